"""Compiling a model's kernels before the first request needs them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from triton_fa.api import flash_attn_with_kvcache, get_scheduler_metadata


def _batches(most: int) -> list[int]:
    """Batch sizes of every kind that is compiled on its own; see `kernels.plans`."""
    steps = [1 << i for i in range(most.bit_length())]
    return sorted({b for step in steps for b in (step, step + 1) if b <= most})


def _query_bounds(wanted: Sequence[int], group: int) -> list[int]:
    """The bounds asked for, and the smaller ones that a call with few tokens comes down to."""
    short = [1 << i for i in range(7) if group << i <= 64]
    return sorted({*wanted, *(s for s in short if s <= max(wanted, default=0))})


def warmup(
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    *,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    page_size: int = 16,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: bool = False,
    return_softmax_lse: bool = False,
    max_batch: int = 256,
    max_seqlens_q: Sequence[int] = (1,),
    max_seqlen_k: int = 8192,
    device: torch.device | str | None = None,
) -> list[tuple[int, int]]:
    """Compile what calls of ver="triton" on a paged cache with these settings will run.

    Runs small calls on tensors of its own, with `cu_seqlens_q` as engines pass it. Later calls of
    that form compile nothing.

    Args:
        num_heads_q: Query heads.
        num_heads_kv: Key heads.
        head_dim: Head size of queries and keys.
        head_dim_v: Head size of values; None: as head_dim.
        dtype: Of queries, keys and values.
        page_size: Tokens of a page.
        causal: As of the calls.
        window_size: As of the calls.
        softcap: As of the calls.
        sinks: Whether the calls have sinks.
        return_softmax_lse: As of the calls.
        max_batch: Largest batch to prepare for.
        max_seqlens_q: The `max_seqlen_q` values to prepare for, e.g. (1, 4, 2048).
        max_seqlen_k: Longest sequence; a window at least as long is no window.
        device: Default: the current CUDA device.

    Returns:
        The (batch, max_seqlen_q) pairs that were run.
    """
    where = torch.device("cuda" if device is None else device)
    dim_v = head_dim if head_dim_v is None else head_dim_v
    width = -(-max_seqlen_k // page_size)
    k_cache = torch.zeros(1, page_size, num_heads_kv, head_dim, dtype=dtype, device=where)
    v_cache = torch.zeros(1, page_size, num_heads_kv, dim_v, dtype=dtype, device=where)
    logits = torch.zeros(num_heads_q, dtype=dtype, device=where) if sinks else None
    done = []
    for batch in _batches(max_batch):
        lengths = torch.ones(batch, dtype=torch.int32, device=where)
        table = torch.zeros(batch, width, dtype=torch.int32, device=where)
        for most in _query_bounds(max_seqlens_q, num_heads_q // num_heads_kv):
            # Few tokens, whatever the bound: lengths say how many there are.
            tokens = max(batch, most)
            q = torch.zeros(tokens, num_heads_q, head_dim, dtype=dtype, device=where)
            cu_seqlens_q = torch.arange(batch + 1, dtype=torch.int32, device=where)
            metadata = get_scheduler_metadata(
                batch,
                most,
                max_seqlen_k,
                num_heads_q,
                num_heads_kv,
                head_dim,
                lengths,
                dtype,
                dim_v,
                cu_seqlens_q,
                page_size=page_size,
                causal=causal,
                window_size=window_size,
                has_softcap=softcap > 0,
                ver="triton",
            )
            flash_attn_with_kvcache(
                q,
                k_cache,
                v_cache,
                cache_seqlens=lengths,
                page_table=table,
                cu_seqlens_q=cu_seqlens_q,
                max_seqlen_q=most,
                causal=causal,
                window_size=window_size,
                softcap=softcap,
                sinks=logits,
                return_softmax_lse=return_softmax_lse,
                scheduler_metadata=metadata,
                ver="triton",
            )
            done.append((batch, most))
    return done

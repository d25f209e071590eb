"""Compiling a model's kernels before the first request needs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from triton_fa.api import flash_attn_with_kvcache, get_scheduler_metadata

MEAN_ROWS = 32
"""Query rows a kv head of the mean sequence; with more of them no bound is seen to overstate (see
`decode_rows` in `kernels.plans`)."""
FULL_ROWS = 1 << 16
"""Query rows of all heads, more than the tiles that a chip computes at the same time."""

Variant = tuple[int, int]
"""(batch, max_seqlen_q) of a call that stands for all calls that compile to the same kernels."""


@dataclass(frozen=True)
class Model:
    """What calls have in common; the fields are those of `warmup`."""

    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    page_size: int
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    sinks: bool
    return_softmax_lse: bool
    max_seqlen_k: int
    device: str
    qv: bool = False
    kv_dtype: torch.dtype | None = None
    descales: bool = False


def _batches(most: int) -> list[int]:
    """Batch sizes of every kind that is compiled on its own; see `kernels.plans`."""
    steps = [1 << i for i in range(most.bit_length())]
    return sorted({b for step in steps for b in (step, step + 1) if b <= most})


def _query_bounds(wanted: Sequence[int], group: int, qv: bool) -> list[int]:
    """The bounds asked for, and the smaller ones that a call with few tokens comes down to."""
    most = max(wanted, default=0)
    if qv:  # see `normalize.problem`
        short = [1 << i for i in range(most.bit_length())]
    else:
        short = [1 << i for i in range(7) if group << i <= 64] + [64]
    return sorted({*wanted, *(s for s in short if s <= most)})


def variants(
    group: int, max_batch: int, max_seqlens_q: Sequence[int], *, qv: bool = False
) -> list[Variant]:
    """What `warmup` runs for `group` query heads a kv head."""
    bounds = _query_bounds(max_seqlens_q, group, qv)
    return [(batch, most) for batch in _batches(max_batch) for most in bounds]


def warmup(
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    *,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    kv_dtype: torch.dtype | None = None,
    descales: bool = False,
    page_size: int = 16,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: bool = False,
    qv: bool = False,
    return_softmax_lse: bool = False,
    max_batch: int = 256,
    max_seqlens_q: Sequence[int] = (1,),
    max_seqlen_k: int = 8192,
    device: torch.device | str | None = None,
    on_variant: Callable[[Variant, int], object] | None = None,
) -> list[Variant]:
    """Compile what calls of ver="triton" on a paged cache with these settings will run.

    Runs small calls on tensors of its own, with `cu_seqlens_q` as engines pass it. Later calls of
    that form compile nothing. There is a variant for each pair of a batch size, about two for every
    power of two up to `max_batch` (16 for 256), and a query bound: those given, 64, and the powers
    of two below the largest that leave at most 64 query rows a kv head (1, 2, 4, … 16 in a model of
    4 query heads each); with `qv`, those given and all powers of two below the largest. Each is
    some calls: several numbers of tokens, with metadata and without. Most find their kernels
    compiled by an earlier one. Float8 calls with factors and without are models of their own.

    Args:
        num_heads_q: Query heads.
        num_heads_kv: Key heads.
        head_dim: Head size of queries and keys.
        head_dim_v: Head size of values; None: as head_dim.
        dtype: Of queries; of metadata, too.
        kv_dtype: Of keys and values; None: as dtype.
        descales: Whether the calls have factors of float8 numbers: `k_descale` and `v_descale`, and
            `q_descale` if queries are float8. Their strides don't matter.
        page_size: Tokens of a page.
        causal: As of the calls.
        window_size: As of the calls.
        softcap: As of the calls.
        sinks: Whether the calls have sinks.
        qv: Whether the calls have `qv`; keys and values are then parts of one cache, values first.
        return_softmax_lse: As of the calls.
        max_batch: Largest batch to prepare for.
        max_seqlens_q: The `max_seqlen_q` values to prepare for, e.g. (1, 4, 2048).
        max_seqlen_k: Longest sequence; a window at least as long is no window.
        device: Default: the current CUDA device.
        on_variant: Called after each pair with it and the number of all, e.g. to show progress.

    Returns:
        The (batch, max_seqlen_q) pairs that were run.
    """
    model = Model(
        num_heads_q,
        num_heads_kv,
        head_dim,
        head_dim if head_dim_v is None else head_dim_v,
        dtype,
        page_size,
        causal,
        window_size,
        softcap,
        sinks,
        return_softmax_lse,
        max_seqlen_k,
        str("cuda" if device is None else device),
        qv,
        kv_dtype,
        descales,
    )
    done = variants(num_heads_q // num_heads_kv, max_batch, max_seqlens_q, qv=qv)
    for variant in done:
        run_variant(model, variant)
        if on_variant is not None:
            on_variant(variant, len(done))
    return done


def _tokens(model: Model, batch: int, most: int) -> list[int]:
    """Numbers of query tokens that lead to kernels of their own: how far `most` overstates.

    Whatever they are, the lengths say that there is one for each sequence.
    """
    if model.qv:
        return [most]
    group = model.num_heads_q // model.num_heads_kv
    means = [1 << i for i in range(most.bit_length()) if i == 0 or group << i <= MEAN_ROWS]
    full = min(batch * most, FULL_ROWS // model.num_heads_q)
    return sorted({max(tokens, most) for tokens in (*(batch * mean for mean in means), full)})


def _table_widths(model: Model) -> list[int]:
    """Pages of a sequence: a window that reaches over all of them is no window."""
    most = -(-model.max_seqlen_k // model.page_size)
    reach = model.window_size[0] + 1
    return [most, *([1] if model.page_size <= reach < most * model.page_size else [])]


def run_variant(model: Model, variant: Variant) -> Variant:
    """Compile the kernels of one variant."""
    for width in _table_widths(model):
        _run(model, variant, width)
    return variant


def _run(model: Model, variant: Variant, table_width: int) -> None:
    batch, most = variant
    where, dtype = torch.device(model.device), model.dtype
    kv_dtype = dtype if model.kv_dtype is None else model.kv_dtype
    page = (1, model.page_size, model.num_heads_kv)
    k_cache = torch.zeros(*page, model.head_dim, dtype=kv_dtype, device=where)
    v_cache = torch.zeros(*page, model.head_dim_v, dtype=kv_dtype, device=where)
    if model.qv:
        width = model.head_dim_v + model.head_dim
        both = torch.zeros(*page, width, dtype=kv_dtype, device=where)
        v_cache, k_cache = both.split([model.head_dim_v, model.head_dim], -1)
    lengths = torch.ones(batch, dtype=torch.int32, device=where)
    table = torch.zeros(batch, table_width, dtype=torch.int32, device=where)
    cu_seqlens_q = torch.arange(batch + 1, dtype=torch.int32, device=where)
    plans: tuple[torch.Tensor | None, ...] = (None,)
    if not model.qv:  # which has no metadata
        metadata = get_scheduler_metadata(
            batch,
            most,
            table_width * model.page_size,
            model.num_heads_q,
            model.num_heads_kv,
            model.head_dim,
            lengths,
            dtype,
            model.head_dim_v,
            cu_seqlens_q,
            page_size=model.page_size,
            causal=model.causal,
            window_size=model.window_size,
            has_softcap=model.softcap > 0,
            ver="triton",
        )
        plans = (metadata, None)
    sinks = torch.zeros(model.num_heads_q, dtype=dtype, device=where) if model.sinks else None
    widths = (model.num_heads_q, model.head_dim_v)
    factors = _factors(model, batch)
    for tokens, plan in product(_tokens(model, batch, most), plans):
        flash_attn_with_kvcache(
            torch.zeros(tokens, model.num_heads_q, model.head_dim, dtype=dtype, device=where),
            k_cache,
            v_cache,
            qv=torch.zeros(tokens, *widths, dtype=dtype, device=where) if model.qv else None,
            cache_seqlens=lengths,
            page_table=table,
            cu_seqlens_q=cu_seqlens_q,
            max_seqlen_q=most,
            causal=model.causal,
            window_size=model.window_size,
            softcap=model.softcap,
            sinks=sinks,
            return_softmax_lse=model.return_softmax_lse,
            scheduler_metadata=plan,
            ver="triton",
            **factors,
        )


def _factors(model: Model, batch: int) -> dict[str, Any]:
    """The factors of float8 numbers that calls have."""
    names = ["k_descale", "v_descale", *(["q_descale"] if model.dtype.itemsize == 1 else [])]
    ones = torch.ones(batch, model.num_heads_kv, device=model.device)
    return dict.fromkeys(names, ones) if model.descales else {}

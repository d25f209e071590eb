"""Attention over keys that are spread over the ranks of a process group.

Each rank attends to the keys it has; the parts are gathered and merged by their log-sum-exp, in the
order of the ranks, so that all ranks end with the same bits. Heads that are spread over ranks need
nothing of this: their results never meet.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist

from triton_fa.api import flash_attn_func, flash_attn_with_kvcache
from triton_fa.errors import ArgumentValueError
from triton_fa.merge import flash_attn_combine

_ALIGNMENT = 16  # of each part, in bytes


def decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cache_seqlens: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    sinks: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One new token of each sequence against all keys of all ranks.

    The newest key of each sequence, its query's own, is on one rank like every other. Which keys a
    rank has makes no difference: whole runs of a sequence, or every second token.

    Args:
        q: (batch, 1, heads_q, head_dim): the same on every rank.
        k_cache: This rank's keys, as of `flash_attn_with_kvcache`.
        v_cache: This rank's values.
        cache_seqlens: (batch,) int32: how many keys of each sequence this rank has; may be 0.
        group: The ranks; None: all.
        sinks: (heads_q,) one extra logit per head; counted once.
        **options: Of `flash_attn_with_kvcache`: `page_table`, `softmax_scale`, `softcap`, ... No
            window: this rank's keys do not know their places in the sequence.

    Returns:
        out like q, and its lse, (batch, heads_q, 1): of all keys, on every rank.

    Raises:
        ArgumentValueError: several query tokens, or a mask.
    """
    if q.dim() != 4 or q.shape[1] != 1:
        raise ArgumentValueError(
            f"q: expected one token of each sequence (batch, 1, heads, head_dim), got {q.shape}"
        )
    _refuse_masks(options)
    out, lse, *_ = flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        cache_seqlens=cache_seqlens,
        sinks=sinks if dist.get_rank(group) == 0 else None,
        return_softmax_lse=True,
        **options,
    )
    return merge_over_ranks(out, lse, group)


def prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    keys_after: int,
    group: dist.ProcessGroup | None = None,
    sinks: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of a prompt, or of a piece of it, against all keys of all ranks.

    Each rank has one run of each sequence's keys. The queries are the last tokens of the sequence,
    as everywhere in this package.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim): the same on every rank.
        k: (batch, any length, heads_kv, head_dim): this rank's keys.
        v: This rank's values.
        keys_after: How many keys of each sequence come after this rank's: 0 on the rank with the
            end of the sequence.
        group: The ranks; None: all.
        sinks: (heads_q,) one extra logit per head; counted once.
        **options: Of `flash_attn_func`: `softmax_scale`, `softcap`, ... No window.

    Returns:
        out like q, and its lse, (batch, heads_q, seqlen_q): of all keys, on every rank.

    Raises:
        ArgumentValueError: a mask other than the causal one, or a negative keys_after.
    """
    if keys_after < 0:
        raise ArgumentValueError(f"keys_after: expected at least 0, got {keys_after}")
    _refuse_masks(options)
    out, lse, *_ = flash_attn_func(
        q,
        k,
        v,
        # Rows are aligned with the end of this rank's keys, and stand so much further right.
        window_size=(-1, keys_after),
        sinks=sinks if dist.get_rank(group) == 0 else None,
        return_softmax_lse=True,
        **options,
    )
    return merge_over_ranks(out, lse, group)


def merge_over_ranks(
    out: torch.Tensor, lse: torch.Tensor, group: dist.ProcessGroup | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge what each rank computed for the same queries over its own keys.

    Args:
        out: (tokens, heads, head_dim_v) or (batch, seqlen, heads, head_dim_v).
        lse: Its float32 log-sum-exp, as the attention functions return it: (heads, tokens) or
            (batch, heads, seqlen).
        group: The ranks, at most 256; None: all.

    Returns:
        The same for the keys of all ranks: the same bits on every rank.
    """
    outs, lses = _gathered((out, lse), group)
    merged, merged_lse = flash_attn_combine(
        outs.float(), lses.transpose(-1, -2), out_dtype=out.dtype
    )
    return merged, merged_lse.transpose(-1, -2)


def _gathered(
    parts: tuple[torch.Tensor, ...], group: dist.ProcessGroup | None
) -> list[torch.Tensor]:
    """Each part of all ranks, (ranks, ...): as bytes, because a collective takes one dtype."""
    ends = list(itertools.accumulate(-(-part.nbytes // _ALIGNMENT) * _ALIGNMENT for part in parts))
    mine = parts[0].new_empty(ends[-1], dtype=torch.uint8)
    ranks = dist.get_world_size(group)
    whole = mine.new_empty(ranks, ends[-1])

    def of(data: torch.Tensor, number: int) -> torch.Tensor:
        part, begin = parts[number], ends[number - 1] if number else 0
        values = data[..., begin : begin + part.nbytes].view(part.dtype)
        return values.view(*data.shape[:-1], *part.shape)

    for number, part in enumerate(parts):
        of(mine, number).copy_(part)
    # One name since torch 2.13, the other before. Both concatenate.
    gather: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    gather(whole.view(-1), mine, group)
    return [of(whole, number) for number in range(len(parts))]


def _refuse_masks(options: dict[str, Any]) -> None:
    for name in ("causal", "window_size", "attention_chunk"):
        if name in options:
            raise ArgumentValueError(f"{name}: expected none, got {options[name]!r}")

"""One call in canonical form: spec, bounds and tensors. Frozen, no logic."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from triton_fa.spec import AttnSpec, Bounds


class Append(NamedTuple):
    """Keys and values that a call writes into its cache first, and the rotation of them and of q.

    k, v: (batch, seqlen_new, heads_kv, dim), or (total_new, heads_kv, dim) with cu_seqlens_k_new.
    rotary_cos, rotary_sin: (positions, rotary_dim / 2).
    """

    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_k_new: torch.Tensor | None = None
    rotary_cos: torch.Tensor | None = None
    rotary_sin: torch.Tensor | None = None
    rotary_seqlens: torch.Tensor | None = None


class BlockSparseTensors(NamedTuple):
    """What a `mask_mod` hides, as lists of key blocks for each block of queries.

    The fields are FlashAttention-4's. A block in no list is hidden from all of its queries, one in
    the full list from none; the mask_mod decides inside the others. Blocks are numbered from the
    sequence's first query and key, and listed in ascending order.

    mask_block_cnt: (batch, heads, query blocks) int32: how many entries of each list count.
    mask_block_idx: (batch, heads, query blocks, entries) int32. Batch and heads may be 1, for all;
        where several query heads share a kv head, heads must be.
    full_block_cnt, full_block_idx: the same of the full blocks, or None without any.
    cu_total_m_blocks, cu_block_idx_offsets: None; lists packed over sequences are not taken.
    block_size: (queries, keys) of a block, multiples of 16 up to 2**20.
    """

    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor | None = None
    full_block_idx: torch.Tensor | None = None
    cu_total_m_blocks: torch.Tensor | None = None
    cu_block_idx_offsets: torch.Tensor | None = None
    block_size: tuple[int, int] | None = None


class Tensors(NamedTuple):
    """The tensors of a call, in canonical spelling; the caller's own objects, never copies.

    q: (batch, seqlen_q, heads_q, head_dim), or (total_q, heads_q, head_dim) with cu_seqlens_q.
    k, v: (batch, seqlen_k, heads_kv, dim) dense, (total_k, heads_kv, dim) packed, or
    (num_pages, page_size, heads_kv, dim) paged. cache_batch_idx names a sequence's row of a dense
    cache or of page_table; cache_leftpad is its first key in use. qv: q's second part, scored
    against v; with the feature "only_qv" q and k stand in for it and v. The descales are
    (batch, heads_kv) float32 factors of float8 numbers. aux is what score_mod and mask_mod read.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor | None = None
    page_table: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    seqused_q: torch.Tensor | None = None
    seqused_k: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    scheduler_metadata: torch.Tensor | None = None
    cache_batch_idx: torch.Tensor | None = None
    cache_leftpad: torch.Tensor | None = None
    qv: torch.Tensor | None = None
    q_descale: torch.Tensor | None = None
    k_descale: torch.Tensor | None = None
    v_descale: torch.Tensor | None = None
    aux: tuple[torch.Tensor, ...] | None = None
    append: Append | None = None
    blocks: BlockSparseTensors | None = None


class Lengths(NamedTuple):
    """The tensors that say how long the sequences are; see `Tensors`."""

    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    seqused_q: torch.Tensor | None = None
    seqused_k: torch.Tensor | None = None
    cu_seqlens_k_new: torch.Tensor | None = None
    cache_leftpad: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """A validated call. Everything but the values inside `tensors` is fixed by the launch key."""

    spec: AttnSpec
    bounds: Bounds
    tensors: Tensors
    return_lse: bool

    def without_tensors(self) -> Problem:
        """The same problem for a closure that outlives the call and must not keep its memory."""
        nothing = torch.empty(0, device="meta")
        return replace(self, tensors=Tensors(nothing, nothing, nothing))


class AttnResult(NamedTuple):
    """`lse` is float32 natural log, (heads_q, total_q) packed or (batch, heads_q, seqlen_q)."""

    out: torch.Tensor
    lse: torch.Tensor | None
    extra: tuple[torch.Tensor, ...] = ()  # FA3's accumulators

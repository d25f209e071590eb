"""The scheduler metadata: what one step's layers share about its lengths, in one small kernel.

int32, `4 * br + 1` entries with br = batch rounded up to a multiple of 4; per sequence:
    [0, br)        inclusive prefix sum of decode tiles (`line.py`)
    [br, 2 br)     visible keys
    [2 br, 3 br)   the sequences in prefill order, longest first, and 2^16 times the inverse
    [3 br, 4 br)   inclusive prefix sum of query row tiles in that order
    [4 br]         a tag of layout, tile sizes and window
Nothing in it is trusted. The prefill kernel takes the order if it is one; all else the attention
kernels find from the lengths, which costs no more than checking.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_fa.kernels.line import decode_work
from triton_fa.kernels.primitives import (
    VARYING,
    key_span,
    left_padding,
    query_span,
    row_tiles,
    visible_keys,
)


@triton.jit
def visible_count(seq_idx, mask, lengths, windows):
    """Keys that sequences see."""
    _, seqlen_q = query_span(seq_idx, mask, lengths)
    _, seqlen_k = key_span(seq_idx, mask, lengths)
    padding = left_padding(seq_idx, mask, seqlen_k, lengths)
    begin, end = visible_keys(0, seqlen_q, seqlen_k - seqlen_q, padding, seqlen_k, windows)
    return tl.where(mask, end - begin, 0)


@triton.jit
def fill_block(
    start,
    decode_before,
    rows_before,
    plan_ptr,
    batch,
    segment,
    lengths,
    windows,
    GROUP: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
    HAS_PREFILL: tl.constexpr,
    ORDERED: tl.constexpr,
):
    """Fill the entries of BLOCK_B sequences from `start` on; returns their decode and row tiles."""
    order_ptr = plan_ptr + 2 * segment
    idx = start + tl.arange(0, BLOCK_B)
    mask = idx < batch
    tiles = decode_work(idx, mask, lengths, windows, GROUP, None, MAX_ROWS, BLOCK_N)[7]
    visible = visible_count(idx, mask, lengths, windows)
    tl.store(plan_ptr + segment + idx, visible, mask=mask)
    rows = idx * 0
    if HAS_PREFILL:
        rows = row_tiles(idx, mask, lengths, GROUP, MAX_ROWS, BLOCK_M)
    # Each entry: a sequence in its lower half, in the upper one the place of sequence `idx`.
    if ORDERED:
        # Longest first; equal lengths in batch order. Absent sequences go last.
        work = rows.to(tl.int64) * (visible // BLOCK_N + 1)
        work = tl.where(mask, tl.minimum(work, 0xFFFFF), -1).to(tl.int32)
        keys = tl.sort(work * BLOCK_B + (BLOCK_B - 1 - idx), descending=True)
        order = BLOCK_B - 1 - (keys & (BLOCK_B - 1))
        rows = row_tiles(order, order < batch, lengths, GROUP, MAX_ROWS, BLOCK_M)
        halves_ptr = order_ptr.to(tl.pointer_type(tl.int16))
        tl.store(halves_ptr + 2 * idx, order.to(tl.int16), mask=mask)
        tl.store(halves_ptr + 2 * order + 1, idx.to(tl.int16), mask=mask)
    else:
        tl.store(order_ptr + idx, idx & 0xFFFF | idx << 16, mask=mask)
    row_sums = rows
    if HAS_PREFILL:
        row_sums = rows_before + tl.cumsum(rows, 0)
    tl.store(plan_ptr + 3 * segment + idx, row_sums, mask=mask)
    tl.store(plan_ptr + idx, decode_before + tl.cumsum(tiles, 0), mask=mask)
    return tiles, rows


@triton.jit(do_not_specialize=VARYING)
def schedule_kernel(
    plan_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    seqused_q_ptr,
    seqused_k_ptr,
    cu_seqlens_k_new_ptr,
    leftpad_ptr,
    batch,
    segment,
    total_q,
    total_k,
    fixed_seqlen_q,
    fixed_seqlen_k,
    max_seqlen_k,
    fixed_seqlen_new,
    window_left,
    window_right,
    attention_chunk,
    tag,
    GROUP: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    HAS_PREFILL: tl.constexpr,
    ORDERED: tl.constexpr,
):
    """Fill the metadata of `batch` sequences; one program. ORDERED: longest first, of one block."""
    lengths = (
        cu_seqlens_q_ptr,
        seqused_q_ptr,
        total_q,
        fixed_seqlen_q,
        cu_seqlens_k_ptr,
        seqused_k_ptr,
        total_k,
        fixed_seqlen_k,
        max_seqlen_k,
        cu_seqlens_k_new_ptr,
        fixed_seqlen_new,
        leftpad_ptr,
    )
    windows = (window_left, window_right, attention_chunk)
    if ONE_BLOCK:
        fill_block(
            0,
            0,
            0,
            plan_ptr,
            batch,
            segment,
            lengths,
            windows,
            GROUP,
            MAX_ROWS,
            BLOCK_N,
            BLOCK_M,
            BLOCK_B,
            HAS_PREFILL,
            ORDERED,
        )
    else:
        decode_before = 0
        rows_before = 0
        for start in tl.range(0, batch, BLOCK_B, num_stages=1):
            tiles, rows = fill_block(
                start,
                decode_before,
                rows_before,
                plan_ptr,
                batch,
                segment,
                lengths,
                windows,
                GROUP,
                MAX_ROWS,
                BLOCK_N,
                BLOCK_M,
                BLOCK_B,
                HAS_PREFILL,
                ORDERED,
            )
            decode_before += tl.sum(tiles, 0)
            if HAS_PREFILL:
                rows_before += tl.sum(rows, 0)
    # The padding of each segment, so that equal lengths give equal bits.
    pad = batch + tl.arange(0, 4)
    for part in tl.static_range(4):
        tl.store(plan_ptr + part * segment + pad, 0, mask=pad < segment)
    tl.store(plan_ptr + 4 * segment, tag)

"""Merges the partial results that `decode.py` left of sequences cut across programs."""

from __future__ import annotations

import triton
import triton.language as tl

from triton_fa.kernels.compat import grid_dependency_wait
from triton_fa.kernels.line import (
    chunk_tiles,
    decode_work,
    holder_of,
    line_units,
    locate,
    pieces_until,
    program_range,
    range_of,
    total_and_tiles,
    total_and_units_before,
)
from triton_fa.kernels.primitives import LOG2E, NO_SCORE, VARYING, finish, merge_factors


@triton.jit(do_not_specialize=VARYING)
def combine_kernel(
    out_ptr,
    lse_ptr,
    part_ptr,  # as decode_kernel wrote it
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    seqused_q_ptr,
    seqused_k_ptr,
    cu_seqlens_k_new_ptr,
    leftpad_ptr,
    sinks_ptr,
    out_stride_b,
    out_stride_t,
    out_stride_h,
    lse_stride_b,
    lse_stride_t,
    lse_stride_h,
    batch,
    total_q,
    total_k,
    fixed_seqlen_q,
    fixed_seqlen_k,
    max_seqlen_k,
    fixed_seqlen_new,
    programs,
    num_slots,
    program_slots,
    smallest_chunk,
    most_pieces,
    window_left,
    window_right,
    attention_chunk,
    NUM_HEADS_KV: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    LANES_DIVIDE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MIN_ROWS: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    ONE_BY_ONE: tl.constexpr,
    BY_SEQUENCE: tl.constexpr,
    HAS_LSE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (v, i, j) merges rows [i BLOCK_R, …) and columns [j BLOCK_V, …) of a lane of sequence
    v // LANES, or, where there are more of those than ranges, of the one that range v leaves
    half-way.

    m = max_p m_p; l = sum_p 2^(m_p - m) l_p; out = sum_p 2^(m_p - m) acc_p / l, in order of p; with
    chunking one p after the other. Everything but the partials is loaded before the attention
    kernel has ended.
    """
    HAS_SINK: tl.constexpr = sinks_ptr is not None
    LANES: tl.constexpr = NUM_HEADS_KV * ROW_BLOCKS
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
    part_stat_ptr = part_ptr + num_slots.to(tl.int64) * (ROWS * V)
    pid = tl.program_id(0)
    CHUNKED: tl.constexpr = most_pieces is not None and not ONE_BY_ONE
    if ONE_BY_ONE:
        lane = pid % LANES
        seq_idx = pid // LANES
        chunking = (smallest_chunk, most_pieces)
        total_units, before = total_and_units_before(
            seq_idx,
            batch,
            lengths,
            windows,
            chunking,
            GROUP,
            MIN_ROWS,
            MAX_ROWS,
            BLOCK_N,
            BLOCK_B,
        )
        first_q, seqlen_q, _, _, _, _, _, num_tiles = decode_work(
            seq_idx, seq_idx < batch, lengths, windows, GROUP, MIN_ROWS, MAX_ROWS, BLOCK_N
        )
        pieces = line_units(num_tiles, chunking)
        ours = pieces > 1
        first_slot = lane * total_units + before
    else:
        total_tiles, tiles = total_and_tiles(
            batch, lengths, windows, GROUP, MIN_ROWS, MAX_ROWS, BLOCK_N, BLOCK_B, ONE_BLOCK
        )
        lane, index, first, share, extra = program_range(
            pid, programs, total_tiles, LANES, LANES_DIVIDE
        )
        stop = first + share + (index < extra).to(tl.int32)
        # With chunking a range may end where the next line begins.
        final = stop if CHUNKED else stop - 1
        if BY_SEQUENCE:
            lane = pid % LANES
        elif not LANES_DIVIDE:
            lane = final // tl.maximum(total_tiles, 1)
        if LANES_DIVIDE:
            line_start = 0
            range_start = lane * (programs // LANES)
        else:
            line_start = lane * total_tiles
            range_start = 0
        if BY_SEQUENCE:
            seq_idx = pid // LANES
            before = tl.sum(tl.where(tl.arange(0, BLOCK_B) < seq_idx, tiles, 0), 0)
        else:
            seq_idx, before, _ = locate(
                tl.maximum(final - line_start, 0),
                tiles,
                batch,
                lengths,
                windows,
                GROUP,
                MIN_ROWS,
                MAX_ROWS,
                BLOCK_N,
                BLOCK_B,
                ONE_BLOCK,
            )
        first_q, seqlen_q, _, _, _, _, _, num_tiles = decode_work(
            seq_idx, seq_idx < batch, lengths, windows, GROUP, MIN_ROWS, MAX_ROWS, BLOCK_N
        )
        begin = line_start + before
        if CHUNKED:
            chunk = chunk_tiles(num_tiles, (smallest_chunk, most_pieces))
            pieces = (num_tiles + chunk - 1) // chunk
            if BY_SEQUENCE:
                index, _ = holder_of(0, begin, num_tiles, chunk, share, extra)
                first = index * share + tl.minimum(index, extra)
                stop = first + share + (index < extra).to(tl.int32)
            merged = pieces_until(stop - begin, num_tiles, chunk)
            entered = pieces_until(tl.maximum(first - begin, 0), num_tiles, chunk)
            ours = (entered == 0) & (merged > 0) & (merged < pieces)
        else:
            owner = range_of(begin, share, extra)
            pieces = range_of(begin + num_tiles - 1, share, extra) - owner + 1
            ours = pieces > 1
            if not BY_SEQUENCE:
                ours &= (owner == index) & (final >= first)
            first_slot = 2 * (range_start + owner)
        # Of launches for some numbers of rows nobody has any where the line is empty.
        ours &= total_tiles > 0
    if ours:
        part_rows = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
        head = lane // ROW_BLOCKS
        rows = lane % ROW_BLOCKS * ROWS + part_rows
        dims = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
        nths = tl.arange(0, BLOCK_P)
        row_max = tl.full([BLOCK_R], NO_SCORE, tl.float32)
        row_sum = tl.zeros([BLOCK_R], tl.float32)
        acc = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
        q_head = head * GROUP + rows % GROUP
        row_mask = rows < seqlen_q * GROUP
        written = tl.where(row_mask, pieces, 0)  # of other rows nobody wrote anything
        if HAS_SINK:
            sink = tl.load(sinks_ptr + q_head, mask=row_mask, other=0.0).to(tl.float32) * LOG2E
        if PDL:
            grid_dependency_wait()
        if CHUNKED:
            # What range v has merged, and then every piece; a few loads run at a time.
            part_row = ((range_start + index) * program_slots).to(tl.int64) * ROWS + part_rows
            stat = part_stat_ptr + part_row * 2
            row_max = tl.load(stat, mask=row_mask, other=NO_SCORE, cache_modifier=".cg")
            row_sum = tl.load(stat + 1, mask=row_mask, other=0.0, cache_modifier=".cg")
            acc = tl.load(
                part_ptr + part_row[:, None] * V + dims[None, :],
                mask=row_mask[:, None] & (dims < V)[None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            for start in tl.range(merged, pieces, BLOCK_P, num_stages=1):
                holder, earlier = holder_of(start + nths, begin, num_tiles, chunk, share, extra)
                slots = (range_start + holder) * program_slots + 1 + earlier
                for nth in tl.static_range(BLOCK_P):
                    live = start + nth < written
                    slot = tl.sum(tl.where(nths == nth, slots, 0), 0)
                    part_row = slot.to(tl.int64) * ROWS + part_rows
                    stat = part_stat_ptr + part_row * 2
                    part_max = tl.load(stat, mask=live, other=NO_SCORE, cache_modifier=".cg")
                    part_sum = tl.load(stat + 1, mask=live, other=0.0, cache_modifier=".cg")
                    part = tl.load(
                        part_ptr + part_row[:, None] * V + dims[None, :],
                        mask=live[:, None] & (dims < V)[None, :],
                        other=0.0,
                        cache_modifier=".cg",
                    )
                    new_max, alpha, weight = merge_factors(row_max, part_max)
                    row_sum = tl.fma(row_sum, alpha, part_sum * weight)
                    acc = tl.fma(
                        acc,
                        tl.broadcast_to(alpha[:, None], [BLOCK_R, BLOCK_V]),
                        part * weight[:, None],
                    )
                    row_max = new_max
        else:
            for start in tl.range(0, pieces, BLOCK_P, num_stages=1):
                nth = start + nths
                live = nth[:, None] < written[None, :]
                slot = first_slot + nth
                if not ONE_BY_ONE:
                    # The first piece began with the sequence: what its program left half-way.
                    slot += nth + (nth == 0).to(tl.int32)
                part_row = slot.to(tl.int64)[:, None] * ROWS + part_rows[None, :]
                stat = part_stat_ptr + part_row * 2
                part_max = tl.load(stat, mask=live, other=NO_SCORE, cache_modifier=".cg")
                part_sum = tl.load(stat + 1, mask=live, other=0.0, cache_modifier=".cg")
                part = tl.load(
                    part_ptr + part_row[:, :, None] * V + dims[None, None, :],
                    mask=live[:, :, None] & (dims < V)[None, None, :],
                    other=0.0,
                    cache_modifier=".cg",
                )
                new_max = tl.maximum(row_max, tl.max(part_max, 0))
                weight = tl.exp2(part_max - new_max[None, :])
                alpha = tl.exp2(row_max - new_max)
                # Rounded before it is added: else each thread with the row has a sum of its own.
                weighted = tl.fma(part_sum, weight, 0.0)
                row_sum = row_sum * alpha + tl.sum(weighted, 0)
                acc = acc * alpha[:, None] + tl.sum(part * weight[:, :, None], 0)
                row_max = new_max
        if HAS_SINK:
            factor, lse = finish(row_max, row_sum, sink, True)
        else:
            factor, lse = finish(row_max, row_sum, 0.0, False)
        token = first_q + rows // GROUP
        out_row = (
            seq_idx.to(tl.int64) * out_stride_b
            + token.to(tl.int64) * out_stride_t
            + q_head.to(tl.int64) * out_stride_h
        )
        tl.store(
            out_ptr + out_row[:, None] + dims[None, :],
            tl.where((row_sum != 0)[:, None], acc * factor[:, None], 0.0).to(
                out_ptr.dtype.element_ty
            ),
            mask=row_mask[:, None] & (dims < HEAD_DIM_V)[None, :],
        )
        if HAS_LSE and tl.program_id(2) == 0:
            lse_row = (
                seq_idx.to(tl.int64) * lse_stride_b
                + token.to(tl.int64) * lse_stride_t
                + q_head.to(tl.int64) * lse_stride_h
            )
            tl.store(lse_ptr + lse_row, lse, mask=row_mask)
    elif PDL and pid == 0:
        # The grid must not end before the attention kernel: what follows waits for it alone.
        grid_dependency_wait()

"""Attention of few query rows against long key sequences, on a balanced schedule.

The key tiles of all sequences form one line (each sequence has at least one tile). A fixed number
of persistent programs take equal contiguous ranges of it, for one lane (a kv head, or a block of
its query rows) or, where the lanes don't divide the programs, of the line repeated for every lane.
So a program leaves at most two partial results: of the sequence it enters half-way (slot 2v) and of
the one it leaves half-way (slot 2v + 1); a sequence inside one range is written to the output
directly. Pieces of one sequence belong to consecutive v, which is what `combine.py` merges, in that
order.

With chunking (`line.py`) ranges are made of whole pieces of sequences. Every piece is computed on
its own and the pieces of a sequence are merged one after the other in their order: what is computed
for a sequence then depends on its own length alone, or is cut into no more pieces than asked for.
As long as a program has a sequence from its first key on, it merges each piece with what it left of
those before (slot 0 of its own); of a sequence that it enters half-way it leaves every piece (slots
from 1 on), and `combine.py` goes on in the same way.

Grid and workspace depend on shapes only; the ranges are found on the device from the lengths.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_fa.kernels.compat import grid_dependency_release
from triton_fa.kernels.line import (
    chunk_tiles,
    decode_work,
    locate,
    piece_range,
    program_range,
    total_and_tiles,
)
from triton_fa.kernels.primitives import (
    LOG2E,
    NEG_INF,
    NO_SCORE,
    VARYING,
    cache_row,
    divided,
    dot,
    finish,
    from_fp8,
    joined,
    largest,
    masked_by,
    merge_factors,
    page_ids,
    parted,
    power_above,
    scored_by,
    seen_keys,
    softcapped,
    split_fp8,
)


@triton.jit
def load_panel(base_ptr, offsets, dims, dim_size, MASKED: tl.constexpr):
    """Rows `offsets` of a [rows, dim] tensor, dims beyond `dim_size` as zeros."""
    if MASKED:
        return tl.load(
            base_ptr + offsets[:, None] + dims[None, :], mask=(dims < dim_size)[None, :], other=0
        )
    else:
        return tl.load(base_ptr + offsets[:, None] + dims[None, :])


@triton.jit
def load_panels(
    base_ptr,
    offsets,
    dims,
    DIM: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    FORMAT: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """The panels of rows `offsets`: one, or two where P1 is not 0.

    Of float8 numbers, which are the even and the odd columns. Two of them are loaded as 16 bits;
    bytes are put together here where an odd stride or address lets nothing wider be loaded.
    """
    if FORMAT == "":
        panel0 = load_panel(base_ptr, offsets, dims[0], DIM, P1 == 0 and P0 != DIM)
        if P1 > 0:
            return panel0, load_panel(base_ptr, offsets, dims[1], DIM, P0 + P1 != DIM)
        else:
            return (panel0,)
    else:
        pairs = tl.arange(0, P0)
        if base_ptr.dtype.element_ty == tl.int16:
            both = load_panel(base_ptr, offsets, pairs, DIM // 2, 2 * P0 != DIM)
        else:
            low = load_panel(base_ptr, offsets, 2 * pairs, DIM, 2 * P0 != DIM)
            high = load_panel(base_ptr, offsets, 2 * pairs + 1, DIM, 2 * P0 != DIM)
            both = low.to(tl.int16) | high.to(tl.int16) << 8
        return split_fp8(both, FORMAT, HARDWARE)


@triton.jit
def descale(tensor, seq_idx, head):
    """What float8 numbers of a sequence and kv head are multiplied by; 1 where nothing was given.

    `tensor` is (pointer, batch stride, head stride).
    """
    if tensor[0] is None:
        return 1.0
    else:
        return tl.load(tensor[0] + seq_idx.to(tl.int64) * tensor[1] + head * tensor[2])


@triton.jit
def folded(x, COLUMNS: tl.constexpr):
    """[rows, columns] summed to as many columns."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // COLUMNS, COLUMNS]), 1)


@triton.jit
def load_queries(
    base_ptr,
    offsets,
    dims,
    row_mask,
    DIM: tl.constexpr,
    FORMAT: tl.constexpr,
    NEGATE: tl.constexpr,
):
    """Query rows, zeros where there are none."""
    q = tl.load(
        base_ptr + offsets[:, None] + dims[None, :],
        mask=row_mask[:, None] & (dims < DIM)[None, :],
        other=0,
    )
    q = from_fp8(q, FORMAT, "bits")
    if NEGATE:
        q = -q
    return q


@triton.jit(do_not_specialize=VARYING)
def decode_kernel(
    out_ptr,  # q's shape with head_dim_v
    lse_ptr,  # [heads_q, total_q] or [batch, heads_q, seqlen_q], float32
    part_ptr,  # float32: [slots, ROWS, V0 + V1] accumulators, then [slots, ROWS, 2]
    q_ptr,
    k_ptr,
    v_ptr,
    page_table_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    seqused_q_ptr,
    seqused_k_ptr,
    cu_seqlens_k_new_ptr,
    leftpad_ptr,
    batch_idx_ptr,
    sinks_ptr,
    qv_ptr,  # q's second part, scored against v
    q_descale_ptr,  # [batch, heads_kv] float32, as the two below
    k_descale_ptr,
    v_descale_ptr,
    aux_ptr,  # a tuple of pointers for the functions below, or None
    out_stride_b,
    out_stride_t,
    out_stride_h,
    lse_stride_b,
    lse_stride_t,
    lse_stride_h,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    qv_stride_b,
    qv_stride_t,
    qv_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    q_descale_stride_b,
    q_descale_stride_h,
    k_descale_stride_b,
    k_descale_stride_h,
    v_descale_stride_b,
    v_descale_stride_h,
    table_stride,
    batch,
    total_q,
    total_k,
    fixed_seqlen_q,
    fixed_seqlen_k,
    max_seqlen_k,
    fixed_seqlen_new,
    num_rows,
    num_pages,
    programs,
    num_slots,
    program_slots,
    smallest_chunk,
    most_pieces,
    window_left,
    window_right,
    attention_chunk,
    scale_log2,
    softcap_log2,
    NUM_HEADS_KV: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    LANES_DIVIDE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    MIN_ROWS: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    ONE_TOKEN: tl.constexpr,
    SAME_STRIDES: tl.constexpr,
    WIDE_SLOTS: tl.constexpr,
    LAZY_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_LSE: tl.constexpr,
    NEGATE: tl.constexpr,
    ONLY_QV: tl.constexpr,
    SCORE_MOD: tl.constexpr,
    MASK_MOD: tl.constexpr,
    Q_FORMAT: tl.constexpr,
    KEY_FORMAT: tl.constexpr,
    FP8_HARDWARE: tl.constexpr,
    HOLDS_Q: tl.constexpr,
    BY_16_BYTES: tl.constexpr,
    IEEE: tl.constexpr,
    PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out = softmax(scale * q k^T + mask) v over the program's range of key tiles."""
    HAS_SINK: tl.constexpr = sinks_ptr is not None
    HAS_LEFT: tl.constexpr = window_left is not None
    HAS_RIGHT: tl.constexpr = window_right is not None
    ATTENTION_CHUNKED: tl.constexpr = attention_chunk is not None
    HAS_ROWS: tl.constexpr = batch_idx_ptr is not None
    PAGED: tl.constexpr = page_table_ptr is not None
    HAS_QV: tl.constexpr = qv_ptr is not None
    HAS_K: tl.constexpr = not ONLY_QV
    # bfloat16 queries beside float8 keys are computed with as float16.
    PAIRS: tl.constexpr = KEY_FORMAT != ""
    DIVIDES: tl.constexpr = PAIRS and q_ptr.dtype.element_ty == tl.bfloat16
    HAS_MODS: tl.constexpr = SCORE_MOD is not None or MASK_MOD is not None
    COUNTS_PADDING: tl.constexpr = ATTENTION_CHUNKED or HAS_MODS
    IN_BASE_2: tl.constexpr = HAS_SOFTCAP or SCORE_MOD is not None
    LANES: tl.constexpr = NUM_HEADS_KV * ROW_BLOCKS
    # A tile lies inside one page: one page number a tile. Elsewhere tiles start anywhere.
    FROM_START: tl.constexpr = not HAS_LEFT and not ATTENTION_CHUNKED and leftpad_ptr is None
    WHOLE_TILES: tl.constexpr = PAGED and PAGE_SIZE % BLOCK_N == 0 and FROM_START
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
    q_descales = (q_descale_ptr, q_descale_stride_b, q_descale_stride_h)
    k_descales = (k_descale_ptr, k_descale_stride_b, k_descale_stride_h)
    v_descales = (v_descale_ptr, v_descale_stride_b, v_descale_stride_h)
    # Row maximum (base 2) and row sum of every partial result.
    if part_ptr is not None:
        part_stat_ptr = part_ptr + num_slots.to(tl.int64) * (ROWS * (V0 + V1))
    pid = tl.program_id(0)
    CHUNKED: tl.constexpr = most_pieces is not None
    total_tiles, tiles = total_and_tiles(
        batch, lengths, windows, GROUP, MIN_ROWS, MAX_ROWS, BLOCK_N, BLOCK_B, ONE_BLOCK
    )
    lane, index, position, share, extra = program_range(
        pid, programs, total_tiles, LANES, LANES_DIVIDE
    )
    count = share + (index < extra).to(tl.int32)
    slot = index
    if LANES_DIVIDE:
        slot += lane * (programs // LANES)
    else:
        lane = position // tl.maximum(total_tiles, 1)
        position -= lane * total_tiles
    if CHUNKED:
        chunking = (smallest_chunk, most_pieces)
        slot *= program_slots
        piece_slot = slot + 1
        lane, seq_idx, tile, count = piece_range(
            lane,
            position,
            count,
            tiles,
            total_tiles,
            batch,
            lengths,
            windows,
            chunking,
            GROUP,
            MIN_ROWS,
            MAX_ROWS,
            BLOCK_N,
            BLOCK_B,
            ONE_BLOCK,
            LANES_DIVIDE,
        )
    else:
        slot *= 2
    if PDL:
        grid_dependency_release()
    if count > 0:
        if not CHUNKED:
            seq_idx, before, _ = locate(
                position,
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
            tile = position - before
        first_q, seqlen_q, first_k, begin, end, offset, padding, num_tiles = decode_work(
            seq_idx, seq_idx < batch, lengths, windows, GROUP, MIN_ROWS, MAX_ROWS, BLOCK_N
        )
        after = tl.where(seq_idx + 1 < batch, seq_idx + 1, 0)
        first_q1, seqlen_q1, first_k1, begin1, end1, offset1, padding1, num_tiles1 = decode_work(
            after, after < batch, lengths, windows, GROUP, MIN_ROWS, MAX_ROWS, BLOCK_N
        )
        # Where its keys are: of a dense cache, or of the page table.
        row = seq_idx
        if HAS_ROWS:
            row = cache_row(seq_idx, seq_idx < batch, batch_idx_ptr, num_rows)
            row1 = cache_row(after, after < batch, batch_idx_ptr, num_rows)
        rows = tl.arange(0, BLOCK_M)
        token = rows // GROUP
        cols = tl.arange(0, BLOCK_N)
        dims0 = tl.arange(0, D0)
        vdims0 = tl.arange(0, V0)
        if PAIRS:
            dims0 = 2 * dims0
            dims1 = dims0 + 1
            vdims0 = 2 * vdims0
            vdims1 = vdims0 + 1
        else:
            dims1 = D0 + tl.arange(0, max(D1, 1))
            vdims1 = V0 + tl.arange(0, max(V1, 1))
        dims = (dims0, dims1)
        vdims = (vdims0, vdims1)
        q_rows = token.to(tl.int64) * q_stride_t + (rows % GROUP).to(tl.int64) * q_stride_h
        if HAS_QV:
            qv_rows = token.to(tl.int64) * qv_stride_t + (rows % GROUP).to(tl.int64) * qv_stride_h

        if CHUNKED:
            chunk = chunk_tiles(num_tiles, chunking)
            piece_end = tl.minimum(tile + chunk, num_tiles)
        if PAGED:
            if WHOLE_TILES:
                ahead = tl.minimum(begin + tile * BLOCK_N, tl.maximum(end - 1, 0))
            else:
                ahead = tl.minimum(begin + tile * BLOCK_N + cols, tl.maximum(end - 1, 0))
            page = page_ids(
                page_table_ptr,
                row.to(tl.int64) * table_stride,
                ahead,
                num_pages,
                (ahead * 0) < end,
                PAGE_SIZE,
            )
        else:
            page = row * 1
        # Whether the tiles since the last result began with the sequence's first.
        whole = (tile == 0).to(tl.int32)
        row_max = tl.full([BLOCK_M], NO_SCORE, tl.float32)
        row_sum = tl.zeros([BLOCK_M, SUMS], tl.float32)
        acc0 = tl.zeros([BLOCK_M, V0], tl.float32)
        if V1 > 0:
            acc1 = tl.zeros([BLOCK_M, V1], tl.float32)
        if HOLDS_Q:
            held_q = tl.zeros([BLOCK_M, D0], tl.int32)
            held_scale = tl.zeros([BLOCK_M], tl.float32)
        for step in tl.range(0, count):
            # Where the next tile is, and its page numbers: one iteration ahead of its K and V.
            last = tile + 1 >= num_tiles
            wrap = last & (seq_idx + 1 >= batch)
            seq_idx_ = tl.where(last, after, seq_idx)
            lane_ = lane + wrap.to(tl.int32)
            tile_ = tl.where(last, 0, tile + 1)
            first_q_ = tl.where(last, first_q1, first_q)
            seqlen_q_ = tl.where(last, seqlen_q1, seqlen_q)
            first_k_ = tl.where(last, first_k1, first_k)
            begin_ = tl.where(last, begin1, begin)
            end_ = tl.where(last, end1, end)
            offset_ = tl.where(last, offset1, offset)
            num_tiles_ = tl.where(last, num_tiles1, num_tiles)
            row_ = seq_idx_
            if HAS_ROWS:
                row_ = tl.where(last, row1, row)
            if COUNTS_PADDING:
                padding_ = tl.where(last, padding1, padding)
            # Unconditional: a branch here would keep the page numbers out of the pipeline.
            after = tl.where(seq_idx_ + 1 < batch, seq_idx_ + 1, 0)
            first_q1, seqlen_q1, first_k1, begin1, end1, offset1, padding1, num_tiles1 = (
                decode_work(
                    after, after < batch, lengths, windows, GROUP, MIN_ROWS, MAX_ROWS, BLOCK_N
                )
            )
            if HAS_ROWS:
                row1 = cache_row(after, after < batch, batch_idx_ptr, num_rows)
            if PAGED:
                if WHOLE_TILES:
                    ahead = tl.minimum(begin_ + tile_ * BLOCK_N, tl.maximum(end_ - 1, 0))
                else:
                    ahead = tl.minimum(begin_ + tile_ * BLOCK_N + cols, tl.maximum(end_ - 1, 0))
                page_ = page_ids(
                    page_table_ptr,
                    row_.to(tl.int64) * table_stride,
                    ahead,
                    num_pages,
                    (ahead * 0) < end_,
                    PAGE_SIZE,
                )
            else:
                page_ = row_ * 1

            # This tile. Tokens are clamped into the visible range, not masked: unused slots may
            # hold NaN and are never read (but for a sequence without keys, whose sum stays 0).
            head = lane // ROW_BLOCKS
            if ROW_BLOCKS > 1:
                rows = lane % ROW_BLOCKS * ROWS + tl.arange(0, BLOCK_M)
                token = rows // GROUP
                q_rows = token.to(tl.int64) * q_stride_t + (rows % GROUP).to(tl.int64) * q_stride_h
                qv_rows = token.to(tl.int64) * qv_stride_t
                qv_rows += (rows % GROUP).to(tl.int64) * qv_stride_h
            q_base = (
                q_ptr
                + seq_idx.to(tl.int64) * q_stride_b
                + first_q.to(tl.int64) * q_stride_t
                + (head * GROUP).to(tl.int64) * q_stride_h
            )
            row_mask = rows < seqlen_q * GROUP
            tokens = begin + tile * BLOCK_N + cols
            inside = tl.maximum(tl.minimum(tokens, end - 1), 0)
            if PAGED:
                slot_in_page = inside % PAGE_SIZE
            else:
                # The clamp is for an empty sequence at the end of packed keys.
                slot_in_page = tl.minimum(inside + first_k, total_k - 1)
            if WIDE_SLOTS:
                slot_in_page = slot_in_page.to(tl.int64)
            k_base = k_ptr + head.to(tl.int64) * k_stride_h
            v_base = v_ptr + head.to(tl.int64) * v_stride_h
            k_rows = page.to(tl.int64) * k_stride_b + slot_in_page * k_stride_t
            if SAME_STRIDES:
                v_rows = k_rows
            else:
                v_rows = page.to(tl.int64) * v_stride_b + slot_in_page * v_stride_t
            if BY_16_BYTES:
                k_base = tl.multiple_of(k_base, 16)
                k_rows = tl.multiple_of(k_rows, [8])
                v_base = tl.multiple_of(v_base, 16)
                v_rows = tl.multiple_of(v_rows, [8])
            raw = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if HOLDS_Q:
                if (step == 0) | (tile == 0):
                    even = load_queries(q_base, q_rows, dims0, row_mask, HEAD_DIM, Q_FORMAT, NEGATE)
                    odd = load_queries(q_base, q_rows, dims1, row_mask, HEAD_DIM, Q_FORMAT, NEGATE)
                    factor = descale(q_descales, seq_idx, head) * descale(k_descales, seq_idx, head)
                    if DIVIDES:
                        power = power_above(tl.maximum(largest(even), largest(odd)))
                        even = divided(even, power)
                        odd = divided(odd, power)
                        factor *= power
                    factor = tl.zeros([BLOCK_M], tl.float32) + factor * scale_log2
                    turned = (factor < 0)[:, None]
                    even = tl.where(turned, -even, even)
                    odd = tl.where(turned, -odd, odd)
                    held_q = joined(even.to(tl.float16), odd.to(tl.float16))
                    size = tl.where(factor < 0, -factor, factor)
                    held_scale = tl.where(size < 1e-30, 1e-30, size)  # a NaN stays one
                q0, q1 = parted(held_q, FP8_HARDWARE)
            elif HAS_K:
                q0 = load_queries(q_base, q_rows, dims0, row_mask, HEAD_DIM, Q_FORMAT, NEGATE)
                if D1 > 0:
                    q1 = load_queries(q_base, q_rows, dims1, row_mask, HEAD_DIM, Q_FORMAT, NEGATE)
            if HAS_QV:
                qv_base = (
                    qv_ptr
                    + seq_idx.to(tl.int64) * qv_stride_b
                    + first_q.to(tl.int64) * qv_stride_t
                    + (head * GROUP).to(tl.int64) * qv_stride_h
                )
                qv0 = load_queries(qv_base, qv_rows, vdims0, row_mask, HEAD_DIM_V, "", NEGATE)
                if V1 > 0:
                    qv1 = load_queries(qv_base, qv_rows, vdims1, row_mask, HEAD_DIM_V, "", NEGATE)
            row_scale = scale_log2
            scale = scale_log2
            if HOLDS_Q:
                row_scale = held_scale
                scale = row_scale[:, None]
            elif DIVIDES:
                top = tl.zeros([BLOCK_M], tl.float32)
                if HAS_K:
                    top = tl.maximum(top, largest(q0))
                    if D1 > 0:
                        top = tl.maximum(top, largest(q1))
                if HAS_QV:
                    top = tl.maximum(top, largest(qv0))
                    if V1 > 0:
                        top = tl.maximum(top, largest(qv1))
                power = power_above(top)
                if HAS_K:
                    q0 = divided(q0, power)
                    if D1 > 0:
                        q1 = divided(q1, power)
                if HAS_QV:
                    qv0 = divided(qv0, power)
                    if V1 > 0:
                        qv1 = divided(qv1, power)
                row_scale = scale_log2 * power
                scale = row_scale[:, None]
            if HAS_K:
                keys = load_panels(k_base, k_rows, dims, HEAD_DIM, D0, D1, KEY_FORMAT, FP8_HARDWARE)
                raw = dot(q0, keys[0].T, raw, IEEE, INTERPRETED)
                if D1 > 0:
                    raw = dot(q1, keys[1].T, raw, IEEE, INTERPRETED)
            if PAIRS and not HOLDS_Q:
                raw *= descale(q_descales, seq_idx, head) * descale(k_descales, seq_idx, head)
            if HAS_QV:
                values = load_panels(
                    v_base, v_rows, vdims, HEAD_DIM_V, V0, V1, KEY_FORMAT, FP8_HARDWARE
                )
                if v_descale_ptr is not None:
                    v_factor = descale(v_descales, seq_idx, head)
                    by_values = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                    by_values = dot(qv0, values[0].T, by_values, IEEE, INTERPRETED)
                    if V1 > 0:
                        by_values = dot(qv1, values[1].T, by_values, IEEE, INTERPRETED)
                    raw += by_values * v_factor
                else:
                    raw = dot(qv0, values[0].T, raw, IEEE, INTERPRETED)
                    if V1 > 0:
                        raw = dot(qv1, values[1].T, raw, IEEE, INTERPRETED)
            if HAS_MODS:
                cells = (
                    seq_idx,
                    (head * GROUP + rows % GROUP)[:, None],
                    token[:, None],
                    (tokens - padding)[None, :],
                    seqlen_q,
                    offset + seqlen_q - padding,
                    aux_ptr,
                )
            if SCORE_MOD is not None:
                raw = scored_by(SCORE_MOD, raw, scale, cells) * LOG2E
            if HAS_SOFTCAP:
                raw = softcapped(raw, scale, softcap_log2, IEEE)
            if MASK_MOD is not None:
                raw = masked_by(MASK_MOD, raw, cells)
            if ONE_TOKEN:
                raw = tl.where((tokens < end)[None, :], raw, NEG_INF)
            elif LAZY_MASK and not HAS_LEFT and not ATTENTION_CHUNKED:
                limit = end
                if HAS_RIGHT:
                    limit = tl.minimum(end, offset + window_right + 1)
                if begin + (tile + 1) * BLOCK_N > limit:
                    row_end = end + 0 * token
                    if HAS_RIGHT:
                        row_end = tl.minimum(end, token + offset + window_right + 1)
                    raw = tl.where(tokens[None, :] < row_end[:, None], raw, NEG_INF)
            else:
                # No key before `begin` is looked at: it serves where padding is not counted.
                hidden = begin
                if COUNTS_PADDING:
                    hidden = padding
                row_first, row_end = seen_keys(token, offset, hidden, end, windows)
                keep = tokens[None, :] < row_end[:, None]
                if HAS_LEFT or ATTENTION_CHUNKED:
                    keep &= tokens[None, :] >= row_first[:, None]
                raw = tl.where(keep, raw, NEG_INF)
            if IN_BASE_2:
                new_max = tl.maximum(row_max, tl.max(raw, 1))
                prob = tl.exp2(raw - new_max[:, None])
            else:
                # The scale is positive (its sign is q's).
                new_max = tl.maximum(row_max, tl.max(raw, 1) * row_scale)
                prob = tl.exp2(raw * scale - new_max[:, None])
            alpha = tl.exp2(row_max - new_max)
            row_sum = row_sum * alpha[:, None] + folded(prob, SUMS)
            row_max = new_max
            if not HAS_QV:
                values = load_panels(
                    v_base, v_rows, vdims, HEAD_DIM_V, V0, V1, KEY_FORMAT, FP8_HARDWARE
                )
            weights = prob.to(values[0].dtype)
            acc0 = dot(weights, values[0], acc0 * alpha[:, None], IEEE, INTERPRETED)
            if V1 > 0:
                acc1 = dot(weights, values[1], acc1 * alpha[:, None], IEEE, INTERPRETED)
            if CHUNKED:
                done = tile + 1 == piece_end
                target = slot
            else:
                done = last | (step == count - 1)
                target = slot + whole
            direct = last & (whole == 1)
            if done:
                total = tl.sum(row_sum, 1)
                if v_descale_ptr is not None:
                    v_factor = descale(v_descales, seq_idx, head)
                    acc0 *= v_factor
                    if V1 > 0:
                        acc1 *= v_factor
                if CHUNKED:
                    if whole == 0:
                        target = piece_slot
                        piece_slot += 1
                    elif part_ptr is not None:
                        if tile >= chunk:
                            # What this program left of the pieces before this one: by the same
                            # threads, and with the barriers of a round between.
                            kept_row = target.to(tl.int64) * ROWS + tl.arange(0, BLOCK_M)
                            kept = row_mask & (tl.arange(0, BLOCK_M) < ROWS)
                            kept_base = part_ptr + kept_row[:, None] * (V0 + V1)
                            merged_max = tl.load(part_stat_ptr + kept_row * 2, kept, NO_SCORE)
                            merged_sum = tl.load(part_stat_ptr + kept_row * 2 + 1, kept, 0.0)
                            merged0 = tl.load(kept_base + vdims0[None, :], kept[:, None], 0.0)
                            if V1 > 0:
                                merged1 = tl.load(kept_base + vdims1[None, :], kept[:, None], 0.0)
                            new_max, alpha, weight = merge_factors(merged_max, row_max)
                            total = tl.fma(merged_sum, alpha, total * weight)
                            acc0 = tl.fma(
                                merged0,
                                tl.broadcast_to(alpha[:, None], [BLOCK_M, V0]),
                                acc0 * weight[:, None],
                            )
                            if V1 > 0:
                                acc1 = tl.fma(
                                    merged1,
                                    tl.broadcast_to(alpha[:, None], [BLOCK_M, V1]),
                                    acc1 * weight[:, None],
                                )
                            row_max = new_max
                if direct:
                    if HAS_SINK:
                        sink = tl.load(sinks_ptr + head * GROUP + rows % GROUP)
                        sink = sink.to(tl.float32) * LOG2E
                        factor, lse = finish(row_max, total, sink, True)
                    else:
                        factor, lse = finish(row_max, total, 0.0, False)
                    # 0 times the NaN of an unused slot is not 0.
                    live = (total != 0)[:, None]
                    out_row = (
                        seq_idx.to(tl.int64) * out_stride_b
                        + (first_q + token).to(tl.int64) * out_stride_t
                        + (head * GROUP + rows % GROUP).to(tl.int64) * out_stride_h
                    )
                    tl.store(
                        out_ptr + out_row[:, None] + vdims0[None, :],
                        tl.where(live, acc0 * factor[:, None], 0.0).to(out_ptr.dtype.element_ty),
                        mask=row_mask[:, None] & (vdims0 < HEAD_DIM_V)[None, :],
                    )
                    if V1 > 0:
                        tl.store(
                            out_ptr + out_row[:, None] + vdims1[None, :],
                            tl.where(live, acc1 * factor[:, None], 0.0).to(
                                out_ptr.dtype.element_ty
                            ),
                            mask=row_mask[:, None] & (vdims1 < HEAD_DIM_V)[None, :],
                        )
                    if HAS_LSE:
                        lse_row = (
                            seq_idx.to(tl.int64) * lse_stride_b
                            + (first_q + token).to(tl.int64) * lse_stride_t
                            + (head * GROUP + rows % GROUP).to(tl.int64) * lse_stride_h
                        )
                        tl.store(lse_ptr + lse_row, lse, mask=row_mask)
                elif part_ptr is not None:  # None: no sequence is cut
                    part_row = target.to(tl.int64) * ROWS + tl.arange(0, BLOCK_M)
                    keep_row = row_mask & (tl.arange(0, BLOCK_M) < ROWS)
                    part_base = part_ptr + part_row[:, None] * (V0 + V1)
                    tl.store(part_base + vdims0[None, :], acc0, mask=keep_row[:, None])
                    if V1 > 0:
                        tl.store(part_base + vdims1[None, :], acc1, mask=keep_row[:, None])
                    tl.store(part_stat_ptr + part_row * 2, row_max, mask=keep_row)
                    tl.store(part_stat_ptr + part_row * 2 + 1, total, mask=keep_row)
                row_max = tl.full([BLOCK_M], NO_SCORE, tl.float32)
                row_sum = tl.zeros([BLOCK_M, SUMS], tl.float32)
                acc0 = tl.zeros([BLOCK_M, V0], tl.float32)
                if V1 > 0:
                    acc1 = tl.zeros([BLOCK_M, V1], tl.float32)
                if CHUNKED:
                    if last:
                        chunk = chunk_tiles(num_tiles_, chunking)
                        whole = 1
                    piece_end = tl.minimum(tile_ + chunk, num_tiles_)
                else:
                    whole = 1
            seq_idx = seq_idx_
            lane = lane_
            tile = tile_
            first_q = first_q_
            seqlen_q = seqlen_q_
            first_k = first_k_
            begin = begin_
            end = end_
            offset = offset_
            num_tiles = num_tiles_
            page = page_
            if HAS_ROWS:
                row = row_
            if COUNTS_PADDING:
                padding = padding_

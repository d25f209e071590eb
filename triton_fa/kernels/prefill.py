"""Attention of many query rows: one program for each tile of rows and kv head.

Key blocks that every row of the tile sees are computed without a mask; masked blocks are those
that a sequence end, the causal diagonal or a window edge runs through. Blocks that no row sees
are not read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_fa.kernels.primitives import (
    LOG2E,
    NEG_INF,
    NO_SCORE,
    dot,
    finish,
    key_span,
    page_ids,
    query_span,
    softcapped,
    visible_keys,
)


@triton.jit
def key_pages(
    paging,  # (page_table_ptr, row offset, num_pages)
    start,
    live_keys,  # first and last key that any row of the tile sees
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Physical pages of the block of keys that begins at `start`: one, or one for each key."""
    page_table_ptr, table_row, num_pages = paging
    if WHOLE:
        token = start
    else:
        token = start + tl.arange(0, BLOCK_N)
    token = tl.minimum(tl.maximum(token, live_keys[0] // PAGE_SIZE * PAGE_SIZE), live_keys[1])
    return page_ids(page_table_ptr, table_row, token, num_pages, token >= 0, PAGE_SIZE)


@triton.jit
def load_keys(
    source,  # (descriptor [batch or pages, tokens, heads, dim] or None, pointer, strides)
    place,  # (page or sequence, first key token, kv head)
    start,
    live_keys,
    total_k,
    head_dim: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGED: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """One block of keys or values, [BLOCK_N, BLOCK_D].

    Rows outside `live_keys` are whatever lies there when read through a descriptor, and repeat
    the nearest live key when read through pointers with CLAMP.
    """
    page, first_k, head = place
    descriptor, base_ptr, strides = source
    if descriptor is not None:
        if PAGED:
            block = descriptor.load([page, start % PAGE_SIZE, head, 0])
        else:
            block = descriptor.load([page, first_k + start, head, 0])
        return block.reshape([BLOCK_N, BLOCK_D])
    else:
        token = start + tl.arange(0, BLOCK_N)
        if CLAMP:
            token = tl.minimum(tl.maximum(token, live_keys[0]), live_keys[1])
        if PAGED:
            slot = token % PAGE_SIZE
        else:
            slot = tl.minimum(token + first_k, total_k - 1)
        rows = page.to(tl.int64) * strides[0] + slot.to(tl.int64) * strides[1]
        dims = tl.arange(0, BLOCK_D)
        if head_dim != BLOCK_D:
            return tl.load(
                base_ptr + rows[:, None] + dims[None, :],
                mask=(dims < head_dim)[None, :],
                other=0.0,
            )
        else:
            return tl.load(base_ptr + rows[:, None] + dims[None, :])


@triton.jit
def masked_scores(
    raw,
    start,
    row_range,  # first key and one past the last key that each row sees
    scale_log2,
    softcap_log2,
    BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    IEEE: tl.constexpr,
):
    """Scores of the block of keys at `start`: raw, or with a softcap in base 2; masked -inf."""
    if HAS_SOFTCAP:
        raw = softcapped(raw, scale_log2, softcap_log2, IEEE)
    if MASKED:
        token = start + tl.arange(0, BLOCK_N)
        keep = token[None, :] < row_range[1][:, None]
        if HAS_LEFT:
            keep &= token[None, :] >= row_range[0][:, None]
        raw = tl.where(keep, raw, NEG_INF)
    return raw


@triton.jit
def softmax_step(raw, row_max, row_sum, scale_log2, HAS_SOFTCAP: tl.constexpr):
    """(weights, factor for what was summed before, new row maximum, new row sum)."""
    if HAS_SOFTCAP:
        new_max = tl.maximum(row_max, tl.max(raw, 1))
        prob = tl.exp2(raw - new_max[:, None])
    else:
        # The scale is positive (the launcher folds a sign into q).
        new_max = tl.maximum(row_max, tl.max(raw, 1) * scale_log2)
        prob = tl.exp2(raw * scale_log2 - new_max[:, None])
    alpha = tl.exp2(row_max - new_max)
    return prob, alpha, new_max, row_sum * alpha + tl.sum(prob, 1)


@triton.jit
def attend_blocks(
    state,  # (row maximum, row sum, accumulator, scores at `begin`, pages of it and the next block)
    q,
    begin,
    end,
    row_range,
    live_keys,
    keys,  # (descriptor, pointer, strides) of K
    values,  # and of V
    place,  # (sequence, first key token, kv head)
    paging,  # (page_table_ptr, row offset, num_pages)
    total_k,
    scale_log2,
    softcap_log2,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    IEEE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Online softmax over key blocks [begin, end), BLOCK_N apart; `end` is scored, not summed.

    The scores of the next block are only carried to the next step: so their product runs while
    the softmax of this block does.
    """
    row_max, row_sum, acc, raw, page, page_next = state
    PAGED: tl.constexpr = paging[0] is not None
    for start in tl.range(begin, end, BLOCK_N):
        if PAGED:
            # Page numbers are fetched one block ahead of the keys.
            page_after = key_pages(
                paging, start + 2 * BLOCK_N, live_keys, BLOCK_N, PAGE_SIZE, WHOLE
            )
        k = load_keys(
            keys,
            (page_next, place[1], place[2]),
            start + BLOCK_N,
            live_keys,
            total_k,
            HEAD_DIM,
            BLOCK_N,
            BLOCK_D,
            PAGE_SIZE,
            PAGED,
            True,
        )
        raw_next = dot(q, k.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), IEEE, INTERPRETED)
        scores = masked_scores(
            raw,
            start,
            row_range,
            scale_log2,
            softcap_log2,
            BLOCK_N,
            HAS_LEFT,
            HAS_SOFTCAP,
            MASKED,
            IEEE,
        )
        prob, alpha, row_max, row_sum = softmax_step(
            scores, row_max, row_sum, scale_log2, HAS_SOFTCAP
        )
        v = load_keys(
            values,
            (page, place[1], place[2]),
            start,
            live_keys,
            total_k,
            HEAD_DIM_V,
            BLOCK_N,
            BLOCK_DV,
            PAGE_SIZE,
            PAGED,
            HAS_LEFT,
        )
        acc = dot(prob.to(v.dtype), v, acc * alpha[:, None], IEEE, INTERPRETED)
        raw = raw_next
        if PAGED:
            # Not a plain copy: Triton does not pipeline a loop that carries a value two steps.
            page = tl.minimum(page_next, paging[2] - 1)
            page_next = page_after
    return row_max, row_sum, acc, raw, page, page_next


@triton.jit
def prefill_kernel(
    out_ptr,  # q's shape with head_dim_v
    lse_ptr,  # [heads_q, total_q] or [batch, heads_q, seqlen_q], float32
    q_ptr,
    k_ptr,
    v_ptr,
    k_desc,
    v_desc,
    page_table_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    seqused_q_ptr,
    seqused_k_ptr,
    sinks_ptr,
    out_stride_b,
    out_stride_t,
    out_stride_h,
    lse_stride_b,
    lse_stride_t,
    lse_stride_h,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    table_stride,
    batch,
    total_q,
    total_k,
    fixed_seqlen_q,
    fixed_seqlen_k,
    max_seqlen_k,
    num_pages,
    num_row_tiles,
    window_left,
    window_right,
    scale_log2,
    softcap_log2,
    NUM_HEADS_KV: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    DECODE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_LSE: tl.constexpr,
    NEGATE: tl.constexpr,
    IEEE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out = softmax(scale * q k^T + mask) v for BLOCK_M rows of one sequence and kv head.

    Sequences of at most DECODE_ROWS rows belong to the decode path and are left alone.
    """
    HAS_SINK: tl.constexpr = sinks_ptr is not None
    HAS_LEFT: tl.constexpr = window_left is not None
    HAS_RIGHT: tl.constexpr = window_right is not None
    PAGED: tl.constexpr = page_table_ptr is not None
    # A block of keys lies inside one page.
    WHOLE: tl.constexpr = PAGED and PAGE_SIZE % BLOCK_N == 0
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
    )
    pid = tl.program_id(0)
    head = pid % NUM_HEADS_KV
    seq_idx = (pid // NUM_HEADS_KV) % batch
    # The last rows see the most keys under a causal mask: they go first.
    row_tile = num_row_tiles - 1 - pid // (NUM_HEADS_KV * batch)
    first_q, seqlen_q = query_span(seq_idx, seq_idx < batch, lengths)
    num_rows = seqlen_q * GROUP
    if (row_tile * BLOCK_M < num_rows) & (num_rows > DECODE_ROWS):
        first_k, seqlen_k = key_span(seq_idx, seq_idx < batch, lengths)
        offset = seqlen_k - seqlen_q
        rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        token = rows // GROUP
        first_token = row_tile * BLOCK_M // GROUP
        end_token = tl.minimum((row_tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1, seqlen_q)
        begin, end = visible_keys(
            first_token, end_token, offset, seqlen_k, (window_left, window_right)
        )
        live_keys = (begin, tl.maximum(end - 1, begin))
        begin = begin // BLOCK_N * BLOCK_N
        # Keys that the first and the last row both see, and so all between them.
        row_end = seqlen_k + 0 * token
        row_begin = 0 * token
        full_begin = begin
        full_end = end
        if HAS_RIGHT:
            row_end = tl.minimum(token + offset + window_right + 1, seqlen_k)
            full_end = tl.minimum(first_token + offset + window_right + 1, full_end)
        if HAS_LEFT:
            row_begin = token + offset - window_left
            full_begin = tl.maximum(end_token - 1 + offset - window_left, begin)
            full_begin = (full_begin + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        stop = begin + (end - begin + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        full_begin = tl.minimum(full_begin, stop)
        full_end = tl.maximum(tl.maximum(full_end, 0) // BLOCK_N * BLOCK_N, full_begin)

        q_head = head * GROUP + rows % GROUP
        row_mask = rows < num_rows
        dims = tl.arange(0, BLOCK_D)
        q_row = (
            seq_idx.to(tl.int64) * q_stride_b
            + (first_q + token).to(tl.int64) * q_stride_t
            + q_head.to(tl.int64) * q_stride_h
        )
        q = tl.load(
            q_ptr + q_row[:, None] + dims[None, :],
            mask=row_mask[:, None] & (dims < HEAD_DIM)[None, :],
            other=0.0,
        )
        if NEGATE:
            q = -q
        k_base = k_ptr
        v_base = v_ptr
        if k_desc is None:
            k_base += head.to(tl.int64) * k_stride_h
            v_base += head.to(tl.int64) * v_stride_h
        keys = (k_desc, k_base, (k_stride_b, k_stride_t))
        values = (v_desc, v_base, (v_stride_b, v_stride_t))
        if cu_seqlens_k_ptr is None:
            place = (seq_idx, first_k, head)
        else:
            place = (seq_idx * 0, first_k, head)
        paging = (page_table_ptr, seq_idx.to(tl.int64) * table_stride, num_pages)
        row_range = (row_begin, row_end)
        if PAGED:
            page = key_pages(paging, begin, live_keys, BLOCK_N, PAGE_SIZE, WHOLE)
            page_after = key_pages(paging, begin + BLOCK_N, live_keys, BLOCK_N, PAGE_SIZE, WHOLE)
        else:
            page = place[0] + 0
            page_after = place[0] + 0
        k = load_keys(
            keys,
            (page, place[1], place[2]),
            begin,
            live_keys,
            total_k,
            HEAD_DIM,
            BLOCK_N,
            BLOCK_D,
            PAGE_SIZE,
            PAGED,
            True,
        )
        raw = dot(q, k.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), IEEE, INTERPRETED)
        state = (
            tl.full([BLOCK_M], NO_SCORE, tl.float32),
            tl.zeros([BLOCK_M], tl.float32),
            tl.zeros([BLOCK_M, BLOCK_DV], tl.float32),
            raw,
            page,
            page_after,
        )
        # The last block is finished behind the loops: nothing is scored after it, and only there
        # may rows behind the sequence's end occur.
        final = tl.maximum(stop - BLOCK_N, begin)
        full_begin = tl.minimum(full_begin, final)
        full_end = tl.minimum(full_end, final)
        if HAS_LEFT:
            state = attend_blocks(
                state,
                q,
                begin,
                full_begin,
                row_range,
                live_keys,
                keys,
                values,
                place,
                paging,
                total_k,
                scale_log2,
                softcap_log2,
                HEAD_DIM,
                HEAD_DIM_V,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
                BLOCK_DV,
                PAGE_SIZE,
                WHOLE,
                HAS_LEFT,
                HAS_SOFTCAP,
                True,
                IEEE,
                INTERPRETED,
            )
        state = attend_blocks(
            state,
            q,
            full_begin,
            full_end,
            row_range,
            live_keys,
            keys,
            values,
            place,
            paging,
            total_k,
            scale_log2,
            softcap_log2,
            HEAD_DIM,
            HEAD_DIM_V,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            BLOCK_DV,
            PAGE_SIZE,
            WHOLE,
            HAS_LEFT,
            HAS_SOFTCAP,
            False,
            IEEE,
            INTERPRETED,
        )
        row_max, row_sum, acc, raw, page, _ = attend_blocks(
            state,
            q,
            full_end,
            final,
            row_range,
            live_keys,
            keys,
            values,
            place,
            paging,
            total_k,
            scale_log2,
            softcap_log2,
            HEAD_DIM,
            HEAD_DIM_V,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            BLOCK_DV,
            PAGE_SIZE,
            WHOLE,
            HAS_LEFT,
            HAS_SOFTCAP,
            True,
            IEEE,
            INTERPRETED,
        )
        scores = masked_scores(
            raw,
            final,
            row_range,
            scale_log2,
            softcap_log2,
            BLOCK_N,
            HAS_LEFT,
            HAS_SOFTCAP,
            True,
            IEEE,
        )
        prob, alpha, row_max, row_sum = softmax_step(
            scores, row_max, row_sum, scale_log2, HAS_SOFTCAP
        )
        v = load_keys(
            values,
            (page, place[1], place[2]),
            final,
            live_keys,
            total_k,
            HEAD_DIM_V,
            BLOCK_N,
            BLOCK_DV,
            PAGE_SIZE,
            PAGED,
            True,
        )
        if k_desc is not None:
            # They may hold NaN, and 0 * NaN is not 0.
            v = tl.where((final + tl.arange(0, BLOCK_N) <= live_keys[1])[:, None], v, 0.0)
        acc = dot(prob.to(v.dtype), v, acc * alpha[:, None], IEEE, INTERPRETED)
        if HAS_SINK:
            sink = tl.load(sinks_ptr + q_head).to(tl.float32) * LOG2E
            factor, lse = finish(row_max, row_sum, sink, True)
        else:
            factor, lse = finish(row_max, row_sum, 0.0, False)
        vdims = tl.arange(0, BLOCK_DV)
        out_row = (
            seq_idx.to(tl.int64) * out_stride_b
            + (first_q + token).to(tl.int64) * out_stride_t
            + q_head.to(tl.int64) * out_stride_h
        )
        tl.store(
            out_ptr + out_row[:, None] + vdims[None, :],
            tl.where((row_sum > 0)[:, None], acc * factor[:, None], 0.0).to(
                out_ptr.dtype.element_ty
            ),
            mask=row_mask[:, None] & (vdims < HEAD_DIM_V)[None, :],
        )
        if HAS_LSE:
            lse_row = (
                seq_idx.to(tl.int64) * lse_stride_b
                + (first_q + token).to(tl.int64) * lse_stride_t
                + q_head.to(tl.int64) * lse_stride_h
            )
            tl.store(lse_ptr + lse_row, lse, mask=row_mask)

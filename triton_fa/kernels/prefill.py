"""Attention of many query rows: one program for each tile of rows and kv head.

Where sequences differ much, programs find their tile from the lengths, taking the sequences in the
order of a plan (`schedule.py`), longest first; else tile and sequence follow from the program's
number. A plan of other lengths, or garbage, changes when a tile is computed and nothing else.

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
    VARYING,
    cache_row,
    divided,
    dot,
    finish,
    from_fp8,
    key_span,
    largest,
    left_padding,
    masked_by,
    page_ids,
    power_above,
    query_span,
    row_tiles,
    scored_by,
    seen_keys,
    softcapped,
    visible_keys,
)


@triton.jit
def sequences_in_order(plan_ptr, batch, segment, BLOCK_B: tl.constexpr):
    """The plan's order of up to BLOCK_B sequences, or their own where it is not an order of them.

    It may be of another batch, or garbage: it is one if every sequence's place leads back to it.
    """
    idx = tl.arange(0, BLOCK_B)
    mask = idx < batch
    entry = tl.load(plan_ptr + 2 * segment + idx, mask=mask, other=0)
    seq_idx = entry & 0xFFFF
    inside = mask & (seq_idx < batch)
    there = tl.load(plan_ptr + 2 * segment + seq_idx, mask=inside, other=-1)
    wrong = tl.sum((mask & ((there >> 16) != idx)).to(tl.int32), 0)
    return tl.where(mask & (wrong == 0), seq_idx, idx)


@triton.jit
def planned_tile(
    tile,
    plan_ptr,
    batch,
    segment,
    lengths,
    GROUP: tl.constexpr,
    DECODE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """(sequence, its row tile counted from the last) of a tile; (batch, 0) behind the last tile."""
    if ONE_BLOCK:
        seq_idx = sequences_in_order(plan_ptr, batch, segment, BLOCK_B)
        idx = tl.arange(0, BLOCK_B)
        tiles = row_tiles(seq_idx, idx < batch, lengths, GROUP, DECODE_ROWS, BLOCK_M)
        upto = tl.cumsum(tiles, 0)
        passed = (upto <= tile) & (idx < batch)
        place = tl.sum(passed.to(tl.int32), 0)
        before = tl.max(tl.where(passed, upto, 0), 0)
        found = tl.max(tl.where(idx == place, seq_idx, 0), 0)
    else:
        place = 0
        before = 0
        carry = 0
        for start in tl.range(0, batch, BLOCK_B, num_stages=1):
            idx = start + tl.arange(0, BLOCK_B)
            tiles = row_tiles(idx, idx < batch, lengths, GROUP, DECODE_ROWS, BLOCK_M)
            upto = carry + tl.cumsum(tiles, 0)
            passed = (upto <= tile) & (idx < batch)
            place += tl.sum(passed.to(tl.int32), 0)
            before = tl.maximum(before, tl.max(tl.where(passed, upto, 0), 0))
            carry += tl.sum(tiles, 0)
        found = place
    return tl.where(place < batch, found, batch), tile - before


@triton.jit
def key_block_list(counts_ptr, entries_ptr, place, width):
    """(first entry, how many count) of the list of key blocks at `place` of all lists."""
    count = tl.load(counts_ptr + place)
    return entries_ptr + place.to(tl.int64) * width, tl.minimum(tl.maximum(count, 0), width)


@triton.jit
def entries_inside(first_ptr, count, blocks):
    """How many entries of a list are among the first `blocks` blocks of keys."""
    inside = 0
    for start in tl.range(0, count, 128, num_stages=1):
        entry = start + tl.arange(0, 128)
        block = tl.load(first_ptr + entry, mask=entry < count, other=-1)
        inside += tl.sum(((block >= 0) & (block < blocks)).to(tl.int32), 0)
    return inside


@triton.jit
def listed(at, key_list, SPARSE_N: tl.constexpr):
    """The key at place `at` of the keys that a list of blocks names; without one, `at` itself.

    `key_list` is (first entry, entries, largest result). Whatever the list holds, the key is not
    behind that.
    """
    if key_list is None:
        return at
    else:
        first_ptr, count, last = key_list
        entry = tl.maximum(tl.minimum(at // SPARSE_N, count - 1), 0)
        key = tl.load(first_ptr + entry) * SPARSE_N + at % SPARSE_N
        return tl.minimum(tl.maximum(key, 0), last)


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
def load_panel(
    descriptor,  # [batch or pages, tokens, heads, dim] or None
    source,  # (its descriptor, that of the second panel, pointer, strides)
    place,  # (page or sequence, first key token, kv head)
    start,
    live_keys,
    total_k,
    head_dim: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLUMN: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGED: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """Columns [COLUMN, COLUMN + WIDTH) of one block of keys or values, [BLOCK_N, WIDTH].

    Rows outside `live_keys` are whatever lies there when read through a descriptor, and repeat
    the nearest live key when read through pointers with CLAMP.
    """
    page, first_k, head = place
    if descriptor is not None:
        if PAGED:
            block = descriptor.load([page, start % PAGE_SIZE, head, COLUMN])
        else:
            block = descriptor.load([page, first_k + start, head, COLUMN])
        return block.reshape([BLOCK_N, WIDTH])
    else:
        strides = source[3]
        token = start + tl.arange(0, BLOCK_N)
        if CLAMP:
            token = tl.minimum(tl.maximum(token, live_keys[0]), live_keys[1])
        if PAGED:
            slot = token % PAGE_SIZE
        else:
            slot = tl.minimum(token + first_k, total_k - 1)
        rows = page.to(tl.int64) * strides[0] + slot.to(tl.int64) * strides[1]
        dims = COLUMN + tl.arange(0, WIDTH)
        if head_dim < COLUMN + WIDTH:
            return tl.load(
                source[2] + rows[:, None] + dims[None, :],
                mask=(dims < head_dim)[None, :],
                other=0,
            )
        else:
            return tl.load(source[2] + rows[:, None] + dims[None, :])


@triton.jit
def load_keys(
    source,
    place,
    start,
    live_keys,
    total_k,
    head_dim: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGED: tl.constexpr,
    CLAMP: tl.constexpr,
    FORMAT: tl.constexpr,
    BY: tl.constexpr,
):
    """The panels of one block of keys or values; the second is the first without D1."""
    first = load_panel(
        source[0],
        source,
        place,
        start,
        live_keys,
        total_k,
        head_dim,
        BLOCK_N,
        0,
        D0,
        PAGE_SIZE,
        PAGED,
        CLAMP,
    )
    first = from_fp8(first, FORMAT, BY)
    second = first
    if D1 > 0:
        second = load_panel(
            source[1],
            source,
            place,
            start,
            live_keys,
            total_k,
            head_dim,
            BLOCK_N,
            D0,
            D1,
            PAGE_SIZE,
            PAGED,
            CLAMP,
        )
        second = from_fp8(second, FORMAT, BY)
    return first, second


@triton.jit
def scores(
    queries,  # panels of rows
    keys,  # panels of a block
    D1: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IEEE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """queries @ keys.T in float32."""
    zeros = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
    raw = dot(queries[0], keys[0].T, zeros, IEEE, INTERPRETED)
    if D1 > 0:
        raw = dot(queries[1], keys[1].T, raw, IEEE, INTERPRETED)
    return raw


@triton.jit
def changed_scores(
    raw,
    start,
    row_scale,
    cells,  # see `scored_by`; the keys' place holds the padding
    scale_log2,
    softcap_log2,
    BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SCORE_MOD: tl.constexpr,
    MASK_MOD: tl.constexpr,
    IEEE: tl.constexpr,
):
    """Scores of the block of keys at `start`: raw, or in base 2 if changed."""
    if row_scale is not None:
        raw *= row_scale[:, None]
    if SCORE_MOD is not None or MASK_MOD is not None:
        keys = (start + tl.arange(0, BLOCK_N) - cells[3])[None, :]
        cells = (cells[0], cells[1], cells[2], keys, cells[4], cells[5], cells[6])
    if SCORE_MOD is not None:
        raw = scored_by(SCORE_MOD, raw, scale_log2, cells) * LOG2E
    if HAS_SOFTCAP:
        raw = softcapped(raw, scale_log2, softcap_log2, IEEE)
    if MASK_MOD is not None:
        raw = masked_by(MASK_MOD, raw, cells)
    return raw


@triton.jit
def visible_scores(raw, start, row_range, BLOCK_N: tl.constexpr, HAS_FIRST: tl.constexpr):
    """Scores of the block of keys at `start`, -inf for keys that a row does not see.

    `row_range` is the first key and one past the last key that each row sees.
    """
    token = start + tl.arange(0, BLOCK_N)
    keep = token[None, :] < row_range[1][:, None]
    if HAS_FIRST:
        keep &= token[None, :] >= row_range[0][:, None]
    return tl.where(keep, raw, NEG_INF)


@triton.jit
def folded(x, COLUMNS: tl.constexpr):
    """[rows, columns] summed to as many columns."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // COLUMNS, COLUMNS]), 1)


@triton.jit
def maximum_with(row_max, raw, scale_log2, IN_BASE_2: tl.constexpr):
    """The row maximum in base 2, and of these scores."""
    if IN_BASE_2:
        return tl.maximum(row_max, tl.max(raw, 1))
    else:
        # The scale is positive (the launcher folds a sign into q).
        return tl.maximum(row_max, tl.max(raw, 1) * scale_log2)


@triton.jit
def softmax_step(
    raw,
    start,
    row_max,
    row_sum,
    row_scale,
    row_range,
    cells,
    scale_log2,
    softcap_log2,
    BLOCK_N: tl.constexpr,
    SUMS: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SCORE_MOD: tl.constexpr,
    MASK_MOD: tl.constexpr,
    MASKED: tl.constexpr,
    IEEE: tl.constexpr,
):
    """(row maximum in base 2, row sum) with the block of keys at `start`, the weights of its keys,
    and what earlier weights are multiplied by."""
    raw = changed_scores(
        raw,
        start,
        row_scale,
        cells,
        scale_log2,
        softcap_log2,
        BLOCK_N,
        HAS_SOFTCAP,
        SCORE_MOD,
        MASK_MOD,
        IEEE,
    )
    if MASKED:
        raw = visible_scores(raw, start, row_range, BLOCK_N, HAS_FIRST)
    IN_BASE_2: tl.constexpr = HAS_SOFTCAP or SCORE_MOD is not None
    new_max = maximum_with(row_max, raw, scale_log2, IN_BASE_2)
    if IN_BASE_2:
        prob = tl.exp2(raw - new_max[:, None])
    else:
        prob = tl.exp2(raw * scale_log2 - new_max[:, None])
    alpha = tl.exp2(row_max - new_max)
    if SUMS > 0:
        row_sum = row_sum * alpha[:, None] + folded(prob, SUMS)
    else:
        row_sum = row_sum * alpha + tl.sum(prob, 1)
    return new_max, row_sum, prob, alpha


@triton.jit
def add_values(
    acc0,
    acc1,
    alpha,
    weights,
    values,  # panels of a block
    V1: tl.constexpr,
    IEEE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The panels of a result, multiplied by `alpha`, and weights @ values."""
    acc0 = dot(weights, values[0], acc0 * alpha[:, None], IEEE, INTERPRETED)
    if V1 > 0:
        acc1 = dot(weights, values[1], acc1 * alpha[:, None], IEEE, INTERPRETED)
    return acc0, acc1


@triton.jit
def live_values(values, start, live_keys, BLOCK_N: tl.constexpr, V1: tl.constexpr):
    """Values, zeros for keys behind the last live one: they may be NaN, and 0 * NaN is not 0."""
    live = (start + tl.arange(0, BLOCK_N) <= live_keys[1])[:, None]
    first = tl.where(live, values[0], 0.0)
    second = first
    if V1 > 0:
        second = tl.where(live, values[1], 0.0)
    return first, second


@triton.jit
def attend_blocks(
    state,  # (row maximum, row sum, accumulators) of each half of the rows
    queries,  # panels of the rows' halves; None for the second if there is one only
    row_scales,  # factors of the halves' scores, or None
    begin,
    end,
    key_list,  # of the blocks that [begin, end) counts through, or None: see `listed`
    row_ranges,  # of each half
    row_cells,  # what the caller's functions are told of each half
    live_keys,  # first and last key that any row of the tile sees
    keys,  # (descriptors, pointer, strides) of K
    values,  # and of V
    place,  # (sequence, first key token, kv head)
    paging,  # (page_table_ptr, row offset, num_pages)
    total_k,
    scale_log2,
    softcap_log2,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    SUMS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SPARSE_N: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SCORE_MOD: tl.constexpr,
    MASK_MOD: tl.constexpr,
    MASKED: tl.constexpr,
    CLEAN: tl.constexpr,  # blocks may hold places that are no keys of the sequence
    WGMMA: tl.constexpr,  # products may be under way while others are computed
    KEY_FORMAT: tl.constexpr,
    K_FROM_FP8: tl.constexpr,
    V_FROM_FP8: tl.constexpr,
    IEEE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Online softmax over key blocks [begin, end), BLOCK_N apart.

    With two halves, the products of one run while the softmax of the other does.
    """
    row_max0, row_sum0, acc00, acc01, row_max1, row_sum1, acc10, acc11 = state
    PAGED: tl.constexpr = paging[0] is not None
    TWO: tl.constexpr = queries[1] is not None
    WHOLE: tl.constexpr = PAGED and PAGE_SIZE % BLOCK_N == 0
    if PAGED:
        first = listed(begin, key_list, SPARSE_N)
        page = key_pages(paging, first, live_keys, BLOCK_N, PAGE_SIZE, WHOLE)
    else:
        page = place[0] + 0
    # Beside the loop the accumulators are what they were; ptxas would not leave products under way
    # within it where both meet before the last are waited for.
    if (begin < end) | (not WGMMA):
        for at in tl.range(begin, end, BLOCK_N):
            start = listed(at, key_list, SPARSE_N)
            if PAGED:
                # Page numbers are fetched one block ahead of the keys.
                ahead = listed(at + BLOCK_N, key_list, SPARSE_N)
                page_next = key_pages(paging, ahead, live_keys, BLOCK_N, PAGE_SIZE, WHOLE)
            here = (page, place[1], place[2])
            k = load_keys(
                keys,
                here,
                start,
                live_keys,
                total_k,
                HEAD_DIM,
                BLOCK_N,
                D0,
                D1,
                PAGE_SIZE,
                PAGED,
                CLEAN,
                KEY_FORMAT,
                K_FROM_FP8,
            )
            v = load_keys(
                values,
                here,
                start,
                live_keys,
                total_k,
                HEAD_DIM_V,
                BLOCK_N,
                V0,
                V1,
                PAGE_SIZE,
                PAGED,
                CLEAN,
                KEY_FORMAT,
                V_FROM_FP8,
            )
            if CLEAN and values[0] is not None:
                v = live_values(v, start, live_keys, BLOCK_N, V1)
            raw0 = scores(queries[0], k, D1, BLOCK_H, BLOCK_N, IEEE, INTERPRETED)
            if TWO:
                raw1 = scores(queries[1], k, D1, BLOCK_H, BLOCK_N, IEEE, INTERPRETED)
            row_max0, row_sum0, prob0, alpha0 = softmax_step(
                raw0,
                start,
                row_max0,
                row_sum0,
                row_scales[0],
                row_ranges[0],
                row_cells[0],
                scale_log2,
                softcap_log2,
                BLOCK_N,
                SUMS,
                HAS_FIRST,
                HAS_SOFTCAP,
                SCORE_MOD,
                MASK_MOD,
                MASKED,
                IEEE,
            )
            weights0 = prob0.to(v[0].dtype)
            acc00, acc01 = add_values(acc00, acc01, alpha0, weights0, v, V1, IEEE, INTERPRETED)
            if TWO:
                row_max1, row_sum1, prob1, alpha1 = softmax_step(
                    raw1,
                    start,
                    row_max1,
                    row_sum1,
                    row_scales[1],
                    row_ranges[1],
                    row_cells[1],
                    scale_log2,
                    softcap_log2,
                    BLOCK_N,
                    SUMS,
                    HAS_FIRST,
                    HAS_SOFTCAP,
                    SCORE_MOD,
                    MASK_MOD,
                    MASKED,
                    IEEE,
                )
                weights1 = prob1.to(v[0].dtype)
                acc10, acc11 = add_values(acc10, acc11, alpha1, weights1, v, V1, IEEE, INTERPRETED)
            if PAGED:
                page = page_next
    return row_max0, row_sum0, acc00, acc01, row_max1, row_sum1, acc10, acc11


@triton.jit
def attend_late(
    no_sum,
    acc0,
    acc1,
    queries,  # panels of the rows
    row_scale,
    begin,
    full_begin,  # of the blocks that all rows see
    full_end,
    end,
    row_range,
    cells,
    live_keys,
    keys,
    values,
    place,
    paging,
    total_k,
    scale_log2,
    softcap_log2,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    SUMS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SCORE_MOD: tl.constexpr,
    MASK_MOD: tl.constexpr,
    KEY_FORMAT: tl.constexpr,
    K_FROM_FP8: tl.constexpr,
    V_FROM_FP8: tl.constexpr,
    IEEE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """(row maximum, row sum, accumulators) over the key blocks [begin, end), BLOCK_N apart.

    A step's values are multiplied in the next one, beside the softmax of that. Triton leaves a
    product under way where nothing else in the step reads it, and where the next step does so
    behind a product that is waited for, here the scores.
    """
    PAGED: tl.constexpr = paging[0] is not None
    WHOLE: tl.constexpr = PAGED and PAGE_SIZE % BLOCK_N == 0
    DTYPE: tl.constexpr = queries[0].dtype
    row_max = tl.full([BLOCK_H], NO_SCORE, tl.float32)
    row_sum = no_sum
    # Handed on as bits, weights stay in registers; else Triton puts them into shared memory.
    BITS: tl.constexpr = tl.int16 if DTYPE.primitive_bitwidth == 16 else tl.int32
    if PAGED:
        value_page = key_pages(paging, begin, live_keys, BLOCK_N, PAGE_SIZE, WHOLE)
        key_page = key_pages(paging, begin + BLOCK_N, live_keys, BLOCK_N, PAGE_SIZE, WHOLE)
    else:
        value_page = place[0] + 0
        key_page = value_page
    k = load_keys(
        keys,
        (value_page, place[1], place[2]),
        begin,
        live_keys,
        total_k,
        HEAD_DIM,
        BLOCK_N,
        D0,
        D1,
        PAGE_SIZE,
        PAGED,
        True,
        KEY_FORMAT,
        K_FROM_FP8,
    )
    raw = scores(queries, k, D1, BLOCK_H, BLOCK_N, IEEE, INTERPRETED)
    row_max, row_sum, prob, alpha = softmax_step(
        raw,
        begin,
        row_max,
        row_sum,
        row_scale,
        row_range,
        cells,
        scale_log2,
        softcap_log2,
        BLOCK_N,
        SUMS,
        HAS_FIRST,
        HAS_SOFTCAP,
        SCORE_MOD,
        MASK_MOD,
        True,
        IEEE,
    )
    bits = prob.to(DTYPE).to(BITS, bitcast=True)
    for PART in tl.static_range(3):
        if PART == 0:
            part_begin = begin + BLOCK_N
            part_end = full_begin
        else:
            part_begin = tl.maximum(full_begin if PART == 1 else full_end, begin + BLOCK_N)
            part_end = full_end if PART == 1 else end
        # See `attend_blocks` for the condition.
        if PART > 0 or HAS_FIRST:
            if part_begin < part_end:
                for start in tl.range(part_begin, part_end, BLOCK_N):
                    if PAGED:
                        value_page_next = key_pages(
                            paging, start, live_keys, BLOCK_N, PAGE_SIZE, WHOLE
                        )
                        key_page_next = key_pages(
                            paging, start + BLOCK_N, live_keys, BLOCK_N, PAGE_SIZE, WHOLE
                        )
                    k = load_keys(
                        keys,
                        (key_page, place[1], place[2]),
                        start,
                        live_keys,
                        total_k,
                        HEAD_DIM,
                        BLOCK_N,
                        D0,
                        D1,
                        PAGE_SIZE,
                        PAGED,
                        True,
                        KEY_FORMAT,
                        K_FROM_FP8,
                    )
                    raw = scores(queries, k, D1, BLOCK_H, BLOCK_N, IEEE, INTERPRETED)
                    v = load_keys(
                        values,
                        (value_page, place[1], place[2]),
                        start - BLOCK_N,
                        live_keys,
                        total_k,
                        HEAD_DIM_V,
                        BLOCK_N,
                        V0,
                        V1,
                        PAGE_SIZE,
                        PAGED,
                        True,
                        KEY_FORMAT,
                        V_FROM_FP8,
                    )
                    weights = bits.to(DTYPE, bitcast=True)
                    acc0, acc1 = add_values(acc0, acc1, alpha, weights, v, V1, IEEE, INTERPRETED)
                    row_max, row_sum, prob, alpha = softmax_step(
                        raw,
                        start,
                        row_max,
                        row_sum,
                        row_scale,
                        row_range,
                        cells,
                        scale_log2,
                        softcap_log2,
                        BLOCK_N,
                        SUMS,
                        HAS_FIRST,
                        HAS_SOFTCAP,
                        SCORE_MOD,
                        MASK_MOD,
                        PART != 1,
                        IEEE,
                    )
                    bits = prob.to(DTYPE).to(BITS, bitcast=True)
                    if PAGED:
                        value_page = value_page_next
                        key_page = key_page_next
    last = tl.maximum(end - BLOCK_N, begin)
    v = load_keys(
        values,
        (value_page, place[1], place[2]),
        last,
        live_keys,
        total_k,
        HEAD_DIM_V,
        BLOCK_N,
        V0,
        V1,
        PAGE_SIZE,
        PAGED,
        True,
        KEY_FORMAT,
        V_FROM_FP8,
    )
    if values[0] is not None:
        v = live_values(v, last, live_keys, BLOCK_N, V1)
    weights = bits.to(DTYPE, bitcast=True)
    acc0, acc1 = add_values(acc0, acc1, alpha, weights, v, V1, IEEE, INTERPRETED)
    return row_max, row_sum, acc0, acc1


@triton.jit
def row_view(
    base,  # (pointer at the sequence's first token and head, token stride, head stride)
    rows,
    num_rows,
    GROUP: tl.constexpr,
):
    """Addresses of query rows in a tensor, and which of them exist."""
    pointer, stride_t, stride_h = base
    offsets = (rows // GROUP).to(tl.int64) * stride_t + (rows % GROUP).to(tl.int64) * stride_h
    return pointer + offsets, rows < num_rows


@triton.jit
def load_rows(
    base,
    rows,
    num_rows,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    FORMAT: tl.constexpr,
    NEGATE: tl.constexpr,
):
    """The panels of query rows, zeros where there are none; the second is the first without D1."""
    first = load_columns(base, rows, num_rows, GROUP, DIM, 0, D0, FORMAT, NEGATE)
    second = first
    if D1 > 0:
        second = load_columns(base, rows, num_rows, GROUP, DIM, D0, D1, FORMAT, NEGATE)
    return first, second


@triton.jit
def load_columns(
    base,
    rows,
    num_rows,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    COLUMN: tl.constexpr,
    WIDTH: tl.constexpr,
    FORMAT: tl.constexpr,
    NEGATE: tl.constexpr,
):
    """Columns [COLUMN, COLUMN + WIDTH) of query rows."""
    pointers, mask = row_view(base, rows, num_rows, GROUP)
    dims = COLUMN + tl.arange(0, WIDTH)
    q = tl.load(
        pointers[:, None] + dims[None, :], mask=mask[:, None] & (dims < DIM)[None, :], other=0
    )
    q = from_fp8(q, FORMAT, "bits")
    if NEGATE:
        q = -q
    return q


@triton.jit
def halved(q, factor, D1: tl.constexpr):
    """float16 rows, and what their scores are multiplied by: `factor`, and what they lost."""
    if q[0].dtype == tl.bfloat16:
        top = largest(q[0])
        if D1 > 0:
            top = tl.maximum(top, largest(q[1]))
        power = power_above(top)
        first = divided(q[0], power)
        second = first
        if D1 > 0:
            second = divided(q[1], power)
        return (first, second), power * factor
    else:
        return q, tl.zeros([q[0].shape[0]], tl.float32) + factor


@triton.jit
def store_rows(
    out_base,
    lse_base,
    sinks_ptr,  # at the kv head's first query head
    rows,
    num_rows,
    row_max,
    row_sum,
    acc0,
    acc1,
    v_factor,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    SUMS: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """Divide by the sums and write rows of the result."""
    if SUMS > 0:
        row_sum = tl.sum(row_sum, 1)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + rows % GROUP).to(tl.float32) * LOG2E
        factor, lse = finish(row_max, row_sum, sink, True)
    else:
        factor, lse = finish(row_max, row_sum, 0.0, False)
    if v_factor is not None:
        factor *= v_factor
    store_columns(out_base, rows, num_rows, row_sum, acc0, factor, GROUP, DIM, 0, V0)
    if V1 > 0:
        store_columns(out_base, rows, num_rows, row_sum, acc1, factor, GROUP, DIM, V0, V1)
    if HAS_LSE:
        pointers, mask = row_view(lse_base, rows, num_rows, GROUP)
        tl.store(pointers, lse, mask=mask)


@triton.jit
def store_columns(
    out_base,
    rows,
    num_rows,
    row_sum,
    acc,
    factor,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    COLUMN: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Columns [COLUMN, COLUMN + WIDTH) of rows of the result; zeros where the sum is 0."""
    pointers, mask = row_view(out_base, rows, num_rows, GROUP)
    dims = COLUMN + tl.arange(0, WIDTH)
    tl.store(
        pointers[:, None] + dims[None, :],
        tl.where((row_sum != 0)[:, None], acc * factor[:, None], 0.0).to(
            out_base[0].dtype.element_ty
        ),
        mask=mask[:, None] & (dims < DIM)[None, :],
    )


@triton.jit(do_not_specialize=VARYING)
def prefill_kernel(
    out_ptr,  # q's shape with head_dim_v
    lse_ptr,  # [heads_q, total_q] or [batch, heads_q, seqlen_q], float32
    q_ptr,
    k_ptr,
    v_ptr,
    k_desc,
    k1_desc,  # of the second panels
    v_desc,
    v1_desc,
    page_table_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    seqused_q_ptr,
    seqused_k_ptr,
    cu_seqlens_k_new_ptr,
    leftpad_ptr,
    batch_idx_ptr,
    sinks_ptr,
    q_descale_ptr,  # [batch, heads_kv] float32, as the two below
    k_descale_ptr,
    v_descale_ptr,
    aux_ptr,  # a tuple of pointers for the functions below, or None
    mask_block_cnt_ptr,  # lists of key blocks, [batch or 1, heads or 1, query blocks (, entries)]
    mask_block_idx_ptr,
    full_block_cnt_ptr,
    full_block_idx_ptr,
    plan_ptr,
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
    q_descale_stride_b,
    q_descale_stride_h,
    k_descale_stride_b,
    k_descale_stride_h,
    v_descale_stride_b,
    v_descale_stride_h,
    table_stride,
    batch,
    segment,
    total_q,
    total_k,
    fixed_seqlen_q,
    fixed_seqlen_k,
    max_seqlen_k,
    fixed_seqlen_new,
    num_rows,
    num_pages,
    num_row_tiles,
    window_left,
    window_right,
    attention_chunk,
    sparse_stride_b,
    sparse_stride_h,
    masked_width,
    full_width,
    scale_log2,
    softcap_log2,
    NUM_HEADS_KV: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SPARSE_M: tl.constexpr,  # queries and keys of a listed block; 0 without lists
    SPARSE_N: tl.constexpr,
    DECODE_ROWS: tl.constexpr,
    PLANNED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D0: tl.constexpr,  # columns of the panels of queries and keys, 0 for no second one
    D1: tl.constexpr,
    V0: tl.constexpr,  # and of values
    V1: tl.constexpr,
    SUMS: tl.constexpr,  # columns that a row's weights are summed to in loops; 0: to one number
    LATE: tl.constexpr,  # values are multiplied a block late: see `attend_late`
    WGMMA: tl.constexpr,  # products run beside other work, as on Hopper
    SPLIT_END: tl.constexpr,  # the block on the sequence's end is a part of its own
    HAS_SOFTCAP: tl.constexpr,
    HAS_LSE: tl.constexpr,
    NEGATE: tl.constexpr,
    SCORE_MOD: tl.constexpr,
    MASK_MOD: tl.constexpr,
    Q_FORMAT: tl.constexpr,
    KEY_FORMAT: tl.constexpr,
    K_FROM_FP8: tl.constexpr,
    V_FROM_FP8: tl.constexpr,
    IEEE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out = softmax(scale * q k^T + mask) v for BLOCK_M rows of one sequence and kv head.

    Sequences of at most DECODE_ROWS rows belong to the decode path and are left alone.
    """
    PADDED: tl.constexpr = leftpad_ptr is not None
    ATTENTION_CHUNKED: tl.constexpr = attention_chunk is not None
    # Whether rows may see neither the first nor the last keys of what is loaded.
    HAS_FIRST: tl.constexpr = window_left is not None or ATTENTION_CHUNKED or PADDED
    HAS_END: tl.constexpr = window_right is not None or ATTENTION_CHUNKED
    BLOCK_H: tl.constexpr = BLOCK_M // HALVES
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
    pid = tl.program_id(0)
    head = pid % NUM_HEADS_KV
    if PLANNED:
        seq_idx, from_last = planned_tile(
            pid // NUM_HEADS_KV,
            plan_ptr,
            batch,
            segment,
            lengths,
            GROUP,
            DECODE_ROWS,
            BLOCK_M,
            BLOCK_B,
            ONE_BLOCK,
        )
    else:
        seq_idx = (pid // NUM_HEADS_KV) % batch
        from_last = pid // (NUM_HEADS_KV * batch)
    first_q, seqlen_q = query_span(seq_idx, seq_idx < batch, lengths)
    query_rows = seqlen_q * GROUP
    # The last rows see the most keys under a causal mask: they go first.
    if PLANNED:
        row_tile = (query_rows + BLOCK_M - 1) // BLOCK_M - 1 - from_last
    else:
        row_tile = num_row_tiles - 1 - from_last
    if (row_tile >= 0) & (row_tile * BLOCK_M < query_rows) & (query_rows > DECODE_ROWS):
        first_k, seqlen_k = key_span(seq_idx, seq_idx < batch, lengths)
        offset = seqlen_k - seqlen_q
        padding = left_padding(seq_idx, seq_idx < batch, seqlen_k, lengths)
        windows = (window_left, window_right, attention_chunk)
        first_row = row_tile * BLOCK_M
        first_token = first_row // GROUP
        end_token = tl.minimum((first_row + BLOCK_M - 1) // GROUP + 1, seqlen_q)
        begin, end = visible_keys(first_token, end_token, offset, padding, seqlen_k, windows)
        live_keys = (begin, tl.maximum(end - 1, begin))
        begin = begin // BLOCK_N * BLOCK_N
        stop = begin + (end - begin + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        # Keys that the first and the last row both see, and so all between them.
        full_begin = begin
        full_end = end
        if HAS_END:
            _, full_end = seen_keys(first_token, offset, padding, full_end, windows)
        if HAS_FIRST:
            full_begin, _ = seen_keys(end_token - 1, offset, padding, end, windows)
            full_begin = tl.maximum(full_begin, begin)
            full_begin = (full_begin + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        full_begin = tl.minimum(full_begin, stop)
        full_end = tl.maximum(tl.maximum(full_end, 0) // BLOCK_N * BLOCK_N, full_begin)

        q_base = (
            q_ptr
            + seq_idx.to(tl.int64) * q_stride_b
            + first_q.to(tl.int64) * q_stride_t
            + (head * GROUP).to(tl.int64) * q_stride_h,
            q_stride_t,
            q_stride_h,
        )
        rows0 = first_row + tl.arange(0, BLOCK_H)
        q0 = load_rows(q_base, rows0, query_rows, GROUP, HEAD_DIM, D0, D1, Q_FORMAT, NEGATE)
        row_scales = (None, None)
        seen = seqlen_k - padding
        cells0 = (
            seq_idx,
            (head * GROUP + rows0 % GROUP)[:, None],
            (rows0 // GROUP)[:, None],
            padding,
            seqlen_q,
            seen,
            aux_ptr,
        )
        row_cells = (cells0, cells0)
        if SUMS > 0:
            no_sum = tl.zeros([BLOCK_H, SUMS], tl.float32)
        else:
            no_sum = tl.zeros([BLOCK_H], tl.float32)
        if V1 > 0:
            acc01 = tl.zeros([BLOCK_H, V1], tl.float32)
        else:
            acc01 = tl.zeros([1], tl.float32)
        if KEY_FORMAT != "":
            factor = 1.0
            if q_descale_ptr is not None:
                cell = seq_idx.to(tl.int64) * q_descale_stride_b + head * q_descale_stride_h
                factor *= tl.load(q_descale_ptr + cell)
            if k_descale_ptr is not None:
                cell = seq_idx.to(tl.int64) * k_descale_stride_b + head * k_descale_stride_h
                factor *= tl.load(k_descale_ptr + cell)
            q0, scale0 = halved(q0, factor, D1)
            row_scales = (scale0, None)
        if HALVES == 2:
            rows1 = first_row + BLOCK_H + tl.arange(0, BLOCK_H)
            q1 = load_rows(q_base, rows1, query_rows, GROUP, HEAD_DIM, D0, D1, Q_FORMAT, NEGATE)
            if KEY_FORMAT != "":
                q1, scale1 = halved(q1, factor, D1)
                row_scales = (scale0, scale1)
            queries = (q0, q1)
            cells1 = (
                seq_idx,
                (head * GROUP + rows1 % GROUP)[:, None],
                (rows1 // GROUP)[:, None],
                padding,
                seqlen_q,
                seen,
                aux_ptr,
            )
            row_cells = (cells0, cells1)
            row_ranges = (
                seen_keys(rows0 // GROUP, offset, padding, seqlen_k, windows),
                seen_keys(rows1 // GROUP, offset, padding, seqlen_k, windows),
            )
            row_max1 = tl.full([BLOCK_H], NO_SCORE, tl.float32)
            row_sum1 = no_sum
            acc10 = tl.zeros([BLOCK_H, V0], tl.float32)
            acc11 = acc01
        else:
            queries = (q0, None)
            row_ranges = (seen_keys(rows0 // GROUP, offset, padding, seqlen_k, windows), None)
            row_max1 = tl.zeros([1], tl.float32)
            row_sum1 = tl.zeros([1], tl.float32)
            acc10 = tl.zeros([1], tl.float32)
            acc11 = tl.zeros([1], tl.float32)
        # Where its keys are: of a dense cache, or of the page table.
        row = seq_idx
        if batch_idx_ptr is not None:
            row = cache_row(seq_idx, seq_idx < batch, batch_idx_ptr, num_rows)
        k_base = k_ptr
        v_base = v_ptr
        if k_desc is None:
            k_base += head.to(tl.int64) * k_stride_h
            v_base += head.to(tl.int64) * v_stride_h
        keys = (k_desc, k1_desc, k_base, (k_stride_b, k_stride_t))
        values = (v_desc, v1_desc, v_base, (v_stride_b, v_stride_t))
        if cu_seqlens_k_ptr is None:
            place = (row, first_k, head)
        else:
            place = (seq_idx * 0, first_k, head)
        paging = (page_table_ptr, row.to(tl.int64) * table_stride, num_pages)
        if SPARSE_M > 0:
            list_place = seq_idx * sparse_stride_b + head * sparse_stride_h
            # Sequences may be longer than the lists' bound, which is max_seqlen_q.
            list_place += tl.minimum(first_token, fixed_seqlen_q - 1) // SPARSE_M
            masked_entries, masked_count = key_block_list(
                mask_block_cnt_ptr, mask_block_idx_ptr, list_place, masked_width
            )
            full_entries = masked_entries
            full_count = masked_count * 0
            if full_block_cnt_ptr is not None:
                full_entries, full_count = key_block_list(
                    full_block_cnt_ptr, full_block_idx_ptr, list_place, full_width
                )
            blocks = (seqlen_k + SPARSE_N - 1) // SPARSE_N
            masked_count = entries_inside(masked_entries, masked_count, blocks)
            full_count = entries_inside(full_entries, full_count, blocks)
            inside = entries_inside(full_entries, full_count, seqlen_k // SPARSE_N)
        state = (
            tl.full([BLOCK_H], NO_SCORE, tl.float32),
            no_sum,
            tl.zeros([BLOCK_H, V0], tl.float32),
            acc01,
            row_max1,
            row_sum1,
            acc10,
            acc11,
        )
        if LATE:
            ended = attend_late(
                no_sum,
                state[2],
                state[3],
                queries[0],
                row_scales[0],
                begin,
                full_begin,
                full_end,
                stop,
                row_ranges[0],
                row_cells[0],
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
                BLOCK_H,
                BLOCK_N,
                D0,
                D1,
                V0,
                V1,
                SUMS,
                PAGE_SIZE,
                HAS_FIRST,
                HAS_SOFTCAP,
                SCORE_MOD,
                MASK_MOD,
                KEY_FORMAT,
                K_FROM_FP8,
                V_FROM_FP8,
                IEEE,
                INTERPRETED,
            )
            state = (ended[0], ended[1], ended[2], ended[3], row_max1, row_sum1, acc10, acc11)
        else:
            # Keys before those that every row sees, those, and what is behind them; behind the
            # last whole block are places that are no keys. With lists: full blocks inside the
            # sequence, full blocks on its end, masked blocks.
            whole = tl.minimum(seqlen_k // BLOCK_N * BLOCK_N, stop)
            whole = tl.maximum(whole, full_end)
            for PART in tl.static_range(4 if SPLIT_END else 3):
                key_list = None
                if SPARSE_M > 0:
                    if PART == 0:
                        part_begin = seqlen_k * 0
                        part_end = inside * SPARSE_N
                        key_list = (full_entries, full_count, (end - BLOCK_N) // BLOCK_N * BLOCK_N)
                    elif PART == 1:
                        part_begin = inside * SPARSE_N
                        part_end = full_count * SPARSE_N
                        key_list = (full_entries, full_count, stop)
                    else:
                        part_begin = seqlen_k * 0
                        part_end = masked_count * SPARSE_N
                        key_list = (masked_entries, masked_count, stop)
                elif PART == 0:
                    part_begin = begin
                    part_end = full_begin
                elif PART == 1:
                    part_begin = full_begin
                    part_end = full_end
                elif PART == 2:
                    part_begin = full_end
                    part_end = whole if SPLIT_END else stop
                else:
                    part_begin = whole
                    part_end = stop
                # Parts that are there: without windows or padding nothing is before the second,
                # and between it and the block on the end nothing is without a diagonal.
                if (PART > 0 or HAS_FIRST or SPARSE_M > 0) and (
                    PART != 2 or HAS_END or not SPLIT_END
                ):
                    state = attend_blocks(
                        state,
                        queries,
                        row_scales,
                        part_begin,
                        part_end,
                        key_list,
                        row_ranges,
                        row_cells,
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
                        BLOCK_H,
                        BLOCK_N,
                        D0,
                        D1,
                        V0,
                        V1,
                        SUMS,
                        PAGE_SIZE,
                        SPARSE_N,
                        HAS_FIRST,
                        HAS_SOFTCAP,
                        SCORE_MOD,
                        MASK_MOD if PART == 2 or SPARSE_M == 0 else None,
                        (0 if SPARSE_M > 0 else 1) != PART,
                        (0 if SPARSE_M > 0 else 1) != PART and (PART != 2 or not SPLIT_END),
                        WGMMA,
                        KEY_FORMAT,
                        K_FROM_FP8,
                        V_FROM_FP8,
                        IEEE,
                        INTERPRETED,
                    )
        out_base = (
            out_ptr
            + seq_idx.to(tl.int64) * out_stride_b
            + first_q.to(tl.int64) * out_stride_t
            + (head * GROUP).to(tl.int64) * out_stride_h,
            out_stride_t,
            out_stride_h,
        )
        lse_base = (None, 0, 0)
        if HAS_LSE:
            lse_base = (
                lse_ptr
                + seq_idx.to(tl.int64) * lse_stride_b
                + first_q.to(tl.int64) * lse_stride_t
                + (head * GROUP).to(tl.int64) * lse_stride_h,
                lse_stride_t,
                lse_stride_h,
            )
        v_factor = None
        if v_descale_ptr is not None:
            cell = seq_idx.to(tl.int64) * v_descale_stride_b + head * v_descale_stride_h
            v_factor = tl.load(v_descale_ptr + cell)
        sinks = sinks_ptr
        if sinks_ptr is not None:
            sinks = sinks_ptr + head * GROUP
        store_rows(
            out_base,
            lse_base,
            sinks,
            rows0,
            query_rows,
            state[0],
            state[1],
            state[2],
            state[3],
            v_factor,
            GROUP,
            HEAD_DIM_V,
            V0,
            V1,
            SUMS,
            HAS_LSE,
        )
        if HALVES == 2:
            store_rows(
                out_base,
                lse_base,
                sinks,
                rows1,
                query_rows,
                state[4],
                state[5],
                state[6],
                state[7],
                v_factor,
                GROUP,
                HEAD_DIM_V,
                V0,
                V1,
                SUMS,
                HAS_LSE,
            )

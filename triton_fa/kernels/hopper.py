"""Prefill on Hopper in Gluon: what `prefill.py` computes, with its warps in separate roles.

One program for each multiprocessor. A producer warp takes tiles of query tokens of one head from a
counter and loads queries, keys and values by tensor descriptors (TMA); each consumer, four warps,
attends with its share of the tile's tokens. Weights stay in registers, and consumers take turns at
the tensor cores, so that the softmax of one runs beside the products of another. Key tiles go from
right to left; only those that a boundary runs through pay for a mask.

Every descriptor has five dimensions: wrap, end, batch or page, token, column. A box at wrap 2^30
lies at token `end + token - 2^30`, since addresses are counted modulo 2^64, and ends at `end`: rows
behind it are zeros when loaded and left alone when stored. So a neighbour's rows and unused rows
are never seen, whatever they hold. A head is a range of columns, of two panels with a descriptor
each where its dim is no power of two.

Which sequences there are, in which order, and how long, is found as in `prefill.py`. Where lists
name blocks of keys, the producer counts their tiles and tells the consumers, and each looks up the
keys of a tile while the one before is computed: masked tiles first, then full ones.

Functions of the caller's are plain ones of Triton's; they are compiled with the layouts of what
they are given, which is enough for anything elementwise.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from triton_fa.kernels.compat import gluon_names
from triton_fa.kernels.primitives import (
    LOG2E,
    NEG_INF,
    NO_SCORE,
    VARYING,
    cache_row,
    finish,
    key_span,
    left_padding,
    masked_by,
    page_ids,
    query_span,
    row_tiles,
    scored_by,
    seen_keys,
    visible_keys,
)

tma_load = gluon_names().tma_load
tma_store = gluon_names().tma_store
warps_barrier = gluon_names().barrier
RENAMED = gl.constexpr(gluon_names().public_reinterpret)

# Hardware barriers. Triton takes 0, 1 and one for each partition from 2 on; the tests look.
TURN = gl.constexpr(5)  # 5, 6, 7: a consumer's turn at the tensor cores
KEYS_FREE = gl.constexpr(8)  # 8, 9: all consumers have left a stage of keys
VALUES_FREE = gl.constexpr(10)  # 10, 11: and of values

WRAP = gl.constexpr(1 << 30)
STAGES = gl.constexpr(2)  # tile i of keys, or of values, is in stage i & 1
WARPS = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))  # a number in each of four warps' lanes
LANES = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))  # a number in each lane of one warp
ENTRIES = gl.constexpr(gl.BlockedLayout([4], [32], [1], [0]))  # four numbers in each of them
BROADCAST = gl.constexpr(gl.BlockedLayout([8], [32], [4], [0]))  # eight numbers in every thread
BROADCAST16 = gl.constexpr(gl.BlockedLayout([16], [32], [4], [0]))


# ---------------------------------------------------------------- instructions


@gluon.jit
def barrier_sync(BARRIER, THREADS):
    """Arrive at a hardware barrier, and wait until that many threads have."""
    gl.inline_asm_elementwise(
        "{ bar.sync $1, $2; mov.u32 $0, 0; }",
        "=r,r,r",
        [BARRIER, THREADS],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def barrier_arrive(BARRIER, THREADS):
    """Arrive at a hardware barrier, and go on."""
    gl.inline_asm_elementwise(
        "{ bar.arrive $1, $2; mov.u32 $0, 0; }",
        "=r,r,r",
        [BARRIER, THREADS],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def exp2(x):
    """One instruction; gl.exp2 adds range fix-ups for denormals."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def reciprocal(x):
    """One instruction, good to the last bit but one."""
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def packed(x, DTYPE: gl.constexpr):
    """To 16 bits. Volatile: sunk below the next scores, both would take registers at once."""
    if gl.bfloat16 == DTYPE:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;",
            "=r,f,f",
            [x],
            dtype=gl.bfloat16,
            is_pure=False,
            pack=2,
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;",
            "=r,f,f",
            [x],
            dtype=gl.float16,
            is_pure=False,
            pack=2,
        )


@gluon.jit
def packed8(x):
    """To float8, in an operand's layout."""
    return gl.inline_asm_elementwise(
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; "
        "cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }",
        "=r,f,f,f,f",
        [x],
        dtype=gl.float8e4nv,
        is_pure=False,
        pack=4,
    )


@gluon.jit
def negated8(x):
    """Float8 numbers with the other sign."""
    bits = x.to(gl.int8, bitcast=True) ^ -128
    return bits.to(gl.float8e4nv, bitcast=True)


@gluon.constexpr_function
def rescaling(n):
    """Multiply n accumulators by their factors, unless all factors of the warp are 1.

    A thread holds two rows of an accumulator; elements 0 and 2 belong to different ones.
    """
    factor = 2 * n  # the results are $0 to $n-1, tied to the inputs $n to $2n-1
    products = "".join(f"mul.f32 ${i}, ${i}, ${factor + i}; " for i in range(n))
    return (
        f"{{ .reg .pred p, q; setp.neu.f32 p, ${factor}, 0f3F800000; "
        f"setp.neu.f32 q, ${factor + 2}, 0f3F800000; or.pred p, p, q; "
        f"vote.sync.any.pred p, p, 0xffffffff; @!p bra.uni SKIP; {products}SKIP: }}"
    )


@gluon.constexpr_function
def tied(n):
    """Constraints of assembly with n results in place of its first n of 2n inputs."""
    return ",".join(["=f"] * n + [str(i) for i in range(n)] + ["f"] * n)


@gluon.jit
def rescaled(acc, alpha, LAZY: gl.constexpr):
    """acc times a factor for each row. LAZY: mostly skipped, as the factors are mostly 1."""
    factors = gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
    if LAZY:
        COUNT: gl.constexpr = acc.shape[0] * acc.shape[1] // 128
        _, factors = gl.broadcast(acc, factors)
        return gl.inline_asm_elementwise(
            rescaling(COUNT),
            tied(COUNT),
            [acc, factors],
            dtype=gl.float32,
            is_pure=False,
            pack=COUNT,
        )
    else:
        return acc * factors


# ---------------------------------------------------------------- tiles


@gluon.jit
def add(a, b):
    """The sum, for scans."""
    return a + b


@gluon.jit
def is_order(plan_ptr, batch, segment, BLOCK_B: gl.constexpr):
    """Whether the plan holds an order of all sequences: each one's place leads back to it."""
    idx = gl.arange(0, BLOCK_B, layout=WARPS)
    mask = idx < batch
    seq_idx = gl.load(plan_ptr + 2 * segment + idx, mask=mask, other=0) & 0xFFFF
    there = gl.load(plan_ptr + 2 * segment + seq_idx, mask=mask & (seq_idx < batch), other=-1)
    return gl.sum((mask & ((there >> 16) != idx)).to(gl.int32), 0) == 0


@gluon.jit
def query_tiles(seq_idx, mask, lengths, C: gl.constexpr):
    """Tiles of one head of sequences. Decode counts rows, of all heads of a group."""
    return row_tiles(seq_idx, mask, lengths, C.GROUP, C.DECODE_ROWS, C.BLOCK_M * C.GROUP)


@gluon.jit
def all_query_tiles(batch, lengths, C: gl.constexpr):
    """Tiles of one head of all sequences."""
    count = 0
    for first in range(0, batch, C.BLOCK_B):
        idx = first + gl.arange(0, C.BLOCK_B, layout=WARPS)
        count += gl.sum(query_tiles(idx, idx < batch, lengths, C), 0)
    return count


@gluon.jit
def next_sequences(first, before, order, lengths, C: gl.constexpr):
    """32 sequences from place `first` of the order, and the tiles up to each, `before` included."""
    plan_ptr, batch, segment, is_ordered = order
    idx = first + gl.arange(0, 32, layout=LANES)
    mask = idx < batch
    seq_idx = idx
    if C.ORDERED:
        entry = gl.load(plan_ptr + 2 * segment + idx, mask=mask & is_ordered, other=0)
        seq_idx = gl.where(mask & is_ordered, entry & 0xFFFF, idx)
    tiles = query_tiles(seq_idx, mask, lengths, C)
    return seq_idx, before + gl.associative_scan(tiles, 0, add)


@gluon.jit
def key_tiles(first_token, seqlen_q, seqlen_k, padding, windows, C: gl.constexpr):
    """(first key, one past the last, key tiles, and which of them, lo to hi, need no mask).

    Rows that see no key still have one key tile, all masked: it writes zeros.
    """
    offset = seqlen_k - seqlen_q
    end_token = gl.minimum(first_token + C.BLOCK_M, seqlen_q)
    begin, end = visible_keys(first_token, end_token, offset, padding, seqlen_k, windows)
    full_end = end
    if C.HAS_END:
        _, full_end = seen_keys(first_token, offset, padding, end, windows)
    start = begin // C.ALIGN * C.ALIGN
    count = gl.maximum((end - start + C.BLOCK_N - 1) // C.BLOCK_N, 1)
    lo = 0
    if C.HAS_FIRST:
        full_begin, _ = seen_keys(end_token - 1, offset, padding, end, windows)
        lo = (gl.maximum(full_begin, begin) - start + C.BLOCK_N - 1) // C.BLOCK_N
        lo = gl.minimum(lo, count - 1)
    # The right-most tile is always masked.
    hi = gl.minimum(gl.maximum(full_end - start, 0) // C.BLOCK_N, count - 1)
    return start, end, count, lo, gl.maximum(hi, lo)


@gluon.jit
def blocks_inside(entries_ptr, count, seqlen_k, C: gl.constexpr):
    """How many of a list's entries are whole blocks of the sequence, and how many any."""
    whole = 0
    some = 0
    for start in range(0, count, 128):
        idx = start + gl.arange(0, 128, layout=ENTRIES)
        block = gl.load(entries_ptr + idx, mask=idx < count, other=-1)
        is_whole = (block >= 0) & (block < seqlen_k // C.SPARSE_N)
        is_there = (block >= 0) & (block < (seqlen_k + C.SPARSE_N - 1) // C.SPARSE_N)
        whole += gl.sum(is_whole.to(gl.int32), 0)
        some += gl.sum(is_there.to(gl.int32), 0)
    return whole, some


@gluon.jit
def list_place(seq_idx, head, token, lists, C: gl.constexpr):
    """Which of all lists is that of a tile."""
    stride_b, stride_h, _, _, max_seqlen_q = lists[4]
    # Sequences may be longer than the lists' bound.
    return seq_idx * stride_b + head * stride_h + gl.minimum(token, max_seqlen_q - 1) // C.SPARSE_M


@gluon.jit
def listed_tiles(place, seqlen_k, lists, C: gl.constexpr):
    """Key tiles that a tile's lists name: (of the masked list, 1 if the sequence ends inside of one
    of the full list, all of the full list)."""
    ROUNDS: gl.constexpr = C.SPARSE_N // C.BLOCK_N
    rest = seqlen_k % C.SPARSE_N
    counts_ptr, entries_ptr, full_counts_ptr, full_entries_ptr, numbers = lists
    HAS_FULL: gl.constexpr = full_counts_ptr is not None
    count = gl.minimum(gl.maximum(gl.load(counts_ptr + place), 0), numbers[2])
    ends = 0
    full = 0
    if HAS_FULL:
        full_count = gl.minimum(gl.maximum(gl.load(full_counts_ptr + place), 0), numbers[3])
    entries_ptr += place.to(gl.int64) * numbers[2]
    whole, some = blocks_inside(entries_ptr, count, seqlen_k, C)
    masked = whole * ROUNDS + (some - whole) * ((rest + C.BLOCK_N - 1) // C.BLOCK_N)
    if HAS_FULL:
        full_entries_ptr += place.to(gl.int64) * numbers[3]
        whole, some = blocks_inside(full_entries_ptr, full_count, seqlen_k, C)
        ends = gl.where(rest % C.BLOCK_N != 0, some - whole, 0)
        full = whole * ROUNDS + (some - whole) * (rest // C.BLOCK_N) + ends
    return masked, ends, full


@gluon.jit
def listed_key(step, named, seqlen_k, lists, C: gl.constexpr):
    """First key of tile `step` of those that lists name, from right to left: masked ones, then full
    ones, and behind the last one 0. Whatever the lists hold, it is in a block of the sequence's.

    `named` is (masked tiles, full tiles, which of all lists).
    """
    ROUNDS: gl.constexpr = C.SPARSE_N // C.BLOCK_N
    masked, full, place = named
    _, entries_ptr, _, full_entries_ptr, numbers = lists
    is_masked = step < masked
    tile = gl.maximum(gl.where(is_masked, masked, masked + full) - 1 - step, 0)
    entries_ptr += place.to(gl.int64) * numbers[2] + tile // ROUNDS
    block = gl.load(entries_ptr, mask=is_masked, other=0)
    if full_entries_ptr is not None:
        full_entries_ptr += place.to(gl.int64) * numbers[3] + tile // ROUNDS
        is_full = (step >= masked) & (step < masked + full)
        block += gl.load(full_entries_ptr, mask=is_full, other=0)
    last = gl.maximum(seqlen_k - 1, 0) // C.SPARSE_N
    block = gl.minimum(gl.maximum(block, 0), last)
    return block * C.SPARSE_N + tile % ROUNDS * C.BLOCK_N


@gluon.jit
def send(i, message, box):
    """Message i of the producer, 7 of 8 numbers or 10 of 16, into one of two slots."""
    slots, full, empty = box
    SIZE: gl.constexpr = slots.shape[1]
    COUNT: gl.constexpr = 10 if SIZE == 16 else 7
    mbarrier.wait(empty.index(i & 1), ((i >> 1) & 1) ^ 1)
    place = gl.arange(0, SIZE, layout=LANES)
    numbers = gl.full([SIZE], 0, gl.int32, layout=LANES)
    for k in gl.static_range(COUNT):
        numbers = gl.where(place == k, message[k], numbers)
    slots.index(i & 1).store(numbers)
    mbarrier.arrive(full.index(i & 1), count=1)


@gluon.jit
def receive(i, box):
    """Message i: (head, or -1 at the end; sequence; its first query token; query and key length;
    left padding; first token of the tile); with lists what `listed_tiles` says, too."""
    slots, full, empty = box
    SIZE: gl.constexpr = slots.shape[1]
    COUNT: gl.constexpr = 10 if SIZE == 16 else 7
    EVERYWHERE: gl.constexpr = BROADCAST16 if SIZE == 16 else BROADCAST
    mbarrier.wait(full.index(i & 1), (i >> 1) & 1)
    numbers = slots.index(i & 1).load(EVERYWHERE)
    mbarrier.arrive(empty.index(i & 1), count=1)
    place = gl.arange(0, SIZE, layout=EVERYWHERE)
    message = ()
    for k in gl.static_range(COUNT):
        message = message + (gl.sum(gl.where(place == k, numbers, 0), 0),)  # noqa: RUF005
    return message


# ---------------------------------------------------------------- the producer


@gluon.jit
def load(desc, ready, box, at, live, column):
    """A box of rows from (batch row or page, token) `at` on, `live` of which exist."""
    live = gl.maximum(live, 0)
    tma_load(desc, [WRAP, at[1] + live, at[0], WRAP - live, column], ready, box)


@gluon.jit
def load_panel(panel, ready, i, b, at, live, column, DIM: gl.constexpr, C: gl.constexpr):
    """Box b of key tile i, in as many parts as the descriptor's width takes."""
    desc, _, boxes = panel
    BOXES: gl.constexpr = C.BLOCK_N // C.BOX
    WIDTH: gl.constexpr = desc.block_shape[4]
    PARTS: gl.constexpr = DIM // WIDTH
    for part in gl.static_range(PARTS):
        box = boxes.index(((i & 1) * PARTS + part) * BOXES + b)
        load(desc, ready, box, at, live, column + part * WIDTH)


@gluon.jit
def load_keys(
    source,  # (panels, barriers, first column)
    i,  # number of the tile, over all of the program's
    span,  # from this key on, up to that one
    place,  # (batch row, first token) where there are no pages
    pages,
    FREE: gl.constexpr,
    DIM: gl.constexpr,
    TAIL: gl.constexpr,
    C: gl.constexpr,
):
    """A tile of keys or values, box by box, into a stage that all consumers have left."""
    panels, barriers, column = source
    key, end = span
    ready = free_stage(i, barriers, FREE, C)
    mbarrier.expect(ready, C.BLOCK_N * (DIM + TAIL) * C.BYTES)
    BOXES: gl.constexpr = C.BLOCK_N // C.BOX
    for b in gl.static_range(BOXES):
        at = (place[0], place[1] + key + b * C.BOX)
        if C.PAGE_SIZE:
            page = gl.sum(gl.where(gl.arange(0, 32, layout=LANES) == b, pages, 0), 0)
            at = (page, (key + b * C.BOX) % C.PAGE_SIZE)
        live = end - key - b * C.BOX
        load_panel(panels[0], ready, i, b, at, live, column, DIM, C)
        if TAIL:
            load_panel(panels[1], ready, i, b, at, live, column + DIM, TAIL, C)


@gluon.jit
def free_stage(i, barriers, FREE: gl.constexpr, C: gl.constexpr):
    """Wait until all consumers have left the stage of tile i; the barrier of its being full."""
    full, empty = barriers
    if C.NAMED:
        if i >= STAGES:
            barrier_sync(FREE + (i & 1), C.CONSUMERS * 128 + 32)
    else:
        mbarrier.wait(empty.index(i & 1), ((i >> 1) & 1) ^ 1)
    return full.index(i & 1)


@gluon.jit
def load_transposed(panel, ready, i, at, live, row):
    """Values [dim, keys] of a tile out of `transpose.py`'s: the keys run fastest.

    A step of `end` is 16 bytes here, the smallest one, so what ends at `live` is 16 keys or less
    behind it; zeros are there.
    """
    live = (gl.maximum(live, 0) + 15) // 16 * 16
    end = (at[1] + live) // 16
    tma_load(panel[0], [WRAP // 16, end, at[0], row, WRAP - live], ready, panel[2].index(i))


@gluon.jit
def load_values(source, i, span, place, pages, C: gl.constexpr):
    """A tile of values."""
    if C.FP8:
        panels, barriers, row = source
        key, end = span
        ready = free_stage(i, barriers, VALUES_FREE, C)
        mbarrier.expect(ready, C.BLOCK_N * (C.V0 + C.V1))
        at = (place[2], place[3] + key)
        load_transposed(panels[0], ready, i & 1, at, end - key, row)
        if C.V1:
            load_transposed(panels[1], ready, i & 1, at, end - key, row + C.V0)
    else:
        load_keys(source, i, span, place, pages, VALUES_FREE, C.V0, C.V1, C)


@gluon.jit
def pages_of(key, end, table, C: gl.constexpr):
    """The page of each box of the key tile at `key`, one in a lane; 0 where there are no pages."""
    if C.PAGE_SIZE:
        page_table_ptr, row_offset, num_pages = table
        token = gl.minimum(key + gl.arange(0, 32, layout=LANES) * C.BOX, end - 1)
        return page_ids(
            page_table_ptr, row_offset, gl.maximum(token, 0), num_pages, token >= 0, C.PAGE_SIZE
        )
    else:
        return 0


@gluon.jit
def producer(given, C: gl.constexpr):
    """Take tiles from the counter, tell the consumers, and load what they need."""
    panels, barriers, box, order, lengths, windows, paging, strides, counting, lists = given
    queries, keys, values = panels
    q_barriers, k_barriers, v_barriers = barriers
    page_table_ptr, table_stride, num_pages, batch_idx_ptr, num_rows = paging
    counter_ptr, tiles, num_row_tiles = counting
    batch = order[1]
    CONSUMERS: gl.constexpr = C.CONSUMERS
    ROWS: gl.constexpr = C.BLOCK_M // CONSUMERS
    loaded = 0  # key tiles so far
    sent = 0  # query tiles so far
    first = 0
    before = 0
    if C.PLANNED:
        sequences, upto = next_sequences(first, before, order, lengths, C)
    tile = gl.program_id(0)
    while tile < tiles:
        # Heads run fastest: those of one group meet in the L2 cache.
        head = tile % C.HEADS_Q
        from_last = tile // C.HEADS_Q
        if C.PLANNED:
            while (gl.max(upto, 0) <= from_last) & (first + 32 < batch):
                first += 32
                before = gl.max(upto, 0)
                sequences, upto = next_sequences(first, before, order, lengths, C)
            passed = upto <= from_last
            found = gl.sum(passed.to(gl.int32), 0)
            is_here = gl.arange(0, 32, layout=LANES) == found
            seq_idx = gl.where(found < 32, gl.sum(gl.where(is_here, sequences, 0), 0), batch)
            from_last -= gl.maximum(gl.max(gl.where(passed, upto, 0), 0), before)
        else:
            seq_idx = from_last % batch
            from_last = from_last // batch
        exists = seq_idx < batch
        first_q, seqlen_q = query_span(seq_idx, exists, lengths)
        first_k, seqlen_k = key_span(seq_idx, exists, lengths)
        padding = left_padding(seq_idx, exists, seqlen_k, lengths)
        # The last tokens see the most keys under a causal mask: they go first.
        last = num_row_tiles - 1
        if C.PLANNED:
            last = (seqlen_q + C.BLOCK_M - 1) // C.BLOCK_M - 1
        token = (last - from_last) * C.BLOCK_M
        is_ours = (token >= 0) & (token < seqlen_q) & (seqlen_q * C.GROUP > C.DECODE_ROWS)
        start, end, count, _, _ = key_tiles(token, seqlen_q, seqlen_k, padding, windows, C)
        if C.SPARSE_N:
            at_list = gl.where(is_ours, list_place(seq_idx, head, token, lists, C), 0)
            masked, ends, full = listed_tiles(at_list, seqlen_k, lists, C)
            named = (masked, full, at_list)
            count = gl.maximum(masked + full, 1)
        count = gl.where(is_ours, count, 0)
        end = gl.where(is_ours, end, 0)
        row = seq_idx
        if batch_idx_ptr is not None:
            row = cache_row(seq_idx, exists, batch_idx_ptr, num_rows)
        table = (page_table_ptr, row.to(gl.int64) * table_stride, num_pages)
        if lengths[4] is not None:
            row = 0
        # Transposed values are in rows of their own, of packed sequences from blocks of 16 on.
        row_v = seq_idx
        first_v = 0
        if lengths[4] is not None:
            row_v = 0
            first_v = (first_k // 16 + seq_idx) * 16
        place = (row, first_k, row_v, first_v)
        k_source = (keys, k_barriers, head // C.GROUP * strides[1])
        v_source = (values, v_barriers, head // C.GROUP * strides[2])
        key = start + (count - 1) * C.BLOCK_N
        if C.SPARSE_N:
            key = listed_key(0, named, seqlen_k, lists, C)
            next_key = listed_key(1, named, seqlen_k, lists, C)
        pages = pages_of(key, end, table, C)
        if count > 0:
            about = (head, seq_idx, first_q, seqlen_q, seqlen_k, padding, token)
            if C.SPARSE_N:
                send(sent, about + (masked, ends, full), box)  # noqa: RUF005
            else:
                send(sent, about, box)
            load_keys(k_source, loaded, (key, end), place, pages, KEYS_FREE, C.D0, C.D1, C)
            for c in gl.static_range(CONSUMERS):
                mbarrier.wait(q_barriers[1].index(c), (sent & 1) ^ 1)
                ready = q_barriers[0].index(c)
                mbarrier.expect(ready, ROWS * (C.D0 + C.D1) * C.BYTES)
                mine = token + c * ROWS
                at = (0, first_q + mine)
                if C.DENSE:
                    at = (seq_idx, mine)
                live = seqlen_q - mine
                column = head * strides[0]
                load(queries[0][0], ready, queries[0][2].index(c), at, live, column)
                if C.D1:
                    load(queries[1][0], ready, queries[1][2].index(c), at, live, column + C.D0)
        tile = tiles
        if tiles > gl.num_programs(0):  # else every tile has a program, and the counter is not 0
            tile = gl.atomic_add(counter_ptr, 1) + gl.num_programs(0)
        for j in range(1, count):  # keys one tile ahead of values
            if C.SPARSE_N:
                ahead = next_key
                next_key = listed_key(j + 1, named, seqlen_k, lists, C)
            else:
                ahead = key - C.BLOCK_N
            next_pages = pages_of(ahead, end, table, C)
            span = (ahead, end)
            load_keys(k_source, loaded + 1, span, place, next_pages, KEYS_FREE, C.D0, C.D1, C)
            load_values(v_source, loaded, (key, end), place, pages, C)
            pages = next_pages
            key = ahead
            loaded += 1
        if count > 0:
            load_values(v_source, loaded, (key, end), place, pages, C)
            loaded += 1
            sent += 1
    send(sent, (-1, 0, 0, 0, 0, 0, 0, 0, 0, 0), box)
    if C.NAMED:  # leave no arrival behind in the hardware barriers
        for i in range(gl.maximum(loaded - STAGES, 0), loaded):
            barrier_sync(KEYS_FREE + (i & 1), C.CONSUMERS * 128 + 32)
            barrier_sync(VALUES_FREE + (i & 1), C.CONSUMERS * 128 + 32)


# ---------------------------------------------------------------- the consumers


@gluon.jit
def await_tile(i, barriers, C: gl.constexpr):
    """Wait for key tile i."""
    mbarrier.wait(barriers[0].index(i & 1), (i >> 1) & 1)


@gluon.jit
def leave_stage(i, barriers, FREE: gl.constexpr, C: gl.constexpr):
    """A consumer leaves the stage of key tile i.

    An mbarrier costs a barrier of the consumer's warps, a hardware barrier one instruction.
    """
    if C.NAMED:
        barrier_arrive(FREE + (i & 1), C.CONSUMERS * 128 + 32)
    else:
        mbarrier.arrive(barriers[1].index(i & 1), count=1)


@gluon.jit
def raw_scores(queries, keys, i, SCORES: gl.constexpr, C: gl.constexpr):
    """The products of queries and key tile i, begun."""
    ROWS: gl.constexpr = C.BLOCK_M // C.CONSUMERS
    scores = gl.full([ROWS, C.BLOCK_N], 0.0, gl.float32, layout=SCORES)
    k = keys[0][1].index(i & 1).permute((1, 0))
    scores = warpgroup_mma(queries[0], k, scores, use_acc=False, is_async=True)
    if C.D1:
        k = keys[1][1].index(i & 1).permute((1, 0))
        scores = warpgroup_mma(queries[1], k, scores, is_async=True)
    return scores


@gluon.jit
def value_tile(panel, i, C: gl.constexpr):
    """Values [keys, dim] of key tile i."""
    if C.FP8:
        return panel[1].index(i & 1).permute((1, 0))
    else:
        return panel[1].index(i & 1)


@gluon.jit
def weights(prob, LAYOUT: gl.constexpr, DTYPE: gl.constexpr, C: gl.constexpr):
    """Weights as an operand in registers, by layouts alone: no thread needs another's.

    Of 16 keys a thread holds those of two pairs 8 apart, which float8 operands take for 4 in a row.
    `transpose.py` has the values in that order.
    """
    if C.FP8:
        ROWS: gl.constexpr = prob.shape[0]
        KEYS: gl.constexpr = prob.shape[1]
        prob = gl.permute(gl.reshape(prob, [ROWS, KEYS // 16, 2, 4, 2]), (0, 1, 3, 2, 4))
        prob = gl.reshape(prob, [ROWS, KEYS])
        return packed8(gl.convert_layout(prob, LAYOUT, assert_trivial=True))
    else:
        return gl.convert_layout(packed(prob, DTYPE), LAYOUT)


@gluon.jit
def weighted(prob, values, i, accs, C: gl.constexpr):
    """Accumulators with the weighted values of key tile i, begun."""
    acc = warpgroup_mma(prob, value_tile(values[0], i, C), accs[0], is_async=True)
    if C.V1:
        WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, accs[1].type.layout, 4 // C.BYTES)
        prob = gl.convert_layout(prob, WEIGHTS)
        return acc, warpgroup_mma(prob, value_tile(values[1], i, C), accs[1], is_async=True)
    else:
        return (acc,)


@gluon.jit
def finished(accs, C: gl.constexpr):
    """Accumulators when no product is under way any more."""
    if C.V1:
        return warpgroup_mma_wait(0, deps=[accs[0], accs[1]])
    else:
        return (warpgroup_mma_wait(0, deps=[accs[0]]),)


@gluon.jit
def changed_and_masked(
    scores,
    key,
    rows,
    windows,
    scales,
    about,  # (sequence, query head, pointers) for the functions
    is_full,  # whether lists say that MASK_MOD keeps all of the tile
    MASKED: gl.constexpr,
    SCORE_MOD: gl.constexpr,
    MASK_MOD: gl.constexpr,
    C: gl.constexpr,
):
    """Scores as `scale_of` says; -inf where a row does not see a key."""
    first_row, seqlen_q, seqlen_k, padding = rows
    OF_COLUMN: gl.constexpr = gl.SliceLayout(0, scores.type.layout)
    OF_ROW: gl.constexpr = gl.SliceLayout(1, scores.type.layout)
    if SCORE_MOD is not None or MASK_MOD is not None:
        seq_idx, head, aux = about
        token = (first_row + gl.arange(0, scores.shape[0], layout=OF_ROW))[:, None]
        column = (key - padding + gl.arange(0, scores.shape[1], layout=OF_COLUMN))[None, :]
        cells = (seq_idx, head, token, column, seqlen_q, seqlen_k - padding, aux)
    if SCORE_MOD is not None:
        scores = scored_by(SCORE_MOD, scores, scales[0], cells)
    if C.HAS_SOFTCAP:  # as in `softcapped`
        scores = scales[1] - 2.0 * scales[1] * reciprocal(1.0 + exp2(scores * scales[0]))
    if MASK_MOD is not None:
        if C.SPARSE_N:
            if not is_full:
                scores = masked_by(MASK_MOD, scores, cells)
        else:
            scores = masked_by(MASK_MOD, scores, cells)
    if MASKED:
        token = first_row + gl.arange(0, scores.shape[0], layout=OF_ROW)
        first, end = seen_keys(token, seqlen_k - seqlen_q, padding, seqlen_k, windows)
        column = gl.arange(0, scores.shape[1], layout=OF_COLUMN)
        keep = column[None, :] < (end - key)[:, None]
        if C.HAS_FIRST:
            keep &= column[None, :] >= (first - key)[:, None]
        scores = gl.where(keep, scores, NEG_INF)
    return scores


@gluon.jit
def scale_of(scales, SCORE_MOD: gl.constexpr, C: gl.constexpr):
    """What scores are multiplied by for base 2: raw ones, those of a softcap or of a function."""
    if C.HAS_SOFTCAP:
        return 1.0
    elif SCORE_MOD is not None:
        return LOG2E
    else:
        return scales[0]


@gluon.jit
def sums(prob, C: gl.constexpr):
    """Row sums; with PARTIAL eight for each row, which no thread shares with another."""
    if C.PARTIAL:
        GROUPS: gl.constexpr = prob.shape[1] // 8
        return gl.sum(gl.reshape(prob, [prob.shape[0], GROUPS, 8]), 1)
    else:
        return gl.sum(prob, 1)


@gluon.jit
def softmax_step(
    scores,
    row_max,
    row_sum,
    scale_log2,
    UNSEEN: gl.constexpr,  # a row may have seen no key yet
    FIRST: gl.constexpr,
    C: gl.constexpr,
):
    """(weights, factor for what was summed before, row maximum, row sum).

    Weights and sums are times 2^SHIFT. LAZY: the maximum moves only when it is outgrown by 2^SLACK.
    The result does not depend on either but for how weights are rounded.
    """
    highest = gl.maximum(row_max, gl.max(scores, 1))
    if C.LAZY and not FIRST:
        has_grown = (highest - row_max) * scale_log2 > C.SLACK
        highest = gl.where(has_grown, highest, row_max)
    pivot = highest
    if UNSEEN:
        pivot = gl.where(highest == NEG_INF, 0.0, highest)
    shift = -pivot * scale_log2
    if C.FP8:
        prob = exp2(scores * scale_log2 + (shift + C.SHIFT)[:, None])
    else:
        prob = exp2(scores * scale_log2 + shift[:, None])
    if FIRST:
        return prob, highest, highest, sums(prob, C)
    else:
        if C.LAZY:
            alpha = gl.where(has_grown, exp2((row_max - highest) * scale_log2), 1.0)
        else:
            alpha = exp2(row_max * scale_log2 + shift)
        if C.PARTIAL:
            factor = gl.convert_layout(alpha, gl.SliceLayout(1, row_sum.type.layout))[:, None]
        else:
            factor = alpha
        return prob, alpha, highest, row_sum * factor + sums(prob, C)


@gluon.jit
def attend(
    state,  # weights of the tile before, accumulators, row maximum, row sum
    i,  # number of the key tile
    key,  # its first key
    rows,  # (first token, query length, key length, left padding)
    given,
    is_full,
    MASKED: gl.constexpr,
    SCORE_MOD: gl.constexpr,
    MASK_MOD: gl.constexpr,
    CONSUMER: gl.constexpr,
    SCORES: gl.constexpr,
    C: gl.constexpr,
):
    """The scores of key tile i and the weighted values of the one before, together; the softmax.

    Weights are handed on in float32: 16-bit ones would be taken apart and packed in every round.
    """
    prob, accs, row_max, row_sum = state
    queries, keys, values, k_barriers, v_barriers, windows, scales, about = given
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, accs[0].type.layout, 4 // C.BYTES)
    prob = weights(prob, WEIGHTS, queries[0].dtype, C)
    await_tile(i, k_barriers, C)
    barrier_sync(TURN + CONSUMER, 256)
    scores = raw_scores(queries, keys, i, SCORES, C)
    await_tile(i - 1, v_barriers, C)
    accs = weighted(prob, values, i - 1, accs, C)
    barrier_arrive(TURN + (CONSUMER + 1) % C.CONSUMERS, 256)
    PRODUCTS: gl.constexpr = 2 if C.V1 else 1
    scores = warpgroup_mma_wait(PRODUCTS, deps=[scores])
    leave_stage(i, k_barriers, KEYS_FREE, C)
    scores = changed_and_masked(
        scores, key, rows, windows, scales, about, is_full, MASKED, SCORE_MOD, MASK_MOD, C
    )
    UNSEEN: gl.constexpr = MASKED or SCORE_MOD is not None or MASK_MOD is not None
    scale_log2 = scale_of(scales, SCORE_MOD, C)
    prob, alpha, row_max, row_sum = softmax_step(
        scores, row_max, row_sum, scale_log2, UNSEEN, False, C
    )
    accs = finished(accs, C)
    leave_stage(i - 1, v_barriers, VALUES_FREE, C)
    if C.V1:
        accs = (rescaled(accs[0], alpha, C.LAZY), rescaled(accs[1], alpha, C.LAZY))
    else:
        accs = (rescaled(accs[0], alpha, C.LAZY),)
    return prob, accs, row_max, row_sum


@gluon.jit
def stage_out(acc, factor, row_sum, smem):
    """The result of rows into shared memory; zeros for those that saw no key."""
    OF_ROW: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    has_seen = gl.convert_layout(row_sum, OF_ROW)[:, None] != 0
    out = gl.where(has_seen, acc * gl.convert_layout(factor, OF_ROW)[:, None], 0.0)
    smem.store(out.to(smem.dtype))


@gluon.jit
def descaled(scale, head, seq_idx, descales):
    """The scale of one kv head's scores, of any sign, and the factor of its values."""
    q_descale_ptr, k_descale_ptr, v_descale_ptr, strides = descales
    factor = 1.0
    if q_descale_ptr is not None:
        scale *= descale_of(q_descale_ptr, head, seq_idx, strides[0], strides[1])
    if k_descale_ptr is not None:
        scale *= descale_of(k_descale_ptr, head, seq_idx, strides[2], strides[3])
    if v_descale_ptr is not None:
        factor = descale_of(v_descale_ptr, head, seq_idx, strides[4], strides[5])
    return scale, factor


@gluon.jit
def with_sign(queries, factor, C: gl.constexpr):
    """Negate a consumer's queries where their factor is negative, for scores of a positive one."""
    if factor < 0:
        negate(queries[0])
        if C.D1:
            negate(queries[1])
        fence_async_shared()
        warps_barrier()


@gluon.jit
def negate(smem):
    """All float8 numbers of a block in shared memory, by one consumer."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0])
    smem.store(negated8(smem.load(LAYOUT)))


@gluon.jit
def positive(scale):
    """The size of a factor; one of 0 stays a factor, of scores that may be -inf."""
    return gl.where(gl.abs(scale) < 1e-30, 1e-30, gl.abs(scale))


@gluon.jit
def descale_of(descale_ptr, head, seq_idx, stride_b, stride_h):
    """One number of [batch, heads_kv]."""
    return gl.load(descale_ptr + seq_idx.to(gl.int64) * stride_b + head * stride_h)


@gluon.jit
def store_lse(lse, lse_ptr, tile, first_row, strides):
    """One number for each query token."""
    head, seq_idx, first_q, seqlen_q = tile
    token = first_row + gl.arange(0, lse.shape[0], layout=lse.type.layout)
    lse_ptr += seq_idx.to(gl.int64) * strides[0] + head.to(gl.int64) * strides[2]
    lse_ptr += first_q.to(gl.int64) * strides[1]
    gl.store(lse_ptr + token * strides[1], lse, mask=token < seqlen_q)


@gluon.jit
def rows_of(queries, CONSUMER: gl.constexpr, C: gl.constexpr):
    """The panels of a consumer's queries."""
    if C.D1:
        return queries[0][1].index(CONSUMER), queries[1][1].index(CONSUMER)
    else:
        return (queries[0][1].index(CONSUMER),)


@gluon.jit
def no_values(ROWS: gl.constexpr, C: gl.constexpr):
    """Accumulators of nothing."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.V0, 32 // C.BYTES])
    acc = gl.full([ROWS, C.V0], 0.0, gl.float32, layout=LAYOUT)
    if C.V1:
        TAIL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.V1, 32 // C.BYTES])
        return acc, gl.full([ROWS, C.V1], 0.0, gl.float32, layout=TAIL)
    else:
        return (acc,)


@gluon.jit
def consumer(
    CONSUMER: gl.constexpr,
    given,
    SCORE_MOD: gl.constexpr,
    MASK_MOD: gl.constexpr,
    C: gl.constexpr,
):
    """Attend with one consumer's tokens of tile after tile."""
    panels, outs, barriers, box, results, windows, scales, descales, aux, lists = given
    queries, keys, values = panels
    q_barriers, k_barriers, v_barriers = barriers
    lse_ptr, lse_strides, sinks_ptr, out_stride_h = results
    ROWS: gl.constexpr = C.BLOCK_M // C.CONSUMERS
    DEPTH: gl.constexpr = 32 // C.BYTES  # of one product's instruction
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BLOCK_N, DEPTH])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.V0, DEPTH])
    OF_ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    PANELS: gl.constexpr = 2 if C.V1 else 1
    IS_SCALED: gl.constexpr = descales[0] is not None or descales[1] is not None
    mine = rows_of(queries, CONSUMER, C)
    if CONSUMER == C.CONSUMERS - 1:
        barrier_arrive(TURN, 256)  # the first turn is consumer 0's
    i = 0  # key tiles so far
    got = 0  # query tiles so far
    message = receive(0, box)
    while message[0] >= 0:
        head, seq_idx, first_q, seqlen_q, seqlen_k, padding, token = message[:7]
        key, _, count, lo, hi = key_tiles(token, seqlen_q, seqlen_k, padding, windows, C)
        key += (count - 1) * C.BLOCK_N
        is_full = False
        if C.SPARSE_N:
            masked, ends, full = message[7:]
            count = gl.maximum(masked + full, 1)
            lo = 0
            hi = count - gl.maximum(masked + ends, 1)
            named = (masked, full, list_place(seq_idx, head, token, lists, C))
            is_full = masked == 0
            key = gl.where(masked + full > 0, listed_key(0, named, seqlen_k, lists, C), seqlen_k)
            next_key = listed_key(1, named, seqlen_k, lists, C)
        first_row = token + CONSUMER * ROWS
        rows = (first_row, seqlen_q, seqlen_k, padding)
        signed, descale = descaled(scales[0], head // C.GROUP, seq_idx, descales)
        scale = scales[0]
        if IS_SCALED:
            scale = positive(signed)
        of_tile = (scale, scales[1])
        about = (seq_idx, head, aux)
        shared = (mine, keys, values, k_barriers, v_barriers, windows, of_tile, about)
        # The right-most key tile: there is nothing to overlap with.
        mbarrier.wait(q_barriers[0].index(CONSUMER), got & 1)
        if IS_SCALED:
            with_sign(mine, signed, C)
        await_tile(i, k_barriers, C)
        scores = warpgroup_mma_wait(0, deps=[raw_scores(mine, keys, i, SCORES, C)])
        leave_stage(i, k_barriers, KEYS_FREE, C)
        scores = changed_and_masked(
            scores, key, rows, windows, of_tile, about, is_full, True, SCORE_MOD, MASK_MOD, C
        )
        row_max = gl.full([ROWS], NEG_INF, gl.float32, layout=OF_ROW)
        scale_log2 = scale_of(of_tile, SCORE_MOD, C)
        prob, _, row_max, row_sum = softmax_step(scores, row_max, 0, scale_log2, True, True, C)
        state = (prob, no_values(ROWS, C), row_max, row_sum)
        i += 1
        # The other tiles that an end runs through, those that all rows see, and those that a first
        # key runs through. With lists the first are those that are masked, and a full one on the
        # sequence's end.
        if C.HAS_END or C.HAS_FIRST or C.SPARSE_N:
            for j in range(hi, count - 1):
                if C.SPARSE_N:
                    step = j - hi + 1
                    is_full = step >= masked
                    key = next_key
                    next_key = listed_key(step + 1, named, seqlen_k, lists, C)
                else:
                    key -= C.BLOCK_N
                state = attend(
                    state,
                    i,
                    key,
                    rows,
                    shared,
                    is_full,
                    True,
                    SCORE_MOD,
                    MASK_MOD,
                    CONSUMER,
                    SCORES,
                    C,
                )
                i += 1
        for j in range(lo, hi):
            if not C.SPARSE_N:
                key -= C.BLOCK_N
            elif SCORE_MOD is not None:
                key = next_key
                next_key = listed_key(count - hi + j + 1, named, seqlen_k, lists, C)
            state = attend(
                state,
                i,
                key,
                rows,
                shared,
                True,
                False,
                SCORE_MOD,
                MASK_MOD if C.SPARSE_N == 0 else None,
                CONSUMER,
                SCORES,
                C,
            )
            i += 1
        if C.HAS_FIRST:
            for _j in range(lo):
                key -= C.BLOCK_N
                state = attend(
                    state,
                    i,
                    key,
                    rows,
                    shared,
                    False,
                    True,
                    SCORE_MOD,
                    MASK_MOD,
                    CONSUMER,
                    SCORES,
                    C,
                )
                i += 1
        prob, accs, row_max, row_sum = state
        if C.OWN_OUT:
            mbarrier.arrive(q_barriers[1].index(CONSUMER), count=1)
        # The last values; beside them the next tile's numbers and the lse.
        WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, ACC, 4 // C.BYTES)
        prob = weights(prob, WEIGHTS, mine[0].dtype, C)
        await_tile(i - 1, v_barriers, C)
        accs = weighted(prob, values, i - 1, accs, C)
        tile = (head, seq_idx, first_q, seqlen_q)
        got += 1
        message = receive(got, box)
        if C.PARTIAL:
            row_sum = gl.convert_layout(gl.sum(row_sum, 1), OF_ROW)
        row_max = gl.where(row_max == NEG_INF, NO_SCORE, row_max * scale_log2 - C.SHIFT)
        sink = 0.0
        if sinks_ptr is not None:
            sink = gl.load(sinks_ptr + tile[0]).to(gl.float32) * LOG2E
        factor, lse = finish(row_max, row_sum, sink, sinks_ptr is not None)
        if C.FP8:
            factor *= descale
        if C.HAS_LSE:
            store_lse(lse, lse_ptr, tile, first_row, lse_strides)
        accs = finished(accs, C)
        leave_stage(i - 1, v_barriers, VALUES_FREE, C)
        # Through shared memory, from where it is copied while the next tile begins.
        if C.OWN_OUT:
            tma.store_wait(0)
        warps_barrier()
        for v in gl.static_range(PANELS):
            stage_out(accs[v], factor, row_sum, outs[v][1].index(CONSUMER))
        fence_async_shared()
        warps_barrier()
        row = 0
        if C.DENSE:
            row = tile[1]
        live = gl.maximum(tile[3] - first_row, 0)
        end = tile[2] + first_row + live
        for v in gl.static_range(PANELS):
            column = tile[0] * out_stride_h + v * C.V0
            tma_store(outs[v][0], [WRAP, end, row, WRAP - live, column], outs[v][2].index(CONSUMER))
        if not C.OWN_OUT:
            tma.store_wait(0)
            mbarrier.arrive(q_barriers[1].index(CONSUMER), count=1)
    tma.store_wait(0)
    if CONSUMER == 0:
        barrier_sync(TURN, 256)  # the last turn, which nobody takes


# ---------------------------------------------------------------- the kernel


@gluon.jit
def boxes_of(smem, desc):
    """Shared memory of a panel as the boxes that its descriptor loads or stores."""
    SHAPE: gl.constexpr = desc.block_shape
    COUNT: gl.constexpr = smem.numel // (SHAPE[3] * SHAPE[4])
    if RENAMED:
        return smem.reinterpret(smem.dtype, [COUNT, 1, 1, 1, SHAPE[3], SHAPE[4]], desc.layout)
    else:
        return smem._reinterpret(smem.dtype, [COUNT, 1, 1, 1, SHAPE[3], SHAPE[4]], desc.layout)


@gluon.jit
def panel(desc, COUNT: gl.constexpr, ROWS: gl.constexpr, DIM: gl.constexpr):
    """(Descriptor, shared memory for COUNT blocks [ROWS, DIM], the same in boxes)."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, DIM], desc.dtype)
    smem = gl.allocate_shared_memory(desc.dtype, [COUNT, ROWS, DIM], LAYOUT)
    return desc, smem, boxes_of(smem, desc)


@gluon.jit
def panels_of(
    descs, COUNT: gl.constexpr, ROWS: gl.constexpr, DIM: gl.constexpr, TAIL: gl.constexpr
):
    """One panel, or two."""
    if TAIL:
        return panel(descs[0], COUNT, ROWS, DIM), panel(descs[1], COUNT, ROWS, TAIL)
    else:
        return (panel(descs[0], COUNT, ROWS, DIM),)


@gluon.jit
def transposed_panels(
    descs, COUNT: gl.constexpr, KEYS: gl.constexpr, DIM: gl.constexpr, TAIL: gl.constexpr
):
    """Values, [dim, keys] each."""
    if TAIL:
        return panel(descs[0], COUNT, DIM, KEYS), panel(descs[1], COUNT, TAIL, KEYS)
    else:
        return (panel(descs[0], COUNT, DIM, KEYS),)


@gluon.jit
def barrier_pair(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT pairs of barriers: full, by the producer, and empty, by so many consumers."""
    full = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=ARRIVALS)
    return full, empty


@gluon.jit(do_not_specialize=[*VARYING, "tiles", "counter_offset"])
def hopper_kernel(
    out_desc,  # of the first panels, and of the second ones or None
    out_tail_desc,
    q_desc,
    q_tail_desc,
    k_desc,
    k_tail_desc,
    v_desc,
    v_tail_desc,
    lse_ptr,  # [heads_q, total_q] or [batch, heads_q, seqlen_q], float32
    part_ptr,  # the tile counter is at counter_offset, an int32 that was set to 0
    page_table_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    seqused_q_ptr,
    seqused_k_ptr,
    cu_seqlens_k_new_ptr,
    leftpad_ptr,
    batch_idx_ptr,
    sinks_ptr,
    q_descale_ptr,  # [batch, heads_kv] float32, as the two below; for float8 only
    k_descale_ptr,
    v_descale_ptr,
    aux_ptr,  # a tuple of pointers for the functions below, or None
    mask_block_cnt_ptr,  # lists of key blocks, [batch or 1, heads or 1, query blocks (, entries)]
    mask_block_idx_ptr,
    full_block_cnt_ptr,
    full_block_idx_ptr,
    plan_ptr,
    out_stride_h,
    lse_stride_b,
    lse_stride_t,
    lse_stride_h,
    q_stride_h,
    k_stride_h,
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
    tiles,
    counter_offset,
    window_left,
    window_right,
    attention_chunk,
    sparse_stride_b,
    sparse_stride_h,
    masked_width,
    full_width,
    scale_log2,
    softcap_log2,
    SCORE_MOD: gl.constexpr,
    MASK_MOD: gl.constexpr,
    C: gl.constexpr,  # a Variant of `hopper_plans.py`
):
    """out = softmax(scale * q k^T + mask) v for tiles of BLOCK_M tokens of one head.

    Sequences of at most DECODE_ROWS rows belong to the decode path and are left alone.
    """
    ROWS: gl.constexpr = C.BLOCK_M // C.CONSUMERS
    queries = panels_of((q_desc, q_tail_desc), C.CONSUMERS, ROWS, C.D0, C.D1)
    keys = panels_of((k_desc, k_tail_desc), STAGES, C.BLOCK_N, C.D0, C.D1)
    if C.FP8:
        values = transposed_panels((v_desc, v_tail_desc), STAGES, C.BLOCK_N, C.V0, C.V1)
    else:
        values = panels_of((v_desc, v_tail_desc), STAGES, C.BLOCK_N, C.V0, C.V1)
    if C.OWN_OUT:
        outs = panels_of((out_desc, out_tail_desc), C.CONSUMERS, ROWS, C.V0, C.V1)
    else:
        outs = ((out_desc, queries[0][1], boxes_of(queries[0][1], out_desc)),)
        if C.V1:
            outs = (outs[0], (out_tail_desc, queries[1][1], boxes_of(queries[1][1], out_tail_desc)))
    SLOT: gl.constexpr = 16 if C.SPARSE_N else 8
    LINEAR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    slots = gl.allocate_shared_memory(gl.int32, [2, SLOT], LINEAR)
    messages = barrier_pair(2, C.CONSUMERS)
    box = (slots, messages[0], messages[1])
    q_barriers = barrier_pair(C.CONSUMERS, 1)
    k_barriers = barrier_pair(STAGES, C.CONSUMERS)
    v_barriers = barrier_pair(STAGES, C.CONSUMERS)
    fence_async_shared()
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
    scales = (scale_log2, softcap_log2)
    is_ordered = False
    if C.ORDERED:
        is_ordered = is_order(plan_ptr, batch, segment, C.BLOCK_B)
    if C.PLANNED:
        tiles = gl.minimum(tiles, all_query_tiles(batch, lengths, C) * C.HEADS_Q)
    order = (plan_ptr, batch, segment, is_ordered)
    counter_ptr = (part_ptr + counter_offset).to(gl.pointer_type(gl.int32), bitcast=True)
    lse_strides = (lse_stride_b, lse_stride_t, lse_stride_h)
    results = (lse_ptr, lse_strides, sinks_ptr, out_stride_h)
    barriers = (q_barriers, k_barriers, v_barriers)
    panels = (queries, keys, values)
    lists = (
        mask_block_cnt_ptr,
        mask_block_idx_ptr,
        full_block_cnt_ptr,
        full_block_idx_ptr,
        (sparse_stride_b, sparse_stride_h, masked_width, full_width, fixed_seqlen_q),
    )
    loading = (
        panels,
        barriers,
        box,
        order,
        lengths,
        windows,
        (page_table_ptr, table_stride, num_pages, batch_idx_ptr, num_rows),
        (q_stride_h, k_stride_h, v_stride_h),
        (counter_ptr, tiles, num_row_tiles),
        lists,
    )
    strides = (
        q_descale_stride_b,
        q_descale_stride_h,
        k_descale_stride_b,
        k_descale_stride_h,
        v_descale_stride_b,
        v_descale_stride_h,
    )
    descales = (q_descale_ptr, k_descale_ptr, v_descale_ptr, strides)
    attending = (
        panels,
        outs,
        barriers,
        box,
        results,
        windows,
        scales,
        descales,
        aux_ptr,
        lists,
    )
    C0: gl.constexpr = 0
    C1: gl.constexpr = 1
    C2: gl.constexpr = 2
    if C.CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consumer, (C0, attending, SCORE_MOD, MASK_MOD, C)),
                (consumer, (C1, attending, SCORE_MOD, MASK_MOD, C)),
                (producer, (loading, C)),
            ],
            [4, 1],
            [C.REGISTERS, C.PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (consumer, (C0, attending, SCORE_MOD, MASK_MOD, C)),
                (consumer, (C1, attending, SCORE_MOD, MASK_MOD, C)),
                (consumer, (C2, attending, SCORE_MOD, MASK_MOD, C)),
                (producer, (loading, C)),
            ],
            [4, 4, 1],
            [C.REGISTERS, C.REGISTERS, C.PRODUCER_REGISTERS],
        )


@gluon.jit
def functions_kernel(
    scores_ptr,  # [64, BLOCK_N] float32
    aux_ptr,
    number,
    BLOCK_N: gl.constexpr,
    DEPTH: gl.constexpr,
    SCORE_MOD: gl.constexpr,
    MASK_MOD: gl.constexpr,
):
    """The caller's functions, called as by `hopper_kernel`. It is compiled, and not launched."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, DEPTH])
    token = gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))[:, None]
    column = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))[None, :]
    scores = gl.load(scores_ptr + token * BLOCK_N + column)
    cells = (number, number + 1, token, column, number + 2, number + 3, aux_ptr)
    if SCORE_MOD is not None:
        scores = scored_by(SCORE_MOD, scores, 1.0, cells)
    if MASK_MOD is not None:
        scores = masked_by(MASK_MOD, scores, cells)
    gl.store(scores_ptr + token * BLOCK_N + column, scores)


@triton.jit(do_not_specialize=["counter_offset"])
def reset_kernel(part_ptr, counter_offset):
    """Set the tile counter of `hopper_kernel` to 0."""
    tl.store((part_ptr + counter_offset).to(tl.pointer_type(tl.int32), bitcast=True), 0)

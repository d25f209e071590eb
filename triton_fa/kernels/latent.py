"""Decode with scored values (`qv`, absorbed latent attention) on Hopper in Gluon.

What `decode.py` computes on the schedule it describes, for many query heads over one latent cache:
keys are a small part K of each row and a latent part V, which is a key beside and the value. A
program's 64 query rows stay in shared memory; a tile of 64 keys is loaded once, and multiplied
from there both ways. Warps have roles:

- the producer loads tiles: one warp by tensor descriptors (TMA) where pages are long, else four
  warps key by key with asynchronous copies;
- the scorer, four warps, computes scores and their softmax, and leaves weights in shared memory;
- two weighers, four warps each, have half of the columns of the accumulators each.

So the scores of a tile are computed beside the weighted values of the one before. A tile is three
panels, K and the halves of V, each given back by the one who reads it last.

Boxes end where a sequence does, as in `hopper.py`: what is behind is zeros, whatever is stored.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from triton_fa.kernels.compat import gluon_names
from triton_fa.kernels.hopper import (
    LANES,
    WARPS,
    add,
    boxes_of,
    exp2,
    load,
    rescaled,
    warps_barrier,
)
from triton_fa.kernels.line import chunk_tiles, decode_work, line_units, program_range
from triton_fa.kernels.primitives import (
    NEG_INF,
    NO_SCORE,
    VARYING,
    cache_row,
    finish,
    page_ids,
    seen_keys,
)

async_load = gluon_names().async_load

STAGES = gl.constexpr(2)  # tile i is in stage i & 1
ROWS = gl.constexpr(64)  # query rows of a program
HALF = gl.constexpr(256)  # columns of V that a weigher has
K_DIM = gl.constexpr(64)  # columns of K


@gluon.jit
def release_dependents():
    """Let the launch that depends on this one begin."""
    gl.inline_asm_elementwise(
        "{ griddepcontrol.launch_dependents; mov.u32 $0, 0; }",
        "=r,r",
        [0],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


# ---------------------------------------------------------------- the line, as in `line.py`


@gluon.jit
def units_of_block(start, line, C: gl.constexpr):
    """(units, tiles) of BLOCK_B sequences from `start` on, 0 behind the batch."""
    batch, lengths, windows, chunking = line
    idx = start + gl.arange(0, C.BLOCK_B, layout=WARPS)
    _, _, _, _, _, _, _, tiles = decode_work(
        idx, idx < batch, lengths, windows, C.GROUP, None, C.MAX_ROWS, C.BLOCK_N
    )
    if C.CHUNKED:
        return line_units(tiles, chunking), tiles
    else:
        return tiles, tiles


@gluon.jit
def units_in_line(line, C: gl.constexpr):
    """Units of all sequences together."""
    total = 0
    for start in range(0, line[0], C.BLOCK_B):
        units, _ = units_of_block(start, line, C)
        total += gl.sum(units, 0)
    return total


@gluon.jit
def located(position, line, C: gl.constexpr):
    """The sequence that holds unit `position` of the line, and its first unit's position."""
    batch = line[0]
    seq_idx = 0
    before = 0
    carry = 0
    for start in range(0, batch, C.BLOCK_B):
        units, _ = units_of_block(start, line, C)
        upto = carry + gl.associative_scan(units, 0, add)
        idx = start + gl.arange(0, C.BLOCK_B, layout=WARPS)
        passed = (upto <= position) & (idx < batch)
        seq_idx += gl.sum(passed.to(gl.int32), 0)
        before = gl.maximum(before, gl.max(gl.where(passed, upto, 0), 0))
        carry += gl.sum(units, 0)
    return seq_idx, before


@gluon.jit
def tiles_of_units(first, count, line, C: gl.constexpr):
    """Key tiles of the chunked units [first, first + count) of the line."""
    total = 0
    carry = 0
    for start in range(0, line[0], C.BLOCK_B):
        units, tiles = units_of_block(start, line, C)
        upto = carry + gl.associative_scan(units, 0, add)
        begin = gl.maximum(first, upto - units) - (upto - units)
        end = gl.minimum(first + count, upto) - (upto - units)
        chunk = chunk_tiles(tiles, line[3])
        inside = gl.minimum(end * chunk, tiles) - begin * chunk
        total += gl.sum(gl.where(end > begin, inside, 0), 0)
        carry += gl.sum(units, 0)
    return total


@gluon.jit
def piece_of(start, line, C: gl.constexpr):
    """What comes next: (work of the sequence, tiles of the result, whether it is all of it).

    `start` is (lane, sequence, first tile, tiles left, slot, whether the tiles of the sequence
    began in this program).
    """
    batch, lengths, windows, chunking = line
    _, seq_idx, tile, left, _, whole = start
    work = decode_work(
        seq_idx, seq_idx < batch, lengths, windows, C.GROUP, None, C.MAX_ROWS, C.BLOCK_N
    )
    num_tiles = work[7]
    if C.CHUNKED:
        chunk = chunk_tiles(num_tiles, chunking)
        tiles = gl.minimum(num_tiles - tile, chunk)
        is_direct = num_tiles <= chunk
    else:
        tiles = gl.minimum(num_tiles - tile, left)
        is_direct = (tile + tiles >= num_tiles) & (whole == 1)
    return work, gl.minimum(tiles, left), is_direct


@gluon.jit
def behind(start, tiles, num_tiles, line, C: gl.constexpr):
    """`start` behind a result of so many tiles of a sequence of `num_tiles`."""
    lane, seq_idx, tile, left, slot, whole = start
    is_last = tile + tiles >= num_tiles
    is_wrap = is_last & (seq_idx + 1 >= line[0])
    lane += is_wrap.to(gl.int32)
    seq_idx = gl.where(is_wrap, 0, seq_idx + is_last.to(gl.int32))
    tile = gl.where(is_last, 0, tile + tiles)
    if C.CHUNKED:
        slot += 1
    else:
        whole = whole * 0 + 1
    return lane, seq_idx, tile, left - tiles, slot, whole


@gluon.jit
def target_of(start, C: gl.constexpr):
    """The slot of a partial result."""
    if C.CHUNKED:
        return start[4]
    else:
        return start[4] + start[5]


# ---------------------------------------------------------------- the producer


@gluon.jit
def load_boxes(panel, ready, i, key, end, place, pages, column, C: gl.constexpr):
    """A panel of a tile by descriptor, box by box."""
    desc, boxes = panel
    BOXES: gl.constexpr = C.BLOCK_N // C.BOX
    WIDTH: gl.constexpr = desc.block_shape[4]
    PARTS: gl.constexpr = boxes.shape[0] // (STAGES * BOXES)
    for b in gl.static_range(BOXES):
        at = (place[0], place[1] + key + b * C.BOX)
        if C.PAGE_SIZE:
            page = gl.sum(gl.where(gl.arange(0, 32, layout=LANES) == b, pages, 0), 0)
            at = (page, (key + b * C.BOX) % C.PAGE_SIZE)
        live = end - key - b * C.BOX
        for part in gl.static_range(PARTS):
            box = boxes.index(((i & 1) * PARTS + part) * BOXES + b)
            load(desc, ready, box, at, live, column + part * WIDTH)


@gluon.jit
def copy_rows(smem, ready, base, rows, live, C: gl.constexpr):
    """A panel of a tile key by key; the barrier hears of it when it has arrived."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [C.PRODUCER_WARPS, 1], [1, 0])
    column = gl.arange(0, smem.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    async_load(smem, base + rows[:, None] + column[None, :], mask=live[:, None])
    async_copy.mbarrier_arrive(ready, increment_count=False)


@gluon.jit
def pages_of(key, end, table, C: gl.constexpr):
    """Pages of the tile at `key`: of each box, or of each key; 0 where there are no pages."""
    if C.PAGE_SIZE:
        page_table_ptr, row_offset, num_pages = table
        if C.TMA:
            token = key + gl.arange(0, 32, layout=LANES) * C.BOX
        else:
            LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [C.PRODUCER_WARPS, 1], [1, 0])
            token = key + gl.arange(0, C.BLOCK_N, layout=gl.SliceLayout(1, LAYOUT))
        token = gl.maximum(gl.minimum(token, end - 1), 0)
        return page_ids(
            page_table_ptr, row_offset, token, num_pages, (token * 0) < end, C.PAGE_SIZE
        )
    else:
        return 0


@gluon.jit
def producer(given, C: gl.constexpr):
    """Load the tiles of the program's range."""
    start, line, k_panel, v_panels, barriers, sources, paging, strides = given
    k_full, k_empty, v_full, v_empty = barriers
    k_desc, v_desc, k_ptr, v_ptr = sources
    page_table_ptr, table_stride, num_pages, batch_idx_ptr, num_rows = paging
    k_strides, v_strides = strides
    batch, lengths = line[0], line[1]
    i = 0
    while start[3] > 0:
        work, tiles, _is_direct = piece_of(start, line, C)
        first_k, begin, end = work[2], work[3], work[4]
        seq_idx = start[1]
        head = start[0] // C.ROW_BLOCKS
        row = seq_idx
        if batch_idx_ptr is not None:
            row = cache_row(seq_idx, seq_idx < batch, batch_idx_ptr, num_rows)
        table = (page_table_ptr, row.to(gl.int64) * table_stride, num_pages)
        if lengths[4] is not None:
            row = 0
        key = begin + start[2] * C.BLOCK_N
        pages = pages_of(key, end, table, C)
        for _j in range(tiles):
            next_pages = pages_of(key + C.BLOCK_N, end, table, C)
            stage = i & 1
            free = ((i >> 1) & 1) ^ 1
            if C.TMA:
                place = (row, first_k)
                for v in gl.static_range(2):
                    mbarrier.wait(v_empty.index(stage * 2 + v), free)
                    ready = v_full.index(stage * 2 + v)
                    mbarrier.expect(ready, C.BLOCK_N * HALF * 2)
                    column = head * v_strides[2] + v * HALF
                    panel = (v_desc, boxes_of(v_panels[v], v_desc))
                    load_boxes(panel, ready, i, key, end, place, pages, column, C)
                if C.HAS_K:
                    mbarrier.wait(k_empty.index(stage), free)
                    mbarrier.expect(k_full.index(stage), C.BLOCK_N * K_DIM * 2)
                    column = head * k_strides[2]
                    panel = (k_desc, boxes_of(k_panel, k_desc))
                    ready = k_full.index(stage)
                    load_boxes(panel, ready, i, key, end, place, pages, column, C)
            else:
                LAYOUT: gl.constexpr = gl.BlockedLayout(
                    [1, 8], [4, 8], [C.PRODUCER_WARPS, 1], [1, 0]
                )
                token = key + gl.arange(0, C.BLOCK_N, layout=gl.SliceLayout(1, LAYOUT))
                live = token < end
                if C.PAGE_SIZE:
                    inside = token % C.PAGE_SIZE
                    page = pages.to(gl.int64)
                else:
                    inside = token + first_k
                    page = row.to(gl.int64)
                inside = inside.to(gl.int64)
                # Heads in the rows: of a pointer's offset nothing says what it is a multiple of.
                # In 32 bits, because registers are short; `latent_plans._in_steps` sees to it.
                v_rows = page * v_strides[0] + inside * v_strides[1]
                v_rows = gl.multiple_of(v_rows + head * v_strides[2], 8)
                for v in gl.static_range(2):
                    mbarrier.wait(v_empty.index(stage * 2 + v), free)
                    ready = v_full.index(stage * 2 + v)
                    smem = v_panels[v].index(stage)
                    copy_rows(smem, ready, v_ptr + v * HALF, v_rows, live, C)
                if C.HAS_K:
                    k_rows = page * k_strides[0] + inside * k_strides[1]
                    k_rows = gl.multiple_of(k_rows + head * k_strides[2], 8)
                    mbarrier.wait(k_empty.index(stage), free)
                    copy_rows(k_panel.index(stage), k_full.index(stage), k_ptr, k_rows, live, C)
            pages = next_pages
            key += C.BLOCK_N
            i += 1
        start = behind(start, tiles, work[7], line, C)


# ---------------------------------------------------------------- the scorer


@gluon.jit
def copy_queries(smem, base, rows, has_row):
    """A panel of query rows, zeros where there are none."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    column = gl.arange(0, smem.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    async_load(smem, base + rows[:, None] + column[None, :], mask=has_row[:, None])


@gluon.jit
def load_queries(panels, sources, start, first_q, seqlen_q, C: gl.constexpr):
    """The query rows of a lane of a sequence."""
    q_panel, qv_panels = panels
    q_ptr, qv_ptr, q_strides, qv_strides = sources
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = start[0] % C.ROW_BLOCKS * ROWS
    rows += gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    has_row = rows < seqlen_q * C.GROUP
    token = (first_q + rows // C.GROUP).to(gl.int64)
    heads = start[0] // C.ROW_BLOCKS * C.GROUP + rows % C.GROUP
    seq_idx = start[1].to(gl.int64)
    # Said of sums: of a function's argument it would be forgotten.
    at = seq_idx * qv_strides[0] + token * qv_strides[1] + heads.to(gl.int64) * qv_strides[2]
    at = gl.multiple_of(at, 8)
    for v in gl.static_range(2):
        copy_queries(qv_panels[v], qv_ptr + v * HALF, at, has_row)
    if C.HAS_K:
        at = seq_idx * q_strides[0] + token * q_strides[1] + heads.to(gl.int64) * q_strides[2]
        at = gl.multiple_of(at, 8)
        copy_queries(q_panel, q_ptr, at, has_row)
    async_copy.commit_group()
    async_copy.wait_group(0)
    fence_async_shared()
    warps_barrier()


@gluon.jit
def scorer(given, C: gl.constexpr):
    """Scores and softmax; the statistics of rows."""
    (
        start,
        line,
        queries,
        q_sources,
        k_panel,
        v_panels,
        barriers,
        handed,
        hand_barriers,
        results,
        scale_log2,
    ) = given
    q_panel, qv_panels = queries
    k_full, k_empty, v_full = barriers[0], barriers[1], barriers[2]
    weights, alphas, factors = handed
    p_full, p_empty, f_full, f_empty = hand_barriers
    lse_ptr, lse_strides, part_ptr, num_slots = results
    windows = line[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BLOCK_N, 16])
    OF_ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    OF_COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    column = gl.arange(0, C.BLOCK_N, layout=OF_COLUMN)
    i = 0
    done = 0
    is_fresh = start[3] > 0
    while start[3] > 0:
        work, tiles, is_direct = piece_of(start, line, C)
        first_q, seqlen_q = work[0], work[1]
        begin, end, offset, num_tiles = work[3], work[4], work[5], work[7]
        if is_fresh:
            load_queries(queries, q_sources, start, first_q, seqlen_q, C)
        rows = start[0] % C.ROW_BLOCKS * ROWS + gl.arange(0, ROWS, layout=OF_ROW)
        token = rows // C.GROUP
        row_end = end + 0 * token
        limit = end
        if windows[1] is not None:
            row_end = seen_keys(token, offset, 0, end, windows)[1]
            limit = gl.minimum(end, offset + windows[1] + 1)
        row_max = gl.full([ROWS], NO_SCORE, gl.float32, layout=OF_ROW)
        row_sum = gl.full([ROWS], 0.0, gl.float32, layout=OF_ROW)
        key = begin + start[2] * C.BLOCK_N
        for _j in range(tiles):
            stage = i & 1
            phase = (i >> 1) & 1
            scores = gl.full([ROWS, C.BLOCK_N], 0.0, gl.float32, layout=SCORES)
            for v in gl.static_range(2):
                mbarrier.wait(v_full.index(stage * 2 + v), phase)
                if not C.TMA:
                    fence_async_shared()
                transposed = v_panels[v].index(stage).permute((1, 0))
                scores = warpgroup_mma(
                    qv_panels[v], transposed, scores, use_acc=v > 0, is_async=True
                )
            if C.HAS_K:
                mbarrier.wait(k_full.index(stage), phase)
                if not C.TMA:
                    fence_async_shared()
                transposed = k_panel.index(stage).permute((1, 0))
                scores = warpgroup_mma(q_panel, transposed, scores, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[scores])
            if C.HAS_K:
                mbarrier.arrive(k_empty.index(stage), count=1)
            if key + C.BLOCK_N > limit:
                keep = column[None, :] < (row_end - key)[:, None]
                scores = gl.where(keep, scores, NEG_INF)
            highest = gl.maximum(row_max, gl.max(scores, 1) * scale_log2)
            # Weights are relative to a maximum that moves when it is outgrown by 2^8.
            highest = gl.where(highest - row_max > 8.0, highest, row_max)
            prob = exp2(scores * scale_log2 - highest[:, None])
            alpha = exp2(row_max - highest)
            row_sum = row_sum * alpha + gl.sum(prob, 1)
            row_max = highest
            mbarrier.wait(p_empty.index(0), (i & 1) ^ 1)
            weights.store(prob.to(weights.dtype))
            alphas.store(alpha)
            fence_async_shared()
            mbarrier.arrive(p_full.index(0), count=1)
            key += C.BLOCK_N
            i += 1
        factor, lse = finish(row_max, row_sum, 0.0, False)
        mbarrier.wait(f_empty.index(0), (done & 1) ^ 1)
        # A partial result is left as it is.
        factors.store(gl.where(is_direct, factor, 1.0))
        mbarrier.arrive(f_full.index(0), count=1)
        if is_direct:
            if lse_ptr is not None and C.HAS_LSE:
                heads = start[0] // C.ROW_BLOCKS * C.GROUP + rows % C.GROUP
                lse_row = start[1].to(gl.int64) * lse_strides[0]
                lse_row += (first_q + token).to(gl.int64) * lse_strides[1]
                lse_row += heads.to(gl.int64) * lse_strides[2]
                gl.store(lse_ptr + lse_row, lse, mask=rows < seqlen_q * C.GROUP)
        elif part_ptr is not None:
            part_stat_ptr = part_ptr + num_slots.to(gl.int64) * (ROWS * 2 * HALF)
            part_row = target_of(start, C).to(gl.int64) * ROWS
            part_row += gl.arange(0, ROWS, layout=OF_ROW)
            gl.store(part_stat_ptr + part_row * 2, row_max)
            gl.store(part_stat_ptr + part_row * 2 + 1, row_sum)
        done += 1
        is_fresh = start[2] + tiles >= num_tiles
        start = behind(start, tiles, num_tiles, line, C)


# ---------------------------------------------------------------- the weighers


@gluon.jit
def weigher(V: gl.constexpr, given, C: gl.constexpr):
    """Weighted values: one half of the columns."""
    start, line, v_panels, barriers, handed, hand_barriers, results = given
    v_full, v_empty = barriers[2], barriers[3]
    weights, alphas, factors = handed
    p_full, p_empty, f_full, f_empty = hand_barriers
    out_ptr, out_strides, part_ptr = results
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    OF_ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    values = v_panels[V]
    i = 0
    done = 0
    while start[3] > 0:
        work, tiles, is_direct = piece_of(start, line, C)
        acc = gl.full([ROWS, HALF], 0.0, gl.float32, layout=ACC)
        for _j in range(tiles):
            stage = i & 1
            mbarrier.wait(v_full.index(stage * 2 + V), (i >> 1) & 1)
            if not C.TMA:
                fence_async_shared()
            mbarrier.wait(p_full.index(0), i & 1)
            acc = rescaled(acc, alphas.load(OF_ROW), True)
            acc = warpgroup_mma(weights, values.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(p_empty.index(0), count=1)
            mbarrier.arrive(v_empty.index(stage * 2 + V), count=1)
            i += 1
        mbarrier.wait(f_full.index(0), done & 1)
        factor = factors.load(OF_ROW)
        mbarrier.arrive(f_empty.index(0), count=1)
        part_rows = gl.arange(0, ROWS, layout=OF_ROW)
        column = V * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(0, ACC))
        if is_direct:
            rows = start[0] % C.ROW_BLOCKS * ROWS + part_rows
            heads = start[0] // C.ROW_BLOCKS * C.GROUP + rows % C.GROUP
            token = (work[0] + rows // C.GROUP).to(gl.int64)
            out_row = start[1].to(gl.int64) * out_strides[0] + token * out_strides[1]
            out_row += heads.to(gl.int64) * out_strides[2]
            out = (acc * factor[:, None]).to(out_ptr.dtype.element_ty)
            mask = (rows < work[1] * C.GROUP)[:, None]
            gl.store(out_ptr + out_row[:, None] + column[None, :], out, mask=mask)
        elif part_ptr is not None:
            part_row = target_of(start, C).to(gl.int64) * ROWS + part_rows
            gl.store(part_ptr + part_row[:, None] * (2 * HALF) + column[None, :], acc)
        done += 1
        start = behind(start, tiles, work[7], line, C)


# ---------------------------------------------------------------- the kernel


@gluon.jit
def barriers_of(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers of so many arrivals each."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def panel(DTYPE: gl.constexpr, COUNT: gl.constexpr, KEYS: gl.constexpr, DIM: gl.constexpr):
    """Shared memory for COUNT blocks of rows."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, DIM], DTYPE)
    return gl.allocate_shared_memory(DTYPE, [COUNT, KEYS, DIM], LAYOUT)


@gluon.jit(do_not_specialize=VARYING)
def latent_kernel(
    k_desc,  # None where tiles are copied key by key, or without K
    v_desc,
    out_ptr,  # qv's shape
    lse_ptr,  # [heads_q, total_q] or [batch, heads_q, seqlen_q], float32
    part_ptr,  # float32: [slots, 64, 512] accumulators, then [slots, 64, 2]
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
    qv_ptr,
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
    smallest_chunk,
    most_pieces,
    window_left,
    window_right,
    attention_chunk,
    scale_log2,
    C: gl.constexpr,  # a Variant of `latent_plans.py`
):
    """out = softmax(scale * (q k^T + qv v^T) + mask) v over the program's range of key tiles."""
    DTYPE: gl.constexpr = qv_ptr.dtype.element_ty
    LANES_: gl.constexpr = C.NUM_HEADS_KV * C.ROW_BLOCKS
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
    line = (batch, lengths, windows, (smallest_chunk, most_pieces))

    qv0 = panel(DTYPE, 1, ROWS, HALF).index(0)
    qv1 = panel(DTYPE, 1, ROWS, HALF).index(0)
    v0 = panel(DTYPE, STAGES, C.BLOCK_N, HALF)
    v1 = panel(DTYPE, STAGES, C.BLOCK_N, HALF)
    if C.HAS_K:
        q_panel = panel(DTYPE, 1, ROWS, K_DIM).index(0)
        k_panel = panel(DTYPE, STAGES, C.BLOCK_N, K_DIM)
    else:
        q_panel = 0
        k_panel = 0
    weights = panel(DTYPE, 1, ROWS, C.BLOCK_N).index(0)
    OF_ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    alphas = gl.allocate_shared_memory(gl.float32, [ROWS], OF_ROWS)
    factors = gl.allocate_shared_memory(gl.float32, [ROWS], OF_ROWS)
    LOADS: gl.constexpr = 1 if C.TMA else 32 * C.PRODUCER_WARPS
    k_full = barriers_of(STAGES, LOADS)
    k_empty = barriers_of(STAGES, 1)
    v_full = barriers_of(2 * STAGES, LOADS)
    v_empty = barriers_of(2 * STAGES, 1)
    p_full = barriers_of(1, 1)
    p_empty = barriers_of(1, 2)
    f_full = barriers_of(1, 1)
    f_empty = barriers_of(1, 2)
    fence_async_shared()

    units = units_in_line(line, C)
    lane, index, position, share, extra = program_range(
        gl.program_id(0), programs, units, LANES_, C.LANES_DIVIDE
    )
    left = share + (index < extra).to(gl.int32)
    if C.CHUNKED:
        # The launcher sees to it that the lanes divide the programs.
        slot = lane * units + position
    elif C.LANES_DIVIDE:
        slot = 2 * (lane * (programs // LANES_) + index)
    else:
        slot = 2 * index
        lane = position // units
        position = position - lane * units
    if C.PDL:
        release_dependents()
    seq_idx, before = located(position, line, C)
    tile = position - before
    if C.CHUNKED:
        work = decode_work(
            seq_idx, seq_idx < batch, lengths, windows, C.GROUP, None, C.MAX_ROWS, C.BLOCK_N
        )
        tile = tile * chunk_tiles(work[7], line[3])
        left = tiles_of_units(position, left, line, C)
    start = (lane, seq_idx, tile, left, slot, (tile == 0).to(gl.int32))

    barriers = (k_full, k_empty, v_full, v_empty)
    handed = (weights, alphas, factors)
    hand_barriers = (p_full, p_empty, f_full, f_empty)
    v_panels = (v0, v1)
    loading = (
        start,
        line,
        k_panel,
        v_panels,
        barriers,
        (k_desc, v_desc, k_ptr, v_ptr),
        (page_table_ptr, table_stride, num_pages, batch_idx_ptr, num_rows),
        ((k_stride_b, k_stride_t, k_stride_h), (v_stride_b, v_stride_t, v_stride_h)),
    )
    scoring = (
        start,
        line,
        (q_panel, (qv0, qv1)),
        (
            q_ptr,
            qv_ptr,
            (q_stride_b, q_stride_t, q_stride_h),
            (qv_stride_b, qv_stride_t, qv_stride_h),
        ),
        k_panel,
        v_panels,
        barriers,
        handed,
        hand_barriers,
        (lse_ptr, (lse_stride_b, lse_stride_t, lse_stride_h), part_ptr, num_slots),
        scale_log2,
    )
    weighing = (
        start,
        line,
        v_panels,
        barriers,
        handed,
        hand_barriers,
        (out_ptr, (out_stride_b, out_stride_t, out_stride_h), part_ptr),
    )
    C0: gl.constexpr = 0
    C1: gl.constexpr = 1
    gl.warp_specialize(
        [
            (scorer, (scoring, C)),
            (weigher, (C0, weighing, C)),
            (weigher, (C1, weighing, C)),
            (producer, (loading, C)),
        ],
        [4, 4, C.PRODUCER_WARPS],
        [160, 160, 64],  # registers of a thread; the scorer has the rest, 128
    )

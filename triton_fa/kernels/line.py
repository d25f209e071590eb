"""The line of work that the decode path shares out: lengths to ranges, on the device.

The line is made of key tiles, sequence after sequence. Balanced, ranges cut sequences anywhere.
With `chunking` = (smallest chunk, most pieces) a sequence consists of pieces of a whole chunk of
tiles, which depend on its own length alone, and a range begins at the piece that is nearest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_fa.kernels.primitives import key_span, left_padding, query_span, visible_keys


@triton.jit
def decode_work(
    seq_idx,
    mask,
    lengths,
    windows,
    GROUP: tl.constexpr,
    MIN_ROWS: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What sequences `seq_idx` ask of the decode path.

    Returns first query token, query length, first key token, visible [begin, end), the offset
    sk - sq, the left padding, and the number of key tiles. Sequences that belong to the prefill
    path, or to a launch for fewer rows (up to MIN_ROWS, if not None), come back with query length 0
    and one tile, so that the line has no gaps; masked ones with no tile.
    """
    first_q, seqlen_q = query_span(seq_idx, mask, lengths)
    first_k, seqlen_k = key_span(seq_idx, mask, lengths)
    offset = seqlen_k - seqlen_q
    padding = left_padding(seq_idx, mask, seqlen_k, lengths)
    begin, end = visible_keys(0, seqlen_q, offset, padding, seqlen_k, windows)
    seqlen_q = tl.where(seqlen_q * GROUP <= MAX_ROWS, seqlen_q, 0)
    if MIN_ROWS is not None:
        seqlen_q = tl.where(seqlen_q * GROUP > MIN_ROWS, seqlen_q, 0)
    tiles = tl.where(seqlen_q > 0, (end - begin + BLOCK_N - 1) // BLOCK_N, 0)
    tiles = tl.where(mask, tl.maximum(tiles, 1), 0)
    return first_q, seqlen_q, first_k, begin, end, offset, padding, tiles


@triton.jit
def chunk_tiles(tiles, chunking):
    """Tiles of one piece of a sequence of `tiles`.

    About an eighth of it, from the smallest chunk to four of those; more where there would be too
    many pieces.
    """
    eighth = tl.minimum(tl.maximum((tiles + 4) // 8, chunking[0]), 4 * chunking[0])
    return tl.maximum((tiles + chunking[1] - 1) // chunking[1], eighth)


@triton.jit
def line_units(tiles, chunking):
    """Pieces of a sequence of `tiles`."""
    chunk = chunk_tiles(tiles, chunking)
    return (tiles + chunk - 1) // chunk


@triton.jit
def nearest_piece(tile, tiles, chunk):
    """The start of a piece of a sequence of `tiles` that is nearest to `tile`; may be the end."""
    return tl.minimum((tile + chunk // 2) // chunk * chunk, tiles)


@triton.jit
def program_range(pid, programs, total_tiles, LANES: tl.constexpr, LANES_DIVIDE: tl.constexpr):
    """(lane, index, first position, share, extra) of program `pid`'s range of the line.

    A lane is a kv head, or some rows of one. Ranges follow each other by index; the first `extra`
    of them have share + 1 units. Where the lanes divide the programs each has a line and indices of
    its own, else the line is repeated for every lane. Neighbouring programs work on different lanes
    of the same tokens: their reads share pages.
    """
    lane = pid % LANES
    parts = programs // LANES
    if LANES_DIVIDE:
        index = pid // LANES
        line = total_tiles
    else:
        index = lane * parts + tl.minimum(lane, programs % LANES) + pid // LANES
        line = total_tiles * LANES
        parts = programs
    share = line // parts
    extra = line - share * parts
    first = index * share + tl.minimum(index, extra)
    return lane, index, first, share, extra


@triton.jit
def range_of(position, share, extra):
    """The index of the range that holds `position`: the inverse of `program_range`."""
    in_long = extra * (share + 1)
    short = (position >= in_long).to(tl.int32)
    return short * extra + (position - short * in_long) // tl.maximum(share + 1 - short, 1)


@triton.jit
def tiles_of_block(
    start,
    batch,
    lengths,
    windows,
    GROUP: tl.constexpr,
    MIN_ROWS: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """(tiles, query lengths) of BLOCK_B sequences from `start` on, 0 behind the batch."""
    idx = start + tl.arange(0, BLOCK_B)
    _, seqlen_q, _, _, _, _, _, tiles = decode_work(
        idx, idx < batch, lengths, windows, GROUP, MIN_ROWS, MAX_ROWS, BLOCK_N
    )
    return tiles, seqlen_q


@triton.jit
def total_and_tiles(
    batch,
    lengths,
    windows,
    GROUP: tl.constexpr,
    MIN_ROWS: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """Tiles of all sequences together, and those of the last block of them one by one.

    Of launches for some numbers of rows only, the total is 0 where no sequence has so many.
    """
    if ONE_BLOCK:
        tiles, seqlens_q = tiles_of_block(
            0, batch, lengths, windows, GROUP, MIN_ROWS, MAX_ROWS, BLOCK_N, BLOCK_B
        )
        total = tl.sum(tiles, 0)
        if MIN_ROWS is not None:
            total = tl.where(tl.max(seqlens_q, 0) > 0, total, 0)
    else:
        total = 0
        longest = 0
        tiles = tl.zeros([BLOCK_B], tl.int32)
        for start in tl.range(0, batch, BLOCK_B, num_stages=1):
            tiles, seqlens_q = tiles_of_block(
                start, batch, lengths, windows, GROUP, MIN_ROWS, MAX_ROWS, BLOCK_N, BLOCK_B
            )
            total += tl.sum(tiles, 0)
            longest = tl.maximum(longest, tl.max(seqlens_q, 0))
        if MIN_ROWS is not None:
            total = tl.where(longest > 0, total, 0)
    return total, tiles


@triton.jit
def total_and_units_before(
    seq_idx,
    batch,
    lengths,
    windows,
    chunking,
    GROUP: tl.constexpr,
    MIN_ROWS: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Pieces of all sequences together, and of those before `seq_idx`."""
    total = 0
    before = 0
    for start in tl.range(0, batch, BLOCK_B, num_stages=1):
        tiles, _ = tiles_of_block(
            start, batch, lengths, windows, GROUP, MIN_ROWS, MAX_ROWS, BLOCK_N, BLOCK_B
        )
        units = line_units(tiles, chunking)
        total += tl.sum(units, 0)
        before += tl.sum(tl.where(start + tl.arange(0, BLOCK_B) < seq_idx, units, 0), 0)
    return total, before


@triton.jit
def passing(position, upto, real):
    """Of a block of sequences: (those before `position`, where they end, where the next ends)."""
    passed = (upto <= position) & real
    before = tl.max(tl.where(passed, upto, 0), 0)
    return tl.sum(passed.to(tl.int32), 0), before, tl.min(tl.where(passed, 0x7FFFFFFF, upto), 0)


@triton.jit
def locate_two(
    position,
    other,
    tiles,
    batch,
    lengths,
    windows,
    GROUP: tl.constexpr,
    MIN_ROWS: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """(sequence that holds tile `position` of the line, its first tile's position, its tiles), and
    the same of `other`.

    Behind the line: (batch, the line's end, 0).
    """
    if ONE_BLOCK:
        # Behind the batch `upto` stays at the line's end.
        upto = tl.cumsum(tiles, 0)
        real = tl.arange(0, BLOCK_B) < batch
        seq_idx, before, its_end = passing(position, upto, real)
        seq_idx1, before1, its_end1 = passing(other, upto, real)
    else:
        seq_idx = 0
        before = 0
        its_end = 0x7FFFFFFF
        seq_idx1 = 0
        before1 = 0
        its_end1 = 0x7FFFFFFF
        carry = 0
        for start in tl.range(0, batch, BLOCK_B, num_stages=1):
            block, _ = tiles_of_block(
                start, batch, lengths, windows, GROUP, MIN_ROWS, MAX_ROWS, BLOCK_N, BLOCK_B
            )
            upto = carry + tl.cumsum(block, 0)
            real = start + tl.arange(0, BLOCK_B) < batch
            passed, last_end, next_end = passing(position, upto, real)
            seq_idx += passed
            before = tl.maximum(before, last_end)
            its_end = tl.minimum(its_end, next_end)
            passed, last_end, next_end = passing(other, upto, real)
            seq_idx1 += passed
            before1 = tl.maximum(before1, last_end)
            its_end1 = tl.minimum(its_end1, next_end)
            carry += tl.sum(block, 0)
    its_tiles = tl.where(seq_idx < batch, its_end - before, 0)
    its_tiles1 = tl.where(seq_idx1 < batch, its_end1 - before1, 0)
    return (seq_idx, before, its_tiles), (seq_idx1, before1, its_tiles1)


@triton.jit
def locate(
    position,
    tiles,
    batch,
    lengths,
    windows,
    GROUP: tl.constexpr,
    MIN_ROWS: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """`locate_two` for one position."""
    found, _ = locate_two(
        position,
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
    return found


@triton.jit
def piece_at(position, found, batch, chunking):
    """The piece that begins nearest to `position`, which is in the sequence that `locate` found:
    its sequence, that sequence's first tile's position, and the piece's tile.
    """
    seq_idx, before, its_tiles = found
    tile = nearest_piece(position - before, its_tiles, chunk_tiles(its_tiles, chunking))
    passed = (tile == its_tiles) & (seq_idx < batch)
    return (
        seq_idx + passed.to(tl.int32),
        tl.where(passed, before + its_tiles, before),
        tl.where(passed, 0, tile),
    )


@triton.jit
def piece_range(
    lane,
    position,
    count,
    tiles,
    total_tiles,
    batch,
    lengths,
    windows,
    chunking,
    GROUP: tl.constexpr,
    MIN_ROWS: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    LANES_DIVIDE: tl.constexpr,
):
    """`count` tiles from `position` of a lane's line on, with both ends at the nearest piece.

    Returns (lane, sequence, tile of it, number of tiles).
    """
    stop = position + count
    stop_start = 0 if LANES_DIVIDE else stop // tl.maximum(total_tiles, 1) * total_tiles
    found, found_stop = locate_two(
        position,
        stop - stop_start,
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
    seq_idx, before, tile = piece_at(position, found, batch, chunking)
    _, stop_before, stop_tile = piece_at(stop - stop_start, found_stop, batch, chunking)
    count = stop_start + stop_before + stop_tile - (before + tile)
    if not LANES_DIVIDE:
        # Its first piece may be the next line's.
        wraps = (seq_idx == batch).to(tl.int32)
        lane += wraps
        seq_idx = tl.where(wraps == 1, 0, seq_idx)
    return lane, seq_idx, tile, count


@triton.jit
def pieces_until(position, tiles, chunk):
    """Pieces of a sequence before the range that begins at its tile `position`."""
    # The last piece may be short.
    return (nearest_piece(position, tiles, chunk) + chunk - 1) // chunk


@triton.jit
def holder_of(piece, begin, tiles, chunk, share, extra):
    """Where a piece of the sequence at position `begin` is: the range that holds it, and the number
    of the sequence's pieces there before it.
    """
    # The last range that begins at this piece, or before it.
    last_begin = begin + piece * chunk + (chunk - chunk // 2 - 1)
    holder = range_of(tl.minimum(last_begin, begin + tiles - 1), share, extra)
    its_first = holder * share + tl.minimum(holder, extra)
    return holder, piece - pieces_until(its_first - begin, tiles, chunk)

"""The line of work that the decode path shares out: lengths to ranges, on the device.

The line is made of units, sequence after sequence. Balanced, a unit is one key tile, and ranges cut
sequences anywhere. With `chunking` = (smallest chunk, most pieces) a unit is a piece of a sequence
of a whole chunk of tiles: the pieces of a sequence then depend on its own length alone.
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
    MAX_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What sequences `seq_idx` ask of the decode path.

    Returns first query token, query length, first key token, visible [begin, end), the offset
    sk - sq, the left padding, and the number of key tiles. Sequences that belong to the prefill
    path come back with query length 0 and one tile, so that the line has no gaps; masked ones with
    no tile.
    """
    first_q, seqlen_q = query_span(seq_idx, mask, lengths)
    first_k, seqlen_k = key_span(seq_idx, mask, lengths)
    offset = seqlen_k - seqlen_q
    padding = left_padding(seq_idx, mask, seqlen_k, lengths)
    begin, end = visible_keys(0, seqlen_q, offset, padding, seqlen_k, windows)
    seqlen_q = tl.where(seqlen_q * GROUP <= MAX_ROWS, seqlen_q, 0)
    tiles = tl.where(seqlen_q > 0, (end - begin + BLOCK_N - 1) // BLOCK_N, 0)
    tiles = tl.where(mask, tl.maximum(tiles, 1), 0)
    return first_q, seqlen_q, first_k, begin, end, offset, padding, tiles


@triton.jit
def chunk_tiles(tiles, chunking):
    """Tiles of one piece of a sequence of `tiles`."""
    return tl.maximum((tiles + chunking[1] - 1) // chunking[1], chunking[0])


@triton.jit
def line_units(tiles, chunking):
    """Units of sequences of `tiles` key tiles."""
    if chunking is None:
        return tiles
    else:
        chunk = chunk_tiles(tiles, chunking)
        return (tiles + chunk - 1) // chunk


@triton.jit
def program_range(pid, programs, total_units, LANES: tl.constexpr, LANES_DIVIDE: tl.constexpr):
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
        line = total_units
    else:
        index = lane * parts + tl.minimum(lane, programs % LANES) + pid // LANES
        line = total_units * LANES
        parts = programs
    share = line // parts
    extra = line - share * parts
    first = index * share + tl.minimum(index, extra)
    return lane, index, first, share, extra


@triton.jit
def range_of(position, share, extra):
    """The index of the range that holds `position`: the inverse of `program_range`."""
    in_long = extra * (share + 1)
    return tl.where(
        position < in_long,
        position // (share + 1),
        extra + (position - in_long) // tl.maximum(share, 1),
    )


@triton.jit
def units_of_block(
    start,
    batch,
    lengths,
    windows,
    chunking,
    GROUP: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """(units, tiles) of BLOCK_B sequences from `start` on, 0 behind the batch."""
    idx = start + tl.arange(0, BLOCK_B)
    _, _, _, _, _, _, _, tiles = decode_work(
        idx, idx < batch, lengths, windows, GROUP, MAX_ROWS, BLOCK_N
    )
    return line_units(tiles, chunking), tiles


@triton.jit
def total_and_units(
    batch,
    lengths,
    windows,
    chunking,
    GROUP: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """Units of all sequences together; units and tiles of the last block of them one by one."""
    if ONE_BLOCK:
        units, tiles = units_of_block(
            0, batch, lengths, windows, chunking, GROUP, MAX_ROWS, BLOCK_N, BLOCK_B
        )
        total = tl.sum(units, 0)
    else:
        total = 0
        units = tl.zeros([BLOCK_B], tl.int32)
        tiles = tl.zeros([BLOCK_B], tl.int32)
        for start in tl.range(0, batch, BLOCK_B, num_stages=1):
            units, tiles = units_of_block(
                start, batch, lengths, windows, chunking, GROUP, MAX_ROWS, BLOCK_N, BLOCK_B
            )
            total += tl.sum(units, 0)
    return total, units, tiles


@triton.jit
def locate(
    position,
    units,
    batch,
    lengths,
    windows,
    chunking,
    GROUP: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """The sequence that holds unit `position` of the line, and its first unit's position."""
    if ONE_BLOCK:
        upto = tl.cumsum(units, 0)
        passed = (upto <= position) & (tl.arange(0, BLOCK_B) < batch)
        seq_idx = tl.sum(passed.to(tl.int32), 0)
        before = tl.max(tl.where(passed, upto, 0), 0)
    else:
        seq_idx = 0
        before = 0
        carry = 0
        for start in tl.range(0, batch, BLOCK_B, num_stages=1):
            block, _ = units_of_block(
                start, batch, lengths, windows, chunking, GROUP, MAX_ROWS, BLOCK_N, BLOCK_B
            )
            upto = carry + tl.cumsum(block, 0)
            passed = (upto <= position) & (start + tl.arange(0, BLOCK_B) < batch)
            seq_idx += tl.sum(passed.to(tl.int32), 0)
            before = tl.maximum(before, tl.max(tl.where(passed, upto, 0), 0))
            carry += tl.sum(block, 0)
    return seq_idx, before


@triton.jit
def units_before(
    seq_idx,
    batch,
    lengths,
    windows,
    chunking,
    GROUP: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Units of the sequences before `seq_idx`."""
    before = 0
    for start in tl.range(0, seq_idx, BLOCK_B, num_stages=1):
        units, _ = units_of_block(
            start, batch, lengths, windows, chunking, GROUP, MAX_ROWS, BLOCK_N, BLOCK_B
        )
        before += tl.sum(tl.where(start + tl.arange(0, BLOCK_B) < seq_idx, units, 0), 0)
    return before


@triton.jit
def tiles_in_range(
    first,
    count,
    batch,
    lengths,
    windows,
    chunking,
    GROUP: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Key tiles of the chunked units [first, first + count) of the line."""
    total = 0
    carry = 0
    for start in tl.range(0, batch, BLOCK_B, num_stages=1):
        units, tiles = units_of_block(
            start, batch, lengths, windows, chunking, GROUP, MAX_ROWS, BLOCK_N, BLOCK_B
        )
        upto = carry + tl.cumsum(units, 0)
        begin = tl.maximum(first, upto - units) - (upto - units)
        end = tl.minimum(first + count, upto) - (upto - units)
        chunk = chunk_tiles(tiles, chunking)
        inside = tl.minimum(end * chunk, tiles) - begin * chunk
        total += tl.sum(tl.where(end > begin, inside, 0), 0)
        carry += tl.sum(units, 0)
    return total

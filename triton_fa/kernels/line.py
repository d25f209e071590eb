"""The line of key tiles that the decode path shares out: lengths to ranges, on the device."""

from __future__ import annotations

import triton
import triton.language as tl

from triton_fa.kernels.primitives import key_span, query_span, visible_keys


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
    sk - sq, and the number of key tiles. Sequences that belong to the prefill path come back with
    query length 0 and one tile, so that the line has no gaps; masked ones with no tile.
    """
    first_q, seqlen_q = query_span(seq_idx, mask, lengths)
    first_k, seqlen_k = key_span(seq_idx, mask, lengths)
    offset = seqlen_k - seqlen_q
    begin, end = visible_keys(0, seqlen_q, offset, seqlen_k, windows)
    seqlen_q = tl.where(seqlen_q * GROUP <= MAX_ROWS, seqlen_q, 0)
    tiles = tl.where(seqlen_q > 0, (end - begin + BLOCK_N - 1) // BLOCK_N, 0)
    tiles = tl.where(mask, tl.maximum(tiles, 1), 0)
    return first_q, seqlen_q, first_k, begin, end, offset, tiles


@triton.jit
def program_range(pid, total_tiles, NUM_HEADS_KV: tl.constexpr, PROGRAMS: tl.constexpr):
    """(kv head lane, index, first position, share, extra) of program `pid`'s range of the line.

    Ranges follow each other by index; the first `extra` of them have share + 1 tiles. Neighbouring
    programs work on different heads of the same tokens: their reads share pages.
    """
    lane = pid % NUM_HEADS_KV
    if PROGRAMS % NUM_HEADS_KV == 0:
        index = pid // NUM_HEADS_KV
        line = total_tiles
        parts = PROGRAMS // NUM_HEADS_KV
    else:
        index = (
            lane * (PROGRAMS // NUM_HEADS_KV)
            + tl.minimum(lane, PROGRAMS % NUM_HEADS_KV)
            + pid // NUM_HEADS_KV
        )
        line = total_tiles * NUM_HEADS_KV
        parts = PROGRAMS
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
def total_and_tiles(
    batch,
    lengths,
    windows,
    GROUP: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """Tiles of all sequences together, and of the last block of BLOCK_B sequences one by one."""
    if ONE_BLOCK:
        idx = tl.arange(0, BLOCK_B)
        _, _, _, _, _, _, tiles = decode_work(
            idx, idx < batch, lengths, windows, GROUP, MAX_ROWS, BLOCK_N
        )
        total = tl.sum(tiles, 0)
    else:
        total = 0
        tiles = tl.zeros([BLOCK_B], tl.int32)
        for start in tl.range(0, batch, BLOCK_B, num_stages=1):
            idx = start + tl.arange(0, BLOCK_B)
            _, _, _, _, _, _, tiles = decode_work(
                idx, idx < batch, lengths, windows, GROUP, MAX_ROWS, BLOCK_N
            )
            total += tl.sum(tiles, 0)
    return total, tiles


@triton.jit
def locate(
    position,
    tiles,
    batch,
    lengths,
    windows,
    GROUP: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """The sequence that holds tile `position` of the line, and its first tile's position."""
    if ONE_BLOCK:
        upto = tl.cumsum(tiles, 0)
        passed = (upto <= position) & (tl.arange(0, BLOCK_B) < batch)
        seq_idx = tl.sum(passed.to(tl.int32), 0)
        before = tl.max(tl.where(passed, upto, 0), 0)
    else:
        seq_idx = 0
        before = 0
        carry = 0
        for start in tl.range(0, batch, BLOCK_B, num_stages=1):
            idx = start + tl.arange(0, BLOCK_B)
            _, _, _, _, _, _, block = decode_work(
                idx, idx < batch, lengths, windows, GROUP, MAX_ROWS, BLOCK_N
            )
            upto = carry + tl.cumsum(block, 0)
            passed = (upto <= position) & (idx < batch)
            seq_idx += tl.sum(passed.to(tl.int32), 0)
            before = tl.maximum(before, tl.max(tl.where(passed, upto, 0), 0))
            carry += tl.sum(block, 0)
    return seq_idx, before

"""The line of key tiles: the kernels' own arithmetic against a model in plain Python."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

triton = pytest.importorskip("triton")
tl = triton.language

from triton_fa.kernels.line import (  # noqa: E402  triton may be missing
    decode_work,
    locate,
    program_range,
    range_of,
    tiles_in_range,
    total_and_units,
    units_before,
)

ci = hypothesis.settings(
    max_examples=30,
    deadline=None,  # a first call on a GPU compiles
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)

# What `decode_work` returns of one sequence, in its order.
FIELDS = ("first_q", "seqlen_q", "first_k", "begin", "end", "offset", "tiles")


@triton.jit
def work_kernel(
    into_ptr,  # [7, batch]: FIELDS of every sequence
    cu_seqlens_q_ptr,
    seqused_q_ptr,
    cu_seqlens_k_ptr,
    seqused_k_ptr,
    batch,
    total_q,
    fixed_seqlen_q,
    total_k,
    fixed_seqlen_k,
    max_seqlen_k,
    window_left,
    window_right,
    GROUP: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """`decode_work` of BLOCK_B sequences, of which `batch` exist."""
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
        None,
        None,
        None,
    )
    idx = tl.arange(0, BLOCK_B)
    first_q, seqlen_q, first_k, begin, end, offset, _, tiles = decode_work(
        idx, idx < batch, lengths, (window_left, window_right, None), GROUP, MAX_ROWS, BLOCK_N
    )
    tl.store(into_ptr + idx, first_q + 0 * idx)
    tl.store(into_ptr + BLOCK_B + idx, seqlen_q + 0 * idx)
    tl.store(into_ptr + 2 * BLOCK_B + idx, first_k + 0 * idx)
    tl.store(into_ptr + 3 * BLOCK_B + idx, begin + 0 * idx)
    tl.store(into_ptr + 4 * BLOCK_B + idx, end + 0 * idx)
    tl.store(into_ptr + 5 * BLOCK_B + idx, offset + 0 * idx)
    tl.store(into_ptr + 6 * BLOCK_B + idx, tiles + 0 * idx)


@triton.jit
def range_kernel(
    into_ptr,  # [programs, 5]: what `program_range` returns
    owner_ptr,  # [positions]: `range_of` each position
    total_tiles,
    positions,
    NUM_HEADS_KV: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """The range of one program, and the owner of each position of the line it is part of."""
    pid = tl.program_id(0)
    lane, index, first, share, extra = program_range(
        pid, PROGRAMS, total_tiles, NUM_HEADS_KV, PROGRAMS % NUM_HEADS_KV == 0
    )
    tl.store(into_ptr + pid * 5, lane)
    tl.store(into_ptr + pid * 5 + 1, index)
    tl.store(into_ptr + pid * 5 + 2, first)
    tl.store(into_ptr + pid * 5 + 3, share)
    tl.store(into_ptr + pid * 5 + 4, extra)
    for position in tl.range(pid, positions, PROGRAMS):
        tl.store(owner_ptr + position, range_of(position, share, extra))


@triton.jit
def locate_kernel(
    into_ptr,  # [3, positions]: sequence, its first unit's position, tiles up to and with this unit
    total_ptr,
    before_ptr,  # [batch]: `units_before` each sequence
    seqused_k_ptr,
    batch,
    max_seqlen_k,
    positions,
    smallest_chunk,
    most_pieces,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """`locate` of every position of the line of `batch` one-token sequences."""
    lengths = (None, None, batch, 1, None, seqused_k_ptr, 1, 0, max_seqlen_k, None, None, None)
    windows = (None, None, None)
    if most_pieces is None:
        chunking = None
    else:
        chunking = (smallest_chunk, most_pieces)
    total, units, _ = total_and_units(
        batch, lengths, windows, chunking, 1, 1, BLOCK_N, BLOCK_B, ONE_BLOCK
    )
    tl.store(total_ptr, total)
    for position in tl.range(0, positions):
        seq_idx, before = locate(
            position, units, batch, lengths, windows, chunking, 1, 1, BLOCK_N, BLOCK_B, ONE_BLOCK
        )
        tl.store(into_ptr + position, seq_idx)
        tl.store(into_ptr + positions + position, before)
        if most_pieces is not None:
            upto = tiles_in_range(
                0, position + 1, batch, lengths, windows, chunking, 1, 1, BLOCK_N, BLOCK_B
            )
            tl.store(into_ptr + 2 * positions + position, upto)
    for seq_idx in tl.range(0, batch):
        before = units_before(seq_idx, batch, lengths, windows, chunking, 1, 1, BLOCK_N, BLOCK_B)
        tl.store(before_ptr + seq_idx, before)


def int32(values: list[int], device: str) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


# ---------------------------------------------------------------- ranges


def ranges(
    total_tiles: int, heads: int, programs: int, device: str
) -> tuple[list[list[int]], list[int]]:
    """`program_range` of every program, and `range_of` every position."""
    line = total_tiles if programs % heads == 0 else total_tiles * heads
    into = torch.full((programs, 5), -1, dtype=torch.int32, device=device)
    owner = torch.full((line,), -1, dtype=torch.int32, device=device)
    range_kernel[(programs,)](into, owner, total_tiles, line, heads, programs)
    return into.tolist(), owner.tolist()


@ci
@hypothesis.given(
    total_tiles=st.integers(1, 90), heads=st.integers(1, 6), programs=st.integers(1, 40)
)
@hypothesis.example(total_tiles=1, heads=4, programs=3)  # fewer programs than heads
@hypothesis.example(total_tiles=1, heads=2, programs=40)  # most ranges are empty
@hypothesis.example(total_tiles=90, heads=1, programs=1)
@hypothesis.example(total_tiles=80, heads=5, programs=40)  # no range is longer
def test_every_tile_of_every_head_is_in_one_range(
    total_tiles: int, heads: int, programs: int, device: str
) -> None:
    rows, owner = ranges(total_tiles, heads, programs, device)
    divides = programs % heads == 0
    covered: dict[tuple[int, int], int] = {}  # (head, tile) -> pid
    sizes = []
    for pid, (lane, index, first, share, extra) in enumerate(rows):
        assert lane == pid % heads
        count = share + (index < extra)
        sizes.append(count)
        for position in range(first, first + count):
            tile = (lane, position) if divides else divmod(position, total_tiles)
            assert tile not in covered, f"{tile} in programs {covered[tile]} and {pid}"
            covered[tile] = pid
            assert owner[position] == index
    assert set(covered) == {(h, t) for h in range(heads) for t in range(total_tiles)}
    assert max(sizes) - min(sizes) <= 1


@ci
@hypothesis.given(
    total_tiles=st.integers(1, 90), heads=st.integers(1, 6), programs=st.integers(1, 40)
)
def test_ranges_follow_each_other_by_index(
    total_tiles: int, heads: int, programs: int, device: str
) -> None:
    rows, _ = ranges(total_tiles, heads, programs, device)
    lines: dict[int, list[tuple[int, int, int]]] = {}
    for lane, index, first, share, extra in rows:
        line = lane if programs % heads == 0 else 0
        lines.setdefault(line, []).append((index, first, share + (index < extra)))
    for line_ranges in lines.values():
        ordered = sorted(line_ranges)
        assert [index for index, _, _ in ordered] == list(range(len(ordered)))
        assert ordered[0][1] == 0
        for (_, first, count), (_, following, _) in pairwise(ordered):
            assert following == first + count


@ci
@hypothesis.given(
    tiles=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    heads=st.integers(1, 4),
    programs=st.integers(1, 24),
)
def test_the_pieces_of_a_sequence_have_consecutive_indices(
    tiles: list[int], heads: int, programs: int, device: str
) -> None:
    rows, owner = ranges(sum(tiles), heads, programs, device)
    starts = [0]
    for n in tiles:
        starts.append(starts[-1] + n)
    for line_start in range(0, len(owner), sum(tiles)):
        for first, end in pairwise(starts):
            pieces = owner[line_start + first : line_start + end]
            # In order and without a gap: the merge reads slots first, first + 1, ...
            assert all(0 <= b - a <= 1 for a, b in pairwise(pieces))
            # A piece that is not the sequence's last ends its program's range.
            for position in range(line_start + first, line_start + end - 1):
                if owner[position + 1] != owner[position]:
                    _, index, begin, share, extra = next(
                        row for row in rows if row[1] == owner[position]
                    )
                    assert position == begin + share + (index < extra) - 1


# ---------------------------------------------------------------- where a position is


@ci
@hypothesis.given(
    seqlens_k=st.lists(st.integers(0, 70), min_size=1, max_size=10),
    block_b=st.just(4),
    chunking=st.one_of(st.none(), st.tuples(st.integers(1, 3), st.integers(1, 4))),
)
@hypothesis.example(seqlens_k=[0], block_b=4, chunking=None)
@hypothesis.example(seqlens_k=[0, 0, 0, 0, 0], block_b=4, chunking=(1, 1))
@hypothesis.example(seqlens_k=[16, 17, 33, 0] * 2, block_b=8, chunking=None)  # exactly one block
@hypothesis.example(seqlens_k=[1] * 9, block_b=4, chunking=None)  # one in the last of three blocks
@hypothesis.example(seqlens_k=[70] * 5, block_b=4, chunking=(2, 2))  # pieces of 3 and 2 tiles
def test_a_position_is_found_in_one_block_and_in_several(
    seqlens_k: list[int], block_b: int, chunking: tuple[int, int] | None, device: str
) -> None:
    block_n, batch = 16, len(seqlens_k)
    tiles = [max(1, -(-n // block_n)) for n in seqlens_k]
    pieces = [[1] * n for n in tiles]  # tiles of each unit
    if chunking is not None:
        smallest, most = chunking
        chunks = [max(-(-n // most), smallest) for n in tiles]
        pieces = [
            [min(chunk, n - first) for first in range(0, n, chunk)]
            for n, chunk in zip(tiles, chunks, strict=True)
        ]
        assert max(map(len, pieces)) <= most
    units = [len(cut) for cut in pieces]
    before = [sum(units[:b]) for b in range(batch)]
    want = [(b, before[b]) for b, n in enumerate(units) for _ in range(n)]
    flat = [n for cut in pieces for n in cut]
    several = (block_b, False)
    one = (triton.next_power_of_2(max(block_b, batch)), True)
    for size, one_block in (several, one):
        total = int32([-1], device)
        got_before = int32([-1] * batch, device)
        into = torch.full((3, len(want)), -1, dtype=torch.int32, device=device)
        locate_kernel[(1,)](
            into,
            total,
            got_before,
            int32(seqlens_k, device),
            batch,
            70,
            len(want),
            *(chunking or (None, None)),
            block_n,
            size,
            one_block,
            num_warps=1,
        )
        assert total.item() == sum(units)
        seq_idx, first, upto = into.tolist()
        assert list(zip(seq_idx, first, strict=True)) == want
        assert got_before.tolist() == before
        if chunking is not None:
            assert upto == [sum(flat[: i + 1]) for i in range(len(flat))]


# ---------------------------------------------------------------- the work of a sequence


@dataclass(frozen=True)
class Lengths:
    """What the device tensors say of each sequence, and what the host knows."""

    seqlens_q: list[int]
    seqlens_k: list[int]
    block_b: int = 16
    group: int = 1
    max_rows: int = 8
    block_n: int = 16
    left: int | None = None
    right: int | None = None
    max_seqlen_q: int = 12
    max_seqlen_k: int = 100

    def tiles(self, b: int) -> tuple[int, int, int, int]:
        """(query length on the decode path, first and end of the visible keys, tiles)."""
        seqlen_q, seqlen_k = self.seqlens_q[b], self.seqlens_k[b]
        seen = [
            j
            for i in range(seqlen_q)
            for j in range(seqlen_k)
            if (self.left is None or j >= i + seqlen_k - seqlen_q - self.left)
            and (self.right is None or j <= i + seqlen_k - seqlen_q + self.right)
        ]
        begin, end = (min(seen), max(seen) + 1) if seen else (0, 0)
        if seqlen_q * self.group > self.max_rows:
            return 0, begin, end, 1
        return seqlen_q, begin, end, max(1, -(-(end - begin) // self.block_n))


def work(given: dict[str, Any], device: str) -> dict[str, list[int]]:
    """FIELDS of every sequence, from `decode_work`."""
    names = ("cu_seqlens_q", "seqused_q", "cu_seqlens_k", "seqused_k")
    tensors = [None if given.get(name) is None else int32(given[name], device) for name in names]
    sizes = ("batch", "total_q", "fixed_seqlen_q", "total_k", "fixed_seqlen_k", "max_seqlen_k")
    block_b = given.get("block_b", 16)
    into = torch.full((7, block_b), -7, dtype=torch.int32, device=device)
    work_kernel[(1,)](
        into,
        *tensors,
        *[given.get(name, 0) for name in sizes],
        given.get("left"),
        given.get("right"),
        given.get("group", 1),
        given.get("max_rows", 64),
        given.get("block_n", 16),
        block_b,
        num_warps=1,
    )
    assert into[6, given["batch"] :].eq(0).all(), "a sequence that does not exist has tiles"
    rows = into[:, : given["batch"]].tolist()
    return dict(zip(FIELDS, rows, strict=True))


@st.composite
def several_lengths(draw: st.DrawFn) -> Lengths:
    batch = draw(st.integers(1, 7))
    side = st.sampled_from((None, 0, 1, 5, 20, 64))

    def lengths(most: int) -> list[int]:
        return draw(st.lists(st.integers(0, most), min_size=batch, max_size=batch))

    return Lengths(
        lengths(12),
        lengths(100),
        group=draw(st.sampled_from((1, 2, 3))),
        left=draw(side),
        right=draw(side),
    )


@ci
@hypothesis.given(lengths=several_lengths(), packed=st.booleans())
def test_a_sequence_asks_for_the_tiles_of_its_visible_keys(
    lengths: Lengths, packed: bool, device: str
) -> None:
    batch = len(lengths.seqlens_q)
    cu_q, cu_k = [0], [0]
    for n, m in zip(lengths.seqlens_q, lengths.seqlens_k, strict=True):
        cu_q.append(cu_q[-1] + n)
        cu_k.append(cu_k[-1] + m)
    given: dict[str, Any] = {
        "batch": batch,
        "cu_seqlens_q": cu_q,
        "total_q": cu_q[-1],
        "max_seqlen_k": 100,
        "group": lengths.group,
        "max_rows": lengths.max_rows,
        "left": lengths.left,
        "right": lengths.right,
    }
    if packed:
        given |= {"cu_seqlens_k": cu_k, "total_k": cu_k[-1]}
    else:
        given |= {"seqused_k": lengths.seqlens_k}
    got = work(given, device)
    assert got["first_q"] == cu_q[:-1]
    assert got["first_k"] == (cu_k[:-1] if packed else [0] * batch)
    for b in range(batch):
        seqlen_q, begin, end, tiles = lengths.tiles(b)
        where = f"sequence {b} of {lengths}"
        assert got["seqlen_q"][b] == seqlen_q, where
        assert got["tiles"][b] == tiles, where
        if end > begin and seqlen_q:
            assert (got["begin"][b], got["end"][b]) == (begin, end), where
            assert got["offset"][b] == lengths.seqlens_k[b] - lengths.seqlens_q[b], where


def test_a_sequence_without_work_takes_one_tile(device: str) -> None:
    got = work(
        {
            "batch": 4,
            # No keys; no queries; more rows than the decode path takes; as many as it takes.
            "cu_seqlens_q": [0, 1, 1, 10, 18],
            "seqused_k": [0, 50, 50, 50],
            "total_q": 18,
            "max_seqlen_k": 50,
            "max_rows": 8,
        },
        device,
    )
    assert got["seqlen_q"] == [1, 0, 0, 8]
    assert got["tiles"] == [1, 1, 1, 4]


@pytest.mark.parametrize(
    ("left", "right", "begin", "tiles"),
    [(None, 0, 0, 63), (0, 0, 999, 1), (31, 0, 968, 2), (16, 0, 983, 2), (15, 0, 984, 1)],
)
def test_a_window_shrinks_the_line(
    left: int | None, right: int | None, begin: int, tiles: int, device: str
) -> None:
    given = {"batch": 1, "fixed_seqlen_q": 1, "seqused_k": [1000], "max_seqlen_k": 1000}
    got = work({**given, "total_q": 1, "left": left, "right": right}, device)
    assert (got["begin"], got["end"], got["tiles"]) == ([begin], [1000], [tiles])


GARBAGE = st.one_of(
    st.integers(-(2**31), 2**31 - 1), st.integers(-3, 30), st.sampled_from((-(2**31), 2**31 - 1))
)


@ci
@hypothesis.given(
    cu_q=st.lists(GARBAGE, min_size=5, max_size=5),
    cu_k=st.one_of(st.none(), st.lists(GARBAGE, min_size=5, max_size=5)),
    used_q=st.one_of(st.none(), st.lists(GARBAGE, min_size=4, max_size=4)),
    used_k=st.one_of(st.none(), st.lists(GARBAGE, min_size=4, max_size=4)),
    window=st.tuples(st.sampled_from((None, 0, 9)), st.sampled_from((None, 0, 9))),
)
def test_garbage_lengths_stay_inside_the_tensors(
    cu_q: list[int],
    cu_k: list[int] | None,
    used_q: list[int] | None,
    used_k: list[int] | None,
    window: tuple[int | None, int | None],
    device: str,
) -> None:
    total_q, total_k, max_seqlen_k = 20, 25, 24
    got = work(
        {
            "batch": 4,
            "cu_seqlens_q": cu_q,
            "seqused_q": used_q,
            "cu_seqlens_k": cu_k,
            "seqused_k": used_k,
            "total_q": total_q,
            "total_k": total_k,
            "max_seqlen_k": max_seqlen_k,
            "fixed_seqlen_k": max_seqlen_k,
            "left": window[0],
            "right": window[1],
        },
        device,
    )
    room = max_seqlen_k if cu_k is None else total_k
    for b in range(4):
        row = {name: values[b] for name, values in got.items()}
        assert 0 <= row["first_q"] <= total_q, row
        assert 0 <= row["seqlen_q"] <= total_q - row["first_q"], row
        assert 0 <= row["first_k"] <= total_k, row
        assert 0 <= row["begin"] <= row["end"], row
        if row["end"] > row["begin"]:
            assert row["first_k"] + row["end"] <= room, row
        assert 1 <= row["tiles"] <= -(-room // 16), row


def test_lengths_beyond_what_the_host_knows_are_cut(device: str) -> None:
    given = {"batch": 3, "fixed_seqlen_q": 4, "total_q": 12, "max_seqlen_k": 30}
    got = work({**given, "seqused_q": [9, -1, 2], "seqused_k": [31, 30, -5]}, device)
    assert got["seqlen_q"] == [4, 0, 2]
    assert got["end"] == [30, 30, 0]
    assert got["first_q"] == got["first_k"] == [0, 0, 0]

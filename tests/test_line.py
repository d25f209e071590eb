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
    chunk_tiles,
    decode_work,
    holder_of,
    locate,
    piece_range,
    program_range,
    range_of,
    total_and_tiles,
)
from triton_fa.kernels.plans import piece_slots  # noqa: E402

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
    MIN_ROWS: tl.constexpr,
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
        idx,
        idx < batch,
        lengths,
        (window_left, window_right, None),
        GROUP,
        MIN_ROWS,
        MAX_ROWS,
        BLOCK_N,
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
    into_ptr,  # [3, positions]: what `locate` returns
    total_ptr,
    seqused_k_ptr,
    batch,
    max_seqlen_k,
    positions,
    MIN_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """`locate` of every position of the line of `batch` one-token sequences."""
    lengths = (None, None, batch, 1, None, seqused_k_ptr, 1, 0, max_seqlen_k, None, None, None)
    windows = (None, None, None)
    total, tiles = total_and_tiles(
        batch, lengths, windows, 1, MIN_ROWS, 1, BLOCK_N, BLOCK_B, ONE_BLOCK
    )
    tl.store(total_ptr, total)
    for position in tl.range(0, positions):
        seq_idx, before, its_tiles = locate(
            position, tiles, batch, lengths, windows, 1, None, 1, BLOCK_N, BLOCK_B, ONE_BLOCK
        )
        tl.store(into_ptr + position, seq_idx)
        tl.store(into_ptr + positions + position, before)
        tl.store(into_ptr + 2 * positions + position, its_tiles)


@triton.jit
def piece_kernel(
    into_ptr,  # [programs, 5]: index, and what `piece_range` returns
    holder_ptr,  # [lanes, batch, longest, 2]: what `holder_of` returns
    chunk_ptr,  # [batch]
    seqused_k_ptr,
    batch,
    longest,
    smallest_chunk,
    most_pieces,
    LANES: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """The range of one program; program 0 also looks for every piece. Tiles are of one key."""
    lengths = (None, None, batch, 1, None, seqused_k_ptr, 1, 0, longest, None, None, None)
    windows = (None, None, None)
    chunking = (smallest_chunk, most_pieces)
    DIVIDE: tl.constexpr = PROGRAMS % LANES == 0
    pid = tl.program_id(0)
    total, tiles = total_and_tiles(batch, lengths, windows, 1, None, 1, 1, BLOCK_B, ONE_BLOCK)
    lane, index, position, share, extra = program_range(pid, PROGRAMS, total, LANES, DIVIDE)
    count = share + (index < extra).to(tl.int32)
    if not DIVIDE:
        lane = position // total
        position -= lane * total
    lane, seq_idx, tile, count = piece_range(
        lane,
        position,
        count,
        tiles,
        total,
        batch,
        lengths,
        windows,
        chunking,
        1,
        None,
        1,
        1,
        BLOCK_B,
        ONE_BLOCK,
        DIVIDE,
    )
    tl.store(into_ptr + pid * 5, index)
    tl.store(into_ptr + pid * 5 + 1, lane)
    tl.store(into_ptr + pid * 5 + 2, seq_idx)
    tl.store(into_ptr + pid * 5 + 3, tile)
    tl.store(into_ptr + pid * 5 + 4, count)
    if pid == 0:
        begin = 0
        for seq_idx in tl.range(0, batch):
            its_tiles = tl.maximum(tl.load(seqused_k_ptr + seq_idx), 1)
            chunk = chunk_tiles(its_tiles, chunking)
            tl.store(chunk_ptr + seq_idx, chunk)
            for lane in tl.static_range(LANES):
                line = begin if DIVIDE else begin + lane * total
                for piece in tl.range(0, (its_tiles + chunk - 1) // chunk):
                    holder, before = holder_of(piece, line, its_tiles, chunk, share, extra)
                    place = ((lane * batch + seq_idx) * longest + piece) * 2
                    tl.store(holder_ptr + place, holder)
                    tl.store(holder_ptr + place + 1, before)
            begin += its_tiles


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
    seqlens_k=st.lists(st.integers(0, 70), min_size=1, max_size=10), block_b=st.just(4)
)
@hypothesis.example(seqlens_k=[0], block_b=4)
@hypothesis.example(seqlens_k=[16, 17, 33, 0] * 2, block_b=8)  # exactly one block
@hypothesis.example(seqlens_k=[1] * 9, block_b=4)  # one in the last of three blocks
def test_a_position_is_found_in_one_block_and_in_several(
    seqlens_k: list[int], block_b: int, device: str
) -> None:
    block_n, batch = 16, len(seqlens_k)
    tiles = [max(1, -(-n // block_n)) for n in seqlens_k]
    want = [(b, sum(tiles[:b]), n) for b, n in enumerate(tiles) for _ in range(n)]
    want.append((batch, sum(tiles), 0))  # behind the line
    for size, one_block in (
        (block_b, False),
        (triton.next_power_of_2(max(block_b, batch)), True),
    ):
        into, total = found(seqlens_k, len(want), device, block_n, size, one_block)
        assert total == sum(tiles)
        assert list(zip(*into.tolist(), strict=True)) == want


def found(
    seqlens_k: list[int],
    positions: int,
    device: str,
    block_n: int,
    block_b: int,
    one_block: bool,
    min_rows: int | None = None,
) -> tuple[torch.Tensor, int]:
    """`locate` of the first `positions`, and the total."""
    total = int32([-1], device)
    into = torch.full((3, positions), -1, dtype=torch.int32, device=device)
    locate_kernel[(1,)](
        into,
        total,
        int32(seqlens_k, device),
        len(seqlens_k),
        70,
        positions,
        min_rows,
        block_n,
        block_b,
        one_block,
        num_warps=1,
    )
    return into, int(total.item())


@pytest.mark.parametrize("one_block", [True, False])
def test_a_launch_for_other_rows_has_an_empty_line(one_block: bool, device: str) -> None:
    assert found([5, 40, 3], 1, device, 16, 4, one_block, min_rows=1)[1] == 0
    assert found([5, 40, 3], 1, device, 16, 4, one_block, min_rows=0)[1] == 5


# ---------------------------------------------------------------- ranges of whole pieces


@ci
@hypothesis.given(
    tiles=st.lists(st.integers(1, 60), min_size=1, max_size=7),
    lanes=st.integers(1, 3),
    programs=st.integers(1, 24),
    chunking=st.tuples(st.integers(1, 4), st.sampled_from((1, 2, 5, 64))),
    one_block=st.booleans(),
)
# The nearest piece is the end of a sequence, whose last piece is short.
@hypothesis.example(tiles=[7, 4], lanes=1, programs=2, chunking=(1, 2), one_block=True)
# A range with the pieces of one sequence that leaves the next one half-way.
@hypothesis.example(tiles=[40, 40], lanes=1, programs=3, chunking=(2, 64), one_block=True)
@hypothesis.example(tiles=[9, 9], lanes=3, programs=2, chunking=(4, 64), one_block=True)
@hypothesis.example(tiles=[3], lanes=1, programs=24, chunking=(2, 64), one_block=False)
def test_every_piece_is_in_one_range_and_found_there(
    tiles: list[int],
    lanes: int,
    programs: int,
    chunking: tuple[int, int],
    one_block: bool,
    device: str,
) -> None:
    batch, most = len(tiles), chunking[1]
    into = torch.full((programs, 5), -1, dtype=torch.int32, device=device)
    longest = max(tiles)
    holders = torch.full((lanes, batch, longest, 2), -1, dtype=torch.int32, device=device)
    chunks = torch.full((batch,), -1, dtype=torch.int32, device=device)
    sizes = (lanes, programs, 8 if one_block else 2, one_block)
    piece_kernel[(programs,)](
        into, holders, chunks, int32(tiles, device), batch, longest, *chunking, *sizes, num_warps=1
    )
    chunk = chunks.tolist()
    for n, size in zip(tiles, chunk, strict=True):
        assert size >= min(n, chunking[0])
        assert -(-n // size) <= most
    whole: set[tuple[int, int]] = set()  # (lane, sequence): done by one program
    begun: dict[tuple[int, int], int] = {}  # its first pieces, merged by one program
    entered: dict[tuple[int, int, int], tuple[int, int]] = {}  # piece: (range, number there)
    slots = 0
    for index, lane, seq_idx, tile, count in into.tolist():
        from_start, here = tile == 0, 0
        for step in range(count):
            end = tile + 1 == tiles[seq_idx]
            if end or (tile + 1) % chunk[seq_idx] == 0:
                at, piece = (lane, seq_idx), tile // chunk[seq_idx]
                if not from_start:
                    place = (*at, piece)
                    assert place not in entered
                    entered[place] = (index, here)
                    here += 1
                elif end:
                    assert at not in whole
                    whole.add(at)
                elif step == count - 1:
                    assert at not in begun
                    begun[at] = piece + 1
            else:
                assert step < count - 1, "a range ends inside a piece"
            tile += 1
            if end:
                tile, from_start = 0, True
                lane, seq_idx = (lane, seq_idx + 1) if seq_idx + 1 < batch else (lane + 1, 0)
        slots = max(slots, 1 + here)
    for lane in range(lanes):
        for seq_idx, (n, size) in enumerate(zip(tiles, chunk, strict=True)):
            at, pieces = (lane, seq_idx), -(-n // size)
            if at in whole:
                assert at not in begun
                continue
            assert 0 < begun[at] < pieces
            want = [entered.pop((*at, piece)) for piece in range(begun[at], pieces)]
            assert [tuple(h) for h in holders[lane, seq_idx, begun[at] : pieces].tolist()] == want
    assert not entered
    assert slots <= piece_slots(longest, batch, programs, lanes, chunking)


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
        given.get("min_rows"),
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


def test_a_launch_for_more_rows_leaves_fewer_alone(device: str) -> None:
    given = {"batch": 3, "cu_seqlens_q": [0, 4, 9, 11], "seqused_k": [50] * 3, "total_q": 11}
    got = work({**given, "max_seqlen_k": 50, "group": 2, "min_rows": 8, "max_rows": 64}, device)
    assert got["seqlen_q"] == [0, 5, 0]
    assert got["tiles"] == [1, 4, 1]


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

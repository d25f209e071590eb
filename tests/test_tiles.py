"""Tile tables: what a plan asks of a chip is there, for every head_dim, dtype and chip.

And the choice between the table and what was measured.
"""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import triton_fa
from triton_fa import device as device_facts
from triton_fa import store
from triton_fa.device import DeviceFacts
from triton_fa.kernels import choice, plans
from triton_fa.schedule import tiles
from triton_fa.schedule.tiles import (
    decode_fits,
    decode_programs,
    decode_tile,
    next_power_of_2,
    panels,
    prefill_tile,
)
from triton_fa.spec import AttnSpec

CHIPS = {
    "sm_75": DeviceFacts("cuda", (7, 5), 40, 64 << 10),
    "sm_80": DeviceFacts("cuda", (8, 0), 108, 163 << 10),
    "sm_86": DeviceFacts("cuda", (8, 6), 84, 99 << 10),
    "sm_90": DeviceFacts("cuda", (9, 0), 132, 227 << 10),
    "sm_100": DeviceFacts("cuda", (10, 0), 148, 227 << 10),
    "sm_120": DeviceFacts("cuda", (12, 0), 170, 99 << 10),
    "gfx942": DeviceFacts("hip", (0, 0), 304, 64 << 10, 64),
    "gfx950": DeviceFacts("hip", (0, 0), 256, 160 << 10, 64),
    "gfx1100": DeviceFacts("hip", (0, 0), 96, 64 << 10, 32),
    "cpu": DeviceFacts("cpu", (0, 0), 4, 1 << 20),
}
H200 = CHIPS["sm_90"]
DIMS = range(8, 257, 8)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


def spec(dtype: torch.dtype, head_dim: int, head_dim_v: int) -> AttnSpec:
    return AttnSpec(
        entry="kvcache",
        device=torch.device("cpu"),
        dtype=dtype,
        kv_dtype=dtype,
        num_heads_q=8,
        num_heads_kv=2,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        query_layout="dense",
        key_layout="paged",
        page_size=16,
        softmax_scale=1.0,
        window_left=-1,
        window_right=-1,
        softcap=0.0,
        num_splits=0,
        sm_margin=0,
        features=frozenset(),
    )


def specs(dtype: torch.dtype) -> list[AttnSpec]:
    """Equal head dims, and those of which one decides alone."""
    pairs = [(d, d) for d in DIMS] + [(d, e) for d in DIMS for e in (8, 256)]
    return [spec(dtype, d, dv) for d, dv in pairs]


def is_power_of_2(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@pytest.mark.parametrize(
    ("n", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (255, 256), (257, 512)]
)
def test_next_power_of_2(n: int, power: int) -> None:
    assert next_power_of_2(n) == power


@pytest.mark.parametrize(
    ("dim", "pair"),
    [
        (8, (16, 0)),
        (16, (16, 0)),
        (24, (32, 0)),
        (40, (32, 16)),
        (48, (32, 16)),
        (56, (64, 0)),
        (64, (64, 0)),
        (72, (64, 16)),
        (80, (64, 16)),
        (96, (64, 32)),
        (112, (128, 0)),
        (128, (128, 0)),
        (136, (128, 16)),
        (192, (128, 64)),
        (200, (256, 0)),
        (256, (256, 0)),
    ],
)
def test_panels(dim: int, pair: tuple[int, int]) -> None:
    assert panels(dim) == pair


@pytest.mark.parametrize("dim", DIMS)
def test_panels_hold_a_head_without_waste(dim: int) -> None:
    first, second = panels(dim)
    assert dim <= first + second <= max(16, next_power_of_2(dim))
    assert is_power_of_2(first)
    assert first >= 16
    if second:
        assert is_power_of_2(second)
        assert 16 <= second < first < dim  # both are read, the second one masked
        assert first + second < next_power_of_2(dim)  # or one panel would do


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chip", CHIPS)
def test_a_prefill_tile_fits(chip: str, dtype: torch.dtype) -> None:
    device = CHIPS[chip]
    for problem, rows in itertools.product(specs(dtype), (1, 64, 65, 4096)):
        tile = prefill_tile(problem, device, rows)
        dim = tiles._prefill_dim(problem, tile)
        assert dim >= max(16, problem.head_dim, problem.head_dim_v)
        # At least q and one block of keys or values; with stages, both of them each.
        blocks = 2 * tile.num_stages * tile.block_n if tile.num_stages > 1 else tile.block_n
        assert (tile.block_m + blocks) * dim * dtype.itemsize <= device.shared_memory, problem
        assert tiles._prefill_bytes(tile, dim, dtype.itemsize) <= device.shared_memory, problem
        assert all(is_power_of_2(n) for n in (tile.block_m, tile.block_n, tile.num_warps))
        assert min(tile.block_m, tile.block_n) >= 16  # what a matrix instruction needs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chip", CHIPS)
def test_a_decode_tile_fits(chip: str, dtype: torch.dtype) -> None:
    device = CHIPS[chip]
    for problem, rows in itertools.product(specs(dtype), ROWS):
        if not decode_fits(problem, device, rows):
            continue  # see the test below
        tile = decode_tile(problem, device, rows)
        dim = max(sum(panels(problem.head_dim)), sum(panels(problem.head_dim_v)))
        # Buffers that are live at once: with stages K and V of each, without one after the other.
        stages = tile.num_stages - 1
        blocks = 2 * stages * tile.block_n if stages else 0
        resident = (max(16, rows, tile.block_n) + blocks) * dim * dtype.itemsize
        assert resident * tile.programs_per_sm <= device.shared_memory, (problem, rows)
        assert all(is_power_of_2(n) for n in (tile.block_n, tile.num_warps))
        assert tile.block_n >= 16
        assert tile.num_stages >= 1
        assert tile.programs_per_sm >= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chip", CHIPS)
def test_rows_of_the_decode_path(chip: str, dtype: torch.dtype) -> None:
    device = CHIPS[chip]
    for problem in specs(dtype):
        dim = max(problem.head_dim, problem.head_dim_v)
        taken = [decode_fits(problem, device, rows) for rows in ROWS]
        assert taken == sorted(taken, reverse=True)  # if so many, fewer as well
        most = ROWS[sum(taken) - 1]
        if chip == "cpu":
            assert most == 128  # interpreted tests reach every size
        elif dtype == torch.float32:
            assert most == 16
        elif dim > 128:
            assert most <= 32 if chip == "gfx1100" else most >= 64
        else:
            assert most >= 64
            assert most == 128 or dim > 64


@pytest.mark.parametrize("chip", CHIPS)
def test_scheduler_metadata_of_values_512_wide_has_tiles_to_plan_with(chip: str) -> None:
    problem = spec(torch.bfloat16, 64, 512)
    assert decode_fits(problem, CHIPS[chip], 16)
    assert decode_tile(problem, CHIPS[chip], 16).block_n >= 16
    assert prefill_tile(problem, CHIPS[chip], 4096).block_m >= 16


@pytest.mark.parametrize("chip", CHIPS)
def test_a_sequence_is_on_one_path_only(chip: str) -> None:
    """Whatever its bound: the decode path takes the rows that its tiles are for."""
    device = CHIPS[chip]
    for dtype, dim, group in itertools.product(DTYPES, (64, 128, 256), (1, 4, 16, 24, 64, 128)):
        problem = replace(spec(dtype, dim, dim), num_heads_q=group, num_heads_kv=1)
        for layout, features in itertools.product(
            ("dense", "packed"), (frozenset(), frozenset({"batch_invariant"}))
        ):
            made = replace(problem, query_layout=layout, features=features)
            rows = {}
            for tokens in (1, 2, 5, 16, 4096):
                most = tokens * group
                rows[tokens] = plans.decode_rows(made, device, most, varlen_q=True)
                assert not rows[tokens] or decode_fits(made, device, rows[tokens])
                assert not rows[tokens] or is_power_of_2(rows[tokens])
            if features:
                assert len(set(rows.values())) == 1
            else:  # one new token of each sequence is decoded where the chip takes its rows
                assert (rows[1] >= group) == decode_fits(made, device, group)


MEASURED_DECODE = {  # head_dim, rows: what was measured on an H200 (docs/log.md)
    (64, 1): (128, 4, 3, 2),
    (64, 16): (128, 4, 3, 2),
    (64, 32): (128, 4, 3, 2),
    (64, 64): (128, 4, 2, 2),
    (128, 1): (64, 4, 3, 2),
    (160, 1): (64, 4, 3, 2),
    (192, 1): (32, 4, 3, 3),
    (128, 16): (64, 4, 3, 2),
    (128, 32): (64, 4, 3, 2),
    (128, 64): (128, 8, 2, 1),
    (256, 1): (32, 4, 3, 2),
    (256, 16): (32, 4, 3, 2),
    (256, 32): (64, 4, 3, 1),
    (256, 64): (32, 4, 2, 1),
}
MEASURED_PREFILL: dict[tuple[int, int], tuple[Any, ...]] = {  # head_dim, most rows of a sequence
    (64, 4096): (128, 64, 4, 3, 2, False, 8),
    (64, 4097): (128, 64, 4, 3, 2, False, 8),
    (80, 4097): (128, 64, 4, 3, 2, True, 8),
    (96, 4097): (128, 64, 4, 3, 2, True, 8),
    (160, 4097): (128, 64, 8, 3, 1, True),
    (192, 4097): (128, 64, 8, 3, 1, True, 8),
    (128, 4096): (128, 64, 4, 2, 2),
    (128, 4097): (256, 64, 8, 3, 2),
    (256, 4096): (128, 64, 8, 2, 1, False, 0, True),
    (256, 4097): (128, 64, 8, 2, 1, False, 0, True),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_tiles_that_were_measured(dtype: torch.dtype) -> None:
    for (dim, rows), decode in MEASURED_DECODE.items():
        assert decode_tile(spec(dtype, dim, dim), H200, rows) == tiles.DecodeTile(*decode)
    for (dim, rows), prefill in MEASURED_PREFILL.items():
        assert prefill_tile(spec(dtype, dim, dim), H200, rows) == tiles.PrefillTile(*prefill)
    of_mla = prefill_tile(spec(dtype, 192, 128), H200, 4097)
    assert of_mla == tiles.PrefillTile(*MEASURED_PREFILL[192, 4097])


@pytest.mark.parametrize(
    ("dim", "pair"),
    [(16, (32, 0)), (80, (64, 32)), (112, (128, 0)), (160, (128, 32)), (192, (128, 64))],
)
def test_panels_of_a_prefill_tile(dim: int, pair: tuple[int, int]) -> None:
    assert tiles.prefill_panels(dim, tiles.PrefillTile(128, 64, 8, 3, panels=True)) == pair
    whole = max(16, next_power_of_2(dim))
    assert tiles.prefill_panels(dim, tiles.PrefillTile(128, 64, 8, 3)) == (whole, 0)


SHORT = {"sm_80": 128, "sm_90": 128, "sm_100": 128, "sm_120": 128, "gfx942": 128, "gfx1100": 0}


@pytest.mark.parametrize("chip", SHORT)
def test_the_tile_of_all_keys(chip: str) -> None:
    """Of 16-bit numbers, up to a width."""
    for dim, dim_v in itertools.product((8, 64, 80, 128, 136, 256), (16, 128)):
        made = spec(torch.bfloat16, dim, dim_v)
        tile = tiles.short_tile(made, CHIPS[chip])
        assert (tile is not None) == (max(dim, dim_v) <= SHORT[chip])
        assert tiles.short_tile(replace(made, kv_dtype=torch.float8_e4m3fn), CHIPS[chip]) is None


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("heads_kv", [1, 2, 3, 5, 7, 8, 64, 128, 500])
def test_there_is_always_a_decode_program(chip: str, heads_kv: int) -> None:
    device = CHIPS[chip]
    for dim, sm_margin in itertools.product((64, 128, 256), (0, 1, 16, 1000)):
        tile = decode_tile(spec(torch.bfloat16, dim, dim), device, 8)
        programs = decode_programs(device, tile, heads_kv, 3, sm_margin)
        slots = max(1, device.num_sms - sm_margin) * tile.programs_per_sm
        assert 1 <= programs <= slots
        # Few are idle, whether or not the heads or the sequences divide them.
        assert programs >= 0.9 * 0.94 * slots - heads_kv


def test_programs_are_a_multiple_of_the_heads_where_that_idles_few() -> None:
    tile = tiles.DecodeTile(64, 4, 3, 2)
    facts = CHIPS["sm_90"]
    assert decode_programs(facts, tile, 8, 1, 0) == 264
    assert decode_programs(facts, tile, 7, 1, 0) == 259
    assert decode_programs(facts, tile, 8, 1, 2) == 256  # 260 slots
    assert decode_programs(facts, tile, 40, 16, 0) == 240
    assert decode_programs(facts, tile, 100, 1, 0) == 264  # 200 would idle a quarter


def test_ranges_end_where_equal_sequences_do() -> None:
    tile = tiles.DecodeTile(64, 4, 3, 2)
    facts = CHIPS["sm_90"]
    assert decode_programs(facts, tile, 8, 32, 0) == 32 * 8  # one sequence a range, not 32 / 33
    assert decode_programs(facts, tile, 8, 64, 0) == 32 * 8
    assert decode_programs(facts, tile, 1, 1024, 0) == 256
    assert decode_programs(facts, tile, 8, 7, 0) == 264  # 28 would idle a sixth


LATENT_TILES = [
    # chip, dtype, rows, whether values alone are scored; keys, warps, stages
    ("sm_90", torch.bfloat16, 16, False, (64, 8, 3)),
    ("sm_90", torch.bfloat16, 32, False, (64, 8, 2)),
    ("sm_90", torch.float32, 16, False, (32, 4, 2)),
    ("sm_90", torch.float32, 32, False, (32, 8, 1)),
    ("sm_80", torch.bfloat16, 16, False, (32, 4, 2)),
    ("sm_80", torch.bfloat16, 16, True, (64, 4, 2)),
    ("sm_80", torch.bfloat16, 32, False, (32, 8, 2)),
    ("sm_86", torch.bfloat16, 16, False, (32, 4, 1)),
    ("gfx942", torch.bfloat16, 16, False, (32, 4, 1)),
    ("gfx942", torch.bfloat16, 32, False, (16, 8, 1)),
    ("gfx942", torch.float32, 32, False, (16, 8, 1)),
    ("cpu", torch.float32, 32, False, (32, 4, 1)),
]


@pytest.mark.parametrize(("chip", "dtype", "rows", "only", "expected"), LATENT_TILES)
def test_latent_tiles(
    chip: str, dtype: torch.dtype, rows: int, only: bool, expected: tuple[int, int, int]
) -> None:
    """The widest that fits beside queries and what is scored: 64 and 512, or 512 alone."""
    features = frozenset(["qv", "only_qv"] if only else ["qv"])
    found = tiles.latent_tile(replace(spec(dtype, 64, 512), features=features), CHIPS[chip], rows)
    assert found == tiles.DecodeTile(*expected, programs_per_sm=2 if chip == "cpu" else 1)


@pytest.mark.parametrize(
    ("chip", "dtype", "prefill", "decode"),
    [
        ("sm_90", torch.bfloat16, "hopper", "hopper"),
        ("sm_90", torch.float8_e4m3fn, "hopper float8", "hopper float8"),
        ("sm_90", torch.float32, "nvidia float32", "nvidia float32"),
        ("sm_100", torch.float16, "blackwell", "blackwell"),
        ("sm_120", torch.float16, "ampere", "ampere"),
        ("sm_120", torch.float32, "nvidia float32", "ampere float32"),
        ("sm_80", torch.float8_e4m3fn, "ampere float8", "ampere float8"),
        ("sm_100", torch.float8_e4m3fn, "blackwell float8", "blackwell"),
        ("gfx942", torch.float8_e5m2, "cdna float8", "cdna"),
        ("gfx942", torch.float32, "cdna float32", "cdna float32"),
        ("gfx1100", torch.float8_e5m2, "rdna", "rdna float8"),
    ],
)
def test_tables_of_a_chip(chip: str, dtype: torch.dtype, prefill: str, decode: str) -> None:
    problem = replace(spec(torch.float16, 64, 64), kv_dtype=dtype)
    assert tiles._choices(tiles._PREFILL, problem, CHIPS[chip]) is tiles._PREFILL[prefill]
    assert tiles._choices(tiles._DECODE, problem, CHIPS[chip]) is tiles._DECODE[decode]


@pytest.mark.parametrize(
    ("sms", "heads", "batch", "programs"),
    [
        (10, 9, 1, 9),  # a tenth idle, and no more
        (11, 9, 1, 11),
        (100, 1, 3, 99),  # a multiple of the sequences
        (100, 1, 94, 94),  # six of a hundred idle, and no more
        (100, 1, 93, 100),
        (100, 1, 192, 96),  # a divisor of them
    ],
)
def test_how_many_programs_may_idle(sms: int, heads: int, batch: int, programs: int) -> None:
    device, tile = replace(H200, num_sms=sms), tiles.DecodeTile(64, 4, 2, 1)
    assert decode_programs(device, tile, heads, batch, 0) == programs


def test_a_latent_tile_may_fill_the_memory() -> None:
    both = replace(spec(torch.bfloat16, 64, 512), features=frozenset(["qv", "only_qv"]))
    just = replace(H200, shared_memory=2048 + (64 + 16) * 2 * 512 * 2)
    assert tiles.latent_tile(both, just, 16) == tiles.DecodeTile(64, 4, 2, 1)
    less = replace(just, shared_memory=just.shared_memory - 1)
    assert tiles.latent_tile(both, less, 16) == tiles.DecodeTile(32, 4, 2, 1)


# ---------------------------------------------------------------- what may be measured


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chip", CHIPS)
def test_candidates_fit(chip: str, dtype: torch.dtype) -> None:
    device = CHIPS[chip]
    for problem in (spec(dtype, dim, dim) for dim in (16, 64, 96, 128, 192, 256)):
        for rows in (n for n in (1, 16, 64, 128) if decode_fits(problem, device, n)):
            shipped, *others = tiles.decode_candidates(problem, device, rows)
            assert shipped == decode_tile(problem, device, rows)
            assert len({shipped, *others}) == 1 + len(others) <= 100
            dim = max(sum(tiles.decode_panels(problem.head_dim, rows)), 16)
            for tile in others:
                needed = tiles._decode_bytes(tile, rows, dim, dtype.itemsize)
                assert needed <= device.shared_memory, (problem, tile)
                assert all(map(is_power_of_2, (tile.block_n, tile.num_warps)))
        for rows in (64, 4096, 2**31):
            shipped_too, *more = tiles.prefill_candidates(problem, device, rows)
            assert shipped_too == prefill_tile(problem, device, rows)
            assert len({shipped_too, *more}) == 1 + len(more) <= 100
            dim = max(16, next_power_of_2(problem.head_dim))
            for found in more:
                needed = tiles._prefill_bytes(found, dim, dtype.itemsize)
                assert needed <= device.shared_memory, (problem, found)
                assert found.block_m // found.halves >= 16 * found.num_warps


def test_candidates_are_what_can_be_compiled_and_nothing_is_left_out() -> None:
    """On a chip with memory for all of them: fewer warps where accumulators fill the registers."""
    roomy = replace(H200, shared_memory=1 << 30)
    stages = (1, 2, 3)
    for dims, most_rows in (((64, 64), 256), ((8, 128), 128), ((128, 8), 128), ((256, 256), 64)):
        _, *found = tiles.prefill_candidates(spec(torch.float16, *dims), roomy, 4096)
        expected = {
            tiles.PrefillTile(rows, keys, warps, stages_, halves)
            for rows, warps, halves in (
                (64, 4, 1),
                (128, 4, 1),
                (128, 4, 2),
                (128, 8, 1),
                (256, 4, 1),
                (256, 4, 2),
                (256, 8, 1),
                (256, 8, 2),
            )
            for keys, stages_ in itertools.product((32, 64, 128), stages)
            if rows <= most_rows * warps // 4
        }
        shipped = prefill_tile(spec(torch.float16, *dims), roomy, 4096)
        assert {shipped, *found} == expected | {shipped}


@pytest.mark.parametrize(("rows", "dim", "warps"), [(16, 64, (4, 8)), (128, 192, (8,))])
def test_decode_candidates_are_what_threads_can_hold(
    rows: int, dim: int, warps: tuple[int, ...]
) -> None:
    roomy, problem = replace(H200, shared_memory=1 << 30), spec(torch.float16, dim, dim)
    shipped, *found = tiles.decode_candidates(problem, roomy, rows)
    expected = {
        tiles.DecodeTile(keys, warps_, stages, programs)
        for keys, stages in itertools.product((32, 64, 128), (2, 3, 4))
        for warps_, programs in ((4, 1), (4, 2), (4, 3), (8, 1), (8, 2))
        if warps_ in warps
    }
    assert {shipped, *found} == expected | {shipped}


def test_a_tile_may_fill_the_memory() -> None:
    """And one byte less is another tile. Heads of 8 take as much as those of 16."""
    problem = spec(torch.float16, 8, 8)
    grid = tiles.PrefillTile(128, 64, 4, 3, 2)
    first = replace(grid, sums=8)
    just = replace(H200, shared_memory=2048 + (128 + 2 * 64 * 3) * 16 * 2)
    less = replace(just, shared_memory=just.shared_memory - 1)
    assert prefill_tile(problem, just, 2**31) == first
    assert prefill_tile(problem, less, 2**31) != first
    assert grid in tiles._prefill_grid(problem, just)
    assert grid not in tiles._prefill_grid(problem, less)
    decode = tiles.DecodeTile(128, 4, 3, 2)
    just = replace(H200, shared_memory=2048 + 2 * (2 * 2 * 128 + 4 * 16) * 16 * 2)
    less = replace(just, shared_memory=just.shared_memory - 1)
    assert decode_tile(problem, just, 16) == decode
    assert decode_tile(problem, less, 16) != decode
    assert decode in tiles._decode_grid(problem, just, 16)
    assert decode not in tiles._decode_grid(problem, less, 16)


@pytest.mark.parametrize(
    ("rows", "itemsize", "expected"),
    [
        # rows of keys, values and q in two stages; operands staged; times the bytes of a row
        (32, 2, (128 + 3 * 32) * 128 * 2),
        (64, 2, (2 * (128 + 64) + 128) * 128 * 2),
        (128, 2, (2 * (128 + 128) + 128 + 128) * 128 * 2),
        (64, 4, (2 * (128 + 64)) * 128 * 4),
        (128, 4, (2 * (128 + 128)) * 128 * 4),
    ],
)
def test_shared_memory_of_a_decode_tile(rows: int, itemsize: int, expected: int) -> None:
    tile = tiles.DecodeTile(64, 8, 2, 1)
    assert tiles._decode_bytes(tile, rows, 128, itemsize) == expected


def test_many_rows_fit_where_the_smallest_of_their_tiles_does() -> None:
    problem = spec(torch.float16, 128, 128)
    just = replace(H200, shared_memory=2048 + (2 * (64 + 128) + 64 + 128) * 128 * 2)
    assert decode_fits(problem, just, 128)
    assert not decode_fits(problem, replace(just, shared_memory=just.shared_memory - 1), 128)


@pytest.mark.parametrize(
    ("dim", "rows", "expected"),
    [(72, 32, (64, 16)), (72, 64, (128, 0)), (192, 64, (128, 64)), (192, 32, (128, 64))],
)
def test_panels_of_wgmma_are_64_wide_at_least(
    dim: int, rows: int, expected: tuple[int, int]
) -> None:
    assert tiles.decode_panels(dim, rows) == expected


def test_there_is_something_to_measure_where_tiles_were_not() -> None:
    for chip in ("sm_80", "sm_86", "sm_100", "sm_120", "gfx942", "gfx950", "gfx1100"):
        problem = spec(torch.bfloat16, 64, 64)
        assert len(tiles.decode_candidates(problem, CHIPS[chip], 8)) > 5
        assert len(tiles.prefill_candidates(problem, CHIPS[chip], 4096)) > 5


@pytest.mark.parametrize("rows", [1, 64, 65, 4096, 4097, 2**31])
@pytest.mark.parametrize("chip", CHIPS)
def test_a_class_of_rows_has_one_shipped_tile(chip: str, rows: int) -> None:
    """Else an entry would be made for one and read for the other."""
    problem, device = spec(torch.bfloat16, 128, 128), CHIPS[chip]
    most = next((n for n in tiles.LONG_ROWS if rows <= n), 2**31)
    assert prefill_tile(problem, device, rows) == prefill_tile(problem, device, most)


# ---------------------------------------------------------------- measured or shipped

BF16 = spec(torch.bfloat16, 128, 128)


@pytest.fixture
def measured(fresh: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """An empty store, and tensors of the CPU that count as a chip's."""
    fresh.setenv("TRITON_FA_CACHE_DIR", str(tmp_path))
    fresh.setattr(choice, "chip", lambda device: "a chip sm_90")
    choice.forget()
    store._warned.clear()
    yield fresh
    choice.forget()
    store._warned.clear()


def enter(made: choice.Choice[Any], tile: object) -> None:
    """Put a tile into the store, as another process would."""
    assert store.write(dict(made.key), {"tile": tile}) is not None


def test_an_entry_is_used_instead_of_the_table(measured: pytest.MonkeyPatch) -> None:
    decode, prefill = choice.decode_choice(BF16, H200, 8), choice.prefill_choice(BF16, H200, 8192)
    assert decode.candidates()[-1] != decode_tile(BF16, H200, 8)
    enter(decode, asdict(decode.candidates()[-1]))
    enter(prefill, asdict(prefill.candidates()[-1]))
    assert choice.decode_tile(BF16, H200, 8) == decode.candidates()[-1]
    assert choice.prefill_tile(BF16, H200, 8192) == prefill.candidates()[-1]
    # And for nothing else.
    assert choice.decode_tile(BF16, H200, 16) == decode_tile(BF16, H200, 16)
    assert choice.prefill_tile(BF16, H200, 4096) == prefill_tile(BF16, H200, 4096)


def test_without_an_entry_it_is_the_table(
    measured: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for rows in ROWS:
        assert choice.decode_tile(BF16, H200, rows) == decode_tile(BF16, H200, rows)
        assert choice.prefill_tile(BF16, H200, rows) == prefill_tile(BF16, H200, rows)
    assert not caplog.records


GOOD = {"block_n": 32, "num_warps": 4, "num_stages": 2, "programs_per_sm": 2}
BAD: list[Any] = [
    GOOD | {"block_n": 48},
    GOOD | {"block_n": 1 << 20},
    GOOD | {"block_n": 0},
    GOOD | {"block_n": -32},
    GOOD | {"block_n": 32.0},
    GOOD | {"block_n": "32"},
    GOOD | {"num_warps": 3},
    GOOD | {"num_warps": 64},
    GOOD | {"num_stages": True},
    GOOD | {"num_stages": 100},
    GOOD | {"programs_per_sm": 0},
    GOOD | {"programs_per_sm": 10**9},
    GOOD | {"block_n": 128, "num_stages": 4},  # fits no multiprocessor twice
    GOOD | {"unknown": 1},
    {name: value for name, value in GOOD.items() if name != "num_warps"},
    {"block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 2, "halves": 1},
    {},
    [],
    None,
    "64x64",
]


def test_the_good_tile_is_one(measured: pytest.MonkeyPatch) -> None:
    enter(choice.decode_choice(BF16, H200, 8), GOOD)
    assert asdict(choice.decode_tile(BF16, H200, 8)) == GOOD


@pytest.mark.parametrize("tile", BAD, ids=str)
def test_a_tile_that_is_no_candidate_is_a_miss(
    measured: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tile: object
) -> None:
    caplog.set_level(logging.WARNING, logger="triton_fa")
    for rows in (8, 16):
        enter(choice.decode_choice(BF16, H200, rows), tile)
        assert choice.decode_tile(BF16, H200, rows) == decode_tile(BF16, H200, rows)
    assert len(caplog.records) == 1


def test_an_entry_without_a_tile_is_a_miss(measured: pytest.MonkeyPatch) -> None:
    store.write(dict(choice.decode_choice(BF16, H200, 8).key), {})
    assert choice.decode_tile(BF16, H200, 8) == decode_tile(BF16, H200, 8)


@pytest.mark.parametrize(
    ("heads_q", "head_dim", "classes"),
    [(8, 128, (32, 64)), (8, 96, (16, 64)), (8, 192, (16, 64)), (80, 128, (64,)), (300, 128, ())],
)
def test_classes_of_batch_invariant_rows(
    heads_q: int, head_dim: int, classes: tuple[int, ...]
) -> None:
    """16 and 32 rows are one class where their products are summed alike."""
    some = replace(spec(torch.bfloat16, head_dim, head_dim), num_heads_q=heads_q, num_heads_kv=2)
    assert plans.invariant_launches(some, H200) == classes


def test_batch_invariant_calls_never_look(measured: pytest.MonkeyPatch) -> None:
    invariant = replace(BF16, features=frozenset({"batch_invariant"}))
    for made in (choice.decode_choice(BF16, H200, 8), choice.prefill_choice(BF16, H200, 2**31)):
        enter(made, asdict(made.candidates()[-1]))
    measured.setattr(store, "read", lambda key: pytest.fail(f"read {key}"))
    assert choice.decode_tile(invariant, H200, 8) == decode_tile(invariant, H200, 8)
    assert choice.prefill_tile(invariant, H200, 2**31) == prefill_tile(invariant, H200, 2**31)


def test_a_cpu_never_looks(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(store, "read", lambda key: pytest.fail(f"read {key}"))
    assert choice.decode_tile(BF16, H200, 8) == decode_tile(BF16, H200, 8)


def test_a_process_looks_once(measured: pytest.MonkeyPatch) -> None:
    """All launches of a call agree, and all calls of a captured model."""
    made = choice.decode_choice(BF16, H200, 8)
    first = choice.decode_tile(BF16, H200, 8)
    enter(made, asdict(made.candidates()[-1]))
    assert choice.decode_tile(BF16, H200, 8) == first
    choice.forget()
    assert choice.decode_tile(BF16, H200, 8) == made.candidates()[-1]
    store.clear()
    assert choice.decode_tile(BF16, H200, 8) == made.candidates()[-1]


def test_switched_off_the_table_is_used(measured: pytest.MonkeyPatch) -> None:
    made = choice.decode_choice(BF16, H200, 8)
    enter(made, asdict(made.candidates()[-1]))
    measured.setenv("TRITON_FA_AUTOTUNE_CACHE", "0")
    store.settings.cache_clear()
    assert choice.decode_tile(BF16, H200, 8) == decode_tile(BF16, H200, 8)


def test_trying_leaves_nothing_behind(measured: pytest.MonkeyPatch) -> None:
    made = choice.decode_choice(BF16, H200, 8)
    tile = made.candidates()[-1]
    for _ in range(2):  # not looked up before, and looked up
        with choice.trying(made, tile):
            assert choice.decode_tile(BF16, H200, 8) == tile
        assert choice.decode_tile(BF16, H200, 8) == decode_tile(BF16, H200, 8)


@pytest.mark.parametrize(
    ("change", "device", "rows"),
    [
        ({"dtype": torch.float16}, H200, 8),
        ({"kv_dtype": torch.float8_e4m3fn}, H200, 8),
        ({"head_dim": 64}, H200, 8),
        ({"head_dim_v": 64}, H200, 8),
        ({"page_size": 64}, H200, 8),
        ({"page_size": 0}, H200, 8),
        ({"features": frozenset({"qv"})}, H200, 8),
        ({}, replace(H200, num_sms=66), 8),
        ({}, H200, 16),
    ],
)
def test_a_key_holds_what_a_measurement_depends_on(
    measured: pytest.MonkeyPatch, change: dict[str, Any], device: DeviceFacts, rows: int
) -> None:
    mine = choice.decode_choice(BF16, H200, 8).key
    assert choice.decode_choice(replace(BF16, **change), device, rows).key != mine
    assert choice.prefill_choice(BF16, H200, 8).key != mine


@pytest.mark.parametrize("name", ["FORMAT", "TRITON_VERSION", "chip"])
def test_a_key_holds_versions_and_chip(measured: pytest.MonkeyPatch, name: str) -> None:
    mine = choice.decode_choice(BF16, H200, 8).key
    module = tiles if name == "FORMAT" else choice
    measured.setattr(module, name, (lambda device: "b") if name == "chip" else 99)
    assert choice.decode_choice(BF16, H200, 8).key != mine


def test_pages_are_told_apart_by_the_blocks_they_hold(measured: pytest.MonkeyPatch) -> None:
    def page(size: int) -> object:
        return dict(choice.decode_choice(replace(BF16, page_size=size), H200, 8).key)["page"]

    assert [page(n) for n in (0, 1, 16, 48, 64, 96, 128, 256, 1024)] == [
        *(0, 1, 16, 16, 64, 32, 128, 256, 256)
    ]


def test_a_call_runs_with_the_measured_tile_and_looks_once(
    measured: pytest.MonkeyPatch, device: str
) -> None:
    """From the store to the kernel: another block, the same numbers, and no look-up on a hit."""
    if device != "cpu":
        pytest.skip("tiles of the interpreter")
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(2, 1, 8, 32, generator=rng, dtype=torch.float16)
    k, v = torch.randn(2, 2, 70, 2, 32, generator=rng, dtype=torch.float16)

    def call() -> torch.Tensor:
        out = triton_fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=70, ver="triton")
        assert isinstance(out, torch.Tensor)
        return out

    shipped = call()
    facts = device_facts.facts(q.device)
    problem = replace(spec(torch.float16, 32, 32), key_layout="dense", page_size=0)
    enter(choice.decode_choice(problem, facts, 4), asdict(tiles.DecodeTile(128, 8, 2, 1)))
    triton_fa.api._RECORDS.clear()
    choice.forget()
    reads: list[Any] = []
    read = store.read
    measured.setattr(store, "read", lambda key: (reads.append(key), read(key))[1])
    out = call()
    assert choice.decode_tile(problem, facts, 4).block_n == 128
    torch.testing.assert_close(out, shipped, rtol=0, atol=2e-3)
    seen = len(reads)
    assert seen == 1
    call()
    assert len(reads) == seen


def test_float8_keys_are_staged_as_bytes() -> None:
    tile = tiles.DecodeTile(128, 4, 3, 2)
    assert tiles._decode_bytes(tile, 16, 128, 2, 1) == 2 * 73728  # 69632 each were compiled
    made = replace(spec(torch.bfloat16, 128, 128), kv_dtype=torch.float8_e4m3fn)
    assert decode_tile(made, H200, 16) == tile


@pytest.mark.parametrize(
    ("most", "mean", "expected"),
    [(64, 4, 16), (64, 17, 64), (32, 32, 32), (32, 4, 16), (16, 1, 16), (200, 4, 16)],
)
def test_a_bound_far_above_the_mean_does_not_widen_the_tile(
    most: int, mean: int, expected: int
) -> None:
    made = replace(spec(torch.bfloat16, 128, 128), query_layout="packed", num_heads_q=8)
    found = plans.decode_rows(made, H200, most, varlen_q=False, mean_rows=mean)
    assert found == expected

"""Tile tables: what a plan asks of a chip is there, for every head_dim, dtype and chip."""

import itertools

import pytest
import torch

from triton_fa.device import DeviceFacts
from triton_fa.schedule import tiles
from triton_fa.schedule.tiles import (
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
    "gfx942": DeviceFacts("hip", (0, 0), 304, 64 << 10),
    "gfx950": DeviceFacts("hip", (0, 0), 256, 160 << 10),
}
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
        dim = max(16, next_power_of_2(max(problem.head_dim, problem.head_dim_v)))
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
        tile = decode_tile(problem, device, rows)
        dim = max(sum(panels(problem.head_dim)), sum(panels(problem.head_dim_v)))
        if max(16, rows) * dim * dtype.itemsize > device.shared_memory:
            continue  # not even q fits: see the test below
        # Buffers that are live at once: with stages K and V of each, without one after the other.
        stages = tile.num_stages - 1
        blocks = 2 * stages * tile.block_n if stages else 0
        resident = (max(16, rows, tile.block_n) + blocks) * dim * dtype.itemsize
        assert resident * tile.programs_per_sm <= device.shared_memory, (problem, rows)
        assert all(is_power_of_2(n) for n in (tile.block_n, tile.num_warps))
        assert tile.block_n >= 16
        assert tile.num_stages >= 1
        assert tile.programs_per_sm >= 1


@pytest.mark.parametrize("chip", CHIPS)
def test_only_wide_float32_heads_of_128_rows_cannot_fit(chip: str) -> None:
    device = CHIPS[chip]
    for dtype, dim, rows in itertools.product(DTYPES, DIMS, ROWS):
        q_bytes = max(16, rows) * sum(panels(dim)) * dtype.itemsize
        if q_bytes > device.shared_memory:
            assert (dtype, rows) == (torch.float32, 128)
            assert dim > 128


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

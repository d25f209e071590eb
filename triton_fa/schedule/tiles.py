"""Tile shapes: what was measured, and what fits elsewhere."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from triton_fa.device import DeviceFacts
from triton_fa.spec import AttnSpec

FORMAT = 3
"""Of tiles and their candidates: measurements made with another are not used."""

LONG_ROWS = (64, 4096)
"""Prefill tiles change where one sequence may have more rows per kv head than this."""


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n` (and at least 1)."""
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True, slots=True)
class PrefillTile:
    """Rows and keys of one prefill step, and how it is compiled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    halves: int = 1  # 2: the rows are computed as two halves, products beside softmax
    panels: bool = False  # heads that are no power of two are two panels: see `prefill_panels`
    sums: int = 0  # columns that a row's weights are summed to in loops; 0: to one number
    late: bool = False  # values are multiplied a block late, beside the softmax; for one half


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """Keys of one decode step, programs resident on a multiprocessor, and how it is compiled."""

    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


def panels(dim: int, smallest: int = 16) -> tuple[int, int]:
    """`dim` as one or two powers of two of at least `smallest`: 128 -> (128, 0), 96 -> (64, 32).

    Two only where they waste less than rounding up: 112 -> (128, 0).
    """
    whole = max(smallest, next_power_of_2(dim))
    lower = whole // 2
    if lower < smallest or dim <= lower:
        return whole, 0
    rest = max(smallest, next_power_of_2(dim - lower))
    return (lower, rest) if lower + rest < whole else (whole, 0)


def decode_panels(dim: int, rows: int, itemsize: int = 2) -> tuple[int, int]:
    """The panels of a decode kernel of `rows` rows; of float8 numbers the even and odd columns.

    From 64 rows on products are wgmma, for which Triton 3.6 reads past the shared memory of
    panels narrower than 64 (head_dim 72; float8 values of 40 beside keys of 72).
    """
    if itemsize == 1:
        half = max(64 if rows >= 64 else 16, next_power_of_2(dim // 2))
        return half, half
    return panels(dim, 64 if rows >= 64 else 16)


def prefill_panels(dim: int, tile: PrefillTile) -> tuple[int, int]:
    """The panels of a prefill kernel, whose products are wgmma on Hopper: not below 32."""
    return panels(dim, 32) if tile.panels else (max(16, next_power_of_2(dim)), 0)


def _shared_budget(device: DeviceFacts) -> int:
    # CDNA 4 has 160 KiB, but registers for no larger tiles than its predecessors.
    shared = min(device.shared_memory, 65536) if device.kind == "hip" else device.shared_memory
    return shared - 2048


_PREFILL: dict[str, tuple[tuple[int, PrefillTile], ...]] = {
    "cpu": ((256, PrefillTile(32, 32, 4, 1)),),
    # Measured (docs/log.md). Two halves keep the tensor cores busy during softmax.
    "hopper": (
        (64, PrefillTile(128, 64, 4, 3, 2, sums=8)),
        (96, PrefillTile(128, 64, 4, 3, 2, panels=True, sums=8)),
        (128, PrefillTile(256, 64, 8, 3, 2)),
        (128, PrefillTile(128, 64, 4, 2, 2)),
        (160, PrefillTile(128, 64, 8, 3, panels=True)),
        (192, PrefillTile(128, 64, 8, 3, panels=True, sums=8)),
        (256, PrefillTile(128, 64, 8, 2, late=True)),
        (256, PrefillTile(64, 64, 4, 2)),
    ),
    "hopper float8": (
        (64, PrefillTile(128, 64, 4, 3, 2)),
        (128, PrefillTile(256, 64, 8, 3, 2)),
        (128, PrefillTile(128, 64, 4, 2, 2)),
        (256, PrefillTile(128, 64, 8, 2)),
        (256, PrefillTile(64, 64, 4, 2)),
    ),
    "blackwell": (
        (256, PrefillTile(128, 64, 8, 2)),
        (256, PrefillTile(64, 64, 4, 2)),
    ),
    # Triton 3.6 compiles these products for 10.x without a pipeline only.
    "blackwell float8": (
        (256, PrefillTile(128, 64, 8, 1)),
        (256, PrefillTile(64, 64, 4, 1)),
    ),
    "ampere": (
        (64, PrefillTile(128, 64, 8, 2)),
        (128, PrefillTile(128, 32, 8, 2)),
        (128, PrefillTile(64, 64, 4, 2)),
        (256, PrefillTile(64, 32, 8, 2)),
        (256, PrefillTile(32, 32, 4, 1)),
    ),
    "ampere float8": (
        (256, PrefillTile(64, 32, 8, 2)),
        (256, PrefillTile(32, 32, 4, 1)),
    ),
    "nvidia float32": (
        (64, PrefillTile(64, 32, 8, 1)),
        (256, PrefillTile(16, 32, 8, 1)),
        (256, PrefillTile(16, 16, 8, 1)),
    ),
    "cdna": (
        (256, PrefillTile(128, 64, 8, 2)),
        (256, PrefillTile(64, 64, 4, 2)),
        (256, PrefillTile(64, 32, 4, 2)),
        (256, PrefillTile(32, 32, 4, 1)),
    ),
    "cdna float8": (
        (256, PrefillTile(128, 32, 8, 2)),
        (256, PrefillTile(64, 32, 4, 2)),
        (256, PrefillTile(32, 32, 4, 1)),
    ),
    "cdna float32": (
        (128, PrefillTile(64, 32, 8, 1)),
        (128, PrefillTile(32, 32, 4, 1)),
        (256, PrefillTile(16, 32, 4, 1)),
        (256, PrefillTile(16, 16, 4, 1)),
    ),
    "rdna": (
        (64, PrefillTile(128, 32, 8, 1)),
        (128, PrefillTile(64, 16, 8, 1)),
        (256, PrefillTile(32, 16, 8, 1, panels=True)),
    ),
    "rdna float32": ((256, PrefillTile(16, 16, 8, 1)),),
}
"""Classes of chips: pairs of the widest head a tile is for and the tile, the first choice first."""


_SHORT: dict[str, tuple[tuple[int, PrefillTile], ...]] = {
    "cpu": ((256, PrefillTile(32, 64, 4, 1)),),
    # Measured (docs/log.md).
    "hopper": ((128, PrefillTile(64, 64, 4, 2)),),
    "blackwell": ((128, PrefillTile(64, 64, 4, 2)),),
    "ampere": ((128, PrefillTile(64, 64, 4, 2)),),
    "nvidia float32": (),
    "cdna": ((128, PrefillTile(64, 64, 4, 2)),),
    "cdna float32": (),
    "rdna": (),
}
"""Tiles of programs that take all keys of a sequence at once, up to this wide a head; the rest of
the chips, of heads and of numbers has none."""


Choices = TypeVar("Choices")


def _choices(tables: dict[str, Choices], spec: AttnSpec, device: DeviceFacts) -> Choices:
    """The table of a class of chips; of those for some numbers only, the narrowest."""
    if device.kind == "cpu":
        return tables["cpu"]
    maker = {"cuda": "nvidia", "hip": "cdna" if device.warp_size == 64 else "rdna"}[device.kind]
    # Ada, and 12.x, multiply like Ampere: from registers, with products of 16 rows.
    chips = {9: "hopper", 10: "blackwell"}.get(device.arch[0], "ampere")
    chips = chips if maker == "nvidia" else maker
    numbers = {4: "float32", 2: "", 1: "float8"}[spec.kv_dtype.itemsize]
    names = (f"{chips} {numbers}", f"{maker} {numbers}", chips)
    return next(tables[name] for name in names if name in tables)


def prefill_tile(spec: AttnSpec, device: DeviceFacts, max_rows: int) -> PrefillTile:
    """The prefill tile for `spec` when one sequence has at most `max_rows` rows per kv head."""
    dim = max(spec.head_dim, spec.head_dim_v)
    size = spec.dtype.itemsize
    # Short sequences leave fewer rows idle in the smaller tiles.
    most_rows = 64 << sum(max_rows > n for n in LONG_ROWS)
    table = _choices(_PREFILL, spec, device)
    choices = [t for widest, t in table if min(256, dim) <= widest and t.block_m <= most_rows]
    budget = _shared_budget(device)
    fitting = (c for c in choices if _prefill_bytes(c, _prefill_dim(spec, c), size) <= budget)
    return next(fitting, choices[-1])


def short_tile(spec: AttnSpec, device: DeviceFacts) -> PrefillTile | None:
    """The tile of sequences whose keys all fit it; None where no program may hold so many."""
    if spec.kv_dtype.itemsize == 1:
        return None
    dim = max(next_power_of_2(spec.head_dim), next_power_of_2(spec.head_dim_v))
    table = _choices(_SHORT, spec, device)
    return next((tile for widest, tile in table if dim <= widest), None)


def _prefill_dim(spec: AttnSpec, tile: PrefillTile) -> int:
    """Columns of the wider of keys and values, as the kernel holds them."""
    return max(sum(prefill_panels(dim, tile)) for dim in (spec.head_dim, spec.head_dim_v))


def prefill_candidates(
    spec: AttnSpec, device: DeviceFacts, max_rows: int
) -> tuple[PrefillTile, ...]:
    """What may be measured instead of `prefill_tile`, and that first. The rest fits the device."""
    shipped = prefill_tile(spec, device, max_rows)
    return tuple(dict.fromkeys((shipped, *_prefill_grid(spec, device))))


def _prefill_grid(spec: AttnSpec, device: DeviceFacts) -> Iterator[PrefillTile]:
    dim = max(next_power_of_2(spec.head_dim), next_power_of_2(spec.head_dim_v), 16)
    size = spec.dtype.itemsize
    for rows, keys, warps, stages, halves in itertools.product(
        (64, 128, 256), (32, 64, 128), (4, 8), (1, 2, 3), (1, 2)
    ):
        tile = PrefillTile(rows, keys, warps, stages, halves)
        fits = _prefill_bytes(tile, dim, size) <= _shared_budget(device)
        # Each warp has the 16 rows of a matrix instruction for itself.
        if fits and rows >= 16 * warps * halves and _held(rows, dim, warps):
            yield tile


def _held(rows: int, dim: int, warps: int) -> bool:
    """Whether a program's accumulators leave its threads half of their registers."""
    return rows * dim <= 128 * 32 * warps


def _prefill_bytes(tile: PrefillTile, dim: int, size: int) -> int:
    """Shared memory of a prefill tile: q, and keys and values once a stage."""
    keys = 2 * tile.block_n * dim * max(1, tile.num_stages)
    return (tile.block_m * dim + keys) * size


_DECODE: dict[str, tuple[tuple[int, int, DecodeTile], ...]] = {
    "cpu": ((128, 256, DecodeTile(32, 4, 1, 2)),),
    # Measured (docs/log.md).
    "hopper": (
        (32, 64, DecodeTile(128, 4, 3, 2)),
        (64, 64, DecodeTile(128, 4, 2, 2)),
        (64, 128, DecodeTile(64, 4, 3, 2)),
        (64, 128, DecodeTile(128, 8, 2, 1)),
        (64, 128, DecodeTile(64, 4, 2, 1)),
        (32, 160, DecodeTile(64, 4, 3, 2)),
        (32, 192, DecodeTile(32, 4, 3, 3)),
        (32, 256, DecodeTile(32, 4, 3, 2)),
        (32, 256, DecodeTile(64, 4, 3, 1)),
        (32, 256, DecodeTile(64, 4, 2, 1)),
        (128, 192, DecodeTile(64, 8, 2, 1)),
        (128, 192, DecodeTile(32, 8, 2, 1)),
        (64, 256, DecodeTile(32, 4, 2, 1)),
    ),
    "hopper float8": (
        (16, 64, DecodeTile(128, 4, 2, 4)),
        (32, 128, DecodeTile(128, 4, 3, 2)),
        (64, 128, DecodeTile(64, 4, 3, 2)),
        (64, 128, DecodeTile(64, 4, 2, 1)),
        (32, 256, DecodeTile(64, 4, 3, 1)),
        (32, 256, DecodeTile(64, 4, 2, 1)),
        (128, 192, DecodeTile(64, 8, 2, 1)),
        (128, 192, DecodeTile(32, 8, 2, 1)),
        (64, 256, DecodeTile(32, 4, 2, 1)),
    ),
    "blackwell": (
        (16, 64, DecodeTile(128, 4, 3, 2)),
        (32, 128, DecodeTile(64, 4, 3, 2)),
        (16, 256, DecodeTile(64, 4, 3, 1)),
        (32, 160, DecodeTile(16, 4, 2, 1)),
        (32, 256, DecodeTile(64, 4, 3, 1)),
        (32, 256, DecodeTile(64, 4, 2, 1)),
        (64, 256, DecodeTile(64, 8, 2, 1)),
        (64, 256, DecodeTile(32, 8, 2, 1)),
        (128, 128, DecodeTile(32, 8, 2, 1)),
    ),
    "ampere": (
        (16, 64, DecodeTile(128, 4, 3, 2)),
        (64, 64, DecodeTile(64, 4, 3, 2)),
        (64, 64, DecodeTile(64, 4, 2, 1)),
        (16, 256, DecodeTile(64, 4, 2, 1)),
        (32, 128, DecodeTile(64, 8, 2, 1)),
        (32, 160, DecodeTile(16, 4, 2, 1)),
        (32, 256, DecodeTile(32, 4, 2, 1)),
        (32, 256, DecodeTile(32, 4, 1, 1)),
        (128, 192, DecodeTile(64, 8, 2, 1)),
        (128, 192, DecodeTile(32, 8, 2, 1)),
        (128, 128, DecodeTile(32, 8, 1, 1)),
        (128, 192, DecodeTile(16, 8, 1, 1)),
        (64, 256, DecodeTile(32, 8, 2, 1)),
        (64, 256, DecodeTile(32, 8, 1, 1)),
    ),
    "ampere float8": (
        (16, 64, DecodeTile(128, 4, 3, 2)),
        (64, 64, DecodeTile(64, 4, 3, 2)),
        (64, 64, DecodeTile(64, 4, 2, 1)),
        (32, 256, DecodeTile(64, 4, 2, 1)),
        (32, 256, DecodeTile(32, 4, 2, 1)),
        (64, 128, DecodeTile(16, 8, 3, 1)),
        (128, 192, DecodeTile(32, 8, 2, 1)),
        (64, 256, DecodeTile(32, 8, 2, 1)),
        (64, 256, DecodeTile(32, 8, 1, 1)),
    ),
    "ampere float32": (
        (16, 96, DecodeTile(32, 8, 2, 1)),
        (16, 256, DecodeTile(16, 4, 1, 1)),
    ),
    "cdna": (
        (16, 64, DecodeTile(128, 4, 3, 2)),
        (64, 128, DecodeTile(64, 4, 3, 2)),
        (64, 256, DecodeTile(64, 4, 2, 1)),
        (64, 256, DecodeTile(32, 4, 2, 1)),
        (64, 256, DecodeTile(32, 4, 1, 1)),
        (64, 256, DecodeTile(16, 4, 1, 1)),
        (128, 192, DecodeTile(64, 8, 2, 1)),
        (128, 192, DecodeTile(32, 8, 2, 1)),
        (128, 192, DecodeTile(32, 8, 1, 1)),
    ),
    "rdna": (
        (16, 128, DecodeTile(32, 8, 2, 1)),
        (128, 128, DecodeTile(16, 8, 1, 1)),
        (32, 192, DecodeTile(16, 8, 1, 1)),
        (32, 256, DecodeTile(16, 16, 1, 1)),
    ),
    "rdna float8": (
        (32, 128, DecodeTile(16, 8, 2, 1)),
        (128, 128, DecodeTile(16, 8, 1, 1)),
        (32, 256, DecodeTile(16, 8, 1, 1)),
    ),
    "nvidia float32": (
        (16, 96, DecodeTile(32, 4, 2, 1)),
        (16, 256, DecodeTile(16, 4, 1, 1)),
    ),
    "cdna float32": (
        (16, 96, DecodeTile(32, 4, 2, 1)),
        (16, 256, DecodeTile(16, 4, 1, 1)),
    ),
    "rdna float32": ((16, 256, DecodeTile(16, 8, 1, 1)),),
}
"""Classes of chips: the most rows and the widest head a tile is for, and the tile.

No tile is for more rows than a program can hold without spilling: see `decode_fits`.
"""


def _decode_dim(spec: AttnSpec, rows: int) -> int:
    return max(
        sum(decode_panels(d, rows, spec.kv_dtype.itemsize))
        for d in (spec.head_dim, spec.head_dim_v)
    )


def _decode_choices(spec: AttnSpec, device: DeviceFacts, rows: int) -> list[DecodeTile]:
    dim = min(256, _decode_dim(spec, rows))
    table = _choices(_DECODE, spec, device)
    return [tile for most, widest, tile in table if rows <= most and dim <= widest]


def decode_tile(spec: AttnSpec, device: DeviceFacts, rows: int) -> DecodeTile:
    """The decode tile for `spec`; `rows`, one sequence's per kv head, are such as `decode_fits`."""
    choices = _decode_choices(spec, device, rows)
    dim, size = _decode_dim(spec, rows), spec.dtype.itemsize
    bytes_of = functools.partial(
        _decode_bytes, rows=rows, dim=dim, size=size, key_size=spec.kv_dtype.itemsize
    )
    fitting = (c for c in choices if bytes_of(c) <= _shared_budget(device))
    # The estimate is an upper bound: where nothing seems to fit, the smallest tile still may.
    return next(fitting, choices[-1])


def decode_candidates(spec: AttnSpec, device: DeviceFacts, rows: int) -> tuple[DecodeTile, ...]:
    """What may be measured instead of `decode_tile`, and that first. The rest fits the device."""
    shipped = decode_tile(spec, device, rows)
    return tuple(dict.fromkeys((shipped, *_decode_grid(spec, device, rows))))


def _decode_grid(spec: AttnSpec, device: DeviceFacts, rows: int) -> Iterator[DecodeTile]:
    dim = max(
        sum(decode_panels(d, rows, spec.kv_dtype.itemsize))
        for d in (spec.head_dim, spec.head_dim_v)
    )
    for keys, warps, stages, programs in itertools.product(
        (32, 64, 128), (4, 8), (2, 3, 4), (1, 2, 3)
    ):
        tile = DecodeTile(keys, warps, stages, programs)
        fits = _decode_bytes(tile, rows, dim, spec.dtype.itemsize) <= _shared_budget(device)
        # More threads than this leave each fewer than 128 registers.
        if fits and 32 * warps * programs <= 512 and _held(max(16, rows), dim, warps):
            yield tile


def _decode_bytes(
    tile: DecodeTile, rows: int, dim: int, size: int, key_size: int | None = None
) -> int:
    """Shared memory of all resident programs of a decode tile.

    Keys and values are loaded a stage less ahead, q is there once a stage and once more, beside
    float8 keys twice in all; an upper bound of what was compiled. From 64 rows on the operands of
    wgmma are staged, too.
    """
    stages, rows = max(1, tile.num_stages), max(16, rows)
    if rows < 64:
        keys = 2 * tile.block_n * max(1, stages - 1) * (key_size or size)
        queries = rows * (2 if key_size == 1 else stages + 1) * size
        return (keys + queries) * dim * tile.programs_per_sm
    kept = (2 * tile.block_n + rows) * stages
    kept += 2 * tile.block_n if size == 2 else 0
    kept += rows if rows > 64 and size == 2 else 0
    return kept * dim * size * tile.programs_per_sm


def latent_tile(spec: AttnSpec, device: DeviceFacts, rows: int) -> DecodeTile:
    """The decode tile where values are scored, too: read once for both, and as wide as 512."""
    if device.kind == "cpu":
        return DecodeTile(32, 4, 1, 2)
    size = spec.dtype.itemsize
    scored = (
        0
        if "only_qv" in spec.features
        else sum(decode_panels(spec.head_dim, rows, spec.kv_dtype.itemsize))
    )
    dim = scored + sum(decode_panels(spec.head_dim_v, rows, spec.kv_dtype.itemsize))
    if device.arch[0] == 9 and rows <= 16:  # measured (docs/log.md)
        tile = DecodeTile(64, 8, 3, 1)
        if (64 * 2 + 16 * 4) * dim * size <= _shared_budget(device):
            return tile
    warps = 8 if rows > 16 else 4
    for keys, stages in ((64, 2), (32, 2), (32, 1), (16, 1)):
        tile = DecodeTile(keys, warps, stages, 1)
        if keys == 64 and spec.batch_invariant and device.arch[0] == 10:
            continue  # Triton 3.9 has no registers left beside its pieces
        if (keys + rows) * stages * dim * size <= _shared_budget(device):
            return tile
    return DecodeTile(16, warps, 1, 1)


def decode_fits(spec: AttnSpec, device: DeviceFacts, rows: int) -> bool:
    """Whether the decode path takes sequences of `rows` rows per kv head: if so, fewer as well.

    Up to 64 rows a tile that is there fits, whatever the estimate says of it.
    """
    choices = _decode_choices(spec, device, rows)
    if rows <= 64:
        return bool(choices)
    dim, size = _decode_dim(spec, rows), spec.dtype.itemsize
    return any(_decode_bytes(c, rows, dim, size) <= _shared_budget(device) for c in choices)


def decode_programs(
    device: DeviceFacts, tile: DecodeTile, heads_kv: int, batch: int, sm_margin: int
) -> int:
    """Programs of the decode grid.

    A multiple of the heads unless that idles over 10 %; and ranges per head that the sequences
    divide, or that divide the sequences, if that idles no more than 6 %: then the ranges of equally
    long sequences end where sequences do, and fewer results need merging.
    """
    slots = max(1, device.num_sms - sm_margin) * tile.programs_per_sm
    ranges = slots // heads_kv
    if ranges * heads_kv < 0.9 * slots:
        return slots
    fewest = math.ceil(0.94 * ranges)
    aligned = (n for n in range(ranges, fewest - 1, -1) if n % batch == 0 or batch % n == 0)
    return next(aligned, ranges) * heads_kv

"""Tile shapes: what was measured, and what fits elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from triton_fa.device import DeviceFacts
from triton_fa.spec import AttnSpec


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


def decode_panels(dim: int, rows: int) -> tuple[int, int]:
    """The panels of a decode kernel of `rows` rows.

    From 64 rows on products are wgmma, for which Triton 3.6 reads past the shared memory of a
    panel of 16 (head_dim 72).
    """
    return panels(dim, 64 if rows >= 64 else 16)


def _shared_budget(device: DeviceFacts) -> int:
    return device.shared_memory - 2048


def prefill_tile(spec: AttnSpec, device: DeviceFacts, max_rows: int) -> PrefillTile:
    """The prefill tile for `spec` when one sequence has at most `max_rows` rows per kv head."""
    dim = max(next_power_of_2(spec.head_dim), next_power_of_2(spec.head_dim_v), 16)
    if device.kind == "cpu":
        return PrefillTile(32, 32, 4, 1)
    size = spec.dtype.itemsize
    if size == 4:
        choices = [PrefillTile(64, 32, 8, 1), PrefillTile(32, 32, 4, 1)] if dim <= 128 else []
        choices += [PrefillTile(16, 32, 4, 1), PrefillTile(16, 16, 4, 1)]
    elif device.arch[0] == 9 and max_rows > 64:
        # Measured on an H200 (docs/log.md). Two halves keep the tensor cores busy during softmax;
        # short sequences leave fewer rows idle in the smaller tile.
        if dim <= 64:
            choices = [PrefillTile(128, 64, 4, 3, 2)]
        elif dim <= 128 and max_rows > 4096:
            choices = [PrefillTile(256, 64, 8, 3, 2)]
        elif dim <= 128:
            choices = [PrefillTile(128, 64, 4, 2, 2)]
        else:
            choices = [PrefillTile(128, 64, 8, 2)]
    else:
        choices = [PrefillTile(128, 64, 8, 2)] if max_rows > 64 else []
    choices += [PrefillTile(64, 64, 4, 2), PrefillTile(64, 32, 4, 2), PrefillTile(32, 32, 4, 1)]
    fitting = (c for c in choices if _prefill_bytes(c, dim, size) <= _shared_budget(device))
    return next(fitting, choices[-1])


def _prefill_bytes(tile: PrefillTile, dim: int, size: int) -> int:
    """Shared memory of a prefill tile: q, and keys and values once a stage."""
    keys = 2 * tile.block_n * dim * max(1, tile.num_stages)
    return (tile.block_m * dim + keys) * size


def decode_tile(spec: AttnSpec, device: DeviceFacts, rows: int) -> DecodeTile:
    """The decode tile for `spec`; `rows` is the row count of one sequence and kv head.

    The choices for compute capability 9.0 were measured on an H200 (docs/log.md).
    """
    dim = max(sum(decode_panels(d, rows)) for d in (spec.head_dim, spec.head_dim_v))
    if device.kind == "cpu":
        return DecodeTile(32, 4, 1, 2)
    if spec.dtype == torch.float32:
        # With 4 warps the accumulators of wide heads do not fit an NVIDIA thread's registers.
        wide = DecodeTile(16, 8 if device.kind == "cuda" else 4, 1, 1)
        choices = [wide] if dim > 128 else [DecodeTile(32, 4, 2, 1), DecodeTile(16, 4, 1, 1)]
    elif rows > 64 or (rows == 64 and device.arch[0] == 10):  # 4 warps spill there
        choices = [DecodeTile(64, 8, 2, 1)]
    elif dim <= 64 and rows <= 16:
        choices = [DecodeTile(128, 4, 3, 2)]
    elif dim > 128:
        choices = [DecodeTile(64, 4, 3, 1)]
    else:
        choices = [DecodeTile(64, 4, 3, 2)]
    choices += [DecodeTile(64, 4, 2, 1), DecodeTile(32, 4, 2, 1), DecodeTile(32, 4, 1, 1)]
    choices += [DecodeTile(16, 4, 1, 1)]
    size = spec.dtype.itemsize
    fitting = (c for c in choices if _decode_bytes(c, rows, dim, size) <= _shared_budget(device))
    # The estimate is an upper bound: where nothing seems to fit, the smallest tile still may.
    return next(fitting, choices[-1])


def _decode_bytes(tile: DecodeTile, rows: int, dim: int, size: int) -> int:
    """Shared memory of all resident programs of a decode tile.

    Keys, values and q once a stage; 64 rows and more also stage the operands of wgmma.
    """
    per_stage = 2 * tile.block_n + max(16, rows)
    operands = 2 * tile.block_n if rows >= 64 and size == 2 else 0
    per_program = (per_stage * max(1, tile.num_stages) + operands) * dim * size
    return per_program * tile.programs_per_sm


def decode_fits(spec: AttnSpec, device: DeviceFacts, rows: int) -> bool:
    """Whether any decode tile for `rows` rows fits the device's shared memory.

    Up to 64 rows one does on every chip, whatever the estimate says of the smallest.
    """
    if rows <= 64:
        return True
    tile = decode_tile(spec, device, rows)
    dim = max(sum(decode_panels(d, rows)) for d in (spec.head_dim, spec.head_dim_v))
    return _decode_bytes(tile, rows, dim, spec.dtype.itemsize) <= _shared_budget(device)


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

"""What to launch for a problem: kernels, grids, arguments and workspace, decided on the host.

Everything here follows from shapes, dtypes, strides and device facts, never from lengths on the
device; so a plan holds for every call with the same launch key, and for captured graphs.
"""

from __future__ import annotations

import functools
import math
import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from triton_fa.device import DeviceFacts
from triton_fa.kernels import hopper_plans, latent_plans
from triton_fa.kernels.append import append_kernel
from triton_fa.kernels.choice import decode_tile, prefill_tile
from triton_fa.kernels.combine import combine_kernel
from triton_fa.kernels.compat import INTERPRETED
from triton_fa.kernels.decode import decode_kernel
from triton_fa.kernels.launch import names_of
from triton_fa.kernels.prefill import prefill_kernel
from triton_fa.kernels.schedule import schedule_kernel
from triton_fa.kernels.short import short_kernel
from triton_fa.problem import Append, AttnResult, Lengths, Problem, Tensors
from triton_fa.schedule.tiles import (
    DecodeTile,
    PrefillTile,
    decode_fits,
    decode_panels,
    decode_programs,
    latent_tile,
    next_power_of_2,
    prefill_panels,
    short_tile,
)
from triton_fa.spec import AttnSpec, Bounds, metadata_entries

LOG2E = math.log2(math.e)
FP8_FORMATS = {
    torch.float8_e4m3fn: "e4m3",
    torch.float8_e5m2: "e5m2",
    torch.float8_e4m3fnuz: "e4m3fnuz",
    torch.float8_e5m2fnuz: "e5m2fnuz",
}
REGISTERS_PER_SM = 65536
INVARIANT_CHUNK = 256
INVARIANT_PIECES = 64
"""The fewest keys of a batch-invariant piece, and the most pieces of a sequence."""
MERGED_TOGETHER = 8
"""Pieces whose loads a program of the merge has under way together, in chunked launches."""
LIST_ARGUMENTS = (
    "sparse_stride_b",
    "sparse_stride_h",
    "masked_width",
    "full_width",
    "SPARSE_M",
    "SPARSE_N",
)
MERGED_COLUMNS = 128
"""Columns of a program of the merge where results are wider than 256."""
MANY_SEQUENCES = 256
"""Batches above this are looked through by four warps."""
PLAN_BELOW = 0.8
"""The prefill path is planned where that leaves less than this of the unplanned programs."""
SHORT_PROGRAMS = 4
"""The fewest programs a multiprocessor that take all rows of a sequence and kv head each."""
MAX_DECODE_ROWS = 64
"""A sequence with at most this many query rows per kv head belongs to the decode path, where the
chip has tiles for so many."""

POINTERS = (
    "out_ptr",
    "lse_ptr",
    "part_ptr",
    "q_ptr",
    "k_ptr",
    "v_ptr",
    "page_table_ptr",
    "cu_seqlens_q_ptr",
    "cu_seqlens_k_ptr",
    "seqused_q_ptr",
    "seqused_k_ptr",
    "cu_seqlens_k_new_ptr",
    "leftpad_ptr",
    "batch_idx_ptr",
    "sinks_ptr",
    "qv_ptr",
    "q_descale_ptr",
    "k_descale_ptr",
    "v_descale_ptr",
    "aux_ptr",
    "mask_block_cnt_ptr",
    "mask_block_idx_ptr",
    "full_block_cnt_ptr",
    "full_block_idx_ptr",
    "plan_ptr",
    "v_transposed_ptr",
    "absent",
    "k_new_ptr",
    "v_new_ptr",
    "cos_ptr",
    "sin_ptr",
    "rotary_seqlens_ptr",
    "turned_ptr",
)
"""The tensors of a call, in the order `call_tensors` gives them; kernels take some of them."""
NAMES = {
    field: f"{field}_ptr"
    for field in Tensors._fields
    if field not in ("scheduler_metadata", "cache_batch_idx", "cache_leftpad", "append", "blocks")
} | {
    "scheduler_metadata": "plan_ptr",
    "cache_batch_idx": "batch_idx_ptr",
    "cache_leftpad": "leftpad_ptr",
}
"""What `POINTERS` calls the tensors of a call."""
_NO_LISTS = (None,) * 4
ABSENT = POINTERS.index("absent")
"""Place of a None; what stands behind it are `append_tensors`."""
_PLACES = {name: place for place, name in enumerate(POINTERS)}


def call_tensors(
    tensors: Tensors,
    result: AttnResult,
    part: torch.Tensor | None,
    prefill_plan: torch.Tensor | None,
    v_transposed: torch.Tensor | None = None,
) -> tuple[Any, ...]:
    """What `POINTERS` names up to the None for an absent descriptor.

    `part` is the workspace of the decode path, the two behind it are those of the prefill path.
    """
    return (
        result.out,
        result.lse,
        part,
        tensors.q,
        tensors.k,
        tensors.v,
        tensors.page_table,
        tensors.cu_seqlens_q,
        tensors.cu_seqlens_k,
        tensors.seqused_q,
        tensors.seqused_k,
        None if tensors.append is None else tensors.append.cu_seqlens_k_new,
        tensors.cache_leftpad,
        tensors.cache_batch_idx,
        tensors.sinks,
        tensors.qv,
        tensors.q_descale,
        tensors.k_descale,
        tensors.v_descale,
        tensors.aux,
        *(_NO_LISTS if tensors.blocks is None else tensors.blocks[:4]),
        tensors.scheduler_metadata if prefill_plan is None else prefill_plan,
        v_transposed,
        None,
    )


def append_tensors(
    tensors: Tensors, append: Append, turned: torch.Tensor | None
) -> tuple[Any, ...]:
    """What `POINTERS` names, for the append kernel; `turned` is where q goes if it is rotated."""
    return (
        *call_tensors(tensors, AttnResult(tensors.q, None), None, None),
        append.k,
        append.v,
        append.rotary_cos,
        append.rotary_sin,
        append.rotary_seqlens,
        turned,
    )


def length_tensors(lengths: Lengths, metadata: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """What `POINTERS` names, for the schedule kernel."""
    given: dict[str, torch.Tensor | None] = dict.fromkeys(POINTERS[: ABSENT + 1])
    given |= {
        "cu_seqlens_q_ptr": lengths.cu_seqlens_q,
        "cu_seqlens_k_ptr": lengths.cu_seqlens_k,
        "seqused_q_ptr": lengths.seqused_q,
        "seqused_k_ptr": lengths.seqused_k,
        "cu_seqlens_k_new_ptr": lengths.cu_seqlens_k_new,
        "leftpad_ptr": lengths.cache_leftpad,
    }
    given["plan_ptr"] = metadata
    return tuple(given.values())


@functools.cache
def _leading(names: tuple[str, ...]) -> list[str]:
    """The leading arguments of a kernel: pointers and descriptors."""
    return [name for name in names if name.endswith(("_ptr", "_desc"))]


@dataclass(frozen=True, slots=True)
class PlannedLaunch:
    """One kernel launch: everything but the addresses of a call's tensors."""

    kernel: Any
    grid: tuple[int, int, int]
    values: dict[str, Any]
    options: dict[str, Any]
    key_box: tuple[int, dict[str, int]] | None = None
    """Keys of the blocks that descriptors read, if it has any, and the columns of each."""
    in_pairs: bool = False
    """Whether K and V pointers are of 16 bits each for two float8 numbers."""

    def pointers(self, given: tuple[torch.Tensor | None, ...]) -> tuple[Any, ...]:
        """The kernel's leading arguments out of `call_tensors`, descriptors included."""
        return tuple(self._pointer(name, given) for name in _leading(names_of(self.kernel)))

    def _pointer(self, name: str, given: tuple[torch.Tensor | None, ...]) -> Any:
        if name in _PLACES:
            tensor = given[_PLACES[name]]
            if self.in_pairs and name in ("k_ptr", "v_ptr"):
                return tensor.view(torch.int16) if tensor is not None else None
            return _as_bytes(tensor)
        if self.key_box is None:
            return None
        keys, columns = self.key_box
        if not columns[name]:
            return None
        tensor = _as_bytes(given[_PLACES[f"{name[0]}_ptr"]])
        return _descriptor(tensor, keys, columns[name])


@dataclass(frozen=True, slots=True)
class Plan:
    """The launches of one call, in order, and the workspaces they share."""

    launches: tuple[PlannedLaunch, ...]
    partial_floats: int  # partial results of the decode path, behind them Hopper's tile counter
    plan_entries: int  # int32 entries of the prefill path's plan; 0 where it needs none
    transposed_bytes: int = 0  # of values, for prefill on Hopper with float8


def plan(problem: Problem, device: DeviceFacts) -> Plan:
    """The launches that compute `problem` on `device`.

    Both paths are launched where the host cannot tell which one the sequences belong to; each
    kernel leaves the other's sequences alone.
    """
    spec, bounds = problem.spec, problem.bounds
    most_rows = bounds.max_seqlen_q * spec.q_heads_per_kv
    common = _common(problem) | _from_fp8(spec, device)
    if problem.tensors.qv is not None:
        on_hopper = latent_plans.takes(problem, device, most_rows)
        rows = latent_plans.ROWS if on_hopper else latent_rows(spec, most_rows)
        latent, floats = _decode(
            problem, device, rows, common, -(-most_rows // rows), on_hopper=on_hopper
        )
        return Plan(latent, floats, 0)
    varlen_q = problem.tensors.seqused_q is not None
    mean_rows = -(-bounds.total_q // max(1, bounds.batch)) * spec.q_heads_per_kv
    rows = decode_rows(spec, device, most_rows, varlen_q=varlen_q, mean_rows=mean_rows)
    if most_rows > rows and (tile := _short_tile(problem, device)):
        return Plan((_short(problem, tile, common),), 0, 0)
    prefill: tuple[PlannedLaunch, ...] = ()
    decode: tuple[PlannedLaunch, ...] = ()
    partial_floats = plan_entries = transposed = 0
    if rows and spec.batch_invariant:
        decode, partial_floats = _invariant_decode(problem, device, most_rows, common)
    elif rows:
        decode, partial_floats = _decode(problem, device, rows, common)
    if most_rows > rows or not rows:
        prefill, counters, transposed = _prefill(
            problem, device, rows, most_rows, common, partial_floats
        )
        partial_floats += counters
        if any(step.kernel is schedule_kernel for step in prefill):
            plan_entries = metadata_entries(bounds.batch)
    return Plan(prefill + decode, partial_floats, plan_entries, transposed)


def decode_rows(
    spec: AttnSpec,
    device: DeviceFacts,
    most_rows: int,
    *,
    varlen_q: bool,
    mean_rows: int | None = None,
) -> int:
    """Rows of the decode kernel, a power of two; 0 where no sequence can be on its path.

    `most_rows` bounds the rows of one sequence per kv head; with `varlen_q`, or packed queries,
    sequences may have fewer. Where their mean is far below, the bound overstates them.
    """
    if mean_rows is not None and not spec.batch_invariant and spec.num_splits != 1:
        most = max(16, 2 * next_power_of_2(mean_rows))
        if most < most_rows <= MAX_DECODE_ROWS:
            return decode_rows(spec, device, most, varlen_q=varlen_q)
    rows = _wanted_rows(spec, device, most_rows, varlen_q)
    return rows if rows and decode_fits(spec, device, rows) else 0


def latent_rows(spec: AttnSpec, most_rows: int) -> int:
    """Rows of a lane of the decode kernel where values are scored, too.

    Such calls are on the decode path whole; the rows of a kv head fill as many lanes as they need.
    """
    if spec.batch_invariant:  # whatever the bound
        most_rows = spec.q_heads_per_kv
    # Accumulators 512 wide: more rows have to spill, and larger products don't pipeline.
    return 16 if most_rows <= 16 else 32


def _wanted_rows(spec: AttnSpec, device: DeviceFacts, most_rows: int, varlen_q: bool) -> int:
    group = spec.q_heads_per_kv
    if spec.batch_invariant:
        # The path of a row must not depend on how long its neighbours may be.
        return max(invariant_launches(spec, device), default=0)
    limit = next(n for n in (MAX_DECODE_ROWS, 32, 16) if decode_fits(spec, device, n))
    if most_rows <= limit:
        return next_power_of_2(most_rows)
    if spec.num_splits == 1:
        return 0  # unsplit rows are what the prefill kernel computes
    if spec.query_layout == "dense" and not varlen_q:
        return 0 if group != most_rows or most_rows > 128 else 128
    if group > 128:
        return 0
    # One token of each head: most sequences of such a batch have no more, and pay for every row.
    rows = max(16, next_power_of_2(group))
    return rows if rows <= limit else 128


def invariant_launches(spec: AttnSpec, device: DeviceFacts) -> tuple[int, ...]:
    """The most rows of each decode launch of a batch-invariant call; a sequence is in the first
    that it fits.

    Which launch that is follows from a sequence's own rows: their bits depend on how a tile is
    summed. NVIDIA's products of 16 and of 32 rows are spread over warps alike where they have more
    than 32 columns, so that one launch serves both.
    """
    group = spec.q_heads_per_kv
    alike = device.kind == "cuda" and decode_fits(spec, device, 32)
    if alike:
        tile = decode_tile(spec, device, 16)
        columns = (tile.block_n, *filter(None, decode_panels(spec.head_dim_v, 16)))
        alike = tile == decode_tile(spec, device, 32) and min(columns) > 32
    fewest = max(32 if alike else 16, next_power_of_2(group))
    if fewest > 128:
        return ()
    several = fewest < MAX_DECODE_ROWS and decode_fits(spec, device, MAX_DECODE_ROWS)
    rows = (fewest, MAX_DECODE_ROWS) if several else (fewest,)
    return tuple(n for n in rows if decode_fits(spec, device, n))


def _chunking(spec: AttnSpec, block_n: int) -> tuple[int | None, int | None]:
    """(smallest chunk in tiles, most pieces of a sequence); (None, None) is balanced."""
    if spec.batch_invariant:
        most = min(INVARIANT_PIECES, spec.num_splits or INVARIANT_PIECES)
        # Results 512 wide, all of them left to the merge where they are on the Hopper kernel.
        keys = 2 * INVARIANT_CHUNK if "qv" in spec.features else INVARIANT_CHUNK
        return max(1, keys // block_n), most
    return (1, spec.num_splits) if spec.num_splits else (None, None)


def _strides(name: str, tensor: torch.Tensor, packed: bool) -> dict[str, int]:
    """(batch or page, token, head) strides; a packed tensor has no batch."""
    return {
        f"{name}_stride_b": 0 if packed else tensor.stride(0),
        f"{name}_stride_t": tensor.stride(-3),
        f"{name}_stride_h": tensor.stride(-2),
    }


def _out_strides(problem: Problem, packed: bool) -> dict[str, int]:
    """Strides of the result, which is the caller's buffer or a new contiguous tensor."""
    out, q = problem.tensors.out, problem.tensors.q
    heads, dim = q.shape[-2], problem.spec.head_dim_v
    if out is not None:
        strides = _strides("out", out, packed)
    else:
        per_batch = 0 if packed else q.shape[1] * heads * dim
        strides = {
            "out_stride_b": per_batch,
            "out_stride_t": heads * dim,
            "out_stride_h": dim,
        }
    tokens = q.shape[-3]
    return strides | {
        "lse_stride_b": 0 if packed else heads * tokens,
        "lse_stride_t": 1,
        "lse_stride_h": tokens,
    }


def _common(problem: Problem) -> dict[str, Any]:
    """The arguments that the kernels share, by name."""
    spec, bounds, tensors = problem.spec, problem.bounds, problem.tensors
    packed_q = spec.query_layout == "packed"
    packed_k = spec.key_layout == "packed"
    capacity = tensors.k.shape[0] if packed_k else bounds.max_seqlen_k
    return {
        **_out_strides(problem, packed_q),
        **_strides("q", tensors.q, packed_q),
        **_strides("k", tensors.k, packed_k),
        **_strides("v", tensors.v, packed_k),
        **_strides("qv", tensors.q if tensors.qv is None else tensors.qv, packed_q),
        **_descale_strides(tensors),
        "table_stride": 0 if tensors.page_table is None else tensors.page_table.stride(0),
        "batch": bounds.batch,
        "total_q": bounds.total_q,
        "total_k": max(1, capacity),
        "fixed_seqlen_q": bounds.max_seqlen_q,
        "fixed_seqlen_k": bounds.fixed_seqlen_k or 0,
        "max_seqlen_k": bounds.max_seqlen_k,
        "fixed_seqlen_new": bounds.max_seqlen_new if tensors.append is not None else None,
        "num_rows": (tensors.k if tensors.page_table is None else tensors.page_table).shape[0],
        "num_pages": tensors.k.shape[0],
        **_windows(spec, capacity, bounds.max_seqlen_q),
        **_scales(spec),
        "NUM_HEADS_KV": spec.num_heads_kv,
        "GROUP": spec.q_heads_per_kv,
        "HEAD_DIM": spec.head_dim,
        "HEAD_DIM_V": spec.head_dim_v,
        "PAGE_SIZE": spec.page_size,
        "HAS_SOFTCAP": spec.softcap > 0,
        "HAS_LSE": problem.return_lse,
        "NEGATE": spec.softmax_scale < 0,
        "ONLY_QV": "only_qv" in spec.features,
        "SCORE_MOD": spec.score_mod,
        "MASK_MOD": spec.mask_mod,
        "Q_FORMAT": FP8_FORMATS.get(spec.dtype, ""),
        "KEY_FORMAT": FP8_FORMATS.get(spec.kv_dtype, ""),
        "IEEE": spec.dtype == torch.float32,
        "INTERPRETED": INTERPRETED,
    }


def _descale_strides(tensors: Tensors) -> dict[str, int]:
    strides: dict[str, int] = {}
    for name in ("q_descale", "k_descale", "v_descale"):
        tensor = getattr(tensors, name)
        given = (0, 0) if tensor is None else tensor.stride()
        strides |= {f"{name}_stride_b": given[0], f"{name}_stride_h": given[1]}
    return strides


def _from_fp8(spec: AttnSpec, device: DeviceFacts) -> dict[str, Any]:
    """How keys and values become float16, see `primitives.from_fp8` and `split_fp8`."""
    hardware = device.kind == "cuda" and device.arch >= (8, 9) and not INTERPRETED
    if spec.kv_dtype != torch.float8_e4m3fn or not hardware:
        return {"K_FROM_FP8": "bits", "V_FROM_FP8": "bits", "FP8_HARDWARE": hardware}
    return {"K_FROM_FP8": "cast", "V_FROM_FP8": "packed", "FP8_HARDWARE": hardware}


def _windows(spec: AttnSpec, max_seqlen_k: int, max_seqlen_q: int) -> dict[str, int | None]:
    """The window, None on a side that bounds nothing for lengths up to these."""
    left = None if not 0 <= spec.window_left < max_seqlen_k - 1 else spec.window_left
    right = None if not 0 <= spec.window_right < max_seqlen_q - 1 else spec.window_right
    chunk = spec.attention_chunk or None
    return {"window_left": left, "window_right": right, "attention_chunk": chunk}


def _scales(spec: AttnSpec) -> dict[str, float]:
    """The positive factors of the base-2 scores; a scale of 0 stays a factor, not a NaN."""
    scale = max(abs(spec.softmax_scale), 1e-30)
    if spec.softcap > 0:
        return {
            "scale_log2": 2 * LOG2E * scale / spec.softcap,
            "softcap_log2": LOG2E * spec.softcap,
        }
    return {"scale_log2": scale * LOG2E, "softcap_log2": 0.0}


def _arguments(kernel: Any, common: dict[str, Any], **own: Any) -> dict[str, Any]:
    """The shared arguments that `kernel` takes, and its own."""
    return {name: common[name] for name in names_of(kernel) if name in common} | own


def _block_b(batch: int) -> int:
    """Sequences looked at together: few sizes, so that few variants are compiled."""
    return 32 if batch <= 32 else 256 if batch <= 256 else 1024


def _decode(
    problem: Problem,
    device: DeviceFacts,
    rows: int,
    common: dict[str, Any],
    row_blocks: int = 1,
    *,
    on_hopper: bool = False,
    min_rows: int | None = None,
    tile_rows: int | None = None,
) -> tuple[tuple[PlannedLaunch, ...], int]:
    """The attention and the merge launch of the decode path, and their workspace.

    The query rows of a kv head are `row_blocks` times `rows`, each block a lane of its own.
    Sequences of up to `min_rows` are left alone; the tile is the one for `tile_rows`.
    """
    spec, bounds = problem.spec, problem.bounds
    if on_hopper:
        tile = latent_plans.SCHEDULED
    elif "qv" in spec.features:
        tile = latent_tile(spec, device, rows)
    else:
        tile = decode_tile(spec, device, tile_rows or rows)
    smallest_chunk, most_pieces = _chunking(spec, tile.block_n)
    lanes = spec.num_heads_kv * row_blocks
    programs = decode_programs(device, tile, lanes, bounds.batch, spec.sm_margin)
    program_slots = 2
    one_by_one = False
    if smallest_chunk and most_pieces:
        tiles = -(-common["total_k"] // tile.block_n)
        chunking = smallest_chunk, most_pieces
        one_by_one = on_hopper
        if one_by_one:
            programs = max(1, programs // lanes) * lanes
        else:
            program_slots = piece_slots(tiles, bounds.batch, programs, lanes, chunking)
    slots = program_slots * programs
    if one_by_one:
        slots = sequence_pieces(tiles, chunking) * bounds.batch * lanes
    size = spec.kv_dtype.itemsize
    d0, d1 = decode_panels(spec.head_dim, rows, size)
    v0, v1 = decode_panels(spec.head_dim_v, rows, size)
    paired = size == 1 and _in_steps(problem.tensors, 2)
    if paired:
        strides = [f"{name}_stride_{axis}" for name in "kv" for axis in "bth"]
        common = common | {name: common[name] // 2 for name in strides}
    # Programmatic dependent launch: the merge starts while the attention kernel still runs.
    pdl = device.kind == "cuda" and device.arch >= (9, 0)
    shared = {
        "programs": programs,
        "ROW_BLOCKS": row_blocks,
        "LANES_DIVIDE": programs % lanes == 0,
        "MIN_ROWS": min_rows,
        "MAX_ROWS": rows * row_blocks,
        "ROWS": rows,
        "BLOCK_N": tile.block_n,
        "BLOCK_B": _block_b(bounds.batch),
        "ONE_BLOCK": bounds.batch <= _block_b(bounds.batch),
        "PDL": pdl,
        "num_slots": slots,
        "program_slots": program_slots,
        "smallest_chunk": smallest_chunk,
        "most_pieces": most_pieces,
    }
    if on_hopper:
        kernel, values, options = latent_plans.launch(problem, common, shared)
        attend = PlannedLaunch(kernel, (programs, 1, 1), values, options)
    else:
        attend = PlannedLaunch(
            decode_kernel,
            (programs, 1, 1),
            _arguments(
                decode_kernel,
                common,
                **shared,
                D0=d0,
                D1=d1,
                V0=v0,
                V1=v1,
                BLOCK_M=max(16, rows),
                SUMS=min(tile.block_n, (8 if device.kind == "cuda" else 16) * tile.num_warps),
                ONE_TOKEN=bounds.max_seqlen_q == 1,
                SAME_STRIDES=problem.tensors.k.stride() == problem.tensors.v.stride(),
                WIDE_SLOTS=_wide_slots(problem),
                LAZY_MASK=rows > 16 or spec.kv_dtype in FP8_FORMATS,
                # Queries converted once a sequence. Triton 3.6 does not compile that for AMD chips.
                HOLDS_Q=size == 1 and problem.tensors.qv is None and device.kind != "hip",
                # Half such a stride may be no multiple of 16, which is all that Triton looks at.
                BY_16_BYTES=paired and _in_steps(problem.tensors, 16),
            ),
            _decode_options(tile, device),
            in_pairs=paired,
        )
    if most_pieces == 1:
        return (attend,), 0
    pieces = most_pieces if most_pieces and one_by_one else programs // lanes // bounds.batch + 2
    block_v = next_power_of_2(v0 + v1)
    if block_v > 256:
        block_v = MERGED_COLUMNS
    block_p, block_r, warps = _merge_shape(pieces, rows, block_v, 0 if one_by_one else bounds.batch)
    if device.kind == "hip" and block_v <= 16:
        # Addresses of rows this narrow take as many registers as what they hold.
        block_r = max(1, block_r // 2)
    if most_pieces and not one_by_one:
        # One piece after the other, of few rows each.
        many = bounds.batch > MANY_SEQUENCES
        block_r = min(rows, 16) if many else max(1, rows // 4)
        block_p, warps = MERGED_TOGETHER, 4 if many else min(4, block_r)
    # Powers of two, so that warm-up meets both sides of every step.
    by_sequence = one_by_one or next_power_of_2(bounds.batch) * lanes <= programs
    merge = PlannedLaunch(
        combine_kernel,
        (
            bounds.batch * lanes if by_sequence else programs,
            rows // block_r,
            -(-(v0 + v1) // block_v),
        ),
        _arguments(
            combine_kernel,
            common,
            **shared,
            V=v0 + v1,
            BLOCK_V=block_v,
            BLOCK_R=block_r,
            BLOCK_P=block_p,
            ONE_BY_ONE=one_by_one,
            BY_SEQUENCE=by_sequence,
        ),
        {"num_warps": warps} | ({"launch_pdl": True} if pdl else {}),
    )
    return (attend, merge), slots * rows * (v0 + v1 + 2)


def sequence_pieces(tiles: int, chunking: tuple[int, int]) -> int:
    """The most pieces of a sequence of up to `tiles`, see `line.chunk_tiles`."""
    smallest, most = chunking
    # 11 tiles are as many pieces, as an eighth of them is rounded to one.
    return min(most, max(11, -(-tiles // (4 * smallest))))


def piece_slots(
    tiles: int, batch: int, programs: int, lanes: int, chunking: tuple[int, int]
) -> int:
    """The most partial results of a program: of a sequence that it leaves half-way, and the pieces
    of one that it enters half-way. Sequences have up to `tiles`.
    """
    ranges = programs // lanes if programs % lanes == 0 else programs / lanes
    longest = math.ceil(tiles * batch / ranges)
    return 1 + min(sequence_pieces(tiles, chunking) - 1, longest // chunking[0] + 3)


def _invariant_decode(
    problem: Problem, device: DeviceFacts, most_rows: int, common: dict[str, Any]
) -> tuple[tuple[PlannedLaunch, ...], int]:
    """`_decode` of batch-invariant calls: launches for each class of rows that there may be."""
    launches: tuple[PlannedLaunch, ...] = ()
    floats = 0
    classes = invariant_launches(problem.spec, device)
    only = most_rows <= classes[0]
    if problem.spec.query_layout == "dense" and problem.tensors.seqused_q is None:
        # All sequences have as many rows.
        wanted = tuple(n for n in classes if most_rows <= n)[:1]
        only = True
    else:
        wanted = tuple(n for i, n in enumerate(classes) if i == 0 or most_rows > classes[i - 1])
    min_rows = None if only else 0
    mean_rows = problem.bounds.total_q * problem.spec.q_heads_per_kv / max(1, problem.bounds.batch)
    for tile_rows in wanted:
        # Fewer rows than those of the smallest product are only stored.
        fewer = next_power_of_2(most_rows) if tile_rows == classes[0] <= 32 else tile_rows
        served = [min(tile_rows, fewer)]
        if served == [32] and problem.spec.q_heads_per_kv <= 16 and mean_rows <= 16:
            # Either number of rows has the same bits, and most sequences have the smaller one.
            served, min_rows = [16, 32], min_rows or 0
        for rows in served:
            steps, its_floats = _decode(
                problem, device, rows, common, min_rows=min_rows, tile_rows=tile_rows
            )
            launches += steps
            floats = max(floats, its_floats)  # one after the other
            min_rows = rows
    return launches, floats


def _decode_options(tile: DecodeTile, device: DeviceFacts) -> dict[str, Any]:
    """Compiler options; a register limit where resident programs would not fit without one."""
    options: dict[str, Any] = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    threads = 32 * tile.num_warps * tile.programs_per_sm
    if device.kind == "cuda" and REGISTERS_PER_SM // threads < 255:
        # A warp is given them eight a thread at a time.
        options["maxnreg"] = REGISTERS_PER_SM // threads // 8 * 8
    return options


def _wide_slots(problem: Problem) -> bool:
    """Whether an offset inside a page, or inside a row of the batch, needs 64 bits."""
    tensors = problem.tensors
    tokens = problem.spec.page_size or max(1, tensors.k.shape[-3])
    return tokens * max(tensors.k.stride(-3), tensors.v.stride(-3)) >= 2**31


def _merge_shape(pieces: int, rows: int, columns: int, batch: int) -> tuple[int, int, int]:
    """(partials, rows) that one program of the merge holds at once, and its warps.

    About 4096 accumulators a warp; one warp needs no reductions across warps. With many sequences
    looking for one takes longer than merging it.
    """
    # Few sizes, so that few variants are compiled.
    block_p, warps = (16, 1) if pieces <= 16 else (32, 1) if pieces <= 64 else (64, 2)
    if rows > 16 and pieces <= 8:
        block_p = 8
    if batch > MANY_SEQUENCES:
        return 8, max(1, min(rows, 8192 // (8 * columns))), 4
    block_p = min(block_p, 4096 * warps // columns)
    return block_p, max(1, min(rows, 4096 * warps // (block_p * columns))), warps


def _prefill(
    problem: Problem,
    device: DeviceFacts,
    rows_of_decode: int,
    most_rows: int,
    common: dict[str, Any],
    partial_floats: int,
) -> tuple[tuple[PlannedLaunch, ...], int, int]:
    """The launch of the prefill path, behind the one that plans it where nobody has; what it needs
    of the workspace behind that of the decode path, and its bytes for transposed values.

    It is planned where sequences may differ much: then most programs would find no tile.
    """
    spec, bounds = problem.spec, problem.bounds
    # Batch-invariant: the tile must not depend on how long neighbours may be either.
    tile = prefill_tile(spec, device, 2**31 if spec.batch_invariant else most_rows)
    tile, lists = _within_blocks(problem, tile)
    on_hopper = hopper_plans.tile(problem, device)
    block_m = on_hopper.block_m * spec.q_heads_per_kv if on_hopper else tile.block_m
    row_tiles = -(-most_rows // block_m)
    tiles = row_tiles * bounds.batch
    planned_tiles = bounds.total_q * spec.q_heads_per_kv // block_m + bounds.batch
    launches: tuple[PlannedLaunch, ...] = ()
    is_planned = spec.query_layout == "packed" and planned_tiles < PLAN_BELOW * tiles
    if is_planned:
        tiles = planned_tiles
    if is_planned and problem.tensors.scheduler_metadata is None:
        tensors = problem.tensors
        lengths = Lengths(
            tensors.cu_seqlens_q,
            tensors.cu_seqlens_k,
            tensors.seqused_q,
            tensors.seqused_k,
            None if tensors.append is None else tensors.append.cu_seqlens_k_new,
            tensors.cache_leftpad,
        )
        launches += (schedule(spec, bounds, lengths, device, total_k=common["total_k"]),)
    if on_hopper:
        steps, counters, transposed = hopper_plans.launches(
            problem,
            device,
            on_hopper,
            common,
            lists,
            entries=tiles,
            counter_offset=partial_floats,
            segment=metadata_entries(bounds.batch) // 4,
            num_row_tiles=row_tiles,
            DECODE_ROWS=rows_of_decode,
            PLANNED=is_planned,
            BLOCK_B=_block_b(bounds.batch) if is_planned else 0,
            ORDERED=is_planned and bounds.batch <= _block_b(bounds.batch),
        )
        return (*launches, *(PlannedLaunch(*step) for step in steps)), counters, transposed
    d0, d1 = prefill_panels(spec.head_dim, tile)
    v0, v1 = prefill_panels(spec.head_dim_v, tile)
    columns = {"k_desc": d0, "k1_desc": d1, "v_desc": v0, "v1_desc": v1}
    described = _describable(problem, device, tile)
    prefill = PlannedLaunch(
        prefill_kernel,
        (tiles * spec.num_heads_kv, 1, 1),
        _arguments(
            prefill_kernel,
            common,
            **lists,
            segment=metadata_entries(bounds.batch) // 4,
            num_row_tiles=row_tiles,
            DECODE_ROWS=rows_of_decode,
            PLANNED=is_planned,
            BLOCK_B=_block_b(bounds.batch) if is_planned else 32,
            ONE_BLOCK=is_planned and bounds.batch <= _block_b(bounds.batch),
            BLOCK_M=tile.block_m,
            HALVES=tile.halves,
            BLOCK_N=tile.block_n,
            D0=d0,
            D1=d1,
            V0=v0,
            V1=v1,
            SUMS=tile.sums,
            WGMMA=device.kind == "cuda" and device.arch[0] == 9,
            LATE=tile.late and problem.tensors.blocks is None,
            # What descriptors read there must be cleared; the interpreter tests the loops.
            SPLIT_END=(described or INTERPRETED) and problem.tensors.blocks is None,
        ),
        {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
        (tile.block_n, columns) if described else None,
    )
    return (*launches, prefill), 0, 0


def _short_tile(problem: Problem, device: DeviceFacts) -> PrefillTile | None:
    """The tile of `_short`, None for calls that it does not take.

    Its programs are long ones where rows are many, and few where sequences are.
    """
    spec, bounds, tensors = problem.spec, problem.bounds, problem.tensors
    tile = short_tile(spec, device)
    if tile is None or max(bounds.max_seqlen_q, bounds.max_seqlen_k) > tile.block_n:
        return None
    if bounds.batch * spec.num_heads_kv < SHORT_PROGRAMS * device.num_sms:
        return None
    if spec.batch_invariant:  # bits must not depend on how long sequences may be
        return None
    others = (
        spec.page_size or None,
        spec.score_mod,
        spec.mask_mod,
        tensors.append,
        tensors.cache_leftpad,
        tensors.cache_batch_idx,
        tensors.scheduler_metadata,
    )
    return tile if all(other is None for other in others) else None


def _short(problem: Problem, tile: PrefillTile, common: dict[str, Any]) -> PlannedLaunch:
    """The launch for sequences with keys for one tile, and not many more rows."""
    spec, bounds = problem.spec, problem.bounds
    values = _arguments(
        short_kernel,
        common,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_D=max(16, next_power_of_2(spec.head_dim)),
        BLOCK_DV=max(16, next_power_of_2(spec.head_dim_v)),
    )
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return PlannedLaunch(short_kernel, (bounds.batch * spec.num_heads_kv, 1, 1), values, options)


def _within_blocks(problem: Problem, tile: PrefillTile) -> tuple[PrefillTile, dict[str, int]]:
    """A tile that never leaves one of the listed blocks, and the kernel's arguments for them."""
    blocks = problem.tensors.blocks
    if blocks is None or problem.tensors.cache_leftpad is not None:
        return tile, dict.fromkeys(LIST_ARGUMENTS, 0)
    assert blocks.block_size is not None
    queries, keys = blocks.block_size
    rows = math.gcd(queries * problem.spec.q_heads_per_kv, tile.block_m)
    batch, heads, of_queries = blocks.mask_block_cnt.shape
    listed = (
        heads * of_queries if batch > 1 else 0,
        of_queries if heads > 1 else 0,
        blocks.mask_block_idx.shape[3],
        0 if blocks.full_block_idx is None else blocks.full_block_idx.shape[3],
        queries,
        keys,
    )
    halves = tile.halves if rows == tile.block_m else 1
    smaller = replace(tile, block_m=rows, block_n=math.gcd(keys, tile.block_n), halves=halves)
    return smaller, dict(zip(LIST_ARGUMENTS, listed, strict=True))


def schedule(
    spec: AttnSpec,
    bounds: Bounds,
    lengths: Lengths,
    device: DeviceFacts,
    total_k: int = 2**31 - 1,
) -> PlannedLaunch:
    """The launch that fills the scheduler metadata of these lengths."""
    most_rows = bounds.max_seqlen_q * spec.q_heads_per_kv
    rows = decode_rows(spec, device, most_rows, varlen_q=lengths.seqused_q is not None)
    block_n = decode_tile(spec, device, max(rows, 1)).block_n
    block_m = prefill_tile(spec, device, 2**31 if spec.batch_invariant else most_rows).block_m
    windows = _windows(spec, bounds.max_seqlen_k, bounds.max_seqlen_q)
    block_b = _block_b(bounds.batch)
    layout = (1, rows, block_n, block_m, spec.q_heads_per_kv, *windows.values())
    values = {
        "batch": bounds.batch,
        "segment": -(-bounds.batch // 4) * 4,
        "total_q": bounds.total_q,
        "total_k": total_k,
        "fixed_seqlen_q": bounds.max_seqlen_q,
        "fixed_seqlen_k": bounds.fixed_seqlen_k or 0,
        "max_seqlen_k": bounds.max_seqlen_k,
        "fixed_seqlen_new": bounds.max_seqlen_new if bounds.total_new else None,
        **windows,
        "tag": zlib.crc32(repr(layout).encode()) & 0x7FFFFFFF,
        "GROUP": spec.q_heads_per_kv,
        "MAX_ROWS": rows,
        "BLOCK_N": block_n,
        "BLOCK_M": block_m,
        "BLOCK_B": block_b,
        "ONE_BLOCK": bounds.batch <= block_b,
        # Of calls without a prefill path nobody reads the order.
        "HAS_PREFILL": most_rows > rows,
        "ORDERED": bounds.batch <= block_b and most_rows > rows,
    }
    warps = 4 if block_b <= 256 else 16 if values["ORDERED"] else 8
    return PlannedLaunch(schedule_kernel, (1, 1, 1), values, {"num_warps": warps})


def append(problem: Problem, new: Append) -> PlannedLaunch:
    """The launch that writes new keys into the cache, and turns them and q."""
    spec, bounds = problem.spec, problem.bounds
    packed_new = new.cu_seqlens_k_new is not None
    tokens = max(bounds.total_new, bounds.total_q if spec.rotary_dim else 0)
    block_t = 4 if tokens <= 1024 else 32
    programs = -(-bounds.total_new // block_t) * spec.num_heads_kv
    if spec.rotary_dim:
        programs += -(-bounds.total_q // block_t) * spec.num_heads_q
    values = _arguments(
        append_kernel,
        _common(problem),
        **_strides("k_new", new.k, packed_new),
        **_strides("v_new", new.v, packed_new),
        total_new=bounds.total_new,
        fixed_seqlen_new=max(1, bounds.max_seqlen_new),
        num_positions=1 if new.rotary_cos is None else new.rotary_cos.shape[0],
        NUM_HEADS_Q=spec.num_heads_q,
        ROTARY_DIM=spec.rotary_dim,
        INTERLEAVED=spec.rotary_interleaved,
        MOVING=spec.rotary_moving,
        BLOCK_T=block_t,
        BLOCK_D=next_power_of_2(spec.head_dim),
        BLOCK_DV=next_power_of_2(spec.head_dim_v),
        BLOCK_R=next_power_of_2(max(1, spec.rotary_dim // 2)),
        BLOCK_B=_block_b(bounds.batch),
    )
    return PlannedLaunch(append_kernel, (programs, 1, 1), values, {"num_warps": 4})


def _in_steps(tensors: Tensors, size: int) -> bool:
    """Whether every row of float8 keys and values begins at a multiple of so many bytes."""
    return not any(
        tensor.data_ptr() % size or any(s % size for s in tensor.stride()[:-1])
        for tensor in (tensors.k, tensors.v)
    )


def _as_bytes(tensor: Any) -> Any:
    """Kernels take float8 numbers as bytes, so that every chip compiles them."""
    if isinstance(tensor, torch.Tensor) and tensor.dtype in FP8_FORMATS:
        return tensor.view(torch.uint8)
    return tensor


def _describable(problem: Problem, device: DeviceFacts, tile: PrefillTile) -> bool:
    """Whether keys and values are read through tensor descriptors (TMA).

    That is for products which take their operands from shared memory. Others copy the swizzled
    blocks to registers, and need more of them than for what pointers read.
    """
    spec = problem.spec
    if INTERPRETED or device.kind != "cuda" or device.arch[0] not in (9, 10):
        return False
    if spec.dtype == torch.float32 or problem.tensors.cache_leftpad is not None:
        return False
    if spec.key_layout == "paged" and spec.page_size % tile.block_n:
        return False
    for tensor in (problem.tensors.k, problem.tensors.v):
        bytes_apart = [s * tensor.element_size() for s in tensor.stride()[:-1]]
        if tensor.data_ptr() % 16 or any(b % 16 or b <= 0 for b in bytes_apart):
            return False
    return True


def _descriptor(tensor: Any, block_n: int, block_d: int) -> TensorDescriptor:
    """A descriptor of [batch or pages, tokens, heads, dim] that reads block_n tokens of a head."""
    if tensor.dim() == 3:
        tensor = tensor.unsqueeze(0)
    return TensorDescriptor(
        tensor, list(tensor.shape), list(tensor.stride()), [1, block_n, 1, block_d]
    )

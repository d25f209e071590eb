"""Our own kernels: refusals, the split between decode and prefill, buffers and launches."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton

from triton_fa import device as device_facts
from triton_fa.backends.base import Run
from triton_fa.device import DeviceFacts
from triton_fa.kernels.compat import INTERPRETED
from triton_fa.kernels.combine import combine_kernel
from triton_fa.kernels.decode import decode_kernel
from triton_fa.kernels.launch import Launch
from triton_fa.kernels.prefill import prefill_kernel
from triton_fa.problem import AttnResult, Problem, Tensors
from triton_fa.schedule.tiles import (
    decode_programs,
    decode_tile,
    next_power_of_2,
    panels,
    prefill_tile,
)
from triton_fa.spec import AttnSpec

LOG2E = math.log2(math.e)
MAX_DECODE_ROWS = 64
SUPPORTED_FEATURES = frozenset({"sinks", "scheduler_metadata", "seqused_q", "out"})


class TritonBackend:
    """Hand-written Triton kernels for any device Triton compiles for."""

    ver: int | str = "triton"

    def unavailable(self, device: torch.device) -> str | None:
        """Triton runs on GPUs, and on a CPU in its interpreter."""
        if device.type == "cuda" or (device.type == "cpu" and INTERPRETED):
            return None
        if device.type == "cpu":
            return "Triton runs on a CPU only in its interpreter (TRITON_INTERPRET=1)"
        return f"no Triton for device type {device.type!r}"

    def detail(self) -> str:
        """The Triton version."""
        return f"triton {triton.__version__}" + (" (interpreter)" if INTERPRETED else "")

    def unsupported(self, spec: AttnSpec) -> list[str]:
        """What is not there yet, by argument name."""
        reasons = [
            f"{name} is not supported yet" for name in sorted(spec.features - SUPPORTED_FEATURES)
        ]
        for name, dim in (("head_dim", spec.head_dim), ("head_dim_v", spec.head_dim_v)):
            if dim % 8 or not 8 <= dim <= 256:
                reasons.append(f"{name}={dim}: expected a multiple of 8 up to 256")
        if spec.num_splits > 1:
            reasons.append(f"num_splits={spec.num_splits}: expected 0 or 1")
        return reasons

    def prepare(self, problem: Problem) -> Run:
        """Compile, size and place the launches of `problem`."""
        bounds = problem.bounds
        if bounds.batch == 0 or bounds.total_q == 0 or bounds.max_seqlen_q == 0:
            return lambda tensors: _buffers(problem, tensors)
        return _prepare(problem, device_facts.facts(problem.spec.device))


def _buffers(problem: Problem, tensors: Tensors) -> AttnResult:
    """The result's tensors, not yet written."""
    q = tensors.q
    out = tensors.out
    if out is None:
        out = torch.empty(
            (*q.shape[:-1], problem.spec.head_dim_v), dtype=q.dtype, device=q.device
        )
    lse = None
    if problem.return_lse:
        lse = torch.empty(_lse_shape(q), dtype=torch.float32, device=q.device)
    return AttnResult(out, lse)


def _lse_shape(q: torch.Tensor) -> tuple[int, ...]:
    if q.dim() == 3:
        return (q.shape[1], q.shape[0])
    return (q.shape[0], q.shape[2], q.shape[1])


def _prepare(problem: Problem, device: DeviceFacts) -> Run:
    spec, bounds = problem.spec, problem.bounds
    stand_in = _stand_in(problem)
    if stand_in is not None:
        problem = Problem(
            spec, bounds, problem.tensors._replace(k=stand_in, v=stand_in), problem.return_lse
        )
    group = spec.q_heads_per_kv
    most_rows = bounds.max_seqlen_q * group
    fixed_q = spec.query_layout == "dense" and problem.tensors.seqused_q is None
    # num_splits=1 asks for unsplit rows, which is what the prefill kernel computes.
    decode_rows = 0
    if spec.num_splits == 0 and (most_rows <= MAX_DECODE_ROWS or not fixed_q):
        decode_rows = min(MAX_DECODE_ROWS, next_power_of_2(most_rows))
    if decode_rows and group > MAX_DECODE_ROWS:
        decode_rows = next_power_of_2(group) if group <= 128 else 0
    example = _buffers(problem, problem.tensors)
    decode = _prepare_decode(problem, device, decode_rows, example) if decode_rows else None
    prefill = None
    if most_rows > decode_rows:
        prefill = _prepare_prefill(problem, device, decode_rows, example)

    def run(tensors: Tensors) -> AttnResult:
        if stand_in is not None:
            tensors = tensors._replace(k=stand_in, v=stand_in)
        result = _buffers(problem, tensors)
        if prefill is not None:
            prefill(tensors, result)
        if decode is not None:
            decode(tensors, result)
        return result

    return run


def _stand_in(problem: Problem) -> torch.Tensor | None:
    """One key of zeros, any place of any batch, for a call whose key tensors hold nothing."""
    k, v = problem.tensors.k, problem.tensors.v
    if k.numel() and v.numel():
        return None
    zeros = k.new_zeros(max(k.shape[-1], v.shape[-1], 1))
    return zeros.expand(*k.shape[:-1], zeros.shape[0])


def _strides(tensor: torch.Tensor, name: str, packed: bool) -> dict[str, int]:
    """(batch or page, token, head) strides; a packed tensor has no batch."""
    outer = 0 if packed else tensor.stride(0)
    return {
        f"{name}_stride_b": outer,
        f"{name}_stride_t": tensor.stride(-3),
        f"{name}_stride_h": tensor.stride(-2),
    }


def _common(problem: Problem, example: AttnResult) -> dict[str, Any]:
    """The kernel arguments that decode, prefill and combine share, by name."""
    spec, bounds, tensors = problem.spec, problem.bounds, problem.tensors
    packed_q = spec.query_layout == "packed"
    packed_k = spec.key_layout == "packed"
    lse = example.lse
    lse_strides = (0, 0, 0)
    if lse is not None:
        lse_strides = (
            (0, lse.stride(1), lse.stride(0))
            if packed_q
            else (lse.stride(0), lse.stride(2), lse.stride(1))
        )
    capacity = tensors.k.shape[0] if packed_k else bounds.max_seqlen_k
    left = -1 if spec.window_left >= capacity - 1 else spec.window_left
    right = -1 if spec.window_right >= bounds.max_seqlen_q - 1 else spec.window_right
    return {
        **_strides(example.out, "out", packed_q),
        **dict(zip(("lse_stride_b", "lse_stride_t", "lse_stride_h"), lse_strides, strict=True)),
        **_strides(tensors.q, "q", packed_q),
        **_strides(tensors.k, "k", packed_k),
        **_strides(tensors.v, "v", packed_k),
        "table_stride": 0 if tensors.page_table is None else tensors.page_table.stride(0),
        "batch": bounds.batch,
        "total_q": bounds.total_q,
        "total_k": max(1, tensors.k.shape[0] if packed_k else bounds.max_seqlen_k),
        "fixed_seqlen_q": bounds.max_seqlen_q,
        "fixed_seqlen_k": bounds.fixed_seqlen_k or 0,
        "max_seqlen_k": bounds.max_seqlen_k if tensors.k.shape[0] else 0,
        "num_pages": tensors.k.shape[0],
        "window_left": None if left < 0 else left,
        "window_right": None if right < 0 else right,
        **_scales(spec),
        "NUM_HEADS_KV": spec.num_heads_kv,
        "GROUP": spec.q_heads_per_kv,
        "HEAD_DIM": spec.head_dim,
        "HEAD_DIM_V": spec.head_dim_v,
        "PAGE_SIZE": spec.page_size,
        "HAS_SOFTCAP": spec.softcap > 0,
        "HAS_LSE": problem.return_lse,
        "NEGATE": spec.softmax_scale < 0,
        "IEEE": spec.dtype == torch.float32,
        "INTERPRETED": INTERPRETED,
    }


def _scales(spec: AttnSpec) -> dict[str, float]:
    """The positive factors of the base-2 scores; a scale of 0 stays a factor, not a NaN."""
    scale = max(abs(spec.softmax_scale), 1e-30)
    if spec.softcap > 0:
        return {
            "scale_log2": 2 * LOG2E * scale / spec.softcap,
            "softcap_log2": LOG2E * spec.softcap,
        }
    return {"scale_log2": scale * LOG2E, "softcap_log2": 0.0}


def _pick(common: dict[str, Any], kernel: Any, **own: Any) -> dict[str, Any]:
    """The shared arguments that `kernel` takes, and its own."""
    return {name: common[name] for name in kernel.arg_names if name in common} | own


def _block_b(batch: int) -> int:
    """Sequences looked at together: few sizes, so that few variants are compiled."""
    return 32 if batch <= 32 else 256 if batch <= 256 else 1024


def _prepare_decode(problem: Problem, device: DeviceFacts, rows: int, example: AttnResult) -> Any:
    """The two launches of the decode path as a function of (tensors, result)."""
    spec, bounds = problem.spec, problem.bounds
    tile = decode_tile(spec, device, bounds.batch, rows)
    programs = decode_programs(device, tile, spec.num_heads_kv, spec.sm_margin)
    d0, d1 = panels(spec.head_dim)
    v0, v1 = panels(spec.head_dim_v)
    workspace_size = 2 * programs * rows * (v0 + v1 + 2)
    common = _common(problem, example)
    # Programmatic dependent launch: the merge starts while the attention kernel still runs.
    pdl = device.kind == "cuda" and device.arch >= (9, 0)
    shared = {
        "PROGRAMS": programs,
        "MAX_ROWS": rows,
        "ROWS": rows,
        "BLOCK_N": tile.block_n,
        "BLOCK_B": _block_b(bounds.batch),
        "ONE_BLOCK": bounds.batch <= _block_b(bounds.batch),
        "PDL": pdl,
    }
    workspace = torch.empty(workspace_size, dtype=torch.float32, device=spec.device)
    attend = Launch(
        decode_kernel,
        (programs, 1, 1),
        _decode_pointers(problem.tensors, example, workspace),
        _pick(
            common,
            decode_kernel,
            **shared,
            D0=d0,
            D1=d1,
            V0=v0,
            V1=v1,
            BLOCK_M=max(16, rows),
            ONE_TOKEN=bounds.max_seqlen_q == 1,
            SAME_STRIDES=problem.tensors.k.stride() == problem.tensors.v.stride(),
            LAZY_MASK=rows > 16,
        ),
        {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
        spec.device,
    )
    block_p, block_r, warps = _combine_shape(programs, bounds.batch, spec, rows)
    merge = Launch(
        combine_kernel,
        (programs, rows // block_r, 1),
        _combine_pointers(problem.tensors, example, workspace),
        _pick(
            common,
            combine_kernel,
            **shared,
            V=v0 + v1,
            BLOCK_V=next_power_of_2(v0 + v1),
            BLOCK_R=block_r,
            BLOCK_P=block_p,
        ),
        {"num_warps": warps} | ({"launch_pdl": True} if pdl else {}),
        spec.device,
    )

    def run(tensors: Tensors, result: AttnResult) -> None:
        workspace = torch.empty(workspace_size, dtype=torch.float32, device=spec.device)
        attend(*_decode_pointers(tensors, result, workspace))
        merge(*_combine_pointers(tensors, result, workspace))

    return run


def _combine_shape(programs: int, batch: int, spec: AttnSpec, rows: int) -> tuple[int, int, int]:
    """(partials, rows) that one program of the merge holds at once, and its warps.

    About 4096 accumulators a warp; one warp needs no reductions across warps.
    """
    pieces = next_power_of_2(programs // spec.num_heads_kv // batch + 2)
    warps = 1
    block_p = max(8 if rows > 16 else 16, min(32, pieces))
    if pieces > 64:
        block_p, warps = 64, 2
    width = next_power_of_2(sum(panels(spec.head_dim_v)))
    return block_p, max(1, min(rows, 4096 * warps // (block_p * width))), warps


def _decode_pointers(tensors: Tensors, result: AttnResult, workspace: torch.Tensor) -> Any:
    return (
        result.out,
        result.lse,
        workspace,
        tensors.q,
        tensors.k,
        tensors.v,
        tensors.page_table,
        tensors.cu_seqlens_q,
        tensors.cu_seqlens_k,
        tensors.seqused_q,
        tensors.seqused_k,
        tensors.sinks,
    )


def _combine_pointers(tensors: Tensors, result: AttnResult, workspace: torch.Tensor) -> Any:
    return (
        result.out,
        result.lse,
        workspace,
        tensors.cu_seqlens_q,
        tensors.cu_seqlens_k,
        tensors.seqused_q,
        tensors.seqused_k,
        tensors.sinks,
    )


def _prepare_prefill(
    problem: Problem, device: DeviceFacts, decode_rows: int, example: AttnResult
) -> Any:
    """The launch of the prefill path as a function of (tensors, result)."""
    spec, bounds = problem.spec, problem.bounds
    most_rows = bounds.max_seqlen_q * spec.q_heads_per_kv
    tile = prefill_tile(spec, device, most_rows)
    row_tiles = -(-most_rows // tile.block_m)
    block_d = max(16, next_power_of_2(spec.head_dim))
    block_dv = max(16, next_power_of_2(spec.head_dim_v))
    described = _describable(problem, device, tile.block_n)
    values = _pick(
        _common(problem, example),
        prefill_kernel,
        num_row_tiles=row_tiles,
        DECODE_ROWS=decode_rows,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
    )
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    grid = (row_tiles * bounds.batch * spec.num_heads_kv, 1, 1)

    def pointers(tensors: Tensors, result: AttnResult) -> Any:
        k_desc = v_desc = None
        if described:
            k_desc = _descriptor(tensors.k, tile.block_n, block_d)
            v_desc = _descriptor(tensors.v, tile.block_n, block_dv)
        return (
            result.out,
            result.lse,
            tensors.q,
            tensors.k,
            tensors.v,
            k_desc,
            v_desc,
            tensors.page_table,
            tensors.cu_seqlens_q,
            tensors.cu_seqlens_k,
            tensors.seqused_q,
            tensors.seqused_k,
            tensors.sinks,
        )

    launch = Launch(
        prefill_kernel,
        grid,
        pointers(problem.tensors, example),
        values,
        options,
        spec.device,
        direct=not described,
    )
    return lambda tensors, result: launch(*pointers(tensors, result))


def _describable(problem: Problem, device: DeviceFacts, block_n: int) -> bool:
    """Whether keys and values can be read through tensor descriptors (Hopper's TMA)."""
    spec = problem.spec
    if INTERPRETED or device.kind != "cuda" or device.arch < (9, 0):
        return False
    if spec.key_layout == "paged" and spec.page_size % block_n:
        return False
    for tensor in (problem.tensors.k, problem.tensors.v):
        bytes_apart = [s * tensor.element_size() for s in tensor.stride()[:-1]]
        if tensor.data_ptr() % 16 or any(b % 16 or b <= 0 for b in bytes_apart):
            return False
    return True


def _descriptor(tensor: torch.Tensor, block_n: int, block_d: int) -> Any:
    """A descriptor of [batch or pages, tokens, heads, dim] that reads block_n tokens of a head."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    if tensor.dim() == 3:
        tensor = tensor.unsqueeze(0)
    return TensorDescriptor(
        tensor, list(tensor.shape), list(tensor.stride()), [1, block_n, 1, block_d]
    )


BACKEND = TritonBackend()

"""Our own kernels: what they refuse, the buffers of a call, and its launches."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
from triton.runtime.jit import KernelInterface

from triton_fa import device as device_facts
from triton_fa.backends.base import Run, RunByAddress, allocate, result_shapes, without_work
from triton_fa.checks import require_shape
from triton_fa.kernels import plans, submit
from triton_fa.kernels.compat import INTERPRETED
from triton_fa.kernels.launch import Launch
from triton_fa.problem import Append, AttnResult, Lengths, Problem, Tensors
from triton_fa.spec import AttnSpec, Bounds, metadata_entries

SUPPORTED_FEATURES = frozenset(
    {
        "sinks",
        "scheduler_metadata",
        "seqused_q",
        "out",
        "batch_invariant",
        "k",
        "rotary_cos",
        "rotary_seqlens",
        "cache_batch_idx",
        "cache_leftpad",
        "attention_chunk",
        "qv",
        "only_qv",
        "q_descale",
        "k_descale",
        "v_descale",
        "score_mod",
        "mask_mod",
        "aux_tensors",
        "block_sparse_tensors",
    }
)


CallTensors = tuple[Any, ...]
OUT = Tensors._fields.index("out")


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
        most = 512 if "qv" in spec.features else 256
        only_qv = "only_qv" in spec.features
        dims = {"head_dim": (spec.head_dim, 512 if only_qv else 256)}
        dims |= {"head_dim_v": (spec.head_dim_v, most)}
        for name, (dim, limit) in dims.items():
            if dim % 8 or not 8 <= dim <= limit:
                reasons.append(f"{name}={dim}: expected a multiple of 8 up to {limit}")
        for name, mod in (("score_mod", spec.score_mod), ("mask_mod", spec.mask_mod)):
            if mod is not None and not isinstance(mod, KernelInterface):
                reasons.append(f"{name}: expected a @triton.jit function, got {mod!r}")
        return reasons

    def prepare(self, problem: Problem) -> Run:
        """Compile, size and place the launches of `problem`."""
        bounds = problem.bounds
        metadata = problem.tensors.scheduler_metadata
        if metadata is not None:
            require_shape("scheduler_metadata", metadata, (metadata_entries(bounds.batch),))
        if problem.tensors.append is None:
            return _attend(problem)
        return _append_and_attend(problem, problem.tensors.append)

    def prepare_schedule(
        self, spec: AttnSpec, bounds: Bounds, lengths: Lengths
    ) -> Callable[[Lengths, torch.Tensor], None]:
        """What fills metadata from lengths, for tensors like these."""
        if bounds.batch == 0:
            return lambda lengths, metadata: _fill_zero(metadata)
        device = spec.device
        step = plans.schedule(spec, bounds, lengths, device_facts.facts(device))
        example = torch.empty(metadata_entries(bounds.batch), dtype=torch.int32, device=device)
        tensors = plans.length_tensors(lengths, example)
        enqueue = _enqueuer([step], _compiled([step], tensors, device), tensors, device)
        return lambda lengths, metadata: enqueue(plans.length_tensors(lengths, metadata))


def _fill_zero(metadata: torch.Tensor) -> None:
    metadata.zero_()


def _attend(problem: Problem) -> Run:
    """Attention alone: of an appending call, over what was appended before."""
    if without_work(problem):
        bare = problem.without_tensors()
        return lambda tensors: allocate(bare, tensors)
    stand_ins = _stand_ins(problem.tensors)
    if not stand_ins:
        return _launches(problem)
    inner = _launches(replace(problem, tensors=problem.tensors._replace(**stand_ins)))
    return lambda tensors: inner(tensors._replace(**stand_ins))


def _append_and_attend(problem: Problem, new: Append) -> Run:
    spec, bounds, tensors = problem.spec, problem.bounds, problem.tensors
    has_place = tensors.k.numel() and tensors.v.numel() and bounds.max_seqlen_k
    turns = spec.rotary_dim > 0 and bounds.total_q > 0
    if not has_place or not (bounds.total_new or turns):
        return _attend(problem)
    device = spec.device

    def turned(q: torch.Tensor) -> torch.Tensor:
        return torch.empty(q.shape, dtype=q.dtype, device=device) if turns else q

    example = turned(tensors.q)
    step = plans.append(problem, new)
    examples = plans.append_tensors(tensors, new, example)
    enqueue = _enqueuer([step], _compiled([step], examples, device), examples, device)
    inner = _attend(replace(problem, tensors=tensors._replace(q=example)))

    def run(given: Tensors) -> AttnResult:
        assert given.append is not None
        q = turned(given.q)
        enqueue(plans.append_tensors(given, given.append, q))
        return inner(given._replace(q=q))

    return run


def _launches(problem: Problem) -> Run:
    device = problem.spec.device
    planned = plans.plan(problem, device_facts.facts(device))
    bare = problem.without_tensors()

    make_part = _workspace(planned.partial_floats, torch.float32, device)
    make_plan = _workspace(planned.plan_entries, torch.int32, device)
    make_transposed = _workspace(planned.transposed_bytes, torch.uint8, device)

    def call_tensors(tensors: Tensors, result: AttnResult) -> CallTensors:
        part, prefill_plan, v_transposed = (
            None if make is None else make() for make in (make_part, make_plan, make_transposed)
        )
        return plans.call_tensors(tensors, result, part, prefill_plan, v_transposed)

    example = call_tensors(problem.tensors, allocate(bare, problem.tensors))
    launches = _compiled(planned.launches, example, device)
    steps = _submittable(launches)
    nested = (problem.tensors.aux, problem.tensors.append, problem.tensors.blocks)
    if steps is not None and all(part is None for part in nested):
        return RunByAddress(_by_address(problem, steps, make_part, make_plan, make_transposed))
    enqueue = _enqueuer(planned.launches, launches, example, device)

    def run(tensors: Tensors) -> AttnResult:
        result = allocate(bare, tensors)
        enqueue(call_tensors(tensors, result))
        return result

    return run


Maker = Callable[[], torch.Tensor]


def _workspace(size: int, dtype: torch.dtype, device: torch.device) -> Maker | None:
    return _maker((size,), dtype, device) if size else None


def _maker(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Maker:
    """What makes contiguous tensors on the current device, which is `device`.

    PyTorch's compiler has a function for it that takes half the time of `torch.empty`. It is
    private.
    """
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    quick = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)
    if quick is not None and device.type == "cuda":
        return functools.partial(quick, shape, strides, dtype)
    return functools.partial(torch.empty_strided, shape, strides, dtype=dtype, device=device)


def _by_address(
    problem: Problem,
    steps: Sequence[submit.Submittable],
    make_part: Maker | None,
    make_plan: Maker | None,
    make_transposed: Maker | None,
) -> Callable[[tuple[Any, ...], list[int]], AttnResult]:
    """What runs a call given the addresses of its tensors, in their order: all work of a hit."""
    spec, tensors = problem.spec, problem.tensors
    device, index = spec.device, spec.device.index
    shape, lse_shape = result_shapes(problem, tensors.q)
    make_out = None if tensors.out is not None else _maker(shape, spec.out_dtype, device)
    make_lse = _maker(lse_shape, torch.float32, device) if problem.return_lse else None
    names = [plans.NAMES[n] for n in Tensors._fields if getattr(tensors, n) is not None]
    made = (make_out, make_lse, make_part, make_plan, make_transposed)
    added = ("out_ptr", "lse_ptr", "part_ptr", "plan_ptr", "v_transposed_ptr")
    names += [name for name, make in zip(added, made, strict=True) if make is not None]
    send = submit.submission(steps, names, index)
    current_device = submit.current_device()
    new_result = tuple.__new__

    def run(given: tuple[Any, ...], addresses: list[int]) -> AttnResult:
        if current_device() != index:
            with torch.cuda.device(device):
                return run(given, addresses)
        if make_out is None:
            out = given[OUT]
        else:
            out = make_out()
            addresses.append(out.data_ptr())
        lse = None
        if make_lse is not None:
            lse = make_lse()
            addresses.append(lse.data_ptr())
        if make_part is not None:
            part = make_part()  # a name, so that it lives until the kernels are enqueued
            addresses.append(part.data_ptr())
        if make_plan is not None:
            prefill_plan = make_plan()
            addresses.append(prefill_plan.data_ptr())
        if make_transposed is not None:
            v_transposed = make_transposed()
            addresses.append(v_transposed.data_ptr())
        send(addresses)
        return new_result(AttnResult, (out, lse, ()))

    return run


def _compiled(
    steps: Sequence[plans.PlannedLaunch], example: CallTensors, device: torch.device
) -> list[Launch]:
    """The launches of `steps` for tensors like `example`."""
    return [
        Launch(step.kernel, step.grid, step.pointers(example), step.values, step.options, device)
        for step in steps
    ]


def _submittable(launches: Sequence[Launch]) -> list[submit.Submittable] | None:
    """The launches as `submit` takes them; None if it does not take all."""
    found = [launch.submittable for launch in launches if launch.submittable is not None]
    return found if len(found) == len(launches) else None


def _enqueuer(
    steps: Sequence[plans.PlannedLaunch],
    launches: Sequence[Launch],
    example: CallTensors,
    device: torch.device,
) -> Callable[[CallTensors], None]:
    """What enqueues the launches of `steps` for tensors like `example`."""
    direct = _submittable(launches)
    places = [i for i, tensor in enumerate(example) if isinstance(tensor, torch.Tensor)]
    names = [plans.POINTERS[i] for i in places]
    send = None if direct is None else submit.submission(direct, names, device.index)

    def enqueue(given: CallTensors) -> None:
        if device.type == "cuda" and torch.cuda.current_device() != device.index:
            with torch.cuda.device(device):
                enqueue(given)
        elif send is not None:
            send([given[i].data_ptr() for i in places])
        else:
            for step, dispatched in zip(steps, launches, strict=True):
                dispatched(step.pointers(given))

    return enqueue


def _stand_ins(tensors: Tensors) -> dict[str, Any]:
    """What replaces tensors without any element, which have no address to read from.

    One key of zeros, any place of any batch, for the keys and values; page 0 for a page table.
    """
    made: dict[str, Any] = {}
    k, v, table = tensors.k, tensors.v, tensors.page_table
    if not (k.numel() and v.numel()):
        zeros = k.new_zeros(max(k.shape[-1], v.shape[-1], 1))
        made["k"] = made["v"] = zeros.expand(*(max(1, n) for n in k.shape[:-1]), zeros.shape[0])
    if table is not None and not table.numel():
        made["page_table"] = table.new_zeros(1).expand(table.shape[0], 1)
    return made


BACKEND = TritonBackend()

"""Our own kernels: what they refuse, the buffers of a call, and its launches."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
from triton.runtime.jit import KernelInterface

from triton_fa import device as device_facts
from triton_fa.backends.base import Run, allocate, without_work
from triton_fa.checks import require_shape
from triton_fa.kernels import plans
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
        enqueue = _enqueuer([step], plans.length_tensors(lengths, example), device)
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
    enqueue = _enqueuer([step], plans.append_tensors(tensors, new, example), device)
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

    part_like = _pattern(planned.partial_floats, torch.float32, device)
    plan_like = _pattern(planned.plan_entries, torch.int32, device)
    v_like = _pattern(planned.transposed_bytes, torch.uint8, device)

    def call_tensors(tensors: Tensors, result: AttnResult) -> CallTensors:
        part = None if part_like is None else torch.empty_like(part_like)
        prefill_plan = None if plan_like is None else torch.empty_like(plan_like)
        v_transposed = None if v_like is None else torch.empty_like(v_like)
        return plans.call_tensors(tensors, result, part, prefill_plan, v_transposed)

    example = call_tensors(problem.tensors, allocate(bare, problem.tensors))
    enqueue = _enqueuer(planned.launches, example, device)

    def run(tensors: Tensors) -> AttnResult:
        result = allocate(bare, tensors)
        enqueue(call_tensors(tensors, result))
        return result

    return run


def _pattern(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """One element that `torch.empty_like` makes a workspace from, quicker than `torch.empty`."""
    return torch.empty(1, dtype=dtype, device=device).expand(size) if size else None


def _enqueuer(
    steps: Sequence[plans.PlannedLaunch], example: CallTensors, device: torch.device
) -> Callable[[CallTensors], None]:
    """Compile `steps` for tensors like `example`; the result launches them for such tensors."""
    launches = [
        Launch(step.kernel, step.grid, step.pointers(example), step.values, step.options, device)
        for step in steps
    ]
    direct = [
        (launch.direct, _picker(step.indices()))
        for step, launch in zip(steps, launches, strict=True)
        if launch.direct is not None
    ]
    all_direct = len(direct) == len(steps)

    def enqueue(given: CallTensors) -> None:
        if device.type == "cuda" and torch.cuda.current_device() != device.index:
            with torch.cuda.device(device):
                enqueue(given)
        elif all_direct:
            addresses = [None if t is None else t.data_ptr() for t in given]
            for launch, pick in direct:
                launch(pick(addresses))
        else:
            for step, dispatched in zip(steps, launches, strict=True):
                dispatched(step.pointers(given))

    return enqueue


def _picker(places: tuple[int, ...]) -> Callable[[list[int | None]], Sequence[int | None]]:
    """What takes these places out of a list; `itemgetter` of one place gives no sequence."""
    if len(places) == 1:
        return lambda given: (given[places[0]],)
    return operator.itemgetter(*places)


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

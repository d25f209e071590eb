"""Our own kernels: what they refuse, the buffers of a call, and its launches."""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
import triton

from triton_fa import device as device_facts
from triton_fa.backends.base import Run
from triton_fa.kernels.compat import INTERPRETED
from triton_fa.kernels.launch import Launch
from triton_fa.kernels.plans import call_tensors, plan
from triton_fa.problem import AttnResult, Problem, Tensors
from triton_fa.spec import AttnSpec

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
        stand_in = _stand_in(problem)
        if stand_in is None:
            return _launches(problem)
        inner = _launches(
            replace(problem, tensors=problem.tensors._replace(k=stand_in, v=stand_in))
        )
        return lambda tensors: inner(tensors._replace(k=stand_in, v=stand_in))


def _launches(problem: Problem) -> Run:
    device = problem.spec.device
    planned = plan(problem, device_facts.facts(device))
    size = planned.workspace_size
    part = torch.empty(size, dtype=torch.float32, device=device)
    example = call_tensors(problem.tensors, _buffers(problem, problem.tensors), part)
    steps = [
        (
            step,
            Launch(
                step.kernel,
                step.grid,
                step.pointers(example),
                step.values,
                step.options,
                device,
            ),
        )
        for step in planned.launches
    ]
    direct = [
        (launch.direct, operator.itemgetter(*step.indices()))
        for step, launch in steps
        if launch.direct is not None
    ]
    all_direct = len(direct) == len(steps)

    def enqueue(given: tuple[torch.Tensor | None, ...]) -> None:
        if all_direct:
            addresses = [None if t is None else t.data_ptr() for t in given]
            for launch, pick in direct:
                launch(pick(addresses))
        else:
            for step, dispatched in steps:
                dispatched(step.pointers(given))

    def run(tensors: Tensors) -> AttnResult:
        result = _buffers(problem, tensors)
        part = torch.empty(size, dtype=torch.float32, device=device) if size else None
        given = call_tensors(tensors, result, part)
        if device.type == "cuda" and torch.cuda.current_device() != device.index:
            with torch.cuda.device(device):
                enqueue(given)
        else:
            enqueue(given)
        return result

    return run


def _buffers(problem: Problem, tensors: Tensors) -> AttnResult:
    """The result's tensors, not yet written."""
    q, out, lse = tensors.q, tensors.out, None
    if out is None:
        out = torch.empty((*q.shape[:-1], problem.spec.head_dim_v), dtype=q.dtype, device=q.device)
    if problem.return_lse:
        shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
        lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    return AttnResult(out, lse)


def _stand_in(problem: Problem) -> torch.Tensor | None:
    """One key of zeros, any place of any batch, for a call whose key tensors hold nothing."""
    k, v = problem.tensors.k, problem.tensors.v
    if k.numel() and v.numel():
        return None
    zeros = k.new_zeros(max(k.shape[-1], v.shape[-1], 1))
    return zeros.expand(*(max(1, n) for n in k.shape[:-1]), zeros.shape[0])


BACKEND = TritonBackend()

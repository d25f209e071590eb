"""What a backend is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from triton_fa.problem import AttnResult, Problem, Tensors
from triton_fa.spec import AttnSpec

Run = Callable[[Tensors], AttnResult]
"""Runs one prepared call. Valid for every call with the same launch key."""


class RunByAddress:
    """A `Run` that needs only the addresses of what it is given, which the caller may have already.

    `by_address` takes the fields of `Tensors`, none of which is nested, and a list of their
    addresses in order, without those that are None; it may extend that list.
    """

    def __init__(self, by_address: Callable[[tuple[Any, ...], list[int]], AttnResult]) -> None:
        self.by_address = by_address

    def __call__(self, tensors: Tensors) -> AttnResult:
        """Run the call."""
        fields: tuple[Any, ...] = tensors
        return self.by_address(fields, [t.data_ptr() for t in fields if t is not None])


class Backend(Protocol):
    """One way of computing attention. Stateless: everything it needs is in its arguments."""

    ver: int | str

    def unavailable(self, device: torch.device) -> str | None:
        """Why this backend cannot be used on `device` at all, or None."""

    def detail(self) -> str:
        """What was loaded, for people: package and version."""

    def unsupported(self, spec: AttnSpec) -> list[str]:
        """Every reason this backend refuses `spec`; empty means `run` will not refuse it."""

    def prepare(self, problem: Problem) -> Run:
        """Do all host work that depends on the launch key only, and return what is left."""


def allocate(problem: Problem, tensors: Tensors) -> AttnResult:
    """The tensors of a result, not yet written: the caller's `out`, or a new one, and the lse."""
    q = tensors.q
    out = tensors.out
    shape, lse_shape = result_shapes(problem, q)
    if out is None:
        if q.shape == shape and q.dtype == problem.spec.out_dtype and q.is_contiguous():
            out = torch.empty_like(q)  # the quicker of the two
        else:
            out = q.new_empty(shape, dtype=problem.spec.out_dtype)
    lse = None
    if problem.return_lse:
        lse = torch.empty(lse_shape, dtype=torch.float32, device=q.device)
    return AttnResult(out, lse)


def result_shapes(problem: Problem, q: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of the result and of its lse."""
    *batch, tokens, heads, _ = q.shape  # batch only if queries are not packed
    return (*batch, tokens, heads, problem.spec.head_dim_v), (*batch, heads, tokens)


def without_work(problem: Problem) -> bool:
    """Whether the call has no query row at all, so that nothing needs to run."""
    bounds = problem.bounds
    return bounds.batch == 0 or bounds.total_q == 0 or bounds.max_seqlen_q == 0


def fixed_lengths(problem: Problem) -> Callable[[], torch.Tensor]:
    """Makes a (batch,) int32 tensor of the key length that the host knows.

    For binaries that take no int. Made on each call: a kept one would be filled on the stream, or
    in the graph, of the first call only.
    """
    device, bounds = problem.spec.device, problem.bounds
    length = bounds.fixed_seqlen_k or 0
    return lambda: torch.full((bounds.batch,), length, dtype=torch.int32, device=device)

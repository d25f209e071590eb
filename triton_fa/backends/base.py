"""What a backend is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from triton_fa.problem import AttnResult, Problem, Tensors
from triton_fa.spec import AttnSpec

Run = Callable[[Tensors], AttnResult]
"""Runs one prepared call. Valid for every call with the same launch key."""


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

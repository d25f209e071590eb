"""Names that differ between Triton versions, and what the interpreter lacks. Known here only."""

from __future__ import annotations

import triton
import triton.language as tl
from packaging.version import Version

from triton_fa.env import triton_interpreted

TRITON_VERSION = Version(triton.__version__)

INTERPRETED: bool = triton_interpreted()
"""Kernels take this as a constexpr: the interpreter's bfloat16 `tl.dot` returns garbage."""

if INTERPRETED:
    # Programs run one after the other there: a dependent launch has nothing to wait for.
    @triton.jit
    def grid_dependency_wait():
        """Nothing to wait for."""

    @triton.jit
    def grid_dependency_release():
        """Nothing to release."""

else:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    grid_dependency_wait = gdc_wait
    grid_dependency_release = gdc_launch_dependents

__all__ = [
    "INTERPRETED",
    "TRITON_VERSION",
    "grid_dependency_release",
    "grid_dependency_wait",
    "tl",
    "triton",
]

"""Names that differ between Triton versions, and what the interpreter lacks. Known here only."""

from __future__ import annotations

import functools
import importlib
from types import SimpleNamespace
from typing import Any

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


@functools.cache
def gluon_names() -> SimpleNamespace:
    """Names of Gluon that were renamed. Imported when a Gluon kernel is, and not before.

    Raises:
        ImportError, AttributeError: this Triton's Gluon has other names.
    """
    gluon = "triton.experimental.gluon"
    gl: Any = importlib.import_module(f"{gluon}.language")
    tma: Any = importlib.import_module(f"{gluon}.language.nvidia.hopper.tma")
    copies: Any = importlib.import_module(f"{gluon}.language.nvidia.ampere.async_copy")
    return SimpleNamespace(
        async_load=getattr(copies, "async_load", None) or copies.async_copy_global_to_shared,
        barrier=getattr(gl, "barrier", None) or gl.thread_barrier,
        tma_load=getattr(tma, "async_load", None) or tma.async_copy_global_to_shared,
        tma_store=getattr(tma, "async_store", None) or tma.async_copy_shared_to_global,
        public_reinterpret=hasattr(gl.shared_memory_descriptor, "reinterpret"),
    )


__all__ = [
    "INTERPRETED",
    "TRITON_VERSION",
    "gluon_names",
    "grid_dependency_release",
    "grid_dependency_wait",
    "tl",
    "triton",
]

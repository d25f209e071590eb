"""Stands in for `sgl_kernel.flash_attn`, as of 0.4.2, whose order of arguments is our own."""

from __future__ import annotations

import functools
from typing import Any

from triton_fa import api
from triton_fa.compat.common import on_own_version, own_version, with_accumulators
from triton_fa.merge import merge_state

__all__ = ["flash_attn_varlen_func", "flash_attn_with_kvcache", "get_scheduler_metadata"]
PACKAGE = ["merge_state", "merge_state_v2"]  # of `sgl_kernel` itself, where there is none

flash_attn_with_kvcache = on_own_version(api.flash_attn_with_kvcache, with_accumulators)
flash_attn_varlen_func = on_own_version(api.flash_attn_varlen_func, with_accumulators)
merge_state_v2 = merge_state


@functools.wraps(api.get_scheduler_metadata)
def get_scheduler_metadata(*args: Any, **kwargs: Any) -> Any:
    """`sgl_kernel`'s, on our own version."""
    lengths = kwargs["cache_seqlens"] if "cache_seqlens" in kwargs else args[6]
    return api.get_scheduler_metadata(*args, **kwargs, ver=own_version(lengths))

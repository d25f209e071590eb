"""Attention for LLM inference in Triton, behind the functions of FlashAttention-3 and -4."""

from triton_fa.api import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
)
from triton_fa.dispatch import BackendStatus, FallbackWarning, backends, strict
from triton_fa.errors import (
    ArgumentError,
    ArgumentTypeError,
    ArgumentValueError,
    BackendUnavailableError,
    LayoutError,
    TritonFAError,
    UnknownVersionError,
    UnsupportedError,
)
from triton_fa.merge import flash_attn_combine, merge_state
from triton_fa.planner import StepPlanner, StepSchedules
from triton_fa.problem import BlockSparseTensors
from triton_fa.warm import warmup

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "ArgumentValueError",
    "BackendStatus",
    "BackendUnavailableError",
    "BlockSparseTensors",
    "FallbackWarning",
    "LayoutError",
    "StepPlanner",
    "StepSchedules",
    "TritonFAError",
    "UnknownVersionError",
    "UnsupportedError",
    "backends",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "merge_state",
    "strict",
    "warmup",
]

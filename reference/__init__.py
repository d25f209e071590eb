"""Attention in float64 and plain indexing: the judge of every backend. Imports torch only."""

from reference.attention import Rules, attend, visible_keys
from reference.entries import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from reference.float8 import dequantise
from reference.low_precision import (
    attend_low_precision,
    dequantise_low_precision,
    rotate_low_precision,
)
from reference.rotary import rotate

__all__ = [
    "Rules",
    "attend",
    "attend_low_precision",
    "dequantise",
    "dequantise_low_precision",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "rotate",
    "rotate_low_precision",
    "visible_keys",
]

"""What is known about a call on the host, in frozen values without tensors.

`AttnSpec` decides which code runs, `Bounds` how much memory and how large a grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

QueryLayout = Literal["dense", "packed"]
KeyLayout = Literal["dense", "packed", "paged"]


@dataclass(frozen=True, slots=True)
class AttnSpec:
    """Everything code is specialised on.

    Windows are normalised: -1 is unbounded, and `causal` appears as `window_right == 0` only.
    `features` names the optional arguments the caller used, in the public API's spelling; a
    backend refuses the ones it does not know.
    """

    entry: Literal["kvcache", "varlen", "dense"]
    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int
    query_layout: QueryLayout
    key_layout: KeyLayout
    page_size: int  # 0 unless paged
    softmax_scale: float
    window_left: int
    window_right: int
    softcap: float
    num_splits: int
    sm_margin: int
    features: frozenset[str]
    sinks_dtype: torch.dtype | None = None  # None without sinks
    pack_gqa: bool | None = None  # a hint, passed on to FA3 and FA4
    attention_chunk: int = 0  # 0: none
    score_mod: Any = None  # functions of the caller's
    mask_mod: Any = None
    rotary_dim: int = 0  # 0: no rotation
    rotary_interleaved: bool = True
    rotary_moving: bool = False  # a rotation turns query i by its own position, not by its first's

    @property
    def batch_invariant(self) -> bool:
        """Whether a row's bits must not depend on the rest of the batch."""
        return "batch_invariant" in self.features

    @property
    def out_dtype(self) -> torch.dtype:
        """Of the result: that of the queries, or bfloat16 for float8 ones."""
        return torch.bfloat16 if self.dtype.itemsize == 1 else self.dtype

    @property
    def q_heads_per_kv(self) -> int:
        """GQA group size."""
        return self.num_heads_q // self.num_heads_kv


@dataclass(frozen=True, slots=True)
class Bounds:
    """Sizes the host knows. Lengths on the device may be smaller, and are clamped to these."""

    batch: int
    total_q: int  # query tokens in q
    max_seqlen_q: int
    max_seqlen_k: int  # keys one sequence can have: table width x page size, or the key tensor's
    fixed_seqlen_k: int | None  # the length of every sequence where no device tensor gives one
    total_new: int = 0  # appended keys of all sequences together
    max_seqlen_new: int = 0  # and of one sequence at most


def metadata_entries(batch: int) -> int:
    """int32 entries of the scheduler metadata of `batch` sequences."""
    return 4 * (-(-batch // 4) * 4) + 1

"""Stands in for FlashAttention-2's `flash_attn`, as of 2.8: its attention functions, forward."""

from __future__ import annotations

from typing import Any

import torch

from triton_fa import api
from triton_fa.api import Window
from triton_fa.compat.common import own_version, refuse

__version__ = "2.8.3"  # callers compare it to learn what the functions take

__all__ = ["__version__", "flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """FlashAttention-2's `flash_attn_func`; every forward pass is deterministic."""
    refuse(q, dropout_p=dropout_p or None, alibi_slopes=alibi_slopes)
    result = api.flash_attn_func(
        q,
        k,
        v,
        softmax_scale,
        causal,
        window_size=window_size,
        softcap=softcap,
        num_splits=0,
        return_attn_probs=return_attn_probs,
        ver=own_version(q),
    )
    return _with_probabilities(result)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> Any:
    """FlashAttention-2's `flash_attn_varlen_func`; prefix sums of keys with pages, too."""
    refuse(q, dropout_p=dropout_p or None, alibi_slopes=alibi_slopes)
    paged = block_table is not None
    result = api.flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        None if paged else cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_k=cu_seqlens_k.diff() if paged else None,
        page_table=block_table,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        num_splits=0,
        return_softmax_lse=return_attn_probs,
        ver=own_version(q),
    )
    return _with_probabilities(result)


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | int | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window | None = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """FlashAttention-2's `flash_attn_with_kvcache`: `out`, or `(out, lse)`."""
    refuse(q, alibi_slopes=alibi_slopes)
    return api.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        page_table=block_table,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        rotary_interleaved=rotary_interleaved,
        num_splits=num_splits,
        return_softmax_lse=return_softmax_lse,
        ver=own_version(q),
    )


def _with_probabilities(result: Any) -> Any:
    """`out`, or `(out, lse, probabilities)`: these are only there with a dropout."""
    if isinstance(result, torch.Tensor):
        return result
    out, lse = result
    return out, lse, out.new_empty(0)

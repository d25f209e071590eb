"""A local kernel of the package `kernels`, as transformers loads it: three functions by name.

transformers reads from their signatures what they can do, and passes nothing else. Every argument
here is one that it may pass; the backend is the default one, as of `ver=None`.
"""

from __future__ import annotations

from typing import Any

import torch

from triton_fa.integrations import FeatureError
from triton_fa.integrations.torch_library import call

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    s_aux: torch.Tensor | None = None,
) -> Any:
    """Attention of (batch, seqlen, heads, head_dim); s_aux: (heads_q,) sink logits."""
    _refuse_dropout(dropout_p)
    return call(
        "flash_attn_func",
        *(q, k, v),
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        num_splits=0,
        sinks=s_aux,
    )


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
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    s_aux: torch.Tensor | None = None,
) -> Any:
    """Attention of packed sequences, (total, heads, head_dim)."""
    _refuse_dropout(dropout_p)
    return call(
        "flash_attn_varlen_func",
        *(q, k, v, cu_seqlens_q.to(torch.int32), cu_seqlens_k.to(torch.int32)),
        max_seqlen_q=int(max_seqlen_q),
        max_seqlen_k=int(max_seqlen_k),
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        num_splits=0,
        sinks=s_aux,
    )


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    s_aux: torch.Tensor | None = None,
) -> Any:
    """Write new keys and values into the pages, then attend to all of them.

    Rows that only fill up a CUDA graph have length -1 and no pages: nothing is written for them.

    Args:
        q: (batch, 1, heads_q, head_dim).
        k_cache: (pages, page_size, heads_kv, head_dim), written in place.
        v_cache: As k_cache.
        k: (batch, 1, heads_kv, head_dim).
        v: As k.
        cache_seqlens: (batch,) keys in the cache before these.
        block_table: (batch, max_pages) int32, -1 behind the last page of a sequence.
        softmax_scale: Multiplies the scores.
        causal: As of the attention functions, as are window_size and softcap.
        window_size: (left, right).
        softcap: 0 is off.
        s_aux: (heads_q,) sink logits.

    Returns:
        As q.
    """
    return call(
        "flash_attn_with_kvcache_append",
        *(q, k_cache, v_cache, k, v),
        cache_seqlens=cache_seqlens.to(torch.int32),
        page_table=block_table,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        num_splits=0,
        sinks=s_aux,
    )


def _refuse_dropout(dropout_p: float) -> None:
    if dropout_p:
        raise FeatureError(f"dropout: expected 0, got {dropout_p}; call model.eval()")

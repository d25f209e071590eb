"""Stands in for `vllm.vllm_flash_attn`, as of vLLM 0.33."""

from __future__ import annotations

from typing import Any

import torch

from triton_fa import api
from triton_fa.api import Window
from triton_fa.compat.common import own_version, refuse
from triton_fa.errors import ArgumentValueError

__all__ = [
    "FA2_AVAILABLE",
    "FA3_AVAILABLE",
    "fa_version_unsupported_reason",
    "flash_attn_varlen_func",
    "get_scheduler_metadata",
    "is_fa_version_supported",
]
PACKAGE: list[str] = []

FA2_AVAILABLE = True
FA3_AVAILABLE = True


def is_fa_version_supported(fa_version: int) -> bool:
    """Whether calls for this version are answered: all of vLLM's are."""
    return fa_version_unsupported_reason(fa_version) is None


def fa_version_unsupported_reason(fa_version: int) -> str | None:
    """Why calls for this version are not answered: None."""
    if fa_version not in (2, 3, 4):
        raise ArgumentValueError(f"fa_version: expected 2, 3 or 4, got {fa_version!r}")
    return None


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_k: int,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    q_v: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    return_softmax_lse: bool = False,
    out: torch.Tensor | None = None,
    scheduler_metadata: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    num_splits: int = 0,
    output_scale: torch.Tensor | None = None,
    fa_version: int = 2,
    s_aux: torch.Tensor | None = None,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_tot_seqused_k: torch.Tensor | None = None,
    mask_mod: object = None,
    block_sparse_tensors: object = None,
    aux_tensors: object = None,
    aux_tensor_leading_dims: object = None,
    dynamic_causal: torch.Tensor | None = None,
    gather_kv_indices: torch.Tensor | None = None,
    gather_kv_valid_length: torch.Tensor | None = None,
) -> Any:
    """vLLM's `flash_attn_varlen_func`: `out`, or `(out, lse)`; the same for every `fa_version`."""
    fa_version_unsupported_reason(fa_version)
    refuse(
        q,
        dropout_p=dropout_p or None,
        alibi_slopes=alibi_slopes,
        return_attn_probs=return_attn_probs,
        output_scale=output_scale,
        cp_world_size=None if cp_world_size == 1 else cp_world_size,
        cp_tot_seqused_k=cp_tot_seqused_k,
        mask_mod=mask_mod,
        block_sparse_tensors=block_sparse_tensors,
        aux_tensors=aux_tensors,
        aux_tensor_leading_dims=aux_tensor_leading_dims,
        dynamic_causal=dynamic_causal,
        gather_kv_indices=gather_kv_indices,
        gather_kv_valid_length=gather_kv_valid_length,
    )
    return api.flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_k=seqused_k,
        page_table=block_table,
        # The same with a q_v, unlike our own default.
        softmax_scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        causal=causal,
        qv=q_v,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        window_size=window_size,
        softcap=softcap,
        num_splits=num_splits,
        return_softmax_lse=return_softmax_lse,
        sinks=s_aux,
        ver=own_version(q),
        out=out,
        scheduler_metadata=scheduler_metadata,
    )


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: torch.Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: Window | None = (-1, -1),
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> torch.Tensor:
    """vLLM's `get_scheduler_metadata`."""
    return api.get_scheduler_metadata(
        batch_size,
        max_seqlen_q,
        max_seqlen_k,
        num_heads_q,
        num_heads_kv,
        headdim,
        cache_seqlens,
        qkv_dtype,
        headdim_v,
        cu_seqlens_q,
        cu_seqlens_k_new=cu_seqlens_k_new,
        leftpad_k=cache_leftpad,
        page_size=page_size,
        max_seqlen_k_new=max_seqlen_k_new,
        causal=causal,
        window_size=window_size,
        has_softcap=has_softcap,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
        ver=own_version(cache_seqlens),
    )

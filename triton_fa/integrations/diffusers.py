"""The attention backend "triton_fa" for diffusers.

diffusers keeps its backends in a closed enumeration, so `register()` adds a member to it: a private
interface, checked for what is relied on.
"""

from __future__ import annotations

from typing import Any

import torch

from triton_fa.integrations import FeatureError, require

require("diffusers", ">=0.42,<1")

from diffusers.models import attention_dispatch

from triton_fa.integrations.padding import attend_padded
from triton_fa.integrations.torch_library import call

NAME = "triton_fa"


def register(*, ver: int | str | None = None) -> None:
    """Make `model.set_attention_backend("triton_fa")` work, and `attention_backend("triton_fa")`.

    Calling it again replaces what was registered.

    Args:
        ver: As of the attention functions.

    Raises:
        ImportError: this diffusers keeps its backends otherwise.
    """
    member = _member(attention_dispatch.AttentionBackendName)

    # Parameters by name: diffusers drops what is not among them.
    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        return_lse: bool = False,
        _parallel_config: object = None,
    ) -> Any:
        if dropout_p:
            raise FeatureError(f"dropout_p: expected 0, got {dropout_p}")
        if _parallel_config is not None:
            raise FeatureError("parallel_config: expected None: no context parallelism here")
        if is_causal and query.shape[1] != key.shape[1]:
            raise FeatureError(
                "is_causal: expected as many queries as keys, "
                f"got {query.shape[1]} and {key.shape[1]}"
            )
        options = {
            "softmax_scale": scale,
            "causal": is_causal,
            "window_size": window_size,
            "num_splits": 0,
            "ver": ver,
        }
        if attn_mask is None:
            return call("flash_attn_func", query, key, value, **options, return_lse=return_lse)
        if is_causal or return_lse or tuple(window_size) != (-1, -1):
            raise FeatureError("attn_mask: expected None with is_causal, window_size or return_lse")
        mask = _key_mask(attn_mask, query.shape[0], key.shape[1])
        return attend_padded(query, key, value, mask, same_tokens=False, **options)

    attention_dispatch._AttentionBackendRegistry.register(member)(attention)


def _key_mask(mask: torch.Tensor, batch: int, seqlen_k: int) -> torch.Tensor:
    """The (batch, seqlen_k) mask that the same says for every head and query."""
    shape = tuple(mask.shape)
    if mask.dtype != torch.bool:
        raise FeatureError(f"attn_mask: expected dtype bool, got {mask.dtype}")
    if mask.dim() in (3, 4):
        for dim in range(1, mask.dim() - 1):
            if mask.shape[dim] != 1 and mask.stride(dim) != 0:
                raise FeatureError(
                    f"attn_mask: expected the same keys for every query and head, got shape {shape}"
                )
        mask = mask[:, 0, 0] if mask.dim() == 4 else mask[:, 0]
    if mask.dim() not in (1, 2):
        raise FeatureError(f"attn_mask: expected 1 to 4 dimensions, got shape {shape}")
    if mask.dim() == 2 and mask.shape[0] not in (1, batch):
        raise FeatureError(f"attn_mask: expected batch 1 or {batch}, got shape {shape}")
    if mask.shape[-1] != seqlen_k:
        raise FeatureError(f"attn_mask: expected {seqlen_k} keys, got shape {shape}")
    return mask.expand(batch, seqlen_k)


def _member(names: Any) -> Any:
    if NAME in names._value2member_map_:
        return names(NAME)
    for private in ("_member_map_", "_value2member_map_", "_member_names_"):
        if not hasattr(names, private):
            raise ImportError(f"diffusers: expected {private} of {names.__name__}, found none")
    member = str.__new__(names, NAME)
    member._name_ = NAME.upper()
    member._value_ = NAME
    names._member_map_[NAME.upper()] = member
    names._value2member_map_[NAME] = member
    names._member_names_.append(NAME.upper())
    type.__setattr__(names, NAME.upper(), member)
    return member

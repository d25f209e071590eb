"""PyTorch's own attention on our kernels: `scaled_dot_product_attention` and `varlen_attn`.

PyTorch 2.13 and later keep a list of flash attention implementations. `register()` puts us on it,
`torch.nn.attention.activate_flash_attention_impl("triton_fa")` switches us on, for the calls that
PyTorch sends to flash attention.
"""

from __future__ import annotations

from typing import Any

import torch

from triton_fa.api import flash_attn_func, flash_attn_varlen_func
from triton_fa.integrations import FeatureError, FrameworkVersionError, require

NAME = "triton_fa"
# The CPU has no such kernel of its own, and calls it for `varlen_attn` alone.
_DISPATCH_KEYS = ("CUDA", "CPU")


class _Active:
    """Our kernels in PyTorch's dispatcher, until they are removed."""

    def __init__(self) -> None:
        self._library: torch.library.Library | None = torch.library.Library("aten", "IMPL")
        for key in _DISPATCH_KEYS:
            self._library.impl("_flash_attention_forward", _forward, key)
            self._library.impl("_flash_attention_forward_no_dropout_inplace", _forward_into, key)
            self._library.impl("_flash_attention_backward", _no_backward, key)
        self._library.impl("_scaled_dot_product_flash_attention", _dense, "CUDA")
        self._library.impl("_scaled_dot_product_flash_attention_backward", _no_backward, "CUDA")

    def remove(self) -> None:
        """Give PyTorch its own kernels back."""
        if self._library is not None:
            self._library._destroy()
        self._library = None


def register() -> None:
    """Make "triton_fa" known to `torch.nn.attention.activate_flash_attention_impl`.

    Raises:
        FrameworkVersionError: this PyTorch has no such list; 2.13 has.
    """
    require("torch", ">=2.13")
    attention: Any = torch.nn.attention
    if not hasattr(attention, "register_flash_attention_impl"):  # a build from before 2.13 was out
        raise FrameworkVersionError(
            f"torch: expected >=2.13, found {torch.__version__}, a build before"
        )
    attention.register_flash_attention_impl(NAME, register_fn=_Active)


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_seq_q: torch.Tensor | None,
    cum_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """`aten::_flash_attention_forward`: (batch, seqlen, heads, head_dim), or packed."""
    if dropout_p:
        raise FeatureError(f"dropout_p: expected 0, got {dropout_p}")
    if return_debug_mask:
        raise FeatureError("return_debug_mask: expected False, got True")
    if alibi_slopes is not None:
        raise FeatureError("alibi_slopes: expected None, got a tensor")
    options: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": is_causal,
        "window_size": (window_size_left, window_size_right),
        "num_splits": num_splits or 0,
        "out": out,
        "return_lse": True,
    }
    if cum_seq_q is None:
        if seqused_k is not None or block_table is not None:
            raise FeatureError("seqused_k, block_table: expected cum_seq_q with them")
        result, lse = flash_attn_func(query, key, value, **options)[:2]
    else:
        result, lse = flash_attn_varlen_func(
            query,
            key,
            value,
            cum_seq_q,
            # The table and the lengths say where keys are.
            None if block_table is not None else cum_seq_k,
            max_q,
            max_k,
            seqused_k=seqused_k,
            page_table=block_table,
            **options,
        )[:2]
    rng_state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    unused = torch.zeros((), dtype=torch.uint64, device=query.device)
    return result, lse, rng_state, unused, query.new_empty(0)


def _forward_into(out: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
    """`aten::_flash_attention_forward_no_dropout_inplace`."""
    return _forward(*arguments, **options, out=out)[1]


def _no_backward(*_: Any, **__: Any) -> None:
    raise FeatureError("backward: expected a forward pass only; use torch.no_grad() or detach()")


def _dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """`aten::_scaled_dot_product_flash_attention`: (batch, heads, seqlen, head_dim)."""
    max_q, max_k = query.shape[2], key.shape[2]
    out = torch.empty_like(query)  # callers count on the query's strides
    _, lse, rng_state, unused, debug = _forward(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        None,
        None,
        max_q,
        max_k,
        dropout_p,
        is_causal,
        return_debug_mask,
        scale=scale,
        out=out.transpose(1, 2),
    )
    return out, lse, None, None, max_q, max_k, rng_state, unused, debug

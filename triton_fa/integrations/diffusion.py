"""An attention layer for diffusion engines, by the interface of SGLang's `FlashAttentionImpl`.

Everything a call depends on is passed to it: there is no look-up of a current request or context.
The metadata that a caller passes stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from triton_fa.api import flash_attn_varlen_func


@dataclass
class FlashAttentionMetadata:
    """What an engine knows of the lengths; None is taken from the tensors of each call."""

    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None


class FlashAttentionImpl:
    """Attention of one layer: (batch, seqlen, heads, head_dim) in, the same out."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        causal: bool,
        softmax_scale: float,
        num_kv_heads: int | None = None,
        prefix: str = "",
        is_cross_attention: bool = False,
        *,
        ver: int | str | None = None,
        **extra_impl_args: Any,
    ) -> None:
        """Take down what is the same for each call.

        Args:
            num_heads: Query heads.
            head_size: Head size.
            causal: Whether a query sees keys up to its own position only.
            softmax_scale: Multiplies the scores.
            num_kv_heads: Key heads; None: as many as query heads.
            prefix: The layer's name.
            is_cross_attention: Whether keys are other tokens than queries; makes no difference.
            ver: As of the attention functions.
            **extra_impl_args: Settings of other implementations.
        """
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.ver = ver

    def preprocess_qkv(self, qkv: torch.Tensor, attn_metadata: object) -> torch.Tensor:
        """Nothing to do before."""
        return qkv

    def postprocess_output(self, output: torch.Tensor, attn_metadata: object) -> torch.Tensor:
        """Nothing to do after."""
        return output

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: Any = None,
        *,
        return_softmax_lse: bool = False,
    ) -> Any:
        """Attention of a dense batch, or of packed sequences where the metadata has their lengths.

        Args:
            query: (batch, seqlen_q, heads_q, head_dim).
            key: (batch, seqlen_k, heads_kv, head_dim).
            value: As key.
            attn_metadata: `FlashAttentionMetadata`, or any object with some of its attributes.
            return_softmax_lse: Also return the (batch, heads_q, seqlen_q) log-sum-exp.

        Returns:
            out, or (out, lse).
        """
        return self._attend(query, key, value, attn_metadata, return_lse=return_softmax_lse)

    def forward_into(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor | None,
        attn_metadata: Any = None,
    ) -> bool:
        """As `forward`, into `out`; whether that can be done: always."""
        if out is not None:
            self._attend(query, key, value, attn_metadata, out=out)
        return True

    def forward_varlen(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        cu_seqlens_host: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        """Attention of packed sequences, (tokens, heads, head_dim), on keys of the same lengths."""
        lengths = FlashAttentionMetadata(max_seqlen, max_seqlen, cu_seqlens, cu_seqlens)
        out: torch.Tensor = self._attend(query, key, value, lengths)
        return out

    def forward_ring_kv_chunk(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens, heads, head_dim) against one chunk of all keys: out and (heads, tokens) lse."""
        out, lse = flash_attn_varlen_func(
            query[None],
            key[None],
            value[None],
            None,
            None,
            softmax_scale=self.softmax_scale,
            num_splits=0,
            return_softmax_lse=True,
            ver=self.ver,
        )[:2]
        return out[0], lse[0]

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        metadata: Any,
        *,
        out: torch.Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        max_q = getattr(metadata, "max_seqlen_q", None)
        max_k = getattr(metadata, "max_seqlen_k", None)
        tokens = -3  # the dimension of tokens, with a batch before it or not
        result = flash_attn_varlen_func(
            query,
            key,
            value,
            getattr(metadata, "cu_seqlens_q", None),
            getattr(metadata, "cu_seqlens_k", None),
            query.shape[tokens] if max_q is None else max_q,
            key.shape[tokens] if max_k is None else max_k,
            softmax_scale=self.softmax_scale,
            causal=self.causal,
            num_splits=0,
            return_softmax_lse=return_lse,
            ver=self.ver,
            out=out,
        )
        return result[:2] if return_lse else result

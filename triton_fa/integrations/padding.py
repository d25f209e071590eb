"""Batches padded to one length, computed as packed sequences."""

from __future__ import annotations

from typing import Any

import torch

from triton_fa.integrations.torch_library import call


def attend_padded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    *,
    same_tokens: bool,
    **options: Any,
) -> torch.Tensor:
    """Attention of a padded batch; waits for the device, because the mask decides the shapes.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim).
        k: (batch, seqlen_k or more, heads_kv, head_dim).
        v: As k.
        mask: (batch, seqlen_k): which keys count.
        same_tokens: Whether the queries are the last of the keys' tokens, as causal masks and
            windows take them to be: padding then has no query. Else every query counts.
        **options: The other arguments of `flash_attn_varlen_func`.

    Returns:
        (batch, seqlen_q, heads_q, head_dim_v); rows of padding are 0.
    """
    batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], mask.shape[1]
    mask = mask.bool()
    k_rows, cu_seqlens_k = _unpadded(mask)
    q_rows, cu_seqlens_q = _unpadded(
        mask[:, -seqlen_q:] if same_tokens else mask.new_ones(batch, seqlen_q)
    )
    packed = call(
        "flash_attn_varlen_func",
        q.flatten(0, 1)[q_rows],
        *(x[:, :seqlen_k].flatten(0, 1)[k_rows] for x in (k, v)),
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=seqlen_q,
        max_seqlen_k=seqlen_k,
        **options,
    )
    out: torch.Tensor = packed.new_zeros(batch * seqlen_q, *packed.shape[1:])
    out[q_rows] = packed
    return out.view(batch, seqlen_q, *packed.shape[1:])


def _unpadded(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of the tokens that count, and the prefix sums of each row's."""
    lengths = mask.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return mask.flatten().nonzero().flatten(), torch.nn.functional.pad(lengths, (1, 0))

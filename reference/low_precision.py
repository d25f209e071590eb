"""The same attention as plain PyTorch does it in the inputs' own dtype: the error baseline.

This is what FlashAttention's tests call `pt`: attention_ref with upcast=False and
reorder_ops=True. Scores are rounded to the input dtype (the scale is on k), the softmax runs in
float32 inside and is rounded to the input dtype, and so is the product with v.
"""

import torch

from reference.attention import Rules, Tensor, row_blocks, visible_keys
from reference.float8 import is_float8
from reference.rotary import rotate

WEIGHTS_SIZE = 2.0**8  # of a float8 weight of 1: the largest is 448


def attend_low_precision(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rules: Rules,
    sinks: Tensor | None = None,
    qv: Tensor | None = None,
    weights_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one sequence in the dtype of q; shapes as in `reference.attention.attend`.

    `weights_dtype` is what the weights are rounded to besides, before they meet v: `attention_ref`
    calls it intermediate_dtype, and has it be float8_e4m3fn where the inputs are. They are larger
    by WEIGHTS_SIZE then, as in FA3's kernel: without it the weights of some hundred keys round to
    nothing, and anything would be within a multiple of that error.
    """
    seqlen_q, heads_q, _ = q.shape
    seqlen_k, heads_kv, head_dim_v = v.shape
    group = heads_q // heads_kv
    out = torch.empty(seqlen_q, heads_q, head_dim_v, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads_q, seqlen_q, dtype=torch.float32, device=q.device)

    for lo, hi in row_blocks(seqlen_q, group * seqlen_k):
        visible = visible_keys(torch.arange(lo, hi, device=q.device), seqlen_q, seqlen_k, rules)
        for kv_head in range(heads_kv):
            heads = slice(kv_head * group, (kv_head + 1) * group)
            k_scaled = k[:, kv_head] * rules.softmax_scale
            scores = torch.einsum("qgd,kd->gqk", q[lo:hi, heads], k_scaled)
            if qv is not None:
                qv_scaled = qv[lo:hi, heads] * rules.softmax_scale
                scores = scores + torch.einsum("qgd,kd->gqk", qv_scaled, v[:, kv_head])
            if rules.softcap > 0:
                scores = torch.tanh(scores / rules.softcap) * rules.softcap
            scores = scores.masked_fill(~visible, -torch.inf)

            log_sum = torch.logsumexp(scores.float(), dim=-1)
            if sinks is None:
                weights = torch.softmax(scores, dim=-1)
            else:
                log_sum = torch.logaddexp(log_sum, sinks[heads, None].float())
                weights = torch.exp(scores.float() - log_sum[..., None]).to(v.dtype)
            weights = weights.masked_fill(~visible, 0.0)
            if weights_dtype is not None:
                weights = (weights * WEIGHTS_SIZE).to(weights_dtype).to(v.dtype) / WEIGHTS_SIZE

            out[lo:hi, heads] = torch.einsum("gqk,kd->qgd", weights, v[:, kv_head])
            lse[heads, lo:hi] = log_sum
    return out, lse


def rotate_low_precision(
    x: Tensor, tables: tuple[Tensor, Tensor], positions: Tensor, interleaved: bool
) -> Tensor:
    """The same rotation in float32, in which every backend computes it, whatever x is."""
    return rotate(x, tables, positions, interleaved, torch.float32)


def dequantise_low_precision(x: Tensor, factors: Tensor, like: Tensor) -> Tensor:
    """The same numbers rounded to the dtype of the queries, or to bfloat16 where that is float8."""
    dtype = torch.bfloat16 if is_float8(like) else like.dtype
    return (x.float() * factors).to(dtype)

"""The same attention as plain PyTorch does it in the inputs' own dtype: the error baseline.

This is what FlashAttention's tests call `pt`: attention_ref with upcast=False and
reorder_ops=True. Scores are rounded to the input dtype (the scale is on k), the softmax runs in
float32 inside and is rounded to the input dtype, and so is the product with v.
"""

import torch

from reference.attention import Rules, Tensor, row_blocks, visible_keys


def attend_low_precision(
    q: Tensor, k: Tensor, v: Tensor, rules: Rules, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of one sequence in the dtype of q; shapes as in `reference.attention.attend`."""
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

            out[lo:hi, heads] = torch.einsum("gqk,kd->qgd", weights, v[:, kv_head])
            lse[heads, lo:hi] = log_sum
    return out, lse

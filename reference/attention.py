"""Attention of one sequence in float64, written to be judged correct by reading it."""

from typing import NamedTuple

import torch

Tensor = torch.Tensor

# Query rows are taken in blocks so that one block of float64 scores stays near half a gigabyte.
MAX_SCORES_IN_MEMORY = 2**26


class Rules(NamedTuple):
    """What changes the scores of a call; a window side of None is unbounded."""

    softmax_scale: float
    causal: bool = False
    window_left: int | None = None
    window_right: int | None = None
    softcap: float = 0.0
    attention_chunk: int = 0  # 0: none


def rules(
    head_dim: int,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int | None, int | None],
    softcap: float,
    attention_chunk: int | None = 0,
) -> Rules:
    """Read the public arguments: default scale head_dim**-0.5, a negative window side is None."""
    left, right = (None if side is None or side < 0 else side for side in window_size)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    return Rules(scale, causal, left, right, softcap, attention_chunk or 0)


def visible_keys(rows: Tensor, seqlen_q: int, seqlen_k: int, rules: Rules) -> Tensor:
    """Which keys each query row may see, as booleans [len(rows), seqlen_k].

    Masks are aligned bottom-right: the last query row sits at the position of the last key. With
    an attention_chunk a row sees the keys of its own chunk only; rows before the first key are in
    chunks of negative numbers.
    """
    position = rows[:, None] + (seqlen_k - seqlen_q)
    key = torch.arange(seqlen_k, device=rows.device)[None, :]
    visible = torch.ones(len(rows), seqlen_k, dtype=torch.bool, device=rows.device)
    if rules.causal:
        visible &= key <= position
    if rules.window_left is not None:
        visible &= key >= position - rules.window_left
    if rules.window_right is not None:
        visible &= key <= position + rules.window_right
    if rules.attention_chunk > 0:
        visible &= key // rules.attention_chunk == position // rules.attention_chunk
    return visible


def row_blocks(seqlen_q: int, scores_per_row: int) -> list[tuple[int, int]]:
    """Cut the query rows into consecutive blocks (first, last + 1)."""
    step = max(1, MAX_SCORES_IN_MEMORY // max(1, scores_per_row))
    return [(lo, min(lo + step, seqlen_q)) for lo in range(0, seqlen_q, step)]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rules: Rules,
    sinks: Tensor | None = None,
    qv: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one sequence, in float64.

    q is (seqlen_q, heads_q, head_dim), k is (seqlen_k, heads_kv, head_dim) and v is
    (seqlen_k, heads_kv, head_dim_v). Query heads are grouped: consecutive heads_q / heads_kv of
    them read one kv head. With qv, (seqlen_q, heads_q, head_dim_v), a score is q·k + qv·v. A sink
    is one more logit of a head whose value is zero; it is neither
    scaled nor capped. Returns out (seqlen_q, heads_q, head_dim_v) and the natural-log lse
    (heads_q, seqlen_q). A row that sees no key gets out 0 and lse -inf (with a sink: the sink).
    """
    seqlen_q, heads_q, _ = q.shape
    seqlen_k, heads_kv, head_dim_v = v.shape
    group = heads_q // heads_kv
    out = torch.empty(seqlen_q, heads_q, head_dim_v, dtype=torch.float64, device=q.device)
    lse = torch.empty(heads_q, seqlen_q, dtype=torch.float64, device=q.device)

    for lo, hi in row_blocks(seqlen_q, group * seqlen_k):
        visible = visible_keys(
            torch.arange(lo, hi, device=q.device), seqlen_q, seqlen_k, rules
        )  # [rows, seqlen_k]
        for kv_head in range(heads_kv):
            heads = slice(kv_head * group, (kv_head + 1) * group)
            q_block = q[lo:hi, heads].double()  # [rows, group, head_dim]
            k_head = k[:, kv_head].double()  # [seqlen_k, head_dim]
            v_head = v[:, kv_head].double()  # [seqlen_k, head_dim_v]

            scores = torch.einsum("qgd,kd->gqk", q_block, k_head)
            if qv is not None:
                scores += torch.einsum("qgd,kd->gqk", qv[lo:hi, heads].double(), v_head)
            scores *= rules.softmax_scale
            if rules.softcap > 0:
                scores = rules.softcap * torch.tanh(scores / rules.softcap)
            scores = scores.masked_fill(~visible, -torch.inf)

            log_sum = torch.logsumexp(scores, dim=-1)  # [group, rows], -inf for an empty row
            if sinks is not None:
                log_sum = torch.logaddexp(log_sum, sinks[heads, None].double())
            # An empty row is -inf - -inf = NaN here; the mask makes it zero.
            weights = torch.exp(scores - log_sum[..., None]).masked_fill(~visible, 0.0)

            out[lo:hi, heads] = torch.einsum("gqk,kd->qgd", weights, v_head)
            lse[heads, lo:hi] = log_sum
    return out, lse

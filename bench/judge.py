"""Is a timed output right? A float32 computation in little memory, and one comparison.

This is a gate against timing a wrong answer, not a measure of accuracy: the harness in
``parity_tests`` judges that against float64. It shares nothing with the package.
"""

import math
from collections.abc import Iterator

import torch

from bench.counters import bounds
from bench.inputs import Inputs

# Largest deviation allowed within one (token, head), relative to that row's largest value. bf16
# rounding of p and of out accounts for about 0.006 on either side; FA3's fast tanh adds to it.
BUDGET = 0.02
SOFTCAP_BUDGET = 0.04
# Elements of the score matrix computed at a time.
SCORE_ELEMENTS = 2**27


def keys_of(inputs: Inputs, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of one sequence, [keys, heads_kv, dim], float32."""
    row, length = inputs.row, inputs.row.k_lens[index]
    if inputs.page_table is not None:
        assert row.page_size is not None
        pages = inputs.page_table[index, : -(-length // row.page_size)].long()
        k, v = (x[pages].flatten(0, 1)[:length].float() for x in (inputs.k, inputs.v))
        return k, v
    if row.dense:
        return inputs.k[index].float(), inputs.v[index].float()
    start = sum(row.k_lens[:index])
    k, v = (x[start : start + length].float() for x in (inputs.k, inputs.v))
    return k, v


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: int, inputs: Inputs
) -> torch.Tensor:
    """Attention of queries [n, heads, dim], of which the first sits at key position ``first``."""
    row = inputs.row
    left, right = bounds(row)
    n, heads, dim = q.shape
    low = 0 if left is None else max(0, first - left)
    high = len(k) if right is None else max(low, min(len(k), first + n + right))
    k, v = k[low:high], v[low:high]
    grouped = q.float().unflatten(1, (row.heads.kv, -1))  # [n, heads_kv, group, dim]
    scores = torch.einsum("nhgd,khd->hgnk", grouped, k) * dim**-0.5
    if row.softcap:
        scores = row.softcap * torch.tanh(scores / row.softcap)
    distance = (
        torch.arange(low, high, device=q.device)
        - (torch.arange(first, first + n, device=q.device)[:, None])
    )
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left is not None:
        hidden |= distance < -left
    if right is not None:
        hidden |= distance > right
    scores.masked_fill_(hidden, -math.inf)
    if inputs.sinks is not None:
        sink = inputs.sinks.float().view(row.heads.kv, -1, 1, 1).expand(-1, -1, n, 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    weights = torch.nan_to_num(weights)  # a row that sees no key
    return torch.einsum("hgnk,khd->nhgd", weights, v).reshape(n, heads, -1)


def expected(inputs: Inputs) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(first packed row, past the last, out of these rows) for every piece of the output."""
    row = inputs.row
    q = inputs.q.flatten(0, 1) if row.dense else inputs.q
    start = 0
    for index, (q_len, k_len) in enumerate(zip(row.q_lens, row.k_lens, strict=True)):
        k, v = keys_of(inputs, index)
        step = max(1, SCORE_ELEMENTS // max(1, row.heads.q * k_len))
        for i in range(0, q_len, step):
            n = min(step, q_len - i)
            piece = q[start + i : start + i + n]
            yield start + i, start + i + n, attend(piece, k, v, i + k_len - q_len, inputs)
        start += q_len


def deviation(out: torch.Tensor, want: torch.Tensor) -> float:
    """Largest |out - want| within a (token, head), over that row's largest |want|."""
    if want.numel() == 0:
        return 0.0
    want = want.float()
    apart = (out.float() - want).abs().amax(-1)
    scale = want.abs().amax(-1).clamp_min(1e-6)
    worst = float((apart / scale).amax())
    return math.inf if math.isnan(worst) else worst


def budget(inputs: Inputs) -> float:
    return SOFTCAP_BUDGET if inputs.row.softcap else BUDGET


def judge(inputs: Inputs, out: torch.Tensor, peer: torch.Tensor | None = None) -> float:
    """Deviation of ``out`` from ``peer``'s output, or from float32 attention without a peer."""
    out = out.flatten(0, -3)
    if peer is not None:
        return deviation(out, peer.flatten(0, -3))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return max(deviation(out[a:b], want) for a, b, want in expected(inputs))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before

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
# With float8 queries FA3 rounds the weights to e4m3, too: each by up to 2**-4 of itself, in the
# mean square by 2**-4 / 3**0.5 times the root of the mean of 1 / m**2 over mantissas m in [1, 2),
# which is 0.5**0.5: 0.026. Keys add up with random signs, so that is also the error of a number of
# the output, as a part of the typical size of its row. Among 16384 x 32 rows of 128 such numbers
# the largest of 7e7 errors is at 5.5 of it, 0.14, in a row whose own largest number is above 1.6
# typical sizes: below 0.09. Where a row sees two or three keys, 2**-4 times the root of two bounds
# it: 0.09 again. The rest up to 2**-3 is for Hopper's sums of float8 products, which keep fewer
# bits than float32. Ours round no weights so, but are held against FA3.
FLOAT8_BUDGET = 0.125
# Elements of the score matrix computed at a time.
SCORE_ELEMENTS = 2**27


def keys_of(inputs: Inputs, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of one sequence, [keys, heads_kv, dim], float32; new ones as they were given."""
    row = inputs.row
    k, v = stored(inputs, index)
    if row.new:
        old = row.k_lens[index] - row.new
        k[old:] = turned(inputs.options["k"][index].float(), old, inputs)
        v[old:] = inputs.options["v"][index].float()
    for x, name in ((k, "k_descale"), (v, "v_descale")):
        if name in inputs.options:
            x *= inputs.options[name][index, :, None]
    return k, v


def stored(inputs: Inputs, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the memory of K and V holds of one sequence, in float32."""
    row, length = inputs.row, inputs.row.k_lens[index]
    if inputs.page_table is not None:
        assert row.page_size is not None
        pages = inputs.page_table[index, : -(-length // row.page_size)].long()
        k, v = (gathered(x, pages).flatten(0, 1)[:length] for x in (inputs.k, inputs.v))
        return k, v
    if row.dense:
        return inputs.k[index].float(), inputs.v[index].float()
    start = sum(row.k_lens[:index])
    k, v = (x[start : start + length].float() for x in (inputs.k, inputs.v))
    return k, v


def gathered(x: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """Pages in float32; float8 is indexed as bytes, which every version of torch can."""
    if x.dtype.itemsize > 1:
        return x[pages].float()
    return x.view(torch.uint8)[pages].view(x.dtype).float()


def turned(x: torch.Tensor, first: int, inputs: Inputs) -> torch.Tensor:
    """Rows [n, heads, dim] from position `first` on, after the rotary embedding if there is one."""
    if not inputs.row.rotary:
        return x
    rows = slice(first, first + len(x))
    cos, sin = (inputs.options[f"rotary_{name}"][rows, None].float() for name in ("cos", "sin"))
    if inputs.row.rotary == "halves":
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def queries_of(inputs: Inputs, index: int) -> torch.Tensor:
    """Q of one sequence, [queries, heads, dim], float32."""
    row = inputs.row
    if row.dense:
        return inputs.q[index].float()
    start = sum(row.q_lens[:index])
    rows = slice(start, start + row.q_lens[index])
    q = turned(inputs.q[rows].float(), row.k_lens[index] - row.new, inputs)
    if "q_descale" in inputs.options:
        of_heads = inputs.options["q_descale"][index].repeat_interleave(row.heads.q // row.heads.kv)
        q = q * of_heads[:, None]
    if "qv" in inputs.options:
        q = torch.cat([q, inputs.options["qv"][rows].float()], dim=-1)
    return q


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
    grouped = q.unflatten(1, (row.heads.kv, -1))  # [n, heads_kv, group, dim]
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
    if row.phase == "combine":
        parts, shares = inputs.options["out_partial"], inputs.options["lse_partial"].softmax(0)
        yield 0, sum(row.q_lens), torch.einsum("sbth,sbthd->bthd", shares, parts).flatten(0, 1)
        return
    start = 0
    for index, (q_len, k_len) in enumerate(zip(row.q_lens, row.k_lens, strict=True)):
        q = queries_of(inputs, index)
        k, v = keys_of(inputs, index)
        if row.latent:
            k = torch.cat([k, v], dim=-1)
        step = max(1, SCORE_ELEMENTS // max(1, row.heads.q * k_len))
        for i in range(0, q_len, step):
            n = min(step, q_len - i)
            yield start + i, start + i + n, attend(q[i : i + n], k, v, i + k_len - q_len, inputs)
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


def appended(inputs: Inputs) -> float:
    """Deviation of the new keys and values in the cache from what a call has to write there."""
    worst = 0.0
    for index, length in enumerate(inputs.row.k_lens):
        new = slice(length - inputs.row.new, length)
        for found, want in zip(stored(inputs, index), keys_of(inputs, index), strict=True):
            worst = max(worst, deviation(found[new], want[new]))
    return worst


def budget(inputs: Inputs) -> float:
    if inputs.row.dtype.startswith("float8"):
        return FLOAT8_BUDGET
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

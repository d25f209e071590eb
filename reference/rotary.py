"""Rotary embedding of new keys and queries, from tables of cosines and sines."""

import torch

from reference.attention import Tensor


def rotate(
    x: Tensor,
    tables: tuple[Tensor, Tensor],
    positions: Tensor,
    interleaved: bool,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Rotate the leading dims of x, (tokens, heads, head_dim), by the angles of their positions.

    The tables are cos and sin, (positions, rotary_dim / 2) each; positions behind their last row
    use that row. Pair m of dims (a, b) becomes (a cos - b sin, a sin + b cos) of angle m, where the
    pairs are dims (2m, 2m + 1) if interleaved, else (m, m + rotary_dim / 2). It is computed in
    `dtype` and rounded to the dtype of x, which is what a cache stores and what a query is.
    """
    cos, sin = (table[positions.clamp(max=len(table) - 1), None].to(dtype) for table in tables)
    half = cos.shape[-1]
    pair = torch.arange(half, device=x.device)
    first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
    a, b = x[..., first].to(dtype), x[..., second].to(dtype)
    rotated = x.clone()
    rotated[..., first] = (a * cos - b * sin).to(x.dtype)
    rotated[..., second] = (a * sin + b * cos).to(x.dtype)
    return rotated

"""Merging attention over parts of the keys, by the log-sum-exp of each part.

A part without any key has lse -inf (or FA3's +inf) and weight 0: what its output holds, NaN
included, is never read.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from triton_fa.checks import (
    require_device,
    require_dtype,
    require_no_grad,
    require_rank,
    require_shape,
    require_tensor,
)
from triton_fa.device import runs_triton
from triton_fa.errors import ArgumentError, ArgumentTypeError

MAX_SPLITS = 256
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def flash_attn_combine(
    out_partial: torch.Tensor,
    lse_partial: torch.Tensor,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge partial results over splits of the keys.

    Args:
        out_partial: (splits, batch, seqlen, heads, head_dim) float32, or (splits, total, heads,
            head_dim) for packed sequences. At most 256 splits, any head_dim, any strides.
        lse_partial: (splits, batch, seqlen, heads) or (splits, total, heads) float32, any strides.
        out: Buffer of out_partial's shape without splits, to write to.
        out_dtype: float16, bfloat16 or float32; default that of out, else float32.

    Returns:
        out, and lse: float32, (batch, seqlen, heads) as a view of a (batch, heads, seqlen) buffer,
        or (total, heads) as a view of (heads, total). Rows that are empty in every split give
        0 and -inf.

    Raises:
        ArgumentError, ArgumentTypeError: bad input.
    """
    require_tensor("out_partial", out_partial)
    require_tensor("lse_partial", lse_partial)
    if out_partial.dim() not in (4, 5):
        raise ArgumentError(
            "out_partial: expected 4 or 5 dimensions ([splits, batch, seqlen, heads, head_dim] or "
            f"[splits, total, heads, head_dim]), got shape {tuple(out_partial.shape)}"
        )
    require_dtype("out_partial", out_partial, (torch.float32,))
    require_dtype("lse_partial", lse_partial, (torch.float32,))
    require_shape("lse_partial", lse_partial, out_partial.shape[:-1])
    require_device("lse_partial", lse_partial, out_partial.device, "out_partial")
    if out_partial.shape[0] > MAX_SPLITS:
        raise ArgumentError(
            f"out_partial: expected at most {MAX_SPLITS} splits, got {out_partial.shape[0]}"
        )
    if out_dtype is not None and not isinstance(out_dtype, torch.dtype):
        raise ArgumentTypeError(f"out_dtype: expected a dtype, got {type(out_dtype).__name__}")
    if out_dtype not in (None, *FLOAT_DTYPES):
        raise ArgumentError(f"out_dtype: expected float16, bfloat16 or float32, got {out_dtype}")
    if out is not None:
        require_tensor("out", out)
        require_dtype("out", out, FLOAT_DTYPES if out_dtype is None else (out_dtype,))
        require_shape("out", out, out_partial.shape[1:])
        require_device("out", out, out_partial.device, "out_partial")
    require_no_grad({"out_partial": out_partial, "lse_partial": lse_partial, "out": out})

    rows = lse_partial.shape[1:]  # (batch, seqlen, heads) or (total, heads)
    if out is None:
        dtype = torch.float32 if out_dtype is None else out_dtype
        out = out_partial.new_empty(out_partial.shape[1:], dtype=dtype)
    lse = lse_partial.new_empty((*rows[:-2], rows[-1], rows[-2])).transpose(-1, -2)
    kernels = _kernels(out_partial.device)
    if kernels is None:
        merged, total = _merge(out_partial, lse_partial)
        out.copy_(merged)
        lse.copy_(total)
    elif out.dim() == 3:  # packed: a batch of one
        parts = out_partial.unsqueeze(1), lse_partial.unsqueeze(1)
        kernels.merge_splits(*parts, out.unsqueeze(0), lse.unsqueeze(0))
    else:
        kernels.merge_splits(out_partial, lse_partial, out, lse)
    return out, lse


def merge_state(
    v_a: torch.Tensor,
    s_a: torch.Tensor,
    v_b: torch.Tensor,
    s_b: torch.Tensor,
    v_merged: torch.Tensor | None = None,
    s_merged: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two results over disjoint sets of keys.

    Two empty states merge to 0 and -inf; an lse of +inf is taken for -inf.

    Args:
        v_a: (tokens, heads, head_dim_v) in float16, bfloat16 or float32.
        s_a: (tokens, heads) float32: the natural-log lse of v_a. An lse of (heads, tokens), as
            the attention functions return it, is passed transposed; its strides do not matter.
        v_b: As v_a.
        s_b: As s_a.
        v_merged: Buffer like v_a to write to; it may be v_a or v_b itself.
        s_merged: Buffer like s_a to write to; it may be s_a or s_b itself.

    Returns:
        The merged output in v_a's dtype, and its lse.

    Raises:
        ArgumentError, ArgumentTypeError: bad input.
    """
    require_tensor("v_a", v_a)
    require_rank("v_a", v_a, 3, "(tokens, heads, head_dim_v)")
    require_dtype("v_a", v_a, FLOAT_DTYPES)
    states = {"v_a": v_a, "v_b": v_b, "v_merged": v_merged}
    sums = {"s_a": s_a, "s_b": s_b, "s_merged": s_merged}
    for values, dtype, shape in (
        (states, v_a.dtype, v_a.shape),
        (sums, torch.float32, v_a.shape[:-1]),
    ):
        for name, value in values.items():
            if value is None and name.endswith("_merged"):
                continue
            tensor = require_tensor(name, value)
            require_dtype(name, tensor, (dtype,))
            require_shape(name, tensor, shape)
            require_device(name, tensor, v_a.device, "v_a")
    require_no_grad(states | sums)

    kernels = _kernels(v_a.device)
    if v_merged is None:
        v_merged = torch.empty_like(v_a)
    if s_merged is None:
        s_merged = torch.empty_like(s_a)
    if kernels is not None:
        kernels.merge_pair(v_a, s_a, v_b, s_b, v_merged, s_merged)
        return v_merged, s_merged
    merged, lse = _merge(torch.stack((v_a.float(), v_b.float())), torch.stack((s_a, s_b)))
    return v_merged.copy_(merged), s_merged.copy_(lse)


def _kernels(device: torch.device) -> Any:
    """The module that merges with Triton where it runs; PyTorch does elsewhere."""
    if not runs_triton(device):
        return None
    try:
        return importlib.import_module("triton_fa.kernels.merge")
    except ImportError:
        return None


def _merge(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Parts in the first dimension: lse = logsumexp(lse_i), out = sum of exp(lse_i - lse) out_i."""
    lse = lse.masked_fill(lse == torch.inf, -torch.inf)
    total = torch.logsumexp(lse, 0)
    # An all-empty row would otherwise compute -inf - (-inf).
    weights = torch.exp(lse - total.masked_fill(total == -torch.inf, 0.0)).unsqueeze(-1)
    # An empty part never wrote its rows, and 0 * garbage is not 0.
    written = out.masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0)
    return (weights * written).sum(0), total

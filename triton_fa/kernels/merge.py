"""Merges results over disjoint sets of keys that the caller holds, by their log-sum-exp.

out = sum of exp(lse_i - lse) out_i with lse = log(sum of exp(lse_i)). A part without any key has
lse -inf (or FA3's +inf) and weight 0; what its output holds is never read.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

from triton_fa.kernels.primitives import LOG2E, NEG_INF
from triton_fa.schedule.tiles import next_power_of_2

HELD = 8192
"""Elements of one result that a program merging two holds at once."""
MANY = 1 << 20
"""Elements of a result from which on there are programs enough for a chip."""
ROWS = ("seqlen", "heads", "num_rows", "splits")


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@triton.jit
def log_sums(ptr, offsets, mask):
    """Natural-log sums in base 2, empty ones -inf."""
    lse = tl.load(ptr + offsets, mask=mask, other=NEG_INF) * LOG2E
    return tl.where(lse == -NEG_INF, NEG_INF, lse)


@triton.jit
def finite(top):
    """What exponents are relative to: a maximum, or 0 of nothing, as -inf - (-inf) is NaN."""
    return tl.where(top == NEG_INF, 0.0, top)


@triton.jit
def merge_weights(before, highest, lse):
    """(maximum, weight of the sums so far, weights of what `lse` belongs to).

    `before` was the maximum so far, `highest` is that of `lse`, all in base 2.
    """
    top = tl.maximum(before, highest)
    base = finite(top)
    weights = tl.exp2(lse - base)
    return top, tl.exp2(before - base), weights


@triton.jit
def partial_results(ptr, offsets, mask, lse):
    """Partial results, 0 where they are empty. Loading them does not wait for their sums."""
    part = tl.load(ptr + offsets, mask=mask, other=0.0)
    return tl.where((lse > NEG_INF)[:, None], part, 0.0)


@triton.jit(do_not_specialize=ROWS)
def merge_splits_kernel(
    out_ptr,
    lse_ptr,
    part_ptr,  # [splits, batch, seqlen, heads, DIM]
    lse_part_ptr,  # [splits, batch, seqlen, heads]
    out_stride_b,
    out_stride_t,
    out_stride_h,
    out_stride_d,
    lse_stride_b,
    lse_stride_t,
    lse_stride_h,
    part_stride_s,
    part_stride_b,
    part_stride_t,
    part_stride_h,
    part_stride_d,
    lse_part_stride_s,
    lse_part_stride_b,
    lse_part_stride_t,
    lse_part_stride_h,
    seqlen,
    heads,
    num_rows,
    splits,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Program (i, j) merges rows [i BLOCK_R, …) of (batch, token, head), dims [j BLOCK_D, …).

    One row takes BLOCK_P splits at once, several rows take one after the other.
    """
    if BLOCK_R == 1:
        row = tl.program_id(0).to(tl.int64)
    else:
        row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    real = row < num_rows
    head = row % heads
    token = row // heads % seqlen
    batch = row // heads // seqlen
    lse_row = batch * lse_part_stride_b + token * lse_part_stride_t + head * lse_part_stride_h
    part_row = batch * part_stride_b + token * part_stride_t + head * part_stride_h
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (dims < DIM)[None, :]
    wide = (dims.to(tl.int64) * part_stride_d)[None, :]
    if BLOCK_R == 1:
        top = tl.full([], NEG_INF, tl.float32)
        total = tl.full([], 0.0, tl.float32)
        acc = tl.zeros([BLOCK_D], tl.float32)
        for start in tl.range(0, splits, BLOCK_P):
            split = start + tl.arange(0, BLOCK_P).to(tl.int64)
            there = split < splits
            lse = log_sums(lse_part_ptr, split * lse_part_stride_s + lse_row, there)
            offsets = (split * part_stride_s + part_row)[:, None] + wide
            part = partial_results(part_ptr, offsets, there[:, None] & inside, lse)
            top, again, weights = merge_weights(top, tl.max(lse, 0), lse)
            total = total * again + tl.sum(weights, 0)
            acc = acc * again + tl.sum(part * weights[:, None], 0)
        result = acc * tl.where(total > 0, 1.0 / total, 0.0)
        out_row = batch * out_stride_b + token * out_stride_t + head * out_stride_h
        tl.store(
            out_ptr + out_row + dims.to(tl.int64) * out_stride_d,
            result.to(out_ptr.dtype.element_ty),
            mask=dims < DIM,
        )
    else:
        top = tl.full([BLOCK_R], NEG_INF, tl.float32)
        total = tl.zeros([BLOCK_R], tl.float32)
        acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        for start in tl.range(0, splits, BLOCK_P):
            for here in tl.static_range(BLOCK_P):
                split = start + tl.full([BLOCK_R], here, tl.int64)
                there = real & (split < splits)
                lse = log_sums(lse_part_ptr, split * lse_part_stride_s + lse_row, there)
                offsets = (split * part_stride_s + part_row)[:, None] + wide
                part = partial_results(part_ptr, offsets, there[:, None] & inside, lse)
                top, again, weights = merge_weights(top, lse, lse)
                total = total * again + weights
                acc = acc * again[:, None] + part * weights[:, None]
        result = acc * tl.where(total > 0, 1.0 / total, 0.0)[:, None]
        out_row = batch * out_stride_b + token * out_stride_t + head * out_stride_h
        tl.store(
            out_ptr + out_row[:, None] + (dims.to(tl.int64) * out_stride_d)[None, :],
            result.to(out_ptr.dtype.element_ty),
            mask=real[:, None] & inside,
        )
    if tl.program_id(1) == 0:
        lse = tl.where(total > 0, (finite(top) + tl.log2(total)) / LOG2E, NEG_INF)
        target = batch * lse_stride_b + token * lse_stride_t + head * lse_stride_h
        tl.store(lse_ptr + target, lse, mask=real)


def merge_splits(
    out_partial: torch.Tensor, lse_partial: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Fill `out` (batch, seqlen, heads, dim) and `lse` (batch, seqlen, heads), any strides."""
    splits, batch, seqlen, heads, dim = out_partial.shape
    num_rows = batch * seqlen * heads
    if num_rows == 0:
        return
    block_d = min(256, next_power_of_2(dim))
    # One row a program, unless there are rows enough for a chip and few splits of each.
    one_row = splits > 8 or num_rows * block_d <= MANY
    block_r = 1 if one_row else max(2, 2048 // block_d)
    block_p = min(32 if one_row else 8, next_power_of_2(splits))
    grid = (-(-num_rows // block_r), max(1, -(-dim // block_d)))
    with _on(out.device):
        merge_splits_kernel[grid](
            out,
            lse,
            out_partial,
            lse_partial,
            *out.stride(),
            *lse.stride(),
            *out_partial.stride(),
            *lse_partial.stride(),
            seqlen,
            heads,
            num_rows,
            splits,
            DIM=dim,
            BLOCK_D=block_d,
            BLOCK_R=block_r,
            BLOCK_P=block_p,
            num_warps=4,
        )


@triton.jit(do_not_specialize=ROWS)
def merge_pair_kernel(
    out_ptr,
    lse_ptr,
    a_ptr,
    lse_a_ptr,
    b_ptr,
    lse_b_ptr,
    out_stride_t,
    out_stride_h,
    out_stride_d,
    lse_stride_t,
    lse_stride_h,
    a_stride_t,
    a_stride_h,
    a_stride_d,
    lse_a_stride_t,
    lse_a_stride_h,
    b_stride_t,
    b_stride_h,
    b_stride_d,
    lse_b_stride_t,
    lse_b_stride_h,
    heads,
    num_rows,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Rows [i BLOCK_R, …) of (token, head). `out` and `lse` may be those of a part."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    real = row < num_rows
    head = row % heads
    token = row // heads
    lse_a = log_sums(lse_a_ptr, token * lse_a_stride_t + head * lse_a_stride_h, real)
    lse_b = log_sums(lse_b_ptr, token * lse_b_stride_t + head * lse_b_stride_h, real)
    top = tl.maximum(lse_a, lse_b)
    base = finite(top)
    weight_a = tl.exp2(lse_a - base)
    weight_b = tl.exp2(lse_b - base)
    total = weight_a + weight_b
    scale = tl.where(total > 0, 1.0 / total, 0.0)
    dims = tl.arange(0, BLOCK_D)
    wide = dims.to(tl.int64)[None, :]
    inside = (dims < DIM)[None, :]
    a_row = (token * a_stride_t + head * a_stride_h)[:, None]
    b_row = (token * b_stride_t + head * b_stride_h)[:, None]
    a_mask = (real & (lse_a > NEG_INF))[:, None] & inside
    b_mask = (real & (lse_b > NEG_INF))[:, None] & inside
    a = tl.load(a_ptr + a_row + wide * a_stride_d, mask=a_mask, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + b_row + wide * b_stride_d, mask=b_mask, other=0.0).to(tl.float32)
    merged = a * (weight_a * scale)[:, None] + b * (weight_b * scale)[:, None]
    out_row = (token * out_stride_t + head * out_stride_h)[:, None]
    tl.store(
        out_ptr + out_row + wide * out_stride_d,
        merged.to(out_ptr.dtype.element_ty),
        mask=real[:, None] & inside,
    )
    lse = tl.where(total > 0, (base + tl.log2(total)) / LOG2E, NEG_INF)
    tl.store(lse_ptr + token * lse_stride_t + head * lse_stride_h, lse, mask=real)


def merge_pair(
    v_a: torch.Tensor,
    s_a: torch.Tensor,
    v_b: torch.Tensor,
    s_b: torch.Tensor,
    v_merged: torch.Tensor,
    s_merged: torch.Tensor,
) -> None:
    """Fill `v_merged` (tokens, heads, dim) and `s_merged` (tokens, heads), any strides."""
    tokens, heads, dim = v_a.shape
    if tokens * heads == 0:
        return
    block_d = next_power_of_2(dim)
    block_r = max(1, min(64, HELD // block_d))
    grid = (-(-tokens * heads // block_r),)
    with _on(v_a.device):
        merge_pair_kernel[grid](
            v_merged,
            s_merged,
            v_a,
            s_a,
            v_b,
            s_b,
            *v_merged.stride(),
            *s_merged.stride(),
            *v_a.stride(),
            *s_a.stride(),
            *v_b.stride(),
            *s_b.stride(),
            heads,
            tokens * heads,
            DIM=dim,
            BLOCK_D=block_d,
            BLOCK_R=block_r,
            num_warps=4,
        )

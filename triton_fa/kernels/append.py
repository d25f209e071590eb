"""New keys and values into the cache, and the rotation of new keys and queries, before attention.

Programs take a few tokens of one head: of the new keys first, then of q where it is turned.
Whatever the lengths and the page table hold, nothing is written outside the cache: a target that
does not exist is dropped.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_fa.kernels.primitives import VARYING, key_span, new_span, query_span


@triton.jit
def sequence_of(token, cu_seqlens_ptr, batch, BLOCK_B: tl.constexpr):
    """The sequences that packed tokens belong to; `batch` behind the last one."""
    seq_idx = token * 0
    for start in tl.range(0, batch, BLOCK_B, num_stages=1):
        idx = start + tl.arange(0, BLOCK_B)
        ends = tl.load(cu_seqlens_ptr + idx + 1, mask=idx < batch, other=2147483647)
        seq_idx += tl.sum((ends[None, :] <= token[:, None]).to(tl.int32), 1)
    return seq_idx


@triton.jit
def copy_turned(
    source,  # addresses of rows
    target,
    live,
    position,
    rotary,  # (cos pointer or None, sin pointer, positions)
    DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Copy rows of DIM, the leading ROTARY_DIM dims turned: (x, y) to (x c - y s, x s + y c)."""
    dims = tl.arange(0, BLOCK_D)
    rest = live[:, None] & ((dims >= ROTARY_DIM) & (dims < DIM))[None, :]
    kept = tl.load(source[:, None] + dims[None, :], mask=rest, other=0)
    tl.store(target[:, None] + dims[None, :], kept, mask=rest)
    if ROTARY_DIM > 0:
        cos_ptr, sin_ptr, num_positions = rotary
        half = tl.arange(0, BLOCK_R)
        mask = live[:, None] & (half < ROTARY_DIM // 2)[None, :]
        place = tl.minimum(tl.maximum(position, 0), num_positions - 1).to(tl.int64)
        angle = place[:, None] * (ROTARY_DIM // 2) + half[None, :]
        cos = tl.load(cos_ptr + angle, mask=mask, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle, mask=mask, other=0.0).to(tl.float32)
        if INTERLEAVED:
            first = 2 * half
            second = 2 * half + 1
        else:
            first = half
            second = half + ROTARY_DIM // 2
        x = tl.load(source[:, None] + first[None, :], mask=mask, other=0.0).to(tl.float32)
        y = tl.load(source[:, None] + second[None, :], mask=mask, other=0.0).to(tl.float32)
        dtype: tl.constexpr = target.dtype.element_ty
        tl.store(target[:, None] + first[None, :], (x * cos - y * sin).to(dtype), mask=mask)
        tl.store(target[:, None] + second[None, :], (x * sin + y * cos).to(dtype), mask=mask)


@triton.jit(do_not_specialize=VARYING)
def append_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    page_table_ptr,
    cu_seqlens_q_ptr,
    seqused_k_ptr,
    cu_seqlens_k_new_ptr,
    batch_idx_ptr,
    k_new_ptr,
    v_new_ptr,
    cos_ptr,
    sin_ptr,
    rotary_seqlens_ptr,
    turned_ptr,  # [total_q, heads_q, HEAD_DIM]: q turned
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    k_new_stride_b,
    k_new_stride_t,
    k_new_stride_h,
    v_new_stride_b,
    v_new_stride_t,
    v_new_stride_h,
    table_stride,
    batch,
    total_q,
    total_new,
    fixed_seqlen_q,
    fixed_seqlen_k,
    max_seqlen_k,
    fixed_seqlen_new,
    num_rows,
    num_pages,
    num_positions,
    NUM_HEADS_KV: tl.constexpr,
    NUM_HEADS_Q: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    MOVING: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Program (tokens, head). MOVING: query i turns by position p + i, else all of them by p."""
    cached = (
        cu_seqlens_q_ptr,
        None,
        total_q,
        fixed_seqlen_q,
        None,
        seqused_k_ptr,
        0,
        fixed_seqlen_k,
        max_seqlen_k,
        cu_seqlens_k_new_ptr,
        None,  # the length before anything is appended
        None,
    )
    rotary = (cos_ptr, sin_ptr, num_positions)
    new_blocks = (total_new + BLOCK_T - 1) // BLOCK_T
    pid = tl.program_id(0)
    if pid < new_blocks * NUM_HEADS_KV:
        head = pid % NUM_HEADS_KV
        token = pid // NUM_HEADS_KV * BLOCK_T + tl.arange(0, BLOCK_T)
        if cu_seqlens_k_new_ptr is not None:
            seq_idx = sequence_of(token, cu_seqlens_k_new_ptr, batch, BLOCK_B)
            live = (token < total_new) & (seq_idx < batch)
            first_new, count = new_span(seq_idx, live, cached)
            nth = token - first_new
            live &= (nth >= 0) & (nth < count)
        else:
            seq_idx = token // fixed_seqlen_new
            nth = token - seq_idx * fixed_seqlen_new
            live = token < total_new
        _, seqlen_k = key_span(seq_idx, live, cached)
        target = seqlen_k + nth
        position = target
        if rotary_seqlens_ptr is not None:
            position = nth + tl.load(rotary_seqlens_ptr + seq_idx, mask=live, other=0)
        live &= target < max_seqlen_k
        row = seq_idx
        if batch_idx_ptr is not None:
            row = tl.load(batch_idx_ptr + seq_idx, mask=live, other=0)
            live &= (row >= 0) & (row < num_rows)
        slot = target
        if page_table_ptr is not None:
            entry = row.to(tl.int64) * table_stride + target // PAGE_SIZE
            row = tl.load(page_table_ptr + entry, mask=live, other=0)
            live &= (row >= 0) & (row < num_pages)
            slot = target % PAGE_SIZE
        row = row.to(tl.int64)
        slot = slot.to(tl.int64)
        if cu_seqlens_k_new_ptr is not None:
            k_rows = token.to(tl.int64) * k_new_stride_t
            v_rows = token.to(tl.int64) * v_new_stride_t
        else:
            k_rows = seq_idx.to(tl.int64) * k_new_stride_b + nth.to(tl.int64) * k_new_stride_t
            v_rows = seq_idx.to(tl.int64) * v_new_stride_b + nth.to(tl.int64) * v_new_stride_t
        wide_head = head.to(tl.int64)
        copy_turned(
            k_new_ptr + wide_head * k_new_stride_h + k_rows,
            k_ptr + wide_head * k_stride_h + row * k_stride_b + slot * k_stride_t,
            live,
            position,
            rotary,
            HEAD_DIM,
            ROTARY_DIM,
            INTERLEAVED,
            BLOCK_D,
            BLOCK_R,
        )
        copy_turned(
            v_new_ptr + wide_head * v_new_stride_h + v_rows,
            v_ptr + wide_head * v_stride_h + row * v_stride_b + slot * v_stride_t,
            live,
            position,
            rotary,
            HEAD_DIM_V,
            0,
            INTERLEAVED,
            BLOCK_DV,
            BLOCK_R,
        )
    elif ROTARY_DIM > 0:
        pid -= new_blocks * NUM_HEADS_KV
        q_head = (pid % NUM_HEADS_Q).to(tl.int64)
        token = pid // NUM_HEADS_Q * BLOCK_T + tl.arange(0, BLOCK_T)
        if cu_seqlens_q_ptr is not None:
            seq_idx = sequence_of(token, cu_seqlens_q_ptr, batch, BLOCK_B)
            live = (token < total_q) & (seq_idx < batch)
            first_q, _ = query_span(seq_idx, live, cached)
            nth = token - first_q
            q_rows = token.to(tl.int64) * q_stride_t
        else:
            seq_idx = token // fixed_seqlen_q
            nth = token - seq_idx * fixed_seqlen_q
            live = token < total_q
            q_rows = seq_idx.to(tl.int64) * q_stride_b + nth.to(tl.int64) * q_stride_t
        if rotary_seqlens_ptr is not None:
            position = tl.load(rotary_seqlens_ptr + seq_idx, mask=live, other=0)
        else:
            _, position = key_span(seq_idx, live, cached)
        if MOVING:
            position += nth
        copy_turned(
            q_ptr + q_head * q_stride_h + q_rows,
            turned_ptr + (token.to(tl.int64) * NUM_HEADS_Q + q_head) * HEAD_DIM,
            live,
            position,
            rotary,
            HEAD_DIM,
            ROTARY_DIM,
            INTERLEAVED,
            BLOCK_D,
            BLOCK_R,
        )

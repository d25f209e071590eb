"""Attention of sequences whose keys fit one tile: one program for a sequence and kv head.

It reads the keys and values once, for all query rows, which it takes in tiles. In batches of many
short sequences that saves a program for each tile of rows its lengths, its keys and its tail.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_fa.kernels.prefill import load_rows, maximum_with, store_rows, visible_scores
from triton_fa.kernels.primitives import (
    NO_SCORE,
    VARYING,
    dot,
    key_span,
    query_span,
    seen_keys,
    softcapped,
    visible_keys,
)


@triton.jit
def load_tile(
    base,
    stride_t,
    live_keys,  # first and one past the last key that any row sees
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keys or values as [BLOCK_N, BLOCK], zeros where no row sees them."""
    token = tl.arange(0, BLOCK_N)
    live = (token >= live_keys[0]) & (token < live_keys[1])
    dims = tl.arange(0, BLOCK)
    return tl.load(
        base + token.to(tl.int64)[:, None] * stride_t + dims[None, :],
        mask=live[:, None] & (dims < DIM)[None, :],
        other=0,
    )


@triton.jit(do_not_specialize=VARYING)
def short_kernel(
    out_ptr,  # q's shape with head_dim_v
    lse_ptr,  # [heads_q, total_q] or [batch, heads_q, seqlen_q], float32
    q_ptr,  # [total_q, heads_q, head_dim] or [batch, seqlen_q, heads_q, head_dim]
    k_ptr,  # [total_k, heads_kv, head_dim] or [batch, seqlen_k, heads_kv, head_dim]
    v_ptr,  # k's shape with head_dim_v
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    seqused_q_ptr,
    seqused_k_ptr,
    sinks_ptr,
    out_stride_b,
    out_stride_t,
    out_stride_h,
    lse_stride_b,
    lse_stride_t,
    lse_stride_h,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    batch,
    total_q,
    total_k,
    fixed_seqlen_q,
    fixed_seqlen_k,
    max_seqlen_k,
    window_left,
    window_right,
    attention_chunk,
    scale_log2,
    softcap_log2,
    NUM_HEADS_KV: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_LSE: tl.constexpr,
    NEGATE: tl.constexpr,
    IEEE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out = softmax(scale * q k^T + mask) v for all rows of one sequence and kv head.

    Of a sequence with more than BLOCK_N keys, which its bound excludes, those behind are left out.
    """
    HAS_FIRST: tl.constexpr = window_left is not None or attention_chunk is not None
    lengths = (
        cu_seqlens_q_ptr,
        seqused_q_ptr,
        total_q,
        fixed_seqlen_q,
        cu_seqlens_k_ptr,
        seqused_k_ptr,
        total_k,
        fixed_seqlen_k,
        max_seqlen_k,
        None,
        None,
        None,
    )
    windows = (window_left, window_right, attention_chunk)
    pid = tl.program_id(0)
    head = pid % NUM_HEADS_KV
    seq_idx = pid // NUM_HEADS_KV
    first_q, seqlen_q = query_span(seq_idx, seq_idx < batch, lengths)
    first_k, seqlen_k = key_span(seq_idx, seq_idx < batch, lengths)
    seqlen_k = tl.minimum(seqlen_k, BLOCK_N)
    offset = seqlen_k - seqlen_q
    live_keys = visible_keys(0, seqlen_q, offset, 0, seqlen_k, windows)
    seq_idx = seq_idx.to(tl.int64)
    first_q = first_q.to(tl.int64)
    first_k = first_k.to(tl.int64)
    first_head = (head * GROUP).to(tl.int64)
    k_base = k_ptr + first_k * k_stride_t + head.to(tl.int64) * k_stride_h
    v_base = v_ptr + first_k * v_stride_t + head.to(tl.int64) * v_stride_h
    if cu_seqlens_k_ptr is None:
        k_base += seq_idx * k_stride_b
        v_base += seq_idx * v_stride_b
    k = load_tile(k_base, k_stride_t, live_keys, HEAD_DIM, BLOCK_N, BLOCK_D)
    v = load_tile(v_base, v_stride_t, live_keys, HEAD_DIM_V, BLOCK_N, BLOCK_DV)
    q_base = (
        q_ptr + seq_idx * q_stride_b + first_q * q_stride_t + first_head * q_stride_h,
        q_stride_t,
        q_stride_h,
    )
    out_base = (
        out_ptr + seq_idx * out_stride_b + first_q * out_stride_t + first_head * out_stride_h,
        out_stride_t,
        out_stride_h,
    )
    lse_base = (None, 0, 0)
    if HAS_LSE:
        lse_base = (
            lse_ptr + seq_idx * lse_stride_b + first_q * lse_stride_t + first_head * lse_stride_h,
            lse_stride_t,
            lse_stride_h,
        )
    sinks = sinks_ptr
    if sinks_ptr is not None:
        sinks = sinks_ptr + first_head
    query_rows = seqlen_q * GROUP
    for start in tl.range(0, query_rows, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q, _ = load_rows(q_base, rows, query_rows, GROUP, HEAD_DIM, BLOCK_D, 0, "", False)
        raw = dot(q, k.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), IEEE, INTERPRETED)
        if NEGATE:
            raw = -raw
        if HAS_SOFTCAP:
            raw = softcapped(raw, scale_log2, softcap_log2, IEEE)
        row_range = seen_keys(rows // GROUP, offset, 0, seqlen_k, windows)
        raw = visible_scores(raw, 0, row_range, BLOCK_N, HAS_FIRST)
        row_max = tl.full([BLOCK_M], NO_SCORE, tl.float32)
        row_max = maximum_with(row_max, raw, scale_log2, HAS_SOFTCAP)
        if not HAS_SOFTCAP:
            raw *= scale_log2
        prob = tl.exp2(raw - row_max[:, None])
        row_sum = tl.sum(prob, 1)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        acc = dot(prob.to(v.dtype), v, acc, IEEE, INTERPRETED)
        store_rows(
            out_base,
            lse_base,
            sinks,
            rows,
            query_rows,
            row_max,
            row_sum,
            acc,
            acc,
            None,
            GROUP,
            HEAD_DIM_V,
            BLOCK_DV,
            0,
            0,
            HAS_LSE,
        )

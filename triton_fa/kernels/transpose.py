"""Float8 values transposed, for `hopper.py`: its float8 products want the keys of both operands to
run fastest.

The result is [batch, heads_kv, head_dim_v, keys]; the keys of packed sequences lie in one row, and
sequence i begins at block `first key // 16 + i` of 16 keys. Every block of 16 is in the order in
which a thread of the tensor cores holds weights: place 4t + 2h + j has key 8h + 2t + j.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_fa.kernels.primitives import (
    VARYING,
    cache_row,
    key_span,
    left_padding,
    page_ids,
    query_span,
    visible_keys,
)


@triton.jit(do_not_specialize=[*VARYING, "tiles"])
def transpose_kernel(
    v_transposed_ptr,  # bytes
    v_ptr,  # [batch or pages, tokens, heads_kv, head_dim_v] or [total_k, heads_kv, head_dim_v]
    page_table_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    seqused_q_ptr,
    seqused_k_ptr,
    cu_seqlens_k_new_ptr,
    leftpad_ptr,
    batch_idx_ptr,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    table_stride,
    total_q,
    total_k,
    fixed_seqlen_q,
    fixed_seqlen_k,
    max_seqlen_k,
    fixed_seqlen_new,
    num_rows,
    num_pages,
    window_left,
    window_right,
    attention_chunk,
    row_stride,  # keys in a row of the result, a multiple of 16
    tiles,  # programs of one head and sequence
    NUM_HEADS_KV: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    DECODE_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Blocks of BLOCK_N keys that rows of the prefill path may see.

    Zeros are what lies in the left padding, and behind the last key in its block of 16.
    """
    head = tl.program_id(0) % NUM_HEADS_KV
    tile = tl.program_id(0) // NUM_HEADS_KV % tiles
    seq_idx = tl.program_id(0) // NUM_HEADS_KV // tiles
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
        cu_seqlens_k_new_ptr,
        fixed_seqlen_new,
        leftpad_ptr,
    )
    windows = (window_left, window_right, attention_chunk)
    _, seqlen_q = query_span(seq_idx, True, lengths)
    first_k, seqlen_k = key_span(seq_idx, True, lengths)
    padding = left_padding(seq_idx, True, seqlen_k, lengths)
    begin, end = visible_keys(0, seqlen_q, seqlen_k - seqlen_q, padding, seqlen_k, windows)
    if seqlen_q * GROUP <= DECODE_ROWS:
        end = begin
    row = seq_idx
    if batch_idx_ptr is not None:
        row = cache_row(seq_idx, True, batch_idx_ptr, num_rows)
    if cu_seqlens_k_ptr is not None:
        v_ptr += first_k.to(tl.int64) * v_stride_t
        v_transposed_ptr += (first_k // 16 + seq_idx) * 16
    else:
        per_sequence = NUM_HEADS_KV * HEAD_DIM_V * row_stride.to(tl.int64)
        v_transposed_ptr += seq_idx.to(tl.int64) * per_sequence
        if PAGE_SIZE == 0:
            v_ptr += row.to(tl.int64) * v_stride_b
    v_ptr += head.to(tl.int64) * v_stride_h
    v_transposed_ptr += head.to(tl.int64) * HEAD_DIM_V * row_stride
    dim = tl.arange(0, BLOCK_DV)
    place = tl.arange(0, BLOCK_N)
    inside = (place & -16) + (place >> 1 & 1) * 8 + (place >> 2 & 3) * 2 + (place & 1)
    first_tile = begin // BLOCK_N
    last_tile = (end + BLOCK_N - 1) // BLOCK_N
    for n in range(first_tile + tile, last_tile, tiles):
        key = n * BLOCK_N + inside
        is_used = (key >= padding) & (key < seqlen_k)
        address = key.to(tl.int64) * v_stride_t
        if PAGE_SIZE:
            table = row.to(tl.int64) * table_stride
            page = page_ids(page_table_ptr, table, key, num_pages, is_used, PAGE_SIZE)
            address = page.to(tl.int64) * v_stride_b + (key % PAGE_SIZE).to(tl.int64) * v_stride_t
        is_used = is_used[:, None] & (dim < HEAD_DIM_V)[None, :]
        v = tl.load(v_ptr + address[:, None] + dim[None, :], mask=is_used, other=0)
        at = n * BLOCK_N + place
        to = v_transposed_ptr + dim.to(tl.int64)[:, None] * row_stride + at[None, :]
        fits = at < (seqlen_k + 15) // 16 * 16
        tl.store(to, tl.trans(v), mask=(dim < HEAD_DIM_V)[:, None] & fits[None, :])

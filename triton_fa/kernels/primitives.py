"""Device helpers shared by the attention kernels.

`lengths` is the tuple (cu_seqlens_q_ptr, seqused_q_ptr, total_q, fixed_seqlen_q, cu_seqlens_k_ptr,
seqused_k_ptr, total_k, fixed_seqlen_k, max_seqlen_k), with None for an absent tensor.

A *row* is one (query token, query head) pair of one kv head: row r is token r // GROUP, head
r % GROUP of the group. Scores are kept in base 2: the softmax scale carries log2(e).
"""

from __future__ import annotations

import triton
import triton.language as tl

VARYING = (
    "lse_stride_b",
    "lse_stride_t",
    "lse_stride_h",
    "table_stride",
    "batch",
    "segment",
    "total_q",
    "total_k",
    "fixed_seqlen_q",
    "fixed_seqlen_k",
    "max_seqlen_k",
    "num_pages",
    "num_row_tiles",
    "programs",
    "num_slots",
    "smallest_chunk",
    "most_pieces",
    "window_left",
    "window_right",
    "tag",
)
"""Integer arguments that change from call to call: a value of 1 or 16 is no variant of its own."""

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEG_INF = tl.constexpr(float("-inf"))
# A finite stand-in for "no score yet": exp2(NO_SCORE - anything) is 0, never NaN.
NO_SCORE = tl.constexpr(-1.0e30)


@triton.jit
def query_span(seq_idx, mask, lengths):
    """First query token and query length of sequences `seq_idx` (a scalar or a block).

    The first token is 0 where sequences are rows of a dense batch. Whatever the device tensors
    hold, the span lies inside q.
    """
    cu_seqlens_q_ptr, seqused_q_ptr, total_q, fixed_seqlen_q, _, _, _, _, _ = lengths
    if cu_seqlens_q_ptr is not None:
        first = tl.load(cu_seqlens_q_ptr + seq_idx, mask=mask, other=0)
        end = tl.load(cu_seqlens_q_ptr + seq_idx + 1, mask=mask, other=0)
        first = tl.minimum(tl.maximum(first, 0), total_q)
        seqlen = tl.minimum(tl.maximum(end, first), total_q) - first
    else:
        first = seq_idx * 0
        seqlen = tl.where(mask, fixed_seqlen_q + seq_idx * 0, 0)
    if seqused_q_ptr is not None:
        used = tl.load(seqused_q_ptr + seq_idx, mask=mask, other=0)
        seqlen = tl.minimum(tl.maximum(used, 0), seqlen)
    return first, seqlen


@triton.jit
def key_span(seq_idx, mask, lengths):
    """First key token and key length of sequences `seq_idx`, inside what the tensors hold."""
    _, _, _, _, cu_seqlens_k_ptr, seqused_k_ptr, total_k, fixed_seqlen_k, max_seqlen_k = lengths
    if cu_seqlens_k_ptr is not None:
        first = tl.load(cu_seqlens_k_ptr + seq_idx, mask=mask, other=0)
        end = tl.load(cu_seqlens_k_ptr + seq_idx + 1, mask=mask, other=0)
        first = tl.minimum(tl.maximum(first, 0), total_k)
        seqlen = tl.minimum(tl.maximum(end, first), total_k) - first
    else:
        first = seq_idx * 0
        seqlen = tl.where(mask, fixed_seqlen_k + seq_idx * 0, 0)
    if seqused_k_ptr is not None:
        used = tl.load(seqused_k_ptr + seq_idx, mask=mask, other=0)
        if cu_seqlens_k_ptr is not None:
            seqlen = tl.minimum(tl.maximum(used, 0), seqlen)
        else:
            seqlen = tl.minimum(tl.maximum(used, 0), max_seqlen_k)
    return first, seqlen


@triton.jit
def visible_keys(first_token, end_token, offset, seqlen_k, windows):
    """[begin, end) of the keys that query tokens [first_token, end_token) see between them.

    `offset` is sk - sq; `windows` is (left, right), None for an unbounded side.
    """
    window_left, window_right = windows
    begin = seqlen_k * 0
    end = seqlen_k + 0
    if window_left is not None:
        begin = tl.maximum(first_token + offset - window_left, 0)
    if window_right is not None:
        end = tl.minimum(end_token + offset + window_right, seqlen_k)
    return begin, tl.maximum(end, begin)


@triton.jit
def page_ids(page_table_ptr, row_offset, token, num_pages, mask, PAGE_SIZE: tl.constexpr):
    """Physical pages of logical tokens; an id outside the cache is clamped into it."""
    page = tl.load(page_table_ptr + row_offset + token // PAGE_SIZE, mask=mask, other=0)
    return tl.minimum(tl.maximum(page, 0), num_pages - 1)


@triton.jit
def dot(a, b, acc, IEEE: tl.constexpr, INTERPRETED: tl.constexpr):
    """acc + a @ b in float32."""
    if INTERPRETED:
        # Exact for products of 16-bit numbers, like the hardware.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif IEEE:
        return tl.dot(a, b, acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def softcapped(raw, scale_log2, softcap_log2, PRECISE: tl.constexpr):
    """softcap * tanh(scale * raw / softcap) in base 2; scale_log2 = 2 log2(e) scale / softcap.

    tanh(x) = 1 - 2 / (1 + e^2x); e^2x saturates to 0 or inf, and both are right. PRECISE adds the
    Taylor polynomial where that difference cancels, for float32 inputs.
    """
    twice = raw * scale_log2
    tanh = 1.0 - 2.0 / (1.0 + tl.exp2(twice))
    if PRECISE:
        x = twice * (0.5 * LN2)
        x2 = x * x
        series = -0.05396825396825397 + x2 * (0.021869488536155203 + x2 * -0.008863235529902197)
        series = x * (1.0 + x2 * (-0.3333333333333333 + x2 * (0.13333333333333333 + x2 * series)))
        tanh = tl.where(x2 < 0.09, series, tanh)
    return softcap_log2 * tanh


@triton.jit
def finish(row_max, row_sum, sink_log2, HAS_SINK: tl.constexpr):
    """(factor for the accumulator, lse in natural log) of finished rows.

    An empty row has row_sum 0: factor 0 and lse -inf, or lse = sink.
    """
    if HAS_SINK:
        top = tl.maximum(row_max, sink_log2)
        total = row_sum * tl.exp2(row_max - top) + tl.exp2(sink_log2 - top)
        factor = tl.where(row_sum > 0, tl.exp2(row_max - top) / total, 0.0)
        lse = (top + tl.log2(total)) * LN2
    else:
        factor = tl.where(row_sum > 0, 1.0 / row_sum, 0.0)
        lse = tl.where(row_sum > 0, (row_max + tl.log2(row_sum)) * LN2, NEG_INF)
    return factor, lse

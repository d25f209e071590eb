"""Device helpers shared by the attention kernels.

`lengths` is the tuple (cu_seqlens_q_ptr, seqused_q_ptr, total_q, fixed_seqlen_q, cu_seqlens_k_ptr,
seqused_k_ptr, total_k, fixed_seqlen_k, max_seqlen_k, cu_seqlens_k_new_ptr, fixed_seqlen_new,
leftpad_ptr), with None for an absent tensor, and for fixed_seqlen_new where nothing is appended.
`windows` is (left, right, attention_chunk), None for a side without bound and without chunks.
Keys are counted from the start of a sequence's cache, left padding included.

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
    "q_descale_stride_b",
    "q_descale_stride_h",
    "k_descale_stride_b",
    "k_descale_stride_h",
    "v_descale_stride_b",
    "v_descale_stride_h",
    "table_stride",
    "batch",
    "segment",
    "total_q",
    "total_k",
    "fixed_seqlen_q",
    "fixed_seqlen_k",
    "max_seqlen_k",
    "fixed_seqlen_new",
    "total_new",
    "num_positions",
    "num_rows",
    "attention_chunk",
    "sparse_stride_b",
    "sparse_stride_h",
    "masked_width",
    "full_width",
    "num_pages",
    "num_row_tiles",
    "programs",
    "num_slots",
    "program_slots",
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
    cu_seqlens_q_ptr = lengths[0]
    seqused_q_ptr = lengths[1]
    total_q = lengths[2]
    if cu_seqlens_q_ptr is not None:
        first = tl.load(cu_seqlens_q_ptr + seq_idx, mask=mask, other=0)
        end = tl.load(cu_seqlens_q_ptr + seq_idx + 1, mask=mask, other=0)
        first = tl.minimum(tl.maximum(first, 0), total_q)
        seqlen = tl.minimum(tl.maximum(end, first), total_q) - first
    else:
        first = seq_idx * 0
        seqlen = tl.where(mask, lengths[3] + seq_idx * 0, 0)
    if seqused_q_ptr is not None:
        used = tl.load(seqused_q_ptr + seq_idx, mask=mask, other=0)
        seqlen = tl.minimum(tl.maximum(used, 0), seqlen)
    return first, seqlen


@triton.jit
def key_span(seq_idx, mask, lengths):
    """First key token and key length of sequences `seq_idx`, inside what the tensors hold.

    The length counts appended keys and left padding.
    """
    cu_seqlens_k_ptr = lengths[4]
    seqused_k_ptr = lengths[5]
    total_k = lengths[6]
    max_seqlen_k = lengths[8]
    if cu_seqlens_k_ptr is not None:
        first = tl.load(cu_seqlens_k_ptr + seq_idx, mask=mask, other=0)
        end = tl.load(cu_seqlens_k_ptr + seq_idx + 1, mask=mask, other=0)
        first = tl.minimum(tl.maximum(first, 0), total_k)
        seqlen = tl.minimum(tl.maximum(end, first), total_k) - first
    else:
        first = seq_idx * 0
        seqlen = tl.where(mask, lengths[7] + seq_idx * 0, 0)
    if seqused_k_ptr is not None:
        used = tl.load(seqused_k_ptr + seq_idx, mask=mask, other=0)
        if cu_seqlens_k_ptr is not None:
            seqlen = tl.minimum(tl.maximum(used, 0), seqlen)
        else:
            seqlen = tl.minimum(tl.maximum(used, 0), max_seqlen_k)
    if lengths[10] is not None:
        new = new_span(seq_idx, mask, lengths)[1]
        seqlen += tl.minimum(new, max_seqlen_k - seqlen)
    return first, seqlen


@triton.jit
def new_span(seq_idx, mask, lengths):
    """First appended token of sequences `seq_idx` among all, and how many they append."""
    cu_seqlens_k_new_ptr = lengths[9]
    if cu_seqlens_k_new_ptr is not None:
        first = tl.maximum(tl.load(cu_seqlens_k_new_ptr + seq_idx, mask=mask, other=0), 0)
        end = tl.load(cu_seqlens_k_new_ptr + seq_idx + 1, mask=mask, other=0)
        count = tl.maximum(end, first) - first
        if lengths[10] is not None:
            count = tl.minimum(count, lengths[10])
    else:
        first = seq_idx * lengths[10]
        count = tl.where(mask, lengths[10] + seq_idx * 0, 0)
    return first, count


@triton.jit
def left_padding(seq_idx, mask, seqlen_k, lengths):
    """First key in use of sequences `seq_idx` of that length."""
    leftpad_ptr = lengths[11]
    if leftpad_ptr is not None:
        padding = tl.load(leftpad_ptr + seq_idx, mask=mask, other=0)
        return tl.minimum(tl.maximum(padding, 0), seqlen_k)
    else:
        return seqlen_k * 0


@triton.jit
def cache_row(seq_idx, mask, batch_idx_ptr, num_rows):
    """The row of a dense cache, or of the page table, that belongs to sequences `seq_idx`."""
    row = tl.load(batch_idx_ptr + seq_idx, mask=mask, other=0)
    return tl.minimum(tl.maximum(row, 0), num_rows - 1)


@triton.jit
def seen_keys(token, offset, padding, seqlen_k, windows):
    """First key and one past the last key that query tokens see. Neither falls as tokens rise.

    `offset` is the key position of query token 0: key length - query length.
    """
    window_left, window_right, attention_chunk = windows
    position = token + offset
    first = padding + 0 * position
    end = seqlen_k + 0 * position
    if window_left is not None:
        first = tl.maximum(first, position - window_left)
    if window_right is not None:
        end = tl.minimum(position + window_right + 1, end)
    if attention_chunk is not None:
        inside = position - padding  # chunks are counted behind the padding
        below = (attention_chunk - 1 - inside) // attention_chunk
        chunk = tl.where(inside < 0, -below, inside // attention_chunk)
        first = tl.maximum(first, padding + chunk * attention_chunk)
        end = tl.minimum(end, padding + (chunk + 1) * attention_chunk)
    return first, end


@triton.jit
def row_tiles(
    seq_idx, mask, lengths, GROUP: tl.constexpr, DECODE_ROWS: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Row tiles of sequences on the prefill path: those of more than DECODE_ROWS rows."""
    _, seqlen_q = query_span(seq_idx, mask, lengths)
    rows = seqlen_q * GROUP
    return tl.where(rows > DECODE_ROWS, (rows + BLOCK_M - 1) // BLOCK_M, 0)


@triton.jit
def visible_keys(first_token, end_token, offset, padding, seqlen_k, windows):
    """[begin, end) of the keys that query tokens [first_token, end_token) see between them."""
    begin, _ = seen_keys(first_token, offset, padding, seqlen_k, windows)
    _, end = seen_keys(end_token - 1, offset, padding, seqlen_k, windows)
    return begin, tl.maximum(end, begin)


@triton.jit
def page_ids(page_table_ptr, row_offset, token, num_pages, mask, PAGE_SIZE: tl.constexpr):
    """Physical pages of logical tokens; an id outside the cache is clamped into it."""
    page = tl.load(page_table_ptr + row_offset + token // PAGE_SIZE, mask=mask, other=0)
    return tl.minimum(tl.maximum(page, 0), num_pages - 1)


@triton.jit
def from_fp8(x, FORMAT: tl.constexpr, BY: tl.constexpr):
    """float16 of float8 numbers given as bytes: all formats fit exactly.

    BY "bits" needs no hardware for it. For e4m3 there are two more: "cast" leaves it to the
    compiler, which moves a cast behind a change of layout and may gather byte by byte then;
    "packed" converts in the layout that was loaded.
    """
    if FORMAT == "":
        return x
    elif BY == "cast":
        return x.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    elif BY == "packed":
        return tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; mov.b32 {low, high}, $2;"
            " cvt.rn.f16x2.e4m3x2 $0, low; cvt.rn.f16x2.e4m3x2 $1, high; }",
            "=r,=r,r",
            [x],
            dtype=tl.float16,
            is_pure=False,
            pack=4,
        )
    else:
        return half_of_byte(x.to(tl.int16) & 0xFF, FORMAT)


@triton.jit
def half_of_byte(wide, FORMAT: tl.constexpr):
    """float16 of float8 numbers given as 16-bit integers below 256."""
    # Exponents of 4 bits need another bias; a multiplication also gets subnormals right.
    if FORMAT == "e5m2":
        half = (wide << 8).to(tl.float16, bitcast=True)
    elif FORMAT == "e5m2fnuz":
        single = (wide.to(tl.int32) & 0x80) << 24 | (wide.to(tl.int32) & 0x7F) << 21
        half = (single.to(tl.float32, bitcast=True) * 2596148429267413814265248164610048.0).to(
            tl.float16
        )
    else:
        same = ((wide & 0x80) << 8 | (wide & 0x7F) << 7).to(tl.float16, bitcast=True)
        half = same * (256.0 if FORMAT == "e4m3" else 128.0)
        half = half.to(tl.float16)
    if FORMAT == "e4m3":
        half = tl.where((wide & 0x7F) == 0x7F, float("nan"), half)
    elif FORMAT == "e4m3fnuz" or FORMAT == "e5m2fnuz":
        half = tl.where((wide & 0xFF) == 0x80, float("nan"), half)
    return half


@triton.jit
def split_fp8(x, FORMAT: tl.constexpr, HARDWARE: tl.constexpr):
    """float16 of the float8 numbers in the low and in the high bytes of 16 bits.

    Pairs reach the operands of a product as 16-bit numbers do, values transposed included; single
    bytes would be gathered one by one.
    """
    if HARDWARE and FORMAT == "e4m3":
        return tl.inline_asm_elementwise(
            "{ .reg .b32 sorted; .reg .b16 even, odd; prmt.b32 sorted, $2, 0, 0x3120;"
            " mov.b32 {even, odd}, sorted;"
            " cvt.rn.f16x2.e4m3x2 $0, even; cvt.rn.f16x2.e4m3x2 $1, odd; }",
            "=r,=r,r",
            [x],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    elif HARDWARE and FORMAT == "e5m2":
        return tl.inline_asm_elementwise(
            "{ prmt.b32 $0, $2, 0, 0x2404; and.b32 $1, $2, 0xff00ff00; }",
            "=&r,=r,r",
            [x],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        return half_of_byte(x & 0xFF, FORMAT), half_of_byte((x >> 8) & 0xFF, FORMAT)


@triton.jit
def joined(low, high):
    """Two float16 numbers in 32 bits: a loop hands those on as they are, 16 bits it takes apart."""
    low = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | high.to(tl.int16, bitcast=True).to(tl.int32) << 16


@triton.jit
def parted(both, HARDWARE: tl.constexpr):
    """What `joined` joined."""
    if HARDWARE:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $2, $3, 0x7632;",
            "=&r,=r,r,r",
            [both],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        low = both.to(tl.int16).to(tl.float16, bitcast=True)
        return low, (both >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def largest(q):
    """The largest absolute value of each row."""
    return tl.max(tl.abs(q.to(tl.float32)), 1)


@triton.jit
def power_above(top):
    """The power of two from `top` on; 1 for 0. What bfloat16 queries are divided by.

    Beside float8 keys they are computed with as float16, which holds their digits, not their range.
    """
    power = (top.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
    return tl.where(top > 0, power.to(tl.float32, bitcast=True), 1.0)


@triton.jit
def divided(q, power):
    """Query rows as float16, divided by a power of two each."""
    return (q.to(tl.float32) / power[:, None]).to(tl.float16)


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
def scored_by(SCORE_MOD: tl.constexpr, raw, scale_log2, cells):
    """The caller's function of the scaled scores; not in base 2.

    `cells` is (sequence, query head, query token, key, query length, key length, aux pointers);
    the three in the middle broadcast to the block of scores.
    """
    score = SCORE_MOD(
        raw * (scale_log2 * LN2),
        cells[0],
        cells[1],
        cells[2],
        cells[3],
        cells[4],
        cells[5],
        cells[6],
    )
    return score.to(tl.float32)


@triton.jit
def masked_by(MASK_MOD: tl.constexpr, raw, cells):
    """Scores that the caller's function does not keep become -inf."""
    keep = MASK_MOD(cells[0], cells[1], cells[2], cells[3], cells[4], cells[5], cells[6])
    return tl.where(keep, raw, NEG_INF)


@triton.jit
def merge_factors(row_max, part_max):
    """(maximum, factor of what is there, factor of a part) where a part joins partial results.

    The kernels that merge use `tl.fma` where they apply them, so that all round alike.
    """
    new_max = tl.maximum(row_max, part_max)
    return new_max, tl.exp2(row_max - new_max), tl.exp2(part_max - new_max)


@triton.jit
def finish(row_max, row_sum, sink_log2, HAS_SINK: tl.constexpr):
    """(factor for the accumulator, lse in natural log) of finished rows.

    An empty row has row_sum 0: factor 0 and lse -inf, or lse = sink.
    """
    if HAS_SINK:
        top = tl.maximum(row_max, sink_log2)
        total = row_sum * tl.exp2(row_max - top) + tl.exp2(sink_log2 - top)
        factor = tl.where(row_sum != 0, tl.exp2(row_max - top) / total, 0.0)
        lse = (top + tl.log2(total)) * LN2
    else:
        factor = tl.where(row_sum != 0, 1.0 / row_sum, 0.0)
        lse = tl.where(row_sum != 0, (row_max + tl.log2(row_sum)) * LN2, NEG_INF)
    return factor, lse

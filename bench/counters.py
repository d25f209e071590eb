"""What a workload costs at least: bytes that have to move and operations that have to run.

Only visible work counts. Bytes are the K and V slots that some query sees, q, and out (and the lse
when it is returned); page tables, lengths and partial results are the implementation's business.
New keys are read once, wherever from, and written to the cache; rotary tables are not counted, nor
are factors. Keys and values that are one cache count once. Merging reads its partial results.
Operations are two per multiply-add of the matrix products, over visible (query, key) pairs: a
causal square counts as (n² + n) / 2 pairs.
"""

from collections import Counter
from functools import cache

from bench.workloads import Workload

ELEMENT_BYTES = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}


def bounds(row: Workload) -> tuple[int | None, int | None]:
    """The window after FlashAttention's rules: None is unbounded, causal closes the right."""
    left, right = (None if side < 0 else side for side in row.window)
    return left, 0 if row.causal else right


@cache
def visible_pairs(q_len: int, k_len: int, left: int | None, right: int | None) -> int:
    """Visible (query, key) pairs; query i sits at key position i + k_len - q_len."""
    return sum_clipped(q_len, k_len - q_len, right, k_len) - sum_below(q_len, k_len, left, right)


def sum_clipped(q_len: int, shift: int, right: int | None, k_len: int) -> int:
    """Sum over queries of the keys at or before the right bound: clip(i + shift + right + 1)."""
    if right is None:
        return q_len * k_len
    return ramp(q_len, shift + right + 1, k_len)


def sum_below(q_len: int, k_len: int, left: int | None, right: int | None) -> int:
    """Sum over queries of the keys before the left bound, as far as they lie within the right."""
    if left is None:
        return 0
    if right is not None and right < -left:
        return sum_clipped(q_len, k_len - q_len, right, k_len)
    return ramp(q_len, k_len - q_len - left, k_len)


def ramp(n: int, start: int, top: int) -> int:
    """Sum of min(max(start + i, 0), top) for i in range(n), in closed form."""
    first = min(max(-start, 0), n)  # values before this one are 0
    last = min(max(top - start, first), n)  # values from this one on are top
    rising = last - first
    return rising * (start + first) + rising * (rising - 1) // 2 + (n - last) * top


@cache
def visible_keys(q_len: int, k_len: int, left: int | None, right: int | None) -> int:
    """Keys that at least one query sees."""
    if q_len == 0:
        return 0
    shift = k_len - q_len
    low = 0 if left is None else max(0, shift - left)
    high = k_len if right is None else min(k_len, q_len - 1 + shift + right + 1)
    return max(0, high - low)


def flops(row: Workload) -> int:
    """Floating-point operations of q·k, qv·v and p·v over visible pairs, all heads, one layer."""
    if row.splits:
        return 2 * row.splits * sum(row.q_lens) * row.heads.q * row.head_dim_v
    left, right = bounds(row)
    pairs = sum(
        n * visible_pairs(q, k, left, right)
        for (q, k), n in Counter(zip(row.q_lens, row.k_lens, strict=True)).items()
    )
    return 2 * (query_dims(row) + row.head_dim_v) * row.heads.q * pairs


def query_dims(row: Workload) -> int:
    """What is scored: head_dim, and with `qv` as many as a value has."""
    return row.heads.dim + (row.head_dim_v if row.latent else 0)


def mandatory_bytes(row: Workload) -> int:
    """Bytes that any implementation has to read or write, one layer."""
    rows = sum(row.q_lens) * row.heads.q
    out = rows * row.head_dim_v * ELEMENT_BYTES[row.out_dtype]
    if row.splits:  # each partial result in float32 with its lse, and one lse returned
        return 4 * rows * (row.splits * (row.head_dim_v + 1) + 1) + out
    left, right = bounds(row)
    keys = sum(
        n * visible_keys(q, k, left, right)
        for (q, k), n in Counter(zip(row.q_lens, row.k_lens, strict=True)).items()
    )
    cached = (keys + row.new * row.batch) * row.heads.kv * (row.heads.dim + row.head_dim_v)
    queries = rows * query_dims(row)
    lse = 4 * rows if row.return_lse else 0
    return cached * ELEMENT_BYTES[row.key_dtype] + queries * ELEMENT_BYTES[row.dtype] + out + lse


def cache_bytes(row: Workload) -> int:
    """Bytes of one K and V cache, unused slots of the last pages included."""
    page = row.page_size or 1
    slots = sum(-(-k // page) * page for k in row.k_lens)
    return slots * row.heads.kv * (row.heads.dim + row.head_dim_v) * ELEMENT_BYTES[row.key_dtype]

"""What a serving engine really hands over, one trap at a time, through the public functions.

Each test fails when the guard that it is about is taken out of the code. `Call` builds a ragged
paged call whose every place that no backend may read is poisoned, and knows the right answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import pytest
import torch

import reference
import triton_fa
from triton_fa import env, validate
from triton_fa.errors import ArgumentError

pytestmark = pytest.mark.usefixtures("fresh")

VERS = ["torch", "triton"]
# float32 computed in another order.
BUDGET = {"atol": 3e-6, "rtol": 3e-6}
NAN = float("nan")
INT_MAX = 2**31 - 1


@dataclass(frozen=True)
class Call:
    """A ragged call on a paged cache. `tokens` holds the true keys and values."""

    queries: Sequence[int]
    keys: Sequence[int]
    heads: int = 4
    heads_kv: int = 2
    dim: int = 16
    page_size: int = 4
    extra_columns: int = 2  # of the table, that no sequence uses: they hold garbage
    seed: int = 0

    def tensors(self, device: str) -> dict[str, Any]:
        """The arguments of `flash_attn_with_kvcache`."""
        rng = torch.Generator().manual_seed(self.seed)
        pages = [-(-n // self.page_size) for n in self.keys]
        pool = sum(pages) + 2
        # A garbage id is clamped to the first or the last page: no sequence uses those.
        ids = 1 + torch.randperm(sum(pages), generator=rng, dtype=torch.int32)
        shape = (pool, self.page_size, self.heads_kv, self.dim)
        k_cache, v_cache = torch.full(shape, NAN), torch.full(shape, NAN)
        # Garbage of the kind that a recycled table holds: far out of range on both sides.
        table = torch.tensor([INT_MAX, -1, -INT_MAX, 7 * pool], dtype=torch.int32)
        width = max(pages) + self.extra_columns
        table = table.repeat(len(self.keys), width)[:, :width]
        used = 0
        for row, (n, count) in enumerate(zip(self.keys, pages, strict=True)):
            table[row, :count] = ids[used : used + count]
            used += count
            for token in range(n):
                page, slot = int(table[row, token // self.page_size]), token % self.page_size
                k_cache[page, slot] = torch.randn(self.heads_kv, self.dim, generator=rng)
                v_cache[page, slot] = torch.randn(self.heads_kv, self.dim, generator=rng)
        given = {
            "q": torch.randn(sum(self.queries), self.heads, self.dim, generator=rng),
            "k_cache": k_cache,
            "v_cache": v_cache,
            "page_table": table.contiguous(),
            "cache_seqlens": ints(*self.keys),
            "cu_seqlens_q": ints(0, *accumulate(self.queries)),
        }
        return {name: tensor.to(device) for name, tensor in given.items()} | {
            "max_seqlen_q": max(self.queries, default=0)
        }


# One path of the kernels, and both in one call.
DECODE = Call(queries=[1, 1, 1], keys=[9, 37, 4])
MIXED = Call(queries=[33, 2, 1], keys=[33, 37, 45])


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def run(given: dict[str, Any], ver: str, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    result = triton_fa.flash_attn_with_kvcache(**given, **options, ver=ver, return_softmax_lse=True)
    return result[0], result[1]


def check(
    given: dict[str, Any], ver: str, like: dict[str, Any] | None = None, **options: Any
) -> None:
    """`given` on `ver` is what the reference says of `like` (default: the same call)."""
    out, lse = run(given, ver, **options)
    options.pop("out", None)
    want = reference.flash_attn_with_kvcache(**(given if like is None else like), **options)
    same(out, lse, want)


def same(out: torch.Tensor, lse: torch.Tensor, want: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Rows that the reference leaves NaN belong to no query."""
    used = ~want[0][..., 0].isnan()
    torch.testing.assert_close(out[used].double(), want[0][used], **BUDGET)
    got, wanted = (x.transpose(-1, -2)[used].double() for x in (lse, want[1]))
    torch.testing.assert_close(got, wanted, **BUDGET)


# ---------------------------------------------------------------- what may not be read


@pytest.mark.parametrize("ver", VERS)
@pytest.mark.parametrize("shape", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize("page_size", [1, 4, 64])
def test_nan_in_unused_slots_and_pages_and_garbage_in_table_tails(
    ver: str, shape: Call, page_size: int, device: str
) -> None:
    check(replace(shape, page_size=page_size).tensors(device), ver, causal=True)


@pytest.mark.parametrize("ver", VERS)
@pytest.mark.parametrize("shape", [DECODE, MIXED], ids=["decode", "mixed"])
def test_nan_beyond_the_lengths_of_a_dense_cache(ver: str, shape: Call, device: str) -> None:
    keys = torch.randn(3, 64, 2, 16, device=device)
    values = torch.randn(3, 64, 2, 16, device=device)
    for row, n in enumerate(shape.keys):
        keys[row, n:] = values[row, n:] = NAN
    given = shape.tensors(device) | {"k_cache": keys, "v_cache": values, "page_table": None}
    check(given, ver, causal=True)


@pytest.mark.parametrize("ver", VERS)
@pytest.mark.parametrize("queries", [(1, 1, 1), (40, 33, 1)], ids=["decode", "prefill"])
def test_nan_between_packed_sequences(ver: str, queries: tuple[int, ...], device: str) -> None:
    starts, used = [0, 20, 60, 70], [12, 40, 0]
    k, v = torch.randn(75, 2, 16), torch.randn(75, 2, 16)
    for first, end, n in zip(starts[:-1], starts[1:], used, strict=True):
        k[first + n : end] = v[first + n : end] = NAN
    k[70:] = v[70:] = NAN
    given = {
        "q": torch.randn(sum(queries), 4, 16),
        "k": k,
        "v": v,
        "cu_seqlens_q": ints(0, *accumulate(queries)),
        "cu_seqlens_k": ints(*starts),
        "seqused_k": ints(*used),
    }
    given = {name: tensor.to(device) for name, tensor in given.items()}
    bounds = {"max_seqlen_q": max(queries), "max_seqlen_k": 40, "causal": True}
    out, lse = triton_fa.flash_attn_varlen_func(
        **given, **bounds, num_splits=0, return_lse=True, ver=ver
    )
    same(out, lse, reference.flash_attn_varlen_func(**given, **bounds))


@pytest.mark.parametrize("ver", VERS)
@pytest.mark.parametrize("shape", [DECODE, MIXED], ids=["decode", "mixed"])
def test_pages_that_a_window_left_behind_are_not_in_use(ver: str, shape: Call, device: str) -> None:
    """Engines free them: what they hold now, and where the table points, is no longer ours."""
    shape = replace(shape, page_size=1)
    given = shape.tensors(device)
    want = {n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in given.items()}
    for row, (sq, sk) in enumerate(zip(shape.queries, shape.keys, strict=True)):
        gone = max(0, sk - sq - 3)
        for page in given["page_table"][row, :gone].tolist():
            given["k_cache"][page] = given["v_cache"][page] = NAN
    check(given, ver, like=want, causal=True, window_size=(3, 0))


# ---------------------------------------------------------------- rows without keys


@pytest.mark.parametrize("ver", VERS)
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        Call(queries=[1, 0, 1, 1], keys=[0, 7, 5, 0]),
        Call(queries=[40, 0, 3, 33], keys=[0, 7, 0, 20]),
        Call(queries=[0, 0], keys=[0, 0]),
    ],
    ids=["decode", "prefill", "nothing"],
)
def test_sequences_of_length_zero(ver: str, with_sinks: bool, shape: Call, device: str) -> None:
    sinks = torch.linspace(-3, 3, 4, device=device) if with_sinks else None
    check(shape.tensors(device), ver, causal=True, sinks=sinks)


@pytest.mark.parametrize("ver", VERS)
@pytest.mark.parametrize("queries", [5, 40], ids=["decode", "prefill"])
def test_more_queries_than_keys_leave_the_first_rows_empty(
    ver: str, queries: int, device: str
) -> None:
    given = Call(queries=[queries], keys=[3]).tensors(device)
    check(given, ver, causal=True)
    out, lse = run(given, ver, causal=True)
    assert (out[: queries - 3] == 0).all()
    assert (lse[:, : queries - 3] == -torch.inf).all()
    assert (lse[:, queries - 3 :] > -torch.inf).all()


@pytest.mark.parametrize("ver", VERS)
@pytest.mark.parametrize("queries", [5, 40], ids=["decode", "prefill"])
def test_the_lse_of_an_empty_row_with_a_sink_is_the_sink(
    ver: str, queries: int, device: str
) -> None:
    given = Call(queries=[queries], keys=[3]).tensors(device)
    sinks = torch.tensor([1.5, -40.0, 0.0, 60.0], device=device)
    out, lse = run(given, ver, causal=True, sinks=sinks)
    assert (out[: queries - 3] == 0).all()
    torch.testing.assert_close(lse[:, 0], sinks)
    check(given, ver, causal=True, sinks=sinks)


@pytest.mark.parametrize("ver", VERS)
@pytest.mark.parametrize("queries", [1, 40], ids=["decode", "prefill"])
def test_a_cache_tensor_without_any_element(ver: str, queries: int, device: str) -> None:
    q = torch.randn(2, queries, 4, 16, device=device)
    cache = torch.empty(2, 0, 2, 16, device=device)
    out, lse = triton_fa.flash_attn_with_kvcache(q, cache, cache, ver=ver, return_softmax_lse=True)
    assert (out == 0).all()
    assert (lse == -torch.inf).all(), "FA3 gives +inf here; we never do"


@pytest.mark.parametrize("ver", VERS)
@pytest.mark.parametrize("queries", [1, 40], ids=["decode", "prefill"])
def test_a_page_table_without_any_column(ver: str, queries: int, device: str) -> None:
    q = torch.randn(2, queries, 4, 16, device=device)
    cache = torch.randn(3, 4, 2, 16, device=device)
    out, lse = triton_fa.flash_attn_with_kvcache(
        q,
        cache,
        cache,
        cache_seqlens=ints(0, INT_MAX).to(device),
        page_table=torch.zeros(2, 0, dtype=torch.int32, device=device),
        causal=True,
        window_size=(5, 0),
        ver=ver,
        return_softmax_lse=True,
    )
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("ver", VERS)
@pytest.mark.parametrize(
    "window",
    [(-1, 0), (-1, 3), (5, -1), (None, 2), (4, None), (0, 0), (7, 2), (-9, -9), (1000, 1000)],
)
def test_a_negative_side_of_a_window_is_unbounded(
    ver: str, window: tuple[int | None, int | None], device: str
) -> None:
    given = MIXED.tensors(device)
    check(given, ver, window_size=window)


@pytest.mark.parametrize("ver", VERS)
def test_causal_overrides_the_right_side_of_a_window(ver: str, device: str) -> None:
    given = Call(queries=[3, 1], keys=[13, 20]).tensors(device)
    for right in (-1, 0, 9):
        check(given, ver, causal=True, window_size=(6, right))


@pytest.mark.parametrize("ver", VERS)
@pytest.mark.parametrize("shape", [DECODE, MIXED], ids=["decode", "mixed"])
def test_a_sink_counts_once(ver: str, shape: Call, device: str) -> None:
    long = replace(shape, keys=[300, *shape.keys[1:]])  # split over several programs
    sinks = torch.tensor([2.0, -2.0, 8.0, 0.0], device=device)
    check(long.tensors(device), ver, causal=True, sinks=sinks)


# ---------------------------------------------------------------- lengths


@pytest.mark.parametrize("ver", VERS)
@pytest.mark.parametrize("length", [0, 1, 13, 24])
def test_an_int_length_counts_keys_of_each_sequence_not_pages(
    ver: str, length: int, device: str
) -> None:
    given = Call(queries=[1, 2], keys=[24, 24], extra_columns=0).tensors(device)
    check(given | {"cache_seqlens": length}, ver, causal=True)
    fits = triton_fa.flash_attn_with_kvcache(**given | {"cache_seqlens": None}, ver=ver)
    assert fits.isfinite().all()


@pytest.mark.parametrize("ver", VERS)
@pytest.mark.parametrize("shape", [DECODE, MIXED], ids=["decode", "mixed"])
def test_lengths_out_of_range_are_clamped_to_the_table(ver: str, shape: Call, device: str) -> None:
    full = [-(-max(shape.keys) // 4) * 4] * 2 + [0]
    given = replace(shape, keys=full, extra_columns=0).tensors(device)
    wild = given | {"cache_seqlens": ints(INT_MAX, full[0] + 1, -5).to(device)}
    check(wild, ver, like=given, causal=True)


@pytest.mark.parametrize("ver", VERS)
def test_page_ids_out_of_range_are_clamped_into_the_pool(ver: str, device: str) -> None:
    given = MIXED.tensors(device)
    pool = given["k_cache"].shape[0]
    for name in ("k_cache", "v_cache"):
        given[name] = torch.randn(given[name].shape, device=device)
    given["page_table"][0, 0], given["page_table"][1, 1] = INT_MAX, -INT_MAX
    given["page_table"][1, 2], given["page_table"][2, 0] = pool, -1
    clamped = given | {"page_table": given["page_table"].clamp(0, pool - 1)}
    check(given, ver, like=clamped, causal=True)


WILD = [
    # cu_seqlens_q over 10 rows, and the spans [first, end) that it comes to
    ([0, 3, 1000, INT_MAX], [(0, 3), (3, 10), (10, 10)]),
    ([-7, 3, 5, 9], [(0, 3), (3, 5), (5, 9)]),
    ([0, 6, 2, 9], [(0, 6), (6, 6), (2, 9)]),
    ([-INT_MAX, -1, 0, 4], [(0, 0), (0, 0), (0, 4)]),
]


@pytest.mark.parametrize("ver", VERS)
@pytest.mark.parametrize("group", [1, 16], ids=["decode", "prefill"])
@pytest.mark.parametrize(("cu_seqlens_q", "spans"), WILD)
def test_wild_prefix_sums_of_queries_stay_in_bounds(
    ver: str, group: int, cu_seqlens_q: list[int], spans: list[tuple[int, int]], device: str
) -> None:
    shape = Call(queries=[5, 3, 2], keys=[9, 37, 4], heads=group, heads_kv=1)
    given = shape.tensors(device) | {"max_seqlen_q": 10}
    buffer = torch.full((14, group, 16), 7.0, device=device)
    out = buffer[2:12]
    run(given | {"cu_seqlens_q": ints(*cu_seqlens_q).to(device)}, ver, causal=True, out=out)
    assert (buffer[:2] == 7).all()
    assert (buffer[12:] == 7).all()
    covered = torch.zeros(10, dtype=torch.bool)
    for first, end in spans:
        covered[first:end] = True
    assert (out[~covered] == 7).all(), "a row of no sequence was written"
    assert out.isfinite().all()


WILD_KEYS = [
    # cu_seqlens_k over 20 tokens, and what it is clamped to
    ([0, 5, INT_MAX], [0, 5, 20]),
    ([-15, 12, 20], [0, 12, 20]),
    ([0, 30, 8], [0, 20, 20]),
    ([0, 25, 29], [0, 20, 20]),
]


@pytest.mark.parametrize("ver", VERS)
@pytest.mark.parametrize("queries", [1, 40], ids=["decode", "prefill"])
@pytest.mark.parametrize(("cu_seqlens_k", "clamped"), WILD_KEYS)
def test_wild_prefix_sums_of_keys_stay_in_bounds(
    ver: str, queries: int, cu_seqlens_k: list[int], clamped: list[int], device: str
) -> None:
    pool = torch.full((60, 1, 16), NAN, device=device)  # guards on both sides of the keys
    pool[20:40] = torch.randn(20, 1, 16, device=device)
    k = pool[20:40]
    q = torch.randn(2 * queries, 2, 16, device=device)
    cu_seqlens_q = ints(0, queries, 2 * queries).to(device)
    bounds = {"max_seqlen_q": queries, "max_seqlen_k": 20}
    given, like = ints(*cu_seqlens_k).to(device), ints(*clamped).to(device)
    out, lse = triton_fa.flash_attn_varlen_func(
        q, k, k, cu_seqlens_q, given, **bounds, num_splits=0, return_lse=True, ver=ver
    )
    same(out, lse, reference.flash_attn_varlen_func(q, k, k, cu_seqlens_q, like, **bounds))


# ---------------------------------------------------------------- what may not be written


@pytest.mark.parametrize("ver", VERS)
@pytest.mark.parametrize("layout", ["packed", "dense"])
@pytest.mark.parametrize("queries", [4, 40], ids=["decode", "prefill"])
def test_rows_beyond_seqused_q_are_not_touched(
    ver: str, layout: str, queries: int, device: str
) -> None:
    used = [1, 0, queries]
    q = torch.randn(3, queries, 4, 16, device=device)
    k, v = (torch.randn(3, 50, 2, 16, device=device) for _ in range(2))
    given = {"q": q, "k": k, "v": v, "cu_seqlens_q": None, "cu_seqlens_k": None}
    if layout == "packed":
        given |= {"q": q.flatten(0, 1), "cu_seqlens_q": ints(*range(0, 4 * queries, queries))}
        given["cu_seqlens_q"] = given["cu_seqlens_q"].to(device)
    options = {"seqused_q": ints(*used).to(device), "max_seqlen_q": queries, "causal": True}
    out = torch.full_like(given["q"], 7.0)
    got, lse = triton_fa.flash_attn_varlen_func(
        **given, **options, out=out, num_splits=0, return_lse=True, ver=ver
    )
    assert got is out
    for row, n in enumerate(used):
        assert (out.view(3, queries, 4, 16)[row, n:] == 7).all()
    same(out, lse, reference.flash_attn_varlen_func(**given, **options))


@pytest.mark.parametrize("ver", VERS)
def test_rows_beyond_the_last_sequence_are_not_touched(ver: str, device: str) -> None:
    # A captured graph is padded: more rows than the sequences have.
    given = DECODE.tensors(device)
    given["q"] = torch.cat([given["q"], torch.full((5, 4, 16), NAN, device=device)])
    out = torch.full((8, 4, 16), 7.0, device=device)
    check(given, ver, causal=True, out=out)
    assert (out[3:] == 7).all()


@pytest.mark.parametrize("ver", VERS)
def test_a_strided_out_is_filled_in_place_and_nothing_beside_it(ver: str, device: str) -> None:
    given = MIXED.tensors(device)
    rows = sum(MIXED.queries)
    buffer = torch.full((rows, 6, 32), 7.0, device=device)
    out = buffer[:, 1:5, 8:24]
    assert run(given, ver, causal=True, out=out)[0] is out
    same(
        *run(given, ver, causal=True, out=out),
        reference.flash_attn_with_kvcache(**given, causal=True),
    )
    buffer[:, 1:5, 8:24] = 7.0
    assert (buffer == 7).all()


@pytest.mark.parametrize("ver", VERS)
def test_nothing_of_the_callers_is_changed(ver: str, device: str) -> None:
    given = MIXED.tensors(device)
    before = {n: t.clone() for n, t in given.items() if isinstance(t, torch.Tensor)}
    run(given, ver, causal=True)
    for name, tensor in before.items():
        assert torch.equal(given[name].nan_to_num(9), tensor.nan_to_num(9)), name


# ---------------------------------------------------------------- strides


def cache_views(kind: str, pool: int, page_size: int, device: str) -> tuple[Any, Any]:
    """Empty key and value caches (pool, page_size, 2, 16) as engines lay them out."""
    fresh = torch.full((pool * page_size * 256,), NAN, device=device)
    if kind == "vllm":  # (2, pages, page_size, heads, dim)
        both = fresh[: 2 * pool * page_size * 32].view(2, pool, page_size, 2, 16)
        return both[0], both[1]
    if kind == "vllm-interleaved":  # (pages, 2, page_size, heads, dim)
        both = fresh[: 2 * pool * page_size * 32].view(pool, 2, page_size, 2, 16)
        return both[:, 0], both[:, 1]
    if kind == "vllm-hnd":  # (pages, heads, page_size, dim) seen as (pages, page_size, heads, dim)
        both = fresh[: 2 * pool * page_size * 32].view(2, pool, 2, page_size, 16).transpose(2, 3)
        return both[0], both[1]
    if kind == "sglang":  # a pool of tokens per layer, keys and values of other layers between
        tokens = fresh[: pool * page_size * 128].view(pool * page_size, 4, 2, 16)
        paged = tokens.view(pool, page_size, 4, 2, 16)
        return paged[:, :, 1], paged[:, :, 3]
    assert kind == "sglang-mla"  # one latent row: keys and values overlap in neither
    rows = fresh[: pool * page_size * 80].view(pool, page_size, 80)
    return (
        rows[..., :32].view(pool, page_size, 2, 16),
        rows[..., 40:72].unflatten(-1, (2, 16)),
    )


@pytest.mark.parametrize("ver", VERS)
@pytest.mark.parametrize("kind", ["vllm", "vllm-interleaved", "vllm-hnd", "sglang", "sglang-mla"])
def test_caches_strided_as_engines_lay_them_out(ver: str, kind: str, device: str) -> None:
    given = MIXED.tensors(device)
    k_cache, v_cache = cache_views(kind, given["k_cache"].shape[0], 4, device)
    k_cache.copy_(given["k_cache"])
    v_cache.copy_(given["v_cache"])
    check(given | {"k_cache": k_cache, "v_cache": v_cache}, ver, like=given, causal=True)


@pytest.mark.parametrize("ver", VERS)
def test_queries_that_are_part_of_a_fused_projection(ver: str, device: str) -> None:
    given = MIXED.tensors(device)
    fused = torch.full((sum(MIXED.queries), 8, 16), NAN, device=device)
    q = fused[:, 2:6]
    q.copy_(given["q"])
    assert not q.is_contiguous()
    check(given | {"q": q}, ver, like=given, causal=True)


@pytest.mark.parametrize("ver", VERS)
def test_queries_whose_last_dimension_is_strided(ver: str, device: str) -> None:
    given = MIXED.tensors(device)
    wide = torch.full((*given["q"].shape, 2), NAN, device=device)
    wide[..., 1] = given["q"]
    for _ in range(2):  # prepared, then a hit with another tensor
        check(given | {"q": wide[..., 1]}, ver, like=given, causal=True)
        wide = wide.clone()


@pytest.mark.parametrize("ver", VERS)
def test_a_table_that_is_part_of_a_wider_one(ver: str, device: str) -> None:
    given = DECODE.tensors(device)
    table = given["page_table"]
    wide = torch.full((3, table.shape[1] + 9), INT_MAX, dtype=torch.int32, device=device)
    wide[:, : table.shape[1]] = table
    check(given | {"page_table": wide[:, : table.shape[1]]}, ver, like=given, causal=True)


@pytest.mark.parametrize("ver", VERS)
def test_pages_may_be_shared(ver: str, device: str) -> None:
    given = Call(queries=[1, 1], keys=[16, 16]).tensors(device)
    given["page_table"][1] = given["page_table"][0]
    check(given, ver, causal=True)


@pytest.mark.parametrize("ver", VERS)
@pytest.mark.parametrize("queries", [1, 40], ids=["decode", "prefill"])
def test_offsets_beyond_32_bits(ver: str, queries: int) -> None:
    """Pages further apart than 2**31 elements reach: on the CPU, memory that is never touched."""
    if torch.cuda.is_available():
        pytest.skip("the GPU's own tests allocate this much")
    page_stride = 2**31 // 8 + 16  # page 9 begins past 2**31 elements
    pool = torch.empty(10 * page_stride, dtype=torch.float16)
    shape, strides = (10, 4, 2, 16), (page_stride, 32, 16, 1)
    k_cache = torch.as_strided(pool, shape, strides)
    v_cache = torch.as_strided(pool, shape, strides, 200)
    small_k, small_v = torch.randn(2, 10, 4, 2, 16).half()
    k_cache.copy_(small_k)
    v_cache.copy_(small_v)
    given = {
        "q": torch.randn(1, queries, 4, 16).half(),
        "page_table": ints(9, 2).view(1, 2),
        "cache_seqlens": ints(7),
    }
    out, lse = run(given | {"k_cache": k_cache, "v_cache": v_cache}, ver)
    want = run(given | {"k_cache": small_k, "v_cache": small_v}, ver)
    assert torch.equal(out, want[0])
    assert torch.equal(lse, want[1])


# ---------------------------------------------------------------- TRITON_FA_VALIDATE


def values(**changes: Any) -> dict[str, Any]:
    """A call whose values are all in order, until one is changed."""
    return Call(queries=[2, 3], keys=[9, 5]).tensors("cpu") | changes


BAD_VALUES = [
    ({"cu_seqlens_q": ints(1, 2, 5)}, "cu_seqlens_q: expected 0 as the first entry, got 1"),
    ({"cu_seqlens_q": ints(0, 5, 2)}, "got 2 after 5 for sequence 1"),
    ({"cu_seqlens_q": ints(0, 2, 6)}, r"at most 5 \(the tokens of q\), got 6 for sequence 1"),
    ({"max_seqlen_q": 2}, r"between 0 and 2 \(max_seqlen_q\), got 3 for sequence 1"),
    ({"cache_seqlens": ints(9, 21)}, "cache_seqlens: .* 0 and 20 .* got 21 for sequence 1"),
    ({"cache_seqlens": ints(-1, 5)}, "cache_seqlens: .* got -1 for sequence 0"),
    ({"page_table": torch.full((2, 5), 99, dtype=torch.int32)}, "page_table: .* got 99 for page 0"),
    ({"page_table": torch.full((2, 5), -1, dtype=torch.int32)}, "page 0 of sequence 0"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_VALUES)
def test_validation_names_the_value(
    fresh: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    out = torch.full((5, 4, 16), 7.0)
    given = values(**changes) | {"out": out}
    fresh.setenv("TRITON_FA_VALIDATE", "1")
    env.settings.cache_clear()
    with pytest.raises(ArgumentError, match=message):
        run(given, "torch")
    assert (out == 7).all()


def test_validation_of_packed_lengths(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("TRITON_FA_VALIDATE", "1")
    q, k = torch.randn(5, 2, 8), torch.randn(9, 2, 8)
    good: dict[str, Any] = {
        "cu_seqlens_q": ints(0, 2, 5),
        "cu_seqlens_k": ints(0, 4, 9),
        "seqused_q": ints(2, 0),
        "seqused_k": ints(0, 5),
        "max_seqlen_q": 3,
        "max_seqlen_k": 5,
    }
    triton_fa.flash_attn_varlen_func(q, k, k, **good, ver="torch")
    for changes, message in (
        ({"seqused_q": ints(3, 0)}, "seqused_q: .* got 3 for sequence 0"),
        ({"seqused_k": ints(0, 6)}, "seqused_k: .* got 6 for sequence 1"),
        ({"cu_seqlens_k": ints(0, 4, 10)}, r"\(the tokens of k\), got 10"),
        ({"max_seqlen_k": 4}, r"cu_seqlens_k: .* \(max_seqlen_k\), got 5"),
    ):
        for _ in range(2):  # on a miss and on a hit
            with pytest.raises(ArgumentError, match=message):
                triton_fa.flash_attn_varlen_func(q, k, k, **good | changes, ver="torch")


@pytest.mark.parametrize("ver", VERS)
def test_validation_lets_a_legal_call_pass(
    fresh: pytest.MonkeyPatch, ver: str, device: str
) -> None:
    fresh.setenv("TRITON_FA_VALIDATE", "1")
    given = MIXED.tensors(device)
    check(given, ver, causal=True)
    # Freed by the window: their ids mean nothing.
    given["page_table"][1, :2] = -1
    given["cache_seqlens"][0] = 0
    run(given, ver, causal=True, window_size=(3, 0))


def test_validation_is_left_out_while_a_graph_is_captured(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("TRITON_FA_VALIDATE", "1")
    given = values(cu_seqlens_q=ints(0, 5, 2))
    with pytest.raises(ArgumentError):
        run(given, "torch")
    fresh.setattr(validate, "_is_capturing", lambda device: True)
    run(given, "torch")


def test_validation_is_off_unless_asked_for() -> None:
    run(values(cu_seqlens_q=ints(0, 5, 2)), "torch")

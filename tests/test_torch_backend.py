"""ver="torch" against the float64 reference, and partial results merged."""

import math
from itertools import accumulate
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import reference
import triton_fa
from triton_fa.backends import torch as torch_backend

# Float32 throughout: a few roundings of numbers of size 1.
BUDGET = {"atol": 2e-5, "rtol": 0.0}


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def compare(function: str, given: dict[str, Any], **options: Any) -> None:
    out, lse = getattr(triton_fa, function)(**given, **options, return_lse=True, ver="torch")
    want, want_lse = getattr(reference, function)(**given, **options)
    used = ~want[..., 0].isnan()
    torch.testing.assert_close(out[used].double(), want[used], **BUDGET)
    heads_last = lse.transpose(-1, -2)[used].double()
    torch.testing.assert_close(heads_last, want_lse.transpose(-1, -2)[used], **BUDGET)


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A call of any layout: ragged, with empty sequences, and with what no kernel may read."""
    group, heads_kv = draw(st.sampled_from([(1, 1), (1, 3), (4, 2), (5, 1)]))
    heads, d, dv = group * heads_kv, draw(st.sampled_from([8, 40])), draw(st.sampled_from([8, 24]))
    batch = draw(st.integers(1, 4))
    keys = draw(st.lists(st.integers(0, 9), min_size=batch, max_size=batch))
    queries = draw(st.lists(st.integers(0, 6), min_size=batch, max_size=batch))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    layout = draw(st.sampled_from(["packed", "paged", "dense"]))
    seqlens_k, used_k = ints(*keys), None

    q = torch.randn(sum(queries), heads, d, generator=rng)
    given: dict[str, Any] = {
        "q": q,
        "cu_seqlens_q": ints(0, *accumulate(queries)),
        "max_seqlen_q": max(queries),
    }
    if draw(st.booleans()):
        given["seqused_q"] = ints(*(draw(st.integers(0, n)) for n in queries))
    if layout == "packed":
        slack = [n + draw(st.integers(0, 2)) for n in keys]
        used_k = seqlens_k if slack != keys else None
        k, v = (torch.randn(sum(slack), heads_kv, dim, generator=rng) for dim in (d, dv))
        given |= {"cu_seqlens_k": ints(0, *accumulate(slack)), "max_seqlen_k": max(slack)}
    elif layout == "paged":
        page_size = draw(st.sampled_from([1, 3, 4]))
        k, v = (torch.randn(12, page_size, heads_kv, dim, generator=rng) for dim in (d, dv))
        width = -(-max(keys) // page_size) + 1
        table = torch.randint(0, 12, (batch, width), generator=rng, dtype=torch.int32)
        given |= {"page_table": table, "cu_seqlens_k": None}
        used_k = seqlens_k
    else:
        k, v = (torch.randn(batch, 10, heads_kv, dim, generator=rng) for dim in (d, dv))
        given["cu_seqlens_k"] = None
        used_k = seqlens_k
    given |= {"k": k, "v": v, "seqused_k": used_k}
    side = st.sampled_from([-1, None, 0, 2, 20])
    options = {
        "causal": draw(st.booleans()),
        "window_size": (draw(side), draw(side)),
        "softcap": draw(st.sampled_from([0.0, 3.0])),
        "softmax_scale": draw(st.sampled_from([None, 0.3, -0.2])),
        "sinks": draw(st.sampled_from([None, torch.linspace(-2, 2, heads)])),
    }
    return "flash_attn_varlen_func", given, options


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(calls())
def test_any_varlen_call_is_the_reference(call: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
    function, given, options = call
    compare(function, given, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(2, 5, 4, 32, generator=rng).to(dtype)
    k, v = (torch.randn(2, 9, 2, 32, generator=rng).to(dtype) for _ in range(2))
    out, lse = triton_fa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True, ver="torch")
    want, want_lse = reference.flash_attn_func(q, k, v, causal=True)
    assert out.dtype == dtype
    # One rounding to the output's dtype, and no more.
    torch.testing.assert_close(
        out.double(), want, atol=1e-5, rtol=torch.finfo(dtype).eps / 2 * 1.01
    )
    torch.testing.assert_close(lse.double(), want_lse, **BUDGET)


def test_pieces_of_queries_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(0)
    given = {
        name: torch.randn(2, n, heads, 16, generator=rng)
        for name, n, heads in (("q", 13, 4), ("k", 17, 2), ("v", 17, 2))
    }
    monkeypatch.setattr(torch_backend, "_MAX_SCORES", 4 * 17 * 3)
    for window in ((-1, -1), (4, 2), (0, 0)):
        compare("flash_attn_func", given, causal=False, window_size=window)
        compare("flash_attn_func", given, causal=True, window_size=window)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True, "window_size": (5, 0)},
        {"attention_chunk": 8},
        {"cache_leftpad": ints(9)},
        {"cache_leftpad": ints(4), "attention_chunk": 5},
    ],
    ids=["window", "chunk", "leftpad", "leftpad-chunk"],
)
def test_pages_that_no_query_sees_are_not_read(options: dict[str, Any]) -> None:
    # Engines free the pages that a sliding window has left behind.
    rng = torch.Generator().manual_seed(0)
    cache = torch.randn(6, 4, 1, 16, generator=rng)
    q = torch.randn(1, 1, 2, 16, generator=rng)
    where = {"page_table": ints(0, 0, 1, 2).view(1, 4), "cache_seqlens": ints(15)}
    want, _ = reference.flash_attn_with_kvcache(q, cache, cache, **where, **options)
    cache[0] = torch.nan
    out = triton_fa.flash_attn_with_kvcache(q, cache, cache, **where, **options, ver="torch")
    torch.testing.assert_close(out.double(), want, **BUDGET)


def test_an_mla_view_of_one_buffer() -> None:
    # Keys are the whole latent row, values its first part.
    rng = torch.Generator().manual_seed(0)
    cache = torch.randn(5, 2, 1, 24, generator=rng)
    given = {"q": torch.randn(2, 1, 4, 24, generator=rng), "k_cache": cache}
    where = {"page_table": ints(4, 1, 0, 3).view(2, 2), "cache_seqlens": ints(4, 1)}
    compare("flash_attn_with_kvcache", given | {"v_cache": cache[..., :16]}, **where)


def test_no_sequence_and_no_query() -> None:
    k = torch.zeros(3, 1, 8)
    for cu_seqlens, shape in ((ints(0), 0), (ints(0, 0), 0)):
        out, lse = triton_fa.flash_attn_varlen_func(
            torch.zeros(shape, 2, 8),
            k,
            k,
            cu_seqlens,
            ints(0) if len(cu_seqlens) == 1 else ints(0, 3),
            max_seqlen_q=0,
            max_seqlen_k=3,
            return_lse=True,
            ver="torch",
        )
        assert (tuple(out.shape), tuple(lse.shape)) == ((0, 2, 8), (2, 0))


def test_a_cache_without_pages_is_empty() -> None:
    out, lse = triton_fa.flash_attn_with_kvcache(
        torch.ones(1, 1, 2, 8),
        torch.zeros(0, 4, 1, 8),
        torch.zeros(0, 4, 1, 8),
        page_table=ints(0, 1).view(1, 2),
        cache_seqlens=ints(5),
        return_softmax_lse=True,
        ver="torch",
    )
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


# ---------------------------------------------------------------- caches that a call appends to


@st.composite
def cache_calls(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """A call on a paged or dense cache, with any of new keys, rotation, padding and row numbers."""
    group, heads_kv = draw(st.sampled_from([(1, 2), (3, 1)]))
    d, dv = draw(st.sampled_from([16, 40])), 8
    batch = draw(st.integers(1, 3))
    most = 12
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def each(least: int, *highest: int) -> list[int]:
        return [draw(st.integers(least, high)) for high in highest]

    keys, queries, new = each(0, *[most] * batch), each(0, *[5] * batch), each(0, *[4] * batch)
    page_size = draw(st.sampled_from([None, 1, 3, 4]))
    rows = draw(st.permutations(range(batch + 2)))[:batch]
    given: dict[str, Any] = {"cache_seqlens": ints(*keys)}
    if page_size is None:
        shape = (batch + 2, most)
    else:
        width = most // page_size
        # Every page belongs to one sequence: two that append to the same one would race.
        table = torch.randperm((batch + 2) * width, generator=rng, dtype=torch.int32)
        given["page_table"] = table.view(batch + 2, width)
        shape = ((batch + 2) * width, page_size)
    given["cache_batch_idx"] = ints(*rows)
    given |= {
        name: torch.randn(*shape, heads_kv, dim, generator=rng)
        for name, dim in (("k_cache", d), ("v_cache", dv))
    }
    if draw(st.booleans()):
        given["cache_leftpad"] = ints(*each(0, *keys))
    heads = group * heads_kv
    if draw(st.booleans()):
        given |= {"cu_seqlens_q": ints(0, *accumulate(queries)), "max_seqlen_q": max(queries)}
        given["q"] = torch.randn(sum(queries), heads, d, generator=rng)
    else:
        given["q"] = torch.randn(batch, queries[0], heads, d, generator=rng)
    if draw(st.booleans()):
        tokens = (sum(new),) if draw(st.booleans()) else (batch, new[0])
        if len(tokens) == 1:
            given["cu_seqlens_k_new"] = ints(0, *accumulate(new))
        for name, dim in (("k", d), ("v", dv)):
            given[name] = torch.randn(*tokens, heads_kv, dim, generator=rng)
        if draw(st.booleans()):
            half = draw(st.sampled_from([8, d // 16 * 8]))
            angles = torch.randn(most + 6, half, generator=rng)
            given |= {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
            given["rotary_interleaved"] = draw(st.booleans())
            if draw(st.booleans()):
                given["rotary_seqlens"] = ints(*each(0, *[30] * batch))
    side = st.sampled_from([-1, 0, 2, most])
    options = {
        "causal": draw(st.booleans()),
        "window_size": (draw(side), draw(side)),
        "attention_chunk": draw(st.sampled_from([None, 0, 1, 3, 100])),
        "sinks": draw(st.sampled_from([None, torch.linspace(-2, 2, heads)])),
    }
    return given, options


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(cache_calls())
def test_any_call_on_a_cache_is_the_reference(call: tuple[dict[str, Any], dict[str, Any]]) -> None:
    given, options = call
    mine = given | {name: given[name].clone() for name in ("k_cache", "v_cache")}
    out, lse = triton_fa.flash_attn_with_kvcache(
        **mine, **options, return_softmax_lse=True, ver="torch"
    )
    want, want_lse = reference.flash_attn_with_kvcache(**given, **options)
    used = ~want[..., 0].isnan()
    torch.testing.assert_close(out[used].double(), want[used], **BUDGET)
    heads_last = lse.transpose(-1, -2)[used].double()
    torch.testing.assert_close(heads_last, want_lse.transpose(-1, -2)[used], **BUDGET)
    if "k" in given:
        torch.testing.assert_close(mine["k_cache"], given["k_cache"], atol=1e-6, rtol=1e-6)
        assert torch.equal(mine["v_cache"], given["v_cache"])


def appending(**changes: Any) -> dict[str, Any]:
    """Two sequences with 3 and 6 of at most 8 keys that get 2 more each; table row 1 is first."""
    rng = torch.Generator().manual_seed(0)
    given = {
        "q": torch.randn(2, 2, 2, 16, generator=rng),
        "k_cache": torch.randn(5, 4, 1, 16, generator=rng),
        "v_cache": torch.randn(5, 4, 1, 16, generator=rng),
        "page_table": ints(3, 1, 4, 0).view(2, 2),
        "cache_batch_idx": ints(1, 0),
        "cache_seqlens": ints(3, 6),
        "k": torch.randn(2, 2, 1, 16, generator=rng),
        "v": torch.randn(2, 2, 1, 16, generator=rng),
    }
    return given | changes


def append(**changes: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor]:
    """The arguments after the call, the caches before, and the result."""
    given = appending(**changes)
    before = {name: given[name].clone() for name in ("k_cache", "v_cache")}
    return given, before, triton_fa.flash_attn_with_kvcache(**given, ver="torch")


def test_new_keys_and_values_are_written_where_they_belong_and_nowhere_else() -> None:
    given, want, _ = append()
    for name, new in (("k_cache", given["k"]), ("v_cache", given["v"])):
        # Token 3 of the first is slot 3 of page 4, token 4 slot 0 of page 0; then 6 and 7.
        want[name][4, 3], want[name][0, 0] = new[0]
        want[name][1, 2], want[name][1, 3] = new[1]
        assert torch.equal(given[name], want[name])
    assert given["cache_seqlens"].tolist() == [3, 6], "the caller's lengths"


@pytest.mark.parametrize(
    ("changes", "written"),
    [
        ({"page_table": ints(3, 1, 5, -1).view(2, 2)}, [1, 2, 1, 3]),
        ({"page_table": ints(3, 1, 2**31 - 1, 0).view(2, 2)}, [0, 0, 1, 2, 1, 3]),
        ({"cache_batch_idx": ints(2, 0)}, [1, 2, 1, 3]),
        ({"cache_batch_idx": ints(-1, -(2**31))}, []),
        ({"cache_seqlens": ints(3, 7)}, [4, 3, 0, 0, 1, 3]),
        ({"cache_seqlens": ints(2**31 - 1, 8)}, []),
        ({"cache_seqlens": ints(-5, 8)}, [4, 0, 4, 1]),
    ],
    ids=["page-5-of-5", "page-max", "row-2-of-2", "row-negative", "full", "beyond", "negative"],
)
def test_a_key_without_a_place_is_dropped(changes: dict[str, Any], written: list[int]) -> None:
    given, before, out = append(**changes)
    assert out.isfinite().all()
    slots = list(zip(written[::2], written[1::2], strict=True))
    for name in ("k_cache", "v_cache"):
        changed = (given[name] != before[name]).any(-1).any(-1).nonzero().tolist()
        assert sorted(map(tuple, changed)) == sorted(slots)


def test_garbage_in_the_prefix_sums_of_new_keys_stays_inside_them() -> None:
    new = {name: torch.ones(3, 1, 16) for name in ("k", "v")}
    for sums in ((0, 2**31 - 1, 5), (7, -3, 9), (-1, 2, 3)):
        _, _, out = append(**new, cu_seqlens_k_new=ints(*sums))
        assert out.isfinite().all()


def test_a_sequence_or_a_call_without_a_query_still_appends() -> None:
    for q, sums in ((torch.zeros(2, 2, 16), ints(0, 0, 2)), (torch.zeros(0, 2, 16), ints(0, 0, 0))):
        given, _, _ = append(q=q, cu_seqlens_q=sums, max_seqlen_q=2)
        assert torch.equal(given["v_cache"][4, 3], given["v"][0, 0])
        assert torch.equal(given["v_cache"][1, 3], given["v"][1, 1])


def test_strided_queries_are_copied_and_the_caches_are_not() -> None:
    rng = torch.Generator().manual_seed(1)
    q = torch.randn(2, 2, 2, 32, generator=rng)[..., ::2]
    given, _, out = append(q=q)
    assert torch.equal(given["k_cache"][4, 3], given["k"][0, 0])
    assert torch.equal(out, append(q=q.contiguous())[2])


def turned(x: torch.Tensor, angle: float, first: int, second: int) -> torch.Tensor:
    """One token's heads with a pair of dims turned, in float32, in x's dtype."""
    cos, sin = (torch.tensor(f(angle)).to(x.dtype).float() for f in (math.cos, math.sin))
    want, wide = x.clone(), x.float()
    want[..., first] = (wide[..., first] * cos - wide[..., second] * sin).to(x.dtype)
    want[..., second] = (wide[..., first] * sin + wide[..., second] * cos).to(x.dtype)
    return want


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("interleaved", "pair"), [(True, (4, 5)), (False, (2, 10))], ids=["interleaved", "halves"]
)
def test_a_pair_of_dims_is_turned_by_its_own_angle(
    interleaved: bool, pair: tuple[int, int], dtype: torch.dtype
) -> None:
    angles = torch.zeros(12, 8)
    angles[:, 2] = torch.arange(12) * 0.1
    given = {n: t.to(dtype) for n, t in appending().items() if t.is_floating_point()}
    given |= {"rotary_cos": angles.cos().to(dtype), "rotary_sin": angles.sin().to(dtype)}
    given, _, out = append(**given, rotary_interleaved=interleaved, causal=True)
    for seq, (position, places) in enumerate(((3, [(4, 3), (0, 0)]), (6, [(1, 2), (1, 3)]))):
        for nth, place in enumerate(places):
            want = turned(given["k"][seq, nth], (position + nth) * 0.1, *pair)
            torch.testing.assert_close(given["k_cache"][place], want, rtol=1e-6, atol=1e-6)
            assert torch.equal(given["v_cache"][place], given["v"][seq, nth])
    # The same queries, turned by hand, on what the cache now holds.
    q = given["q"].clone()
    for seq, position in enumerate((3, 6)):
        for nth in range(2):
            q[seq, nth] = turned(q[seq, nth], (position + nth) * 0.1, *pair)
    read = {n: given[n] for n in ("k_cache", "v_cache", "page_table", "cache_batch_idx")}
    want = triton_fa.flash_attn_with_kvcache(
        q, **read, cache_seqlens=ints(5, 8), causal=True, ver="torch"
    )
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


# (options, whether query 1 is turned further than query 0), with 2 queries and at most 8 keys.
# None of them hides a key of these lengths, but in a longer batch they might.
MOVING = [
    ({}, False),
    ({"window_size": (6, -1)}, True),
    ({"window_size": (7, -1)}, False),
    ({"window_size": (-1, 1)}, False),
    ({"attention_chunk": 100}, True),
]


@pytest.mark.parametrize(("options", "moving"), MOVING, ids=[str(o) for o, _ in MOVING])
def test_queries_move_where_a_mask_may_hide_a_key(options: dict[str, Any], moving: bool) -> None:
    rng = torch.Generator().manual_seed(2)
    angles = torch.randn(12, 8, generator=rng)
    q = torch.randn(2, 1, 2, 16, generator=rng).repeat(1, 2, 1, 1)
    _, _, out = append(q=q, rotary_cos=angles.cos(), rotary_sin=angles.sin(), **options)
    assert torch.equal(out[:, 0], out[:, 1]) == (not moving)


@pytest.mark.parametrize(("begin", "row"), [(100, 11), (2**31 - 1, 11), (-100, 0)])
def test_positions_beyond_the_tables_use_their_outer_rows(begin: int, row: int) -> None:
    rng = torch.Generator().manual_seed(3)
    angles = torch.randn(12, 8, generator=rng)
    rotary = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    one = {n: t.expand(12, -1).contiguous() for n, t in ((n, t[row]) for n, t in rotary.items())}
    got, _, out = append(**rotary, rotary_seqlens=ints(begin, begin), causal=True)
    want, _, want_out = append(**one, causal=True)
    assert torch.equal(got["k_cache"], want["k_cache"])
    assert torch.equal(out, want_out)


def test_chunks_of_rows_before_the_first_key_hold_no_key() -> None:
    # Row i is at key position i - 4: rows 0 to 3 are in chunks -2 and -1, 4 and 5 in chunk 0.
    rng = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, n, 1, 8, generator=rng) for n in (7, 3, 3))
    out, lse = triton_fa.flash_attn_func(
        q, k, v, attention_chunk=2, return_attn_probs=True, ver="torch"
    )
    assert (out[:, :4] == 0).all()
    assert (lse[..., :4] == -torch.inf).all()
    for rows, keys in ((slice(4, 6), slice(0, 2)), (slice(6, 7), slice(2, 3))):
        want = triton_fa.flash_attn_func(q[:, rows], k[:, keys], v[:, keys], ver="torch")
        torch.testing.assert_close(out[:, rows], want, **BUDGET)


# ---------------------------------------------------------------- merging


def halves(empty: bool = False) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Attention over all keys, and over the keys before and after a cut."""
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(1, 3, 4, 10, generator=rng)
    k, v = (torch.randn(1, 9, 2, 10, generator=rng) for _ in range(2))

    def attend(part: slice) -> Any:
        return triton_fa.flash_attn_func(
            q, k[:, part], v[:, part], return_attn_probs=True, ver="torch"
        )

    parts = [attend(slice(0, 4)), attend(slice(4, 9))]
    if empty:
        parts.append((torch.full_like(q, torch.nan), torch.full((1, 4, 3), -torch.inf)))
    out, lse = attend(slice(0, 9))
    return {"out": out, "lse": lse}, parts


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_combined_splits_are_the_whole(packed: bool, empty: bool) -> None:
    whole, parts = halves(empty)
    outs = torch.stack([out for out, _ in parts])
    lses = torch.stack([lse.transpose(1, 2) for _, lse in parts])
    if packed:
        outs, lses = outs[:, 0], lses[:, 0]
    out, lse = triton_fa.flash_attn_combine(outs, lses)
    want_lse = whole["lse"].transpose(1, 2)
    torch.testing.assert_close(out, whole["out"][0] if packed else whole["out"], **BUDGET)
    torch.testing.assert_close(lse, want_lse[0] if packed else want_lse, **BUDGET)
    assert lse.transpose(-1, -2).is_contiguous(), "a view of (heads, seqlen)"


@pytest.mark.parametrize("head_dim", [1, 3, 10, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_combine_writes_the_callers_buffer(head_dim: int, dtype: torch.dtype) -> None:
    outs, lses = torch.ones(2, 1, 3, 4, head_dim), torch.zeros(2, 1, 3, 4)
    buffer = torch.full((1, 3, 4, head_dim), torch.nan, dtype=dtype)
    out, lse = triton_fa.flash_attn_combine(outs, lses, out=buffer, out_dtype=dtype)
    assert out is buffer
    assert (buffer == 1).all()
    torch.testing.assert_close(lse, torch.full_like(lse, 2.0).log())
    assert triton_fa.flash_attn_combine(outs, lses, out_dtype=dtype)[0].dtype == dtype


@pytest.mark.parametrize("value", [-torch.inf, torch.inf])
def test_combining_nothing_gives_nothing(value: float) -> None:
    outs = torch.full((256, 1, 2, 3, 8), torch.nan)
    out, lse = triton_fa.flash_attn_combine(outs, torch.full((256, 1, 2, 3), value))
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_two_states_merge_to_the_whole() -> None:
    whole, parts = halves()
    (v_a, s_a), (v_b, s_b) = ((out[0], lse[0].T) for out, lse in parts)
    v, s = triton_fa.merge_state(v_a, s_a, v_b, s_b)
    torch.testing.assert_close(v, whole["out"][0], **BUDGET)
    torch.testing.assert_close(s, whole["lse"][0].T, **BUDGET)
    v_buffer, s_buffer = torch.empty_like(v), torch.empty_like(s)
    in_place = triton_fa.merge_state(v_a, s_a, v_b, s_b, v_buffer, s_buffer)
    assert in_place[0] is v_buffer
    assert in_place[1] is s_buffer
    triton_fa.merge_state(v_a, s_a, v_b, s_b, v_a, s_a)
    for merged in (v_buffer, v_a):
        assert torch.equal(merged, v)
    for merged in (s_buffer, s_a):
        assert torch.equal(merged, s)


@pytest.mark.parametrize("value", [-torch.inf, torch.inf])
def test_an_empty_state_weighs_nothing(value: float) -> None:
    garbage = torch.full((3, 4, 8), torch.nan, dtype=torch.bfloat16)
    empty = torch.full((3, 4), value)
    full, sums = torch.ones(3, 4, 8, dtype=torch.bfloat16), torch.full((3, 4), 0.5)
    for v, s in (
        triton_fa.merge_state(garbage, empty, full, sums),
        triton_fa.merge_state(full, sums, garbage, empty),
    ):
        assert torch.equal(v, full)
        assert torch.equal(s, sums)
    v, s = triton_fa.merge_state(garbage, empty, garbage, empty)
    assert (v == 0).all()
    assert (s == -torch.inf).all()

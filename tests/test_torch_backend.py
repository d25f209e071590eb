"""ver="torch" against the float64 reference, and partial results merged."""

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


def test_a_window_reads_its_own_pages_only(monkeypatch: pytest.MonkeyPatch) -> None:
    # Engines free the pages that a sliding window has left behind.
    rng = torch.Generator().manual_seed(0)
    cache = torch.randn(6, 4, 1, 16, generator=rng)
    cache[0] = torch.nan
    given = {"q": torch.randn(1, 1, 2, 16, generator=rng), "k_cache": cache, "v_cache": cache}
    where = {"page_table": ints(0, 0, 1, 2).view(1, 4), "cache_seqlens": ints(15)}
    compare("flash_attn_with_kvcache", given, **where, causal=True, window_size=(5, 0))


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

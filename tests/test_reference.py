"""The fp64 reference against PyTorch's own attention, hand-computed cases and brute force."""

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import reference

INF = math.inf


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def close(got: torch.Tensor, want: torch.Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=atol, equal_nan=True)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
    """PyTorch's attention on (batch, seqlen, heads, dim)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    attention = torch.nn.functional.scaled_dot_product_attention
    return attention(q, k, v, enable_gqa=True, **options).transpose(1, 2)


def naive(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    window: tuple[int | None, int | None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """One (row, head) at a time, over Python lists of visible keys."""
    (sq, heads, dim), (sk, heads_kv, dim_v) = q.shape, v.shape
    out = torch.zeros(sq, heads, dim_v, dtype=torch.float64)
    lse = torch.full((heads, sq), -INF, dtype=torch.float64)
    left = INF if window[0] is None or window[0] < 0 else window[0]
    right = INF if window[1] is None or window[1] < 0 else window[1]
    if causal:
        right = 0
    for i in range(sq):
        here = i + sk - sq
        seen = [j for j in range(sk) if here - left <= j <= here + right]
        for h in range(heads):
            kv = h // (heads // heads_kv)
            scores = [float(q[i, h] @ k[j, kv]) / math.sqrt(dim) for j in seen]
            total = sum(math.exp(s) for s in scores)
            if not seen:
                continue
            lse[h, i] = math.log(total)
            out[i, h] = sum(
                math.exp(s) / total * v[j, kv] for s, j in zip(scores, seen, strict=True)
            )
    return out, lse


@pytest.mark.parametrize("heads_kv", [1, 2, 6])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_full_attention_is_sdpa(heads_kv: int, scale: float | None) -> None:
    q, k, v = randn(2, 7, 6, 16), randn(2, 11, heads_kv, 16, seed=1), randn(2, 11, heads_kv, 24)
    out, _ = reference.flash_attn_func(q, k, v, softmax_scale=scale)
    close(out, sdpa(q, k, v, scale=scale))


@pytest.mark.parametrize("seqlen", [1, 9])
def test_square_causal_is_sdpa(seqlen: int) -> None:
    q, k, v = (randn(2, seqlen, 4, 8, seed=i) for i in range(3))
    out, _ = reference.flash_attn_func(q, k, v, causal=True)
    close(out, sdpa(q, k, v, is_causal=True))


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    sq=st.integers(0, 6),
    sk=st.integers(0, 7),
    causal=st.booleans(),
    window=st.tuples(*[st.sampled_from([None, -1, 0, 1, 3, 10])] * 2),
)
def test_masks_are_what_a_loop_over_keys_says(
    sq: int, sk: int, causal: bool, window: tuple[int | None, int | None]
) -> None:
    q, k, v = randn(sq, 4, 8), randn(sk, 2, 8, seed=1), randn(sk, 2, 8, seed=2)
    rules = reference.attention.rules(8, None, causal, window, 0.0)
    out, lse = reference.attend(q, k, v, rules)
    want_out, want_lse = naive(q, k, v, causal, window)
    close(out, want_out)
    close(lse, want_lse)


def test_causal_is_aligned_bottom_right() -> None:
    rules = reference.Rules(1.0, causal=True)
    rows = torch.arange(3)
    assert reference.visible_keys(rows, 3, 5, rules).int().tolist() == [
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]
    assert reference.visible_keys(rows, 3, 1, rules).int().tolist() == [[0], [0], [1]]


def test_window_sides_are_inclusive() -> None:
    rules = reference.Rules(1.0, window_left=1, window_right=0)
    rows = torch.arange(3)
    assert reference.visible_keys(rows, 3, 3, rules).int().tolist() == [
        [1, 0, 0],
        [1, 1, 0],
        [0, 1, 1],
    ]


def hand_case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One query; scores are 0 and ln 3, so the weights are 1/4 and 3/4."""
    q = torch.tensor([[[[1.0]]]], dtype=torch.float64)
    k = torch.tensor([0.0, math.log(3)], dtype=torch.float64).view(1, 2, 1, 1)
    v = torch.tensor([4.0, 8.0], dtype=torch.float64).view(1, 2, 1, 1)
    return q, k, v


def test_two_keys_by_hand() -> None:
    out, lse = reference.flash_attn_func(*hand_case())
    assert out.item() == pytest.approx(0.25 * 4 + 0.75 * 8)
    assert lse.item() == pytest.approx(math.log(4))


def test_a_sink_by_hand() -> None:
    """A sink of ln 4 doubles the denominator and adds no value."""
    sinks = torch.tensor([math.log(4)])
    out, lse = reference.flash_attn_func(*hand_case(), sinks=sinks, softmax_scale=1.0)
    assert out.item() == pytest.approx(3.5)
    assert lse.item() == pytest.approx(math.log(8))


def test_softcap_by_hand() -> None:
    q, k, v = hand_case()
    out, lse = reference.flash_attn_func(q, k, v, softcap=0.5)
    capped = 0.5 * math.tanh(math.log(3) / 0.5)
    weights = 1.0, math.exp(capped)
    assert out.item() == pytest.approx((weights[0] * 4 + weights[1] * 8) / sum(weights))
    assert lse.item() == pytest.approx(math.log(sum(weights)))


@pytest.mark.parametrize("attend", [reference.attend, reference.attend_low_precision])
def test_rows_without_keys(attend: reference.entries.Attend) -> None:
    q, k, v = randn(1, 3, 2, 8), randn(1, 1, 1, 8, seed=1), randn(1, 1, 1, 8, seed=2)
    out, lse = reference.flash_attn_func(q, k, v, causal=True, attend=attend)
    assert (out[0, :2] == 0).all()
    assert (lse[0, :, :2] == -INF).all()
    assert out[0, 2].abs().min() > 0

    sinks = torch.tensor([1.5, -2.0])
    out, lse = reference.flash_attn_func(q, k, v, causal=True, sinks=sinks, attend=attend)
    assert (out[0, :2] == 0).all()
    close(lse[0, :, :2], sinks.double()[:, None].expand(2, 2), atol=1e-6)


def test_no_keys_at_all() -> None:
    out, lse = reference.flash_attn_func(randn(2, 3, 2, 8), randn(2, 0, 1, 8), randn(2, 0, 1, 8))
    assert (out == 0).all()
    assert (lse == -INF).all()


def test_pages_are_followed_and_garbage_entries_are_not_read() -> None:
    q, k, v = randn(2, 1, 4, 8), randn(2, 7, 2, 8, seed=1), randn(2, 7, 2, 8, seed=2)
    table = torch.tensor([[4, 1, 2, -1], [0, 2**31 - 1, -7, -7]], dtype=torch.int32)
    lengths = torch.tensor([7, 2], dtype=torch.int32)
    caches = torch.full((2, 5, 3, 2, 8), math.nan, dtype=torch.float64)
    for cache, source in zip(caches, (k, v), strict=True):
        cache[4], cache[1], cache[2, :1] = source[0, :3], source[0, 3:6], source[0, 6:]
        cache[0, :2] = source[1, :2]
    out, lse = reference.flash_attn_with_kvcache(
        q, *caches, cache_seqlens=lengths, page_table=table
    )
    for b, n in enumerate((7, 2)):
        one = slice(b, b + 1)
        want, want_lse = reference.flash_attn_func(q[one], k[one, :n], v[one, :n])
        close(out[one], want)
        close(lse[one], want_lse)


@pytest.mark.parametrize("lengths", [None, 4, torch.tensor([4, 4], dtype=torch.int32)])
def test_dense_cache_lengths(lengths: torch.Tensor | int | None) -> None:
    q, k, v = randn(2, 2, 4, 8), randn(2, 6, 2, 8, seed=1), randn(2, 6, 2, 8, seed=2)
    out, _ = reference.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True)
    used = 6 if lengths is None else 4
    close(out, reference.flash_attn_func(q, k[:, :used], v[:, :used], causal=True)[0])


def test_packed_sequences_and_untouched_rows() -> None:
    q, k, v = randn(9, 4, 8), randn(10, 2, 8, seed=1), randn(10, 2, 8, seed=2)
    out, lse = reference.flash_attn_varlen_func(
        q,
        k,
        v,
        torch.tensor([0, 3, 8]),
        torch.tensor([0, 4, 10]),
        seqused_q=torch.tensor([2, 5]),
        seqused_k=torch.tensor([4, 3]),
        causal=True,
    )
    for rows, keys in ((slice(0, 2), slice(0, 4)), (slice(3, 8), slice(4, 7))):
        want, want_lse = reference.flash_attn_func(
            q[None, rows], k[None, keys], v[None, keys], causal=True
        )
        close(out[rows], want[0])
        close(lse[:, rows], want_lse[0])
    assert out[[2, 8]].isnan().all()
    assert lse[:, [2, 8]].isnan().all()


def test_query_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = randn(1, 9, 4, 8), randn(1, 12, 2, 8, seed=1), randn(1, 12, 2, 8, seed=2)
    whole, whole_lse = reference.flash_attn_func(q, k, v, causal=True, window_size=(3, -1))
    monkeypatch.setattr(reference.attention, "MAX_SCORES_IN_MEMORY", 2 * 2 * 12)
    assert len(reference.attention.row_blocks(9, 24)) == 5
    blocks, blocks_lse = reference.flash_attn_func(q, k, v, causal=True, window_size=(3, -1))
    close(blocks, whole)
    close(blocks_lse, whole_lse)


@pytest.mark.parametrize(("dtype", "low", "high"), [
    (torch.float32, 1e-9, 1e-5), (torch.float16, 1e-6, 5e-3), (torch.bfloat16, 1e-5, 5e-2),
])  # fmt: skip
def test_the_baseline_is_off_by_the_rounding_of_its_dtype(
    dtype: torch.dtype, low: float, high: float
) -> None:
    q, k, v = (randn(1, 40, 4, 32, seed=i).to(dtype) for i in range(3))
    exact, _ = reference.flash_attn_func(q, k, v, causal=True)
    baseline, _ = reference.flash_attn_func(
        q, k, v, causal=True, attend=reference.attend_low_precision
    )
    assert low < (baseline - exact).abs().max().item() < high

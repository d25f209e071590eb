"""The fp64 reference against PyTorch's own attention, hand-computed cases and brute force."""

import functools
import math
from typing import Any, NamedTuple

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
    chunk: int = 0,
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
        if chunk:
            first = math.floor(here / chunk) * chunk
            seen = [j for j in seen if first <= j < first + chunk]
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
    chunk=st.sampled_from([0, 0, 1, 2, 3, 10]),
)
def test_masks_are_what_a_loop_over_keys_says(
    sq: int, sk: int, causal: bool, window: tuple[int | None, int | None], chunk: int
) -> None:
    q, k, v = randn(sq, 4, 8), randn(sk, 2, 8, seed=1), randn(sk, 2, 8, seed=2)
    rules = reference.attention.rules(8, None, causal, window, 0.0, chunk)
    out, lse = reference.attend(q, k, v, rules)
    want_out, want_lse = naive(q, k, v, causal, window, chunk)
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


def test_chunks_are_cut_at_multiples_and_go_on_below_zero() -> None:
    rules = reference.Rules(1.0, attention_chunk=2)
    rows = torch.arange(4)
    assert reference.visible_keys(rows, 4, 5, rules).int().tolist() == [
        [1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    # Rows at -1 and -2 are in the chunk before the first key.
    assert reference.visible_keys(rows, 4, 2, rules).int().tolist() == [
        [0, 0],
        [0, 0],
        [1, 1],
        [1, 1],
    ]


@pytest.mark.parametrize("chunk", [None, 0, 3])
def test_every_function_has_the_chunk(chunk: int | None) -> None:
    q, k, v = randn(1, 4, 2, 8), randn(1, 7, 2, 8, seed=1), randn(1, 7, 2, 8, seed=2)
    options = {"causal": True, "attention_chunk": chunk}
    want, _ = naive(q[0], k[0], v[0], True, (-1, -1), chunk or 0)
    close(reference.flash_attn_func(q, k, v, **options)[0][0], want)
    close(reference.flash_attn_with_kvcache(q, k, v, **options)[0][0], want)
    cu = torch.tensor([0, 4]), torch.tensor([0, 7])
    close(reference.flash_attn_varlen_func(q[0], k[0], v[0], *cu, **options)[0], want)


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


class Appended(NamedTuple):
    """Two sequences: what is in their caches, what is appended, and the call that does it."""

    call: dict[str, Any]
    old: list[tuple[torch.Tensor, torch.Tensor]]
    new: list[tuple[torch.Tensor, torch.Tensor]]

    @property
    def q(self) -> list[torch.Tensor]:
        return list(self.call["q"])

    def in_cache(self, b: int, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [first, end) of a sequence, found one by one."""
        k_cache, v_cache = self.call["k_cache"], self.call["v_cache"]
        table = self.call.get("page_table")
        places = [(b, j) if table is None else (int(table[b, j // 3]), j % 3)
                  for j in range(first, end)]  # fmt: skip
        picked = [torch.stack([cache[place] for place in places]) for cache in (k_cache, v_cache)]
        return picked[0], picked[1]


def appending(lengths: tuple[int, int], new: tuple[int, int], paged: bool) -> Appended:
    """Caches with room for 9 tokens, NaN wherever nothing was written."""
    q = randn(2, 2, 4, 16)
    old = [(randn(n, 2, 16, seed=10 + n), randn(n, 2, 8, seed=20 + n)) for n in lengths]
    add = [(randn(n, 2, 16, seed=30 + n), randn(n, 2, 8, seed=40 + n)) for n in new]
    shape = (7, 3) if paged else (2, 9)
    k_cache = torch.full((*shape, 2, 16), math.nan, dtype=torch.float64)
    v_cache = torch.full((*shape, 2, 8), math.nan, dtype=torch.float64)
    table = torch.tensor([[4, 1, 6], [0, 5, 2]], dtype=torch.int32)
    for b, (k, v) in enumerate(old):
        for j in range(lengths[b]):
            place = (int(table[b, j // 3]), j % 3) if paged else (b, j)
            k_cache[place], v_cache[place] = k[j], v[j]
    call = {
        "q": q,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "k": torch.cat([k for k, _ in add]),
        "v": torch.cat([v for _, v in add]),
        "cu_seqlens_k_new": torch.tensor([0, new[0], sum(new)], dtype=torch.int32),
        "cache_seqlens": torch.tensor(lengths, dtype=torch.int32),
    }
    return Appended(call | ({"page_table": table} if paged else {}), old, add)


def each_alone(
    q: list[torch.Tensor], keys: list[tuple[torch.Tensor, torch.Tensor]], **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every sequence in a call of its own."""
    results = [
        reference.flash_attn_func(q_b[None], k[None], v[None], **options)
        for q_b, (k, v) in zip(q, keys, strict=True)
    ]
    return torch.cat([out for out, _ in results]), torch.cat([lse for _, lse in results])


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_appending_is_concatenating(paged: bool, causal: bool) -> None:
    case = appending((4, 0), (3, 7), paged)
    before = case.call["k_cache"].isnan().sum()
    out, lse = reference.flash_attn_with_kvcache(**case.call, causal=causal)
    joined = [(torch.cat((a, c)), torch.cat((b, d)))
              for (a, b), (c, d) in zip(case.old, case.new, strict=True)]  # fmt: skip
    want, want_lse = each_alone(case.q, joined, causal=causal)
    close(out, want)
    close(lse, want_lse)
    for b, (k, v) in enumerate(joined):
        assert torch.equal(case.in_cache(b, 0, 7)[0], k)
        assert torch.equal(case.in_cache(b, 0, 7)[1], v)
    assert before - case.call["k_cache"].isnan().sum() == 10 * 2 * 16


def test_equally_many_new_tokens_and_an_int_length() -> None:
    packed, batched = appending((4, 4), (2, 2), True), appending((4, 4), (2, 2), True)
    dense = {name: batched.call[name].view(2, 2, 2, -1) for name in ("k", "v")}
    changed = {**dense, "cu_seqlens_k_new": None, "cache_seqlens": 4}
    want = reference.flash_attn_with_kvcache(**packed.call)
    close(reference.flash_attn_with_kvcache(**batched.call | changed)[0], want[0])
    close(batched.call["k_cache"], packed.call["k_cache"])


def test_a_prefix_sum_without_new_keys_is_ignored() -> None:
    call = appending((4, 5), (0, 0), False).call
    want = reference.flash_attn_with_kvcache(**call)
    for prefix in (None, torch.tensor([7, -3])):
        without = call | {"k": None, "v": None, "cu_seqlens_k_new": prefix}
        close(reference.flash_attn_with_kvcache(**without)[0], want[0])


@pytest.mark.parametrize("paged", [False, True])
def test_what_the_cache_has_no_room_for_is_dropped(paged: bool) -> None:
    case = appending((4, 9), (7, 2), paged)
    out, _ = reference.flash_attn_with_kvcache(**case.call, causal=True)
    kept = [(torch.cat((case.old[0][0], case.new[0][0][:5])),
             torch.cat((case.old[0][1], case.new[0][1][:5]))), case.old[1]]  # fmt: skip
    close(out, each_alone(case.q, kept, causal=True)[0])
    assert torch.equal(case.in_cache(1, 0, 9)[0], case.old[1][0])


def angles(rows: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    turn = randn(rows, half, seed=7)
    return turn.cos(), turn.sin()


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_rotation_is_a_complex_multiplication(interleaved: bool) -> None:
    x, (cos, sin) = randn(5, 2, 16), angles(9, 4)
    positions = torch.tensor([0, 8, 3, 3, 7])
    got = reference.rotate(x, (cos, sin), positions, interleaved)
    turned = x[..., :8].unflatten(-1, (4, 2) if interleaved else (2, 4))
    number = (
        torch.view_as_complex((turned if interleaved else turned.transpose(-1, -2)).contiguous())
        * torch.complex(cos, sin)[positions, None]
    )
    parts = torch.view_as_real(number)
    want = (parts if interleaved else parts.transpose(-1, -2)).flatten(-2)
    close(got[..., :8], want)
    assert torch.equal(got[..., 8:], x[..., 8:])


def test_a_quarter_turn_by_hand() -> None:
    x = torch.arange(1.0, 5.0).view(1, 1, 4)
    tables = torch.zeros(1, 2), torch.ones(1, 2)
    assert reference.rotate(x, tables, torch.tensor([0]), True).flatten().tolist() == [-2, 1, -4, 3]
    assert reference.rotate(x, tables, torch.tensor([0]), False).flatten().tolist() == [
        -3, -4, 1, 2,
    ]  # fmt: skip


def test_positions_behind_the_table_use_its_last_row() -> None:
    x, tables = randn(3, 2, 16), angles(4, 8)
    far = reference.rotate(x, tables, torch.tensor([3, 4, 1000]), True)
    assert torch.equal(far, reference.rotate(x, tables, torch.tensor([3, 3, 3]), True))


def test_what_is_rotated_is_rounded_to_its_dtype() -> None:
    x, tables = randn(50, 2, 16).bfloat16(), tuple(t.bfloat16() for t in angles(50, 8))
    positions = torch.arange(50)
    got = reference.rotate(x, tables, positions, False)
    exact = reference.rotate(x.double(), tables, positions, False)
    assert torch.equal(got, exact.bfloat16())
    close(exact, reference.rotate_low_precision(x.double(), tables, positions, False), atol=1e-6)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("given", [None, [11, 2]])
def test_new_keys_and_causal_queries_are_rotated_by_their_positions(
    paged: bool, interleaved: bool, given: list[int] | None
) -> None:
    case, tables = appending((4, 0), (3, 5), paged), angles(20, 4)
    starts = given or [4, 0]
    rotary = {
        "rotary_cos": tables[0],
        "rotary_sin": tables[1],
        "rotary_seqlens": None if given is None else torch.tensor(given),
        "rotary_interleaved": interleaved,
    }
    out, _ = reference.flash_attn_with_kvcache(**case.call, **rotary, causal=True)
    keys, queries = [], []
    for b, p in enumerate(starts):
        k, v = case.new[b]
        turned = [reference.rotate(k[t : t + 1], tables, torch.tensor([p + t]), interleaved)
                  for t in range(len(k))]  # fmt: skip
        keys.append((torch.cat((case.old[b][0], *turned)), torch.cat((case.old[b][1], v))))
        queries.append(reference.rotate(case.q[b], tables, torch.tensor([p, p + 1]), interleaved))
        got_k, got_v = case.in_cache(b, 0, len(keys[b][0]))
        assert torch.equal(got_k, keys[b][0])
        assert torch.equal(got_v, keys[b][1])
    close(out, each_alone(queries, keys, causal=True)[0])


@pytest.mark.parametrize(
    ("options", "moves"),
    [
        ({}, False),
        ({"causal": True}, True),
        ({"window_size": (-1, 0)}, True),
        ({"window_size": (7, -1)}, True),
        ({"window_size": (8, -1)}, False),  # 9 slots: a window of 8 to the left hides none
        ({"window_size": (-1, 1)}, False),  # 2 queries: nothing is hidden to the right
        ({"window_size": (8, 1)}, False),
        ({"attention_chunk": 100}, True),
        ({"causal": True, "window_size": (8, 1)}, True),
    ],
)
def test_queries_move_where_a_mask_may_hide_a_key(options: dict[str, Any], moves: bool) -> None:
    tables = angles(20, 4)
    rotary = {"rotary_cos": tables[0], "rotary_sin": tables[1]}
    case, again = (appending((4, 2), (3, 5), False) for _ in range(2))
    out, _ = reference.flash_attn_with_kvcache(**case.call, **rotary, **options)
    q = torch.stack([
        reference.rotate(q, tables, torch.tensor([p, p + moves]), True)
        for q, p in zip(case.q, (4, 2), strict=True)
    ])  # fmt: skip
    again.call["k"] = torch.cat([
        reference.rotate(k, tables, p + torch.arange(len(k)), True)
        for (k, _), p in zip(case.new, (4, 2), strict=True)
    ])  # fmt: skip
    close(out, reference.flash_attn_with_kvcache(**again.call | {"q": q}, **options)[0])


@pytest.mark.parametrize(("most", "moves"), [(2, False), (3, True)])
def test_of_packed_queries_the_bound_says_what_a_window_hides(most: int, moves: bool) -> None:
    tables = angles(20, 4)
    call = appending((4, 2), (3, 5), False).call
    rotary = {"rotary_cos": tables[0], "rotary_sin": tables[1], "window_size": (-1, 1)}
    packed = {
        "q": call["q"].flatten(0, 1),
        "cu_seqlens_q": torch.tensor([0, 2, 4]),
        "max_seqlen_q": most,
    }
    out, _ = reference.flash_attn_with_kvcache(**call | packed, **rotary)
    alike = {"causal": False, "attention_chunk": 100 if moves else 0}
    want, _ = reference.flash_attn_with_kvcache(**call | alike, **rotary)
    close(out.view_as(want), want)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (2, 0)},
                                     {"attention_chunk": 3}])  # fmt: skip
def test_left_padding_is_slicing(paged: bool, options: dict[str, Any]) -> None:
    case = appending((7, 2), (2, 4), paged)
    leftpads = torch.tensor([3, 1], dtype=torch.int32)
    out, lse = reference.flash_attn_with_kvcache(**case.call, cache_leftpad=leftpads, **options)
    keys = [case.in_cache(b, first, end) for b, (first, end) in enumerate(((3, 9), (1, 6)))]
    want, want_lse = each_alone(case.q, keys, **options)
    close(out, want)
    close(lse, want_lse)


def test_padding_up_to_the_end_leaves_no_key() -> None:
    case = appending((4, 3), (0, 0), True)
    leftpads = torch.tensor([4, 8])
    out, lse = reference.flash_attn_with_kvcache(**case.call, cache_leftpad=leftpads)
    assert (out == 0).all()
    assert (lse == -INF).all()


@pytest.mark.parametrize("paged", [False, True])
def test_rows_of_the_cache_are_looked_up(paged: bool) -> None:
    want_case, case = (appending((4, 3), (1, 2), paged) for _ in range(2))
    want = reference.flash_attn_with_kvcache(**want_case.call)
    call = dict(case.call)
    nobody = torch.tensor([2, 0])
    if paged:
        table = torch.full((3, 3), -9, dtype=torch.int32)
        table[nobody] = call["page_table"]
        call["page_table"] = table
    else:
        for name in ("k_cache", "v_cache"):
            rows = torch.full((3, *call[name].shape[1:]), math.nan, dtype=torch.float64)
            rows[nobody] = call[name]
            call[name] = rows
    out, lse = reference.flash_attn_with_kvcache(**call, cache_batch_idx=nobody)
    close(out, want[0])
    close(lse, want[1])
    got = call["k_cache"] if paged else call["k_cache"][nobody]
    close(got, want_case.call["k_cache"])


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


# ---------------------------------------------------------------- values besides, and 8 bits


def test_a_second_part_is_more_dims() -> None:
    q, qv = randn(2, 7, 6, 16), randn(2, 7, 6, 24, seed=1)
    k, v = randn(2, 11, 2, 16, seed=2), randn(2, 11, 2, 24, seed=3)
    out, _ = reference.flash_attn_func(q, k, v, qv=qv)
    more = torch.cat((q, qv), -1), torch.cat((k, v), -1)
    close(out, sdpa(*more, v, scale=40**-0.5))


def test_values_alone() -> None:
    qv, v = randn(2, 7, 6, 24, seed=1), randn(2, 11, 2, 24, seed=3)
    table = torch.tensor([[1], [0]], dtype=torch.int32)
    out, _ = reference.flash_attn_with_kvcache(
        None, None, v[[1, 0]], qv=qv, only_qv=True, page_table=table
    )
    close(out, sdpa(qv, v, v))
    packed = torch.tensor([0, 7, 14]), torch.tensor([0, 11, 22])
    nan = torch.full((22, 2, 16), torch.nan)
    again, _ = reference.flash_attn_varlen_func(
        torch.full((14, 6, 16), torch.nan), nan, v.flatten(0, 1), *packed,
        qv=qv.flatten(0, 1), only_qv=True,
    )  # fmt: skip
    close(again.view_as(out), out)


def test_factors_are_of_kv_heads_and_of_float8_alone() -> None:
    factors = {f"{name}_descale": 0.5 + torch.rand(2, 2) for name in "qkv"}
    inputs = [randn(2, n, h, 16, seed=n).float() for n, h in ((7, 6), (11, 2), (13, 2))]
    inputs[2] = inputs[2][:, :11]
    ignored, _ = reference.flash_attn_func(*inputs, **factors)
    close(ignored, reference.flash_attn_func(*inputs)[0])
    for dtype in reference.float8.DTYPES:
        eights = [x.to(dtype) for x in inputs]
        scaled = [
            x.double() * f.double().repeat_interleave(x.shape[2] // 2, 1)[:, None, :, None]
            for x, f in zip(eights, factors.values(), strict=True)
        ]
        out, _ = reference.flash_attn_func(*eights, **factors)
        close(out, sdpa(*scaled))
        mixed, _ = reference.flash_attn_func(inputs[0].half(), *eights[1:], k_descale=None)
        close(mixed, sdpa(inputs[0].half().double(), *(x.double() for x in eights[1:])))


@pytest.mark.parametrize("second", [False, True])
def test_the_baseline_of_eight_bits_rounds_weights_to_them(second: bool) -> None:
    q, k, v = (randn(1, 40, 4, 32, seed=i).to(torch.float8_e4m3fn) for i in range(3))
    more = {"qv": randn(1, 40, 4, 32, seed=5).bfloat16()} if second else {}
    q = q.bfloat16() if second else q
    exact, _ = reference.flash_attn_func(q, k, v, **more)
    errors = []
    for dtype in (None, torch.float8_e4m3fn):
        out, _ = reference.flash_attn_func(
            q, k, v, **more,
            dequantise=reference.dequantise_low_precision,
            attend=functools.partial(reference.attend_low_precision, weights_dtype=dtype),
        )  # fmt: skip
        errors.append((out - exact).abs().mean().item())
    assert 1e-5 < errors[0] < 2e-3
    assert 3 * errors[0] < errors[1] < 2e-2


def test_float8_is_appended_as_it_is() -> None:
    k, v, new = (randn(2, n, 1, 8, seed=n).to(torch.float8_e5m2) for n in (5, 6, 2))
    v = v[:, :5].contiguous()
    lengths = torch.tensor([3, 4])
    reference.flash_attn_with_kvcache(randn(2, 1, 2, 8).half(), k, v, new, new,
                                      cache_seqlens=lengths)  # fmt: skip
    assert torch.equal(k[0, 3:5].float(), new[0].float())
    assert torch.equal(v[1, 4].float(), new[1, 0].float())

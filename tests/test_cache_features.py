"""Append, rotary, cache rows, left padding and attention chunks on the Triton kernels."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import triton_fa
from triton_fa.device import runs_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(
    not runs_triton(DEVICE), reason="needs a GPU or Triton's interpreter"
)

HEADS, HEADS_KV, DIM, PAGE, WIDTH = 4, 2, 32, 8, 8
NAN = float("nan")


def turned(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """(tokens, heads, dim) with pairs of leading dims turned; cos and sin are (tokens, pairs)."""
    result = x.double().clone()
    pairs = cos.shape[1]
    for i in range(pairs):
        one, two = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
        c, s = cos[:, i, None].double(), sin[:, i, None].double()
        result[..., one] = x[..., one].double() * c - x[..., two].double() * s
        result[..., two] = x[..., one].double() * s + x[..., two].double() * c
    return result.to(x.dtype)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, left: int, chunk: int
) -> torch.Tensor:
    """One sequence in float64, masks from the definition."""
    seqlen_q, seqlen_k = q.shape[0], k.shape[0]
    group = q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=torch.float64)
    for row, head in itertools.product(range(seqlen_q), range(q.shape[1])):
        position = row + seqlen_k - seqlen_q
        seen = [
            key
            for key in range(seqlen_k)
            if (not causal or key <= position)
            and (left < 0 or key >= position - left)
            and (not chunk or key // chunk == position // chunk)
        ]
        if seen:
            scores = k[seen, head // group].double() @ q[row, head].double()
            weights = torch.softmax(scores * q.shape[-1] ** -0.5, 0)
            out[row, head] = weights @ v[seen, head // group].double()
    return out


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(torch.float16)


class Call:
    """A cache of three sequences among NaN, what is appended to it, and the exact result."""

    lengths = (21, 0, 40)

    def __init__(
        self,
        *,
        paged: bool = True,
        new: tuple[int, ...] | None = None,
        packed_new: bool = False,
        q_lens: tuple[int, ...] = (1, 1, 1),
        rotary_dim: int = 0,
        interleaved: bool = True,
        rotary_seqlens: tuple[int, ...] | None = None,
        rows: tuple[int, ...] | None = None,
        padding: tuple[int, ...] = (0, 0, 0),
        chunk: int = 0,
        left: int = -1,
        causal: bool = True,
    ) -> None:
        torch.manual_seed(0)
        batch, room = 3, PAGE * WIDTH
        row_of = rows or tuple(range(batch))
        num_rows = max(row_of) + 1
        pages = torch.randperm(num_rows * WIDTH + 2)
        table = pages[: num_rows * WIDTH].view(num_rows, WIDTH).int()
        shape = (len(pages), PAGE) if paged else (num_rows, room)
        self.k_cache = torch.full((*shape, HEADS_KV, DIM), NAN, dtype=torch.float16)
        self.v_cache = torch.full_like(self.k_cache, NAN)
        positions = torch.arange(room + 8)[:, None]
        angles = positions * 0.3 ** torch.arange(rotary_dim // 2)[None, :].double()
        cos, sin = angles.cos().half(), angles.sin().half()

        def at(b: int, key: int) -> tuple[int, int]:
            if paged:
                return int(table[row_of[b], key // PAGE]), key % PAGE
            return row_of[b], key

        q = [normal(n, HEADS, DIM) for n in q_lens]
        old = [(normal(n, HEADS_KV, DIM), normal(n, HEADS_KV, DIM)) for n in self.lengths]
        counts = new or (0, 0, 0)
        added = [(normal(n, HEADS_KV, DIM), normal(n, HEADS_KV, DIM)) for n in counts]
        expected, self.after_k, self.after_v = [], None, None
        for b, (k, v) in enumerate(old):
            for key in range(padding[b], len(k)):
                self.k_cache[at(b, key)], self.v_cache[at(b, key)] = k[key], v[key]
        self.after_k, self.after_v = self.k_cache.clone(), self.v_cache.clone()
        for b, (k, v) in enumerate(old):
            k_new, v_new = added[b]
            q_used = q[b]
            if rotary_dim:
                start = rotary_seqlens[b] if rotary_seqlens else len(k)
                steps = torch.arange(max(len(k_new), len(q_used)))
                places = (start + steps[: len(k_new)]).clamp(max=len(cos) - 1)
                k_new = turned(k_new, cos[places], sin[places], interleaved)
                moving = causal or left >= 0 or chunk > 0
                places = start + steps[: len(q_used)] * int(moving)
                places = places.clamp(max=len(cos) - 1)
                q_used = turned(q_used, cos[places], sin[places], interleaved)
            for t in range(counts[b]):
                if len(k) + t < room:
                    self.after_k[at(b, len(k) + t)] = k_new[t]
                    self.after_v[at(b, len(k) + t)] = v_new[t]
            k, v = torch.cat([k, k_new])[padding[b] : room], torch.cat([v, v_new])[:room]
            expected.append(attention(q_used, k, v[padding[b] :], causal, left, chunk))
        self.expected = torch.cat(expected)

        def ints(values: Any) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=DEVICE)

        def prefix(values: tuple[int, ...]) -> torch.Tensor:
            return ints([0, *itertools.accumulate(values)])

        self.arguments: dict[str, Any] = {
            "q": torch.cat(q).to(DEVICE),
            "cache_seqlens": ints(self.lengths),
            "cu_seqlens_q": prefix(q_lens),
            "max_seqlen_q": max(q_lens),
            "causal": causal,
            "window_size": (left, -1),
            "attention_chunk": chunk,
            "ver": "triton",
        }
        if paged:
            self.arguments["page_table"] = table.to(DEVICE)
        if rows:
            self.arguments["cache_batch_idx"] = ints(rows)
        if any(padding):
            self.arguments["cache_leftpad"] = ints(padding)
        if new:
            for name, which in (("k", 0), ("v", 1)):
                parts = [pair[which] for pair in added]
                joined = torch.cat(parts) if packed_new else torch.stack(parts)
                self.arguments[name] = joined.to(DEVICE)
            if packed_new:
                self.arguments["cu_seqlens_k_new"] = prefix(new)
        if rotary_dim:
            self.arguments |= {
                "rotary_cos": cos.to(DEVICE),
                "rotary_sin": sin.to(DEVICE),
                "rotary_interleaved": interleaved,
            }
            if rotary_seqlens:
                self.arguments["rotary_seqlens"] = ints(rotary_seqlens)

    def check(self, **options: Any) -> None:
        k_cache, v_cache = self.k_cache.to(DEVICE), self.v_cache.to(DEVICE)
        out = triton_fa.flash_attn_with_kvcache(
            k_cache=k_cache, v_cache=v_cache, **self.arguments | options
        )
        assert isinstance(out, torch.Tensor)
        torch.testing.assert_close(out.double().cpu(), self.expected, atol=5e-3, rtol=0)
        exact = "rotary_cos" not in self.arguments
        torch.testing.assert_close(v_cache.cpu(), self.after_v, atol=0, rtol=0, equal_nan=True)
        tolerance = 0 if exact else 4e-3
        torch.testing.assert_close(
            k_cache.cpu(), self.after_k, atol=tolerance, rtol=tolerance, equal_nan=True
        )


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("q_lens", [(1, 1, 1), (3, 1, 2), (40, 1, 0)])
def test_new_keys_are_written_and_seen(paged: bool, q_lens: tuple[int, ...]) -> None:
    Call(paged=paged, new=(2, 2, 2), q_lens=q_lens).check()
    Call(paged=paged, new=(3, 0, 7), packed_new=True, q_lens=q_lens).check()


@pytest.mark.parametrize("new", [(1, 1, 1), (4, 0, 2)])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_new_keys_and_queries_turn(new: tuple[int, ...], interleaved: bool, causal: bool) -> None:
    options: dict[str, Any] = {"interleaved": interleaved, "causal": causal, "q_lens": (2, 1, 3)}
    packed = len(set(new)) > 1
    Call(new=new, packed_new=packed, rotary_dim=16, **options).check()
    Call(new=new, packed_new=packed, rotary_dim=DIM, rotary_seqlens=(5, 0, 9), **options).check()


def test_a_window_turns_queries_by_their_own_positions() -> None:
    Call(new=(3, 3, 3), q_lens=(3, 3, 3), rotary_dim=16, causal=False, left=6).check()


def test_positions_behind_the_table_turn_by_its_last_row() -> None:
    Call(new=(2, 2, 2), q_lens=(2, 1, 3), rotary_dim=16, rotary_seqlens=(70, 5000, 71)).check()


def test_new_values_have_strides_of_their_own() -> None:
    for packed in (False, True):
        call = Call(new=(2, 2, 2), packed_new=packed, q_lens=(2, 1, 3))
        v = call.arguments["v"]
        call.check(v=torch.cat([v, v], -1)[..., :DIM])


@pytest.mark.parametrize("paged", [True, False])
def test_rows_of_the_cache(paged: bool) -> None:
    Call(paged=paged, rows=(4, 0, 2)).check()
    Call(paged=paged, rows=(1, 5, 0), new=(2, 2, 2), q_lens=(2, 2, 2)).check()
    Call(paged=paged, rows=(1, 5, 0), q_lens=(40, 1, 3)).check()


@pytest.mark.parametrize("q_lens", [(1, 1, 1), (3, 1, 2), (40, 1, 33)])
@pytest.mark.parametrize("left", [-1, 6])
def test_keys_before_the_padding_are_never_read(q_lens: tuple[int, ...], left: int) -> None:
    for paged in (True, False):
        Call(paged=paged, padding=(5, 0, 33), q_lens=q_lens, left=left).check()
        Call(paged=paged, padding=(21, 0, 9), q_lens=q_lens, left=left, causal=False).check()
    Call(padding=(5, 0, 17), new=(2, 2, 2), q_lens=q_lens, left=left, rotary_dim=16).check()


@pytest.mark.parametrize("q_lens", [(1, 1, 1), (3, 1, 2), (40, 1, 33)])
@pytest.mark.parametrize("causal", [True, False])
def test_rows_see_their_own_chunk(q_lens: tuple[int, ...], causal: bool) -> None:
    for chunk in (1, 7, 16, 100):
        Call(chunk=chunk, q_lens=q_lens, causal=causal).check()
    Call(chunk=7, left=3, padding=(4, 0, 2), q_lens=q_lens, causal=causal).check()


def test_a_program_goes_on_to_the_next_sequence() -> None:
    """With its row of the cache, and its padding: there are two programs for three sequences."""
    Call(rows=(4, 2, 0)).check(sm_margin=1000)
    Call(chunk=7, padding=(4, 0, 2), q_lens=(3, 1, 2)).check(sm_margin=1000)


@pytest.mark.parametrize("options", [{"num_splits": 3}, {"batch_invariant": True}])
def test_everything_together_in_pieces(options: dict[str, Any]) -> None:
    call = Call(
        new=(3, 0, 7),
        packed_new=True,
        q_lens=(2, 1, 4),
        rotary_dim=16,
        rows=(2, 4, 0),
        padding=(3, 0, 11),
        chunk=16,
        left=9,
    )
    call.check(**options)
    metadata = triton_fa.get_scheduler_metadata(
        3,
        4,
        PAGE * WIDTH,
        HEADS,
        HEADS_KV,
        DIM,
        call.arguments["cache_seqlens"],
        torch.float16,
        cu_seqlens_q=call.arguments["cu_seqlens_q"],
        cu_seqlens_k_new=call.arguments["cu_seqlens_k_new"],
        max_seqlen_k_new=7,
        cache_leftpad=call.arguments["cache_leftpad"],
        attention_chunk=16,
        window_size=(9, -1),
        causal=True,
        page_size=PAGE,
        ver="triton",
    )
    call.check(scheduler_metadata=metadata)


def test_the_schedule_counts_new_keys_padding_and_chunks() -> None:
    def visible(**options: Any) -> int:
        lengths = torch.tensor([50], dtype=torch.int32, device=DEVICE)
        metadata = triton_fa.get_scheduler_metadata(
            1, 1, 1024, HEADS, HEADS_KV, DIM, lengths, page_size=PAGE, ver="triton", **options
        )
        return int(metadata[4])  # behind one sequence, rounded up to four

    one = torch.tensor([7], dtype=torch.int32, device=DEVICE)
    assert visible() == 50
    assert visible(max_seqlen_k_new=3) == 53
    assert visible(cu_seqlens_k_new=torch.tensor([0, 7]).int().to(DEVICE), max_seqlen_k_new=9) == 57
    assert visible(cache_leftpad=one) == 43
    assert visible(attention_chunk=32, causal=True) == 50 - 32
    assert visible(attention_chunk=32, causal=True, cache_leftpad=one) == 43 - 32


def test_a_target_that_does_not_exist_is_dropped() -> None:
    Call(new=(30, 30, 30)).check()  # 40 + 30 keys, 64 places
    for paged in (True, False):  # and behind them another sequence's
        Call(paged=paged, new=(30, 30, 30), rows=(1, 2, 0)).check()
    Call(new=(2, 0, 30), packed_new=True, q_lens=(2, 1, 30), rotary_dim=16).check()


@pytest.mark.parametrize(
    "name", ["page_table", "cache_batch_idx", "cache_seqlens", "cache_leftpad"]
)
def test_garbage_writes_nowhere_else(name: str) -> None:
    call = Call(new=(2, 2, 2), rows=(0, 1, 2), padding=(1, 0, 2))
    k_cache, v_cache = call.k_cache.to(DEVICE), call.v_cache.to(DEVICE)
    good = call.arguments[name]
    for bad in (-(2**31), -1, 2**31 - 1):
        k, v = k_cache.clone(), v_cache.clone()
        triton_fa.flash_attn_with_kvcache(
            k_cache=k, v_cache=v, **call.arguments | {name: torch.full_like(good, bad)}
        )
        if name == "cache_leftpad" or (name == "cache_seqlens" and bad < 0):
            continue  # the targets exist
        torch.testing.assert_close(k, k_cache, atol=0, rtol=0, equal_nan=True)
        torch.testing.assert_close(v, v_cache, atol=0, rtol=0, equal_nan=True)


def test_keys_are_appended_without_any_query() -> None:
    call = Call(new=(2, 2, 2))
    k_cache, v_cache = call.k_cache.to(DEVICE), call.v_cache.to(DEVICE)
    empty = {
        "q": call.arguments["q"][:0],
        "cu_seqlens_q": torch.zeros_like(call.arguments["cu_seqlens_q"]),
        "max_seqlen_q": 0,
    }
    triton_fa.flash_attn_with_kvcache(k_cache=k_cache, v_cache=v_cache, **call.arguments | empty)
    torch.testing.assert_close(k_cache.cpu(), call.after_k, atol=0, rtol=0, equal_nan=True)


def test_a_dense_batch_of_queries() -> None:
    call = Call(new=(2, 2, 2), q_lens=(2, 2, 2), rotary_dim=16, rows=(1, 0, 3), paged=False)
    q = call.arguments.pop("q")
    for name in ("cu_seqlens_q", "max_seqlen_q"):
        call.arguments.pop(name)
    call.expected = call.expected.view(3, 2, HEADS, DIM)
    call.check(q=q.view(3, 2, HEADS, DIM))


def test_padding_is_each_sequences_own_where_a_range_holds_several() -> None:
    """Behind a sequence with much padding comes one with none: its window reaches further."""
    lengths, padding, left = [20, 17, 23] * 12, [15, 0, 3] * 12, 10
    batch, capacity = len(lengths), max(lengths)
    q, k, v = (
        normal(batch, 3, 2, DIM),
        normal(batch, capacity, 1, DIM),
        normal(batch, capacity, 1, DIM),
    )
    out = triton_fa.flash_attn_with_kvcache(
        q,
        k,
        v,
        cache_seqlens=torch.tensor(lengths, dtype=torch.int32),
        cache_leftpad=torch.tensor(padding, dtype=torch.int32),
        causal=True,
        window_size=(left, 0),
        ver="triton",
    )
    for i, (length, first) in enumerate(zip(lengths, padding, strict=True)):
        wanted = attention(q[i], k[i, first:length], v[i, first:length], True, left, 0)
        torch.testing.assert_close(out[i].double(), wanted, atol=2e-3, rtol=2e-3)

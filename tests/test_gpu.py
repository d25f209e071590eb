"""What only a GPU can show: graphs, streams, determinism, launches, float32 precision, NaN by TMA.

Skipped where there is no CUDA device; `nox -s tests_gpu` runs it on a GPU machine.
"""

from __future__ import annotations

import random

import pytest
import torch

import triton_fa
from reference.entries import flash_attn_func as reference_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PAGE, HEADS_Q, HEADS_KV, DIM = 16, 8, 2, 128


class Cache:
    """A paged cache that every slot of is in use, and queries for it."""

    def __init__(
        self, batch: int, most: int, seqlen_q: int = 1, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        rng = torch.Generator(device="cuda").manual_seed(0)
        self.width = -(-most // PAGE)
        pages = batch * self.width
        shape = (pages, PAGE, HEADS_KV, DIM)
        self.k = torch.randn(shape, generator=rng, device="cuda").to(dtype)
        self.v = torch.randn(shape, generator=rng, device="cuda").to(dtype)
        order = torch.randperm(pages, generator=rng, device="cuda").int()
        self.table = order.view(batch, self.width)
        tokens = batch * seqlen_q
        self.q = torch.randn(tokens, HEADS_Q, DIM, generator=rng, device="cuda").to(dtype)
        self.prefix = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * seqlen_q
        self.seqlen_q = seqlen_q
        self.lengths = torch.full((batch,), most, device="cuda", dtype=torch.int32)

    def attend(self, **options: object) -> torch.Tensor:
        out = triton_fa.flash_attn_with_kvcache(
            self.q,
            self.k,
            self.v,
            cache_seqlens=self.lengths,
            page_table=self.table,
            cu_seqlens_q=self.prefix,
            **{"max_seqlen_q": self.seqlen_q, "causal": True, "ver": "triton"} | options,
        )
        assert isinstance(out, torch.Tensor)
        return out

    def expected(self) -> torch.Tensor:
        rows = []
        for seq, length in enumerate(self.lengths.tolist()):
            slots = torch.arange(length, device="cuda")
            pages = self.table[seq, slots // PAGE].long()
            q = self.q[self.prefix[seq] : self.prefix[seq + 1]]
            k, v = self.k[pages, slots % PAGE], self.v[pages, slots % PAGE]
            rows.append(attention(q, k, v, causal=True))
        return torch.cat(rows)

    def metadata(self, out: torch.Tensor | None = None) -> torch.Tensor:
        return triton_fa.get_scheduler_metadata(
            self.lengths.shape[0],
            self.seqlen_q,
            self.width * PAGE,
            HEADS_Q,
            HEADS_KV,
            DIM,
            self.lengths,
            cu_seqlens_q=self.prefix,
            page_size=PAGE,
            causal=True,
            ver="triton",
            out=out,
        )


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """One sequence, (tokens, heads, dim), in float64."""
    out, _ = reference_attention(q[None], k[None], v[None], causal=causal)
    return out[0]


def _close(out: torch.Tensor, expected: torch.Tensor, bound: float = 1e-2) -> None:
    error = (out.double() - expected).norm() / expected.norm()
    assert error < bound, float(error)


def _captured(call: object) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # type: ignore[operator]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()  # type: ignore[operator]
    return graph


@pytest.mark.parametrize("seqlen_q", [1, 4, 40])
def test_a_graph_captured_at_length_1_serves_any_lengths(seqlen_q: int) -> None:
    cache = Cache(6, 3000, seqlen_q)
    out = torch.empty_like(cache.q)
    metadata = cache.metadata()
    cache.lengths.fill_(max(1, seqlen_q))
    graph = _captured(lambda: cache.attend(out=out, scheduler_metadata=metadata))
    for lengths in ([3000] * 6, [40, 3000, 64, 65, 2999, 41], [40] * 6):
        cache.lengths.copy_(torch.tensor(lengths))
        cache.metadata(metadata)
        out.fill_(float("nan"))
        graph.replay()
        _close(out, cache.expected())
    cache.table.copy_(cache.table.flip(0))  # another page order
    out.fill_(float("nan"))
    graph.replay()
    _close(out, cache.expected())


def test_a_graph_serves_a_shrunken_batch() -> None:
    cache = Cache(6, 500)
    out = torch.zeros_like(cache.q)
    graph = _captured(lambda: cache.attend(out=out))
    cache.lengths.copy_(torch.tensor([500, 33, 0, 0, 0, 0]))
    graph.replay()
    _close(out[:2], cache.expected()[:2])
    assert not out[2:].any()


def test_lengths_beyond_the_table_stay_inside() -> None:
    cache = Cache(4, 256)
    out = torch.empty_like(cache.q)
    graph = _captured(lambda: cache.attend(out=out))
    cache.lengths.fill_(2**30)
    graph.replay()
    torch.cuda.synchronize()
    cache.lengths.fill_(256)
    _close(out, cache.expected())


def test_two_streams_at_once() -> None:
    caches = [Cache(8, 2000), Cache(8, 2000)]
    caches[1].q.neg_()
    outs = [torch.empty_like(c.q) for c in caches]
    graphs = [
        _captured(lambda c=c, o=o: c.attend(out=o)) for c, o in zip(caches, outs, strict=True)
    ]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for cache, out in zip(caches, outs, strict=True):
        _close(out, cache.expected())


@pytest.mark.parametrize("seqlen_q", [1, 300])
def test_repeats_are_bit_equal(seqlen_q: int) -> None:
    cache = Cache(5, 1500, seqlen_q)
    first = cache.attend()
    for _ in range(300):
        assert torch.equal(cache.attend(), first)


@pytest.mark.parametrize("kind", ["zero", "stale", "random"])
def test_metadata_is_advice(kind: str) -> None:
    cache = Cache(5, 1500)
    cache.lengths.copy_(torch.tensor([1500, 3, 700, 64, 65]))
    expected = cache.attend()
    stale = cache.metadata()
    cache.lengths.copy_(torch.tensor([1, 1500, 2, 1400, 9]))
    if kind == "zero":
        stale.zero_()
    elif kind == "random":
        stale.random_(-(2**31), 2**31 - 1)
    cache.lengths.copy_(torch.tensor([1500, 3, 700, 64, 65]))
    assert torch.equal(cache.attend(scheduler_metadata=stale), expected)


def test_batch_invariant_rows_keep_their_bits() -> None:
    cache = Cache(6, 9000)
    cache.lengths.copy_(torch.tensor([9000, 100, 5000, 3, 700, 8999]))
    whole = cache.attend(batch_invariant=True)
    _close(whole, cache.expected())
    for row in range(6):
        alone = triton_fa.flash_attn_with_kvcache(
            cache.q[row : row + 1],
            cache.k,
            cache.v,
            cache_seqlens=cache.lengths[row : row + 1],
            page_table=cache.table[row : row + 1],
            cu_seqlens_q=cache.prefix[:2],
            max_seqlen_q=1,
            causal=True,
            batch_invariant=True,
            ver="triton",
        )
        assert torch.equal(alone, whole[row : row + 1])


@pytest.mark.parametrize("num_splits", [1, 3, 50])
def test_splits_agree(num_splits: int) -> None:
    cache = Cache(3, 5000)
    _close(cache.attend(num_splits=num_splits), cache.expected())


def test_nothing_waits_for_the_device() -> None:
    cache = Cache(4, 600)
    metadata = cache.metadata()
    cache.attend(scheduler_metadata=metadata)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cache.attend(scheduler_metadata=cache.metadata(metadata))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("seqlen_q", [1, 70])
def test_float32_is_full_precision(seqlen_q: int) -> None:
    cache = Cache(3, 700, seqlen_q, torch.float32)
    _close(cache.attend(), cache.expected(), 3e-6)


def test_nan_behind_the_end_of_packed_keys_stays_there() -> None:
    """Keys of 8 bytes and more apart are read by whole blocks, a neighbour's rows included."""
    rng = torch.Generator(device="cuda").manual_seed(0)
    shape = (2, 200, 4, DIM)
    q, k, v = torch.randn((3, *shape), generator=rng, device="cuda").bfloat16()
    used = torch.tensor([130, 7], device="cuda", dtype=torch.int32)
    expected = torch.stack(
        [attention(q[b], k[b, :n], v[b, :n], causal=False) for b, n in enumerate(used.tolist())]
    )
    for b, n in enumerate(used.tolist()):
        k[b, n:], v[b, n:] = float("nan"), float("nan")
    dense = triton_fa.flash_attn_varlen_func(q, k, v, None, None, seqused_k=used, ver="triton")
    _close(dense, expected)
    prefix = torch.tensor([0, 200, 400], device="cuda", dtype=torch.int32)
    packed = triton_fa.flash_attn_varlen_func(
        *(t.flatten(0, 1) for t in (q, k, v)),
        prefix,
        prefix,
        200,
        200,
        seqused_k=used,
        ver="triton",
    )
    _close(packed.view(shape), expected)


def test_warmed_up_calls_compile_nothing() -> None:
    triton_fa.warmup(HEADS_Q, HEADS_KV, DIM, page_size=PAGE, max_batch=40, max_seqlens_q=(1, 4, 99))
    from triton_fa.kernels.launch import compiled_kernels

    before = compiled_kernels()
    rng = random.Random(0)
    for _ in range(1000):
        most = rng.choice([1, 4, 99])
        cache = Cache(rng.randint(1, 40), rng.randint(1, 12) * PAGE, rng.randint(1, most))
        cache.lengths.random_(1, cache.width * PAGE + 1)
        cache.attend(max_seqlen_q=most)
    assert compiled_kernels() == before


def test_a_device_that_is_not_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    with torch.cuda.device(1):
        cache = Cache(3, 500)
    with torch.cuda.device(0):
        _close(cache.attend(), cache.expected())

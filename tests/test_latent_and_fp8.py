"""Scores against values (qv, absorbed MLA) and float8 numbers, on both own backends."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import triton_fa
from triton_fa import ArgumentError, ArgumentValueError, UnsupportedError, api
from triton_fa.device import DeviceFacts, runs_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VERS = ("triton", "torch") if runs_triton(DEVICE) else ("torch",)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
PAGE, WIDTH = 8, 16
pytestmark = pytest.mark.parametrize("ver", VERS)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence in float64: out (rows, heads, dim_v) and lse (heads, rows)."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        rows = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
        scores = scores.masked_fill(torch.arange(k.shape[0])[None] > rows, -math.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1)


class Paged:
    """Sequences in shuffled pages; whatever no sequence uses is NaN."""

    def __init__(
        self,
        lengths: tuple[int, ...],
        q_lens: tuple[int, ...],
        heads: tuple[int, int],
        dims: tuple[int, int],
        dtype: torch.dtype = torch.float16,
        kv_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        rng = torch.Generator().manual_seed(seed)
        heads_q, heads_kv = heads
        self.lengths, self.q_lens, self.heads = lengths, q_lens, heads
        pages = torch.randperm(len(lengths) * WIDTH, generator=rng)
        self.table = pages.view(-1, WIDTH).int()

        def numbers(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=rng)

        self.q = numbers(sum(q_lens), heads_q, dims[0]).to(dtype)
        self.qv = numbers(sum(q_lens), heads_q, dims[1]).to(torch.float16)
        # As MLA keeps them: one cache, of which keys and values are views.
        both = torch.full((len(pages), PAGE, heads_kv, sum(dims)), math.nan).to(kv_dtype or dtype)
        self.keys = []
        for row, length in zip(self.table.long(), lengths, strict=True):
            token = torch.arange(length)
            made = numbers(length, heads_kv, sum(dims)).to(both.dtype)
            size = made.dtype.itemsize
            raw = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[size]
            both.view(raw)[row[token // PAGE], token % PAGE] = made.view(raw)
            self.keys.append(made.float())
        self.v, self.k = both[..., : dims[1]], both[..., dims[1] :]
        self.dim_v = dims[1]
        self.prefix = torch.tensor([0, *q_lens]).cumsum(0).int()

    def call(self, ver: str, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        given: dict[str, Any] = {
            "q": self.q,
            "k_cache": self.k,
            "v_cache": self.v,
            "cache_seqlens": torch.tensor(self.lengths, dtype=torch.int32),
            "page_table": self.table,
            "cu_seqlens_q": self.prefix,
            "max_seqlen_q": max(self.q_lens),
            "causal": True,
            "return_softmax_lse": True,
            "ver": ver,
        } | options
        on_device = {n: x.to(DEVICE) if hasattr(x, "to") else x for n, x in given.items()}
        result = triton_fa.flash_attn_with_kvcache(**on_device)
        return result[0].cpu(), result[1].cpu()

    def expected(
        self, scale: float, qv: bool = False, factors: Any = (1.0, 1.0, 1.0), **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        outs, lses = [], []
        group = self.heads[0] // self.heads[1]
        for i, keys in enumerate(self.keys):
            of_q, of_k, of_v = (f if isinstance(f, float) else f[i].double() for f in factors)
            rows = slice(int(self.prefix[i]), int(self.prefix[i + 1]))
            v, k = keys[..., : self.dim_v].double(), keys[..., self.dim_v :].double()
            q = self.q[rows].double()
            if isinstance(of_q, torch.Tensor):
                q = q * of_q.repeat_interleave(group)[:, None]
                k, v = k * of_k[:, None], v * of_v[:, None]
            if qv:
                q, k = torch.cat([q, self.qv[rows].double()], -1), torch.cat([k, v], -1)
            out, lse = attention(q, k, v, scale, True, **options)
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses, 1)


def close(found: Any, exact: Any, atol: float = 4e-3) -> None:
    torch.testing.assert_close(found[0].double(), exact[0], atol=atol, rtol=atol)
    torch.testing.assert_close(found[1].double(), exact[1], atol=2e-3, rtol=1e-3)


# ---------------------------------------------------------------- qv


@pytest.mark.parametrize("heads", [(16, 1), (80, 1), (6, 2)])
@pytest.mark.parametrize("q_lens", [(1, 1, 1), (2, 1, 4)])
def test_scores_count_values(ver: str, heads: tuple[int, int], q_lens: tuple[int, ...]) -> None:
    case = Paged((37, 4, 100), q_lens, heads, (16, 48))
    close(case.call(ver, qv=case.qv), case.expected(64**-0.5, qv=True))


def test_the_shape_of_a_latent_cache(ver: str) -> None:
    case = Paged((40, 9), (1, 2), (16, 1), (64, 512))
    close(case.call(ver, qv=case.qv), case.expected(576**-0.5, qv=True))


@pytest.mark.parametrize("options", [{"num_splits": 3}, {"batch_invariant": True}])
def test_in_pieces(ver: str, options: dict[str, Any]) -> None:
    case = Paged((100, 3, 64), (1, 2, 1), (80, 1), (16, 32))
    close(case.call(ver, qv=case.qv, **options), case.expected(48**-0.5, qv=True))


def test_many_queries(ver: str) -> None:
    case = Paged((40, 20), (10, 20), (8, 1), (16, 32))
    close(case.call(ver, qv=case.qv), case.expected(48**-0.5, qv=True))


def test_values_alone(ver: str) -> None:
    case = Paged((37, 4), (1, 2), (20, 1), (16, 48))
    out = case.call(ver, qv=case.qv, only_qv=True, q=None, k_cache=None)
    wanted = Paged((37, 4), (1, 2), (20, 1), (16, 48))
    wanted.q = torch.zeros_like(wanted.q)
    close(out, wanted.expected(48**-0.5, qv=True))
    given = case.call(ver, qv=case.qv, only_qv=True, q=case.q * math.nan)
    assert torch.equal(given[0], out[0])


def test_a_row_alone_has_the_same_bits(ver: str) -> None:
    case = Paged((100, 3, 64), (1, 1, 1), (80, 1), (16, 32))
    options = {"qv": case.qv, "batch_invariant": True}
    whole, _ = case.call(ver, **options)
    alone, _ = case.call(
        ver,
        q=case.q[2:],
        qv=case.qv[2:],
        cache_seqlens=torch.tensor([64], dtype=torch.int32),
        page_table=case.table[2:],
        cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32),
        batch_invariant=True,
    )
    assert torch.equal(alone, whole[2:])


def test_what_does_not_fit_is_refused(ver: str) -> None:
    case = Paged((37, 4), (1, 2), (16, 1), (16, 48))
    with pytest.raises(ArgumentError, match=r"qv: expected shape \(3, 16, 48\)"):
        case.call(ver, qv=case.qv[..., :40])
    with pytest.raises(ArgumentError, match="qv: expected dtype float16"):
        case.call(ver, qv=case.qv.float())
    with pytest.raises(ArgumentValueError, match="qv: expected a tensor together with only_qv"):
        case.call(ver, only_qv=True)
    new = torch.zeros(2, 1, 1, 48, dtype=torch.float16)
    with pytest.raises(ArgumentError, match="k: expected None together with only_qv"):
        case.call(ver, qv=case.qv, only_qv=True, k=new.to(DEVICE), v=new.to(DEVICE))
    if ver == "triton":
        wide = Paged((9,), (1,), (4, 1), (16, 520))
        with pytest.raises(UnsupportedError, match="head_dim_v=520"):
            wide.call(ver, qv=wide.qv)


# ---------------------------------------------------------------- float8


def factors(case: Paged) -> list[torch.Tensor]:
    """Of queries, keys and values, none of them 1."""
    rng = torch.Generator().manual_seed(1)
    shape = (len(case.lengths), case.heads[1])
    return [0.25 + torch.rand(shape, generator=rng) for _ in range(3)]


@pytest.mark.parametrize(
    ("kv_dtype", "q_lens"),
    [*((dtype, (1, 1, 1)) for dtype in FP8), (FP8[0], (2, 24, 1))],
)
def test_a_float8_cache(ver: str, kv_dtype: torch.dtype, q_lens: tuple[int, ...]) -> None:
    case = Paged((37, 44, 100), q_lens, (6, 2), (32, 32), kv_dtype=kv_dtype)
    close(case.call(ver), case.expected(32**-0.5))
    of = factors(case)
    given = dict(zip(("q_descale", "k_descale", "v_descale"), of, strict=True))
    close(case.call(ver, **given), case.expected(32**-0.5, factors=of))
    capped = case.call(ver, **given, softcap=3.0)
    close(capped, case.expected(32**-0.5, factors=of, softcap=3.0))


@pytest.mark.parametrize(
    ("dtype", "q_lens"), [(FP8[0], (1, 1)), (FP8[0], (3, 24)), (FP8[1], (1, 1))]
)
def test_float8_queries_give_bfloat16(ver: str, dtype: torch.dtype, q_lens: Any) -> None:
    case = Paged((37, 44), q_lens, (6, 2), (32, 32), dtype=dtype)
    out, lse = case.call(ver)
    assert out.dtype == torch.bfloat16
    close((out, lse), case.expected(32**-0.5), 1e-2)
    buffer = torch.empty_like(out)
    case.call(ver, out=buffer.to(DEVICE))
    of = factors(case)
    given = dict(zip(("q_descale", "k_descale", "v_descale"), of, strict=True))
    close(case.call(ver, **given), case.expected(32**-0.5, factors=of), 1e-2)


@pytest.mark.parametrize(
    ("size", "q_lens"), [(1e-6, (1, 1)), (1.0, (1, 1)), (3e5, (1, 1)), (3e5, (3, 24))]
)
def test_bfloat16_queries_keep_their_range(ver: str, size: float, q_lens: Any) -> None:
    case = Paged((37, 44), q_lens, (6, 2), (32, 32), torch.bfloat16, torch.float8_e4m3fn)
    case.q = (case.q.float() * size).bfloat16()
    case.q[0, 0] = 0
    out = case.call(ver, softmax_scale=1 / size)
    close(out, case.expected(1 / size), 2e-2)


@pytest.mark.parametrize("kv_dtype", FP8)
def test_a_nan_of_a_float8_cache_stays_one(ver: str, kv_dtype: torch.dtype) -> None:
    case = Paged((5, 9), (1, 1), (4, 2), (32, 32), kv_dtype=kv_dtype)
    nan = torch.tensor(math.nan).to(kv_dtype)
    case.v.view(torch.uint8)[int(case.table[0, 0]), 2, 1, 7] = nan.view(torch.uint8)
    is_nan = case.call(ver)[0].isnan()
    assert is_nan.nonzero().tolist() == [[0, 2, 7], [0, 3, 7]]  # the queries of kv head 1


def test_strided_and_expanded_factors(ver: str) -> None:
    case = Paged((37, 44), (1, 2), (6, 2), (32, 32), kv_dtype=torch.float8_e4m3fn)
    one = torch.tensor([[0.5]]).expand(2, 2)
    across = torch.tensor([[0.5, 0.75], [1.5, 2.0]]).t()
    found = case.call(ver, k_descale=one, v_descale=across)
    ones = torch.ones(2, 2)
    close(found, case.expected(32**-0.5, factors=[ones, one, across]))


def test_factors_of_any_sign(ver: str) -> None:
    case = Paged((37, 44), (1, 2), (6, 2), (32, 32), kv_dtype=torch.float8_e4m3fn)
    of = [
        torch.tensor(x) for x in ([[-0.5, 1], [1, -2]], [[1.5, -1], [0, -1]], [[1.0, 2], [3, -1]])
    ]
    given = dict(zip(("q_descale", "k_descale", "v_descale"), of, strict=True))
    close(case.call(ver, **given), case.expected(32**-0.5, factors=of))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_queries_converted_for_every_tile(
    ver: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on AMD's chips, where they are not kept."""
    if ver != "triton" or DEVICE.type != "cpu":
        pytest.skip("what the interpreter computes for another chip")
    facts = DeviceFacts("hip", (0, 0), 304, 64 << 10, 64)
    monkeypatch.setattr("triton_fa.device.facts", lambda device: facts)
    case = Paged((37, 44), (1, 2), (6, 2), (32, 32), dtype, torch.float8_e4m3fn)
    of = [torch.tensor(x) for x in ([[0.5, 1], [1, 2]], [[1.5, -1], [0, 1]], [[1.0, 2], [3, 1]])]
    given = dict(zip(("q_descale", "k_descale", "v_descale"), of, strict=True))
    api._RECORDS.clear()
    try:
        close(case.call(ver, **given), case.expected(32**-0.5, factors=of), 2e-2)
    finally:
        api._RECORDS.clear()


@pytest.mark.parametrize("dims", [(24, 40), (32, 32)])
@pytest.mark.parametrize(("past", "padding"), [(1, 0), (0, 1), (2, 2)])
def test_float8_rows_at_odd_places(ver: str, dims: Any, past: int, padding: int) -> None:
    case = Paged((37, 44), (1, 2), (6, 2), dims, kv_dtype=torch.float8_e4m3fn)
    expected = case.expected(dims[0] ** -0.5)

    def moved(cache: torch.Tensor) -> torch.Tensor:
        pages, slots, heads, dim = cache.shape
        wide = torch.empty(cache.numel() + past + pages * slots * heads * padding, dtype=torch.int8)
        strides = [dim + padding]
        for n in (heads, slots):
            strides.insert(0, strides[0] * n)
        view = wide.view(cache.dtype).to(DEVICE).as_strided(cache.shape, (*strides, 1), past)
        return view.copy_(cache)

    case.k, case.v = moved(case.k), moved(case.v)
    close(case.call(ver), expected)


def test_factors_of_16_bit_keys_are_not_read(ver: str) -> None:
    case = Paged((37, 44), (1, 2), (6, 2), (32, 32))
    found = case.call(ver, k_descale=torch.full((2, 2), math.nan))
    assert torch.equal(found[0], case.call(ver)[0])


def test_float8_values_are_scored(ver: str) -> None:
    case = Paged((37, 44), (1, 2), (20, 1), (16, 48), kv_dtype=torch.float8_e4m3fn)
    close(case.call(ver, qv=case.qv), case.expected(64**-0.5, qv=True))
    of = factors(case)
    given = dict(zip(("q_descale", "k_descale", "v_descale"), of, strict=True))
    close(case.call(ver, qv=case.qv, **given), case.expected(64**-0.5, qv=True, factors=of))


def test_float8_keys_are_appended_as_they_are(ver: str) -> None:
    case = Paged((5, 9), (1, 1), (4, 2), (32, 32), kv_dtype=torch.float8_e4m3fn)
    new = torch.randn(2, 1, 2, 64, generator=torch.Generator().manual_seed(2))
    new = new.to(torch.float8_e4m3fn)
    k_cache, v_cache = case.k.contiguous().to(DEVICE), case.v.contiguous().to(DEVICE)
    case.call(ver, k_cache=k_cache, v_cache=v_cache, k=new[..., :32], v=new[..., 32:])
    for cache, part in ((k_cache, new[..., :32]), (v_cache, new[..., 32:])):
        for row, length, token in zip(case.table.long(), case.lengths, part, strict=True):
            slot = cache.cpu()[row[length // PAGE], length % PAGE]
            assert torch.equal(slot.view(torch.uint8), token[0].contiguous().view(torch.uint8))


def test_dtypes_that_do_not_go_together_are_refused(ver: str) -> None:
    case = Paged((37, 44), (1, 2), (6, 2), (32, 32), kv_dtype=torch.float8_e4m3fn)
    with pytest.raises(ArgumentError, match="v_cache: expected dtype float8_e4m3fn"):
        case.call(ver, v_cache=case.v.to(torch.float8_e5m2))
    with pytest.raises(ArgumentError, match="k_cache: expected dtype float32"):
        case.call(ver, q=case.q.float())
    with pytest.raises(ArgumentError, match="k_cache: expected dtype float8_e5m2"):
        case.call(ver, q=case.q.to(torch.float8_e5m2))
    with pytest.raises(ArgumentError, match=r"k_descale: expected shape \(2, 2\)"):
        case.call(ver, k_descale=torch.ones(2, 6))
    with pytest.raises(ArgumentError, match="v_descale: expected dtype float32"):
        case.call(ver, v_descale=torch.ones(2, 2, dtype=torch.float16))
    with pytest.raises(ArgumentError, match="out: expected dtype float16"):
        case.call(ver, out=torch.empty(3, 6, 32, dtype=torch.bfloat16, device=DEVICE))

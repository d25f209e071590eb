"""The kernels through the public functions, in the interpreter, against the float64 reference.

The harness generates wide parity cases; these aim at what our kernels do differently from each
other: few and many programs, heads that don't divide them, two-panel heads, the two paths in one
call, blocks of sequences, and what device tensors say when they are wrong.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import reference
import triton_fa
from parity_tests.budgets import Limits, Result, Truth, judge
from parity_tests.cases import Case
from parity_tests.runners import Prepared
from triton_fa.schedule.tiles import PrefillTile

pytest.importorskip("triton")

DIMS = (8, 16, 40, 48, 72, 80, 96)
TILE = 32  # rows and keys of a tile in the interpreter


def ci(examples: int) -> Any:
    return hypothesis.settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[
            hypothesis.HealthCheck.function_scoped_fixture,
            hypothesis.HealthCheck.too_slow,
        ],
    )


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Set how many programs the decode grid has (but for margin and heads, which may lower it)."""
    from triton_fa import api
    from triton_fa.kernels import plans

    def choose(count: int) -> None:
        api._RECORDS.clear()  # a record keeps its grid
        monkeypatch.setattr(plans, "decode_programs", lambda *arguments: count)

    yield choose
    api._RECORDS.clear()


def agrees(case: Case, device: str, **more: Any) -> None:
    """The public function gives what the reference gives, within the budget of its dtype."""
    prepared = Prepared.of(case, device)
    arguments = prepared.arguments() | more
    returned = getattr(triton_fa, case.function)(**arguments, ver="triton")
    out, lse = returned if case.lse else (returned, None)
    if case.out:
        assert out.data_ptr() == arguments["out"].data_ptr()
    _, problems = judge(case, Result(out, lse), prepared.truth, Limits.of(case))
    assert not problems, f"{problems}\n{case.repro_snippet(device=device)}"


# ---------------------------------------------------------------- what is drawn

windows = st.one_of(
    st.just((-1, -1)),
    st.tuples(st.sampled_from((-1, None, 0, 1, 9, 33, 70)), st.sampled_from((-1, None, 0, 3, 40))),
)
q_lengths = {
    "decode": st.integers(0, 4),
    "prefill": st.one_of(st.integers(66, 75), st.just(96)),
    "mixed": st.one_of(st.integers(0, 3), st.integers(62, 68)),
}
k_lengths = st.one_of(st.sampled_from((0, 1, 31, 32, 33, 64, 65, 96, 97)), st.integers(0, 150))


@st.composite
def cases(draw: st.DrawFn, phase: str) -> Case:
    """A legal call whose sequences are on one path, or on both."""
    heads_kv = draw(st.sampled_from((1, 2, 3)))
    group = draw(st.sampled_from((1, 2) if heads_kv > 1 else (1, 3, 6)))
    if phase != "decode":
        heads_kv, group = 1, draw(st.sampled_from((1, 2)))
    kv_layout = draw(st.sampled_from(("paged", "paged", "batched", "packed")))
    entry = "varlen" if kv_layout == "packed" else draw(st.sampled_from(("kvcache", "varlen")))
    head_dim = draw(st.sampled_from(DIMS))
    batch = draw(st.integers(1, 4 if phase == "decode" else 2))
    packed_q = phase == "mixed" or draw(st.booleans())
    pad_q = draw(st.sampled_from((0, 2))) if entry == "varlen" else 0
    lengths_q = draw(st.lists(q_lengths[phase], min_size=batch, max_size=batch))
    if not packed_q and not pad_q:
        lengths_q = lengths_q[:1] * batch
    return Case(
        entry=entry,
        dtype=draw(st.sampled_from(("float16", "float16", "float32", "bfloat16"))),
        heads_q=heads_kv * group,
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=draw(st.sampled_from((head_dim, head_dim, *DIMS))),
        q_layout="packed" if packed_q else "batched",
        kv_layout=kv_layout,
        page_size=draw(st.sampled_from((1, 3, 16, 32, 64))) if kv_layout == "paged" else 0,
        kv_strides=draw(st.sampled_from(("plain", "fused", "sliced"))),
        q_strided=draw(st.booleans()),
        causal=draw(st.booleans()),
        window=draw(windows),
        softcap=draw(st.sampled_from((0.0, 0.0, 20.0))),
        sinks=draw(st.booleans()),
        lse=draw(st.booleans()),
        out=draw(st.booleans()),
        seqlens_q=tuple(lengths_q),
        seqlens_k=tuple(draw(st.lists(k_lengths, min_size=batch, max_size=batch))),
        softmax_scale=draw(st.sampled_from((None, None, 0.3, -0.2, 0.0))),
        num_splits=draw(st.sampled_from((0, 0, 1, 2, 5))),
        pad_q=pad_q,
        pad_k=draw(st.sampled_from((0, 7))),
        tail_q=draw(st.sampled_from((0, 2))) if packed_q else 0,
        max_q_slack=draw(st.sampled_from((0, 50))),
        table_slack=draw(st.integers(0, 2)) if kv_layout == "paged" else 0,
        seed=draw(st.integers(0, 1000)),
    )


@ci(30)
@hypothesis.given(case=cases("decode"), count=st.sampled_from((1, 2, 3, 5, 8, 13)))
def test_decode(case: Case, count: int, programs: Callable[[int], None], device: str) -> None:
    programs(count)
    agrees(case, device)


@ci(12)
@hypothesis.given(case=cases("prefill"))
def test_prefill(case: Case, device: str) -> None:
    agrees(case, device)


@ci(12)
@hypothesis.given(case=cases("mixed"), count=st.sampled_from((1, 3, 8)))
def test_both_paths_in_one_call(
    case: Case, count: int, programs: Callable[[int], None], device: str
) -> None:
    programs(count)
    agrees(case, device)


# ---------------------------------------------------------------- the schedule

PAGED = Case(
    dtype="float16",
    heads_q=6,
    heads_kv=3,
    head_dim=16,
    head_dim_v=16,
    page_size=16,
    seqlens_q=(1, 1, 1),
    seqlens_k=(150, 3, 70),
    num_splits=0,
)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 9, 24, 64])
@pytest.mark.parametrize("sinks", [False, True])
def test_any_number_of_programs(
    count: int, sinks: bool, programs: Callable[[int], None], device: str
) -> None:
    """More, fewer than heads and tiles; dividing them or not: the pieces add up to the same."""
    programs(count)
    agrees(PAGED.with_changes(sinks=sinks), device)


@pytest.mark.parametrize("slope", [-4.0, 4.0])
def test_more_pieces_than_a_merge_holds_at_once(
    slope: float, programs: Callable[[int], None], device: str
) -> None:
    """Scores that rise or fall along the keys: earlier or later pieces hold the maximum."""
    programs(40)
    seqlen_k = 40 * TILE
    generator = torch.Generator().manual_seed(0)
    q = torch.ones(1, 1, 1, 16, device=device)
    k = (torch.linspace(0, slope, seqlen_k) / 4)[None, :, None, None].repeat(1, 1, 1, 16)
    v = torch.randn(1, seqlen_k, 1, 16, generator=generator).to(device)
    arguments = {"q": q, "k_cache": k.to(device), "v_cache": v}
    out, lse = triton_fa.flash_attn_with_kvcache(**arguments, return_softmax_lse=True, ver="triton")
    want, want_lse = reference.flash_attn_with_kvcache(**arguments)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [31, 32, 33, 257])
def test_more_sequences_than_a_block(batch: int, device: str) -> None:
    lengths = tuple((7 * b) % 5 for b in range(batch))
    agrees(
        PAGED.with_changes(
            heads_q=1, heads_kv=1, page_size=2, seqlens_q=(1,) * batch, seqlens_k=lengths
        ),
        device,
    )


def test_more_sequences_than_the_largest_block(
    monkeypatch: pytest.MonkeyPatch, programs: Callable[[int], None], device: str
) -> None:
    """Beyond 1024 sequences a program looks at them block after block; so here beyond 4."""
    from triton_fa.kernels import plans

    monkeypatch.setattr(plans, "_block_b", lambda batch: 4)
    programs(5)
    lengths = (40, 0, 3, 33, 64, 1, 0, 90, 5)
    for heads_kv in (1, 2):
        agrees(
            PAGED.with_changes(heads_q=2, heads_kv=heads_kv, seqlens_q=(1,) * 9, seqlens_k=lengths),
            device,
        )


@pytest.mark.parametrize("sm_margin", [0, 1, 3, 1000])
def test_a_margin_leaves_multiprocessors_idle(
    sm_margin: int, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    from triton_fa import api
    from triton_fa.kernels import plans

    api._RECORDS.clear()
    made = []
    real = plans.decode_programs

    def spy(*arguments: Any) -> int:
        made.append(real(*arguments))
        return made[-1]

    monkeypatch.setattr(plans, "decode_programs", spy)
    agrees(PAGED, device, sm_margin=sm_margin)
    if device == "cpu":  # 4 multiprocessors of 2 programs
        # 6 of 8 programs would divide the heads, and idle more than 5 % of them.
        assert made == [{0: 8, 1: 6, 3: 2, 1000: 2}[sm_margin]]


@pytest.mark.parametrize("num_splits", [0, 1, 2, 3, 100])
@pytest.mark.parametrize("seqlen_q", [1, 3])
def test_split_and_unsplit(num_splits: int, seqlen_q: int, device: str) -> None:
    agrees(
        PAGED.with_changes(causal=True, seqlens_q=(seqlen_q,) * 3, num_splits=num_splits), device
    )


def test_the_last_piece_is_shorter(device: str) -> None:
    """Who took it for a whole one would go on to a head that there is not, and write its rows."""
    agrees(PAGED.with_changes(seqlens_k=(3, 5, 150), num_splits=2), device)


def test_unsplit_is_one_kernel(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    from triton_fa import api
    from triton_fa.kernels import plans

    launched: list[set[str]] = []
    real = plans.plan

    def spy(*arguments: Any) -> Any:
        planned = real(*arguments)
        launched.append({step.kernel.__name__ for step in planned.launches})
        return planned

    monkeypatch.setattr(plans, "plan", spy)
    for num_splits in (0, 1):
        api._RECORDS.clear()
        agrees(PAGED.with_changes(num_splits=num_splits), device)
    split, unsplit = launched
    assert "combine_kernel" in split
    assert len(unsplit) == 1
    assert "combine_kernel" not in unsplit


@pytest.mark.parametrize(("group", "seqlen_q"), [(65, 1), (70, 1), (2, 33), (1, 65), (130, 1)])
def test_more_rows_than_the_decode_path_takes(group: int, seqlen_q: int, device: str) -> None:
    """Rows around 64 and 128, where the path and its tile change."""
    for q_layout in ("batched", "packed"):
        agrees(
            PAGED.with_changes(
                heads_q=group,
                heads_kv=1,
                q_layout=q_layout,
                causal=True,
                seqlens_q=(seqlen_q, seqlen_q),
                seqlens_k=(70, 33),
            ),
            device,
        )


HALVED: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window": (20, 3), "sinks": True},
    "negative-scale": {"softmax_scale": -0.5},
    "float8": {"kv_dtype": "float8_e4m3fn", "descales": "kv"},
}


@pytest.mark.parametrize("name", HALVED)
def test_rows_in_two_halves(name: str, fresh: pytest.MonkeyPatch, device: str) -> None:
    """What the tiles of Hopper are; groups of three are cut by the ends of halves and tiles."""
    if device == "cpu":
        tile = PrefillTile(2 * TILE, TILE, 4, 1, halves=2)
        fresh.setattr("triton_fa.kernels.plans.prefill_tile", lambda *arguments: tile)
    agrees(
        PAGED.with_changes(
            heads_q=3, heads_kv=1, seqlens_q=(50,) * 3, seqlens_k=(75, 60, 30), **HALVED[name]
        ),
        device,
    )


LOOPS = {
    "panels": PrefillTile(2 * TILE, TILE, 4, 1, halves=2, panels=True, sums=8),
    "late": PrefillTile(TILE, TILE, 4, 1, panels=True, late=True),
}
LOOPED: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "full": {"sinks": True},
    "window": {"window": (20, 3), "sinks": True},
    "wide-window": {"causal": True, "window": (70, 0), "head_dim": 72},
    "softcap": {"causal": True, "softcap": 20.0, "head_dim": 64},
    "negative-scale": {"causal": True, "softmax_scale": -0.5},
    "chunk": {"causal": True, "attention_chunk": 40, "head_dim_v": 32},
    "float32": {"dtype": "float32", "causal": True},
    "pages": {"causal": True, "entry": "kvcache", "kv_layout": "paged", "page_size": 16},
    "float8": {"kv_layout": "batched", "kv_dtype": "float8_e4m3fn", "descales": "kv"}
    | {"entry": "kvcache"},
    "padding": {"causal": True, "entry": "kvcache", "kv_layout": "batched"}
    | {"leftpad": True, "leftpads": (3, 40, 0, 20)},
}


@pytest.mark.parametrize("tile", LOOPS)
@pytest.mark.parametrize("name", LOOPED)
def test_loops_of_a_tile(name: str, tile: str, fresh: pytest.MonkeyPatch, device: str) -> None:
    """Sums by column, panels, values a block late; lengths on and off the edges of blocks."""
    if device == "cpu":
        fresh.setattr("triton_fa.kernels.plans.prefill_tile", lambda *arguments: LOOPS[tile])
    agrees(
        replace(
            PAGED,
            **{"entry": "varlen", "kv_layout": "packed", "q_layout": "packed", "page_size": 0}
            | {"heads_q": 3, "heads_kv": 1, "head_dim": 96, "head_dim_v": 80, "num_splits": 1}
            | {"seqlens_q": (50, 40, 70, 35), "seqlens_k": (75, 64, 30, 150)}
            | LOOPED[name],
        ),
        device,
    )


def test_a_window_wider_than_a_tile(device: str) -> None:
    """Its left edge runs through blocks that only the first rows of a tile see whole."""
    agrees(
        PAGED.with_changes(
            heads_q=2,
            heads_kv=1,
            causal=True,
            window=(100, 0),
            seqlens_q=(33,),
            seqlens_k=(190,),
            num_splits=1,
        ),
        device,
    )


def test_a_ragged_prefill_of_more_sequences_than_the_largest_block(
    fresh: pytest.MonkeyPatch, device: str
) -> None:
    """Beyond 1024 sequences there is no order; so here beyond 4, in three blocks."""
    fresh.setattr("triton_fa.kernels.plans._block_b", lambda batch: 4)
    agrees(
        PAGED.with_changes(
            q_layout="packed",
            heads_q=1,
            heads_kv=1,
            causal=True,
            seqlens_q=(66, 1, 0, 2, 65, 1, 1, 0, 65),
            seqlens_k=(70, 9, 5, 2, 65, 3, 4, 0, 33),
            max_q_slack=200,
        ),
        device,
    )


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("scale", [-0.5, 0.0, 3.0])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("seqlen_q", [1, 70])
def test_any_finite_scale(scale: float, softcap: float, seqlen_q: int, device: str) -> None:
    agrees(
        PAGED.with_changes(
            heads_q=2,
            heads_kv=1,
            dtype="float32",
            causal=True,
            softmax_scale=scale,
            softcap=softcap,
            seqlens_q=(seqlen_q,) * 3,
        ),
        device,
    )


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dim_v", [16, 72])
def test_head_dims(dim: int, dim_v: int, device: str) -> None:
    """One and two panels, whole and masked, of q·k and of v."""
    agrees(PAGED.with_changes(head_dim=dim, head_dim_v=dim_v), device)
    case = PAGED.with_changes(heads_q=1, heads_kv=1, head_dim=dim, head_dim_v=dim_v, num_splits=1)
    agrees(case, device)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("seqlen_q", [3, 70])
def test_rows_without_a_key(sinks: bool, seqlen_q: int, device: str) -> None:
    """More queries than keys under a causal mask, no keys at all, a window beyond the keys."""
    base = PAGED.with_changes(heads_q=2, heads_kv=1, q_layout="packed", sinks=sinks, out=True)
    lengths = {"seqlens_q": (seqlen_q, seqlen_q, 2), "seqlens_k": (2, 0, 40)}
    agrees(base.with_changes(causal=True, **lengths), device)
    agrees(base.with_changes(**lengths), device)
    agrees(base.with_changes(window=(1, 0), **lengths), device)


def test_large_scores_stay_finite(device: str) -> None:
    q = torch.full((1, 1, 1, 16), 100.0, device=device)
    k = torch.linspace(-100, 100, 70, device=device)[None, :, None, None].repeat(1, 1, 1, 16)
    v = torch.randn(1, 70, 1, 16, generator=torch.Generator().manual_seed(0)).to(device)
    out, lse = triton_fa.flash_attn_with_kvcache(
        q, k, v, softmax_scale=1.0, return_softmax_lse=True, ver="triton"
    )
    torch.testing.assert_close(out, v[:, -1:], rtol=0, atol=1e-6)
    torch.testing.assert_close(lse.flatten().cpu(), torch.tensor([160_000.0]), rtol=1e-6, atol=0)


# ---------------------------------------------------------------- device tensors that are wrong


def int32(*values: int, device: str) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def guarded(*shape: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor inside a larger one of NaN: whoever writes outside it shows."""
    size = math.prod(shape)
    around = torch.full((size + 2048,), torch.nan, dtype=torch.float16, device=device)
    return around, around[1024 : 1024 + size].view(shape)


@pytest.mark.parametrize("lengths", [(-5, 2**31 - 1, 90), (-(2**31), 91, 10_000), (89, 90, 2**30)])
@pytest.mark.parametrize("seqlen_q", [1, 70])
def test_wrong_cache_lengths_are_cut_to_the_table(
    lengths: tuple[int, ...], seqlen_q: int, device: str
) -> None:
    case = PAGED.with_changes(
        heads_q=2,
        heads_kv=1,
        page_size=15,
        seqlens_q=(seqlen_q,) * 3,
        seqlens_k=tuple(min(max(n, 0), 90) for n in lengths),
    )
    agrees(case, device, cache_seqlens=int32(*lengths, device=device))


@pytest.mark.parametrize("seqlen_q", [1, 70])
def test_wrong_page_ids_stay_inside_the_cache(seqlen_q: int, device: str) -> None:
    """An id below 0 reads the first page, one beyond the cache the last."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1, seqlen_q, 2, 16, generator=generator).to(device, torch.float16)
    cache = torch.randn(4, 16, 1, 16, generator=generator).to(device, torch.float16)
    arguments = {"cache_seqlens": 48, "causal": True}
    got, want = (
        triton_fa.flash_attn_with_kvcache(
            q, cache, cache, page_table=int32(*ids, device=device)[None], ver="triton", **arguments
        )
        for ids in ((-7, 2**31 - 1, 4), (0, 3, 3))
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "cu_seqlens", [(0, -3, 2**31 - 1), (5, 2, 90), (-(2**31), 2**31 - 1, 0), (90, 91, 92)]
)
@pytest.mark.parametrize("num_splits", [0, 1])
def test_wrong_prefix_sums_write_nothing_outside(
    cu_seqlens: tuple[int, ...], num_splits: int, device: str
) -> None:
    q = torch.zeros(75, 2, 16, dtype=torch.float16, device=device)
    k = torch.zeros(40, 1, 16, dtype=torch.float16, device=device)
    cu = int32(*cu_seqlens, device=device)
    around, out = guarded(75, 2, 16, device=device)
    triton_fa.flash_attn_varlen_func(
        q, k, k, cu, cu, 75, 75, num_splits=num_splits, out=out, ver="triton"
    )
    assert around[:1024].isnan().all()
    assert around[1024 + out.numel() :].isnan().all()
    assert not out.isinf().any()


def test_calls_do_not_share_a_workspace(programs: Callable[[int], None], device: str) -> None:
    """The same record runs with other tensors of the same shapes, in any order."""
    programs(5)
    prepared = [Prepared.of(PAGED.with_changes(seed=s), device) for s in range(3)]
    function = triton_fa.flash_attn_with_kvcache
    results = [function(**p.arguments(), ver="triton") for p in (*prepared, *reversed(prepared))]
    for (out, lse), p in zip(results, (*prepared, *reversed(prepared)), strict=True):
        _, problems = judge(p.case, Result(out, lse), p.truth, Limits.of(p.case))
        assert not problems
    for first, again in zip(results, reversed(results), strict=True):
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


def test_dense_call(device: str) -> None:
    case = Case(
        entry="dense",
        dtype="float32",
        heads_q=2,
        heads_kv=1,
        head_dim=40,
        head_dim_v=48,
        kv_layout="batched",
        page_size=0,
        causal=True,
        seqlens_q=(40, 40),
        seqlens_k=(70, 70),
    )
    agrees(case, device)
    agrees(replace(case, num_splits=0, seqlens_q=(2, 2)), device)


def test_the_judge_sees_a_missing_piece(device: str) -> None:
    """What these tests rest on: attention over all keys but a few is not within the budget."""
    prepared = Prepared.of(PAGED, device)
    arguments = prepared.arguments()
    arguments.pop("num_splits")
    arguments.pop("return_softmax_lse")
    arguments["cache_seqlens"] = arguments["cache_seqlens"] - 1
    out, lse = reference.flash_attn_with_kvcache(**arguments)
    truth: Truth = prepared.truth
    result = Result(out.half(), lse.float())
    _, problems = judge(PAGED, result, truth, Limits.of(PAGED))
    assert len(problems) >= 2


@pytest.mark.parametrize("seqlen_q", [1, 40])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_a_nan_that_is_seen_stays_one(seqlen_q: int, num_splits: int, device: str) -> None:
    q = torch.ones(1, seqlen_q, 4, 16, dtype=torch.float16, device=device)
    k = torch.ones(1, 100, 2, 16, dtype=torch.float16, device=device)
    k[0, 70, 1, 5] = torch.nan
    out, lse, *_ = triton_fa.flash_attn_with_kvcache(
        q,
        k,
        torch.ones_like(k),
        num_splits=num_splits,
        causal=True,
        return_softmax_lse=True,
        ver="triton",
    )
    sees = torch.arange(seqlen_q, device=device) + 100 - seqlen_q >= 70
    assert torch.equal(out.isnan().all(-1)[0, :, 2], sees)
    assert torch.equal(lse.isnan()[0, 3], sees)
    assert not out[:, :, :2].isnan().any()
    assert not lse[:, :2].isnan().any()

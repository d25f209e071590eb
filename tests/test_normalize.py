"""From public arguments to the canonical problem: layouts, windows, bounds, features, spellings."""

import dataclasses
from typing import Any

import pytest
import torch

import triton_fa
from triton_fa import normalize, spec
from triton_fa.errors import ArgumentError, ArgumentTypeError, ArgumentValueError
from triton_fa.normalize import MetadataOptions, Options
from triton_fa.problem import Append, Lengths, Problem, Tensors
from triton_fa.spec import AttnSpec, Bounds

pytestmark = pytest.mark.usefixtures("fresh")


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def dense(**options: Any) -> Problem:
    q, k, v = torch.zeros(2, 3, 4, 16), torch.zeros(2, 5, 2, 16), torch.zeros(2, 5, 2, 24)
    return normalize.problem(Tensors(q, k, v), Options("dense", **options))


def paged(**options: Any) -> Problem:
    tensors = Tensors(
        q=torch.zeros(5, 4, 16),
        k=torch.zeros(9, 8, 2, 16),
        v=torch.zeros(9, 8, 2, 16),
        page_table=torch.zeros(3, 6, dtype=torch.int32),
        cu_seqlens_q=ints(0, 1, 2, 5),
        seqused_k=ints(1, 2, 3),
    )
    return normalize.problem(tensors, Options("kvcache", max_seqlen_q=3, **options))


def packed(**options: Any) -> Problem:
    tensors = Tensors(
        q=torch.zeros(5, 4, 16),
        k=torch.zeros(7, 2, 16),
        v=torch.zeros(7, 2, 16),
        cu_seqlens_q=ints(0, 2, 5),
        cu_seqlens_k=ints(0, 3, 7),
    )
    return normalize.problem(
        tensors, Options("varlen", **{"max_seqlen_q": 3, "max_seqlen_k": 4} | options)
    )


def test_a_dense_call() -> None:
    spec, bounds = dense().spec, dense().bounds
    assert (spec.query_layout, spec.key_layout, spec.page_size) == ("dense", "dense", 0)
    assert (spec.num_heads_q, spec.num_heads_kv, spec.q_heads_per_kv) == (4, 2, 2)
    assert (spec.head_dim, spec.head_dim_v) == (16, 24)
    assert (spec.softmax_scale, spec.softcap) == (0.25, 0.0)
    assert (bounds.batch, bounds.total_q, bounds.max_seqlen_q, bounds.max_seqlen_k) == (2, 6, 3, 5)
    assert bounds.fixed_seqlen_k == 5


def test_a_paged_call() -> None:
    spec, bounds = paged().spec, paged().bounds
    assert (spec.query_layout, spec.key_layout, spec.page_size) == ("packed", "paged", 8)
    assert (bounds.batch, bounds.total_q, bounds.max_seqlen_q, bounds.max_seqlen_k) == (3, 5, 3, 48)
    assert bounds.fixed_seqlen_k is None


def test_a_packed_call() -> None:
    spec, bounds = packed().spec, packed().bounds
    assert (spec.query_layout, spec.key_layout) == ("packed", "packed")
    assert (bounds.max_seqlen_q, bounds.max_seqlen_k, bounds.fixed_seqlen_k) == (3, 4, None)


def test_bounds_are_never_beyond_the_tensors() -> None:
    bounds = packed(max_seqlen_q=10**9, max_seqlen_k=10**9).bounds
    assert (bounds.max_seqlen_q, bounds.max_seqlen_k) == (5, 7)


@pytest.mark.parametrize(("stated", "bound"), [(3, 3), (5, 5), (6, 6), (7, 7), (8, 8), (10**9, 8)])
def test_bounds_of_few_sizes_where_values_are_scored(stated: int, bound: int) -> None:
    """Behind 5 tokens the next power of two, but never more than was stated."""
    q, qv, v = torch.zeros(5, 4, 16), torch.zeros(5, 4, 24), torch.zeros(9, 8, 1, 24)
    tensors = Tensors(
        q=q,
        k=torch.zeros(9, 8, 1, 16),
        v=v,
        qv=qv,
        page_table=torch.zeros(3, 6, dtype=torch.int32),
        cu_seqlens_q=ints(0, 1, 2, 5),
        seqused_k=ints(1, 2, 3),
    )
    problem = normalize.problem(tensors, Options("kvcache", max_seqlen_q=stated))
    assert problem.bounds.max_seqlen_q == bound


@pytest.mark.parametrize(
    ("causal", "window", "want"),
    [
        (False, (-1, -1), (-1, -1)),
        (False, (None, None), (-1, -1)),
        (False, (-5, None), (-1, -1)),
        (True, (-1, -1), (-1, 0)),
        (True, (3, 7), (3, 0)),
        (True, (0, 0), (0, 0)),
        (False, (-1, 0), (-1, 0)),
        (False, (3, -1), (3, -1)),
        (False, (None, 3), (-1, 3)),
        (False, (3, 7), (3, 7)),
    ],
)
def test_windows(causal: bool, window: Any, want: tuple[int, int]) -> None:
    spec = dense(causal=causal, window_size=window).spec
    assert (spec.window_left, spec.window_right) == want


def test_an_int_cache_seqlens_is_a_bound_and_no_tensor() -> None:
    tensors = Tensors(
        q=torch.zeros(3, 1, 4, 16),
        k=torch.zeros(9, 8, 2, 16),
        v=torch.zeros(9, 8, 2, 16),
        page_table=torch.zeros(3, 6, dtype=torch.int32),
    )
    problem = normalize.problem(tensors, Options("kvcache", fixed_seqlen_k=7))
    assert problem.bounds.fixed_seqlen_k == 7
    assert problem.tensors.seqused_k is None
    assert normalize.problem(tensors, Options("kvcache")).bounds.fixed_seqlen_k == 48


def test_features_name_what_was_used() -> None:
    assert dense().spec.features == frozenset()
    given = dense(features=frozenset({"qv"})).spec
    assert given.features == {"qv"}
    tensors = Tensors(
        q=torch.zeros(2, 3, 4, 16),
        k=torch.zeros(2, 5, 2, 16),
        v=torch.zeros(2, 5, 2, 16),
        out=torch.zeros(2, 3, 4, 16),
        seqused_q=ints(1, 2),
        sinks=torch.zeros(4, dtype=torch.bfloat16),
        scheduler_metadata=ints(1),
    )
    spec = normalize.problem(tensors, Options("varlen")).spec
    assert spec.features == {"out", "seqused_q", "sinks", "scheduler_metadata"}
    assert spec.sinks_dtype == torch.bfloat16


def appending(new: Append, *, interleaved: bool = True, **tensors: Any) -> Problem:
    given = Tensors(
        q=torch.zeros(2, 3, 4, 32),
        k=torch.zeros(2, 20, 2, 32),
        v=torch.zeros(2, 20, 2, 24),
        seqused_k=ints(1, 2),
        append=new,
    )._replace(**tensors)
    return normalize.problem(given, Options("kvcache", rotary_interleaved=interleaved))


def test_appended_keys_are_bounds_and_features() -> None:
    k, v = torch.zeros(2, 5, 2, 32), torch.zeros(2, 5, 2, 24)
    problem = appending(Append(k, v))
    assert (problem.bounds.total_new, problem.bounds.max_seqlen_new) == (10, 5)
    assert problem.spec.features == {"k"}
    assert problem.spec.rotary_dim == 0
    packed = appending(Append(k[0], v[0], cu_seqlens_k_new=ints(0, 1, 5)))
    assert (packed.bounds.total_new, packed.bounds.max_seqlen_new) == (5, 5)
    cos, sin = torch.zeros(9, 8), torch.zeros(9, 8)
    rotary = Append(k, v, None, cos, sin, ints(0, 1))
    turned = appending(rotary, interleaved=False).spec
    assert turned.features == {"k", "rotary_cos", "rotary_seqlens"}
    assert (turned.rotary_dim, turned.rotary_interleaved) == (16, False)
    assert dense().bounds.total_new == 0


def test_rows_and_padding_are_features() -> None:
    k, v = torch.zeros(7, 20, 2, 32), torch.zeros(7, 20, 2, 24)
    new = Append(torch.zeros(2, 0, 2, 32), torch.zeros(2, 0, 2, 24))
    rows = {"cache_batch_idx": ints(6, 0), "cache_leftpad": ints(0, 3)}
    problem = appending(new, k=k, v=v, **rows)
    assert problem.spec.features == {"k", *rows}
    assert (problem.bounds.batch, problem.bounds.total_new) == (2, 0)
    table = torch.zeros(5, 3, dtype=torch.int32)
    paged = appending(new, k=k, v=v, page_table=table, **rows)
    assert (paged.bounds.batch, paged.bounds.max_seqlen_k) == (2, 60)


@pytest.mark.parametrize(("value", "want"), [(None, 0), (0, 0), (7, 7)])
def test_attention_chunk(value: int | None, want: int) -> None:
    spec = dense(attention_chunk=value).spec
    assert spec.attention_chunk == want
    assert spec.features == ({"attention_chunk"} if want else set())


@pytest.mark.parametrize(
    ("options", "moving"),
    [
        # 3 queries and 5 keys at most
        ({}, False),
        ({"causal": True}, True),
        ({"window_size": (-1, 0)}, True),
        ({"window_size": (0, -1)}, True),
        ({"window_size": (3, -1)}, True),
        ({"window_size": (4, -1)}, False),
        ({"window_size": (-1, 1)}, True),
        ({"window_size": (-1, 2)}, False),
        ({"window_size": (4, 2)}, False),
        ({"window_size": (4, 9), "causal": True}, True),
        ({"attention_chunk": 1000}, True),
    ],
)
def test_queries_have_positions_of_their_own_where_a_mask_may_hide_a_key(
    options: dict[str, Any], moving: bool
) -> None:
    assert dense(**options).spec.rotary_moving == moving


def test_one_causal_query_has_a_position_of_its_own() -> None:
    q, k = torch.zeros(1, 1, 2, 16), torch.zeros(1, 8, 2, 16)
    for causal in (False, True):
        options = Options("kvcache", causal=causal)
        assert normalize.problem(Tensors(q, k, k), options).spec.rotary_moving == causal


def test_a_bound_of_dense_queries_is_checked_and_not_needed() -> None:
    assert dense(max_seqlen_q=0).bounds.max_seqlen_q == 3
    with pytest.raises(ArgumentValueError, match=r"^max_seqlen_q: expected at least 0"):
        dense(max_seqlen_q=-1)


def test_a_bound_counts_as_it_is_stated_there() -> None:
    q, k = torch.zeros(3, 2, 16), torch.zeros(1, 8, 2, 16)
    prefix = torch.tensor([0, 3], dtype=torch.int32)
    tensors = Tensors(q, k, k, cu_seqlens_q=prefix)
    for stated, moving in ((3, False), (4, True)):
        options = Options("kvcache", max_seqlen_q=stated, window_size=(-1, 2))
        assert normalize.problem(tensors, options).spec.rotary_moving == moving


def test_off_is_off_in_every_spelling() -> None:
    assert dense(softcap=None).spec == dense(softcap=0.0).spec == dense(softcap=0).spec
    assert dense(num_splits=-1).spec == dense(num_splits=0).spec


def test_the_problem_is_hashable_without_its_tensors() -> None:
    assert hash(dense().spec) == hash(dense().spec)
    assert hash(paged().bounds) == hash(paged().bounds)


def test_the_callers_tensors_are_not_copied() -> None:
    q, k, v = (torch.zeros(2, 3, 2, 16) for _ in range(3))
    tensors = normalize.problem(Tensors(q, k, v), Options("dense")).tensors
    assert tensors.q is q
    assert tensors.k is k
    assert tensors.v is v


@pytest.mark.parametrize("batch", [0, 1, 3, 4, 5, 255, 256, 1023])
def test_metadata_is_never_longer_than_engines_allot(batch: int) -> None:
    assert spec.metadata_entries(batch) == 4 * ((batch + 3) // 4 * 4) + 1


def test_a_batch_of_nothing() -> None:
    tensors = Tensors(
        q=torch.zeros(0, 4, 16),
        k=torch.zeros(0, 2, 16),
        v=torch.zeros(0, 2, 16),
        cu_seqlens_q=ints(0),
        cu_seqlens_k=ints(0),
    )
    problem = normalize.problem(tensors, Options("varlen", max_seqlen_q=0, max_seqlen_k=0))
    assert (problem.bounds.batch, problem.bounds.total_q) == (0, 0)


# ---------------------------------------------------------------- spellings of the public functions


def kvcache(**changes: Any) -> Any:
    torch.manual_seed(0)
    given = {
        "q": torch.randn(2, 1, 4, 16),
        "k_cache": torch.randn(5, 4, 2, 16),
        "v_cache": torch.randn(5, 4, 2, 16),
    }
    return triton_fa.flash_attn_with_kvcache(**given, **changes, ver="torch")


TABLE, LENGTHS = ints(4, 1, 2, 3).view(2, 2), ints(3, 8)
SINKS = torch.tensor([1.0, 2.0, -1.0, 0.0])


@pytest.mark.parametrize(
    "other",
    [
        {"block_table": TABLE, "cache_seqlens": LENGTHS},
        {"page_table": TABLE, "seqused_k": LENGTHS},
        {"page_table": TABLE, "cache_seqlens": LENGTHS, "block_table": TABLE},
    ],
)
def test_other_spellings_of_a_cache_mean_the_same(other: dict[str, Any]) -> None:
    want = kvcache(page_table=TABLE, cache_seqlens=LENGTHS)
    assert torch.equal(kvcache(**other), want)
    assert not torch.equal(kvcache(page_table=TABLE), want)


@pytest.mark.parametrize("name", ["s_aux", "learnable_sink"])
def test_other_spellings_of_sinks_mean_the_same(name: str) -> None:
    where = {"page_table": TABLE, "cache_seqlens": LENGTHS}
    want = kvcache(**where, sinks=SINKS)
    assert torch.equal(kvcache(**where, **{name: SINKS}), want)
    assert not torch.equal(kvcache(**where), want)


@pytest.mark.parametrize("name", ["return_softmax_lse", "return_attn_probs", "return_lse"])
def test_every_lse_flag_gives_the_lse(name: str) -> None:
    out, lse = kvcache(page_table=TABLE, cache_seqlens=LENGTHS, **{name: True})
    assert out.shape == (2, 1, 4, 16)
    assert lse.shape == (2, 4, 1)
    assert lse.dtype == torch.float32


def test_hints_change_nothing() -> None:
    where = {"page_table": TABLE, "cache_seqlens": LENGTHS}
    want = kvcache(**where)
    hints = {"pack_gqa": True, "sm_margin": 3, "num_splits": 1, "max_seqlen_k": 1}
    for name, value in hints.items():
        assert torch.equal(kvcache(**where, **{name: value}), want), name


def test_a_call_is_prepared_again_when_anything_the_host_sees_changes(fresh: Any) -> None:
    seen = []
    real = normalize.problem
    fresh.setattr(normalize, "problem", lambda *given: seen.append(1) or real(*given))
    q, k = torch.randn(2, 3, 4, 16), torch.randn(2, 5, 2, 16)

    def prepared(**changes: Any) -> int:
        before = len(seen)
        triton_fa.flash_attn_func(**{"q": q, "k": k, "v": k, "ver": "torch"} | changes)
        return len(seen) - before

    assert prepared() == 1
    assert prepared() == 0
    assert prepared(k=k.clone(), v=k.clone()) == 0, "another tensor of the same kind"
    changes: list[dict[str, Any]] = [
        {"causal": True},
        {"softmax_scale": 2.0},
        {"softcap": 1.0},
        {"window_size": (1, 1)},
        {"num_splits": 0},
        {"pack_gqa": True},
        {"sm_margin": 1},
        {"sinks": torch.zeros(4)},
        {"sinks": torch.zeros(4).half()},
        {"q": torch.randn(2, 3, 8, 16)},
        {"q": torch.randn(2, 3, 4, 32)[..., :16]},
        {"q": torch.randn(385)[1:].view(2, 3, 4, 16)},
        {"return_attn_probs": True},
        {"out": torch.empty(2, 3, 4, 16)},
        {"ver": "triton"} if torch.cuda.is_available() is False else {"softcap": 2.0},
    ]
    for change in changes:
        assert prepared(**change) == 1, change
        assert prepared(**change) == 0, change


def test_an_append_is_prepared_again_when_anything_the_host_sees_of_it_changes(fresh: Any) -> None:
    seen = []
    real = normalize.problem
    fresh.setattr(normalize, "problem", lambda *given: seen.append(1) or real(*given))

    def new(*shape: int) -> dict[str, torch.Tensor]:
        return {"k": torch.zeros(*shape, 2, 32), "v": torch.zeros(*shape, 2, 32)}

    given = {
        "q": torch.zeros(2, 1, 4, 32),
        "k_cache": torch.zeros(2, 8, 2, 32),
        "v_cache": torch.zeros(2, 8, 2, 32),
        "cache_seqlens": ints(3, 4),
        "rotary_cos": torch.zeros(9, 16),
        "rotary_sin": torch.zeros(9, 16),
    } | new(2, 1)

    def prepared(**changes: Any) -> int:
        before = len(seen)
        triton_fa.flash_attn_with_kvcache(**given | changes, ver="torch")
        return len(seen) - before

    assert prepared() == 1
    assert prepared() == 0
    assert prepared(**{name: tensor.clone() for name, tensor in new(2, 1).items()}) == 0
    more_rows = {"k_cache": torch.zeros(5, 8, 2, 32), "v_cache": torch.zeros(5, 8, 2, 32)}
    changes: list[dict[str, Any]] = [
        {name: None for name in ("k", "v", "rotary_cos", "rotary_sin")},
        {"rotary_cos": None, "rotary_sin": None},
        new(2, 2),
        new(3) | {"cu_seqlens_k_new": ints(0, 1, 3)},
        {"k": torch.zeros(2, 1, 2, 64)[..., :32]},
        {"k": torch.zeros(129)[1:].view(2, 1, 2, 32)},
        {"rotary_cos": torch.zeros(9, 8), "rotary_sin": torch.zeros(9, 8)},
        {"rotary_cos": torch.zeros(10, 16), "rotary_sin": torch.zeros(10, 16)},
        {"rotary_seqlens": ints(0, 1)},
        {"rotary_interleaved": False},
        {"cache_leftpad": ints(0, 1)},
        {"cache_batch_idx": ints(1, 0)},
        {"cache_batch_idx": ints(1, 0)} | more_rows,
        {"attention_chunk": 2},
        {"attention_chunk": 3},
        {"cache_seqlens": 3},
        {"cache_seqlens": 4},
    ]
    for change in changes:
        assert prepared(**change) == 1, change
        assert prepared(**change) == 0, change


# ---------------------------------------------------------------- scheduler metadata

ERRORS = (ArgumentError, ArgumentTypeError, ArgumentValueError)
STEP_LENGTHS = Lengths(
    cu_seqlens_q=ints(0, 2, 5),
    cu_seqlens_k=ints(0, 3, 7),
    seqused_q=ints(2, 3),
    seqused_k=ints(3, 4),
    cu_seqlens_k_new=ints(0, 1, 3),
    cache_leftpad=ints(0, 1),
)
STEP = MetadataOptions(
    batch_size=2,
    max_seqlen_q=3,
    max_seqlen_k=48,
    num_heads_q=4,
    num_heads_kv=2,
    headdim=64,
    headdim_v=128,
    qkv_dtype=torch.bfloat16,
    page_size=16,
    causal=True,
    window_size=(9, -1),
    has_softcap=True,
    num_splits=3,
    sm_margin=2,
    features=frozenset(["cache_leftpad"]),
    attention_chunk=8,
    max_seqlen_k_new=2,
)


def test_what_a_step_schedules() -> None:
    what, bounds = normalize.schedule(STEP_LENGTHS, torch.zeros(17).int(), STEP)
    assert what == AttnSpec(
        entry="kvcache",
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        kv_dtype=torch.bfloat16,
        num_heads_q=4,
        num_heads_kv=2,
        head_dim=64,
        head_dim_v=128,
        query_layout="packed",
        key_layout="paged",
        page_size=16,
        softmax_scale=1.0,
        window_left=9,
        window_right=0,
        softcap=1.0,
        num_splits=3,
        sm_margin=2,
        features=frozenset(["cache_leftpad"]),
        sinks_dtype=None,
        pack_gqa=None,
        attention_chunk=8,
    )
    unknown = 2**31 - 1
    assert bounds == Bounds(2, unknown, 3, 48, None, unknown, 2)


def test_what_the_smallest_step_schedules() -> None:
    smallest = dataclasses.replace(
        STEP,
        batch_size=0,
        max_seqlen_q=0,
        max_seqlen_k=0,
        num_heads_q=1,
        num_heads_kv=1,
        headdim=1,
        headdim_v=None,
        page_size=None,
        has_softcap=False,
        num_splits=0,
        sm_margin=0,
        max_seqlen_k_new=0,
    )
    what, bounds = normalize.schedule(Lengths(seqused_k=ints()), None, smallest)
    assert (what.num_heads_q, what.num_heads_kv, what.head_dim, what.head_dim_v) == (1, 1, 1, 1)
    assert (what.query_layout, what.key_layout, what.page_size) == ("dense", "dense", 0)
    assert (what.softcap, what.num_splits, what.sm_margin) == (0.0, 0, 0)
    assert bounds == Bounds(0, 2**31 - 1, 0, 0, None, 0, 0)
    narrow = dataclasses.replace(smallest, headdim_v=1)
    assert normalize.schedule(Lengths(seqused_k=ints()), None, narrow)[0] == what


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seqused_k", None),
        ("seqused_k", ints(1, 2, 3)),
        ("cu_seqlens_q", ints(0, 2)),
        ("cu_seqlens_k", ints(0, 3, 7, 9)),
        ("cu_seqlens_k_new", torch.zeros(3)),
        ("seqused_q", ints(2)),
        ("cache_leftpad", ints(0, 1, 2)),
    ],
)
def test_a_step_names_its_lengths(name: str, value: Any) -> None:
    shown = "cache_seqlens" if name == "seqused_k" else name
    with pytest.raises(ERRORS, match=f"^{shown}: expected "):
        normalize.schedule(STEP_LENGTHS._replace(**{name: value}), None, STEP)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", -1),
        ("max_seqlen_q", -1),
        ("max_seqlen_k", -1),
        ("num_heads_q", 0),
        ("num_heads_q", 3),
        ("num_heads_kv", 0),
        ("headdim", 0),
        ("headdim_v", 0),
        ("qkv_dtype", torch.int32),
        ("num_splits", 1.5),
        ("sm_margin", -1),
        ("attention_chunk", -1),
        ("max_seqlen_k_new", -1),
    ],
)
def test_a_step_names_its_numbers(name: str, value: Any) -> None:
    with pytest.raises(ERRORS, match=f"^{name}: expected "):
        normalize.schedule(STEP_LENGTHS, None, dataclasses.replace(STEP, **{name: value}))


@pytest.mark.parametrize(
    ("out", "says"),
    [
        (7, "a tensor, got int"),
        (torch.zeros(17), "dtype int32, got float32"),
        (torch.zeros(17, device="meta").int(), r"device cpu \(that of q\), got meta"),
        (torch.zeros(1, 17).int(), r"1 dimensions \(at most 17 entries\), got"),
        (torch.zeros(16).int(), r"shape \(17,\), got"),
        (torch.zeros(34).int()[::2], r"a contiguous tensor, got strides \(2,\)"),
    ],
    ids=["type", "dtype", "device", "rank", "length", "strides"],
)
def test_a_step_names_its_buffer(out: Any, says: str) -> None:
    with pytest.raises(ERRORS, match=f"^out: expected {says}"):
        normalize.schedule(STEP_LENGTHS, out, STEP)

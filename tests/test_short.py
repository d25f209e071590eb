"""The kernel of many short sequences, in the interpreter, against the float64 reference."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import reference
import triton_fa
from parity_tests.budgets import Limits, Result, judge
from parity_tests.cases import Case
from parity_tests.runners import Prepared

pytest.importorskip("triton")

NAN = float("nan")
KEYS = 64  # of the kernel's tile

Kernels = Callable[[], list[str]]


@pytest.fixture
def kernels(fresh: pytest.MonkeyPatch) -> Kernels:
    """Names of the kernels of the last call that was planned; few sequences are many here."""
    from triton_fa.kernels import plans

    planned: list[Any] = []
    real = plans.plan

    def spy(*arguments: Any) -> Any:
        planned.append(real(*arguments))
        return planned[-1]

    fresh.setattr(plans, "plan", spy)
    fresh.setattr(plans, "SHORT_PROGRAMS", 0)
    return lambda: [step.kernel.__name__ for step in planned[-1].launches]


def agrees(case: Case, device: str) -> None:
    """The public function gives what the reference gives, within the budget of its dtype."""
    prepared = Prepared.of(case, device)
    returned = getattr(triton_fa, case.function)(**prepared.arguments(), ver="triton")
    out, lse = returned if case.lse else (returned, None)
    _, problems = judge(case, Result(out, lse), prepared.truth, Limits.of(case))
    assert not problems, f"{problems}\n{case.repro_snippet(device=device)}"


PACKED = Case(
    entry="varlen",
    dtype="float16",
    heads_q=6,
    heads_kv=2,
    head_dim=16,
    head_dim_v=16,
    q_layout="packed",
    kv_layout="packed",
    page_size=0,
    causal=True,
    seqlens_q=(34, 0, 11, 64, 1, 40),
    seqlens_k=(34, 5, 64, 20, 0, 41),
)


windows = st.tuples(st.sampled_from((-1, None, 0, 1, 9, 40)), st.sampled_from((-1, None, 0, 3)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A legal call of sequences that are short enough, one of them with rows for two tiles."""
    kv_layout = draw(st.sampled_from(("packed", "packed", "batched")))
    q_layout = draw(st.sampled_from(("packed", "packed", "batched")))
    batch = draw(st.integers(1, 4))
    lengths_q = draw(st.lists(st.integers(0, 60), min_size=batch, max_size=batch))
    lengths_q[draw(st.integers(0, batch - 1))] = draw(st.sampled_from((33, 60)))
    pad_q = draw(st.sampled_from((0, 2))) if q_layout == "packed" else 2
    head_dim, head_dim_v = (draw(st.sampled_from((8, 16, 40, 64))) for _ in range(2))
    group, heads_kv = draw(st.sampled_from(((3, 1), (5, 2))))
    return PACKED.with_changes(
        dtype=draw(st.sampled_from(("float16", "float16", "float32", "bfloat16"))),
        heads_q=group * heads_kv,
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        q_layout=q_layout,
        kv_layout=kv_layout,
        kv_strides=draw(st.sampled_from(("plain", "sliced"))),
        q_strided=draw(st.booleans()),
        causal=draw(st.booleans()),
        window=draw(windows),
        attention_chunk=draw(st.sampled_from((0, 0, 13))),
        softcap=draw(st.sampled_from((0.0, 0.0, 20.0))),
        sinks=draw(st.booleans()),
        lse=draw(st.booleans()),
        out=draw(st.booleans()),
        seqlens_q=tuple(lengths_q),
        seqlens_k=tuple(draw(st.lists(st.integers(0, 61), min_size=batch, max_size=batch))),
        softmax_scale=draw(st.sampled_from((None, None, 0.3, -0.2, 0.0))),
        num_splits=draw(st.sampled_from((0, 1, 5))),
        pad_q=pad_q,
        pad_k=draw(st.sampled_from((0, 3))),
        tail_q=draw(st.sampled_from((0, 2))) if q_layout == "packed" else 0,
        max_q_slack=draw(st.sampled_from((0, 2))),
        seed=draw(st.integers(0, 1000)),
    )


@hypothesis.settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.filter_too_much,
    ],
)
@hypothesis.given(data=st.data())
def test_features(data: st.DataObject, kernels: Kernels, device: str) -> None:
    try:
        case = data.draw(cases())
    except ValueError:  # not a legal case
        hypothesis.reject()
    if device == "cpu" and case.dtype == "bfloat16":  # the interpreter does not round it
        hypothesis.reject()
    agrees(case, device)
    if device == "cpu" or case.dtype != "float32":  # GPUs have no tile of it for float32
        assert kernels() == ["short_kernel"]


ONE_EACH: dict[str, dict[str, Any]] = {
    "sinks": {"sinks": True},
    "softcap": {"softcap": 20.0},
    "negative-scale": {"softmax_scale": -0.5},
}


@pytest.mark.parametrize("name", ONE_EACH)
def test_one_feature(name: str, kernels: Kernels, device: str) -> None:
    agrees(PACKED.with_changes(**ONE_EACH[name]), device)
    assert kernels() == ["short_kernel"]


OTHERS: dict[str, dict[str, Any]] = {
    "batch-invariant": {"batch_invariant": True},
    "more-keys": {"max_seqlen_k": KEYS + 1},
    "more-queries": {"max_seqlen_q": KEYS + 1},
    "decode": {"max_seqlen_q": 1},
}


def varlen(device: str, lengths_k: tuple[int, ...] = (20, 25, 30), **changes: Any) -> torch.Tensor:
    """A packed call of three sequences of 34 queries, six heads to a head, on random values."""
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(102, 6, 16, generator=rng).to(device)
    k, v = torch.randn(2, 75, 1, 16, generator=rng).to(device)
    ends = torch.tensor((0, *lengths_k), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    arguments: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": v,
        "cu_seqlens_q": torch.tensor([0, 34, 68, 102], dtype=torch.int32, device=device),
        "cu_seqlens_k": ends.to(device),
        "max_seqlen_q": 34,
        "max_seqlen_k": 34,
        "ver": "triton",
    }
    out = triton_fa.flash_attn_varlen_func(**arguments | changes)
    assert isinstance(out, torch.Tensor)
    return out


def test_what_it_takes(kernels: Kernels, device: str) -> None:
    varlen(device)
    assert kernels() == ["short_kernel"]
    varlen(device, num_splits=1)
    assert kernels() == ["short_kernel"]


@pytest.mark.parametrize("name", OTHERS)
def test_what_others_take(name: str, kernels: Kernels, device: str) -> None:
    varlen(device, **OTHERS[name])
    assert "short_kernel" not in kernels()


def test_few_sequences_are_left_to_others(
    kernels: Kernels, fresh: pytest.MonkeyPatch, device: str
) -> None:
    fresh.setattr("triton_fa.kernels.plans.SHORT_PROGRAMS", 1000)
    varlen(device)
    assert "short_kernel" not in kernels()


CACHES: dict[str, dict[str, Any]] = {
    "pages": {"kv_layout": "paged", "page_size": 16},
    "padding": {"leftpad": True, "leftpads": (3, 0)},
    "other-rows": {"batch_idx": True, "spare_rows": 1},
    "appended": {"append": "batched", "seqlens_new": (2, 2)},
    "float8": {"kv_dtype": "float8_e4m3fn"},
}


@pytest.mark.parametrize("name", ["plain", *CACHES])
def test_caches(name: str, kernels: Kernels, device: str) -> None:
    """A dense cache without more to it is taken, too."""
    case = replace(
        PACKED,
        **{"entry": "kvcache", "kv_layout": "batched", "q_layout": "batched"}
        | {"seqlens_q": (33, 33), "seqlens_k": (40, 17)}
        | CACHES.get(name, {}),
    )
    agrees(case, device)
    assert (kernels() == ["short_kernel"]) is (name == "plain")


def test_scheduler_metadata_goes_to_the_kernels_that_read_it(kernels: Kernels, device: str) -> None:
    lengths = torch.tensor([20, 40], dtype=torch.int32, device=device)
    q = torch.randn(2, 33, 6, 16, device=device)
    k = torch.randn(2, 60, 2, 16, device=device)
    metadata = triton_fa.get_scheduler_metadata(2, 33, 60, 6, 2, 16, lengths, q.dtype, ver="triton")
    triton_fa.flash_attn_with_kvcache(
        q, k, k, cache_seqlens=lengths, scheduler_metadata=metadata, ver="triton"
    )
    assert "short_kernel" not in kernels()


WILD = [
    # cu_seqlens_k over 20 tokens, and what it is clamped to
    ([0, 5, 2**31 - 1], [0, 5, 20]),
    ([-15, 12, 20], [0, 12, 20]),
    ([0, 30, 8], [0, 20, 20]),
    ([-(2**31), 25, 29], [0, 20, 20]),
]


@pytest.mark.parametrize(("ends", "clamped"), WILD)
@pytest.mark.parametrize("causal", [False, True])
def test_wild_prefix_sums_of_keys_stay_in_bounds(
    ends: list[int], clamped: list[int], causal: bool, kernels: Kernels, device: str
) -> None:
    pool = torch.full((60, 1, 16), NAN, device=device)  # guards on both sides of the keys
    pool[20:40] = torch.randn(20, 1, 16, device=device)
    k = pool[20:40]
    q = torch.randn(80, 2, 16, device=device)
    cu_seqlens_q = torch.tensor([0, 40, 80], dtype=torch.int32, device=device)
    given, like = (torch.tensor(x, dtype=torch.int32, device=device) for x in (ends, clamped))
    options = {"max_seqlen_q": 40, "max_seqlen_k": 20, "causal": causal}
    out, lse = triton_fa.flash_attn_varlen_func(
        q, k, k, cu_seqlens_q, given, **options, return_lse=True, ver="triton"
    )
    want, want_lse = reference.flash_attn_varlen_func(q, k, k, cu_seqlens_q, like, **options)
    assert kernels() == ["short_kernel"]
    torch.testing.assert_close(out.double(), want, atol=3e-6, rtol=3e-6)
    torch.testing.assert_close(lse.double(), want_lse, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize(
    ("ends", "covered"),
    [
        ([0, 30, 1000, 2**31 - 1], range(80)),
        ([-7, 30, 50, 79], range(79)),
        ([0, 60, 20, 79], range(79)),
        ([-(2**31), -1, 0, 40], range(40)),
    ],
)
def test_wild_prefix_sums_of_queries_stay_in_bounds(
    ends: list[int], covered: range, kernels: Kernels, device: str
) -> None:
    buffer = torch.full((100, 2, 16), 7.0, device=device)
    out = buffer[10:90]
    q, k = torch.randn(80, 2, 16, device=device), torch.randn(90, 1, 16, device=device)
    cu_seqlens_q = torch.tensor(ends, dtype=torch.int32, device=device)
    cu_seqlens_k = torch.tensor([0, 30, 60, 90], dtype=torch.int32, device=device)
    options = {"max_seqlen_q": 40, "max_seqlen_k": 30, "out": out, "ver": "triton"}
    triton_fa.flash_attn_varlen_func(q, k, k, cu_seqlens_q, cu_seqlens_k, **options)
    assert kernels() == ["short_kernel"]
    assert (buffer[:10] == 7).all()
    assert (buffer[90:] == 7).all()
    written = (out != 7).any(-1).any(-1)
    assert written.nonzero().flatten().tolist() == list(covered)
    assert out.isfinite().all()


def test_of_a_longer_sequence_the_first_keys_are_taken(kernels: Kernels, device: str) -> None:
    """One that has more keys than the bound, and than a tile, beside those that have not."""
    out = varlen(device, (75, 0, 0), causal=True)
    assert kernels() == ["short_kernel"]
    want = varlen(device, (KEYS, 0, 0), causal=True)
    torch.testing.assert_close(out, want, rtol=0, atol=0)
    assert not out[34:].any()


def test_keys_that_no_row_sees_are_not_read(kernels: Kernels, device: str) -> None:
    """Those before a window, behind the diagonal, and between sequences, hold NaN."""
    q = torch.randn(2 * 40, 4, 16, device=device)
    k = torch.randn(128, 2, 16, device=device)
    lengths = torch.tensor([60, 50], dtype=torch.int32, device=device)
    arguments: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": k.clone(),
        "cu_seqlens_q": torch.tensor([0, 40, 80], dtype=torch.int32, device=device),
        "cu_seqlens_k": torch.tensor([0, 64, 128], dtype=torch.int32, device=device),
        "seqused_k": lengths,
        "max_seqlen_q": 40,
        "max_seqlen_k": 64,
        "window_size": (3, -1),
    }
    want, _ = reference.flash_attn_varlen_func(**arguments)
    for name in ("k", "v"):
        for first, used in ((0, 60), (64, 50)):
            arguments[name][first : first + used - 43] = NAN
            arguments[name][first + used : first + 64] = NAN
    out = triton_fa.flash_attn_varlen_func(**arguments, ver="triton")
    assert kernels() == ["short_kernel"]
    torch.testing.assert_close(out.double(), want, atol=3e-6, rtol=3e-6)


def test_a_nan_that_is_seen_stays_one(kernels: Kernels, device: str) -> None:
    q = torch.ones(1, 40, 4, 16, dtype=torch.float16, device=device)
    k = torch.ones(1, 60, 2, 16, dtype=torch.float16, device=device)
    k[0, 30, 1, 5] = NAN
    out, lse, *_ = triton_fa.flash_attn_with_kvcache(
        q, k, torch.ones_like(k), causal=True, return_softmax_lse=True, ver="triton"
    )
    assert kernels() == ["short_kernel"]
    sees = torch.arange(40, device=device) + 20 >= 30
    assert torch.equal(out.isnan().all(-1)[0, :, 2], sees)
    assert torch.equal(lse.isnan()[0, 3], sees)
    assert not out[:, :, :2].isnan().any()
    assert not lse[:, :2].isnan().any()


def test_many_sequences(fresh: pytest.MonkeyPatch, device: str) -> None:
    """As many as are taken without a test's help, of every length."""
    agrees(
        PACKED.with_changes(
            seqlens_q=tuple((11 * b) % 41 for b in range(300)),
            seqlens_k=tuple((7 * b) % 64 for b in range(300)),
        ),
        device,
    )

"""The harness itself: a wrong result must be reported, whatever is wrong with it."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import reference
import triton_fa
from parity_tests import __main__ as command_line
from parity_tests import device as device_module
from parity_tests import (
    features,
    known_differences,
    model_case,
    named,
    rejudge,
    report,
    strategies,
    suite,
    workers,
)
from parity_tests.budgets import LSE_ATOL, Limits
from parity_tests.cases import Case
from parity_tests.legality import FLOAT8
from parity_tests.poison import GARBAGE
from parity_tests.rejudge import judge_again
from parity_tests.runners import (
    AGREES,
    FAILED,
    KNOWN,
    NOT_RUN,
    REFUSED,
    UNAVAILABLE,
    Outcome,
    Prepared,
    public_call,
    run_backend,
)
from triton_fa import dispatch
from triton_fa.errors import BackendUnavailableError, UnsupportedError

CPU = device_module.Device("cpu", interpreted=True)
ROOT = Path(__file__).parent.parent
CASE = Case(
    q_layout="packed",
    seqlens_q=(1, 4, 0, 9),
    seqlens_k=(33, 4, 5, 0),
    causal=True,
    heads_q=6,
    heads_kv=2,
    spare_pages=2,
    table_slack=2,
    pad_k=3,
)


def exact(case: Case, arguments: dict[str, Any], _ver: Any = None) -> Any:
    """A stub backend that is right: the exact result, rounded to the dtypes of a backend."""
    what = {k: v for k, v in arguments.items() if k not in ("out", "num_splits")}
    what.pop("return_softmax_lse", None)
    out, lse = getattr(reference, case.function)(**what)
    out, lse = out.to(getattr(torch, case.out_dtype)), lse.float()
    given = arguments.get("out")
    if given is not None:
        written = ~out.isnan()
        given[written] = out[written]
        out = given
    return (out, lse) if case.lse else out


def judged(case: Case, spoil: Any = None, ver: Any = "triton") -> Outcome:
    """Run the exact stub, its result spoiled, through the runner."""

    def call(case: Case, arguments: dict[str, Any], _ver: Any) -> Any:
        out, lse = exact(case, arguments)
        return (out, lse) if spoil is None else spoil(out, lse)

    return run_backend(Prepared.of(case, "cpu"), ver, call)


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stubs compute in PyTorch: what Triton's interpreter is excused for is not theirs."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def with_value(tensor: torch.Tensor, index: Any, value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed[index] = value
    return changed


def test_the_exact_result_agrees() -> None:
    outcome = judged(CASE)
    assert outcome.verdict == AGREES, outcome.describe()
    assert outcome.measures.max_ratio is not None
    assert outcome.measures.max_ratio < 1
    assert outcome.measures.lse_error is not None


@pytest.mark.parametrize("entry", ["kvcache", "varlen", "dense"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_baseline_itself_agrees(entry: str, dtype: str) -> None:
    case = next(c for c in named.small() if c.entry == entry and c.source == "random")
    case = case.with_changes(dtype=dtype)

    def baseline(case: Case, arguments: dict[str, Any], _ver: Any) -> Any:
        what = {k: v for k, v in arguments.items() if k not in ("out", "num_splits")}
        what.pop("return_softmax_lse", None)
        entry = getattr(reference, case.function)
        out, _ = entry(**what, attend=reference.attend_low_precision)
        return out.to(getattr(torch, case.dtype)), entry(**what)[1].float()

    outcome = run_backend(Prepared.of(case, "cpu"), "torch", baseline)
    assert outcome.verdict == AGREES, outcome.describe()


MLA = CASE.with_changes(heads_kv=1, head_dim=16, qv=True, kv_strides="latent")
OF_EIGHT_BITS = [
    CASE.with_changes(dtype="float8_e4m3fn", descales="qkv"),
    CASE.with_changes(dtype="float8_e5m2", softcap=15.0, out=True, descales="k"),
    CASE.with_changes(kv_dtype="float8_e4m3fn", descales="kv", descale_strides="expanded"),
    CASE.with_changes(dtype="float16", kv_dtype="float8_e5m2fnuz"),
    CASE.with_changes(
        kv_dtype="float8_e4m3fnuz", append="packed", seqlens_new=(2, 1, 0, 3), descales="v"
    ),
]
LATENT = [
    MLA,
    MLA.with_changes(kv_dtype="float8_e4m3fn", descales="kv"),
    MLA.with_changes(entry="varlen", only_qv="unread", pad_q=2),
    MLA.with_changes(only_qv="bare", softcap=15.0),
    MLA.with_changes(append="packed", seqlens_new=(2, 1, 0, 3), rotary_dim=16),
    MLA.with_changes(kv_dtype="float8_e4m3fn", descales="k"),
]


@pytest.mark.parametrize("case", [*OF_EIGHT_BITS, *LATENT], ids=lambda case: case.label)
def test_eight_bits_and_values_that_are_scored_agree(case: Case) -> None:
    prepared = Prepared.of(case, "cpu")
    outcome = run_backend(prepared, "triton", exact)
    assert outcome.verdict == AGREES, outcome.describe()
    without_memory = run_backend(prepared, "torch")
    assert without_memory.verdict == AGREES, without_memory.describe()


@pytest.mark.parametrize(
    ("case", "changed"),
    [
        (OF_EIGHT_BITS[0], {"q_descale": None}),
        (OF_EIGHT_BITS[0], {"k_descale": None}),
        (OF_EIGHT_BITS[0], {"v_descale": None}),
        (OF_EIGHT_BITS[2], {"k_descale": None}),
        (OF_EIGHT_BITS[2], {"v_descale": None}),
        (MLA, {"qv": None, "softmax_scale": (16 + 64) ** -0.5}),
        (MLA, {"softmax_scale": 16**-0.5}),
        (LATENT[1], {"v_descale": None}),
        (LATENT[3], {"softmax_scale": (16 + 64) ** -0.5}),
    ],
)
def test_plausible_mistakes_of_scores_are_failures(case: Case, changed: dict[str, Any]) -> None:
    def mistaken(case: Case, arguments: dict[str, Any], ver: Any) -> Any:
        return exact(case, arguments | changed, ver)

    # With float8 queries a small mistake in scores shows in the lse alone.
    prepared = Prepared.of(case.with_changes(lse=case.dtype in FLOAT8), "cpu")
    assert run_backend(prepared, "triton", mistaken).verdict == FAILED


def test_keys_of_another_head_have_other_factors() -> None:
    def mistaken(case: Case, arguments: dict[str, Any], ver: Any) -> Any:
        return exact(case, arguments | {"v_descale": arguments["v_descale"].flip(1)}, ver)

    case = OF_EIGHT_BITS[0].with_changes(descale_strides="transposed")
    assert run_backend(Prepared.of(case, "cpu"), "triton", mistaken).verdict == FAILED


@pytest.mark.parametrize("dtype", FLOAT8)
def test_eight_bits_that_nobody_needs_are_poison(dtype: str) -> None:
    case = CASE.with_changes(kv_dtype=dtype, kv_strides="latent")
    poisoned, clean = (case.materialise("cpu", poison=poison) for poison in (True, False))
    for name in ("k_cache", "v_cache"):
        real = ~poisoned[name].float().isnan()
        assert 0 < int(real.sum()) < real.numel()
        assert torch.equal(poisoned[name].float()[real], clean[name].float()[real])
        assert (clean[name].float()[~real] == 0).all()
    given = LATENT[2].materialise("cpu")
    assert given["q"].isnan().all()
    assert given["k"].isnan().all()
    assert not given["v"].isnan().all()
    assert LATENT[3].materialise("cpu")["k_cache"] is None


def test_only_float8_queries_have_the_wider_budget() -> None:
    for case in (OF_EIGHT_BITS[0], OF_EIGHT_BITS[1]):
        assert (Limits.of(case).max_mult, Limits.of(case).mean_mult) == (4.0, 3.0)
    for case in (OF_EIGHT_BITS[2], MLA):
        assert (Limits.of(case).max_mult, Limits.of(case).mean_mult) == (2.0, 1.5)


WIDE = OF_EIGHT_BITS[0].with_changes(head_dim=128, head_dim_v=128, softmax_scale=3.0)


@pytest.mark.parametrize("case", [OF_EIGHT_BITS[0], WIDE], ids=["ordinary", "scale 3"])
@pytest.mark.parametrize(
    ("spoil", "ver", "verdict"),
    [
        (0.7, 3, AGREES),  # of what products of float8 are allowed beside the ordinary limit
        (1.1, 3, FAILED),
        (0.7, "torch", FAILED),  # it multiplies in more bits
        (8 * math.log(2), 3, FAILED),  # the power of two of the weights left in
        ("q_descale", 3, FAILED),
        ("k_descale", 3, FAILED),
    ],
)
def test_float8_products_may_be_off_by_their_bits(
    case: Case, spoil: Any, ver: Any, verdict: str
) -> None:
    prepared = Prepared.of(case, "cpu")
    limit = 2.0**-13 * case.head_dim**0.5 * prepared.truth.largest_score
    assert limit > 0.002

    def call(case: Case, arguments: dict[str, Any], _ver: Any) -> Any:
        out, lse = exact(case, arguments)
        if isinstance(spoil, str):
            return out, exact(case, arguments | {spoil: None})[1]
        return out, lse + (spoil if spoil > 2 else LSE_ATOL + spoil * limit)

    outcome = run_backend(prepared, ver, call)
    assert outcome.verdict == verdict, outcome.describe()
    assert verdict == AGREES or "lse error" in "; ".join(outcome.reasons)


def test_the_largest_score_is_that_of_any_query_and_key() -> None:
    case = Case(
        entry="dense",
        dtype="float8_e4m3fn",
        heads_q=4,
        heads_kv=2,
        q_layout="batched",
        kv_layout="batched",
        page_size=0,
        causal=True,
        softcap=3.0,
        descales="qkv",
        seqlens_q=(5, 5),
        seqlens_k=(9, 9),
    )
    given = case.materialise("cpu")
    q, k = given["q"].double(), given["k"].double()
    q = q * given["q_descale"].double().repeat_interleave(2, 1)[:, None, :, None]
    k = k * given["k_descale"].double()[:, None, :, None]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2))
    largest = scores.abs().max().item() * case.head_dim**-0.5
    assert Prepared.of(case, "cpu").truth.largest_score == pytest.approx(largest)
    assert Prepared.of(CASE, "cpu").truth.largest_score == 0


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda o, s: (with_value(o, (0, 0, 0), 1.0), s), "max error"),
        (lambda o, s: (o * 1.03, s), "mean error"),
        (lambda o, s: (with_value(o, (2, 1, 3), math.nan), s), "NaN"),
        (lambda o, s: (with_value(o, (2, 1, 3), math.inf), s), "infinite"),
        (lambda o, s: (with_value(o, 3, math.nan), s), "unwritten"),
        (lambda o, s: (with_value(o, 6, 1e-6), s), "not zero in a row that sees no key"),
        (lambda o, s: (o, with_value(s, (0, 0), 9.0)), "lse error"),
        (lambda o, s: (o, s + 0.002), "lse error"),
        (lambda o, s: (o, with_value(s, (0, 0), -math.inf)), "wrong places"),
        (lambda o, s: (o, with_value(s, (1, 6), 0.0)), "wrong places"),
        (lambda o, s: (o, with_value(s, (1, 6), math.inf)), "wrong places"),
        (lambda o, s: (o, with_value(s, (1, 6), math.nan)), "lse is unwritten or NaN"),
        (lambda o, s: (o, s / math.log(2)), "lse error"),
        (lambda o, s: (o, s.T), "lse has shape"),
        (lambda o, s: (o, s.double()), "not float32"),
        (lambda o, s: (o.float(), s), "out is torch.float32"),
        (lambda o, s: (o[:-1], s), "out has shape"),
        (lambda o, s: o, "expected (out, lse, ...)"),
        (lambda o, s: (None, s), "expected a tensor"),
        (lambda o, s: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_every_kind_of_wrong_result_is_a_failure(spoil: Any, says: str) -> None:
    outcome = judged(CASE, spoil)
    assert outcome.verdict == FAILED
    assert outcome.is_failure
    assert says in "; ".join(outcome.reasons)


def test_two_heads_swapped_is_a_failure() -> None:
    assert judged(CASE, lambda o, s: (o[:, [1, 0, 2, 3, 4, 5]], s)).verdict == FAILED


MISTAKES = {
    "the mask of the last key is off by one": ({"causal": True}, {"causal": False}),
    "window one key wider": ({"window": (20, 0)}, {"window_size": (21, 0)}),
    "window one key narrower": ({"window": (20, 0)}, {"window_size": (19, 0)}),
    "a negative side taken literally": ({"window": (-1, 5)}, {"window_size": (0, 5)}),
    "softcap dropped": ({"softcap": 15.0}, {"softcap": 0.0}),
    "sinks dropped": ({"sinks": True}, {"sinks": None}),
    "scale off by 2 %": ({}, {"softmax_scale": 1.02 * 64**-0.5}),
    "the last key forgotten": ({}, {"cache_seqlens": torch.tensor([39, 49])}),
    "the table of another sequence": ({}, {"page_table": [1, 0]}),
    "chunks one key longer": ({"attention_chunk": 20}, {"attention_chunk": 21}),
    "chunks one key shorter": ({"attention_chunk": 39}, {"attention_chunk": 38}),
    "chunk dropped": ({"attention_chunk": 20}, {"attention_chunk": 0}),
    "padding one key longer": (
        {"leftpad": True, "leftpads": (3, 9)},
        {"cache_leftpad": torch.tensor([4, 10])},
    ),
    "rows of the table not looked up": ({"batch_idx": True}, {"cache_batch_idx": [1, 0]}),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_plausible_mistakes_are_failures(name: str, dtype: str) -> None:
    correct, changed = MISTAKES[name]
    case = Case(dtype=dtype, seqlens_q=(2, 2), seqlens_k=(40, 50)).with_changes(**correct)

    def mistaken(case: Case, arguments: dict[str, Any], ver: Any) -> Any:
        now = arguments | changed
        for name in {"page_table", "cache_batch_idx"} & set(changed):
            now[name] = arguments[name][changed[name]]
        return exact(case, now, ver)

    prepared = Prepared.of(case.with_changes(lse=False), "cpu")
    assert run_backend(prepared, "triton", exact).verdict == AGREES
    assert run_backend(prepared, "triton", mistaken).verdict == FAILED


APPEND = Case(
    append="packed",
    q_layout="packed",
    seqlens_q=(2, 1, 3),
    seqlens_k=(33, 4, 0),
    seqlens_new=(2, 0, 5),
    rotary_dim=32,
    causal=True,
    spare_pages=2,
    table_slack=1,
    pad_k=3,
    tail_new=2,
)
DENSE_APPEND = APPEND.with_changes(
    kv_layout="batched",
    page_size=0,
    spare_pages=0,
    table_slack=0,
    kv_strides="sliced",
    head_dim_v=32,
    batch_idx=True,
    spare_rows=1,
    leftpad=True,
    leftpads=(3, 0, 1),
)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("case", [APPEND, DENSE_APPEND], ids=["paged", "dense"])
@pytest.mark.parametrize("rotary_dim", [0, 32, 64])
def test_the_exact_append_agrees(case: Case, dtype: str, rotary_dim: int) -> None:
    outcome = judged(case.with_changes(dtype=dtype, rotary_dim=rotary_dim))
    assert outcome.verdict == AGREES, outcome.describe()
    assert outcome.measures.key_error == 0


def places(case: Case) -> torch.Tensor:
    """(page, slot) or (row, slot) of every new token, in the order of the caches."""
    appended = Prepared.of(case, "cpu").truth.appended
    assert appended is not None
    return appended.slots.nonzero()


def spoiled(case: Case, spoil: Any, ver: Any = "triton") -> Outcome:
    """Run the exact stub, which then does something to its arguments, the caches for example."""

    def call(case: Case, arguments: dict[str, Any], _ver: Any) -> Any:
        result = exact(case, arguments)
        spoil(arguments, [tuple(place) for place in places(case).tolist()])
        return result

    return run_backend(Prepared.of(case, "cpu"), ver, call)


def units(x: torch.Tensor, steps: int) -> torch.Tensor:
    """The numbers so many steps further from zero."""
    integer = {2: torch.int16, 4: torch.int32}[x.element_size()]
    return (x.view(integer) + steps).view(x.dtype)


def set_to(name: str, index: Any, change: Any) -> Any:
    """Change one new token's slot (or its neighbour's) of a cache."""

    def spoil(arguments: dict[str, Any], found: list[tuple[int, int]]) -> None:
        cache, (row, slot) = arguments[name], found[0]
        where = index(row, slot)
        cache[where] = change(cache[where])

    return spoil


def token(row: int, slot: int) -> Any:
    return (row, slot)


def neighbour(row: int, slot: int) -> Any:
    return (row, slot - 1)


def swap_new(name: str) -> Any:
    """Two new tokens in each other's place."""

    def spoil(arguments: dict[str, Any], found: list[tuple[int, int]]) -> None:
        cache, (a, b) = arguments[name], found[-2:]
        cache[a], cache[b] = cache[b].clone(), cache[a].clone()

    return spoil


def shift_new(arguments: dict[str, Any], found: list[tuple[int, int]]) -> None:
    """The last new token one place further on."""
    row, slot = found[-1]
    for name in ("k_cache", "v_cache"):
        cache = arguments[name]
        cache[row, slot + 1] = cache[row, slot]
        cache[row, slot] = math.nan


def unrotate(arguments: dict[str, Any], _: Any) -> None:
    """New keys as they were given."""
    cos, sin = arguments["rotary_cos"], arguments["rotary_sin"]
    still = {"rotary_cos": torch.ones_like(cos), "rotary_sin": torch.zeros_like(sin)}
    exact(APPEND, arguments | still)


WRONG_CACHES = {
    "the new key in another slot": (shift_new, "k_cache has a wrong new key in 1 of 7"),
    "the slot that it went to": (shift_new, "k_cache was overwritten in 1 of"),
    "keys not rotated": (unrotate, "k_cache has a wrong new key in"),
    "two new keys swapped": (swap_new("k_cache"), "k_cache has a wrong new key in 2 of 7"),
    "two new values swapped": (swap_new("v_cache"), "v_cache has a wrong new value in 2 of 7"),
    "values cast": (
        set_to("v_cache", token, lambda v: v.to(torch.float8_e4m3fn).to(v.dtype)),
        "v_cache has a wrong new value in 1 of 7",
    ),
    "a value off by one unit": (
        set_to("v_cache", lambda row, slot: (row, slot, 0, 5), lambda v: units(v, 1)),
        "v_cache has a wrong new value in 1 of 7",
    ),
    "a key that is not rotated off by one unit": (
        set_to("k_cache", lambda row, slot: (row, slot, 0, 40), lambda k: units(k, 1)),
        "k_cache has a wrong new key in 1 of 7",
    ),
    "a rotated key off by three units": (
        set_to("k_cache", lambda row, slot: (row, slot, 1, 3), lambda k: units(k, 3)),
        "k_cache has a wrong new key in 1 of 7",
    ),
    "a new key that is NaN": (
        set_to("k_cache", lambda row, slot: (row, slot, 0, 0), lambda k: k * math.nan),
        "k_cache has a wrong new key in 1 of 7",
    ),
    "an old key overwritten": (
        set_to("k_cache", neighbour, lambda k: units(k, 1)),
        "k_cache was overwritten in 1 of",
    ),
    "a slot nobody uses overwritten": (
        lambda arguments, _: arguments["v_cache"].nan_to_num_(nan=0.0),
        "v_cache was overwritten in",
    ),
    "poison replaced by another NaN": (
        lambda arguments, _: arguments["v_cache"].view(torch.int16).bitwise_xor_(-(2**15)),
        "v_cache was overwritten in",
    ),
}


@pytest.mark.parametrize("name", WRONG_CACHES)
@pytest.mark.parametrize("case", [APPEND, DENSE_APPEND], ids=["paged", "dense"])
def test_what_is_wrong_with_a_cache_is_a_failure(case: Case, name: str) -> None:
    spoil, says = WRONG_CACHES[name]
    outcome = spoiled(case, spoil)
    assert outcome.verdict == FAILED, outcome.describe()
    assert says in "; ".join(outcome.reasons)


def test_a_float32_sum_of_one_thread_is_float32() -> None:
    """Sums that add one product after the other are inside, though PyTorch's are nearer."""
    case = Case(
        entry="varlen",
        dtype="float32",
        heads_q=1,
        heads_kv=1,
        head_dim=96,
        head_dim_v=96,
        q_layout="packed",
        kv_layout="packed",
        page_size=0,
        seqlens_q=(200,),
        seqlens_k=(3000,),
    )
    prepared = Prepared.of(case, "cpu")

    def added(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(a.shape[0], b.shape[1])
        for column, row in zip(a.double().t(), b.double(), strict=True):
            total = (total.double() + column[:, None] * row).float()
        return total

    def call(case: Case, arguments: dict[str, Any], _ver: Any) -> Any:
        def attend(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rules: Any, *_: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            scores = added(q[:, 0], k[:, 0].t()) * rules.softmax_scale
            lse = scores.logsumexp(-1, keepdim=True)
            return added((scores - lse).exp(), v[:, 0])[:, None], lse.t()

        return exact(case, arguments | {"attend": attend})

    measured = run_backend(prepared, "triton", call)
    assert measured.verdict == AGREES, measured.describe()
    assert measured.measures.max_ratio > 1.3


@pytest.mark.parametrize("seqlen_k", [40, 1500])
@pytest.mark.parametrize("name", ["q", "v_cache"])
@pytest.mark.parametrize(("head_dim", "softcap"), [(64, 0.0), (128, 50.0), (256, 0.0)])
def test_tf32_is_no_float32_however_long_the_sums(
    head_dim: int, softcap: float, name: str, seqlen_k: int
) -> None:
    """Products of 11 bits fail, whatever long sums of float32 may be off."""
    case = CASE.with_changes(
        dtype="float32",
        head_dim=head_dim,
        head_dim_v=head_dim,
        seqlens_k=(seqlen_k,) * CASE.batch,
        softcap=softcap,
    )

    def call(case: Case, arguments: dict[str, Any], _ver: Any) -> Any:
        exact_bits = arguments[name].contiguous().view(torch.int32)
        cut = (exact_bits + (1 << 12) & -(1 << 13)).view(torch.float32)
        return exact(case, arguments | {name: cut})

    assert judged(case).verdict == AGREES
    outcome = run_backend(Prepared.of(case, "cpu"), "triton", call)
    assert outcome.verdict == FAILED
    # By either rule alone: both have the term for long sums.
    assert {reason.partition(" ")[0] for reason in outcome.reasons} >= {"max", "mean"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_rotated_key_may_be_off_by_one_unit(dtype: str) -> None:
    def one(arguments: dict[str, Any], found: list[tuple[int, int]]) -> None:
        for place in found:
            rotated = arguments["k_cache"][place][..., :32]
            arguments["k_cache"][place][..., :32] = units(rotated, 1)

    outcome = spoiled(APPEND.with_changes(dtype=dtype), one)
    assert outcome.verdict == AGREES, outcome.describe()
    assert outcome.measures.key_error is not None
    assert outcome.measures.key_error > 0


def test_memory_between_the_keys_is_not_to_be_written() -> None:
    def beside(arguments: dict[str, Any], _: Any) -> None:
        arguments["k_cache"]._base[0, 0, 0] = 1.0  # before the first head

    outcome = spoiled(DENSE_APPEND, beside)
    assert outcome.verdict == FAILED
    assert outcome.reasons == ("memory beside k_cache and v_cache was written",)


APPEND_MISTAKES = {
    "appended one slot early": {"cache_seqlens": [32, 3, 0]},
    "nothing appended": {"k": None, "v": None},
    "rotary dropped": {"rotary_cos": None, "rotary_sin": None},
    "angles swapped": {"rotary_cos": "rotary_sin", "rotary_sin": "rotary_cos"},
    "rotated the other way": {"rotary_sin": -1},
    "other pairs rotated": {"rotary_interleaved": False},
    "rotated at one position further": {"rotary_seqlens": [34, 5, 1]},
    "the prefix sums of the queries": {"cu_seqlens_k_new": "cu_seqlens_q"},
}


@pytest.mark.parametrize("name", APPEND_MISTAKES)
@pytest.mark.parametrize("case", [APPEND, DENSE_APPEND], ids=["paged", "dense"])
def test_plausible_mistakes_of_appending_are_failures(case: Case, name: str) -> None:
    def mistaken(case: Case, arguments: dict[str, Any], ver: Any) -> Any:
        now = dict(arguments)
        for key, value in APPEND_MISTAKES[name].items():
            now[key] = {
                str: lambda v: arguments[v],
                int: lambda v, key=key: v * arguments[key],
                list: lambda v: torch.tensor(v, dtype=torch.int32),
            }.get(type(value), lambda v: v)(value)
        if now["k"] is None:
            now = {n: value for n, value in now.items() if "rotary" not in n}
        return exact(case, now, ver)

    prepared = Prepared.of(case, "cpu")
    assert run_backend(prepared, "triton", exact).verdict == AGREES
    assert run_backend(prepared, "triton", mistaken).verdict == FAILED


@pytest.mark.parametrize("causal", [False, True])
def test_queries_rotated_at_other_positions_are_a_failure(causal: bool, monkeypatch: Any) -> None:
    def mistaken(case: Case, arguments: dict[str, Any], ver: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(reference.entries, "_queries_move", lambda *_: not causal)
            return exact(case, arguments, ver)

    prepared = Prepared.of(APPEND.with_changes(causal=causal), "cpu")
    assert run_backend(prepared, "triton", exact).verdict == AGREES
    assert run_backend(prepared, "triton", mistaken).verdict == FAILED


def test_what_nobody_needs_is_poison() -> None:
    case = APPEND.with_changes(
        batch_idx=True, spare_rows=2, leftpad=True, leftpads=(20, 1, 2), max_q_slack=9
    )
    poisoned, clean = (case.materialise("cpu", poison=poison) for poison in (True, False))
    table, rows = poisoned["page_table"], poisoned["cache_batch_idx"].tolist()
    pages = poisoned["k_cache"].shape[0]
    unused = [row for row in range(5) if row not in rows]
    assert not ((table[unused] >= 0) & (table[unused] < pages)).any()
    assert not 0 <= int(table[rows[0], 0]) < pages  # 20 padding slots before it: a page of 16
    first = table[rows[0], 1]
    assert poisoned["k_cache"][first, :4].isnan().all()
    assert poisoned["k_cache"][first, 4:].isfinite().all()
    assert poisoned["k_cache"][table[rows[0], 2], 1:].isnan().all()  # of 33 old keys, 2 new ones
    assert poisoned["k"][-2:].isnan().all()
    needed = {33, 34, *range(5)}
    angles = poisoned["rotary_cos"][:, 0]
    assert {i for i, angle in enumerate(angles.tolist()) if not math.isnan(angle)} == needed
    for name in ("k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin"):
        real = ~poisoned[name].isnan()
        assert torch.equal(poisoned[name][real], clean[name][real])
        assert (clean[name][~real] == 0).all()


def test_two_runs_do_not_share_a_cache() -> None:
    prepared = Prepared.of(APPEND, "cpu")
    for _ in range(2):
        assert run_backend(prepared, "triton", exact).verdict == AGREES


def test_fa3_need_not_store_a_key_that_no_query_sees_and_nobody_else_may() -> None:
    case = APPEND.with_changes(window=(1, 0), seqlens_new=(2, 0, 200), seqlens_q=(2, 1, 1))

    def forget(arguments: dict[str, Any], found: list[tuple[int, int]]) -> None:
        table = arguments["page_table"][2, :5].tolist()
        for name in ("k_cache", "v_cache"):
            arguments[name][table] = 0.0  # FA3 is given zeros for poison

    forgotten = spoiled(case, forget, ver=3)
    assert forgotten.differences == ("fa3-stores-visible-keys",), forgotten.describe()
    assert spoiled(case.with_changes(window=(-1, -1)), forget, ver=3).verdict == FAILED

    def spoil(arguments: dict[str, Any], _: Any) -> None:
        arguments["k_cache"][arguments["page_table"][2, 0]] += 1.0

    assert spoiled(case, spoil, ver=3).verdict == FAILED
    assert spoiled(case, forget, ver="torch").verdict == FAILED


@pytest.mark.parametrize(
    ("changes", "entry"),
    [
        ({"overflow": 2, "pad_k": 0, "table_slack": 0, "seqlens_k": (47, 4, 0)}, "append-beyond"),
        ({"rotary_rows": 80, "rotary_seqlens": (78, 79, 76)}, "angles-beyond"),
        ({"leftpad": True, "leftpads": (0, 5, 0)}, "left-padding-beyond"),
    ],
)
def test_fa3_is_not_launched_where_it_leaves_its_tensors(changes: Any, entry: str) -> None:
    case = APPEND.with_changes(**changes)
    outcome = judged(case, ver=3)
    assert outcome.verdict == KNOWN
    assert entry in outcome.differences[0]
    assert not outcome.launched
    assert judged(case).verdict == AGREES
    assert judged(APPEND, ver=3).verdict == AGREES


def test_reading_one_poisoned_slot_is_a_failure() -> None:
    def one_key_too_many(case: Case, arguments: dict[str, Any], ver: Any) -> Any:
        return exact(case, arguments | {"cache_seqlens": arguments["cache_seqlens"] + 1}, ver)

    prepared = Prepared.of(CASE.with_changes(seqlens_k=(33, 4, 5, 1)), "cpu")
    outcome = run_backend(prepared, "triton", one_key_too_many)
    assert outcome.verdict == FAILED
    assert "NaN" in outcome.reasons[0]


def test_an_unwritten_row_of_the_given_buffer_is_a_failure() -> None:
    case = CASE.with_changes(out=True, tail_q=2)

    def forgetful(case: Case, arguments: dict[str, Any], ver: Any) -> Any:
        out, lse = exact(case, arguments, ver)
        out[2, 1] = math.nan
        return out, lse

    prepared = Prepared.of(case, "cpu")
    assert run_backend(prepared, "triton", exact).verdict == AGREES
    assert run_backend(prepared, "triton", forgetful).verdict == FAILED


def test_writing_padding_rows_or_another_buffer_is_a_failure() -> None:
    prepared = Prepared.of(CASE.with_changes(out=True, tail_q=2), "cpu")

    def overwriting(case: Case, arguments: dict[str, Any], ver: Any) -> Any:
        out, lse = exact(case, arguments, ver)
        out[-1] = 0.0
        return out, lse

    def ignoring(case: Case, arguments: dict[str, Any], ver: Any) -> Any:
        out, lse = exact(case, arguments, ver)
        return out.clone(), lse

    assert "were written" in run_backend(prepared, "triton", overwriting).reasons[0]
    assert "not the buffer" in run_backend(prepared, "triton", ignoring).reasons[0]


def test_a_nan_of_the_reference_does_not_pass_for_padding(monkeypatch: Any) -> None:
    real = reference.flash_attn_with_kvcache

    def broken(*arguments: Any, **options: Any) -> Any:
        out, lse = real(*arguments, **options)
        out[0] = math.nan
        return out, lse

    monkeypatch.setattr(reference, "flash_attn_with_kvcache", broken)
    with pytest.raises(AssertionError, match="NaN in a row that counts"):
        Prepared.of(CASE, "cpu")


def refuse(*_: Any) -> Any:
    raise UnsupportedError("triton", ["head_dim 64", "sinks"])


def missing(*_: Any) -> Any:
    raise BackendUnavailableError(3, "no such package")


def test_refused_and_unavailable_are_not_agreement() -> None:
    prepared = Prepared.of(CASE, "cpu")
    refused = run_backend(prepared, 3, refuse)
    assert (refused.verdict, refused.reasons) == (REFUSED, ("head_dim 64", "sinks"))
    assert not refused.ran
    assert not refused.is_failure
    assert run_backend(prepared, "triton", refuse).is_failure
    absent = run_backend(prepared, 3, missing)
    assert (absent.verdict, absent.reasons) == (UNAVAILABLE, ("no such package",))


def run_of(call: Any, cases: list[Case], **options: Any) -> suite.Run:
    run = suite.Run(suite.Options(CPU, **options), call)
    run.go(cases)
    return run


def test_a_run_passes_only_if_something_ran_and_nothing_failed() -> None:
    assert run_of(exact, [CASE], vers=("triton",)).verdict()[0]
    assert run_of(exact, [], vers=("triton",)).verdict() == (False, "FAILED: nothing ran at all")
    assert "nothing ran" in run_of(refuse, [CASE], vers=(3, 4)).verdict()[1]
    wrong = run_of(lambda c, a, v: (exact(c, a)[0] * 2, exact(c, a)[1]), [CASE], vers=("triton",))
    assert not wrong.verdict()[0]


def test_required_peers_that_are_missing_fail_the_run() -> None:
    def call(case: Case, arguments: dict[str, Any], ver: Any) -> Any:
        return missing() if ver == 3 else exact(case, arguments)

    assert run_of(call, [CASE], vers=("triton", 3)).verdict()[0]
    required = run_of(call, [CASE], vers=("triton", 3), require_peers=True)
    assert not required.verdict()[0]


TWO = [CASE.with_changes(name=name) for name in ("first", "second")]
PEERS = suite.Options(CPU, vers=(3, 4))


class InThisProcess:
    """A worker that is no process: it runs what is left and ends with the given exit status."""

    def __init__(self, state: workers.State, call: Any, status: int = 0) -> None:
        self.state, self.call, self.status = state, call, status

    def wait(self) -> int:
        workers.work(self.state, suite.Run(PEERS, self.call, self.state.outcomes()))
        return self.status


def supervised(state: workers.State, start: Any, cases: list[Case] = TWO) -> suite.Run:
    state.save_plan(cases)
    run = suite.Run(PEERS)
    assert workers.supervise(state, run, start(), start) == 0
    return run


def test_after_a_lost_cuda_context_another_process_goes_on(
    monkeypatch: Any, tmp_path: Path
) -> None:
    called = []

    def call(case: Case, arguments: dict[str, Any], ver: Any) -> Any:
        called.append((case.name, ver))
        return 1 / 0 if called == [("first", 3)] else exact(case, arguments)

    monkeypatch.setattr("parity_tests.runners.context_is_lost", lambda: True)
    monkeypatch.setattr(
        suite.Prepared, "of", lambda case, _: dataclasses.replace(real(case, "cpu"), device="cuda")
    )
    monkeypatch.setattr(Prepared, "arguments", lambda self, **_: self.case.materialise("cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    state = workers.State(tmp_path)
    run = supervised(state, lambda: InThisProcess(state, call))
    assert [o.verdict for o in run.outcomes] == [FAILED, AGREES, AGREES, AGREES]
    assert run.outcomes[0].reasons[0] == "crashed: left CUDA unusable"
    assert "ZeroDivisionError" in run.outcomes[0].reasons[1]
    assert called == [("first", 3), ("first", 4), ("second", 3), ("second", 4)]
    assert run.verdict() == (False, "FAILED: 1 of 4 outcomes, 1 of them crashed")


real = Prepared.of

DYING = """
import os, signal, sys
from pathlib import Path
from parity_tests import device, suite, workers
from triton_fa.errors import UnsupportedError

def call(case, arguments, ver):
    if (case.name, ver) == ("first", 4):
        os._exit(3)
    if (case.name, ver) == ("second", 3):
        os.kill(os.getpid(), signal.SIGSEGV)
    raise UnsupportedError(ver, ["a reason"])

state = workers.State(Path(sys.argv[1]))
options = suite.Options(device.Device("cpu", True), vers=(3, 4))
workers.work(state, suite.Run(options, call, state.outcomes()))
"""


def test_a_process_that_dies_fails_the_pair_it_ran_and_no_other(tmp_path: Path) -> None:
    def start() -> workers.Worker:
        command = [sys.executable, "-c", DYING, str(tmp_path)]
        return subprocess.Popen(command, cwd=report.ROOT)

    run = supervised(workers.State(tmp_path), start)
    assert [o.verdict for o in run.outcomes] == [REFUSED, FAILED, FAILED, REFUSED]
    assert run.outcomes[1].reasons == (
        "crashed: the process ended with exit status 3 in backend 4",
    )
    assert "died of signal 11" in run.outcomes[2].reasons[0]
    assert [(o.case.name, o.ver) for o in run.outcomes] == [
        (case.name, ver) for case in TWO for ver in (3, 4)
    ]


def test_a_process_that_dies_on_the_exact_result_fails_the_case(
    monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(suite.Prepared, "of", dies)
    state = workers.State(tmp_path)
    run = supervised(state, lambda: Dies(state, exact, -9), TWO[:1])
    assert [o.verdict for o in run.outcomes] == [FAILED, FAILED]
    assert "in its exact result" in run.outcomes[0].reasons[0]


class Death(BaseException):
    pass


def dies(*_: Any) -> Any:
    raise Death


class Dies(InThisProcess):
    """Ends in whatever it runs first."""

    def wait(self) -> int:
        with contextlib.suppress(Death):
            super().wait()
        return self.status


def test_restarts_are_bounded_and_the_rest_is_said_loudly(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(workers, "RESTARTS", 2)
    state, started = workers.State(tmp_path), []

    def start() -> workers.Worker:
        started.append(1)
        return Dies(state, dies, -11)

    run = supervised(state, start)
    assert [o.verdict for o in run.outcomes] == [FAILED, FAILED, FAILED, NOT_RUN]
    assert len(started) == 3
    assert run.verdict() == (
        False,
        "FAILED: no more than 2 restarts after crashes; the rest was not run",
    )
    assert any("Not run, 1 times: no more than 2 restarts" in s for s in report.limits(run))


def test_a_process_that_runs_nothing_is_not_started_again(tmp_path: Path) -> None:
    class Nothing:
        def wait(self) -> int:
            return 1

    run = supervised(workers.State(tmp_path), Nothing)
    assert {o.verdict for o in run.outcomes} == {NOT_RUN}
    assert run.verdict()[1] == (
        "FAILED: the process ended with exit status 1 before it ran a case; the rest was not run"
    )
    no_plan = workers.State(tmp_path / "empty")
    assert workers.supervise(no_plan, suite.Run(PEERS), Nothing(), Nothing) == 1


def test_outcomes_survive_json() -> None:
    for outcome in (judged(CASE), judged(CASE, lambda o, s: (o * math.nan, s), ver=3)):
        assert Outcome.from_json(outcome.to_json()) == outcome


CRASH = known_differences.Difference(
    id="crash",
    reason="it crashes",
    where="here",
    applies=lambda _case, ver: ver == "torch",
    case=CASE,
    kind=known_differences.CRASH,
)


def test_a_quarantined_pair_is_never_launched(monkeypatch: Any) -> None:
    monkeypatch.setattr(known_differences, "DIFFERENCES", (CRASH,))
    called = []

    def call(case: Case, arguments: dict[str, Any], ver: Any) -> Any:
        called.append(ver)
        return exact(case, arguments)

    run = run_of(call, [CASE], vers=("torch", 3))
    outcome = run.outcomes[0]
    assert (outcome.verdict, outcome.reasons) == (KNOWN, ("quarantined: it crashes",))
    assert outcome.quarantined
    assert called == [3]
    assert run.verdict() == (True, "passed: 1 comparisons within budget")
    assert "Quarantined, 1 times never launched: crash." in report.limits(run)
    assert "nothing ran" in run_of(call, [CASE], vers=("torch",)).verdict()[1]


def test_what_the_package_refuses_needs_no_quarantine(monkeypatch: Any) -> None:
    entry = dataclasses.replace(CRASH, applies=lambda _case, ver: ver == 3)
    monkeypatch.setattr(known_differences, "DIFFERENCES", (entry,))
    backend = dispatch._load(3)
    prepared = Prepared.of(CASE, "cpu")
    monkeypatch.setattr(backend, "unavailable", lambda _: None, raising=False)
    monkeypatch.setattr(backend, "unsupported", lambda _: ["a reason"], raising=False)
    dispatch.refusals.cache_clear()
    try:
        outcome = run_backend(prepared, 3, exact)
    finally:
        dispatch.refusals.cache_clear()
    assert (outcome.verdict, outcome.reasons) == (REFUSED, ("a reason",))


def test_fa4_is_quarantined_where_it_was_seen_to_crash(monkeypatch: Any) -> None:
    case = CASE.with_changes(head_dim=160, head_dim_v=160)
    for capability, expected in (((9, 0), True), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda at=capability: at)
        kinds = {entry.kind for entry in known_differences.known(case, 4)}
        assert (known_differences.CRASH in kinds) is expected
        narrow = known_differences.known(CASE, 4)
        assert known_differences.CRASH not in {entry.kind for entry in narrow}


def test_fa4_variants_are_bounded_and_the_rest_is_said_loudly() -> None:
    several = [CASE.with_changes(head_dim=d, head_dim_v=d) for d in (8, 16, 24)]
    run = run_of(exact, several, vers=(4,), fa4_variants=2)
    assert [o.verdict for o in run.outcomes] == [AGREES, AGREES, NOT_RUN]
    assert any("Not run, 1 times: FA4 compiles at most 2" in text for text in report.limits(run))


def test_a_known_difference_is_its_own_verdict_and_has_its_own_budget() -> None:
    case = CASE.with_changes(softcap=50.0, causal=False)
    slight, large = (lambda o, s, by=by: (o, s + by) for by in (0.01, 0.1))
    assert judged(case, slight, ver=3).verdict == KNOWN
    assert judged(case, slight, ver=3).differences == ("fast-tanh",)
    assert judged(case, slight, ver="triton").verdict == FAILED
    assert judged(case, large, ver=3).verdict == FAILED


def test_a_sink_row_without_keys_may_be_minus_infinity_for_fa3_only() -> None:
    case = CASE.with_changes(sinks=True)
    empty = (slice(None), slice(5, 14))
    spoil = lambda o, s: (o, with_value(s, empty, -math.inf))  # noqa: E731
    assert judged(case, ver=3).verdict == AGREES
    assert judged(case, spoil, ver=3).differences == ("fa3-sink-without-key-block",)
    assert judged(case, spoil, ver="triton").verdict == FAILED
    elsewhere = lambda o, s: (o, with_value(s, (0, 0), math.inf))  # noqa: E731
    assert judged(case, elsewhere, ver=3).verdict == FAILED


def test_peers_get_clean_inputs_with_the_same_values() -> None:
    given: dict[Any, dict[str, Any]] = {}

    def record(case: Case, arguments: dict[str, Any], ver: Any) -> Any:
        given[ver] = arguments
        return exact(case, arguments)

    prepared = Prepared.of(CASE, "cpu")
    outcomes = [run_backend(prepared, ver, record) for ver in ("triton", 3)]
    assert [o.verdict for o in outcomes] == [AGREES, AGREES]
    assert given["triton"]["k_cache"].isnan().any()
    assert not given[3]["k_cache"].isnan().any()
    table, pages = given[3]["page_table"], given[3]["k_cache"].shape[0]
    assert ((table >= 0) & (table < pages)).all()
    assert (given["triton"]["page_table"] < 0).any()
    used = ~given["triton"]["k_cache"].isnan()
    assert torch.equal(given["triton"]["k_cache"][used], given[3]["k_cache"][used])


@pytest.mark.parametrize("case", [*named.small(), APPEND, DENSE_APPEND], ids=lambda c: c.label)
def test_cases_survive_json(case: Case) -> None:
    assert Case.from_json(case.to_json()) == case


def test_covering_calls_have_every_choice_alone_and_every_pair() -> None:
    for seed in range(3):
        rows = features.covering(seed)
        assert rows == features.covering(seed)
        assert max(map(len, rows)) <= features.TOGETHER + 1
        needed = {"rotary": {"append"}, "only_qv": {"qv"}, "descales": {"float8 cache"}}
        for name in features.CHOICES:
            assert {name} | needed.get(name, set()) in rows
        for pair in itertools.combinations(features.CHOICES, 2):
            together = any(row.issuperset(pair) for row in rows)
            assert together == (frozenset(pair) not in features.APART), pair


@pytest.mark.parametrize("scale", [strategies.SMALL, strategies.FULL], ids=["small", "full"])
def test_pairwise_cases_make_use_of_every_legal_pair(scale: strategies.Scale) -> None:
    cases = strategies.pairwise(1, scale)
    counts = features.coverage(cases)
    assert min(counts["alone"].values()) > 0
    assert min(counts["pairs"].values()) > 0
    apart = len(features.APART)
    assert len(counts["pairs"]) == math.comb(len(features.FEATURES), 2) - apart
    for case in cases:
        used = features.of(case)
        assert not any(pair <= used for pair in features.APART), case


def test_a_feature_that_makes_no_difference_is_not_counted() -> None:
    used = features.of(APPEND)
    assert {"append", "rotary", "causal", "packed q", "q_len > 1", "paged"} <= used
    assert not {"leftpad", "batch_idx", "chunk", "dense cache"} & used
    assert {"leftpad", "batch_idx", "dense cache"} <= features.of(DENSE_APPEND)
    idle = APPEND.with_changes(seqlens_new=(0, 0, 0), leftpad=True, leftpads=(0, 0, 0))
    assert not {"append", "rotary", "leftpad"} & features.of(idle)


def test_there_are_named_cases_of_every_feature() -> None:
    for cases in (named.small(), named.full()):
        assert min(features.coverage(cases)["alone"].values()) > 1


def test_generated_cases_are_distinct_and_follow_the_seed() -> None:
    first = strategies.generate(40, 3, strategies.FULL, 6)
    assert first == strategies.generate(40, 3, strategies.FULL, 6)
    assert first != strategies.generate(40, 4, strategies.FULL, 6)
    assert strategies.pairwise(3, strategies.SMALL) == strategies.pairwise(3, strategies.SMALL)
    assert len({case.identity() for case in first}) == 40
    assert len({case.spec for case in first}) == 6
    assert {case.entry for case in first} == {"kvcache", "varlen", "dense"}
    assert max(case.work for case in first) <= strategies.FULL.work


def test_a_soak_is_large_and_covers_every_pair_often() -> None:
    count = 20_000
    cases = strategies.soak(count, 1, strategies.FULL)
    assert len({case.identity() for case in cases}) == count
    assert len({case.spec for case in cases}) >= 300
    pairs = features.coverage(cases)["pairs"]
    assert len(pairs) == math.comb(len(features.FEATURES), 2) - len(features.APART)
    assert min(pairs.values()) >= 20
    assert max(case.work for case in cases) <= strategies.FULL.work


@pytest.mark.parametrize("scale", [strategies.SMALL, strategies.FULL], ids=["small", "full"])
def test_a_soak_follows_the_seed(scale: strategies.Scale) -> None:
    first = strategies.soak(500, 3, scale)
    assert first == strategies.soak(500, 3, scale)
    other = strategies.soak(500, 4, scale)
    assert not {case.identity() for case in first} & {case.identity() for case in other}


def test_the_cases_of_a_spec_are_launched_in_few_ways() -> None:
    ways: dict[Any, set[Any]] = defaultdict(set)
    lengths: dict[Any, set[Any]] = defaultdict(set)
    for case in strategies.soak(4000, 2, strategies.FULL, 60):
        known = (case.batch, case.lengths, case.num_splits, case.pad_q, bool(case.rotary_seqlens))
        ways[case.spec].add((known, strategies.launch(case)))
        lengths[case.spec].add((case.seqlens_q, case.seqlens_k))
    assert max(map(len, ways.values())) == strategies.SOAK_LAUNCHES
    assert min(map(len, lengths.values())) > 40
    one, other = (CASE.with_changes(seqlens_q=n, seqlens_k=n) for n in ((1, 1), (9, 100)))
    assert strategies.launch(one) != strategies.launch(other)


@pytest.mark.parametrize("asked", [{"generated": 10}, {"soak": 400}], ids=str)
def test_shards_are_disjoint_and_together_everything(asked: dict[str, int]) -> None:
    def plan(*shard: int) -> list[Case]:
        return suite.plan(suite.Options(CPU, shard=shard, **asked))

    shares = [plan(i, 3) for i in (1, 2, 3)]
    assert sorted(repr(case) for share in shares for case in share) == sorted(map(repr, plan(1, 1)))
    specs = [{case.spec for case in share} for share in shares]
    assert all(specs)
    assert sum(map(len, specs)) == len(set().union(*specs)), "two shares compile the same kernels"
    assert max(map(len, shares)) < 2 * min(map(len, shares))


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "-1/2"])
def test_a_shard_that_does_not_exist_is_refused(text: str) -> None:
    result = CliRunner().invoke(command_line.main, ["--shard", text])
    assert result.exit_code == 2
    assert "1 <= i <= n" in result.output


def test_every_small_case_is_small_and_every_generated_one_has_an_exact_result() -> None:
    assert max(case.work for case in named.small()) < 2**17
    for case in strategies.generate(24, 0, strategies.SMALL, 24):
        assert run_backend(Prepared.of(case, "cpu"), "triton", exact).verdict == AGREES, case


@pytest.mark.parametrize(
    "changes",
    [
        {"heads_q": 5},
        {"head_dim": 12},
        {"page_size": 0},
        {"kv_layout": "packed", "page_size": 0},
        {"q_layout": "batched"},
        {"lengths": "int"},
        {"seqlens_k": (1, 2)},
        {"pad_q": 1},
        {"entry": "dense"},
        {"dtype": "float64"},
        {"attention_chunk": -1},
        {"append": "packed"},
        {"seqlens_new": (1, 1, 1, 1)},
        {"append": "batched", "seqlens_new": (1, 2, 1, 1)},
        {"append": "packed", "seqlens_new": (1, 2, 1)},
        {"append": "packed", "seqlens_new": (1, 2, 1, -1)},
        {"append": "packed", "seqlens_new": (1,) * 4, "max_q_slack": 1000},
        {"append": "packed", "seqlens_new": (1,) * 4, "overflow": 1},
        {"append": "packed", "seqlens_new": (1,) * 4, "rotary_dim": 24},
        {"append": "packed", "seqlens_new": (1,) * 4, "rotary_dim": 80},
        {"append": "packed", "seqlens_new": (1,) * 4, "rotary_dim": 16, "rotary_rows": 20},
        {"append": "packed", "seqlens_new": (1,) * 4, "rotary_seqlens": (1,) * 4},
        {"append": "packed", "seqlens_new": (1,) * 4, "rotary_interleaved": False},
        {"append": "batched", "seqlens_new": (1,) * 4, "tail_new": 1},
        {"rotary_dim": 16},
        {"leftpad": True},
        {"leftpads": (1,) * 4},
        {"leftpad": True, "leftpads": (1,) * 4, "shared_prefix": True},
        {"leftpad": True, "leftpads": (1000, 1, 1, 1)},
        {"spare_rows": 1},
        {"entry": "varlen", "batch_idx": True},
        {"entry": "varlen", "leftpad": True, "leftpads": (1,) * 4},
        {"entry": "varlen", "append": "packed", "seqlens_new": (1,) * 4},
        {"kv_dtype": "float16"},
        {"dtype": "float32", "kv_dtype": "float8_e4m3fn"},
        {"dtype": "float8_e5m2", "kv_dtype": "float8_e4m3fn"},
        {"descales": "k"},
        {"kv_dtype": "float8_e4m3fn", "descales": "vk"},
        {"kv_dtype": "float8_e4m3fn", "descale_strides": "expanded"},
        {"head_dim_v": 512},
        {"dtype": "float8_e4m3fn", "qv": True},
        {"only_qv": "bare"},
        {"qv": True, "only_qv": "none"},
        {"qv": True, "only_qv": "bare", "append": "packed", "seqlens_new": (1,) * 4},
        {
            "kv_dtype": "float8_e4m3fn",
            "append": "packed",
            "seqlens_new": (1,) * 4,
            "rotary_dim": 16,
        },
    ],
)
def test_an_illegal_case_cannot_be_made(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not a legal case"):
        CASE.with_changes(**changes)


@pytest.mark.parametrize("case", [CASE, APPEND, DENSE_APPEND], ids=["plain", "paged", "dense"])
def test_the_repro_snippet_runs_the_case(case: Case, capsys: Any, monkeypatch: Any) -> None:
    seen = []
    monkeypatch.setattr("parity_tests.runners.public_call", None)
    monkeypatch.setattr(
        "parity_tests.runners.run_backend", lambda prepared, ver: seen.append(prepared) or CASE_RUN
    )
    exec(case.repro_snippet("torch", "cpu"), {})
    assert seen[0].case == case
    assert "agrees" in capsys.readouterr().out


CASE_RUN = Outcome(CASE, "torch", AGREES)

# A fault of the package, the same in any process.
FAULT = """
import triton_fa

real = triton_fa.flash_attn_with_kvcache

def faulty(**arguments):
    out, lse = real(**arguments)
    return out * 1.25, lse

triton_fa.flash_attn_with_kvcache = faulty
"""


def test_the_repro_snippet_shows_the_failure_in_another_process(monkeypatch: Any) -> None:
    monkeypatch.setattr(triton_fa, "flash_attn_with_kvcache", triton_fa.flash_attn_with_kvcache)
    exec(FAULT, {})
    run = run_of(public_call, [APPEND], vers=("torch",))
    (outcome,) = run.failures
    assert "max error" in outcome.describe()

    def snippet(before: str) -> str:
        code = before + outcome.case.repro_snippet(outcome.ver, "cpu")
        command = [sys.executable, "-c", code]
        return subprocess.check_output(command, cwd=ROOT, text=True).strip()

    assert snippet(FAULT) == outcome.describe()
    assert "agrees" in snippet("")


def test_the_model_case_says_when_it_could_not_run(monkeypatch: Any) -> None:
    def no_transformers(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(model_case.importlib, "import_module", no_transformers)
    case = next(c for c in named.small() if c.source == "llama")
    run = run_of(exact, [case], vers=("triton",))
    assert run.outcomes[0].verdict == NOT_RUN
    assert "could not run: transformers missing" in run.outcomes[0].reasons[0]
    assert any("transformers missing" in sentence for sentence in report.limits(run))


def test_every_known_difference_says_why_and_where() -> None:
    entries = known_differences.DIFFERENCES
    assert len({entry.id for entry in entries}) == len(entries)
    for entry in entries:
        assert entry.reason
        assert entry.where
        for dtype in ("float16", "float32"):
            case = CASE.with_changes(sinks=True, softcap=5.0, out=True, dtype=dtype)
            assert not entry.applies(case, "triton")
            assert not entry.applies(case, "torch")


@pytest.mark.parametrize("entry", known_differences.DIFFERENCES, ids=lambda entry: entry.id)
def test_every_known_difference_covers_its_own_case(entry: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(known_differences, "_on_hopper", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = entry.own_case
    assert case.name
    assert any(entry.applies(case, ver) for ver in suite.VERS)
    if case.work < 2**17:  # the others are named cases, which are known to have an exact result
        assert run_backend(Prepared.of(case, "cpu"), "torch", exact).verdict == AGREES


def known_run(entry_id: str, call: Any, vers: Any, **options: Any) -> suite.Run:
    """A run of the own case of a known difference, on a GPU as far as its options say."""
    entry = next(e for e in known_differences.DIFFERENCES if e.id == entry_id)
    return run_of(call, [entry.own_case], vers=vers, **options)


def infinite(case: Case, arguments: dict[str, Any], _ver: Any) -> Any:
    out, lse = exact(case, arguments)
    return out, torch.full_like(lse, math.inf)


def test_a_known_difference_that_does_not_occur_fails_the_run() -> None:
    id_ = "fa3-empty-key-tensor"
    assert known_run(id_, infinite, (3,)).verdict()[0]
    outlived = known_run(id_, exact, (3,))
    assert suite.occurred(outlived.outcomes) == {id_: False}
    assert outlived.verdict() == (False, f"FAILED: known differences that did not occur: {id_}")
    assert known_run(id_, exact, (3,), strict_known=False).verdict()[0]


def test_a_known_difference_is_judged_only_by_its_own_case_on_all_of_its_backends() -> None:
    other = known_differences.known(CASE.with_changes(sinks=True), 3)
    assert "fa3-sink-without-key-block" in {entry.id for entry in other}
    assert run_of(exact, [CASE.with_changes(sinks=True)], vers=(3,)).verdict()[0]
    assert known_run("fast-tanh", exact, (3,)).verdict()[0], "FA4 has it, too, and did not run"
    assert not known_run("fast-tanh", exact, (3, 4)).verdict()[0]

    def capped(case: Case, arguments: dict[str, Any], ver: Any) -> Any:
        out, lse = exact(case, arguments)
        return out, lse + 0.01 * (ver == 3)

    assert known_run("fast-tanh", capped, (3, 4)).verdict()[0]


def test_poison_is_excused_only_where_it_shows_what_is_known() -> None:
    id_ = "unused-slots-must-be-finite"

    def careless(case: Case, arguments: dict[str, Any], _ver: Any) -> Any:
        out, lse = exact(case, arguments)
        return out + 0 * arguments["v_cache"].sum().to(out.dtype), lse

    shown = known_run(id_, careless, (3, 4))
    assert [o.differences for o in shown.outcomes] == [(id_,), (id_,)]
    assert shown.verdict()[0]
    assert not known_run(id_, exact, (3, 4)).verdict()[0]
    assert not known_run(id_, careless, ("triton",)).verdict()[0]
    twin = shown.outcomes[0].case.with_changes(name="")
    assert run_of(careless, [twin], vers=(3, 4)).outcomes[0].verdict == AGREES


def test_only_the_differences_that_were_needed_are_named() -> None:
    case = CASE.with_changes(sinks=True, softcap=50.0)
    empty = (slice(None), slice(5, 14))
    without = judged(case, lambda o, s: (o, with_value(s, empty, -math.inf)), ver=3)
    assert without.differences == ("fa3-sink-without-key-block",)
    both = judged(case, lambda o, s: (o, with_value(s + 0.01, empty, -math.inf)), ver=3)
    assert both.differences == ("fast-tanh", "fa3-sink-without-key-block")


def test_a_plan_has_the_own_cases_of_what_can_run() -> None:
    gpu = device_module.Device("cuda", interpreted=False)
    names = {case.name for case in suite.plan(suite.Options(gpu, named_only=True))}
    assert {"known: fast-tanh", "known: fa3-empty-key-tensor"} <= names
    names = {case.name for case in suite.plan(suite.Options(gpu, vers=(4,), named_only=True))}
    assert "known: fast-tanh" in names
    assert "known: fa3-empty-key-tensor" not in names
    assert not [c for c in suite.plan(suite.Options(CPU)) if c.name.startswith("known")]


def test_truncated_bfloat16_is_excused_in_the_interpreter_alone(monkeypatch: Any) -> None:
    case = CASE.with_changes(entry="varlen", seqlens_q=(40, 33), seqlens_k=(40, 33), sinks=False)

    def smaller(o: torch.Tensor, s: torch.Tensor) -> Any:
        return (o * 0.988).to(torch.bfloat16), s

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    outcome = judged(case, smaller)
    assert outcome.verdict == KNOWN, outcome.describe()
    assert judged(case, lambda o, s: (o * 0.9, s)).verdict == FAILED
    monkeypatch.delenv("TRITON_INTERPRET")
    assert judged(case, smaller).verdict == FAILED


def test_the_report_is_self_contained_and_escaped(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(report, "what_backends", lambda _: {"triton": "here"})
    hostile = CASE.with_changes(name="<script>alert(1)</script>")
    run = run_of(exact, [hostile, CASE], vers=("triton", 3))
    json_path, html_path = report.write(run, tmp_path / "made", "python -m parity_tests")
    data = json.loads(json_path.read_text())
    assert data["passed"]
    assert len(data["outcomes"]) == 4
    assert re.fullmatch("[0-9a-f]{64}", data["environment"]["kernel_digest"])
    assert Case(**data["outcomes"][2]["fields"]) == CASE
    html = html_path.read_text()
    assert not re.search(r"""(src|href)\s*=|https?://|@import|url\(""", html)
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_the_report_shows_a_wrong_cache_and_which_pairs_ran(
    tmp_path: Path, monkeypatch: Any
) -> None:
    def overwriting(case: Case, arguments: dict[str, Any], ver: Any) -> Any:
        result = exact(case, arguments)
        arguments["v_cache"].nan_to_num_(nan=0.0)
        return result

    monkeypatch.setattr(report, "what_backends", lambda _: {"triton": "here"})
    run = run_of(overwriting, [APPEND], vers=("triton",))
    run.outcomes += run_of(exact, [CASE], vers=("triton",)).outcomes
    json_path, html_path = report.write(run, tmp_path, "python -m parity_tests")
    data = json.loads(json_path.read_text())
    assert not data["passed"]
    failed, agreed = data["outcomes"]
    assert "v_cache was overwritten in" in failed["reasons"][0]
    assert failed["measures"]["key_error"] == 0
    assert agreed["measures"]["key_error"] is None
    counts = data["coverage"]["triton"]
    assert counts["alone"]["causal"] == 2
    assert counts["pairs"]["append + rotary"] == 1
    assert counts["pairs"]["append + leftpad"] == 0
    html = html_path.read_text()
    assert "v_cache was overwritten in" in html
    assert "<h2>Coverage</h2>" in html
    assert "pairs of features ran in no case" in html


@pytest.mark.parametrize(("call", "status"), [(exact, 0), (refuse, 1), (lambda *_: 1 / 0, 1)])
def test_the_command_line_says_by_its_exit_status_whether_it_passed(
    call: Any, status: int, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(device_module, "settle", lambda _: CPU)
    monkeypatch.setattr(report, "what_backends", lambda _: {})
    monkeypatch.setattr(suite, "Run", functools.partial(suite.Run, call=call))
    monkeypatch.setattr(command_line, "end_with_parent", lambda: None)
    arguments = ["--cases", "2", "--filter", "varlen", "--repro", "--output", str(tmp_path / "x")]

    class Inline:
        def __init__(self, folder: Path) -> None:
            self.arguments = [*arguments, "--worker", str(folder)]

        def wait(self) -> int:
            command_line.main(self.arguments, standalone_mode=False)
            return 0

    monkeypatch.setattr(command_line, "start_worker", Inline)
    result = CliRunner().invoke(command_line.main, arguments)
    assert result.exit_code == status, result.output
    assert "interpreter" in result.output
    assert ("run_backend(prepared" in result.output) == (status == 1)
    data = json.loads((tmp_path / "x" / "parity.json").read_text())
    assert data["passed"] == (status == 0)
    assert {o["ver"] for o in data["outcomes"]} == {"triton", "torch", "3", "4"}
    assert {path.name for path in (tmp_path / "x").iterdir()} == {"parity.json", "parity.html"}


def test_the_digest_follows_the_kernel_sources(tmp_path: Path, monkeypatch: Any) -> None:
    kernels = tmp_path / "triton_fa" / "kernels"
    kernels.mkdir(parents=True)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (kernels / "a.py").write_text("x = 1\n")
    first = report.kernel_digest()
    (kernels / "a.py").write_text("x = 2\n")
    assert report.kernel_digest() != first


def test_memory_that_a_call_allocates_is_poison(monkeypatch: Any) -> None:
    """A result left unwritten is NaN, also where the call and not the caller allocated it."""
    seen: list[torch.Tensor] = []

    def forgetful(*, q: torch.Tensor, v_cache: torch.Tensor, **_: Any) -> Any:
        out = torch.empty(*q.shape[:-1], v_cache.shape[-1], dtype=q.dtype)
        seen.extend([q.new_empty(3), torch.empty(3, dtype=torch.int32)])
        workspace = torch.empty(1).expand(5)  # as the Triton backend makes one
        seen.append(torch.empty_like(workspace))
        return out, torch.zeros(q.shape[1], q.shape[0])

    monkeypatch.setattr(triton_fa, "flash_attn_with_kvcache", forgetful)
    outcome = run_backend(Prepared.of(CASE, "cpu"), "triton")
    assert outcome.verdict == FAILED
    assert "nan" in " ".join(outcome.reasons).lower()
    assert seen[0].isnan().all()
    assert (seen[1] == GARBAGE).all()
    assert seen[2].isnan().all()
    assert getattr(torch.empty, "__module__", None) != "parity_tests.poison"  # undone


def _recorded(ver: str, **fields: Any) -> dict[str, Any]:
    """A report of one failed outcome."""
    row = {
        "case": "a case",
        "ver": ver,
        "verdict": FAILED,
        "failure": True,
        "reasons": ["rejected"],
        "differences": [],
        "measures": {"max_error": None},
        "fields": json.loads(json.dumps(dataclasses.asdict(CASE.with_changes(**fields)))),
    }
    environment = {"gpu": "NVIDIA H200"}
    return {"environment": environment, "outcomes": [row], "passed": False, "tally": {}}


def test_a_recorded_failure_is_judged_by_todays_known_differences() -> None:
    data = _recorded("4", head_dim=96, head_dim_v=192)
    assert judge_again(data) == 1
    assert data["passed"]
    assert data["tally"] == {"4": {KNOWN: 1}}
    assert data["outcomes"][0]["differences"] == ["fa4-values-wider-than-keys"]
    assert "rejected" in data["outcomes"][0]["reasons"]  # what happened stays
    assert "failed when run" in data["environment"]["judged again"]


def test_judging_again_leaves_the_recorded_run_as_it_is(tmp_path: Path) -> None:
    recorded = ROOT / "parity_tests" / "results" / "2026-11-20-h200.json"
    copy = tmp_path / "run.json"
    data = json.loads(recorded.read_text())
    failed = next(o for o in data["outcomes"] if o["ver"] == "3" and not o["launched"])
    failed |= {"verdict": "failed", "failure": True, "reasons": ["made up"], "launched": True}
    recorded = tmp_path / "recorded.json"
    recorded.write_text(json.dumps(data))
    copy.write_bytes(recorded.read_bytes())
    result = CliRunner().invoke(rejudge.main, [str(copy)])
    assert result.exit_code == 0, result.output
    assert copy.read_bytes() == recorded.read_bytes()
    assert "judged again, not run again" in (tmp_path / "run.judged-again.html").read_text()


@pytest.mark.parametrize(
    ("ver", "fields", "gpu"),
    [
        ("4", {"head_dim": 96, "head_dim_v": 96}, "NVIDIA H200"),
        ("4", {"head_dim": 96, "head_dim_v": 192}, "NVIDIA B200"),
        ("triton", {"head_dim": 96, "head_dim_v": 192}, "NVIDIA H200"),
    ],
)
def test_other_recorded_failures_stay_failures(ver: str, fields: dict[str, int], gpu: str) -> None:
    data = _recorded(ver, **fields)
    data["environment"]["gpu"] = gpu
    before = json.loads(json.dumps(data))
    assert judge_again(data) == 0
    assert data == before

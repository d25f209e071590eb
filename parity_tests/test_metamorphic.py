"""Relations between calls: they hold whatever the exact result is, so no judge can hide a fault.

Results are equal bit for bit where the same numbers meet in the same order. Where only the order
differs they are within twice the budget of one result: `budgets.judge_pair`.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from parity_tests import strategies
from parity_tests.budgets import Result, merging_slack
from parity_tests.cases import Case, Spec
from parity_tests.conftest import DEVICE, FEWER
from parity_tests.layouts import int32
from parity_tests.legality import FLOAT8
from parity_tests.rearranged import (
    Arguments,
    assert_close,
    assert_same_bits,
    attend,
    by_sequence,
    in_chunks,
    key_names,
    of_sequences,
    packed,
    packed_truth,
    pages_in_use,
    with_pages,
)
from parity_tests.runners import OWN, Ver
from triton_fa import merge_state

Relation = Callable[..., None]

TINY = replace(
    strategies.SMALL,
    batch=2,
    seqlen_q=7,
    seqlen_k=50,
    groups=(1, 2, 3),
    head_dims=(16, 40),
    page_sizes=(1, 3, 16),
    latent=((16, 40),),
)
SCALE = TINY if DEVICE.interpreted else strategies.FULL
# The interpreter cuts bfloat16 off where it should round.
DTYPES = ("float16", "float32") if DEVICE.interpreted else ("bfloat16", "float16", "float32")

FEW_PROGRAMS: dict[str, Any] = (
    {"sm_margin": 3} if DEVICE.interpreted else {}
)  # they run one after the other there

NO_APPEND: dict[str, Any] = {"append": "", "rotary_dim": 0, "rotary_interleaved": True}
NO_FLOAT8: dict[str, Any] = {"kv_dtype": "", "descales": "", "descale_strides": "plain"}
NO_QV: dict[str, Any] = {"qv": False, "only_qv": ""}

TOKENS = 2 if DEVICE.interpreted else 40  # of a sequence, where each is a call of its own


def on_every_backend(**examples: st.SearchStrategy[Any]) -> Callable[[Relation], Relation]:
    """A test of plain PyTorch, and with fewer examples of Triton."""

    def decorate(relation: Relation) -> Relation:
        def test(ver: Ver) -> None:
            def holds(**example: Any) -> None:
                relation(ver=ver, **example)

            holds.__name__ = relation.__name__  # hypothesis tells tests apart by it
            settings = FEWER if ver == "triton" else hypothesis.settings()
            settings(given(**examples)(holds))()

        test.__doc__ = relation.__doc__
        return pytest.mark.parametrize("ver", OWN)(test)

    return decorate


def drawn(*entries: str, **fixed: Any) -> st.SearchStrategy[Case]:
    """Cases of some sequences and keys, with these fields of their specs fixed."""

    def fix(spec: Spec) -> Spec:
        changes: dict[str, Any] = {"lse": True, "out": False, "only_qv": ""} | fixed
        if spec.dtype not in DTYPES:
            changes |= {"dtype": DTYPES[0]}
            changes |= NO_FLOAT8 if spec.dtype in FLOAT8 else {}
        if changes.get("kv_layout") == "paged" and spec.page_size == 0:
            changes["page_size"] = SCALE.page_sizes[-1]
        if changes.get("qv") is False:
            changes["head_dim_v"] = min(spec.head_dim_v, 256)
        return replace(spec, **changes)

    cases = strategies.cases(SCALE, entries, fix)
    return cases.filter(lambda c: c.batch > 1 and sum(c.seqlens_q) > 0 and max(c.keys) > 32)


def made(case: Case) -> Arguments:
    """Fresh arguments of the call: an appending one changes its cache."""
    return case.materialise(DEVICE.name) | FEW_PROGRAMS


def whole(case: Case, ver: Ver, **how: Any) -> Result:
    """The rows of the call as it stands."""
    return packed(by_sequence(case, attend(case, made(case), ver, **how)))


@on_every_backend(case=drawn("kvcache", "varlen", kv_layout="paged"))
def test_page_ids_mean_nothing(case: Case, ver: Ver) -> None:
    """Bit-equal: the same keys under other page ids, so that only addresses differ."""
    arguments = made(case)
    count = len(arguments[key_names(case)[1]])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(case.seed))
    order = order.to(DEVICE.name)
    used = pages_in_use(case, arguments)
    table = arguments["page_table"].clone()
    table[used] = order.argsort()[table[used].long()].int()
    moved = attend(case, with_pages(case, arguments, order, table), ver)
    assert_same_bits(packed(by_sequence(case, moved)), whole(case, ver))


@on_every_backend(case=drawn("kvcache", "varlen", kv_layout="paged", leftpad=False))
def test_shared_pages_are_as_good_as_copies(case: Case, ver: Ver) -> None:
    """Bit-equal: every table entry gets a page of its own, and again only addresses differ."""
    case = case.with_changes(shared_prefix=True)
    arguments = made(case)
    used = pages_in_use(case, arguments)
    source = arguments["page_table"][used]
    assume(len(source.unique()) < len(source))
    table = arguments["page_table"].clone()
    table[used] = torch.arange(len(source), dtype=torch.int32, device=table.device)
    copied = attend(case, with_pages(case, arguments, source.long(), table), ver)
    assert_same_bits(packed(by_sequence(case, copied)), whole(case, ver))


@on_every_backend(case=drawn("kvcache", "varlen"), batch_invariant=st.booleans())
def test_the_order_of_the_batch_means_nothing(case: Case, batch_invariant: bool, ver: Ver) -> None:
    """Bit-equal if batch-invariant, as a row then knows its own sequence only.

    Otherwise keys are shared out over the whole batch: the pieces of a sequence, and with them the
    order of its sums, follow from its place. Twice the budget.
    """
    order = list(range(case.batch))
    random.Random(case.seed).shuffle(order)
    order = order if order != sorted(order) else order[::-1]
    _compare_parts(case, [order], batch_invariant, ver)


@on_every_backend(case=drawn("kvcache", "varlen"), batch_invariant=st.booleans())
def test_a_batch_is_its_halves(case: Case, batch_invariant: bool, ver: Ver) -> None:
    """Bit-equal if batch-invariant, else within twice the budget: as of another order."""
    cut = 1 + case.seed % (case.batch - 1)
    _compare_parts(case, [list(range(cut)), list(range(cut, case.batch))], batch_invariant, ver)


def _compare_parts(case: Case, calls: list[list[int]], batch_invariant: bool, ver: Ver) -> None:
    """One call of the whole batch, and several of some sequences each."""
    how = {"batch_invariant": batch_invariant}
    parts: dict[int, Result] = {}
    for chosen in calls:
        result = attend(case, of_sequences(case, made(case), chosen), ver, **how)
        parts |= zip(chosen, by_sequence(case, result, chosen), strict=True)
    joined = packed(parts[b] for b in range(case.batch))
    if batch_invariant:
        assert_same_bits(joined, whole(case, ver, **how))
    else:
        assert_close(case, whole(case, ver), joined, packed_truth(case, DEVICE.name))


@on_every_backend(case=drawn("kvcache", "varlen"), num_splits=st.integers(1, 9))
def test_splits_agree(case: Case, num_splits: int, ver: Ver) -> None:
    """Within twice the budget: cutting the keys changes only in which order they are summed."""
    chosen, split = (whole(case.with_changes(num_splits=n), ver) for n in (0, num_splits))
    assert_close(case, chosen, split, packed_truth(case, DEVICE.name))


@on_every_backend(
    case=drawn("kvcache", leftpad=False, window=(-1, -1), attention_chunk=0, **NO_APPEND),
    share=st.floats(0, 1),
)
def test_two_parts_of_the_keys_merge_to_the_whole(case: Case, share: float, ver: Ver) -> None:
    """Softmax over a union is the mean of both, weighted by exp(lse); a sink is in one of them.

    Twice the budget, and the rounding of both parts to their dtype: `budgets.merging_slack`. The
    first part ends before any causal mask begins, the second starts behind left padding.
    """
    case = case.with_changes(lengths="tensor")
    seen_by_all = [
        max(0, sk - sq + 1) if case.causal else sk
        for sq, sk in zip(case.seqlens_q, case.seqlens_k, strict=True)
    ]
    cut = int32([round(share * n) for n in seen_by_all], DEVICE.name)
    arguments = made(case)
    first = {"cache_seqlens": cut, "causal": False, "sinks": None}
    parts = [
        packed(by_sequence(case, attend(case, arguments | changes, ver)))
        for changes in (first, {"cache_leftpad": cut})
    ]
    (one, two), (lse_one, lse_two) = zip(*((part.out, part.lse) for part in parts), strict=True)
    out, lse = merge_state(one, lse_one.t(), two, lse_two.t())
    truth = packed_truth(case, DEVICE.name)
    slack = merging_slack((one, two), out)
    assert_close(case, whole(case, ver), Result(out, lse.t()), truth, slack)


CHUNKED = drawn("kvcache", q_layout="packed", causal=True, leftpad=False, **NO_APPEND).map(
    lambda case: case.with_changes(lengths="tensor")
)


@on_every_backend(case=CHUNKED)
def test_causal_prefill_is_decode_token_by_token(case: Case, ver: Ver) -> None:
    """A query attends to what was there when it was the last token; later keys change nothing.

    Twice the budget: prefill has other tiles, and so another order.
    """
    case = case.with_changes(seqlens_q=tuple(min(n, TOKENS) for n in case.seqlens_q))
    tokens = in_chunks(case, made(case), 1, ver)
    assert_close(case, whole(case, ver), tokens, packed_truth(case, DEVICE.name))


@on_every_backend(case=CHUNKED, chunks=st.integers(2, 3))
def test_prefill_in_chunks_is_the_whole(case: Case, chunks: int, ver: Ver) -> None:
    """As token by token, with as many of them at a time as the engine likes. Twice the budget."""
    size = -(-max(case.seqlens_q) // chunks)
    pieces = in_chunks(case, made(case), size, ver)
    assert_close(case, whole(case, ver), pieces, packed_truth(case, DEVICE.name))


@on_every_backend(
    case=drawn("kvcache", "varlen", "dense", **NO_APPEND, **NO_FLOAT8, **NO_QV),
    exponent=st.integers(1, 6),
)
def test_a_power_of_two_on_values_comes_out_again(case: Case, exponent: int, ver: Ver) -> None:
    """Bit-equal, where numbers are normal: weights know no values, and sums scale without rounding.

    Subnormal results have fewer bits, so that the larger one is rounded less.
    """
    arguments, plain = made(case), whole(case, ver)
    name = key_names(case)[1]
    arguments[name].mul_(2.0**exponent)
    scaled = packed(by_sequence(case, attend(case, arguments, ver)))
    tiny = (plain.out != 0) & (plain.out.abs() < torch.finfo(plain.out.dtype).tiny)
    back = torch.where(tiny, plain.out, scaled.out * 2.0**-exponent)
    assert_same_bits(Result(back, scaled.lse), plain)


@on_every_backend(case=drawn("kvcache", "varlen", "dense", sinks=False))
def test_a_sink_of_nothing_is_no_sink(case: Case, ver: Ver) -> None:
    """Bit-equal: exp(-inf) adds an exact zero to the sum, and no row becomes a NaN by it."""
    nothing = torch.full((case.heads_q,), -torch.inf, device=DEVICE.name)
    assert_same_bits(whole(case, ver, sinks=nothing), whole(case, ver))


@on_every_backend(case=drawn("kvcache", "varlen", "dense", **NO_APPEND, **NO_FLOAT8))
def test_grouped_heads_are_repeated_heads(case: Case, ver: Ver) -> None:
    """A group reads one kv head as if each of its heads had a copy.

    Twice the budget: other rows share a tile, which may be of another size.
    """
    arguments = made(case)
    for name in key_names(case):
        arguments[name] = arguments[name].repeat_interleave(case.heads_q // case.heads_kv, -2)
    repeated = packed(by_sequence(case, attend(case, arguments, ver)))
    assert_close(case, whole(case, ver), repeated, packed_truth(case, DEVICE.name))

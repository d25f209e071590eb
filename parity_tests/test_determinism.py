"""The same bits again, and of a row in whatever batch it is."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parity_tests import named
from parity_tests.budgets import Result
from parity_tests.caches import differ
from parity_tests.cases import Case
from parity_tests.conftest import DEVICE, FEWER
from parity_tests.rearranged import (
    assert_same_bits,
    attend,
    by_sequence,
    of_sequences,
    packed,
)

REPEATS = 2 if DEVICE.interpreted else 1000
# Each repeat is a call: in the interpreter one of appending and decode, and one of prefill.
FEW = ("all of a cache at once", "llama3-8b prefill fp32")
REPEATED = [
    case
    for case in (named.small() if DEVICE.interpreted else named.full())
    if case.source == "random" and (case.name in FEW or not DEVICE.interpreted)
]


@pytest.mark.parametrize("case", REPEATED, ids=lambda case: case.name)
def test_repeats_are_bit_equal(case: Case) -> None:
    """No sum depends on which program is first. Appending again writes what is there already."""
    case = case.with_changes(lse=True)
    arguments = case.materialise(DEVICE.name)
    first = packed(by_sequence(case, attend(case, arguments, "triton")))
    for _ in range(REPEATS - 1):
        again = attend(case, arguments, "triton")
        assert_same_bits(packed(by_sequence(case, again)), first)


CHUNK = 256  # keys of the smallest batch-invariant piece: longer sequences are merged of several
# float32, where a sum of another order shows.
MODEL: dict[str, Any] = {
    "dtype": "float32",
    "heads_q": 2,
    "heads_kv": 1,
    "head_dim": 16,
    "head_dim_v": 16,
}


@st.composite
def batches(draw: st.DrawFn, longest_q: int) -> Case:
    """Ragged causal batches on a cache, around the length from which sequences are cut."""
    size = draw(st.integers(2, 3 if DEVICE.interpreted else 40))

    def several(*length: st.SearchStrategy[int]) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.one_of(length), min_size=size, max_size=size)))

    edges = [st.integers(edge - 1, edge + 1) for edge in (CHUNK, 2 * CHUNK, 8 * CHUNK)]

    return Case(
        **MODEL,
        q_layout="packed",
        causal=True,
        window=draw(st.sampled_from(((-1, -1), (-1, -1), (600, 0)))),
        sinks=draw(st.booleans()),
        seqlens_q=several(st.integers(1, longest_q)),
        seqlens_k=several(st.integers(1, 70), st.integers(0, 1100), *edges),
        seed=draw(st.integers(0, 2**16)),
    )


def _alone(case: Case, row: int, **how: bool) -> Result:
    """One sequence of the batch, its query length as the bound."""
    bound = {"max_seqlen_q": case.seqlens_q[row]}
    arguments = of_sequences(case, case.materialise(DEVICE.name), [row]) | bound
    return by_sequence(case, attend(case, arguments, "triton", **how), [row])[0]


def _together(case: Case, **how: bool) -> list[Result]:
    return by_sequence(case, attend(case, case.materialise(DEVICE.name), "triton", **how))


@pytest.mark.parametrize(
    "longest_q", [3, 24 if DEVICE.interpreted else 300], ids=["decode", "ragged prefill"]
)
@FEWER
@given(data=st.data())
def test_batch_invariant_rows_keep_their_bits(data: st.DataObject, longest_q: int) -> None:
    """Whatever else is in the batch: path, tiles and pieces follow from a row's own lengths."""
    case = data.draw(batches(longest_q))
    row = data.draw(st.integers(0, case.batch - 1))
    assert_same_bits(
        _alone(case, row, batch_invariant=True), _together(case, batch_invariant=True)[row]
    )


def test_without_the_mode_they_do_not() -> None:
    """Else the mode were not needed, and the test above could not fail."""
    many = 1 if DEVICE.interpreted else 100  # more key tiles than there are programs
    keys = (400 * many, 30, 300 * many)
    case = Case(**MODEL, q_layout="packed", seqlens_q=(1, 1, 1), seqlens_k=keys)
    together = _together(case)
    assert any(differ(_alone(case, row).out, together[row].out).any() for row in range(3))

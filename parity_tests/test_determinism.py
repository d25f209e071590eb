"""The same bits again, and of a row in whatever batch it is."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parity_tests import named, strategies
from parity_tests.cases import Case
from parity_tests.conftest import DEVICE, FEWER
from parity_tests.rearranged import (
    Arguments,
    assert_same_bits,
    attend,
    by_sequence,
    of_sequences,
    packed,
)
from parity_tests.runners import Ver

REPEATS = 2 if DEVICE.interpreted else 1000
# Each repeat is a call: in the interpreter one case of decode, of appending and of ragged prefill.
REPEATED = (
    ("llama3-8b decode fp32", "all of a cache at once", "gpt-oss mixed batch, sinks")
    if DEVICE.interpreted
    else tuple(case.name for case in named.full())
)
CASES = {case.name: case for case in (named.small() if DEVICE.interpreted else named.full())}


@pytest.mark.parametrize("name", REPEATED)
def test_repeats_are_bit_equal(name: str) -> None:
    """No sum depends on which program is first. Appending again writes what is there already."""
    case = CASES[name].with_changes(lse=True)
    arguments = case.materialise(DEVICE.name)
    first = packed(by_sequence(case, attend(case, arguments, "triton")))
    for _ in range(REPEATS - 1):
        again = attend(case, arguments, "triton")
        assert_same_bits(packed(by_sequence(case, again)), first)

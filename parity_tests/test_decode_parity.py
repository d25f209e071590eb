"""flash_attn_with_kvcache of every backend against the float64 reference."""

import functools

import hypothesis
import pytest

from parity_tests import features, named, strategies
from parity_tests.cases import Case
from parity_tests.conftest import DEVICE, check
from parity_tests.runners import VERS, Ver

SCALE = strategies.SMALL if DEVICE.interpreted else strategies.FULL
NAMED = [case for case in named.small() if case.entry == "kvcache"]
PAIRS = features.covering(0)


@functools.cache
def pairs() -> list[Case]:
    return strategies.pairwise(0, SCALE)


@pytest.mark.parametrize("ver", VERS)
@hypothesis.given(case=strategies.cases(SCALE, ("kvcache",)))
def test_generated_decode_agrees(case: Case, ver: Ver) -> None:
    check(case, ver)


@pytest.mark.parametrize("case", NAMED, ids=lambda case: case.name)
def test_named_decode_agrees_in_plain_torch(case: Case) -> None:
    check(case, "torch")


@pytest.mark.parametrize("case", NAMED[:: 4 if DEVICE.interpreted else 1], ids=lambda c: c.name)
def test_named_decode_agrees_in_triton(case: Case) -> None:
    check(case, "triton")


@pytest.mark.parametrize("ver", ["torch", "triton"])
@pytest.mark.parametrize("index", range(len(PAIRS)), ids=lambda i: ", ".join(sorted(PAIRS[i])))
def test_every_pair_of_features_agrees(index: int, ver: Ver) -> None:
    check(pairs()[index], ver)

"""flash_attn_varlen_func and flash_attn_func of every backend against the float64 reference."""

import hypothesis
import pytest

from parity_tests import named, strategies, suite
from parity_tests.cases import Case
from parity_tests.conftest import DEVICE, check
from parity_tests.runners import VERS, Ver

SCALE = strategies.SMALL if DEVICE.interpreted else strategies.FULL
NAMED = [case for case in named.small() if case.source == "random" and case.entry != "kvcache"]


@pytest.mark.parametrize("ver", VERS)
@hypothesis.given(case=strategies.cases(SCALE, ("varlen", "dense")))
def test_generated_prefill_agrees(case: Case, ver: Ver) -> None:
    check(case, ver)


@pytest.mark.parametrize("case", NAMED, ids=lambda case: case.name)
def test_named_prefill_agrees_in_plain_torch(case: Case) -> None:
    check(case, "torch")


@pytest.mark.parametrize("case", NAMED[:: 4 if DEVICE.interpreted else 1], ids=lambda c: c.name)
def test_named_prefill_agrees_in_triton(case: Case) -> None:
    check(case, "triton")


OWN_CASES = suite.own_cases(suite.Options(DEVICE))


@pytest.mark.parametrize("case", OWN_CASES, ids=lambda case: case.name)
def test_known_differences_occur(case: Case) -> None:
    run = suite.Run(suite.Options(DEVICE))
    run.go([case])
    assert not run.failures
    assert all(suite.occurred(run.outcomes).values()), [o.describe() for o in run.outcomes]

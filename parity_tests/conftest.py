"""Hypothesis profiles, the gpu marker, and a header that says what these tests really ran on."""

import os
from typing import Any

import hypothesis
import pytest
import torch

from parity_tests import device as device_module
from parity_tests.cases import Case
from parity_tests.runners import REFUSED, UNAVAILABLE, Prepared, Ver, run_backend

# Before anything imports triton: without a GPU the kernels run in its interpreter.
DEVICE = device_module.settle(os.environ.get("PARITY_DEVICE"))

_common: dict[str, Any] = {
    "deadline": None,  # a first call compiles
    "suppress_health_check": [
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.data_too_large,
        hypothesis.HealthCheck.filter_too_much,  # draws are cheap, and a test without any fails
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
}
hypothesis.settings.register_profile("ci", max_examples=10, derandomize=True, **_common)
hypothesis.settings.register_profile("dev", max_examples=25, **_common)
hypothesis.settings.register_profile("gpu", max_examples=50, **_common)
hypothesis.settings.register_profile("soak", max_examples=2000, **_common)
hypothesis.settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if DEVICE.interpreted else "gpu")
)
# Of properties that make several calls with each example: half a second a call in the interpreter,
# and some compilations an example on a GPU.
FEWER = hypothesis.settings(max_examples=hypothesis.settings.default.max_examples // 5)


def check(case: Case, ver: Ver) -> None:
    """Fail unless the backend agrees, differs as documented, or (a peer) refuses by name."""
    outcome = run_backend(Prepared.of(case, DEVICE.name), ver)
    if outcome.verdict == UNAVAILABLE and not outcome.is_failure:
        pytest.skip(f"ver={ver}: {'; '.join(outcome.reasons)}")
    if outcome.verdict == REFUSED:
        hypothesis.event(f"ver={ver} refused: {'; '.join(outcome.reasons)}")
    snippet = case.repro_snippet(ver, DEVICE.name)
    assert not outcome.is_failure, f"{outcome.describe()}\n\n{snippet}"


def pytest_report_header() -> str:
    """The device line of the header."""
    return f"parity: {DEVICE.description}; torch {torch.__version__}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip gpu tests, with the reason, where there is no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def device() -> device_module.Device:
    """The device of this test session."""
    return DEVICE

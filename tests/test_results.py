"""Committed results say what they belong to; a stale one is reported, not hidden."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from parity_tests.report import kernel_digest
from parity_tests.sanitize import TOOLS

ROOT = Path(__file__).parent.parent
PARITY = sorted((ROOT / "parity_tests" / "results").glob("*.json"))
SANITIZED = sorted((ROOT / "parity_tests" / "results" / "sanitizer").glob("*.json"))


def test_there_are_results() -> None:
    assert PARITY


@pytest.mark.parametrize("path", PARITY, ids=lambda p: p.stem)
def test_a_parity_report_names_its_kernels(path: Path) -> None:
    report = json.loads(path.read_text())
    environment = report["environment"]
    for name in ("gpu", "driver", "torch", "triton", "date", "command", "kernel_digest"):
        assert environment[name], name
    assert "seed" in environment
    assert path.with_suffix(".html").exists()
    if path == PARITY[-1] and environment["kernel_digest"] != kernel_digest():
        warnings.warn(f"the kernels changed since {path.name} was made", stacklevel=1)


@pytest.mark.parametrize("path", PARITY, ids=lambda p: p.stem)
def test_the_own_backends_agree_in_every_case(path: Path) -> None:
    tally = json.loads(path.read_text())["tally"]
    for backend in ("triton", "torch"):
        assert set(tally[backend]) <= {"agrees", "known difference"}
        assert sum(tally[backend].values()) >= 200


def test_every_tool_of_the_sanitizer_was_run() -> None:
    """Records are of one tool or several, of all cases or a share; none is of what another is."""
    ran: set[tuple[str, str, str]] = set()
    for path in SANITIZED:
        record = json.loads(path.read_text())
        kernels = record["environment"]["kernel_digest"]
        share = {
            (kernels, tool, case)
            for tool, each in record["tools"].items()
            for case in each["cases"]
        }
        assert not ran & share, path.stem
        ran |= share
    for kernels in {kernels for kernels, _, _ in ran}:
        assert {tool for which, tool, _ in ran if which == kernels} == set(TOOLS)


@pytest.mark.parametrize("path", SANITIZED, ids=lambda p: p.stem)
def test_the_sanitizer_found_nothing_unexplained(path: Path) -> None:
    record = json.loads(path.read_text())
    environment, tools = record["environment"], record["tools"]
    for name in ("gpu", "driver", "torch", "triton", "date", "command", "compute_sanitizer"):
        assert environment[name], name
    assert record["passed"]
    for found in tools.values():
        assert found["cases"] == list(dict.fromkeys(found["cases"]))
        assert found["problems"] == []
        assert all(finding["accepted"] for finding in found["findings"])
    if path == SANITIZED[-1] and environment["kernel_digest"] != kernel_digest():
        warnings.warn(f"the kernels changed since {path.name} was made", stacklevel=1)

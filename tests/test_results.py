"""Committed results say what they belong to; a stale one is reported, not hidden."""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from pathlib import Path

import pytest

from parity_tests.report import kernel_digest
from parity_tests.sanitize import TOOLS

ROOT = Path(__file__).parent.parent
PARITY = sorted((ROOT / "parity_tests" / "results").glob("*.json"))
SANITIZED = sorted((ROOT / "parity_tests" / "results" / "sanitizer").glob("*.json"))


def test_there_are_results() -> None:
    assert PARITY
    assert SANITIZED


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


def test_every_tool_of_the_sanitizer_was_run_over_the_same_cases() -> None:
    """Records are of one tool or several, of all cases or a share; no case is in two of them."""
    ran: dict[str, dict[str, list[str]]] = defaultdict(lambda: {tool: [] for tool in TOOLS})
    for path in SANITIZED:
        record = json.loads(path.read_text())
        for tool, found in record["tools"].items():
            names = [*found["cases"], *found["left_out"]]
            ran[record["environment"]["kernel_digest"]][tool] += names
    for kernels, tools in ran.items():
        for tool, names in tools.items():
            assert sorted(names) == sorted(set(tools["memcheck"])), (kernels[:8], tool)


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

"""What compute-sanitizer prints is understood, and nothing it finds passes without a reason."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from parity_tests import sanitize
from parity_tests.sanitize import Accepted, parse

CLEAN = """========= COMPUTE-SANITIZER
some output of the program
========= ERROR SUMMARY: 0 errors
"""
MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at decode_kernel+0x1d0 in decode.py:123
=========     by thread (5,0,0) in block (0,0,0)
=========     Address 0x7f0000000400 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f0000000000 of size 1024 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: cuLaunchKernelEx [0x331b0a] in libcuda.so.1
=========
========= Program hit cudaErrorLaunchFailure (error 719) due to "unspecified launch failure" on CUDA API call to cudaDeviceSynchronize.
=========     Saved host backtrace up to driver entry point at error
=========
========= Target application returned an error
========= ERROR SUMMARY: 2 errors
"""  # noqa: E501
RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at prefill_kernel+0x90 in prefill.py:41
=========     and Read access at prefill_kernel+0x150 in prefill.py:44 [256 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
RACECHECK_CLEAN = """========= COMPUTE-SANITIZER
========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)
"""
INITCHECK = """========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at merge_kernel+0x40 in merge.py:17
=========     by thread (0,0,0) in block (2,0,0)
=========     Address 0x7f0000000600
=========
========= ERROR SUMMARY: 1 error
"""
SYNCCHECK = """========= COMPUTE-SANITIZER
========= Barrier error detected. Divergent thread(s) in warp
=========     at combine_kernel+0x70 in combine.py:60
=========     by thread (32,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 1 error
"""


@pytest.mark.parametrize(("tool", "output"), [("memcheck", CLEAN), ("racecheck", RACECHECK_CLEAN)])
def test_a_clean_run_is_clean(tool: str, output: str) -> None:
    assert parse(tool, output) == sanitize.Report(tool, (), 0)
    assert not parse(tool, output).problems


@pytest.mark.parametrize(
    ("tool", "output", "says"),
    [
        (
            "memcheck",
            MEMCHECK,
            "memcheck: Invalid __global__ read of size 4 bytes at decode_kernel",
        ),
        ("racecheck", RACECHECK, "Write access at prefill_kernel+0x90 in prefill.py:41 and Read"),
        ("initcheck", INITCHECK, "Uninitialized __global__ memory read of size 4 bytes at merge_"),
        ("synccheck", SYNCCHECK, "Divergent thread(s) in warp at combine_kernel+0x70"),
    ],
)
def test_findings_name_what_and_where(tool: str, output: str, says: str) -> None:
    report = parse(tool, output)
    assert says in report.problems[0]
    assert report.counted == len(report.findings) == len(report.problems)


def test_an_error_of_a_call_is_a_finding() -> None:
    assert "cudaErrorLaunchFailure" in parse("memcheck", MEMCHECK).problems[1]


def test_a_tool_that_did_not_end_is_not_clean() -> None:
    assert parse("memcheck", "").problems == ["memcheck: no summary, it did not come to its end"]
    cut = "\n".join(MEMCHECK.splitlines()[:3])
    assert len(parse("memcheck", cut).problems) == 2


def test_what_is_counted_but_not_understood_is_not_clean() -> None:
    assert "counts 3" in parse("memcheck", "========= ERROR SUMMARY: 3 errors").problems[0]


def test_an_explained_finding_passes_for_its_tool_alone(monkeypatch: Any) -> None:
    monkeypatch.setattr(sanitize, "LEDGER", (Accepted("initcheck", r"merge\.py:17", "a reason"),))
    assert not parse("initcheck", INITCHECK).problems
    assert parse("initcheck", INITCHECK.replace("merge.py:17", "merge.py:18")).problems
    assert parse("memcheck", INITCHECK).problems
    assert parse("initcheck", INITCHECK + SYNCCHECK).problems == [
        "initcheck: Barrier error detected. Divergent thread(s) in warp"
        " at combine_kernel+0x70 in combine.py:60"
    ]


def test_the_ledger_explains() -> None:
    for entry in sanitize.LEDGER:
        assert entry.tool in sanitize.TOOLS
        assert entry.pattern
        assert entry.why


def test_the_cases_exist_and_are_small() -> None:
    chosen = sanitize.cases()
    assert len(chosen) == len(sanitize.CASES)
    assert max(case.work for case in chosen) < 2**17
    sanitize.call(min(chosen, key=lambda case: case.work), "cpu")


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compute-sanitizer that prints a file named as its tool."""
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(f'#!/bin/sh\ncat "{tmp_path}/$2"\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in sanitize.TOOLS:
        (tmp_path / name).write_text(RACECHECK_CLEAN if name == "racecheck" else CLEAN)
    return tmp_path


def test_the_command_fails_on_one_finding_of_one_tool(tool: Path) -> None:
    clean = CliRunner().invoke(sanitize.main, [])
    assert clean.exit_code == 0, clean.output
    assert [line.split(":")[0] for line in clean.output.splitlines()] == list(sanitize.TOOLS)
    (tool / "synccheck").write_text(SYNCCHECK)
    failed = CliRunner().invoke(sanitize.main, [])
    assert failed.exit_code == 1
    assert "synccheck: Barrier error" in failed.output
    assert "memcheck: clean" in failed.output
    assert CliRunner().invoke(sanitize.main, ["--tool", "memcheck"]).exit_code == 0


def test_shares_of_the_cases(tool: Path) -> None:
    shares = [sanitize.cases((index, 3)) for index in (1, 2, 3)]
    assert sorted(case.name for share in shares for case in share) == sorted(sanitize.CASES)
    (tool / "compute-sanitizer").write_text(f'#!/bin/sh\necho "$@" > "{tool}/given"\n')
    CliRunner().invoke(sanitize.main, ["--tool", "memcheck", "--shard", "2/3"])
    assert (tool / "given").read_text().rstrip().endswith("--cases --shard 2/3")
    count = len(sanitize.CASES) + 1
    none = CliRunner().invoke(sanitize.main, ["--shard", f"{count}/{count}"])
    assert none.exit_code == 2
    assert f"there are {len(sanitize.CASES)} cases" in none.output


def test_cases_that_fail_are_not_clean(tool: Path) -> None:
    (tool / "compute-sanitizer").write_text(f'#!/bin/sh\ncat "{tool}/$2"\nexit 3\n')
    failed = CliRunner().invoke(sanitize.main, ["--tool", "memcheck"])
    assert failed.exit_code == 1
    assert "the cases ended with exit status 3" in failed.output


def test_without_the_tool_or_a_gpu_it_says_so(tool: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a CUDA GPU" in CliRunner().invoke(sanitize.main, []).output
    monkeypatch.setenv("PATH", "")
    missing = CliRunner().invoke(sanitize.main, [])
    assert missing.exit_code == 1
    assert "compute-sanitizer is not on PATH" in missing.output

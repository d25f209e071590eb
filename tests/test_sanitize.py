"""What compute-sanitizer prints is understood, nothing it finds passes without a reason, and no
kernel is left out."""

import dataclasses
import json
import os
import re
import stat
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from click.testing import CliRunner
from triton.runtime import interpreter

from parity_tests import sanitize
from parity_tests.sanitize import parse
from parity_tests.sanitize_cases import CALLS, Call
from parity_tests.sanitize_ledger import KERNELS, LEDGER, Accepted, place, race
from tests.portability.__main__ import kernel_names
from tests.portability.compiler import Step, planning_for
from tests.portability.targets import TARGETS
from triton_fa import device as device_facts
from triton_fa.kernels import hopper_plans
from triton_fa.kernels.compat import TRITON_VERSION

ROOT = Path(__file__).parents[1]

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
    for entry in LEDGER:
        assert entry.tool in sanitize.TOOLS
        assert entry.pattern
        assert entry.why


def race_text(first: str, *others: str) -> str:
    """What racecheck prints of accesses like "Write kernel file.py:1"."""
    lines = [
        f"{kind} access at {kernel}+0x{0x90 + n:x} in {where}"
        for n, (kind, kernel, where) in enumerate(access.split() for access in (first, *others))
    ]
    between = "".join(f"=========     and {line} [46 hazards]\n" for line in lines[1:])
    return (
        f"========= Error: Race reported between {lines[0]}\n{between}========= \n"
        "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
    )


def test_a_race_is_accepted_for_its_kernel_and_its_places_alone(monkeypatch: Any) -> None:
    pattern = race("one_kernel", r"a\.py:1", r"a\.py:1", r"a\.py:20")
    monkeypatch.setattr(sanitize, "LEDGER", (Accepted("racecheck", pattern, "a reason"),))
    read, write = "Read one_kernel a.py:1", "Write one_kernel a.py:1"
    last = "Write one_kernel a.py:20"
    for accepted in ((read, write), (read, write, last), (last, read), (write, read, read)):
        assert not parse("racecheck", race_text(*accepted)).problems
    for real in (
        (read, "Write one_kernel a.py:2"),
        (read, "Write one_kernel a.py:200"),
        (read, write, "Write one_kernel b.py:1"),
        (read, "Write another_kernel a.py:1"),
        ("Read another_kernel a.py:1", write),
        ("Read one_kernel a.py:20", write),
        (write, last),
        (write, read, last),
    ):
        assert parse("racecheck", race_text(*real)).problems


def test_a_place_is_one_line_of_the_sources() -> None:
    lines = (KERNELS / "latent.py").read_text().splitlines()
    file, number = place("latent.py", "acc = rescaled(acc, alphas", "weigher").split(":")
    assert file == r"latent\.py"
    assert "alphas.load(" in lines[int(number) - 1]
    for given in (
        ("mbarrier.wait(",),
        ("mbarrier.wait(", "weigher"),
        ("acc = rescaled(", "scorer"),
    ):
        with pytest.raises(ValueError, match="expected one"):
            place("latent.py", *given)


def test_a_finding_names_the_case_that_was_running() -> None:
    body = "\n".join(INITCHECK.splitlines()[1:-1])
    output = f"case: first\ncase: second, page 16\n{body}\ncase: third\n{body}\n"
    report = parse("initcheck", output + INITCHECK.splitlines()[-1])
    assert [f.case for f in report.findings] == ["second, page 16", "third"]
    assert report.problems[0].endswith("merge.py:17 (second, page 16)")


# ---------------------------------------------------------------- what the cases reach


def test_cases_have_a_name_of_their_own() -> None:
    assert len({case.name for case in CALLS}) == len(CALLS)
    assert sanitize.cases() == list(CALLS)


@dataclasses.dataclass(frozen=True)
class Launched:
    """A launch of a case, and of each argument whether it is "on", "true", or "off": None, 0."""

    case: str
    kernel: str
    states: dict[str, str]


def state(value: Any) -> str:
    if value is None or (isinstance(value, bool | int | float | str) and not value):
        return "off"
    return "true" if value is True else "on"


def states(step: Step) -> dict[str, str]:
    """Of the Hopper kernels' constants, too, which are fields of one."""
    given = dict(step.values)
    constants = given.pop("C", None)
    if constants is not None:
        given |= dataclasses.asdict(constants)
    return {name: state(value) for name, value in given.items()}


def launches(case: Call) -> list[Launched]:
    """What an H200 would run, on any Triton; from a process without the interpreter."""
    tried = {TRITON_VERSION.release[:2]}
    with (
        mock.patch.object(hopper_plans, "RUN_ON", tried),
        planning_for(TARGETS["sm_90"]) as seen,
    ):
        case.run("cpu")
    return [Launched(case.name, step.kernel.__name__, states(step)) for step in seen]


@pytest.fixture(scope="module")
def launched() -> list[Launched]:
    if isinstance(hopper_plans.kernel_module(), str):
        pytest.skip("this Triton's Gluon has other names")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_sanitize"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [Launched(**each) for each in json.loads(done.stdout)]


def kernels_of(found: Iterable[Launched]) -> set[str]:
    return {each.kernel for each in found}


def test_every_kernel_is_run(launched: list[Launched]) -> None:
    assert kernel_names(["sm_90"]) - kernels_of(launched) == set()
    assert {each.case for each in launched} == {case.name for case in CALLS}


NEVER_SO = {
    ("decode_kernel|prefill_kernel|short_kernel", "INTERPRETED"): "no GPU is",
    ("decode_kernel", "WIDE_SLOTS"): "2^31 elements in a page",
    ("short_kernel", "IEEE"): "its tiles are for 16 bits",
    ("latent_kernel", "attention_chunk|leftpad_ptr|window_left|window_right"): "are refused",
}
"""(kernel, argument), as regular expressions, of what is None, 0 or False in every case; why."""
ALWAYS_SO = {
    (".*", "PDL"): "since sm_90",
    ("decode_kernel", "FP8_HARDWARE"): "since sm_89, but in the interpreter",
    ("schedule_kernel", "plan_ptr"): "its result",
    ("combine_kernel|latent_kernel|hopper_kernel|reset_kernel", "part_ptr"): "its workspace",
    ("prefill_kernel", "WGMMA"): "on Hopper",
    ("latent_kernel", "qv_ptr"): "what it is for",
    ("merge_.*_kernel", "lse_ptr|part_ptr"): "its result, and what it merges",
}
"""Flags that are set, and tensors that are given, in every case."""


def one_sided(found: Iterable[Launched]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(kernel, argument) of what is never given or set, and of what always is though some kernel
    does without."""
    seen: dict[tuple[str, str], set[str]] = defaultdict(set)
    for each in found:
        for name, value in each.states.items():
            seen[each.kernel, name].add(value)
    optional = {name for (_, name), values in seen.items() if "off" in values}
    never = [key for key, values in seen.items() if values == {"off"}]
    always = [
        key
        for key, values in seen.items()
        if values == {"true"}
        or (values == {"on"} and key[1].endswith("_ptr") and key[1] in optional)
    ]
    return never, always


def explained(key: tuple[str, str], exceptions: dict[tuple[str, str], str]) -> bool:
    return any(all(map(re.fullmatch, entry, key)) for entry in exceptions)


def test_every_branch_is_taken(launched: list[Launched]) -> None:
    """Each argument of each kernel is there in one case and not in another."""
    never, always = one_sided(launched)
    assert [key for key in never if not explained(key, NEVER_SO)] == []
    assert [key for key in always if not explained(key, ALWAYS_SO)] == []
    needless = [
        entry
        for exceptions, keys in ((NEVER_SO, never), (ALWAYS_SO, always))
        for entry in exceptions
        if not any(explained(key, {entry: ""}) for key in keys)
    ]
    assert needless == []


def test_a_branch_that_no_case_takes_is_seen() -> None:
    some = [
        Launched("a", "k", {"FLAG": "true", "SIZE": "on", "x_ptr": "on"}),
        Launched("b", "k", {"FLAG": "true", "SIZE": "off", "x_ptr": "on"}),
        Launched("b", "l", {"FLAG": "off", "x_ptr": "off", "y_ptr": "on"}),
    ]
    assert one_sided(some) == ([("l", "FLAG"), ("l", "x_ptr")], [("k", "FLAG"), ("k", "x_ptr")])
    some.append(Launched("c", "k", {"FLAG": "off", "SIZE": "on", "x_ptr": "off"}))
    some.append(Launched("c", "l", {"FLAG": "on", "x_ptr": "on", "y_ptr": "on"}))
    assert one_sided(some) == ([], [])


def where(found: Iterable[Launched], kernel: str, **wanted: str) -> bool:
    """Whether a launch of `kernel` has these arguments in these states."""
    return any(
        each.kernel == kernel and all(each.states[n] == value for n, value in wanted.items())
        for each in found
    )


def test_what_goes_together(launched: list[Launched]) -> None:
    """Combinations that an argument alone does not tell."""
    assert where(launched, "combine_kernel", BY_SEQUENCE="true", most_pieces="off")
    assert where(launched, "combine_kernel", BY_SEQUENCE="off", most_pieces="off")
    assert where(launched, "combine_kernel", ONE_BY_ONE="off", most_pieces="on")
    assert where(launched, "hopper_kernel", FP8="true", PAGE_SIZE="on", V1="off")
    assert where(launched, "hopper_kernel", SPARSE_N="on", SCORE_MOD="on", MASK_MOD="on")
    assert where(launched, "prefill_kernel", SPARSE_N="on", SCORE_MOD="on", MASK_MOD="on")
    assert where(launched, "prefill_kernel", PLANNED="true", ONE_BLOCK="off")
    assert where(launched, "decode_kernel", qv_ptr="on", KEY_FORMAT="on")
    assert where(launched, "latent_kernel", TMA="off", CHUNKED="off")


def test_a_case_runs() -> None:
    """In the interpreter, as all of them do where there is a GPU."""
    next(case for case in CALLS if case.name == "zero lengths, paged").run("cpu")


# ---------------------------------------------------------------- initcheck in the interpreter


class Memory:
    """Which bytes of the workspaces that are allocated from now on a kernel has stored."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.spaces: list[tuple[torch.Tensor, Any]] = []
        self.unwritten = 0  # bytes that were loaded all the same
        empty = torch.empty_strided
        builder = interpreter.InterpreterBuilder
        load, store = builder.create_masked_load, builder.create_masked_store

        def allocated(*given: Any, **options: Any) -> torch.Tensor:
            space = empty(*given, **options)
            self.spaces.append((space, np.zeros(space.nbytes, bool)))
            return space

        def loaded(own: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            for written, bytes_of in self.touched(pointers, mask):
                self.unwritten += np.count_nonzero(~written[bytes_of])
            return load(own, pointers, mask, *rest)

        def stored(own: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            for written, bytes_of in self.touched(pointers, mask):
                written[bytes_of] = True
            return store(own, pointers, value, mask, *rest)

        monkeypatch.setattr(torch, "empty_strided", allocated)
        monkeypatch.setattr(builder, "create_masked_load", loaded)
        monkeypatch.setattr(builder, "create_masked_store", stored)

    def touched(self, pointers: Any, mask: Any) -> Iterable[tuple[Any, Any]]:
        """Of each workspace: what is written of it, and which of its bytes are meant."""
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = pointers.data[mask.data.astype(bool)].astype(np.int64)
        for space, written in self.spaces:
            first = addresses - space.data_ptr()
            first = first[(first >= 0) & (first < space.nbytes)]
            if first.size:
                yield written, first[:, None] + np.arange(size)


@pytest.fixture
def memory(fresh: pytest.MonkeyPatch) -> Memory:
    """With 16 multiprocessors, more than the interpreter has: more sequences are cut."""
    facts = device_facts.DeviceFacts("cpu", (0, 0), 16, 1 << 20)
    fresh.setattr(device_facts, "facts", lambda device: facts)
    return Memory(fresh)


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter")


@interpreted
@pytest.mark.parametrize(
    "name",
    [
        "head dim 72, mixed batch",
        "head dim 192 with v 128, decode",
        "decode, batch-invariant",
        "deepseek MLA decode, 16 heads, 1 to 4 tokens",
    ],
)
def test_partial_results_are_read_as_they_were_written(name: str, memory: Memory) -> None:
    """Also where a sequence has fewer rows than its launch."""
    next(case for case in CALLS if case.name == name).run("cpu")
    assert any(written.any() for _, written in memory.spaces)
    assert memory.unwritten == 0


@triton.jit
def _shift_kernel(x_ptr, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x_ptr + at, at, mask=at < count)
    tl.debug_barrier()
    tl.store(x_ptr + at + BLOCK, tl.load(x_ptr + at))


@interpreted
@pytest.mark.parametrize(("count", "unwritten"), [(16, 0), (13, 12)])
def test_what_nobody_wrote_is_noticed(count: int, unwritten: int, memory: Memory) -> None:
    space = torch.empty_strided((32,), (1,), dtype=torch.int32)
    _shift_kernel[(1,)](space, count, BLOCK=16)
    assert memory.unwritten == unwritten


# ---------------------------------------------------------------- the command


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
    assert sorted(c.name for share in shares for c in share) == sorted(c.name for c in CALLS)
    (tool / "compute-sanitizer").write_text(f'#!/bin/sh\necho "$@" > "{tool}/given"\n')
    CliRunner().invoke(sanitize.main, ["--tool", "racecheck", "--shard", "2/3"])
    given = (tool / "given").read_text().rstrip()
    assert given.endswith("--cases --shard 2/3")
    assert given.startswith("--tool racecheck --print-limit 1000 --num-cuda-barriers 2048 ")
    count = len(CALLS) + 1
    none = CliRunner().invoke(sanitize.main, ["--shard", f"{count}/{count}"])
    assert none.exit_code == 2
    assert f"of {len(CALLS)} cases none is left" in none.output


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Stands for the machine that records are of."""
    about = dict.fromkeys(("gpu", "torch", "triton", "commit", "source_digest"), "same")
    about |= {"date": "today", "command": "python", "compute_sanitizer": "Version 2025.3.1"}
    monkeypatch.setattr(sanitize, "environment", lambda command: about)
    return about


def recorded(path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    done = CliRunner().invoke(sanitize.main, [*arguments, "--output", str(path)])
    return done.exit_code, json.loads(path.read_text()) if path.exists() else {}


def test_records_of_shares_are_joined(
    tool: Path, machine: dict[str, str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(sanitize, "LEDGER", (Accepted("initcheck", r"merge\.py:17", "a reason"),))
    (tool / "initcheck").write_text(f"case: some\n{INITCHECK}")
    shares = [str(tool / "folder" / f"{index}.json") for index in (1, 2)]
    for index, path in enumerate(shares, 1):
        status, share = recorded(Path(path), "--shard", f"{index}/2")
        assert (status, share["passed"], share["environment"]) == (0, True, machine)
        assert [*share["tools"]] == list(sanitize.TOOLS)
        assert "merge.py:17" in Path(path).with_suffix(".initcheck.log").read_text()
    status, whole = recorded(tool / "whole.json", "--join", *shares)
    assert (status, whole["passed"], whole["environment"]["date"]) == (0, True, "today")
    for found in whole["tools"].values():
        assert sorted(found["cases"]) == sorted(case.name for case in CALLS)
        assert found["seconds"] >= 0
    assert whole["tools"]["memcheck"]["counted"] == 0
    assert whole["tools"]["initcheck"]["counted"] == 2
    (finding, _) = whole["tools"]["initcheck"]["findings"]
    assert finding["case"] == "some"
    assert (finding["times"], finding["accepted"]) == (1, "a reason")
    assert finding["details"][0].startswith("at merge_kernel")


def test_a_record_says_what_was_found(tool: Path, machine: dict[str, str]) -> None:
    first, *body, last = INITCHECK.splitlines()
    (tool / "initcheck").write_text("\n".join([first, *body, *body, last.replace("1", "2")]))
    status, data = recorded(tool / "one.json", "--tool", "initcheck")
    assert (status, data["passed"]) == (1, False)
    found = data["tools"]["initcheck"]
    assert [each["times"] for each in found["findings"]] == [2]
    assert found["findings"][0]["accepted"] is None
    assert len(found["problems"]) == 1
    assert "merge.py:17" in found["problems"][0]
    status, joined = recorded(tool / "whole.json", "--join", str(tool / "one.json"))
    assert (status, joined["passed"]) == (1, False)
    assert found["problems"][0] in joined["tools"]["initcheck"]["problems"]


def test_a_share_that_is_missing_is_no_clean_result(tool: Path, machine: dict[str, str]) -> None:
    one = str(tool / "1.json")
    recorded(Path(one), "--shard", "1/2")
    status, data = recorded(tool / "whole.json", "--join", one)
    assert (status, data["passed"]) == (1, False)
    assert (
        f"memcheck: {len(CALLS) // 2} cases in no record"
        in data["tools"]["memcheck"]["problems"][0]
    )


def test_a_case_is_left_out_for_a_reason(tool: Path, machine: dict[str, str]) -> None:
    (first, *_), (other, *_) = sanitize.cases((1, 2)), sanitize.cases((2, 2))
    leave_out = [f"--leave-out={name}=it = slow" for name in (first.name, other.name)]
    shares = [str(tool / f"{index}.json") for index in (1, 2, 3)]
    for index, path in enumerate(shares[:2], 1):
        status, data = recorded(Path(path), "--shard", f"{index}/2", *leave_out)
        (name,) = data["tools"]["racecheck"]["left_out"]
        assert status == 0
        assert data["tools"]["racecheck"]["left_out"][name] == "it = slow"
        assert name not in data["tools"]["racecheck"]["cases"]
    status, whole = recorded(tool / "whole.json", "--join", *shares[:2])
    assert (status, whole["passed"]) == (0, True)
    assert [*whole["tools"]["racecheck"]["left_out"]] == [first.name, other.name]
    # By another run, over that case among others, it is there after all.
    recorded(Path(shares[2]), "--shard", "1/2")
    status, whole = recorded(tool / "whole.json", "--join", *shares[1:])
    assert (status, [*whole["tools"]["racecheck"]["left_out"]]) == (0, [other.name])
    for wrong in ("no such case=slow", first.name, f"{first.name}= "):
        assert CliRunner().invoke(sanitize.main, ["--leave-out", wrong]).exit_code == 2


def test_what_is_left_out_does_not_run(tool: Path) -> None:
    (tool / "compute-sanitizer").write_text(f'#!/bin/sh\necho "$@" > "{tool}/given"\n')
    (name, *_) = (case.name for case in sanitize.cases((1, 3)))
    options = ["--tool", "racecheck", "--shard", "1/3", "--leave-out", f"{name}=slow"]
    CliRunner().invoke(sanitize.main, options)
    assert f"--cases --shard 1/3 --leave-out={name}={name}" in (tool / "given").read_text()
    ran: list[Call] = []
    with mock.patch.object(sanitize, "run_cases", ran.extend):
        CliRunner().invoke(sanitize.main, ["--cases", *options[2:]])
    assert ran == sanitize.cases((1, 3))[1:]


def test_what_does_not_belong_together_is_not_joined(tool: Path, machine: dict[str, str]) -> None:
    paths = [str(tool / f"{index}.json") for index in (1, 2)]
    recorded(Path(paths[0]), "--shard", "1/2")
    twice = CliRunner().invoke(sanitize.main, ["--join", paths[0], paths[0]])
    assert (twice.exit_code, "in several records" in twice.output) == (1, True)
    machine["source_digest"] = "another"
    recorded(Path(paths[1]), "--shard", "2/2")
    other = CliRunner().invoke(sanitize.main, ["--join", *paths])
    assert (other.exit_code, "differ in source_digest" in other.output) == (1, True)
    for wrong in (["--join"], [paths[0]]):
        assert CliRunner().invoke(sanitize.main, wrong).exit_code == 2


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


if __name__ == "__main__":
    found = [dataclasses.asdict(each) for case in CALLS for each in launches(case)]
    sys.stdout.write(json.dumps(found))

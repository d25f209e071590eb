"""Every kernel compiles for every chip without one, fits its shared memory and spills nothing hot.

This is the part of ``python -m tests.portability`` that every change runs: fewer chips and cases.
"""

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from tests.portability import __main__ as portability
from tests.portability.binary import amd, gcn, local_in_loops, sass
from tests.portability.cases import CASES, CORE, LARGE, LONG, decode, prefill
from tests.portability.compiler import (
    Compiled,
    Step,
    compiled,
    excused,
    faults,
    misfits,
    planned,
    planning_for,
)
from tests.portability.exceptions import EXCEPTIONS, Exempt
from tests.portability.targets import TARGETS

pytest.importorskip("triton")

KERNELS = Path(__file__).parents[1] / "triton_fa" / "kernels"
CHIPS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
# Shared memory and registers are shortest here, so the large cases are compiled here only.
TIGHT = ("sm_120", "gfx942")
# The cases that decide the speed of decode. Others may spill: see the table that is printed.
UNSPILLED = (
    "decode-128",
    "decode-128-pieces",
    "decode-96-two-panels",
    "decode-float8-80",
    "short-128",
)


def expected_kernels(name: str) -> set[str]:
    """The kernels that a case is there for."""
    kernels: set[str] = set()
    if name.startswith("merge"):
        return {"merge_pair_kernel" if "pair" in name else "merge_splits_kernel"}
    if name.startswith("short"):
        return {"short_kernel"}
    if "append" in name:
        kernels |= {"append_kernel"}
    if "append" in name or "decode" in name or "mixed" in name:
        kernels |= {"decode_kernel", "combine_kernel"}
    if "prefill" in name or "mixed" in name:
        kernels |= {"prefill_kernel"}
    if "mixed" in name:
        kernels |= {"schedule_kernel"}
    return kernels


@pytest.mark.parametrize("chip", CHIPS)
def test_every_plan_compiles_and_fits(chip: str) -> None:
    """One test for a chip: its cases share a process, and tests may run in several."""
    facts = TARGETS[chip].facts
    names = [*CORE, *(LARGE if chip in TIGHT else ())]
    found = list(compiled(chip, names))
    sys.stdout.write("\n".join(map(str, found)) + "\n")
    problems = [text for c in found for text in misfits(c)]
    for name in names:
        kernels = {c.kernel for c in found if c.case == name}
        if kernels != expected_kernels(name):
            problems.append(f"{name}: {kernels} were launched")
    problems += [f"spills: {c}" for c in found if c.case in UNSPILLED and c.local]
    has_descriptors = facts.kind == "cuda" and facts.arch[0] in (9, 10)
    problems += [
        f"reads through descriptors, or does not: {c}"
        for c in found
        if c.case == "prefill-128" and c.described != has_descriptors
    ]
    assert not problems, "\n".join(problems)


# ---------------------------------------------------------------- the matrix itself


def tiles(launches: Iterable[Step]) -> set[tuple[object, ...]]:
    """What distinguishes compilations of the two attention kernels for one kind of head."""
    return {
        (x.kernel.__name__, x.tile, x.values.get("HALVES"), x.options.get("maxnreg"))
        for x in launches
        if x.kernel.__name__ in ("decode_kernel", "prefill_kernel")
    }


@pytest.mark.parametrize("chip", TARGETS)
def test_the_matrix_has_every_shipped_tile(chip: str) -> None:
    attention = [case for case in CASES if not case.startswith("merge")]
    reached = tiles(launch for case in attention for launch in planned(TARGETS[chip], case))
    with planning_for(TARGETS[chip]) as shipped:
        for dtype, dim in product((torch.bfloat16, torch.float32), (16, *range(32, 257, 32))):
            for rows in (1, 16, 32, 64, 128):
                decode(rows, dim, dtype=dtype)()
            for seqlen in (256, LONG):
                prefill(seqlen, dim, dtype=dtype)()
    assert tiles(shipped) - reached == set()


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x37c] ;        /* 0x0000df00ff017b82 */
        /*0010*/                   STL [R1+0x34], RZ ;            /* 0x000034ff01007387 */
        /*0020*/              @P0 BRA 0x70 ;                      /* 0x0000004000a80947 */
        /*0030*/                   LDL.64 R2, [R1+0x34] ;         /* 0x00003000010a7983 */
        /*0040*/              @P3 BRA 0x60 ;                      /* 0x0000004000a80947 */
        /*0050*/             @!P1 BRA P2, 0x30 ;                  /* 0xffffffc000d88947 */
        /*0060*/                   LDL R2, [R1+0x34] ;            /* 0x00003000010a7983 */
        /*0070*/                   EXIT ;                         /* 0x000000000000794d */
        /*0080*/                   BRA 0x80;                      /* 0xfffffffc00fc7947 */
"""
GCN = """
kernel:
; %bb.0:
\tscratch_store_b32 off, v5, off offset:1320 ; 4-byte Folded Spill
\ts_cbranch_scc1 .LBB0_3
.LBB0_1:                                ; =>This Loop Header: Depth=1
.LBB0_2:
\tbuffer_load_dwordx4 v[4:7], v9, s[8:11], 0 offen
\tbuffer_load_dword v1, off, s[0:3], 0 offset:4 ; 4-byte Folded Reload
\tscratch_load_b32 v0, off, off offset:808 ; 4-byte Folded Reload
\ts_cbranch_vccnz .LBB0_2
\ts_branch .LBB0_1
.LBB0_3:
\tscratch_load_b32 v0, off, off offset:808
\ts_endpgm
    .private_segment_fixed_size: 2076
    .vgpr_count:     256
"""


HINTS = SASS.replace(" ;  ", " &req={0} ?trans6;  ")


def test_local_memory_counts_where_it_is_touched_again_and_again() -> None:
    assert [x.local for x in sass(SASS)].count(True) == 3
    assert local_in_loops(sass(SASS)) == 1
    assert sass(HINTS) == sass(SASS)
    assert HINTS != SASS
    assert local_in_loops(sass(SASS.replace("0x30 ;", "0x60 ;"))) == 0
    assert local_in_loops(sass("code that this tool cannot read")) is None
    assert [x.local for x in gcn(GCN)].count(True) == 4
    assert amd(GCN) == (256, 2076, 2)
    assert local_in_loops(gcn(GCN.replace("s_branch .LBB0_1", "s_branch .LBB0_3"))) == 2


def test_a_case_that_kills_the_compiler_costs_itself_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[list[str]] = []

    def dies_at_b(target: str, cases: list[str], kernels: str, log: IO[str]) -> Any:
        asked.append(list(cases))
        lines = [f"print({json.dumps(json.dumps(c))}, flush=True)" for c in cases if c != "b"]
        if cases[0] != "c":
            lines[cases.index("b") :] = ["import sys; sys.exit('out of registers')"]
        command = [sys.executable, "-c", "\n".join(lines)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)

    monkeypatch.setattr("tests.portability.compiler.worker", dies_at_b)
    (found,) = compiled("sm_90", ["a", "b", "c"])
    assert asked == [["a", "b", "c"], ["c"]]
    assert found.case == "b"
    assert "out of registers" in found.error


GOOD = Compiled("sm_90", "decode-128", "decode_kernel", "16x64", True, 81920, 160)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"error": "no such instruction"}, "does not compile"),
        ({"shared": 300_000}, "too much shared memory"),
        ({"local": 8, "in_loops": 2}, "local memory in a loop"),
        ({"local": 8, "in_loops": None}, None),
        ({"local": 8}, None),
    ],
)
def test_the_matrix_fails_on_faults_and_writes_its_tables(
    change: dict[str, Any], fault: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = dataclasses.replace(GOOD, **change)
    monkeypatch.setattr(portability, "compiled", lambda target, cases, kernels: [one])
    arguments = ["--target", "sm_90", "--kernel", "decode", "--output", str(tmp_path)]
    status = portability.main(arguments)
    assert status == (fault is not None)
    assert [text.startswith(str(fault)) for text in faults(one, "3.9.0")] == [True] * status
    (table,) = tmp_path.glob("*.md")
    assert "| decode-128 | decode_kernel | 16x64 |" in table.read_text()
    (data,) = tmp_path.glob("*.json")
    assert json.loads(data.read_text())["launches"] == [dataclasses.asdict(one)]


@pytest.mark.parametrize("exempt", EXCEPTIONS, ids=lambda e: f"{e.target} {e.case}")
def test_an_exception_is_for_something(exempt: Exempt) -> None:
    """And not for what decides speed on chips where it was measured."""
    assert exempt.why
    assert any(re.fullmatch(exempt.target, name) for name in TARGETS)
    assert any(re.fullmatch(exempt.case, name) for name in CASES)
    for case in UNSPILLED:
        assert not exempt.covers("sm_90", case, "decode_kernel", "3.9.0")


def test_an_exception_excuses_no_more_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    spills = dataclasses.replace(GOOD, local=8, in_loops=2)
    exempt = Exempt("reason", "sm_90", "decode-128", "decode_kernel", r"3\.9.*")
    monkeypatch.setattr("tests.portability.compiler.EXCEPTIONS", (exempt,))
    assert excused(spills, "3.9.0") == "reason"
    assert faults(spills, "3.9.0") == []
    assert faults(dataclasses.replace(spills, shared=300_000), "3.9.0") != []
    for other in ({"target": "sm_100"}, {"case": "decode-128-pieces"}, {"kernel": "combine"}):
        assert faults(dataclasses.replace(spills, **other), "3.9.0") != []
    assert faults(spills, "3.6.0") != []


def test_parts_of_the_matrix_add_up_to_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for target in ("sm_90", "sm_80"):
        one = dataclasses.replace(GOOD, target=target)
        monkeypatch.setattr(portability, "compiled", lambda *_, one=one: [one])
        portability.main(["--target", target, "--kernel", "decode", "--output", str(tmp_path)])
    assert len(list(tmp_path.glob("*.json"))) == 2
    (table,) = tmp_path.glob("*.md")
    text = table.read_text()
    assert text.index("## sm_80, 163 KiB") < text.index("## sm_90, 227 KiB")
    assert re.search(r"^\| sm_80 \| 1 \| 0 \| 0 \| \d+ \| [0-9a-f]{16} \|$", text, re.MULTILINE)


def test_a_kernel_that_no_case_launches_is_at_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(portability, "compiled", lambda target, cases, kernels: [GOOD])
    assert portability.main(["--target", "sm_90", "--output", str(tmp_path)]) == 1
    assert "no case launches it: prefill_kernel" in capsys.readouterr().out


def test_a_part_of_the_matrix_can_be_asked_for() -> None:
    options = portability.parse(
        ["--target", "gfx942", "--target", "sm_90", "--case", "^prefill-96"]
    )
    assert options.target == ["gfx942", "sm_90"]
    assert options.cases == ["prefill-96-long", "prefill-96-short"]
    with pytest.raises(SystemExit):
        portability.parse(["--target", "sm_75"])


PTX = """
import sys
from triton.backends.compiler import GPUTarget
from tests.portability.compiler import planned
from tests.portability.targets import TARGETS
from triton_fa.kernels.launch import cross_compile
for step in planned(TARGETS["sm_90"], sys.argv[1]):
    if step.kernel.__name__ == sys.argv[2]:
        chip = GPUTarget("cuda", 90, 32)
        made = cross_compile(step.kernel, (), step.values, step.options, chip)
        sys.stdout.write(made.asm["ptx"])
"""


@pytest.mark.parametrize("case", ["decode-128", "decode-latent"])
def test_all_threads_with_a_row_merge_to_the_same_sum(case: str) -> None:
    """A product that becomes part of the addition across threads is rounded by the others alone:
    then sums differ by the thread, and so does what is written of them to one place.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PTX, case, "combine_kernel"]
    ptx = subprocess.run(
        command, cwd=KERNELS.parents[1], env=environment, capture_output=True, text=True, check=True
    ).stdout
    others = set(re.findall(r"shfl\.sync\.bfly\.b32\s+(%r\d+)", ptx))
    sums = re.findall(r"add(?:\.rn)?\.f32\s+%r\d+, %r\d+, (%r\d+)", ptx)
    assert others & {*sums}
    addends = re.findall(r"fma\.rn\.f32\s+%r\d+, %r\d+, %r\d+, (%r\d+)", ptx)
    assert not others & {*addends}


def shadowed(source: str) -> list[str]:
    """Parameters of kernels that a statement gives another value without reading them."""
    found = []
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef) and function.name.endswith("_kernel"):
            names = {argument.arg for argument in function.args.args}
            for statement in ast.walk(function):
                if isinstance(statement, ast.Assign | ast.For):
                    part = statement.target if isinstance(statement, ast.For) else statement
                    used = [n for n in ast.walk(part) if isinstance(n, ast.Name) and n.id in names]
                    written = {n.id for n in used if isinstance(n.ctx, ast.Store)}
                    read = {n.id for n in used if isinstance(n.ctx, ast.Load)}
                    found += [f"{function.name}: {name}" for name in sorted(written - read)]
    return found


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.name)
def test_no_kernel_takes_the_name_of_a_parameter(path: Path) -> None:
    """One did: rows of the query under the name of the cache's, which were then clamped by them."""
    assert shadowed(path.read_text()) == []


def test_a_name_that_is_taken_is_seen() -> None:
    kernel = "def some_kernel(size, rows):\n    size = size + 1\n    rows, other = 2 * size, 3\n"
    assert shadowed(kernel) == ["some_kernel: rows"]

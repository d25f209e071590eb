"""python -m parity_tests.sanitize: the kernels under NVIDIA's compute-sanitizer.

Each tool runs the calls of `sanitize_cases.py` in a process of its own. A finding that is not in
`LEDGER` fails, as does a tool that did not come to its end. Numbers are not judged here: parity
does that.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from parity_tests import report as parity_report
from parity_tests.device import Device
from parity_tests.sanitize_cases import CALLS, Call, caching
from parity_tests.sanitize_ledger import LEDGER, Accepted
from parity_tests.shard import Shard, part

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Barriers of a block that are followed, more than any kernel has: by itself the tool counts those
# of nvcc's kernels only.
OPTIONS = {tool: ("--num-cuda-barriers", "2048") for tool in ("racecheck", "synccheck")}
PREFIX = "========="
CASE = "case: "  # what the program prints before each
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")
# What stands where findings do and is none: the tool's name, its summary, and what it says of the
# program, whose exit status tells as much.
NO_FINDING = re.compile(r"COMPUTE-SANITIZER$|[A-Z]+ SUMMARY: |Target application returned an error")
# What records that are joined have in common.
SAME = ("gpu", "torch", "triton", "commit", "source_digest", "compute_sanitizer")


@dataclass(frozen=True)
class Finding:
    """What a tool reported: a headline, and where."""

    tool: str
    text: str
    details: tuple[str, ...] = ()
    case: str = ""

    @property
    def where(self) -> str:
        """The first detail that is no host frame: kernel and line."""
        return next((line for line in self.details if line.startswith(("at ", "and "))), "")

    @property
    def accepted(self) -> Accepted | None:
        """The entry of the ledger that explains it."""
        whole = "\n".join((self.text, *self.details))
        fits = (e for e in LEDGER if e.tool == self.tool and re.search(e.pattern, whole))
        return next(fits, None)


@dataclass(frozen=True)
class Report:
    """The output of one tool."""

    tool: str
    findings: tuple[Finding, ...]
    counted: int | None  # by the tool's own summary; None: it did not come to its end

    @property
    def problems(self) -> list[str]:
        """Why this is no clean result, accepted findings aside."""
        found = [
            " ".join(filter(None, (f"{self.tool}:", finding.text, finding.where, in_case)))
            for finding in self.findings
            if not finding.accepted
            for in_case in (finding.case and f"({finding.case})",)
        ]
        if self.counted is None:
            found.append(f"{self.tool}: no summary, it did not come to its end")
        elif self.counted and not self.findings:
            found.append(
                f"{self.tool}: counts {self.counted} findings, none of which was understood"
            )
        return found


def parse(tool: str, output: str) -> Report:
    """What a tool printed, among whatever the program printed."""
    found: list[tuple[str, list[str], str]] = []
    counted = None
    for line, case in _said(output):
        text = line.strip()
        if summary := SUMMARY.search(text):
            counted = (counted or 0) + int(summary[1])
        if not text or NO_FINDING.match(text):
            continue
        if line.startswith("  "):  # more of the last one
            if found:
                found[-1][1].append(text)
        else:
            found.append((text, [], case))
    findings = (Finding(tool, text, tuple(details), case) for text, details, case in found)
    return Report(tool, tuple(findings), counted)


def _said(output: str) -> Iterator[tuple[str, str]]:
    """The tool's own lines, and the case that each belongs to."""
    case = ""
    for line in output.splitlines():
        if line.startswith(PREFIX):
            yield line.removeprefix(PREFIX), case
        elif line.startswith(CASE):
            case = line.removeprefix(CASE)


def run(
    tool: str,
    shard: tuple[int, int] = (1, 1),
    log: Path | None = None,
    left_out: Iterable[str] = (),
) -> tuple[Report, str, int]:
    """One tool over a share of the cases: its report, all output, and the exit status.

    The output also goes to `log`, as it comes.
    """
    sanitizer = ["compute-sanitizer", "--tool", tool, "--print-limit", "1000"]
    share = ["--shard", "{}/{}".format(*shard)]
    share += [f"--leave-out={name}={name}" for name in left_out]
    program = [sys.executable, "-m", "parity_tests.sanitize", "--cases", *share]
    with log.open("w+") if log else tempfile.TemporaryFile("w+") as file:
        done = subprocess.run(
            [*sanitizer, *OPTIONS.get(tool, ()), *program],
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
        file.seek(0)
        output = file.read()
    return parse(tool, output), output, done.returncode


def cases(shard: tuple[int, int] = (1, 1), left_out: Iterable[str] = ()) -> list[Call]:
    """Those of a share, but for some."""
    return [case for case in part(CALLS, shard) if case.name not in left_out]


def run_cases(chosen: Iterable[Call]) -> None:
    """Run them here, where a tool looks on."""
    torch.cuda.init()
    # Each tensor an allocation of its own: between parts of a block nobody notices an overrun.
    with caching(False):
        torch.empty(1, device="cuda")
        if torch.cuda.memory_reserved():
            raise RuntimeError("PyTorch still keeps memory for later tensors")
        for case in chosen:
            click.echo(f"{CASE}{case.name}")
            case.run("cuda")
            torch.cuda.synchronize()


# ---------------------------------------------------------------- the record


def as_data(
    report: Report,
    problems: Sequence[str],
    ran: Sequence[Call],
    left_out: Mapping[str, str],
    s: float,
) -> dict[str, Any]:
    """What a record holds of one tool; findings that read alike are one."""
    times = Counter((f.case, f.text, f.where) for f in report.findings)
    first = {(f.case, f.text, f.where): f for f in reversed(report.findings)}
    findings = [
        {
            "case": f.case,
            "text": f.text,
            "details": f.details,
            "times": count,
            "accepted": None if f.accepted is None else f.accepted.why,
        }
        for key, count in times.items()
        for f in (first[key],)
    ]
    return {
        "counted": report.counted,
        "findings": findings,
        "problems": list(dict.fromkeys(problems)),
        "cases": [case.name for case in ran],
        "left_out": dict(left_out),
        "seconds": round(s, 1),
    }


def environment(command: str) -> dict[str, Any]:
    """Where and from what a record was made."""
    version = subprocess.run(
        ["compute-sanitizer", "--version"], capture_output=True, text=True, check=False
    )
    numbers = [line for line in version.stdout.splitlines() if line.startswith("Version")]
    machine = parity_report.machine(Device("cuda", interpreted=False), command)
    return machine | {"compute_sanitizer": " ".join(numbers)}


def write(path: Path, environment: dict[str, Any], tools: dict[str, Any]) -> None:
    passed = bool(tools) and not any(each["problems"] for each in tools.values())
    content = {"passed": passed, "environment": environment, "tools": tools}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def joined(
    paths: Sequence[Path], wanted: Sequence[str] = TOOLS
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The environment and the tools of several records; what none of them ran is a problem."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    environments = [each["environment"] for each in records]
    for name in SAME:
        if len({each[name] for each in environments}) > 1:
            raise click.ClickException(f"--join: the records differ in {name}")
    tools: dict[str, Any] = {}
    for tool in wanted:
        parts = [each["tools"][tool] for each in records if tool in each["tools"]]
        whole = {
            name: [entry for each in parts for entry in each[name]]
            for name in ("findings", "problems", "cases")
        }
        counts = [each["counted"] for each in parts]
        left_out = {n: why for each in parts for n, why in each["left_out"].items()}
        left_out = {n: why for n, why in left_out.items() if n not in whole["cases"]}
        tools[tool] = {
            "counted": None if None in counts else sum(counts),
            **whole,
            "left_out": left_out,
            "seconds": round(sum(each["seconds"] for each in parts), 1),
        }
        if len(set(whole["cases"])) < len(whole["cases"]):
            raise click.ClickException(f"--join: cases of {tool} are in several records")
        if missing := {case.name for case in CALLS} - {*whole["cases"], *left_out}:
            few = ", ".join(sorted(missing)[:3])
            whole["problems"].append(f"{tool}: {len(missing)} cases in no record: {few}")
    commands = "; ".join(each["command"] for each in environments)
    dates = ", ".join(dict.fromkeys(each["date"] for each in environments))
    return environments[0] | {"date": dates, "command": commands}, tools


def _join(paths: Sequence[Path], tools: Sequence[str], output: Path | None) -> None:
    where, found_by = joined(paths, tools or TOOLS)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        write(output, where, found_by)
    for tool, found in found_by.items():
        _tell(tool, found["problems"], len(found["cases"]), found["left_out"])
    sys.exit(any(found["problems"] for found in found_by.values()))


def _tell(tool: str, problems: Sequence[str], ran: int, left_out: Mapping[str, str]) -> None:
    for name, why in left_out.items():
        click.echo(f"{tool}: left out, {why}: {name}")
    click.echo("\n".join(problems) if problems else f"{tool}: clean over {ran} cases")


class LeftOut(click.ParamType):
    """``CASE=REASON``: a case that is not run."""

    name = "CASE=REASON"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        """(case, reason) of what was typed."""
        name, _, why = str(value).partition("=")
        if name not in {case.name for case in CALLS}:
            self.fail(f"there is no case {name!r}", param, ctx)
        if not why.strip():
            self.fail(f"why is {name!r} left out? CASE=REASON", param, ctx)
        return name, why


@click.command()
@click.option("--tool", "tools", multiple=True, type=click.Choice(TOOLS), help="Only this one.")
@click.option(
    "--shard",
    type=Shard(),
    default="1/1",
    show_default=True,
    help="The i-th of n shares of the cases, as i/n.",
)
@click.option(
    "--leave-out",
    multiple=True,
    type=LeftOut(),
    help="A case that is not run, say because a tool does not get through it; a record says so.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="A JSON record; beside it, as .TOOL.log, what the tools say.",
)
@click.option("--join", is_flag=True, help="Run nothing: one record of these RECORDS of shares.")
@click.option("--cases", "only_cases", is_flag=True, hidden=True)
@click.argument("records", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(
    tools: tuple[str, ...],
    shard: tuple[int, int],
    leave_out: tuple[tuple[str, str], ...],
    output: Path | None,
    join: bool,
    only_cases: bool,
    records: tuple[Path, ...],
) -> None:
    """Run the kernels under compute-sanitizer; exits with 1 on a finding nobody explained."""
    if join != bool(records):
        raise click.UsageError("--join goes with records, and they with it")
    if join:
        _join(records, tools, output)
    in_share = {case.name for case in cases(shard)}
    left_out = {name: why for name, why in leave_out if name in in_share}
    chosen = cases(shard, left_out)
    if not chosen:
        raise click.UsageError(f"--shard, --leave-out: of {len(CALLS)} cases none is left")
    if only_cases:
        run_cases(chosen)
        return
    if shutil.which("compute-sanitizer") is None:
        raise click.ClickException(
            "compute-sanitizer is not on PATH: it comes with the CUDA toolkit, in its bin/ folder"
        )
    if not torch.cuda.is_available():
        raise click.ClickException("compute-sanitizer needs a CUDA GPU, and torch sees none")
    made: dict[str, Any] = {}
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
    for tool in tools or TOOLS:
        begin = time.perf_counter()
        log = output.with_suffix(f".{tool}.log") if output else None
        report, said, status = run(tool, shard, log, left_out)
        problems = report.problems
        if status and not problems:
            problems = [f"{tool}: the cases ended with exit status {status}"]
        if problems and not log:
            click.echo(said)
        for finding in report.findings:
            if finding.accepted:
                click.echo(f"{tool}: accepted, {finding.accepted.why}: {finding.text}")
        _tell(tool, problems, len(chosen), left_out)
        made[tool] = as_data(report, problems, chosen, left_out, time.perf_counter() - begin)
    if output:
        command = shlex.join(["python", "-m", "parity_tests.sanitize", *sys.argv[1:]])
        write(output, environment(command), made)
    sys.exit(any(each["problems"] for each in made.values()))


if __name__ == "__main__":
    os.environ["TRITON_FA_AUTOTUNE_CACHE"] = "0"  # of the shipped tiles
    main()

"""python -m parity_tests.sanitize: the kernels under NVIDIA's compute-sanitizer.

Each tool runs the same few small cases in a process of its own. A finding that is not in `LEDGER`
fails, as does a tool that did not come to its end. Numbers are not judged here: parity does that.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import click
import torch

import triton_fa
from parity_tests import named
from parity_tests.cases import Case
from parity_tests.shard import Shard, part

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PREFIX = "========="
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")
# What stands where findings do and is none: the tool's name, its summary, and what it says of the
# program, whose exit status tells as much.
NO_FINDING = re.compile(r"COMPUTE-SANITIZER$|[A-Z]+ SUMMARY: |Target application returned an error")

# Paths of the kernels, by the names of cases. None has a score_mod, a mask_mod or block lists, and
# none merges results: no case of the harness does.
CASES = (
    "llama3-8b decode, page 16",
    "llama3-8b decode, dense cache",
    "qwen3-32b decode, q_len 4",
    "gpt-oss mixed batch, sinks",
    "zero lengths, paged",
    "llama3-8b prefill, varlen",
    "llama3-8b chunked prefill, append and rotary",
    "gemma2-9b prefill, softcap and window",
    "all of a cache at once",
    "left-padded batch, prefill",
    "deepseek MLA decode, 16 heads, 1 to 4 tokens",
    "llama3-8b decode, float8 cache",
    "head dim 96, mixed batch",
)


@dataclass(frozen=True)
class Accepted:
    """A finding that is none, and why."""

    tool: str
    pattern: str  # a regular expression that the finding contains
    why: str


LEDGER: tuple[Accepted, ...] = ()


@dataclass(frozen=True)
class Finding:
    """What a tool reported: a headline, and where."""

    tool: str
    text: str
    details: tuple[str, ...] = ()

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
            f"{self.tool}: {finding.text} {finding.where}".strip()
            for finding in self.findings
            if not finding.accepted
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
    found: list[tuple[str, list[str]]] = []
    counted = None
    for line in _said(output):
        text = line.strip()
        if summary := SUMMARY.search(text):
            counted = (counted or 0) + int(summary[1])
        if not text or NO_FINDING.match(text):
            continue
        if line.startswith("  "):  # more of the last one
            if found:
                found[-1][1].append(text)
        else:
            found.append((text, []))
    findings = (Finding(tool, text, tuple(details)) for text, details in found)
    return Report(tool, tuple(findings), counted)


def _said(output: str) -> Iterator[str]:
    """The tool's own lines."""
    for line in output.splitlines():
        if line.startswith(PREFIX):
            yield line.removeprefix(PREFIX)


def run(tool: str, shard: tuple[int, int] = (1, 1)) -> tuple[Report, str, int]:
    """One tool over a share of the cases: its report, all output, and the exit status."""
    sanitizer = ["compute-sanitizer", "--tool", tool, "--print-limit", "1000"]
    share = ["--shard", "{}/{}".format(*shard)]
    program = [sys.executable, "-m", "parity_tests.sanitize", "--cases", *share]
    # Each tensor an allocation of its own: between parts of a block nobody notices an overrun.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [*sanitizer, *program],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    return parse(tool, done.stdout), done.stdout, done.returncode


def cases(shard: tuple[int, int] = (1, 1)) -> list[Case]:
    """The cases of a share, small ones."""
    chosen = {case.name: case for case in named.small()}
    return [chosen[name] for name in part(CASES, shard)]


def call(case: Case, device: str) -> None:
    """Run a case in Triton; what the call allocates stays as it comes, for initcheck to see."""
    with triton_fa.strict():
        getattr(triton_fa, case.function)(**case.materialise(device), ver="triton")


@click.command()
@click.option("--tool", "tools", multiple=True, type=click.Choice(TOOLS), help="Only this one.")
@click.option(
    "--shard",
    type=Shard(),
    default="1/1",
    show_default=True,
    help="The i-th of n shares of the cases, as i/n.",
)
@click.option("--cases", "only_cases", is_flag=True, hidden=True)
def main(tools: tuple[str, ...], shard: tuple[int, int], only_cases: bool) -> None:
    """Run the kernels under compute-sanitizer; exits with 1 on a finding nobody explained."""
    chosen = cases(shard)
    if not chosen:
        raise click.UsageError(f"--shard: there are {len(CASES)} cases")
    if only_cases:
        for case in chosen:
            call(case, "cuda")
        torch.cuda.synchronize()
        return
    if shutil.which("compute-sanitizer") is None:
        raise click.ClickException(
            "compute-sanitizer is not on PATH: it comes with the CUDA toolkit, in its bin/ folder"
        )
    if not torch.cuda.is_available():
        raise click.ClickException("compute-sanitizer needs a CUDA GPU, and torch sees none")
    failed = False
    for tool in tools or TOOLS:
        report, output, status = run(tool, shard)
        problems = report.problems
        if status and not problems:
            problems = [f"{tool}: the cases ended with exit status {status}"]
        if problems:
            failed = True
            click.echo(output)
        for finding in report.findings:
            if finding.accepted:
                click.echo(f"{tool}: accepted, {finding.accepted.why}: {finding.text}")
        click.echo("\n".join(problems) if problems else f"{tool}: clean over {len(chosen)} cases")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    os.environ["TRITON_FA_AUTOTUNE_CACHE"] = "0"  # of the shipped tiles
    main()

"""``python -m tests.mutants``: put each bug into a copy of the package, and see its tests fail."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from parity_tests.shard import parse, part
from tests.mutants.kernels import MUTANTS
from tests.mutants.record import Mutant

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("bench", "parity_tests", "reference", "tests", "triton_fa", "pyproject.toml")
KERNELS = Path("triton_fa", "kernels")
TIMEOUT = 300
"""Seconds for the tests of one mutant, which take less than a minute on the package as it is."""
SURVIVED, KILLED, NEEDS_GPU = "survived", "killed", "needs a GPU"


@dataclass(frozen=True, slots=True)
class Run:
    """What pytest said of a copy."""

    passed: bool
    detail: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a mutant."""

    mutant: Mutant
    verdict: str
    by: str = ""
    seconds: float = 0.0


def mutated(mutant: Mutant, source: str) -> str:
    """The source with the bug in it."""
    if source.count(mutant.text) != 1:
        raise ValueError(
            f"{mutant.name}: its text occurs {source.count(mutant.text)} times in {mutant.file}"
        )
    return source.replace(mutant.text, mutant.replacement)


def copy(into: Path) -> None:
    """What the tests need, without what was compiled from it."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(ROOT / name, into / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, into / name)


def pytest_in(root: Path, tests: Iterable[str], timeout: float | None = TIMEOUT) -> Run:
    """Run the tests of a copy until one fails. A skipped test is not one that passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    try:
        done = subprocess.run(
            [*command, *tests],
            cwd=root,
            env=environment,
            timeout=timeout,
            capture_output=True,
            text=True,
        )
    except subprocess.TimeoutExpired:
        return Run(False, f"no end after {timeout:.0f} s", time.monotonic() - start)
    seconds = time.monotonic() - start
    if done.returncode < 0:
        return Run(False, f"crash: {signal.Signals(-done.returncode).name}", seconds)
    if done.returncode == 0 and " passed" in done.stdout and " skipped" not in done.stdout:
        return Run(True, "", seconds)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    if done.returncode not in (1, 2) or not failed:
        raise RuntimeError(f"pytest ran no test, or skipped some:\n{done.stdout[-2000:]}")
    return Run(False, failed[1], seconds)


def check_unmutated(mutants: Iterable[Mutant]) -> Run:
    """Raise unless the package as it is passes all of their tests."""
    with tempfile.TemporaryDirectory() as folder:
        copy(Path(folder))
        run = pytest_in(Path(folder), dict.fromkeys(t for m in mutants for t in m.tests), None)
    if not run.passed:
        raise RuntimeError(f"without any mutant: {run.detail}")
    return run


def is_run(mutant: Mutant) -> bool:
    return torch.cuda.is_available() or not mutant.gpu


def judge(mutant: Mutant) -> Outcome:
    """Put the mutant into a copy of its own, and run its tests there."""
    if not is_run(mutant):
        return Outcome(mutant, NEEDS_GPU)
    with tempfile.TemporaryDirectory() as folder:
        copy(Path(folder))
        path = Path(folder, KERNELS, mutant.file)
        path.write_text(mutated(mutant, path.read_text()))
        run = pytest_in(Path(folder), mutant.tests)
    return Outcome(mutant, SURVIVED if run.passed else KILLED, run.detail, run.seconds)


def line(outcome: Outcome) -> tuple[str, str, str, str]:
    """Cells of a table."""
    mutant = outcome.mutant
    return mutant.file, mutant.name, mutant.breaks, outcome.by or outcome.verdict


def markdown(outcomes: Sequence[Outcome]) -> str:
    rows = [("file", "mutant", "what it breaks", "killed by"), ("---",) * 4]
    for outcome in outcomes:
        file, name, breaks, by = line(outcome)
        killed = outcome.verdict == KILLED
        rows.append((file, f"`{name}`", breaks, f"`{by}`" if killed else f"**{by}**"))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def summary(outcomes: Sequence[Outcome]) -> str:
    counts = [
        f"{sum(o.verdict == verdict for o in outcomes)} {verdict}"
        for verdict in (KILLED, SURVIVED, NEEDS_GPU)
    ]
    blind = [o for o in outcomes if o.mutant.blind]
    return f"{len(outcomes)} mutants: {', '.join(counts)}; {len(blind)} of them blind."


def table(outcomes: Sequence[Outcome]) -> Table:
    shown = Table("file", "mutant", "what it breaks", "killed by", title=summary(outcomes))
    for outcome in outcomes:
        style = {KILLED: "", SURVIVED: "bold red", NEEDS_GPU: "dim"}[outcome.verdict]
        shown.add_row(*line(outcome), style=style)
    return shown


def joined(reports: Sequence[Path]) -> list[Outcome]:
    """The outcomes of several reports, each mutant's once."""
    found: dict[str, Outcome] = {}
    for path in reports:
        for each in json.loads(path.read_text())["mutants"]:
            mutant = Mutant(**each["mutant"] | {"tests": tuple(each["mutant"]["tests"])})
            found[mutant.name] = Outcome(**each | {"mutant": mutant})
    return list(found.values())


def write(outcomes: Sequence[Outcome], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"summary": summary(outcomes), "mutants": [asdict(o) for o in outcomes]}
    (folder / "mutants.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "mutants.md").write_text(f"{summary(outcomes)}\n\n{markdown(outcomes)}")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", default="", help="regex searched in the mutants' names")
    parser.add_argument("--jobs", type=int, default=2, help="mutants tried side by side  [2]")
    parser.add_argument(
        "--output", type=Path, default=Path("mutants-report"), help="folder for the tables"
    )
    parser.add_argument("--shard", type=parse, default=(1, 1), help="i/n: the i-th of n shares")
    parser.add_argument(
        "--join", nargs="+", type=Path, default=[], help="run nothing: one report of these reports"
    )
    options = parser.parse_args(arguments)
    console = Console()
    if options.join:
        outcomes = joined(options.join)
        console.print(table(outcomes))
        write(outcomes, options.output)
        missing = {m.name for m in MUTANTS} - {o.mutant.name for o in outcomes}
        if missing:
            console.print(f"[bold red]not in these reports: {', '.join(sorted(missing))}[/]")
        return int(bool(missing) or any(o.verdict == SURVIVED for o in outcomes))
    chosen = part([m for m in MUTANTS if re.search(options.only, m.name)], options.shard)
    if not chosen:
        parser.error(f"--only, --shard: no mutant is left of {options.only!r}")
    unmutated = check_unmutated(filter(is_run, chosen))
    console.print(f"the tests pass without any mutant ({unmutated.seconds:.0f} s)")
    outcomes = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for outcome in pool.map(judge, chosen):
            outcomes.append(outcome)
            console.print(f"{outcome.mutant.name}: {outcome.verdict} ({outcome.seconds:.0f} s)")
    console.print(table(outcomes))
    write(outcomes, options.output)
    return int(any(o.verdict == SURVIVED for o in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

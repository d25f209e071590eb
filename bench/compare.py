"""``python -m bench compare A.json B.json``: how B's times differ from A's, row by row.

A positive change is a slower B. Changes of up to 1 % are a tie.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.measure import Outcome
from bench.reading import Result, ResultError, load
from bench.report import TIE, markdown, number, table

COLUMNS = ("clean", "dirty", "chain", "schedule", "host")
HEADER = ("row", "backend", "A µs", "B µs", "change", "B is")


@dataclass(frozen=True, slots=True)
class Change:
    """One row on one backend, in both files."""

    row: str
    label: str
    before: float
    after: float | None  # None: B computed a wrong result, which is not timed

    @property
    def percent(self) -> float | None:
        return None if self.after is None else (self.after - self.before) / self.before * 100

    @property
    def verdict(self) -> str:
        if self.percent is None:
            return "WRONG"
        if abs(self.percent) <= TIE * 100:
            return "tie"
        return "slower" if self.percent > 0 else "faster"

    def fails(self, limit: float) -> bool:
        return self.percent is None or self.percent > limit

    def cells(self) -> tuple[str, ...]:
        after, change = "", ""
        if self.after is not None and self.percent is not None:
            after, change = number(self.after), f"{self.percent:+.1f} %"
        return (self.row, self.label, number(self.before), after, change, self.verdict)


def microseconds(outcome: Outcome, column: str) -> float | None:
    return outcome.host_us if column == "host" else outcome.times.best(column)


def outcomes(result: Result) -> dict[tuple[str, str], Outcome]:
    return {(m.row.name, label): o for m in result.measurements for label, o in m.outcomes.items()}


def changes(a: Result, b: Result, column: str) -> list[Change]:
    """What A timed and B timed, or got wrong; the slowest first, wrong ones before them."""
    later = outcomes(b)
    found = []
    for (row, label), outcome in outcomes(a).items():
        before = microseconds(outcome, column)
        if before is None or (row, label) not in later:
            continue
        after = microseconds(later[row, label], column)
        if after is not None or later[row, label].correct is False:
            found.append(Change(row, label, before, after))
    return sorted(found, key=lambda c: (c.percent is not None, -(c.percent or 0), c.row, c.label))


def remarks(a: Result, b: Result, column: str, compared: int) -> list[str]:
    """What makes the two files differ beside the times."""
    said = []
    for name in ("gpu", "torch", "triton"):
        of_a, of_b = (result.environment.get(name) for result in (a, b))
        if of_a != of_b:
            said.append(f"! {name}: {of_a} in A, {of_b} in B")
    for letter, result in (("A", a), ("B", b)):
        timed = sum(microseconds(o, column) is not None for o in outcomes(result).values())
        if timed > compared:
            said.append(f"! times of {letter} without a counterpart: {timed - compared}")
    return said


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__)
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument("--column", choices=COLUMNS, default="clean", help="times to compare")
    parser.add_argument(
        "--fail-above",
        type=float,
        metavar="PCT",
        help="exit status 1 if a row got slower by more than PCT percent, or wrong",
    )
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    try:
        a, b = load(options.before), load(options.after)
    except ResultError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    found = changes(a, b, options.column)
    if not found:
        sys.stderr.write(f"{a.path} and {b.path} have no {options.column} times in common\n")
        return 2
    shown = (markdown if options.markdown else table)(HEADER, [c.cells() for c in found])
    timed = sum(c.after is not None for c in found)
    sys.stdout.write("\n".join([shown, *remarks(a, b, options.column, timed)]) + "\n")
    limit = options.fail_above
    return int(limit is not None and any(c.fails(limit) for c in found))

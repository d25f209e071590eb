"""python -m parity_tests.rejudge REPORT.json: judge a recorded run by today's known differences.

A difference of a binary is often understood only after the run that found it, and the GPU is gone
by then. This looks the recorded failures up in `known_differences.py` again, for the chip that the
report names, and writes a second report beside the first, `NAME.judged-again.json` and `.html`. The
recorded run stays as it is, and a failure of the project's own backends is never excused. The
verdict of the second report says that nothing was run for it. It does not replace a new run.
"""

import datetime
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import click

from parity_tests import known_differences
from parity_tests.cases import Case
from parity_tests.known_differences import BUDGET, known
from parity_tests.report import render
from parity_tests.runners import KNOWN, OWN

HOPPER = re.compile(r"\b(H100|H200|H20|H800|GH200)\b")


@click.command()
@click.argument("report", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(report: Path) -> None:
    """Judge REPORT (a parity.json) again, into a second report beside it."""
    data = json.loads(report.read_text(encoding="utf-8"))
    changed = judge_again(data)
    second = report.with_suffix(".judged-again.json")
    second.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    second.with_suffix(".html").write_text(render(data), encoding="utf-8")
    click.echo(f"{changed} failures are known differences by now; {data['verdict']}")
    sys.exit(0 if data["passed"] else 1)


def judge_again(data: dict[str, Any]) -> int:
    """Change the verdicts of `data`, a report's plain values; how many changed."""
    hopper = bool(HOPPER.search(data["environment"]["gpu"] or ""))
    changed: list[str] = []
    with mock.patch.object(known_differences, "_on_hopper", return_value=hopper):
        for row in data["outcomes"]:
            if row["failure"] and row["ver"] not in {str(ver) for ver in OWN}:
                changed += _excuse(row)
    if not changed:
        return 0
    rows = data["outcomes"]
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        counts.setdefault(row["ver"], Counter())[row["verdict"]] += 1
    data["tally"] = {ver: dict(count) for ver, count in counts.items()}
    failures = sum(row["failure"] for row in rows)
    compared = sum(row["measures"]["max_error"] is not None for row in rows)
    data["passed"] = failures == 0
    data["verdict"] = (
        f"FAILED: {failures} of {len(rows)} outcomes"
        if failures
        else f"judged again, not run again: {compared} comparisons within budget, "
        f"{len(changed)} that failed when run are known differences by now"
    )
    when = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    found = ", ".join(f"{count} x {name}" for name, count in Counter(changed).items())
    data["environment"]["judged again"] = f"{when}: {found}, failed when run"
    data["known_differences"] = [
        {"id": d.id, "kind": d.kind, "reason": d.reason, "where": d.where}
        for d in known_differences.DIFFERENCES
    ]
    return len(changed)


def _excuse(row: dict[str, Any]) -> list[str]:
    """Make one failed outcome a known difference, if it is one now; its differences."""
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in row["fields"].items()}
    entries = [e for e in known(Case(**fields), int(row["ver"])) if e.kind != BUDGET]
    if not entries:
        return []
    row["verdict"], row["failure"] = KNOWN, False
    row["differences"] = [*row["differences"], *(entry.id for entry in entries)]
    row["reasons"] = [*(f"{e.kind}: {e.reason}" for e in entries), *row["reasons"]]
    return row["differences"]


if __name__ == "__main__":
    main()

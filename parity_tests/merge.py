"""Reports of shares of a run, or of several runs, joined into one.

Only what was measured with the same sources, versions and GPU is joined. A case and backend
that several reports have count once, by the worst outcome. A share that is missing fails the whole.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from parity_tests import report
from parity_tests.cases import Case
from parity_tests.device import Device
from parity_tests.runners import FAILED, KNOWN, Outcome, Ver
from parity_tests.suite import Options, Run

# What numbers depend on, of a report's environment.
SAME = ("interpreted", "gpu", "torch", "triton", "triton_fa", "commit", "source_digest")


class CannotJoinError(Exception):
    """These reports say nothing together."""


def merge(paths: list[Path], command: str, strict_known: bool = True) -> dict[str, Any]:
    """The plain values of one report for all of these files."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    environments = [each.get("environment", {}) for each in reports]
    for path, each in zip(paths, environments, strict=True):
        if "source_digest" not in each:
            raise CannotJoinError(
                f"{path} does not say of which sources it is: made before merging"
            )
    for path, data in zip(paths, reports, strict=True):
        if data.get("left_out"):
            raise CannotJoinError(f"{path} is a summary: {data['left_out']} outcomes were left out")
    for name in SAME:
        _one({path: each[name] for path, each in zip(paths, environments, strict=True)}, name)
    backends: dict[str, str] = {}
    for ver in {ver: None for each in environments for ver in each["backends"]}:
        known = {p: e["backends"].get(ver) for p, e in zip(paths, environments, strict=True)}
        backends[ver] = _one({p: what for p, what in known.items() if what}, f"backend {ver}")

    shares = [_options(each) for data in reports for each in data["shares"]]
    outcomes, repeated = _distinct(
        report.outcome_of(row) for data in reports for row in data["outcomes"]
    )
    missing = _missing(shares)
    options = replace(
        shares[0],
        shard=(1, 1),
        require_peers=any(each.require_peers for each in shares),
        strict_known=strict_known,
    )
    stopped = [data["gave_up"] for data in reports if data["gave_up"]]
    run = Run(options, outcomes=outcomes, gave_up="; ".join([*missing, *stopped]))
    environment = _environment(environments, command) | {"backends": backends}
    whole = (replace(each, shard=(1, 1)) for each in shares)
    said = [f"{len(shares)} runs or shares of runs.", *missing, *repeated]
    said += dict.fromkeys(sentence for each in whole for sentence in report.asked(each))
    interpreter = "1" if options.device.interpreted else "0"
    with mock.patch.dict(os.environ, TRITON_INTERPRET=interpreter):  # known differences ask for it
        return report.joined(run, environment, said, shares)


def summarise(data: dict[str, Any]) -> None:
    """Leave out the generated cases' outcomes that neither failed nor are a known difference.

    What is counted over all outcomes stays as it is. Such a report is small enough to be kept.
    """
    rows = [r for r in data["outcomes"] if r["named"] or r["verdict"] in (FAILED, KNOWN)]
    data["left_out"] = len(data["outcomes"]) - len(rows)
    data["limits"].append(f"A summary: {data['left_out']} outcomes are counted and not listed.")
    data["outcomes"] = rows


def _one(values: dict[Path, Any], name: str) -> Any:
    """What all of them are; an error if they are not the same."""
    if len(set(values.values())) > 1:
        said = ", ".join(f"{value} in {path}" for path, value in values.items())
        raise CannotJoinError(f"the reports differ in {name}: {said}")
    return next(iter(values.values()))


def _options(fields: dict[str, Any]) -> Options:
    """The options of one share, read from JSON."""
    return Options(
        **fields
        | {
            "device": Device(**fields["device"]),
            "vers": tuple(fields["vers"]),
            "shard": tuple(fields["shard"]),
        }
    )


def _distinct(outcomes: Iterable[Outcome]) -> tuple[list[Outcome], list[str]]:
    """One outcome of each pair of case and backend, the worst, and a sentence on the others."""
    found: dict[tuple[Case, Ver], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        found[outcome.case, outcome.ver].append(outcome)
    kept = [max(same, key=lambda o: (o.is_failure, o.ran)) for same in found.values()]
    several = [same for same in found.values() if len(same) > 1]
    differ = sum(len({outcome.verdict for outcome in same}) > 1 for same in several)
    said = f"{len(several)} outcomes were in several reports and count once, {differ} of them with"
    return kept, [f"{said} different verdicts: the worst counts."] if several else []


def _missing(shares: list[Options]) -> list[str]:
    """Shares that were cut and are not here."""
    found: dict[tuple[Options, int], set[int]] = defaultdict(set)
    for each in shares:
        index, count = each.shard
        found[replace(each, shard=(1, 1), device=Device("", each.device.interpreted)), count].add(
            index
        )
    return [
        f"share {index} of {count} with seed {options.seed} is missing"
        for (options, count), indices in found.items()
        for index in range(1, count + 1)
        if index not in indices
    ]


def _environment(environments: list[dict[str, Any]], command: str) -> dict[str, Any]:
    """That of the first, with all values of what may differ."""
    joint = {
        name: value if len(values) == 1 else ", ".join(map(str, values))
        for name, value in environments[0].items()
        if name != "backends"
        for values in [list(dict.fromkeys(each.get(name) for each in environments))]
    }
    commands = "; ".join(each["command"] for each in environments)
    return joint | {"command": command, "joined commands": commands}

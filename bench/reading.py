"""Result files read back: those of ``python -m bench`` and of pytest-benchmark, and copied ones."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bench.environment import kernel_digest
from bench.measure import Measurement, Outcome
from bench.timing import Times
from bench.variants import BASELINE
from bench.workloads import find

HOST_GROUP = "host cost, "  # before the row in the group names of test_overhead_bench.py
TEXTS = ("against", "skipped", "note")


class ResultError(ValueError):
    """A file that is no result; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Block:
    """Numbers that somebody copied, in the unit that the text says."""

    what: str
    commit: str
    rows: dict[str, dict[str, float]]  # row name to column to number


@dataclass(frozen=True, slots=True)
class Result:
    """One file."""

    path: Path
    environment: dict[str, Any]
    measurements: tuple[Measurement, ...] = ()
    blocks: tuple[Block, ...] = ()
    remarks: tuple[str, ...] = ()  # what has to be known before the numbers are read

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(label for m in self.measurements for label in m.outcomes))


def load(path: Path) -> Result:
    """Read one file of any of the three kinds.

    Raises:
        ResultError: the file is missing, malformed, of another kind, or holds no row.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultError(f"{path}: {error}") from error
    reader = kind(content)
    if reader is None:
        raise ResultError(f"{path}: neither a result of `python -m bench` nor of pytest-benchmark")
    try:
        result = reader(path, content)
    except KeyError as error:
        raise ResultError(f"{path}: malformed: {error} is missing or no row's name") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ResultError(f"{path}: malformed: {error}") from error
    if not (result.measurements or result.blocks):
        raise ResultError(f"{path}: holds no row")
    return result


def kind(content: Any) -> Callable[[Path, dict[str, Any]], Result] | None:
    if not isinstance(content, dict):
        return None
    readers = {
        ("environment", "rows"): measured,
        ("environment", "runs"): copied,
        ("benchmarks", "machine_info"): benchmarked,
    }
    return next((read for keys, read in readers.items() if content.keys() >= {*keys}), None)


def measured(path: Path, content: dict[str, Any]) -> Result:
    """What ``python -m bench --output`` wrote."""
    where, rows = content["environment"], content["rows"]
    measurements = tuple(map(measurement, rows))
    remarks = digest_remarks(where)
    asked = content.get("rows_asked", len(rows))
    if asked > len(rows):
        remarks.append(f"The run ended early: {len(rows)} of {asked} rows.")
    labels = {label for m in measurements for label in m.outcomes}
    if labels == {BASELINE}:
        remarks.append("FlashAttention-3 alone: no kernel of this package was measured.")
    return Result(path, where, measurements, remarks=tuple(remarks))


def digest_remarks(where: dict[str, Any]) -> list[str]:
    if where["kernel_digest"] == kernel_digest():
        return []
    return ["Measured beside other kernel sources than those of this checkout."]


def measurement(row: dict[str, Any]) -> Measurement:
    """The inverse of `measure.as_json`, for rows of today and of earlier formats."""
    outcomes = {label: outcome(found) for label, found in row.get("variants", {}).items()}
    for label, value in row.get("host_us", {}).items():
        reason = {"skipped": value} if isinstance(value, str) else {"host_us": value}
        outcomes[label] = outcome(reason)
    check_bursts(row["name"], outcomes)
    size, work = (int(number(row.get(key, 0))) for key in ("bytes", "flops"))
    return Measurement(find(row["name"]), outcomes, size, work)


def outcome(found: dict[str, Any]) -> Outcome:
    """One backend on one row; what the file does not hold stays empty."""
    times = {f.name: microseconds(found.get(f"{f.name}_us")) for f in fields(Times)}
    read: dict[str, Any] = {}
    for name in {f.name for f in fields(Outcome)} & found.keys():
        value = found[name]
        read[name] = value if value is None or name in (*TEXTS, "correct") else number(value)
    return Outcome(times=Times(**times), **read)


def microseconds(found: Any) -> tuple[float, ...]:
    """Burst medians; pytest-benchmark's files hold one number."""
    bursts = found if isinstance(found, list) else [] if found is None else [found]
    times = tuple(float(number(us)) for us in bursts)
    if not all(0 < us < math.inf for us in times):
        raise ValueError(f"times are not positive: {found}")
    return times


def number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"expected a number, got {value!r}")
    return value


def check_bursts(name: str, outcomes: dict[str, Outcome]) -> None:
    """Ratios are taken within bursts, so every backend has as many."""
    for field in fields(Times):
        counts = {len(getattr(o.times, field.name)) for o in outcomes.values()} - {0}
        if len(counts) > 1:
            raise ValueError(f"{name}: {field.name} has unequal numbers of bursts: {counts}")


def benchmarked(path: Path, content: dict[str, Any]) -> Result:
    """What pytest-benchmark wrote: one benchmark for each row and backend."""
    rows: dict[str, dict[str, Any]] = {}
    for benchmark in content["benchmarks"]:
        extra = benchmark["extra_info"]
        name = benchmark["group"].removeprefix(HOST_GROUP)
        row = rows.setdefault(name, {"name": name, "variants": {}})
        label = extra["variant"] if "variant" in extra else benchmark["params"]["label"]
        row["variants"].setdefault(label, {}).update(extra)
        row |= {key: extra[key] for key in ("bytes", "flops") if key in extra}
    where = content["machine_info"]["triton_fa"]
    remarks = [
        *digest_remarks(where),
        "Made by pytest-benchmark: backends were timed one after the other, not interleaved.",
    ]
    return Result(path, where, tuple(map(measurement, rows.values())), remarks=tuple(remarks))


def copied(path: Path, content: dict[str, Any]) -> Result:
    """Numbers copied by hand, in blocks."""
    blocks = tuple(
        Block(
            run["what"],
            run["commit"],
            {name: {k: number(v) for k, v in row.items()} for name, row in run["rows"].items()},
        )
        for run in content["runs"]
    )
    where = content["environment"] | {"command": content["command"]}
    seeds = sorted({run["seed"] for run in content["runs"] if "seed" in run})
    where |= {"seed": ", ".join(map(str, seeds))} if seeds else {}
    return Result(path, where, blocks=blocks, remarks=(content["note"],))

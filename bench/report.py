"""Measurements as a table in plain text, and the averages below it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from statistics import geometric_mean

from bench.measure import Measurement
from bench.timing import Times, ratio
from bench.variants import BASELINE

SMALL_BYTES = 150e6
TIE = 0.01


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns padded to their widest cell; the first is text, the others numbers."""
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The same as a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def microseconds(times: Times) -> str:
    """clean/dirty/chain, as far as there is one."""
    columns = [times.best(c) for c in ("clean", "dirty", "chain")]
    return "/".join(number(us) for us in columns if us is not None) or "-"


def number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def rate(measurement: Measurement, us: float | None) -> str:
    """TB/s of mandatory bytes where the row is about memory, TFLOP/s where it is about products."""
    if (terabytes := measurement.terabytes(us)) is None:
        return "-"
    if measurement.row.phase == "prefill":
        return f"{measurement.teraflops(us):.0f} TF"
    return f"{terabytes:.2f} TB"


def ratio_to(measurement: Measurement, label: str, column: str, base: str) -> float | None:
    outcomes = measurement.outcomes
    if base not in outcomes or label not in outcomes:
        return None
    of_base, of_label = (getattr(outcomes[x].times, column) for x in (base, label))
    return ratio(of_base, of_label)


def by_name(measurements: Iterable[Measurement]) -> dict[str, Measurement]:
    return {m.row.name: m for m in measurements}


def plain_us(m: Measurement, label: str, rows: Mapping[str, Measurement]) -> float | None:
    """Clean µs of the row that `m` adds something to, on the same backend in the same run."""
    plain = rows.get(m.row.plain)
    return plain.outcomes[label].times.best("clean") if plain and label in plain.outcomes else None


def added_us(m: Measurement, label: str, rows: Mapping[str, Measurement]) -> float | None:
    """Clean µs that the row takes longer than its plain one."""
    plain, own = plain_us(m, label, rows), m.outcomes[label].times.best("clean")
    return None if plain is None or own is None else own - plain


def over_plain(m: Measurement, label: str, rows: Mapping[str, Measurement]) -> float | None:
    """The plain row's clean time over the row's: above 1 is faster than without what it adds."""
    plain, own = plain_us(m, label, rows), m.outcomes[label].times.best("clean")
    return None if plain is None or own is None else plain / own


def status(measurement: Measurement, label: str) -> str:
    outcome = measurement.outcomes[label]
    if outcome.skipped:
        return "skipped"
    if outcome.correct is False:
        return f"WRONG {outcome.deviation:.3g}"
    return "" if outcome.deviation is None else f"{outcome.deviation:.1e}"


def summary(
    measurements: Sequence[Measurement], labels: Sequence[str], base: str = BASELINE
) -> str:
    """The table of a run. µs are clean/dirty/chain; `x` columns are base time over ours."""
    compared = [label for label in labels if label != base and base in labels]
    header = ["row", "MB"]
    for label in labels:
        header += [f"{label} µs", "rate", "dev"]
    header += [f"x {label}{kind}" for label in compared for kind in ("", " chain")]
    rows = []
    for m in measurements:
        line = [m.row.name, f"{m.bytes / 1e6:.1f}"]
        for label in labels:
            times = m.outcomes[label].times
            line += [microseconds(times), rate(m, times.best("clean")), status(m, label)]
        for label in compared:
            for column in ("clean", "chain"):
                value = ratio_to(m, label, column, base)
                line.append("-" if value is None else f"{value:.2f}")
        rows.append(line)
    return "\n".join(
        [
            table(header, rows),
            *averages(measurements, compared, base),
            *step_launches(measurements),
            *additions(measurements),
            *remarks(measurements),
        ]
    )


def averages(
    measurements: Sequence[Measurement], compared: Sequence[str], base: str
) -> Iterable[str]:
    groups = {
        "all rows": list(measurements),
        "rows up to 150 MB": [m for m in measurements if m.bytes <= SMALL_BYTES],
    }
    for label, column, (group, members) in product(compared, ("clean", "chain"), groups.items()):
        found = [ratio_to(m, label, column, base) for m in members]
        values = [v for v in found if v is not None and math.isfinite(v)]
        if values:
            mean, worst = geometric_mean(values), min(values)
            yield (
                f"{label} over {base}, {column}, {group}: geometric mean {mean:.3f}, "
                f"least {worst:.2f}, {len(values)} rows ({tally(values)})"
            )


def tally(ratios: Sequence[float]) -> str:
    """Wins, ties and losses, where differences of up to 1 % are a tie."""
    faster = sum(r > 1 + TIE for r in ratios)
    slower = sum(r < 1 - TIE for r in ratios)
    return f"{faster} faster, {len(ratios) - faster - slower} ties, {slower} slower"


def step_launches(measurements: Sequence[Measurement]) -> Iterable[str]:
    """What a layer of a step launches, and what the schedule does that its layers share."""
    for m in measurements:
        if m.row.phase == "step":
            for label, o in m.outcomes.items():
                if o.launches is not None:
                    yield (
                        f"{m.row.name}, {label}: {o.launches} launches a layer, "
                        f"{o.plan_launches} for the shared schedule"
                    )


def additions(measurements: Sequence[Measurement]) -> Iterable[str]:
    """What a row costs beyond the plain one of the same run."""
    rows = by_name(measurements)
    lines = [(m, label) for m in measurements for label in m.outcomes]
    for m, label in lines:
        added, times = added_us(m, label, rows), over_plain(m, label, rows)
        if added is not None and times is not None:
            yield f"{m.row.name}, {label}: {added:+.2f} µs, {times:.2f} x {m.row.plain}"


def remarks(measurements: Sequence[Measurement]) -> Iterable[str]:
    """Why a variant is missing or not as the rule says, once per reason, with how many rows."""
    seen: dict[str, list[str]] = {}
    for m in measurements:
        for label, outcome in m.outcomes.items():
            for text in (outcome.skipped, outcome.note):
                if text:
                    seen.setdefault(f"{label}: {text}", []).append(m.row.name)
    for text, names in seen.items():
        where = f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
        yield f"! {text} ({where})"

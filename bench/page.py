"""``python -m bench report RESULT.json...``: result files as one HTML page and as Markdown.

The page stands alone: nothing is loaded, nothing runs. What a file does not hold is an empty cell.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from bench import plots
from bench.measure import Measurement, Outcome
from bench.reading import Block, Result, ResultError, load
from bench.report import added_us, averages, by_name, markdown, number, over_plain, ratio_to
from bench.roofs import ROOFS, Roof
from bench.timing import ratio
from bench.variants import BASELINE

HERE = Path(__file__).resolve().parent
NAMES = ("index.html", "report.md")
Value = Callable[[Measurement, str], float | None]


@dataclass(frozen=True, slots=True)
class Table:
    """Text of a table, for both forms of the report."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def markdown(self) -> str:
        return markdown(self.header, self.rows)


@dataclass(frozen=True, slots=True)
class Section:
    """What the report says of one file."""

    title: str
    remarks: Sequence[str]
    averages: Sequence[str]
    plots: Sequence[plots.Plot]
    tables: Sequence[Table]


# ---------------------------------------------------------------- measured rows


def of_outcome(name: str) -> Value:
    def value(m: Measurement, label: str) -> float | None:
        found: float | None = getattr(m.outcomes[label], name)
        return found

    return value


def of_times(column: str) -> Value:
    return lambda m, label: m.outcomes[label].times.best(column)


def over_baseline(column: str) -> Value:
    return lambda m, label: None if label == BASELINE else ratio_to(m, label, column, BASELINE)


def clean(m: Measurement, label: str) -> float | None:
    return m.outcomes[label].times.best("clean")


def amount(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def columns(
    roof: Roof | None, rows: Mapping[str, Measurement]
) -> dict[str, tuple[Value, Callable[[float], str]]]:
    """Heading to what stands below it and how it is written; `rows` are those of the file."""
    return {
        "MB": (lambda m, label: m.bytes / 1e6 or None, amount),
        "GFLOP": (lambda m, label: m.flops / 1e9 or None, amount),
        "µs clean": (of_times("clean"), number),
        "µs dirty": (of_times("dirty"), number),
        "µs chain": (of_times("chain"), number),
        "TB/s": (lambda m, label: m.terabytes(clean(m, label)) or None, "{:.2f}".format),
        "TFLOP/s": (lambda m, label: m.teraflops(clean(m, label)) or None, number),
        "of roof": (
            lambda m, label: roof.fraction(m, clean(m, label)) if roof else None,
            "{:.2f}".format,
        ),
        "added µs": (lambda m, label: added_us(m, label, rows), "{:+.2f}".format),
        "x plain": (lambda m, label: over_plain(m, label, rows), "{:.2f}".format),
        "x FA3": (over_baseline("clean"), "{:.2f}".format),
        "x FA3 chain": (over_baseline("chain"), "{:.2f}".format),
        "x FA3 host": (host_ratio, "{:.2f}".format),
        "host µs": (of_outcome("host_us"), number),
        "schedule µs": (of_times("schedule"), number),
        "workspace bytes": (of_outcome("workspace_bytes"), "{:.0f}".format),
        "first call s": (of_outcome("first_call_s"), "{:.2f}".format),
        "of it compiling s": (of_outcome("compile_s"), "{:.2f}".format),
        "launches": (of_outcome("launches"), "{:.0f}".format),
        "deviation": (of_outcome("deviation"), "{:.1e}".format),
    }


def host_ratio(m: Measurement, label: str) -> float | None:
    base = m.outcomes.get(BASELINE, Outcome()).host_us
    ours = m.outcomes[label].host_us
    if base is None or ours is None or label == BASELINE:
        return None
    return ratio((base,), (ours,))


def remark(outcome: Outcome) -> str:
    """What became of a backend beside its numbers; empty where all is well."""
    if outcome.correct is False:
        return f"WRONG: deviates from {outcome.against}, not timed"
    return f"skipped: {outcome.skipped}" if outcome.skipped else outcome.note


def family_tables(result: Result, roof: Roof | None) -> list[Table]:
    """A table for each family; columns that the file has no number for are left out."""
    lines = [(m, label) for m in result.measurements for label in m.outcomes]
    wanted = {
        heading: (value, text)
        for heading, (value, text) in columns(roof, by_name(result.measurements)).items()
        if any(value(m, label) is not None for m, label in lines)
    }
    said = any(remark(m.outcomes[label]) for m, label in lines)
    header = ["row", "backend", *(["remark"] if said else []), *wanted]
    families: dict[str, list[Sequence[str]]] = {}
    for m, label in lines:
        found = [(value(m, label), text) for value, text in wanted.values()]
        cells = ["" if value is None else text(value) for value, text in found]
        words = [remark(m.outcomes[label])] if said else []
        families.setdefault(m.row.family, []).append([m.row.name, label, *words, *cells])
    return [Table(family, header, rows) for family, rows in families.items()]


def ratios(result: Result, label: str) -> dict[str, dict[str, float]]:
    """Family to row to FA3's clean time over this backend's."""
    found: dict[str, dict[str, float]] = {}
    for m in result.measurements:
        value = ratio_to(m, label, "clean", BASELINE)
        if value is not None:
            found.setdefault(m.row.family, {})[m.row.name] = value
    return found


def compared(result: Result) -> list[str]:
    """The backends that stand beside FA3."""
    labels = result.labels
    return [label for label in labels if label != BASELINE] if BASELINE in labels else []


def measured_plots(name: str, result: Result, roof: Roof | None) -> Iterable[plots.Plot]:
    for label in compared(result):
        if groups := ratios(result, label):
            title = f"FA3's time over that of {label}"
            yield plots.heat_map(f"{name}-{label}", title, groups)
    yield from plots.speed(name, result.measurements)
    if roof:
        yield from plots.roofline(name, result.measurements, roof)


# ---------------------------------------------------------------- copied rows


def block_table(index: int, block: Block) -> Table:
    header = list(dict.fromkeys(column for row in block.rows.values() for column in row))
    rows = [
        [name, *(f"{row[column]:g}" if column in row else "" for column in header)]
        for name, row in block.rows.items()
    ]
    caption = f"Block {index}: {block.what}. Commit: {block.commit}."
    return Table(caption, ["row", *header], rows)


def copied_plots(name: str, blocks: Sequence[Block]) -> Iterable[plots.Plot]:
    groups = {
        f"block {index}": {
            row: found["ratio"] for row, found in block.rows.items() if "ratio" in found
        }
        for index, block in enumerate(blocks, 1)
    }
    if groups := {block: found for block, found in groups.items() if found}:
        yield plots.heat_map(name, "Copied ratios to FA3", groups)


# ---------------------------------------------------------------- the report


def section(index: int, result: Result) -> Section:
    roof = ROOFS.get(str(result.environment.get("gpu")))
    name = f"plot{index}"
    drawn = [*measured_plots(name, result, roof), *copied_plots(name, result.blocks)]
    remarks = list(result.remarks)
    if roof and result.measurements:
        remarks.append(
            f"Of roof: the larger share of {roof.tb_per_s} TB/s and {roof.tflop_per_s:g} TFLOP/s "
            f"({roof.source}); above 1 the row beat that constant."
        )
    if wrong := sum(len(m.failed) for m in result.measurements):
        remarks.append(f"Wrong results, which are not timed: {wrong}.")
    return Section(
        title=f"{result.path.absolute().parent.name}/{result.path.name}",
        remarks=remarks,
        averages=list(averages(result.measurements, compared(result), BASELINE)),
        plots=drawn,
        tables=[
            environment_table(result),
            *family_tables(result, roof),
            *(block_table(i, block) for i, block in enumerate(result.blocks, 1)),
        ],
    )


def environment_table(result: Result) -> Table:
    shown = result.environment
    if seeds := sorted({m.row.seed for m in result.measurements}):
        shown = shown | {"seed of the rows": ", ".join(map(str, seeds))}
    rows = [[name, flat(value)] for name, value in sorted(shown.items()) if value]
    return Table("Environment", ["what", "value"], rows)


def flat(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {item}" for key, item in value.items())
    return str(value)


def as_markdown(sections: Iterable[Section]) -> str:
    parts = ["# Benchmark report"]
    for s in sections:
        parts.append(f"## {s.title}")
        parts.append("\n".join(f"- {line}" for line in (*s.remarks, *s.averages)))
        for table in s.tables:
            parts += [f"### {table.caption}", table.markdown]
    return "\n\n".join(filter(None, parts)) + "\n"


def as_html(sections: Sequence[Section]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup  # made by plots.py, which escapes
    return environment.get_template("report.html.j2").render(sections=sections)


def write(results: Sequence[Result], folder: Path) -> list[Path]:
    """Write the page and the Markdown, and return their paths."""
    sections = [section(index, result) for index, result in enumerate(results, 1)]
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in NAMES]
    for path, text in zip(paths, (as_html(sections), as_markdown(sections)), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench report", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
    parser.add_argument("--output", type=Path, default=Path("bench-report"), metavar="DIR")
    options = parser.parse_args(arguments)
    try:
        results = [load(path) for path in options.results]
    except ResultError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    for path in write(results, options.output):
        sys.stdout.write(f"{path}\n")
    return 0

"""Reports and comparisons of benchmark results, and the time of a first call, on the CPU."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

pytest.importorskip("matplotlib", reason="reports need the `bench` extra")
pytest.importorskip("jinja2", reason="reports need the `bench` extra")

from bench import compare, first_call, page, plots, reading
from bench.__main__ import main, write
from bench.counters import flops, mandatory_bytes
from bench.measure import Measurement, Outcome, as_json
from bench.reading import ResultError, load
from bench.roofs import ROOFS
from bench.timing import Times
from bench.workloads import find

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
FA3 = sorted((RESULTS / "earlier").glob("*.json"))
COPIED = RESULTS / "exploratory" / "2026-11-20-h200.json"
COMMITTED = RESULTS / "2026-11-20-h200.html"
"""The page of all result files beside it."""
OTHER_KERNELS = "Measured beside other kernel sources than those of this checkout."
SMALL, LARGE, CHUNK = "1x1024.32/8x128.p16", "16x8192.32/8x128.p16", "16x1024.32/8x128"
WHERE = {
    "gpu": "NVIDIA H200",
    "kernel_digest": reading.kernel_digest(),
    "commit": "<b>0123456</b>",
    "command": "python -m bench decode",
    "date": "2026-01-02",
    "torch": "2.11.0",
    "triton": "3.6.0",
}


def measured(name: str, **us: float) -> Measurement:
    """A row on some backends, with two bursts of every time that is given."""
    row = find(name)
    outcomes = {
        label.strip("_"): Outcome(
            Times(clean=(t, t), dirty=(t + 1, t + 1)), deviation=0.001, against="3", correct=True
        )
        for label, t in us.items()
    }
    return Measurement(row, outcomes, mandatory_bytes(row), flops(row))


def file(path: Path, *measurements: Measurement, asked: int = 0) -> Path:
    write(path, WHERE, [as_json(m) for m in measurements], asked or len(measurements))
    return path


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A run with a win, a loss, a tie, a wrong row, a skipped backend and every metric once."""
    rows = [measured(SMALL, triton=10, _3=20), measured(LARGE, triton=150, _3=130)]
    rows += [
        measured(CHUNK, triton=1000.5, _3=1000),
        measured("8x512.32/8x128.p16", triton=1, _3=9),
    ]
    wrong = rows[3].outcomes["triton"]
    wrong.correct, wrong.deviation, wrong.times = False, 0.25, Times()
    rows[0].outcomes["4"] = Outcome(skipped="<not> installed")
    first = rows[0].outcomes["triton"]
    first.times = Times((10, 10), (12, 12), (5, 5), schedule=(3.25, 3.25))
    first.workspace_bytes, first.first_call_s, first.compile_s = 123456, 4.5, 3.75
    first.launches, first.note = 2, "no metadata: a note"
    return file(tmp_path / "full.json", *rows, asked=6)


class Page(HTMLParser):
    """Every attribute, style, script and table cell of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.styles = ""
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._open = tag
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        assert tag not in ("script", "link", "img", "iframe", "object", "base")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in ("th", "td"):
            self.tables[-1][-1][-1] += data
        if self._open == "style":
            self.styles += data

    @property
    def measured(self) -> list[dict[str, str]]:
        """The lines of the tables of rows, by heading."""
        headed = [table for table in self.tables if "backend" in table[0]]
        return [dict(zip(t[0], line, strict=True)) for t in headed for line in t[1:]]


def html(*paths: Path, to: Path) -> str:
    return page.write([load(path) for path in paths], to)[0].read_text(encoding="utf-8")


# ---------------------------------------------------------------- the page


def test_the_page_refers_to_nothing_outside(full: Path, tmp_path: Path) -> None:
    text = html(full, *FA3, COPIED, to=tmp_path / "report")
    found = Page(text)
    ids = {value for _, name, value in found.attributes if name == "id"}
    references = [v for _, name, v in found.attributes if name in ("href", "src", "xlink:href")]
    references += re.findall(r"url\(([^)]*)\)", text)
    assert references
    assert all(r.startswith("#") and r[1:] in ids for r in references)
    assert not [name for _, name, _ in found.attributes if name.startswith(("on", "xmlns"))]
    assert "://" not in text
    assert "@import" not in found.styles
    count = sum(name == "id" for _, name, _ in found.attributes)
    assert count == len(ids), "an id stands twice"


def test_the_page_has_text_alternatives_and_two_schemes(full: Path, tmp_path: Path) -> None:
    text = html(full, to=tmp_path)
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(svgs) == 4  # ratios, TB/s, TFLOP/s, roofline
    for svg in svgs:
        root = ElementTree.fromstring(svg)
        assert root.get("role") == "img"
        title = root[0]
        assert title.tag == "title"
        assert title.text
        assert root.get("aria-labelledby") == title.get("id")
        assert plots.INK not in svg
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert '<html lang="en">' in text


def test_values_of_a_file_are_escaped(full: Path, tmp_path: Path) -> None:
    text = html(full, to=tmp_path)
    assert "<b>0123456</b>" not in text
    assert "&lt;b&gt;0123456&lt;/b&gt;" in text
    assert "skipped: &lt;not&gt; installed" in text


def expectations(path: Path) -> dict[tuple[str, str], dict[str, float | None]]:
    """What may stand in a table of measured rows, straight from the JSON."""
    content = json.loads(path.read_text())
    roof = ROOFS[content["environment"]["gpu"]]
    rows = {row["name"]: row for row in content["rows"]}
    expected = {}
    for name, row in rows.items():
        variants = row.get("variants", {})
        plain = rows.get(find(name).plain, {}).get("variants", {})
        layers = find(name).layers if row.get("phase") != "metadata" else 0
        for label, v in variants.items():
            us = {c: median(v.get(f"{c}_us")) for c in ("clean", "dirty", "chain", "schedule")}
            clean, plain_us = us["clean"], median(plain.get(label, {}).get("clean_us"))
            own = layers / clean / 1e6 if clean else 0.0
            rates = (row["bytes"] * own, row["flops"] * own)
            near = max(rates[0] / roof.tb_per_s, rates[1] / roof.tflop_per_s)
            base = variants.get("3", {}) if label != "3" else {}
            expected[name, label] = {
                "MB": row["bytes"] / 1e6 or None,
                "GFLOP": row["flops"] / 1e9 or None,
                **{f"µs {c}": us[c] for c in ("clean", "dirty", "chain")},
                "schedule µs": us["schedule"],
                "TB/s": rates[0] or None,
                "TFLOP/s": rates[1] or None,
                "of roof": near if all(rates) else None,
                "added µs": clean - plain_us if clean and plain_us else None,
                "x plain": plain_us / clean if clean and plain_us else None,
                "x FA3": quotient(base.get("clean_us"), v.get("clean_us")),
                "x FA3 chain": quotient(base.get("chain_us"), v.get("chain_us")),
                "workspace bytes": v.get("workspace_bytes"),
                "first call s": v.get("first_call_s"),
                "of it compiling s": v.get("compile_s"),
                "launches": v.get("launches"),
                "deviation": v.get("deviation"),
            }
        host = row.get("host_us", {})
        for label, us in host.items():
            over = None if label == "3" else host["3"] / us
            expected[name, label] = {"host µs": us, "x FA3 host": over}
    return expected


def median(bursts: list[float] | None) -> float | None:
    return statistics.median(bursts) if bursts else None


def quotient(base: list[float] | None, own: list[float] | None) -> float | None:
    """Of the times of the same burst."""
    return median([b / o for b, o in zip(base, own, strict=True)]) if base and own else None


def agrees(line: dict[str, str], want: dict[str, float | None]) -> bool:
    """Whether cells hold these numbers, and no number has no cell: to three digits, or two after
    the point."""
    if any(value is not None and heading not in line for heading, value in want.items()):
        return False
    for heading, cell in line.items():
        if heading in ("row", "backend", "remark"):
            continue
        value = want.get(heading)
        if (cell == "") != (value is None):
            return False
        tolerance = 0.05 if heading == "deviation" else 0.006
        if cell and float(cell) != pytest.approx(value, rel=tolerance, abs=0.0051):
            return False
    return True


@pytest.mark.parametrize("path", [*FA3, None], ids=lambda p: p.stem[-7:] if p else "full")
def test_every_number_in_a_table_is_the_files(
    path: Path | None, full: Path, tmp_path: Path
) -> None:
    path = path or full
    expected = expectations(path)
    lines = Page(html(path, to=tmp_path / "report")).measured
    assert len(lines) == len(expected)
    markdown = (tmp_path / "report" / "report.md").read_text()
    for line in lines:
        assert f"| {' | '.join(line.values())} |" in markdown
        assert agrees(line, expected[line["row"], line["backend"]]), line


def test_rows_that_add_something_stand_beside_their_plain_ones(tmp_path: Path) -> None:
    appended, float8 = f"{LARGE}.new1.halves", f"{LARGE}.kv-e4m3"
    rows = [measured(LARGE, triton=130, _3=120), measured(appended, triton=132.5, _3=160)]
    rows.append(measured(float8, triton=65))
    path = file(tmp_path / "added.json", *rows)
    found = {(x["row"], x["backend"]): x for x in Page(html(path, to=tmp_path)).measured}
    cells = {key: (line["added µs"], line["x plain"]) for key, line in found.items()}
    assert cells == {
        (LARGE, "triton"): ("", ""),
        (LARGE, "3"): ("", ""),
        (appended, "triton"): ("+2.50", "0.98"),
        (appended, "3"): ("+40.00", "0.75"),
        (float8, "triton"): ("-65.00", "2.00"),
    }


def test_latent_rows_are_near_either_roof(tmp_path: Path) -> None:
    """151.6 MB at 4.3 TB/s are 35.2 µs, and 8 times the FLOP of 16 heads at 700 TFLOP/s 52.2."""
    few, many = (f"16x8192.{heads}/1x64,512.p64.qv" for heads in (16, 128))
    path = file(tmp_path / "latent.json", measured(few, triton=35.25), measured(many, triton=104.3))
    lines = {x["row"]: x for x in Page(html(path, to=tmp_path)).measured}
    assert lines[few]["of roof"] == "1.00"
    assert lines[many]["of roof"] == "0.50"


def test_merging_has_rates_and_no_keys(tmp_path: Path) -> None:
    path = file(tmp_path / "combine.json", measured("combine.4x1x16384.32x128", triton=400))
    text = html(path, to=tmp_path)
    (line,) = Page(text).measured
    assert line["TB/s"] == "3.05"
    assert "keys of the longest sequence" not in text


def sections(text: str) -> dict[str, str]:
    """What a page says of each file, by the file's name."""
    parts = re.split(r'<h2 id="file\d+">([^<]*)</h2>', text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_committed_page_holds_every_number_of_the_committed_files() -> None:
    found = sections(COMMITTED.read_text(encoding="utf-8"))
    files = sorted(RESULTS.glob("*.json"))
    assert list(found) == [f"{RESULTS.name}/{path.name}" for path in files]
    for path, text in zip(files, found.values(), strict=True):
        shown, expected = Page(text), expectations(path)
        assert {(x["row"], x["backend"]) for x in shown.measured} == expected.keys()
        assert len(shown.measured) == len(expected)
        for line in shown.measured:
            assert agrees(line, expected[line["row"], line["backend"]]), line
        environment = dict(shown.tables[0][1:])
        for name, value in json.loads(path.read_text())["environment"].items():
            words = value.values() if isinstance(value, dict) else [value]
            assert all(str(word) in environment.get(name, "") for word in words if word), name


def test_the_committed_page_is_what_the_report_makes_of_the_committed_files(tmp_path: Path) -> None:
    """But for a remark, which depends on the kernels, and the drawings' ids and outlines."""

    def comparable(text: str) -> tuple[str, list[str]]:
        rest = re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)
        return rest.replace(f"<li>{OTHER_KERNELS}</li>\n", ""), re.findall(r"<text.*?</text>", text)

    again = comparable(html(*sorted(RESULTS.glob("*.json")), to=tmp_path))
    assert comparable(COMMITTED.read_text(encoding="utf-8")) == again


def test_the_earlier_page_holds_the_earlier_numbers() -> None:
    """It was made before there were all of today's columns."""
    page = RESULTS / "earlier" / "2026-11-20-h200.html"
    lines = Page(page.read_text(encoding="utf-8")).measured
    files = [expectations(path) for path in FA3]
    assert len(lines) == sum(map(len, files))
    for line in lines:
        wanted = [file.get((line["row"], line["backend"]), {}) for file in files]
        assert any(agrees(line, {n: w[n] for n in w.keys() & line.keys()}) for w in wanted), line


def test_environment_failures_and_means_are_on_the_page(full: Path, tmp_path: Path) -> None:
    text = html(full, to=tmp_path)
    for words in ("NVIDIA H200", "python -m bench decode", "2026-01-02", "seed of the rows"):
        assert words in text
    assert "The run ended early: 4 of 6 rows." in text
    assert "Wrong results, which are not timed: 1." in text
    assert "docs/log.md" in text  # where the roofs come from
    mean = (2 * 130 / 150 * 1000 / 1000.5) ** (1 / 3)
    assert (
        f"triton over 3, clean, all rows: geometric mean {mean:.3f}, least 0.87, "
        "3 rows (1 faster, 1 ties, 1 slower)"
    ) in text
    lines = Page(text).measured
    remarks = {(line["row"], line["backend"]): line["remark"] for line in lines}
    wrong = remarks["8x512.32/8x128.p16", "triton"]
    assert wrong == "WRONG: deviates from 3, not timed"
    assert f'class="bad">{wrong}' in text
    assert remarks[SMALL, "4"] == "skipped: <not> installed"
    assert remarks[SMALL, "triton"] == "no metadata: a note"


def test_what_the_committed_results_are_stands_above_their_numbers(tmp_path: Path) -> None:
    text = html(*FA3, COPIED, to=tmp_path)
    assert text.count("FlashAttention-3 alone: no kernel of this package was measured.") == 2
    assert "Copied by hand" in text


def test_copied_numbers_stay_in_their_blocks(tmp_path: Path) -> None:
    found = Page(html(COPIED, to=tmp_path))
    tables = [table for table in found.tables if "ratio" in table[0]]
    runs = json.loads(COPIED.read_text())["runs"]
    assert len(tables) == len(runs)
    for table, run in zip(tables, runs, strict=True):
        shown = {
            line[0]: dict(zip(table[0][1:], map(float, line[1:]), strict=True))
            for line in table[1:]
        }
        assert shown == run["rows"]


def test_a_heat_map_writes_the_ratio_in_the_cell(full: Path, tmp_path: Path) -> None:
    svg = re.findall(r"<svg.*?</svg>", html(full, to=tmp_path), re.DOTALL)[0]
    texts = ["".join(t.itertext()).strip() for t in ElementTree.fromstring(svg).iter("text")]
    assert {"2.00", "0.87", "1.00"} <= {*texts}
    assert not {"9.00"} & {*texts}  # the wrong row has no ratio


def test_host_times_have_a_table(tmp_path: Path) -> None:
    path = tmp_path / "overhead.json"
    write(path, WHERE, [{"name": SMALL, "host_us": {"triton": 20.0, "3": 30.0, "4": "missing"}}], 1)
    lines = {line["backend"]: line for line in Page(html(path, to=tmp_path)).measured}
    assert lines["triton"]["host µs"] == "20.0"
    assert lines["triton"]["x FA3 host"] == "1.50"
    assert lines["4"]["remark"] == "skipped: missing"
    assert lines["triton"].keys() == {"row", "backend", "remark", "host µs", "x FA3 host"}


@pytest.mark.slow
@pytest.mark.parametrize("which", ["made", "committed"])
def test_the_page_renders_in_a_browser(which: str, full: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on PATH: apt-get install chromium, then nox -s browser")
    index = page.write([load(full)], tmp_path / "report")[0] if which == "made" else COMMITTED
    shot = tmp_path / "page.png"
    options = (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/user",
    )
    done = subprocess.run(
        [chromium, *options, "--dump-dom", f"--screenshot={shot}", index.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    drawn = index.read_text(encoding="utf-8").count("<svg")
    assert drawn >= 4
    assert done.stdout.count("<svg") == drawn
    assert shot.stat().st_size > 10_000


# ---------------------------------------------------------------- reading


def without(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["rows"][0].pop(key)


def with_value(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["rows"][0]["variants"]["triton"].update({key: value})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content.update(rows=[]), "holds no row"),
        (lambda content: content.pop("rows"), "neither a result"),
        (lambda content: content.update(rows=[3]), "malformed"),
        (lambda content: content["environment"].pop("kernel_digest"), "kernel_digest"),
        (without("name"), "'name' is missing"),
        (lambda content: content["rows"][0].update(name="no such row"), "no such row"),
        (with_value("clean_us", [1, "2"]), "expected a number, got '2'"),
        (with_value("clean_us", [0.0, 1.0]), "not positive"),
        (with_value("clean_us", [1.0]), "unequal numbers of bursts"),
        (with_value("deviation", "0.1"), "expected a number"),
    ],
)
def test_a_malformed_result_is_one_clear_error(
    spoil: Callable[[dict[str, Any]], object],
    message: str,
    full: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = json.loads(full.read_text())
    spoil(content)
    full.write_text(json.dumps(content))
    with pytest.raises(ResultError, match=message):
        load(full)
    assert main(["report", str(full), "--output", str(full.parent / "report")]) == 2
    error = capsys.readouterr().err
    assert str(full) in error
    assert len(error.splitlines()) == 1
    assert not (full.parent / "report").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"rows": 1}'])
def test_what_is_no_result_is_said(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ResultError, match=r"other\.json"):
        load(path)


def test_a_missing_or_binary_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="No such file"):
        load(tmp_path / "missing.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ResultError, match="decode"):
        load(tmp_path / "binary.json")


def test_what_was_written_reads_back(full: Path) -> None:
    """The inverse of as_json, for every field that a file holds."""
    result = load(full)
    again = [as_json(m) for m in result.measurements]
    assert json.loads(json.dumps(again)) == json.loads(full.read_text())["rows"]


def test_results_of_other_kernels_say_so(full: Path) -> None:
    assert OTHER_KERNELS not in load(full).remarks
    content = json.loads(full.read_text())
    content["environment"]["kernel_digest"] = "0" * 16
    full.write_text(json.dumps(content))
    assert OTHER_KERNELS in load(full).remarks


RECORDED = f"""
import pytest
from bench import conftest
from bench.measure import Measurement, Outcome
from bench.reading import HOST_GROUP
from bench.timing import Times
from bench.workloads import find

def measure(row, labels, flusher, bursts):
    times = Times((8.0,) * bursts, (9.0,) * bursts)
    outcome = Outcome(times, deviation=0.001, against="fp32", correct=True)
    return Measurement(row, {{labels[0]: outcome}}, 1000, 2000)

conftest.measure = measure

@pytest.fixture(scope="session")
def flusher():
    return None

@pytest.mark.parametrize("label", ["triton", "3"])
def test_row(record, label):
    record(find({SMALL!r}), label)

@pytest.mark.parametrize("name", [{SMALL!r}])
@pytest.mark.parametrize("label", ["triton"])
def test_host(benchmark, name, label):
    benchmark.group = HOST_GROUP + name
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info["host_us"] = 21.5
"""


def test_what_pytest_benchmark_writes_is_read(tmp_path: Path) -> None:
    """The real plugin and the real fixture over a measurement that was made up."""
    script, path = tmp_path / "test_recorded.py", tmp_path / "benchmark.json"
    script.write_text(RECORDED)
    options = (
        "-q",
        "-p",
        "bench.conftest",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        "-c",
        "/dev/null",
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"--benchmark-json={path}", str(script)],
        cwd=ROOT,
        # A worker of xdist would leave the file to the process that started it.
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    result = load(path)
    (row,) = result.measurements
    assert row.row.name == SMALL
    assert (row.bytes, row.flops) == (1000, 2000)
    assert row.outcomes["triton"].times.clean == (8.0,)
    assert row.outcomes["triton"].correct
    assert row.outcomes["triton"].host_us == 21.5
    assert any("not interleaved" in remark for remark in result.remarks)
    lines = {line["backend"]: line for line in Page(html(path, to=tmp_path)).measured}
    assert lines["triton"]["µs clean"] == "8.00"
    assert lines["triton"]["x FA3"] == "1.00"


# ---------------------------------------------------------------- comparing


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    a = [measured(SMALL, triton=100, _3=100), measured(LARGE, triton=100, _3=100)]
    b = [measured(SMALL, triton=105, _3=101), measured(LARGE, triton=80, _3=100)]
    a.append(measured(CHUNK, triton=50))
    return str(file(tmp_path / "a.json", *a)), str(file(tmp_path / "b.json", *b))


def test_changes_are_sorted_and_up_to_one_percent_is_a_tie(
    pair: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *pair]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split("  ")[0] == "row"
    assert [line.split() for line in lines[:4]] == [
        [SMALL, "triton", "100.0", "105.0", "+5.0", "%", "slower"],
        [SMALL, "3", "100.0", "101.0", "+1.0", "%", "tie"],
        [LARGE, "3", "100.0", "100.0", "+0.0", "%", "tie"],
        [LARGE, "triton", "100.0", "80.0", "-20.0", "%", "faster"],
    ]
    assert lines[4:] == ["! times of A without a counterpart: 1"]


def test_a_slower_row_fails_above_a_limit(pair: tuple[str, str]) -> None:
    assert main(["compare", *pair, "--fail-above", "4.9"]) == 1
    assert main(["compare", *pair, "--fail-above", "5"]) == 0
    a, b = pair
    assert main(["compare", b, a, "--fail-above", "24"]) == 1
    assert main(["compare", b, a, "--fail-above", "26"]) == 0


def test_a_row_that_became_wrong_fails(
    tmp_path: Path, pair: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = measured(SMALL, triton=100, _3=100)
    wrong.outcomes["triton"] = Outcome(correct=False, deviation=0.5)
    b = str(file(tmp_path / "wrong.json", wrong))
    assert main(["compare", pair[0], b, "--fail-above", "1000"]) == 1
    assert capsys.readouterr().out.splitlines()[1].split() == [SMALL, "triton", "100.0", "WRONG"]
    assert main(["compare", pair[0], b]) == 0


def test_a_comparison_as_markdown_and_of_other_columns(
    pair: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *pair, "--markdown", "--column", "dirty"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"| {' | '.join(compare.HEADER)} |"
    assert lines[2] == f"| {SMALL} | triton | 101.0 | 106.0 | +5.0 % | slower |"
    assert main(["compare", *pair, "--column", "host"]) == 2
    assert "no host times in common" in capsys.readouterr().err


def test_another_gpu_is_said(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(Path(pair[1]).read_text())
    content["environment"]["gpu"] = "another"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    main(["compare", pair[0], str(other)])
    assert "! gpu: NVIDIA H200 in A, another in B" in capsys.readouterr().out


def test_a_file_that_is_no_result_is_not_compared(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", pair[0], str(tmp_path / "missing.json")]) == 2
    assert "missing.json" in capsys.readouterr().err


# ---------------------------------------------------------------- the first call


def test_a_first_call_is_timed_in_new_processes(tmp_path: Path) -> None:
    """On the backend that runs everywhere; nothing is compiled."""
    row = find(SMALL)
    outcomes = first_call.fresh("torch", row, "cpu", repeat=1)
    assert outcomes.keys() == {"torch, cold", "torch, warm"}
    for outcome in outcomes.values():
        assert outcome.first_call_s is not None
        assert 0 < outcome.first_call_s < 60
        assert outcome.compile_s is None
    path = file(tmp_path / "first.json", Measurement(row, outcomes, 1, 1))
    lines = Page(html(path, to=tmp_path)).measured
    assert [line["backend"] for line in lines] == ["torch, cold", "torch, warm"]
    assert all(float(line["first call s"]) > 0 for line in lines)


def test_what_cannot_make_a_first_call_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_call, "child", lambda *_, **__: [{"skipped": "not installed"}])
    outcomes = first_call.fresh("4", find(SMALL), "cpu", repeat=2)
    assert {label: o.skipped for label, o in outcomes.items()} == {"4": "not installed"}
    text = first_call.text([Measurement(find(SMALL), outcomes, 1, 1)])
    assert "not installed" in text


def test_a_process_that_fails_costs_its_own_backend_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def child(_: str, label: str, *__: str, caches: Path, env: object) -> list[dict[str, Any]]:
        if label == "4":
            raise RuntimeError("bench.fresh 4: exit status 1:\nno such symbol")
        return [{"first_call_s": 1.0, "compiled": []}]

    monkeypatch.setattr(first_call, "child", child)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("bench.environment.describe", lambda commit: {"commit": commit})
    path = tmp_path / "first.json"
    arguments = ["first-call", "--repeat", "1", "--output", str(path), "--backend"]
    assert main([*arguments, "triton,4"]) == 1
    assert "exit status 1: no such symbol" in capsys.readouterr().out
    for row in json.loads(path.read_text())["rows"]:
        assert row["variants"]["triton, warm"]["first_call_s"] == 1.0
        assert row["variants"]["4"]["skipped"].startswith("failed: bench.fresh 4")
    assert main([*arguments, "triton"]) == 0


def test_a_process_that_hangs_or_says_nothing_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "asleep.py").write_text("import time\ntime.sleep(60)\n")
    (tmp_path / "silent.py").write_text("")
    env = dict(os.environ) | {"PYTHONPATH": str(tmp_path)}
    monkeypatch.setattr(first_call, "CHILD_SECONDS", 3)
    with pytest.raises(RuntimeError, match="asleep: still running after 3 s"):
        first_call.child("asleep", caches=tmp_path, env=env)
    with pytest.raises(RuntimeError, match="silent: exit status 0"):
        first_call.child("silent", caches=tmp_path, env=env)


def test_warm_processes_find_the_caches_of_cold_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []

    def child(*_: str, caches: Path, env: object) -> list[dict[str, float]]:
        warm = caches in seen
        seen.append(caches)
        compiled = [] if warm else [("decode_kernel", 3.0), ("combine_kernel", 1.0)]
        return [{"first_call_s": 1.0 if warm else 5.0 + len(seen), "compiled": compiled}]

    monkeypatch.setattr(first_call, "child", child)
    outcomes = first_call.fresh("triton", find(SMALL), "cpu", repeat=3)
    assert len({*seen}) == 3
    assert not any(folder.exists() for folder in seen)
    assert outcomes["triton, warm"].first_call_s == 1.0
    assert outcomes["triton, cold"].first_call_s == 8.0  # of 6, 8 and 10
    assert outcomes["triton, cold"].compile_s == 4.0
    assert outcomes["triton, warm"].compile_s is None
    assert outcomes["triton, warm"].note == "median of 3 processes"
    assert outcomes["triton, cold"].note == (
        "median of 3 processes; decode_kernel 3.00 s; combine_kernel 1.00 s"
    )


def test_the_portable_prefill_stands_beside_the_chip_s_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[str, str, str | None]] = []

    def child(_: str, label: str, row: str, __: str, *, caches: Path, env: dict[str, str]) -> Any:
        seen.append((label, find(row).phase, env.get("TRITON_FA_HOPPER")))
        return [{"first_call_s": 1.0, "compiled": []}]

    monkeypatch.setattr(first_call, "child", child)
    monkeypatch.delenv("TRITON_FA_HOPPER", raising=False)
    decode, prefill = first_call.measure(["triton", first_call.PORTABLE], "cpu", 1, jobs=2)
    assert decode.outcomes.keys() == {"triton, cold", "triton, warm"}
    both = {"triton-portable, cold", "triton-portable, warm"}
    assert prefill.outcomes.keys() == decode.outcomes.keys() | both
    assert {*seen} == {
        ("triton", "decode", None),
        ("triton", "prefill", None),
        ("triton", "prefill", "0"),
    }


@pytest.mark.slow
def test_compiling_for_another_chip_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the cases that compile quickest; those that are offered exist."""
    pytest.importorskip("triton")
    from tests.portability.cases import CASES

    assert CASES.keys() >= {*first_call.CASES}
    monkeypatch.setattr(first_call, "CASES", ("merge-splits", "merge-pair"))
    header, *lines = first_call.cross_compiled("sm_90").splitlines()
    assert header.startswith("compiled for sm_90, not run")
    assert [line.split()[0] for line in lines] == ["merge-splits", "merge-pair"]
    # The first launch of a process pays for more than its own compilation.
    cold, warm = map(float, lines[1].split()[2:])
    assert cold > 2 * warm


def test_a_target_that_does_not_exist_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: str, **__: object) -> list[object]:
        raise RuntimeError("KeyError: 'sm_1'")

    monkeypatch.setattr(first_call, "child", fail)
    assert main(["first-call", "--target", "sm_1"]) == 1
    assert "sm_1" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_without_a_gpu_no_first_call_is_claimed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["first-call"]) == 3
    assert "nothing was measured" in capsys.readouterr().err

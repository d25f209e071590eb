"""The documents against the code: commands, generated tables, links, and the code they show."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from triton_fa.env import VARIABLES

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "bench" / "README.md"]
)
COMMANDS = ("pip install nox && nox -s parity", "pip install nox && nox -s tests")


def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nox_sessions() -> set[str]:
    tree = ast.parse((ROOT / "noxfile.py").read_text())
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any("session" in ast.unparse(decorator) for decorator in node.decorator_list)
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_the_two_commands_stand_alone_on_a_line(command: str) -> None:
    assert README.read_text().splitlines().count(command) == 1


def test_ci_runs_the_second_command() -> None:
    script = ROOT / ".ci" / "run"
    assert COMMANDS[1] in script.read_text()
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_nox_session_named_exists(path: Path) -> None:
    named = set(re.findall(r"nox -s ([a-z_]+)", path.read_text()))
    assert named <= nox_sessions()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_module_run_exists(path: Path) -> None:
    named = re.findall(r"python -m ([a-z_]+(?:\.[a-z_]+)*)", path.read_text())
    for module in set(named) - {"pytest", "pip"}:
        file = ROOT / module.replace(".", "/")
        assert (file / "__main__.py").exists() or file.with_suffix(".py").exists(), module


def test_generated_tables_are_current() -> None:
    text = README.read_text()
    assert tables().rewritten(text) == text, "run: python docs/tables.py"


def test_the_environment_table_has_every_variable() -> None:
    text = README.read_text().partition("<!-- env:begin -->")[2].partition("<!-- env:end -->")[0]
    assert re.findall(r"^\| `(\w+)`", text, re.MULTILINE) == [v.name for v in VARIABLES]


def test_every_variable_read_is_in_the_table() -> None:
    """Both ways: what the package's sources name, and what the table says."""
    sources = "".join(p.read_text() for p in (ROOT / "triton_fa").rglob("*.py"))
    named = set(re.findall(r"\bTRITON_FA_[A-Z0-9_]+", sources))
    assert named == {v.name for v in VARIABLES}


def test_the_refused_table_follows_the_docstrings() -> None:
    found = tables().refusals()
    text = README.read_text()
    for argument, _ in found:
        assert f"| `{argument}` |" in text


def test_the_performance_table_is_what_the_committed_result_says(tmp_path: Path) -> None:
    made, text = tables(), README.read_text()
    block = text.partition("<!-- performance:begin -->")[2].partition("<!-- performance:end -->")[0]
    shown = re.findall(r"\| (\d+\.\d\d) \|", block)
    assert len(shown) == len(made.DECODE) + len(made.PREFILL)
    changed = []
    for path in made.RESULTS:
        result = json.loads(path.read_text())
        for row in result["rows"]:  # all of ours twice as quick
            times = row["variants"]["triton"]
            times["clean_us"] = [us / 2 for us in times["clean_us"]]
        changed.append(tmp_path / path.name)
        changed[-1].write_text(json.dumps(result))
    other = re.findall(r"\| (\d+\.\d\d) \|", made.performance_table(changed) + "\n")
    assert [float(x) for x in other] == pytest.approx([2 * float(x) for x in shown], abs=0.02)


UNITS = r"µs|us|ms|s|seconds|[GT]B/s|TFLOP/s|%|x|\N{MULTIPLICATION SIGN}|times"
FIGURE = re.compile(
    rf"\d+(?:\.\d+)?\s?(?:{UNITS})(?= (?:faster|slower)|[\s.,;:)]|$)|\d\.\d\d(?![\d.])"
)


def test_every_figure_of_the_readme_is_made_from_committed_results() -> None:
    """Those of the performance table are, by the tests above: there are no others."""
    before, _, rest = README.read_text().partition("<!-- performance:begin -->")
    made, _, after = rest.partition("<!-- performance:end -->")
    assert len(FIGURE.findall(made)) >= 20
    assert FIGURE.findall("It takes 20.5 µs, is 2x faster, 1.11 times, at 4 TB/s and 97 %.") == [
        *("20.5 µs", "2x", "1.11 times", "4 TB/s", "97 %"),
    ]
    versions = r"(?:Python|torch|Triton) \d[\d.]*"
    prose = re.sub(rf"```.*?```|`[^`]*`|{versions}", "", before + after, flags=re.DOTALL)
    assert FIGURE.findall(prose) == []


def headings(path: Path) -> set[str]:
    """Anchors as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_resolve(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), target
        assert not anchor or anchor in headings(linked), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_files_named_in_documents_exist(path: Path) -> None:
    """Names in backticks that look like files of ours, from the root or from the package."""
    made_by_a_run = {"parity.json", "parity.html"}
    for name in re.findall(r"`([\w./-]+\.(?:py|md|toml|txt))`", path.read_text()):
        places = (ROOT / name, ROOT / "triton_fa" / name, path.parent / name)
        assert name in made_by_a_run or any(p.exists() for p in places), name


def test_every_page_is_in_the_site() -> None:
    listed = set(re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}


def test_what_the_site_takes_from_the_readme_is_there() -> None:
    pages = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    taken = re.findall(r'^--8<-- "README.md:([\w-]+)"$', pages, re.MULTILINE)
    assert taken
    for name in taken:
        for edge in ("start", "end"):
            assert README.read_text().count(f"<!-- --8<-- [{edge}:{name}] -->") == 1


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def test_the_readme_has_code() -> None:
    assert len(python_blocks(README)) >= 2


@pytest.mark.parametrize("block", python_blocks(README), ids=lambda b: b.splitlines()[-1][:30])
def test_code_in_the_readme_runs(block: str, tmp_path: Path) -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, "-c", block],
        cwd=tmp_path,
        env={**clean, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_changelog_has_an_unreleased_section() -> None:
    assert "\n## [Unreleased]\n" in (ROOT / "CHANGELOG.md").read_text()

"""The pages on integrations: their links, the sessions and tests they name, the code they show."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs" / "integrations").glob("*.md"))
BLOCKS = [
    (page, block)
    for page in PAGES
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_what_a_page_names_exists(path: Path) -> None:
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)\)", text):
        assert (path.parent / target).exists(), target
    for name in re.findall(r"tests/integrations/\w+\.py", text):
        assert (ROOT / name).exists(), name
    for session in re.findall(r"nox -s (\w+)", text):
        assert f"def {session}(" in (ROOT / "noxfile.py").read_text(), session


def test_every_module_has_a_page() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for module in (ROOT / "triton_fa" / "integrations").glob("[a-z]*.py"):
        if module.stem != "padding":
            assert module.stem in text, module.stem
    overview = (ROOT / "docs" / "integrations" / "README.md").read_text()
    for page in PAGES:
        assert page.name == "README.md" or f"]({page.name})" in overview, page.name


@pytest.mark.parametrize(("path", "block"), BLOCKS, ids=lambda x: getattr(x, "stem", ""))
def test_code_runs(path: Path, block: str, tmp_path: Path) -> None:
    for framework in ("transformers", "diffusers"):
        if f"{framework}" in block:
            pytest.importorskip(framework, reason=f"needs {framework}: nox -s integrations")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    search = os.pathsep.join([str(ROOT), *filter(None, [clean.pop("PYTHONPATH", "")])])
    done = subprocess.run(
        [sys.executable, "-c", block],
        cwd=tmp_path,
        env={**clean, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr

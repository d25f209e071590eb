"""The built wheel, installed in a clean environment and imported from another directory."""

import email
import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TRITON_"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**kept, **env},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="building the wheel needs the `test` extra")
    dist = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", dist, cwd=ROOT)
    (built,) = dist.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment's interpreter; it holds the wheel and pip, nothing else."""
    where = tmp_path_factory.mktemp("clean")
    venv.create(where, with_pip=True, symlinks=True)
    python = where / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", wheel, cwd=where)
    return python


def test_the_wheel_holds_the_package_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {re.sub(r"-.*", "", top) for top in tops} == {"triton_fa"}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "triton_fa").rglob("*.py")}
    packed = {n for n in names if not n.startswith(("triton_fa-", "triton_fa.dist"))}
    assert packed >= sources
    assert "triton_fa/py.typed" in packed
    assert not [n for n in packed if "__pycache__" in n]


def test_the_wheel_says_what_it_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_string(archive.read(name).decode())
        licenses = [n for n in archive.namelist() if n.endswith("LICENSE")]
    required = [r for r in metadata.get_all("Requires-Dist") or [] if "extra ==" not in r]
    names = {re.split(r"[ ;<>=!~\[]", r)[0] for r in required}
    assert names == {"packaging", "torch", "triton"}
    assert {"fa3", "fa4", "hub", "cli"} <= set(metadata.get_all("Provides-Extra") or [])
    assert licenses


def test_the_installed_package_imports_from_anywhere(clean_python: Path, tmp_path: Path) -> None:
    """torch comes from this environment's site directory; editable installs there do not count."""
    code = """
import importlib.util, json, triton_fa
print(json.dumps({
    "file": triton_fa.__file__,
    "others": [n for n in ("reference", "parity_tests", "bench")
               if importlib.util.find_spec(n) is not None],
    "names": len(triton_fa.__all__),
}))
"""
    site = str(Path(torch.__file__).parents[1])
    seen = json.loads(run(clean_python, "-c", code, cwd=tmp_path, PYTHONPATH=site))
    assert Path(seen["file"]).is_relative_to(clean_python.parents[1])
    assert seen["others"] == []
    assert seen["names"] > 0


def test_the_installed_package_computes(clean_python: Path, tmp_path: Path) -> None:
    code = """
import torch, triton_fa
q, k, v = (torch.randn(1, n, 2, 16) for n in (3, 5, 5))
out = triton_fa.flash_attn_func(q, k, v, causal=True, ver="torch")
want = torch.nn.functional.scaled_dot_product_attention(
    *(x.transpose(1, 2) for x in (q, k, v)),
    attn_mask=torch.ones(3, 5, dtype=torch.bool).tril(2),
).transpose(1, 2)
torch.testing.assert_close(out, want)
print("agrees")
"""
    site = str(Path(torch.__file__).parents[1])
    assert run(clean_python, "-c", code, cwd=tmp_path, PYTHONPATH=site).strip() == "agrees"

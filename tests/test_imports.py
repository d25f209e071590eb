"""``import triton_fa`` in a fresh process: cheap, silent, and without any heavy dependency."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What only an adapter may load, and only when a call needs it.
LAZY = {
    "cutlass",
    "flash_attn",
    "flash_attn_interface",
    "kernels",
    "sgl_kernel",
    "transformers",
    "triton",
}

# Seconds that `import triton_fa` may take on top of `import torch`.
BUDGET = 0.030

# torch itself imports triton in some builds, so what counts is what triton_fa adds to it.
REPORT = """
import sys, time
import torch
before = set(sys.modules)
begin = time.perf_counter()
import triton_fa
wall = time.perf_counter() - begin
import json, logging
print("REPORT" + json.dumps({
    "added": sorted({name.partition(".")[0] for name in set(sys.modules) - before}),
    "wall": wall,
    "cuda_initialized": torch.cuda.is_initialized(),
    "root_handlers": len(logging.getLogger().handlers),
}))
"""


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a new interpreter that sees the checkout and no TRITON_FA_* variable."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PYTEST_"))}
    search = os.pathsep.join([str(ROOT), *filter(None, [clean.pop("PYTHONPATH", "")])])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**clean, "PYTHONPATH": search, "OMP_NUM_THREADS": "1", **env},
    )


def report() -> dict[str, Any]:
    done = run_python(REPORT)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.partition("REPORT")[2]))


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_import_prints_nothing(interpret: str) -> None:
    done = run_python("import triton_fa", TRITON_INTERPRET=interpret)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_import_logs_nothing_at_any_level() -> None:
    code = """
import logging
import torch
records = []
class Keep(logging.Handler):
    def emit(self, record):
        records.append(record.getMessage())
logging.basicConfig(level=logging.DEBUG, handlers=[Keep()])
import triton_fa
for record in records:
    print(record)
"""
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_import_warns_nothing() -> None:
    code = "import torch, warnings; warnings.simplefilter('error'); import triton_fa"
    assert run_python(code).returncode == 0


def test_import_loads_no_heavy_dependency() -> None:
    assert not LAZY.intersection(report()["added"])


# What `bench first-call` imports is part of the time that it measures.
@pytest.mark.parametrize("module", ["triton_fa", "bench.variants"])
def test_fresh_process_holds_no_heavy_dependency(module: str) -> None:
    """The same in absolute terms, less what `import torch` alone brings along."""
    code = "import sys; import {}; print(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    alone = set(run_python(code.format("torch")).stdout.split())
    ours = set(run_python(code.format(module)).stdout.split())
    assert "triton_fa" in ours
    assert not LAZY.intersection(ours - alone)


def test_import_does_not_touch_cuda() -> None:
    assert report()["cuda_initialized"] is False


def test_import_installs_no_root_logging_handler() -> None:
    assert report()["root_handlers"] == 0


def test_import_is_cheap() -> None:
    """The smallest of several: noise on a loaded machine only ever adds.

    Stops at the first run within the budget, so a quiet machine pays for two.
    """
    report()  # writes the byte code, which later processes read
    seen: list[float] = []
    for _ in range(12):
        seen.append(report()["wall"])
        if seen[-1] <= BUDGET:
            return
    pytest.fail(f"import triton_fa took {min(seen) * 1e3:.1f} ms at best: {seen}")


def test_names_load_without_triton() -> None:
    """Reading every public name still loads none of it: kernels come with the first call."""
    code = """
import sys, torch
before = set(sys.modules)
import triton_fa
for name in triton_fa.__all__:
    getattr(triton_fa, name)
print(*sorted({m.partition(".")[0] for m in set(sys.modules) - before}))
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert not LAZY.intersection(done.stdout.split())

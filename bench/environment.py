"""Where and from what a result was made. Probes fail into a text, never into an exception."""

import datetime
import hashlib
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import triton_fa
from bench import vllm_triton

ROOT = Path(__file__).resolve().parents[1]
GPU_FIELDS = ("name", "driver_version", "power.limit", "memory.total", "clocks.max.sm")
STATE_FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def output(*command: str) -> str:
    """What a command prints, or an empty text when it cannot run."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def nvidia_smi(fields: tuple[str, ...]) -> dict[str, str]:
    """Fields of the current device, or nothing without nvidia-smi."""
    index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    query = f"--query-gpu={','.join(fields)}"
    line = output("nvidia-smi", f"--id={index}", query, "--format=csv,noheader")
    values = [value.strip() for value in line.split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def gpu_state() -> dict[str, str]:
    """Clocks, power and temperature now."""
    return nvidia_smi(STATE_FIELDS)


def clock_and_power() -> dict[str, float] | None:
    """SM clock in MHz and power in W, quick to read; None without the library torch asks."""
    if not torch.cuda.is_available():
        return None
    try:
        return {"mhz": torch.cuda.clock_rate(), "watts": torch.cuda.power_draw() / 1e3}
    except ModuleNotFoundError:
        return None


def version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def kernel_digest(root: Path = ROOT) -> str:
    """A digest of the sources that decide what runs on the GPU, to tell stale results by."""
    package = root / "triton_fa"
    sources = [
        *(package / "kernels").rglob("*.py"),
        *(package / "schedule").rglob("*.py"),
        package / "backends" / "triton.py",
    ]
    digest = hashlib.sha256()
    for path in sorted(p for p in sources if p.exists()):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def describe(commit: str = "") -> dict[str, Any]:
    """The labels without which a number is an anecdote."""
    dirty = output("git", "status", "--porcelain", "--untracked-files=no")
    found = output("git", "rev-parse", "HEAD")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
        "commit": commit or (found + ("+changes" if dirty else "") if found else "unknown"),
        "kernel_digest": kernel_digest(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "nvidia_smi": nvidia_smi(GPU_FIELDS),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "triton": version("triton"),
        "backends": {
            str(ver): status.detail if status.available else f"unavailable: {status.reason}"
            for ver, status in triton_fa.backends().items()
        },
        "vllm": "not fetched" if vllm_triton.missing() else vllm_triton.VERSION,
        "cudnn": torch.backends.cudnn.version() or "",
    }

"""The report of a run: parity.json for machines, parity.html (self-contained) for people."""

import datetime
import hashlib
import json
import math
import platform
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import torch

import triton_fa
from parity_tests import features
from parity_tests.cases import Case
from parity_tests.known_differences import DIFFERENCES
from parity_tests.runners import Outcome
from parity_tests.suite import Run, tally

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def kernel_digest() -> str:
    """sha256 over the kernel sources: a committed result belongs to exactly one digest."""
    digest = hashlib.sha256()
    kernels = ROOT / "triton_fa" / "kernels"
    for path in sorted(kernels.rglob("*.py")):
        digest.update(path.relative_to(kernels).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def environment(run: Run, command: str) -> dict[str, Any]:
    """Everything that a number in the report depends on."""
    options = run.options
    on_gpu = not options.device.interpreted
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "seed": options.seed,
        "device": options.device.description,
        "interpreted": options.device.interpreted,
        "gpu": torch.cuda.get_device_name(options.device.name) if on_gpu else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if on_gpu
        else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "triton_fa": getattr(triton_fa, "__version__", None) or _version("triton-fa"),
        "commit": _commit(),
        "kernel_digest": kernel_digest(),
        "backends": what_backends(options.device.name) if run.backends is None else run.backends,
    }


def as_data(run: Run, command: str) -> dict[str, Any]:
    """The whole report as plain values."""
    passed, sentence = run.verdict()
    return {
        "passed": passed,
        "verdict": sentence,
        "environment": environment(run, command),
        "limits": limits(run),
        "tally": tally(run.outcomes),
        "ratios": ratios(run.outcomes),
        "coverage": coverage(run.outcomes),
        "known_differences": [
            {"id": d.id, "kind": d.kind, "reason": d.reason, "where": d.where} for d in DIFFERENCES
        ],
        "outcomes": [_row(outcome) for outcome in run.outcomes],
    }


def limits(run: Run) -> list[str]:
    """What this run left out, in words: never silently."""
    said = []
    options = run.options
    if options.device.interpreted:
        said.append("No GPU: scaled-down cases in Triton's interpreter; FA3 and FA4 cannot run.")
    if options.pattern:
        said.append(f"Only cases that contain {options.pattern!r}.")
    if options.shard != (1, 1):
        said.append("Share {} of {} of the cases.".format(*options.shard))
    if options.named_only:
        said.append("Named cases only, none generated.")
    else:
        specs = {o.case.spec for o in run.outcomes if not o.case.name}
        cases = {o.case for o in run.outcomes if not o.case.name}
        said.append(f"{len(cases)} generated cases over {len(specs)} compile-time variants.")
    for ver, counts in coverage(run.outcomes).items():
        pairs = counts["pairs"]
        if missing := sum(count == 0 for count in pairs.values()):
            said.append(f"{ver}: {missing} of {len(pairs)} pairs of features ran in no case.")
    for id_, count in Counter(
        id_ for o in run.outcomes if o.quarantined for id_ in o.differences
    ).items():
        said.append(f"Quarantined, {count} times never launched: {id_}.")
    for reason in dict.fromkeys(
        r for o in run.outcomes if o.verdict == "not run" for r in o.reasons
    ):
        count = sum(o.verdict == "not run" and reason in o.reasons for o in run.outcomes)
        said.append(f"Not run, {count} times: {reason}.")
    return said


def ratios(outcomes: Iterable[Outcome]) -> dict[str, dict[str, float]]:
    """Per backend, the spread of max error relative to same-dtype PyTorch."""
    found: dict[str, list[float]] = {}
    for outcome in outcomes:
        if outcome.measures.max_ratio is not None:
            found.setdefault(str(outcome.ver), []).append(outcome.measures.max_ratio)
    return {
        ver: {"median": sorted(values)[len(values) // 2], "worst": max(values)}
        for ver, values in found.items()
    }


def coverage(outcomes: Iterable[Outcome]) -> dict[str, dict[str, dict[str, int]]]:
    """Per backend that ran anything, how often each feature and each legal pair of them ran."""
    ran: dict[str, list[Case]] = {}
    for outcome in outcomes:
        if outcome.ran:
            ran.setdefault(str(outcome.ver), []).append(outcome.case)
    return {ver: features.coverage(cases) for ver, cases in ran.items()}


def write(run: Run, folder: Path, command: str) -> tuple[Path, Path]:
    """Write both files and return their paths."""
    data = as_data(run, command)
    folder.mkdir(parents=True, exist_ok=True)
    json_path, html_path = folder / "parity.json", folder / "parity.html"
    text = json.dumps(_without_nan(data), indent=1, allow_nan=False)
    json_path.write_text(text + "\n", encoding="utf-8")
    html_path.write_text(render(data), encoding="utf-8")
    return json_path, html_path


def render(data: dict[str, Any]) -> str:
    """The page; every value is escaped, nothing is loaded from elsewhere."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value: "" if value is None else f"{value:.3g}"
    return environment.get_template("parity.html.j2").render(**data)


def _row(outcome: Outcome) -> dict[str, Any]:
    return {
        "case": outcome.case.label,
        "named": bool(outcome.case.name),
        "ver": str(outcome.ver),
        "verdict": outcome.verdict,
        "failure": outcome.is_failure,
        "reasons": list(outcome.reasons),
        "differences": list(outcome.differences),
        "seconds": round(outcome.seconds, 4),
        "measures": asdict(outcome.measures),
        "fields": asdict(outcome.case),
    }


def _without_nan(value: Any) -> Any:
    """JSON has no NaN or infinity: they become strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value


def what_backends(device: str) -> dict[str, str]:
    statuses = triton_fa.backends(device)
    return {
        str(ver): status.detail if status.available else f"unavailable: {status.reason}"
        for ver, status in statuses.items()
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    commit = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return f"{commit} with uncommitted changes" if commit and changed else commit


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().split("\n")[0] or None

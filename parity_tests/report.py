"""The report of a run: parity.json for machines, parity.html (self-contained) for people."""

import datetime
import hashlib
import json
import math
import platform
import subprocess
from collections import Counter
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import torch

import triton_fa
from parity_tests import features
from parity_tests.budgets import Measures
from parity_tests.cases import Case
from parity_tests.device import Device
from parity_tests.distributions import distributions
from parity_tests.known_differences import DIFFERENCES
from parity_tests.runners import NOT_RUN, Outcome
from parity_tests.suite import Options, Run, occurred, tally

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MOST_ROWS = 2000  # of generated cases on the page; with more, only what did not plainly agree


def kernel_digest() -> str:
    """sha256 over the kernel sources: a committed result belongs to exactly one digest."""
    return _digest(ROOT / "triton_fa" / "kernels")


def source_digest() -> str:
    """sha256 over all that decides what a case is, what runs, and how it is judged."""
    return _digest(*(ROOT / name for name in ("triton_fa", "reference", "parity_tests")))


def _digest(*folders: Path) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def environment(run: Run, command: str) -> dict[str, Any]:
    """Everything that a number in the report depends on."""
    options = run.options
    backends = what_backends(options.device.name) if run.backends is None else run.backends
    return machine(options.device, command) | {"seed": options.seed, "backends": backends}


def machine(device: Device, command: str) -> dict[str, Any]:
    """Where and from what something was run."""
    on_gpu = not device.interpreted
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "device": device.description,
        "interpreted": device.interpreted,
        "gpu": torch.cuda.get_device_name(device.name) if on_gpu else None,
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if on_gpu
        else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "triton_fa": getattr(triton_fa, "__version__", None) or _version("triton-fa"),
        "commit": _commit(),
        "kernel_digest": kernel_digest(),
        "source_digest": source_digest(),
    }


def as_data(run: Run, command: str) -> dict[str, Any]:
    """The whole report as plain values."""
    return joined(run, environment(run, command), asked(run.options), [run.options])


def joined(
    run: Run, environment: dict[str, Any], said: list[str], shares: list[Options]
) -> dict[str, Any]:
    """The report of a run that was one or several, each with its options."""
    passed, sentence = run.verdict()
    shown = occurred(run.outcomes)
    spread = distributions(run.outcomes)
    return {
        "passed": passed,
        "verdict": sentence,
        "gave_up": run.gave_up,
        "environment": environment,
        "shares": [asdict(options) for options in shares],
        "limits": said + seen(run.outcomes),
        "tally": tally(run.outcomes),
        "ratios": {
            ver: {"median": row["median"], "worst": row["max"]}
            for ver, row in spread["backends"].items()
        },
        "distributions": spread,
        "counts": counts(run.outcomes),
        "coverage": coverage(run.outcomes),
        "known_differences": [
            {
                "id": d.id,
                "kind": d.kind,
                "reason": d.reason,
                "where": d.where,
                "occurred": shown.get(d.id),
            }
            for d in DIFFERENCES
        ],
        "outcomes": [_row(outcome) for outcome in run.outcomes],
    }


def limits(run: Run) -> list[str]:
    """What this run left out, in words: never silently."""
    return asked(run.options) + seen(run.outcomes)


def asked(options: Options) -> list[str]:
    """What a run with these options leaves out."""
    said = []
    if options.device.interpreted:
        said.append("No GPU: scaled-down cases in Triton's interpreter; FA3 and FA4 cannot run.")
    if options.pattern:
        said.append(f"Only cases that contain {options.pattern!r}.")
    if options.shard != (1, 1):
        said.append("Share {} of {} of the cases.".format(*options.shard))
    if options.named_only:
        said.append("Named cases only, none generated.")
    return said


def seen(outcomes: list[Outcome]) -> list[str]:
    """What was run of the rest, and what was not."""
    said = []
    cases = {o.case for o in outcomes if not o.case.name}
    if cases:
        specs = {case.spec for case in cases}
        said.append(f"{len(cases)} generated cases over {len(specs)} compile-time variants.")
    for ver, found in coverage(outcomes).items():
        pairs = found["pairs"]
        if missing := sum(count == 0 for count in pairs.values()):
            said.append(f"{ver}: {missing} of {len(pairs)} pairs of features ran in no case.")
    for id_, count in Counter(
        id_ for o in outcomes if o.quarantined for id_ in o.differences
    ).items():
        said.append(f"Quarantined, {count} times never launched: {id_}.")
    for reason, count in Counter(
        reason for o in outcomes if o.verdict == NOT_RUN for reason in dict.fromkeys(o.reasons)
    ).items():
        said.append(f"Not run, {count} times: {reason}.")
    return said


def counts(outcomes: list[Outcome]) -> dict[str, dict[str, Any]]:
    """Per backend that ran anything: different cases, their seed aside, and how well they cover."""
    found = {}
    for ver, cases in _ran(outcomes).items():
        pairs = features.coverage(cases)["pairs"]
        least = min(pairs, key=lambda pair: pairs[pair])
        found[ver] = {
            "cases": len(cases),
            "specs": len({case.spec for case in cases}),
            "least covered pair": least,
            "covered": pairs[least],
        }
    return found


def coverage(outcomes: list[Outcome]) -> dict[str, dict[str, dict[str, int]]]:
    """Per backend that ran anything, how often each feature and each legal pair of them ran."""
    return {ver: features.coverage(cases) for ver, cases in _ran(outcomes).items()}


def _ran(outcomes: list[Outcome]) -> dict[str, list[Case]]:
    """The cases that each backend ran; those that differ in their seed alone are one."""
    identity = {case: case.identity() for case in {outcome.case for outcome in outcomes}}
    ran: dict[str, dict[str, Case]] = {}
    for outcome in outcomes:
        if outcome.ran:
            ran.setdefault(str(outcome.ver), {})[identity[outcome.case]] = outcome.case
    return {ver: list(cases.values()) for ver, cases in ran.items()}


def write(run: Run, folder: Path, command: str) -> tuple[Path, Path]:
    """Write both files and return their paths."""
    return save(as_data(run, command), folder)


def save(data: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write a report's plain values as both files."""
    json_path, html_path = save_json(data, folder), folder / "parity.html"
    html_path.write_text(render(data), encoding="utf-8")
    return json_path, html_path


def save_json(data: dict[str, Any], folder: Path) -> Path:
    """Write a report's plain values, each outcome as a line."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "parity.json"
    plain = _without_nan(data)
    text = json.dumps(plain | {"outcomes": []}, indent=1, allow_nan=False)
    rows = ",\n".join(json.dumps(row, allow_nan=False) for row in plain["outcomes"])
    text = text.replace('"outcomes": []', f'"outcomes": [\n{rows}\n ]')
    part = folder / "parity.part"
    part.write_text(text + "\n", encoding="utf-8")
    return part.replace(path)  # never half of a report


def render(data: dict[str, Any]) -> str:
    """The page; every value is escaped, nothing is loaded from elsewhere."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["MOST_ROWS"] = MOST_ROWS
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
        "launched": outcome.launched,
        "distances": outcome.distances,
        "measures": asdict(outcome.measures),
        "fields": asdict(outcome.case),
    }


def outcome_of(row: dict[str, Any]) -> Outcome:
    """The outcome that `_row` wrote, read from JSON."""
    ver, fields, measures = row["ver"], row["fields"], row["measures"]
    return Outcome(
        case=Case(**fields),
        ver=int(ver) if ver.isdigit() else ver,
        verdict=row["verdict"],
        reasons=tuple(row["reasons"]),
        measures=Measures(**{k: None if v is None else float(v) for k, v in measures.items()}),
        differences=tuple(row["differences"]),
        seconds=row["seconds"],
        launched=row["launched"],
        distances=row["distances"],
    )


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
    commit = output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changed = output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return f"{commit} with uncommitted changes" if commit and changed else commit


def output(*command: str) -> str | None:
    """The first line that a command prints; None if it fails or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().split("\n")[0] or None

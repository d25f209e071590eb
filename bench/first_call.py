"""``python -m bench first-call``: seconds that the first call of a new process takes.

Beyond torch's import, the CUDA context and the inputs. Cold: the compilers' disk caches are empty.
Warm: another new process, with the caches that a cold one left. ``--target`` compiles for a chip
that is not here instead, and times that.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench import environment
from bench.__main__ import write
from bench.counters import flops, mandatory_bytes
from bench.environment import ROOT
from bench.measure import Measurement, Outcome, as_json
from bench.report import table
from bench.variants import VARIANTS
from bench.workloads import Workload, find

ROWS = ("1x1024.32/8x128.p16", "16x1024.32/8x128")
PORTABLE = "triton-portable"
"""The prefill kernel that every chip has, where there is one for the chip alone."""
LABELS = f"triton,{PORTABLE},4"
CACHES = ("cold", "warm")
# Where Triton, CuTe DSL and FA4 keep what they compiled. FA4 keeps it on disk only when asked to.
FOLDERS = ("TRITON_CACHE_DIR", "CUTE_DSL_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR")
SETTINGS = {"FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1", "TRITON_FA_AUTOTUNE_CACHE": "0"}
# A process that takes longer hangs: torch's import and an FA4 compilation take some ten seconds.
CHILD_SECONDS = 120
FAILED = "failed: "
# Cases of tests/portability that compile for every chip.
CASES = ("decode-128", "prefill-128")


def child(module: str, *arguments: str, caches: Path, env: Mapping[str, str]) -> list[Any]:
    """The JSON lines that a module prints in a new process, whose compiler caches are `caches`.

    Raises:
        RuntimeError: it failed, or hangs; with the end of what it said.
    """
    folders = {name: str(caches / name.lower()) for name in FOLDERS}
    paths = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    named = " ".join([module, *arguments])
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env={**env, **SETTINGS, **folders, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=False,
            timeout=CHILD_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{named}: still running after {CHILD_SECONDS} s") from error
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("{", '"'))]
    if done.returncode or not found:
        raise RuntimeError(f"{named}: exit status {done.returncode}: {done.stderr[-2000:]}")
    return found


def fresh(label: str, row: Workload, device: str, repeat: int) -> dict[str, Outcome]:
    """A backend's outcomes with cold and with warm caches, medians of several processes each.

    What fails is said in its own place: the times of other backends are kept.
    """
    variant, env = label, dict(os.environ)
    if label == PORTABLE:
        variant, env = "triton", env | {"TRITON_FA_HOPPER": "0"}
    seen: dict[str, list[dict[str, Any]]] = {cache: [] for cache in CACHES}
    for _ in range(repeat):
        with tempfile.TemporaryDirectory() as folder:
            for cache in CACHES:
                arguments = (variant, row.name, device)
                try:
                    found = child("bench.fresh", *arguments, caches=Path(folder), env=env)[-1]
                except RuntimeError as error:
                    return {label: Outcome(skipped=FAILED + " ".join(str(error).split()))}
                if "skipped" in found:
                    return {label: Outcome(skipped=found["skipped"])}
                seen[cache].append(found)
    return {f"{label}, {cache}": summarised(found) for cache, found in seen.items()}


def summarised(found: Sequence[dict[str, Any]]) -> Outcome:
    """Medians over processes; which kernel took how long to compile is the note's."""
    kernels: dict[str, list[float]] = {}
    for process in found:
        for kernel, took in process["compiled"]:
            kernels.setdefault(kernel, []).append(took)
    totals = [sum(took for _, took in f["compiled"]) for f in found if f["compiled"]]
    each = [f"{kernel} {median(took):.2f} s" for kernel, took in kernels.items()]
    return Outcome(
        first_call_s=median(f["first_call_s"] for f in found),
        compile_s=median(totals) if totals else None,
        note="; ".join([f"median of {len(found)} processes", *each]),
    )


def measure(labels: Sequence[str], device: str, repeat: int, jobs: int) -> list[Measurement]:
    rows = [find(name) for name in ROWS]
    # Decoding has one kernel for all chips.
    wanted = {row: [x for x in labels if x != PORTABLE or row.phase == "prefill"] for row in rows}
    with ThreadPoolExecutor(jobs) as pool:
        running = {
            row: [pool.submit(fresh, label, row, device, repeat) for label in wanted[row]]
            for row in rows
        }
        outcomes = {
            row: {label: o for done in running[row] for label, o in done.result().items()}
            for row in rows
        }
    return [Measurement(row, outcomes[row], mandatory_bytes(row), flops(row)) for row in rows]


def text(measurements: Sequence[Measurement]) -> str:
    rows = [
        [m.row.name, label, seconds(o.first_call_s), seconds(o.compile_s), o.skipped or o.note]
        for m in measurements
        for label, o in m.outcomes.items()
    ]
    return table(("row", "backend, caches", "first call s", "of it compiling s", ""), rows)


def seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def cross_compiled(target: str) -> str:
    """What compiling for a chip takes, launch by launch, with an empty and with a full cache."""
    # Where the interpreter is asked for, jit functions are not compiled.
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cold, warm = (
            child("tests.portability.compiler", target, "", *CASES, caches=Path(folder), env=env)
            for _ in CACHES
        )
    for one, other in zip(cold, warm, strict=True):
        if isinstance(one, dict):
            if one["error"]:
                raise RuntimeError(f"{one['case']}, {one['kernel']}: {one['error']}")
            times = [f"{found['seconds']:.2f}" for found in (one, other)]
            rows.append([f"{one['case']} {one['kernel']}", *times])
    return table((f"compiled for {target}, not run", "cold s", "warm s"), rows)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench first-call", description=__doc__)
    parser.add_argument("--backend", default=LABELS, help=f"a list  [{LABELS}]")
    parser.add_argument("--repeat", type=int, default=3, help="processes for each number")
    parser.add_argument(
        "--jobs", type=int, default=1, help="measure so many at a time: quicker, less exact  [1]"
    )
    parser.add_argument("--target", metavar="CHIP", help="compile for CHIP (sm_90, ...) only")
    parser.add_argument("--commit", default="", help="recorded where git cannot tell")
    parser.add_argument("--output", type=Path, help="write the result file here")
    options = parser.parse_args(arguments)
    options.labels = options.backend.split(",")
    if unknown := [label for label in options.labels if label not in (*VARIANTS, PORTABLE)]:
        parser.error(
            f"--backend: expected some of {','.join((*VARIANTS, PORTABLE))}, got {unknown}"
        )
    for name in ("repeat", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if options.target and options.output:
        parser.error("--output: compiling for another chip is no result to keep")
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if not (options.target or torch.cuda.is_available()):
        sys.stderr.write("no CUDA device: nothing was measured; --target compiles without one\n")
        return 3
    if options.target:
        try:
            sys.stdout.write(cross_compiled(options.target) + "\n")
        except RuntimeError as error:
            sys.stderr.write(f"{error}\n")
            return 1
        return 0
    where = environment.describe(options.commit)
    measurements = measure(options.labels, "cuda", options.repeat, options.jobs)
    if options.output:
        write(options.output, where, [as_json(m) for m in measurements], asked=len(ROWS))
    sys.stdout.write(text(measurements) + "\n")
    outcomes = [outcome for m in measurements for outcome in m.outcomes.values()]
    return int(any(outcome.skipped.startswith(FAILED) for outcome in outcomes))

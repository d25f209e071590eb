"""``python -m bench KIND``: time the workloads of a kind, print one table.

``report`` and ``compare`` read results instead, and ``first-call`` times new processes; each has a
``--help`` of its own.

Timing needs a CUDA device. Every row is checked before it is timed, and a wrong row makes the exit
status 1. Rows come from workloads.py, methods from timing.py, and the result file, written anew
after each row, carries both with the GPU, driver, versions, commit, clocks, command and date.
"""

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import triton_fa
from bench import environment, report, workloads
from bench.compile_ahead import compile_ahead, compile_rows
from bench.inputs import make_inputs
from bench.measure import Measurement, as_json, measure, on
from bench.timing import BURST_SECONDS, CHAIN, FLUSH_BYTES, Flusher, host_microseconds
from bench.variants import BASELINE, VARIANTS, bind

KINDS = (*workloads.CORE, "overhead")
# Small calls, where the host's share shows, one of each entry point.
OVERHEAD_ROWS = ("1x1024.32/8x128.p16", "8x512.32/8x128.p16", "16x1024.32/8x128")
# Imported when asked for: a machine that measures needs no library that draws.
OTHERS = {
    "report": "bench.page",
    "compare": "bench.compare",
    "first-call": "bench.first_call",
    "models": "bench.models",
    "serving": "bench.serving",
}
DEFAULT = "triton,3,4"
DEFAULTS = {
    # In a step it matters whether layers share a schedule or each makes its own.
    "step": "triton,triton-nometa,3,3-nometa,4",
    "combine": "triton,torch,3,4",
}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--rows", default="", help="regex searched in row and family names")
    parser.add_argument(
        "--backend",
        action="append",
        help=f"of {','.join(VARIANTS)}, a list or several times  "
        f"[{DEFAULT}; {'; '.join(f'{of} for {kind}' for kind, of in DEFAULTS.items())}]",
    )
    parser.add_argument("--repeat", type=int, default=5, help="interleaved bursts per row")
    parser.add_argument("--set", choices=("core", "grid"), default="core", dest="row_set")
    parser.add_argument("--fp32", action="store_true", help="judge by fp32 attention, not by FA3")
    parser.add_argument(
        "--require-peers", action="store_true", help="a missing backend is an error"
    )
    parser.add_argument("--commit", default="", help="recorded where git cannot tell")
    parser.add_argument("--output", type=Path, help="write the result file here")
    parser.add_argument("--list", action="store_true", help="print row names and stop")
    parser.add_argument(
        "--compile-processes",
        type=int,
        default=0,
        metavar="N",
        help="compile the Triton variants in N processes before timing",
    )
    parser.add_argument(
        "--compile-only", action="store_true", help="compile the Triton variants and stop"
    )
    options = parser.parse_args(arguments)
    chosen = ",".join(options.backend or [DEFAULTS.get(options.kind, DEFAULT)])
    options.labels = [label for label in dict.fromkeys(chosen.split(",")) if label]
    if unknown := [label for label in options.labels if label not in VARIANTS]:
        parser.error(f"--backend: expected some of {','.join(VARIANTS)}, got {unknown}")
    if options.repeat < 1:
        parser.error(f"--repeat: expected at least 1, got {options.repeat}")
    if options.compile_processes < 0:
        parser.error(f"--compile-processes: expected 0 or more, got {options.compile_processes}")
    return options


def rows_of(options: argparse.Namespace) -> tuple[workloads.Workload, ...]:
    if options.kind == "overhead":
        return tuple(map(workloads.find, OVERHEAD_ROWS))
    return workloads.select(options.kind, options.rows, options.row_set == "grid")


def run_overhead(rows: tuple[workloads.Workload, ...], labels: list[str]) -> list[dict[str, Any]]:
    """Host microseconds of one eager call, metadata given where the backend has any."""
    results = []
    for row in rows:
        inputs = make_inputs(row, torch.device("cuda"))
        found: dict[str, Any] = {}
        with triton_fa.strict():
            for label in labels:
                try:
                    found[label] = host_microseconds(on(bind(VARIANTS[label], inputs), inputs))
                except triton_fa.TritonFAError as error:
                    found[label] = str(error)
        results.append({"name": row.name, "host_us": found})
    return results


def overhead_table(results: list[dict[str, Any]], labels: list[str]) -> str:
    def cell(value: object) -> str:
        return f"{value:.1f}" if isinstance(value, float) else "skipped"

    rows = [[r["name"], *(cell(r["host_us"][label]) for label in labels)] for r in results]
    remarks = {
        f"! {label}: {value}"
        for r in results
        for label, value in r["host_us"].items()
        if isinstance(value, str)
    }
    header = ["host µs per eager call", *labels]
    return "\n".join([report.table(header, rows), *sorted(remarks)])


def write(path: Path, environment_: dict[str, Any], rows: list[dict[str, Any]], asked: int) -> None:
    """Write the result file; a run that is killed leaves what it had, fewer rows than asked for."""
    method = {
        "chain_calls": CHAIN,
        "flush_bytes": FLUSH_BYTES,
        "burst_seconds": BURST_SECONDS,
        "ratio": f"median over bursts of {BASELINE} time / own time",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "environment": environment_,
        "method": method,
        "rows": rows,
        "rows_asked": asked,
    }
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    unfinished.replace(path)


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] in OTHERS:
        status: int = importlib.import_module(OTHERS[arguments[0]]).main(arguments[1:])
        return status
    options = parse(arguments)
    rows = rows_of(options)
    if options.list:
        print("\n".join(row.name for row in rows))
        return 0
    if not rows:
        print(f"no {options.kind} row matches {options.rows!r}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was measured", file=sys.stderr)
        return 3
    if options.compile_only:
        compile_rows(rows, options.labels)
        return 0
    if options.compile_processes:
        compile_ahead(
            options.kind, options.row_set, rows, options.labels, options.compile_processes
        )
    where = environment.describe(options.commit)
    for name in ("gpu", "torch", "triton", "commit", "command"):
        print(f"{name}: {where[name]}")
    labels: list[str] = options.labels

    def save(results: list[dict[str, Any]]) -> None:
        if options.output:
            write(options.output, where, results, asked=len(rows))

    if options.kind == "overhead":
        results = run_overhead(rows, labels)
        save(results)
        text, wrong, skipped = overhead_table(results, labels), 0, 0
    else:
        measurements = run_rows(rows, options, save)
        text = report.summary(measurements, labels)
        wrong = sum(len(m.failed) for m in measurements)
        skipped = sum(bool(o.skipped) for m in measurements for o in m.outcomes.values())
    print(text)
    return 1 if wrong or (skipped and options.require_peers) else 0


def run_rows(
    rows: tuple[workloads.Workload, ...],
    options: argparse.Namespace,
    save: Callable[[list[dict[str, Any]]], None],
) -> list[Measurement]:
    flusher = Flusher()
    measurements, results = [], []
    for index, row in enumerate(rows, 1):
        begin = time.perf_counter()
        measurement = measure(
            row, options.labels, flusher, options.repeat, against_peer=not options.fp32
        )
        measurements.append(measurement)
        results.append(as_json(measurement))
        save(results)
        seconds = time.perf_counter() - begin
        print(f"[{index}/{len(rows)}] {row.name} {seconds:.1f} s", file=sys.stderr, flush=True)
    return measurements


if __name__ == "__main__":
    os.environ["TRITON_FA_AUTOTUNE_CACHE"] = "0"  # results are of the shipped tiles
    sys.exit(main(sys.argv[1:]))

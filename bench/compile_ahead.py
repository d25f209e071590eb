"""Compile what rows need in several processes, before they are timed one after the other.

Triton compiles a variant in two to five seconds on one core, and keeps it in its disk cache. A
machine with a GPU has more cores than that; timing needs the GPU to itself, compiling does not.
"""

import contextlib
import re
import subprocess
import sys
from collections.abc import Sequence

import torch

import triton_fa
from bench.inputs import make_inputs
from bench.variants import VARIANTS, bind
from bench.workloads import Workload


def compiled(labels: Sequence[str]) -> list[str]:
    """The labels whose kernels Triton compiles."""
    return [label for label in labels if VARIANTS[label].jit]


def commands(
    kind: str, row_set: str, rows: Sequence[Workload], labels: Sequence[str], processes: int
) -> list[list[str]]:
    """One command for each process; together they cover every row once."""
    shares = [rows[n::processes] for n in range(processes)]
    return [
        [
            *(sys.executable, "-m", "bench", kind, "--set", row_set, "--compile-only"),
            *("--backend", ",".join(compiled(labels)), "--rows", exactly(share)),
        ]
        for share in shares
        if share and compiled(labels)
    ]


def exactly(rows: Sequence[Workload]) -> str:
    """A regex that finds these rows by name and no others."""
    return "^(" + "|".join(re.escape(row.name) for row in rows) + ")$"


def compile_ahead(
    kind: str, row_set: str, rows: Sequence[Workload], labels: Sequence[str], processes: int
) -> int:
    """Run the processes side by side; how many failed. A failure shows again when timing."""
    started = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL)
        for command in commands(kind, row_set, rows, labels, processes)
    ]
    return sum(process.wait() != 0 for process in started)


def compile_rows(rows: Sequence[Workload], labels: Sequence[str]) -> None:
    """Call each row once, which compiles and caches its kernels."""
    for row in rows:
        inputs = make_inputs(row, torch.device("cuda"))
        with triton_fa.strict():
            for label in compiled(labels):
                with contextlib.suppress(triton_fa.TritonFAError):  # timing says it again
                    bind(VARIANTS[label], inputs).call(inputs)
        torch.cuda.synchronize()

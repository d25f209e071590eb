"""pytest-benchmark over the same rows: ``pytest bench/test_decode_bench.py``.

What pytest-benchmark itself times is the whole measurement of a row, set-up and checks included.
The GPU times are in ``extra_info``, made as ``python -m bench`` makes them.
"""

import os
from typing import Any

import pytest
import torch

from bench import environment
from bench.measure import Measurement, Outcome, measure
from bench.timing import Flusher
from bench.workloads import Workload

os.environ["TRITON_FA_AUTOTUNE_CACHE"] = "0"  # results are of the shipped tiles
NO_GPU = "no CUDA device: benchmarks measure nothing on a CPU"


def pytest_report_header() -> str:
    if not torch.cuda.is_available():
        return f"bench: {NO_GPU}; every benchmark will be SKIPPED"
    return f"bench: {torch.cuda.get_device_name()}, torch {torch.__version__}"


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["triton_fa"] = environment.describe()


@pytest.fixture(scope="session")
def flusher() -> Flusher:
    if not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    return Flusher()


@pytest.fixture
def record(benchmark: Any, flusher: Flusher) -> Any:
    """Measure one row on one variant, judged by fp32 attention, and keep the GPU times."""

    def run(row: Workload, label: str) -> Outcome:
        seen: list[Measurement] = []

        def once() -> None:
            seen.append(measure(row, [label], flusher, bursts=3))

        benchmark.group = row.name
        benchmark.pedantic(once, rounds=1, iterations=1)
        measured = seen[-1]
        outcome = measured.outcomes[label]
        if outcome.skipped:
            pytest.skip(f"{label}: {outcome.skipped}")
        benchmark.extra_info.update(
            variant=label,
            bytes=measured.bytes,
            flops=measured.flops,
            clean_us=outcome.times.best("clean"),
            dirty_us=outcome.times.best("dirty"),
            chain_us=outcome.times.best("chain"),
            schedule_us=outcome.times.best("schedule"),
            workspace_bytes=outcome.workspace_bytes,
            deviation=outcome.deviation,
            against=outcome.against,
            correct=outcome.correct,
            note=outcome.note,
            gpu=measured.gpu,
        )
        assert outcome.correct is not False, f"{label}: deviates by {outcome.deviation}"
        return outcome

    return run

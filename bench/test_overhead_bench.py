"""Host cost of one eager call, per entry point and backend: pytest-benchmark times it directly."""

from typing import Any

import pytest
import torch

import triton_fa
from bench.__main__ import OVERHEAD_ROWS
from bench.conftest import NO_GPU
from bench.inputs import make_inputs
from bench.reading import HOST_GROUP
from bench.timing import host_microseconds
from bench.variants import VARIANTS, bind
from bench.workloads import find


@pytest.mark.parametrize("label", ["triton", "3", "4"])
@pytest.mark.parametrize("name", OVERHEAD_ROWS)
def test_host_cost_of_a_call(benchmark: Any, name: str, label: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    inputs = make_inputs(find(name), torch.device("cuda"))
    with triton_fa.strict():
        try:
            bound = bind(VARIANTS[label], inputs)
            bound.call(inputs)
        except triton_fa.TritonFAError as error:
            pytest.skip(f"{label}: {error}")
        benchmark.group = f"{HOST_GROUP}{name}"
        benchmark.pedantic(lambda: bound.call(inputs), rounds=50, iterations=20, warmup_rounds=5)
        benchmark.extra_info["host_us"] = host_microseconds(lambda: bound.call(inputs))
    torch.cuda.synchronize()

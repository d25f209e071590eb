"""Every core prefill row on every backend; ``python -m bench prefill`` interleaves, for ratios."""

from typing import Any

import pytest

from bench.workloads import PREFILL, Workload


@pytest.mark.parametrize("label", ["triton", "3", "4"])
@pytest.mark.parametrize("row", PREFILL, ids=lambda row: row.name)
def test_prefill(record: Any, row: Workload, label: str) -> None:
    record(row, label)

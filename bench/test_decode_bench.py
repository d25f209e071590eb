"""Every core decode row on every backend; ``python -m bench decode`` interleaves, for ratios."""

from typing import Any

import pytest

from bench.workloads import DECODE, Workload


@pytest.mark.parametrize("label", ["triton", "3", "4"])
@pytest.mark.parametrize("row", DECODE, ids=lambda row: row.name)
def test_decode(record: Any, row: Workload, label: str) -> None:
    record(row, label)

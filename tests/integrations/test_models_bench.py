"""Whole models as the benchmarks run them, small and on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", "5.17", reason="needs transformers 5.17: nox -s integrations")

from transformers import AttentionInterface

from bench import models

HAS_PAGED = "paged|sdpa" in AttentionInterface().valid_keys()
MODES = tuple(m for m in models.MODES if m != "paged-graph" and (HAS_PAGED or m != "paged"))


@pytest.mark.parametrize("name", models.MODELS)
def test_every_way_to_generate(name: str) -> None:
    row = models.judge(name, MODES, models.setting(tiny=True))
    assert models.passed(row, MODES), row
    assert set(row["modes"]) == set(MODES)
    assert name in models.table([row], MODES)


def logits() -> torch.Tensor:
    """Of one row and three tokens; the second choice is 0.1 behind at the second token."""
    exact = torch.zeros(1, 3, 5)
    exact[0, :, 2] = 1
    exact[0, 1, 4] = 0.9
    return exact


@pytest.mark.parametrize(("allowed", "correct"), [(0.11, True), (0.09, False)])
def test_a_difference_has_to_be_a_tie(allowed: float, correct: bool) -> None:
    wanted = torch.tensor([[2, 2, 2]])
    found = models.compare(torch.tensor([[2, 4, 3]]), wanted, logits(), allowed)
    assert found["correct"] is correct
    assert found["tokens_equal"] == 1
    assert found["tokens_compared"] == 2
    (difference,) = found["first_differences"]
    assert difference["position"] == 1
    assert difference["logits_gap"] == pytest.approx(0.1, abs=1e-6)


def test_equal_tokens() -> None:
    wanted = torch.tensor([[2, 2, 2]])
    found = models.compare(wanted, wanted, logits(), 0.0)
    assert found["correct"]
    assert found["tokens_compared"] == 3


def test_a_way_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_mode(mode: str, *_: Any) -> torch.Tensor:
        raise RuntimeError(f"no {mode}")

    monkeypatch.setattr(models, "run_mode", run_mode)
    row = models.judge("llama", ("dynamic",), models.setting(tiny=True))
    assert not models.passed(row, ("dynamic",))
    assert "! llama, dynamic: RuntimeError: no dynamic" in models.table([row], ("dynamic",))


def test_a_model_whose_process_ends_early_is_named(tmp_path: Path) -> None:
    rows = [{"name": "llama", "failed": "exit status 1"}]
    assert not models.passed(rows[0], ("dynamic",))
    assert "exit status 1" in models.table(rows, ("dynamic",))

"""The serving loop of the benchmarks, and decode over ranks, on the CPU with small sizes."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import serving
from bench.engine import Batch, Engine, Memory
from bench.serving_model import rotated
from bench.trace import DUMMY_PAGE, Limits, Request, random_trace, schedule

ROOT = Path(__file__).resolve().parents[1]
LIMITS = Limits(batch=3, chunk=7, page=4, columns=8, pages=20)
BUCKETS = [1, 3]


def trace() -> list[Request]:
    return random_trace(6, (2, 20), (1, 6), 1.0, seed=4)


def test_every_token_runs_once_and_in_order() -> None:
    requests = trace()
    seen = {number: 0 for number in range(len(requests))}
    for step in schedule(requests, LIMITS, BUCKETS):
        rows = [part for part in (step.prefill, step.decode) if part is not None]
        for part in rows:
            for request, position in part.history.T:
                if request >= 0:
                    assert position == seen[request]
                    seen[request] += 1
        if step.prefill is not None:
            assert sum(step.prefill.tokens) <= LIMITS.chunk
        if step.decode is not None:
            assert step.decode.batch in BUCKETS
            assert set(step.decode.tokens) == {1}
        assert sum(int((part.requests >= 0).sum()) for part in rows) <= LIMITS.batch
    assert seen == {n: r.prompt + r.new - 1 for n, r in enumerate(requests)}


def test_running_sequences_share_no_page() -> None:
    owners: dict[int, int] = {}
    ended: set[int] = set()
    requests = trace()
    for step in schedule(requests, LIMITS, BUCKETS):
        for part in (step.prefill, step.decode):
            if part is None:
                continue
            for request, length, table in zip(part.requests, part.lengths, part.table, strict=True):
                pages = table[: -(-length // LIMITS.page)]
                if request < 0:
                    assert (pages == DUMMY_PAGE).all()
                    continue
                assert DUMMY_PAGE not in pages
                for page in pages.tolist():
                    before = owners.get(page, request)
                    assert before == request or before in ended
                    owners[page] = request
                if length == requests[request].prompt + requests[request].new - 1:
                    ended.add(int(request))


def test_arrivals_are_waited_for() -> None:
    late = [Request(0, 3, 2), Request(50, 3, 2)]
    steps = list(schedule(late, LIMITS, BUCKETS))
    assert len(steps) == 4  # a prompt and a token each, one after the other


def dense_tokens(memory: Memory, number: int, request: Request) -> list[int]:
    """Greedy tokens without cache, pages or batches: everything again for each token."""
    shape, model = memory.shape, memory.model
    tokens = memory.prompts[number, : request.prompt]

    def attend(_: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        group = shape.heads_q // shape.heads_kv
        heads = [x.transpose(0, 1) for x in (q, *(y.repeat_interleave(group, 1) for y in (k, v)))]
        out = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        return out.transpose(0, 1)

    for _ in range(request.new):
        last = torch.tensor([len(tokens) - 1])
        logits = model.forward(tokens, torch.arange(len(tokens)), last, attend)
        tokens = torch.cat((tokens, logits.argmax(-1)))
    return tokens[request.prompt :].tolist()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_engine_gives_the_tokens_of_plain_attention(seed: int) -> None:
    requests = random_trace(5, (2, 20), (1, 6), 1.0, seed=seed)
    memory = Memory(serving.TINY, LIMITS, requests, "cpu")
    for cache in (memory.k_cache, memory.v_cache):
        cache.fill_(torch.nan)
        cache[:, DUMMY_PAGE] = 0
    served = Engine(memory, "torch")
    steps = [memory.prepared(step) for step in schedule(requests, LIMITS, BUCKETS)]
    assert len(served.run(steps, record=True)) == len(steps)
    for number, found in enumerate(serving.streams(served, requests, served.history)):
        assert found.tolist() == dense_tokens(memory, number, requests[number])
    found = serving.same_tokens(served, served, requests)
    assert found["correct"]
    assert found["tokens_equal"] == sum(r.new for r in requests)


def two_engines(requests: list[Request]) -> tuple[Engine, Engine]:
    memory = Memory(serving.TINY, LIMITS, requests, "cpu")
    steps = [memory.prepared(step) for step in schedule(requests, LIMITS, BUCKETS)]
    engines = Engine(memory, "torch"), Engine(memory, "torch")
    for one in engines:
        one.run(steps, record=True)
    return engines


def test_a_tie_is_no_difference_and_anything_else_is() -> None:
    """Tokens of a close second are accepted only as far as the logits are off."""
    requests = [Request(0, 5, 4), Request(0, 6, 4)]
    one, other = two_engines(requests)
    number, token = 1, 2
    place = requests[number].prompt + token
    history, second = one.history[number], other.top_tokens[number, place, 1]
    gap = float(other.top[number, place, 0] - other.top[number, place, 1])
    history[place] = second
    for noise, correct in ((0.6 * gap, True), (0.4 * gap, False)):
        for served in (one, other):
            served.top[0, requests[0].prompt] += noise
        found = serving.same_tokens(one, other, requests)
        for served in (one, other):
            served.top[0, requests[0].prompt] -= noise
        assert found["correct"] is correct
        assert [(d["request"], d["token"]) for d in found["first_differences"]] == [(1, 2)]
        assert found["first_differences"][0]["logits_gap"] == pytest.approx(gap, rel=1e-3)
        assert found["tokens_equal"] == 6


def test_a_wrong_schedule_of_keys_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the comparison is for: an engine that loses one key gives other tokens."""
    requests = trace()
    memory = Memory(serving.TINY, LIMITS, requests, "cpu")
    steps = [memory.prepared(step) for step in schedule(requests, LIMITS, BUCKETS)]
    right, wrong = Engine(memory, "torch"), Engine(memory, "torch")
    right.run(steps, record=True)
    attend = Engine.attend

    def short(self: Engine, layer: int, q: torch.Tensor, batch: Batch, *more: Any) -> torch.Tensor:
        fewer = replace(batch, lengths=(batch.lengths - 1).clamp(min=1))
        return attend(self, layer, q, fewer, *more)

    monkeypatch.setattr(Engine, "attend", short)
    wrong.run(steps, record=True)
    assert not serving.same_tokens(wrong, right, requests)["correct"]


def test_rotation_keeps_lengths_and_depends_on_the_distance() -> None:
    angles = torch.arange(6.0)[:, None] * torch.tensor([1.0, 0.1])
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    q, k = torch.randn(2, 1, 3, 4).expand(2, 6, 3, 4)
    q, k = rotated(q, cos, sin), rotated(k, cos, sin)
    products = (q[2:] * k[:-2]).sum(-1)
    torch.testing.assert_close(products, products[:1].expand_as(products))


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "serving.json"
    arguments = ["--tiny", "--repeat", "1", "--backend", "torch", "--output", str(path)]
    assert serving.main(arguments) == 0
    assert "tokens_per_s" in capsys.readouterr().out
    assert path.exists()


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert serving.main([]) == 3


@pytest.mark.xdist_group("ranks")
def test_ranks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "bench.ranks"]
    done = subprocess.run(
        [*command, "--tiny", "--output", str(tmp_path / "ranks.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" ok ") == 2
    assert np.all([line[:1] != "!" for line in done.stdout.splitlines()])

"""Measuring tiles on the chip at hand, and keeping the quickest."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from triton_fa import device as device_facts
from triton_fa import normalize, store
from triton_fa.backends.triton import BACKEND
from triton_fa.dump import versions
from triton_fa.env import settings
from triton_fa.kernels import choice, plans
from triton_fa.kernels.choice import Choice
from triton_fa.problem import Problem, Tensors

TIE = 0.99
"""A tile has to be quicker than this part of the shipped one's time: the rest is noise."""
ROUNDS = 25
FLUSH_BYTES = 256 << 20  # several times any L2

Call = Callable[[], object]
Timer = Callable[[Mapping[Any, Call]], Mapping[Any, float]]


@dataclass(frozen=True, slots=True)
class Workload:
    """A call to measure: `batch` sequences of equal lengths, causal, over a cache."""

    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    page_size: int  # 0: not paged
    batch: int
    seqlen_q: int
    seqlen_k: int


@dataclass(slots=True)
class Found:
    """What came out for one choice. Times are microseconds, one for each workload."""

    choice: Choice[Any]
    shipped: Any
    tile: Any
    times: dict[Any, list[float]] = field(default_factory=dict)
    failures: dict[Any, str] = field(default_factory=dict)

    @property
    def gain(self) -> float:
        """How many times as quick as the shipped tile."""
        return 1 / _relative(self.times[self.tile], self.times[self.shipped])

    def value(self) -> dict[str, Any]:
        """The entry of the store."""
        return {
            "tile": asdict(self.tile),
            "shipped": asdict(self.shipped),
            "gain": round(self.gain, 3),
            "microseconds": [round(t, 2) for t in self.times[self.tile]],
            "versions": versions(),
        }


def problem(work: Workload, device: torch.device) -> Problem:
    """The call of a workload, with random values and pages that lie anywhere."""
    rng = torch.Generator(device).manual_seed(0)
    randn = functools.partial(torch.randn, generator=rng, device=device, dtype=work.dtype)
    q = randn(work.batch, work.seqlen_q, work.num_heads_q, work.head_dim)
    table = None
    rows, tokens = work.batch, work.seqlen_k
    if work.page_size:
        each = -(-work.seqlen_k // work.page_size)
        rows, tokens = work.batch * each, work.page_size
        pages = torch.randperm(rows, generator=rng, device=device)
        table = pages.view(work.batch, each).to(torch.int32)
    k = randn(rows, tokens, work.num_heads_kv, work.head_dim)
    v = randn(rows, tokens, work.num_heads_kv, work.head_dim_v)
    lengths = torch.full((work.batch,), work.seqlen_k, dtype=torch.int32, device=device)
    options = normalize.Options("kvcache", causal=True)
    return normalize.problem(Tensors(q, k, v, page_table=table, seqused_k=lengths), options)


def choice_of(problem: Problem) -> Choice[Any]:
    """The choice that decides a workload's call."""
    spec = problem.spec
    facts = device_facts.facts(spec.device)
    most_rows = problem.bounds.max_seqlen_q * spec.q_heads_per_kv
    rows = plans.decode_rows(spec, facts, most_rows, varlen_q=False)
    if rows >= most_rows:
        return choice.decode_choice(spec, facts, rows)
    return choice.prefill_choice(spec, facts, most_rows)


def tune(
    works: Sequence[Workload],
    device: torch.device,
    *,
    timer: Timer | None = None,
    on_tile: Callable[[int], object] = lambda total: None,
) -> list[Found]:
    """Measure every candidate on every workload; the best of each choice is in `tile`.

    Args:
        works: Workloads. Those that share a choice are weighed equally, each by its ratio to the
            shipped tile.
        device: Where to run.
        timer: Microseconds of calls; default: of replays of a CUDA graph.
        on_tile: Called after each candidate is compiled, with how many there are in all.
    """
    timer = timer or graph_microseconds
    grouped: dict[Any, tuple[Choice[Any], list[Workload]]] = {}
    for work in works:
        made = choice_of(problem(work, device))
        grouped.setdefault(made.key, (made, []))[1].append(work)
    total = sum(len(made.candidates()) * len(same) for made, same in grouped.values())
    done = functools.partial(on_tile, total)
    return [_measured(made, same, device, timer, done) for made, same in grouped.values()]


def keep(found: Found, run_directory: Path) -> Path:
    """Put a result into the store; into a new file of `run_directory` where that may not be."""
    key, value = dict(found.choice.key), found.value()
    path = store.write(key, value) if settings().autotune_cache else None
    choice.forget()
    return path or store.write_run(run_directory, str(key["kernel"]), {"key": key} | value)


def _measured(
    made: Choice[Any],
    works: Sequence[Workload],
    device: torch.device,
    timer: Timer,
    on_tile: Callable[[], object],
) -> Found:
    shipped, *others = made.candidates()
    found = Found(made, shipped, shipped)
    for work in works:
        given = problem(work, device)
        calls: dict[Any, Call] = {}
        want = None
        for tile in (shipped, *others):
            if tile not in found.failures:
                try:
                    call = _prepared(made, tile, given)
                    want = _agreeing(call(), want, given)
                    calls[tile] = call
                except Exception as error:
                    # A tile that cannot be used here is no candidate; the shipped one has to be.
                    if tile == shipped:
                        raise
                    found.failures[tile] = f"{type(error).__name__}: {error}"
            on_tile()
        for tile, microseconds in timer(calls).items():
            found.times.setdefault(tile, []).append(microseconds)
    base = found.times[shipped]
    whole = {
        t: _relative(times, base) for t, times in found.times.items() if len(times) == len(base)
    }
    best = min(whole, key=lambda tile: whole[tile])
    if whole[best] < TIE:
        found.tile = best
    return found


def _prepared(made: Choice[Any], tile: Any, given: Problem) -> Callable[[], torch.Tensor]:
    with choice.trying(made, tile):
        run = BACKEND.prepare(given)
    return lambda: run(given.tensors).out


def _agreeing(got: torch.Tensor, want: torch.Tensor | None, given: Problem) -> torch.Tensor:
    """`want`, unless `got` is further from it than rounding explains."""
    if want is None:
        return got
    far = (got.float() - want.float()).abs().max().item()
    allowed = 4 * torch.finfo(got.dtype).eps * given.tensors.v.abs().max().item()
    if not far <= allowed:
        raise ArithmeticError(f"differs from the shipped tile by {far:.2g}, over {allowed:.2g}")
    return want


def _relative(times: Sequence[float], base: Sequence[float]) -> float:
    """Geometric mean of the ratios."""
    return math.exp(sum(math.log(t / b) for t, b in zip(times, base, strict=True)) / len(base))


def graph_microseconds(calls: Mapping[Any, Call]) -> dict[Any, float]:
    """Median time of a replay of each call, with an L2 that holds nothing of it.

    The calls take turns, so that clocks that drift do so for all of them.
    """
    pool = torch.cuda.graph_pool_handle()  # they run one after the other, in the same memory
    graphs = {name: _captured(call, pool) for name, call in calls.items()}
    flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    seen: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        events = {}
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.sum()
            begin.record()
            graph.replay()
            end.record()
            events[name] = (begin, end)
        torch.cuda.synchronize()
        for name, (begin, end) in events.items():
            seen[name].append(begin.elapsed_time(end) * 1e3)
    return {name: median(times) for name, times in seen.items()}


def _captured(call: Call, pool: Any) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        call()
    return graph

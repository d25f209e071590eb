"""A tiny engine that serves whatever hypothesis asks of it, judged step by step.

Two layers, one of them with a sliding window, on one paged pool. The model of it is a dense list of
keys and values per sequence, in float64. Pages are poisoned whenever nobody owns them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

import reference
import triton_fa
from parity_tests.budgets import Limits, Result, Truth, judge
from parity_tests.cases import Case
from parity_tests.conftest import DEVICE, FEWER
from parity_tests.inputs import GARBAGE_PAGES
from parity_tests.layouts import int32, named_dtype, prefix_sum
from parity_tests.poison import GARBAGE, poisoned_allocations
from parity_tests.runners import Ver

Tensor = torch.Tensor

WINDOWS = ((-1, -1), (5, 0))  # of the layers
# The interpreter cuts bfloat16 off where it should round, and runs programs one after the other.
DTYPE, MARGIN = ("float16", 3) if DEVICE.interpreted else ("bfloat16", 0)
HEADS_Q, HEADS_KV, DIM, PAGE, COLUMNS = (
    (2, 1, 16, 4, 10) if DEVICE.interpreted else (8, 2, 64, 16, 40)
)
MOST, PROMPT, CHUNK = (3, 30, 12) if DEVICE.interpreted else (6, 500, 200)
CAPACITY = PAGE * COLUMNS


@dataclass
class Sequence:
    """What the engine knows of a sequence, and its true keys and values, layer by layer."""

    waiting: int  # prompt tokens that are still to be prefilled
    pages: list[int] = field(default_factory=list)
    length: int = 0
    keys: list[Tensor] = field(default_factory=lambda: [_nothing() for _ in WINDOWS])
    values: list[Tensor] = field(default_factory=lambda: [_nothing() for _ in WINDOWS])


class Step(NamedTuple):
    """What a step hands to its layers; rows behind the last sequence are padding."""

    q: Tensor  # (tokens, heads_q, dim)
    k: Tensor  # (layers, tokens, heads_kv, dim): new keys
    v: Tensor
    table: Tensor  # (batch, columns)
    lengths: Tensor  # (batch,): keys in the cache before the attention kernels run
    prefix: Tensor  # (batch + 1,): of queries, and of new keys
    out: Tensor  # (layers, tokens, heads_q, dim)


def _nothing() -> Tensor:
    return torch.empty(0, HEADS_KV, DIM, dtype=torch.float64, device=DEVICE.name)


class Engine(RuleBasedStateMachine):
    """Admits, prefills in chunks, decodes, evicts; `ver` attends."""

    ver: Ver

    def __init__(self) -> None:
        super().__init__()
        shape = (len(WINDOWS), MOST * COLUMNS, PAGE, HEADS_KV, DIM)
        self.k_cache = self._full(*shape)
        self.v_cache = self._full(*shape)
        self.free = list(range(MOST * COLUMNS))
        self.running: dict[int, Sequence] = {}
        self.names = count()
        self.numbers = torch.Generator().manual_seed(0)
        self.planner = triton_fa.StepPlanner(
            MOST,
            HEADS_Q,
            HEADS_KV,
            DIM,
            dtype=named_dtype(DTYPE),
            page_size=PAGE,
            window_size=WINDOWS[1],
            sm_margin=MARGIN,
            ver=self.ver,
            device=DEVICE.name,
        )
        self.static: Step | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.lses: list[Tensor] = []

    # ---------------------------------------------------------------- what may be asked of it

    @initialize(prompts=st.lists(st.integers(PAGE, PROMPT), min_size=2, max_size=MOST))
    def begin(self, prompts: list[int]) -> None:
        for tokens in prompts:
            self.admit(tokens)
        self.prefill(CHUNK, append=False, beside_decode=False)

    @precondition(lambda self: len(self.running) < MOST)
    @rule(tokens=st.integers(1, PROMPT))
    def admit(self, tokens: int) -> None:
        self.running[next(self.names)] = Sequence(tokens)

    @precondition(lambda self: any(s.waiting for s in self.running.values()))
    @rule(size=st.integers(1, CHUNK), append=st.booleans(), beside_decode=st.booleans())
    def prefill(self, size: int, append: bool, beside_decode: bool) -> None:
        """A chunk of every prompt, perhaps in one batch with sequences that decode."""
        work = {name: min(size, s.waiting) for name, s in self.running.items() if s.waiting}
        if beside_decode:
            work |= dict.fromkeys(self._ready(), 1)
        for name, tokens in work.items():
            self.running[name].waiting = max(0, self.running[name].waiting - tokens)
        self._serve(work, append)

    @precondition(lambda self: self._ready())
    @rule(batch=st.integers(1, MOST), append=st.booleans())
    def decode(self, batch: int, append: bool) -> None:
        """One token of each sequence that has its prompt, or of the last few of them."""
        self._serve(dict.fromkeys(self._ready()[-batch:], 1), append)

    @precondition(lambda self: self._ready())
    @rule(batch=st.integers(1, MOST))
    def replay(self, batch: int) -> None:
        """The same in buffers of the largest batch, by a graph captured for any lengths."""
        self._serve(dict.fromkeys(self._ready()[-batch:], 1), append=True, padded=True)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, MOST - 1))
    def evict(self, which: int) -> None:
        """Its pages are the first to be used again."""
        gone = self.running.pop(list(self.running)[which % len(self.running)])
        self.k_cache[:, gone.pages] = torch.nan
        self.v_cache[:, gone.pages] = torch.nan
        self.free += gone.pages

    @invariant()
    def the_pool_holds_every_token_and_nothing_else(self) -> None:
        """Free pages, and slots behind the end of a sequence, are as poisoned as they were."""
        for cache, names in ((self.k_cache, "keys"), (self.v_cache, "values")):
            expected = torch.full_like(cache, torch.nan)
            for sequence in self.running.values():
                page, slot = self._slots(sequence, 0, sequence.length)
                expected[:, page, slot] = torch.stack(getattr(sequence, names)).to(cache.dtype)
            torch.testing.assert_close(cache, expected, rtol=0, atol=0, equal_nan=True)

    # ---------------------------------------------------------------- a step

    def _ready(self) -> list[int]:
        fits = (name for name, s in self.running.items() if s.length < CAPACITY)
        return [name for name in fits if not self.running[name].waiting]

    def _serve(self, work: dict[int, int], append: bool, padded: bool = False) -> None:
        """`work[name]` new tokens of each sequence, written by the engine or by the call."""
        sequences = [self.running[name] for name in work]
        tokens = list(work.values())
        step = self._step(sequences, tokens)
        for row, (sequence, new) in enumerate(zip(sequences, tokens, strict=True)):
            first, end = int(step.prefix[row]), int(step.prefix[row + 1])
            for layer in range(len(WINDOWS)):
                for true, given in ((sequence.keys, step.k), (sequence.values, step.v)):
                    true[layer] = torch.cat([true[layer], given[layer, first:end].double()])
            if not append:
                page, slot = self._slots(sequence, sequence.length, sequence.length + new)
                self.k_cache[:, page, slot] = step.k[:, first:end]
                self.v_cache[:, page, slot] = step.v[:, first:end]
                step.lengths[row] += new
            sequence.length += new
        if padded:
            step = self._in_static_buffers(step)
            lses = self._replayed(step)
        else:
            lses = self._attend(step, max(tokens), append)
        for layer, lse in enumerate(lses):
            self._judge(layer, step, sequences, lse)

    def _step(self, sequences: list[Sequence], tokens: list[int]) -> Step:
        """The inputs of a step, and pages for its tokens."""
        table = torch.tensor(GARBAGE_PAGES, dtype=torch.int32).repeat(len(tokens), COLUMNS)
        table = table[:, :COLUMNS].contiguous()
        for row, (sequence, new) in enumerate(zip(sequences, tokens, strict=True)):
            while len(sequence.pages) * PAGE < sequence.length + new:
                sequence.pages.append(self.free.pop())
            table[row, : len(sequence.pages)] = torch.tensor(sequence.pages)
        total, layers = sum(tokens), len(WINDOWS)
        return Step(
            self._normal(total, HEADS_Q, DIM),
            self._normal(layers, total, HEADS_KV, DIM),
            self._normal(layers, total, HEADS_KV, DIM),
            table.to(DEVICE.name),
            int32([sequence.length for sequence in sequences], DEVICE.name),
            int32(prefix_sum(tokens), DEVICE.name),
            self._full(layers, total, HEADS_Q, DIM),
        )

    def _attend(self, step: Step, max_seqlen_q: int, append: bool) -> list[Tensor]:
        """Plan the step, and run its layers; the lse of each."""
        schedules = self._plan(step, max_seqlen_q, append)
        with triton_fa.strict(), poisoned_allocations():
            return list(self._layers(step, schedules, max_seqlen_q, append))

    def _plan(self, step: Step, max_seqlen_q: int, append: bool) -> triton_fa.StepSchedules:
        new: dict[str, Any] = {"cu_seqlens_k_new": step.prefix, "max_seqlen_k_new": max_seqlen_q}
        return self.planner.plan(
            step.lengths,
            max_seqlen_k=CAPACITY,
            max_seqlen_q=max_seqlen_q,
            cu_seqlens_q=step.prefix,
            **(new if append else {}),
        )

    def _layers(
        self, step: Step, schedules: triton_fa.StepSchedules, max_seqlen_q: int, append: bool
    ) -> Iterator[Tensor]:
        for layer, (window, schedule) in enumerate(zip(WINDOWS, schedules, strict=True)):
            new: dict[str, Any] = {"k": step.k[layer], "v": step.v[layer]}
            new["cu_seqlens_k_new"] = step.prefix
            _, lse = triton_fa.flash_attn_with_kvcache(
                step.q,
                self.k_cache[layer],
                self.v_cache[layer],
                cache_seqlens=step.lengths,
                page_table=step.table,
                cu_seqlens_q=step.prefix,
                max_seqlen_q=max_seqlen_q,
                causal=True,
                window_size=window,
                scheduler_metadata=schedule,
                sm_margin=MARGIN,
                return_softmax_lse=True,
                ver=self.ver,
                out=step.out[layer],
                **(new if append else {}),
            )
            yield lse

    # ---------------------------------------------------------------- a captured step

    def _in_static_buffers(self, step: Step) -> Step:
        """The step in the buffers that a graph reads; rows behind its own are padding."""
        if self.static is None:
            self.static = Step(
                self._full(MOST, HEADS_Q, DIM),
                self._full(len(WINDOWS), MOST, HEADS_KV, DIM),
                self._full(len(WINDOWS), MOST, HEADS_KV, DIM),
                step.table.new_full((MOST, COLUMNS), GARBAGE),
                step.lengths.new_zeros(MOST),
                step.prefix.new_zeros(MOST + 1),
                self._full(len(WINDOWS), MOST, HEADS_Q, DIM),
            )
        batch = len(step.lengths)
        for name in ("q", "k", "v", "out"):
            into: Tensor = getattr(self.static, name)
            into.fill_(torch.nan)[..., :batch, :, :] = getattr(step, name)
        self.static.table[:batch] = step.table
        self.static.lengths[:batch], self.static.lengths[batch:] = step.lengths, 0
        self.static.prefix[: batch + 1], self.static.prefix[batch:] = step.prefix, batch
        return self.static

    def _replayed(self, step: Step) -> list[Tensor]:
        """The step by the graph; without CUDA, or on a backend that waits, by plain calls."""
        if DEVICE.interpreted or self.ver != "triton":
            return self._attend(step, 1, append=True)
        schedules = self._plan(step, 1, append=True)
        if self.graph is None:
            inputs = [tensor.clone() for tensor in step]
            warm = torch.cuda.Stream()
            warm.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(warm):
                list(self._layers(step, schedules, 1, append=True))
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.lses = list(self._layers(step, schedules, 1, append=True))
            for tensor, before in zip(step, inputs, strict=True):
                tensor.copy_(before)
        self.graph.replay()
        return self.lses

    # ---------------------------------------------------------------- the judge

    def _judge(self, layer: int, step: Step, sequences: list[Sequence], lse: Tensor) -> None:
        """Attention over the dense lists, of the same queries."""
        padding = len(step.lengths) - len(sequences)
        lengths = [sequence.length for sequence in sequences] + [0] * padding
        keys = torch.cat([sequence.keys[layer] for sequence in sequences])
        values = torch.cat([sequence.values[layer] for sequence in sequences])
        cu_seqlens_k = int32(prefix_sum(lengths), DEVICE.name)
        masks: dict[str, Any] = {"causal": True, "window_size": WINDOWS[layer]}
        given = (step.prefix, cu_seqlens_k)
        out, exact_lse = reference.flash_attn_varlen_func(step.q, keys, values, *given, **masks)
        rounded = (step.q, keys.to(step.q.dtype), values.to(step.q.dtype))
        baseline, _ = reference.flash_attn_varlen_func(
            *rounded, *given, **masks, attend=reference.attend_low_precision
        )
        case = Case(
            dtype=DTYPE,
            heads_q=HEADS_Q,
            heads_kv=HEADS_KV,
            head_dim=DIM,
            head_dim_v=DIM,
            q_layout="packed",
            page_size=PAGE,
            causal=True,
            window=WINDOWS[layer],
            out=True,
            seqlens_q=tuple(step.prefix.diff().tolist()),
            seqlens_k=tuple(lengths),
        )
        result, truth = Result(step.out[layer], lse), Truth(out, exact_lse, baseline)
        _, problems = judge(case, result, truth, Limits.of(case))
        assert not problems, f"layer {layer}: {problems}: {case}"

    # ---------------------------------------------------------------- memory

    def _slots(self, sequence: Sequence, first: int, end: int) -> tuple[Tensor, Tensor]:
        """The pages and the places in them of some of its tokens."""
        token = torch.arange(first, end)
        return torch.tensor(sequence.pages, dtype=torch.int64)[token // PAGE], token % PAGE

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.numbers).to(DEVICE.name, named_dtype(DTYPE))

    def _full(self, *shape: int) -> Tensor:
        return torch.full(shape, torch.nan, dtype=named_dtype(DTYPE), device=DEVICE.name)


class TorchEngine(Engine):
    ver = "torch"


class TritonEngine(Engine):
    ver = "triton"


@pytest.mark.parametrize("engine", [TorchEngine, TritonEngine])
def test_every_request_once(engine: type[Engine]) -> None:
    """What few examples in the interpreter may leave out: eager, padded, shrunken, pages reused."""
    machine = engine()
    machine.begin([CHUNK + 3, CHUNK, 2])
    machine.replay(1)
    machine.evict(0)
    machine.admit(PROMPT)
    machine.prefill(CHUNK - 1, append=True, beside_decode=True)
    machine.replay(2)
    machine.decode(1, append=True)
    machine.evict(2)
    machine.admit(1)
    machine.prefill(CHUNK, append=False, beside_decode=True)
    machine.replay(MOST)
    machine.the_pool_holds_every_token_and_nothing_else()


TestTorch = TorchEngine.TestCase
TestTorch.settings = hypothesis.settings(stateful_step_count=30)
TestTriton = TritonEngine.TestCase
TestTriton.settings = hypothesis.settings(
    FEWER, stateful_step_count=5 if DEVICE.interpreted else 50
)

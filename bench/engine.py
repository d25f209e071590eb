"""The engine that serves a trace: paged cache, schedule once per step, graphs for decoding."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import triton_fa
from bench.serving_model import Model, Shape
from bench.trace import Limits, Request, Rows, Step

Tensor = torch.Tensor


@dataclass(frozen=True)
class Batch:
    """`Rows` on the device, or the buffers of a captured graph."""

    history: Tensor  # (total,) int64: places of the tokens in the history
    positions: Tensor  # (total,) int64
    slots: Tensor  # (total,) int64
    last: Tensor  # (batch,) int64: each row's last token
    target: Tensor  # (batch,) int64: place of the new token in the history
    lengths: Tensor  # (batch,) int32
    table: Tensor  # (batch, columns) int32
    prefix: Tensor  # (batch + 1,) int32 prefix sums of tokens

    def copy_(self, other: "Batch") -> None:
        for own, new in zip(vars(self).values(), vars(other).values(), strict=True):
            own.copy_(new, non_blocking=True)


@dataclass(frozen=True)
class Prepared:
    """A step with its host tensors made, so that making them is not timed."""

    prefill: tuple[Batch, int] | None  # and the longest row
    decode: Batch | None


class Memory:
    """What engines share: weights, cache, prompts."""

    def __init__(self, shape: Shape, limits: Limits, requests: list[Request], device: str) -> None:
        self.shape, self.limits, self.device = shape, limits, device
        self.longest = limits.columns * limits.page
        self.model = Model(shape, self.longest, device)
        size = (shape.layers, limits.pages, limits.page, shape.heads_kv, shape.head_dim)
        self.k_cache = torch.zeros(size, dtype=shape.dtype, device=device)
        self.v_cache = torch.zeros_like(self.k_cache)
        # One row for each request, and one that padding reads and writes.
        self.rows = len(requests) + 1
        generator = torch.Generator().manual_seed(11)
        self.prompts = torch.randint(
            0, shape.vocabulary, (self.rows, self.longest), generator=generator
        ).to(device)

    def prepared(self, step: Step) -> Prepared:
        prefill, decode = step.prefill, step.decode
        return Prepared(
            None if prefill is None else (self._batch(prefill), max(prefill.tokens)),
            None if decode is None else self._batch(decode),
        )

    def _batch(self, rows: Rows) -> Batch:
        request, position = rows.history
        spare = self.rows - 1
        history = np.where(request < 0, spare, request) * self.longest + position
        goes_on = rows.finished < 0
        target = np.where(goes_on, spare, rows.requests) * self.longest
        target += np.where(goes_on, self.longest - 1, rows.finished)
        prefix = np.cumsum((0, *rows.tokens))
        wide = (history, position, rows.slots, prefix[1:] - 1, target)
        narrow = (rows.lengths, rows.table, prefix)
        tensors = [torch.from_numpy(x.astype(np.int64)) for x in wide]
        tensors += [torch.from_numpy(x.astype(np.int32)) for x in narrow]
        if self.device == "cuda":
            tensors = [x.pin_memory() for x in tensors]
        return Batch(*tensors)


class Engine:
    """Serves with one backend."""

    def __init__(self, memory: Memory, ver: int | str) -> None:
        self.memory, self.ver = memory, ver
        shape, limits = memory.shape, memory.limits
        heads = (limits.batch, shape.heads_q, shape.heads_kv, shape.head_dim)
        options: dict[str, Any] = {
            "dtype": shape.dtype,
            "page_size": limits.page,
            "ver": ver,
            "device": memory.device,
        }
        self.prefill_planner = triton_fa.StepPlanner(*heads, **options)
        self.decode_planner = triton_fa.StepPlanner(*heads, **options)
        self.history = memory.prompts.clone()
        self.graphs: dict[int, tuple[Batch, torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool: Any = None
        # The two highest logits before each token, and whose they are; filled when recording.
        self.top = torch.zeros(*self.history.shape, 2, device=memory.device)
        self.top_tokens = torch.zeros_like(self.top, dtype=torch.int64)

    @torch.no_grad()
    def capture(self, steps: list[Prepared]) -> None:
        """A graph for each size of decode batch. Calls before and while capturing store keys."""
        sizes = {step.decode.lengths.shape[0]: step.decode for step in steps if step.decode}
        for size, example in sorted(sizes.items(), reverse=True):
            buffers = self._on_device(example)
            schedule = self._plan_decode(buffers)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._forward(buffers, None, schedule)
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                logits = self._forward(buffers, None, schedule)
            self.pool = graph.pool()
            self.graphs[size] = buffers, graph, logits

    def run(self, steps: list[Prepared], record: bool = False) -> list[float]:
        """Serve the trace; the seconds of each step, its tokens read at its end."""
        self.history.copy_(self.memory.prompts)
        seconds = []
        with triton_fa.strict(), torch.no_grad():
            self._wait()
            for step in steps:
                begin = time.perf_counter()
                if step.prefill:
                    batch, longest = step.prefill
                    buffers = self._on_device(batch)
                    logits = self._forward(buffers, longest, self.plan(buffers, longest))
                    if record:
                        self._record(buffers, logits)
                if step.decode:
                    buffers, logits = self._run_decode(step.decode)
                    if record:
                        self._record(buffers, logits)
                self._wait()
                seconds.append(time.perf_counter() - begin)
        return seconds

    def attend(self, layer: int, q: Tensor, batch: Batch, longest: int, schedule: Tensor) -> Tensor:
        """The attention call of a layer; q is (total, heads, head_dim), or (batch, 1, ...)."""
        packed: dict[str, Any] = {}
        if q.dim() == 3:
            packed = {"cu_seqlens_q": batch.prefix, "max_seqlen_q": longest}
        out = triton_fa.flash_attn_with_kvcache(
            q,
            self.memory.k_cache[layer],
            self.memory.v_cache[layer],
            cache_seqlens=batch.lengths,
            page_table=batch.table,
            causal=True,
            scheduler_metadata=schedule,
            ver=self.ver,
            **packed,
        )
        assert isinstance(out, Tensor)
        return out

    def plan(self, batch: Batch, longest: int | None) -> Tensor:
        """The step's schedule: of a decode batch if `longest` is None."""
        if longest is None:
            return self._plan_decode(batch)
        return self.prefill_planner.plan(
            batch.lengths,
            max_seqlen_k=self.memory.longest,
            max_seqlen_q=longest,
            cu_seqlens_q=batch.prefix,
        ).full

    def _plan_decode(self, batch: Batch) -> Tensor:
        return self.decode_planner.plan(batch.lengths, max_seqlen_k=self.memory.longest).full

    def _run_decode(self, batch: Batch) -> tuple[Batch, Tensor]:
        captured = self.graphs.get(batch.lengths.shape[0])
        if captured is None:
            buffers = self._on_device(batch)
            return buffers, self._forward(buffers, None, self._plan_decode(buffers))
        buffers, graph, logits = captured
        buffers.copy_(batch)
        self._plan_decode(buffers)
        graph.replay()
        return buffers, logits

    def _forward(self, batch: Batch, longest: int | None, schedule: Tensor) -> Tensor:
        """Logits of each row's last token; the new tokens enter the history."""
        history = self.history.view(-1)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for cache, new in ((self.memory.k_cache, k), (self.memory.v_cache, v)):
                cache[layer].flatten(0, 1).index_copy_(0, batch.slots, new)
            if longest is None:
                return self.attend(layer, q[:, None], batch, 1, schedule)[:, 0]
            return self.attend(layer, q, batch, longest, schedule)

        logits = self.memory.model.forward(
            history[batch.history], batch.positions, batch.last, attend
        )
        history.index_copy_(0, batch.target, logits.argmax(-1))
        return logits

    def _record(self, batch: Batch, logits: Tensor) -> None:
        values, tokens = logits.float().topk(2)
        self.top.view(-1, 2).index_copy_(0, batch.target, values)
        self.top_tokens.view(-1, 2).index_copy_(0, batch.target, tokens)

    def _on_device(self, batch: Batch) -> Batch:
        tensors = [x.to(self.memory.device, non_blocking=True) for x in vars(batch).values()]
        return Batch(*tensors)

    def _wait(self) -> None:
        if self.memory.device == "cuda":
            torch.cuda.synchronize()

"""One workload on several variants: correctness first, then interleaved times."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import triton_fa
from bench.compilations import compilations
from bench.counters import cache_bytes, flops, mandatory_bytes
from bench.environment import clock_and_power, gpu_state
from bench.inputs import Inputs, make_inputs
from bench.judge import appended, budget, judge
from bench.launches import launches
from bench.timing import CHAIN, Flusher, Times, capture, copies_for, interleaved
from bench.variants import BASELINE, VARIANTS, Bound, bind
from bench.workloads import Workload

# A chain's caches have to fit beside each other, and only short calls hide in one another.
CHAIN_CACHE_BYTES = 64 * 2**20
# torch's allocator counts in these.
ALLOCATION_BYTES = 512


@dataclass
class Outcome:
    """What became of one variant on one workload."""

    times: Times = field(default_factory=Times)
    deviation: float | None = None  # from the peer named in `against`
    against: str = ""
    correct: bool | None = None
    skipped: str = ""  # why there is nothing
    note: str = ""
    launches: int | None = None  # of one layer, or of the schedule where that is all
    plan_launches: int | None = None  # of the schedule that layers share
    workspace_bytes: int | None = None  # what a call allocates beside its output
    first_call_s: float | None = None  # of the first call in this process, schedule included
    compile_s: float | None = None  # of that, what Triton compiled; None: nothing
    host_us: float | None = None  # of an eager call


@dataclass
class Measurement:
    """One row of a result file."""

    row: Workload
    outcomes: dict[str, Outcome]
    bytes: int
    flops: int
    gpu: dict[str, Any] = field(default_factory=dict)  # clocks and power around and in the bursts

    def terabytes(self, us: float | None) -> float | None:
        """TB/s of mandatory bytes; None where nothing was timed, or only the schedule."""
        return self._rate(self.bytes, us)

    def teraflops(self, us: float | None) -> float | None:
        """TFLOP/s of visible pairs; None as above."""
        return self._rate(self.flops, us)

    def _rate(self, amount: int, us: float | None) -> float | None:
        if us is None or self.row.phase == "metadata":
            return None
        return amount * self.row.layers / us / 1e6

    @property
    def failed(self) -> list[str]:
        return [label for label, o in self.outcomes.items() if o.correct is False]


def first_call(label: str, inputs: Inputs, outcome: Outcome) -> tuple[Bound, torch.Tensor | None]:
    """Bind a variant and call it once. What earlier rows compiled or loaded is not paid again."""
    begin = time.perf_counter()
    with compilations() as compiled:
        bound, out = attempt(label, inputs)
        if inputs.q.is_cuda:
            torch.cuda.synchronize()
    outcome.first_call_s = time.perf_counter() - begin
    outcome.compile_s = sum(c.seconds for c in compiled) if compiled else None
    outcome.note = bound.note
    if inputs.row.new:  # the next variant writes there, too
        outcome.deviation, outcome.against = appended(inputs), "fp32"
        outcome.correct = outcome.deviation <= budget(inputs)
    return bound, out


def attempt(label: str, inputs: Inputs) -> tuple[Bound, torch.Tensor | None]:
    bound = bind(VARIANTS[label], inputs)
    if inputs.row.phase == "metadata":
        if bound.plan is None:
            raise triton_fa.UnsupportedError(VARIANTS[label].ver, [bound.note or "no metadata"])
        return bound, None
    inputs.forget_new()
    return bound, bound.call(inputs)


def verdict(outcome: Outcome, inputs: Inputs, out: torch.Tensor, peer: torch.Tensor | None) -> None:
    outcome.against = "fp32" if peer is None else BASELINE
    outcome.deviation = max(outcome.deviation or 0.0, judge(inputs, out, peer))
    outcome.correct = outcome.deviation <= budget(inputs)


def measure(
    row: Workload, labels: Sequence[str], flusher: Flusher, bursts: int, against_peer: bool = True
) -> Measurement:
    """Check every variant, then time those that are right, on the flusher's device."""
    inputs = make_inputs(row, flusher.buffer.device)
    outcomes = {label: Outcome() for label in labels}
    bound: dict[str, Bound] = {}
    outs: dict[str, torch.Tensor | None] = {}
    with triton_fa.strict():
        for label in labels:
            try:
                bound[label], outs[label] = first_call(label, inputs, outcomes[label])
            except triton_fa.TritonFAError as error:
                outcomes[label].skipped = str(error)
        trusted = against_peer and BASELINE in outs and outcomes[BASELINE].correct is not False
        reference = outs[BASELINE] if trusted else None
        for label, out in outs.items():
            if out is not None:
                peer = None if label == BASELINE else reference
                # FA3 judges the others; on its own it would be judged by nobody.
                if label != BASELINE or reference is None or len(outs) == 1:
                    verdict(outcomes[label], inputs, out, peer)
        right = {n: b for n, b in bound.items() if outcomes[n].correct is not False}
        outs.clear()
        gpu: dict[str, Any] = {"before": gpu_state()}
        timed, gpu["bursts"] = time_all(row, inputs, right, flusher, bursts)
        gpu["after"] = gpu_state()
        for label, one_bound in right.items():
            outcomes[label].times = timed[label]
            count_launches(outcomes[label], label, one_bound, inputs)
            if row.phase != "metadata" and flusher.buffer.is_cuda:
                outcomes[label].workspace_bytes = workspace_bytes(on(one_bound, inputs))
    del inputs, bound, right
    gc.collect()
    torch.cuda.empty_cache()
    return Measurement(row, outcomes, mandatory_bytes(row), flops(row), gpu)


def count_launches(outcome: Outcome, label: str, bound: Bound, inputs: Inputs) -> None:
    if not VARIANTS[label].captured:
        return
    if inputs.row.phase != "metadata":
        outcome.launches = launches(on(bound, inputs))
        outcome.plan_launches = launches(bound.plan) if bound.plan else 0
    elif bound.plan:
        outcome.launches = launches(bound.plan)


def workspace_bytes(call: Callable[[], torch.Tensor]) -> int:
    """What one call allocates on the GPU at its peak beside its output; a log-sum-exp counts."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    size = call().untyped_storage().nbytes()
    allocated = -(-size // ALLOCATION_BYTES) * ALLOCATION_BYTES
    return torch.cuda.max_memory_allocated() - before - allocated


def single(label: str, calls: list[Callable[[], object]]) -> Callable[[], object]:
    """The calls as one graph, or eagerly where the backend reads lengths on the host."""
    if VARIANTS[label].captured:
        kept = capture(calls), calls  # the graph reads tensors that only the calls hold
        return lambda: kept[0].replay()

    def eager() -> None:
        for call in calls:
            call()

    return eager


def call_lists(
    row: Workload, inputs: Inputs, bound: Bound
) -> tuple[list[Callable[[], object]], list[Callable[[], object]]]:
    """The calls of one sample, and those of a chain (empty where the row has none)."""
    if row.phase == "metadata":
        assert bound.plan is not None
        return [bound.plan], [bound.plan] * CHAIN
    if row.phase == "step":
        caches = rotation(inputs, min(row.layers, copies_for(cache_bytes(row))))
        layers = [on(bound, caches[i % len(caches)]) for i in range(row.layers)]
        return [*([bound.plan] if bound.plan else []), *layers], []
    one: list[Callable[[], object]] = [on(bound, inputs)]
    if row.phase != "decode" or cache_bytes(row) > CHAIN_CACHE_BYTES:
        return one, []
    caches = rotation(inputs, copies_for(mandatory_bytes(row)))
    return one, [on(bound, caches[i % len(caches)]) for i in range(CHAIN)]


def rotation(inputs: Inputs, copies: int) -> list[Inputs]:
    return [inputs, *(inputs.other_cache() for _ in range(copies - 1))]


def on(bound: Bound, inputs: Inputs) -> Callable[[], torch.Tensor]:
    return lambda: bound.call(inputs)


def time_all(
    row: Workload, inputs: Inputs, bound: dict[str, Bound], flusher: Flusher, bursts: int
) -> tuple[dict[str, Times], dict[str, list[dict[str, float] | None]]]:
    """The times of each variant, and the GPU's clock and power after each burst of a column."""
    states: dict[str, list[dict[str, float] | None]] = {"clean": [], "dirty": [], "chain": []}

    def watch(column: str) -> Callable[[], object]:
        return lambda: states[column].append(clock_and_power())

    ones: dict[str, Callable[[], object]] = {}
    plans: dict[str, Callable[[], object]] = {}
    chains: dict[str, Callable[[], object]] = {}
    for label, one_bound in bound.items():
        one, chain = call_lists(row, inputs, one_bound)
        ones[label] = single(label, one)
        if chain:
            chains[label] = single(label, chain)
        if one_bound.plan and row.phase != "metadata":
            plans[label] = single(label, [one_bound.plan])
    clean = interleaved(ones, flusher.clean, bursts, watch("clean"))
    dirty = interleaved(ones, flusher.dirty, bursts, watch("dirty"))
    chained = interleaved(chains, flusher.clean, bursts, watch("chain")) if chains else {}
    scheduled = interleaved(plans, flusher.clean, bursts, lambda: None) if plans else {}
    times = {
        label: Times(
            clean=clean[label],
            dirty=dirty[label],
            chain=tuple(t / CHAIN for t in chained.get(label, ())),
            schedule=scheduled.get(label, ()),
        )
        for label in bound
    }
    return times, states


def as_json(measurement: Measurement) -> dict[str, Any]:
    """A row of the result file. The shape itself is in workloads.py, under the same name."""
    return {
        "name": measurement.row.name,
        "phase": measurement.row.phase,
        "family": measurement.row.family,
        "bytes": measurement.bytes,
        "flops": measurement.flops,
        "gpu": measurement.gpu,
        "variants": {
            label: {
                "clean_us": outcome.times.clean,
                "dirty_us": outcome.times.dirty,
                "chain_us": outcome.times.chain,
                "schedule_us": outcome.times.schedule,
                "tb_per_s": measurement.terabytes(outcome.times.best("clean")),
                "tflop_per_s": measurement.teraflops(outcome.times.best("clean")),
                "launches": outcome.launches,
                "plan_launches": outcome.plan_launches,
                "workspace_bytes": outcome.workspace_bytes,
                "first_call_s": outcome.first_call_s,
                "compile_s": outcome.compile_s,
                "deviation": outcome.deviation,
                "against": outcome.against,
                "correct": outcome.correct,
                "skipped": outcome.skipped,
                "note": outcome.note,
            }
            for label, outcome in measurement.outcomes.items()
        },
    }

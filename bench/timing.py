"""How a call on the GPU is timed.

- A call is captured in a CUDA graph and its replay timed between two events, so that Python and the
  launch queue do not count. The kernel that evicts L2 runs before the first event and keeps the GPU
  busy while the host enqueues the rest: the replay never waits for the host.
- *clean*: L2 is evicted by reading a large buffer, as a matrix product before the call would leave
  it. *dirty*: by writing one, whose lines have to be written back during the call. Clean decides.
- *chain*: microseconds per call of a graph of 20 calls that rotate over copies of the cache, as the
  layers of a model follow each other; launch gaps overlap there.
- Variants are interleaved: one sample of each in turn, several bursts. The figure of a variant is
  the median of its burst medians, and a ratio is the median of the ratios within the bursts:
  clocks and power, which drift, fall on both sides alike. Differences of 1 % are a tie.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch

Call = Callable[[], object]

CHAIN = 20
FLUSH_BYTES = 256 * 2**20
# What the copies of a chain's caches have to hold together, so that none is found in L2.
ROTATION_BYTES = 160 * 2**20
# Seconds of measured time per variant and burst, before the sample limits.
BURST_SECONDS = 0.03
SAMPLES = (4, 20)


@dataclass(frozen=True, slots=True)
class Times:
    """Microseconds of one variant: a list of burst medians per column."""

    clean: tuple[float, ...] = ()
    dirty: tuple[float, ...] = ()
    chain: tuple[float, ...] = ()
    schedule: tuple[float, ...] = ()  # the scheduling pass alone, with a clean L2

    def best(self, column: str) -> float | None:
        bursts: tuple[float, ...] = getattr(self, column)
        return median(bursts) if bursts else None


def ratio(base: tuple[float, ...], other: tuple[float, ...]) -> float | None:
    """How many times faster ``other`` is than ``base``: median of the ratios within each burst."""
    if not base or not other:
        return None
    return median(b / o for b, o in zip(base, other, strict=True))


def copies_for(size: int) -> int:
    """How many caches of ``size`` bytes a chain rotates over."""
    return max(2, min(CHAIN, -(-ROTATION_BYTES // max(1, size))))


def capture(calls: list[Call], mode: str = "global") -> torch.cuda.CUDAGraph:
    """A graph that makes ``calls`` one after the other. They run twice before, to compile.

    `mode` is of `torch.cuda.graph`: what other threads, such as those of NCCL, may do meanwhile.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=mode):
        for call in calls:
            call()
    return graph


class Flusher:
    """Evicts L2 by reading or by writing a buffer several times its size."""

    def __init__(self, device: str = "cuda", size: int = FLUSH_BYTES) -> None:
        self.buffer = torch.zeros(size // 4, dtype=torch.int32, device=device)
        self.sink = torch.zeros((), dtype=torch.int64, device=device)

    def clean(self) -> None:
        torch.sum(self.buffer, dim=0, out=self.sink)

    def dirty(self) -> None:
        self.buffer.zero_()


def sample(call: Call, flush: Call) -> Callable[[], float]:
    """Enqueue one sample; the returned function reads its microseconds after a synchronize."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush()
    begin.record()
    call()
    end.record()
    return lambda: begin.elapsed_time(end) * 1e3


def burst(calls: Mapping[str, Call], flush: Call, samples: int) -> dict[str, float]:
    """Median of ``samples`` of each call, one of each in turn."""
    pending: dict[str, list[Callable[[], float]]] = {name: [] for name in calls}
    for _ in range(samples):
        for name, call in calls.items():
            pending[name].append(sample(call, flush))
    torch.cuda.synchronize()
    return {name: median(read() for read in reads) for name, reads in pending.items()}


def interleaved(
    calls: Mapping[str, Call], flush: Call, bursts: int, after_burst: Call = lambda: None
) -> dict[str, tuple[float, ...]]:
    """Burst medians of every call. The first burst sets the sample count and warms up.

    `after_burst` runs when the samples of a burst are complete, before those of the next begin.
    """
    slowest = max(burst(calls, flush, samples=3).values(), default=0.0)
    low, high = SAMPLES
    samples = max(low, min(high, int(BURST_SECONDS * 1e6 / max(slowest, 1.0))))
    seen = []
    for _ in range(bursts):
        seen.append(burst(calls, flush, samples))
        after_burst()
    return {name: tuple(medians[name] for medians in seen) for name in calls}


def host_microseconds(call: Call, calls: int = 200, repeats: int = 7) -> float:
    """Host time of one eager call: nothing is waited for inside, the queue is drained between."""
    for _ in range(20):
        call()
    best = float("inf")
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (perf_counter() - begin) / calls * 1e6)
    torch.cuda.synchronize()
    return best

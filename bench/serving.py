"""``python -m bench serving``: a small engine on Triton and on FlashAttention-3, on one trace.

Requests of random lengths arrive at random steps. The engine admits them, runs prompts in pieces
beside the sequences that decode, pages of 16, one schedule a step, CUDA graphs for decode batches
of a few sizes, a model of matrix products and the public functions. Both backends serve the same
steps, in turn, several times; launch records are dropped before each time, as an engine that has
just started has none.

- *step ms*: median over all steps of a run, from its first copy to its tokens being there.
- *tokens/s*: of prompts and new ones, of a whole run.
- *attention*: the step's schedule and the attention calls of all its layers in a CUDA graph,
  alone, L2 evicted before; the medians of some decode and some prefill batches, summed.

Figures are medians of the runs, ratios medians of the ratios within each turn: FA3's time over
Triton's, above 1 is faster than FA3.

Greedy tokens must be the same. Where they differ first, the float32 model's logits of the two must
be no further apart than both backends' logits are off from it, and Triton's may be off by no more
than the numerics contract has it: twice the maximum of FA3's error and 1.5 times its mean.
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

import triton_fa
from bench import environment, report
from bench.engine import Batch, Engine, Memory, Prepared
from bench.serving_model import Model, Shape
from bench.timing import Flusher, capture, interleaved
from bench.trace import Limits, Request, Step, random_trace, schedule

Tensor = torch.Tensor

SHAPE = Shape(4, 4096, 14336, 32, 8, 128, 8192, torch.bfloat16)
LIMITS = Limits(batch=64, chunk=2048, page=16, columns=520, pages=24000)
BUCKETS = [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
PROMPTS, NEW = (100, 8000), (16, 256)
REQUESTS, GAP = 128, 2.5

TINY = Shape(2, 64, 96, 4, 2, 16, 61, torch.float32)
TINY_LIMITS = Limits(batch=4, chunk=12, page=4, columns=12, pages=40)
JUDGED_EVERY = 4
MAX_MULT, MEAN_MULT = 2.0, 1.5  # of docs/numerics.md
SAMPLES = 16  # batches whose attention is timed alone, of each kind


def make_steps(tiny: bool, requests: int) -> tuple[list[Request], list[Step], Limits]:
    if tiny:
        limits, trace = TINY_LIMITS, random_trace(4, (3, 30), (2, 5), 1.5)
        return trace, list(schedule(trace, limits, [1, 2, 4])), limits
    trace = random_trace(requests, PROMPTS, NEW, GAP)
    return trace, list(schedule(trace, LIMITS, BUCKETS)), LIMITS


# -------------------------------------------------------------------- tokens


def streams(engine: Engine, trace: list[Request], of: Tensor) -> list[Tensor]:
    """What `of`, by request and position, holds for the new tokens of each request."""
    return [of[n, r.prompt : r.prompt + r.new].cpu() for n, r in enumerate(trace)]


def exact_logits(model: Model, tokens: Tensor, prompt: int) -> Tensor:
    """Before each token behind the prompt, of one sequence alone: (new, vocabulary)."""

    def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    run = tokens[:-1]
    positions = torch.arange(len(run), device=run.device)
    return model.forward(run, positions, positions[prompt - 1 :], attend)


def where_they_part(one: Engine, other: Engine, trace: list[Request]) -> list[int]:
    """For each request, how many new tokens are the same."""
    found = []
    pairs = (streams(engine, trace, engine.history) for engine in (one, other))
    for a, b in zip(*pairs, strict=True):
        unequal = (a != b).nonzero()
        found.append(int(unequal[0]) if len(unequal) else len(a))
    return found


@torch.no_grad()
def same_tokens(one: Engine, other: Engine, trace: list[Request]) -> dict[str, Any]:
    """Where the streams of two engines that recorded differ first, and whether by a tie.

    The judge is the model in a wider dtype, one sequence at a time, in all requests whose streams
    part and in every fourth: its logits say how far off both engines are, and how close the two
    tokens are where they part.
    """
    model = one.memory.model.wider()
    ends = where_they_part(one, other, trace)
    differences, gaps = [], []
    errors: dict[str, list[Tensor]] = {"one": [], "other": []}
    floor = 0.0
    for number, (request, end) in enumerate(zip(trace, ends, strict=True)):
        parted = end < request.new
        if not parted and number % JUDGED_EVERY:
            continue
        place = slice(request.prompt, request.prompt + min(end + 1, request.new))
        exact = exact_logits(model, other.history[number, : place.stop], request.prompt)
        for name, engine in (("one", one), ("other", other)):
            wanted = exact.gather(1, engine.top_tokens[number, place])
            errors[name].append((engine.top[number, place] - wanted).abs().flatten())
        floor = max(floor, exact.abs().max().item() * torch.finfo(one.memory.shape.dtype).eps)
        best = exact.topk(2).values
        gaps.append(best[:, 0] - best[:, 1])
        if parted:
            a, b = (engine.history[number, place.stop - 1] for engine in (one, other))
            gap = (exact[-1, a] - exact[-1, b]).abs().item()
            differences.append({"request": number, "token": end, "logits_gap": gap})
    all_errors = {name: torch.cat(found) for name, found in errors.items()}
    ours, theirs = (all_errors[name].max().item() for name in ("one", "other"))
    our_mean, their_mean = (all_errors[name].mean().item() for name in ("one", "other"))
    right = ours <= MAX_MULT * theirs + floor and our_mean <= MEAN_MULT * their_mean + floor
    return {
        "tokens": sum(request.new for request in trace),
        "tokens_compared": sum(ends) + len(differences),
        "tokens_equal": sum(ends),
        "first_differences": differences,
        "logits_max_error": {str(one.ver): ours, str(other.ver): theirs},
        "logits_mean_error": {str(one.ver): our_mean, str(other.ver): their_mean},
        "logits_gap_median": torch.cat(gaps).median().item(),
        "correct": right and all(d["logits_gap"] <= ours + theirs for d in differences),
    }


# -------------------------------------------------------------------- attention alone


def attention_calls(engine: Engine, batch: Batch, longest: int | None) -> Callable[[], object]:
    """The schedule and the attention of all layers of one batch, queries at random."""
    shape = engine.memory.shape
    tokens = batch.history.shape[0]
    leading = (tokens, 1) if longest is None else (tokens,)
    q = torch.randn(
        *leading, shape.heads_q, shape.head_dim, device=engine.memory.device, dtype=shape.dtype
    )

    def call() -> object:
        planned = engine.plan(batch, longest)
        return [
            engine.attend(layer, q, batch, longest or 1, planned) for layer in range(shape.layers)
        ]

    return call


def spread(items: list[Any], count: int) -> list[Any]:
    return [items[n * len(items) // count] for n in range(min(count, len(items)))]


def samples(steps: list[Prepared], count: int) -> dict[str, list[tuple[Batch, int | None]]]:
    decode = [(step.decode, None) for step in steps if step.decode]
    prefill = [step.prefill for step in steps if step.prefill]
    return {"decode": spread(decode, count), "prefill": spread(prefill, count)}


@torch.no_grad()
def time_attention(engines: list[Engine], steps: list[Prepared], bursts: int) -> dict[str, Any]:
    """Microseconds of the sampled batches, by kind and backend: a list of sums, one per burst."""
    flusher = Flusher()
    found: dict[str, Any] = {}
    for kind, chosen in samples(steps, SAMPLES).items():
        totals = {str(engine.ver): [0.0] * bursts for engine in engines}
        ratios = []
        for host, longest in chosen:
            batch = engines[0]._on_device(host)
            with triton_fa.strict():
                calls = {
                    str(engine.ver): capture([attention_calls(engine, batch, longest)]).replay
                    for engine in engines
                }
            times = interleaved(calls, flusher.clean, bursts)
            for ver, values in times.items():
                totals[ver] = [a + b for a, b in zip(totals[ver], values, strict=True)]
            if len(engines) == 2:
                ours, theirs = (times[str(engine.ver)] for engine in engines)
                ratios.append(median(b / a for a, b in zip(ours, theirs, strict=True)))
        found[kind] = {"batches": len(chosen), "us": totals, "ratios": ratios}
    return found


# -------------------------------------------------------------------- the command


def compile_share(steps: list[Prepared], memory: Memory, share: int, of: int) -> None:
    """Attention of every `of`-th batch, which compiles and caches its kernels."""
    engine = Engine(memory, "triton")
    with triton_fa.strict(), torch.no_grad():
        batches = list(itertools.chain(*samples(steps, 8 * SAMPLES).values()))
        for host, longest in batches[share::of]:
            attention_calls(engine, engine._on_device(host), longest)()
    torch.cuda.synchronize()


def compile_in_processes(count: int, requests: int) -> None:
    command = [sys.executable, "-m", "bench", "serving", "--requests", str(requests)]
    shares = [[*command, "--compile-share", str(n), str(count)] for n in range(count)]
    processes = [subprocess.Popen(share) for share in shares]
    if any([process.wait() for process in processes]):
        raise SystemExit("a process that compiles ahead failed; its message is above")


def new_tokens(steps: list[Step]) -> int:
    return sum(int((rows.finished >= 0).sum()) for s in steps for rows in batches_of(s))


def all_tokens(steps: list[Step]) -> int:
    return sum(int((rows.history[0] >= 0).sum()) for s in steps for rows in batches_of(s))


def batches_of(step: Step) -> Iterator[Any]:
    yield from (rows for rows in (step.prefill, step.decode) if rows is not None)


def measure(engines: list[Engine], steps: list[Prepared], repeats: int) -> dict[str, Any]:
    """Seconds of each run and of its steps, backends in turn."""
    runs: dict[str, Any] = {str(engine.ver): [] for engine in engines}
    for turn in range(repeats):
        for engine in engines if turn % 2 == 0 else engines[::-1]:
            triton_fa.api._RECORDS.clear()
            runs[str(engine.ver)].append(engine.run(steps))
    return runs


def medians(runs: list[list[float]], steps: list[Prepared]) -> dict[str, list[float]]:
    """Of each run: its seconds, the median milliseconds of steps, and of those of each kind."""

    def of(keep: Callable[[Prepared], bool]) -> list[float]:
        kept = [n for n, step in enumerate(steps) if keep(step)]
        return [1e3 * median(run[n] for n in kept) for run in runs] if kept else []

    return {
        "seconds": [sum(run) for run in runs],
        "step_ms": of(lambda step: True),
        "decode_step_ms": of(lambda step: step.prefill is None),
        "prefill_step_ms": of(lambda step: step.prefill is not None),
    }


def ratio(found: dict[str, Any], column: str) -> float | None:
    """How many times slower FA3 is, the median of the turns."""
    if not {"triton", "3"} <= found.keys():
        return None
    pairs = zip(found["3"][column], found["triton"][column], strict=True)
    values = [theirs / ours for theirs, ours in pairs]
    return median(values) if values else None


def table(row: dict[str, Any]) -> str:
    lines = []
    vers = list(row["runs"])
    runs, attention = row["runs"], row.get("attention", {})
    for column in ("tokens_per_s", "step_ms", "decode_step_ms", "prefill_step_ms"):
        cells = [f"{median(runs[v][column]):.5g}" if runs[v][column] else "-" for v in vers]
        value = row["ratios"].get("seconds" if column == "tokens_per_s" else column)
        lines.append([column, *cells, "-" if value is None else f"{value:.3f}"])
    for kind, found in attention.items():
        cells = [f"{median(found['us'][v]):.1f}" for v in vers]
        value = row["ratios"].get(f"attention_{kind}")
        name = f"attention of {found['batches']} {kind} batches, us"
        lines.append([name, *cells, "-" if value is None else f"{value:.3f}"])
    text = report.table(["", *vers, "x"], lines)
    if tokens := row.get("tokens"):
        verdict = "by ties" if tokens["correct"] else "WRONG"
        gaps = [d["logits_gap"] for d in tokens["first_differences"]]
        text += (
            f"\ntokens equal {tokens['tokens_equal']}/{tokens['tokens_compared']}, "
            f"{len(gaps)} of {row['requests']} streams part, "
            f"{verdict}: widest gap {max(gaps, default=0):.4f}, "
            f"median gap of all {tokens['logits_gap_median']:.3f}"
        )
        for name in ("logits_max_error", "logits_mean_error"):
            found = ", ".join(f"{ver} {error:.2g}" for ver, error in tokens[name].items())
            text += f"\n{name}: {found}"
    return text


def versions(text: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in text.split(",")]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench serving", description=__doc__)
    parser.add_argument("--backend", type=versions, default=["triton", 3])
    parser.add_argument("--repeat", type=int, default=5, help="runs of each backend")
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--layers", type=int, default=SHAPE.layers)
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU")
    parser.add_argument("--compile-processes", type=int, default=0, metavar="N")
    parser.add_argument("--compile-share", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--commit", default="", help="recorded where git cannot tell")
    parser.add_argument("--output", type=Path, help="write the result file here")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    device = "cpu" if options.tiny else "cuda"
    if not options.tiny and not torch.cuda.is_available():
        sys.stderr.write("no CUDA device: nothing was run; --tiny runs on the CPU\n")
        return 3
    if options.compile_processes:
        compile_in_processes(options.compile_processes, options.requests)
    trace, steps, limits = make_steps(options.tiny, options.requests)
    shape = TINY if options.tiny else replace(SHAPE, layers=options.layers)
    if options.compile_share:
        bare = replace(shape, layers=1, hidden=8, inner=8)
        memory = Memory(bare, limits, trace, device)
        compile_share([*map(memory.prepared, steps)], memory, *options.compile_share)
        return 0
    memory = Memory(shape, limits, trace, device)
    prepared = [memory.prepared(step) for step in steps]
    engines = [Engine(memory, ver) for ver in options.backend]
    for engine in engines:
        if device == "cuda":
            with triton_fa.strict():
                engine.capture(prepared)
        engine.run(prepared, record=True)
    tokens = same_tokens(engines[0], engines[1], trace) if len(engines) == 2 else None
    found = measure(engines, prepared, options.repeat)
    runs = {ver: medians(of, prepared) for ver, of in found.items()}
    for own in runs.values():
        own["tokens_per_s"] = [all_tokens(steps) / s for s in own["seconds"]]
    ratios = {
        column: ratio(runs, column)
        for column in ("seconds", "step_ms", "decode_step_ms", "prefill_step_ms")
    }
    row = {
        "name": "serving",
        "shape": {key: str(value) for key, value in asdict(shape).items()},
        "limits": asdict(limits),
        "requests": len(trace),
        "steps": len(steps),
        "tokens_run": all_tokens(steps),
        "tokens_new": new_tokens(steps),
        "runs": runs,
        "ratios": ratios,
        "tokens": tokens,
    }
    if device == "cuda":
        attention = time_attention(engines, prepared, bursts=3)
        row["attention"] = attention
        for kind, of in attention.items():
            ratios[f"attention_{kind}"] = ratio({v: {"us": t} for v, t in of["us"].items()}, "us")
    if options.output:
        where = environment.describe(options.commit)
        content = {"environment": where, "rows": [row], "rows_asked": 1}
        options.output.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    sys.stdout.write(table(row) + "\n")
    return 0 if tokens is None or tokens["correct"] else 1

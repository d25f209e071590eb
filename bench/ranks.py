"""``torchrun --nproc-per-node 2 -m bench.ranks``: decode over keys spread on GPUs, beside one GPU.

Each rank has an equal run of each sequence's pages. The result must keep the numerics contract, be
the same bits on every rank, and be no further from one GPU's than the contract lets two results be
apart that differ by rounding, and by rounding the parts besides.

A step is the schedule once and eight layers, in a CUDA graph, the pages of each layer elsewhere in
the cache as far as there are any. Times are of events around a replay that follows another one:
medians of bursts, of the slowest rank; one GPU's is the first rank's, while the others wait. *part*
is a step over this rank's keys without merging, *merge* the merging alone.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

import reference
import triton_fa
from bench import environment, report
from bench.timing import capture
from parity_tests.budgets import Limits, Result, Truth, judge, judge_pair, merging_slack
from parity_tests.cases import Case
from triton_fa.integrations.context_parallel import decode, merge_over_ranks

Tensor = torch.Tensor

PAGE = 16
LAYERS = 8
CHECKED = 2  # sequences compared with float64


@dataclass(frozen=True)
class Row:
    """One step: equally long sequences."""

    batch: int
    keys: int
    heads_q: int
    heads_kv: int
    head_dim: int = 128

    @property
    def name(self) -> str:
        heads = f"{self.heads_q}/{self.heads_kv}x{self.head_dim}"
        return f"{self.batch}x{self.keys}.{heads}.p{PAGE}"

    @property
    def pages(self) -> int:
        """Of all its sequences, in one layer."""
        return self.batch * self.keys // PAGE

    @property
    def page_elements(self) -> int:
        return PAGE * self.heads_kv * self.head_dim


ROWS = tuple(
    Row(batch, keys, *heads)
    for heads in ((32, 8), (8, 1))
    for keys in (128 * 1024, 512 * 1024)
    for batch in (1, 8)
)
TINY = (Row(2, 64, 4, 2, 16), Row(1, 32, 2, 1, 16))


class Inputs:
    """The same on every rank: all keys of a row, of which a rank reads some pages."""

    def __init__(self, row: Row, pool: tuple[Tensor, Tensor]) -> None:
        self.row, self.ver = row, "triton" if pool[0].is_cuda else "torch"
        device, dtype = pool[0].device, pool[0].dtype
        pages = pool[0].numel() // row.page_elements
        shape = (pages, PAGE, row.heads_kv, row.head_dim)
        self.k_cache, self.v_cache = (
            part[: pages * row.page_elements].view(shape) for part in pool
        )
        generator = torch.Generator(device).manual_seed(2)
        q = torch.randn(row.batch, 1, row.heads_q, row.head_dim, generator=generator, device=device)
        self.q = (3 * q).to(dtype)  # some keys matter more than others
        order = torch.randperm(row.pages, generator=generator, device=device).int()
        # As many layers as the cache has room for have pages of their own.
        apart = min(LAYERS, pages // row.pages)
        self.tables = [(order + n % apart * row.pages).view(row.batch, -1) for n in range(LAYERS)]

    def options(self, tables: list[Tensor]) -> list[dict[str, Any]]:
        """Of the calls of each layer over the pages in `tables`, the schedule made now."""
        row = self.row
        keys = tables[0].shape[1] * PAGE
        lengths = torch.full((row.batch,), keys, dtype=torch.int32, device=self.q.device)
        schedule = triton_fa.get_scheduler_metadata(
            *(row.batch, 1, keys, row.heads_q, row.heads_kv, row.head_dim),
            cache_seqlens=lengths,
            qkv_dtype=self.q.dtype,
            page_size=PAGE,
            ver=self.ver,
        )
        return [
            {
                "cache_seqlens": lengths,
                "page_table": table,
                "scheduler_metadata": schedule,
                "ver": self.ver,
            }
            for table in tables
        ]

    def mine(self) -> list[Tensor]:
        """The pages of this rank, of each layer."""
        share = self.tables[0].shape[1] // dist.get_world_size()
        begin = dist.get_rank() * share
        return [table[:, begin : begin + share].contiguous() for table in self.tables]


def alone(inputs: Inputs, tables: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """A step of this GPU alone over the pages in `tables`."""
    results = []
    for options in inputs.options(tables):
        out, lse, *_ = triton_fa.flash_attn_with_kvcache(
            inputs.q, inputs.k_cache, inputs.v_cache, return_softmax_lse=True, **options
        )
        results.append((out, lse))
    return results


def together(inputs: Inputs, tables: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """A step of all GPUs."""
    return [
        decode(inputs.q, inputs.k_cache, inputs.v_cache, **options)
        for options in inputs.options(tables)
    ]


# -------------------------------------------------------------------- judging


def check(inputs: Inputs) -> dict[str, Any]:
    """The first layer against float64, against one GPU, and between the ranks."""
    row, mine = inputs.row, inputs.mine()
    out, lse = together(inputs, mine[:1])[0]
    part, _ = alone(inputs, mine[:1])[0]
    one, one_lse = alone(inputs, inputs.tables[:1])[0]
    ranks = dist.get_world_size()
    outs, parts = (list(x.new_empty(ranks, *x.shape)) for x in (out, part))
    dist.all_gather(outs, out)
    dist.all_gather(parts, part)
    problems = [] if all(torch.equal(outs[0], other) for other in outs) else ["ranks differ"]
    few = min(CHECKED, row.batch)
    arguments: dict[str, Any] = {
        "k_cache": inputs.k_cache,
        "v_cache": inputs.v_cache,
        "page_table": inputs.tables[0][:few],
        "cache_seqlens": torch.full((few,), row.keys, dtype=torch.int32, device=out.device),
    }
    exact, exact_lse = reference.flash_attn_with_kvcache(inputs.q[:few], **arguments)
    baseline, _ = reference.flash_attn_with_kvcache(
        inputs.q[:few], **arguments, attend=reference.attend_low_precision
    )
    case = Case(
        dtype=str(inputs.q.dtype).removeprefix("torch."),
        heads_q=row.heads_q,
        heads_kv=row.heads_kv,
        head_dim=row.head_dim,
        head_dim_v=row.head_dim,
        page_size=PAGE,
        seqlens_q=(1,) * few,
        seqlens_k=(row.keys,) * few,
    )
    truth = Truth(exact, exact_lse, baseline)
    found, expected = Result(out[:few], lse[:few]), Result(one[:few], one_lse[:few])
    measures, failed = judge(case, found, truth, Limits.of(case))
    single, failed_alone = judge(case, expected, truth, Limits.of(case))
    slack = merging_slack([p[:few] for p in parts], out[:few])
    problems += [*failed, *(f"one GPU: {text}" for text in failed_alone)]
    problems += judge_pair(case, found, expected, truth, slack)
    return {
        "problems": problems,
        "max_ratio": measures.max_ratio,
        "mean_ratio": measures.mean_ratio,
        "lse_error": measures.lse_error,
        "max_ratio_one": single.max_ratio,
        "max_difference_from_one": (out.float() - one.float()).abs().max().item(),
    }


# -------------------------------------------------------------------- timing


def timed(call: Callable[[], object], bursts: int, samples: int, every_rank: bool) -> list[float]:
    """Medians of bursts, µs of a replay: the slowest rank's, or the first's while others wait."""
    rank = dist.get_rank()
    found = []
    replay = capture([call], mode="thread_local").replay if every_rank or rank == 0 else None
    for _ in range(bursts):
        times = []
        for _ in range(samples if every_rank else 1):
            dist.barrier()
            torch.cuda.synchronize()
            for _ in range(1 if every_rank else samples):
                if replay is None:
                    continue
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                replay()  # brings the ranks to the same place
                begin.record()
                replay()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) * 1e3)
        slowest = torch.tensor([median(times) if times else 0.0], device="cuda")
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        found.append(slowest.item())
    return found


def time_row(inputs: Inputs, bursts: int, samples: int) -> dict[str, list[float]]:
    mine = inputs.mine()
    results = alone(inputs, mine)

    def merged() -> object:
        return [merge_over_ranks(out, lse) for out, lse in results]

    return {
        "one": timed(lambda: alone(inputs, inputs.tables), bursts, samples, every_rank=False),
        "together": timed(lambda: together(inputs, mine), bursts, samples, every_rank=True),
        "part": timed(lambda: alone(inputs, mine), bursts, samples, every_rank=True),
        "merge": timed(merged, bursts, samples, every_rank=True),
    }


# -------------------------------------------------------------------- the command


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        result = row["result"]
        line = [row["name"], "ok" if not result["problems"] else "WRONG"]
        ratios = (result["max_ratio"], result["mean_ratio"], result["max_ratio_one"])
        line += [f"{value:.2f}" if value is not None else "-" for value in ratios]
        if us := row.get("step_us"):
            one, together, part, merge = (
                median(us[key]) for key in ("one", "together", "part", "merge")
            )
            line += [f"{one:.0f}", f"{together:.0f}", f"{one / together:.2f}"]
            line += [f"{part:.0f}", f"{merge:.0f}"]
        else:
            line += ["-"] * 5
        lines.append(line)
    header = ["keys over ranks", "", "max", "mean", "max of one"]
    header += [f"one, us of {LAYERS} layers", "together", "x", "part", "merge"]
    remarks = [f"! {row['name']}: {text}" for row in rows for text in row["result"]["problems"]]
    return "\n".join([report.table(header, lines), *remarks])


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node 2 -m bench.ranks", description=__doc__
    )
    parser.add_argument("--tiny", action="store_true", help="gloo on the CPU; nothing is timed")
    parser.add_argument("--repeat", type=int, default=5, help="bursts")
    parser.add_argument("--samples", type=int, default=8, help="replays of a burst")
    parser.add_argument("--commit", default="", help="recorded where git cannot tell")
    parser.add_argument("--output", type=Path, help="write the result file here")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    device = torch.device("cpu" if options.tiny else f"cuda:{dist.get_node_local_rank(0)}")
    chosen = TINY if options.tiny else ROWS
    elements = max(row.pages * row.page_elements for row in chosen)
    generator = torch.Generator(device).manual_seed(1)
    dtype = torch.bfloat16
    pool = tuple(
        torch.randn(elements, generator=generator, device=device, dtype=dtype) for _ in range(2)
    )
    rows = []
    for row in chosen:
        inputs = Inputs(row, (pool[0], pool[1]))
        with triton_fa.strict(), torch.no_grad():
            found: dict[str, Any] = {"name": row.name, "result": check(inputs)}
            if not options.tiny:
                found["step_us"] = time_row(inputs, options.repeat, options.samples)
        rows.append(found)
    return rows


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.tiny:
        dist.init_process_group("gloo")
    else:
        device = torch.device("cuda", dist.get_node_local_rank(0))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    rows = run(options)
    first = dist.get_rank() == 0
    dist.destroy_process_group()
    if first:
        if options.output:
            where = environment.describe(options.commit)
            content = {"environment": where, "rows": rows, "rows_asked": len(rows)}
            options.output.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
        sys.stdout.write(table(rows) + "\n")
    return 1 if any(row["result"]["problems"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

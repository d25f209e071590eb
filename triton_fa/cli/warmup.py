"""`warmup`: compile a model's kernels into Triton's cache."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

import click
import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from triton_fa.cli import options
from triton_fa.cli.options import DTYPES, FLOAT8, Shape
from triton_fa.device import runs_triton
from triton_fa.warm import Model, Variant, run_variant, variants


@click.command("warmup")
@options.shapes()
@options.dtype(DTYPES | FLOAT8)
@click.option("--kv-dtype", type=click.Choice(list(FLOAT8)), help="Of keys and values alone.")
@click.option("--descales", is_flag=True, help="The calls have factors of float8 numbers.")
@click.option("--page-size", default=16, show_default=True, help="Tokens of a page.")
@click.option("--causal/--no-causal", default=True, show_default=True)
@click.option("--window", nargs=2, type=int, default=(-1, -1), help="Keys seen left and right.")
@click.option("--softcap", default=0.0, help="As of the calls.")
@click.option("--sinks", is_flag=True, help="The calls have sinks.")
@click.option("--qv", is_flag=True, help="The calls have scored values: absorbed MLA.")
@click.option("--lse", is_flag=True, help="The calls return the log-sum-exp.")
@click.option("--max-batch", default=256, show_default=True, help="Largest batch.")
@click.option(
    "--max-seqlen-q", multiple=True, type=int, default=(1,), help="Query bound; may be repeated."
)
@click.option("--max-seqlen-k", default=8192, show_default=True, help="Longest sequence.")
@options.device(lambda: "cuda")
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=lambda: min(8, os.cpu_count() or 1),
    help="Compile in so many processes.",
)
def command(
    shapes: tuple[Shape, ...],
    dtype: str,
    kv_dtype: str | None,
    descales: bool,
    page_size: int,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
    sinks: bool,
    qv: bool,
    lse: bool,
    max_batch: int,
    max_seqlen_q: tuple[int, ...],
    max_seqlen_k: int,
    device: torch.device,
    processes: int,
) -> None:
    """Compile what decode and prefill of SHAPE on a paged cache need, before a server starts.

    SHAPE is query heads/kv heads x head dim, e.g. 32/8x128, or 128/128x192,128 where values have
    another head dim. The kernels go to Triton's cache on disk, where a later process finds them.
    """
    if not runs_triton(device):
        raise click.ClickException(f"warmup needs a GPU that Triton runs on, got {device}")
    dtypes = DTYPES | FLOAT8
    todos = {
        shape: variants(shape.num_heads_q // shape.num_heads_kv, max_batch, max_seqlen_q, qv=qv)
        for shape in shapes
    }
    with Progress(
        *Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True)
    ) as progress:
        for shape in shapes:
            model = Model(
                shape.num_heads_q,
                shape.num_heads_kv,
                shape.head_dim,
                shape.head_dim_v,
                dtypes[dtype],
                page_size,
                causal,
                window,
                softcap,
                sinks,
                lse,
                max_seqlen_k,
                str(device),
                qv,
                None if kv_dtype is None else dtypes[kv_dtype],
                descales,
            )
            todo = todos[shape]
            bar = progress.add_task(str(shape), total=len(todo))
            for _ in _compiled(model, todo, processes):
                progress.advance(bar)
    for shape in shapes:
        todo = todos[shape]
        batches, bounds = (sorted(set(kind)) for kind in zip(*todo, strict=True))
        click.echo(
            f"{shape}: {len(todo)} variants: {len(batches)} batch sizes up to {batches[-1]} "
            f"x query bounds {', '.join(map(str, bounds))}"
        )


def _compiled(model: Model, todo: list[Variant], processes: int) -> Iterator[Variant]:
    """The variants as they are done."""
    if processes == 1:
        yield from (run_variant(model, variant) for variant in todo)
        return
    # A forked process could not use the GPU.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(todo)), mp_context=context) as pool:
        for done in as_completed([pool.submit(run_variant, model, variant) for variant in todo]):
            yield done.result()

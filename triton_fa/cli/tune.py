"""`tune`: measure tiles for a model on this GPU."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from triton_fa.cli import options
from triton_fa.cli.cache import described
from triton_fa.cli.options import DTYPES, Shape
from triton_fa.env import triton_interpreted


@click.command("tune")
@options.shapes()
@options.dtype()
@click.option("--page-size", default=16, show_default=True, help="Tokens of a page; 0: no pages.")
@click.option(
    "--batch", multiple=True, type=click.IntRange(1), default=(1, 16, 64), show_default=True
)
@click.option("--seqlen-q", multiple=True, type=click.IntRange(1), default=(1,), show_default=True)
@click.option(
    "--seqlen-k", multiple=True, type=click.IntRange(1), default=(1024, 8192), show_default=True
)
@click.option(
    "--run-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="For results that may not, or cannot, go to the store.",
)
def command(
    shapes: tuple[Shape, ...],
    dtype: str,
    page_size: int,
    batch: tuple[int, ...],
    seqlen_q: tuple[int, ...],
    seqlen_k: tuple[int, ...],
    run_dir: Path,
) -> None:
    """Measure the tiles that could serve SHAPE, and keep the quickest of each kernel.

    Every combination of batch and lengths is measured; give each option several times. Processes
    that start later use the tiles; calls that are batch-invariant never do. With
    TRITON_FA_AUTOTUNE_CACHE=0 the results go to a file of their own.
    """
    if not torch.cuda.is_available():
        raise click.ClickException("tune needs a GPU, and torch finds none")
    if triton_interpreted():
        raise click.ClickException("tune needs compiled kernels: unset TRITON_INTERPRET")
    tuning: Any = importlib.import_module("triton_fa.tune")  # brings triton
    works = [
        tuning.Workload(**asdict(shape), dtype=DTYPES[dtype], page_size=page_size, **size)
        for shape, size in itertools.product(shapes, _sizes(batch, seqlen_q, seqlen_k))
    ]
    with Progress(
        *Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True)
    ) as progress:
        bar = progress.add_task("tiles", total=None)
        found = tuning.tune(
            works,
            torch.device("cuda", torch.cuda.current_device()),
            on_tile=lambda total: progress.update(bar, advance=1, total=total),
        )
    for result in found:
        try:
            path = tuning.keep(result, run_dir)
        except OSError as error:
            raise click.ClickException(f"the result cannot be written: {error}") from error
        click.echo(described(dict(result.choice.key), result.value()))
        click.echo(f"  {len(result.times)} tiles measured, {len(result.failures)} unusable; {path}")


def _sizes(
    batch: tuple[int, ...], seqlen_q: tuple[int, ...], seqlen_k: tuple[int, ...]
) -> list[dict[str, int]]:
    return [
        {"batch": b, "seqlen_q": m, "seqlen_k": n}
        for b, m, n in itertools.product(batch, seqlen_q, seqlen_k)
        if m <= n
    ]

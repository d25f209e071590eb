"""`replay`: run a call that was written to a file when it failed."""

from __future__ import annotations

import traceback
from pathlib import Path

import click
import torch

from triton_fa import dispatch, dump
from triton_fa.cli import options
from triton_fa.problem import AttnResult, Problem


@click.command("replay")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@options.device(options.gpu_or_cpu)
@click.option("--seed", default=0, show_default=True, help="Of the values that are made up.")
@click.option(
    "--functions",
    is_flag=True,
    help="Import the call's score_mod and mask_mod: runs their modules.",
)
def command(file: Path, device: torch.device, seed: int, functions: bool) -> None:
    """Run the call in FILE again. Fails if the call does.

    FILE is what TRITON_FA_DUMP_DIR had written. Values that it does not hold are random.
    """
    found = dump.load(file)
    problem = dump.problem(found, device, seed, functions=functions)
    where = ", ".join(f"{k} {v}" for k, v in found.header["versions"].items() if v)
    click.echo(f"then: {found.error}")
    click.echo(f"      on {found.header['device']}; {where}")
    click.echo(f"call: {problem.spec}")
    click.echo(f"      {problem.bounds}")
    for name, form in found.header["tensors"].items():
        made_up = " (values made up)" if name in found.made_up else ""
        click.echo(f"      {name}: {form['dtype']} {form['shape']} by {form['stride']}{made_up}")
    try:
        result = _run(problem)
    except Exception as error:
        click.echo(traceback.format_exc(), err=True)
        raise click.ClickException(
            f"it fails on {device}: {type(error).__name__}: {error}"
        ) from error
    bad = int((~result.out.isfinite()).sum())
    click.echo(f"now:  ran on {device}: out {list(result.out.shape)}, {bad} elements not finite")


def _run(problem: Problem) -> AttnResult:
    with torch.no_grad():
        run, _ = dispatch.prepare("triton", problem)
        result = run(problem.tensors)
    if problem.spec.device.type == "cuda":
        torch.cuda.synchronize(problem.spec.device)
    return result

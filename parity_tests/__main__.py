"""python -m parity_tests: every backend that runs here against the float64 reference."""

import importlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import rich.progress
import rich.table
from rich.console import Console
from rich.markup import escape

from parity_tests.shard import Shard

if TYPE_CHECKING:
    from parity_tests.cases import Case
    from parity_tests.device import Device
    from parity_tests.pool import Shares
    from parity_tests.runners import Outcome
    from parity_tests.suite import Options, Run
    from parity_tests.workers import State, Worker

GENERATED_ON_GPU, GENERATED_INTERPRETED = 200, 24
COLOURS = {"agrees": "green", "failed": "bold red", "known difference": "yellow"}


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--cases",
    "generated",
    type=click.IntRange(0),
    default=None,
    help=f"Generated cases, beside those that cover all pairs of features; 0: none of both"
    f"  [default: {GENERATED_ON_GPU} on a GPU, {GENERATED_INTERPRETED} in the interpreter]",
)
@click.option(
    "--soak",
    type=click.IntRange(0),
    default=0,
    help="Instead of them this many cases over hundreds of variants.",
)
@click.option("--plan-only", is_flag=True, help="Say what would run, and run nothing.")
@click.option("--seed", default=0, show_default=True, help="Decides the generated cases.")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(["triton", "torch", "3", "4"]),
    help="Only this backend; may be given several times.  [default: all]",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("parity-report"),
    show_default=True,
    help="Folder of the report.",
)
@click.option("--require-peers", is_flag=True, help="Fail if a backend is not available.")
@click.option("--named-only", is_flag=True, help="No generated cases.")
@click.option("--filter", "pattern", default="", help="Only cases whose name contains this.")
@click.option(
    "--device",
    "device_name",
    default=None,
    help="A torch device  [default: cuda if there is one, else cpu]",
)
@click.option(
    "--variants",
    type=click.IntRange(1),
    default=20,
    show_default=True,
    help="Distinct compile-time variants among the generated cases.",
)
@click.option(
    "--fa4-variants",
    type=click.IntRange(0),
    default=5,
    show_default=True,
    help="How many of those FA4 compiles (2 to 5 seconds each).",
)
@click.option(
    "--shard",
    type=Shard(),
    default="1/1",
    show_default=True,
    help="The i-th of n shares of the compile-time variants, with all of their cases, as i/n.",
)
@click.option(
    "--strict-known/--no-strict-known",
    default=True,
    show_default=True,
    help="Fail if a known difference does not occur in the case that shows it.",
)
@click.option("--repro", is_flag=True, help="Print code that runs each failed case again.")
@click.option("--worker", type=click.Path(path_type=Path), hidden=True)
@click.pass_context
def main(
    context: click.Context,
    generated: int | None,
    seed: int,
    backends: tuple[str, ...],
    output: Path,
    device_name: str | None,
    repro: bool,
    plan_only: bool,
    worker: Path | None,
    **options: Any,
) -> None:
    """Hold the backends against the float64 reference and write parity.json and parity.html.

    Exits with 1 on any failure, and also if nothing ran. Without a CUDA GPU the kernels run in
    Triton's interpreter on scaled-down cases. The cases run in a process of their own: a backend
    that crashes it fails that case, and another process goes on with the rest.
    """  # fmt: skip
    if context.invoked_subcommand:
        return
    if options["soak"] and (generated is not None or options["named_only"]):
        raise click.UsageError("--soak makes all generated cases: not with --cases or --named-only")
    alone = bool(worker) or plan_only  # else both processes import torch at the same time
    state_folder = worker or (Path() if plan_only else _new_folder(output))
    first = None if alone else start_worker(state_folder)
    device_module = importlib.import_module("parity_tests.device")
    try:
        device = device_module.settle(device_name)
    except RuntimeError as error:
        if worker:
            sys.exit(1)  # the parent says the same
        if not alone:
            shutil.rmtree(state_folder)
        raise click.ClickException(str(error)) from error
    # Only now: these import triton_fa, and the interpreter must be on before triton is imported.
    suite = importlib.import_module("parity_tests.suite")
    report = importlib.import_module("parity_tests.report")
    workers = importlib.import_module("parity_tests.workers")

    chosen = _options(device, generated=generated, seed=seed, backends=backends, **options)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if plan_only:
        _describe(suite.plan(chosen), console)
        return
    state = workers.State(state_folder)
    if first is None:
        _work(state, chosen, console)
        return
    run = suite.Run(chosen)
    status = workers.supervise(
        state,
        run,
        first,
        start=lambda: start_worker(state_folder),
        say=lambda text: console.print(f"[bold red]{escape(text)}[/]"),
    )
    shutil.rmtree(state_folder)
    if status:
        sys.exit(status)
    _show(run, report.limits(run), console)
    command = shlex.join(["python", "-m", "parity_tests", *sys.argv[1:]])
    for path in report.write(run, output, command):
        console.print(f"wrote {path}", highlight=False)
    for outcome in run.failures if repro else ():
        console.rule(escape(outcome.case.label))
        print(outcome.case.repro_snippet(outcome.ver, device.name))
    passed, sentence = run.verdict()
    console.print(f"[{'bold green' if passed else 'bold red'}]{escape(sentence)}[/]")
    sys.exit(0 if passed else 1)


def _options(
    device: "Device", generated: int | None, backends: tuple[str, ...], **options: Any
) -> "Options":
    """What was asked for, as a run takes it."""
    suite = importlib.import_module("parity_tests.suite")
    if generated is None:
        generated = GENERATED_INTERPRETED if device.interpreted else GENERATED_ON_GPU
    vers = tuple(int(ver) if ver.isdigit() else ver for ver in dict.fromkeys(backends))
    chosen: Options = suite.Options(
        device=device, generated=generated, vers=vers or suite.VERS, **options
    )
    return chosen


@main.command("shares")
@click.option("--count", type=click.IntRange(1), default=400, show_default=True, help="Shares.")
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=os.cpu_count() or 1,
    show_default=True,
    help="Processes that take one share after another, on all visible GPUs.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0),
    default=float("inf"),
    help="Stop after this time, within a case's. The same command goes on from there.",
)
@click.option("--place", type=int, hidden=True)
@click.option("--until", type=float, hidden=True)
@click.pass_context
def run_all_shares(
    context: click.Context,
    count: int,
    processes: int,
    seconds: float,
    place: int | None,
    until: float | None,
) -> None:
    """Run all shares of the run that the options before this command ask for.

    Each share has a report, OUTPUT/1/parity.json and on, as soon as it is complete; a call that was
    stopped or killed goes on where it was. `merge` makes one report of them. Exits with 1 if
    anything failed or is left to run.
    """
    assert context.parent is not None, "a command of the group"
    given = dict(context.parent.params)
    for name, unset in (
        ("shard", (1, 1)),
        ("plan_only", False),
        ("repro", False),
        ("worker", None),
    ):
        if given.pop(name) != unset:
            raise click.UsageError(f"--{name.replace('_', '-')} does not go with shares")
    folder, device_name = given.pop("output"), given.pop("device_name")
    device_module = importlib.import_module("parity_tests.device")
    try:
        device = device_module.settle(device_name)
    except RuntimeError as error:
        raise click.ClickException(str(error)) from error
    pool = importlib.import_module("parity_tests.pool")
    options, shares = _options(device, **given), pool.Shares(folder, count)
    command = shlex.join(["python", "-m", "parity_tests", *sys.argv[1:]])
    if place is not None:
        assert until is not None, "given by the parent"
        end_with_parent()
        sys.exit(pool.run_shares(shares, options, place, until, command))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        shares.check(options)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    until = time.time() + seconds
    again = (sys.executable, "-m", "parity_tests", *sys.argv[1:], "--until", str(until), "--place")
    console = Console(width=None if sys.stdout.isatty() else 160)
    pool.Pool(
        shares,
        options,
        start=lambda place: pool.start_process((*again, str(place)), place, folder),
        until=until,
        say=lambda text: console.print(f"[bold red]{escape(text)}[/]"),
    ).go(processes)
    sys.exit(_sum_up(shares, console))


def _sum_up(shares: "Shares", console: Console) -> int:
    """Say what became of the shares; the exit status."""
    suite = importlib.import_module("parity_tests.suite")
    outcomes = shares.outcomes()
    failures = [outcome for outcome in outcomes if outcome.is_failure]
    for outcome in failures:
        console.print(escape(outcome.describe()))
    for ver, counts in suite.tally(outcomes).items():
        console.print(f"{ver}: " + ", ".join(f"{n} {word}" for word, n in counts.items()))
    left = len(shares.left)
    console.print(f"{shares.count - left} of {shares.count} shares are complete")
    return 1 if failures or left else 0


@main.command("merge")
@click.argument(
    "reports",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder of the joint report.",
)
@click.option("--strict-known/--no-strict-known", default=True, show_default=True)
@click.option("--summary", is_flag=True, help="List no generated case that agrees or was refused.")
def merge_reports(
    reports: tuple[Path, ...], output: Path, strict_known: bool, summary: bool
) -> None:
    """Join REPORTS (parity.json of shares or of whole runs) into one.

    All must be of the same sources, versions and GPU. What several of them ran counts once. Exits
    with 1 if the joint report fails, as it does if a share of a run is missing.
    """
    merge = importlib.import_module("parity_tests.merge")
    report = importlib.import_module("parity_tests.report")
    command = shlex.join(["python", "-m", "parity_tests", *sys.argv[1:]])
    try:
        data = merge.merge(list(reports), command, strict_known)
    except merge.CannotJoinError as error:
        raise click.ClickException(str(error)) from error
    if summary:
        merge.summarise(data)
    for path in report.save(data, output):
        print(f"wrote {path}")
    for ver, found in data["counts"].items():
        print(f"{ver}: " + ", ".join(f"{name} {count}" for name, count in found.items()))
    print(data["verdict"])
    sys.exit(0 if data["passed"] else 1)


def _describe(cases: list["Case"], console: Console) -> None:
    """How many cases there are, how different, and which pair of features has the fewest."""
    features = importlib.import_module("parity_tests.features")
    identities = {case.identity() for case in cases}
    specs = {case.spec for case in cases}
    console.print(f"{len(cases)} cases, {len(identities)} of them different but for the seed")
    console.print(f"{len(specs)} compile-time variants")
    pairs = features.coverage(cases)["pairs"]
    least = min(pairs, key=pairs.get)
    console.print(f"{len(pairs)} pairs of features, the least covered {least}: {pairs[least]}")


def _new_folder(output: Path) -> Path:
    """Where a run keeps what it did so far; if this process is killed, it stays there."""
    output.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="run-", dir=output))


def start_worker(folder: Path) -> "Worker":
    """This command again, as the process that runs the cases; it ends when this one does."""
    command = [sys.executable, "-m", "parity_tests", *sys.argv[1:], "--worker", str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE)


def end_with_parent() -> None:
    """End this process when the other end of its standard input is closed."""

    def wait() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _work(state: "State", options: "Options", console: Console) -> None:
    """Run what no earlier worker did."""
    end_with_parent()
    suite = importlib.import_module("parity_tests.suite")
    report = importlib.import_module("parity_tests.report")
    workers = importlib.import_module("parity_tests.workers")
    run = suite.Run(options, outcomes=state.outcomes())
    cases = state.plan()
    if cases is None:
        line = f"[bold]triton_fa parity[/] on {escape(options.device.description)}"
        console.print(f"{line}, seed {options.seed}")
        cases = suite.plan(options)
        state.save_plan(cases)
    columns = (
        rich.progress.SpinnerColumn(),
        *rich.progress.Progress.get_default_columns(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[failed]} failed"),
    )
    with rich.progress.Progress(*columns, console=console) as progress:
        failed = len(run.failures)
        task = progress.add_task("cases", total=len(cases), failed=failed)

        def show(outcome: "Outcome") -> None:
            nonlocal failed
            failed += outcome.is_failure
            done = len(run.outcomes) // len(options.vers)
            progress.update(task, completed=done, failed=failed)

        workers.work(state, run, show)
    state.save_backends(report.what_backends(options.device.name))


def _show(run: "Run", limits: list[str], console: Console) -> None:
    """Named cases and whatever went wrong line by line; agreeing generated cases as counts."""
    suite = importlib.import_module("parity_tests.suite")
    missing = {o.ver: o.reasons for o in run.outcomes if o.verdict == "unavailable"}
    table = rich.table.Table(title="max ratio: error relative to same-dtype PyTorch")
    for heading in ("case", "backend", "max ratio", "LSE error", "verdict"):
        table.add_column(heading, overflow="fold")
    for outcome in run.outcomes:
        quiet = not outcome.case.name and outcome.verdict not in ("failed", "known difference")
        if (quiet or outcome.ver in missing) and not outcome.is_failure:
            continue
        table.add_row(*_cells(outcome))
    console.print(table)
    for ver, reasons in missing.items():
        line = f"backend {ver} could not run: {'; '.join(reasons)}"
        console.print(f"[bold yellow]{escape(line)}[/]")
    for sentence in limits:
        console.print(f"[yellow]{escape(sentence)}[/]")
    for ver, counts in suite.tally(run.outcomes).items():
        console.print(f"{ver}: " + ", ".join(f"{n} {word}" for word, n in counts.items()))


def _cells(outcome: "Outcome") -> tuple[str, ...]:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.3g}"

    measures = outcome.measures
    colour = COLOURS.get(outcome.verdict, "dim")
    why = "; ".join((*outcome.differences, *outcome.reasons))
    verdict = f"[{colour}]{outcome.verdict}[/]" + (f" {escape(why)}" if why else "")
    ratio, lse = number(measures.max_ratio), number(measures.lse_error)
    return escape(outcome.case.label), str(outcome.ver), ratio, lse, verdict


if __name__ == "__main__":
    os.environ["TRITON_FA_AUTOTUNE_CACHE"] = "0"  # results are of the shipped tiles
    main()

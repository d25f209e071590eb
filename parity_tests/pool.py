"""All shares of a run, in a few processes on this machine that take one after another.

Starting a process for a share takes as long as running it. What is known of a share is on disk
after each comparison, and its report once it is complete: a call that is stopped goes on where it
was.
"""

import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch

from parity_tests import report, suite
from parity_tests.runners import Outcome
from parity_tests.suite import Options, Run
from parity_tests.workers import RESTARTS, State, died_on, work

POLL = 0.2  # seconds between two looks at the processes
HANG = 180.0  # seconds for one comparison, and
GRACE = 20.0  # seconds after time is up, until a process is ended


class Process(Protocol):
    """A process that takes shares."""

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""

    def kill(self) -> None:
        """End it."""


@dataclass(frozen=True)
class Shares:
    """The shares of a run as folders 1, 2, ... of one folder."""

    folder: Path
    count: int

    def path(self, index: int) -> Path:
        """Where everything about a share is."""
        return self.folder / str(index)

    def state(self, index: int) -> State:
        """The cases of a share and what is known of them."""
        return State(self.path(index) / "run")

    @property
    def left(self) -> list[int]:
        """Shares without a report."""
        every = range(1, self.count + 1)
        return [index for index in every if not (self.path(index) / "parity.json").exists()]

    def plan(self, options: Options) -> None:
        """Write down the cases of every share, unless an earlier call of the same run did."""
        self.check(options)
        done = self.folder / "planned"
        if done.exists():
            return
        cases = suite.plan(replace(options, shard=(1, 1)))
        for index, share in enumerate(suite.shares(cases, self.count), start=1):
            self.state(index).save_plan(share)
        done.write_text(self._said(options), encoding="utf-8")

    def check(self, options: Options) -> None:
        """Refuse a folder with shares of another run, or of other sources."""
        done = self.folder / "planned"
        if done.exists() and done.read_text(encoding="utf-8") != self._said(options):
            raise ValueError(f"{self.folder} is of another run: remove it, or choose another")

    def _said(self, options: Options) -> str:
        whole = replace(options, shard=(1, 1))
        return f"{self.count} shares of {whole}, sources {report.source_digest()}\n"

    def wait_for_plan(self) -> None:
        """Until every share has its cases."""
        while not (self.folder / "planned").exists():
            time.sleep(POLL)

    def take(self, index: int, place: int) -> bool:
        """Take a share for the process of this place, unless another one has it."""
        try:
            (self.path(index) / "taken").touch(exist_ok=False)
        except FileExistsError:
            return False
        self._place(place).write_text(str(index), encoding="utf-8")
        return True

    def give_back(self, index: int) -> None:
        """Let any process take a share."""
        (self.path(index) / "taken").unlink(missing_ok=True)

    def taken(self, place: int) -> tuple[int, float] | None:
        """The share that the process of this place took last, and when it last came forward."""
        path = self._place(place)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if not text:
            return None
        files = (path, *(self.path(int(text)) / "run").glob("*"))
        return int(text), max(file.stat().st_mtime for file in files if file.exists())

    def forget(self, place: int) -> None:
        """Forget what an earlier process of this place took."""
        self._place(place).unlink(missing_ok=True)

    def outcomes(self) -> list[Outcome]:
        """All there are so far."""
        every = range(1, self.count + 1)
        return [outcome for index in every for outcome in self.state(index).outcomes()]

    def _place(self, place: int) -> Path:
        return self.folder / f"process-{place}"


def run_shares(shares: Shares, options: Options, place: int, until: float, command: str) -> int:
    """Run one share after another in this process, to the last one or to this time.

    Returns its exit status: 1 if CUDA is lost, so that another process has to go on.
    """
    shares.wait_for_plan()
    environment = None
    for index in shares.left:
        if time.time() > until:
            return 0
        if not shares.take(index, place):
            continue
        state = shares.state(index)
        mine = replace(options, shard=(index, shares.count))
        run = Run(mine, outcomes=state.outcomes())
        work(state, run, stop=lambda: time.time() > until)
        if run.context_lost:
            return 1
        if run.left(state.plan() or []):
            return 0
        environment = environment or report.environment(run, command)
        data = report.joined(run, environment, report.asked(mine), [mine])
        report.save_json(data, shares.path(index))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # for the other processes
    return 0


@dataclass
class Pool:
    """The processes of a run, each at a place of its own."""

    shares: Shares
    options: Options
    start: Callable[[int], Process]
    until: float
    say: Callable[[str], None] = lambda text: None
    processes: dict[int, Process] = field(default_factory=dict)
    restarts: Counter[int] = field(default_factory=Counter)  # of each share

    def go(self, places: int) -> None:
        """Run what is left, until nothing is or time is up."""
        for index in self.shares.left:
            self.shares.give_back(index)
        for place in range(min(places, len(self.shares.left))):
            self._start(place)
        self.shares.plan(self.options)
        while self.processes:
            time.sleep(POLL)
            for place, process in list(self.processes.items()):
                status = process.poll()
                if status is None:
                    self._watch(place, process)
                    continue
                del self.processes[place]
                if status:
                    self._go_on(place, status)

    def _start(self, place: int) -> None:
        self.shares.forget(place)
        self.processes[place] = self.start(place)

    def _watch(self, place: int, process: Process) -> None:
        taken, now = self.shares.taken(place), time.time()
        if now > self.until + GRACE or (taken and now > taken[1] + HANG):
            self.say(f"process {place} takes too long" + (f" in share {taken[0]}" if taken else ""))
            process.kill()

    def _go_on(self, place: int, status: int) -> None:
        """Note what a process died of; another one goes on with its share."""
        taken = self.shares.taken(place)
        if taken is None:
            self.say(f"process {place} ended with status {status} before it took a share")
            return
        if time.time() > self.until:  # ended from here: the next call runs that case again
            return
        index, _ = taken
        state = self.shares.state(index)
        for outcome in died_on(state, self.options.vers, status):
            state.add(outcome)
            self.say(outcome.describe())
        self.restarts[index] += 1
        if self.restarts[index] <= RESTARTS:
            self.shares.give_back(index)
        else:
            self.say(f"share {index} is left after {RESTARTS} restarts")
        self._start(place)


def start_process(command: Sequence[str], place: int, folder: Path) -> "subprocess.Popen[bytes]":
    """A process with a log of its own, on one of the visible GPUs; it ends when this one does."""
    environment = {"OMP_NUM_THREADS": "1"} | os.environ  # or they fight over the cores
    gpus = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    gpus = gpus or [str(index) for index in range(torch.cuda.device_count())]
    if len(gpus) > 1:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
    with (folder / f"process-{place}.log").open("a", encoding="utf-8") as log:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment
        )

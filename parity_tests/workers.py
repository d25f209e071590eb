"""A run in worker processes: one that dies costs the pair that it was running, not the rest.

A parent and its workers share a folder: the plan, one outcome per line, and the running pair.
"""

import json
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from parity_tests.cases import Case
from parity_tests.runners import CRASHED, FAILED, NOT_RUN, Outcome, Ver
from parity_tests.suite import Run, none_run

RESTARTS = 20


class Worker(Protocol):
    """A process that runs what has no outcome yet."""

    def wait(self) -> int:
        """Its exit status, once it ended; negative for a signal."""


@dataclass(frozen=True)
class State:
    """What is known of a run on disk, where it outlives a process."""

    folder: Path

    def save_plan(self, cases: list[Case]) -> None:
        """Keep the cases: every process of a run has the same ones."""
        self._write("plan", [asdict(case) for case in cases])

    def plan(self) -> list[Case] | None:
        """The cases, or None before the first worker has kept them."""
        fields = self._read("plan")
        return None if fields is None else [Case(**each) for each in fields]

    def note(self, case: Case, ver: Ver | None) -> None:
        """Say what is about to run; ver None is the exact result of the case."""
        self._write("running", {"case": asdict(case), "ver": ver})

    def running(self) -> tuple[Case, Ver | None] | None:
        """What was last about to run."""
        noted = self._read("running")
        return None if noted is None else (Case(**noted["case"]), noted["ver"])

    def add(self, outcome: Outcome) -> None:
        """Keep an outcome."""
        with self._file("outcomes").open("a", encoding="utf-8") as lines:
            lines.write(outcome.to_json() + "\n")

    def outcomes(self) -> list[Outcome]:
        """All outcomes so far, in order."""
        path = self._file("outcomes")
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [Outcome.from_json(line) for line in lines]

    def save_backends(self, backends: dict[str, str]) -> None:
        """Keep what each backend is: asking means loading binaries, which a parent never does."""
        self._write("backends", backends)

    def backends(self) -> dict[str, str]:
        """What each backend is; empty if no worker came to its end."""
        return self._read("backends") or {}

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.{'jsonl' if name == 'outcomes' else 'json'}"

    def _read(self, name: str) -> Any:
        path = self._file(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def _write(self, name: str, value: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{name}.part"
        part.write_text(json.dumps(value) + "\n", encoding="utf-8")
        part.replace(self._file(name))


def work(
    state: State,
    run: Run,
    after: Callable[[Outcome], None] = lambda outcome: None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Run, in this process, the planned pairs that have no outcome yet."""

    def keep(outcome: Outcome) -> None:
        state.add(outcome)
        after(outcome)

    run.go(state.plan() or [], before=state.note, after=keep, stop=stop)


def supervise(
    state: State,
    run: Run,
    worker: Worker,
    start: Callable[[], Worker],
    say: Callable[[str], None] = lambda text: None,
) -> int:
    """Wait for a worker, and for another one as long as pairs are left; then fill `run`.

    Returns 0, or the exit status of a worker that ended before there was a plan.
    """
    restarts = 0
    while True:
        known = len(run.outcomes)
        status = worker.wait()
        cases = state.plan()
        if cases is None:
            return status or 1
        for outcome in died_on(state, run.options.vers, status) if status else ():
            state.add(outcome)
        run.outcomes = state.outcomes()
        left = run.left(cases)
        if not left:
            break
        if len(run.outcomes) == known:
            run.gave_up = f"{_how(status)} before it ran a case"
        elif restarts == RESTARTS:
            run.gave_up = f"no more than {RESTARTS} restarts after crashes"
        if run.gave_up:
            run.outcomes += [Outcome(c, ver, NOT_RUN, (run.gave_up,)) for c, ver in left]
            break
        restarts += 1
        say(f"{run.outcomes[-1].describe()}; a new process goes on ({restarts} of {RESTARTS})")
        worker = start()
    if status and not left:
        say(f"{_how(status)} after the last case")
    run.backends = state.backends()
    return 0


def died_on(state: State, vers: tuple[Ver, ...], status: int) -> list[Outcome]:
    """The outcomes of the pair in which a worker ended, none if that has an outcome."""
    culprit = state.running()
    if culprit is None:
        return []
    case, ver = culprit
    done = {o.ver for o in state.outcomes() if o.case == case}
    wanted = [each for each in (vers if ver is None else (ver,)) if each not in done]
    where = "its exact result" if ver is None else f"backend {ver}"
    return list(none_run(case, wanted, FAILED, f"{CRASHED}{_how(status)} in {where}"))


def _how(status: int) -> str:
    if status < 0:
        return f"the process died of signal {-status} ({signal.strsignal(-status)})"
    return f"the process ended with exit status {status}"

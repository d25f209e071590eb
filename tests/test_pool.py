"""All shares of a run in a few processes: nothing is run twice, and what is done survives."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parity_tests import merge, pool, report, suite
from parity_tests.cases import Case
from parity_tests.pool import Pool, Shares
from parity_tests.runners import AGREES, FAILED
from tests.test_harness import CASE, CPU, Death, dies

DIMS = (16, 40, 72)  # a spec each
CASES = [
    CASE.with_changes(name=f"{dim} {seed}", head_dim=dim, head_dim_v=dim, seed=seed)
    for dim in DIMS
    for seed in (0, 1)
]
OPTIONS = suite.Options(CPU, vers=("torch",))


@pytest.fixture(autouse=True)
def _planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "plan", lambda _: CASES)
    monkeypatch.setattr(report, "what_backends", lambda _: {"torch": "here"})
    monkeypatch.setattr(pool, "POLL", 0.0)


class Here:
    """A process that is this one: it runs when it is looked at."""

    def __init__(self, run: Callable[[], int]) -> None:
        self.run = run
        self.killed = False

    def poll(self) -> int | None:
        return self.run()

    def kill(self) -> None:
        self.killed = True


def runs(shares: Shares, until: float = float("inf")) -> Callable[[int], Here]:
    return lambda place: Here(lambda: pool.run_shares(shares, OPTIONS, place, until, "a command"))


def go(
    shares: Shares, start: Callable[[int], Any], until: float = float("inf"), places: int = 2
) -> list[str]:
    said: list[str] = []
    Pool(shares, OPTIONS, start, until, said.append).go(places)
    return said


def rows(shares: Shares) -> list[dict[str, Any]]:
    paths = [shares.path(index) / "parity.json" for index in range(1, shares.count + 1)]
    return [row for path in paths for row in json.loads(path.read_text())["outcomes"]]


def test_every_share_is_run_once_and_has_its_report(tmp_path: Path) -> None:
    shares = Shares(tmp_path, 2)
    started: list[int] = []

    def start(place: int) -> Here:
        started.append(place)
        return runs(shares)(place)

    assert go(shares, start) == []
    assert started == [0, 1]
    assert shares.left == []
    assert sorted(row["case"] for row in rows(shares)) == sorted(case.name for case in CASES)
    assert {row["verdict"] for row in rows(shares)} == {AGREES}
    reports = [shares.path(index) / "parity.json" for index in (1, 2)]
    joint = merge.merge(reports, "a command", strict_known=False)
    assert joint["passed"], joint["verdict"]
    assert joint["tally"] == {"torch": {AGREES: len(CASES)}}
    before = [path.read_bytes() for path in reports]
    go(shares, start)
    assert started == [0, 1]
    assert [path.read_bytes() for path in reports] == before


def test_what_time_cut_off_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = Shares(tmp_path, len(DIMS))
    prepared: list[Case] = []
    real = suite.Prepared.of

    def of(case: Case, device: str) -> Any:
        prepared.append(case)
        if len(prepared) == 3:  # in the second share
            monkeypatch.setattr(pool.time, "time", lambda: 100.0)
        return real(case, device)

    monkeypatch.setattr(suite.Prepared, "of", of)
    monkeypatch.setattr(pool.time, "time", lambda: 0.0)
    assert go(shares, runs(shares, until=50.0), until=50.0, places=1) == []
    assert shares.left == [2, 3]
    assert len(shares.outcomes()) == len(prepared) == 3
    go(shares, runs(shares), places=1)
    assert shares.left == []
    assert prepared == CASES


def test_a_folder_of_another_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Shares(tmp_path, 2).plan(OPTIONS)
    Shares(tmp_path, 2).plan(OPTIONS)
    for count, options in ((3, OPTIONS), (2, suite.Options(CPU, vers=("torch",), seed=1))):
        with pytest.raises(ValueError, match="is of another run: remove it"):
            Shares(tmp_path, count).plan(options)
    monkeypatch.setattr(report, "source_digest", lambda: "changed")
    with pytest.raises(ValueError, match="is of another run: remove it"):
        Shares(tmp_path, 2).plan(OPTIONS)


def test_a_share_is_taken_once(tmp_path: Path) -> None:
    shares = Shares(tmp_path, 2)
    shares.plan(OPTIONS)
    assert shares.take(2, place=0)
    assert not shares.take(2, place=1)
    taken = shares.taken(0)
    assert taken is not None
    assert taken[0] == 2
    assert shares.taken(1) is None
    shares.give_back(2)
    assert shares.take(2, place=1)


def test_a_process_that_dies_fails_its_pair_and_another_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = Shares(tmp_path, len(DIMS))
    real = suite.Prepared.of

    def deadly(case: Case, device: str) -> Any:
        return dies() if case == CASES[3] else real(case, device)

    def start(place: int) -> Here:
        def run() -> int:
            try:
                return runs(shares)(place).run()
            except Death:
                return -11

        return Here(run)

    monkeypatch.setattr(suite.Prepared, "of", deadly)
    said = go(shares, start, places=1)
    assert len(said) == 1
    assert "died of signal 11" in said[0]
    assert shares.left == []
    verdicts = {row["case"]: row["verdict"] for row in rows(shares)}
    assert verdicts == {case.name: FAILED if case == CASES[3] else AGREES for case in CASES}


def test_a_share_whose_processes_always_die_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = Shares(tmp_path, 1)
    monkeypatch.setattr(pool, "RESTARTS", 2)
    started: list[int] = []

    def start(place: int) -> Here:
        started.append(place)
        return Here(lambda: 1 if shares.left and shares.take(1, place) else 0)

    said = go(shares, start, places=1)
    assert said == ["share 1 is left after 2 restarts"]
    assert len(started) == 4  # the last one finds nothing to take
    assert shares.left == [1]


def test_a_process_that_takes_nothing_is_not_started_again(tmp_path: Path) -> None:
    said = go(Shares(tmp_path, 1), lambda _: Here(lambda: 2))
    assert said == ["process 0 ended with status 2 before it took a share"]


@pytest.mark.parametrize("why", ["hangs", "time is up"])
def test_a_process_that_takes_too_long_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    shares, now = Shares(tmp_path, 1), time.time()

    class Hangs(Here):
        def poll(self) -> int | None:
            if not self.killed and shares.left and not shares.taken(0):
                assert shares.take(1, 0)
                shares.state(1).note(CASES[0], "torch")
                monkeypatch.setattr(pool.time, "time", lambda: now + 1000)
            return -9 if self.killed else None

    started: list[int] = []

    def start(place: int) -> Here:
        started.append(place)
        return Hangs(lambda: 0) if len(started) == 1 else runs(shares)(place)

    said = go(shares, start, until=now + (900 if why == "time is up" else 9000), places=1)
    assert said[0] == "process 0 takes too long in share 1"
    if why == "time is up":
        assert started == [0]
        assert shares.outcomes() == []  # the next call runs that case again
    else:
        assert started == [0, 0]
        assert [o.verdict for o in shares.outcomes()] == [FAILED] + [AGREES] * (len(CASES) - 1)
        assert "died of signal 9" in shares.outcomes()[0].reasons[0]


def test_the_command_runs_its_shares_in_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "parity_tests", "--named-only", "--filter", "varlen, sinks"]
    command += ["--backend", "torch", "--device", "cpu", "--output", str(tmp_path)]
    command += ["shares", "--count", "2", "--processes", "2"]
    done = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 shares are complete" in done.stdout
    assert {row["verdict"] for row in rows(Shares(tmp_path, 2))} == {AGREES}


@pytest.mark.parametrize("option", [["--shard", "1/2"], ["--plan-only"], ["--repro"]], ids=str)
def test_what_shares_have_no_use_for_is_refused(tmp_path: Path, option: list[str]) -> None:
    command = [sys.executable, "-m", "parity_tests", *option, "--output", str(tmp_path), "shares"]
    done = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{option[0]} does not go with shares" in done.stderr

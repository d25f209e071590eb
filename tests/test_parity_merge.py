"""Reports of shares joined, how errors are spread, and what a large report shows."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from parity_tests import __main__ as command_line
from parity_tests import distributions, merge, report, suite
from parity_tests.cases import Case
from parity_tests.device import Device
from parity_tests.runners import AGREES, FAILED, NOT_RUN, REFUSED, Outcome
from tests.test_harness import CASE, exact

CASES = [CASE.with_changes(name=str(index), seed=index) for index in range(4)]
CASES[3] = CASES[3].with_changes(causal=False)
CPU = Device("cpu", interpreted=False)


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "what_backends", lambda _: {"triton": "here"})
    monkeypatch.setattr(Device, "description", property(lambda self: self.name))
    monkeypatch.setattr(report.torch.cuda, "get_device_name", lambda _: "a chip")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def share(
    folder: Path,
    cases: list[Case],
    shard: tuple[int, int] = (1, 1),
    call: Any = exact,
    **options: Any,
) -> Path:
    """The report of a run of these cases."""
    options = {"vers": ("triton", 3), "device": CPU} | options
    run = suite.Run(suite.Options(shard=shard, **options), call)
    run.go(cases)
    return report.write(run, folder, "python -m parity_tests")[0]


def changed(path: Path, **environment: Any) -> Path:
    data = json.loads(path.read_text())
    data["environment"] |= environment
    path.write_text(json.dumps(data))
    return path


def refuse_second(case: Case, arguments: dict[str, Any], ver: Any) -> Any:
    if case.name == "1":
        raise ZeroDivisionError
    return exact(case, arguments)


def test_shares_are_joined_to_what_one_run_reports(tmp_path: Path) -> None:
    whole = json.loads(share(tmp_path / "whole", CASES).read_text())
    parts = [share(tmp_path / str(i), CASES[i - 1 :: 2], (i, 2)) for i in (1, 2)]
    joint = merge.merge(parts, "a command")
    assert (joint["passed"], joint["verdict"]) == (True, whole["verdict"])
    for name in ("tally", "coverage", "counts", "ratios", "known_differences"):
        assert joint[name] == whole[name], name
    spread, other = joint["distributions"], whole["distributions"]
    assert spread["backends"] == other["backends"]
    assert spread["beside"]["3"]["quotient"] == 1
    by_case = lambda rows: sorted(({**r, "seconds": 0} for r in rows), key=str)  # noqa: E731
    assert by_case(json.loads(json.dumps(joint["outcomes"]))) == by_case(whole["outcomes"])
    again = merge.merge([*report.save(joint, tmp_path / "joint")[:1], parts[0]], "again")
    assert again["passed"]
    assert again["tally"] == whole["tally"]


def test_cases_that_differ_in_their_seed_alone_count_once(tmp_path: Path) -> None:
    joint = merge.merge([share(tmp_path, CASES)], "a command")
    assert len(joint["outcomes"]) == 8
    assert joint["counts"]["triton"]["cases"] == 2
    assert joint["counts"]["triton"]["specs"] == 2
    assert joint["coverage"]["triton"]["alone"]["causal"] == 1
    assert joint["coverage"]["triton"]["pairs"]["causal + paged"] == 1


def test_a_missing_share_fails_the_whole(tmp_path: Path) -> None:
    joint = merge.merge([share(tmp_path, CASES[:2], (2, 3))], "a command")
    assert not joint["passed"]
    assert "share 1 of 3 with seed 0 is missing; share 3 of 3" in joint["verdict"]
    other_run = [
        share(tmp_path / "a", CASES[:1], (1, 2)),
        share(tmp_path / "b", CASES, (2, 2), seed=1),
    ]
    verdict = merge.merge(other_run, "a command")["verdict"]
    assert "share 2 of 2 with seed 0 is missing; share 1 of 2 with seed 1 is missing" in verdict


def test_an_outcome_of_several_reports_counts_once_and_by_the_worst(tmp_path: Path) -> None:
    good, bad = share(tmp_path / "good", CASES), share(tmp_path / "bad", CASES, call=refuse_second)
    same = merge.merge([good, good], "a command")
    assert same["passed"]
    assert same["tally"] == {"triton": {AGREES: 4}, "3": {AGREES: 4}}
    assert any(
        "8 outcomes were in several reports and count once, 0 of them" in s for s in same["limits"]
    )
    for order in ([good, bad], [bad, good]):
        joint = merge.merge(order, "a command")
        assert joint["tally"]["triton"] == {AGREES: 3, FAILED: 1}
        assert joint["verdict"] == "FAILED: 2 of 8 outcomes"
        assert any("2 of them with different verdicts" in sentence for sentence in joint["limits"])


@pytest.mark.parametrize(
    ("worse", "better"), [(FAILED, AGREES), (AGREES, REFUSED), (AGREES, NOT_RUN)]
)
def test_what_ran_counts_before_what_did_not(worse: str, better: str) -> None:
    both = [Outcome(CASE, 3, better), Outcome(CASE, 3, worse)]
    assert [outcome.verdict for outcome in merge._distinct(both)[0]] == [worse]


@pytest.mark.parametrize("name", merge.SAME)
def test_reports_that_differ_in_what_numbers_depend_on_are_not_joined(
    tmp_path: Path, name: str
) -> None:
    first, second = (share(tmp_path / each, CASES[:1]) for each in ("first", "second"))
    with pytest.raises(merge.CannotJoinError, match=f"differ in {name}: .*another in"):
        merge.merge([first, changed(second, **{name: "another"})], "a command")


def test_other_binaries_are_not_joined(tmp_path: Path) -> None:
    first, second = (share(tmp_path / each, CASES[:1]) for each in ("first", "second"))
    changed(first, backends={"3": "one build"})
    changed(second, backends={})
    assert merge.merge([first, second], "a command")["environment"]["backends"] == {
        "3": "one build"
    }
    changed(second, backends={"3": "another"})
    with pytest.raises(merge.CannotJoinError, match="differ in backend 3"):
        merge.merge([first, second], "a command")


def test_what_stopped_a_share_or_required_its_peers_holds_for_the_whole(tmp_path: Path) -> None:
    stopped = share(tmp_path / "stopped", CASES[:1])
    data = json.loads(stopped.read_text()) | {"gave_up": "it was enough"}
    stopped.write_text(json.dumps(data))
    rest = share(tmp_path / "rest", CASES[2:])
    assert (
        merge.merge([rest, stopped], "")["verdict"] == "FAILED: it was enough; the rest was not run"
    )

    def missing(case: Case, arguments: dict[str, Any], ver: Any) -> Any:
        if ver == 3:
            raise report.triton_fa.BackendUnavailableError(ver, "no such package")
        return exact(case, arguments)

    required = share(tmp_path / "required", CASES[1:2], call=missing, require_peers=True)
    assert "peers are required, but 3" in merge.merge([rest, required], "")["verdict"]


def test_known_differences_are_judged_over_all_shares(tmp_path: Path) -> None:
    own = [e.own_case for e in suite.DIFFERENCES if e.id == "fa3-empty-key-tensor"]
    parts = [share(tmp_path / "a", CASES, (1, 2)), share(tmp_path / "b", own, (2, 2))]
    joint = merge.merge(parts, "a command")
    assert joint["verdict"] == "FAILED: known differences that did not occur: fa3-empty-key-tensor"
    assert merge.merge(parts, "a command", strict_known=False)["passed"]


def test_what_the_interpreter_is_known_for_is_judged_wherever_reports_are_joined(
    tmp_path: Path,
) -> None:
    own = [e.own_case for e in suite.DIFFERENCES if e.id == "interpreter-truncates-bfloat16"]
    interpreted = share(tmp_path, own, device=Device("cpu", interpreted=True))
    assert "did not occur: interpreter-truncates" in merge.merge([interpreted], "")["verdict"]
    assert merge.merge([share(tmp_path, own)], "")["passed"]


def test_the_command_joins_and_says_by_its_exit_status_whether_it_passed(tmp_path: Path) -> None:
    parts = [str(share(tmp_path / str(i), CASES[i - 1 :: 2], (i, 2))) for i in (1, 2)]
    joint = tmp_path / "joint"

    def run(*reports: str) -> Any:
        return CliRunner().invoke(command_line.main, ["merge", *reports, "--output", str(joint)])

    done = run(*parts)
    assert done.exit_code == 0, done.output
    assert "passed: 8 comparisons" in done.output
    assert "triton: cases 2, specs 2" in done.output
    assert json.loads((joint / "parity.json").read_text())["passed"]
    assert "2 runs or shares of runs." in (joint / "parity.html").read_text()
    assert run(parts[0]).exit_code == 1
    changed(Path(parts[1]), torch="another")
    refused = run(*parts)
    assert refused.exit_code == 1
    assert "differ in torch" in refused.output
    recorded = json.loads((report.HERE / "results" / "2026-11-20-h200.json").read_text())
    del recorded["environment"]["source_digest"]
    older = tmp_path / "older.json"
    older.write_text(json.dumps(recorded))
    assert "made before merging" in run(str(older)).output


def test_a_summary_counts_what_it_does_not_list(tmp_path: Path) -> None:
    cases = [CASES[0], *(case.with_changes(name="", spare_pages=4 + case.seed) for case in CASES)]

    def call(case: Case, arguments: dict[str, Any], ver: Any) -> Any:
        return 1 / 0 if case.spare_pages == 5 else exact(case, arguments)

    whole, short = share(tmp_path / "whole", cases, call=call), tmp_path / "short"
    arguments = ["merge", str(whole), "--summary", "--output", str(short)]
    assert CliRunner().invoke(command_line.main, arguments).exit_code == 1
    data = json.loads((short / "parity.json").read_text())
    assert [(row["named"], row["verdict"]) for row in data["outcomes"]] == [
        (True, AGREES), (True, AGREES), (False, FAILED), (False, FAILED),
    ]  # fmt: skip
    assert data["tally"]["triton"] == {AGREES: 4, FAILED: 1}
    assert "6 outcomes are counted and not listed" in (short / "parity.html").read_text()
    with pytest.raises(merge.CannotJoinError, match="is a summary"):
        merge.merge([short / "parity.json"], "")


def test_outcomes_survive_the_report(tmp_path: Path) -> None:
    run = suite.Run(suite.Options(CPU, vers=("triton", 3)), refuse_second)
    run.go(CASES)
    rows = json.loads(report.write(run, tmp_path, "")[0].read_text())["outcomes"]
    for row, outcome in zip(rows, run.outcomes, strict=True):
        assert report.outcome_of(row) == Outcome(
            **{**vars(outcome), "seconds": round(outcome.seconds, 4)}
        )


# ---------------------------------------------------------------- how errors are spread


def test_quantiles_are_values_that_occurred() -> None:
    spread = distributions.of([*range(1, 1001)])
    assert spread == {
        "count": 1000,
        "median": 500,
        "p90": 900,
        "p99": 990,
        "p99.9": 999,
        "max": 1000,
    }
    assert set(distributions.of([0.25]).values()) == {1, 0.25}


def test_a_nan_is_the_largest_error_and_hides_no_other() -> None:
    values = [*range(1, 100), math.nan]
    spread = distributions.of(values)
    assert (spread["median"], spread["p99"], spread["max"]) == (50, 99, math.inf)
    assert sum(distributions.histogram(values)) == spread["count"]


def test_a_histogram_has_every_value() -> None:
    bins = distributions.histogram([0.0, 0.12, 0.125, 2.99, 3.0, 70.0, math.inf])
    assert len(bins) == len(distributions.EDGES) - 1
    assert (bins[0], bins[1], bins[-2], bins[-1]) == (2, 1, 1, 3)


def test_backends_are_compared_on_what_both_ran() -> None:
    def outcome(ver: Any, seed: int, ratio: float | None, **distances: float) -> Outcome:
        measures = report.Measures(max_ratio=ratio)
        return Outcome(CASE.with_changes(seed=seed), ver, AGREES, (), measures, distances=distances)

    spread = distributions.distributions(
        [
            outcome("triton", 0, 1.0),
            outcome(3, 0, 2.0, triton=0.5),
            outcome("triton", 1, 9.0),
            outcome(3, 1, None),
            outcome(3, 2, 7.0, triton=0.25),
        ]
    )
    assert spread["beside"] == {"3": {"count": 1, "triton": 1.0, "peer": 2.0, "quotient": 0.5}}
    assert spread["backends"]["3"]["max"] == 7.0
    assert spread["distances"]["triton and 3"]["bfloat16"]["max"] == 0.5
    features = spread["features"]["triton"]
    assert features["causal"]["count"] == 2
    assert "softcap" not in features


def test_distances_are_of_rows_that_count(tmp_path: Path) -> None:
    def call(case: Case, arguments: dict[str, Any], ver: Any) -> Any:
        out, lse = exact(case, arguments)
        if ver == 3:
            out[0] += 0.5
        return (out * math.nan, lse) if ver == 4 else (out, lse)

    run = suite.Run(suite.Options(CPU), call)
    run.go([CASE.with_changes(tail_q=3, dtype="float32")])
    assert [outcome.distances for outcome in run.outcomes] == [
        {},
        {"triton": 0},
        {"triton": pytest.approx(0.5), "torch": pytest.approx(0.5)},
        {},
    ]


def test_the_page_shows_the_spread_and_stays_self_contained(tmp_path: Path) -> None:
    data = json.loads(share(tmp_path, CASES).read_text())
    html = (tmp_path / "parity.html").read_text()
    for heading in ("Distribution of the ratios", "Triton beside the peers", "Largest distance"):
        assert heading in html
    assert "triton and 3, bfloat16" in html
    assert html.count('<div class="histogram">') == len(data["distributions"]["backends"]) == 2
    assert not re.search(r"""(src|href)\s*=|https?://|@import|url\(""", html)


def test_a_large_page_lists_only_what_did_not_agree(tmp_path: Path, monkeypatch: Any) -> None:
    cases = [case.with_changes(name="", spare_pages=index) for index, case in enumerate(CASES)]

    def call(case: Case, arguments: dict[str, Any], ver: Any) -> Any:
        return 1 / 0 if case.spare_pages == 1 else exact(case, arguments)

    monkeypatch.setattr(report, "MOST_ROWS", 3)
    data = json.loads(share(tmp_path, cases, call=call).read_text())
    assert len(data["outcomes"]) == 8
    generated = (tmp_path / "parity.html").read_text().split("<h2>Generated cases</h2>")[1]
    assert "8 outcomes are in parity.json" in generated
    assert generated.count("ZeroDivisionError") == 2
    assert "agrees" not in generated


def test_the_plan_alone_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # triton may be imported already
    arguments = ["--soak", "500", "--plan-only", "--device", "cpu", "--output", str(tmp_path / "x")]
    done = CliRunner().invoke(command_line.main, arguments)
    assert done.exit_code == 0, done.output
    cases, different, specs = map(int, re.findall(r"\d+", done.output)[:3])
    assert cases == different > 500
    assert specs > 300
    assert re.search(r"201 pairs of features, the least covered .*: [1-9]", done.output)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("also", [["--cases", "3"], ["--named-only"]])
def test_a_soak_makes_all_generated_cases(also: list[str]) -> None:
    done = CliRunner().invoke(command_line.main, ["--soak", "5", *also])
    assert done.exit_code == 2
    assert "not with --cases or --named-only" in done.output

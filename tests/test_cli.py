"""The command line, in the interpreter."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import triton_fa
from triton_fa import store, tune, warm
from triton_fa.cli import check, main, options
from triton_fa.cli import warmup as warming
from triton_fa.env import VARIABLES
from triton_fa.kernels import choice
from triton_fa.schedule import tiles

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def own_cache(fresh: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nobody's store but this test's."""
    fresh.setenv("TRITON_FA_CACHE_DIR", str(tmp_path / "cache"))
    fresh.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    fresh.chdir(tmp_path)
    choice.forget()
    store._warned.clear()
    yield
    choice.forget()
    store._warned.clear()


def run(*arguments: str, exits: int = 0) -> Result:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == exits, done.output
    # An error on purpose is a line, not a traceback.
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def python(*arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    return subprocess.run(
        [sys.executable, *arguments],
        env=kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_help_names_every_command() -> None:
    text = run("--help").output
    for name in ("info", "check", "warmup", "tune", "cache", "replay"):
        assert f"\n  {name} " in text
        assert "Usage" in run(name, "--help").output


def test_the_module_is_the_command() -> None:
    done = python("-m", "triton_fa", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert triton_fa.__version__ in done.stdout


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_the_extra_there_is_one_line(missing: str) -> None:
    code = (
        f"import sys, runpy; sys.modules[{missing!r}] = None; "
        "runpy.run_module('triton_fa', run_name='__main__')"
    )
    done = python("-c", code)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert missing in done.stderr
    assert "pip install 'triton-fa[cli]'" in done.stderr


def test_an_error_of_our_own_import_is_not_blamed_on_the_extra(tmp_path: Path) -> None:
    code = (
        "import sys, runpy; sys.modules['triton_fa.warm'] = None; "
        "runpy.run_module('triton_fa', run_name='__main__')"
    )
    done = python("-c", code)
    assert done.returncode == 1
    assert "pip install" not in done.stderr
    assert "triton_fa.warm" in done.stderr


def test_the_package_alone_brings_nothing_of_the_command_line() -> None:
    code = "import sys, triton_fa; print(*{m.partition('.')[0] for m in sys.modules})"
    loaded = set(python("-c", code).stdout.split())
    assert "triton_fa" in loaded
    assert not loaded & {"click", "rich", "platformdirs"}


# ---------------------------------------------------------------- info


def test_info_as_json(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cache" / "tiles").mkdir(parents=True)
    (tmp_path / "cache" / "tiles" / "x").write_bytes(bytes(100))
    found = json.loads(run("info", "--json").output)
    assert found["versions"]["triton_fa"] == triton_fa.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["backends"]) == {"triton", "torch", "3", "4"}
    for status in found["backends"].values():
        assert status["available"] or status["reason"]
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert found["fa3_providers"]["order"] == ["sgl", "hub", "upstream"]
    assert found["fa3_providers"]["outcome"]
    assert found["caches"]["triton_fa"] == {
        "path": str(tmp_path / "cache"),
        "files": 1,
        "bytes": 100,
    }
    assert found["caches"]["triton"]["bytes"] == 0
    assert found["environment"]["TRITON_FA_CACHE_DIR"] == str(tmp_path / "cache")


def test_info_as_text_says_the_same() -> None:
    text = run("info").output
    for title in ("versions", "gpus", "backends", "fa3_providers", "environment", "caches"):
        assert f"{title}:\n" in text
    assert f"torch: {torch.__version__}" in text


def test_info_shows_what_the_environment_sets(fresh: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        fresh.setenv(variable.name, variable.default)
    found = json.loads(run("info", "--json").output)["environment"]
    assert {v.name for v in VARIABLES} <= found.keys()


def test_a_bad_variable_is_one_line(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("TRITON_FA_VALIDATE", "maybe")
    assert "TRITON_FA_VALIDATE: expected 0 or 1" in run("info", exits=1).output


def test_info_changes_nothing(tmp_path: Path) -> None:
    run("info")
    assert not (tmp_path / "cache").exists()


# ---------------------------------------------------------------- check


def test_check_passes_here(device: str) -> None:
    text = run("check").output
    assert text.startswith("ver=triton on ")
    for name in ("decode", "append", "prefill", "combine"):
        assert f"\n{name:8} ok, " in text


def test_check_without_triton_runs_on_torch(fresh: pytest.MonkeyPatch) -> None:
    fresh.delenv("TRITON_INTERPRET", raising=False)
    text = run("check", "--device", "cpu").output
    assert text.startswith("ver=torch on cpu")


@pytest.mark.parametrize(
    ("function", "case"),
    [
        ("flash_attn_with_kvcache", "decode"),
        ("flash_attn_with_kvcache", "append"),
        ("flash_attn_varlen_func", "prefill"),
        ("flash_attn_combine", "combine"),
    ],
)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("wrong", [1.02, float("nan")])
def test_check_sees_wrong_numbers(
    fresh: pytest.MonkeyPatch, function: str, case: str, which: int, wrong: float
) -> None:
    real = getattr(triton_fa, function)

    def off(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        results = list(real(*args, **kwargs))
        results[which] = results[which] * wrong
        return tuple(results)

    fresh.setattr(triton_fa, function, off)
    fresh.setattr(check, "CASES", {case: check.CASES[case]})
    fresh.delenv("TRITON_INTERPRET", raising=False)
    text = run("check", "--device", "cpu", exits=1).output
    assert f"Error: {case}: {('out', 'lse')[which]} is off by" in text


def test_check_gives_the_reason_of_a_failure(fresh: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no luck")

    fresh.setattr(triton_fa, "flash_attn_varlen_func", broken)
    text = run("check", exits=1).output
    assert "Error: prefill: RuntimeError: no luck" in text
    assert "decode   ok" in text


def test_the_judge_of_check_is_its_own() -> None:
    """Against the definition, one score at a time."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, h, 8, generator=rng) for n, h in ((3, 4), (5, 2), (5, 2)))
    out, lse = check.judge(q, k, v)
    for i in range(3):
        for h in range(4):
            keys = range(i + 3)
            scores = [float(q[i, h].double() @ k[j, h // 2].double()) * 8**-0.5 for j in keys]
            weights = torch.tensor(scores, dtype=torch.float64).exp()
            want = sum(w * v[j, h // 2].double() for j, w in zip(keys, weights, strict=True))
            torch.testing.assert_close(out[i, h], want / weights.sum())
            torch.testing.assert_close(lse[h, i], weights.sum().log())
    source = Path(check.__file__).read_text()
    assert "reference" not in source


def test_check_of_a_device_that_is_not_there() -> None:
    text = run("check", "--device", "nonsense", exits=2).output
    assert "--device" in text
    if not torch.cuda.is_available():
        assert "'cuda'" in run("check", "--device", "cuda", exits=2).output


# ---------------------------------------------------------------- warmup


def test_warmup_runs_every_variant(device: str) -> None:
    arguments = ("warmup", "4/2x16", "2/1x32,16", "--device", device, "--dtype", "fp16")
    small = ("--max-batch", "2", "--max-seqlen-k", "64", "--processes", "1")
    text = run(*arguments, *small).output
    assert "4/2x16: 2 variants: 2 batch sizes up to 2 x query bounds 1\n" in text
    assert "2/1x32,16: 2 variants" in text


def test_warmup_passes_every_option_on(fresh: pytest.MonkeyPatch, device: str) -> None:
    seen: list[tuple[warm.Model, warm.Variant]] = []
    fresh.setattr(warming, "run_variant", lambda *given: seen.append(given))
    run(
        *("warmup", "8/2x64", "--dtype", "fp16", "--page-size", "32", "--no-causal"),
        *("--window", "7", "8", "--softcap", "3.5", "--sinks", "--lse", "--max-batch", "1"),
        *("--kv-dtype", "e4m3", "--descales", "--qv"),
        *("--max-seqlen-q", "4", "--max-seqlen-k", "99", "--processes", "1", "--device", device),
    )
    assert {model for model, _ in seen} == {
        warm.Model(
            *(8, 2, 64, 64, torch.float16, 32, False, (7, 8), 3.5, True, True, 99, where),
            *(True, torch.float8_e4m3fn, True),
        )
        for where in [str(torch.empty(0, device=device).device)]
    }
    assert [variant for _, variant in seen] == [(1, 1), (1, 2), (1, 4)]


@pytest.mark.slow
def test_warmup_in_processes(device: str) -> None:
    text = run(
        *("warmup", "2/1x16", "--device", device, "--dtype", "fp16", "--max-batch", "2"),
        *("--max-seqlen-k", "32", "--processes", "2"),
    ).output
    assert "2/1x16: 2 variants" in text


def test_warmup_needs_triton(fresh: pytest.MonkeyPatch) -> None:
    fresh.delenv("TRITON_INTERPRET", raising=False)
    assert "needs a GPU" in run("warmup", "4/2x16", "--device", "cpu", exits=1).output


@pytest.mark.parametrize("shape", ["8-2", "8/2", "8/3x64", "0/0x64", "8/0x64", "8/2x0", "a/bxc"])
def test_a_shape_that_is_none(shape: str) -> None:
    assert repr(shape) in run("warmup", shape, exits=2).output


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("32/8x128", options.Shape(32, 8, 128, 128)),
        ("128/128x192,128", options.Shape(128, 128, 192, 128)),
    ],
)
def test_a_shape_is_written_as_it_is_read(text: str, shape: options.Shape) -> None:
    assert options._shape(text) == shape
    assert str(shape) == text


def test_the_function_reports_progress(device: str) -> None:
    seen: list[tuple[warm.Variant, int]] = []
    done = triton_fa.warmup(
        *(2, 1, 16),
        dtype=torch.float16,
        max_batch=3,
        max_seqlen_k=32,
        device=device,
        on_variant=lambda variant, total: seen.append((variant, total)),
    )
    assert done == [(1, 1), (2, 1), (3, 1)]
    assert seen == [(variant, 3) for variant in done]


def test_how_many_variants_there_are() -> None:
    """What the docstring says."""
    assert len(warm.variants(4, 256, (1,))) == 16
    assert {most for _, most in warm.variants(4, 1, (2048,))} == {1, 2, 4, 8, 16, 64, 2048}
    assert {most for _, most in warm.variants(128, 1, (7,), qv=True)} == {1, 2, 4, 7}


def test_float8_queries_are_warmed_up_with_factors(device: str) -> None:
    done = triton_fa.warmup(
        *(2, 1, 16),
        dtype=torch.float8_e4m3fn,
        descales=True,
        max_batch=1,
        max_seqlen_k=32,
        device=device,
    )
    assert done == [(1, 1)]


# ---------------------------------------------------------------- tune


def test_tune_without_a_gpu_says_so(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setattr(torch.cuda, "is_available", lambda: False)
    text = run("tune", "8/2x64", exits=1).output
    assert text == "Error: tune needs a GPU, and torch finds none\n"
    assert not (tmp_path / "cache").exists()


WORK = tune.Workload(4, 2, 32, 32, torch.float16, 16, batch=1, seqlen_q=1, seqlen_k=40)
CANDIDATES = (
    tiles.DecodeTile(32, 4, 1, 2),
    tiles.DecodeTile(64, 4, 2, 1),
    tiles.DecodeTile(128, 8, 2, 1),
)


@pytest.fixture
def tuning(fresh: pytest.MonkeyPatch, device: str) -> pytest.MonkeyPatch:
    """Three tiles to choose from, in the interpreter."""
    if device != "cpu":
        pytest.skip("tiles of the interpreter")
    fresh.setattr(choice, "chip", lambda device: "a chip sm_90")
    fresh.setattr(tiles, "decode_candidates", lambda *_: CANDIDATES)
    return fresh


def times(*microseconds: float) -> tune.Timer:
    """A timer that knows the answer."""

    def timer(calls: Mapping[Any, Callable[[], object]]) -> dict[Any, float]:
        known = dict(zip(CANDIDATES, microseconds, strict=True))
        return {tile: known[tile] for tile in calls}

    return timer


def test_the_quickest_tile_is_kept_and_used(tuning: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    steps: list[int] = []
    (found,) = tune.tune([WORK, WORK], cpu, timer=times(10, 8, 9), on_tile=steps.append)
    assert (found.shipped, found.tile) == CANDIDATES[:2]
    assert found.gain == pytest.approx(1.25)
    assert steps == [6] * 6
    path = tune.keep(found, tmp_path / "runs")
    assert path.parent == store.directory()
    assert not (tmp_path / "runs").exists()
    problem = tune.problem(WORK, cpu)
    assert choice.chosen(tune.choice_of(problem)) == CANDIDATES[1]
    (entry,) = json.loads(run("cache", "show", "--json").output)["entries"]
    assert entry["tile"] == {
        "block_n": 64,
        "num_warps": 4,
        "num_stages": 2,
        "programs_per_sm": 1,
    }
    assert entry["gain"] == 1.25
    assert entry["microseconds"] == [8, 8]


def test_a_tie_goes_to_the_shipped_tile(tuning: pytest.MonkeyPatch) -> None:
    (found,) = tune.tune([WORK], torch.device("cpu"), timer=times(10, 9.95, 11))
    assert found.tile == found.shipped
    assert found.gain == 1


def test_a_tile_that_cannot_run_is_no_candidate(tuning: pytest.MonkeyPatch) -> None:
    prepare = tune.BACKEND.prepare

    def refuse(problem: Any) -> Any:
        if choice._CHOSEN[tune.choice_of(problem).key] == CANDIDATES[1]:
            raise RuntimeError("out of shared memory")
        return prepare(problem)

    tuning.setattr(tune.BACKEND, "prepare", refuse, raising=False)
    (found,) = tune.tune([WORK, WORK], torch.device("cpu"), timer=times(10, 1, 9))
    assert found.tile == CANDIDATES[2]
    assert found.failures == {CANDIDATES[1]: "RuntimeError: out of shared memory"}
    assert list(found.times) == [CANDIDATES[0], CANDIDATES[2]]


@pytest.mark.parametrize("wrong", [1.1, float("nan")])
def test_a_tile_with_other_numbers_is_no_candidate(
    tuning: pytest.MonkeyPatch, wrong: float
) -> None:
    prepared = tune._prepared

    def off(made: Any, tile: Any, given: Any) -> Callable[[], torch.Tensor]:
        call = prepared(made, tile, given)
        return (lambda: call() * wrong) if tile == CANDIDATES[1] else call

    tuning.setattr(tune, "_prepared", off)
    (found,) = tune.tune([WORK], torch.device("cpu"), timer=times(10, 1, 9))
    assert found.tile == CANDIDATES[2]
    assert "differs from the shipped tile" in found.failures[CANDIDATES[1]]


def test_a_shipped_tile_that_cannot_run_is_an_error(tuning: pytest.MonkeyPatch) -> None:
    tuning.setattr(tune, "_prepared", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tune.tune([WORK], torch.device("cpu"), timer=times(1, 1, 1))


def test_workloads_are_grouped_by_what_they_decide(tuning: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    prompt = tune.Workload(4, 2, 32, 32, torch.float16, 0, batch=1, seqlen_q=70, seqlen_k=70)
    kernels = [dict(tune.choice_of(tune.problem(work, cpu)).key) for work in (WORK, prompt)]
    assert [key["kernel"] for key in kernels] == ["decode", "prefill"]
    assert [key["page"] for key in kernels] == [16, 0]


def test_switched_off_tuning_leaves_the_store_alone(
    tuning: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cpu = torch.device("cpu")
    (found,) = tune.tune([WORK], cpu, timer=times(10, 8, 9))
    path = tune.keep(found, tmp_path / "runs")
    old = time.time() - 1000
    for file in (path, store.directory(), tmp_path / "cache"):
        os.utime(file, (old, old))

    def state() -> list[Any]:
        files = [tmp_path / "cache", *sorted((tmp_path / "cache").rglob("*"))]
        return [(f, f.stat().st_mtime_ns, f.read_bytes() if f.is_file() else 0) for f in files]

    before = state()
    tuning.setenv("TRITON_FA_AUTOTUNE_CACHE", "0")
    store.settings.cache_clear()
    choice.forget()
    assert choice.chosen(tune.choice_of(tune.problem(WORK, cpu))) == CANDIDATES[0]
    (found,) = tune.tune([WORK], cpu, timer=times(10, 8, 7))
    result = tune.keep(found, tmp_path / "runs")
    assert "TRITON_FA_AUTOTUNE_CACHE=0" in run("cache", "show").output
    assert "not touched" in run("cache", "clear", "--yes", exits=1).output
    run("info")
    assert state() == before
    assert result.parent == tmp_path / "runs"
    assert result.name.startswith("decode.")
    kept = json.loads(result.read_text())
    assert kept["tile"]["block_n"] == 128
    assert kept["key"]["kernel"] == "decode"


def test_a_store_that_cannot_be_written_costs_no_result(
    tuning: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("mine")
    (found,) = tune.tune([WORK], torch.device("cpu"), timer=times(10, 8, 9))
    assert tune.keep(found, tmp_path / "runs").parent == tmp_path / "runs"


@pytest.mark.gpu
def test_tune_on_a_gpu(fresh: pytest.MonkeyPatch) -> None:
    real = tiles.decode_candidates
    fresh.setattr(tiles, "decode_candidates", lambda *given: real(*given)[:3])
    text = run(*("tune", "8/2x64", "--batch", "2", "--seqlen-k", "256")).output
    assert "3 tiles measured, 0 unusable" in text
    (entry,) = store.entries()
    assert entry.value["microseconds"][0] > 0
    assert store.read(entry.key) == entry.value


# ---------------------------------------------------------------- cache


def test_the_cache_is_shown_and_cleared() -> None:
    assert "0 entries" in run("cache", "show").output
    store.write({"kernel": "decode", "rows": 8}, {"tile": {"block_n": 64}, "gain": 1.1})
    bad = store.write({"kernel": "decode", "rows": 1}, {})
    assert bad is not None
    bad.write_text("?")
    text = run("cache", "show").output
    assert "2 entries" in text
    assert '"block_n": 64' in text
    assert f"unusable: {bad}" in text
    assert "Aborted" in run("cache", "clear", exits=1).output
    assert len(list(store.entries())) == 2
    assert "2 files removed" in run("cache", "clear", "--yes").output
    assert list(store.entries()) == []

"""Which backend runs a call: `ver`, the settings, the one warning of a fallback, and `strict`."""

import builtins
import importlib
import logging
import os
import subprocess
import sys
import threading
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import triton_fa
from triton_fa import dispatch, env
from triton_fa.backends import fa3, fa4
from triton_fa.errors import ArgumentError, ArgumentValueError

ROOT = Path(__file__).resolve().parents[1]


def dense(device: str = "cpu", **changes: Any) -> dict[str, Any]:
    shapes = {"q": (1, 2, 2, 16), "k": (1, 3, 1, 16), "v": (1, 3, 1, 16)}
    return {n: torch.ones(s, device=device) for n, s in shapes.items()} | changes


def paged(device: str, **changes: Any) -> dict[str, Any]:
    given = {
        "q": torch.ones(1, 1, 2, 16, device=device),
        "k_cache": torch.ones(2, 4, 1, 16, device=device),
        "v_cache": torch.ones(2, 4, 1, 16, device=device),
        "page_table": torch.tensor([[1, 0]], dtype=torch.int32, device=device),
        "cache_seqlens": torch.tensor([5], dtype=torch.int32, device=device),
    }
    return given | changes


@pytest.fixture
def on_hopper(fresh: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No device is ruled out: loading the binaries decides."""
    fresh.setattr(fa3, "_device_reason", lambda device: None)
    fresh.setattr(fa4, "_device_reason", lambda device: None)
    return fresh


def breaks(monkeypatch: pytest.MonkeyPatch, errors: dict[str, Exception]) -> None:
    """Importing these modules raises, as a missing or ABI-broken binary does."""
    real = importlib.import_module

    def import_module(name: str, package: str | None = None) -> types.ModuleType:
        for broken, error in errors.items():
            if name == broken or name.startswith(broken + "."):
                raise error
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", import_module)


BROKEN: dict[str, Exception] = {
    "sgl_kernel": ImportError("libcudart.so.13: cannot open shared object file"),
    "kernels": ModuleNotFoundError("No module named 'kernels'"),
    "flash_attn_interface": OSError("undefined symbol: _ZN3c104cuda9SetDeviceEab"),
    "flash_attn": RuntimeError("operator flash_attn_3::fwd already registered"),
}


# ---------------------------------------------------------------- ver


def test_no_ver_is_triton_where_it_runs_and_torch_elsewhere(fresh: pytest.MonkeyPatch) -> None:
    cpu, meta = torch.device("cpu"), torch.device("meta")
    fresh.setenv("TRITON_INTERPRET", "1")
    assert dispatch.resolve(None, cpu) == "triton"
    fresh.setenv("TRITON_INTERPRET", "0")
    assert dispatch.resolve(None, cpu) == "torch"
    assert dispatch.resolve(None, meta) == "torch"
    assert dispatch.resolve(None, torch.device("cuda")) == "triton"


@pytest.mark.parametrize("ver", ["triton", "torch", 3, 4])
def test_a_given_ver_is_taken_as_it_is(fresh: pytest.MonkeyPatch, ver: int | str) -> None:
    fresh.setenv("TRITON_FA_VER", "torch")
    assert dispatch.resolve(ver, torch.device("cpu")) == ver


@pytest.mark.parametrize(("text", "ver"), [("torch", "torch"), ("triton", "triton"), ("3", 3)])
def test_the_environment_gives_the_default_ver(
    fresh: pytest.MonkeyPatch, text: str, ver: int | str
) -> None:
    fresh.setenv("TRITON_FA_VER", text)
    assert dispatch.resolve(None, torch.device("cpu")) == ver


def test_triton_on_a_cpu_needs_the_interpreter() -> None:
    code = (
        "import torch, triton_fa\n"
        "x = torch.ones(1, 2, 2, 16)\n"
        "try: triton_fa.flash_attn_func(x, x, x, ver='triton')\n"
        "except triton_fa.BackendUnavailableError as e: print(e.ver, e.reason)\n"
    )
    env_vars = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env_vars, check=False
    )
    assert done.stdout.startswith("triton Triton runs on a CPU only in its interpreter"), done


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TRITON_FA_VER", "2"),
        ("TRITON_FA_VER", "Triton"),
        ("TRITON_FA_FORCE", "torch"),
        ("TRITON_FA_FORCE", "1"),
        ("TRITON_FA_FALLBACK", "no"),
        ("TRITON_FA_FALLBACK", ""),
        ("TRITON_FA_VALIDATE", "true"),
        ("TRITON_FA_DIRECT_LAUNCH", "2"),
        ("TRITON_FA_FA3_PROVIDER", "vllm"),
        ("TRITON_FA_FA3_PROVIDER", "sgl,hubb"),
        ("TRITON_FA_FA3_PROVIDER", ","),
    ],
)
def test_a_malformed_variable_raises_by_name(
    fresh: pytest.MonkeyPatch, name: str, value: str
) -> None:
    fresh.setenv(name, value)
    with pytest.raises(ArgumentValueError, match=name) as caught:
        triton_fa.flash_attn_func(**dense(), ver="torch")
    assert repr(value) in str(caught.value)


def test_every_variable_that_is_read_is_documented(fresh: pytest.MonkeyPatch) -> None:
    seen = set()
    real = env.os.environ.get

    def get(name: str, default: Any = None) -> Any:
        seen.add(name)
        return real(name, default)

    fresh.setattr(env.os.environ, "get", get)
    env.settings()
    assert seen == {variable.name for variable in env.VARIABLES}


def test_documented_defaults_are_the_real_ones(fresh: pytest.MonkeyPatch) -> None:
    before = env.settings()
    for variable in env.VARIABLES:
        fresh.setenv(variable.name, variable.default)
    env.settings.cache_clear()
    assert env.settings() == before


# ---------------------------------------------------------------- fallback


@pytest.mark.parametrize("ver", [3, 4])
def test_a_binary_that_does_not_load_is_replaced_with_one_warning(
    on_hopper: pytest.MonkeyPatch, ver: int, device: str
) -> None:
    breaks(on_hopper, BROKEN)
    given = dense(device)
    want = triton_fa.flash_attn_func(**given, ver="triton")
    with pytest.warns(triton_fa.FallbackWarning) as caught:
        got = triton_fa.flash_attn_func(**given, ver=ver)
    assert torch.equal(got, want)
    assert len(caught) == 1
    assert caught[0].filename == __file__, "the warning must point at the caller"
    text = str(caught[0].message)
    named = ["flash_attn"] if ver == 4 else ["sgl_kernel", "kernels", "flash_attn_interface"]
    for module in named:
        assert str(BROKEN[module]) in text
        assert type(BROKEN[module]).__name__ in text

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        triton_fa.flash_attn_func(**given, ver=ver)  # a hit
        triton_fa.flash_attn_func(**dense(device, causal=True), ver=ver)  # a miss, the same reason


def test_the_warning_names_every_reason_and_comes_once_for_each(
    on_hopper: pytest.MonkeyPatch, device: str
) -> None:
    on_hopper.setattr(fa3.FA3Backend, "unavailable", lambda self, device: None)
    on_hopper.setattr(fa3.FA3Backend, "unsupported", lambda self, spec: ["first", "second"])
    with pytest.warns(triton_fa.FallbackWarning, match="3.*first; second") as caught:  # noqa: PT031
        for causal in (False, True):
            triton_fa.flash_attn_func(**dense(device, causal=causal), ver=3)
    assert len(caught) == 1
    dispatch.refusals.cache_clear()
    on_hopper.setattr(fa3.FA3Backend, "unsupported", lambda self, spec: ["third"])
    with pytest.warns(triton_fa.FallbackWarning, match="third") as caught:
        triton_fa.flash_attn_func(**dense(device, softcap=1.0), ver=3)
    assert len(caught) == 1


@pytest.mark.parametrize("how", ["environment", "strict"])
@pytest.mark.parametrize("ver", [3, 4])
def test_without_fallback_it_raises(
    on_hopper: pytest.MonkeyPatch, ver: int, how: str, device: str
) -> None:
    breaks(on_hopper, BROKEN)
    out = torch.full((1, 2, 2, 16), 7.0, device=device)
    given = dense(device, out=out)
    if how == "environment":
        on_hopper.setenv("TRITON_FA_FALLBACK", "0")
        with pytest.raises(triton_fa.BackendUnavailableError) as caught:
            triton_fa.flash_attn_func(**given, ver=ver)
    else:
        with (
            triton_fa.strict(),
            pytest.raises(triton_fa.BackendUnavailableError) as caught,
        ):
            triton_fa.flash_attn_func(**given, ver=ver)
    assert caught.value.ver == ver
    assert str(BROKEN["sgl_kernel" if ver == 3 else "flash_attn"]) in caught.value.reason
    assert (out == 7.0).all()


def test_strict_forgets_a_fallback_that_was_prepared_before(
    on_hopper: pytest.MonkeyPatch, device: str
) -> None:
    breaks(on_hopper, BROKEN)
    given = dense(device)
    with pytest.warns(triton_fa.FallbackWarning):
        triton_fa.flash_attn_func(**given, ver=3)
    with triton_fa.strict(), pytest.raises(triton_fa.BackendUnavailableError):
        triton_fa.flash_attn_func(**given, ver=3)
    triton_fa.flash_attn_func(**given, ver=3)


def test_strict_holds_for_its_own_thread_only() -> None:
    seen = []
    with triton_fa.strict():
        thread = threading.Thread(target=lambda: seen.append(dispatch.is_strict()))
        thread.start()
        thread.join()
        assert dispatch.is_strict()
    assert seen == [False]
    assert not dispatch.is_strict()


def test_an_unsupported_call_raises_every_reason_under_strict(
    on_hopper: pytest.MonkeyPatch,
) -> None:
    on_hopper.setattr(fa3.FA3Backend, "unavailable", lambda self, device: None)
    on_hopper.setattr(fa3.FA3Backend, "unsupported", lambda self, spec: ["first", "second"])
    with triton_fa.strict(), pytest.raises(triton_fa.UnsupportedError) as caught:
        triton_fa.flash_attn_func(**dense(), ver=3)
    assert caught.value.ver == 3
    assert caught.value.reasons == ("first", "second")


def test_what_triton_cannot_do_either_raises_both_reasons(
    on_hopper: pytest.MonkeyPatch, device: str
) -> None:
    breaks(on_hopper, BROKEN)
    given = {name: torch.zeros(1, 3, 2, 12, device=device) for name in ("q", "k", "v")}
    with pytest.raises(triton_fa.UnsupportedError, match="nor does ver='triton': head_d") as caught:
        triton_fa.flash_attn_func(**given, ver=3)
    assert str(BROKEN["sgl_kernel"]) in caught.value.reasons[0]


def appending(device: str) -> dict[str, Any]:
    angles = torch.linspace(0, 1, 64, device=device).view(8, 8)
    new = torch.linspace(-1, 1, 64, device=device).view(1, 2, 2, 16)
    rotary = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    rows = {
        name: torch.tensor([value], dtype=torch.int32, device=device)
        for name, value in (("cache_batch_idx", 0), ("cache_leftpad", 1))
    }
    return paged(device, k=new[:, :, :1], v=new[:, :, 1:], attention_chunk=3, **rotary, **rows)


@pytest.mark.parametrize("ver", [3, 4])
def test_a_call_that_appends_falls_back_like_any_other(
    on_hopper: pytest.MonkeyPatch, ver: int, device: str
) -> None:
    breaks(on_hopper, BROKEN)
    given = appending(device)
    with pytest.warns(triton_fa.FallbackWarning):
        out = triton_fa.flash_attn_with_kvcache(**given, ver=ver)
    want = appending(device)
    torch.testing.assert_close(
        out, triton_fa.flash_attn_with_kvcache(**want, ver="torch"), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(given["k_cache"], want["k_cache"])
    assert torch.equal(given["v_cache"], want["v_cache"])
    assert not torch.equal(given["k_cache"], paged(device)["k_cache"])


def test_bad_input_is_an_error_and_no_reason_to_fall_back(on_hopper: pytest.MonkeyPatch) -> None:
    breaks(on_hopper, BROKEN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ArgumentError):
            triton_fa.flash_attn_func(**dense(k=torch.ones(2, 3, 1, 16)), ver=3)


def test_an_error_of_the_run_propagates(on_hopper: pytest.MonkeyPatch) -> None:
    def prepare(self: Any, problem: Any) -> Any:
        def run(tensors: Any) -> Any:
            raise torch.cuda.OutOfMemoryError("out of memory")

        return run

    on_hopper.setattr(fa3.FA3Backend, "unavailable", lambda self, device: None)
    on_hopper.setattr(fa3.FA3Backend, "unsupported", lambda self, spec: [])
    on_hopper.setattr(fa3.FA3Backend, "prepare", prepare)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(torch.cuda.OutOfMemoryError):
            triton_fa.flash_attn_func(**dense(), ver=3)


def test_fa3_results_keep_their_shape_after_a_fallback(
    on_hopper: pytest.MonkeyPatch, device: str
) -> None:
    breaks(on_hopper, BROKEN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        three = triton_fa.flash_attn_with_kvcache(**paged(device), ver=3, return_softmax_lse=True)
        four = triton_fa.flash_attn_with_kvcache(**paged(device), ver=4, return_softmax_lse=True)
        bare = triton_fa.flash_attn_with_kvcache(**paged(device), ver=3)
    assert [tuple(t.shape) for t in three] == [(1, 1, 2, 16), (1, 2, 1), (0,), (0,)]
    assert [tuple(t.shape) for t in four] == [(1, 1, 2, 16), (1, 2, 1)]
    assert tuple(bare.shape) == (1, 1, 2, 16)


@pytest.mark.parametrize("how", ["fallback", "force"])
@pytest.mark.parametrize("ver", [3, 4])
def test_metadata_that_fa3_made_never_reaches_triton(
    on_hopper: pytest.MonkeyPatch, ver: int, how: str, device: str
) -> None:
    if how == "force":
        on_hopper.setenv("TRITON_FA_FORCE", "triton")
    breaks(on_hopper, BROKEN)
    backend: Any = dispatch._load("triton")
    prepared, given = [], []
    real = type(backend).prepare

    def prepare(self: Any, problem: Any) -> Any:
        prepared.append(problem)
        run = real(self, problem)

        def record(tensors: Any) -> Any:
            given.append(tensors)
            return run(tensors)

        return record

    on_hopper.setattr(type(backend), "prepare", prepare)
    foreign = torch.full((3,), 2**31 - 1, dtype=torch.int32, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            triton_fa.flash_attn_with_kvcache(**paged(device), scheduler_metadata=foreign, ver=ver)
    assert prepared[0].tensors.scheduler_metadata is None
    assert "scheduler_metadata" not in prepared[0].spec.features
    assert [tensors.scheduler_metadata for tensors in given] == [None, None]


# ---------------------------------------------------------------- force


@pytest.mark.parametrize("ver", [None, "torch", 3, 4, "triton"])
def test_force_sends_every_ver_to_triton_without_a_warning(
    on_hopper: pytest.MonkeyPatch, ver: Any, device: str
) -> None:
    on_hopper.setenv("TRITON_FA_FORCE", "triton")
    breaks(on_hopper, BROKEN)
    ran = []
    backend: Any = dispatch._load("triton")
    real = type(backend).prepare
    on_hopper.setattr(
        type(backend), "prepare", lambda self, problem: ran.append(1) or real(self, problem)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = triton_fa.flash_attn_func(**dense(device), ver=ver, return_attn_probs=True)
    assert ran
    assert len(result) == (4 if ver == 3 else 2)


def test_force_still_refuses_an_unknown_ver(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("TRITON_FA_FORCE", "triton")
    with pytest.raises(triton_fa.UnknownVersionError):
        triton_fa.flash_attn_func(**dense(), ver=5)


# ---------------------------------------------------------------- backends()


def test_backends_say_what_is_there_and_why_not(
    on_hopper: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    breaks(on_hopper, BROKEN)
    with caplog.at_level(logging.WARNING, "triton_fa"):
        found = triton_fa.backends("cpu")
    assert list(found) == ["triton", "torch", 3, 4]
    for ver, status in found.items():
        assert status.ver == ver
        assert (status.reason is None) == status.available
        assert bool(status.detail) == status.available
    assert found["torch"].available
    assert found["torch"].detail == f"torch {torch.__version__}"
    assert not found[3].available
    assert str(BROKEN["flash_attn_interface"]) in (found[3].reason or "")
    assert str(BROKEN["flash_attn"]) in (found[4].reason or "")


@pytest.mark.usefixtures("fresh")
def test_the_binaries_need_a_cuda_device() -> None:
    found = triton_fa.backends("cpu")
    assert found[3].reason == "FlashAttention-3 needs a CUDA device, got 'cpu'"
    assert found[4].reason == "FlashAttention-4 needs a CUDA device, got 'cpu'"


def test_an_adapter_that_cannot_be_imported_is_unavailable(fresh: pytest.MonkeyPatch) -> None:
    breaks(fresh, {"triton_fa.backends.triton": ImportError("No module named 'triton'")})
    assert triton_fa.backends("cpu")["triton"].reason == "ImportError: No module named 'triton'"
    with pytest.raises(triton_fa.BackendUnavailableError, match="No module named 'triton'"):
        triton_fa.flash_attn_func(**dense(), ver="triton")


def test_a_torch_call_imports_no_binary(fresh: pytest.MonkeyPatch) -> None:
    asked = []
    real = builtins.__import__

    def watch(name: str, *args: Any, **kwargs: Any) -> Any:
        asked.append(name.partition(".")[0])
        return real(name, *args, **kwargs)

    fresh.setattr(builtins, "__import__", watch)
    triton_fa.flash_attn_func(**dense(), ver="torch")
    assert not {"sgl_kernel", "flash_attn", "flash_attn_interface", "kernels"} & set(asked)

"""Where these tests run, and a package without memory of earlier calls."""

import os
from collections.abc import Iterator

import pytest
import torch

# Before anything imports triton: without a GPU the kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _forget() -> None:
    from triton_fa import api, dispatch, env
    from triton_fa.backends import fa3, fa4

    api._RECORDS.clear()
    api._SCHEDULES.clear()
    for cached in (
        dispatch._load,
        dispatch.refusals,
        dispatch._warn_once,
        env.settings,
        fa3.load_provider,
        fa4.load,
    ):
        cached.cache_clear()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A monkeypatch whose changes the package notices: nothing is cached before or after."""
    for name in list(os.environ):
        if name.startswith("TRITON_FA_"):
            monkeypatch.delenv(name)
    _forget()
    yield monkeypatch
    monkeypatch.undo()
    _forget()


@pytest.fixture(scope="session")
def device() -> str:
    """Where tensors live: a GPU if there is one, else the CPU with Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs on either device; skip gpu tests, with the reason, where there is no GPU."""
    for item in items:
        if "device" in getattr(item, "fixturenames", ()) or hasattr(
            getattr(item, "module", None), "DEVICE"
        ):
            item.add_marker("device")
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))

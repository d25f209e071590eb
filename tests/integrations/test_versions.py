"""A framework that is missing, too old or too new: one error, with what was found."""

import importlib
import sys
from types import ModuleType

import pytest

from triton_fa import integrations
from triton_fa.integrations import FrameworkVersionError, require, torch_attention

# The oldest and newest versions beside the supported ones.
FRAMEWORKS = {
    "transformers": ("5.16.4", "6.0.0", ">=5.17,<6"),
    "diffusers": ("0.41.0", "1.0.0", ">=0.42,<1"),
    "vllm": ("0.32.2", "0.34.0", ">=0.33,<0.34"),
    "sglang": ("0.5.10", "0.6.0", ">=0.5.11,<0.6"),
}


@pytest.mark.parametrize("which", [0, 1, None], ids=["too old", "too new", "missing"])
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_the_module_says_so(name: str, which: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    supported = FRAMEWORKS[name][2]
    found = None if which is None else str(FRAMEWORKS[name][which])
    monkeypatch.setattr(integrations, "_version", lambda asked: found if asked == name else "")
    monkeypatch.delitem(sys.modules, f"triton_fa.integrations.{name}", raising=False)
    with pytest.raises(FrameworkVersionError) as error:
        importlib.import_module(f"triton_fa.integrations.{name}")
    what = "none installed" if found is None else found
    assert str(error.value) == f"{name}: expected {supported}, found {what}"
    assert isinstance(error.value, ImportError)


def test_the_backend_of_sglang_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its interface is younger than the calls that the plug-in stands in for."""
    monkeypatch.setattr(integrations, "_version", lambda _: "0.5.22")
    plugin = ModuleType("triton_fa.integrations.sglang")
    plugin.__dict__.update(BACKEND_VERSIONS=">=0.5.23,<0.6", NAME="triton_fa")
    monkeypatch.setitem(sys.modules, plugin.__name__, plugin)
    monkeypatch.delitem(sys.modules, "triton_fa.integrations.sglang_backend", raising=False)
    with pytest.raises(FrameworkVersionError) as error:
        importlib.import_module("triton_fa.integrations.sglang_backend")
    assert str(error.value) == "sglang: expected >=0.5.23,<0.6, found 0.5.22"


def test_pytorch_without_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operators need no such PyTorch, so the module loads and `register` refuses."""
    monkeypatch.setattr(integrations, "_version", lambda _: "2.11.0+cu130")
    with pytest.raises(FrameworkVersionError, match=r"torch: expected >=2.13, found 2.11.0\+cu130"):
        torch_attention.register()


def test_a_real_one_that_is_missing() -> None:
    with pytest.raises(FrameworkVersionError, match="no_such_framework: expected >=1, found none"):
        require("no_such_framework", ">=1")


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("1.2", True),
        ("1.2.dev3", True),
        ("1.2+cu130", True),
        ("1.9.post1", True),
        ("1.1.9", False),
        ("2.0rc1", False),
        ("2", False),
        ("unknown", True),
        ("", True),
    ],
)
def test_versions(version: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("a_framework_of_sources")
    module.__dict__["__version__"] = version
    monkeypatch.setitem(sys.modules, module.__name__, module)
    if fits:
        require(module.__name__, ">=1.2,<2")
    else:
        with pytest.raises(FrameworkVersionError, match=f"found {version}"):
            require(module.__name__, ">=1.2,<2")

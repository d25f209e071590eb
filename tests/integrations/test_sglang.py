"""The plug-in: it registers our backend, and stands in below SGLang's own only when named.

Without SGLang what it reads and fills is imitated, and SGLang's own dispatcher is not run.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

import triton_fa
from tests.integrations import stub_sglang
from triton_fa import integrations
from triton_fa.compat import install

HAS_SGLANG = importlib.util.find_spec("sglang") is not None
# The dispatcher of 0.5.12 and later, and the one before.
DISPATCHERS = ("sglang.kernels.ops.attention.flash_attention", "sglang.jit_kernel.flash_attention")


def held() -> dict[str, ModuleType]:
    return {n: m for n, m in sys.modules.items() if n.partition(".")[0] == "sgl_kernel"}


@pytest.fixture
def plugin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Our plug-in, with SGLANG_PLUGINS as given."""
    if HAS_SGLANG:
        if request.param is None:
            monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
        else:
            monkeypatch.setenv("SGLANG_PLUGINS", request.param)
    else:
        for name, stub in stub_sglang.modules(request.param).items():
            monkeypatch.setitem(sys.modules, name, stub)
    before = held()
    sys.modules.pop("triton_fa.integrations.sglang", None)
    yield importlib.import_module("triton_fa.integrations.sglang")
    for name in ("sglang", "sglang_backend"):
        sys.modules.pop(f"triton_fa.integrations.{name}", None)
    for name in held():
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.parametrize("plugin", [None, "", "other", "other,not_triton_fa"], indirect=True)
def test_nothing_happens_unless_named(plugin: ModuleType) -> None:
    before = held()
    plugin.register()
    assert held() == before


@pytest.mark.parametrize("plugin", ["triton_fa", "other, triton_fa"], indirect=True)
def test_named(plugin: ModuleType) -> None:
    plugin.register()
    plugin.register()
    stand_in = importlib.import_module("sgl_kernel.flash_attn")
    assert stand_in.__dict__["__triton_fa__"] == "triton_fa.compat.sgl_kernel"
    assert importlib.import_module("sgl_kernel").merge_state_v2 is not None


def registered() -> tuple[list[str], list[str], Any]:
    """Names on the command line, those of deterministic inference, and what makes our backend."""
    choices = importlib.import_module("sglang.srt.arg_groups.choices")
    registry = importlib.import_module("sglang.srt.layers.attention.attention_registry")
    return (
        choices.ATTENTION_BACKEND_CHOICES,
        choices.DETERMINISTIC_ATTENTION_BACKEND_CHOICES,
        registry.ATTENTION_BACKENDS.get("triton_fa"),
    )


@pytest.mark.parametrize("plugin", [None], indirect=True)
def test_the_backend_is_registered_once(plugin: ModuleType) -> None:
    plugin.register()
    plugin.register()
    names, deterministic, create = registered()
    assert (names.count("triton_fa"), deterministic.count("triton_fa")) == (1, 1)
    assert create is plugin.create_backend


@pytest.mark.parametrize("plugin", [None], indirect=True)
def test_the_backend_is_made_where_it_is_chosen(
    plugin: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plugin.register()
    assert "triton_fa.integrations.sglang_backend" not in sys.modules
    backend = importlib.import_module("triton_fa.integrations.sglang_backend")
    monkeypatch.setattr(backend, "TritonFABackend", lambda runner: ("backend of", runner))
    *_, create = registered()
    with caplog.at_level("INFO", "triton_fa"):
        assert create("a runner") == ("backend of", "a runner")
    assert "SGLang's attention runs on triton_fa" in caplog.text


@pytest.mark.skipif(HAS_SGLANG, reason="it has a version of its own")
@pytest.mark.parametrize("plugin", [None], indirect=True)
def test_an_sglang_without_the_interface(
    plugin: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The plug-in of older ones is loaded still, for `fa3`; the log says what is missing."""
    monkeypatch.setattr(integrations, "_version", lambda _: "0.5.22")
    with caplog.at_level("INFO", "triton_fa"):
        plugin.register()
    names, deterministic, create = registered()
    assert ("triton_fa" in names, "triton_fa" in deterministic, create) == (False, False, None)
    message = "no attention backend triton_fa: sglang: expected >=0.5.23,<0.6, found 0.5.22"
    assert message in caplog.text


@pytest.fixture
def dispatcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """SGLang's functions, past its question for a Hopper GPU."""
    if not HAS_SGLANG:
        pytest.skip("SGLang is not installed")
    name = next(n for n in DISPATCHERS if _exists(n))
    version3 = importlib.import_module(f"{name}_v3")
    monkeypatch.setattr(version3, "_is_fa3_supported", lambda *_: True)
    with install("sgl_kernel.flash_attn", replace=True):
        # It keeps what it loaded.
        monkeypatch.setattr(version3, "_load_fa3_kernels", version3._load_fa3_kernel_from_sgl)
        yield importlib.import_module(name)


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_the_calls_of_the_backend(dispatcher: ModuleType) -> None:
    """Decode and extend as `FlashAttentionBackend` makes them."""
    torch.manual_seed(0)
    q, sinks = torch.randn(5, 4, 16), torch.randn(4)
    k, v = torch.randn(2, 6, 4, 2, 16)
    lengths, cu_seqlens_q = ints(11, 7), ints(0, 2, 5)
    call: dict[str, Any] = {
        "q": q,
        "k_cache": k,
        "v_cache": v,
        "page_table": torch.stack((ints(4, 0, 2), ints(1, 5, 3))),
        "cache_seqlens": lengths,
        "cu_seqlens_q": cu_seqlens_q,
        "max_seqlen_q": 3,
        "softmax_scale": 0.3,
        "causal": True,
        "window_size": (5, 0),
        "softcap": 7.0,
    }
    want, want_lse = triton_fa.flash_attn_with_kvcache(
        **call, sinks=sinks, return_softmax_lse=True, ver="torch"
    )
    theirs = call | {"cu_seqlens_k_new": ints(0, 11, 18), "k_descale": None, "v_descale": None}
    with torch.no_grad():
        out = dispatcher.flash_attn_with_kvcache(**theirs, sinks=sinks, ver=3, num_splits=0)
        torch.testing.assert_close(out, want, rtol=0, atol=5e-6)
        buffer = torch.empty_like(q)
        out, lse, *_ = dispatcher.flash_attn_with_kvcache(
            **theirs, sinks=sinks, ver=3, return_softmax_lse=True, out=buffer
        )
    assert out is buffer
    torch.testing.assert_close(out, want, rtol=0, atol=5e-6)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=5e-6)


def test_the_calls_of_diffusion(dispatcher: ModuleType) -> None:
    """Four dimensions and no prefix sums."""
    q, k = torch.randn(2, 6, 4, 16), torch.randn(2, 9, 4, 16)
    with torch.no_grad():
        out = dispatcher.flash_attn_varlen_func(
            q=q,
            k=k,
            v=k,
            cu_seqlens_q=None,
            cu_seqlens_k=None,
            max_seqlen_q=6,
            max_seqlen_k=9,
            softmax_scale=0.2,
            causal=False,
            return_softmax_lse=False,
            ver=3,
        )
    want = triton_fa.flash_attn_func(q, k, k, 0.2, ver="torch")
    torch.testing.assert_close(out, want, rtol=0, atol=5e-6)

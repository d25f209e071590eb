"""How calls reach FlashAttention-3 and -4, seen from fakes with their signatures."""

import importlib
import logging
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

import triton_fa
from triton_fa import device as device_facts
from triton_fa import env
from triton_fa.backends import fa3, fa4
from triton_fa.device import DeviceFacts
from triton_fa.errors import (
    ArgumentError,
    BackendUnavailableError,
    UnknownVersionError,
    UnsupportedError,
)

HALF = torch.float16


@dataclass
class Fake:
    """What a fake binary was called with, as the names that its real signature gives them."""

    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @property
    def last(self) -> dict[str, Any]:
        return self.calls[-1][1]

    @property
    def function(self) -> str:
        return self.calls[-1][0]


def result_of(q: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An out of 3 and an lse of 5, in the shapes that FA3 and FA4 return."""
    dtype = torch.bfloat16 if q.dtype.itemsize == 1 else q.dtype
    out = torch.full((*q.shape[:-1], v.shape[-1]), 3.0, dtype=dtype)
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return out, torch.full(shape, 5.0)


def sgl(fake: Fake) -> types.ModuleType:
    """sgl_kernel.flash_attn of 0.4.10, without the parameters that no call of ours uses."""

    def answer(q: Any, v: Any, out: Any, lse_wanted: bool) -> Any:
        computed, lse = result_of(q, v)
        if out is not None:
            computed = out.copy_(computed)
        if not lse_wanted:
            return computed
        return computed, lse, torch.full((2,), 7.0), torch.full((2,), 9.0)

    def flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k=None,
        v=None,
        qv=None,
        rotary_cos=None,
        rotary_sin=None,
        cache_seqlens=None,
        cache_batch_idx=None,
        cache_leftpad=None,
        page_table=None,
        cu_seqlens_q=None,
        cu_seqlens_k_new=None,
        max_seqlen_q=None,
        rotary_seqlens=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        attention_chunk=None,
        softcap=0.0,
        rotary_interleaved=True,
        scheduler_metadata=None,
        num_splits=0,
        pack_gqa=None,
        only_qv=False,
        sm_margin=0,
        return_softmax_lse=False,
        sinks=None,
        out=None,
    ):
        fake.calls.append(("kvcache", dict(locals())))
        return answer(qv if q is None else q, v_cache, out, return_softmax_lse)

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=None,
        max_seqlen_k=None,
        seqused_q=None,
        seqused_k=None,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        only_qv=False,
        sm_margin=0,
        return_softmax_lse=False,
        sinks=None,
        out=None,
    ):
        fake.calls.append(("varlen", dict(locals())))
        return answer(q, v, out, return_softmax_lse)

    def get_scheduler_metadata(
        batch_size, max_seqlen_q, num_heads, num_heads_k, cache_seqlens, leftpad_k=None
    ):
        fake.calls.append(("metadata", dict(locals())))
        return torch.zeros(5, dtype=torch.int32)

    return module("sgl_kernel.flash_attn", locals())


def upstream(fake: Fake) -> types.ModuleType:
    """flash_attn_interface: no sinks, no out, and another name for the lse flag of one.

    As an older one it has no chunks, new keys without a prefix, and another name for left padding.
    """

    def flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k=None,
        v=None,
        cache_seqlens=None,
        leftpad_k=None,
        page_table=None,
        cu_seqlens_q=None,
        max_seqlen_q=None,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        scheduler_metadata=None,
        num_splits=0,
        pack_gqa=None,
        sm_margin=0,
        return_softmax_lse=False,
    ):
        fake.calls.append(("kvcache", dict(locals())))
        out, lse = result_of(q, v_cache)
        return (out, lse, lse, lse) if return_softmax_lse else out

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q=None,
        seqused_k=None,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        sm_margin=0,
        return_attn_probs=False,
    ):
        fake.calls.append(("varlen", dict(locals())))
        out, lse = result_of(q, v)
        return (out, lse) if return_attn_probs else out

    def get_scheduler_metadata(
        batch_size, max_seqlen_q, num_heads_q, num_heads_kv, cache_seqlens, cache_leftpad=None
    ):
        fake.calls.append(("metadata", dict(locals())))
        return torch.zeros(5, dtype=torch.int32)

    return module("flash_attn_interface", locals())


def cute(fake: Fake) -> types.ModuleType:
    """flash_attn.cute.interface of 4.0.0b36, in the parameters that calls of ours use."""

    def flash_attn_func(
        q,
        k,
        v,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        learnable_sink=None,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        score_mod=None,
        mask_mod=None,
        aux_tensors=None,
        block_sparse_tensors=None,
        return_lse=False,
    ):
        fake.calls.append(("dense", dict(locals())))
        out, lse = result_of(q, v)
        return out, lse if return_lse else None

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        seqused_q=None,
        seqused_k=None,
        page_table=None,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        learnable_sink=None,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        score_mod=None,
        mask_mod=None,
        aux_tensors=None,
        block_sparse_tensors=None,
        return_lse=False,
    ):
        fake.calls.append(("varlen", dict(locals())))
        out, lse = result_of(q, v)
        return out, lse if return_lse else None

    return module("flash_attn.cute.interface", locals())


def module(name: str, members: dict[str, Any]) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__.update({n: f for n, f in members.items() if callable(f) and n != "answer"})
    return made


def provide(
    monkeypatch: pytest.MonkeyPatch, modules: dict[str, types.ModuleType | Exception]
) -> list[str]:
    """Make these modules importable, or their import raise; returns the names asked for."""
    asked = []
    real = importlib.import_module

    def import_module(name: str, package: str | None = None) -> types.ModuleType:
        if name.partition(".")[0] in (
            "sgl_kernel",
            "kernels",
            "flash_attn_interface",
            "flash_attn",
        ):
            asked.append(name)
            found = modules.get(name, ModuleNotFoundError(f"No module named {name!r}"))
            if isinstance(found, Exception):
                raise found
            return found
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", import_module)
    return asked


def arch(monkeypatch: pytest.MonkeyPatch, major: int, minor: int = 0) -> None:
    facts = DeviceFacts("cuda", (major, minor), 132, 227 << 10)
    monkeypatch.setattr(device_facts, "facts", lambda device: facts)


@pytest.fixture
def hopper(fresh: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """CPU tensors pass for those of a Hopper GPU; nothing falls back."""
    fresh.setattr(fa3, "_device_reason", lambda device: None)
    fresh.setattr(fa4, "_device_reason", lambda device: None)
    fresh.setenv("TRITON_FA_FALLBACK", "0")
    arch(fresh, 9)
    return fresh


@pytest.fixture
def fake(hopper: pytest.MonkeyPatch) -> Fake:
    """FA3 from sgl_kernel and FA4, both recording."""
    made = Fake()
    provide(hopper, {"sgl_kernel.flash_attn": sgl(made), "flash_attn.cute.interface": cute(made)})
    return made


@pytest.fixture
def fake_upstream(hopper: pytest.MonkeyPatch) -> Fake:
    """FA3 from flash_attn_interface alone."""
    made = Fake()
    provide(hopper, {"flash_attn_interface": upstream(made)})
    return made


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=HALF)


def paged(**changes: Any) -> dict[str, Any]:
    given = {
        "q": half(2, 1, 4, 16),
        "k_cache": half(6, 4, 2, 16),
        "v_cache": half(6, 4, 2, 16),
        "page_table": ints(0, 1, 2, 3, 4, 5).view(2, 3),
        "cache_seqlens": ints(3, 8),
    }
    return given | changes


def appending(**changes: Any) -> dict[str, Any]:
    """One new key for each sequence of `paged`, rotated."""
    given = {
        "k": half(2, 1, 2, 16),
        "v": half(2, 1, 2, 16),
        "rotary_cos": half(12, 8),
        "rotary_sin": half(12, 8),
        "rotary_seqlens": ints(0, 1),
    }
    return paged(**given | changes)


def packed(**changes: Any) -> dict[str, Any]:
    given = {
        "q": half(5, 4, 16),
        "k": half(7, 2, 16),
        "v": half(7, 2, 16),
        "cu_seqlens_q": ints(0, 2, 5),
        "cu_seqlens_k": ints(0, 3, 7),
        "max_seqlen_q": 3,
        "max_seqlen_k": 4,
    }
    return given | changes


def dense(**changes: Any) -> dict[str, Any]:
    return {"q": half(2, 3, 4, 16), "k": half(2, 5, 2, 16), "v": half(2, 5, 2, 16)} | changes


KVCACHE = triton_fa.flash_attn_with_kvcache
VARLEN = triton_fa.flash_attn_varlen_func
DENSE = triton_fa.flash_attn_func


# ---------------------------------------------------------------- FA3: arguments


def test_fa3_paged_decode(fake: Fake) -> None:
    given = paged(causal=True, num_splits=3, sm_margin=2, pack_gqa=True, softcap=5.0)
    out = KVCACHE(**given, softmax_scale=0.5, ver=3)
    assert (out == 3.0).all()
    assert fake.function == "kvcache"
    for name in ("q", "k_cache", "v_cache", "page_table", "cache_seqlens"):
        assert fake.last[name] is given[name]
    for name in ("causal", "num_splits", "sm_margin", "pack_gqa", "softcap"):
        assert fake.last[name] == given[name]
    assert fake.last["softmax_scale"] == 0.5
    assert fake.last["window_size"] == (-1, -1)
    unused = ("k", "v", "cu_seqlens_q", "max_seqlen_q", "scheduler_metadata", "sinks", "out")
    assert [fake.last[name] for name in unused] == [None] * len(unused)


def test_fa3_packed_queries_on_a_cache(fake: Fake) -> None:
    cu_seqlens_q = ints(0, 1, 3)
    KVCACHE(**paged(q=half(3, 4, 16), cu_seqlens_q=cu_seqlens_q, max_seqlen_q=2), ver=3)
    assert fake.last["cu_seqlens_q"] is cu_seqlens_q
    assert fake.last["max_seqlen_q"] == 2


def test_fa3_varlen(fake: Fake) -> None:
    given = packed(seqused_q=ints(1, 2), seqused_k=ints(2, 2))
    VARLEN(**given, ver=3)
    assert fake.function == "varlen"
    for name, value in given.items():
        assert fake.last[name] is value
    assert fake.last["num_splits"] == 1
    assert fake.last["softmax_scale"] == 0.25


def test_fa3_pages_of_the_varlen_function_go_to_the_kvcache_one(fake: Fake) -> None:
    # sgl_kernel's own varlen function takes a page table and ignores it.
    table, seqused_k = ints(0, 1, 2, 3).view(2, 2), ints(3, 8)
    changes = {"k": half(6, 4, 2, 16), "v": half(6, 4, 2, 16), "cu_seqlens_k": None}
    VARLEN(**packed(**changes, page_table=table, seqused_k=seqused_k), ver=3)
    assert fake.function == "kvcache"
    assert fake.last["page_table"] is table
    assert fake.last["cache_seqlens"] is seqused_k
    with pytest.raises(UnsupportedError, match="seqused_q together with page_table"):
        VARLEN(
            **packed(**changes, page_table=table, seqused_k=seqused_k, seqused_q=ints(1, 1)), ver=3
        )


def test_fa3_dense(fake: Fake) -> None:
    given = dense()
    DENSE(**given, ver=3)
    assert fake.function == "kvcache"
    assert fake.last["k_cache"] is given["k"]
    assert fake.last["cache_seqlens"] is None, "FA3 then needs no schedule"
    assert fake.last["num_splits"] == 1


def test_fa3_dense_queries_in_use_go_to_the_varlen_function(fake: Fake) -> None:
    seqused_q = ints(1, 2)
    VARLEN(**dense(), cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=seqused_q, ver=3)
    assert fake.function == "varlen"
    assert fake.last["seqused_q"] is seqused_q
    assert fake.last["cu_seqlens_q"] is None
    # sgl_kernel wants both numbers even then.
    assert (fake.last["max_seqlen_q"], fake.last["max_seqlen_k"]) == (3, 5)


@pytest.mark.parametrize("ver", [3, 4])
@pytest.mark.parametrize("value", [0, 5])
def test_an_int_cache_seqlens_becomes_one_length_per_sequence(
    fake: Fake, value: int, ver: int
) -> None:
    # Not one per page, and not one per token of packed queries.
    given = paged(q=half(5, 4, 16), cu_seqlens_q=ints(0, 2, 5), max_seqlen_q=3)
    name = "cache_seqlens" if ver == 3 else "seqused_k"
    for _ in range(2):
        KVCACHE(**given | {"cache_seqlens": value}, ver=ver)
    lengths = [arguments[name] for _, arguments in fake.calls]
    assert lengths[0].dtype == torch.int32
    assert lengths[0].tolist() == [value] * 2
    assert lengths[1] is not lengths[0]  # one stream or graph must not rely on another's


@pytest.mark.parametrize("ver", [3, 4])
def test_paged_without_lengths_uses_the_whole_table(fake: Fake, ver: int) -> None:
    KVCACHE(**paged(cache_seqlens=None), ver=ver)
    assert fake.last["cache_seqlens" if ver == 3 else "seqused_k"].tolist() == [12, 12]


WINDOWS = [
    # causal, window_size -> FA3's causal and window, FA4's causal and window
    (False, (-1, -1), (False, (-1, -1)), (False, (None, None))),
    (False, None, (False, (-1, -1)), (False, (None, None))),
    (False, (None, None), (False, (-1, -1)), (False, (None, None))),
    (True, (-1, -1), (True, (-1, -1)), (True, (None, None))),
    (False, (-1, 0), (True, (-1, -1)), (True, (None, None))),
    (False, (-7, 0), (True, (-1, -1)), (True, (None, None))),
    (True, (4, -1), (True, (4, -1)), (True, (4, None))),
    (True, (4, 9), (True, (4, -1)), (True, (4, None))),
    (False, (4, 0), (True, (4, -1)), (True, (4, None))),
    (False, (4, None), (False, (4, -1)), (False, (4, None))),
    (False, (-1, 2), (False, (-1, 2)), (False, (None, 2))),
    (False, (None, 2), (False, (-1, 2)), (False, (None, 2))),
    (False, (4, 2), (False, (4, 2)), (False, (4, 2))),
    (False, [4, 2], (False, (4, 2)), (False, (4, 2))),
]


@pytest.mark.parametrize(("causal", "window", "three", "four"), WINDOWS)
def test_windows_are_spelled_as_each_binary_reads_them(
    fake: Fake, causal: bool, window: Any, three: Any, four: Any
) -> None:
    for ver, want in ((3, three), (4, four)):
        DENSE(**dense(), causal=causal, window_size=window, ver=ver)
        assert (fake.last["causal"], fake.last["window_size"]) == want


def test_fa3_sinks(fake: Fake) -> None:
    sinks = torch.zeros(4, dtype=torch.bfloat16)
    KVCACHE(**paged(sinks=sinks), ver=3)
    assert fake.last["sinks"] is sinks


def test_fa3_scheduler_metadata_is_passed_on(fake: Fake) -> None:
    metadata = torch.zeros(5, dtype=torch.int32)
    KVCACHE(**paged(scheduler_metadata=metadata), ver=3)
    assert fake.last["scheduler_metadata"] is metadata
    with pytest.raises(UnsupportedError, match="scheduler_metadata together with cu_seqlens_k"):
        VARLEN(**packed(scheduler_metadata=metadata), ver=3)


def test_fa3_with_metadata_always_gets_lengths(fake: Fake) -> None:
    cache = {"page_table": None, "k_cache": half(2, 8, 2, 16), "v_cache": half(2, 8, 2, 16)}
    metadata = torch.zeros(5, dtype=torch.int32)
    KVCACHE(**paged(**cache, cache_seqlens=None, scheduler_metadata=metadata), ver=3)
    assert fake.last["cache_seqlens"].tolist() == [8, 8]


def test_fa3_out_is_filled_by_the_binary(fake: Fake) -> None:
    out = half(2, 1, 4, 16)
    assert KVCACHE(**paged(out=out), ver=3) is out
    assert fake.last["out"] is out
    assert (out == 3.0).all()


CACHE_ARGUMENTS = (
    "k",
    "v",
    "rotary_cos",
    "rotary_sin",
    "rotary_seqlens",
    "cu_seqlens_k_new",
    "cache_batch_idx",
    "cache_leftpad",
)


def test_fa3_gets_new_keys_rotation_rows_and_padding(fake: Fake) -> None:
    given = appending(
        k=half(3, 2, 16),
        v=half(3, 2, 16),
        cu_seqlens_k_new=ints(0, 1, 3),
        cache_batch_idx=ints(1, 0),
        cache_leftpad=ints(0, 1),
    )
    for interleaved in (True, False):
        KVCACHE(**given, rotary_interleaved=interleaved, ver=3)
        for name in CACHE_ARGUMENTS:
            assert fake.last[name] is given[name]
        assert fake.last["rotary_interleaved"] is interleaved
    KVCACHE(**paged(rotary_interleaved=False, cu_seqlens_k_new=ints(0, 1, 3)), ver=3)
    assert [fake.last[name] for name in CACHE_ARGUMENTS] == [None] * len(CACHE_ARGUMENTS)


@pytest.mark.parametrize(
    "extra",
    [
        {"cache_batch_idx": ints(1, 0)},
        {"cache_leftpad": ints(0, 1)},
        {"k": half(2, 1, 2, 16), "v": half(2, 1, 2, 16)},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_fa3_gets_one_of_them_alone(fake: Fake, extra: dict[str, Any]) -> None:
    KVCACHE(**paged(**extra), ver=3)
    given = {name for name in CACHE_ARGUMENTS if fake.last[name] is not None}
    assert given == extra.keys()


def test_fa3_that_appends_always_gets_lengths(fake: Fake) -> None:
    # An int that names the whole of a dense cache, and a prefix that may hold no new key at all.
    dense_cache = {"page_table": None, "k_cache": half(2, 8, 2, 16), "v_cache": half(2, 8, 2, 16)}
    new = {"k": half(3, 2, 16), "v": half(3, 2, 16), "cu_seqlens_k_new": ints(0, 0, 0)}
    KVCACHE(**paged(**dense_cache, **new, cache_seqlens=8), ver=3)
    assert fake.last["cache_seqlens"].tolist() == [8, 8]


@pytest.mark.parametrize(("function", "make"), [(KVCACHE, paged), (VARLEN, packed), (DENSE, dense)])
def test_fa3_gets_a_chunk_as_an_int(
    fake: Fake, function: Callable[..., Any], make: Callable[..., Any]
) -> None:
    function(**make(attention_chunk=3), ver=3)
    assert fake.last["attention_chunk"] == 3
    for off in (0, None):
        function(**make(attention_chunk=off), ver=3)
        assert not fake.last["attention_chunk"]


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache"])
def test_fa3_is_not_given_what_its_copies_cannot_read(fake: Fake, name: str) -> None:
    given = paged()
    wide = torch.zeros(*given[name].shape[:-1], 20, dtype=torch.float16)
    with pytest.raises(UnsupportedError) as caught:
        KVCACHE(**given | {name: wide[..., :16]}, ver=3)
    assert [text[:10] for text in caught.value.reasons] == [f"{name[0]}: strides"]
    shifted = torch.zeros(given[name].numel() + 1, dtype=torch.float16)[1:]
    with pytest.raises(UnsupportedError, match="an address of 2 past 16"):
        KVCACHE(**given | {name: shifted.view(given[name].shape)}, ver=3)
    assert not fake.calls


def test_fa3_strides_of_single_rows_are_nobodys_business(fake: Fake) -> None:
    given = dense()
    single = torch.zeros(1, 3, 4, 16, dtype=torch.float16).as_strided((1, 3, 4, 16), (3, 64, 16, 1))
    DENSE(single, given["k"][:1], given["v"][:1], ver=3)
    assert fake.last["q"] is single


@pytest.mark.parametrize(("stated", "passed"), [(9, 5), (5, 5), (4, 2)])
def test_fa3_turns_by_the_bound_that_was_stated(fake: Fake, stated: int, passed: int) -> None:
    """A window that reaches over all of q, but not over the bound, still moves the positions."""
    given = appending(window_size=(-1, 3), causal=False)
    q, batch = given.pop("q"), given["k"].shape[0]
    flat = q.flatten(0, 1)
    prefix = torch.arange(batch + 1, dtype=torch.int32) * q.shape[1]
    KVCACHE(flat, **given, cu_seqlens_q=prefix, max_seqlen_q=stated, ver=3)
    assert fake.last["max_seqlen_q"] == passed


@pytest.mark.parametrize("also", [{"window_size": (5, 20)}, {"attention_chunk": 3}], ids=str)
def test_fa3_gets_no_bound_above_what_the_cache_holds(fake: Fake, also: dict[str, Any]) -> None:
    """It refuses such a bound; the left side or chunks move the positions without it."""
    given = appending(q=half(4, 4, 16), causal=False, **{"window_size": (-1, 20)} | also)
    KVCACHE(**given, cu_seqlens_q=ints(0, 2, 4), max_seqlen_q=1000, ver=3)
    assert fake.last["max_seqlen_q"] == 4


def test_fa3_that_would_need_such_a_bound_is_not_asked(fake: Fake) -> None:
    given = appending(q=half(4, 4, 16), causal=False, cu_seqlens_q=ints(0, 2, 4))
    with pytest.raises(UnsupportedError, match="expected at most the cache's 12 keys"):
        KVCACHE(**given, window_size=(-1, 20), max_seqlen_q=1000, ver=3)
    KVCACHE(**given, window_size=(-1, 10), max_seqlen_q=1000, ver=3)
    assert fake.last["max_seqlen_q"] == 12
    given |= {"q": half(1, 4, 16), "cu_seqlens_q": ints(0, 0, 1)}  # at its own position anyway
    KVCACHE(**given, window_size=(-1, 20), max_seqlen_q=1000, ver=3)
    assert fake.last["max_seqlen_q"] == 1


def test_fa3_without_anything_to_do_it_with_is_not_asked_to_append_or_rotate(fake: Fake) -> None:
    with pytest.raises(UnsupportedError, match="k: nothing is appended where q has no token"):
        KVCACHE(**appending(q=half(2, 0, 4, 16)), ver=3)
    new = {"k": half(2, 0, 2, 16), "v": half(2, 0, 2, 16)}
    with pytest.raises(UnsupportedError, match="rotary_cos: nothing is rotated where k has no"):
        KVCACHE(**appending(**new), ver=3)
    assert not fake.calls


@pytest.mark.parametrize(("function", "make"), [(KVCACHE, paged), (VARLEN, packed), (DENSE, dense)])
def test_fa3_gives_its_four_results(
    fake: Fake, function: Callable[..., Any], make: Callable[..., Any]
) -> None:
    flag = "return_attn_probs" if function is DENSE else "return_softmax_lse"
    out, lse, out_accum, lse_accum = function(**make(), **{flag: True}, ver=3)
    assert (out.unique(), lse.unique()) == (3.0, 5.0)
    assert (out_accum.tolist(), lse_accum.tolist()) == ([7.0, 7.0], [9.0, 9.0])


def test_a_strided_last_dimension_is_copied_for_the_binary(fake: Fake) -> None:
    q = half(2, 3, 4, 32)[..., ::2]
    for _ in range(2):
        DENSE(**dense(q=q), ver=3)
        assert fake.last["q"].stride(-1) == 1


@pytest.mark.parametrize("ver", [3, 4])
def test_without_a_query_the_binary_is_not_called(fake: Fake, ver: int) -> None:
    empty = packed(q=half(0, 4, 16), cu_seqlens_q=ints(0, 0, 0))
    result = VARLEN(**empty, return_softmax_lse=True, ver=ver)
    assert [tuple(t.shape) for t in result[:2]] == [(0, 4, 16), (4, 0)]
    assert not fake.calls


# ---------------------------------------------------------------- FA3: upstream


def test_upstream_takes_the_lse_flag_by_its_own_name(fake_upstream: Fake) -> None:
    result = VARLEN(**packed(), return_softmax_lse=True, ver=3)
    assert fake_upstream.last["return_attn_probs"]
    assert [tuple(t.shape) for t in result] == [(5, 4, 16), (4, 5), (0,), (0,)]


@pytest.mark.parametrize(("function", "make"), [(KVCACHE, paged), (VARLEN, packed)])
def test_upstream_has_no_out_so_it_is_copied_to(
    fake_upstream: Fake, function: Callable[..., Any], make: Callable[..., Any]
) -> None:
    given = make()
    out = torch.zeros_like(given["q"])
    assert function(**given, out=out, ver=3) is out
    assert (out == 3.0).all()


def test_upstream_has_no_sinks(fake_upstream: Fake) -> None:
    with pytest.raises(UnsupportedError, match="sinks: flash_attn_interface does not take them"):
        KVCACHE(**paged(sinks=torch.zeros(4, dtype=torch.bfloat16)), ver=3)


def test_a_provider_may_spell_left_padding_its_own_way(fake_upstream: Fake) -> None:
    leftpad = ints(0, 1)
    KVCACHE(**paged(cache_leftpad=leftpad), ver=3)
    assert fake_upstream.last["leftpad_k"] is leftpad


@pytest.mark.parametrize(
    ("function", "given", "names"),
    [
        (
            KVCACHE,
            appending(),
            [
                "cu_seqlens_k_new",
                "rotary_cos",
                "rotary_sin",
                "rotary_interleaved",
                "rotary_seqlens",
            ],
        ),
        (KVCACHE, paged(cache_batch_idx=ints(1, 0)), ["cache_batch_idx"]),
        (KVCACHE, paged(attention_chunk=4), ["attention_chunk"]),
        (VARLEN, packed(attention_chunk=4), ["attention_chunk"]),
    ],
    ids=["append", "rows", "chunk", "varlen-chunk"],
)
def test_what_a_provider_does_not_take_is_refused_by_name(
    fake_upstream: Fake, function: Callable[..., Any], given: dict[str, Any], names: list[str]
) -> None:
    with pytest.raises(UnsupportedError) as caught:
        function(**given, ver=3)
    want = [f"{name}: flash_attn_interface does not take it" for name in names]
    assert list(caught.value.reasons) == want
    assert not fake_upstream.calls


# ---------------------------------------------------------------- FA3: reasons


def dims(d: int, dv: int) -> dict[str, Any]:
    return dense(q=half(2, 3, 4, d), k=half(2, 5, 2, d), v=half(2, 5, 2, dv))


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def latent(d: int = 64, dv: int = 512, qv: bool = True) -> dict[str, Any]:
    """`dense` with a second part of the queries."""
    return dims(d, dv) | ({"qv": half(2, 3, 4, dv)} if qv else {})


def eights(d: int = 16, dv: int = 16, dtype: torch.dtype = E5M2) -> dict[str, Any]:
    """Queries, keys and values in 8 bits."""
    return {
        name: torch.zeros(shape).to(dtype)
        for name, shape in (("q", (2, 3, 4, d)), ("k", (2, 5, 2, d)), ("v", (2, 5, 2, dv)))
    }


FA3_REASONS = [
    (
        dense(q=torch.zeros(2, 3, 4, 16), k=torch.zeros(2, 5, 2, 16), v=torch.zeros(2, 5, 2, 16)),
        "q: dtype float32",
    ),
    (dims(264, 264), "head_dim=264: expected a multiple of 8 up to 256"),
    (dims(12, 12), "head_dim=12: expected a multiple of 8"),
    (dims(64, 520), "head_dim_v=520: expected a multiple of 8 up to 512"),
    (dims(128, 64), "head_dim=128 with head_dim_v=64"),
    (dims(192, 96), "head_dim=192 with head_dim_v=96"),
    (dense(sinks=torch.zeros(4)), "sinks: dtype float32: expected bfloat16"),
    (
        dense(q=half(2, 3, 66, 16), sinks=torch.zeros(66, dtype=torch.bfloat16)),
        "sinks: 66 query heads: expected at most 64",
    ),
    (dense(num_splits=256), "num_splits=256: expected at most 255"),
    (latent(80, 256), "qv: head_dim=80: expected up to 64"),
    (latent(64, 128), "qv: head_dim_v=128: expected at least 256"),
    (dense(**eights()), "q: dtype float8_e5m2: expected float16, bfloat16 or float8_e4m3fn"),
    (
        dense(**eights(dtype=torch.float8_e4m3fnuz)),
        "q: dtype float8_e4m3fnuz: expected float16, bfloat16 or float8_e4m3fn",
    ),
    (dense(**eights() | {"q": half(2, 3, 4, 16)}), "k: dtype float8_e5m2: expected that of q"),
    (dense(**eights(24, 24, E4M3)), "head_dim=24: expected a multiple of 16"),
    (dense(**eights(32, 24, E4M3)), "head_dim_v=24: expected a multiple of 16"),
    (dense(**eights(64, 512, E4M3)), "head_dim_v=512: expected a multiple of 16 up to 256"),
]


@pytest.mark.parametrize(("given", "reason"), FA3_REASONS, ids=[r for _, r in FA3_REASONS])
def test_fa3_refuses_by_name(fake: Fake, given: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        DENSE(**given, ver=3)
    assert any(text.startswith(reason) for text in caught.value.reasons), caught.value.reasons
    assert not fake.calls


@pytest.mark.parametrize(
    ("d", "dv"), [(64, 512), (64, 40), (8, 8), (256, 256), (192, 128), (136, 104)]
)
def test_fa3_takes_the_pairs_of_head_dims_it_has(fake: Fake, d: int, dv: int) -> None:
    DENSE(**dims(d, dv), ver=3)
    assert fake.calls


def test_fa3_on_ampere_has_neither_sinks_nor_unequal_head_dims(
    hopper: pytest.MonkeyPatch, fake: Fake
) -> None:
    arch(hopper, 8)
    with pytest.raises(UnsupportedError) as caught:
        DENSE(**dims(64, 32), sinks=torch.zeros(4, dtype=torch.bfloat16), ver=3)
    assert len(caught.value.reasons) == 2
    assert all("compute capability 9.x" in reason for reason in caught.value.reasons)
    DENSE(**dims(64, 64), ver=3)


@pytest.mark.parametrize(
    ("module", "facts", "reason"),
    [
        (fa3, DeviceFacts("cuda", (10, 0), 148, 1), "compute capability 8.x or 9.x, got 10.0"),
        (fa3, DeviceFacts("cuda", (7, 5), 40, 1), "compute capability 8.x or 9.x, got 7.5"),
        (fa3, DeviceFacts("hip", (0, 0), 304, 1), "NVIDIA GPU"),
        (fa4, DeviceFacts("cuda", (7, 5), 40, 1), "compute capability 8.x to 12.x, got 7.5"),
        (fa4, DeviceFacts("hip", (0, 0), 304, 1), "NVIDIA GPU"),
    ],
)
def test_devices_that_are_ruled_out(
    fresh: pytest.MonkeyPatch, module: Any, facts: DeviceFacts, reason: str
) -> None:
    fresh.setattr(device_facts, "facts", lambda device: facts)
    assert reason in (module.BACKEND.unavailable(torch.device("cuda")) or "")


def test_fa3_gets_a_second_part(fake: Fake) -> None:
    given = latent()
    DENSE(**given, ver=3)
    assert fake.last["qv"] is given["qv"]
    assert fake.last["q"] is given["q"]
    assert fake.last["softmax_scale"] == 576**-0.5
    assert not fake.last["only_qv"]
    cache = {"k_cache": half(6, 4, 1, 64), "v_cache": half(6, 4, 1, 256)}
    KVCACHE(**paged(q=half(2, 1, 4, 64), qv=half(2, 1, 4, 256), **cache), ver=3)
    assert fake.last["qv"].shape == (2, 1, 4, 256)


def test_fa3_scores_values_alone(fake: Fake) -> None:
    given = paged(q=None, k_cache=None, v_cache=half(6, 4, 1, 512), qv=half(2, 1, 4, 512))
    KVCACHE(**given, only_qv=True, causal=True, ver=3)
    assert fake.function == "kvcache"
    assert (fake.last["q"], fake.last["k_cache"], fake.last["only_qv"]) == (None, None, True)
    for name in ("qv", "v_cache", "page_table", "cache_seqlens"):
        assert fake.last[name] is given[name]
    assert fake.last["softmax_scale"] == 512**-0.5
    # The varlen function makes no placeholders.
    given = packed(q=None, k=None, v=half(7, 1, 512), qv=half(5, 4, 512), only_qv=True)
    with pytest.raises(UnsupportedError, match="only_qv together with cu_seqlens_k"):
        VARLEN(**given, ver=3)
    new = {"k": half(2, 1, 1, 512), "v": half(2, 1, 1, 512)}
    given = paged(q=None, k_cache=None, v_cache=half(6, 4, 1, 512), qv=half(2, 1, 4, 512), **new)
    with pytest.raises(ArgumentError, match="k: expected None together with only_qv"):
        KVCACHE(**given, only_qv=True, ver=3)


DESCALES = ("q_descale", "k_descale", "v_descale")


def test_fa3_gets_eight_bits_and_their_factors(fake: Fake) -> None:
    factors = {name: torch.ones(1).expand(2, 2) for name in DESCALES}
    given = dense(**eights(dtype=E4M3), **factors)
    assert DENSE(**given, ver=3).dtype == torch.bfloat16
    for name, value in given.items():
        assert fake.last[{"k": "k_cache", "v": "v_cache"}.get(name, name)] is value
    out = torch.zeros(2, 3, 4, 16, dtype=torch.bfloat16)
    assert DENSE(**eights(dtype=E4M3), out=out, ver=3) is out
    assert [fake.last[name] for name in DESCALES] == [None] * 3
    flat = {name: value.flatten(0, 1) for name, value in eights(dtype=E4M3).items()}
    prefixes = {"cu_seqlens_q": ints(0, 3, 6), "cu_seqlens_k": ints(0, 5, 10), "max_seqlen_k": 5}
    VARLEN(**packed(**flat, **prefixes, **factors), ver=3)
    assert fake.function == "varlen"
    assert all(fake.last[name] is factors[name] for name in DESCALES)


def test_fa3_is_not_given_factors_of_16_bits(fake: Fake) -> None:
    DENSE(**dense(k_descale=torch.ones(2, 2)), ver=3)
    assert [fake.last[name] for name in DESCALES] == [None] * 3


def test_fa3_on_ampere_has_neither_a_second_part_nor_eight_bits(
    hopper: pytest.MonkeyPatch, fake: Fake
) -> None:
    arch(hopper, 8)
    with pytest.raises(UnsupportedError, match=r"qv: needs compute capability 9\.x"):
        DENSE(**latent(), ver=3)
    with pytest.raises(UnsupportedError, match="q: dtype float8_e4m3fn: needs compute cap"):
        DENSE(**eights(dtype=E4M3), ver=3)
    assert not fake.calls


def test_a_provider_without_a_second_part_or_factors_is_not_given_them(
    fake_upstream: Fake,
) -> None:
    with pytest.raises(UnsupportedError, match="qv: flash_attn_interface does not take it"):
        DENSE(**latent(), ver=3)
    given = dense(**eights(dtype=E4M3), v_descale=torch.ones(2, 2))
    with pytest.raises(UnsupportedError, match="v_descale: flash_attn_interface does not take"):
        DENSE(**given, ver=3)
    given = paged(q=None, k_cache=None, v_cache=half(6, 4, 1, 512), qv=half(2, 1, 4, 512))
    with pytest.raises(UnsupportedError) as caught:
        KVCACHE(**given, only_qv=True, ver=3)
    assert "only_qv: flash_attn_interface does not take it" in caught.value.reasons
    assert not fake_upstream.calls


# ---------------------------------------------------------------- FA3: providers


def test_the_first_provider_that_loads_is_taken(hopper: pytest.MonkeyPatch) -> None:
    asked = provide(
        hopper, {"sgl_kernel.flash_attn": sgl(Fake()), "flash_attn_interface": upstream(Fake())}
    )
    assert fa3.BACKEND.detail().startswith("sgl_kernel")
    assert asked == ["sgl_kernel.flash_attn"]
    fa3.load_provider()
    assert asked == ["sgl_kernel.flash_attn"], "loaded twice"


def test_the_order_of_providers_is_the_setting(hopper: pytest.MonkeyPatch) -> None:
    hopper.setenv("TRITON_FA_FA3_PROVIDER", "upstream, sgl")
    asked = provide(
        hopper, {"sgl_kernel.flash_attn": sgl(Fake()), "flash_attn_interface": upstream(Fake())}
    )
    assert fa3.BACKEND.detail().startswith("flash_attn_interface")
    assert asked == ["flash_attn_interface"]


@pytest.mark.parametrize(
    "error",
    [
        ImportError("undefined symbol: _ZN2at4_ops5zeros4callE"),
        OSError("libcuda.so.1: cannot open shared object file"),
        RuntimeError("Tried to register an operator with the same name"),
        AttributeError("module 'torch' has no attribute 'foo'"),
    ],
)
def test_a_provider_that_breaks_is_logged_and_the_next_is_tried(
    hopper: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    provide(hopper, {"sgl_kernel.flash_attn": error, "flash_attn_interface": upstream(Fake())})
    with caplog.at_level(logging.WARNING, "triton_fa"):
        assert fa3.BACKEND.unavailable(torch.device("cuda")) is None
    assert fa3.BACKEND.detail().startswith("flash_attn_interface")
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == 2  # sgl and hub
    assert f"sgl: {type(error).__name__}: {error}" in logged[0]
    assert "hub: ModuleNotFoundError: No module named 'kernels'" in logged[1]


def test_a_provider_without_the_functions_is_not_one(hopper: pytest.MonkeyPatch) -> None:
    provide(
        hopper,
        {
            "sgl_kernel.flash_attn": types.ModuleType("sgl_kernel.flash_attn"),
            "flash_attn_interface": upstream(Fake()),
        },
    )
    assert fa3.BACKEND.detail().startswith("flash_attn_interface")


def test_the_stand_in_of_our_own_is_not_a_provider(hopper: pytest.MonkeyPatch) -> None:
    stand_in = sgl(Fake())
    stand_in.__dict__["__triton_fa__"] = "triton_fa.compat.sgl_kernel"
    provide(hopper, {"sgl_kernel.flash_attn": stand_in})
    reason = fa3.BACKEND.unavailable(torch.device("cuda")) or ""
    assert "is the stand-in of triton_fa.compat" in reason


def test_every_providers_error_is_in_the_reason(hopper: pytest.MonkeyPatch) -> None:
    provide(hopper, {"sgl_kernel.flash_attn": OSError("no libcudart")})
    reason = fa3.BACKEND.unavailable(torch.device("cuda")) or ""
    assert "sgl: OSError: no libcudart" in reason
    assert "hub: ModuleNotFoundError" in reason
    assert "upstream: ModuleNotFoundError" in reason


@pytest.mark.parametrize("locked", [True, False])
def test_the_hub_kernel_is_locked_by_a_file_of_the_cache_directory(
    hopper: pytest.MonkeyPatch, tmp_path: Path, locked: bool
) -> None:
    hopper.setenv("TRITON_FA_FA3_PROVIDER", "hub")
    hopper.setenv("TRITON_FA_CACHE_DIR", str(tmp_path))
    seen = []

    def load_kernel(repo_id: str, *, lockfile: Path) -> types.ModuleType:
        seen.append(("load", repo_id, lockfile))
        return sgl(Fake())

    def get_kernel(repo_id: str, *, revision: str) -> types.ModuleType:
        seen.append(("get", repo_id, revision))
        return sgl(Fake())

    provide(hopper, {"kernels": module("kernels", locals())})
    lock = tmp_path / "kernels.lock"
    if locked:
        lock.write_text("[]")
    assert fa3.HUB_REPOSITORY in fa3.BACKEND.detail()
    want = ("load", fa3.HUB_REPOSITORY, lock) if locked else ("get", fa3.HUB_REPOSITORY, "v1")
    assert seen == [want]


def test_the_cache_directory_defaults_to_the_users(fresh: pytest.MonkeyPatch) -> None:
    assert env.cache_dir().name == "triton_fa"
    assert env.cache_dir().is_absolute()


# ---------------------------------------------------------------- FA3: metadata


METADATA = {"batch_size": 2, "max_seqlen_q": 1, "num_heads_q": 4, "num_heads_kv": 2}


@pytest.mark.parametrize(
    ("provider", "names"),
    [
        ("sgl", ("num_heads", "num_heads_k", "leftpad_k")),
        ("upstream", ("num_heads_q", "num_heads_kv", "cache_leftpad")),
    ],
)
def test_metadata_comes_from_the_provider_under_its_own_names(
    hopper: pytest.MonkeyPatch, provider: str, names: tuple[str, str, str]
) -> None:
    made = Fake()
    modules = {
        "sgl": ("sgl_kernel.flash_attn", sgl),
        "upstream": ("flash_attn_interface", upstream),
    }
    name, make = modules[provider]
    provide(hopper, {name: make(made)})
    lengths = ints(3, 8)
    metadata = fa3.scheduler_metadata(
        METADATA | {"cache_seqlens": lengths, "cache_leftpad": ints(0, 1), "page_size": None}
    )
    assert metadata.dtype == torch.int32
    assert (made.last[names[0]], made.last[names[1]]) == (4, 2)
    assert made.last[names[2]].tolist() == [0, 1]
    assert made.last["cache_seqlens"] is lengths


def test_metadata_arguments_that_the_provider_lacks_are_refused(fake: Fake) -> None:
    with pytest.raises(UnsupportedError, match="page_size: sgl_kernel"):
        fa3.scheduler_metadata(METADATA | {"page_size": 4})


def test_metadata_of_a_provider_without_it(hopper: pytest.MonkeyPatch) -> None:
    made = sgl(Fake())
    del made.get_scheduler_metadata
    provide(hopper, {"sgl_kernel.flash_attn": made})
    with pytest.raises(BackendUnavailableError, match="has no get_scheduler_metadata"):
        fa3.scheduler_metadata(METADATA)


def test_every_argument_of_metadata_reaches_fa3(hopper: pytest.MonkeyPatch) -> None:
    """Also those of a call that differs from an earlier one in nothing else."""
    given: list[dict[str, Any]] = []
    hopper.setattr(fa3, "scheduler_metadata", lambda given_: given.append(given_) or ints(0))
    provide(hopper, {"sgl_kernel.flash_attn": sgl(Fake())})
    for name, values in {
        "attention_chunk": (0, 128, 256),
        "max_seqlen_k_new": (0, 1, 2),
        "pack_gqa": (None, True, False),
        "window_size": ((-1, -1), (3, 0), (4, 0)),
    }.items():
        for value in values:
            triton_fa.get_scheduler_metadata(
                2, 1, 64, 4, 2, 16, ints(3, 8), qkv_dtype=HALF, ver=3, **{name: value}
            )
            assert given[-1][name] == value


def test_the_lengths_of_an_append_reach_fa3_as_tensors_of_each_call(
    hopper: pytest.MonkeyPatch,
) -> None:
    given: list[dict[str, Any]] = []
    hopper.setattr(fa3, "scheduler_metadata", lambda given_: given.append(given_) or ints(0))
    provide(hopper, {"sgl_kernel.flash_attn": sgl(Fake())})
    for _ in range(2):
        lengths = {"cu_seqlens_k_new": ints(0, 1, 3), "cache_leftpad": ints(0, 1)}
        triton_fa.get_scheduler_metadata(
            2, 1, 64, 4, 2, 16, ints(3, 8), max_seqlen_k_new=2, **lengths, ver=3
        )
        assert all(given[-1][name] is tensor for name, tensor in lengths.items())
    triton_fa.get_scheduler_metadata(2, 1, 64, 4, 2, 16, ints(3, 8), max_seqlen_k_new=2, ver=3)
    assert (given[-1]["cu_seqlens_k_new"], given[-1]["cache_leftpad"]) == (None, None)


TAKEN = (
    *("batch_size", "max_seqlen_q", "max_seqlen_k", "max_seqlen_k_new", "num_heads_q"),
    *("num_heads_kv", "headdim", "headdim_v", "qkv_dtype", "cache_seqlens", "causal"),
    *("window_size", "attention_chunk", "has_softcap", "num_splits", "sm_margin"),
)


def test_fa3_metadata_of_eight_bits(hopper: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def metadata(batch_size, max_seqlen_q, qkv_dtype, headdim, headdim_v, **_: Any):
        given.append({"qkv_dtype": qkv_dtype, "headdim": headdim, "headdim_v": headdim_v})
        return ints(0)

    function = fa3.Function(metadata, frozenset(TAKEN))
    made = fa3.Provider("fake", function, function, function)
    hopper.setattr(fa3, "load_provider", lambda: made)
    shape = (2, 1, 64, 16, 1, 64, ints(3, 8))
    for dtype, dv in ((E4M3, 128), (torch.bfloat16, 512)):
        triton_fa.get_scheduler_metadata(*shape, qkv_dtype=dtype, headdim_v=dv, ver=3)
        assert given[-1] == {"qkv_dtype": dtype, "headdim": 64, "headdim_v": dv}
    with pytest.raises(UnsupportedError, match="qkv_dtype: float8_e5m2: expected float16"):
        triton_fa.get_scheduler_metadata(*shape, qkv_dtype=E5M2, ver=3)


def test_a_planner_passes_on_what_it_is_given(hopper: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    hopper.setattr(fa3, "scheduler_metadata", lambda given_: given.append(given_) or ints(0))
    provide(hopper, {"sgl_kernel.flash_attn": sgl(Fake())})

    def plan(**model: Any) -> triton_fa.StepPlanner:
        return triton_fa.StepPlanner(4, 4, 2, 16, ver=3, device="cpu", **model)

    lengths = {"cu_seqlens_k_new": ints(0, 1, 3), "cache_leftpad": ints(0, 1)}
    schedules = plan(window_size=(5, 0), attention_chunk=7).plan(
        ints(3, 8), max_seqlen_k=64, max_seqlen_k_new=2, **lengths
    )
    assert schedules.sliding is not None
    for call, window, chunk in zip(given, ((-1, -1), (5, -1)), (0, 7), strict=True):
        assert call["max_seqlen_k_new"] == 2
        assert all(call[name] is tensor for name, tensor in lengths.items())
        assert (call["window_size"], call["attention_chunk"]) == (window, chunk)

    given.clear()
    assert plan(attention_chunk=7).plan(ints(3, 8), max_seqlen_k=64).sliding is not None
    assert [call["attention_chunk"] for call in given] == [0, 7]
    assert [call["window_size"] for call in given] == [(-1, -1)] * 2
    assert plan().plan(ints(3, 8), max_seqlen_k=64).sliding is None


def test_a_ver_of_another_type_is_refused_after_a_hit(fake: Fake) -> None:
    KVCACHE(**paged(), ver=3)
    with pytest.raises(UnknownVersionError):
        KVCACHE(**paged(), ver=3.0)


# ---------------------------------------------------------------- FA4


def test_fa4_paged_decode(fake: Fake) -> None:
    given = paged(causal=True, softcap=5.0)
    sinks = torch.zeros(4)
    KVCACHE(**given, sinks=sinks, ver=4)
    assert fake.function == "varlen"
    for name in ("q", "page_table", "causal", "softcap"):
        assert fake.last[name] is given[name]
    assert fake.last["k"] is given["k_cache"]
    assert fake.last["seqused_k"] is given["cache_seqlens"]
    assert fake.last["learnable_sink"] is sinks
    assert (fake.last["max_seqlen_q"], fake.last["max_seqlen_k"]) == (1, 12)
    assert fake.last["return_lse"] is False


def test_fa4_varlen(fake: Fake) -> None:
    given = packed(seqused_q=ints(1, 2), seqused_k=ints(2, 2))
    VARLEN(**given, ver=4)
    for name, value in given.items():
        assert fake.last[name] is value


def test_fa4_dense_has_its_own_function(fake: Fake) -> None:
    given = dense()
    DENSE(**given, ver=4)
    assert fake.function == "dense"
    for name, value in given.items():
        assert fake.last[name] is value


def test_fa4_gives_two_results(fake: Fake) -> None:
    for function, given in ((KVCACHE, paged()), (VARLEN, packed())):
        out, lse = function(**given, return_softmax_lse=True, ver=4)
        assert fake.last["return_lse"] is True
        assert (out.unique(), lse.unique()) == (3.0, 5.0)


def test_fa4_out_is_copied_to(fake: Fake) -> None:
    out = half(2, 1, 4, 16)
    assert KVCACHE(**paged(out=out), ver=4) is out
    assert (out == 3.0).all()


@pytest.mark.parametrize(
    ("major", "given", "passed"),
    [(9, 0, 1), (9, 1, 1), (8, 0, 1), (12, 0, 1), (10, 0, 0), (10, 3, 3)],
)
def test_fa4_splits_on_blackwell_only(
    hopper: pytest.MonkeyPatch, fake: Fake, major: int, given: int, passed: int
) -> None:
    arch(hopper, major)
    DENSE(**dense(num_splits=given), ver=4)
    assert fake.last["num_splits"] == passed


@triton.jit
def triton_mod(score, batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):
    return score


def some_mod(*cells: Any) -> Any:
    """Stands for a CuTe function."""


def some_lists() -> triton_fa.BlockSparseTensors:
    return triton_fa.BlockSparseTensors(
        ints(0).view(1, 1, 1), ints(0).view(1, 1, 1, 1), block_size=(128, 128)
    )


def test_fa4_gets_functions_of_its_own_kind(hopper: pytest.MonkeyPatch, fake: Fake) -> None:
    aux = [torch.zeros(3)]
    VARLEN(**packed(), score_mod=some_mod, aux_tensors=aux, ver=4)
    assert fake.last["score_mod"] is some_mod
    assert fake.last["aux_tensors"][0] is aux[0]
    assert fake.last["mask_mod"] is None
    theirs = module("flash_attn.cute.block_sparsity", {"BlockSparseTensorsTorch": SimpleNamespace})
    provide(hopper, {"flash_attn.cute.block_sparsity": theirs})
    lists = some_lists()
    given = dense() | {"cu_seqlens_q": None, "cu_seqlens_k": None}
    VARLEN(**given, mask_mod=some_mod, block_sparse_tensors=lists, ver=4)
    assert (fake.function, fake.last["mask_mod"]) == ("dense", some_mod)
    assert fake.last["block_sparse_tensors"].mask_block_cnt is lists.mask_block_cnt
    assert fake.last["block_sparse_tensors"].block_size == (128, 128)
    arch(hopper, 10)
    VARLEN(**given, mask_mod=some_mod, block_sparse_tensors=lists, num_splits=0, ver=4)
    assert fake.last["num_splits"] == 1


LISTED = {"mask_mod": some_mod, "block_sparse_tensors": some_lists()}
FA4_REASONS = [
    (9, VARLEN, packed(score_mod=triton_mod), "score_mod: expected a CuTe function, got a Tri"),
    (8, VARLEN, packed(score_mod=some_mod), "score_mod on compute capability 8.x"),
    (9, VARLEN, packed(**LISTED), "block_sparse_tensors with a batch dimension beside cu_seq"),
    (12, VARLEN, packed(**LISTED), "block_sparse_tensors on compute capability 12.x"),
    (10, KVCACHE, paged(**LISTED), "block_sparse_tensors with page_table on compute capability 10"),
    (10, VARLEN, packed(**LISTED, num_splits=2), "num_splits=2: expected 0 or 1 beside block lis"),
    (9, DENSE, dense(num_splits=2), "num_splits=2: expected 0 or 1 on compute capability 9.x"),
    (9, DENSE, FA3_REASONS[0][0], "q: dtype float32"),
    (9, DENSE, dims(264, 264), "head_dim=264, head_dim_v=264"),
    (9, DENSE, latent(), "qv on compute capability 9.x"),
    (10, DENSE, latent(), "qv is not supported"),
    (9, DENSE, dense(**eights(dtype=E4M3)), "q: dtype float8_e4m3fn: expected"),
    (9, DENSE, dense(**eights() | {"q": half(2, 3, 4, 16)}), "k: dtype float8_e5m2: expected"),
    (
        9,
        DENSE,
        dense(**eights(), k_descale=torch.ones(2, 2)),
        "k_descale on compute capability 9.x",
    ),
    (10, DENSE, dims(192, 192), "head_dim=192, head_dim_v=192: expected up to 128"),
    (9, KVCACHE, paged(scheduler_metadata=ints(1)), "scheduler_metadata is not supported"),
    (9, KVCACHE, appending(), "k is not supported"),
    (9, KVCACHE, appending(), "rotary_cos is not supported"),
    (9, KVCACHE, appending(), "rotary_seqlens is not supported"),
    (9, KVCACHE, paged(cache_batch_idx=ints(1, 0)), "cache_batch_idx is not supported"),
    (9, KVCACHE, paged(cache_leftpad=ints(1, 0)), "cache_leftpad is not supported"),
    (9, KVCACHE, paged(attention_chunk=4), "attention_chunk is not supported"),
    (9, DENSE, dense(attention_chunk=4), "attention_chunk is not supported"),
    (8, KVCACHE, paged(), "page_table on compute capability 8.x"),
    (12, KVCACHE, paged(), "page_table on compute capability 12.x"),
    (8, DENSE, dense(sinks=torch.zeros(4)), "sinks on compute capability 8.x"),
    (
        9,
        KVCACHE,
        paged(q=half(2, 1, 4, 24), k_cache=half(6, 4, 2, 24)),
        "page_size=4 with head_dim=24, head_dim_v=16",
    ),
    (
        9,
        KVCACHE,
        paged(q=half(2, 1, 4, 160), k_cache=half(6, 4, 2, 160)),
        "page_size=4 with head_dim=160: expected head_dim up to 128 or 256, or page_size=128",
    ),
    (
        9,
        KVCACHE,
        paged(q=half(2, 1, 4, 96), k_cache=half(6, 4, 2, 96), v_cache=half(6, 4, 2, 192)),
        "head_dim_v=192 with head_dim=96: expected head_dim_v up to 128 or head_dim",
    ),
]


@pytest.mark.parametrize(
    ("major", "function", "given", "reason"), FA4_REASONS, ids=[r for *_, r in FA4_REASONS]
)
def test_fa4_refuses_by_name(
    hopper: pytest.MonkeyPatch,
    fake: Fake,
    major: int,
    function: Callable[..., Any],
    given: dict[str, Any],
    reason: str,
) -> None:
    arch(hopper, major)
    with pytest.raises(UnsupportedError) as caught:
        function(**given, ver=4)
    assert any(text.startswith(reason) for text in caught.value.reasons), caught.value.reasons
    assert not fake.calls


def test_fa4_irregular_head_dims_are_fine_on_pages_as_large_as_a_tile(fake: Fake) -> None:
    cache = half(3, 128, 2, 24)
    given = paged(q=half(2, 1, 4, 24), k_cache=cache, v_cache=cache.clone())
    KVCACHE(**given | {"page_table": ints(0, 1).view(2, 1)}, ver=4)
    assert fake.calls


@pytest.mark.parametrize(("major", "d", "page"), [(9, 128, 4), (9, 256, 4), (9, 160, 128)])
def test_fa4_gathers_pages_except_for_wide_heads(
    hopper: pytest.MonkeyPatch, fake: Fake, major: int, d: int, page: int
) -> None:
    arch(hopper, major)
    caches = {"k_cache": half(6, page, 2, d), "v_cache": half(6, page, 2, 16)}
    KVCACHE(**paged(q=half(2, 1, 4, d), **caches), ver=4)
    assert fake.calls


def test_fa4_is_imported_quietly(
    hopper: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = cute(Fake())
    real = importlib.import_module

    def noisy(name: str, package: str | None = None) -> types.ModuleType:
        if name != "flash_attn.cute.interface":
            return real(name, package)
        warnings.warn("deprecated", DeprecationWarning, stacklevel=2)
        logging.getLogger("cutlass").warning("no CUDA toolkit")
        return made

    hopper.setattr(importlib, "import_module", noisy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fa4.BACKEND.unavailable(torch.device("cuda")) is None
    assert not caplog.records
    assert logging.getLogger("cutlass").level == logging.NOTSET


@pytest.mark.parametrize("error", [ImportError("no cutlass"), RuntimeError("arch"), OSError("so")])
def test_a_broken_fa4_says_why(hopper: pytest.MonkeyPatch, error: Exception) -> None:
    provide(hopper, {"flash_attn.cute.interface": error})
    reason = fa4.BACKEND.unavailable(torch.device("cuda"))
    assert reason == f"flash_attn.cute: {type(error).__name__}: {error}"
    with pytest.raises(BackendUnavailableError, match=str(error)):
        DENSE(**dense(), ver=4)

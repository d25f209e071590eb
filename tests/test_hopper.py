"""The Hopper kernel against the float64 reference: emulated on a CPU, itself on a GPU.

On a CPU its Python source runs over numpy (`gluon_on_cpu.py`), and it is compiled for sm_90: what
the compiler made of it is read. On a GPU of compute capability 9.0 the same cases run on it.
"""

import dataclasses
import functools
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import networkx
import numpy as np
import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

import reference
import triton_fa
from bench.counters import flops
from bench.inputs import make_inputs
from bench.timing import Flusher, capture, interleaved, ratio
from bench.variants import VARIANTS, bind
from bench.workloads import PREFILL
from parity_tests.budgets import Limits, Result, Truth, judge
from parity_tests.cases import Case
from parity_tests.runners import Prepared, limits_of
from tests import gluon_on_cpu
from tests.portability.binary import SASS, cuobjdump, edges, sass
from tests.portability.cases import causal_mask, key_blocks, mixed, prefill
from tests.portability.compiler import planning_for
from tests.portability.targets import TARGETS
from triton_fa import api
from triton_fa.device import DeviceFacts
from triton_fa.env import settings
from triton_fa.kernels import hopper_plans, plans, primitives, submit
from triton_fa.kernels.compat import TRITON_VERSION
from triton_fa.kernels.transpose import transpose_kernel
from triton_fa.problem import Problem

pytest.importorskip("triton")
hopper = hopper_plans.kernel_module()
if isinstance(hopper, str):
    pytest.skip(f"this Triton's Gluon has other names: {hopper}", allow_module_level=True)

PROGRAMS = 3  # of the emulated chip


def flat(tensor: torch.Tensor) -> np.ndarray:
    """All memory from a tensor's address on; of what numpy does not have a copy in more bits."""
    wider = {torch.bfloat16: torch.float32, torch.float8_e4m3fn: torch.float16}
    found = memory(tensor)
    return found.to(wider.get(found.dtype, found.dtype)).numpy()


def memory(tensor: torch.Tensor) -> torch.Tensor:
    size = tensor.untyped_storage().size() // tensor.element_size() - tensor.storage_offset()
    return torch.as_strided(tensor, (size,), (1,))


def emulated(kernel: hopper_plans.Described, grid: tuple[int, int, int]) -> Callable[..., None]:
    """In place of a launch: run the kernel's source."""

    def launch(*given: Any, **options: Any) -> None:
        named = dict(zip(kernel.arg_names, given, strict=True))
        views = dict(zip(kernel._kernel.arg_names, kernel._views, strict=False))

        def argument(name: str) -> Any:
            if name in views:
                view = views[name]
                if view is None:
                    return None
                if view.tensor not in arrays:  # both panels of the result are one copy
                    arrays[view.tensor] = flat(given[view.tensor].view(view.dtype))
                array = arrays[view.tensor]
                size = view.dtype.itemsize
                return gluon_on_cpu.Descriptor(
                    array, view.shape, view.strides, list(view.block), size
                )
            value = named[name]
            if isinstance(value, torch.Tensor):
                return gluon_on_cpu.Pointer(flat(value))
            if isinstance(value, tuple):
                return tuple(gluon_on_cpu.Pointer(flat(tensor)) for tensor in value)
            if hasattr(value, "fn"):
                return gluon_on_cpu.function(value)
            return gluon_on_cpu.Tensor(value) if isinstance(value, int | float) else value

        arrays: dict[int, np.ndarray] = {}
        arguments = {name: argument(name) for name in kernel._kernel.arg_names}
        launched.append(grid)
        gluon_on_cpu.run(hopper, (primitives,), arguments, grid[0], seed=7)
        out = memory(named["out_ptr"])
        if out.dtype == torch.bfloat16:
            out.copy_(torch.from_numpy(arguments["out_desc"].array))

    return launch


launched: list[tuple[int, int, int]] = []


@pytest.fixture
def on_hopper(fresh: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls are planned for Hopper, and prefill runs on its kernel, or an emulation of it."""
    yield from served(fresh)


def served(fresh: pytest.MonkeyPatch) -> Iterator[None]:
    """What `on_hopper` does."""
    fresh.setenv("TRITON_FA_HOPPER", "1")
    if torch.cuda.is_available():
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs compute capability 9.0")
        real = hopper_plans.launches

        def spy(*given: Any, **named: Any) -> Any:
            launched.append((0, 0, 0))
            return real(*given, **named)

        fresh.setattr(hopper_plans, "launches", spy)
    else:
        facts = DeviceFacts("cuda", (9, 0), PROGRAMS, 227 << 10)
        fresh.setattr("triton_fa.device.facts", lambda device: facts)
        fresh.setattr(hopper_plans, "INTERPRETED", False)
        fresh.setattr(hopper_plans.Described, "__getitem__", emulated)
        # Functions of the caller's are made for the interpreter here.
        fresh.setattr(hopper_plans, "fault_of", lambda *given: "")
    launched.clear()
    yield
    assert launched, "the Hopper kernel was not chosen"


def agrees(case: Case, device: str, **more: Any) -> None:
    """The public function gives what the reference gives, within the budget of its dtype."""
    prepared = Prepared.of(case, device)
    arguments = prepared.arguments() | more
    returned = getattr(triton_fa, case.function)(**arguments, ver="triton")
    out, lse = returned if case.lse else (returned, None)
    _, problems = judge(case, Result(out, lse), prepared.truth, limits_of(prepared, "triton"))
    assert not problems, f"{problems}\n{case.repro_snippet(device=device)}"


PACKED = Case(
    entry="varlen",
    dtype="float16",
    heads_q=2,
    heads_kv=1,
    head_dim=128,
    head_dim_v=128,
    q_layout="packed",
    kv_layout="packed",
    page_size=0,
    causal=True,
    lse=True,
    seqlens_q=(150, 0, 70, 129),
    seqlens_k=(200, 5, 40, 300),
    num_splits=1,
)
DIMS = [(64, 64), (80, 80), (96, 96), (128, 128), (160, 160), (192, 128), (192, 192), (256, 256)]


@pytest.mark.parametrize(("head_dim", "head_dim_v"), DIMS)
@pytest.mark.parametrize("causal", [False, True])
def test_head_dims(
    head_dim: int, head_dim_v: int, causal: bool, on_hopper: None, device: str
) -> None:
    agrees(PACKED.with_changes(head_dim=head_dim, head_dim_v=head_dim_v, causal=causal), device)


FEATURES = {
    "window": {"causal": False, "window": (40, 7)},
    "window-causal": {"window": (150, 0)},
    "window-small": {"window": (3, 0)},
    "window-right": {"causal": False, "window": (-1, 60)},
    "attention-chunk": {"attention_chunk": 48},
    "softcap": {"softcap": 20.0},
    "sinks": {"sinks": True},
    "sinks-window": {"sinks": True, "window": (30, 0), "softcap": 30.0},
    "large-scale": {"softmax_scale": 3.0},
    "scale-0": {"softmax_scale": 0.0},
    "outgrown": {  # maxima that move by more than 2^8, where smaller moves are put off
        "softmax_scale": 3.0,
        "head_dim": 256,
        "head_dim_v": 256,
        "seqlens_q": (70,),
        "seqlens_k": (260,),
    },
    "no-lse": {"lse": False},
    "out": {"out": True, "tail_q": 3},
    "unused-rows": {"pad_q": 5, "pad_k": 9},
    "strides": {"kv_strides": "sliced", "heads_kv": 2, "heads_q": 4},
}


@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str, on_hopper: None, device: str) -> None:
    agrees(PACKED.with_changes(**FEATURES[name]), device)


CACHED = PACKED.with_changes(
    entry="kvcache",
    kv_layout="paged",
    page_size=16,
    seqlens_q=(150, 97, 130),
    seqlens_k=(200, 97, 450),
    pad_k=33,
    spare_pages=3,
)


@pytest.mark.parametrize("page_size", [8, 16, 48, 64, 128, 256])
def test_pages(page_size: int, on_hopper: None, device: str) -> None:
    agrees(CACHED.with_changes(page_size=page_size), device)


CACHE_FEATURES = {
    "window": {"window": (100, 0)},
    "full": {"causal": False},
    "dims-64": {"head_dim": 64, "head_dim_v": 64},
    "dims-96": {"head_dim": 96, "head_dim_v": 96},
    "dims-192": {"head_dim": 192, "head_dim_v": 128},
    "dims-256": {"head_dim": 256, "head_dim_v": 256, "page_size": 32},
    "batched-queries": {"q_layout": "batched", "seqlens_q": (140,) * 3, "seqlens_k": (140, 0, 390)},
    "batch-idx": {"batch_idx": True, "spare_rows": 2},
    "append": {"append": "packed", "seqlens_new": (9, 97, 0), "seqlens_k": (190, 0, 450)},
    "chunk": {"attention_chunk": 100},
    "dense": {"kv_layout": "batched", "page_size": 0, "spare_pages": 0},
    "dense-batch-idx": {
        "kv_layout": "batched",
        "page_size": 0,
        "spare_pages": 0,
        "batch_idx": True,
        "spare_rows": 2,
    },
    "dense-left-padding": {
        "kv_layout": "batched",
        "page_size": 0,
        "spare_pages": 0,
        "leftpad": True,
        "leftpads": (30, 0, 129),
    },
}


@pytest.mark.parametrize("name", CACHE_FEATURES)
def test_cache_features(name: str, on_hopper: None, device: str) -> None:
    agrees(CACHED.with_changes(**CACHE_FEATURES[name]), device)


FLOAT8 = PACKED.with_changes(dtype="float8_e4m3fn", descales="qkv", heads_q=4, heads_kv=2)
IN_FLOAT8 = functools.partial(reference.attend_low_precision, weights_dtype=torch.float8_e4m3fn)
FLOAT8_FEATURES = {
    "dims-64": {"head_dim": 64, "head_dim_v": 64},
    "dims-96": {"head_dim": 96, "head_dim_v": 96},
    "dims-128": {},
    "dims-192": {"head_dim": 192, "head_dim_v": 128},
    "dims-256": {"head_dim": 256, "head_dim_v": 256},
    "large-scale": {"softmax_scale": 3.0},
    "outgrown": FEATURES["outgrown"],
    "full": {"causal": False},
    "no-descales": {"descales": ""},
    "window": {"causal": False, "window": (40, 7)},
    "attention-chunk": {"attention_chunk": 48},
    "softcap": {"softcap": 20.0},
    "sinks-window": {"sinks": True, "window": (30, 0)},
    "unused-rows": {"pad_q": 5, "pad_k": 9},
    "strides": {"kv_strides": "sliced"},
    "fused": {"kv_strides": "fused"},
    "queries-of-one-head": {"heads_q": 8, "heads_kv": 1},
}
FLOAT8_CACHE_FEATURES = {
    "page-8": {"page_size": 8},
    "page-48": {"page_size": 48},
    "page-256": {"page_size": 256},
    "batch-idx": {"batch_idx": True, "spare_rows": 2},
    "append": {"append": "packed", "seqlens_new": (9, 97, 0), "seqlens_k": (190, 0, 450)},
    "split": {"kv_strides": "split", "heads_q": 4, "heads_kv": 2},
    "dense": CACHE_FEATURES["dense"],
    "dense-batch-idx": CACHE_FEATURES["dense-batch-idx"],
    "dense-left-padding": CACHE_FEATURES["dense-left-padding"],
}


@pytest.mark.parametrize("name", FLOAT8_FEATURES)
def test_float8(name: str, on_hopper: None, device: str) -> None:
    agrees(FLOAT8.with_changes(**FLOAT8_FEATURES[name]), device)


FLOAT8_DIMS = sorted(hopper_plans.FP8_TILES)
FACTORS = {"negative": (-0.7, 1.3), "both-negative": (-0.7, -1.3), "zero": (0.0, 1.3)}


@pytest.mark.parametrize("head_dim", [128, 192])
@pytest.mark.parametrize("name", FACTORS)
def test_factors_of_any_sign(name: str, head_dim: int, on_hopper: None, device: str) -> None:
    """A head's own: the other one's are positive."""
    case = FLOAT8.with_changes(head_dim=head_dim, seqlens_q=(150, 70), seqlens_k=(300, 200))
    prepared = Prepared.of(case, device)
    arguments = prepared.arguments()
    of_q, of_k = FACTORS[name]
    arguments["q_descale"][0, 1], arguments["k_descale"][0, 1] = of_q, of_k
    arguments["v_descale"][1, 0] *= -1
    what = {n: x for n, x in arguments.items() if n not in ("num_splits", "return_softmax_lse")}
    exact, exact_lse = reference.flash_attn_varlen_func(**what)
    baseline, _ = reference.flash_attn_varlen_func(**what, attend=IN_FLOAT8)
    largest = prepared.truth.largest_score  # no factor above is larger than 1.5
    truth = Truth(exact, exact_lse, baseline, largest_score=largest)
    out, lse = triton_fa.flash_attn_varlen_func(**arguments, ver="triton")
    limits = limits_of(dataclasses.replace(prepared, truth=truth), "triton")
    _, problems = judge(case, Result(out, lse), truth, limits)
    assert not problems, problems


@pytest.mark.parametrize("name", FLOAT8_CACHE_FEATURES)
def test_float8_caches(name: str, on_hopper: None, device: str) -> None:
    changes = {"dtype": "float8_e4m3fn", "descales": "qkv"} | FLOAT8_CACHE_FEATURES[name]
    agrees(CACHED.with_changes(**changes), device)


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn"])
def test_a_page_table_without_any_page(dtype: str, on_hopper: None, device: str) -> None:
    arguments = Prepared.of(CACHED.with_changes(dtype=dtype), device).arguments()
    arguments["page_table"] = arguments["page_table"][:, :0]
    arguments["cache_seqlens"].zero_()
    out, lse = triton_fa.flash_attn_with_kvcache(**arguments, ver="triton")
    assert not out.any()
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))


@pytest.mark.skipif(torch.cuda.is_available(), reason="plans for chips that are not here")
def test_programs_that_transpose_take_several_blocks(
    on_hopper: None, fresh: pytest.MonkeyPatch
) -> None:
    """As many as the chip keeps busy, however wide the page table is."""
    seen: list[plans.Plan] = []
    real = plans.plan

    def spy(problem: Problem, device: DeviceFacts) -> plans.Plan:
        bounds = dataclasses.replace(problem.bounds, max_seqlen_k=1 << 20)
        seen.append(real(dataclasses.replace(problem, bounds=bounds), H200))
        return real(problem, device)

    fresh.setattr(plans, "plan", spy)
    fresh.setattr(hopper_plans, "TRANSPOSING_PROGRAMS", 4)
    case = CACHED.with_changes(dtype="float8_e4m3fn", heads_q=4, heads_kv=2)
    agrees(case, "cpu")  # two programs of a head and sequence, and four blocks in the longest
    (planned,) = seen
    (step,) = (s for s in planned.launches if s.kernel is transpose_kernel)
    assert step.grid == (4 * 132, 1, 1)
    assert step.values["tiles"] == 88


# ---------------------------------------------------------------- the order of tiles

RAGGED = PACKED.with_changes(
    seqlens_q=(70, 400, 0, 5, 129, 64, 1, 200),
    seqlens_k=(70, 410, 7, 5, 129, 90, 300, 0),
    max_q_slack=500,
    num_splits=0,
)


def metadata(case: Case, arguments: dict[str, Any], **more: Any) -> torch.Tensor:
    lengths = arguments["cu_seqlens_k"].diff().int()
    made = triton_fa.get_scheduler_metadata(
        case.batch,
        arguments["max_seqlen_q"],
        arguments["max_seqlen_k"],
        case.heads_q,
        case.heads_kv,
        case.head_dim,
        lengths,
        qkv_dtype=arguments["q"].dtype,
        cu_seqlens_q=arguments["cu_seqlens_q"],
        causal=case.causal,
        ver="triton",
        **more,
    )
    assert isinstance(made, torch.Tensor)
    return made


@pytest.mark.parametrize("kind", ["none", "own", "zero", "random", "stale", "twice"])
def test_the_order_is_advice(kind: str, on_hopper: None, device: str) -> None:
    """Sequences of both paths, planned in the call or before, well or badly."""
    prepared = Prepared.of(RAGGED, device)
    arguments = prepared.arguments()
    if kind != "none":
        given = metadata(RAGGED, arguments)
        if kind == "zero":
            given.zero_()
        elif kind == "random":
            given.random_(-(2**31), 2**31 - 1)
        elif kind == "stale":
            given[2 * 8 : 3 * 8] = torch.tensor([b << 16 | b for b in range(8)], device=device)
        elif kind == "twice":  # one sequence is named twice, and another not at all
            given[2 * 8] = given[2 * 8 + 1]
        arguments["scheduler_metadata"] = given
    out, lse = triton_fa.flash_attn_varlen_func(**arguments, ver="triton")
    _, problems = judge(RAGGED, Result(out, lse), prepared.truth, Limits.of(RAGGED))
    assert not problems, problems


def test_more_sequences_than_a_warp_has_lanes(on_hopper: None, device: str) -> None:
    batch = 70
    lengths = tuple(65 + b % 3 if b % 5 else 0 for b in range(batch))
    agrees(
        RAGGED.with_changes(
            seqlens_q=lengths, seqlens_k=lengths[::-1], heads_q=1, head_dim=64, head_dim_v=64
        ),
        device,
    )


def test_more_sequences_than_are_ordered(
    on_hopper: None, fresh: pytest.MonkeyPatch, device: str
) -> None:
    """Beyond 1024 sequences there is no order; so here beyond 4."""
    if device == "cpu":
        fresh.setattr("triton_fa.kernels.plans._block_b", lambda batch: 4)
    agrees(RAGGED, device)


@pytest.mark.parametrize("sm_margin", [0, 2, 1000])
def test_programs(sm_margin: int, on_hopper: None, device: str) -> None:
    agrees(PACKED, device, sm_margin=sm_margin)
    if device == "cpu":
        assert launched == [(max(1, PROGRAMS - sm_margin), 1, 1)]


def test_fewer_tiles_than_programs_need_no_counter(on_hopper: None, device: str) -> None:
    agrees(PACKED.with_changes(seqlens_q=(100,), seqlens_k=(230,)), device)
    if device == "cpu":
        assert launched == [(2, 1, 1)]


def test_both_paths_in_one_call(on_hopper: None, device: str) -> None:
    case = CACHED.with_changes(
        seqlens_q=(1, 150, 1, 97), seqlens_k=(300, 150, 0, 400), heads_q=4, max_q_slack=10
    )
    agrees(case.with_changes(num_splits=0), device)


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn"])
def test_wrong_lengths_stay_inside(dtype: str, on_hopper: None, device: str) -> None:
    """Prefix sums, lengths and pages that are nonsense; the emulation checks every address."""
    prepared = Prepared.of(CACHED.with_changes(dtype=dtype), device)
    arguments = prepared.arguments()
    arguments["cu_seqlens_q"] += torch.tensor([-9, 99999, -5, 2**30], device=device).int()
    arguments["cache_seqlens"].fill_(2**30)
    arguments["page_table"].random_(-(2**31), 2**31 - 1)
    triton_fa.flash_attn_with_kvcache(**arguments, ver="triton")


def test_batch_invariant_rows(on_hopper: None, device: str) -> None:
    """A sequence alone, and among others under other bounds: the same bits."""
    arguments = Prepared.of(RAGGED, device).arguments() | {"batch_invariant": True}
    out, lse = triton_fa.flash_attn_varlen_func(**arguments, ver="triton")
    first = torch.tensor([0, 400], device=device).int()
    alone, lse_alone = triton_fa.flash_attn_varlen_func(
        **arguments
        | {
            "q": arguments["q"][70:470],
            "k": arguments["k"][70:480],
            "v": arguments["v"][70:480],
            "cu_seqlens_q": first,
            "cu_seqlens_k": first + torch.tensor([0, 10], device=device).int(),
            "max_seqlen_q": 400,
            "max_seqlen_k": 410,
        },
        ver="triton",
    )
    assert torch.equal(out[70:470], alone)
    assert torch.equal(lse[:, 70:470], lse_alone)


# ---------------------------------------------------------------- the choice and the launch


def a_problem(case: Case, fresh: pytest.MonkeyPatch) -> Problem:
    """What the public function makes of a case."""
    made: list[Problem] = []
    real = plans.plan

    def spy(problem: Problem, device: DeviceFacts) -> plans.Plan:
        made.append(problem)
        return real(problem, device)

    fresh.setattr(plans, "plan", spy)
    agrees(case, "cpu")
    return made[0]


H200 = DeviceFacts("cuda", (9, 0), 132, 227 << 10)


@pytest.mark.skipif(torch.cuda.is_available(), reason="plans for chips that are not here")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"head_dim": 112, "head_dim_v": 112}, "head dims 112, 112"),
        ({"dtype": "float32"}, "torch.float32"),
        ({"softmax_scale": -1.0}, "softmax_scale < 0"),
        ({"page_size": 4, "kv_layout": "paged"}, "not a multiple of 8"),
    ],
)
def test_what_the_kernel_does_not_take(
    changes: dict[str, Any], reason: str | None, fresh: pytest.MonkeyPatch
) -> None:
    case = PACKED.with_changes(seqlens_q=(3,), seqlens_k=(70,), heads_q=1, **changes)
    problem = a_problem(case, fresh)
    assert hopper_plans.tile(problem, H200) is None
    fresh.setenv("TRITON_FA_HOPPER", "1")
    settings.cache_clear()
    fresh.setattr(hopper_plans, "INTERPRETED", False)
    reasons = hopper_plans.refusals(problem, H200)
    assert (reasons == []) is (reason is None)
    assert reason is None or reason in reasons[0]
    for other in (
        DeviceFacts("cuda", (10, 0), 148, 227 << 10),
        DeviceFacts("cuda", (8, 0), 108, 163 << 10),
        DeviceFacts("hip", (0, 0), 304, 64 << 10),
    ):
        assert "9.0" in str(hopper_plans.unavailable(other))
    fresh.setenv("TRITON_FA_HOPPER", "0")
    settings.cache_clear()
    assert hopper_plans.unavailable(H200) == "TRITON_FA_HOPPER=0"


@pytest.mark.skipif(torch.cuda.is_available(), reason="plans for chips that are not here")
def test_more_transposed_values_than_are_kept(fresh: pytest.MonkeyPatch) -> None:
    case = FLOAT8.with_changes(seqlens_q=(3,), seqlens_k=(70,), head_dim=64, head_dim_v=64)
    problem = a_problem(case, fresh)
    fresh.setenv("TRITON_FA_HOPPER", "1")
    settings.cache_clear()
    fresh.setattr(hopper_plans, "INTERPRETED", False)
    size, row_stride = hopper_plans.transposed_shape(problem)
    assert size == 2 * 64 * row_stride
    assert row_stride == 96  # 70 keys, and a block for where each sequence begins
    assert hopper_plans.MOST_TRANSPOSED == 2 << 30
    fresh.setattr(hopper_plans, "MOST_TRANSPOSED", size)
    assert hopper_plans.refusals(problem, H200) == []
    fresh.setattr(hopper_plans, "MOST_TRANSPOSED", size - 1)
    reasons = [f"transposed values take {size} bytes, of at most {size - 1}"]
    assert hopper_plans.refusals(problem, H200) == reasons
    assert hopper_plans.tile(problem, H200) is None
    # Batch-invariant calls of any size run on one kernel, or not at all.
    problem = invariant(problem)
    with pytest.raises(triton_fa.UnsupportedError, match=f"batch_invariant: {reasons[0]}; fewer"):
        hopper_plans.tile(problem, H200)
    fresh.setattr(hopper_plans, "MOST_TRANSPOSED", size)
    assert hopper_plans.tile(problem, H200) is not None
    fresh.setattr(hopper_plans, "MOST_TRANSPOSED", 0)
    # What the kernel takes at no size is served by the other one.
    negative = dataclasses.replace(problem.spec, softmax_scale=-1.0)
    assert hopper_plans.tile(dataclasses.replace(problem, spec=negative), H200) is None


def invariant(problem: Problem) -> Problem:
    features = problem.spec.features | {"batch_invariant"}
    return dataclasses.replace(problem, spec=dataclasses.replace(problem.spec, features=features))


def test_too_large_to_be_batch_invariant(
    on_hopper: None, fresh: pytest.MonkeyPatch, device: str
) -> None:
    """The caller is told, and before anything is launched; others are served."""
    arguments = Prepared.of(FLOAT8, device).arguments()
    fresh.setattr(hopper_plans, "MOST_TRANSPOSED", 1 << 18)
    invariant_call = arguments | {"batch_invariant": True}
    triton_fa.flash_attn_varlen_func(**invariant_call, ver="triton")
    before = len(launched)
    assert before
    fresh.setattr(hopper_plans, "MOST_TRANSPOSED", 1 << 10)
    api._RECORDS.clear()
    with pytest.raises(triton_fa.UnsupportedError, match="batch_invariant: transposed values"):
        triton_fa.flash_attn_varlen_func(**invariant_call, ver="triton")
    triton_fa.flash_attn_varlen_func(**arguments, ver="triton")
    assert len(launched) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="plans for chips that are not here")
@pytest.mark.parametrize("name", ["q", "k", "out"])
def test_a_stride_by_which_nothing_is_stepped(name: str, fresh: pytest.MonkeyPatch) -> None:
    """It chooses no kernel, but for batch-invariant calls: for others in the batch it would."""
    case = CACHED.with_changes(
        q_layout="batched",
        kv_layout="batched",
        page_size=0,
        spare_pages=0,
        seqlens_q=(3, 3),
        seqlens_k=(5, 5),
        out=True,
    )
    both = a_problem(case, fresh)
    fresh.setenv("TRITON_FA_HOPPER", "1")
    settings.cache_clear()
    fresh.setattr(hopper_plans, "INTERPRETED", False)

    def refusals(problem: Problem, batch: int, room: int) -> list[str]:
        _, tokens, heads, dim = getattr(problem.tensors, name).shape
        strides = (tokens * heads * dim + room, heads * dim, dim, 1)
        shape = (batch, tokens, heads, dim)
        tensor = torch.empty_strided(shape, strides, dtype=torch.float16)
        tensors = problem.tensors._replace(**{name: tensor})
        return hopper_plans.refusals(dataclasses.replace(problem, tensors=tensors), H200)

    for room, reasons in ((8, 0), (4, 1)):
        assert len(refusals(both, 2, room)) == reasons
        assert refusals(both, 1, room) == []
        assert len(refusals(invariant(both), 2, room)) == reasons
        assert len(refusals(invariant(both), 1, room)) == reasons


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it is chosen where it was run")
def test_it_is_chosen_on_versions_it_was_run_on(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(hopper_plans, "INTERPRETED", False)
    fresh.setattr(hopper_plans, "RUN_ON", frozenset())
    assert "TRITON_FA_HOPPER=1 tries it" in str(hopper_plans.unavailable(H200))
    fresh.setattr(hopper_plans, "RUN_ON", frozenset({TRITON_VERSION.release[:2]}))
    assert hopper_plans.unavailable(H200) is None
    fresh.setattr(hopper_plans, "kernel_module", lambda: "ImportError: no such name")
    assert hopper_plans.unavailable(H200) == "ImportError: no such name"


def test_addresses_become_tensor_maps_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 passes a tensor map, sizes and strides in place of a descriptor."""
    view = hopper_plans.View(0, (1, 2, 3, 4, 5), (50, 40, 30, 20, 1), (1, 1, 1, 8, 64), torch.half)
    views = [view, None, dataclasses.replace(view, tensor=2)]
    kernel = hopper_plans.Described(hopper.hopper_kernel, (*hopper_plans.TENSORS, "v_ptr"), views)
    made = []

    def expand(descriptor: Any, meta: str) -> list[Any]:
        made.append((descriptor.base.data_ptr(), meta))
        assert (descriptor.shape, descriptor.strides) == (view.shape, view.strides)
        return [holders[len(made) - 1], *descriptor.shape, *descriptor.strides]

    holders = [object() for _ in range(3)]
    like_tritons = types.SimpleNamespace(__basicsize__=256)  # the map is in its last bytes
    nvidia = types.SimpleNamespace(make_tensordesc_arg=expand)
    monkeypatch.setitem(sys.modules, "triton.backends.nvidia.driver", nvidia)
    types_of = ("tensordesc<fp16>", "constexpr", "tensordesc<fp16>", "*fp32", "constexpr", "i32")
    given = ("out_ptr", "q_ptr", "k_ptr", "v_ptr", "lse_ptr", None, 7)
    passed = kernel.described_parameters(types_of, given, "ab")
    assert passed is not None
    numbers = [struct.pack("<i", n) for n in view.shape] + [
        struct.pack("<q", n) for n in view.strides
    ]
    first, second = passed[0], passed[11]
    assert isinstance(first, submit.TensorMap)
    assert isinstance(second, submit.TensorMap)
    want = [first, *numbers, second, *numbers, "lse_ptr", struct.pack("<i", 7)]
    assert passed == want
    assert (first.tensor, second.tensor) == ("out_ptr", "k_ptr")
    monkeypatch.setattr(hopper_plans, "id", lambda holder: 1024 * holders.index(holder), False)
    monkeypatch.setattr(hopper_plans, "type", lambda holder: like_tritons, False)
    assert [first.of(address) for address in (16, 32, 16)] == [
        (128, holders[0]),
        (1024 + 128, holders[1]),
        (128, holders[0]),
    ]
    assert second.of(16) == (2048 + 128, holders[2])
    assert made == [(16, "a"), (32, "a"), (16, "b")]
    other = ("tensordesc<fp16>", "constexpr", "tensordesc<fp16>", "fp16", "constexpr", "i32")
    assert kernel.described_parameters(other, given, "ab") is None


# ---------------------------------------------------------------- what only a GPU can show

LONG = PACKED.with_changes(
    dtype="bfloat16",
    heads_q=8,
    heads_kv=2,
    seqlens_q=(2000, 1, 129, 700, 64),
    seqlens_k=(3000, 500, 129, 300, 1000),
)


# Each pair is compiled, for some seconds.
LONG_CASES = [("causal", *dims) for dims in DIMS]
LONG_CASES += [(name, 128, 128) for name in FEATURES]
LONG_CASES += [(name, 64, 64) for name in ("window-causal", "softcap", "sinks")]
LONG_CASES += [("sinks-window", *dims) for dims in ((96, 96), (192, 128), (256, 256))]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "head_dim", "head_dim_v"), LONG_CASES)
def test_long_sequences(
    name: str, head_dim: int, head_dim_v: int, on_hopper: None, device: str
) -> None:
    changes = FEATURES.get(name, {})
    agrees(LONG.with_changes(head_dim=head_dim, head_dim_v=head_dim_v, **changes), device)


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "head_dim_v"), FLOAT8_DIMS)
@pytest.mark.parametrize("softmax_scale", [None, 3.0])
def test_long_sequences_in_float8(
    head_dim: int, head_dim_v: int, softmax_scale: float | None, on_hopper: None, device: str
) -> None:
    case = LONG.with_changes(dtype="float8_e4m3fn", descales="qkv", softmax_scale=softmax_scale)
    agrees(case.with_changes(head_dim=head_dim, head_dim_v=head_dim_v), device)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [8, 16, 64, 128, 256])
def test_long_caches(page_size: int, on_hopper: None, device: str) -> None:
    agrees(
        CACHED.with_changes(
            dtype="bfloat16",
            heads_q=8,
            heads_kv=2,
            page_size=page_size,
            seqlens_q=(1000, 97, 1, 512),
            seqlens_k=(9000, 97, 5000, 2048),
        ),
        device,
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "head_dim", "head_dim_v"),
    [("bfloat16", *dims) for dims in DIMS] + [("float8_e4m3fn", *dims) for dims in FLOAT8_DIMS],
)
def test_repeats_are_bit_equal(
    dtype: str, head_dim: int, head_dim_v: int, on_hopper: None, device: str
) -> None:
    case = LONG.with_changes(dtype=dtype, head_dim=head_dim, head_dim_v=head_dim_v)
    arguments = Prepared.of(case, device).arguments()
    first, first_lse = triton_fa.flash_attn_varlen_func(**arguments, ver="triton")
    for _ in range(300):
        out, lse = triton_fa.flash_attn_varlen_func(**arguments, ver="triton")
        assert torch.equal(out, first)
        assert torch.equal(lse, first_lse)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [0, 16, 128])
def test_a_graph_serves_other_lengths(page_size: int, on_hopper: None) -> None:
    """Also shorter ones, down to nothing; and two replays of one graph leave the counter right."""
    rng = torch.Generator(device="cuda").manual_seed(0)
    heads, dim, room = 8, 128, 4096
    q = torch.randn(3000, heads, dim, generator=rng, device="cuda").bfloat16()
    shape = (-1, page_size, 2, dim) if page_size else (-1, 2, dim)
    k, v = torch.randn(2, 3 * room, 2, dim, generator=rng, device="cuda").bfloat16()
    table = torch.randperm(3 * room // max(page_size, 1), generator=rng, device="cuda").int()
    prefix = torch.tensor([0, 1500, 1600, 3000], device="cuda").int()
    lengths = torch.tensor([4096, 200, 1400], device="cuda").int()
    out = torch.empty_like(q)

    def attend() -> None:
        keys = {"cu_seqlens_k": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()}
        if page_size:
            keys = {"seqused_k": lengths, "page_table": table.view(3, -1), "cu_seqlens_k": None}
        triton_fa.flash_attn_varlen_func(
            q,
            k.view(shape),
            v.view(shape),
            cu_seqlens_q=prefix,
            max_seqlen_q=3000,
            max_seqlen_k=room,
            causal=True,
            out=out,
            ver="triton",
            **keys,
        )

    graph = capture([attend])
    for ends, keys in (
        ([1500, 1600, 3000], [4096, 200, 1400]),
        ([10, 2990, 3000], [10, 3500, 20]),
        ([0, 0, 700], [0, 4000, 700]),
    ):
        prefix.copy_(torch.tensor([0, *ends]))
        lengths.copy_(torch.tensor(keys))
        for _ in range(2):
            out.fill_(float("nan"))
            graph.replay()
        first_k = 0
        for seq, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if begin == end:
                first_k += keys[seq]
                continue
            slots = first_k + torch.arange(keys[seq], device="cuda")
            if page_size:
                token = torch.arange(keys[seq], device="cuda")
                slots = table.view(3, -1)[seq, token // page_size].long() * page_size
                slots += token % page_size
            want, _ = reference.flash_attn_func(
                q[None, begin:end], k[None, slots], v[None, slots], causal=True
            )
            error = (out[begin:end].double() - want[0]).norm() / want.norm().clamp(min=1e-9)
            assert error < 1e-2, (seq, float(error))
            first_k += keys[seq]
        assert out[ends[-1] :].isnan().all(), "rows of no sequence were written"


@pytest.mark.gpu
def test_two_streams_at_once(on_hopper: None, device: str) -> None:
    prepared = [Prepared.of(LONG.with_changes(seed=seed), device) for seed in (1, 2)]
    graphs, outs = [], []
    for each in prepared:
        arguments = each.arguments() | {"out": torch.zeros_like(each.arguments()["q"])}
        call = functools.partial(triton_fa.flash_attn_varlen_func, **arguments, ver="triton")
        graphs.append(capture([call]))
        outs.append(arguments["out"])
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for each, out in zip(prepared, outs, strict=True):
        lse = triton_fa.flash_attn_varlen_func(**each.arguments(), ver="triton")[1]
        _, problems = judge(LONG, Result(out, lse), each.truth, Limits.of(LONG))
        assert not problems, problems


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("direct", ["0", "1"])
def test_launches_agree(
    direct: str, dtype: str, on_hopper: None, fresh: pytest.MonkeyPatch, device: str
) -> None:
    """By Triton's dispatcher and by addresses; other tensors after the first come by address."""
    fresh.setenv("TRITON_FA_DIRECT_LAUNCH", direct)
    settings.cache_clear()
    api._RECORDS.clear()
    for seed in range(4):
        agrees(RAGGED.with_changes(dtype=dtype, seed=seed), device)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("row", PREFILL, ids=lambda row: row.name)
def test_speed(row: Any, fresh: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Says how fast the Hopper kernel, the portable one and FA3 are, interleaved; judges none."""
    inputs = make_inputs(row, torch.device("cuda"))
    graphs: dict[str, Callable[[], object]] = {}
    for label, variant, hopper_wanted in (
        ("hopper", "triton", "1"),
        ("portable", "triton", "0"),
        ("fa3", "3", "0"),
    ):
        fresh.setenv("TRITON_FA_HOPPER", hopper_wanted)
        settings.cache_clear()
        api._RECORDS.clear()
        try:
            with triton_fa.strict():
                bound = bind(VARIANTS[variant], inputs)
                graphs[label] = capture([functools.partial(bound.call, inputs)]).replay
        except triton_fa.TritonFAError as error:
            sys.stdout.write(f"{label}: {error}\n")
    times = interleaved(graphs, Flusher().clean, bursts=5)
    with capsys.disabled():
        figures = {
            label: flops(row) * row.layers / median(bursts) / 1e6 for label, bursts in times.items()
        }
        line = " ".join(f"{label} {figure:.0f}" for label, figure in figures.items())
        for peer in ("portable", "fa3"):
            if peer in times:
                line += f"  x{ratio(times[peer], times['hopper']):.2f} {peer}"
        sys.stdout.write(f"\n{row.name:32} {line} ")


# ---------------------------------------------------------------- what the compiler makes of it

DESCALE = torch.zeros(2, 2)
HALF_SINKS = torch.zeros(8, dtype=torch.float16)
COMPILED: dict[str, Callable[[], object]] = {
    "128": prefill(),
    "64-window-softcap": prefill(
        dim=64, dtype=torch.float16, sinks=HALF_SINKS, window_size=(64, -1), softcap=30.0
    ),
    "96-page-16": mixed(dim=96, most=256),
    "160": prefill(dim=160),
    "192": prefill(dim=192),
    "256-full": prefill(dim=256, causal=False),
    "128-blocks": prefill(mask_mod=causal_mask, block_sparse_tensors=key_blocks(256), causal=False),
    "64-e4m3": prefill(dim=64, dtype=torch.float8_e4m3fn),
    "96-e4m3": prefill(dim=96, dtype=torch.float8_e4m3fn),
    "128-e4m3": prefill(dtype=torch.float8_e4m3fn, q_descale=DESCALE, k_descale=DESCALE),
    "192-128-e4m3": prefill(dim=192, dim_v=128, dtype=torch.float8_e4m3fn),
    "256-e4m3": prefill(dim=256, dtype=torch.float8_e4m3fn),
}
PRODUCTS = {"HGMMA", "QGMMA"}  # of 16 and of 8 bits
INSTRUCTIONS = {"128": 500, "64-window-softcap": 800, "96-page-16": 560, "256-full": 500}
INSTRUCTIONS |= {"160": 610, "192": 420, "128-blocks": 520}
INSTRUCTIONS |= {"64-e4m3": 430, "96-e4m3": 490, "128-e4m3": 470, "192-128-e4m3": 490}
INSTRUCTIONS |= {"256-e4m3": 570}
"""Most that a warp may execute for a key tile without a mask; at the power limit, speed is this."""


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """What the compiler said, and what is in its code: from a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_hopper", *COMPILED],
        cwd=Path(__file__).parents[1],
        env=environment | {"TRITON_FA_HOPPER": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    sys.stdout.write(done.stdout)
    return {each["case"]: each for each in found}


@pytest.mark.xdist_group("hopper")  # they share what was compiled
@pytest.mark.parametrize("case", COMPILED)
def test_it_compiles_for_hopper(case: str, compiled: dict[str, dict[str, Any]]) -> None:
    found = compiled[case]
    assert found["shared"] <= 227 << 10
    # Products that the compiler makes wait for each other (C7510 and others) take twice the time.
    assert not found["warnings"]
    # Triton's own barriers leave ours alone, and none was copied or moved out of its loop.
    assert max(found["barriers"]) < hopper.TURN.value
    assert found["tiles"], "no loop has matrix products"
    assert all(tile["barriers"] <= 5 for tile in found["tiles"])
    unmasked = min(found["tiles"], key=lambda tile: int(tile["instructions"]))
    assert unmasked["local"] <= 2, "registers are spilled in the loop over key tiles"
    assert unmasked["instructions"] <= INSTRUCTIONS[case]


def cross_compiled(name: str, call: Callable[[], object]) -> dict[str, Any]:
    with planning_for(TARGETS["sm_90"]) as seen:
        call()
    (step,) = (s for s in seen if isinstance(s.kernel, hopper_plans.Described))
    made = step.kernel.cross_compile(step.values, step.options, GPUTarget("cuda", 90, 32))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(made.asm["ptx"])
        tool = ptxas()
        command = [tool, "-v", "--gpu-name=sm_90a", path, "-o", path.with_suffix(".cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        code = cuobjdump("-sass", path.with_suffix(".cubin"))
    barriers = re.findall(
        r"\bbar(?:rier)?(?:\.cta)?\.(?:sync|arrive)[.a-z]*\s+(\d+)", made.asm["ptx"]
    )
    return {
        "case": name,
        "shared": made.metadata.shared,
        "said": re.findall(r"\d+ bytes spill \w+|Used \d+ registers", said),
        "warnings": re.findall(r".*(?:warning|C75\d\d).*", said),
        "barriers": sorted(set(map(int, barriers))),
        "tiles": key_tiles(code),
    }


def ptxas() -> str:
    """The assembler that this Triton uses for Hopper; it keeps what that says to itself."""
    knobs = triton.knobs.nvidia
    newer = TRITON_VERSION.release >= (3, 9)
    return (knobs.ptxas_blackwell if newer else knobs.ptxas).path


def key_tiles(code: str) -> list[dict[str, int]]:
    """Of every innermost loop with matrix products, what a warp executes in a round."""
    lines = sass(code)
    names = [found[2] for found in SASS.findall(code)]
    places = {line.place: i for i, line in enumerate(lines)}
    flow = networkx.DiGraph(edges(lines, places))
    above = networkx.immediate_dominators(flow, 0)

    def dominates(a: int, b: int) -> bool:
        while b > a:
            b = above[b]
        return a == b

    loops: dict[int, set[int]] = {}
    for end, begin in flow.edges:
        if begin <= end and end in above and dominates(begin, end):
            body, left = {begin}, [end]
            while left:
                at = left.pop()
                if at not in body:
                    body.add(at)
                    left += flow.predecessors(at)
            loops.setdefault(begin, set()).update(body)
    busy = {b: body for b, body in loops.items() if any(names[i] in PRODUCTS for i in body)}
    inner = [
        body
        for begin, body in busy.items()
        if not any(other != begin and other in body for other in busy)
    ]
    return [
        {
            "instructions": len(body),
            "products": sum(names[i] in PRODUCTS for i in body),
            "barriers": sum(names[i] == "BAR" for i in body),
            "local": sum(lines[i].local for i in body),
        }
        for body in inner
    ]


if __name__ == "__main__":
    for each in sys.argv[1:]:
        sys.stdout.write(json.dumps(cross_compiled(each, COMPILED[each])) + "\n")
        sys.stdout.flush()

"""The benchmarks' arithmetic on the CPU: workloads, counters, ratios, inputs and the judge."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend

import triton_fa
from bench import combine, counters, judge, masked, report, sdpa, timing, vllm_triton, workloads
from bench.__main__ import main, parse, run_rows, write
from bench.compilations import compilations
from bench.compile_ahead import commands
from bench.environment import clock_and_power, kernel_digest
from bench.inputs import Inputs, make_inputs
from bench.launches import graph_nodes, launches
from bench.measure import Measurement, Outcome, as_json, measure, workspace_bytes
from bench.timing import ROTATION_BYTES, Flusher, Times, copies_for, ratio
from bench.variants import VARIANTS, Bound, Variant, bind, plan_arguments
from bench.workloads import CORE, GRID, LLAMA3_8B, Workload, decode, find, prefill, shrunk
from reference.entries import flash_attn_with_kvcache as reference_attention

ROOT = Path(__file__).resolve().parents[1]
ALL = [row for rows in (*CORE.values(), *GRID.values()) for row in rows]
SIDE = st.none() | st.integers(-12, 24)
CPU = torch.device("cpu")
needs_vllm = pytest.mark.skipif(
    bool(vllm_triton.missing()), reason=f"vLLM's files are not here: {vllm_triton.FETCH}"
)


def brute_force(q_len: int, k_len: int, left: int | None, right: int | None) -> tuple[int, int]:
    visible = [
        (i, j)
        for i in range(q_len)
        for j in range(k_len)
        if (left is None or j >= i + k_len - q_len - left)
        and (right is None or j <= i + k_len - q_len + right)
    ]
    return len(visible), len({j for _, j in visible})


@given(st.integers(0, 9), st.integers(0, 12), st.none() | st.integers(0, 15), SIDE)
def test_visible_counts_equal_brute_force(
    q_len: int, k_len: int, left: int | None, right: int | None
) -> None:
    right = None if right is not None and right < 0 else right
    pairs, keys = brute_force(q_len, k_len, left, right)
    assert counters.visible_pairs(q_len, k_len, left, right) == pairs
    assert counters.visible_keys(q_len, k_len, left, right) == keys


def test_flops_of_a_causal_square_are_half_and_the_diagonal() -> None:
    row = find("1x16384.32/8x128")
    n = 16384
    assert counters.flops(row) == 4 * 128 * 32 * (n * n + n) // 2
    assert counters.flops(find("1x16384.32/8x128.full")) == 4 * 128 * 32 * n * n


def test_decode_bytes_are_keys_values_query_and_output() -> None:
    row = find("16x8192.32/8x128.p16")
    kv = 16 * 8192 * 8 * 128 * 2 * 2
    qo = 16 * 32 * 128 * 2 * 2
    assert counters.mandatory_bytes(row) == kv + qo
    with_lse = find("16x8192.32/8x128.p16.lse")
    assert counters.mandatory_bytes(with_lse) == kv + qo + 16 * 32 * 4


def test_a_window_bounds_the_bytes() -> None:
    row = find("16x32768.32/8x128.p16.w1024")
    kv = 16 * 1025 * 8 * 128 * 2 * 2  # the row's own position and 1024 before it
    assert counters.mandatory_bytes(row) == kv + 16 * 32 * 128 * 2 * 2


def test_a_new_key_is_written_besides() -> None:
    plain, row = find("16x8192.32/8x128.p16"), find("16x8192.32/8x128.p16.new1.halves")
    assert counters.mandatory_bytes(row) - counters.mandatory_bytes(plain) == 65_536
    assert counters.flops(row) == counters.flops(plain)


def test_a_latent_cache_counts_once_and_is_scored_twice() -> None:
    row = find("16x8192.16/1x64,512.p64.qv")
    cache, q, out = 150_994_944, 294_912, 262_144
    assert counters.cache_bytes(row) == cache
    assert counters.mandatory_bytes(row) == cache + q + out
    assert counters.flops(row) == 2 * (64 + 512 + 512) * 16 * 16 * 8192
    drafts = find("16x8192.16/1x64,512.p64.q2.qv")
    assert counters.mandatory_bytes(drafts) == cache + 2 * (q + out)
    assert counters.flops(drafts) == 2 * (64 + 512 + 512) * 16 * 16 * (8191 + 8192)


def test_float8_numbers_are_one_byte_and_results_two() -> None:
    assert counters.mandatory_bytes(find("16x8192.32/8x128.p16.kv-e4m3")) == 268_435_456 + 262_144
    assert counters.cache_bytes(find("16x8192.32/8x128.p16.kv-e5m2")) == 268_435_456
    row = find("1x16384.32/8x128.qkv-e4m3")
    assert counters.mandatory_bytes(row) == 16384 * (8 * 256 + 32 * 128 + 2 * 32 * 128)
    assert counters.flops(row) == counters.flops(find("1x16384.32/8x128"))


def test_merging_reads_every_part() -> None:
    row = find("combine.4x16x1.32x128")
    parts, lses, out, lse = 1_048_576, 8_192, 131_072, 2_048
    assert counters.mandatory_bytes(row) == parts + lses + out + lse
    assert counters.flops(row) == 524_288
    assert counters.mandatory_bytes(find("combine.4x1x16384.32x128")) == 1_218_445_312


def test_every_page_size_is_counted_in_the_cache() -> None:
    row = dataclasses.replace(decode([17], LLAMA3_8B), page_size=16)
    assert counters.cache_bytes(row) == 32 * 8 * 128 * 2 * 2


def test_names_are_unique_within_and_across_sets() -> None:
    by_name: dict[str, Workload] = {}
    for row in ALL:
        assert by_name.setdefault(row.name, row) == row, row.name


def test_rows_are_hashable_and_repeatable() -> None:
    assert len({*ALL}) <= len(ALL)
    again = workloads.without_repetition(workloads.decode_core())
    assert again == workloads.DECODE
    assert workloads.without_repetition(workloads.prefill_core()) == workloads.PREFILL


# The random length lists are part of a row's meaning: a change of them is another row.
PINNED = {
    "skew32.32/8x128.p16": 309_760,
    "zipf128.32/8x128.p16": 177_979,
    "lognormal32k.32/8x128": 32_768,
    "giant64.32/8x128.p16": 97_792,
}


@pytest.mark.parametrize("name", PINNED)
def test_length_lists_stay_what_they_were(name: str) -> None:
    assert sum(find(name).k_lens) == PINNED[name]


def test_core_holds_the_rows_that_results_are_quoted_from() -> None:
    """One line per promise: (kind, batch, longest keys, heads, page size or None)."""
    core = {
        (kind, r.batch, max(r.k_lens), str(r.heads), r.page_size)
        for kind, rows in CORE.items()
        for r in rows
    }
    small = [(1, 1024), (8, 512), (4, 2048), (1, 8192), (32, 1024), (64, 512), (256, 64)]
    expected = [("decode", b, k, "32/8x128", 16) for b, k in small]
    expected += [("decode", 16, 8192, "32/8x128", p) for p in (1, 16, 64, 128, 256)]
    expected += [("decode", 16, 4096, f"{h}/{h}x128", 16) for h in (24, 40, 96)]
    expected += [("decode", 16, 4096, f"32/8x{d}", 16) for d in (80, 96, 160, 192)]
    expected += [("decode", b, k, "8/1x128", 16) for b, k in ((1024, 128), (8192, 32), (1, 16384))]
    expected += [("decode", 1, 131072, "32/8x128", 16), ("decode", 32, 8192, "16/8x256", 64)]
    expected += [("prefill", 1, 16384, h, None) for h in ("32/8x128", "16/8x256", "64/8x64")]
    expected += [("prefill", 2, 8192, "32/8x128", p) for p in (None, 16, 64, 128, 256)]
    expected += [("prefill", b, k, "32/8x128", 64) for b in (1, 8) for k in (4096, 32768, 131072)]
    expected += [("prefill", 8192, 34, "32/8x128", None), ("prefill", 2, 8192, "24/24x128", None)]
    expected += [("prefill", 4, 4096, f"32/8x{d}", None) for d in (80, 96, 128, 160)]
    assert core >= set(expected)
    assert {
        kind: (len(CORE[kind]), {r.family for r in CORE[kind] if r.plain or not r.page_size})
        for kind in ("append", "combine", "latent", "float8")
    } == {
        "append": (12, {"append"}),
        "combine": (6, {"combine"}),
        "latent": (22, set()),
        "float8": (15, {"float8 decode", "float8 prefill", "causal", "head dims"}),
    }


def test_every_row_is_consistent() -> None:
    for row in ALL:
        assert counters.mandatory_bytes(row) > 0, row.name
        assert counters.flops(row) > 0, row.name
        lens = zip(row.q_lens, row.k_lens, strict=True)
        assert all(0 < q <= k for q, k in lens), row.name
        assert counters.cache_bytes(row) <= 2 * workloads.MAX_CACHE_BYTES, row.name
        small = shrunk(row)
        assert max(small.k_lens) <= 64, row.name
        assert small.heads == row.heads, row.name


def test_a_row_runs_beside_the_one_it_is_compared_with() -> None:
    compared = [(kind, r) for kind, rows in CORE.items() for r in rows if r.plain]
    assert len(compared) == 9 + 8
    for kind, row in compared:
        plain = find(row.plain)
        assert plain in CORE[kind]
        assert (plain.q_lens, plain.k_lens, plain.heads) == (row.q_lens, row.k_lens, row.heads)


def test_select_searches_names_and_families() -> None:
    assert {r.page_size for r in workloads.select("decode", r"^16x8192\.32/8x128\.p\d+$")} == {
        1,
        16,
        64,
        128,
        256,
    }
    assert all(r.family == "skewed" for r in workloads.select("decode", "^skewed$"))
    assert workloads.select("decode", "no such row") == ()
    assert len(workloads.select("decode", wide=True)) > 100


@pytest.mark.parametrize("distribution", ["uniform", "longtail", "bimodal"])
def test_distributions_are_deterministic_and_bounded(distribution: str) -> None:
    make = getattr(workloads, distribution)
    lens = make(64, 8192, seed=3)
    assert lens == make(64, 8192, seed=3)
    assert len(lens) == 64
    assert 1 <= min(lens) <= max(lens) <= 8192


@given(st.integers(1, 100_000), st.integers(0, 5))
def test_lognormal_reaches_its_total_exactly(total: int, seed: int) -> None:
    lens = workloads.lognormal(total, seed)
    assert sum(lens) == total
    assert min(lens) >= 1


def test_page_tables_name_every_page_once() -> None:
    inputs = make_inputs(decode((33, 1, 64), LLAMA3_8B, page_size=16), CPU)
    table = inputs.page_table
    assert table is not None
    used = [table[i, : -(-k // 16)] for i, k in enumerate(inputs.row.k_lens)]
    pages = torch.cat(used).sort().values
    torch.testing.assert_close(pages, torch.arange(len(inputs.k), dtype=torch.int32))
    assert not torch.equal(torch.cat(used), pages)  # shuffled


def tiny(row: Workload, device: str = "cpu") -> Inputs:
    small = dataclasses.replace(shrunk(row, top=24), dtype="float32")
    return make_inputs(small, torch.device(device))


def dense_mask(row: Workload, index: int) -> torch.Tensor:
    q_len, k_len = row.q_lens[index], row.k_lens[index]
    left, right = counters.bounds(row)
    distance = torch.arange(k_len) - torch.arange(k_len - q_len, k_len)[:, None]
    mask = torch.ones_like(distance, dtype=torch.bool)
    if left is not None:
        mask &= distance >= -left
    if right is not None:
        mask &= distance <= right
    return mask


@pytest.mark.parametrize(
    "name",
    [
        "skew32.32/8x128.p16",
        "16x8192.32/8x128.p16.q4",
        "16x32768.32/8x128.p16.w1024",
        "1x16384.64/8x64.full",
        "1x8192.16/16x192,128",
        "2x8192.24/24x128.full.dense",
        "chunk.1x1024of4096.32/8x128.p64",
    ],
)
def test_the_judge_agrees_with_pytorch(name: str) -> None:
    inputs = tiny(find(name))
    row = inputs.row
    q = inputs.q.flatten(0, 1) if row.dense else inputs.q
    for index, (first, last, want) in enumerate(judge.expected(inputs)):
        k, v = judge.keys_of(inputs, index)
        out = torch.nn.functional.scaled_dot_product_attention(
            q[first:last].transpose(0, 1),
            k.transpose(0, 1),
            v.transpose(0, 1),
            attn_mask=dense_mask(row, index),
            enable_gqa=True,
        )
        torch.testing.assert_close(want, out.transpose(0, 1), rtol=1e-4, atol=1e-5)


def test_the_judge_works_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tiny(find("1x16384.32/8x128.w1024"))
    whole = torch.cat([want for _, _, want in judge.expected(inputs)])
    monkeypatch.setattr(judge, "SCORE_ELEMENTS", 32 * 24 * 5)
    pieces = list(judge.expected(inputs))
    assert len(pieces) > 1
    torch.testing.assert_close(torch.cat([want for _, _, want in pieces]), whole)


def test_the_judge_counts_a_sink_in_the_denominator_only() -> None:
    inputs = tiny(find("8x32768.64/8x64.p16.w128.sinks"))
    assert inputs.sinks is not None
    with_huge = dataclasses.replace(inputs, sinks=torch.full_like(inputs.sinks, 50.0))
    for _, _, want in judge.expected(with_huge):
        assert float(want.abs().max()) < 1e-6


def test_the_judge_rejects_a_wrong_row_and_a_nan() -> None:
    inputs = tiny(find("8x512.32/8x128.p16"))
    out = torch.cat([want for _, _, want in judge.expected(inputs)])
    assert judge.judge(inputs, out) <= 1e-6
    assert judge.judge(inputs, out, out) == 0
    wrong = out.clone()
    wrong[1, 3, 5] += 0.1 * wrong[1, 3].abs().max()
    assert judge.judge(inputs, wrong) > judge.budget(inputs)
    wrong[0, 0, 0] = math.nan
    assert judge.judge(inputs, wrong) == math.inf


@pytest.mark.parametrize(
    "name",
    [
        "giant64.32/8x128.p16",
        "16x8192.16/8x256.p16.cap50",
        "8x32768.64/8x64.p16.w1024.sinks",
        "ragged9.32/8x128",
        "2x8192.24/24x128.full.dense",
        "mixed.31x2048+2048of8192.32/8x128.p16",
    ],
)
def test_the_torch_backend_passes_the_judge(name: str) -> None:
    """The whole path of a row but for timing, on the backend that runs everywhere."""
    inputs = tiny(find(name))
    with triton_fa.strict():
        bound = bind(VARIANTS["torch"], inputs)
        out = bound.call(inputs)
    assert judge.judge(inputs, out) <= 1e-3


# Each form of the rows that append, score values, hold float8 numbers or merge.
OWN = [
    ("16x8192.32/8x128.p16.new1", "float16"),
    ("16x8192.32/8x128.p16.new1.halves", "float16"),
    ("16x8192.32/8x128.p16.new1.interleaved", "float32"),
    ("16x8192.16/1x64,512.p64.q2.qv", "float16"),
    ("16x8192.32/8x128.p16.kv-e4m3", "float16"),
    ("16x8192.32/8x128.p16.kv-e5m2", "float16"),
    ("1x16384.32/8x128.qkv-e4m3", "float8_e4m3fn"),
    ("combine.16x16x1.32x128", "float32"),
    ("combine.4x1x16384.32x128", "float16"),
]


@pytest.mark.parametrize("label", ["torch", "triton"])
@pytest.mark.parametrize(("name", "dtype"), OWN)
def test_own_backends_pass_the_judge(name: str, dtype: str, label: str, device: str) -> None:
    if label == "triton":
        pytest.importorskip("triton")
    row = dataclasses.replace(shrunk(find(name), top=24), dtype=dtype)
    inputs = make_inputs(row, torch.device(device))
    with triton_fa.strict():
        out = bind(VARIANTS[label], inputs).call(inputs)
    limit = judge.BUDGET if dtype.startswith("float8") else 2e-3
    assert judge.judge(inputs, out) <= limit
    assert judge.appended(inputs) <= 2e-3


def test_a_schedule_knows_of_new_keys() -> None:
    arguments = plan_arguments(tiny(find("16x8192.32/8x128.p16.new1")))
    assert arguments["max_seqlen_k_new"] == 1
    assert arguments["cache_seqlens"].tolist() == [23] * 4
    arguments = plan_arguments(tiny(find("16x8192.16/1x64,512.p64.qv")))
    assert (arguments["headdim"], arguments["headdim_v"]) == (64, 512)


def test_the_judge_knows_the_rotations_apart() -> None:
    inputs = tiny(find("16x8192.32/8x128.p16.new1.halves"))
    with triton_fa.strict():
        out = bind(VARIANTS["torch"], inputs).call(inputs)
    other = dataclasses.replace(inputs, row=dataclasses.replace(inputs.row, rotary="interleaved"))
    assert judge.judge(other, out) > judge.budget(inputs)
    assert judge.appended(other) > judge.budget(inputs)


@pytest.mark.parametrize("option", ["q_descale", "k_descale", "v_descale"])
def test_the_judge_needs_every_factor(option: str) -> None:
    inputs = make_inputs(shrunk(find("1x16384.32/8x128.qkv-e4m3"), top=24), CPU)
    with triton_fa.strict():
        out = bind(VARIANTS["torch"], inputs).call(inputs)
    options = {**inputs.options, option: 2 * inputs.options[option]}
    assert judge.judge(dataclasses.replace(inputs, options=options), out) > judge.FLOAT8_BUDGET


@pytest.mark.parametrize("name", ["1x16384.32/8x128.qkv-e4m3", "1x16384.16/8x256.qkv-e4m3"])
def test_the_float8_budget_is_for_weights_in_float8(name: str) -> None:
    """As FA3 computes: weights times 2**8 in e4m3, their sum in float32."""
    inputs = make_inputs(shrunk(find(name)), CPU)
    q, (k, v) = judge.queries_of(inputs, 0), judge.keys_of(inputs, 0)
    heads = inputs.row.heads
    scores = torch.einsum("nhgd,khd->hgnk", q.unflatten(1, (heads.kv, -1)), k) * heads.dim**-0.5
    scores.masked_fill_(~dense_mask(inputs.row, 0), -math.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    rounded = (256 * weights).to(torch.float8_e4m3fn).float() / 256
    shares = rounded / weights.sum(-1, keepdim=True)
    out = torch.einsum("hgnk,khd->nhgd", shares, v).flatten(1, 2).bfloat16()
    assert judge.BUDGET < judge.judge(inputs, out) < judge.FLOAT8_BUDGET / 2


def test_a_copied_latent_cache_is_one_cache() -> None:
    inputs = tiny(find("1x2048.16/1x64,512.p64.qv"))
    copy = inputs.other_cache()
    for x in (inputs, copy):
        assert x.k.untyped_storage().data_ptr() == x.v.untyped_storage().data_ptr()
        assert x.k.stride() == x.v.stride() == (16 * 576, 576, 576, 1)
    assert copy.k.data_ptr() != inputs.k.data_ptr()
    assert torch.equal(copy.k, inputs.k)
    assert torch.equal(copy.v, inputs.v)


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> Flusher:
    """A device to measure on that has no clock: every call runs once and takes 7 µs."""

    def once(
        calls: dict[str, Any], flush: Any, bursts: int, after_burst: Callable[[], object]
    ) -> dict[str, tuple[float, ...]]:
        flush()
        for call in calls.values():
            call()
        for _ in range(bursts):
            after_burst()
        return {label: (7.0,) * bursts for label in calls}

    monkeypatch.setattr("bench.measure.interleaved", once)
    monkeypatch.setattr("bench.measure.clock_and_power", lambda: {"mhz": 1980, "watts": 600.0})
    return Flusher("cpu", size=1024)


def test_a_row_is_checked_timed_and_reported(untimed: Flusher) -> None:
    row = dataclasses.replace(shrunk(find("8x512.32/8x128.p16"), top=24), dtype="float32")
    done = measure(row, ["torch", "3"], untimed, bursts=3)
    outcome = done.outcomes["torch"]
    assert outcome.correct
    assert outcome.against == "fp32"
    assert outcome.times.clean == outcome.times.dirty == (7.0,) * 3
    assert outcome.times.chain == (7.0 / 20,) * 3
    assert done.outcomes["3"].skipped
    assert report.summary([done], ["torch", "3"]).count("skipped") == 1


def test_who_does_not_append_is_wrong_even_after_one_who_did(
    untimed: Flusher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`triton` is a stand-in that reads the slot of the new key and writes nothing there."""

    def lazy(variant: Variant, inputs: Inputs) -> Bound:
        if variant.label == "torch":
            return bind(variant, inputs)
        plain = dataclasses.replace(inputs.row, new=0)
        longer = inputs.seqused_k + 1
        cached = dataclasses.replace(inputs, row=plain, seqused_k=longer, options={})
        bound = bind(VARIANTS["torch"], cached)
        return Bound(lambda x: bound.call(cached), None)

    monkeypatch.setattr("bench.measure.bind", lazy)
    row = shrunk(find("16x8192.32/8x128.p16.new1"), top=24)
    done = measure(dataclasses.replace(row, dtype="float32"), ["torch", "triton"], untimed, 1)
    assert done.outcomes["torch"].correct
    assert done.failed == ["triton"]


def test_a_baseline_that_does_not_append_judges_nobody(
    untimed: Flusher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`3` is a stand-in that returns what `torch` does and then loses the new key."""

    def losing(variant: Variant, inputs: Inputs) -> Bound:
        bound = bind(VARIANTS["torch"], inputs)

        def call(x: Inputs) -> torch.Tensor:
            out = torch.full_like(bound.call(x), math.nan)
            x.forget_new()
            return out

        return bound if variant.label == "torch" else Bound(call, None)

    monkeypatch.setattr("bench.measure.bind", losing)
    row = shrunk(find("16x8192.32/8x128.p16.new1"), top=24)
    done = measure(dataclasses.replace(row, dtype="float32"), ["torch", "3"], untimed, 1)
    assert done.failed == ["3"]
    assert done.outcomes["torch"].against == "fp32"


def test_ways_of_merging_that_are_absent_are_named(
    untimed: Flusher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(combine, "PEERS", dict.fromkeys(("3", "4"), "no_such_module"))
    row = shrunk(find("combine.4x16x1.32x128"), top=24)
    labels = parse(["combine"]).labels
    assert labels == ["triton", "torch", "3", "4"]
    done = measure(row, [*labels[1:], "sdpa"], untimed, bursts=1)
    assert done.outcomes["torch"].correct
    text = report.summary([done], labels[1:])
    for label in ("3", "4"):
        assert f"! {label}: ver={label}" in text
        assert (
            "no_such_module.flash_attn_combine: ModuleNotFoundError" in done.outcomes[label].skipped
        )
    assert "merging partial results" in done.outcomes["sdpa"].skipped


@pytest.mark.parametrize("label", ["3", "4"])
def test_a_peer_that_merges_is_judged(
    label: str, untimed: Flusher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that offers FlashAttention's function, right and then wrong."""
    peer = ModuleType("a_peer")
    vars(peer)["flash_attn_combine"] = triton_fa.flash_attn_combine
    monkeypatch.setitem(sys.modules, "a_peer", peer)
    monkeypatch.setitem(combine.PEERS, label, "a_peer")
    monkeypatch.setattr("bench.measure.capture", lambda calls: SimpleNamespace(replay=lambda: None))
    row = shrunk(find("combine.4x16x1.32x128"), top=24)
    assert measure(row, [label], untimed, bursts=1).outcomes[label].correct
    vars(peer)["flash_attn_combine"] = lambda out, lse, out_dtype: (out[0].to(out_dtype), lse[0])
    assert measure(row, [label], untimed, bursts=1).failed == [label]


@pytest.mark.parametrize(
    ("label", "name", "reason"),
    [
        *(
            (label, name, reason)
            for label in ("sdpa", masked.LABEL, vllm_triton.LABEL, vllm_triton.CAPTURED)
            for name, reason in (
                ("16x8192.32/8x128.p16.new1.halves", "k; rotary_cos; rotary_sin; v"),
                ("1x16384.32/8x128.qkv-e4m3", "k_descale; q_descale; v_descale"),
            )
        ),
        ("sdpa", "16x8192.16/1x64,512.p64.qv", "qv"),
        (masked.LABEL, "16x8192.16/1x64,512.p64.qv", "qv"),
    ],
)
def test_peers_refuse_what_they_are_not_given(label: str, name: str, reason: str) -> None:
    inputs = make_inputs(shrunk(find(name), top=24), CPU)
    with pytest.raises(triton_fa.UnsupportedError, match=reason):
        bind(VARIANTS[label], inputs)


def test_what_a_row_adds_is_said_for_each_backend() -> None:
    plain, row = "16x8192.32/8x128.p16", "16x8192.32/8x128.p16.new1"
    text = report.summary([measured(plain, 130, 120), measured(row, 132.5, 160)], ["triton", "3"])
    assert f"{row}, triton: +2.50 µs, 0.98 x {plain}" in text
    assert f"{row}, 3: +40.00 µs, 0.75 x {plain}" in text
    assert f"{row}, 4" not in text
    assert f"x {plain}" not in report.summary([measured(row, 132.5, 160)], ["triton", "3"])


def test_a_result_row_holds_rates_and_the_state_of_the_gpu(untimed: Flusher) -> None:
    row = dataclasses.replace(shrunk(find("8x512.32/8x128.p16"), top=24), dtype="float32")
    done = json.loads(json.dumps(as_json(measure(row, ["torch"], untimed, bursts=3))))
    found = done["variants"]["torch"]
    assert found["tb_per_s"] == pytest.approx(counters.mandatory_bytes(row) / 7e6)
    assert found["tflop_per_s"] == pytest.approx(counters.flops(row) / 7e6)
    assert done["gpu"].keys() == {"before", "bursts", "after"}
    assert done["gpu"]["bursts"] == {
        column: [{"mhz": 1980, "watts": 600.0}] * 3 for column in ("clean", "dirty", "chain")
    }


def test_a_result_row_holds_the_schedule_and_the_first_call(
    untimed: Flusher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backends that schedule need a GPU: a plan that costs nothing stands in."""
    monkeypatch.setattr("bench.measure.single", lambda label, calls: calls[0])
    monkeypatch.setattr(
        "bench.measure.bind",
        lambda variant, inputs: dataclasses.replace(bind(variant, inputs), plan=torch.Tensor),
    )
    row = dataclasses.replace(shrunk(find("8x512.32/8x128.p16"), top=24), dtype="float32")
    done = json.loads(json.dumps(as_json(measure(row, ["torch"], untimed, bursts=2))))
    found = done["variants"]["torch"]
    assert found["schedule_us"] == [7.0, 7.0]
    assert 0 < found["first_call_s"] < 60
    assert found["compile_s"] is None


def test_the_workspace_is_what_is_allocated_beside_the_output(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The allocator counts in 512 bytes: an output of 400 takes 512."""
    memory = {"memory_allocated": 1000, "max_memory_allocated": 1000 + 512}
    for name, value in memory.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda value=value: value)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda: None)
    assert workspace_bytes(lambda: torch.zeros(100)) == 0
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 1000 + 512 + 4096)
    assert workspace_bytes(lambda: torch.zeros(100)) == 4096


def test_compilations_are_those_that_no_cache_had() -> None:
    triton = pytest.importorskip("triton")
    before = triton.knobs.compilation.listener
    with compilations() as seen:
        listener = triton.knobs.compilation.listener
        about = {"src": None, "metadata": {"name": "merge_kernel"}}
        listener(times=SimpleNamespace(total=2_500_000), cache_hit=False, **about)
        listener(times=SimpleNamespace(total=1_000), cache_hit=True, **about)
    assert seen == [("merge_kernel", 2.5)]
    assert triton.knobs.compilation.listener is before


def test_the_gpu_is_read_after_each_burst_and_not_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def burst(calls: dict[str, Any], flush: Any, samples: int) -> dict[str, float]:
        seen.append("burst")
        return dict.fromkeys(calls, 5.0)

    monkeypatch.setattr(timing, "burst", burst)
    times = timing.interleaved({"a": print}, print, 2, lambda: seen.append("read"))
    assert times == {"a": (5.0, 5.0)}
    assert seen == ["burst", "burst", "read", "burst", "read"]


def test_a_schedule_alone_has_no_rate() -> None:
    done = measured("plan.8.32/8x128.p16", 10, 20)
    assert done.terabytes(10.0) is None
    assert done.teraflops(10.0) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to ask")
def test_without_a_gpu_there_is_no_clock_and_no_launch() -> None:
    assert clock_and_power() is None
    assert launches(lambda: None) is None


def test_launches_are_the_nodes_of_a_graph() -> None:
    def nodes(graph: Any, found: Any, count: Any) -> int:
        assert graph.value == 0x1234
        assert found is None
        count._obj.value = 3
        return 0

    assert graph_nodes(0x1234, SimpleNamespace(cuGraphGetNodes=nodes)) == 3
    with pytest.raises(AssertionError, match="cuGraphGetNodes: 1"):
        graph_nodes(0x1234, SimpleNamespace(cuGraphGetNodes=lambda graph, found, count: 1))


def test_a_step_says_what_a_layer_launches(
    untimed: Flusher, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured: list[int] = []

    def capture(calls: list[Callable[[], object]]) -> SimpleNamespace:
        captured.append(len(calls))
        return SimpleNamespace(replay=lambda: None)

    monkeypatch.setattr("bench.measure.capture", capture)
    monkeypatch.setattr("bench.measure.launches", lambda call: 2)
    monkeypatch.setitem(VARIANTS, "torch", dataclasses.replace(VARIANTS["torch"], captured=True))
    row = shrunk(find("1x8192.32/8x128.p16.layers64"), top=24)
    row = dataclasses.replace(row, dtype="float32", layers=3)
    done = measure(row, ["torch"], untimed, bursts=1)
    assert captured == [3]
    text = report.summary([done], ["torch"])
    assert f"{row.name}, torch: 2 launches a layer, 0 for the shared schedule" in text
    assert json.loads(json.dumps(as_json(done)))["variants"]["torch"]["launches"] == 2


def test_a_step_compares_shared_schedules_with_one_per_layer() -> None:
    assert parse(["step"]).labels == ["triton", "triton-nometa", "3", "3-nometa", "4"]


def test_a_run_that_dies_keeps_the_rows_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = workloads.select("decode", "^1x1024|^8x512")
    path = tmp_path / "new" / "result.json"

    def one_then_killed(row: Workload, *_: Any, **__: Any) -> Measurement:
        if path.exists():
            raise KeyboardInterrupt
        return measured(row.name, 10, 20)

    monkeypatch.setattr("bench.__main__.measure", one_then_killed)
    monkeypatch.setattr("bench.__main__.Flusher", lambda: None)
    with pytest.raises(KeyboardInterrupt):
        run_rows(rows, parse(["decode"]), lambda done: write(path, {}, done, len(rows)))
    content = json.loads(path.read_text())
    assert [row["name"] for row in content["rows"]] == [rows[0].name]
    assert content["rows_asked"] == len(rows) == 3
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


def test_a_wrong_variant_is_not_timed(untimed: Flusher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "BUDGET", -1.0)
    row = dataclasses.replace(shrunk(find("8x512.32/8x128.p16"), top=24), dtype="float32")
    done = measure(row, ["torch"], untimed, bursts=3)
    assert done.failed == ["torch"]
    assert done.outcomes["torch"].times == Times()


def test_ratios_are_taken_within_bursts() -> None:
    base, ours = (10.0, 20.0, 30.0), (5.0, 10.0, 30.0)
    assert ratio(base, ours) == 2.0
    assert ratio((), ours) is None
    assert Times(clean=base).best("clean") == 20.0
    assert Times().best("chain") is None


def test_a_chain_rotates_over_more_than_the_l2() -> None:
    for size in (1, 2**20, 8 * 2**20, 64 * 2**20):
        copies = copies_for(size)
        assert 2 <= copies <= 20
        assert copies == 20 or copies * size >= ROTATION_BYTES


def measured(name: str, ours: float, base: float) -> Measurement:
    row = find(name)
    chain = (base / 4,) * 3 if row.family == "small" else ()
    outcomes = {
        "triton": Outcome(Times((ours,) * 3, chain=chain), deviation=0.001, correct=True),
        "3": Outcome(Times((base,) * 3, chain=chain)),
        "4": Outcome(skipped="not installed"),
    }
    return Measurement(row, outcomes, counters.mandatory_bytes(row), counters.flops(row))


def test_the_table_shows_times_rates_ratios_and_what_is_missing() -> None:
    rows = [measured("1x1024.32/8x128.p16", 10, 20), measured("16x8192.32/8x128.p16", 130, 130)]
    text = report.summary(rows, ["triton", "3", "4"])
    first = next(line for line in text.splitlines() if line.startswith("1x1024"))
    assert "2.00" in first
    assert "0.42 TB" in first
    assert "skipped" in first
    assert "triton over 3, clean, all rows: geometric mean 1.414, least 1.00, 2 rows" in text
    assert "clean, rows up to 150 MB: geometric mean 2.000" in text
    assert "triton over 3, chain, all rows: geometric mean 1.000, least 1.00, 1 rows" in text
    assert "! 4: not installed (1x1024.32/8x128.p16 and 1 more)" in text
    assert max(map(len, text.splitlines())) < 200


def test_a_wrong_row_is_said_and_recorded() -> None:
    row = measured("1x1024.32/8x128.p16", 10, 20)
    row.outcomes["triton"].correct = False
    assert "WRONG" in report.summary([row], ["triton", "3", "4"])
    assert row.failed == ["triton"]
    assert json.loads(json.dumps(as_json(row)))["variants"]["triton"]["correct"] is False


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["decode", "--backend", "triton,3"]).labels == ["triton", "3"]
    with pytest.raises(SystemExit):
        parse(["decode", "--backend", "fa2"])
    assert main(["prefill", "--rows", "ragged9", "--list"]) == 0
    assert capsys.readouterr().out.split() == ["ragged9.32/8x128"]
    assert main(["decode", "--rows", "no such row"]) == 2
    for kind in ("append", "combine", "latent", "float8"):
        assert main([kind, "--list"]) == 0
        assert capsys.readouterr().out.split() == [row.name for row in CORE[kind]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_without_a_gpu_nothing_is_claimed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decode", "--rows", "1x1024"]) == 3
    assert "nothing was measured" in capsys.readouterr().err


def test_committed_results_name_their_rows_and_origin() -> None:
    """A result of other kernel sources is history, not wrong: it warns, it does not fail."""
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        content = json.loads(path.read_text())
        where = content["environment"]
        for label in ("gpu", "nvidia_smi", "torch", "triton", "commit", "command", "date"):
            assert where[label], (path.name, label)
        for row in content["rows"]:
            find(row["name"])
        if where["kernel_digest"] != kernel_digest():
            warnings.warn(f"{path.name} was measured with other kernel sources", stacklevel=1)


def test_mutating_a_prefill_helper_would_show() -> None:
    row = prefill([128, 64], LLAMA3_8B)
    assert row.q_lens == row.k_lens == (128, 64)
    assert row.layout == "packed"
    assert find("2x8192.32/8x128.p16").layout == "paged"
    assert find("2x8192.24/24x128.full.dense").layout == "dense"


def test_backends_may_be_a_list_or_given_several_times() -> None:
    assert parse(["decode", "--backend", "triton,3"]).labels == ["triton", "3"]
    assert parse(["decode", "--backend", "triton", "--backend", "3"]).labels == ["triton", "3"]
    assert parse(["decode"]).labels == ["triton", "3", "4"]


@pytest.mark.parametrize("processes", [1, 3, 100])
def test_compiling_ahead_covers_every_row_once(processes: int) -> None:
    rows = workloads.select("decode", "", False)
    found: list[str] = []
    for command in commands("decode", "core", rows, ["triton", "3"], processes):
        options = parse(command[3:])
        assert options.compile_only
        assert options.labels == ["triton"]
        found += [row.name for row in workloads.select("decode", options.rows, False)]
    assert sorted(found) == sorted(row.name for row in rows)


def test_nothing_is_compiled_ahead_of_peers_without_triton() -> None:
    rows = workloads.select("decode", "", False)
    assert commands("decode", "core", rows, ["3", "4", "torch", "sdpa"], 4) == []
    for command in commands("decode", "core", rows, ["3", "triton-inv", "vllm-triton"], 2):
        assert parse(command[3:]).labels == ["triton-inv", "vllm-triton"]


@needs_vllm
@pytest.mark.parametrize(
    "name",
    [
        "giant64.32/8x128.p16",
        "16x8192.16/8x256.p16.cap50",
        "8x32768.64/8x64.p16.w1024.sinks",
        "8x4096.64/8x64.p16.q2",
        "mixed.31x2048+2048of8192.32/8x128.p16",
    ],
)
def test_vllms_kernel_agrees_with_the_reference(name: str, device: str) -> None:
    x = tiny(find(name), device)
    want, _ = reference_attention(
        x.q,
        x.k,
        x.v,
        cache_seqlens=x.seqused_k,
        page_table=x.page_table,
        cu_seqlens_q=x.cu_seqlens_q,
        causal=x.row.causal,
        window_size=x.row.window,
        softcap=x.row.softcap,
        sinks=x.sinks,
    )
    out = bind(VARIANTS["vllm-triton"], x).call(x)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-3 if device == "cuda" else 1e-5)
    assert not [module for module in sys.modules if module.split(".")[0] == "vllm"]


@needs_vllm
@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("16x8192.16/1x64,512.p64.qv", vllm_triton.LABEL),
        ("16x8192.16/1x64,512.p64.q2.qv", vllm_triton.CAPTURED),
        ("16x8192.16/1x64,512.p64.q4.qv", vllm_triton.LABEL),
        ("16x8192.128/1x64,512.p64.qv", vllm_triton.CAPTURED),
    ],
)
def test_vllms_latent_kernel_is_right(name: str, label: str, device: str) -> None:
    """Its queries of one sequence are rows of their own, on the cache as an engine holds it."""
    row = shrunk(find(name), top=24)
    row = dataclasses.replace(row, k_lens=(24, 9, 17, 4), dtype="float32")
    inputs = make_inputs(row, torch.device(device))
    bound = bind(VARIANTS[label], inputs)
    limit = 1e-2 if device == "cuda" else 1e-5
    assert judge.judge(inputs, bound.call(inputs)) <= limit
    other = inputs.other_cache()
    inputs.k.fill_(math.nan)
    inputs.v.fill_(math.nan)
    assert judge.judge(other, bound.call(other)) <= limit
    assert not [module for module in sys.modules if module.split(".")[0] == "vllm"]


def test_vllm_splits_latent_keys_by_the_longest_sequence() -> None:
    lengths = (1, 511, 1024, 2048, 8192, 32768, vllm_triton.MODEL_KEYS)
    found = [vllm_triton.latent_splits(length, 132) for length in lengths]
    assert found == [1, 1, 2, 4, 16, 64, 264]


def test_vllms_latent_call_is_as_its_backend_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels are given, in stand-ins' hands: this needs no file of vLLM's."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    module = SimpleNamespace(decode_attention_fwd=lambda *a, **k: seen.append((a, k)))
    monkeypatch.setattr(vllm_triton, "load", lambda name: module)
    monkeypatch.setattr(vllm_triton, "multiprocessors", lambda device: 132)
    row = shrunk(find("16x8192.16/1x64,512.p64.q2.qv"), top=24)
    row = dataclasses.replace(row, k_lens=(24, 9, 17, 2048))
    inputs = make_inputs(row, CPU)
    out = bind(VARIANTS[vllm_triton.LABEL], inputs).call(inputs)
    bind(VARIANTS[vllm_triton.CAPTURED], inputs).call(inputs)
    (given, named), (captured, _) = seen
    q, cache, values, written, lse, table, lens, parts, splits, scale, page_size = given
    assert q.equal(torch.cat([inputs.options["qv"], inputs.q], dim=-1))
    assert cache[..., :512].equal(inputs.v)
    assert cache[..., 512:].equal(inputs.k)
    assert values.data_ptr() == cache.data_ptr() == inputs.v.data_ptr()
    assert out is written
    assert out.shape == (8, 16, 512)
    assert lse.shape == (8, 16)
    assert table.equal(inputs.page_table.repeat_interleave(2, 0))
    assert lens.tolist() == [23, 24, 8, 9, 16, 17, 2047, 2048]
    assert parts.shape == (8, 16, splits, 513)
    assert (splits, captured[8]) == (4, 264)
    assert scale == 576**-0.5
    assert page_size == 16
    assert named["is_mla"]
    assert named["k_scale"] == named["v_scale"] == 1


@needs_vllm
def test_vllms_kernels_compile_for_hopper() -> None:
    """In a process of its own: where these tests run, jit functions are the interpreter's."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {tuple(line.split()) for line in done.stdout.splitlines()}
    assert found == {
        ("kernel_unified_attention", "split"),
        ("kernel_unified_attention", "whole"),
        ("reduce_segments", "-"),
        ("_fwd_grouped_kernel_stage1", "-"),
        ("_fwd_kernel_stage2", "-"),
    }


def compile_vllm() -> None:
    """Compile what vLLM's function launches for decode and prefill rows, and print it."""
    from triton.backends.compiler import GPUTarget

    from tests.portability.compiler import recorded
    from triton_fa.kernels.launch import cross_compile

    names = ["16x8192.32/8x128.p16", "8x4096.64/8x64.p16.q8", "2x8192.32/8x128.p64"]
    with recorded() as launches:
        for name in (*names, "16x8192.128/1x64,512.p64.qv"):
            inputs = make_inputs(shrunk(find(name)), CPU)
            bind(VARIANTS["vllm-triton"], inputs).call(inputs)
    for launch in launches:
        cross_compile(launch.kernel, (), launch.values, launch.options, GPUTarget("cuda", 90, 32))
        path = {None: "-", True: "split", False: "whole"}[launch.values.get("IS_3D")]
        sys.stdout.write(f"{launch.kernel.__name__} {path}\n")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("2x8192.32/8x128", "not paged"),
        ("16x8192.32/8x128.p1", "multiple of 16"),
        ("16x8192.32/8x128.p16.lse", "the lse"),
    ],
)
def test_what_vllm_does_not_do_is_refused_by_name(name: str, reason: str) -> None:
    for label in (vllm_triton.LABEL, vllm_triton.CAPTURED):
        with pytest.raises(triton_fa.UnsupportedError, match=f"'{label}' .*{reason}"):
            bind(VARIANTS[label], tiny(find(name)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"page_size": 8}, "multiple of 16"),
        ({"window": (64, 0)}, "windows"),
        ({"softcap": 2.0}, "softcap"),
        ({"sinks": True}, "sinks"),
        ({"return_lse": True}, "the lse"),
        ({"causal": False}, "not causal"),
        ({"q_lens": (1, 2, 1, 1)}, "several lengths"),
    ],
)
@pytest.mark.parametrize("label", [vllm_triton.LABEL, vllm_triton.CAPTURED])
def test_what_vllms_latent_kernel_does_not_do_is_refused_by_name(
    label: str, changes: dict[str, Any], reason: str
) -> None:
    row = shrunk(find("16x8192.16/1x64,512.p64.qv"), top=24)
    inputs = make_inputs(dataclasses.replace(row, **changes), CPU)
    with pytest.raises(triton_fa.UnsupportedError, match=f"'{label}' .*{reason}"):
        bind(VARIANTS[label], inputs)


def test_vllm_captures_only_latent_rows_otherwise() -> None:
    with pytest.raises(triton_fa.UnsupportedError, match="score no values, which vllm-triton"):
        bind(VARIANTS[vllm_triton.CAPTURED], tiny(find("16x8192.32/8x128.p16")))


def test_vllm_splits_for_batches_that_it_captures() -> None:
    assert [vllm_triton.split_threshold(heads) for heads in (1, 8, 24, 96)] == [128, 16, 4, 1]


@pytest.mark.parametrize("name", ["8x512.32/8x128.p16", "16x8192.16/1x64,512.p64.qv"])
def test_files_that_were_not_fetched_are_one_skipped_variant(
    name: str, untimed: Flusher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_triton, "FOLDER", tmp_path)
    vllm_triton.load.cache_clear()
    row = dataclasses.replace(shrunk(find(name), top=24), dtype="float32")
    done = measure(row, ["vllm-triton"], untimed, bursts=1)
    assert "`python -m bench.fetch_vllm` fetches it" in done.outcomes["vllm-triton"].skipped


def test_fetching_takes_these_files_out_of_a_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("remotezip")
    from bench import fetch_vllm

    def a_wheel(scratch: Path) -> ZipFile:
        with ZipFile(scratch / "a.whl", "w") as wheel:
            for name in (*vllm_triton.FILES, "vllm/large.so"):
                wheel.writestr(name, "content")
        return ZipFile(scratch / "a.whl")

    monkeypatch.setattr(fetch_vllm, "open_wheel", a_wheel)
    for module in (fetch_vllm, vllm_triton):
        monkeypatch.setattr(module, "FOLDER", tmp_path)
    assert vllm_triton.missing() == list(vllm_triton.FILES)
    fetch_vllm.main()
    assert vllm_triton.missing() == []
    assert not (tmp_path / "vllm" / "large.so").exists()


@pytest.mark.parametrize(
    "name",
    [
        "1x16384.32/8x128",
        "16x1024.32/8x128",
        "2x8192.24/24x128.full.dense",
        "1x8192.16/16x192,128",
    ],
)
def test_sdpa_is_the_same_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic of the call; cuDNN itself needs a GPU."""
    monkeypatch.setattr(sdpa, "BACKEND", SDPBackend.MATH)
    inputs = tiny(find(name))
    assert judge.judge(inputs, bind(VARIANTS["sdpa"], inputs).call(inputs)) <= 1e-4


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("16x8192.32/8x128.p16", "paged cache"),
        ("ragged9.32/8x128", "several lengths"),
        ("1x16384.32/8x128.w1024", "windows"),
        ("2x8192.64/8x64.w128.sinks", "sinks"),
        ("1x16384.16/8x256.w4096.cap50", "softcap"),
    ],
)
def test_what_sdpa_does_not_do_is_refused_by_name(name: str, reason: str) -> None:
    with pytest.raises(triton_fa.UnsupportedError, match=f"sdpa.*{reason}"):
        bind(VARIANTS["sdpa"], tiny(find(name)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuDNN may take this")
def test_cudnn_is_never_replaced_by_another_backend() -> None:
    with pytest.raises(triton_fa.UnsupportedError, match="cuDNN"):
        bind(VARIANTS["sdpa"], tiny(find("1x16384.32/8x128")))


if __name__ == "__main__":
    compile_vllm()


@pytest.mark.parametrize("name", ["1x16384.32/8x128", "16x1024.32/8x128", "ragged9.32/8x128"])
def test_causality_as_a_function_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masked, "BLOCK", 16)
    inputs = tiny(find(name))
    assert judge.judge(inputs, bind(VARIANTS[masked.LABEL], inputs).call(inputs)) <= 1e-4


def test_causal_lists_hold_half_of_the_blocks() -> None:
    lists = masked.causal_blocks(find("1x16384.32/8x128"), torch.device("cpu"))
    assert lists.full_block_cnt is not None
    assert lists.mask_block_cnt.tolist() == [[[1] * 128]]
    assert lists.full_block_cnt.tolist() == [[[*range(128)]]]


@pytest.mark.parametrize("name", ["16x8192.32/8x128.p16", "1x16384.32/8x128.full"])
def test_rows_that_are_not_just_causal_are_refused(name: str) -> None:
    with pytest.raises(triton_fa.UnsupportedError, match="only causal rows over packed keys"):
        bind(VARIANTS[masked.LABEL], tiny(find(name)))

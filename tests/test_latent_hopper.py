"""The Hopper kernel of latent decode against the float64 reference: emulated on a CPU, see
`test_hopper.py`; on a GPU of compute capability 9.0 the same cases run on it."""

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import triton_fa
from bench.timing import capture
from parity_tests.cases import Case
from parity_tests.runners import Prepared
from tests import gluon_on_cpu
from tests.portability.cases import latent as latent_call
from tests.test_hopper import agrees, cross_compiled, flat
from triton_fa import api
from triton_fa.device import DeviceFacts
from triton_fa.env import settings
from triton_fa.kernels import hopper_plans, latent_plans, line, plans, primitives
from triton_fa.problem import Problem

hopper = hopper_plans.kernel_module()
latent = latent_plans.kernel_module()
for module in (hopper, latent):
    if isinstance(module, str):
        pytest.skip(f"this Triton's Gluon has other names: {module}", allow_module_level=True)

PROGRAMS = 4  # of the emulated chip

launched: list[tuple[int, int, int]] = []


def emulated(kernel: hopper_plans.Described, grid: tuple[int, int, int]) -> Callable[..., None]:
    """In place of a launch: run the kernel's source."""

    def launch(*given: Any, **options: Any) -> None:
        described, rest = given[: len(kernel._tensors)], given[len(kernel._tensors) :]
        names = kernel._kernel.arg_names
        arguments: dict[str, Any] = {}
        for name, view in zip(names, kernel._views, strict=False):
            arguments[name] = None
            if view is not None:
                array = flat(described[view.tensor])
                arguments[name] = gluon_on_cpu.Descriptor(
                    array, view.shape, view.strides, list(view.block), view.dtype.itemsize
                )
        for name, value in zip(names[len(kernel._views) :], rest, strict=True):
            if isinstance(value, torch.Tensor):
                arguments[name] = gluon_on_cpu.Pointer(flat(value))
            else:
                is_number = isinstance(value, int | float)
                arguments[name] = gluon_on_cpu.Tensor(value) if is_number else value
        launched.append(grid)
        modules = (primitives, line, hopper)
        gluon_on_cpu.run(latent, modules, arguments, grid[0], seed=7, name="latent_kernel")

    return launch


@pytest.fixture
def on_hopper(fresh: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Calls are planned for Hopper and run on its kernel, or an emulation of it."""
    fresh.setenv("TRITON_FA_HOPPER", "1")
    if torch.cuda.is_available():
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs compute capability 9.0")
        real = latent_plans.launch

        def spy(*given: Any, **named: Any) -> Any:
            launched.append((0, 0, 0))
            return real(*given, **named)

        fresh.setattr(latent_plans, "launch", spy)
    else:
        facts = DeviceFacts("cuda", (9, 0), PROGRAMS, 227 << 10)
        fresh.setattr("triton_fa.device.facts", lambda device: facts)
        fresh.setattr(hopper_plans, "INTERPRETED", False)
        fresh.setattr(hopper_plans.Described, "__getitem__", emulated)
        # All rows in one program of the merge: what takes long is Triton's interpreter.
        fresh.setattr(plans, "_merge_shape", lambda pieces, rows, columns, batch: (8, rows, 1))
    launched.clear()
    yield fresh
    assert launched, "the Hopper kernel was not chosen"


LATENT = Case(
    entry="kvcache",
    dtype="float16",
    heads_q=5,
    heads_kv=1,
    head_dim=64,
    head_dim_v=512,
    page_size=64,
    causal=True,
    lse=True,
    qv=True,
    seqlens_q=(1, 1, 1),
    seqlens_k=(150, 1, 65),
    pad_k=33,
    spare_pages=3,
)


@pytest.mark.parametrize("page_size", [1, 48, 96])
def test_pages(page_size: int, on_hopper: pytest.MonkeyPatch, device: str) -> None:
    agrees(LATENT.with_changes(page_size=page_size), device)


FEATURES: dict[str, dict[str, Any]] = {
    "tokens-packed": {"q_layout": "packed", "seqlens_q": (1, 0, 3)},
    "full": {"causal": False, "seqlens_q": (2, 2, 2), "lse": False},
    "lanes": {"heads_q": 66, "seqlens_k": (200, 1), "seqlens_q": (1, 1)},
    "no-keys": {"seqlens_k": (70, 0, 64)},
    "two-kv-heads": {"heads_q": 6, "heads_kv": 2},
    "only": {"only_qv": "unread"},
    "dense": {"kv_layout": "batched", "page_size": 0, "spare_pages": 0},
    "three-splits": {"num_splits": 3, "seqlens_k": (450, 1, 65)},
    "strided": {"out": True, "q_strided": True, "seqlens_q": (2, 2), "seqlens_k": (150, 65)},
    "strided-packed": {
        "out": True,
        "q_strided": True,
        "q_layout": "packed",
        "seqlens_q": (2, 1),
        "seqlens_k": (70, 65),
    },
    "heads-apart": {"heads_q": 4, "heads_kv": 2, "page_size": 16, "kv_strides": "sliced"},
}


@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str, on_hopper: pytest.MonkeyPatch, device: str) -> None:
    agrees(LATENT.with_changes(**FEATURES[name]), device)


def test_many_sequences(on_hopper: pytest.MonkeyPatch, device: str) -> None:
    """Several blocks of them, the last one not full."""
    on_hopper.setattr(plans, "_block_b", lambda batch: 32)
    lengths = tuple((1, 0, 70, 64, 3)[i % 5] for i in range(35))
    inputs = Latent(lengths, 3, 1, 64, torch.float16, device)
    for options in ({}, {"batch_invariant": True}):
        inputs.check(*inputs.call(**options))


@pytest.mark.parametrize("page", [1, 64])
def test_rows_of_odd_sizes(page: int, on_hopper: pytest.MonkeyPatch, device: str) -> None:
    """Multiples of 16 bytes, and of no more."""
    inputs = Latent((70, 3), 3, 1, page, torch.float16, device, row=584)
    inputs.check(*inputs.call())


# ---------------------------------------------------------------- inputs of one's own


class Latent:
    """Sequences over one latent cache, shuffled pages or dense; unused slots are NaN."""

    def __init__(
        self,
        lengths: tuple[int, ...],
        heads: int,
        q_len: int,
        page: int,
        dtype: torch.dtype,
        device: str,
        seed: int = 0,
        rise: float = 0.0,  # of the scores from one tile of 64 keys to the next, in base 2
        row: int = 576,  # elements between one row of the cache and the next
    ) -> None:
        rng = torch.Generator(device=device).manual_seed(seed)
        random = functools.partial(torch.randn, generator=rng, device=device)
        batch, most, self.scale = len(lengths), max(lengths), 576**-0.5
        self.q = random(batch, q_len, heads, 64).to(dtype)
        self.qv = random(batch, q_len, heads, 512).to(dtype)
        self.used = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.rows = [random(n, 576).to(dtype) for n in lengths]
        if rise:
            self.q[..., 0] = 1
            for rows in self.rows:
                tile = torch.arange(len(rows), device=device) // 64
                rows[:, 512] = (tile * rise * math.log(2) / self.scale).to(dtype)
        self.table = None
        shape = (batch, most + 5)
        if page:
            width = -(-most // page) + 1
            shape = (batch * width + 2, page)
            order = torch.randperm(shape[0], generator=rng, device=device)
            self.table = order[: batch * width].view(batch, width).int()
        self.cache = torch.full((*shape, 1, row), float("nan"), dtype=dtype, device=device)
        self.cache = self.cache[..., :576]
        for seq, rows in enumerate(self.rows):
            token = torch.arange(len(rows), device=device)
            if self.table is None:
                self.cache[seq, token, 0] = rows
            else:
                self.cache[self.table[seq].long()[token // page], token % page, 0] = rows

    def call(self, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seqs = options.pop("seqs", slice(None))
        return triton_fa.flash_attn_with_kvcache(  # type: ignore[return-value]
            self.q[seqs],
            self.cache[..., 512:],
            self.cache[..., :512],
            qv=self.qv[seqs],
            cache_seqlens=self.used[seqs],
            page_table=None if self.table is None else self.table[seqs],
            softmax_scale=self.scale,
            return_softmax_lse=True,
            **{"causal": True, "ver": "triton"} | options,
        )

    def check(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Against float64, for the lengths that `used` has now."""
        q_len = self.q.shape[1]
        limit = 8e-3 if out.dtype == torch.bfloat16 else 2e-3
        for seq, length in enumerate(self.used.tolist()):
            keys = self.rows[seq][:length].double()
            q = torch.cat([self.qv[seq], self.q[seq]], -1).double()
            scores = torch.einsum("qhd,kd->hqk", q, keys) * self.scale
            last = torch.arange(q_len, device=out.device)[:, None] + length - q_len
            hidden = torch.arange(length, device=out.device) > last
            scores = scores.masked_fill(hidden, -math.inf)
            weights = scores.softmax(-1).nan_to_num(0.0)
            want = torch.einsum("hqk,kd->qhd", weights, keys[:, :512])
            error = (out[seq].double() - want).abs().max()
            assert error <= limit * want.abs().max().clamp(min=1e-3), (seq, float(error))
            want_lse = scores.logsumexp(-1)
            torch.testing.assert_close(lse[seq].double(), want_lse, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rise", [5.0, 9.0])
def test_maxima_that_move_late(rise: float, on_hopper: pytest.MonkeyPatch, device: str) -> None:
    """Scores outgrow the maximum by less and by more than 2^8 from tile to tile."""
    inputs = Latent((200, 70), 3, 1, 64, torch.float16, device, rise=rise)
    inputs.check(*inputs.call(num_splits=1))


def test_batch_invariant_rows(on_hopper: pytest.MonkeyPatch, device: str) -> None:
    """A sequence alone, and among others: the same bits."""
    inputs = Latent((70, 600, 0), 3, 1, 64, torch.float16, device)
    out, lse = inputs.call(batch_invariant=True)
    inputs.check(out, lse)
    alone, lse_alone = inputs.call(batch_invariant=True, seqs=slice(1, 2))
    assert torch.equal(out[1:2], alone)
    assert torch.equal(lse[1:2], lse_alone)


def test_wrong_lengths_stay_inside(on_hopper: pytest.MonkeyPatch, device: str) -> None:
    """Lengths and pages that are nonsense; the emulation checks every address."""
    inputs = Latent((70, 130), 3, 1, 64, torch.float16, device)
    inputs.used.copy_(torch.tensor([2**30, -5]))
    assert inputs.table is not None
    inputs.table.random_(-(2**31), 2**31 - 1)
    inputs.call()


def test_warm_up_reaches_it(on_hopper: pytest.MonkeyPatch, device: str) -> None:
    done = triton_fa.warmup(
        5,
        1,
        64,
        head_dim_v=512,
        dtype=torch.float16,
        qv=True,
        page_size=64,
        max_batch=1,
        max_seqlen_k=64,
        device=device,
    )
    assert done == [(1, 1)]


# ---------------------------------------------------------------- the choice

H200 = DeviceFacts("cuda", (9, 0), 132, 227 << 10)


@pytest.mark.skipif(torch.cuda.is_available(), reason="plans for chips that are not here")
@pytest.mark.parametrize(
    ("changes", "options", "reason"),
    [
        ({}, {}, None),
        ({"heads_q": 16}, {}, "16 rows"),
        ({"heads_q": 16}, {"TRITON_FA_HOPPER": "1"}, None),
        ({"heads_q": 32}, {}, None),
        ({"heads_q": 16, "seqlens_q": (3, 3, 3)}, {}, None),
        ({"heads_q": 16, "seqlens_q": (3, 3, 3)}, {"batch_invariant": True}, "16 rows"),
        ({"head_dim": 128}, {"TRITON_FA_HOPPER": "1"}, "head dims 128, 512"),
        ({"head_dim": 128}, {}, "head dims 128, 512"),
        ({"softcap": 20.0}, {}, "softcap"),
        ({"window": (40, 0)}, {}, "rows do not see the first keys"),
        ({"softmax_scale": -1.0}, {}, "softmax_scale < 0"),
        ({"dtype": "float32"}, {}, "torch.float32 beside torch.float32"),
    ],
)
def test_what_the_kernel_does_not_take(
    changes: dict[str, Any], options: dict[str, Any], reason: str | None, fresh: pytest.MonkeyPatch
) -> None:
    planned: list[Problem] = []

    def spy(problem: Problem, device: DeviceFacts) -> plans.Plan:
        planned.append(problem)
        raise RuntimeError("enough is known")

    fresh.setattr(plans, "plan", spy)
    options = dict(options)
    if "TRITON_FA_HOPPER" in options:
        fresh.setenv("TRITON_FA_HOPPER", options.pop("TRITON_FA_HOPPER"))
        settings.cache_clear()
    case = LATENT.with_changes(**{"heads_q": 40, "seqlens_k": (3, 3, 3)} | changes)
    arguments = Prepared.of(case, "cpu").arguments() | options
    with pytest.raises(RuntimeError, match="enough is known"):
        triton_fa.flash_attn_with_kvcache(**arguments, ver="triton")
    (problem,) = planned
    most_rows = problem.bounds.max_seqlen_q * case.heads_q
    other = DeviceFacts("cuda", (10, 0), 148, 227 << 10)
    assert "9.0" in latent_plans.refusals(problem, other, most_rows)[0]
    fresh.setattr(hopper_plans, "unavailable", lambda device: None)
    assert latent_plans.refusals(problem, H200, most_rows) == ([] if reason is None else [reason])


@pytest.mark.skipif(torch.cuda.is_available(), reason="plans for chips that are not here")
@pytest.mark.parametrize("options", [{}, {"batch_invariant": True}])
def test_a_stride_by_which_nothing_is_stepped(
    options: dict[str, Any], fresh: pytest.MonkeyPatch
) -> None:
    """It chooses no kernel, but for batch-invariant calls: for others in the batch it would."""
    planned: list[Problem] = []

    def spy(problem: Problem, device: DeviceFacts) -> plans.Plan:
        planned.append(problem)
        raise RuntimeError("enough is known")

    fresh.setattr(plans, "plan", spy)
    fresh.setattr(hopper_plans, "unavailable", lambda device: None)
    case = LATENT.with_changes(heads_q=40, seqlens_q=(1,), seqlens_k=(3,))
    arguments = Prepared.of(case, "cpu").arguments() | options
    q = arguments["q"]
    for odd in (0, 4):
        strides = (q.stride(0) + odd, *q.stride()[1:])
        arguments["q"] = torch.empty_strided(q.shape, strides, dtype=q.dtype)
        with pytest.raises(RuntimeError, match="enough is known"):
            triton_fa.flash_attn_with_kvcache(**arguments, ver="triton")
    even, odd_one = (latent_plans.refusals(problem, H200, case.heads_q) for problem in planned)
    assert even == []
    assert odd_one == (["q: strides or address"] if options else [])


@pytest.mark.parametrize(
    ("strides", "taken"),
    [
        ((1 << 33, 584, 1 << 30, 1), True),
        ((1 << 33, 584, 1 << 31, 1), False),  # an offset of a head has 32 bits
        ((1 << 33, 580, 1 << 30, 1), False),
        ((1 << 33, 584, 1 << 30, 2), False),
    ],
)
def test_strides_it_takes(strides: tuple[int, ...], taken: bool) -> None:
    tensor = torch.empty_strided((2, 9, 2, 512), strides, dtype=torch.float16, device="meta")
    assert latent_plans._in_steps(tensor, False) == taken


# ---------------------------------------------------------------- what only a GPU can show

RAGGED = (1, 0, 63, 64, 65, 200, 1000, 4097)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("page", "q_len", "heads"),
    [
        (1, 1, 128),
        (16, 2, 128),
        (64, 1, 128),
        (64, 4, 64),
        (0, 3, 64),
        (48, 1, 128),
        (128, 4, 40),
    ],
)
def test_long_caches(
    page: int,
    q_len: int,
    heads: int,
    dtype: torch.dtype,
    on_hopper: pytest.MonkeyPatch,
    device: str,
) -> None:
    inputs = Latent(RAGGED, heads, q_len, page, dtype, device)
    inputs.check(*inputs.call())


@pytest.mark.gpu
@pytest.mark.parametrize("page", [1, 64])
def test_repeats_are_bit_equal(page: int, on_hopper: pytest.MonkeyPatch, device: str) -> None:
    inputs = Latent(RAGGED, 128, 2, page, torch.bfloat16, device)
    first, first_lse = inputs.call()
    inputs.check(first, first_lse)
    for _ in range(300):
        out, lse = inputs.call()
        assert torch.equal(out, first)
        assert torch.equal(lse, first_lse)


@pytest.mark.gpu
@pytest.mark.parametrize("page", [0, 16, 64])
def test_a_graph_serves_other_lengths(
    page: int, on_hopper: pytest.MonkeyPatch, device: str
) -> None:
    inputs = Latent((4097, 300, 1000), 128, 1, page, torch.bfloat16, device)
    results: list[tuple[torch.Tensor, torch.Tensor]] = []
    graph = capture([lambda: results.append(inputs.call())])
    out, lse = results[-1]
    for lengths in ((4097, 300, 1000), (0, 300, 64), (0, 0, 0), (65, 0, 999)):
        inputs.used.copy_(torch.tensor(lengths))
        for _ in range(2):
            out.fill_(float("nan"))
            graph.replay()
        torch.cuda.synchronize()
        inputs.check(out, lse)


@pytest.mark.gpu
def test_two_streams_at_once(on_hopper: pytest.MonkeyPatch, device: str) -> None:
    both = [Latent(RAGGED, 128, 1, 64, torch.bfloat16, device, seed=seed) for seed in (1, 2)]
    results: list[tuple[torch.Tensor, torch.Tensor]] = []
    graphs, made = [], []
    for inputs in both:
        graphs.append(capture([lambda inputs=inputs: results.append(inputs.call())]))
        made.append(results[-1])
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for inputs, (out, lse) in zip(both, made, strict=True):
        inputs.check(out, lse)


@pytest.mark.gpu
@pytest.mark.parametrize("direct", ["0", "1"])
@pytest.mark.parametrize("page", [16, 64])
def test_launches_agree(page: int, direct: str, on_hopper: pytest.MonkeyPatch, device: str) -> None:
    """By Triton's dispatcher and by addresses, with and without descriptors."""
    on_hopper.setenv("TRITON_FA_DIRECT_LAUNCH", direct)
    settings.cache_clear()
    api._RECORDS.clear()
    for seed in range(3):
        inputs = Latent(RAGGED, 128, 1, page, torch.bfloat16, device, seed=seed)
        inputs.check(*inputs.call())


# ---------------------------------------------------------------- what the compiler makes of it

COMPILED = {
    "page-64": latent_call(128),
    "page-16": latent_call(128, page_size=16, row=584),
    "invariant": latent_call(128, batch_invariant=True),
}


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """As in `test_hopper.py`."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_latent_hopper", *COMPILED],
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


@pytest.mark.xdist_group("latent-hopper")  # they share what was compiled
@pytest.mark.parametrize("case", COMPILED)
def test_it_compiles_for_hopper(case: str, compiled: dict[str, dict[str, Any]]) -> None:
    found = compiled[case]
    assert found["shared"] <= 227 << 10
    assert not found["warnings"]
    # A barrier for each partition behind the first two of Triton's.
    assert max(found["barriers"]) <= 5
    assert 36 in {tile["products"] for tile in found["tiles"]}, "the scorer's loop"
    assert all(tile["local"] == 0 for tile in found["tiles"])
    spilled = [int(each.split()[0]) for each in found["said"] if "spill" in each]
    assert max(spilled) <= 32, "more than two numbers that are read once for a result"
    assert all(tile["barriers"] <= 5 for tile in found["tiles"])


if __name__ == "__main__":
    for each in sys.argv[1:]:
        sys.stdout.write(json.dumps(cross_compiled(each, COMPILED[each])) + "\n")
        sys.stdout.flush()

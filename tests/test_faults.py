"""What goes wrong around a call: garbage on the device, binaries that do not load, no memory.

The cases are the harness': what may not be read is poison, and results are judged by its budgets.
What single traps do is in `test_traps.py`, what launches and threads do in `test_launch.py`.
"""

import threading
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

import triton_fa
from parity_tests.cases import Case
from parity_tests.named import BATCHED, PACKED
from parity_tests.runners import AGREES, Prepared, public_call, run_backend
from tests.test_dispatch import breaks
from tests.test_gpu import Cache, _close
from triton_fa import api
from triton_fa import device as device_facts
from triton_fa.backends import fa3, fa4
from triton_fa.backends import triton as backend
from triton_fa.device import DeviceFacts

pytestmark = pytest.mark.usefixtures("fresh")

Arguments = dict[str, Any]
SMALL: Arguments = {
    "dtype": "float16",
    "heads_q": 2,
    "heads_kv": 1,
    "head_dim": 16,
    "head_dim_v": 16,
    "page_size": 4,
}
TWO: Arguments = {"seqlens_q": (1, 3), "seqlens_k": (5, 12), "q_layout": "packed"}
APPEND: Arguments = {"append": "packed", "seqlens_new": (2, 3), "rotary_dim": 16}
ROWS: Arguments = {"batch_idx": True, "spare_rows": 1}
CASES = {
    "decode": Case(**SMALL, seqlens_q=(1, 1), seqlens_k=(5, 21), causal=True, num_splits=3),
    "mixed": Case(**SMALL | TWO | {"heads_q": 4, "seqlens_q": (1, 18)}, causal=True),
    "append": Case(**SMALL, **TWO, **APPEND, **ROWS, rotary_seqlens=(9, 30), rotary_rows=40),
    "dense append": Case(
        **SMALL | TWO | APPEND | ROWS | BATCHED, leftpad=True, leftpads=(2, 4), pad_k=3
    ),
    "varlen": Case(**SMALL | TWO | PACKED, pad_q=2, pad_k=3, causal=True),
    "latent, float8 cache": Case(**SMALL, **TWO, qv=True, kv_dtype="float8_e4m3fn", descales="kv"),
}


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


# ---------------------------------------------------------------- metadata


def entries(batch: int) -> int:
    return 4 * (-(-batch // 4) * 4) + 1


def stale(case: Case) -> torch.Tensor:
    """Of the same batch, with lengths of another step."""
    lengths = ints(*range(case.batch, 0, -1))
    return triton_fa.get_scheduler_metadata(
        case.batch,
        max(case.seqlens_q),
        case.capacity,
        case.heads_q,
        case.heads_kv,
        case.head_dim,
        lengths.to("cuda" if torch.cuda.is_available() else "cpu"),
        torch.float16,
        page_size=case.page_size or None,
        ver="triton",
    )


def of_fa3(case: Case) -> torch.Tensor:
    """As long as ours, in FA3's order: splits, sequences, row tiles, heads, a counter."""
    rows = -(-case.batch // 4) * 4
    parts = (
        ints(*[3] * rows),
        torch.arange(rows - 1, -1, -1),
        ints(*[1] * rows),
        ints(*[2] * rows),
    )
    return torch.cat([*parts, ints(0)]).int()


METADATA: dict[str, Callable[[Case], torch.Tensor]] = {
    "stale": stale,
    "zeroed": lambda case: torch.zeros(entries(case.batch), dtype=torch.int32),
    "random": lambda case: torch.randint(
        -(2**31), 2**31 - 1, (entries(case.batch),), generator=torch.Generator().manual_seed(1)
    ).int(),
    "of FA3": of_fa3,
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("decode", kind) for kind in METADATA),
        *((name, kind) for name in ("mixed", "append") for kind in ("random", "of FA3")),
    ],
)
def test_metadata_of_any_kind_changes_no_number(name: str, kind: str, device: str) -> None:
    case = CASES[name]
    metadata = METADATA[kind](case).to(device)

    def call(case: Case, arguments: Arguments, ver: Any) -> Any:
        return public_call(case, arguments | {"scheduler_metadata": metadata}, ver)

    outcome = run_backend(Prepared.of(case, device), "triton", call)
    assert outcome.verdict == AGREES, outcome.describe()


# ---------------------------------------------------------------- garbage on the device


class Guarded:
    """A tensor amid bytes of ones: NaN of every dtype, and no index."""

    def __init__(self, tensor: torch.Tensor, offset: int = 0) -> None:
        size = tensor.numel()
        self.pool = torch.zeros(size + 4104, dtype=tensor.dtype, device=tensor.device)
        self.pool.view(torch.uint8).fill_(0xFF)
        self.inner = self.pool[2048 + offset : 2048 + offset + size].view(tensor.shape)
        self.inner.copy_(tensor)

    def is_intact(self) -> bool:
        """Whether nothing around the tensor was written."""
        width = self.pool.element_size()
        first = self.inner.storage_offset()
        around = self.pool.view(torch.uint8).clone()
        around[first * width : (first + self.inner.numel()) * width] = 0xFF
        return bool((around == 0xFF).all())


def garbage(like: torch.Tensor) -> torch.Tensor:
    """The least, the largest and the last negative number in turn."""
    values = ints(-(2**31), 2**31 - 1, -1).repeat(like.numel())[: like.numel()]
    return values.view(like.shape).to(like)


@pytest.mark.parametrize("name", CASES)
def test_garbage_in_any_index_stays_in_bounds(name: str, device: str) -> None:
    """Page ids, lengths, prefix sums, rows, padding, positions: each alone, then all at once."""
    case = CASES[name]
    given = case.materialise(device, poison=False)
    given["out"] = torch.full((*given["q"].shape[:-1], case.head_dim_v), 7.0).to(given["q"])
    tensors = {n: v for n, v in given.items() if isinstance(v, torch.Tensor)}
    indices = {n: v for n, v in tensors.items() if v.dtype == torch.int32}
    changes = [{n: garbage(v)} for n, v in indices.items()]
    changes.append({n: garbage(v) for n, v in indices.items()})
    changes.append({n: garbage(v).flip(0) for n, v in indices.items()})
    assert len(changes) > 3
    for changed in changes:
        guards = {n: Guarded(v) for n, v in (tensors | changed).items()}
        public_call(case, given | {n: guard.inner for n, guard in guards.items()}, "triton")
        for guarded, guard in guards.items():
            assert guard.is_intact(), f"{list(changed)}: {guarded} was overrun"
        assert guards["out"].inner.isfinite().all(), f"{changed}: something outside was read"


@pytest.mark.parametrize(
    ("name", "offset"),
    [*(("decode", n) for n in range(1, 9)), *((name, 1) for name in [*CASES][1:]), ("mixed", 8)],
)
def test_tensors_begin_anywhere_in_their_storage(name: str, offset: int, device: str) -> None:
    def call(case: Case, arguments: Arguments, ver: Any) -> Any:
        tensors = {n: v for n, v in arguments.items() if isinstance(v, torch.Tensor)}
        moved = {n: Guarded(v, offset).inner for n, v in tensors.items()}
        assert {tensor.storage_offset() for tensor in moved.values()} == {2048 + offset}
        result = public_call(case, arguments | moved, ver)
        for cache in ("k_cache", "v_cache") if case.append else ():
            arguments[cache].copy_(moved[cache])  # the judge looks there
        return result

    outcome = run_backend(Prepared.of(CASES[name], device), "triton", call)
    assert outcome.verdict == AGREES, outcome.describe()


# ---------------------------------------------------------------- binaries that are no use


def plain(device: str) -> Arguments:
    q, k, v = torch.randn(3, 1, 4, 2, 16, device=device)
    return {"q": q, "k": k, "v": v}


def falls_back_once(ver: int, device: str, says: str) -> None:
    given = plain(device)
    want = triton_fa.flash_attn_func(**given, ver="triton")
    with pytest.warns(triton_fa.FallbackWarning) as caught:
        got = triton_fa.flash_attn_func(**given, ver=ver)
    assert torch.equal(got, want)
    assert len(caught) == 1
    assert says in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            triton_fa.flash_attn_func(**plain(device), ver=ver)
        triton_fa.flash_attn_func(**plain(device), causal=True, ver=ver)


@pytest.mark.parametrize(("ver", "module"), [(3, fa3), (4, fa4)])
def test_a_binary_of_another_abi_falls_back(
    ver: int, module: Any, fresh: pytest.MonkeyPatch, device: str
) -> None:
    error = ImportError("flash_ops.abi3.so: undefined symbol: _ZN3c104cuda14ExchangeDeviceEa")
    fresh.setattr(module, "_device_reason", lambda device: None)
    breaks(
        fresh, dict.fromkeys(("sgl_kernel", "kernels", "flash_attn_interface", "flash_attn"), error)
    )
    falls_back_once(ver, device, "undefined symbol: _ZN3c104cuda14ExchangeDeviceEa")


@pytest.mark.parametrize(
    ("ver", "module", "arch"), [(3, fa3, (10, 0)), (3, fa3, (7, 5)), (4, fa4, (7, 5))]
)
def test_a_gpu_of_another_architecture_falls_back(
    ver: int, module: Any, arch: tuple[int, int], fresh: pytest.MonkeyPatch, device: str
) -> None:
    real = module._device_reason

    def reason(_: torch.device) -> Any:
        facts = DeviceFacts("cuda", arch, 100, 1)
        with mock.patch.object(device_facts, "facts", return_value=facts):
            return real(torch.device("cuda"))

    fresh.setattr(module, "_device_reason", reason)
    falls_back_once(ver, device, "{}.{}".format(*arch))


# ---------------------------------------------------------------- no memory


@pytest.mark.parametrize("ver", ["triton", 3])
@pytest.mark.parametrize("first", [False, True], ids=["later", "first"])
def test_without_memory_for_a_workspace_the_error_is_the_callers(
    ver: Any, first: bool, fresh: pytest.MonkeyPatch, device: str
) -> None:
    """Nothing is fallen back to, and the next call of the same form works."""
    case = CASES["decode"]
    prepared = Prepared.of(case, device)
    real, failed, is_scarce = backend._maker, [], False

    def maker(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
        make = real(shape, dtype, device)

        def made() -> torch.Tensor:
            if is_scarce and dtype == torch.float32 and len(shape) == 1:
                failed.append(shape)
                raise torch.OutOfMemoryError("CUDA out of memory")
            return make()

        return made

    def attend() -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("error" if ver == "triton" else "ignore", module=__name__)
            return triton_fa.flash_attn_with_kvcache(**prepared.arguments(), ver=ver)

    fresh.setattr(backend, "_maker", maker)
    before = None if first else attend()
    known = len(api._RECORDS)
    is_scarce = True
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            attend()
    is_scarce = False
    assert len(failed) == 2
    assert len(api._RECORDS) == known
    after = attend()
    if before is not None:
        assert torch.equal(after[0], before[0])
    outcome = run_backend(prepared, "triton")
    assert outcome.verdict == AGREES, outcome.describe()


# ---------------------------------------------------------------- what only a GPU can show


@pytest.mark.gpu
def test_a_graph_is_captured_while_another_thread_attends_on_its_own_stream() -> None:
    mine, other = Cache(6, 3000), Cache(6, 2000, seqlen_q=40)
    out, running, stop = torch.empty_like(mine.q), threading.Event(), threading.Event()
    mine.attend(out=out)
    results: list[torch.Tensor] = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            while not stop.is_set():
                results[:] = [other.attend()]
                running.set()
        torch.cuda.synchronize()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert running.wait(60)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            mine.attend(out=out)
    finally:
        stop.set()
        thread.join()
    for length in (3000, 17):
        mine.lengths.fill_(length)
        out.fill_(float("nan"))
        graph.replay()
        _close(out, mine.expected())
    _close(results[0], other.expected())


@pytest.mark.gpu
@pytest.mark.parametrize("seqlen_q", [1, 40])
def test_a_pool_of_more_than_2_to_the_31_elements(seqlen_q: int) -> None:
    cache = Cache(2, 200, seqlen_q)
    want = cache.attend()
    pages = 2**31 // cache.k[0].numel() + cache.k.shape[0]
    for name in ("k", "v"):
        small = getattr(cache, name)
        pool = torch.empty((pages, *small.shape[1:]), dtype=small.dtype, device="cuda")
        pool[-small.shape[0] :] = small
        setattr(cache, name, pool)
    cache.table += pages - cache.table.numel()
    assert torch.equal(cache.attend(), want)

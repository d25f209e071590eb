"""What the driver is given for the launches of a call, seen from a driver that only writes down."""

import contextlib
import ctypes
import gc
import struct
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton_fa import normalize
from triton_fa.backends import triton as backend
from triton_fa.kernels import submit
from triton_fa.kernels.submit import Submittable, TensorMap, submission
from triton_fa.normalize import Options
from triton_fa.problem import Tensors

DEVICE = 3
STREAM = 0x5EED


class Attribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h."""

    _fields_ = (("id", ctypes.c_uint), ("pad", ctypes.c_char * 4), ("value", ctypes.c_char * 64))


class Config(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("count", ctypes.c_uint),
    )


ENQUEUE = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)


@dataclass
class Driver:
    """Stands for libcuda: reads what it is given at once, as the real one does."""

    sizes: list[int]  # bytes of each parameter
    launched: list[dict[str, Any]] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)  # of the next calls; 0 when there are no more
    entered: list[int] = field(default_factory=list)  # devices whose context was made current
    during: Callable[[], object] = lambda: None

    def __post_init__(self) -> None:
        self.cuLaunchKernelEx = ENQUEUE(self._enqueue)
        self.cuGetErrorString = self._describe
        self.cuDeviceGet = self._ordinal
        self.cuDevicePrimaryCtxRetain = self._context
        self.cuCtxSetCurrent = self._enter

    def _enqueue(self, config: int, function: int, table: int, extra: int) -> int:
        during, self.during = self.during, lambda: None
        during()
        given = Config.from_address(config)
        places = (ctypes.c_void_p * len(self.sizes)).from_address(table)
        values = [ctypes.string_at(p, size) for p, size in zip(places, self.sizes, strict=True)]
        self.launched.append(
            {
                "grid": tuple(given.grid),
                "block": tuple(given.block),
                "shared": given.shared,
                "stream": given.stream,
                "attributes": {
                    a.id: int.from_bytes(bytes(a)[8:], "little")
                    for a in given.attributes[: given.count]
                },
                "function": function,
                "extra": extra,
                "values": values,
            }
        )
        return self.statuses.pop(0) if self.statuses else 0

    def _describe(self, status: int, text: Any) -> int:
        text._obj.value = f"status {status}".encode()
        return 0

    def _ordinal(self, ordinal: Any, index: int) -> int:
        ordinal._obj.value = 10 + index
        return 0

    def _context(self, context: Any, ordinal: Any) -> int:
        context._obj.value = 100 + ordinal.value
        return 0

    def _enter(self, context: Any) -> int:
        self.entered.append(context.value)
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver([])
    monkeypatch.setattr(submit, "cuda_driver", lambda: made)
    active = SimpleNamespace(get_current_stream=lambda index: STREAM + index)
    monkeypatch.setattr(submit, "driver", SimpleNamespace(active=active))
    return made


def word(value: int) -> bytes:
    return struct.pack("<Q", value)


def step(*parameters: submit.Parameter, **changes: Any) -> Submittable:
    given = {"function": 7, "grid": (5, 6, 7), "threads": 128, "shared": 4096, "attributes": ()}
    return Submittable(**(given | changes), parameters=parameters)


def test_everything_reaches_the_driver(driver: Driver) -> None:
    driver.sizes = [8, 4, 8, 2, 8]
    parameters = ("b", struct.pack("<i", -5), "a", b"\x01\x02", word(9))
    second = {"function": 8, "grid": (2**31 - 1, 1, 1), "threads": 32, "shared": 0}
    flags = (submit.DEPENDENT, submit.COOPERATIVE)
    steps = [step(*parameters), step(*parameters, **second, attributes=flags)]
    submission(steps, ("a", "b", "c"), DEVICE)([1 << 63, (1 << 47) + 16, 3])
    first, last = driver.launched
    values = [word((1 << 47) + 16), b"\xfb\xff\xff\xff", word(1 << 63), b"\x01\x02", word(9)]
    assert first == {
        "grid": (5, 6, 7),
        "block": (128, 1, 1),
        "shared": 4096,
        "stream": STREAM + DEVICE,
        "attributes": {},
        "function": 7,
        "extra": None,
        "values": values,
    }
    assert last == first | {
        "grid": (2**31 - 1, 1, 1),
        "block": (32, 1, 1),
        "shared": 0,
        "attributes": {6: 1, 2: 1},  # as cuda.h numbers them
        "function": 8,
    }


def test_a_later_call_gives_its_own_addresses_and_stream(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.sizes = [8]
    streams = iter((11, 12))
    active = SimpleNamespace(get_current_stream=lambda index: next(streams))
    monkeypatch.setattr(submit, "driver", SimpleNamespace(active=active))
    submit_ = submission([step("a"), step("a")], ("a",), DEVICE)
    submit_([5])
    submit_([6])
    assert [(s["stream"], s["values"]) for s in driver.launched] == [
        (11, [word(5)]),
        (11, [word(5)]),
        (12, [word(6)]),
        (12, [word(6)]),
    ]


def test_nothing_is_launched_for_a_grid_of_nothing(driver: Driver) -> None:
    driver.sizes = [8]
    submission([step("a", grid=(0, 1, 1)), step("a")], ("a",), DEVICE)([5])
    assert len(driver.launched) == 1


def test_tensor_maps_are_those_of_the_address_and_are_kept_while_they_are_read(
    driver: Driver,
) -> None:
    """What holds a map may have no other owner than the call."""
    driver.sizes = [128, 128, 8]
    memory: list[Any] = []

    class Holder:
        def __init__(self, address: int) -> None:
            self.map = ctypes.create_string_buffer(word(address) * 16, 128)
            memory.append(self.map)

        def __del__(self) -> None:
            ctypes.memset(self.map, 0, 128)

    def map_of(address: int) -> tuple[int, Any]:
        holder = Holder(address)
        return ctypes.addressof(holder.map), holder

    step_ = step(TensorMap("k", map_of), TensorMap("v", map_of), "q")
    send = submission([step_], ("q", "k", "v"), DEVICE)
    for addresses in ([1, 2, 3], [1, 4, 5]):
        send(addresses)
        q, k, v = map(word, addresses)
        assert driver.launched[-1]["values"] == [k * 16, v * 16, q]
    assert [bytes(each) for each in memory] == [bytes(128)] * 4  # and no longer


def test_a_call_within_a_call_has_a_block_of_its_own(driver: Driver) -> None:
    """As another thread does that the interpreter lets run meanwhile."""
    driver.sizes = [8]
    send = submission([step("a"), step("a")], ("a",), DEVICE)
    driver.during = lambda: send([6])
    send([5])
    assert [s["values"] for s in driver.launched] == [[word(n)] for n in (6, 6, 5, 5)]


def test_threads_do_not_get_each_others_addresses(driver: Driver) -> None:
    driver.sizes = [8, 8]
    send = submission([step("a", "b"), step("b", "a")], ("a", "b"), DEVICE)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [
            threading.Thread(target=lambda n=n: [send([n, n]) for _ in range(300)])
            for n in range(1, 5)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    values = [tuple(s["values"]) for s in driver.launched]
    assert sorted(values) == sorted((word(n), word(n)) for n in range(1, 5) for _ in range(600))


def test_an_error_is_raised_and_does_not_stay(driver: Driver) -> None:
    driver.sizes = [8]
    send = submission([step("a")], ("a",), DEVICE)
    driver.statuses = [700]
    with pytest.raises(RuntimeError, match=r"Triton Error \[CUDA\]: status 700"):
        send([5])
    send([6])
    assert driver.launched[-1]["values"] == [word(6)]
    assert driver.entered == []


def test_a_thread_without_a_context_enters_the_devices(driver: Driver) -> None:
    driver.sizes = [8]
    driver.statuses = [submit.INVALID_CONTEXT]
    submission([step("a")], ("a",), DEVICE)([5])
    assert driver.entered == [110 + DEVICE]
    assert len(driver.launched) == 2
    driver.statuses = [submit.INVALID_CONTEXT] * 2
    with pytest.raises(RuntimeError, match="status 201"):
        submission([step("a")], ("a",), DEVICE)([5])


# ---------------------------------------------------------------- parameters


def test_parameters_have_the_bytes_of_their_types() -> None:
    types = ("*bf16", "constexpr", "i32", "i64", "u1", "fp32", "*i32", "constexpr", "u64")
    values = ("q_ptr", 4, -2, -2, True, 0.1, "table_ptr", None, 2**64 - 1)
    assert submit.parameters(types, values) == [
        "q_ptr",
        b"\xfe\xff\xff\xff",
        b"\xfe" + b"\xff" * 7,
        b"\x01",
        struct.pack("<f", 0.1),
        "table_ptr",
        b"\xff" * 8,
    ]
    # As a cast in C has it.
    assert submit.parameters(("fp32",), (1e300,)) == [struct.pack("<f", float("inf"))]


@pytest.mark.parametrize("kind", ["tensordesc<bf16[64]>", "fp16", "nvTmaDesc", ("*bf16", "i32")])
def test_types_that_are_not_known_are_not_passed(kind: object) -> None:
    assert submit.parameters(("i32", kind), (1, 1)) is None


def test_a_number_that_its_type_cannot_hold_is_not_cut_off() -> None:
    with pytest.raises(struct.error):
        submit.parameters(("i32",), (2**31,))


PTX = """
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];
.visible .entry some_kernel(
	.param .align 64 .b8 some_kernel_param_0[128],
	.param .u64 .ptr .global .align 1 some_kernel_param_1,
	.param .u32 some_kernel_param_2,
	.param .u8 some_kernel_param_3,
	.param .f32 some_kernel_param_4,
	.param .u64 some_kernel_param_5
)
.reqntid 128
{
	.param .b32 not_one_of_its;
}
"""


def test_sizes_are_read_from_ptx() -> None:
    assert submit.sizes_in(PTX) == [128, 8, 4, 1, 4, 8]
    assert submit.sizes_in("") == []
    given = [TensorMap("q", lambda address: (0, None)), "k", bytes(4), bytes(1), bytes(4), bytes(8)]
    assert submit.sizes_of(given) == submit.sizes_in(PTX)


def a_compiled(ptx: str = PTX, **changes: Any) -> SimpleNamespace:
    run = {"global_scratch_size": 0, "profile_scratch_size": 0}
    run |= {"launch_pdl": True, "launch_cooperative_grid": False}
    signature = {"a": "*bf16", "b": "i32", "c": "u1", "d": "fp32"}
    return SimpleNamespace(
        function=7,
        packed_metadata=changes.pop("packed_metadata", (4, 1, 2048)),
        src=SimpleNamespace(signature=signature),
        metadata=SimpleNamespace(tensordesc_meta=None),
        asm={"ptx": ptx},
        run=SimpleNamespace(**(run | changes)),
    )


def test_only_kernels_that_take_what_is_passed_are_launched_this_way() -> None:
    from triton.runtime.jit import JITFunction

    from triton_fa.kernels.launch import submittable

    kernel = object.__new__(JITFunction)
    lines = [line for line in PTX.splitlines(keepends=True) if "param_0" not in line]
    ends = "\t.param .u64 some_kernel_param_5,\n\t.param .u64 some_kernel_param_6\n"
    right = "".join(lines).replace("\t.param .u64 some_kernel_param_5\n", ends)
    arguments = ("a_ptr", 3, True, 0.5)
    found = submittable(kernel, a_compiled(right), (2, 1, 1), arguments)
    assert found == Submittable(
        function=7,
        grid=(2, 1, 1),
        threads=128,
        shared=2048,
        attributes=(submit.DEPENDENT,),
        parameters=(
            "a_ptr",
            struct.pack("<i", 3),
            b"\x01",
            struct.pack("<f", 0.5),
            bytes(8),
            bytes(8),
        ),
    )
    others = [
        a_compiled("".join(lines)),
        a_compiled(right, global_scratch_size=1),
        a_compiled(right, profile_scratch_size=1),
        a_compiled(right, packed_metadata=(4, 2, 2048)),
    ]
    for other in others:
        assert submittable(kernel, other, (2, 1, 1), arguments) is None


# ---------------------------------------------------------------- a call by its addresses


@contextlib.contextmanager
def entered(current: list[int], index: int) -> Iterator[None]:
    before, current[0] = current[0], index
    try:
        yield
    finally:
        current[0] = before


GIVEN = {
    "out": lambda: torch.empty(3, 1, 4, 16),
    "sinks": lambda: torch.zeros(4),
    "scheduler_metadata": lambda: torch.zeros(17, dtype=torch.int32),
    "cache_leftpad": lambda: torch.zeros(3, dtype=torch.int32),
    "cache_batch_idx": lambda: torch.zeros(3, dtype=torch.int32),
}
NAMES = {
    "q": "q_ptr",
    "k": "k_ptr",
    "v": "v_ptr",
    "page_table": "page_table_ptr",
    "seqused_k": "seqused_k_ptr",
    "out": "out_ptr",
    "sinks": "sinks_ptr",
    "scheduler_metadata": "plan_ptr",
    "cache_leftpad": "leftpad_ptr",
    "cache_batch_idx": "batch_idx_ptr",
}


@pytest.mark.parametrize("current", [0, DEVICE])
@pytest.mark.parametrize("given", [(), ("out",), tuple(GIVEN)], ids=lambda names: "-".join(names))
def test_a_call_gives_each_parameter_its_tensors_address(
    given: tuple[str, ...], current: int, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the caller and those that are made; on the tensors' device, whichever is current."""
    tensors = Tensors(
        torch.zeros(3, 1, 4, 16),
        torch.zeros(5, 16, 2, 16),
        torch.zeros(5, 16, 2, 16),
        page_table=torch.zeros(3, 2, dtype=torch.int32),
        seqused_k=torch.zeros(3, dtype=torch.int32),
        **{name: GIVEN[name]() for name in given},
    )
    problem = normalize.problem(tensors, Options("kvcache", return_lse=True))
    now = [current]
    made: list[tuple[int, torch.Tensor]] = []
    monkeypatch.setattr(submit, "current_device", lambda: lambda: now[0])
    where = SimpleNamespace(index=DEVICE, type="cpu")

    def maker(shape: tuple[int, ...], dtype: torch.dtype, _: object) -> Callable[[], torch.Tensor]:
        def make() -> torch.Tensor:
            made.append((now[0], torch.empty(shape, dtype=dtype)))
            return made[-1][1]

        return make

    monkeypatch.setattr(backend, "_maker", maker)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered(now, device.index))
    object.__setattr__(problem.spec, "device", where)
    names = [NAMES[name] for name in Tensors._fields if getattr(tensors, name) is not None]
    own = [*(["out_ptr"] if "out" not in given else []), "lse_ptr", "part_ptr", "v_transposed_ptr"]
    driver.sizes = [8] * len(names + own)
    run = backend._by_address(
        problem,
        [step(*names, *own)],
        maker((10,), torch.float32, where),
        None,
        maker((20,), torch.uint8, where),
    )
    addresses = [t.data_ptr() for t in tensors if t is not None]
    result = run(tensors, list(addresses))
    assert [at for at, _ in made] == [DEVICE] * len(own)
    assert now == [current]
    (launched,) = driver.launched
    want = [*addresses, *(tensor.data_ptr() for _, tensor in made)]
    assert launched["values"] == [word(address) for address in want]
    assert result.out is (tensors.out if "out" in given else made[0][1])
    assert result.out.shape == (3, 1, 4, 16)
    assert result.lse is not None
    assert result.lse.shape == (3, 4, 1)
    assert result.lse.data_ptr() == want[len(want) - 3]
    kept = [weakref.ref(tensor) for tensor in (*filter(torch.is_tensor, tensors), made[0][1])]
    made.clear()
    del tensors, problem, result
    gc.collect()
    assert [tensor() for tensor in kept] == [None] * len(kept)
    assert callable(run)


@pytest.mark.parametrize("shape", [(7,), (3, 4, 16), (2, 3, 4, 16), (1, 4, 2)])
def test_what_is_made_is_what_torch_makes(shape: tuple[int, ...]) -> None:
    """Also by the function that only GPUs' tensors come from, seen from its sibling."""
    where = torch.device("cpu")
    quick = getattr(torch._C._dynamo.guards, "_empty_strided_cpu", None)
    for make in (backend._maker(shape, torch.float16, where), quick):
        for inference in (False, True):
            with torch.inference_mode(inference):
                want = torch.empty(shape, dtype=torch.float16)
                got = make() if make is not quick else quick(shape, want.stride(), torch.float16)
            assert got.shape == want.shape
            assert got.stride() == want.stride()
            assert got.dtype == want.dtype
            assert got.is_inference() == want.is_inference()

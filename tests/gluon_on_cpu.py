"""Runs the Hopper kernel on a CPU, where Gluon has no interpreter: its Python source over numpy.

Each partition is a thread, and a thread of the copy engine does loads and stores in random order.
Barriers count as the hardware's do, so a wrong protocol deadlocks, which raises. Shared memory is
NaN until it is loaded, matrix products read it when they are waited for, addresses of descriptors
wrap as the hardware's do, and every address is checked. What only hardware can show is not here:
layouts of registers, swizzles, memory proxies, and the assembly, which is replaced by its meaning.
"""

from __future__ import annotations

import random
import threading
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SECONDS = 60  # until a wait is a deadlock
INT32 = np.dtype(np.int32)


class Dtype:
    """An element type, which tensors are converted to; numpy's may be a wider one."""

    def __init__(self, name: str, numpy: Any, size: int = 0) -> None:
        self.name, self.numpy = name, np.dtype(numpy)
        self.size = size or self.numpy.itemsize


FLOAT8 = Dtype("float8e4nv", "f2", 1)  # numpy has none


def to_float8(x: np.ndarray) -> np.ndarray:
    """Rounded to e4m3 without infinities, in float16."""
    x = np.clip(x, -448, 448).astype(np.float32)
    with np.errstate(divide="ignore"):
        exponent = np.maximum(np.floor(np.log2(np.abs(x))), -6)
    step = np.exp2(exponent - 3).astype(np.float32)
    return (np.round(x / step) * step).astype(np.float16)


class Tensor:
    """A block, or a scalar: numpy with the kernel language's rules."""

    def __init__(self, value: Any, dtype: Any = None) -> None:
        self.value = np.asarray(value, dtype=dtype)
        if self.value.dtype == np.int64 and dtype is None:
            self.value = self.value.astype(np.int32)
        if self.value.dtype == np.float64:
            self.value = self.value.astype(np.float32)
        self.type = types.SimpleNamespace(layout=None)

    shape = property(lambda self: self.value.shape)
    dtype = property(lambda self: self.value.dtype)

    def to(self, dtype: Any) -> Tensor:
        return Tensor(self.value.astype(numpy_of(dtype)), numpy_of(dtype))

    def __getitem__(self, index: Any) -> Tensor:
        return Tensor(self.value[index], self.dtype)

    def __bool__(self) -> bool:
        return bool(self.value)

    def __index__(self) -> int:
        return int(self.value)

    def __neg__(self) -> Tensor:
        return Tensor(-self.value, self.dtype)


def numpy_of(dtype: Any) -> Any:
    return dtype.numpy if isinstance(dtype, Dtype) else np.dtype(dtype)


def raw(x: Any) -> Any:
    return x.value if isinstance(x, Tensor) else x


def binary(operation: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """An operation of tensors and numbers; an int32 that overflows is an error."""

    def method(a: Any, b: Any) -> Any:
        if isinstance(b, Pointer):
            return NotImplemented
        x, y = raw(a), raw(b)
        kinds = [v.value.dtype for v in (a, b) if isinstance(v, Tensor)]
        if all(np.issubdtype(k, np.integer) for k in kinds) and not isinstance(x, float | bool):
            wide = operation(np.asarray(x, np.int64), np.asarray(y, np.int64))
            if wide.dtype != bool:
                kind = max(kinds, key=lambda k: k.itemsize)
                assert np.abs(wide).max(initial=0) < 1 << 8 * kind.itemsize - 1, "overflow"
                return Tensor(wide, kind)
            return Tensor(wide)
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            numbers = [np.float32(v) if isinstance(v, int | float) else v for v in (x, y)]
            return Tensor(operation(*(numbers if kinds[0].kind == "f" else (x, y))))

    return method


def truncated(a: Any, b: Any) -> Any:
    return np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))


OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "truediv": lambda a, b: a / b,
    "floordiv": truncated,
    "mod": lambda a, b: a - truncated(a, b) * b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "rshift": lambda a, b: a >> b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}
for _name, _operation in OPERATIONS.items():
    setattr(Tensor, f"__{_name}__", binary(_operation))
    setattr(
        Tensor,
        f"__r{_name}__",
        binary(lambda a, b, _operation=_operation: _operation(b, a)),
    )


class Pointer:
    """Addresses in one array."""

    def __init__(self, array: np.ndarray, offset: Any = 0) -> None:
        self.array, self.offset = array, offset
        self.dtype = types.SimpleNamespace(element_ty=array.dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.array, np.asarray(self.offset, np.int64) + raw(other))

    __radd__ = __add__

    def to(self, dtype: Any, bitcast: bool = False) -> Pointer:
        return Pointer(self.array.view(numpy_of(dtype)), self.offset)


def load(pointer: Pointer, mask: Any = None, other: Any = None) -> Tensor:
    offset = np.asarray(pointer.offset)
    keep = np.broadcast_to(True if mask is None else raw(mask), offset.shape)
    assert mask is None or other is not None, "a masked load says other="
    assert ((offset >= 0) & (offset < pointer.array.size) | ~keep).all(), "load out of bounds"
    found = pointer.array[np.where(keep, offset, 0)]
    return Tensor(np.where(keep, found, raw(other) or 0), pointer.array.dtype)


def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    offset = np.asarray(pointer.offset)
    keep = np.broadcast_to(True if mask is None else raw(mask), offset.shape)
    assert ((offset >= 0) & (offset < pointer.array.size) | ~keep).all(), "store out of bounds"
    pointer.array[offset[keep]] = np.broadcast_to(raw(value), offset.shape)[keep]


# ---------------------------------------------------------------- one program's machine


class DeadlockError(AssertionError):
    """A barrier was waited for in vain."""


@dataclass
class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes have."""

    count: int = 0
    pending: int = 0
    bytes: int = 0
    phase: int = 0

    def advance(self) -> None:
        assert self.pending >= 0
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count


@dataclass
class Machine:
    """What the threads of one program share."""

    number: int
    seed: int
    lock: threading.Condition = field(default_factory=threading.Condition)
    copies: list[tuple[Any, Callable[[], None]]] = field(default_factory=list)
    hardware: dict[int, list[int]] = field(default_factory=dict)  # id: [arrived, generation]
    stopped: bool = False
    errors: list[Exception] = field(default_factory=list)

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        if not self.lock.wait_for(lambda: ready() or bool(self.errors), SECONDS):
            raise DeadlockError(f"program {self.number}: {what}")
        if self.errors:
            raise DeadlockError("another thread failed")

    def engine(self) -> None:
        """Copy in random order until the end."""
        dice = random.Random(self.seed)
        while True:
            with self.lock:
                self.lock.wait_for(lambda: bool(self.copies) or self.stopped)
                if not self.copies:
                    return
                _, copy = self.copies.pop(dice.randrange(len(self.copies)))
                copy()
                self.lock.notify_all()

    def arrive(self, barrier: int, threads: int, all_threads: int, wait: bool) -> None:
        """At a hardware barrier."""
        with self.lock:
            state = self.hardware.setdefault(barrier, [0, 0])
            state[0] += threads
            assert state[0] <= all_threads, f"too many arrivals at barrier {barrier}"
            generation = state[1]
            if state[0] == all_threads:
                state[0], state[1] = 0, generation + 1
                self.lock.notify_all()
            elif wait:
                self.wait(lambda: state[1] > generation, f"hardware barrier {barrier}")


LOCAL = threading.local()  # the machine, the threads of this partition, and its products


class Shared:
    """Shared memory: blocks of panels of at most 128 bytes a row, as swizzled layouts have them."""

    def __init__(
        self, flat: np.ndarray, shape: Sequence[int], size: int, transposed: bool = False
    ) -> None:
        self.flat, self.shape, self.transposed = flat, tuple(shape), transposed
        self.dtype, self.numel = flat.dtype, flat.size
        self.size = size  # bytes of an element

    def index(self, i: Any) -> Shared:
        i, size = int(i), self.flat.size // self.shape[0]
        assert 0 <= i < self.shape[0], "index out of shared memory"
        return Shared(self.flat[i * size : (i + 1) * size], self.shape[1:], self.size)

    def permute(self, order: tuple[int, int]) -> Shared:
        return Shared(self.flat, self.shape, self.size, True)

    def reinterpret(self, dtype: Any, shape: Sequence[int], layout: Any) -> Shared:
        assert np.prod(shape) == self.flat.size
        return Shared(self.flat, shape, self.size)

    _reinterpret = reinterpret

    def block(self) -> np.ndarray:
        """A view [rows, panels, columns of one], of 128 bytes or whatever is narrower."""
        if len(self.shape) == 1:
            return self.flat
        rows, columns = self.shape[-2:]
        width = min(128 // self.size, columns)
        return self.flat.reshape(columns // width, rows, width).swapaxes(0, 1)

    def read(self) -> np.ndarray:
        found = self.block().reshape(self.shape[-2:] if len(self.shape) > 1 else self.shape)
        return found.T if self.transposed else found

    def load(self, layout: Any) -> Tensor:
        return Tensor(self.read().copy(), self.dtype)

    def store(self, value: Tensor) -> None:
        assert value.shape == self.shape
        assert value.dtype == self.dtype
        block = self.block()
        block[...] = value.value.reshape(block.shape)


class Barriers:
    """Shared memory that holds barriers."""

    def __init__(self, count: int) -> None:
        self.list = [Barrier() for _ in range(count)]

    def index(self, i: Any) -> Barrier:
        assert int(i) >= 0
        return self.list[int(i)]


def allocate(element: Any, shape: Sequence[int], layout: Any) -> Any:
    if layout == "barriers":
        return Barriers(shape[0])
    dtype = numpy_of(element)
    size = int(np.prod(shape))
    poison = np.full(size, np.nan if dtype.kind == "f" else -(2**31), dtype)
    return Shared(poison, shape, element.size if isinstance(element, Dtype) else dtype.itemsize)


@dataclass
class Descriptor:
    """A tensor map."""

    array: np.ndarray  # flat
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    block_shape: list[int]
    size: int  # bytes of an element; the array's may have more

    layout = None

    @property
    def dtype(self) -> Any:
        return FLOAT8 if self.size == 1 else self.array.dtype

    def addresses(self, at: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Of the box at these coordinates, and which of them exist."""
        size = self.size
        assert int(at[4]) * size % 16 == 0, "column not aligned"
        address = np.zeros((1,) * 5, np.uint64)
        inside = np.ones((1,) * 5, bool)
        for axis, (first, length) in enumerate(zip(at, self.block_shape, strict=True)):
            assert abs(int(first)) < 1 << 31
            shape = [-1 if a == axis else 1 for a in range(5)]
            index = (int(first) + np.arange(length)).reshape(shape)
            inside = inside & (index >= 0) & (index < self.sizes[axis])
            address = address + index.astype(np.uint64) * np.uint64(self.strides[axis] * size)
        inside = np.broadcast_to(inside, self.block_shape)
        address = np.broadcast_to(address, self.block_shape) // np.uint64(size)
        assert (address[inside] < self.array.size).all(), "outside of the tensor"
        rows, columns = self.block_shape[3:]
        return address.astype(np.int64).reshape(rows, columns), inside.reshape(rows, columns)


def tma_load(desc: Descriptor, at: Sequence[Any], ready: Barrier, box: Shared) -> None:
    machine, place = LOCAL.machine, [int(x) for x in at]
    assert list(box.shape) == list(desc.block_shape)

    def copy() -> None:
        address, inside = desc.addresses(place)
        found = np.where(inside, desc.array[np.where(inside, address, 0)], 0)
        block = box.block()
        block[...] = found.reshape(block.shape)
        ready.bytes -= box.numel * box.size
        ready.advance()

    with machine.lock:
        machine.copies.append((None, copy))
        machine.lock.notify_all()


def tma_store(desc: Descriptor, at: Sequence[Any], box: Shared) -> None:
    machine, place = LOCAL.machine, [int(x) for x in at]
    assert list(box.shape) == list(desc.block_shape)

    def copy() -> None:
        address, inside = desc.addresses(place)
        found = box.block().reshape(desc.block_shape[3:])
        desc.array[address[inside]] = found[inside]

    with machine.lock:
        machine.copies.append((threading.get_ident(), copy))
        machine.lock.notify_all()


def store_wait(count: int) -> None:
    machine, me = LOCAL.machine, threading.get_ident()
    with machine.lock:
        machine.wait(lambda: all(owner != me for owner, _ in machine.copies), "stores")


def copy_rows(smem: Shared, pointer: Pointer, mask: Any) -> None:
    """A thread's copies: in order here, but whenever the engine likes."""
    machine = LOCAL.machine
    found = load(pointer, mask, 0).value

    def copy() -> None:
        block = smem.block()
        block[...] = np.broadcast_to(found, smem.shape).reshape(block.shape)

    with machine.lock:
        machine.copies.append((threading.get_ident(), copy))
        machine.lock.notify_all()


def copies_arrive(barrier: Barrier, increment_count: bool) -> None:
    """All threads arrive when what they have copied has."""
    assert not increment_count
    machine, me, threads = LOCAL.machine, threading.get_ident(), LOCAL.threads
    with machine.lock:
        mine = [copy for owner, copy in machine.copies if owner == me]

        def arrive() -> None:
            for copy in mine:
                copy()
            barrier.pending -= threads
            barrier.advance()

        machine.copies = [entry for entry in machine.copies if entry[0] != me]
        machine.copies.append((me, arrive))
        machine.lock.notify_all()


def barrier_init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.pending = count


def barrier_expect(barrier: Barrier, count: int) -> None:
    with LOCAL.machine.lock:
        barrier.bytes += count
        barrier.pending -= 1


def barrier_arrive(barrier: Barrier, count: int = 1) -> None:
    with LOCAL.machine.lock:
        barrier.pending -= count
        barrier.advance()
        LOCAL.machine.lock.notify_all()


def barrier_wait(barrier: Barrier, phase: Any) -> None:
    parity = int(phase)
    with LOCAL.machine.lock:
        LOCAL.machine.wait(lambda: barrier.phase & 1 != parity, "mbarrier")


class Product:
    """A matrix product under way; its operands in shared memory are read when it is waited for."""

    def __init__(self, a: Any, b: Shared, acc: Any) -> None:
        self.a, self.b, self.acc, self.result = a, b, acc, None
        self.type = types.SimpleNamespace(layout=None)

    def finish(self) -> None:
        a = self.a.read() if isinstance(self.a, Shared) else self.a.value
        acc = self.acc.result if isinstance(self.acc, Product) else self.acc
        assert acc is not None, "products finish in order"
        with np.errstate(invalid="ignore"):
            product = a.astype(np.float32) @ self.b.read().astype(np.float32)
        self.result = Tensor(acc.value + product)

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} of a product that was not waited for")


def warpgroup_mma(
    a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False
) -> Product:
    assert is_async
    product = Product(a, b, acc)
    LOCAL.products.append(product)
    return product


def warpgroup_mma_wait(count: int, deps: Sequence[Product]) -> Any:
    if len(LOCAL.products) > count:
        time.sleep(0.001)  # products take long: whoever may overwrite their operands, does
    while len(LOCAL.products) > count:
        LOCAL.products.pop(0).finish()
    done = tuple(d.result if isinstance(d, Product) else d for d in deps)
    assert all(d is not None for d in done), "a dependence is still under way"
    return done[0] if len(done) == 1 else done


# ---------------------------------------------------------------- the language


def reduced(operation: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda x, axis: Tensor(operation(x.value, axis), x.dtype)


def elementwise(operation: Callable[..., Any]) -> Callable[..., Tensor]:
    def apply(*given: Any) -> Tensor:
        kinds = [x.dtype for x in given if isinstance(x, Tensor)]
        with np.errstate(all="ignore"):
            return Tensor(operation(*map(raw, given)), kinds[0] if kinds else None)

    return apply


def where(mask: Any, a: Any, b: Any) -> Tensor:
    kinds = [x.dtype for x in (a, b) if isinstance(x, Tensor)]
    return Tensor(np.where(raw(mask), raw(a), raw(b)), kinds[0] if kinds else None)


COUNTER = threading.Lock()


def atomic_add(pointer: Pointer, value: int) -> Tensor:
    with COUNTER:
        place = int(np.asarray(pointer.offset))
        before = int(pointer.array[place])
        pointer.array[place] += value
        return Tensor(before)


def warp_specialize(partitions: Any, warps: Sequence[int], registers: Sequence[int]) -> None:
    """Run partitions side by side; the first one has four warps, too."""
    machine, program, programs = LOCAL.machine, LOCAL.program, LOCAL.programs

    def run(function: Callable[..., None], given: Any, threads: int) -> None:
        LOCAL.machine, LOCAL.threads, LOCAL.products = machine, threads, []
        LOCAL.program, LOCAL.programs = program, programs
        try:
            function(*given)
            assert not LOCAL.products, "products are left"
        except Exception as error:  # noqa: BLE001  raised where the threads are joined
            with machine.lock:
                machine.errors.append(error)
                machine.lock.notify_all()

    sizes = [128, *(32 * w for w in warps)]
    threads = [
        threading.Thread(target=run, args=(function, given, size))
        for (function, given), size in zip(partitions, sizes, strict=True)
    ]
    engine = threading.Thread(target=machine.engine)
    for thread in (engine, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    with machine.lock:
        machine.stopped = True
        machine.lock.notify_all()
    engine.join()
    if machine.errors:
        raise machine.errors[0]
    left = {i: state[0] for i, state in machine.hardware.items() if state[0]}
    assert not left, f"arrivals are left at hardware barriers: {left}"


def language() -> types.SimpleNamespace:
    """What the kernel and the primitives use of `gl` and `tl`."""
    given: dict[str, Any] = {
        "minimum": elementwise(np.minimum),
        "maximum": elementwise(np.maximum),
        "abs": elementwise(np.abs),
        "exp2": elementwise(np.exp2),
        "log2": elementwise(np.log2),
        "where": where,
        "load": load,
        "store": store,
        "atomic_add": atomic_add,
        "sum": reduced(np.sum),
        "max": reduced(np.max),
        "associative_scan": lambda x, axis, add: Tensor(np.cumsum(x.value, axis), x.dtype),
        "full": lambda shape, value, dtype, layout: Tensor(
            np.broadcast_to(np.asarray(raw(value), numpy_of(dtype)), shape).copy(), numpy_of(dtype)
        ),
        "arange": lambda begin, end, layout=None: Tensor(np.arange(begin, end, dtype=np.int32)),
        "reshape": lambda x, shape: Tensor(x.value.reshape(shape), x.dtype),
        "permute": lambda x, order: Tensor(x.value.transpose(order), x.dtype),
        "convert_layout": lambda x, layout, assert_trivial=False: x,
        "static_range": range,
        "allocate_shared_memory": allocate,
        "warp_specialize": warp_specialize,
        "program_id": lambda axis: Tensor(LOCAL.program),
        "num_programs": lambda axis: Tensor(LOCAL.programs),
        "multiple_of": lambda x, n: x,
        "pointer_type": lambda element: element,
        "constexpr": object,
    }
    for name, kind in (("int32", "i4"), ("int64", "i8"), ("float32", "f4"), ("float16", "f2")):
        given[name] = Dtype(name, kind)

    class Layout:
        """Any layout: it means nothing here."""

        def __init__(self, *given: Any, **named: Any) -> None:
            """Ignore it."""

        @staticmethod
        def get_default_for(*given: Any) -> None:
            """Likewise."""

    for name in ("BlockedLayout", "SliceLayout", "NVMMADistributedLayout", "DotOperandLayout"):
        given[name] = Layout
    given["NVMMASharedLayout"] = given["SwizzledSharedLayout"] = Layout
    return types.SimpleNamespace(**given)


def function(given: Any) -> Any:
    """A jitted function of a caller's, over the language of this module."""
    names = given.fn.__globals__ | {"tl": language()}
    return types.FunctionType(given.fn.__code__, names, given.fn.__name__)


def emulated(module: types.ModuleType, shared: dict[str, Any]) -> dict[str, Any]:
    """The functions of a module of kernels, over `shared` in place of the language."""
    names: dict[str, Any] = {"__builtins__": __builtins__}
    for name, value in vars(module).items():
        function = getattr(value, "fn", None)
        if isinstance(function, types.FunctionType):
            names[name] = types.FunctionType(
                function.__code__, names, name, function.__defaults__, function.__closure__
            )
        elif type(value).__name__ == "constexpr":
            names[name] = value.value
    names.update(shared)
    return names


def run(
    kernel: types.ModuleType,
    called: Sequence[types.ModuleType],
    arguments: dict[str, Any],
    programs: int,
    seed: int = 0,
    name: str = "hopper_kernel",
) -> None:
    """Run a kernel of a module with these arguments, all programs side by side.

    `called` are the modules that it imports from, each of what the next ones import, too.
    """
    gl = language()
    mbarrier = types.SimpleNamespace(
        init=barrier_init,
        expect=barrier_expect,
        arrive=barrier_arrive,
        wait=barrier_wait,
        MBarrierLayout=lambda: "barriers",
    )

    def at_hardware(wait: bool) -> Callable[[Any, Any], None]:
        return lambda barrier, threads: LOCAL.machine.arrive(
            int(barrier), LOCAL.threads, int(threads), wait
        )

    machine = {
        "tl": gl,
        "gl": gl,
        "mbarrier": mbarrier,
        "tma": types.SimpleNamespace(store_wait=store_wait),
        "tma_load": tma_load,
        "tma_store": tma_store,
        "async_load": copy_rows,
        "async_copy": types.SimpleNamespace(
            mbarrier_arrive=copies_arrive,
            commit_group=lambda: None,
            wait_group=store_wait,
        ),
        "warps_barrier": lambda: None,
        "fence_async_shared": lambda: None,
        "warpgroup_mma": warpgroup_mma,
        "warpgroup_mma_wait": warpgroup_mma_wait,
        # Assembly, by its meaning.
        "barrier_sync": at_hardware(True),
        "barrier_arrive": at_hardware(False),
        "release_dependents": lambda: None,
        "exp2": elementwise(np.exp2),
        "reciprocal": elementwise(np.reciprocal),
        "packed": lambda x, dtype: x.to(dtype),
        "packed8": lambda x: Tensor(to_float8(x.value)),
        "negated8": lambda x: -x,
        "rescaled": lambda acc, alpha, lazy: acc * alpha[:, None],
    }
    names: dict[str, Any] = {}
    originals: dict[str, Any] = {}
    for module in (*called, kernel):
        same = [n for n, value in vars(module).items() if originals.get(n, module) is value]
        imported = {n: names[n] for n in same if n in names}
        names = names | emulated(module, imported | machine)
        originals |= vars(module)
    failures: list[Exception] = []

    def program(number: int) -> None:
        LOCAL.program, LOCAL.programs = number, programs
        LOCAL.machine = Machine(number, seed + number)
        try:
            names[name](**arguments)
        except Exception as error:  # noqa: BLE001  the same
            failures.append(error)

    threads = [threading.Thread(target=program, args=(n,)) for n in range(programs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]

"""Handing the launches of a call to the CUDA driver, with their parameters laid out ahead.

Triton's launcher takes all arguments of a kernel apart on each call, some fifty of them, of which a
few addresses change. Here a block of memory holds what the driver reads for all launches of a call:
addresses, constants, the tables that point to both, and launch configurations. A call fills in its
addresses and its stream.

A block serves one call at a time: the interpreter lets other threads go on while the driver is
busy, and may change threads between any two steps before.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from triton.runtime import driver

LIBRARY = "libcuda.so.1"
INVALID_CONTEXT = 201
COOPERATIVE = 2  # CU_LAUNCH_ATTRIBUTE_COOPERATIVE
DEPENDENT = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
CONFIG_WORDS = 7  # of a CUlaunchConfig
STREAM_WORD = 4  # place of its stream
ATTRIBUTE_WORDS = 9  # of a CUlaunchAttribute


@dataclass(frozen=True, slots=True)
class TensorMap:
    """A parameter that describes a tensor to the chip's copy engine."""

    tensor: str
    of: Callable[[int], tuple[int, Any]]
    """From the tensor's address to where its map lies, and what keeps it there."""


Parameter = str | bytes | TensorMap
"""The address of a tensor, by its name; a constant; or a tensor map."""


@dataclass(frozen=True, slots=True)
class Submittable:
    """A compiled kernel and everything about its launch but addresses."""

    function: int
    grid: tuple[int, int, int]
    threads: int
    shared: int  # bytes
    attributes: tuple[int, ...]  # that are on
    parameters: tuple[Parameter, ...]


Enqueued = tuple[int, int, int, int, tuple[tuple[int, int, Callable[[int], tuple[int, Any]]], ...]]
"""What a call does for one launch of a block: (the word of its stream; the addresses of its
configuration, function and table; of each tensor map its word, the place of its tensor's address,
and `TensorMap.of`)."""


class _Layout:
    """The words of a block, some of which are addresses of other words."""

    def __init__(self, steps: Sequence[Submittable], names: Sequence[str]) -> None:
        self._words = [0] * len(names)
        self._relative: list[int] = []  # places of words that hold the place of another
        self._steps: list[tuple[int, int, int, Any]] = []
        places = {name: place for place, name in enumerate(names)}
        for step in steps:
            attributes = [
                w for on in step.attributes for w in (on, 1, *[0] * (ATTRIBUTE_WORDS - 2))
            ]
            attributes_at = self._add(*attributes)
            x, y, z = step.grid
            config_at = self._add(
                x | y << 32, z | step.threads << 32, 1 | 1 << 32, step.shared, 0, 0, 0
            )
            self._words[config_at + CONFIG_WORDS - 1] = len(step.attributes)
            self._point(config_at + STREAM_WORD + 1, attributes_at)
            table_at = self._add(*[0] * len(step.parameters))
            maps = []
            for at, parameter in enumerate(step.parameters, table_at):
                if isinstance(parameter, TensorMap):
                    maps.append((at, places[parameter.tensor], parameter.of))
                elif isinstance(parameter, str):
                    self._point(at, places[parameter])
                else:
                    self._point(at, self._add(int.from_bytes(parameter, "little")))
            self._steps.append((config_at, step.function, table_at, tuple(maps)))

    def _add(self, *words: int) -> int:
        self._words += words
        return len(self._words) - len(words)

    def _point(self, at: int, to: int) -> None:
        self._words[at] = to
        self._relative.append(at)

    def block(self) -> tuple[Any, list[Enqueued]]:
        """A new block, and what the driver is given of it."""
        words = (ctypes.c_uint64 * len(self._words))(*self._words)
        base = ctypes.addressof(words)
        for at in self._relative:
            words[at] = base + 8 * self._words[at]
        return words, [
            (config + STREAM_WORD, base + 8 * config, function, base + 8 * table, maps)
            for config, function, table, maps in self._steps
        ]


def submission(
    steps: Sequence[Submittable], names: Sequence[str], device: int
) -> Callable[[Sequence[int]], None]:
    """What enqueues `steps` on the current stream of a device, given the addresses of `names`.

    The device must be current.
    """
    layout = _Layout([step for step in steps if min(step.grid) > 0], names)
    fill = struct.Struct(f"{len(names)}Q").pack_into
    stream_of = driver.active.get_current_stream
    enqueue = cuda_driver().cuLaunchKernelEx
    idle: list[tuple[Any, list[Enqueued]]] = []

    def submit(addresses: Sequence[int]) -> None:
        try:
            block = idle.pop()
        except IndexError:
            block = layout.block()
        words, launches = block
        stream = stream_of(device)
        fill(words, 0, *addresses)
        for stream_at, config, function, table, maps in launches:
            words[stream_at] = stream
            if maps:
                kept = []  # until the driver has copied them
                for at, tensor, map_of in maps:
                    words[at], keeper = map_of(addresses[tensor])
                    kept.append(keeper)
            status = enqueue(config, function, table, None)
            if status:
                if status == INVALID_CONTEXT:  # a thread's first use of the device
                    enter_context(device)
                    status = enqueue(config, function, table, None)
                check(status)
        idle.append(block)

    return submit


@functools.cache
def cuda_driver() -> ctypes.CDLL:
    """The driver's library, with the functions that are used here."""
    library = ctypes.CDLL(LIBRARY)
    pointer = ctypes.c_void_p
    for name, arguments in (
        ("cuLaunchKernelEx", [pointer] * 4),
        ("cuGetErrorString", [ctypes.c_int, pointer]),
        ("cuDeviceGet", [pointer, ctypes.c_int]),
        ("cuDevicePrimaryCtxRetain", [pointer, ctypes.c_int]),
        ("cuCtxSetCurrent", [pointer]),
    ):
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    return library


def enter_context(device: int) -> None:
    """Make the device's primary context this thread's."""
    ordinal, context = ctypes.c_int(), ctypes.c_void_p()
    check(cuda_driver().cuDeviceGet(ctypes.byref(ordinal), device))
    check(cuda_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), ordinal))
    check(cuda_driver().cuCtxSetCurrent(context))


def check(status: int) -> None:
    """Raise what the driver reports, in the words of Triton's launcher."""
    if status:
        text = ctypes.c_char_p()
        cuda_driver().cuGetErrorString(status, ctypes.byref(text))
        reason = text.value.decode() if text.value else f"error {status}"
        raise RuntimeError(f"Triton Error [CUDA]: {reason}")


# ---------------------------------------------------------------- the parameters of a kernel

_SCALARS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q"}
_SCALARS |= {"u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q"}
SCRATCH = (bytes(8), bytes(8))
"""Triton 3.6 ends every kernel's parameters with two addresses of memory that ours do not use."""


def parameters(types: Sequence[Any], values: Sequence[Any]) -> list[Parameter] | None:
    """What a kernel takes for arguments of Triton's `types`; None for types that are not known.

    Args:
        types: As in a signature; "constexpr" for what was compiled in.
        values: The name of a tensor for a pointer, else the argument.
    """
    found: list[Parameter] = []
    for kind, value in zip(types, values, strict=True):
        if kind == "constexpr":
            continue
        if not isinstance(kind, str):
            return None
        if kind.startswith("*"):
            found.append(value)
        elif kind in _SCALARS:
            found.append(struct.pack(f"<{_SCALARS[kind]}", value))
        elif kind == "fp32":
            found.append(bytes(ctypes.c_float(value)))
        else:
            return None
    return found


_ENTRY = re.compile(r"\.entry\s+\w+\s*\((.*?)\)", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.[a-z]+(\d+)\s[^,\[]*(?:\[(\d+)\])?")
MAP_BYTES = 128


def sizes_in(ptx: str) -> list[int]:
    """Bytes of each parameter of the kernel in a PTX module."""
    entry = _ENTRY.search(ptx)
    found = _PARAMETER.findall(entry.group(1)) if entry else []
    return [int(bits) // 8 * int(count or 1) for bits, count in found]


def sizes_of(given: Sequence[Parameter]) -> list[int]:
    """Bytes of each parameter as it would be passed."""
    return [
        len(each) if isinstance(each, bytes) else 8 if isinstance(each, str) else MAP_BYTES
        for each in given
    ]


# ---------------------------------------------------------------- addresses


def current_device() -> Callable[[], int]:
    """What tells the current device, with as little around it as there is."""
    return getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)

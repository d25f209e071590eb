"""Launching a compiled kernel with as little host work as its Triton version allows.

`kernel[grid](...)` looks every argument over on each call. A `Launch` is built once for a launch
key that fixes everything but the pointers, so the driver may be given the compiled kernel itself
(`submit.py`). How Triton passes arguments is private to it, so that is done on the versions it was
run on only.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from triton_fa.env import settings
from triton_fa.kernels import submit
from triton_fa.kernels.compat import INTERPRETED, TRITON_VERSION

DIRECT_VERSIONS = ((3, 6),)
"""Triton versions whose compiled kernels were run and tested here without their launcher."""


class Launch:
    """One kernel launch with everything fixed but its leading pointer arguments."""

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        pointers: Sequence[Any],
        values: Mapping[str, Any],
        options: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        """Compile `kernel` for these arguments, where its launcher can be used directly.

        Args:
            kernel: A jitted function whose first parameters are pointers.
            grid: Programs in each direction.
            pointers: Tensors (same dtypes and alignment as those of every later call), tensor
                descriptors or None.
            values: All other arguments by name, constexprs included.
            options: num_warps, num_stages, launch_pdl.
            device: Where to launch.
        """
        names = names_of(kernel)[len(pointers) :]
        assert values.keys() == set(names), values.keys() ^ set(names)
        self._kernel = kernel
        self._grid = grid
        self._tail = tuple(values[name] for name in names)
        self._options = dict(options)
        if not INTERPRETED:
            self._options["enable_fp_fusion"] = True
        self.submittable = self._submittable(pointers, device)
        """For `submit.submission`, or None if the kernel cannot be launched that way."""

    def _submittable(
        self, pointers: Sequence[Any], device: torch.device
    ) -> submit.Submittable | None:
        if INTERPRETED or torch.version.hip or not settings().direct_launch:
            return None
        if TRITON_VERSION.release[:2] not in DIRECT_VERSIONS:
            return None
        if not all(p is None or isinstance(p, torch.Tensor) for p in pointers):
            return None  # descriptors and tuples are taken apart by Triton's dispatcher
        options = tuple(self._options.items())
        specialised = getattr(self._kernel, "specialisation", None)
        arguments = (*pointers, *self._tail)
        variant = specialised(arguments) if specialised else specialisation(self._kernel, arguments)
        compiled = _COMPILED.get((device.index, options, variant))
        if compiled is None:
            with torch.cuda.device(device):
                compiled = self._kernel.warmup(*arguments, grid=self._grid, **self._options)
                _ = compiled.run  # loads the binary, on the device that is current
            _COMPILED[device.index, options, variant] = compiled
        names = names_of(self._kernel)[: len(pointers)]
        return submittable(self._kernel, compiled, self._grid, (*names, *self._tail))

    def __call__(self, pointers: Sequence[Any]) -> None:
        """Launch on the current device and stream through Triton's dispatcher."""
        self._kernel[self._grid](*pointers, *self._tail, **self._options)


def submittable(
    kernel: Any, compiled: Any, grid: tuple[int, int, int], arguments: Sequence[Any]
) -> submit.Submittable | None:
    """The launch of a compiled kernel; None where it cannot be passed all it needs.

    `arguments` are the kernel's, with the names of tensors for pointers.
    """
    run = compiled.run
    warps, ctas, shared = compiled.packed_metadata
    if run.global_scratch_size or run.profile_scratch_size or ctas != 1:
        return None
    passed = passed_parameters(kernel, compiled, arguments)
    if passed is None or submit.sizes_of(passed) != submit.sizes_in(compiled.asm["ptx"]):
        return None
    flags = {submit.DEPENDENT: run.launch_pdl, submit.COOPERATIVE: run.launch_cooperative_grid}
    return submit.Submittable(
        function=compiled.function,
        grid=grid,
        threads=32 * warps,
        shared=shared,
        attributes=tuple(flag for flag, on in flags.items() if on),
        parameters=tuple(passed),
    )


def passed_parameters(
    kernel: Any, compiled: Any, arguments: Sequence[Any]
) -> list[submit.Parameter] | None:
    """What a compiled kernel is passed, by the types it was compiled for; None if one is unknown.

    `arguments` as of `submittable`.
    """
    types = tuple(compiled.src.signature.values())
    if isinstance(kernel, JITFunction):
        passed = submit.parameters(types, arguments)
    else:
        passed = kernel.described_parameters(types, arguments, compiled.metadata.tensordesc_meta)
    return None if passed is None else [*passed, *submit.SCRATCH]


def compiled_kernels() -> int:
    """How many kernels this process has loaded for launching directly; grows with new variants."""
    return len({compiled.function for compiled in _COMPILED.values()})


_COMPILED: dict[Hashable, Any] = {}


class _Parameters(NamedTuple):
    kernel: Any  # kept, so that its id stays its own
    names: tuple[str, ...]
    kinds: tuple[tuple[bool, bool], ...]  # is a constant; its value makes a variant


_PARAMETERS: dict[int, _Parameters] = {}
"""By id: Triton hashes a kernel by all of its source."""


def _parameters(kernel: Any) -> _Parameters:
    found = _PARAMETERS.get(id(kernel))
    if found is None:
        kinds = tuple((p.is_constexpr, not p.do_not_specialize) for p in kernel.params)
        found = _PARAMETERS[id(kernel)] = _Parameters(kernel, tuple(kernel.arg_names), kinds)
    return found


def names_of(kernel: Any) -> tuple[str, ...]:
    """The parameters of a kernel, which Triton lists anew each time."""
    if isinstance(kernel, JITFunction):
        return _parameters(kernel).names
    return tuple(kernel.arg_names)


def specialisation(kernel: Any, arguments: Sequence[Any]) -> tuple[Hashable, ...]:
    """What decides which variant of `kernel` these arguments take; no two variants have the same.

    Looking a variant up by this takes a tenth of the time that Triton's dispatcher takes. Triton's
    switches for debugging and instrumentation have to be set before the first call.
    """
    found: list[Any] = [id(kernel)]
    for value, (constant, specialised) in zip(arguments, _parameters(kernel).kinds, strict=True):
        if isinstance(value, torch.Tensor):
            found.append((value.dtype, value.data_ptr() % 16 == 0))
        elif constant or value is None or isinstance(value, bool):
            found.append((type(value), value))
        elif isinstance(value, int):
            is_short = -(2**31) <= value < 2**31
            found.append((is_short, value == 1, value % 16 == 0) if specialised else is_short)
        else:
            found.append(type(value))
    return tuple(found)


def cross_compile(
    kernel: Any,
    pointers: Sequence[Any],
    values: Mapping[str, Any],
    options: Mapping[str, Any],
    target: GPUTarget,
) -> Any:
    """Compile a kernel for any chip, without one, as a launch with these arguments would.

    Args:
        kernel: A jitted function whose first parameters are pointers.
        pointers: Tensors, tensor descriptors or None.
        values: All other arguments by name, constexprs included.
        options: num_warps, num_stages, launch_pdl.
        target: The chip, e.g. `GPUTarget("cuda", 90, 32)`.
    """
    signature: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    given = dict(zip(kernel.arg_names, pointers, strict=False)) | dict(values)
    for param in kernel.params:
        value = given[param.name]
        if value is None or param.is_constexpr:
            signature[param.name] = "constexpr"
            constants[param.name] = value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = "*" + _TYPES[value.dtype]
            attributes[(param.num,)] = [["tt.divisibility", 16]]
        elif isinstance(value, tuple):
            signature[param.name] = tuple("*" + _TYPES[tensor.dtype] for tensor in value)
            attributes |= {(param.num, i): [["tt.divisibility", 16]] for i in range(len(value))}
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        elif isinstance(value, int) and value == 1 and not param.do_not_specialize:
            signature[param.name] = "constexpr"
            constants[param.name] = value
        elif isinstance(value, int):
            signature[param.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not param.do_not_specialize:
                attributes[(param.num,)] = [["tt.divisibility", 16]]
        else:
            block = ", ".join(map(str, value.block_shape))
            signature[param.name] = f"tensordesc<{_TYPES[value.base.dtype]}[{block}]>"
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=dict(options) | {"enable_fp_fusion": True})


_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.uint8: "u8",
}

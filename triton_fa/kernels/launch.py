"""Launching a compiled kernel with as little host work as its Triton version allows.

`kernel[grid](...)` looks every argument over on each call. A `Launch` is built once for a launch
key that fixes everything but the pointers, so it may hand them to the compiled kernel's own
launcher. That interface is private to Triton and used on the versions it was run on only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from triton_fa.env import settings
from triton_fa.kernels.compat import INTERPRETED, TRITON_VERSION

DIRECT_VERSIONS = ((3, 6),)
"""Triton versions whose `CompiledKernel` launcher was run and tested here."""

Pointers = Sequence[torch.Tensor | None]


class Launch:
    """One kernel launch with everything fixed but its leading pointer arguments."""

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        pointers: Pointers,
        values: Mapping[str, Any],
        options: Mapping[str, Any],
        device: torch.device,
        *,
        direct: bool = True,
    ) -> None:
        """Compile `kernel` for these arguments.

        Args:
            kernel: A jitted function whose first parameters are pointers.
            grid: Programs in each direction.
            pointers: Tensors like those of every later call: same dtypes and alignment.
            values: All other arguments by name, constexprs included.
            options: num_warps, num_stages, launch_pdl.
            device: Where to launch.
            direct: Whether all pointers are tensors; tensor descriptors need Triton's dispatcher.
        """
        names = kernel.arg_names[len(pointers) :]
        self._tail = tuple(values[name] for name in names)
        assert len(values) == len(names), set(values) ^ set(names)
        self._kernel = kernel
        self._grid = grid
        self._options = dict(options)
        if not INTERPRETED:
            self._options["enable_fp_fusion"] = True
        self._device = device
        self._direct = None
        # The empty grid of an empty call must not reach the driver.
        self._empty = 0 in grid
        if direct and not (INTERPRETED or self._empty) and settings().direct_launch:
            self._direct = self._direct_launcher(pointers)

    def _direct_launcher(self, pointers: Pointers) -> Callable[..., None] | None:
        if TRITON_VERSION.release[:2] not in DIRECT_VERSIONS or torch.version.hip:
            return None
        with torch.cuda.device(self._device):
            compiled = self._kernel.warmup(*pointers, *self._tail, grid=self._grid, **self._options)
            run = compiled.run
        if run.global_scratch_size or run.profile_scratch_size:
            return None
        index = self._device.index
        stream_of = driver.active.get_current_stream
        launch = run.launch
        head = self._grid
        middle = (
            compiled.function,
            run.launch_cooperative_grid,
            run.launch_pdl,
            None,
            None,
            compiled.packed_metadata,
            None,
            None,
            None,
        )
        tail = self._tail

        def direct(pointers: Pointers) -> None:
            raw = [p if p is None else p.data_ptr() for p in pointers]
            launch(*head, stream_of(index), *middle, *raw, *tail)

        return direct

    def __call__(self, *pointers: torch.Tensor | None) -> None:
        """Enqueue the kernel on the current stream of the launch's device."""
        if self._empty:
            return
        if self._device.type == "cuda" and torch.cuda.current_device() != self._device.index:
            with torch.cuda.device(self._device):
                self._launch(pointers)
        else:
            self._launch(pointers)

    def _launch(self, pointers: Pointers) -> None:
        if self._direct is not None:
            self._direct(pointers)
        else:
            self._kernel[self._grid](*pointers, *self._tail, **self._options)


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
    signature: dict[str, str] = {}
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
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        elif isinstance(value, int):
            signature[param.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
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
}

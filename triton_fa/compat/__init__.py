"""Code written for another attention package, on ours: `install("flash_attn")`.

Only on request, and only until it is removed again. What stands in for a module is a module of its
own with that module's spellings, orders of arguments and results; it always runs on
`ver="triton"`, or `"torch"` on a device that Triton does not run on.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, TracebackType
from typing import Any

from triton_fa.errors import ArgumentValueError

# The module that stands in, and its names: the first is what `install` is given.
_STAND_INS: dict[str, tuple[str, tuple[str, ...]]] = {
    "flash_attn": ("flash_attn", ("flash_attn", "flash_attn.flash_attn_interface")),
    "flash_attn_interface": ("flash_attn_interface", ("flash_attn_interface",)),
    "sgl_kernel.flash_attn": ("sgl_kernel", ("sgl_kernel.flash_attn",)),
    "vllm.vllm_flash_attn": (
        "vllm_flash_attn",
        ("vllm.vllm_flash_attn", "vllm.vllm_flash_attn.flash_attn_interface"),
    ),
}
_ABSENT = object()


class Installed:
    """What `install` put in place; as a context manager it is removed at the end."""

    def __init__(self) -> None:
        self._modules: list[tuple[str, ModuleType | None]] = []
        self._attributes: list[tuple[ModuleType, str, object]] = []

    def remove(self) -> None:
        """Put back what was there. Names that code has imported in between stay as they are."""
        while self._attributes:
            parent, name, before = self._attributes.pop()
            if before is _ABSENT:
                delattr(parent, name)
            else:
                setattr(parent, name, before)
        while self._modules:
            name, module = self._modules.pop()
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module

    def __enter__(self) -> Installed:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def _put(self, name: str, module: ModuleType) -> None:
        self._modules.append((name, sys.modules.get(name)))
        sys.modules[name] = module
        parent_name, _, child = name.rpartition(".")
        parent = sys.modules.get(parent_name)
        if parent is not None:
            self._attributes.append((parent, child, getattr(parent, child, _ABSENT)))
            setattr(parent, child, module)


def install(name: str, *, replace: bool = False) -> Installed:
    """Let `import name` find a stand-in that runs on this package.

    Call it before the code that imports `name`: what was imported before keeps what it has. A
    parent package that is not installed (`sgl_kernel`, `vllm`) is made as well, with what
    belongs to attention only.

    Args:
        name: "flash_attn", "flash_attn_interface", "sgl_kernel.flash_attn" or
            "vllm.vllm_flash_attn".
        replace: Shadow the real module where it is installed.

    Returns:
        What to call `remove` of, or to enter.

    Raises:
        ArgumentValueError: there is no stand-in for `name`, or the real module is installed and
            `replace` is not set.
    """
    if name not in _STAND_INS:
        raise ArgumentValueError(f"name: expected one of {', '.join(_STAND_INS)}, got {name!r}")
    real = _installed(name)
    if real is not None and not replace:
        raise ArgumentValueError(
            f"replace: expected True to shadow {name}, installed as {real.origin}, got False"
        )
    source_name, names = _STAND_INS[name]
    source = importlib.import_module(f"triton_fa.compat.{source_name}")
    installed = Installed()
    parent = name.rpartition(".")[0]
    if parent and parent not in sys.modules and _installed(parent) is None:
        installed._put(parent, _stand_in(parent, source, source.PACKAGE, []))
    # Other submodules of the real package stay importable.
    path = list(real.submodule_search_locations or []) if real is not None else []
    installed._put(name, _stand_in(name, source, source.__all__, path))
    for other in names[1:]:
        installed._put(other, _stand_in(other, source, source.__all__, None))
    return installed


def _installed(name: str) -> ModuleSpec | None:
    """Where the real module is, found without importing anything."""
    module = sys.modules.get(name)
    if module is not None and not hasattr(module, "__triton_fa__"):
        return module.__spec__ or ModuleSpec(name, None, origin="loaded without a spec")
    spec: ModuleSpec | None = None
    path: Any = None
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        full_name = ".".join(parts[:end])
        found = (finder.find_spec(full_name, path) for finder in sys.meta_path)
        spec = next((one for one in found if one is not None), None)
        if spec is None:
            return None
        path = spec.submodule_search_locations or []
    return spec


def _stand_in(
    name: str, source: ModuleType, exported: list[str], path: list[str] | None
) -> ModuleType:
    module = ModuleType(name, source.__doc__)
    # Without a spec, importlib.util.find_spec(name) raises.
    spec = ModuleSpec(name, None, origin=source.__file__, is_package=path is not None)
    module.__spec__ = spec
    module.__file__ = source.__file__
    if path is not None:
        spec.submodule_search_locations = module.__path__ = path
    for attribute in exported:
        setattr(module, attribute, getattr(source, attribute))
    module.__dict__["__triton_fa__"] = source.__name__
    return module

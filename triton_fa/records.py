"""Launch records: what was prepared for calls that look the same to the host.

A call is looked up by everything the host can see of it: shapes, strides, dtypes, devices,
alignment and every scalar. Making that key takes longer than comparing a call with the last one of
its shape, so that is tried first, by the tensor guard that torch's own compiler uses. It is private
to torch, and is used only where it notices every change that a key would.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from triton_fa import dispatch
from triton_fa.env import settings

MAX_RECORDS = 8192
MAX_SHORTCUTS = 4
"""Calls that look alike but for their tensors, such as of layers with and without sinks."""
WINDOW = 3  # place of the window among the scalars

NESTED = 3
"""Fields of `Tensors`, the last ones, that hold several tensors each."""

Key = tuple[Any, ...]
Values = tuple[Any, ...]
"""The fields of `Tensors`, or of `Options`, in order."""
Fits = Callable[[int | str | None, Values, Values], list[int] | None]
"""The addresses of a call's tensors, without those that are None, if it looks like the call that
this was made for. None may also mean that it is hard to say."""


@dataclass(frozen=True, slots=True)
class Shortcut:
    """A record, and what tells whether it serves a call that it was found for."""

    record: Any
    fits: Fits


_GUARD = """
def made({names}):
    def fits(ver, tensors, scalars):
        {tensors} = tensors
        {scalars} = scalars
        if not (settings() is own_settings and in_strict() is strict and grad_enabled() is grad):
            return None
        if not ({same_tensors}):
            return None
        if not (ver is own_ver and {same_scalars}) and not same_types(ver, scalars):
            return None
        try:
            {addresses} = {reads}
        except AttributeError:  # not tensors
            return None
        if ({any_address}) & 15 or not same({distinct}):
            return None
        return [{all_addresses}]
    return fits
"""
"""What a shortcut looks at, written out for it: loops over some forty values take twice as long.

Scalars are equal already, by which the shortcut was found; most are the same objects, too. The
guard of torch takes no tensor twice: such a one is to be in the same places again.
"""


def _guard_of(ver: int | str | None, tensors: Values, scalars: Values) -> Fits | None:
    """`_GUARD` for calls like this one, where it can see all that it has to."""
    places = [i for i, tensor in enumerate(tensors) if tensor is not None]
    if any(i >= len(tensors) - NESTED for i in places):
        return None
    first: dict[int, int] = {}
    for i in places:
        first.setdefault(id(tensors[i]), i)
    origin = {i: first[id(tensors[i])] for i in places}
    distinct = list(first.values())
    if any(tensors[i].data_ptr() & 15 for i in distinct):
        return None
    own_types = types_of(ver, scalars)
    names: dict[str, Any] = {
        "settings": settings,
        "own_settings": settings(),
        "in_strict": dispatch.in_strict,
        "strict": dispatch.in_strict(),
        "grad_enabled": torch.is_grad_enabled,
        "grad": torch.is_grad_enabled(),
        "own_ver": ver,
        **{f"own{i}": scalar for i, scalar in enumerate(scalars)},
        "same_types": lambda ver, scalars: types_of(ver, scalars) == own_types,
        "same": _tensor_guard(*(tensors[i] for i in distinct)),
    }
    source = _GUARD.format(
        names=", ".join(names),
        tensors=_listed("t{}", range(len(tensors))),
        scalars=_listed("s{}", range(len(scalars))),
        same_tensors=" and ".join(
            f"t{i} is None" if tensor is None else f"t{i} is t{origin[i]}"
            for i, tensor in enumerate(tensors)
            if origin.get(i) != i
        ),
        same_scalars=" and ".join(f"s{i} is own{i}" for i in range(len(scalars))),
        addresses=_listed("a{}", distinct),
        reads=_listed("t{}.data_ptr()", distinct),
        any_address=" | ".join(f"a{i}" for i in distinct),
        distinct=_listed("t{}", distinct),
        all_addresses=_listed("a{}", [origin[i] for i in places]),
    )
    fits: Fits = _function(source)(**names)
    return fits


@functools.lru_cache(maxsize=1024)
def _function(source: str) -> Callable[..., Any]:
    """The function `made` of a source text; few differ."""
    defined: dict[str, Any] = {}
    exec(source, defined)  # `_GUARD`, with numbers put in
    function: Callable[..., Any] = defined["made"]
    return function


def _listed(text: str, numbers: Iterable[int]) -> str:
    """The text for each number, as a tuple is written."""
    return "".join(f"{text.format(i)}, " for i in numbers)


def types_of(ver: int | str | None, scalars: Values) -> list[type]:
    """Types of what may be equal without being alike, as True and 1, which are not refused alike.

    A window's are those of its sides.
    """
    return [type(ver), *map(type, scalars), *map(type, scalars[WINDOW])]


class Records(dict[Key, Any]):
    """Records by key, bounded, with shortcuts to the last used of each shape."""

    def __init__(self) -> None:
        super().__init__()
        self._shortcuts: dict[Key, tuple[Shortcut, ...]] = {}

    def find(
        self, ver: int | str | None, tensors: Values, scalars: Values
    ) -> tuple[Any, list[int] | None]:
        """The record of a call, or None; and its tensors' addresses where they were looked at."""
        try:
            place = (ver, scalars, tensors[0].shape)
            known = self._shortcuts.get(place, ())
            for shortcut in known:
                addresses = shortcut.fits(ver, tensors, scalars)
                if addresses is not None:
                    return shortcut.record, addresses
            record = self.get(key(ver, tensors, scalars))
        except (AttributeError, TypeError):  # not tensors, or not hashable: normalize says which
            return None, None
        if record is not None and guards_work():
            fits = _guard_of(ver, tensors, scalars)
            if fits is not None and fits(ver, tensors, scalars) is not None:
                self._shortcuts[place] = (Shortcut(record, fits), *known[: MAX_SHORTCUTS - 1])
        return record, None

    def keep(self, ver: int | str | None, tensors: Values, scalars: Values, record: Any) -> None:
        """Remember the record of a call."""
        if len(self) >= MAX_RECORDS:
            self.clear()
        self[key(ver, tensors, scalars)] = record

    def __setitem__(self, key: Key, record: Any) -> None:
        """No shortcut leads to a record that is no longer here."""
        if key in self:
            self._shortcuts.clear()
        super().__setitem__(key, record)

    def clear(self) -> None:
        """Forget everything."""
        self._shortcuts.clear()
        super().clear()


def key(ver: int | str | None, tensors: Values, scalars: Values) -> Key:
    """Everything that validation and code choice may depend on."""
    *plain, aux, append, blocks = tensors
    return (
        ver,
        scalars,
        *types_of(ver, scalars),
        dispatch.is_strict(),
        torch.is_grad_enabled(),
        *map(signature, plain),
        None if aux is None else tuple(map(signature, aux)),
        None if append is None else tuple(map(signature, append)),
        None if blocks is None else (*map(signature, blocks[:-1]), blocks.block_size),
    )


def signature(tensor: Any) -> Any:
    """The same of one tensor."""
    if tensor is None:
        return None
    return (
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.device,
        tensor.data_ptr() & 15,
        tensor.requires_grad,
    )


def _tensor_guard(*tensors: torch.Tensor) -> Callable[..., bool]:
    guards: Any = torch._C._dynamo.guards
    guard = guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    check: Callable[..., bool] = guard.check
    return check


@functools.cache
def guards_work() -> bool:
    """Whether this torch has tensor guards, and they see what they are relied on to see."""
    try:
        one, two = torch.zeros(2, 3), torch.zeros(4, dtype=torch.int32)
        check = _tensor_guard(one, two)
        same = check(torch.ones(2, 3), torch.ones(4, dtype=torch.int32))
        others = (
            torch.zeros(3, 2),
            torch.zeros(2, 3, 1),
            torch.zeros(3, 2).t(),
            torch.zeros(2, 6)[:, :3],
            torch.zeros(2, 3, dtype=torch.float16),
            torch.zeros(2, 3, device="meta"),
            torch.zeros(2, 3, requires_grad=True),
            torch.nn.Parameter(torch.zeros(2, 3), requires_grad=False),
        )
        return same is True and not any(check(other, two) for other in others)
    except Exception:  # noqa: BLE001  # a private interface may be gone or raise anything
        return False

"""Launch records: what was prepared for calls that look the same to the host.

A call is looked up by everything the host can see of it: shapes, strides, dtypes, devices,
alignment and every scalar. Making that key takes longer than comparing a call with the last one of
its shape, so that is tried first, by the tensor guard that torch's own compiler uses. It is private
to torch, and is used only where it notices every change that a key would.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from triton_fa import dispatch
from triton_fa.problem import Tensors

MAX_RECORDS = 8192
WINDOW = 3  # place of the window among the scalars

Key = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Shortcut:
    """A record, and what a call must look like to be the one it was made for."""

    record: Any
    ver: int | str | None
    scalars: tuple[Any, ...]
    strict: bool
    grad: bool
    given: Callable[[Tensors], tuple[torch.Tensor, ...]]
    absent: Callable[[Tensors], tuple[Any, ...]]
    nones: tuple[None, ...]
    same: Callable[..., bool]

    def fits(self, ver: int | str | None, tensors: Tensors, scalars: tuple[Any, ...]) -> bool:
        """Whether the record serves this call, too; False may also mean that it is hard to say."""
        if (
            self.ver is not ver
            # Identity, because True == 1 and 0.0 == 0, which are not refused alike.
            or not all(map(operator.is_, scalars, self.scalars))
            or self.absent(tensors) != self.nones
            or self.strict is not dispatch.is_strict()
            or self.grad is not torch.is_grad_enabled()
        ):
            return False
        given = self.given(tensors)
        addresses = 0
        try:
            for tensor in given:
                addresses |= tensor.data_ptr()
        except AttributeError:  # not a tensor, or not given this time
            return False
        return not addresses & 15 and self.same(*given)


class Records(dict[Key, Any]):
    """Records by key, bounded, with shortcuts to the last used of each shape."""

    def __init__(self) -> None:
        super().__init__()
        self._shortcuts: dict[Key, Shortcut] = {}

    def find(self, ver: int | str | None, tensors: Tensors, scalars: tuple[Any, ...]) -> Any:
        """The record of a call, or None."""
        try:
            place = (ver, scalars, tensors.q.shape)
            shortcut = self._shortcuts.get(place)
            if shortcut is not None and shortcut.fits(ver, tensors, scalars):
                return shortcut.record
            record = self.get(key(ver, tensors, scalars))
        except (AttributeError, TypeError):  # not tensors, or not hashable: normalize says which
            return None
        if record is not None and guards_work():
            shortcut = _shortcut(record, ver, tensors, scalars)
            if shortcut is not None:
                self._shortcuts[place] = shortcut
        return record

    def keep(
        self, ver: int | str | None, tensors: Tensors, scalars: tuple[Any, ...], record: Any
    ) -> None:
        """Remember the record of a call."""
        if len(self) >= MAX_RECORDS:
            self.clear()
        self[key(ver, tensors, scalars)] = record

    def __setitem__(self, key: Key, record: Any) -> None:
        """Every change forgets the shortcuts."""
        self._shortcuts.clear()
        super().__setitem__(key, record)

    def clear(self) -> None:
        """Forget everything."""
        self._shortcuts.clear()
        super().clear()


def key(ver: int | str | None, tensors: Tensors, scalars: tuple[Any, ...]) -> Key:
    """Everything that validation and code choice may depend on."""
    return (
        ver,
        scalars,
        # True == 1 and 0.0 == 0, but what is refused must not depend on what came before.
        type(ver),
        *map(type, scalars),
        *map(type, scalars[WINDOW]),
        dispatch.is_strict(),
        torch.is_grad_enabled(),
        *map(signature, tensors[:-3]),
        None if tensors.aux is None else tuple(map(signature, tensors.aux)),
        None if tensors.append is None else tuple(map(signature, tensors.append)),
        None
        if tensors.blocks is None
        else (*map(signature, tensors.blocks[:-1]), tensors.blocks.block_size),
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


def _shortcut(
    record: Any, ver: int | str | None, tensors: Tensors, scalars: tuple[Any, ...]
) -> Shortcut | None:
    """A shortcut to `record` for calls like this one, where there can be one."""
    places = [i for i, tensor in enumerate(tensors) if tensor is not None]
    rest = [i for i, tensor in enumerate(tensors) if tensor is None]
    nested = (tensors.append, tensors.aux, tensors.blocks)
    if any(part is not None for part in nested) or len(rest) < 2:
        return None
    given = operator.itemgetter(*places)
    shortcut = Shortcut(
        record,
        ver,
        scalars,
        dispatch.is_strict(),
        torch.is_grad_enabled(),
        given,
        operator.itemgetter(*rest),
        (None,) * len(rest),
        _guard(*given(tensors)),
    )
    return shortcut if shortcut.fits(ver, tensors, scalars) else None


def _guard(*tensors: torch.Tensor) -> Callable[..., bool]:
    guards: Any = torch._C._dynamo.guards
    guard = guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    check: Callable[..., bool] = guard.check
    return check


@functools.cache
def guards_work() -> bool:
    """Whether this torch has tensor guards, and they see what they are relied on to see."""
    try:
        one, two = torch.zeros(2, 3), torch.zeros(4, dtype=torch.int32)
        check = _guard(one, two)
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

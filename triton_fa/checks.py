"""Small checks of caller input with uniform messages: argument, expected, got."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from triton_fa.errors import ArgumentError, ArgumentTypeError, ArgumentValueError


def require_tensor(name: str, value: object) -> torch.Tensor:
    """`value` as a tensor."""
    if not isinstance(value, torch.Tensor):
        raise ArgumentTypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    return value


def require_rank(name: str, tensor: torch.Tensor, rank: int, layout: str) -> None:
    """`tensor` has `rank` dimensions; `layout` names them for the message."""
    if tensor.dim() != rank:
        raise ArgumentError(f"{name}: expected {rank} dimensions {layout}, got {_shape(tensor)}")


def require_shape(name: str, tensor: torch.Tensor, shape: Sequence[int]) -> None:
    """`tensor` has exactly `shape`."""
    if tuple(tensor.shape) != tuple(shape):
        raise ArgumentError(f"{name}: expected shape {tuple(shape)}, got {_shape(tensor)}")


def require_dtype(name: str, tensor: torch.Tensor, allowed: Sequence[torch.dtype]) -> None:
    """`tensor` has one of the `allowed` dtypes."""
    if tensor.dtype not in allowed:
        wanted = " or ".join(_dtype(d) for d in allowed)
        raise ArgumentError(f"{name}: expected dtype {wanted}, got {_dtype(tensor.dtype)}")


def require_device(name: str, tensor: torch.Tensor, device: torch.device, like: str = "q") -> None:
    """`tensor` lives on `device`, where the argument `like` is."""
    if tensor.device != device:
        raise ArgumentError(
            f"{name}: expected device {device} (that of {like}), got {tensor.device}"
        )


def require_no_grad(tensors: Mapping[str, torch.Tensor | None]) -> None:
    """No tensor asks for a gradient while gradients are recorded: there is no backward pass."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            raise ArgumentError(
                f"{name}: expected no gradient (forward only), got requires_grad=True; "
                "use torch.no_grad() or detach()"
            )


def require_index(name: str, value: object, shape: Sequence[int], device: torch.device) -> None:
    """`value` is an int32 tensor of `shape` on `device`, contiguous in its last dimension."""
    tensor = require_tensor(name, value)
    require_dtype(name, tensor, (torch.int32,))
    require_shape(name, tensor, shape)
    require_device(name, tensor, device)
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ArgumentError(f"{name}: expected last stride 1, got strides {tensor.stride()}")


def require_int(name: str, value: object, minimum: int) -> int:
    """`value` as an int of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < minimum:
        raise ArgumentValueError(f"{name}: expected at least {minimum}, got {value}")
    return value


def require_bool(name: str, value: object) -> bool:
    """`value` as a bool."""
    if not isinstance(value, bool):
        raise ArgumentTypeError(f"{name}: expected a bool, got {type(value).__name__}")
    return value


def require_float(name: str, value: object) -> float:
    """`value` as a finite float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgumentTypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not -float("inf") < value < float("inf"):
        raise ArgumentValueError(f"{name}: expected a finite number, got {value}")
    return float(value)


def one_spelling(**spellings: Any) -> Any:
    """The value given under one of several names of the same argument; two that differ raise."""
    given = {name: value for name, value in spellings.items() if value is not None}
    if not given:
        return None
    values = list(given.values())
    if any(value is not values[0] and not _equal_ints(value, values[0]) for value in values[1:]):
        names = " and ".join(given)
        raise ArgumentValueError(f"{names}: expected one of these spellings, got several")
    return values[0]


def _equal_ints(a: object, b: object) -> bool:
    return type(a) is int and type(b) is int and a == b


def _shape(tensor: torch.Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""What the stand-ins share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from triton_fa.device import runs_triton
from triton_fa.errors import UnsupportedError


def own_version(tensor: torch.Tensor) -> str:
    """The backend that is our own: never a binary, which may be the module that we stand in for."""
    return "triton" if runs_triton(tensor.device) else "torch"


def refuse(tensor: torch.Tensor, **given: Any) -> None:
    """Raise for every argument of the other package that has a value and no meaning here."""
    reasons = [name for name, value in given.items() if value is not None and value is not False]
    if reasons:
        raise UnsupportedError(
            own_version(tensor), [f"{name} is not supported" for name in reasons]
        )


def on_own_version(
    function: Callable[..., Any], shape_result: Callable[[Any], Any]
) -> Callable[..., Any]:
    """`function`, whose parameters are the other package's too, for whatever `ver`."""

    @functools.wraps(function)
    def call(q: torch.Tensor, *args: Any, ver: object = None, **kwargs: Any) -> Any:
        return shape_result(function(q, *args, ver=own_version(q), **kwargs))

    return call


def unchanged(result: Any) -> Any:
    """`out`, or `(out, lse)`."""
    return result


def with_accumulators(result: Any) -> Any:
    """`out`, or FA3's `(out, lse, out_accum, lse_accum)`, the last two empty."""
    if isinstance(result, torch.Tensor):
        return result
    out, lse = result
    return out, lse, lse.new_empty(0), lse.new_empty(0)

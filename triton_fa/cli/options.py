"""Options that several commands have, and what a model's attention is called on the line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import click
import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True, slots=True)
class Shape:
    """Heads and head dims of a model's attention."""

    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int

    def __str__(self) -> str:
        values = f",{self.head_dim_v}" if self.head_dim_v != self.head_dim else ""
        return f"{self.num_heads_q}/{self.num_heads_kv}x{self.head_dim}{values}"


def _shape(text: str) -> Shape:
    found = re.fullmatch(r"(\d+)/(\d+)x(\d+)(?:,(\d+))?", text)
    if found is None:
        raise click.BadParameter(f"{text!r}: expected query heads/kv heads x head dim: 32/8x128")
    heads_q, heads_kv, dim, dim_v = (int(n) for n in found.groups(default=found[3]))
    if not (heads_q and heads_kv and dim and dim_v) or heads_q % heads_kv:
        raise click.BadParameter(f"{text!r}: expected a multiple of the kv heads as query heads")
    return Shape(heads_q, heads_kv, dim, dim_v)


def _shapes(_: click.Context, __: click.Parameter, texts: tuple[str, ...]) -> tuple[Shape, ...]:
    return tuple(map(_shape, texts))


def _device(_: click.Context, __: click.Parameter, text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (AssertionError, RuntimeError) as error:
        raise click.BadParameter(f"{text!r}: {str(error).splitlines()[0]}") from error


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def shapes() -> Decorator:
    """One shape or more."""
    return click.argument("shapes", metavar="SHAPE...", nargs=-1, required=True, callback=_shapes)


def dtype(names: Iterable[str] = DTYPES) -> Decorator:
    """The dtype of queries, keys and values."""
    return click.option(
        "--dtype",
        type=click.Choice(list(names)),
        default="bf16",
        show_default=True,
        help="Of queries, keys and values.",
    )


def device(default: Callable[[], str]) -> Decorator:
    """The device to run on."""
    return click.option("--device", default=default, callback=_device, help="Where to run.")


def gpu_or_cpu() -> str:
    """The current GPU, or the CPU where there is none."""
    return "cuda" if torch.cuda.is_available() else "cpu"

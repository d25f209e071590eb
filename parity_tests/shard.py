"""Parts of a run for several machines: ``--shard i/n`` is the i-th of n."""

from collections.abc import Sequence
from typing import Any, TypeVar

import click

T = TypeVar("T")


def parse(text: str) -> tuple[int, int]:
    """(i, n) of ``i/n`` with 1 <= i <= n."""
    first, _, last = text.partition("/")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise ValueError(f"expected i/n with 1 <= i <= n, got {text!r}")
    return int(first), int(last)


def part(items: Sequence[T], shard: tuple[int, int]) -> list[T]:
    """The i-th of n parts, whose sizes differ by one at most; all parts together are the items."""
    index, count = shard
    return list(items[index - 1 :: count])


class Shard(click.ParamType):
    """``i/n`` with 1 <= i <= n, as an option of a command."""

    name = "i/n"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """(i, n) of what was typed."""
        try:
            return parse(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)

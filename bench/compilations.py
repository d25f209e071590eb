"""What Triton compiles while something else runs."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple


class Compilation(NamedTuple):
    """One that no cache had."""

    kernel: str
    seconds: float


@contextmanager
def compilations() -> Iterator[list[Compilation]]:
    """What is compiled while this is open; what is found in the disk cache is not."""
    seen: list[Compilation] = []
    if find_spec("triton") is None:
        yield seen
        return

    def listen(*, times: Any, cache_hit: bool, metadata: dict[str, Any], **_: object) -> None:
        if not cache_hit:
            seen.append(Compilation(metadata["name"], times.total / 1e6))

    knobs = importlib.import_module("triton").knobs.compilation
    before, knobs.listener = knobs.listener, listen
    try:
        yield seen
    finally:
        knobs.listener = before

"""What a mutant is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutant:
    """A bug put into one file of `triton_fa/kernels` by hand."""

    name: str
    file: str
    text: str
    """What is replaced: occurs exactly once in the file."""
    replacement: str
    breaks: str
    """What goes wrong, in a few words."""
    tests: tuple[str, ...]
    """Those of which one is expected to fail, as pytest names them."""
    blind: bool = False
    """Written before its author had read a test."""
    gpu: bool = False
    """Only a run on a GPU can fail: not run here, and not counted as killed."""

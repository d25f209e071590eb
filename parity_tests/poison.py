"""Memory that a call allocates for itself starts out as NaN, not as what happens to lie there."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

GARBAGE = -0x5A5A5A5B
"""What integers start out as: out of range as a length, a page and a tile."""


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Within it `torch.empty` and its siblings return poison: results, workspaces, plans.

    Allocations inside of compiled libraries are not reached.
    """
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poisoned(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta:
            return tensor
        if tensor.dtype == torch.int32:
            return tensor.fill_(GARBAGE)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    def poisoned_empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        return poisoned(empty(*args, **kwargs))

    def poisoned_empty_like(*args: Any, **kwargs: Any) -> torch.Tensor:
        return poisoned(empty_like(*args, **kwargs))

    def poisoned_new_empty(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return poisoned(new_empty(self, *args, **kwargs))

    with (
        mock.patch.object(torch, "empty", poisoned_empty),
        mock.patch.object(torch, "empty_like", poisoned_empty_like),
        mock.patch.object(torch.Tensor, "new_empty", poisoned_new_empty),
    ):
        yield

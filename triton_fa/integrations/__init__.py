"""This package inside other frameworks. Each module imports the framework it is for."""

from __future__ import annotations

from triton_fa.errors import TritonFAError


class FeatureError(TritonFAError, NotImplementedError):
    """A framework asks for something that attention here does not do; the message names it."""

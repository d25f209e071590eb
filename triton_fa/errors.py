"""Every error this package raises on purpose.

TritonFAError
├── ArgumentError            (RuntimeError)         shape, dtype, device or ratio of a tensor
├── ArgumentTypeError        (TypeError)            not the kind of object that was expected
├── ArgumentValueError       (ValueError)           missing, contradicting or out-of-range value
├── LayoutError              (AssertionError)       a stride that no backend accepts
├── UnknownVersionError      (RuntimeError)         `ver` names no backend
├── UnsupportedError         (NotImplementedError)  the backend does not do this, with every reason
└── BackendUnavailableError  (ImportError)          the backend cannot be loaded here

The second base is the type that FlashAttention-3 or SGLang raises for the same mistake.
"""

from __future__ import annotations

from collections.abc import Sequence


class TritonFAError(Exception):
    """Base of all errors raised on purpose."""


class ArgumentError(TritonFAError, RuntimeError):
    """A tensor has the wrong shape, dtype, device or head ratio."""


class ArgumentTypeError(TritonFAError, TypeError):
    """An argument is not the kind of object that was expected."""


class ArgumentValueError(TritonFAError, ValueError):
    """An argument is missing, out of range, or contradicts another one."""


class LayoutError(TritonFAError, AssertionError):
    """A tensor's last dimension is not contiguous where every backend needs it to be."""


class UnknownVersionError(TritonFAError, RuntimeError):
    """`ver` names no backend."""


class UnsupportedError(TritonFAError, NotImplementedError):
    """The backend `ver` does not do what was asked; `reasons` lists everything that is missing."""

    def __init__(self, ver: int | str, reasons: Sequence[str]) -> None:
        self.ver = ver
        self.reasons = tuple(reasons)
        super().__init__(f"ver={ver!r} does not support this call: " + "; ".join(self.reasons))


class BackendUnavailableError(TritonFAError, ImportError):
    """The backend `ver` cannot be loaded or cannot run on this device; `reason` says why."""

    def __init__(self, ver: int | str, reason: str) -> None:
        self.ver = ver
        self.reason = reason
        super().__init__(f"ver={ver!r} is not available: {reason}")

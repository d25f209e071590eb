"""Numbers of 8 bits: what they stand for, and moving them as they are."""

import torch

from reference.attention import Tensor

DTYPES = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)


def is_float8(x: Tensor) -> bool:
    """Whether these are such numbers."""
    return x.dtype in DTYPES


def bits(x: Tensor) -> Tensor:
    """The same memory as a dtype that can be indexed and assigned to on every device."""
    return x.view(torch.uint8) if is_float8(x) else x


def dequantise(x: Tensor, factors: Tensor, like: Tensor) -> Tensor:
    """x times its factors, which are broadcast against it, in float64.

    `like` are the queries of the call, whose dtype decides nothing here.
    """
    del like
    return x.double() * factors.double()

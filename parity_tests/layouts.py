"""Tensors as engines lay them out in memory, filled with one value."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from parity_tests.cases import Case

Tensor = torch.Tensor


def named_dtype(name: str) -> torch.dtype:
    """The dtype of this name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def bits(x: Tensor) -> Tensor:
    """The same memory as integers where x is float8: what every device can index and assign."""
    return x.view(torch.uint8) if x.element_size() == 1 else x


def strided(shape: tuple[int, ...], odd: bool, fill: float, dtype: str, device: str) -> Tensor:
    """A filled tensor; with `odd` a slice of a larger one, so that no dimension is contiguous."""
    if not odd:
        return torch.full(shape, fill, dtype=named_dtype(dtype), device=device)
    *lead, heads, dim = shape
    wide = torch.full((*lead, heads + 1, dim + 8), fill, dtype=named_dtype(dtype), device=device)
    return wide[..., 1:, :dim]


def kv_buffers(
    lead: tuple[int, ...], case: "Case", fill: float, device: str
) -> tuple[Tensor, Tensor]:
    """k (*lead, heads_kv, head_dim) and v, laid out in memory as engines lay them out."""
    heads, d, dv = case.heads_kv, case.head_dim, case.head_dim_v

    def full(*shape: int) -> Tensor:
        return torch.full(shape, fill, dtype=named_dtype(case.of_keys), device=device)

    if case.kv_strides == "latent":  # MLA: values, and behind them what of keys is rotated
        both = full(*lead, heads, dv + d)
        return both[..., dv:], both[..., :dv]
    if case.kv_strides == "split":  # vLLM: (blocks, heads, page, k and v side by side)
        pages, page_size = lead
        both = full(pages, heads, page_size, d + dv).transpose(1, 2)
        return both[..., :d], both[..., d:]
    if case.kv_strides == "fused":  # one row holds k and v of a head: v is a view at an offset
        both = full(*lead, heads, d + dv)
        return both[..., :d], both[..., d:]
    if case.kv_strides == "sliced":  # as cut from a packed qkv projection, heads k then heads v
        both = full(*lead, 2 * heads + 1, max(d, dv))
        return both[..., 1 : heads + 1, :d], both[..., heads + 1 :, :dv]
    return full(*lead, heads, d), full(*lead, heads, dv)


def prefix_sum(lengths: list[int]) -> list[int]:
    """0, and the sum up to each length."""
    total = [0]
    for n in lengths:
        total.append(total[-1] + n)
    return total


def int32(values: list[int], device: str) -> Tensor:
    """Lengths, positions and the like on the device."""
    return torch.tensor(values, dtype=torch.int32, device=device)

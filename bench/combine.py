"""Merging partial results: ours, plain PyTorch, and the functions of FlashAttention-3 and -4."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

import triton_fa
from bench.inputs import Inputs

Combine = Callable[..., tuple[torch.Tensor, Any]]

# sglang-kernel exports no such function: its attention merges inside.
PEERS = {"3": "flash_attn_interface", "4": "flash_attn.cute.interface"}


def plain(
    out_partial: torch.Tensor, lse_partial: torch.Tensor, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the parts by their shares, as PyTorch computes it."""
    shares = lse_partial.softmax(0)
    return (shares[..., None] * out_partial).sum(0).to(out_dtype), lse_partial.logsumexp(0)


def find(label: str) -> Combine:
    """The function behind a label.

    Raises:
        triton_fa.BackendUnavailableError: its module is not here, or has none.
        triton_fa.UnsupportedError: the label names no way of merging.
    """
    own: dict[str, Combine] = {"triton": triton_fa.flash_attn_combine, "torch": plain}
    if label in own:
        return own[label]
    if label not in PEERS:
        raise triton_fa.UnsupportedError(label, ["merging partial results"])
    name = PEERS[label]
    try:
        combine: Combine = importlib.import_module(name).flash_attn_combine
    except Exception as error:  # a broken binary raises anything
        reason = f"{name}.flash_attn_combine: {type(error).__name__}: {error}"
        raise triton_fa.BackendUnavailableError(int(label), reason) from error
    return combine


def bind_attention(label: str, inputs: Inputs) -> Callable[[Inputs], torch.Tensor]:
    """The call of a row that merges; its result has the dtype of queries."""
    combine = find(label)
    dtype = getattr(torch, inputs.row.out_dtype)

    def call(x: Inputs) -> torch.Tensor:
        out, _ = combine(x.options["out_partial"], x.options["lse_partial"], out_dtype=dtype)
        return out

    return call

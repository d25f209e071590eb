"""`TRITON_FA_VALIDATE=1`: look at the lengths, prefix sums and page ids of every call.

The kernels clamp whatever they read, so a bad value costs a wrong row and never a bad access. This
says which value it was. Reading them waits for the device, which cannot be done while a CUDA graph
is captured: those calls are not checked.
"""

from __future__ import annotations

import logging
from itertools import pairwise

import torch

from triton_fa.backends.base import Run
from triton_fa.errors import ArgumentError
from triton_fa.problem import AttnResult, Problem, Tensors

_logger = logging.getLogger("triton_fa")


def checked(run: Run, problem: Problem) -> Run:
    """`run`, behind a check of the values in its tensors."""
    bare = problem.without_tensors()

    def run_checked(tensors: Tensors) -> AttnResult:
        if _is_capturing(bare.spec.device):
            _logger.debug("values not checked: a graph is being captured")
        else:
            check_values(bare, tensors)
        return run(tensors)

    return run_checked


def check_values(problem: Problem, tensors: Tensors) -> None:
    """Check what the tensors of a call say about its sequences.

    Raises:
        ArgumentError: Naming the argument, the sequence, what was expected and what was found.
    """
    bounds = problem.bounds
    queries = [bounds.max_seqlen_q] * bounds.batch
    if tensors.cu_seqlens_q is not None:
        queries = _segments("cu_seqlens_q", tensors.cu_seqlens_q, "q", bounds.total_q)
        _at_most("cu_seqlens_q", queries, [bounds.max_seqlen_q] * bounds.batch, "max_seqlen_q")
    if tensors.seqused_q is not None:
        used = _values(tensors.seqused_q)
        _at_most("seqused_q", used, queries, "the sequence's queries")
        queries = used

    room = [bounds.max_seqlen_k] * bounds.batch
    room_name = "page_table's width x page_size" if tensors.page_table is not None else "the keys"
    if tensors.cu_seqlens_k is not None:
        keys = _segments("cu_seqlens_k", tensors.cu_seqlens_k, "k", tensors.k.shape[0])
        _at_most("cu_seqlens_k", keys, room, "max_seqlen_k")
        room, room_name = keys, "the sequence's keys"
    else:
        keys = [bounds.fixed_seqlen_k or 0] * bounds.batch
    if tensors.seqused_k is not None:
        keys = _values(tensors.seqused_k)
        name = "cache_seqlens" if problem.spec.entry == "kvcache" else "seqused_k"
        _at_most(name, keys, room, room_name)
    if tensors.page_table is not None:
        _check_pages(problem, tensors, tensors.page_table, queries, keys)


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _values(tensor: torch.Tensor) -> list[int]:
    return [int(value) for value in tensor.tolist()]


def _segments(name: str, cu_seqlens: torch.Tensor, of: str, total: int) -> list[int]:
    """The lengths that prefix sums describe, each inside `total` tokens."""
    ends = _values(cu_seqlens)
    if ends[0] != 0:
        raise ArgumentError(f"{name}: expected 0 as the first entry, got {ends[0]}")
    for index, (start, end) in enumerate(pairwise(ends)):
        if end < start:
            raise ArgumentError(
                f"{name}: expected sums that do not decrease, "
                f"got {end} after {start} for sequence {index}"
            )
        if end > total:
            raise ArgumentError(
                f"{name}: expected at most {total} (the tokens of {of}), "
                f"got {end} for sequence {index}"
            )
    return [end - start for start, end in pairwise(ends)]


def _at_most(name: str, lengths: list[int], most: list[int], limit: str) -> None:
    for index, (length, room) in enumerate(zip(lengths, most, strict=True)):
        if not 0 <= length <= room:
            raise ArgumentError(
                f"{name}: expected between 0 and {room} ({limit}), "
                f"got {length} for sequence {index}"
            )


def _check_pages(
    problem: Problem,
    tensors: Tensors,
    page_table: torch.Tensor,
    queries: list[int],
    keys: list[int],
) -> None:
    """Page ids that the call reads; what lies before every row's window may have been freed."""
    spec, num_pages = problem.spec, tensors.k.shape[0]
    rows = page_table.tolist()
    for index, (seqlen_q, seqlen_k) in enumerate(zip(queries, keys, strict=True)):
        if not seqlen_q:
            continue
        begin = 0
        if spec.window_left >= 0:
            begin = max(0, seqlen_k - seqlen_q - spec.window_left)
        for page in range(begin // spec.page_size, -(-seqlen_k // spec.page_size)):
            if not 0 <= rows[index][page] < num_pages:
                raise ArgumentError(
                    f"page_table: expected ids from 0 to {num_pages - 1}, "
                    f"got {rows[index][page]} for page {page} of sequence {index}"
                )

"""`TRITON_FA_VALIDATE=1`: look at the lengths, prefix sums, page ids and block lists of every call.

The kernels clamp whatever they read, so a bad value costs a wrong row and never a bad access. This
says which value it was. Reading them waits for the device, which cannot be done while a CUDA graph
is captured: those calls are not checked.
"""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import NamedTuple

import torch

from triton_fa.backends.base import Run
from triton_fa.errors import ArgumentError
from triton_fa.problem import Append, AttnResult, Problem, Tensors

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


class _Sequence(NamedTuple):
    """The lengths of one sequence."""

    queries: int
    cached: int  # keys before any is appended, left padding included
    new: int
    leftpad: int


def check_values(problem: Problem, tensors: Tensors) -> None:
    """Check what the tensors of a call say about its sequences.

    Raises:
        ArgumentError: Naming the argument, the sequence, what was expected and what was found.
    """
    queries = _queries(problem, tensors)
    room = [problem.bounds.max_seqlen_k] * problem.bounds.batch
    room_name = "page_table's width x page_size" if tensors.page_table is not None else "the keys"
    if tensors.cu_seqlens_k is not None:
        keys = _segments("cu_seqlens_k", tensors.cu_seqlens_k, "k", tensors.k.shape[0])
        _at_most("cu_seqlens_k", keys, room, "max_seqlen_k")
        room, room_name = keys, "the sequence's keys"
    else:
        keys = [problem.bounds.fixed_seqlen_k or 0] * problem.bounds.batch
    if tensors.seqused_k is not None:
        keys = _values(tensors.seqused_k)
        name = "cache_seqlens" if problem.spec.entry == "kvcache" else "seqused_k"
        _at_most(name, keys, room, room_name)

    new = [problem.bounds.max_seqlen_new] * problem.bounds.batch
    if tensors.append is not None:
        if tensors.append.cu_seqlens_k_new is not None:
            prefix = tensors.append.cu_seqlens_k_new
            new = _segments("cu_seqlens_k_new", prefix, "k", tensors.append.k.shape[0])
        left = [most - n for most, n in zip(room, keys, strict=True)]
        _at_most("k", new, left, f"{room_name} less cache_seqlens")
    leftpads = [0] * problem.bounds.batch
    if tensors.cache_leftpad is not None:
        leftpads = _values(tensors.cache_leftpad)
        _at_most("cache_leftpad", leftpads, keys, "the sequence's keys")
    if tensors.blocks is not None:
        _check_lists("mask_block", tensors.blocks.mask_block_cnt, tensors.blocks.mask_block_idx)
        _check_lists("full_block", tensors.blocks.full_block_cnt, tensors.blocks.full_block_idx)
    rows = _rows(problem, tensors)
    sequences = list(map(_Sequence, queries, keys, new, leftpads))
    if tensors.append is not None and tensors.append.rotary_cos is not None:
        _check_rotary(problem, tensors.append, sequences)
    if tensors.page_table is not None:
        _check_pages(problem, tensors, tensors.page_table[rows], sequences)


def _check_lists(name: str, counts: torch.Tensor | None, entries: torch.Tensor | None) -> None:
    """Lists of key blocks: as many as they have room for, in ascending order from 0."""
    if counts is None or entries is None:
        return
    for count, row in zip(_values(counts.flatten()), entries.flatten(0, -2).tolist(), strict=True):
        if not 0 <= count <= len(row):
            raise ArgumentError(
                f"block_sparse_tensors.{name}_cnt: expected 0 to {len(row)}, got {count}"
            )
        if any(later <= block for block, later in pairwise((-1, *row[:count]))):
            raise ArgumentError(
                f"block_sparse_tensors.{name}_idx: expected ascending blocks, got {row[:count]}"
            )


def _queries(problem: Problem, tensors: Tensors) -> list[int]:
    bounds = problem.bounds
    queries = [bounds.max_seqlen_q] * bounds.batch
    if tensors.cu_seqlens_q is not None:
        queries = _segments("cu_seqlens_q", tensors.cu_seqlens_q, "q", bounds.total_q)
        _at_most("cu_seqlens_q", queries, [bounds.max_seqlen_q] * bounds.batch, "max_seqlen_q")
    if tensors.seqused_q is not None:
        used = _values(tensors.seqused_q)
        _at_most("seqused_q", used, queries, "the sequence's queries")
        queries = used
    return queries


def _rows(problem: Problem, tensors: Tensors) -> list[int]:
    """Each sequence's row of page_table, or of a dense cache."""
    if tensors.cache_batch_idx is None:
        return list(range(problem.bounds.batch))
    rows = _values(tensors.cache_batch_idx)
    name, held = "k_cache", tensors.k
    if tensors.page_table is not None:
        name, held = "page_table", tensors.page_table
    _at_most("cache_batch_idx", rows, [held.shape[0] - 1] * len(rows), f"{name}'s last row")
    return rows


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


def _check_rotary(problem: Problem, append: Append, sequences: list[_Sequence]) -> None:
    """Positions of the new keys and of the queries, which without a mask are all at the first."""
    assert append.rotary_cos is not None
    held = append.rotary_cos.shape[0]
    moving = problem.spec.rotary_moving
    begins = [seq.cached for seq in sequences]
    name = "cache_seqlens"
    if append.rotary_seqlens is not None:
        begins, name = _values(append.rotary_seqlens), "rotary_seqlens"
    for index, (seq, begin) in enumerate(zip(sequences, begins, strict=True)):
        count = max(seq.new, seq.queries if moving else min(1, seq.queries))
        if count and not 0 <= begin <= held - count:
            raise ArgumentError(
                f"{name}: expected between 0 and {held - count} (rotary_cos has {held} rows, "
                f"for {count} positions), got {begin} for sequence {index}"
            )


def _check_pages(
    problem: Problem, tensors: Tensors, page_table: torch.Tensor, sequences: list[_Sequence]
) -> None:
    """Page ids that the call reads; what lies before every row's window may have been freed."""
    page_size, num_pages = problem.spec.page_size, tensors.k.shape[0]
    for index, (row, seq) in enumerate(zip(page_table.tolist(), sequences, strict=True)):
        if not (seq.queries or seq.new):
            continue
        end = seq.cached + seq.new
        begin = seq.cached
        if seq.queries:
            begin = min(begin, seq.leftpad + _first_visible(problem, seq))
        for page in range(begin // page_size, -(-end // page_size)):
            if not 0 <= row[page] < num_pages:
                raise ArgumentError(
                    f"page_table: expected ids from 0 to {num_pages - 1}, "
                    f"got {row[page]} for page {page} of sequence {index}"
                )


def _first_visible(problem: Problem, seq: _Sequence) -> int:
    """The first key, counted behind the left padding, that a query of the sequence sees."""
    spec = problem.spec
    position = seq.cached + seq.new - seq.leftpad - seq.queries
    begin = 0
    if spec.window_left >= 0:
        begin = position - spec.window_left
    if spec.attention_chunk:
        begin = max(begin, position // spec.attention_chunk * spec.attention_chunk)
    return max(0, begin)

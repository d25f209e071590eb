"""Attention in plain PyTorch, for devices that Triton does not run on.

Loops over the sequences, so it reads the lengths on the host: each call waits for the device and
cannot be captured in a graph. Scores and sums are float32, whatever the inputs are. Lengths and
page ids are clamped like in the kernels, and only tokens and pages in use are ever touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch

from triton_fa.backends.base import Run, allocate, without_work
from triton_fa.problem import AttnResult, Problem, Tensors
from triton_fa.spec import AttnSpec

SUPPORTED_FEATURES = frozenset(
    {"sinks", "scheduler_metadata", "seqused_q", "out", "batch_invariant"}
)
# Scores held at once: query rows are taken in pieces, so that memory stays bounded.
_MAX_SCORES = 1 << 25


class TorchBackend:
    """Plain PyTorch on any device."""

    ver: int | str = "torch"

    def unavailable(self, device: torch.device) -> str | None:
        """PyTorch is always there."""
        return None

    def detail(self) -> str:
        """The PyTorch version."""
        return f"torch {torch.__version__}"

    def unsupported(self, spec: AttnSpec) -> list[str]:
        """What is not there yet, by argument name.

        `scheduler_metadata`, `num_splits`, `sm_margin` and `pack_gqa` only say how to share out
        work that is not shared out here: rows are always computed unsplit.
        """
        return [
            f"{name} is not supported yet" for name in sorted(spec.features - SUPPORTED_FEATURES)
        ]

    def prepare(self, problem: Problem) -> Run:
        """Nothing can be prepared: the lengths decide everything."""
        bare = problem.without_tensors()
        if without_work(problem):
            return lambda tensors: allocate(bare, tensors)
        return lambda tensors: _run(bare, tensors)


def _run(problem: Problem, tensors: Tensors) -> AttnResult:
    result = allocate(problem, tensors)
    packed = problem.spec.query_layout == "packed"
    for seq in _sequences(problem, tensors):
        # [tokens, heads_q, dim] of this sequence
        q = tensors.q if packed else tensors.q[seq.seq_idx]
        out = result.out if packed else result.out[seq.seq_idx]
        lse = None
        if result.lse is not None:
            lse = result.lse if packed else result.lse[seq.seq_idx]
        for first, last in _pieces(problem.spec, seq):
            rows = slice(seq.first_q + first, seq.first_q + last)
            begin, end = _visible(problem.spec, seq, first, last)
            k, v = _keys(problem, tensors, seq, begin, end)
            positions = torch.arange(first, last, device=q.device) + seq.offset - begin
            piece, piece_lse = _attend(problem.spec, q[rows], k, v, positions, tensors.sinks)
            out[rows] = piece.to(out.dtype)
            if lse is not None:
                lse[:, rows] = piece_lse
    return result


class _Sequence(NamedTuple):
    """Where one sequence is, by lengths that were clamped into the tensors."""

    seq_idx: int
    first_q: int
    seqlen_q: int
    first_k: int
    seqlen_k: int

    @property
    def offset(self) -> int:
        """Key position of query token 0."""
        return self.seqlen_k - self.seqlen_q


def _sequences(problem: Problem, tensors: Tensors) -> Iterator[_Sequence]:
    """Every sequence with at least one query."""
    spec, bounds = problem.spec, problem.bounds
    packed_k = spec.key_layout == "packed"
    # Keys without any page or token behind them do not exist, whatever the lengths say.
    most_k = bounds.max_seqlen_k if tensors.k.shape[0] else 0
    queries = _spans(tensors.cu_seqlens_q, bounds.batch, bounds.total_q, bounds.max_seqlen_q)
    fixed_k = min(bounds.fixed_seqlen_k or 0, most_k)
    keys = _spans(tensors.cu_seqlens_k, bounds.batch, tensors.k.shape[0], fixed_k)
    used_q, used_k = _values(tensors.seqused_q), _values(tensors.seqused_k)
    for seq_idx in range(bounds.batch):
        first_q, seqlen_q = queries[seq_idx]
        if used_q is not None:
            seqlen_q = _clamp(used_q[seq_idx], seqlen_q)
        first_k, seqlen_k = keys[seq_idx]
        if used_k is not None:
            seqlen_k = _clamp(used_k[seq_idx], seqlen_k if packed_k else most_k)
        if seqlen_q:
            yield _Sequence(seq_idx, first_q, seqlen_q, first_k, seqlen_k)


def _spans(
    cu_seqlens: torch.Tensor | None, batch: int, total: int, fixed: int
) -> list[tuple[int, int]]:
    """(first token, length) of each sequence, inside `total` whatever the prefix sums hold."""
    ends = _values(cu_seqlens)
    if ends is None:
        return [(0, fixed)] * batch
    spans = []
    for start, end in pairwise(ends):
        first = _clamp(start, total)
        spans.append((first, min(max(end, first), total) - first))
    return spans


def _values(tensor: torch.Tensor | None) -> list[int] | None:
    return None if tensor is None else [int(value) for value in tensor.tolist()]


def _clamp(value: int, most: int) -> int:
    return min(max(value, 0), most)


def _pieces(spec: AttnSpec, seq: _Sequence) -> Iterator[tuple[int, int]]:
    """Query tokens [first, last) that are computed together."""
    size = max(1, _MAX_SCORES // (spec.num_heads_q * max(seq.seqlen_k, 1)))
    for first in range(0, seq.seqlen_q, size):
        yield first, min(first + size, seq.seqlen_q)


def _visible(spec: AttnSpec, seq: _Sequence, first: int, last: int) -> tuple[int, int]:
    """[begin, end) of the keys that query tokens [first, last) see between them."""
    begin, end = 0, seq.seqlen_k
    if spec.window_left >= 0:
        begin = max(0, first + seq.offset - spec.window_left)
    if spec.window_right >= 0:
        end = min(end, last + seq.offset + spec.window_right)
    return begin, max(begin, end)


def _keys(
    problem: Problem, tensors: Tensors, seq: _Sequence, begin: int, end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [begin, end) of one sequence, (tokens, heads_kv, dim)."""
    k, v = tensors.k, tensors.v
    if problem.spec.key_layout == "packed":
        tokens = slice(seq.first_k + begin, seq.first_k + end)
        return k[tokens], v[tokens]
    if tensors.page_table is None:
        return k[seq.seq_idx, begin:end], v[seq.seq_idx, begin:end]
    if begin == end:
        return k[:0].flatten(0, 1), v[:0].flatten(0, 1)
    page_size = problem.spec.page_size
    first_page = begin // page_size
    pages = tensors.page_table[seq.seq_idx, first_page : -(-end // page_size)]
    pages = pages.clamp(0, k.shape[0] - 1)
    tokens = slice(begin - first_page * page_size, end - first_page * page_size)
    return k[pages].flatten(0, 1)[tokens], v[pages].flatten(0, 1)[tokens]


def _attend(
    spec: AttnSpec,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of queries at key `positions` against keys 0, 1, ...: (out, lse) in float32.

    q: (rows, heads_q, dim); out: (rows, heads_q, dim_v); lse: (heads_q, rows).
    """
    rows, heads_q, head_dim = q.shape
    heads_kv, group, keys = spec.num_heads_kv, spec.q_heads_per_kv, k.shape[0]
    # One matrix per kv head, the heads of its group one after the other.
    grouped = q.float().view(rows, heads_kv, group, head_dim).permute(1, 2, 0, 3)
    grouped = grouped.reshape(heads_kv, group * rows, head_dim)
    scores = torch.matmul(grouped, k.float().permute(1, 2, 0)) * spec.softmax_scale
    if spec.softcap > 0:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)

    columns = torch.arange(keys, device=q.device)
    hidden = torch.zeros((rows, keys), dtype=torch.bool, device=q.device)
    if spec.window_left >= 0:
        hidden |= columns < positions[:, None] - spec.window_left
    if spec.window_right >= 0:
        hidden |= columns > positions[:, None] + spec.window_right
    scores = scores.view(heads_q, rows, keys).masked_fill(hidden, -torch.inf)

    lse = torch.logsumexp(scores, -1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.float()[:, None])
    # An empty row would otherwise compute -inf - (-inf).
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    out = torch.matmul(weights.view(heads_kv, group * rows, keys), v.float().transpose(0, 1))
    return out.view(heads_q, rows, -1).transpose(0, 1), lse


BACKEND = TorchBackend()

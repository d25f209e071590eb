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
from triton_fa.problem import Append, AttnResult, Problem, Tensors
from triton_fa.spec import AttnSpec

SUPPORTED_FEATURES = frozenset(
    {
        "sinks",
        "scheduler_metadata",
        "seqused_q",
        "out",
        "batch_invariant",
        "k",
        "rotary_cos",
        "rotary_seqlens",
        "cache_batch_idx",
        "cache_leftpad",
        "attention_chunk",
        "qv",
        "only_qv",
        "q_descale",
        "k_descale",
        "v_descale",
    }
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
        if without_work(problem) and not problem.bounds.total_new:
            return lambda tensors: allocate(bare, tensors)
        return lambda tensors: _run(bare, tensors)


def _run(problem: Problem, tensors: Tensors) -> AttnResult:
    spec, append = problem.spec, tensors.append
    result = allocate(problem, tensors)
    sequences = list(_sequences(problem, tensors))
    if append is not None:
        for seq in sequences:
            _append(spec, tensors, append, seq)
    packed = spec.query_layout == "packed"
    moving = spec.rotary_moving
    for seq in sequences:
        # [tokens, heads_q, dim] of this sequence
        q = tensors.q if packed else tensors.q[seq.seq_idx]
        out = result.out if packed else result.out[seq.seq_idx]
        lse = None
        if result.lse is not None:
            lse = result.lse if packed else result.lse[seq.seq_idx]
        for first, last in _pieces(spec, seq):
            rows = slice(seq.first_q + first, seq.first_q + last)
            tokens = torch.arange(first, last, device=q.device)
            q_rows = q[rows]
            if append is not None:
                q_rows = _turned(spec, append, q_rows, seq.position + int(moving) * tokens)
            begin, end = _visible(spec, seq, first, last)
            k, v = _keys(problem, tensors, seq, begin, end)
            hidden = _hidden(spec, tokens + seq.offset, torch.arange(begin, end, device=q.device))
            k, v = _scaled(tensors.k_descale, k, seq), _scaled(tensors.v_descale, v, seq)
            q_rows = _scaled(tensors.q_descale, q_rows, seq)
            if tensors.qv is not None:
                qv = (tensors.qv if packed else tensors.qv[seq.seq_idx])[rows].float()
                only = "only_qv" in spec.features
                q_rows = qv if only else torch.cat((q_rows, qv), -1)
                k = v if only else torch.cat((k, v), -1)
            piece, piece_lse = _attend(spec, q_rows, k, v, hidden, tensors.sinks)
            out[rows] = piece.to(out.dtype)
            if lse is not None:
                lse[:, rows] = piece_lse
    return result


class _Sequence(NamedTuple):
    """Where one sequence is, by lengths that were clamped into the tensors."""

    seq_idx: int
    row: int  # of the dense cache or of page_table, as the caller gave it
    first_q: int
    seqlen_q: int
    first_k: int  # among the packed keys, or in its cache row, behind the left padding
    seqlen_k: int  # with the appended keys, without the left padding
    cached: int  # where the appended keys begin in the cache row
    first_new: int
    seqlen_new: int  # of them, what the row has room for
    position: int  # that the first new key and the first query are rotated by

    @property
    def offset(self) -> int:
        """Key position of query token 0."""
        return self.seqlen_k - self.seqlen_q


def _sequences(problem: Problem, tensors: Tensors) -> Iterator[_Sequence]:
    spec, bounds = problem.spec, problem.bounds
    append = tensors.append
    packed_k = spec.key_layout == "packed"
    # Keys without any page or token behind them do not exist, whatever the lengths say.
    most_k = bounds.max_seqlen_k if tensors.k.shape[0] else 0
    queries = _spans(tensors.cu_seqlens_q, bounds.batch, bounds.total_q, bounds.max_seqlen_q)
    fixed_k = min(bounds.fixed_seqlen_k or 0, most_k)
    keys = _spans(tensors.cu_seqlens_k, bounds.batch, tensors.k.shape[0], fixed_k)
    cu_seqlens_new = None if append is None else append.cu_seqlens_k_new
    new = _spans(cu_seqlens_new, bounds.batch, bounds.total_new, bounds.max_seqlen_new)
    used_q, used_k = _values(tensors.seqused_q), _values(tensors.seqused_k)
    rows, leftpads = _values(tensors.cache_batch_idx), _values(tensors.cache_leftpad)
    positions = None if append is None else _values(append.rotary_seqlens)
    for seq_idx in range(bounds.batch):
        first_q, seqlen_q = queries[seq_idx]
        if used_q is not None:
            seqlen_q = _clamp(used_q[seq_idx], seqlen_q)
        first_k, cached = keys[seq_idx]
        if used_k is not None:
            cached = _clamp(used_k[seq_idx], cached if packed_k else most_k)
        first_new, seqlen_new = new[seq_idx]
        seqlen_new = min(seqlen_new, max(0, most_k - cached))
        leftpad = 0 if leftpads is None else _clamp(leftpads[seq_idx], cached + seqlen_new)
        yield _Sequence(
            seq_idx,
            seq_idx if rows is None else rows[seq_idx],
            first_q,
            seqlen_q,
            first_k + leftpad,
            cached + seqlen_new - leftpad,
            cached,
            first_new,
            seqlen_new,
            cached if positions is None else positions[seq_idx],
        )


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


def _append(spec: AttnSpec, tensors: Tensors, append: Append, seq: _Sequence) -> None:
    """Write the new keys and values of one sequence; a row or page that is not there drops them."""
    nth = torch.arange(seq.seqlen_new, device=tensors.k.device)
    tokens = seq.cached + nth
    table = tensors.page_table
    if table is None:
        rows, slots = torch.full_like(tokens, seq.row), tokens
    elif 0 <= seq.row < table.shape[0]:
        rows, slots = table[seq.row, tokens // spec.page_size].long(), tokens % spec.page_size
    else:
        return
    there = (rows >= 0) & (rows < tensors.k.shape[0])
    packed = append.cu_seqlens_k_new is not None
    k, v = (new if packed else new[seq.seq_idx] for new in (append.k, append.v))
    taken = seq.first_new + nth[there]
    places = (rows[there], slots[there])
    _bytes(tensors.k)[places] = _bytes(_turned(spec, append, k[taken], seq.position + nth[there]))
    _bytes(tensors.v)[places] = _bytes(v[taken])


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """float8 numbers as what every device can copy to an index."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def _turned(
    spec: AttnSpec, append: Append, x: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """`x` (tokens, heads, dim) with its leading dims rotated by the tokens' positions, if asked."""
    cos, sin = append.rotary_cos, append.rotary_sin
    if cos is None or sin is None:
        return x
    rows = positions.clamp(0, cos.shape[0] - 1)
    # [tokens, 1, rotary_dim / 2]
    cos, sin = cos[rows, None].float(), sin[rows, None].float()
    pairs = x[..., : spec.rotary_dim].float()
    if spec.rotary_interleaved:
        a, b = pairs[..., ::2], pairs[..., 1::2]
        pairs = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:
        a, b = pairs.chunk(2, -1)
        pairs = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    return torch.cat((pairs.to(x.dtype), x[..., spec.rotary_dim :]), -1)


def _scaled(descale: torch.Tensor | None, x: torch.Tensor, seq: _Sequence) -> torch.Tensor:
    """`x` (tokens, heads, dim) in float32, times the factor of its kv head."""
    if descale is None:
        return x.float()
    factors = descale[seq.seq_idx]
    return x.float() * factors.repeat_interleave(x.shape[1] // factors.shape[0])[:, None]


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
    if chunk := spec.attention_chunk:
        begin = max(begin, (first + seq.offset) // chunk * chunk)
        end = min(end, ((last - 1 + seq.offset) // chunk + 1) * chunk)
    return begin, max(begin, end)


def _keys(
    problem: Problem, tensors: Tensors, seq: _Sequence, begin: int, end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [begin, end) of one sequence, (tokens, heads_kv, dim)."""
    k, v = tensors.k, tensors.v
    if begin == end:
        return k.new_empty(0, *k.shape[-2:]), v.new_empty(0, *v.shape[-2:])
    first, last = seq.first_k + begin, seq.first_k + end
    if problem.spec.key_layout == "packed":
        return k[first:last], v[first:last]
    if tensors.page_table is None:
        row = _clamp(seq.row, k.shape[0] - 1)
        return k[row, first:last], v[row, first:last]
    page_size = problem.spec.page_size
    row = _clamp(seq.row, tensors.page_table.shape[0] - 1)
    first_page = first // page_size
    pages = tensors.page_table[row, first_page : -(-last // page_size)]
    pages = pages.clamp(0, k.shape[0] - 1)
    tokens = slice(first - first_page * page_size, last - first_page * page_size)
    return k[pages].flatten(0, 1)[tokens], v[pages].flatten(0, 1)[tokens]


def _hidden(spec: AttnSpec, positions: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Whether a query at key position p does not see a key, [positions, keys]."""
    at = positions[:, None]
    hidden = torch.zeros((len(positions), len(keys)), dtype=torch.bool, device=keys.device)
    if spec.window_left >= 0:
        hidden |= keys < at - spec.window_left
    if spec.window_right >= 0:
        hidden |= keys > at + spec.window_right
    if spec.attention_chunk:
        hidden |= keys // spec.attention_chunk != at // spec.attention_chunk
    return hidden


def _attend(
    spec: AttnSpec,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    hidden: torch.Tensor,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of queries against the keys that are not `hidden` from them: (out, lse) in float32.

    q: (rows, heads_q, dim); out: (rows, heads_q, dim_v); lse: (heads_q, rows).
    """
    rows, heads_q, head_dim = q.shape
    heads_kv, group, keys = spec.num_heads_kv, spec.q_heads_per_kv, k.shape[0]
    # One matrix per kv head, the heads of its group one after the other.
    grouped = q.view(rows, heads_kv, group, head_dim).permute(1, 2, 0, 3)
    grouped = grouped.reshape(heads_kv, group * rows, head_dim)
    scores = torch.matmul(grouped, k.permute(1, 2, 0)) * spec.softmax_scale
    if spec.softcap > 0:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores.view(heads_q, rows, keys).masked_fill(hidden, -torch.inf)

    lse = torch.logsumexp(scores, -1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.float()[:, None])
    # An empty row would otherwise compute -inf - (-inf).
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    out = torch.matmul(weights.view(heads_kv, group * rows, keys), v.transpose(0, 1))
    return out.view(heads_q, rows, -1).transpose(0, 1), lse


BACKEND = TorchBackend()

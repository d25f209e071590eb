"""The public functions again, read independently: each loops over its sequences.

Every function returns (out, lse) of the dtype `attend` works in. Rows that belong to no query
(beyond seqused_q, or beyond cu_seqlens_q[-1]) stay NaN in both.
"""

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple

import torch

from reference import attention, float8, rotary
from reference.attention import Rules, Tensor
from reference.cache import Cache

Attend = Callable[..., tuple[Tensor, Tensor]]  # as `attention.attend`
Dequantise = Callable[[Tensor, Tensor, Tensor], Tensor]
Rotate = Callable[[Tensor, tuple[Tensor, Tensor], Tensor, bool], Tensor]
Window = tuple[int | None, int | None]


class _Sequence(NamedTuple):
    out: Tensor  # view (seqlen_q, heads_q, head_dim_v) into the call's output
    lse: Tensor  # view (heads_q, seqlen_q)
    q: Tensor
    k: Tensor
    v: Tensor


class _Scores(NamedTuple):
    """How the scores of a call are made."""

    rules: Rules
    sinks: Tensor | None
    second: list[Tensor] | None  # the rows of qv of each sequence
    factors: tuple[Tensor | None, Tensor | None, Tensor | None]  # of q, k and v
    attend: Attend
    dequantise: Dequantise


def _run(sequences: Iterable[_Sequence], scores: _Scores) -> None:
    for b, seq in enumerate(sequences):
        q, k, v = seq.q, seq.k, seq.v
        if float8.is_float8(v):  # factors of other numbers are ignored
            heads_kv = v.shape[1]
            one = torch.ones(heads_kv, dtype=torch.float32, device=v.device)
            of = [one if factors is None else factors[b] for factors in scores.factors]
            of[0] = of[0].repeat_interleave(q.shape[1] // heads_kv)  # q's too are of kv heads
            q, k, v = (
                scores.dequantise(x, f[:, None], seq.q) for x, f in zip((q, k, v), of, strict=True)
            )
        more = {} if scores.second is None else {"qv": scores.second[b]}
        out, lse = scores.attend(q, k, v, scores.rules, scores.sinks, **more)
        seq.out.copy_(out)
        seq.lse.copy_(lse)


def _no_dims(x: Tensor) -> Tensor:
    """Vectors of no dims, in the place of q and k that no score is made of."""
    return x[..., :0]


def _empty_result(q: Tensor, head_dim_v: int) -> tuple[Tensor, Tensor]:
    """NaN-filled out like q, and lse (heads, tokens) for packed q or (batch, heads, tokens)."""
    out = torch.full((*q.shape[:-1], head_dim_v), torch.nan, dtype=torch.float64, device=q.device)
    lse_shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return out, torch.full(lse_shape, torch.nan, dtype=torch.float64, device=q.device)


def _lengths(value: Tensor | int | None, batch: int, default: list[int]) -> list[int]:
    if value is None:
        return default
    if isinstance(value, int):
        return [value] * batch
    return [int(n) for n in value.tolist()]


class _Queries(NamedTuple):
    """Where the queries of each sequence are, for packed and for batched q."""

    views: list[tuple[Tensor, Tensor, Tensor]]  # out, lse, q of each sequence

    @property
    def rows(self) -> list[Tensor]:
        """Of q alone."""
        return [q for _, _, q in self.views]

    @classmethod
    def find(
        cls,
        q: Tensor,
        out: Tensor,
        lse: Tensor,
        cu_seqlens_q: Tensor | None,
        seqused_q: Tensor | None,
    ) -> "_Queries":
        if cu_seqlens_q is None:
            batch, seqlen = q.shape[:2]
            used = _lengths(seqused_q, batch, [seqlen] * batch)
            return cls([(out[b, :n], lse[b, :, :n], q[b, :n]) for b, n in enumerate(used)])
        cu = [int(n) for n in cu_seqlens_q.tolist()]
        batch = len(cu) - 1
        used = _lengths(seqused_q, batch, [cu[b + 1] - cu[b] for b in range(batch)])
        spans = [slice(cu[b], cu[b] + used[b]) for b in range(batch)]
        return cls([(out[rows], lse[:, rows], q[rows]) for rows in spans])


def _new_tokens(new: Tensor, cu_seqlens_k_new: Tensor | None) -> list[Tensor]:
    """The new keys or values of each sequence, (tokens, heads_kv, dim)."""
    if cu_seqlens_k_new is None:
        return list(new)
    cu = [int(n) for n in cu_seqlens_k_new.tolist()]
    return [new[first:end] for first, end in pairwise(cu)]


def _positions(tokens: Tensor, start: int, step: int) -> Tensor:
    return start + step * torch.arange(len(tokens), device=tokens.device)


def _queries_move(rules: Rules, max_seqlen_q: int, capacity: int) -> bool:
    """Whether query i is rotated by position p + i, else all by p: if a mask may hide a key.

    A window that reaches over all the cache, or over all queries a sequence can have, hides none.
    """
    left, right = rules.window_left, rules.window_right
    return (
        rules.causal
        or (left is not None and left < capacity - 1)
        or (right is not None and right < max_seqlen_q - 1)
        or rules.attention_chunk > 0
    )


def flash_attn_with_kvcache(
    q: Tensor | None,
    k_cache: Tensor | None,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    qv: Tensor | None = None,
    only_qv: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int | None = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    sinks: Tensor | None = None,
    attend: Attend = attention.attend,
    rotate: Rotate = rotary.rotate,
    dequantise: Dequantise = float8.dequantise,
) -> tuple[Tensor, Tensor]:
    """Attention over a cache: pages with a page_table, else (rows, seqlen, heads_kv, head_dim).

    Token t of the new keys k and values v is written into the caches at cache_seqlens[b] + t, in
    place, and dropped where the row has no such place; then the queries attend to old and new. The
    rotation is of new keys, at rotary_seqlens[b] + t (cache_seqlens[b] + t if None), and of
    queries, at that of token 0 or, where a mask hides keys, of as many tokens further on.
    cache_batch_idx[b] is the sequence's row of the cache or of page_table, cache_leftpad[b] its
    first key in use: masks count keys from there. `max_seqlen_q` is a bound for kernels, and
    decides nothing here but which windows hide a key.

    With qv, of q's shape but the head size of values, a score is q·k + qv·v, with only_qv qv·v.
    The descales, (batch, heads_kv), are what the float8 numbers of a kv head are multiplied by.
    """
    if only_qv:
        assert qv is not None, "only_qv comes with qv"
        q, k_cache = _no_dims(qv), _no_dims(v_cache)
    assert q is not None, "queries are needed"
    assert k_cache is not None, "keys are needed"
    out, lse = _empty_result(q, v_cache.shape[-1])
    queries = _Queries.find(q, out, lse, cu_seqlens_q, None).views
    batch = len(queries)
    rows = _lengths(cache_batch_idx, batch, list(range(batch)))
    cache = Cache(k_cache, v_cache, page_table, rows)
    used = _lengths(cache_seqlens, batch, [cache.capacity] * batch)
    leftpads = _lengths(cache_leftpad, batch, [0] * batch)
    second = None if qv is None else _Queries.find(qv, out, lse, cu_seqlens_q, None).rows
    scored = q.shape[-1] + (0 if qv is None else qv.shape[-1])
    call_rules = attention.rules(
        scored, softmax_scale, causal, window_size, softcap, attention_chunk
    )

    if k is not None:
        assert v is not None, "new keys come with new values"
        new_k, new_v = _new_tokens(k, cu_seqlens_k_new), _new_tokens(v, cu_seqlens_k_new)
        if rotary_cos is not None:
            assert rotary_sin is not None, "cos comes with sin"
            most_q = q.shape[1] if cu_seqlens_q is None else max_seqlen_q
            assert most_q is not None, "packed queries come with max_seqlen_q"
            step = int(_queries_move(call_rules, most_q, cache.capacity))
            tables = rotary_cos, rotary_sin
            for b, start in enumerate(_lengths(rotary_seqlens, batch, used)):
                positions = _positions(new_k[b], start, 1)
                new_k[b] = rotate(new_k[b], tables, positions, rotary_interleaved)
                out_b, lse_b, q_b = queries[b]
                positions = _positions(q_b, start, step)
                queries[b] = out_b, lse_b, rotate(q_b, tables, positions, rotary_interleaved)
        used = [cache.append(b, used[b], new_k[b], new_v[b]) for b in range(batch)]

    sequences = (
        _Sequence(*views, *cache.read(b, leftpads[b], used[b])) for b, views in enumerate(queries)
    )
    factors = q_descale, k_descale, v_descale
    _run(sequences, _Scores(call_rules, sinks, second, factors, attend, dequantise))
    return out, lse


def flash_attn_varlen_func(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    *,
    qv: Tensor | None = None,
    only_qv: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int | None = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    attend: Attend = attention.attend,
    dequantise: Dequantise = float8.dequantise,
) -> tuple[Tensor, Tensor]:
    """Attention over packed, batched or paged keys; the max_seqlen bounds change nothing here."""
    if only_qv:
        assert qv is not None, "only_qv comes with qv"
        q, k = _no_dims(qv), _no_dims(v)
    assert q is not None, "queries are needed"
    assert k is not None, "keys are needed"
    out, lse = _empty_result(q, v.shape[-1])
    queries = _Queries.find(q, out, lse, cu_seqlens_q, seqused_q).views
    second = None if qv is None else _Queries.find(qv, out, lse, cu_seqlens_q, seqused_q).rows
    batch = len(queries)
    cache = Cache(k, v, page_table, list(range(batch)))

    def keys(b: int) -> tuple[Tensor, Tensor]:
        if page_table is not None:
            assert seqused_k is not None, "paged keys need seqused_k"
            return cache.read(b, 0, int(seqused_k[b]))
        if cu_seqlens_k is None:
            return cache.read(b, 0, _lengths(seqused_k, batch, [cache.capacity] * batch)[b])
        first, end = int(cu_seqlens_k[b]), int(cu_seqlens_k[b + 1])
        used = _lengths(seqused_k, batch, [end - first] * batch)[b]
        return k[first : first + used], v[first : first + used]

    sequences = (_Sequence(*views, *keys(b)) for b, views in enumerate(queries))
    scored = q.shape[-1] + (0 if qv is None else qv.shape[-1])
    call_rules = attention.rules(
        scored, softmax_scale, causal, window_size, softcap, attention_chunk
    )
    factors = q_descale, k_descale, v_descale
    _run(sequences, _Scores(call_rules, sinks, second, factors, attend, dequantise))
    return out, lse


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int | None = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    attend: Attend = attention.attend,
    dequantise: Dequantise = float8.dequantise,
) -> tuple[Tensor, Tensor]:
    """Attention of equal-length sequences: q (batch, seqlen_q, heads_q, head_dim)."""
    out, lse = _empty_result(q, v.shape[-1])
    sequences = (_Sequence(out[b], lse[b], q[b], k[b], v[b]) for b in range(q.shape[0]))
    scored = q.shape[-1] + (0 if qv is None else qv.shape[-1])
    call_rules = attention.rules(
        scored, softmax_scale, causal, window_size, softcap, attention_chunk
    )
    second = None if qv is None else list(qv)
    factors = q_descale, k_descale, v_descale
    _run(sequences, _Scores(call_rules, sinks, second, factors, attend, dequantise))
    return out, lse

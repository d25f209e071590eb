"""The public functions again, read independently: each loops over its sequences.

Every function returns (out, lse) of the dtype `attend` works in. Rows that belong to no query
(beyond seqused_q, or beyond cu_seqlens_q[-1]) stay NaN in both.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from reference import attention
from reference.attention import Rules, Tensor
from reference.paged import gather_pages

Attend = Callable[[Tensor, Tensor, Tensor, Rules, Tensor | None], tuple[Tensor, Tensor]]
Window = tuple[int | None, int | None]


class _Sequence(NamedTuple):
    out: Tensor  # view (seqlen_q, heads_q, head_dim_v) into the call's output
    lse: Tensor  # view (heads_q, seqlen_q)
    q: Tensor
    k: Tensor
    v: Tensor


def _run(
    sequences: Iterable[_Sequence], rules: Rules, sinks: Tensor | None, attend: Attend
) -> None:
    for seq in sequences:
        out, lse = attend(seq.q, seq.k, seq.v, rules, sinks)
        seq.out.copy_(out)
        seq.lse.copy_(lse)


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


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor | int | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    attend: Attend = attention.attend,
) -> tuple[Tensor, Tensor]:
    """Attention over a cache: pages with a page_table, else (batch, seqlen, heads_kv, head_dim).

    `max_seqlen_q` is a bound for kernels and changes nothing here.
    """
    out, lse = _empty_result(q, v_cache.shape[-1])
    queries = _Queries.find(q, out, lse, cu_seqlens_q, None).views
    batch = len(queries)
    capacity = k_cache.shape[1] if page_table is None else page_table.shape[1] * k_cache.shape[1]
    seqlens_k = _lengths(cache_seqlens, batch, [capacity] * batch)

    def keys(cache: Tensor, b: int) -> Tensor:
        if page_table is None:
            return cache[b, : seqlens_k[b]]
        return gather_pages(cache, page_table[b], seqlens_k[b])

    sequences = (
        _Sequence(*views, keys(k_cache, b), keys(v_cache, b)) for b, views in enumerate(queries)
    )
    call_rules = attention.rules(q.shape[-1], softmax_scale, causal, window_size, softcap)
    _run(sequences, call_rules, sinks, attend)
    return out, lse


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    attend: Attend = attention.attend,
) -> tuple[Tensor, Tensor]:
    """Attention over packed, batched or paged keys; the max_seqlen bounds change nothing here."""
    out, lse = _empty_result(q, v.shape[-1])
    queries = _Queries.find(q, out, lse, cu_seqlens_q, seqused_q).views
    batch = len(queries)

    def keys(source: Tensor, b: int) -> Tensor:
        if page_table is not None:
            assert seqused_k is not None, "paged keys need seqused_k"
            return gather_pages(source, page_table[b], int(seqused_k[b]))
        if cu_seqlens_k is None:
            used = _lengths(seqused_k, batch, [source.shape[1]] * batch)
            return source[b, : used[b]]
        first, end = int(cu_seqlens_k[b]), int(cu_seqlens_k[b + 1])
        used = _lengths(seqused_k, batch, [end - first] * batch)
        return source[first : first + used[b]]

    sequences = (_Sequence(*views, keys(k, b), keys(v, b)) for b, views in enumerate(queries))
    call_rules = attention.rules(q.shape[-1], softmax_scale, causal, window_size, softcap)
    _run(sequences, call_rules, sinks, attend)
    return out, lse


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    attend: Attend = attention.attend,
) -> tuple[Tensor, Tensor]:
    """Attention of equal-length sequences: q (batch, seqlen_q, heads_q, head_dim)."""
    out, lse = _empty_result(q, v.shape[-1])
    sequences = (_Sequence(out[b], lse[b], q[b], k[b], v[b]) for b in range(q.shape[0]))
    call_rules = attention.rules(q.shape[-1], softmax_scale, causal, window_size, softcap)
    _run(sequences, call_rules, sinks, attend)
    return out, lse

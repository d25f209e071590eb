"""The public functions. The only place where FlashAttention's signatures are written out.

A call is looked up among the launch records (`records.py`). A miss validates, picks the backend
and prepares the launch; a hit runs what was prepared. Validation holds for hits because all it
looked at is in the key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from triton_fa import dispatch, normalize
from triton_fa.backends.base import Run, RunByAddress
from triton_fa.checks import one_spelling
from triton_fa.normalize import Options
from triton_fa.problem import Append, AttnResult, BlockSparseTensors, Lengths, Tensors
from triton_fa.records import MAX_RECORDS, Records, Values, signature

Window = Sequence[int | None]
Result = torch.Tensor | tuple[torch.Tensor, ...]


class _Record:
    """A prepared call: what to run, and how to shape what it returns."""

    __slots__ = ("by_address", "run", "shape_result")

    def __init__(self, run: Run, shape_result: Callable[[AttnResult], Result] | None) -> None:
        """With a `shape_result` of None only `out` is returned."""
        self.run = run
        self.by_address = run.by_address if isinstance(run, RunByAddress) else None
        self.shape_result = shape_result


_RECORDS = Records()


def _call(ver: int | str | None, tensors: Values, scalars: Values) -> Result:
    """Run a call from its launch record, making the record on a miss.

    Args:
        ver: As of the public functions.
        tensors: The fields of `Tensors`, in order: making those takes longer than a look-up.
        scalars: The fields of `Options`, in order.
    """
    record, addresses = _RECORDS.find(ver, tensors, scalars)
    if addresses is not None and record.by_address is not None:
        result: AttnResult = record.by_address(tensors, addresses)
    else:
        named = Tensors(*tensors)
        if record is None:
            options = Options(*scalars)
            problem = normalize.problem(named, options)
            run, version = dispatch.prepare(ver, problem)
            record = _Record(run, _result_shaper(version, options.return_lse))
            _RECORDS.keep(ver, tensors, scalars, record)
        result = record.run(named)
    shape_result: Callable[[AttnResult], Result] | None = record.shape_result
    return result[0] if shape_result is None else shape_result(result)


def _result_shaper(ver: int | str, return_lse: bool) -> Callable[[AttnResult], Result] | None:
    if not return_lse:
        return None
    if ver == 3:
        return _fa3_result
    return lambda result: (result.out, result.lse)  # type: ignore[return-value]  # lse was asked for


def _fa3_result(result: AttnResult) -> Result:
    """FA3's (out, lse, out_accum, lse_accum); the accumulators are empty where we have none."""
    assert result.lse is not None
    extra = result.extra or (result.lse.new_empty(0), result.lse.new_empty(0))
    return (result.out, result.lse, *extra)


def _window(window_size: Window | None) -> Any:
    """A hashable pair; None is unbounded on both sides, anything odd is left to normalize."""
    if window_size is None:
        return (-1, -1)
    return tuple(window_size) if isinstance(window_size, list) else window_size


_NO_FEATURES: frozenset[str] = frozenset()


def _features(**given: object) -> frozenset[str]:
    """Names of the optional arguments that were really used."""
    return frozenset([name for name, value in given.items() if value is not None])


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    qv: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | int | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window | None = (-1, -1),
    attention_chunk: int | None = None,
    softcap: float | None = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: torch.Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    sinks: torch.Tensor | None = None,
    score_mod: object = None,
    aux_tensors: object = None,
    ver: int | str | None = None,
    out: torch.Tensor | None = None,
    *,
    only_qv: bool = False,
    mask_mod: object = None,
    block_sparse_tensors: object = None,
    max_seqlen_k: int | None = None,
    batch_invariant: bool = False,
    block_table: torch.Tensor | None = None,
    seqused_k: torch.Tensor | int | None = None,
    s_aux: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    return_attn_probs: bool = False,
    return_lse: bool = False,
) -> Result:
    """Attention of new queries against a key/value cache, paged or dense.

    Query row i of a sequence with sq queries and sk keys sits at key position i + sk - sq
    (bottom-right alignment); causal and window masks count from there. Rows without a visible
    key give 0, and lse -inf (with a sink: lse = sink).

    Args:
        q: (batch, seqlen_q, heads_q, head_dim), or (total_q, heads_q, head_dim) with
            cu_seqlens_q. float16, bfloat16, float32, or float8 (then the result is bfloat16).
        k_cache: (batch, seqlen_k, heads_kv, head_dim), or (num_pages, page_size, heads_kv,
            head_dim) with page_table. Same dtype as q, or float8 beside 16-bit queries; any
            strides but a last one of 1.
        v_cache: As k_cache, with head_dim_v.
        k: (batch, seqlen_new, heads_kv, head_dim), or (total_new, heads_kv, head_dim) with
            cu_seqlens_k_new: new keys. They are written into k_cache from position cache_seqlens[b]
            on, before anything is read; needs v and cache_seqlens, which stays as it is. A key that
            the table or the cache has no place for is dropped. Rows of the cache that two sequences
            append to hold either one's.
        v: As k, with head_dim_v: new values.
        qv: q's leading shape with head_dim_v, q's dtype: scores become q·k + qv·v (absorbed MLA).
        rotary_cos: (positions, rotary_dim / 2), q's dtype: turns the leading rotary_dim dims of the
            new keys and of q; needs k. Key t is at position cache_seqlens[b] + t, query i at
            cache_seqlens[b] + i if the call is causal or has a window that hides a key, else at
            cache_seqlens[b]. Positions past the last row use the last row.
        rotary_sin: As rotary_cos.
        cache_seqlens: (batch,) int32, or one int for all: keys in use. None: all of the cache.
        cache_batch_idx: (batch,) int32: the row of a dense cache, or of page_table, of each
            sequence; None: its own number.
        cache_leftpad: (batch,) int32: the first key in use. Keys are counted from there, in
            cache_seqlens from the start of the cache.
        page_table: (batch, max_pages) int32. Entries past a sequence's last page are never used.
        cu_seqlens_q: (batch + 1,) int32 prefix sums of query lengths.
        cu_seqlens_k_new: Lengths of appended keys; read only together with k.
        max_seqlen_q: Upper bound of query lengths; required with cu_seqlens_q.
        rotary_seqlens: (batch,) int32: positions to rotate at, instead of cache_seqlens.
        q_descale: (batch, heads_kv) float32, any strides: what float8 numbers of q are multiplied
            by. As the two below read only if the keys are float8.
        k_descale: The same of keys.
        v_descale: The same of values.
        softmax_scale: Multiplies the scores. Default d ** -0.5, where d counts the dims of q and qv
            that take part.
        causal: Row i sees keys up to its own position.
        window_size: (left, right) keys visible on each side of a row's position, inclusive;
            negative or None is unbounded.
        attention_chunk: c > 0: a row at key position p sees keys of its own chunk only, from
            floor(p / c) * c to c - 1 further; None or 0 is off.
        softcap: Scores become softcap * tanh(score / softcap); 0 or None is off.
        rotary_interleaved: Whether dims (0, 1), (2, 3), ... turn together, or i and
            i + rotary_dim / 2.
        scheduler_metadata: What `get_scheduler_metadata` returned for these lengths and this ver.
        num_splits: 0 lets the library choose, 1 computes every row unsplit, n cuts the keys of
            a sequence into at most n pieces.
        pack_gqa: A hint for ver=3 and ver=4; ver="triton" always packs.
        sm_margin: Multiprocessors to leave idle; ver="torch" and ver=4 have no such choice.
        return_softmax_lse: Also return the log-sum-exp.
        sinks: (heads_q,) one extra logit per head that takes part in the softmax only.
        score_mod: A `@triton.jit` function f(score, batch, head, q_idx, kv_idx, seqlen_q, seqlen_k,
            aux) of blocks of scaled scores, before any mask; see docs/numerics.md. Not with
            softcap.
        aux_tensors: Tensors whose pointers the functions are given as the tuple aux.
        ver: "triton", "torch", 3, 4, or None for the default.
        out: Buffer of the result's shape and dtype to write to.
        only_qv: Scores are qv·v alone; q and k may be None, and are not read.
        mask_mod: A `@triton.jit` function f(batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux),
            true where a query sees a key; see docs/numerics.md. Not with causal, window_size or
            attention_chunk.
        block_sparse_tensors: A `BlockSparseTensors`, or FlashAttention-4's: which blocks mask_mod
            hides or shows whole, so that kernels for long prompts skip them. It must say the same
            as mask_mod, which decides alone where the lists are of no use.
        max_seqlen_k: A hint; the bound is taken from page_table or k_cache.
        batch_invariant: The bits of a row depend on its own sequence and the settings only, not
            on the rest of the batch, the bounds or the device's size.
        block_table: Other spelling of page_table.
        seqused_k: Other spelling of cache_seqlens.
        s_aux: Other spelling of sinks.
        learnable_sink: Other spelling of sinks.
        leftpad_k: Other spelling of cache_leftpad.
        return_attn_probs: Other spelling of return_softmax_lse.
        return_lse: Other spelling of return_softmax_lse.

    Returns:
        out, (…, heads_q, head_dim_v) in q's dtype; with return_softmax_lse (out, lse), where lse
        is float32 natural log, (heads_q, total_q) packed or (batch, heads_q, seqlen_q) dense.
        ver=3 returns FA3's (out, lse, out_accum, lse_accum).

    Raises:
        ArgumentError, ArgumentTypeError, ArgumentValueError, LayoutError: bad input.
        UnknownVersionError, UnsupportedError, BackendUnavailableError: see `strict`.
    """
    lengths: Any = cache_seqlens
    if seqused_k is not None:
        lengths = one_spelling(cache_seqlens=cache_seqlens, seqused_k=seqused_k)
    fixed = lengths if isinstance(lengths, int) else None
    if only_qv and qv is not None:
        q, k_cache = qv, v_cache  # stand-ins
    if not (q_descale is None and k_descale is None and v_descale is None):
        q_descale, k_descale, v_descale = _descales(k_cache, q_descale, k_descale, v_descale)
    append = None
    if not (
        k is None
        and v is None
        and rotary_cos is None
        and rotary_sin is None
        and rotary_seqlens is None
    ):
        append = Append(k, v, cu_seqlens_k_new, rotary_cos, rotary_sin, rotary_seqlens)  # type: ignore[arg-type]  # normalize
    tensors = (
        q,
        k_cache,
        v_cache,
        out,
        page_table if block_table is None else _table(page_table, block_table),
        cu_seqlens_q,
        None,
        None,
        None if fixed is not None else lengths,
        sinks if s_aux is None and learnable_sink is None else _sinks(sinks, s_aux, learnable_sink),
        scheduler_metadata,
        cache_batch_idx,
        cache_leftpad
        if leftpad_k is None
        else one_spelling(cache_leftpad=cache_leftpad, leftpad_k=leftpad_k),
        qv,
        q_descale,
        k_descale,
        v_descale,
        None if aux_tensors is None else _aux(aux_tensors),
        append,
        None if block_sparse_tensors is None else _blocks(block_sparse_tensors),
    )
    # The condition repeats the names below: a microsecond less on a hit. A name missing here would
    # be dropped silently; test_refusals.py and test_schedule.py have every one of them.
    features = _NO_FEATURES
    if not (
        score_mod is None
        and aux_tensors is None
        and mask_mod is None
        and block_sparse_tensors is None
        and not only_qv
        and not batch_invariant
    ):
        features = _features(
            score_mod=score_mod,
            aux_tensors=aux_tensors,
            mask_mod=mask_mod,
            block_sparse_tensors=block_sparse_tensors,
            only_qv=only_qv or None,
            batch_invariant=batch_invariant or None,
        )
    scalars = (
        "kvcache",
        softmax_scale,
        causal,
        window_size if type(window_size) is tuple else _window(window_size),
        softcap,
        num_splits,
        sm_margin,
        max_seqlen_q,
        None,
        fixed,
        features,
        return_softmax_lse or return_attn_probs or return_lse,
        pack_gqa,
        attention_chunk,
        rotary_interleaved,
        score_mod,
        mask_mod,
    )
    return _call(ver, tensors, scalars)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: Window | None = (-1, -1),
    attention_chunk: int | None = 0,
    softcap: float | None = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    sinks: torch.Tensor | None = None,
    score_mod: object = None,
    aux_tensors: object = None,
    ver: int | str | None = None,
    out: torch.Tensor | None = None,
    *,
    scheduler_metadata: torch.Tensor | None = None,
    only_qv: bool = False,
    mask_mod: object = None,
    block_sparse_tensors: object = None,
    batch_invariant: bool = False,
    block_table: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
    return_attn_probs: bool = False,
    return_lse: bool = False,
) -> Result:
    """Attention over sequences of different lengths, packed one after the other.

    Masks, alignment and empty rows as in `flash_attn_with_kvcache`.

    Args:
        q: (total_q, heads_q, head_dim); with cu_seqlens_q=None (batch, seqlen_q, heads_q,
            head_dim). float16, bfloat16 or float32.
        k: (total_k, heads_kv, head_dim) with cu_seqlens_k, (num_pages, page_size, heads_kv,
            head_dim) with page_table, else (batch, seqlen_k, heads_kv, head_dim).
        v: As k, with head_dim_v.
        cu_seqlens_q: (batch + 1,) int32 prefix sums of query lengths, or None.
        cu_seqlens_k: (batch + 1,) int32 prefix sums of key lengths, or None.
        max_seqlen_q: Upper bound of query lengths; required with cu_seqlens_q, else taken from q.
        max_seqlen_k: Upper bound of key lengths; required with cu_seqlens_k, else taken from k.
        seqused_q: (batch,) int32: only the first so many queries of each sequence count; rows
            beyond are not written.
        seqused_k: (batch,) int32: only the first so many keys of each sequence count.
        page_table: (batch, max_pages) int32; needs seqused_k.
        softmax_scale: Multiplies the scores. Default d ** -0.5, where d counts the dims of q and qv
            that take part.
        causal: Row i sees keys up to its own position.
        qv: q's leading shape with head_dim_v, q's dtype: scores become q·k + qv·v (absorbed MLA).
        q_descale: (batch, heads_kv) float32, any strides: what float8 numbers of q are multiplied
            by. As the two below read only if the keys are float8.
        k_descale: The same of keys.
        v_descale: The same of values.
        window_size: (left, right) keys visible on each side of a row's position, inclusive;
            negative or None is unbounded.
        attention_chunk: c > 0: a row at key position p sees keys of its own chunk only, from
            floor(p / c) * c to c - 1 further; None or 0 is off.
        softcap: Scores become softcap * tanh(score / softcap); 0 or None is off.
        num_splits: 0 lets the library choose, 1 computes every row unsplit, n cuts the keys of
            a sequence into at most n pieces.
        pack_gqa: A hint for ver=3 and ver=4; ver="triton" always packs.
        sm_margin: Multiprocessors to leave idle; ver="torch" and ver=4 have no such choice.
        return_softmax_lse: Also return the log-sum-exp.
        sinks: (heads_q,) one extra logit per head that takes part in the softmax only.
        score_mod: A `@triton.jit` function f(score, batch, head, q_idx, kv_idx, seqlen_q, seqlen_k,
            aux) of blocks of scaled scores, before any mask; see docs/numerics.md. Not with
            softcap.
        aux_tensors: Tensors whose pointers the functions are given as the tuple aux.
        ver: "triton", "torch", 3, 4, or None for the default.
        out: Buffer of the result's shape and dtype to write to.
        scheduler_metadata: What `get_scheduler_metadata` returned for these lengths and this ver.
        only_qv: Scores are qv·v alone; q and k may be None, and are not read.
        mask_mod: A `@triton.jit` function f(batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux),
            true where a query sees a key; see docs/numerics.md. Not with causal, window_size or
            attention_chunk.
        block_sparse_tensors: A `BlockSparseTensors`, or FlashAttention-4's: which blocks mask_mod
            hides or shows whole, so that kernels for long prompts skip them. It must say the same
            as mask_mod, which decides alone where the lists are of no use.
        batch_invariant: The bits of a row depend on its own sequence and the settings only, not
            on the rest of the batch, the bounds or the device's size.
        block_table: Other spelling of page_table.
        cache_seqlens: Other spelling of seqused_k.
        s_aux: Other spelling of sinks.
        learnable_sink: Other spelling of sinks.
        return_attn_probs: Other spelling of return_softmax_lse.
        return_lse: Other spelling of return_softmax_lse.

    Returns:
        As `flash_attn_with_kvcache`.

    Raises:
        ArgumentError, ArgumentTypeError, ArgumentValueError, LayoutError: bad input.
        UnknownVersionError, UnsupportedError, BackendUnavailableError: see `strict`.
    """
    lengths: Any = seqused_k
    if cache_seqlens is not None:
        lengths = one_spelling(seqused_k=seqused_k, cache_seqlens=cache_seqlens)
    if only_qv and qv is not None:
        q, k = qv, v  # stand-ins
    if not (q_descale is None and k_descale is None and v_descale is None):
        q_descale, k_descale, v_descale = _descales(k, q_descale, k_descale, v_descale)
    tensors = (
        q,
        k,
        v,
        out,
        page_table if block_table is None else _table(page_table, block_table),
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_q,
        lengths,
        sinks if s_aux is None and learnable_sink is None else _sinks(sinks, s_aux, learnable_sink),
        scheduler_metadata,
        None,
        None,
        qv,
        q_descale,
        k_descale,
        v_descale,
        None if aux_tensors is None else _aux(aux_tensors),
        None,
        None if block_sparse_tensors is None else _blocks(block_sparse_tensors),
    )
    features = _NO_FEATURES
    if not (
        score_mod is None
        and aux_tensors is None
        and mask_mod is None
        and block_sparse_tensors is None
        and not only_qv
        and not batch_invariant
    ):
        features = _features(
            score_mod=score_mod,
            aux_tensors=aux_tensors,
            mask_mod=mask_mod,
            block_sparse_tensors=block_sparse_tensors,
            only_qv=only_qv or None,
            batch_invariant=batch_invariant or None,
        )
    scalars = (
        "varlen",
        softmax_scale,
        causal,
        window_size if type(window_size) is tuple else _window(window_size),
        softcap,
        num_splits,
        sm_margin,
        max_seqlen_q,
        max_seqlen_k,
        None,
        features,
        return_softmax_lse or return_attn_probs or return_lse,
        pack_gqa,
        attention_chunk,
        True,
        score_mod,
        mask_mod,
    )
    return _call(ver, tensors, scalars)


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: Window | None = (-1, -1),
    attention_chunk: int | None = 0,
    softcap: float | None = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    sinks: torch.Tensor | None = None,
    ver: int | str | None = None,
    out: torch.Tensor | None = None,
    batch_invariant: bool = False,
    learnable_sink: torch.Tensor | None = None,
    return_softmax_lse: bool = False,
    return_lse: bool = False,
) -> Result:
    """Attention over a dense batch. Masks, alignment and empty rows as `flash_attn_with_kvcache`.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim) in float16, bfloat16 or float32.
        k: (batch, seqlen_k, heads_kv, head_dim).
        v: (batch, seqlen_k, heads_kv, head_dim_v).
        softmax_scale: Multiplies the scores. Default d ** -0.5, where d counts the dims of q and qv
            that take part.
        causal: Row i sees keys up to its own position.
        qv: q's leading shape with head_dim_v, q's dtype: scores become q·k + qv·v (absorbed MLA).
        q_descale: (batch, heads_kv) float32, any strides: what float8 numbers of q are multiplied
            by. As the two below read only if the keys are float8.
        k_descale: The same of keys.
        v_descale: The same of values.
        window_size: (left, right) keys visible on each side of a row's position, inclusive;
            negative or None is unbounded.
        attention_chunk: c > 0: a row at key position p sees keys of its own chunk only, from
            floor(p / c) * c to c - 1 further; None or 0 is off.
        softcap: Scores become softcap * tanh(score / softcap); 0 or None is off.
        num_splits: 0 lets the library choose, 1 computes every row unsplit, n cuts the keys of
            a sequence into at most n pieces.
        pack_gqa: A hint for ver=3 and ver=4; ver="triton" always packs.
        deterministic: Every backend's forward pass is; accepted for either value.
        sm_margin: Multiprocessors to leave idle; ver="torch" and ver=4 have no such choice.
        return_attn_probs: Also return the log-sum-exp.
        sinks: (heads_q,) one extra logit per head that takes part in the softmax only.
        ver: "triton", "torch", 3, 4, or None for the default.
        out: Buffer of the result's shape and dtype to write to.
        batch_invariant: The bits of a row depend on its own sequence and the settings only, not
            on the rest of the batch, the bounds or the device's size.
        learnable_sink: Other spelling of sinks.
        return_softmax_lse: Other spelling of return_attn_probs.
        return_lse: Other spelling of return_attn_probs.

    Returns:
        As `flash_attn_with_kvcache`; lse is (batch, heads_q, seqlen_q).

    Raises:
        ArgumentError, ArgumentTypeError, ArgumentValueError, LayoutError: bad input.
        UnknownVersionError, UnsupportedError, BackendUnavailableError: see `strict`.
    """
    sink_logits = _sinks(sinks, None, learnable_sink)
    if not (q_descale is None and k_descale is None and v_descale is None):
        q_descale, k_descale, v_descale = _descales(k, q_descale, k_descale, v_descale)
    nothing = (None,) * 5  # a dense batch has no lengths and no table
    descales = (q_descale, k_descale, v_descale)
    tensors = (
        q,
        k,
        v,
        out,
        *nothing,
        sink_logits,
        None,
        None,
        None,
        qv,
        *descales,
        None,
        None,
        None,
    )
    features = _features(batch_invariant=True) if batch_invariant else _NO_FEATURES
    scalars = (
        "dense",
        softmax_scale,
        causal,
        window_size if type(window_size) is tuple else _window(window_size),
        softcap,
        num_splits,
        sm_margin,
        None,
        None,
        None,
        features,
        return_attn_probs or return_softmax_lse or return_lse,
        pack_gqa,
        attention_chunk,
        True,
        None,
        None,
    )
    return _call(ver, tensors, scalars)


def _aux(aux_tensors: Any) -> Any:
    return tuple(aux_tensors) if isinstance(aux_tensors, list) else aux_tensors


def _blocks(given: Any) -> Any:
    """FlashAttention-4's lists as ours; what is neither is left to normalize."""
    if given is None or isinstance(given, BlockSparseTensors):
        return given
    try:
        return BlockSparseTensors(*(getattr(given, name) for name in BlockSparseTensors._fields))
    except AttributeError:
        return given


_NO_DESCALES: tuple[Any, Any, Any] = (None, None, None)


def _descales(k: Any, q_descale: Any, k_descale: Any, v_descale: Any) -> tuple[Any, Any, Any]:
    """The factors of float8 numbers; FlashAttention-3 reads them for nothing else, nor do we."""
    if getattr(k, "dtype", torch.float16).itemsize > 1:
        return _NO_DESCALES
    return q_descale, k_descale, v_descale


def _table(page_table: Any, block_table: Any) -> Any:
    if block_table is None:
        return page_table
    return one_spelling(page_table=page_table, block_table=block_table)


def _sinks(sinks: Any, s_aux: Any, learnable_sink: Any) -> Any:
    if s_aux is None and learnable_sink is None:
        return sinks
    return one_spelling(sinks=sinks, s_aux=s_aux, learnable_sink=learnable_sink)


_SCHEDULES: dict[tuple[Any, ...], Callable[[Lengths, torch.Tensor | None], torch.Tensor]] = {}


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads: int | None = None,
    num_heads_k: int | None = None,
    headdim: int | None = None,
    cache_seqlens: torch.Tensor | None = None,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: Window | None = (-1, -1),
    attention_chunk: int | None = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    *,
    ver: int | str | None = None,
    out: torch.Tensor | None = None,
    batch_invariant: bool = False,
    num_heads_q: int | None = None,
    num_heads_kv: int | None = None,
    cache_leftpad: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
) -> torch.Tensor:
    """The schedule that one step's layers share, computed once from the lengths on the device.

    One small kernel, no host synchronisation. Pass the result as `scheduler_metadata` to every
    call with these lengths and this `ver`. FlashAttention-3 trusts it. For ver="triton" it is
    advice: ragged prefill takes the order of the sequences from it, and whatever it holds, the
    numbers are right. It must not be refilled while a call that was given it still runs.

    Args:
        batch_size: Number of sequences.
        max_seqlen_q: Upper bound of query lengths.
        max_seqlen_k: Upper bound of key lengths; with pages, table width x page size.
        num_heads: Query heads.
        num_heads_k: Key heads.
        headdim: Head size of queries and keys.
        cache_seqlens: (batch_size,) int32 key lengths.
        qkv_dtype: Dtype of queries, keys and values.
        headdim_v: Head size of values; None: as headdim.
        cu_seqlens_q: (batch_size + 1,) int32 prefix sums of query lengths; None: all are
            max_seqlen_q.
        cu_seqlens_k: (batch_size + 1,) int32 prefix sums of key lengths, with packed keys.
        cu_seqlens_k_new: (batch_size + 1,) int32 prefix sums of appended lengths; None: all are
            max_seqlen_k_new.
        seqused_q: (batch_size,) int32 query lengths in use.
        leftpad_k: (batch_size,) int32 first keys in use.
        page_size: Tokens of a page; None: not paged.
        max_seqlen_k_new: Upper bound of appended lengths.
        causal: As of the attention call.
        window_size: As of the attention call: layers with a window have a schedule of their own.
        attention_chunk: c > 0: a row at key position p sees keys of its own chunk only, from
            floor(p / c) * c to c - 1 further; None or 0 is off.
        has_softcap: Whether the attention call has a softcap.
        num_splits: As of the attention call.
        pack_gqa: As of the attention call.
        sm_margin: As of the attention call.
        ver: "triton", "torch", 3, or None for the default; FA4 has no such tensor.
        out: (4 * round_up(batch_size, 4) + 1,) int32 buffer to fill, e.g. one that a captured
            graph reads.
        batch_invariant: The bits of a row depend on its own sequence and the settings only, not
            on the rest of the batch, the bounds or the device's size.
        num_heads_q: Other spelling of num_heads.
        num_heads_kv: Other spelling of num_heads_k.
        cache_leftpad: Other spelling of leftpad_k.
        seqused_k: Other spelling of cache_seqlens.

    Returns:
        (4 * round_up(batch_size, 4) + 1,) int32; for ver=3 FA3's own, which may be shorter (a
        view of `out` where that is given).

    Raises:
        ArgumentError, ArgumentTypeError, ArgumentValueError: bad input.
        UnknownVersionError, UnsupportedError, BackendUnavailableError: see `strict`.
    """
    lengths = Lengths(
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_q,
        one_spelling(cache_seqlens=cache_seqlens, seqused_k=seqused_k),
        cu_seqlens_k_new,
        one_spelling(leftpad_k=leftpad_k, cache_leftpad=cache_leftpad),
    )
    window = _window(window_size)
    scalars: tuple[Any, ...] = (
        batch_size,
        max_seqlen_q,
        max_seqlen_k,
        one_spelling(num_heads=num_heads, num_heads_q=num_heads_q),
        one_spelling(num_heads_k=num_heads_k, num_heads_kv=num_heads_kv),
        headdim,
        headdim_v,
        qkv_dtype,
        page_size,
        causal,
        window,
        has_softcap,
        num_splits,
        sm_margin,
        _features(batch_invariant=batch_invariant or None),
        attention_chunk,
        max_seqlen_k_new,
    )
    key = None
    run = None
    try:
        key = (
            ver,
            scalars,
            type(ver),
            *map(type, scalars),
            *map(type, window),
            pack_gqa,  # FA3 is given it
            dispatch.is_strict(),
            *map(signature, (*lengths, out)),
        )
        run = _SCHEDULES.get(key)
    except (AttributeError, TypeError):
        key = None
    if run is None:
        options = normalize.MetadataOptions(*scalars)
        spec, bounds = normalize.schedule(lengths, out, options)
        arguments = {
            "batch_size": batch_size,
            "max_seqlen_q": max_seqlen_q,
            "max_seqlen_k": max_seqlen_k,
            "num_heads_q": options.num_heads_q,
            "num_heads_kv": options.num_heads_kv,
            "headdim": headdim,
            "headdim_v": headdim_v,
            "qkv_dtype": qkv_dtype,
            "page_size": page_size,
            "max_seqlen_k_new": max_seqlen_k_new,
            "causal": causal,
            "window_size": (spec.window_left, -1 if causal else spec.window_right),
            "attention_chunk": spec.attention_chunk,
            "has_softcap": has_softcap,
            "num_splits": num_splits,
            "pack_gqa": pack_gqa,
            "sm_margin": sm_margin,
        }
        run = dispatch.prepare_schedule(ver, spec, bounds, lengths, arguments)
        if key is not None:
            if len(_SCHEDULES) >= MAX_RECORDS:
                _SCHEDULES.clear()
            _SCHEDULES[key] = run
    return run(lengths, out)

"""Which cases are legal: what a caller may ask for, whatever a backend makes of it."""

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parity_tests.cases import Case

ENTRIES = ("kvcache", "varlen", "dense")
FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
DTYPES = ("float16", "bfloat16", "float32", *FLOAT8)
Q_LAYOUTS = ("packed", "batched")
KV_LAYOUTS = ("paged", "packed", "batched")
KV_STRIDES = ("plain", "split", "fused", "sliced", "latent")
DESCALES = ("", "q", "k", "v", "qk", "qv", "kv", "qkv")
DESCALE_STRIDES = ("plain", "expanded", "transposed")
ONLY_QV = ("", "bare", "unread")
LENGTHS = ("tensor", "int", "none")
SOURCES = ("random", "llama")
APPENDS = ("", "batched", "packed")


def illegal(case: "Case") -> str | None:
    """Why no caller may make this call, or None."""
    rules = chain(_form(case), _scores(case), _cache(case))
    return next((why for fine, why in rules if not fine), None)


def _form(case: "Case") -> Iterator[tuple[bool, str]]:
    paged, dense = case.kv_layout == "paged", case.entry == "dense"
    yield case.entry in ENTRIES and case.dtype in DTYPES, "unknown entry or dtype"
    yield case.q_layout in Q_LAYOUTS and case.kv_layout in KV_LAYOUTS, "unknown layout"
    yield (
        case.kv_strides in KV_STRIDES and case.lengths in LENGTHS,
        "unknown strides or lengths",
    )
    yield case.source in SOURCES, "unknown source"
    yield len(case.seqlens_q) == len(case.seqlens_k) > 0, "one q and one k length per sequence"
    yield min((*case.seqlens_q, *case.seqlens_k)) >= 0, "negative length"
    equal_q, equal_k = len(set(case.seqlens_q)) == 1, len(set(case.seqlens_k)) == 1
    yield case.heads_q % case.heads_kv == 0, "heads_q must be a multiple of heads_kv"
    most = 512 if case.qv else 256
    yield case.head_dim % 8 == 0 and 8 <= case.head_dim <= 256, "head dim"
    yield case.head_dim_v % 8 == 0 and 8 <= case.head_dim_v <= most, "head dim of values"
    yield case.attention_chunk >= 0, "negative attention_chunk"
    yield paged == (case.page_size > 0), "page_size goes with paged keys"
    yield not (case.entry == "kvcache" and case.kv_layout == "packed"), "a cache is never packed"
    yield not (case.kv_strides == "split" and case.kv_layout == "packed"), "split needs pages"
    yield not dense or case.q_layout == case.kv_layout == "batched", "dense is batched"
    yield not dense or (equal_q and equal_k and not case.pad_k), "dense has equal lengths"
    yield case.pad_q == 0 or case.entry == "varlen", "only varlen has seqused_q"
    yield (
        case.q_layout == "packed" or equal_q or case.pad_q > 0,
        "batched q of unequal lengths",
    )
    yield case.tail_q == 0 or case.q_layout == "packed", "only packed q has a tail"
    yield case.lengths == "tensor" or (case.entry == "kvcache" and equal_k), "lengths as int"
    yield (
        case.lengths != "none" or (not paged and case.pad_k == 0),
        "cache_seqlens=None means that the whole cache is in use",
    )
    yield not case.shared_prefix or paged, "only pages can be shared"
    yield (
        case.source == "random"
        or (case.q_layout == case.kv_layout == "packed" and case.seqlens_q == case.seqlens_k),
        "a model's forward pass gives packed self-attention",
    )


def _scores(case: "Case") -> Iterator[tuple[bool, str]]:
    """What scores are made of: numbers of 8 bits, and values besides keys."""
    float8 = case.of_keys in FLOAT8
    yield (
        not case.kv_dtype or (case.kv_dtype in FLOAT8 and case.dtype in ("float16", "bfloat16")),
        "only float8 keys may have another dtype, beside queries of 16 bits",
    )
    yield (
        case.descales in DESCALES and case.descale_strides in DESCALE_STRIDES,
        "unknown descales",
    )
    yield float8 or not case.descales, "only float8 numbers have factors"
    yield case.descales != "" or case.descale_strides == "plain", "strides of no factors"
    yield case.only_qv in ONLY_QV and (case.qv or not case.only_qv), "only_qv goes with qv"
    yield not case.qv or case.dtype not in FLOAT8, "qv is never float8"
    yield (
        not case.only_qv or (case.entry != "dense" and not case.append),
        "only_qv neither appends keys nor is it known to the dense function",
    )
    yield not float8 or case.rotary_dim == 0, "float8 keys are not rotated"
    yield case.source == "random" or not (float8 or case.qv), "a model has neither"


def _cache(case: "Case") -> Iterator[tuple[bool, str]]:
    """What only a cache has. To be looked at once the rules of form hold."""
    new, append, paged = case.seqlens_new, bool(case.append), case.kv_layout == "paged"
    yield (
        case.entry == "kvcache" or not (append or case.leftpad or case.batch_idx),
        "only a cache is appended to, padded or looked up",
    )
    yield case.append in APPENDS and append == bool(new), "append says how seqlens_new are given"
    yield case.leftpad == bool(case.leftpads), "leftpad says that there are leftpads"
    per_sequence = (new, case.leftpads, case.rotary_seqlens)
    yield all(len(n) in (0, case.batch) for n in per_sequence), "one number per sequence"
    yield min((0, *chain(*per_sequence))) >= 0, "negative length"
    yield case.append != "batched" or len(set(new)) == 1, "batched new keys of unequal lengths"
    yield case.tail_new == 0 or case.append == "packed", "only packed new keys have a tail"
    yield not append or case.lengths != "none", "appending needs lengths"
    yield (
        case.overflow == 0 or (append and case.pad_k == case.table_slack == 0),
        "only new keys can be too many for a cache without slack",
    )
    yield (
        case.overflow == 0 or case.append == "packed" or case.lengths == "tensor",
        "lengths that the host knows show that the cache is too small",
    )
    yield (
        not append or max(case.seqlens_q) + case.max_q_slack <= case.capacity,
        "an appending call has at most as many queries as the cache has room for",
    )
    yield case.rotary_dim % 16 == 0 and 0 <= case.rotary_dim <= case.head_dim, "rotary_dim"
    yield append or case.rotary_dim == 0, "only an appending call rotates"
    yield (
        case.rotary_dim > 0
        or (case.rotary_interleaved and not case.rotary_seqlens and case.rotary_rows == 0),
        "how to rotate goes with rotary_dim",
    )
    yield (
        case.rotary_rows == 0 or not paged or case.rotary_rows >= case.capacity,
        "the angles of a paged cache are as many as its tokens",
    )
    yield max((0, *case.leftpads)) <= case.capacity, "left padding beyond the cache"
    yield not (case.leftpad and case.shared_prefix), "padded sequences share no prefix"
    yield case.spare_rows == 0 or case.batch_idx, "spare rows need cache_batch_idx"

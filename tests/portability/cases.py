"""The calls whose launches are compiled: every tile that is shipped, and every feature once.

They are public calls, on tensors that only have shapes that matter: nothing is computed.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

import triton_fa

BATCH = 4
HEADS_KV = 2


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def decode(
    group: int = 8,
    dim: int = 128,
    dim_v: int = 0,
    page_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = BATCH,
    **options: Any,
) -> Callable[[], object]:
    """One new token for each sequence; `group` query heads share a head of a paged cache."""

    def call() -> object:
        return triton_fa.flash_attn_with_kvcache(
            torch.zeros(batch, 1, HEADS_KV * group, dim, dtype=dtype),
            torch.zeros(8, page_size, HEADS_KV, dim, dtype=dtype),
            torch.zeros(8, page_size, HEADS_KV, dim_v or dim, dtype=dtype),
            cache_seqlens=ints(batch),
            page_table=ints(batch, 4096 // page_size),
            **{"causal": True, "return_softmax_lse": True, "ver": "triton"} | options,
        )

    return call


def mixed(
    group: int = 4,
    dim: int = 128,
    page_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    most: int = 128,
    batch: int = BATCH,
    **options: Any,
) -> Callable[[], object]:
    """Prompt chunks of up to `most` tokens and decodes in one call, with metadata: every path."""

    def call() -> object:
        heads = HEADS_KV * group
        cu_seqlens_q, lengths = ints(batch + 1), ints(batch)
        shared = {"cu_seqlens_q": cu_seqlens_q, "causal": True, "ver": "triton"} | options
        metadata = triton_fa.get_scheduler_metadata(
            batch,
            most,
            4096,
            heads,
            HEADS_KV,
            dim,
            lengths,
            dtype,
            page_size=page_size,
            **shared,
        )
        return triton_fa.flash_attn_with_kvcache(
            torch.zeros(batch * most, heads, dim, dtype=dtype),
            *torch.zeros(2, 8, page_size, HEADS_KV, dim, dtype=dtype),
            cache_seqlens=lengths,
            page_table=ints(batch, 4096 // page_size),
            max_seqlen_q=most,
            scheduler_metadata=metadata,
            **shared,
        )

    return call


def prefill(
    seqlen: int = 256,
    dim: int = 128,
    dim_v: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 2,
    **options: Any,
) -> Callable[[], object]:
    """Packed sequences of up to `seqlen` queries and keys, four query heads to a head."""

    def call() -> object:
        tokens = 2 * seqlen
        return triton_fa.flash_attn_varlen_func(
            torch.zeros(tokens, 4 * HEADS_KV, dim, dtype=dtype),
            torch.zeros(tokens, HEADS_KV, dim, dtype=dtype),
            torch.zeros(tokens, HEADS_KV, dim_v or dim, dtype=dtype),
            ints(batch + 1),
            ints(batch + 1),
            seqlen,
            seqlen,
            **{"causal": True, "num_splits": 1, "return_softmax_lse": True, "ver": "triton"}
            | options,
        )

    return call


def append(
    new: int = 1, rotary_dim: int = 0, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> Callable[[], object]:
    """Decode with `new` keys of each sequence written to the cache first, turned if asked to."""

    def call() -> object:
        turns = torch.zeros(2, 4096, rotary_dim // 2, dtype=dtype)
        rotary = dict(zip(("rotary_cos", "rotary_sin"), turns, strict=True)) if rotary_dim else {}
        added = torch.zeros(2, BATCH, new, HEADS_KV, 128, dtype=dtype)
        return decode(dtype=dtype, k=added[0], v=added[1], **rotary, **options)()

    return call


def merge_splits(
    dim: int = 128, splits: int = 4, tokens: int = 2, **options: Any
) -> Callable[[], object]:
    """Partial results that the caller made."""
    shape = (splits, 1, tokens, HEADS_KV)
    return lambda: triton_fa.flash_attn_combine(
        torch.zeros(*shape, dim), torch.zeros(shape), **options
    )


def merge_pair(dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> Callable[[], object]:
    """Two results that the caller holds."""
    v, s = torch.zeros(2, HEADS_KV, dim, dtype=dtype), torch.zeros(2, HEADS_KV)
    return lambda: triton_fa.merge_state(v, s, v, s)


def sinks(heads: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(heads, dtype=dtype)


def latent(
    heads: int, *, page_size: int = 64, row: int = 576, **options: Any
) -> Callable[[], object]:
    """Absorbed MLA: one kv head, values of 512 that are scored, keys of 64 beside them.

    `row` is how many elements one row of the cache lies behind the one before; those of queries
    are as much longer than their heads.
    """

    def call() -> object:
        cache = torch.zeros(8, page_size, 1, row, dtype=torch.bfloat16)
        q, qv = (
            torch.zeros(BATCH, 1, heads, dim + row - 576, dtype=torch.bfloat16)[..., :dim]
            for dim in (64, 512)
        )
        return triton_fa.flash_attn_with_kvcache(
            q,
            cache[..., 512:576],
            cache[..., :512],
            qv=qv,
            cache_seqlens=ints(BATCH),
            page_table=ints(BATCH, 64),
            **{"causal": True, "ver": "triton"} | options,
        )

    return call


def float8(
    dtype: torch.dtype, q_dtype: torch.dtype = torch.bfloat16, seqlen: int = 1, dim: int = 128
) -> Callable[[], object]:
    """A float8 cache with factors."""

    def call() -> object:
        cache = torch.zeros(8, 64, HEADS_KV, dim).to(dtype)
        factors = torch.ones(BATCH, HEADS_KV)
        return triton_fa.flash_attn_with_kvcache(
            torch.zeros(BATCH, seqlen, HEADS_KV * 4, dim).to(q_dtype),
            cache,
            torch.zeros_like(cache),
            q_descale=factors,
            k_descale=factors,
            v_descale=factors,
            cache_seqlens=ints(BATCH),
            page_table=ints(BATCH, 64),
            causal=True,
            ver="triton",
        )

    return call


@triton.jit
def causal_mask(batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):
    return kv_idx <= q_idx + seqlen_k - seqlen_q


@triton.jit
def distance(score, batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):
    return score - tl.abs(q_idx + seqlen_k - seqlen_q - kv_idx)


@triton.jit
def documents(batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):
    mine = tl.load(aux[0] + tl.minimum(q_idx, seqlen_q - 1))
    return mine == tl.load(aux[0] + tl.minimum(kv_idx, seqlen_k - 1))


def key_blocks(seqlen: int, size: int = 128) -> triton_fa.BlockSparseTensors:
    """Lists for blocks of `size` queries and keys."""
    blocks = -(-seqlen // size)
    counts, entries = ints(1, 1, blocks), ints(1, 1, blocks, blocks)
    return triton_fa.BlockSparseTensors(counts, entries, counts, entries, block_size=(size, size))


LONG = 2048  # more than 4096 rows with four query heads to a head
F16, F32, E4M3 = torch.float16, torch.float32, torch.float8_e4m3fn

MANY = 640  # of them, with two kv heads each, fill every chip
IN_BLOCKS: dict[str, Any] = {
    "mask_mod": documents,
    "aux_tensors": [ints(LONG)],
    "block_sparse_tensors": key_blocks(LONG),
    "causal": False,
}

# What every change is compiled for, in tests/test_compile.py.
CORE = {
    "decode-128": decode(page_size=64),
    "decode-128-pieces": decode(page_size=64, num_splits=4),
    "decode-96-two-panels": decode(dim=96),
    "decode-256": decode(group=4, dim=256, page_size=64),
    "mixed-128-page-16": mixed(),
    "prefill-128": prefill(sinks=sinks(8)),
    "prefill-64-window-softcap": prefill(
        dim=64, dtype=F16, sinks=sinks(8, F16), window_size=(64, -1), softcap=30.0
    ),
    "short-128": prefill(64, batch=MANY, sinks=sinks(8)),
    "prefill-blocks": prefill(LONG, **IN_BLOCKS),
    "mixed-float32": mixed(dim=64, dtype=F32),
    "append-rotary": append(rotary_dim=128),
    "decode-float8": float8(torch.float8_e4m3fn),
    "decode-float8-80": float8(torch.float8_e4m3fn, dim=80),
    "decode-latent": latent(16),
    "merge-splits": merge_splits(),
    "merge-pair": merge_pair(),
}
# Shared memory and registers are shortest here; slow to compile.
LARGE = {
    "prefill-256": prefill(dim=256, sinks=sinks(8)),
    "mixed-256-float32": mixed(dim=256, dtype=F32),
}
TILES = {
    f"decode-{dim}-rows-{rows}": decode(group=rows, dim=dim)
    for dim in (16, 32, 64, 80, 96, 128, 160, 192, 256)
    for rows in (1, 16, 32, 64, 128)
    if dim in (16, 64, 128, 256) or rows in (1, 32, 64, 128)
}
TILES |= {
    f"decode-{dim}-rows-{rows}-float32": decode(group=rows, dim=dim, dtype=F32)
    for dim in (64, 96, 128, 256)
    for rows in (1, 32, 64, 128)
}
TILES |= {
    "decode-192,128": decode(dim=192, dim_v=128),
    "decode-128-float16": decode(dtype=F16),
    "prefill-192,128": prefill(LONG, dim=192, dim_v=128),
    "prefill-128-float16": prefill(LONG, dtype=F16),
    "prefill-128-float32": prefill(LONG, dtype=F32),
    "prefill-256-float32": prefill(LONG, dim=256, dtype=F32),
}
TILES |= {
    f"prefill-{dim}-{name}": prefill(seqlen, dim=dim)
    for dim in (64, 80, 96, 128, 160, 256)
    for name, seqlen in (("long", LONG), ("short", 256))
}
FEATURES = {
    "decode-batch-1": decode(batch=1),
    "decode-batch-64": decode(batch=64),
    "decode-batch-2000": decode(batch=2000),
    "decode-256-batch-1": decode(dim=256, batch=1),
    "mixed-batch-2000": mixed(most=2, batch=2000),
    "decode-page-1": decode(page_size=1),
    "decode-page-256": decode(page_size=256),
    "decode-window": decode(window_size=(128, 0)),
    "decode-softcap": decode(softcap=50.0),
    "decode-sinks": decode(sinks=sinks(16)),
    "decode-invariant": decode(batch_invariant=True),
    "decode-no-lse": decode(return_softmax_lse=False),
    "mixed-page-64": mixed(page_size=64),
    "mixed-invariant": mixed(batch_invariant=True),
    "mixed-window": mixed(window_size=(128, 0)),
    "prefill-full": prefill(LONG, causal=False),
    "prefill-window": prefill(LONG, window_size=(1024, 0)),
    "prefill-both-windows": prefill(causal=False, window_size=(64, 32)),
    "prefill-softcap": prefill(LONG, softcap=50.0),
    "prefill-sinks": prefill(LONG, sinks=sinks(8)),
    "prefill-no-lse": prefill(return_softmax_lse=False),
}
FEATURES |= {
    "decode-latent-128": latent(128),
    "decode-latent-alone": latent(128, only_qv=True),
    "decode-latent-invariant": latent(128, batch_invariant=True),
    "decode-float8-both": float8(torch.float8_e4m3fn, torch.float8_e4m3fn),
    "decode-float8-64": float8(torch.float8_e4m3fn, dim=64),
    "decode-float8-96": float8(torch.float8_e4m3fn, dim=96),
    "decode-float8-rows-64": float8(torch.float8_e4m3fn, seqlen=16),
    "decode-e5m2": float8(torch.float8_e5m2, torch.float16),
    "decode-e4m3fnuz": float8(torch.float8_e4m3fnuz),
    "decode-e5m2fnuz": float8(torch.float8_e5m2fnuz),
    "prefill-float8": float8(torch.float8_e4m3fn, seqlen=2048),
    "prefill-float8-both": float8(torch.float8_e4m3fn, torch.float8_e4m3fn, seqlen=2048),
    "append": append(),
    "append-rotary-halves": append(rotary_dim=32, rotary_interleaved=False),
    "append-float32": append(dtype=F32, rotary_dim=64),
    "decode-left-padding": decode(cache_leftpad=ints(BATCH)),
    "decode-batch-idx": decode(cache_batch_idx=ints(BATCH)),
    "decode-attention-chunk": decode(attention_chunk=1024),
    "mixed-attention-chunk": mixed(attention_chunk=64),
    "decode-modified": decode(score_mod=distance, mask_mod=causal_mask, causal=False),
    "prefill-modified": prefill(LONG, score_mod=distance, mask_mod=causal_mask, causal=False),
    "merge-splits-256": merge_splits(dim=256, splits=128),
    "merge-splits-many-rows": merge_splits(tokens=8192),
    "merge-splits-to-float16": merge_splits(out_dtype=F16),
    "merge-pair-256-float32": merge_pair(dim=256, dtype=F32),
}
FEATURES |= {f"short-{dim}": prefill(64, dim=dim, batch=MANY) for dim in (16, 64, 80, 96)}
FEATURES |= {
    "short-96,128": prefill(64, dim=96, dim_v=128, batch=MANY),
    "short-128-float16": prefill(64, dtype=F16, batch=MANY),
    "short-128-full": prefill(64, batch=MANY, causal=False, return_softmax_lse=False),
    "short-128-window-softcap": prefill(64, batch=MANY, window_size=(16, 0), softcap=30.0),
    "short-128-both-windows": prefill(64, batch=MANY, causal=False, window_size=(8, 4)),
    "short-128-negative": prefill(64, batch=MANY, softmax_scale=-1.0),
}
# Compiled for Hopper alone, where the kernel that is only there is chosen.
HOPPER = {
    f"hopper-{dim}{',128' * (dim == 192)}": prefill(LONG, dim=dim, dim_v=min(dim, 128))
    for dim in (64, 96, 128, 192)
}
HOPPER |= {
    "hopper-80": prefill(LONG, dim=80),
    "hopper-160": prefill(LONG, dim=160),
    "hopper-192": prefill(LONG, dim=192),
    "hopper-256": prefill(LONG, dim=256),
    "hopper-256-full": prefill(LONG, dim=256, causal=False),
    "hopper-128-blocks": prefill(LONG, **IN_BLOCKS),
    "hopper-64-blocks": prefill(LONG, dim=64, **IN_BLOCKS),
    "hopper-256-blocks": prefill(LONG, dim=256, **IN_BLOCKS),
    "hopper-128-mask": prefill(LONG, mask_mod=causal_mask, causal=False),
    "hopper-128-modified": prefill(LONG, score_mod=distance),
    "hopper-128-full": prefill(LONG, causal=False),
    "hopper-128-float16": prefill(LONG, dtype=F16),
    "hopper-128-page-16": mixed(most=LONG),
    "hopper-128-page-64": mixed(most=LONG, page_size=64),
    "hopper-128-page-256": mixed(most=LONG, page_size=256),
    "hopper-128-invariant": mixed(most=LONG, batch_invariant=True),
    "hopper-128-attention-chunk": mixed(most=LONG, attention_chunk=1024),
    "hopper-128-window": prefill(LONG, window_size=(1024, 0)),
    "hopper-64-window-sinks": prefill(LONG, dim=64, window_size=(128, 0), sinks=sinks(8)),
    "hopper-latent": latent(128),
    "hopper-latent-alone": latent(128, only_qv=True),
    "hopper-latent-invariant": latent(128, batch_invariant=True),
    "hopper-latent-page-1": latent(128, page_size=1),
    "hopper-latent-page-16": latent(64, page_size=16),
    "hopper-latent-page-16-rows-584": latent(128, page_size=16, row=584),
    "hopper-latent-page-32": latent(64, page_size=32),
    "hopper-256-softcap": prefill(LONG, dim=256, softcap=50.0, window_size=(4096, 0)),
    "hopper-64-e4m3": prefill(LONG, dim=64, dtype=E4M3),
    "hopper-96-e4m3": prefill(LONG, dim=96, dtype=E4M3),
    "hopper-128-e4m3": prefill(LONG, dtype=E4M3),
    "hopper-128-e4m3-page-16": mixed(most=LONG, dtype=E4M3),
    "hopper-192,128-e4m3": prefill(LONG, dim=192, dim_v=128, dtype=E4M3),
    "hopper-256-e4m3": prefill(LONG, dim=256, dtype=E4M3),
}
CASES = CORE | LARGE | TILES | FEATURES | HOPPER

"""Named cases: the attention of real models and every head size and length pattern that matters.

Each has a scaled-down version for Triton's interpreter: the same heads per kv head, head dims,
page size and flags, few heads and tokens.
"""

import math
from typing import Any

from parity_tests.cases import Case

LLAMA3_8B = {"heads_q": 32, "heads_kv": 8, "head_dim": 128, "head_dim_v": 128, "causal": True}
QWEN3_32B = {"heads_q": 64, "heads_kv": 8, "head_dim": 128, "head_dim_v": 128, "causal": True}
GPT_OSS = {"heads_q": 64, "heads_kv": 8, "head_dim": 64, "head_dim_v": 64, "causal": True}
GPT_OSS_LOCAL = {**GPT_OSS, "window": (127, 0), "sinks": True}
GEMMA2_9B = {
    "heads_q": 16,
    "heads_kv": 8,
    "head_dim": 256,
    "head_dim_v": 256,
    "causal": True,
    "softcap": 50.0,
}
GEMMA2_LOCAL = {**GEMMA2_9B, "window": (4095, 0)}
LLAMA4 = {"heads_q": 40, "heads_kv": 8, "head_dim": 128, "head_dim_v": 128, "causal": True}
LLAMA4_LOCAL = {**LLAMA4, "attention_chunk": 8192}
GPTJ_6B = {"heads_q": 16, "heads_kv": 16, "head_dim": 256, "head_dim_v": 256, "causal": True}
MHA = {"heads_q": 16, "heads_kv": 16, "head_dim": 64, "head_dim_v": 64, "causal": True}
MQA = {"heads_q": 16, "heads_kv": 1, "head_dim": 128, "head_dim_v": 128, "causal": True}
# Absorbed MLA: the queries' parts of 64 rotated and 512 other dims, one kv head of such rows.
MLA = {"heads_q": 128, "heads_kv": 1, "head_dim": 64, "head_dim_v": 512, "causal": True,
       "qv": True, "kv_strides": "latent", "page_size": 64}  # fmt: skip
MLA_TP8 = {**MLA, "heads_q": 16}
FLOAT8 = {"dtype": "float8_e4m3fn", "descales": "qkv", "descale_strides": "expanded"}
FLOAT8_CACHE = {"kv_dtype": "float8_e4m3fn", "descales": "kv", "descale_strides": "expanded"}

PACKED = {"entry": "varlen", "q_layout": "packed", "kv_layout": "packed", "page_size": 0}
PAGED_VARLEN = {"entry": "varlen", "q_layout": "packed", "kv_layout": "paged"}
BATCHED = {"kv_layout": "batched", "page_size": 0}
DENSE = {"entry": "dense", "q_layout": "batched", **BATCHED}
# What an engine's cache looks like: pages to spare, a table wider than needed.
ENGINE = {"spare_pages": 5, "table_slack": 3, "pad_k": 2}
# As in Llama: each half of the dims is rotated with the other.
NEOX = {"rotary_dim": 128, "rotary_interleaved": False}


def _case(name: str, q: tuple[int, ...], k: tuple[int, ...], *parts: dict[str, Any]) -> Case:
    fields: dict[str, Any] = {"seed": sum(name.encode())}
    for part in parts:
        fields |= part
    return Case(name=name, seqlens_q=q, seqlens_k=k, **fields)


def _append(*lengths: int, packed: bool = False) -> dict[str, Any]:
    return {"append": "packed" if packed else "batched", "seqlens_new": lengths}


def _leftpad(*lengths: int) -> dict[str, Any]:
    return {"leftpad": True, "leftpads": lengths}


def _odd(head_dim: int, head_dim_v: int, heads: int = 6) -> dict[str, Any]:
    dims = {"head_dim": head_dim, "head_dim_v": head_dim_v}
    return {"heads_q": heads, "heads_kv": 2, "causal": True, **dims}


def full() -> list[Case]:
    """The cases as a GPU runs them."""
    ragged = (1, 17, 256, 1000, 4097, 33, 2048, 512)
    mixed_q, mixed_k = (1, 1, 512, 1, 77, 1), (4096, 131, 512, 1, 1024, 2049)
    fp16, fp32 = {"dtype": "float16"}, {"dtype": "float32"}
    varlen = (1024, 300, 77, 1, 513)
    decode = (1,) * 8
    short = (34, 64, 0, 7, 50) * 20
    return [
        # decode
        _case("llama3-8b decode, page 16", decode, ragged, LLAMA3_8B, ENGINE),
        _case("llama3-8b decode, page 1", decode, ragged, LLAMA3_8B, ENGINE, {"page_size": 1}),
        _case("llama3-8b decode, vLLM cache", decode, ragged, LLAMA3_8B, ENGINE,
              {"kv_strides": "split", "out": True, "q_layout": "packed"}),
        _case("llama3-8b decode fp16, page 64", decode, ragged, LLAMA3_8B, fp16,
              {"page_size": 64}),
        _case("llama3-8b decode fp32", (1, 1), (777, 40), LLAMA3_8B, fp32),
        _case("llama3-8b decode, one long context", (1,), (32768,), LLAMA3_8B,
              {"page_size": 128}),
        _case("llama3-8b decode, dense cache", (1,) * 4, (1024,) * 4, LLAMA3_8B, BATCHED,
              {"lengths": "int", "pad_k": 5}),
        _case("qwen3-32b decode, q_len 4", (4,) * 4, (4096, 5, 4, 1023), QWEN3_32B, ENGINE),
        _case("gpt-oss decode, sinks and window", decode, ragged, GPT_OSS_LOCAL, ENGINE),
        _case("gpt-oss decode, sinks, q_len 8", (8,) * 3, (4096, 8, 129), GPT_OSS,
              {"sinks": True}, ENGINE),
        _case("gemma2-9b decode, softcap and window", (1,) * 4, (8192, 4096, 100, 1),
              GEMMA2_LOCAL, {"page_size": 64}),
        _case("mha decode", decode, ragged, MHA, ENGINE, {"page_size": 64}),
        _case("mqa decode, shared prefix", decode, ragged, MQA, ENGINE,
              {"shared_prefix": True}),
        # prefill
        _case("llama3-8b prefill, varlen", varlen, varlen, LLAMA3_8B, PACKED,
              {"kv_strides": "sliced", "q_strided": True}),
        _case("llama3-8b prefill, 4096 tokens", (4096,), (4096,), LLAMA3_8B, PACKED),
        _case("llama3-8b prefill fp16, seqused", varlen, varlen, LLAMA3_8B, PACKED, fp16,
              {"pad_q": 7, "pad_k": 9, "out": True}),
        _case("llama3-8b prefill fp32", (130, 65), (130, 65), LLAMA3_8B, PACKED, fp32),
        _case("llama3-8b chunked prefill, paged", (512, 512), (2048, 1500), LLAMA3_8B, ENGINE,
              {"q_layout": "packed", "page_size": 64}),
        _case("qwen3-32b chunked prefill, varlen paged", (256, 100), (1024, 612), QWEN3_32B,
              PAGED_VARLEN, ENGINE, {"page_size": 128}),
        _case("gpt-oss prefill, sinks and window", varlen, varlen, GPT_OSS_LOCAL, PACKED),
        _case("gemma2-9b prefill, softcap and window", (600, 100), (600, 100), GEMMA2_LOCAL,
              PACKED, {"window": (255, 0)}),
        _case("mha bidirectional, dense", (500,) * 2, (500,) * 2, MHA, DENSE,
              {"causal": False}),
        _case("mqa cross attention, two-sided window", (200, 300), (300, 200), MQA, PACKED,
              {"causal": False, "window": (64, 32)}),
        _case("llama3-8b, many short sequences, varlen", short, short, LLAMA3_8B, PACKED),
        _case("gpt-oss, many short sequences, sinks and window", short, short[::-1], GPT_OSS,
              PACKED, {"window": (20, 0), "sinks": True}),
        # batches as engines make them
        _case("llama3-8b mixed batch", mixed_q, mixed_k, LLAMA3_8B, ENGINE,
              {"q_layout": "packed", "tail_q": 3, "out": True}),
        _case("gpt-oss mixed batch, sinks", mixed_q, mixed_k, GPT_OSS, ENGINE,
              {"q_layout": "packed", "sinks": True}),
        _case("zero lengths, paged", (1, 0, 3, 0, 2), (0, 5, 0, 0, 40), LLAMA3_8B, ENGINE,
              {"q_layout": "packed", "out": True}),
        _case("zero lengths, varlen, sinks", (1, 0, 3, 20), (0, 5, 0, 7), GPT_OSS, PACKED,
              {"sinks": True}),
        _case("more queries than keys, causal", (300, 64), (100, 1), MHA, PACKED),
        # a cache that the call appends to, and rows of it elsewhere
        _case("llama3-8b decode, append and rotary, page 16", decode, ragged, LLAMA3_8B, ENGINE,
              NEOX, _append(*decode)),
        _case("llama3-8b decode, append and rotary, dense cache", (1,) * 4, (1000,) * 4, LLAMA3_8B,
              BATCHED, NEOX, _append(*(1,) * 4), {"lengths": "int", "pad_k": 5}),
        _case("llama3-8b decode fp16, append, vLLM cache", decode, ragged, LLAMA3_8B, fp16, ENGINE,
              _append(*decode), {"kv_strides": "split", "q_layout": "packed", "out": True}),
        _case("llama3-8b decode fp32, append and rotary", (1, 1), (777, 40), LLAMA3_8B, fp32, NEOX,
              _append(1, 1)),
        _case("llama3-8b chunked prefill, append and rotary", (512, 300), (1536, 0), LLAMA3_8B,
              ENGINE, NEOX, _append(512, 300, packed=True),
              {"q_layout": "packed", "page_size": 64, "q_strided": True}),
        _case("llama3-8b mixed batch, append and rotary", mixed_q,
              tuple(k - q for q, k in zip(mixed_q, mixed_k, strict=True)), LLAMA3_8B, ENGINE, NEOX,
              _append(*mixed_q, packed=True), {"q_layout": "packed", "tail_q": 3, "tail_new": 3}),
        _case("qwen3-32b decode, q_len 4, append and rotary", (4,) * 4, (4092, 1, 0, 1019),
              QWEN3_32B, ENGINE, NEOX, _append(*(4,) * 4)),
        # Ranges of several sequences, each with a padding of its own.
        _case("mqa decode, window and left padding, many sequences", (3,) * 600,
              (40, 33, 36) * 200, MQA, BATCHED, _leftpad(*(30, 0, 7) * 200), {"window": (8, 0)}),
        _case("float8_e5m2, 64 rows of head dims 72 and 40", (63, 63), (70, 300),
              {"heads_q": 2, "heads_kv": 2, "head_dim": 72, "head_dim_v": 40, "causal": True},
              {"kv_dtype": "float8_e5m2"}),
        _case("gpt-j decode, interleaved rotary of 64 dims", (1,) * 4, (500, 17, 1, 1023), GPTJ_6B,
              ENGINE, {"rotary_dim": 64, "page_size": 64}, _append(*(1,) * 4)),
        _case("gpt-oss decode, append, rotary, sinks and window", decode, ragged, GPT_OSS_LOCAL,
              ENGINE, {"rotary_dim": 64, "rotary_interleaved": False}, _append(*decode)),
        _case("uneven append, some of nothing", (3, 1, 2, 0), (100, 33, 0, 64), LLAMA3_8B, ENGINE,
              NEOX, _append(5, 0, 200, 3, packed=True), {"q_layout": "packed"}),
        _case("append with positions of its own, not causal", (4, 4), (300, 70), MHA, ENGINE,
              {"causal": False, "rotary_dim": 32, "rotary_seqlens": (1000, 3)}, _append(4, 4)),
        _case("rotary, a window that reaches over all queries but not over their bound", (4, 2),
              (300, 70), MHA, ENGINE, {"causal": False, "window": (-1, 12), "rotary_dim": 32},
              _append(4, 2, packed=True), {"q_layout": "packed", "max_q_slack": 20}),
        _case("append beyond the end of the table", (1,) * 3, (1024, 1000, 40), LLAMA3_8B, NEOX,
              _append(9, 40, 9, packed=True), {"overflow": 16}),
        _case("llama4 decode, attention_chunk", (1,) * 4, (8192, 8193, 20000, 77), LLAMA4_LOCAL,
              ENGINE, {"page_size": 64, "num_splits": 3}),
        _case("llama4 decode, attention_chunk, append and rotary", (1,) * 4, (8191, 8192, 20000, 0),
              LLAMA4_LOCAL, ENGINE, {"rotary_dim": 128, "page_size": 64}, _append(*(1,) * 4)),
        _case("llama4 prefill, attention_chunk", (2048, 300), (2048, 300), LLAMA4, PACKED,
              {"attention_chunk": 512}),
        _case("llama4 chunked prefill, attention_chunk", (300, 100), (1600, 513), LLAMA4, ENGINE,
              {"attention_chunk": 512, "q_layout": "packed", "page_size": 64}),
        _case("attention_chunk, not causal, more queries than keys", (300, 64), (100, 64), MHA,
              PACKED, {"causal": False, "attention_chunk": 48}),
        _case("left-padded batch, decode", (1,) * 4, (1024,) * 4, LLAMA3_8B, BATCHED, {"pad_k": 5},
              _leftpad(0, 1000, 517, 3)),
        _case("left-padded batch, prefill", (256,) * 3, (256,) * 3, LLAMA3_8B, BATCHED,
              _leftpad(0, 250, 100)),
        _case("left-padded batch, paged, append and rotary", (1,) * 4, (700, 64, 16, 333),
              LLAMA3_8B, ENGINE, NEOX, _append(*(1,) * 4), _leftpad(5, 63, 16, 0)),
        _case("cache rows in another order, decode", (1,) * 4, (1000, 17, 333, 64), LLAMA3_8B,
              BATCHED, {"batch_idx": True, "spare_rows": 3, "pad_k": 9}),
        _case("table rows in another order, mixed batch, unsplit", (80, 1, 2, 1, 1, 1, 3, 1),
              (90, 17, 333, 64, 1, 2, 90, 5), LLAMA3_8B, ENGINE,
              {"q_layout": "packed", "batch_idx": True, "spare_rows": 3, "num_splits": 1}),
        _case("table rows in another order, append", (1,) * 4, (1000, 17, 333, 64), LLAMA3_8B,
              ENGINE, NEOX, {"batch_idx": True, "spare_rows": 3}, _append(*(1,) * 4)),
        _case("all of a cache at once", (2,) * 4, (1000, 17, 333, 64), GPT_OSS_LOCAL, ENGINE,
              {"rotary_dim": 32, "batch_idx": True, "spare_rows": 2, "attention_chunk": 100,
               "num_splits": 4},
              _append(3, 2, 0, 40, packed=True), _leftpad(500, 1, 60, 0)),
        # absorbed MLA, and numbers of 8 bits
        _case("deepseek MLA decode, 128 heads", (1,) * 4, (4096, 17, 1000, 64), MLA, ENGINE),
        _case("deepseek MLA decode, 128 heads, 1 to 4 tokens", (1, 2, 3, 4), (1000, 64, 2048, 4),
              MLA, ENGINE, {"q_layout": "packed"}),
        _case("deepseek MLA decode, 16 heads", decode, ragged, MLA_TP8, ENGINE),
        _case("deepseek MLA decode, 16 heads, 1 to 4 tokens", (4, 1, 2, 3), (4096, 17, 1000, 65),
              MLA_TP8, ENGINE, {"q_layout": "packed", "num_splits": 3, "out": True}),
        _case("deepseek MLA decode, 16 heads, values alone", (1, 2), (1000, 65), MLA_TP8, ENGINE,
              {"q_layout": "packed", "only_qv": "bare"}),
        _case("deepseek MLA decode, 16 heads, values alone, dense cache", (3,) * 2, (1000, 65),
              MLA_TP8, BATCHED, {"only_qv": "unread", "pad_k": 2}),
        _case("deepseek MLA chunked prefill, 16 heads", (200, 33), (1000, 33), MLA_TP8, ENGINE,
              {"q_layout": "packed"}),
        _case("deepseek MLA decode, 16 heads, float8 cache", (1, 2), (1000, 65), MLA_TP8, ENGINE,
              FLOAT8_CACHE, {"q_layout": "packed"}),
        _case("llama3-8b decode, float8", decode, ragged, LLAMA3_8B, ENGINE, FLOAT8),
        _case("llama3-8b chunked prefill, float8", (512, 300), (2048, 1500), LLAMA3_8B, ENGINE,
              FLOAT8, {"q_layout": "packed", "page_size": 64}),
        _case("llama3-8b decode, float8, append, factors of each head", (1,) * 4, (700, 64, 16, 0),
              LLAMA3_8B, ENGINE, FLOAT8, _append(*(1,) * 4), {"descale_strides": "plain"}),
        _case("llama3-8b decode, float8 cache", decode, ragged, LLAMA3_8B, ENGINE, FLOAT8_CACHE),
        _case("llama3-8b chunked prefill, float8 cache", (512, 300), (2048, 1500), LLAMA3_8B,
              ENGINE, FLOAT8_CACHE, {"q_layout": "packed", "page_size": 64}),
        _case("gpt-oss decode fp16, float8_e5m2 cache, sinks and window", (1,) * 4,
              (1000, 129, 128, 7), GPT_OSS_LOCAL, ENGINE, fp16, FLOAT8_CACHE,
              {"kv_dtype": "float8_e5m2"}),
        # head dims
        *(
            _case(f"head dim {d}, mixed batch", (1, 200, 2, 65), (700, 333, 64, 65), _odd(d, d),
                  {"q_layout": "packed"})
            for d in (72, 80, 96, 112, 160)
        ),
        *(
            _case(f"head dim {d}, prefill", (200, 65), (333, 65), _odd(d, d), PACKED)
            for d in (80, 192)
        ),
        _case("head dim 192 with v 128, decode", (1, 1), (700, 64), _odd(192, 128, heads=14),
              {"kv_strides": "fused"}),
        _case("head dim 192 with v 128, prefill", (200, 65), (333, 65), _odd(192, 128, heads=14),
              PACKED),
        # a model's own q, k, v
        _case("llama model forward pass", (96, 33), (96, 33), PACKED,
              {"heads_q": 8, "heads_kv": 2, "causal": True, "source": "llama"}),
    ]  # fmt: skip


def small() -> list[Case]:
    """The same cases for Triton's interpreter."""
    return [scaled_down(case) for case in full()]


def scaled_down(case: Case) -> Case:
    """Few heads and tokens; what a kernel is compiled for stays, but for very many heads.

    Wide values of absorbed MLA are narrower besides: the interpreter would take minutes.
    """
    group = min(case.heads_q // case.heads_kv, 20)
    heads_kv = 1 if group > 2 else min(case.heads_kv, 2)
    return case.with_changes(
        heads_q=heads_kv * group,
        heads_kv=heads_kv,
        seqlens_q=tuple(_fewer(n) for n in case.seqlens_q[:5]),
        seqlens_k=tuple(_fewer(n) for n in case.seqlens_k[:5]),
        seqlens_new=tuple(_fewer(n) for n in case.seqlens_new[:5]),
        leftpads=tuple(_fewer(n) for n in case.leftpads[:5]),
        rotary_seqlens=tuple(_fewer(n) for n in case.rotary_seqlens[:5]),
        attention_chunk=_fewer(case.attention_chunk) // 2,
        window=tuple(None if side is None else _fewer(side) // 2 if side > 0 else side
                     for side in case.window),
        page_size=min(case.page_size, 16),
        head_dim=16 if case.qv else case.head_dim,
        head_dim_v=128 if case.qv else case.head_dim_v,
    )  # fmt: skip


def _fewer(n: int) -> int:
    """Small, and in the same order as before: 8 -> 8, 16 -> 14, 512 -> 44, 32768 -> 80."""
    return n if n <= 8 else 8 + int(6 * math.log2(n / 8))

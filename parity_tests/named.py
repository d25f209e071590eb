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
MHA = {"heads_q": 16, "heads_kv": 16, "head_dim": 64, "head_dim_v": 64, "causal": True}
MQA = {"heads_q": 16, "heads_kv": 1, "head_dim": 128, "head_dim_v": 128, "causal": True}

PACKED = {"entry": "varlen", "q_layout": "packed", "kv_layout": "packed", "page_size": 0}
PAGED_VARLEN = {"entry": "varlen", "q_layout": "packed", "kv_layout": "paged"}
BATCHED = {"kv_layout": "batched", "page_size": 0}
DENSE = {"entry": "dense", "q_layout": "batched", **BATCHED}
# What an engine's cache looks like: pages to spare, a table wider than needed.
ENGINE = {"spare_pages": 5, "table_slack": 3, "pad_k": 2}


def _case(name: str, q: tuple[int, ...], k: tuple[int, ...], *parts: dict[str, Any]) -> Case:
    fields: dict[str, Any] = {"seed": sum(name.encode())}
    for part in parts:
        fields |= part
    return Case(name=name, seqlens_q=q, seqlens_k=k, **fields)


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
    """Few heads and tokens; what a kernel is compiled for stays."""
    group = case.heads_q // case.heads_kv
    heads_kv = 1 if group > 2 else min(case.heads_kv, 2)
    return case.with_changes(
        heads_q=heads_kv * group,
        heads_kv=heads_kv,
        seqlens_q=tuple(_fewer(n) for n in case.seqlens_q[:5]),
        seqlens_k=tuple(_fewer(n) for n in case.seqlens_k[:5]),
        window=tuple(None if side is None else _fewer(side) // 2 if side > 0 else side
                     for side in case.window),
        page_size=min(case.page_size, 16),
    )  # fmt: skip


def _fewer(n: int) -> int:
    """Small, and in the same order as before: 8 -> 8, 16 -> 14, 512 -> 44, 32768 -> 80."""
    return n if n <= 8 else 8 + int(6 * math.log2(n / 8))

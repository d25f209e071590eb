"""What is compared: one public call per backend, strict, with its own schedule where legal.

Peers that are no backend of the package come as functions of their own.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import triton_fa
from bench import combine, sdpa, vllm_triton
from bench.inputs import Inputs

Attention = Callable[[Inputs], torch.Tensor]

BASELINE = "3"
# Rows whose schedule an engine computes once per step, outside the layers.
SCHEDULED = ("decode", "mixed", "step", "metadata")


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of making the call."""

    label: str
    ver: int | str
    batch_invariant: bool = False
    scheduled: bool = True  # give it metadata where the row allows
    captured: bool = True  # False: reads lengths on the host, so it is timed eagerly
    peer: Callable[[Inputs], Attention] | None = None  # makes the call where no backend does
    takes: tuple[str, ...] = ()  # of a row's options, those that the peer knows
    jit: bool = False  # Triton compiles its kernels


def bind_masked(inputs: Inputs) -> Attention:
    """Our kernel with a mask; its module imports Triton, for which no other first call pays."""
    bound: Attention = importlib.import_module("bench.masked").bind_attention(inputs)
    return bound


def vllm(label: str, peer: Callable[[Inputs], Attention]) -> Variant:
    return Variant(label, label, peer=peer, takes=("qv",), jit=True)


VARIANTS: dict[str, Variant] = {
    v.label: v
    for v in (
        Variant("triton", "triton", jit=True),
        Variant("triton-nometa", "triton", scheduled=False, jit=True),
        Variant("triton-inv", "triton", batch_invariant=True, jit=True),
        Variant("torch", "torch", scheduled=False, captured=False),
        Variant("3", 3),
        Variant("3-nometa", 3, scheduled=False),
        Variant("4", 4),
        vllm(vllm_triton.LABEL, vllm_triton.bind_attention),
        vllm(vllm_triton.CAPTURED, vllm_triton.bind_captured),
        Variant("triton-mask", "triton-mask", peer=bind_masked, jit=True),
        Variant(sdpa.LABEL, sdpa.LABEL, peer=sdpa.bind_attention),
    )
}


@dataclass(frozen=True, slots=True)
class Bound:
    """A variant tied to one workload: ``call(inputs)`` computes, ``plan()`` makes the schedule."""

    call: Attention
    plan: Callable[[], torch.Tensor] | None
    note: str = ""  # what differs from the rule, for the report


def plan_arguments(inputs: Inputs) -> dict[str, Any]:
    """Arguments of get_scheduler_metadata that describe the call exactly as it will be made."""
    row = inputs.row
    assert row.page_size is not None
    assert inputs.page_table is not None
    return {
        "batch_size": row.batch,
        "max_seqlen_q": row.bound_q,
        "max_seqlen_k": inputs.page_table.shape[1] * row.page_size,
        "num_heads_q": row.heads.q,
        "num_heads_kv": row.heads.kv,
        "headdim": row.heads.dim,
        "headdim_v": row.head_dim_v,
        "cache_seqlens": inputs.seqused_k,
        "qkv_dtype": inputs.q.dtype,
        "cu_seqlens_q": inputs.cu_seqlens_q,
        "page_size": row.page_size,
        **({"max_seqlen_k_new": row.new} if row.new else {}),
        "causal": row.causal,
        "window_size": row.window,
        "has_softcap": row.softcap > 0,
    }


def bind(variant: Variant, inputs: Inputs) -> Bound:
    """Tie ``variant`` to the workload of ``inputs``.

    Raises:
        triton_fa.TritonFAError: the backend is missing, or refuses this workload; says why.
    """
    row = inputs.row
    if row.phase == "combine":
        return Bound(combine.bind_attention(variant.label, inputs), None)
    if variant.peer:
        if unknown := sorted(inputs.options.keys() - {*variant.takes}):
            raise triton_fa.UnsupportedError(variant.label, unknown)
        return Bound(variant.peer(inputs), None)
    plan, metadata, note = None, None, ""
    if row.latent and variant.ver == 3:
        note = "no metadata: with qv FA3 asks for another size than it makes"
    elif row.phase in SCHEDULED and variant.scheduled:
        arguments = plan_arguments(inputs)

        def make() -> torch.Tensor:
            metadata: torch.Tensor = triton_fa.get_scheduler_metadata(**arguments, ver=variant.ver)
            return metadata

        try:
            metadata, plan = make(), make
        except NotImplementedError as error:
            note = f"no metadata: {error}"
    common: dict[str, Any] = {
        "causal": row.causal,
        "window_size": row.window,
        "softcap": row.softcap,
        "sinks": inputs.sinks,
        "return_softmax_lse": row.return_lse,
        "ver": variant.ver,
        **inputs.options,
    }
    if row.rotary:
        common["rotary_interleaved"] = row.rotary == "interleaved"
    if variant.batch_invariant:
        common["batch_invariant"] = True

    def cached(x: Inputs) -> Any:
        return triton_fa.flash_attn_with_kvcache(
            x.q,
            x.k,
            x.v,
            cache_seqlens=x.seqused_k,
            page_table=x.page_table,
            cu_seqlens_q=x.cu_seqlens_q,
            max_seqlen_q=row.bound_q,
            scheduler_metadata=metadata,
            **common,
        )

    def packed(x: Inputs) -> Any:
        return triton_fa.flash_attn_varlen_func(
            x.q,
            x.k,
            x.v,
            x.cu_seqlens_q,
            x.cu_seqlens_k,
            max_seqlen_q=row.bound_q,
            max_seqlen_k=max(row.k_lens),
            **common,
        )

    def dense(x: Inputs) -> Any:
        return triton_fa.flash_attn_func(x.q, x.k, x.v, **common)

    entry = {"paged": cached, "packed": packed, "dense": dense}[row.layout]

    def call(x: Inputs) -> torch.Tensor:
        result = entry(x)
        out: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return out

    return Bound(call, plan, note)

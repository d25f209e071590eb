"""The attention functions as operators of PyTorch: `torch.ops.triton_fa`, for `torch.compile`.

Importing this module defines them. Arguments have the names and defaults of the functions, all but
the first few tensors by keyword. Each returns `(out, lse)`, with an empty lse unless
`return_lse=True`. Appending to a cache is an operator of its own, which says that it writes there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from triton_fa.api import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from triton_fa.checks import require_no_grad

_MASKS = """
    float? softmax_scale=None, bool causal=False, SymInt[] window_size=[-1, -1],
    SymInt? attention_chunk=None, float? softcap=0.0"""
_SETTINGS = """
    Tensor? qv=None, Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None,
    bool? pack_gqa=None, SymInt sm_margin=0, Tensor? sinks=None, str? ver=None,
    bool batch_invariant=False, bool return_lse=False"""
_CACHE = """
    Tensor? cache_seqlens=None, Tensor? cache_batch_idx=None, Tensor? cache_leftpad=None,
    Tensor? page_table=None, Tensor? cu_seqlens_q=None, SymInt? max_seqlen_q=None"""

_SCHEMAS = {
    "flash_attn_func": f"""
        (Tensor q, Tensor k, Tensor v, *, {_MASKS}, SymInt num_splits=1, {_SETTINGS})
        -> (Tensor, Tensor)""",
    "flash_attn_varlen_func": f"""
        (Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, *,
        SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, Tensor? seqused_q=None,
        Tensor? seqused_k=None, Tensor? page_table=None, Tensor? scheduler_metadata=None,
        {_MASKS}, SymInt num_splits=1, {_SETTINGS})
        -> (Tensor, Tensor)""",
    "flash_attn_with_kvcache": f"""
        (Tensor q, Tensor k_cache, Tensor v_cache, *, {_CACHE}, Tensor? scheduler_metadata=None,
        {_MASKS}, SymInt num_splits=0, {_SETTINGS})
        -> (Tensor, Tensor)""",
    "flash_attn_with_kvcache_append": f"""
        (Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, *, {_CACHE},
        Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor? cu_seqlens_k_new=None,
        Tensor? rotary_seqlens=None, bool rotary_interleaved=True,
        Tensor? scheduler_metadata=None, {_MASKS}, SymInt num_splits=0, {_SETTINGS})
        -> (Tensor, Tensor)""",
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "flash_attn_func": flash_attn_func,
    "flash_attn_varlen_func": flash_attn_varlen_func,
    "flash_attn_with_kvcache": flash_attn_with_kvcache,
    "flash_attn_with_kvcache_append": flash_attn_with_kvcache,
}


def _implementation(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*tensors: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ver = options.pop("ver", None)
        result = function(*tensors, **options, ver=int(ver) if ver in ("3", "4") else ver)
        if not options.get("return_lse"):
            return result, result.new_empty(0, dtype=torch.float32)
        return result[0], result[1]

    return run


def _fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes of the result, for the compiler."""
    require_no_grad({"q": q, "k": k, "v": v})
    dtype = torch.bfloat16 if q.dtype.itemsize == 1 else q.dtype  # of float8
    out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=dtype)
    if not options.get("return_lse"):
        return out, q.new_empty(0, dtype=torch.float32)
    rows = q.shape[:-1]
    return out, q.new_empty((*rows[:-2], rows[-1], rows[-2]), dtype=torch.float32)


def _define() -> torch.library.Library:
    # Not `custom_op`, which does more on each call.
    library = torch.library.Library("triton_fa", "DEF")
    for name, schema in _SCHEMAS.items():
        library.define(name + " ".join(schema.split()), tags=torch.Tag.pt2_compliant_tag)
        library.impl(name, _implementation(_FUNCTIONS[name]), "CompositeExplicitAutograd")
        torch.library.register_fake(f"triton_fa::{name}", _fake, lib=library)
    return library


def call(name: str, *tensors: Any, **options: Any) -> Any:
    """A function by its name: as operator while `torch.compile` traces, else directly.

    Args:
        name: "flash_attn_func", "flash_attn_varlen_func" or "flash_attn_with_kvcache".
        *tensors: Those that the operator has by position.
        **options: The others.

    Returns:
        As the function: out, or (out, lse) with return_lse.
    """
    if not torch.compiler.is_compiling():
        return _FUNCTIONS[name](*tensors, **options)
    if options.get("ver") is not None:
        options["ver"] = str(options["ver"])
    out, lse = getattr(torch.ops.triton_fa, name)(*tensors, **options)
    return (out, lse) if options.get("return_lse") else out


_LIBRARY = _define()  # the operators live as long as this object

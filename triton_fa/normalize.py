"""From the arguments of a public function to a `Problem`: all validation of caller input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from triton_fa.checks import (
    require_bool,
    require_device,
    require_dtype,
    require_float,
    require_index,
    require_int,
    require_no_grad,
    require_rank,
    require_shape,
    require_tensor,
)
from triton_fa.errors import ArgumentError, ArgumentTypeError, ArgumentValueError, LayoutError
from triton_fa.problem import Lengths, Problem, Tensors
from triton_fa.spec import AttnSpec, Bounds, KeyLayout, QueryLayout, metadata_entries

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class Options:
    """The arguments of a call that are not tensors, as the caller gave them (hashable)."""

    entry: Literal["kvcache", "varlen", "dense"]
    softmax_scale: float | None = None
    causal: bool = False
    window_size: tuple[int | None, int | None] = (-1, -1)
    softcap: float | None = 0.0
    num_splits: int = 0
    sm_margin: int = 0
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    fixed_seqlen_k: int | None = None  # an int `cache_seqlens`
    features: frozenset[str] = frozenset()
    return_lse: bool = False
    pack_gqa: bool | None = None


def problem(tensors: Tensors, options: Options) -> Problem:
    """Validate a call and bring it into canonical form.

    Raises:
        ArgumentError, ArgumentTypeError, ArgumentValueError, LayoutError: naming the argument,
            what was expected and what was given.
    """
    q = require_tensor("q", tensors.q)
    names = _key_names(options.entry)
    k, v = require_tensor(names[0], tensors.k), require_tensor(names[1], tensors.v)
    require_no_grad({"q": q, names[0]: k, names[1]: v, "sinks": tensors.sinks, "out": tensors.out})
    _check_dtypes(q, {names[0]: k, names[1]: v})

    query_layout: QueryLayout = "dense" if tensors.cu_seqlens_q is None else "packed"
    if query_layout == "dense":
        require_rank("q", q, 4, "(batch, seqlen_q, heads, head_dim) without cu_seqlens_q")
        batch, total_q = q.shape[0], q.shape[0] * q.shape[1]
    else:
        require_rank("q", q, 3, "(total_q, heads, head_dim) with cu_seqlens_q")
        cu_seqlens_q = require_tensor("cu_seqlens_q", tensors.cu_seqlens_q)
        require_rank("cu_seqlens_q", cu_seqlens_q, 1, "(batch + 1,)")
        batch, total_q = cu_seqlens_q.shape[0] - 1, q.shape[0]
        if batch < 0:
            raise ArgumentError("cu_seqlens_q: expected shape (batch + 1,), got (0,)")
        require_index("cu_seqlens_q", cu_seqlens_q, (batch + 1,), q.device)
    max_seqlen_q = _max_seqlen_q(q, query_layout, options)

    key_layout, max_seqlen_k = _check_keys(tensors, options, batch, names)
    for name in ("seqused_q", "seqused_k"):
        lengths = getattr(tensors, name)
        if lengths is not None:
            shown = "cache_seqlens" if (name, options.entry) == ("seqused_k", "kvcache") else name
            require_index(shown, lengths, (batch,), q.device)
    fixed_seqlen_k = _fixed_seqlen_k(tensors, options, key_layout, max_seqlen_k)

    heads_q, heads_kv = q.shape[-2], k.shape[-2]
    if heads_q == 0 or heads_kv == 0 or heads_q % heads_kv:
        raise ArgumentError(
            f"q: expected a number of heads that is a multiple of {names[0]}'s, "
            f"got {heads_q} and {heads_kv}"
        )
    if q.shape[-1] != k.shape[-1]:
        raise ArgumentError(f"{names[0]}: expected head_dim {q.shape[-1]}, got {k.shape[-1]}")
    for name, tensor in (("q", q), (names[1], v)):
        if tensor.shape[-1] == 0:
            raise ArgumentError(f"{name}: expected a head_dim of at least 1, got 0")
    if tensors.sinks is not None:
        sinks = require_tensor("sinks", tensors.sinks)
        require_dtype("sinks", sinks, FLOAT_DTYPES)
        require_shape("sinks", sinks, (heads_q,))
        require_device("sinks", sinks, q.device)
        if heads_q > 1 and sinks.stride(0) != 1:
            raise ArgumentError(f"sinks: expected stride 1, got strides {sinks.stride()}")
    if tensors.out is not None:
        out = require_tensor("out", tensors.out)
        require_dtype("out", out, (q.dtype,))
        require_shape("out", out, (*q.shape[:-1], v.shape[-1]))
        require_device("out", out, q.device)
        if out.shape[-1] > 1 and out.stride(-1) != 1:
            raise ArgumentError(f"out: expected last stride 1, got strides {out.stride()}")
    if tensors.scheduler_metadata is not None:
        _check_metadata("scheduler_metadata", tensors.scheduler_metadata, batch, q.device)

    window_left, window_right = _window(options.causal, options.window_size)
    scale = q.shape[-1] ** -0.5 if options.softmax_scale is None else options.softmax_scale
    softcap = require_float("softcap", 0.0 if options.softcap is None else options.softcap)
    if softcap < 0:
        raise ArgumentValueError(f"softcap: expected 0 (off) or a positive number, got {softcap}")
    spec = AttnSpec(
        entry=options.entry,
        device=q.device,
        dtype=q.dtype,
        kv_dtype=k.dtype,
        num_heads_q=heads_q,
        num_heads_kv=heads_kv,
        head_dim=q.shape[-1],
        head_dim_v=v.shape[-1],
        query_layout=query_layout,
        key_layout=key_layout,
        page_size=k.shape[1] if key_layout == "paged" else 0,
        softmax_scale=require_float("softmax_scale", scale),
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        num_splits=max(0, _plain_int("num_splits", options.num_splits)),
        sm_margin=require_int("sm_margin", options.sm_margin, 0),
        features=options.features | _tensor_features(tensors),
        sinks_dtype=None if tensors.sinks is None else tensors.sinks.dtype,
        pack_gqa=_pack_gqa(options),
    )
    bounds = Bounds(batch, total_q, max_seqlen_q, max_seqlen_k, fixed_seqlen_k)
    return Problem(spec, bounds, tensors, require_bool("return_softmax_lse", options.return_lse))


def _key_names(entry: str) -> tuple[str, str]:
    return ("k_cache", "v_cache") if entry == "kvcache" else ("k", "v")


def _check_dtypes(q: torch.Tensor, keys: dict[str, torch.Tensor]) -> None:
    require_dtype("q", q, FLOAT_DTYPES)
    for name, tensor in keys.items():
        require_dtype(name, tensor, (q.dtype,))
        require_device(name, tensor, q.device)


def _max_seqlen_q(q: torch.Tensor, layout: QueryLayout, options: Options) -> int:
    if layout == "dense":
        if options.max_seqlen_q is not None:
            require_int("max_seqlen_q", options.max_seqlen_q, 0)
        return q.shape[1]
    if options.max_seqlen_q is None:
        error = ArgumentError if options.entry == "kvcache" else ArgumentValueError
        raise error("max_seqlen_q: expected an int together with cu_seqlens_q, got None")
    return min(require_int("max_seqlen_q", options.max_seqlen_q, 0), q.shape[0])


def _check_keys(
    tensors: Tensors, options: Options, batch: int, names: tuple[str, str]
) -> tuple[KeyLayout, int]:
    """The key layout, and the most keys that one sequence can have."""
    q, k, v = tensors.q, tensors.k, tensors.v
    layout: KeyLayout
    if tensors.page_table is not None:
        if tensors.cu_seqlens_k is not None:
            raise ArgumentError("cu_seqlens_k: expected None together with page_table")
        layout = "paged"
        require_rank(names[0], k, 4, "(pages, page_size, heads, head_dim) with page_table")
        table = require_tensor("page_table", tensors.page_table)
        require_rank("page_table", table, 2, "(batch, max_pages_per_sequence)")
        require_index("page_table", table, (batch, table.shape[1]), q.device)
        if k.shape[1] == 0:
            raise ArgumentError(f"{names[0]}: expected page_size of at least 1, got 0")
        if options.entry == "varlen" and tensors.seqused_k is None:
            raise ArgumentValueError(
                "seqused_k: expected the key lengths together with page_table, got None"
            )
        most = table.shape[1] * k.shape[1]
    elif tensors.cu_seqlens_k is not None:
        layout = "packed"
        require_rank(names[0], k, 3, "(total_k, heads, head_dim) with cu_seqlens_k")
        require_index("cu_seqlens_k", tensors.cu_seqlens_k, (batch + 1,), q.device)
        if options.max_seqlen_k is None:
            raise ArgumentValueError(
                "max_seqlen_k: expected an int together with cu_seqlens_k, got None"
            )
        most = min(require_int("max_seqlen_k", options.max_seqlen_k, 0), k.shape[0])
    else:
        layout = "dense"
        require_rank(names[0], k, 4, "(batch, seqlen_k, heads, head_dim)")
        if k.shape[0] != batch:
            raise ArgumentError(f"{names[0]}: expected batch {batch}, got {k.shape[0]}")
        most = k.shape[1]
    if layout != "packed" and options.max_seqlen_k is not None:
        require_int("max_seqlen_k", options.max_seqlen_k, 0)
    require_shape(names[1], v, (*k.shape[:-1], v.shape[-1]))
    if options.entry == "kvcache":
        for name, tensor in zip(names, (k, v), strict=True):
            if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
                raise LayoutError(f"{name}: expected last stride 1, got strides {tensor.stride()}")
    return layout, most


def _fixed_seqlen_k(
    tensors: Tensors, options: Options, layout: KeyLayout, max_seqlen_k: int
) -> int | None:
    if options.fixed_seqlen_k is not None:
        length = require_int("cache_seqlens", options.fixed_seqlen_k, 0)
        if length > max_seqlen_k:
            raise ArgumentError(
                f"cache_seqlens: expected at most {max_seqlen_k} (what "
                f"{'page_table' if layout == 'paged' else 'k_cache'} can hold), got {length}"
            )
        return length
    if tensors.seqused_k is not None or layout == "packed":
        return None
    return max_seqlen_k


def _window(causal: object, window: object) -> tuple[int, int]:
    """(left, right) with -1 for unbounded; causal is right == 0."""
    is_causal = require_bool("causal", causal)
    if not isinstance(window, tuple) or len(window) != 2:
        raise ArgumentTypeError(f"window_size: expected a pair (left, right), got {window!r}")
    left, right = (
        -1 if side is None or _plain_int("window_size", side) < 0 else int(side) for side in window
    )
    return left, 0 if is_causal else right


def _plain_int(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"{name}: expected an int, got {type(value).__name__}")
    return value


def _pack_gqa(options: Options) -> bool | None:
    return None if options.pack_gqa is None else require_bool("pack_gqa", options.pack_gqa)


def _check_metadata(name: str, value: object, batch: int, device: torch.device) -> None:
    """Type and place only: FA3's own metadata may be shorter, each backend checks its length."""
    tensor = require_tensor(name, value)
    require_dtype(name, tensor, (torch.int32,))
    require_device(name, tensor, device)
    require_rank(name, tensor, 1, f"(at most {metadata_entries(batch)} entries)")
    if not tensor.is_contiguous():
        raise ArgumentError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")


def _tensor_features(tensors: Tensors) -> frozenset[str]:
    present = {"sinks": tensors.sinks, "scheduler_metadata": tensors.scheduler_metadata}
    present |= {"seqused_q": tensors.seqused_q, "out": tensors.out}
    return frozenset(name for name, tensor in present.items() if tensor is not None)


@dataclass(frozen=True, slots=True)
class MetadataOptions:
    """The arguments of `get_scheduler_metadata` that are not tensors (hashable)."""

    batch_size: int
    max_seqlen_q: int
    max_seqlen_k: int
    num_heads_q: int
    num_heads_kv: int
    headdim: int
    headdim_v: int | None
    qkv_dtype: torch.dtype
    page_size: int | None
    causal: bool
    window_size: tuple[int | None, int | None]
    has_softcap: bool
    num_splits: int
    sm_margin: int
    features: frozenset[str]


def schedule(
    lengths: Lengths, out: torch.Tensor | None, options: MetadataOptions
) -> tuple[AttnSpec, Bounds]:
    """Validate the arguments of `get_scheduler_metadata`: what to schedule, and its bounds."""
    seqused_k = require_tensor("cache_seqlens", lengths.seqused_k)
    batch = require_int("batch_size", options.batch_size, 0)
    device = seqused_k.device
    require_index("cache_seqlens", seqused_k, (batch,), device)
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        if (prefix := getattr(lengths, name)) is not None:
            require_index(name, prefix, (batch + 1,), device)
    if lengths.seqused_q is not None:
        require_index("seqused_q", lengths.seqused_q, (batch,), device)
    if out is not None:
        _check_metadata("out", out, batch, device)
        require_shape("out", out, (metadata_entries(batch),))
    heads_q = require_int("num_heads_q", options.num_heads_q, 1)
    heads_kv = require_int("num_heads_kv", options.num_heads_kv, 1)
    if heads_q % heads_kv:
        raise ArgumentError(
            f"num_heads_q: expected a multiple of num_heads_kv, got {heads_q} and {heads_kv}"
        )
    if options.qkv_dtype not in FLOAT_DTYPES:
        raise ArgumentError(
            f"qkv_dtype: expected float16, bfloat16 or float32, got {options.qkv_dtype}"
        )
    head_dim = require_int("headdim", options.headdim, 1)
    left, right = _window(options.causal, options.window_size)
    max_q = require_int("max_seqlen_q", options.max_seqlen_q, 0)
    max_k = require_int("max_seqlen_k", options.max_seqlen_k, 0)
    spec = AttnSpec(
        entry="kvcache",
        device=device,
        dtype=options.qkv_dtype,
        kv_dtype=options.qkv_dtype,
        num_heads_q=heads_q,
        num_heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=head_dim
        if options.headdim_v is None
        else require_int("headdim_v", options.headdim_v, 1),
        query_layout="dense" if lengths.cu_seqlens_q is None else "packed",
        key_layout="paged" if options.page_size else "dense",
        page_size=options.page_size or 0,
        softmax_scale=1.0,
        window_left=left,
        window_right=right,
        softcap=1.0 if options.has_softcap else 0.0,
        num_splits=max(0, _plain_int("num_splits", options.num_splits)),
        sm_margin=require_int("sm_margin", options.sm_margin, 0),
        features=options.features,
        sinks_dtype=None,
        pack_gqa=None,
    )
    # Query tokens are not known here, and nothing of a tensor is addressed by them.
    return spec, Bounds(batch, 2**31 - 1, max_q, max_k, None)

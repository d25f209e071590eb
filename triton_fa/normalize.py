"""From the arguments of a public function to a `Problem`: all validation of caller input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

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
from triton_fa.problem import Append, BlockSparseTensors, Lengths, Problem, Tensors
from triton_fa.schedule.tiles import next_power_of_2
from triton_fa.spec import AttnSpec, Bounds, KeyLayout, QueryLayout, metadata_entries

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_BLOCK = 1 << 20
"""Queries or keys of a listed block: past it their products with counts could leave 32 bits."""
FP8_DTYPES = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)


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
    attention_chunk: int | None = 0
    rotary_interleaved: bool = True
    score_mod: Any = None
    mask_mod: Any = None


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
    require_dtype("q", q, (*FLOAT_DTYPES, *FP8_DTYPES))
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
    for name in ("cache_batch_idx", "cache_leftpad"):
        per_sequence = getattr(tensors, name)
        if per_sequence is not None:
            require_index(name, per_sequence, (batch,), q.device)
    rows = (k if tensors.page_table is None else tensors.page_table).shape[0]
    if tensors.cache_batch_idx is not None and batch and rows == 0:
        name = names[0] if tensors.page_table is None else "page_table"
        raise ArgumentError(f"cache_batch_idx: expected a row of {name} to name, got none")
    fixed_seqlen_k = _fixed_seqlen_k(tensors, options, key_layout, max_seqlen_k)
    total_new, max_seqlen_new, rotary_dim = 0, 0, 0
    if tensors.append is not None:
        if "only_qv" in options.features:
            raise ArgumentError("k: expected None together with only_qv, which reads no keys")
        bounds = Bounds(batch, total_q, max_seqlen_q, max_seqlen_k, fixed_seqlen_k)
        total_new, max_seqlen_new = _check_append(
            tensors, tensors.append, bounds, options.fixed_seqlen_k is not None
        )
        rotary_dim = _check_rotary(tensors, tensors.append, bounds)

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
    _check_second_part(tensors, options)
    _check_descales(tensors, batch, heads_kv)
    if tensors.out is not None:
        out = require_tensor("out", tensors.out)
        require_dtype("out", out, (torch.bfloat16 if q.dtype in FP8_DTYPES else q.dtype,))
        require_shape("out", out, (*q.shape[:-1], v.shape[-1]))
        require_device("out", out, q.device)
        if out.shape[-1] > 1 and out.stride(-1) != 1:
            raise ArgumentError(f"out: expected last stride 1, got strides {out.stride()}")
    if tensors.scheduler_metadata is not None:
        _check_metadata("scheduler_metadata", tensors.scheduler_metadata, batch, q.device)

    window_left, window_right = _window(options.causal, options.window_size)
    _check_mods(tensors, options)
    if tensors.blocks is not None:
        _check_blocks(tensors, options, batch, max_seqlen_q)
    scored = q.shape[-1]
    if tensors.qv is not None and "only_qv" not in options.features:
        scored += v.shape[-1]
    scale = scored**-0.5 if options.softmax_scale is None else options.softmax_scale
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
        features=options.features | _tensor_features(tensors) | _chunk_feature(options),
        sinks_dtype=None if tensors.sinks is None else tensors.sinks.dtype,
        pack_gqa=_pack_gqa(options),
        attention_chunk=_attention_chunk(options.attention_chunk),
        score_mod=options.score_mod,
        mask_mod=options.mask_mod,
        rotary_dim=rotary_dim,
        rotary_interleaved=require_bool("rotary_interleaved", options.rotary_interleaved),
        rotary_moving=_hides_keys(options, q, max_seqlen_k),
    )
    if tensors.qv is not None and query_layout == "packed":
        # Kernels are compiled for blocks of its rows: few sizes, not one for each number of tokens.
        assert options.max_seqlen_q is not None
        max_seqlen_q = min(options.max_seqlen_q, next_power_of_2(max_seqlen_q))
    bounds = Bounds(
        batch, total_q, max_seqlen_q, max_seqlen_k, fixed_seqlen_k, total_new, max_seqlen_new
    )
    return Problem(spec, bounds, tensors, require_bool("return_softmax_lse", options.return_lse))


def _key_names(entry: str) -> tuple[str, str]:
    return ("k_cache", "v_cache") if entry == "kvcache" else ("k", "v")


def _check_dtypes(q: torch.Tensor, keys: dict[str, torch.Tensor]) -> None:
    """Keys have q's dtype, or are all of one float8 dtype beside 16-bit queries."""
    first, *_ = keys.values()
    mixed = q.dtype in (torch.float16, torch.bfloat16) and first.dtype in FP8_DTYPES
    for name, tensor in keys.items():
        require_dtype(name, tensor, (first.dtype if mixed else q.dtype,))
        require_device(name, tensor, q.device)


def _check_second_part(tensors: Tensors, options: Options) -> None:
    """Validate qv."""
    only = "only_qv" in options.features
    if tensors.qv is None:
        if only:
            raise ArgumentValueError("qv: expected a tensor together with only_qv, got None")
        return
    q, qv = tensors.q, require_tensor("qv", tensors.qv)
    require_no_grad({"qv": qv})
    require_dtype("qv", qv, (q.dtype,))
    if q.dtype in FP8_DTYPES:
        raise ArgumentError(f"qv: expected float16, bfloat16 or float32, got {q.dtype}")
    require_device("qv", qv, q.device)
    require_shape("qv", qv, (*q.shape[:-1], tensors.v.shape[-1]))
    if qv.shape[-1] > 1 and qv.stride(-1) != 1:
        raise LayoutError(f"qv: expected last stride 1, got strides {qv.stride()}")


def _check_mods(tensors: Tensors, options: Options) -> None:
    """Validate score_mod, mask_mod and aux_tensors; where two could mean two things, neither."""
    for name in ("score_mod", "mask_mod"):
        value = getattr(options, name)
        if value is not None and not callable(value):
            raise ArgumentTypeError(f"{name}: expected a function, got {type(value).__name__}")
    if options.score_mod is not None and options.softcap:
        raise ArgumentError("score_mod: expected None together with softcap")
    if options.mask_mod is not None:
        masks = {
            "causal": options.causal,
            "window_size": _window(False, options.window_size) != (-1, -1),
            "attention_chunk": options.attention_chunk,
        }
        for name, given in masks.items():
            if given:
                raise ArgumentError(f"mask_mod: expected None together with {name}")
    if tensors.aux is None:
        return
    if options.score_mod is None and options.mask_mod is None:
        raise ArgumentError("aux_tensors: expected None without score_mod and mask_mod")
    for index, value in enumerate(tensors.aux):
        tensor = require_tensor(f"aux_tensors[{index}]", value)
        require_device(f"aux_tensors[{index}]", tensor, tensors.q.device)


def _check_blocks(tensors: Tensors, options: Options, batch: int, max_seqlen_q: int) -> None:
    """Validate block_sparse_tensors."""
    name, blocks = "block_sparse_tensors", tensors.blocks
    if not isinstance(blocks, BlockSparseTensors):
        raise ArgumentTypeError(f"{name}: expected BlockSparseTensors, got {type(blocks).__name__}")
    if options.mask_mod is None:
        raise ArgumentError(f"{name}: expected None without mask_mod")
    for field in ("cu_total_m_blocks", "cu_block_idx_offsets"):
        if getattr(blocks, field) is not None:
            raise ArgumentError(f"{name}.{field}: expected None (lists with a batch dimension)")
    sizes = blocks.block_size
    if not isinstance(sizes, tuple) or len(sizes) != 2:
        raise ArgumentTypeError(f"{name}.block_size: expected (queries, keys), got {sizes!r}")
    for size in sizes:
        if require_int(f"{name}.block_size", size, 16) % 16:
            raise ArgumentValueError(f"{name}.block_size: expected multiples of 16, got {sizes}")
        if size > LARGEST_BLOCK:
            raise ArgumentValueError(
                f"{name}.block_size: expected at most {LARGEST_BLOCK}, got {sizes}"
            )
    if (blocks.full_block_cnt is None) is not (blocks.full_block_idx is None):
        raise ArgumentError(f"{name}: expected full_block_cnt and full_block_idx, or neither")
    heads_q, heads_kv = tensors.q.shape[-2], tensors.k.shape[-2]
    heads = {1} if heads_q > heads_kv else {1, heads_q}  # a tile holds the heads of a group
    counts = require_tensor(f"{name}.mask_block_cnt", blocks.mask_block_cnt)
    require_rank(f"{name}.mask_block_cnt", counts, 3, "(batch, heads, query blocks)")
    if counts.shape[0] not in (1, batch) or counts.shape[1] not in heads:
        raise ArgumentError(
            f"{name}.mask_block_cnt: expected batch 1 or {batch} and heads "
            f"{' or '.join(map(str, sorted(heads)))}, got shape {tuple(counts.shape)}"
        )
    if counts.shape[2] * sizes[0] < max_seqlen_q:
        raise ArgumentError(
            f"{name}.mask_block_cnt: expected query blocks of {sizes[0]} for max_seqlen_q="
            f"{max_seqlen_q}, got {counts.shape[2]}"
        )
    for field in ("mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx"):
        value, shape = getattr(blocks, field), tuple(counts.shape)
        if value is None and field.startswith("full"):
            continue
        tensor = require_tensor(f"{name}.{field}", value)
        if field.endswith("idx"):
            require_rank(f"{name}.{field}", tensor, 4, "(batch, heads, query blocks, entries)")
            shape = (*shape, max(1, tensor.shape[3]))
        require_index(f"{name}.{field}", tensor, shape, tensors.q.device)
        if not tensor.is_contiguous():
            raise LayoutError(f"{name}.{field}: expected contiguous, got {tensor.stride()}")


def _check_descales(tensors: Tensors, batch: int, heads_kv: int) -> None:
    for name in ("q_descale", "k_descale", "v_descale"):
        if (value := getattr(tensors, name)) is not None:
            tensor = require_tensor(name, value)
            require_dtype(name, tensor, (torch.float32,))
            require_shape(name, tensor, (batch, heads_kv))
            require_device(name, tensor, tensors.q.device)


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
        rows = batch if tensors.cache_batch_idx is None else table.shape[0]
        require_index("page_table", table, (rows, table.shape[1]), q.device)
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
        if k.shape[0] != batch and tensors.cache_batch_idx is None:
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


def _check_append(
    tensors: Tensors, append: Append, bounds: Bounds, has_length: bool
) -> tuple[int, int]:
    """Validate new keys and values: how many there are, and at most in one sequence."""
    q, cache, v_cache, batch = tensors.q, tensors.k, tensors.v, bounds.batch
    given = {name: value for name, value in append._asdict().items() if value is not None}
    if "k" not in given and "v" not in given:
        name = next(name for name in given if name.startswith("rotary"))
        raise ArgumentError(f"{name}: expected None without k (new keys), got a tensor")
    for name, other in (("k", "v"), ("v", "k")):
        if name not in given:
            raise ArgumentError(f"{name}: expected a tensor together with {other}, got None")
    k, v = require_tensor("k", append.k), require_tensor("v", append.v)
    if tensors.seqused_k is None and not has_length:
        raise ArgumentError("cache_seqlens: expected key lengths together with k, got None")
    require_no_grad({"k": k, "v": v})
    for name, tensor in (("k", k), ("v", v)):
        require_dtype(name, tensor, (cache.dtype,))
        require_device(name, tensor, q.device)
    heads = cache.shape[-2]
    if append.cu_seqlens_k_new is None:
        require_rank("k", k, 4, "(batch, seqlen_new, heads, head_dim) without cu_seqlens_k_new")
        require_shape("k", k, (batch, k.shape[1], heads, cache.shape[-1]))
        total, most = batch * k.shape[1], k.shape[1]
    else:
        require_rank("k", k, 3, "(total_new, heads, head_dim) with cu_seqlens_k_new")
        require_shape("k", k, (k.shape[0], heads, cache.shape[-1]))
        prefix = require_tensor("cu_seqlens_k_new", append.cu_seqlens_k_new)
        require_index("cu_seqlens_k_new", prefix, (batch + 1,), q.device)
        total = most = k.shape[0]
    require_shape("v", v, (*k.shape[:-1], v_cache.shape[-1]))
    for name, tensor in (("k", k), ("v", v)):
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise LayoutError(f"{name}: expected last stride 1, got strides {tensor.stride()}")
    if bounds.max_seqlen_q > bounds.max_seqlen_k:
        raise ArgumentError(
            f"k: expected a cache of at least max_seqlen_q={bounds.max_seqlen_q} keys, "
            f"got {bounds.max_seqlen_k}"
        )
    fixed = None if append.cu_seqlens_k_new is not None else bounds.fixed_seqlen_k
    if fixed is not None and fixed + most > bounds.max_seqlen_k:
        raise ArgumentError(
            f"cache_seqlens: expected at most {bounds.max_seqlen_k - most} (what the cache can "
            f"hold beside {most} new keys), got {fixed}"
        )
    return total, most


def _check_rotary(tensors: Tensors, append: Append, bounds: Bounds) -> int:
    """Validate the rotation: how many leading dims it turns, 0 without one."""
    cos, sin = append.rotary_cos, append.rotary_sin
    if cos is None and sin is None:
        if append.rotary_seqlens is not None:
            raise ArgumentError("rotary_seqlens: expected None without rotary_cos")
        return 0
    for name, value, other in (("rotary_cos", cos, "sin"), ("rotary_sin", sin, "cos")):
        if value is None:
            raise ArgumentError(f"{name}: expected a tensor together with rotary_{other}, got None")
    q = tensors.q
    if append.k.dtype in FP8_DTYPES:
        raise ArgumentError(f"rotary_cos: expected None together with k of {append.k.dtype}")
    cos, sin = require_tensor("rotary_cos", cos), require_tensor("rotary_sin", sin)
    require_no_grad({"rotary_cos": cos, "rotary_sin": sin})
    for name, tensor in (("rotary_cos", cos), ("rotary_sin", sin)):
        require_dtype(name, tensor, (q.dtype,))
        require_device(name, tensor, q.device)
    require_rank("rotary_cos", cos, 2, "(positions, rotary_dim / 2)")
    dim = 2 * cos.shape[1]
    if dim % 16 or not 0 < dim <= q.shape[-1]:
        raise ArgumentError(
            f"rotary_cos: expected a rotary_dim (twice its last size) that is a multiple of 16 "
            f"up to {q.shape[-1]}, got {dim}"
        )
    least = max(1, bounds.max_seqlen_k if tensors.page_table is not None else 1)
    if cos.shape[0] < least:
        raise ArgumentError(
            f"rotary_cos: expected at least {least} positions, as many as the cache has, "
            f"got {cos.shape[0]}"
        )
    require_shape("rotary_sin", sin, tuple(cos.shape))
    for name, tensor in (("rotary_cos", cos), ("rotary_sin", sin)):
        if not tensor.is_contiguous():
            raise LayoutError(f"{name}: expected a contiguous tensor, got {tensor.stride()}")
    if append.rotary_seqlens is not None:
        require_index("rotary_seqlens", append.rotary_seqlens, (bounds.batch,), q.device)
    return dim


def _hides_keys(options: Options, q: torch.Tensor, max_seqlen_k: int) -> bool:
    """Whether FA3 calls this causal or local, and so turns query i by its own position.

    By the bounds as they are given, which may be more than q can hold.
    """
    left, right = _window(options.causal, options.window_size)
    stated = options.max_seqlen_q if q.dim() == 3 else q.shape[1]
    hidden = 0 <= left < max_seqlen_k - 1 or 0 <= right < (stated or 0) - 1
    return hidden or right == 0 or bool(options.attention_chunk)


def _attention_chunk(value: object) -> int:
    return 0 if value is None else require_int("attention_chunk", value, 0)


def _chunk_feature(options: Options) -> frozenset[str]:
    return frozenset(["attention_chunk"] if options.attention_chunk else [])


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
    present |= {
        "cache_batch_idx": tensors.cache_batch_idx,
        "cache_leftpad": tensors.cache_leftpad,
        "qv": tensors.qv,
        "q_descale": tensors.q_descale,
        "k_descale": tensors.k_descale,
        "v_descale": tensors.v_descale,
    }
    if tensors.append is not None:
        present |= {
            "k": tensors.append.k,
            "rotary_cos": tensors.append.rotary_cos,
            "rotary_seqlens": tensors.append.rotary_seqlens,
        }
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
    attention_chunk: int | None = 0
    max_seqlen_k_new: int = 0


def schedule(
    lengths: Lengths, out: torch.Tensor | None, options: MetadataOptions
) -> tuple[AttnSpec, Bounds]:
    """Validate the arguments of `get_scheduler_metadata`: what to schedule, and its bounds."""
    seqused_k = require_tensor("cache_seqlens", lengths.seqused_k)
    batch = require_int("batch_size", options.batch_size, 0)
    device = seqused_k.device
    require_index("cache_seqlens", seqused_k, (batch,), device)
    for name in ("cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_new"):
        if (prefix := getattr(lengths, name)) is not None:
            require_index(name, prefix, (batch + 1,), device)
    for name in ("seqused_q", "cache_leftpad"):
        if (per_sequence := getattr(lengths, name)) is not None:
            require_index(name, per_sequence, (batch,), device)
    if out is not None:
        _check_metadata("out", out, batch, device)
        require_shape("out", out, (metadata_entries(batch),))
    heads_q = require_int("num_heads_q", options.num_heads_q, 1)
    heads_kv = require_int("num_heads_kv", options.num_heads_kv, 1)
    if heads_q % heads_kv:
        raise ArgumentError(
            f"num_heads_q: expected a multiple of num_heads_kv, got {heads_q} and {heads_kv}"
        )
    if options.qkv_dtype not in (*FLOAT_DTYPES, *FP8_DTYPES):
        raise ArgumentError(
            f"qkv_dtype: expected float16, bfloat16, float32 or a float8 dtype, "
            f"got {options.qkv_dtype}"
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
        attention_chunk=_attention_chunk(options.attention_chunk),
    )
    new = require_int("max_seqlen_k_new", options.max_seqlen_k_new, 0)
    # Tokens are not known here, and nothing of a tensor is addressed by them.
    total = 2**31 - 1
    return spec, Bounds(batch, total, max_q, max_k, None, total if new else 0, new)

"""Tensors of a case: values from its seed, poison wherever the call must not read."""

import math
from typing import TYPE_CHECKING, Any

import torch

from parity_tests import model_case

if TYPE_CHECKING:
    from parity_tests.cases import Case

Tensor = torch.Tensor

# What an engine may leave in table entries it does not use: padding, stale ids, anything.
GARBAGE_PAGES = (-1, 2**31 - 1, -(2**31), 2**30, -7)


def make(case: "Case", device: str, poison: bool) -> dict[str, Any]:
    """See `Case.materialise`."""
    fill = math.nan if poison else 0.0
    q_rows, keys, values = _values(case, device)
    numbers = torch.Generator().manual_seed(case.seed)  # page ids and the like: same on any device

    arguments: dict[str, Any] = _queries(case, q_rows, fill, device)
    if case.kv_layout == "paged":
        arguments |= _paged(case, keys, values, fill, numbers, device)
    elif case.kv_layout == "packed":
        arguments |= _packed(case, keys, values, fill, device)
    else:
        arguments |= _batched(case, keys, values, fill, device)
    arguments |= _scalars(case)
    if case.sinks:
        dtype = torch.float32 if case.dtype == "float32" else torch.bfloat16
        arguments["sinks"] = torch.randn(case.heads_q, generator=numbers).to(device, dtype)
    if case.out:
        lead = arguments["q"].shape[:-2]
        arguments["out"] = _strided(
            (*lead, case.heads_q, case.head_dim_v), case.q_strided, math.nan, case, device
        )
    return arguments


def _dtype(case: "Case") -> torch.dtype:
    dtype = getattr(torch, case.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _values(case: "Case", device: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """What the call may read: per sequence q, k and v, (tokens, heads, dim) each."""
    if case.source == "llama":
        return model_case.llama_qkv(case, device)
    generator = torch.Generator(device).manual_seed(case.seed)

    def draw(tokens: tuple[int, ...], heads: int, dim: int) -> list[Tensor]:
        shape = (sum(tokens), heads, dim)
        flat = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return list(flat.to(_dtype(case)).split(list(tokens)))

    q = draw(case.seqlens_q, case.heads_q, case.head_dim)
    if case.softcap > 0:  # large enough that the cap bends the scores, as FlashAttention's tests do
        q = [rows * (case.softcap / 4) for rows in q]
    k = draw(case.seqlens_k, case.heads_kv, case.head_dim)
    return q, k, draw(case.seqlens_k, case.heads_kv, case.head_dim_v)


def _strided(shape: tuple[int, ...], odd: bool, fill: float, case: "Case", device: str) -> Tensor:
    """A filled tensor; with `odd` a slice of a larger one, so that no dimension is contiguous."""
    if not odd:
        return torch.full(shape, fill, dtype=_dtype(case), device=device)
    *lead, heads, dim = shape
    wide = torch.full((*lead, heads + 1, dim + 8), fill, dtype=_dtype(case), device=device)
    return wide[..., 1:, :dim]


def _queries(case: "Case", rows: list[Tensor], fill: float, device: str) -> dict[str, Any]:
    allotted = [n + case.pad_q for n in case.seqlens_q]
    bound = max(allotted) + case.max_q_slack
    arguments: dict[str, Any] = {}
    shape: tuple[int, ...]
    if case.q_layout == "batched":
        shape = (case.batch, max(allotted), case.heads_q, case.head_dim)
        q = _strided(shape, case.q_strided, fill, case, device)
        for b, values in enumerate(rows):
            q[b, : len(values)] = values
        if case.entry == "varlen":
            arguments |= {"cu_seqlens_q": None, "max_seqlen_q": max(allotted)}
    else:
        cu = _prefix_sum(allotted)
        shape = (cu[-1] + case.tail_q, case.heads_q, case.head_dim)
        q = _strided(shape, case.q_strided, fill, case, device)
        for first, values in zip(cu, rows, strict=False):
            q[first : first + len(values)] = values
        arguments |= {"cu_seqlens_q": _int32(cu, device), "max_seqlen_q": bound}
    if case.pad_q > 0:
        arguments["seqused_q"] = _int32(list(case.seqlens_q), device)
    return {"q": q, **arguments}


def _kv_buffers(
    lead: tuple[int, ...], case: "Case", fill: float, device: str
) -> tuple[Tensor, Tensor]:
    """k (*lead, heads_kv, head_dim) and v, laid out in memory as engines lay them out."""
    heads, d, dv = case.heads_kv, case.head_dim, case.head_dim_v

    def full(*shape: int) -> Tensor:
        return torch.full(shape, fill, dtype=_dtype(case), device=device)

    if case.kv_strides == "split":  # vLLM: (blocks, heads, page, k and v side by side)
        pages, page_size = lead
        both = full(pages, heads, page_size, d + dv).transpose(1, 2)
        return both[..., :d], both[..., d:]
    if case.kv_strides == "fused":  # one row holds k and v of a head: v is a view at an offset
        both = full(*lead, heads, d + dv)
        return both[..., :d], both[..., d:]
    if case.kv_strides == "sliced":  # as cut from a packed qkv projection, heads k then heads v
        both = full(*lead, 2 * heads + 1, max(d, dv))
        return both[..., 1 : heads + 1, :d], both[..., heads + 1 :, :dv]
    return full(*lead, heads, d), full(*lead, heads, dv)


def _paged(
    case: "Case",
    keys: list[Tensor],
    values: list[Tensor],
    fill: float,
    numbers: torch.Generator,
    device: str,
) -> dict[str, Any]:
    size = case.page_size
    needed = [-(-n // size) for n in case.seqlens_k]
    num_pages = sum(needed) + case.spare_pages
    order = torch.randperm(num_pages, generator=numbers).tolist()
    width = max(1, max(needed) + case.table_slack + -(-case.pad_k // size))

    clean = fill == 0.0
    picks = torch.randint(0, len(GARBAGE_PAGES), (case.batch, width), generator=numbers)
    table = torch.zeros(case.batch, width, dtype=torch.int32)
    if not clean:
        table = torch.tensor(GARBAGE_PAGES, dtype=torch.int32)[picks]

    k_cache, v_cache = _kv_buffers((max(1, num_pages), size), case, fill, device)
    taken = 0
    for b, seqlen_k in enumerate(case.seqlens_k):
        pages = order[taken : taken + needed[b]]
        taken += needed[b]
        shared = min(seqlen_k, case.seqlens_k[0]) // size if case.shared_prefix and b else 0
        pages[:shared] = table[0, :shared].tolist()
        table[b, : needed[b]] = torch.tensor(pages, dtype=torch.int32)
        token = torch.arange(shared * size, seqlen_k)
        page, slot = table[b].long()[token // size].to(device), (token % size).to(device)
        k_cache[page, slot] = keys[b][shared * size :]
        v_cache[page, slot] = values[b][shared * size :]

    lengths = _int32(list(case.seqlens_k), device)
    arguments: dict[str, Any] = {"page_table": table.to(device)}
    if case.entry == "varlen":
        bound = max(case.seqlens_k) + case.max_q_slack
        more = {"cu_seqlens_k": None, "max_seqlen_k": bound, "seqused_k": lengths}
        return {"k": k_cache, "v": v_cache, **arguments, **more}
    arguments["cache_seqlens"] = case.seqlens_k[0] if case.lengths == "int" else lengths
    return {"k_cache": k_cache, "v_cache": v_cache, **arguments}


def _packed(
    case: "Case", keys: list[Tensor], values: list[Tensor], fill: float, device: str
) -> dict[str, Any]:
    allotted = [n + case.pad_k for n in case.seqlens_k]
    cu = _prefix_sum(allotted)
    k, v = _kv_buffers((cu[-1],), case, fill, device)
    for b, first in enumerate(cu[:-1]):
        k[first : first + len(keys[b])] = keys[b]
        v[first : first + len(values[b])] = values[b]
    bound = max(allotted) + case.max_q_slack
    arguments = {"k": k, "v": v, "cu_seqlens_k": _int32(cu, device), "max_seqlen_k": bound}
    if case.pad_k > 0:
        arguments["seqused_k"] = _int32(list(case.seqlens_k), device)
    return arguments


def _batched(
    case: "Case", keys: list[Tensor], values: list[Tensor], fill: float, device: str
) -> dict[str, Any]:
    seqlen = max(case.seqlens_k) + case.pad_k
    k, v = _kv_buffers((case.batch, seqlen), case, fill, device)
    for b, seqlen_k in enumerate(case.seqlens_k):
        k[b, :seqlen_k] = keys[b]
        v[b, :seqlen_k] = values[b]
    ragged = any(n != seqlen for n in case.seqlens_k)
    lengths = _int32(list(case.seqlens_k), device)
    if case.entry == "kvcache":
        ways: dict[str, Tensor | int | None] = {
            "tensor": lengths,
            "int": case.seqlens_k[0],
            "none": None,
        }
        given = ways[case.lengths]
        return {"k_cache": k, "v_cache": v, "cache_seqlens": given}
    arguments: dict[str, Any] = {"k": k, "v": v}
    if case.entry == "varlen":
        arguments |= {"cu_seqlens_k": None, "max_seqlen_k": seqlen}
        if ragged:
            arguments["seqused_k"] = lengths
    return arguments


def _scalars(case: "Case") -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "causal": case.causal,
        "window_size": case.window,
        "softcap": case.softcap,
    }
    if case.softmax_scale is not None:
        arguments["softmax_scale"] = case.softmax_scale
    if case.num_splits is not None:
        arguments["num_splits"] = case.num_splits
    if case.lse:
        arguments["return_softmax_lse"] = True
    return arguments


def _prefix_sum(lengths: list[int]) -> list[int]:
    total = [0]
    for n in lengths:
        total.append(total[-1] + n)
    return total


def _int32(values: list[int], device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)

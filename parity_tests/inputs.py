"""Tensors of a case: values from its seed, poison wherever the call must not read."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from parity_tests import model_case
from parity_tests.layouts import bits, int32, kv_buffers, named_dtype, prefix_sum, strided

if TYPE_CHECKING:
    from parity_tests.cases import Case

Tensor = torch.Tensor

# What an engine may leave in table entries it does not use: padding, stale ids, anything.
GARBAGE_PAGES = (-1, 2**31 - 1, -(2**31), 2**30, -7)


def make(case: "Case", device: str, poison: bool) -> dict[str, Any]:
    """See `Case.materialise`."""
    fill = math.nan if poison else 0.0
    values = _values(case, device)
    numbers = torch.Generator().manual_seed(case.seed)  # page ids and the like: same on any device

    arguments: dict[str, Any] = _queries(case, values, fill, device)
    if case.kv_layout == "paged":
        arguments |= _paged(case, values, fill, numbers, device)
    elif case.kv_layout == "packed":
        arguments |= _packed(case, values, fill, device)
    else:
        arguments |= _batched(case, values, fill, numbers, device)
    if case.append:
        arguments |= _append(case, values, fill, device)
    if case.rotary_dim > 0:
        arguments |= _rotary(case, fill, numbers, device)
    arguments |= _scalars(case)
    arguments |= _descales(case, device)
    if case.only_qv:
        arguments |= _without_keys(case, arguments, fill)
    if case.sinks:
        dtype = torch.float32 if case.dtype == "float32" else torch.bfloat16
        arguments["sinks"] = torch.randn(case.heads_q, generator=numbers).to(device, dtype)
    if case.out:
        arguments["out"] = strided(
            (*_lead(case), case.heads_q, case.head_dim_v),
            case.q_strided,
            math.nan,
            case.out_dtype,
            device,
        )
    return arguments


class _Values(NamedTuple):
    """What the call may read: per sequence (tokens, heads, dim) each."""

    q: list[Tensor]
    k: list[Tensor]  # in the cache, left padding included
    v: list[Tensor]
    new_k: list[Tensor]
    new_v: list[Tensor]
    qv: list[Tensor]


def _values(case: "Case", device: str) -> _Values:
    if case.source == "llama":
        return _Values(*model_case.llama_qkv(case, device), [], [], [])
    generator = torch.Generator(device).manual_seed(case.seed)

    def draw(tokens: tuple[int, ...], heads: int, dim: int, dtype: str) -> list[Tensor]:
        shape = (sum(tokens), heads, dim)
        flat = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return list(flat.to(named_dtype(dtype)).split(list(tokens)))

    def queries(dim: int) -> list[Tensor]:
        rows = draw(case.seqlens_q, case.heads_q, dim, case.dtype)
        if case.softcap > 0:  # large enough that the cap bends scores, as FlashAttention's tests do
            size = case.softcap / 4
            rows = [(each.to(named_dtype(case.out_dtype)) * size).to(each.dtype) for each in rows]
        return rows

    q = queries(case.head_dim)
    lengths = (case.seqlens_k, case.new)
    k, v, new_k, new_v = (
        draw(tokens, case.heads_kv, dim, case.of_keys)
        for tokens in lengths
        for dim in (case.head_dim, case.head_dim_v)
    )
    return _Values(q, k, v, new_k, new_v, queries(case.head_dim_v) if case.qv else [])


def _lead(case: "Case") -> tuple[int, ...]:
    """Leading sizes of q, of qv and of the result."""
    allotted = [n + case.pad_q for n in case.seqlens_q]
    if case.q_layout == "batched":
        return (case.batch, max(allotted))
    return (sum(allotted) + case.tail_q,)


def _queries(case: "Case", values: _Values, fill: float, device: str) -> dict[str, Any]:
    allotted = [n + case.pad_q for n in case.seqlens_q]
    bound = max(allotted) + case.max_q_slack
    cu = prefix_sum(allotted)
    arguments: dict[str, Any] = {}
    parts = {"q": values.q} | ({"qv": values.qv} if case.qv else {})
    for name, each in parts.items():
        shape = (*_lead(case), case.heads_q, each[0].shape[-1])
        tensor = strided(shape, case.q_strided, fill, case.dtype, device)
        for b, rows in enumerate(each):
            if case.q_layout == "batched":
                tensor[b, : len(rows)] = rows
            else:
                tensor[cu[b] : cu[b] + len(rows)] = rows
        arguments[name] = tensor
    if case.q_layout == "packed":
        arguments |= {"cu_seqlens_q": int32(cu, device), "max_seqlen_q": bound}
    elif case.entry == "varlen":
        arguments |= {"cu_seqlens_q": None, "max_seqlen_q": max(allotted)}
    if case.pad_q > 0:
        arguments["seqused_q"] = int32(list(case.seqlens_q), device)
    return arguments


def _descales(case: "Case", device: str) -> dict[str, Any]:
    """Factors from a generator of their own: other values do not depend on whether there are any.

    "expanded" is one number for all, as engines pass the scale of a layer.
    """
    numbers = torch.Generator().manual_seed(case.seed + 1)
    shape = (case.batch, case.heads_kv)
    arguments: dict[str, Any] = {}
    for letter in case.descales:
        factors = 0.5 + torch.rand(shape, generator=numbers)
        if case.descale_strides == "expanded":
            arguments[f"{letter}_descale"] = factors[:1, :1].to(device).expand(shape)
        elif case.descale_strides == "transposed":
            arguments[f"{letter}_descale"] = factors.to(device).t().contiguous().t()
        else:
            arguments[f"{letter}_descale"] = factors.to(device)
    return arguments


def _without_keys(case: "Case", arguments: dict[str, Any], fill: float) -> dict[str, Any]:
    """only_qv, and q and k as what is not read: None, or all of them poison."""
    names = ("q", "k_cache" if case.entry == "kvcache" else "k")
    if case.only_qv == "bare":
        return {"only_qv": True, **dict.fromkeys(names)}
    for name in names:
        arguments[name].fill_(fill)
    return {"only_qv": True}


def _rows(case: "Case", numbers: torch.Generator) -> list[int]:
    """Which row of the cache, or of the table, each sequence uses."""
    if not case.batch_idx:
        return list(range(case.batch))
    return torch.randperm(case.batch + case.spare_rows, generator=numbers)[: case.batch].tolist()


def _paged(
    case: "Case", values: _Values, fill: float, numbers: torch.Generator, device: str
) -> dict[str, Any]:
    size = case.page_size
    firsts = [min(case.leftpads[b] if case.leftpad else 0, n) for b, n in enumerate(case.seqlens_k)]
    columns = [
        range(first // size, -(-end // size) if end > first else 0)
        for first, end in zip(firsts, case.ends, strict=True)
    ]
    num_pages = sum(map(len, columns)) + case.spare_pages
    order = torch.randperm(num_pages, generator=numbers).tolist()

    shape = (case.batch + case.spare_rows, case.capacity // size)
    picks = torch.randint(0, len(GARBAGE_PAGES), shape, generator=numbers)
    table = torch.zeros(shape, dtype=torch.int32)
    if fill != 0.0:
        table = torch.tensor(GARBAGE_PAGES, dtype=torch.int32)[picks]
    rows = _rows(case, numbers)

    k_cache, v_cache = kv_buffers((max(1, num_pages), size), case, fill, device)
    taken = 0
    for b, seqlen_k in enumerate(case.seqlens_k):
        pages = order[taken : taken + len(columns[b])]
        taken += len(columns[b])
        shared = min(seqlen_k, case.seqlens_k[0]) // size if case.shared_prefix and b else 0
        pages[:shared] = table[rows[0], :shared].tolist()
        table[rows[b], list(columns[b])] = torch.tensor(pages, dtype=torch.int32)
        first = max(firsts[b], shared * size)
        token = torch.arange(first, seqlen_k)
        page, slot = table[rows[b]].long()[token // size].to(device), (token % size).to(device)
        bits(k_cache)[page, slot] = bits(values.k[b][first:])
        bits(v_cache)[page, slot] = bits(values.v[b][first:])

    arguments: dict[str, Any] = {"page_table": table.to(device)}
    if case.entry == "varlen":
        bound = max(case.seqlens_k) + case.max_q_slack
        lengths = int32(list(case.seqlens_k), device)
        more = {"cu_seqlens_k": None, "max_seqlen_k": bound, "seqused_k": lengths}
        return {"k": k_cache, "v": v_cache, **arguments, **more}
    return {"k_cache": k_cache, "v_cache": v_cache, **arguments, **_cached(case, rows, device)}


def _cached(case: "Case", rows: list[int], device: str) -> dict[str, Any]:
    """Where the keys of each sequence are in a cache, and how many."""
    ways: dict[str, Tensor | int | None] = {
        "tensor": int32(list(case.seqlens_k), device),
        "int": case.seqlens_k[0],
        "none": None,
    }
    arguments: dict[str, Any] = {"cache_seqlens": ways[case.lengths]}
    if case.batch_idx:
        arguments["cache_batch_idx"] = int32(rows, device)
    if case.leftpad:
        arguments["cache_leftpad"] = int32(list(case.leftpads), device)
    return arguments


def _packed(case: "Case", values: _Values, fill: float, device: str) -> dict[str, Any]:
    allotted = [n + case.pad_k for n in case.seqlens_k]
    cu = prefix_sum(allotted)
    k, v = kv_buffers((cu[-1],), case, fill, device)
    for b, first in enumerate(cu[:-1]):
        k[first : first + len(values.k[b])] = values.k[b]
        v[first : first + len(values.v[b])] = values.v[b]
    bound = max(allotted) + case.max_q_slack
    arguments = {"k": k, "v": v, "cu_seqlens_k": int32(cu, device), "max_seqlen_k": bound}
    if case.pad_k > 0:
        arguments["seqused_k"] = int32(list(case.seqlens_k), device)
    return arguments


def _batched(
    case: "Case", values: _Values, fill: float, numbers: torch.Generator, device: str
) -> dict[str, Any]:
    k, v = kv_buffers((case.batch + case.spare_rows, case.capacity), case, fill, device)
    rows = _rows(case, numbers)
    for b, seqlen_k in enumerate(case.seqlens_k):
        used = slice(case.leftpads[b] if case.leftpad else 0, seqlen_k)
        k[rows[b], used] = values.k[b][used]
        v[rows[b], used] = values.v[b][used]
    if case.entry == "kvcache":
        return {"k_cache": k, "v_cache": v, **_cached(case, rows, device)}
    arguments: dict[str, Any] = {"k": k, "v": v}
    if case.entry == "varlen":
        arguments |= {"cu_seqlens_k": None, "max_seqlen_k": case.capacity}
        if any(n != case.capacity for n in case.seqlens_k):
            arguments["seqused_k"] = int32(list(case.seqlens_k), device)
    return arguments


def _append(case: "Case", values: _Values, fill: float, device: str) -> dict[str, Any]:
    """New keys and values, strided like the queries: both come from the same projection."""
    cu = prefix_sum(list(case.seqlens_new))
    lead: tuple[int, ...] = (case.batch, case.seqlens_new[0])
    arguments: dict[str, Any] = {}
    if case.append == "packed":
        lead = (cu[-1] + case.tail_new,)
        arguments["cu_seqlens_k_new"] = int32(cu, device)
    for name, new in (("k", values.new_k), ("v", values.new_v)):
        shape = (*lead, case.heads_kv, new[0].shape[-1])
        arguments[name] = strided(shape, case.q_strided, fill, case.of_keys, device)
        if case.append == "packed":
            arguments[name][: cu[-1]] = torch.cat(new)
        else:
            arguments[name][:] = torch.stack(new)
    return arguments


def _rotary(case: "Case", fill: float, numbers: torch.Generator, device: str) -> dict[str, Any]:
    """A random angle for each position and pair of dims: a neighbour's are as wrong as any."""
    spans = zip(case.rotary_starts, case.new, case.seqlens_q, strict=True)
    used = {p + i for p, new, seqlen_q in spans for i in range(max(new, seqlen_q))}
    rows = case.rotary_rows or max(1, case.capacity, case.rotary_end)
    angles = 2 * math.pi * torch.rand(rows, case.rotary_dim // 2, generator=numbers)
    unused = torch.ones(rows, dtype=torch.bool)
    unused[[min(position, rows - 1) for position in used]] = False
    tables = [
        each.masked_fill(unused[:, None], fill).to(device, named_dtype(case.dtype))
        for each in (angles.cos(), angles.sin())
    ]
    arguments: dict[str, Any] = {
        "rotary_cos": tables[0],
        "rotary_sin": tables[1],
        "rotary_interleaved": case.rotary_interleaved,
    }
    if case.rotary_seqlens:
        arguments["rotary_seqlens"] = int32(list(case.rotary_seqlens), device)
    return arguments


def _scalars(case: "Case") -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "causal": case.causal,
        "window_size": case.window,
        "softcap": case.softcap,
    }
    if case.attention_chunk > 0:
        arguments["attention_chunk"] = case.attention_chunk
    if case.softmax_scale is not None:
        arguments["softmax_scale"] = case.softmax_scale
    if case.num_splits is not None:
        arguments["num_splits"] = case.num_splits
    if case.lse:
        arguments["return_softmax_lse"] = True
    return arguments

"""Small calls that reach every kernel of the package, and every branch of it that Hopper has.

Most are cases of the harness, some with what those do not have: functions, lists of blocks,
`batch_invariant`. `tests/test_sanitize.py` plans them all and says what none of them reaches.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl

import triton_fa
from parity_tests import named
from parity_tests.cases import Case
from triton_fa import api, env

Fields = dict[str, Any]
ALWAYS, NEVER = "1", "0"  # values of TRITON_FA_HOPPER


@dataclass(frozen=True)
class Call:
    """Something to run, on a device."""

    name: str
    make: Callable[[str], object]
    hopper: str = ""

    def run(self, device: str) -> None:
        """What it allocates stays as it comes, for initcheck to see."""
        with hopper(self.hopper), triton_fa.strict():
            self.make(device)


@contextlib.contextmanager
def hopper(value: str) -> Iterator[None]:
    """TRITON_FA_HOPPER as given; no launch is left over from another value."""
    with mock.patch.dict(os.environ, TRITON_FA_HOPPER=value):
        env.settings.cache_clear()
        api._RECORDS.clear()
        yield
    env.settings.cache_clear()
    api._RECORDS.clear()


def attend(case: Case, device: str, **options: Any) -> Any:
    """A case of the harness in Triton, with further arguments."""
    arguments = case.materialise(device) | options
    return getattr(triton_fa, case.function)(**arguments, ver="triton")


def of(case: Case, hopper: str = "", **options: Any) -> Call:
    return Call(case.name, lambda device: attend(case, device, **options), hopper)


# ---------------------------------------------------------------- cases of the harness

NAMED = (
    "llama3-8b decode, page 16",
    "llama3-8b decode, page 1",
    "llama3-8b decode, dense cache",
    "qwen3-32b decode, q_len 4",
    "gpt-oss mixed batch, sinks",
    "zero lengths, paged",
    "llama3-8b prefill, varlen",
    "llama3-8b prefill fp32",
    "llama3-8b chunked prefill, append and rotary",
    "llama3-8b decode fp16, append, vLLM cache",
    "llama3-8b decode, append and rotary, dense cache",
    "gpt-j decode, interleaved rotary of 64 dims",
    "append with positions of its own, not causal",
    "uneven append, some of nothing",
    "gemma2-9b prefill, softcap and window",
    "mqa cross attention, two-sided window",
    "all of a cache at once",
    "left-padded batch, decode",
    "left-padded batch, prefill",
    "table rows in another order, append",
    "llama4 decode, attention_chunk",
    "llama4 chunked prefill, attention_chunk",
    "deepseek MLA decode, 16 heads, 1 to 4 tokens",
    "deepseek MLA decode, 16 heads, values alone",
    "deepseek MLA decode, 16 heads, float8 cache",
    "llama3-8b decode, float8",
    "llama3-8b decode, float8, append, factors of each head",
    "llama3-8b decode, float8 cache",
    "llama3-8b chunked prefill, float8 cache",
    "gpt-oss decode fp16, float8_e5m2 cache, sinks and window",
    "head dim 72, mixed batch",
    "head dim 96, mixed batch",
    "head dim 160, mixed batch",
    "head dim 192 with v 128, decode",
)
"""In the size they have for Triton's interpreter."""
SHORT: tuple[tuple[str, Fields], ...] = (
    ("llama3-8b, many short sequences, varlen", {"heads_q": 8}),
    ("gpt-oss, many short sequences, sinks and window", {"heads_q": 16}),
)
"""All of their sequences, with fewer heads: fewer sequences are another kernel's."""


# ---------------------------------------------------------------- prefill

# With more than 96 tokens they are for the Hopper kernel, with 300 its pipeline wraps around.
PREFILL = Case(
    name="prefill",
    entry="varlen",
    heads_q=4,
    heads_kv=2,
    head_dim=128,
    head_dim_v=128,
    q_layout="packed",
    kv_layout="packed",
    page_size=0,
    causal=True,
    seqlens_q=(300, 1, 130),
    seqlens_k=(300, 40, 513),
    num_splits=1,
)
CACHED: Fields = {"entry": "kvcache", "kv_layout": "paged", "num_splits": 0, "spare_pages": 3}
CACHED |= {"pad_k": 2, "table_slack": 1}
DENSE: Fields = {"entry": "dense", "q_layout": "batched", "kv_layout": "batched", "causal": False}
DENSE |= {"seqlens_q": (300, 300), "seqlens_k": (300, 300), "out": True, "lse": False}
FLOAT8: Fields = {"dtype": "float8_e4m3fn", "descales": "qkv", "descale_strides": "expanded"}
FACTORS: Fields = {**FLOAT8, "descale_strides": "plain"}  # of each sequence and head
ROWS: Fields = {"entry": "kvcache", "kv_layout": "batched", "num_splits": 0, "pad_k": 2}
PADDED: Fields = {**ROWS, "q_layout": "batched", "leftpad": True, "seqlens_q": (130,) * 3}
PADDED |= {"seqlens_k": (300,) * 3, "leftpads": (0, 290, 100)}
GROWN: Fields = {
    **ROWS,
    "append": "packed",
    "seqlens_new": (300, 1, 130),
    "seqlens_k": (20, 9, 513),
}
GROWN |= {"batch_idx": True, "spare_rows": 2, "leftpad": True, "leftpads": (7, 0, 100)}
EQUAL: Fields = {
    **ROWS,
    "q_layout": "batched",
    "lengths": "int",
    "seqlens_q": (130,) * 2,
    "lse": False,
}
EQUAL |= {"seqlens_k": (300,) * 2, "append": "batched", "seqlens_new": (130,) * 2}


def prefill(name: str, dims: tuple[int, int] = (128, 128), **fields: Any) -> Case:
    dim, dim_v = dims
    return PREFILL.with_changes(
        **{"name": f"prefill, {name}", "head_dim": dim, "head_dim_v": dim_v} | fields
    )


BOTH = (
    prefill("packed"),
    prefill("packed, decodes among it", num_splits=0),
    prefill("page 16", **CACHED, page_size=16),
    prefill("page 128, sinks", **CACHED, page_size=128, sinks=True),
    prefill("dense, head dim 64", (64, 64), **DENSE),
    prefill("two-sided window", causal=False, window=(100, 20)),
    prefill("attention_chunk", attention_chunk=100),
    prefill("left padding", **PADDED),
    prefill("append, left padding, rows in another order", **GROWN),
    prefill("ragged queries, keys of one length", **ROWS, lengths="int", seqlens_k=(300,) * 3),
    prefill("unused tokens, softcap", pad_q=7, pad_k=9, softcap=20.0),
    prefill("head dim 80", (80, 80)),
    prefill("head dim 96", (96, 96)),
    prefill("head dim 160", (160, 160)),
    prefill("head dim 192 with v 128", (192, 128), heads_q=2),
    prefill("head dim 192", (192, 192), heads_q=2),
    prefill("head dim 256", (256, 256), heads_q=2, softcap=20.0),
    prefill("float8", **FLOAT8),
    prefill("float8, head dim 64, page 16", (64, 64), **CACHED, **FLOAT8, page_size=16),
    prefill("float8, append, left padding, rows in another order", **GROWN, **FACTORS),
    prefill("float8, append, one length", **EQUAL, **FLOAT8),
    prefill("float8, unused tokens, window", **FLOAT8, pad_q=7, causal=False, window=(100, 20)),
    prefill("float8, attention_chunk", **FLOAT8, attention_chunk=100),
    prefill("float8, head dim 192 with v 128", (192, 128), heads_q=2, **FLOAT8),
    prefill("float8, head dim 256", (256, 256), heads_q=2, **FLOAT8),
)
"""For the Hopper kernel and for the portable one."""


def short(name: str, lengths: tuple[int, ...] = (34, 60, 0, 7, 50), **fields: Any) -> Case:
    """Enough sequences for every multiprocessor, of up to 64 tokens."""
    given = {"seqlens_q": lengths * 54, "seqlens_k": lengths * 54} | fields
    return prefill(f"short sequences, {name}", (64, 64), **given)


# ---------------------------------------------------------------- functions and lists of blocks


@triton.jit
def earlier(batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):
    """Query i sees keys up to i, wherever the sequence of keys ends."""
    return kv_idx <= q_idx


@triton.jit
def biased(score, batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):
    """A number for each key, of 1024 at most."""
    return score + tl.load(aux[0] + tl.minimum(tl.maximum(kv_idx, 0), 1023))


def bias(device: str) -> tuple[torch.Tensor]:
    return (torch.randn(1024, device=device),)


def earlier_blocks(
    device: str, size: int = 128, shape: tuple[int, int] = (1, 1)
) -> triton_fa.BlockSparseTensors:
    """The lists of `earlier` for up to 512 queries and keys; `shape` is (batch, heads)."""
    count = 512 // size
    order = torch.arange(count, device=device, dtype=torch.int32)
    masked = torch.ones_like(order), order[:, None]
    full = order, order.expand(count, count)
    lists = [t.expand(*shape, *t.shape).contiguous() for t in (*masked, *full)]
    return triton_fa.BlockSparseTensors(*lists, block_size=(size, size))


def mods(device: str) -> Fields:
    return {"score_mod": biased, "mask_mod": earlier, "aux_tensors": bias(device)}


def blocks(device: str, *shape: Any) -> Fields:
    return {"mask_mod": earlier, "block_sparse_tensors": earlier_blocks(device, *shape)}


UNMASKED: Fields = {"causal": False, "softcap": 0.0}
MODIFIED: tuple[tuple[Case, Callable[[str], Fields]], ...] = (
    (prefill("functions", **UNMASKED), mods),
    (prefill("functions, page 16", **UNMASKED, **CACHED, page_size=16), mods),
    (prefill("lists of blocks", **UNMASKED), blocks),
    (prefill("lists of blocks, head dim 64", (64, 64), **UNMASKED), blocks),
    (
        prefill("lists of blocks of each sequence and head", **UNMASKED, heads_q=2),
        lambda device: blocks(device, 128, (3, 2)),
    ),
    (
        prefill("functions and lists of blocks, head dim 256", (256, 256), **UNMASKED),
        lambda device: mods(device) | blocks(device),
    ),
)
DECODE = Case(
    name="decode",
    heads_q=8,
    heads_kv=2,
    head_dim=128,
    head_dim_v=128,
    causal=True,
    seqlens_q=(1,) * 5,
    seqlens_k=(5, 17, 700, 300, 64),
    spare_pages=3,
    table_slack=2,
    pad_k=2,
)


def modified(case: Case, more: Callable[[str], Fields], hopper: str = "") -> Call:
    return Call(case.name, lambda device: attend(case, device, **more(device)), hopper)


# ---------------------------------------------------------------- decode


def decode(name: str, **fields: Any) -> Case:
    return DECODE.with_changes(**{"name": f"decode, {name}"} | fields)


MIXED: Fields = {
    "q_layout": "packed",
    "seqlens_q": (1, 4, 16, 2, 130),
    "seqlens_k": (300, 17, 700, 2, 300),
}
DENSE_CACHE: Fields = {"kv_layout": "batched", "page_size": 0, "spare_pages": 0, "table_slack": 0}
PACKED_KEYS: Fields = {"entry": "varlen", "kv_layout": "packed", "num_splits": 0}
MLA = decode("MLA").with_changes(
    heads_q=32,
    heads_kv=1,
    head_dim=64,
    head_dim_v=512,
    qv=True,
    kv_strides="latent",
    page_size=64,
    q_layout="packed",
    seqlens_q=(1, 2, 3, 4),
    seqlens_k=(300, 64, 500, 4),
)
LATENT: tuple[tuple[Case, Fields], ...] = (
    (MLA, {}),
    (MLA.with_changes(name="decode, MLA, page 16", page_size=16), {}),
    (MLA.with_changes(name="decode, MLA, values alone", only_qv="bare", lse=False), {}),
    (MLA.with_changes(name="decode, MLA, num_splits", num_splits=3), {}),
    (
        MLA.with_changes(
            name="decode, MLA, dense cache, append, rows in another order",
            **DENSE_CACHE | {"lengths": "int", "append": "batched", "seqlens_new": (2,) * 3},
            q_layout="batched",
            seqlens_q=(2,) * 3,
            seqlens_k=(300,) * 3,
            batch_idx=True,
            spare_rows=2,
        ),
        {},
    ),
    (
        MLA.with_changes(
            name="decode, MLA, append of unequal lengths",
            append="packed",
            seqlens_new=(1, 2, 3, 4),
        ),
        {},
    ),
    (
        MLA.with_changes(
            name="decode, MLA, packed keys, unused tokens",
            **DENSE_CACHE | PACKED_KEYS,
            pad_q=1,
        ),
        {},
    ),
    # 80 blocks of rows, of which 132 programs are no multiple.
    (
        MLA.with_changes(
            name="decode, MLA, 5120 rows", heads_q=128, seqlens_q=(40, 3), seqlens_k=(100, 64)
        ),
        {},
    ),
    (MLA.with_changes(name="decode, MLA, batch-invariant"), {"batch_invariant": True}),
)


# ---------------------------------------------------------------- what is no case


class Cached:
    """One new token for each of some sequences over a paged cache, all of one set of tensors."""

    def __init__(self, device: str) -> None:
        self.given = DECODE.materialise(device) | {"ver": "triton", "return_softmax_lse": True}

    def attend(self, **options: Any) -> Any:
        return triton_fa.flash_attn_with_kvcache(**self.given | options)

    def metadata(self, out: torch.Tensor | None = None) -> torch.Tensor:
        return triton_fa.get_scheduler_metadata(
            DECODE.batch,
            1,
            DECODE.capacity,
            DECODE.heads_q,
            DECODE.heads_kv,
            DECODE.head_dim,
            self.given["cache_seqlens"],
            page_size=DECODE.page_size,
            causal=True,
            ver="triton",
            out=out,
        )


def again(device: str) -> None:
    """Calls that are found by their launch record, the last with another buffer."""
    cached = Cached(device)
    for out in (None, None, torch.empty_like(cached.given["q"])):
        cached.attend(out=out)


def planned(device: str) -> None:
    """Metadata that several layers use, refilled for the next step."""
    cached = Cached(device)
    metadata = cached.metadata()
    for _ in range(2):
        cached.attend(scheduler_metadata=metadata)
        cached.attend(scheduler_metadata=metadata)
        cached.given["cache_seqlens"] -= 1
        cached.metadata(metadata)


def planned_prefill(device: str) -> None:
    """Ragged prompts, in the order that the metadata says."""
    case = PREFILL.with_changes(**CACHED, page_size=16)
    given = case.materialise(device)
    metadata = triton_fa.get_scheduler_metadata(
        case.batch,
        given["max_seqlen_q"],
        case.capacity,
        case.heads_q,
        case.heads_kv,
        case.head_dim,
        given["cache_seqlens"],
        cu_seqlens_q=given["cu_seqlens_q"],
        page_size=case.page_size,
        causal=True,
        ver="triton",
    )
    for _ in range(2):
        triton_fa.flash_attn_with_kvcache(**given, scheduler_metadata=metadata, ver="triton")


def captured(device: str) -> None:
    """A step with its metadata, replayed from a CUDA graph with other lengths."""
    if device == "cpu":  # where nothing can be captured
        planned(device)
        return
    with caching(True):  # memory of a graph is its own
        cached = Cached(device)
        metadata = cached.metadata()
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            cached.metadata(metadata)
            cached.attend(scheduler_metadata=metadata)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            cached.metadata(metadata)
            cached.attend(scheduler_metadata=metadata)
        for _ in range(3):
            graph.replay()
            cached.given["cache_seqlens"] -= 1
        torch.cuda.synchronize()


@contextlib.contextmanager
def caching(wanted: bool) -> Iterator[None]:
    """Whether PyTorch cuts tensors out of larger allocations of its own."""
    torch.cuda.caching_allocator_enable(wanted)
    yield
    torch.cuda.caching_allocator_enable(not wanted)


def crowd(device: str, batch: int = 1100, most: int = 40) -> None:
    """More sequences than are looked through at once, most of them decodes, over a dense cache."""
    lengths = torch.ones(batch, dtype=torch.int32)
    lengths[::50] = most
    cu_seqlens_q = torch.zeros(batch + 1, dtype=torch.int32)
    cu_seqlens_q[1:] = lengths.cumsum(0)
    total = int(cu_seqlens_q[-1])
    keys = torch.randn(2, batch, 2 * most, 1, 64, device=device, dtype=torch.bfloat16)
    triton_fa.flash_attn_with_kvcache(
        torch.randn(total, 4, 64, device=device, dtype=torch.bfloat16),
        keys[0],
        keys[1],
        cache_seqlens=(lengths + 30).to(device),
        cu_seqlens_q=cu_seqlens_q.to(device),
        max_seqlen_q=most,
        causal=True,
        ver="triton",
    )


def combine(
    device: str, splits: int, shape: tuple[int, ...], dim: int, dtype: torch.dtype = torch.float32
) -> None:
    """Partial results of a caller; of one row in three a part is empty and NaN."""
    parts = torch.randn(splits, *shape, dim, device=device)
    sums = torch.randn(splits, *shape, device=device)
    sums[0, ..., ::3] = -torch.inf
    parts[0, ..., ::3, :] = torch.nan
    triton_fa.flash_attn_combine(parts, sums, out_dtype=dtype)


def merge(device: str, dim: int, dtype: torch.dtype, in_place: bool) -> None:
    """Two results; their log-sum-exps are transposed as the functions return them."""
    a, b = torch.randn(2, 37, 3, dim, device=device, dtype=dtype)
    s_a, s_b = torch.randn(2, 3, 37, device=device).transpose(1, 2)
    s_a[0], s_b[:2] = -torch.inf, -torch.inf
    given = (a, s_a, b, s_b)
    triton_fa.merge_state(*given, *((a, s_a) if in_place else ()))


# ---------------------------------------------------------------- the set

_SMALL = {case.name: case for case in named.small()}
_FULL = {case.name: case for case in named.full()}


def _portable(case: Case) -> Case:
    return case.with_changes(name=f"{case.name}, portable")


CALLS = (
    *(of(_SMALL[name]) for name in NAMED),
    *(of(_FULL[name].with_changes(**fields)) for name, fields in SHORT),
    of(short("negative softmax_scale", softcap=20.0, lse=False), softmax_scale=-0.1),
    of(short("dense", **DENSE | dict.fromkeys(("seqlens_q", "seqlens_k"), (40,) * 270))),
    of(short("unused tokens", pad_q=2, pad_k=3, causal=False, window=(8, 4))),
    of(short("attention_chunk", attention_chunk=16)),
    *(of(case, ALWAYS) for case in BOTH),
    *(of(_portable(case), NEVER) for case in BOTH),
    # Two programs take all tiles, from a counter that is set to 0 before.
    of(prefill("few programs", num_splits=0), sm_margin=130),
    of(prefill("few programs, float8", **FLOAT8), sm_margin=130),
    of(prefill("negative softmax_scale", (64, 64)), softmax_scale=-0.1),
    of(prefill("float32, page 16", **CACHED, page_size=16, dtype="float32")),
    of(prefill("batch-invariant", **CACHED, page_size=16), ALWAYS, batch_invariant=True),
    of(prefill("batch-invariant, portable", **CACHED, page_size=16), NEVER, batch_invariant=True),
    of(
        prefill(
            "1040 tokens, append and rotary",
            (64, 64),
            **CACHED | {"page_size": 64, "heads_q": 2, "heads_kv": 1, "rotary_dim": 64},
            seqlens_q=(1040,),
            seqlens_k=(0,),
            append="batched",
            seqlens_new=(1040,),
        )
    ),
    *(modified(case, more, ALWAYS) for case, more in MODIFIED),
    *(modified(_portable(case), more, NEVER) for case, more in MODIFIED),
    modified(prefill("lists of small blocks", **UNMASKED), lambda device: blocks(device, 32)),
    modified(decode("functions", **UNMASKED), mods),
    of(decode("num_splits"), num_splits=4),
    of(decode("softcap, no lse", softcap=20.0, lse=False), softmax_scale=-0.1),
    of(decode("float32", dtype="float32", sinks=True)),
    of(decode("128 heads of one key head", heads_q=128, heads_kv=1)),
    of(decode("values wider than keys", head_dim=64)),
    of(decode("batch-invariant", **MIXED), batch_invariant=True),
    of(decode("batch-invariant, unequal lengths"), batch_invariant=True),
    of(
        decode(
            "300 sequences",
            heads_q=4,
            seqlens_q=(1,) * 300,
            seqlens_k=(20, 1, 7) * 100,
            **DENSE_CACHE,
        )
    ),
    of(decode("100 key heads", heads_q=100, heads_kv=100, head_dim=64, head_dim_v=64)),
    of(
        decode(
            "packed keys, unused tokens, a window to the right",
            **DENSE_CACHE | PACKED_KEYS,
            q_layout="packed",
            seqlens_q=(4, 1, 2, 4, 0),
            pad_q=2,
            causal=False,
            window=(-1, 1),
        )
    ),
    *(of(case, ALWAYS, **options) for case, options in LATENT),
    *(of(_portable(case), NEVER, **options) for case, options in LATENT),
    Call("the same call again", again),
    Call("metadata, used again", planned),
    Call("metadata of a prefill", planned_prefill),
    Call("a CUDA graph, replayed", captured),
    Call("1100 sequences", crowd),
    Call("combine, 3 splits", lambda device: combine(device, 3, (2, 5, 3), 96)),
    Call("combine, 100 splits", lambda device: combine(device, 100, (7, 3), 320, torch.float16)),
    Call("combine, many rows", lambda device: combine(device, 2, (1100, 4), 256)),
    Call("merge_state", lambda device: merge(device, 96, torch.bfloat16, False)),
    Call("merge_state in place", lambda device: merge(device, 128, torch.float32, True)),
)

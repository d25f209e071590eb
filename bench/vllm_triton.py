"""vLLM's Triton attention as a peer: its own source files, which are fetched and never kept here.

``python -m bench.fetch_vllm`` takes them out of vLLM's wheel. They import small parts of vLLM,
which stand-ins replace while they load; so a benchmark needs neither vLLM nor a network.
"""

import importlib
import logging
import sys
from collections.abc import Callable
from enum import IntEnum
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from bench.inputs import Inputs
from bench.workloads import Workload
from triton_fa import BackendUnavailableError, UnsupportedError

LABEL = "vllm-triton"
CAPTURED = "vllm-triton-captured"
VERSION = "0.33.0"
OPS = "vllm/v1/attention/ops"
FILES = (
    f"{OPS}/triton_unified_attention.py",
    f"{OPS}/triton_attention_helpers.py",
    f"{OPS}/triton_decode_attention.py",
    f"vllm-{VERSION}.dist-info/licenses/LICENSE",
)
FOLDER = Path(__file__).resolve().parents[1] / ".bench-peers" / f"vllm-{VERSION}"
FETCH = "python -m bench.fetch_vllm"

# How vLLM's TRITON_ATTN backend launches it, on all but compute capability 12.0: a split kernel of
# 16 segments where the grid would stay below 128 programs, rounded to a batch that it captures.
SEGMENTS = 16
LEAST_GRID = 128
CAPTURED_BATCHES: tuple[int, ...] = (1, 2, 4, *range(8, 257, 8))
LONGEST_SPLIT_QUERY = 8

# How its TRITON_MLA backend launches the kernels of absorbed MLA: as many splits as the longest
# sequence has 512 keys, a power of two, and no more than two for each multiprocessor. In a captured
# graph the longest sequence is the longest that the model allows: for DeepSeek-V3 163 840 keys.
SPLIT_KEYS = 512
SPLITS_PER_MULTIPROCESSOR = 2
MODEL_KEYS = 163_840


class KVQuantMode(IntEnum):
    """vLLM's modes that the kernel names; benchmarks use the first."""

    NONE = 0
    INT8_PER_TOKEN_HEAD = 2
    FP8_PER_TOKEN_HEAD = 3
    INT4_PER_TOKEN_HEAD = 4


def is_family(capability: int) -> bool:
    """vLLM's is_device_capability_family: 100 is any 10.x."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] * 10 == capability


def stand_ins() -> dict[str, ModuleType]:
    """What the files import of vLLM, as modules that hold no more than that."""
    logger = SimpleNamespace(debug_once=logging.getLogger(__name__).debug)
    platform = SimpleNamespace(
        fp8_dtype=lambda: torch.float8_e4m3fn,
        is_device_capability_family=is_family,
        is_rocm=lambda: torch.version.hip is not None,
    )
    triton = importlib.import_module("triton")
    contents: dict[str, dict[str, Any]] = {
        "vllm": {"__path__": [str(FOLDER / "vllm")]},
        "vllm.envs": {"VLLM_BATCH_INVARIANT": False},
        "vllm.logger": {"init_logger": lambda name: logger},
        "vllm.platforms": {"current_platform": platform},
        "vllm.triton_utils": {"triton": triton, "tl": triton.language},
        "vllm.v1.kv_cache_interface": {"KVQuantMode": KVQuantMode},
    }
    modules = {}
    for name, content in contents.items():
        modules[name] = ModuleType(name)
        vars(modules[name]).update(content)
    return modules


def missing() -> list[str]:
    """The files that were not fetched."""
    return [name for name in FILES if not (FOLDER / name).is_file()]


@cache
def load(name: str) -> ModuleType:
    """A module of vLLM's kernels; afterwards no module is called vllm again."""
    if absent := missing():
        raise BackendUnavailableError(
            LABEL, f"{absent[0]} of vLLM {VERSION} is not here, `{FETCH}` fetches it"
        )
    with mock.patch.dict(sys.modules, stand_ins()):
        return importlib.import_module(f"{OPS.replace('/', '.')}.{name}")


def refusals(row: Workload) -> list[str]:
    """What vLLM does not offer with the row's kernel, or not as the row asks."""
    reasons = {
        "keys that are not paged": row.page_size is None,
        "page sizes that are no multiple of 16": bool(row.page_size and row.page_size % 16),
        "attention that is not causal": not row.causal,
        "returning the lse": row.return_lse,
    }
    if row.latent:
        reasons |= {
            "windows": row.window != (-1, -1),
            "softcap": row.softcap > 0,
            "sinks": row.sinks,
            "queries of several lengths": len({*row.q_lens}) > 1,
        }
    else:
        reasons |= {
            "windows that look ahead": row.window[1] > 0,
            "a head_dim_v other than head_dim": row.head_dim_v != row.heads.dim,
        }
    return [reason for reason, applies in reasons.items() if applies]


def split_threshold(heads_kv: int) -> int:
    """Largest batch that the split kernel is used for."""
    wanted = LEAST_GRID // heads_kv
    return min(CAPTURED_BATCHES, key=lambda batch: abs(batch - wanted))


def bind_attention(inputs: Inputs) -> Callable[[Inputs], torch.Tensor]:
    """The call of a workload like `inputs`; its scratch is shared by all layers, as in vLLM.

    Raises:
        BackendUnavailableError: the files were not fetched.
        UnsupportedError: the row asks for what the kernel does not do.
    """
    row = inputs.row
    if reasons := refusals(row):
        raise UnsupportedError(LABEL, reasons)
    if row.latent:
        return bind_latent(inputs, longest=max(row.k_lens))
    unified_attention = load("triton_unified_attention").unified_attention
    threshold = split_threshold(row.heads.kv)
    tokens = threshold * min(row.bound_q, LONGEST_SPLIT_QUERY)
    shape = (tokens, row.heads.q, SEGMENTS)
    padded = 1 << (row.heads.dim - 1).bit_length()
    segments, most, sums = (
        torch.empty(s, dtype=torch.float32, device=inputs.q.device)
        for s in ((*shape, padded), shape, shape)
    )

    def call(x: Inputs) -> torch.Tensor:
        assert x.page_table is not None
        out = torch.empty_like(x.q)
        unified_attention(
            q=x.q,
            k=x.k,
            v=x.v,
            out=out,
            cu_seqlens_q=x.cu_seqlens_q,
            max_seqlen_q=row.bound_q,
            seqused_k=x.seqused_k,
            max_seqlen_k=x.page_table.shape[1] * x.k.shape[1],
            softmax_scale=row.heads.dim**-0.5,
            causal=True,
            window_size=(row.window[0], 0) if row.window[0] >= 0 else (-1, -1),
            block_table=x.page_table,
            softcap=row.softcap,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            seq_threshold_3D=threshold,
            num_par_softmax_segments=SEGMENTS,
            softmax_segm_output=segments,
            softmax_segm_max=most,
            softmax_segm_expsum=sums,
            sinks=x.sinks,
        )
        return out

    return call


def latent_splits(longest: int, multiprocessors: int) -> int:
    """Into how many parts every sequence is split, whatever its own length."""
    wanted = 1 << (max(1, longest // SPLIT_KEYS) - 1).bit_length()
    return min(wanted, multiprocessors * SPLITS_PER_MULTIPROCESSOR)


def multiprocessors(device: torch.device) -> int:
    """Those of a GPU; the CPU counts as one."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def whole_cache(x: Inputs) -> torch.Tensor:
    """[pages, page_size, 1, 576]: the cache that keys and values are views of, the latent first."""
    assert x.v.shape[2] == 1
    assert x.k.stride() == x.v.stride()
    assert x.k.data_ptr() == x.v.data_ptr() + x.v.shape[-1] * x.v.element_size()
    return x.v.as_strided((*x.v.shape[:-1], x.v.shape[-1] + x.k.shape[-1]), x.v.stride())


def bind_captured(inputs: Inputs) -> Callable[[Inputs], torch.Tensor]:
    """Absorbed MLA as a captured graph of vLLM holds it.

    Raises:
        BackendUnavailableError: the files were not fetched.
        UnsupportedError: the row asks for what the kernel does not do, or for another kernel.
    """
    reasons = refusals(inputs.row)
    if not inputs.row.latent:
        reasons.append(f"rows that score no values, which {LABEL} launches alike in graphs")
    if reasons:
        raise UnsupportedError(CAPTURED, reasons)
    return bind_latent(inputs, longest=MODEL_KEYS)


def bind_latent(inputs: Inputs, longest: int) -> Callable[[Inputs], torch.Tensor]:
    """Absorbed MLA, split for a longest sequence of so many keys; all layers share the scratch.

    A call is vLLM's two kernels. What its backend does before them in every layer is done once,
    here: joining both parts of the queries, clearing outputs, and a page table and a length for
    each of several queries, which the kernels take as sequences of their own.
    """
    row, device = inputs.row, inputs.q.device
    decode_attention = load("triton_decode_attention").decode_attention_fwd
    splits = latent_splits(longest, multiprocessors(device))
    q = torch.cat([inputs.options["qv"], inputs.q], dim=-1)
    assert inputs.page_table is not None
    table = inputs.page_table.repeat_interleave(row.q_lens[0], dim=0)
    after = torch.arange(1 - row.q_lens[0], 1, dtype=torch.int32, device=device)
    lens = (inputs.seqused_k[:, None] + after).flatten().clamp(min=0)
    shape = (len(q), row.heads.q, splits, row.head_dim_v + 1)
    parts = torch.empty(shape, dtype=torch.float32, device=device)
    one = torch.ones((), dtype=torch.float32, device=device)

    def call(x: Inputs) -> torch.Tensor:
        assert x.q is inputs.q
        cache = whole_cache(x)
        out = torch.empty_like(x.options["qv"])
        decode_attention(
            q,
            cache,
            cache[..., : row.head_dim_v],
            out,
            torch.empty(q.shape[:2], dtype=q.dtype, device=device),  # the lse
            table,
            lens,
            parts,
            splits,
            q.shape[-1] ** -0.5,
            cache.shape[1],
            k_scale=one,
            v_scale=one,
            is_mla=True,
        )
        return out

    return call

"""FlashAttention-4 (CuTe DSL): loading it, and calling it by keyword.

Differences in spelling: an unbounded side of a window is None there, a sink is `learnable_sink`.
`sm_margin` has no counterpart and is ignored. `out` is filled by a copy, since the public functions
take no buffer; the copy includes rows beyond `seqused_q`. Its kernels read all of a sequence's
last page: unused slots there must hold finite numbers. score_mod and mask_mod are CuTe functions.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from triton_fa import device as device_facts
from triton_fa.backends.base import Run, allocate, fixed_lengths, without_work
from triton_fa.errors import BackendUnavailableError
from triton_fa.problem import AttnResult, Problem, Tensors
from triton_fa.spec import AttnSpec

SUPPORTED_FEATURES = frozenset(
    {"sinks", "seqused_q", "out", "score_mod", "mask_mod", "aux_tensors", "block_sparse_tensors"}
)
BLACKWELL_FEATURES = frozenset({"qv", "only_qv", "q_descale", "k_descale", "v_descale"})
NOISY_LOGGERS = ("CUTE_DSL", "cutlass", "flash_attn", "quack")
_logger = logging.getLogger("triton_fa")


@dataclass(frozen=True, slots=True)
class Functions:
    """The two public functions of FlashAttention-4."""

    dense: Callable[..., Any]
    varlen: Callable[..., Any]


class FA4Backend:
    """FlashAttention-4, on NVIDIA GPUs from compute capability 8.0."""

    ver: int | str = 4

    def unavailable(self, device: torch.device) -> str | None:
        """Why FA4 cannot run on `device`; tries to import it, which takes seconds."""
        reason = _device_reason(device)
        if reason is not None:
            return reason
        functions = load()
        return functions if isinstance(functions, str) else None

    def detail(self) -> str:
        """The package and its version."""
        try:
            return f"flash-attn-4 {importlib.metadata.version('flash-attn-4')}"
        except importlib.metadata.PackageNotFoundError:
            return "flash_attn.cute"

    def unsupported(self, spec: AttnSpec) -> list[str]:
        """What FA4 does not do on this device."""
        major = device_facts.facts(spec.device).arch[0]
        reasons = [
            f"{name} on compute capability {major}.x"
            if name in BLACKWELL_FEATURES and major not in (10, 11)
            else f"{name} is not supported"
            for name in sorted(spec.features - SUPPORTED_FEATURES)
        ]
        dtype, kv_dtype = (str(x).removeprefix("torch.") for x in (spec.dtype, spec.kv_dtype))
        if spec.dtype not in (torch.float16, torch.bfloat16):
            reasons.append(f"q: dtype {dtype}: expected float16 or bfloat16")
        if kv_dtype != dtype:
            name = "k_cache" if spec.entry == "kvcache" else "k"
            reasons.append(f"{name}: dtype {kv_dtype}: expected that of q, {dtype}")
        reasons += _dim_reasons(spec, major)
        if spec.key_layout == "paged":
            reasons += _paging_reasons(spec, major)
        if major not in (10, 11) and spec.num_splits > 1:
            reasons.append(
                f"num_splits={spec.num_splits}: expected 0 or 1 on compute capability {major}.x"
            )
        if "sinks" in spec.features and major in (8, 12):
            reasons.append(f"sinks on compute capability {major}.x")
        return reasons + _mod_reasons(spec, major)

    def prepare(self, problem: Problem) -> Run:
        """Put together the arguments that no tensor of the call changes."""
        functions = load()
        if isinstance(functions, str):
            raise BackendUnavailableError(4, functions)
        if without_work(problem):
            bare = problem.without_tensors()
            return lambda tensors: allocate(bare, tensors)
        fixed = _fixed_arguments(problem)
        if _is_plain(problem):
            return lambda tensors: _call(functions.dense, fixed, tensors, {})
        bounds = problem.bounds
        fixed |= {"max_seqlen_q": bounds.max_seqlen_q, "max_seqlen_k": bounds.max_seqlen_k}
        lengths = _same_lengths(problem)

        def run(tensors: Tensors) -> AttnResult:
            where = {
                "cu_seqlens_q": tensors.cu_seqlens_q,
                "cu_seqlens_k": tensors.cu_seqlens_k,
                "seqused_q": tensors.seqused_q,
                "seqused_k": lengths() if tensors.seqused_k is None else tensors.seqused_k,
                "page_table": tensors.page_table,
            }
            return _call(functions.varlen, fixed, tensors, where)

        return run


def _device_reason(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"FlashAttention-4 needs a CUDA device, got {device.type!r}"
    facts = device_facts.facts(device)
    if facts.kind != "cuda":
        return "FlashAttention-4 needs an NVIDIA GPU"
    if not 8 <= facts.arch[0] <= 12:
        major, minor = facts.arch
        return f"FlashAttention-4 needs compute capability 8.x to 12.x, got {major}.{minor}"
    return None


@functools.cache
def load() -> Functions | str:
    """FA4's functions, or the text of the error that importing them gave."""
    try:
        with _quiet():
            module = importlib.import_module("flash_attn.cute.interface")
        return Functions(module.flash_attn_func, module.flash_attn_varlen_func)
    except Exception as error:  # noqa: BLE001  # a broken binary raises anything
        text = f"flash_attn.cute: {type(error).__name__}: {error}"
        _logger.warning("no FlashAttention-4 from %s", text)
        return text


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what an import logs and warns about to itself."""
    loggers = [logging.getLogger(name) for name in NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _dim_reasons(spec: AttnSpec, major: int) -> list[str]:
    d, dv = spec.head_dim, spec.head_dim_v
    if d % 8 or dv % 8 or max(d, dv) > 256:
        return [f"head_dim={d}, head_dim_v={dv}: expected multiples of 8 up to 256"]
    if major in (10, 11) and max(d, dv) > 128 and (d, dv) not in ((192, 128), (256, 256)):
        return [
            f"head_dim={d}, head_dim_v={dv}: expected up to 128, or (192, 128) or (256, 256), "
            f"on compute capability {major}.x"
        ]
    if major == 9 and dv > max(128, d):
        # 4.0.0b36 asks for more shared memory than there is, and the launch is rejected.
        return [
            f"head_dim_v={dv} with head_dim={d}: expected head_dim_v up to 128 or head_dim, "
            "on compute capability 9.x"
        ]
    return []


def _mod_reasons(spec: AttnSpec, major: int) -> list[str]:
    reasons = []
    for name, mod in (("score_mod", spec.score_mod), ("mask_mod", spec.mask_mod)):
        if type(mod).__module__.partition(".")[0] == "triton":
            reasons.append(f"{name}: expected a CuTe function, got a Triton one")
    if spec.score_mod is not None and major == 8:
        reasons.append("score_mod on compute capability 8.x")
    if "block_sparse_tensors" in spec.features:
        if major not in (9, 10, 11):
            reasons.append(f"block_sparse_tensors on compute capability {major}.x")
        if spec.query_layout == "packed":
            reasons.append("block_sparse_tensors with a batch dimension beside cu_seqlens_q")
        if spec.key_layout == "paged" and major in (10, 11):
            reasons.append(f"block_sparse_tensors with page_table on compute capability {major}.x")
        if spec.num_splits > 1 and major in (10, 11):
            reasons.append(f"num_splits={spec.num_splits}: expected 0 or 1 beside block lists")
    return reasons


def _paging_reasons(spec: AttnSpec, major: int) -> list[str]:
    if major in (8, 12):
        return [f"page_table on compute capability {major}.x"]
    if major == 9 and spec.page_size != _sm90_tile_keys(spec):
        # Pages of another size than the tile are gathered, by a copy that knows no rest. With
        # wide heads it has left memory: 4.0.0b36 at head_dim 160. Of tiles of 144 keys it makes
        # wrong numbers.
        reasons = []
        if _sm90_tile_keys(spec) == 144:
            reasons.append(
                f"page_size={spec.page_size} with head_dim={spec.head_dim}, neither causal nor "
                "windowed: expected page_size=144, on compute capability 9.x"
            )
        if 128 < spec.head_dim < 256:
            reasons.append(
                f"page_size={spec.page_size} with head_dim={spec.head_dim}: expected head_dim "
                f"up to 128 or 256, or page_size={_sm90_tile_keys(spec)}, "
                "on compute capability 9.x"
            )
        if spec.head_dim % 16 or spec.head_dim_v % 16:
            reasons.append(
                f"page_size={spec.page_size} with head_dim={spec.head_dim}, "
                f"head_dim_v={spec.head_dim_v}: expected multiples of 16, or "
                f"page_size={_sm90_tile_keys(spec)}, on compute capability 9.x"
            )
        return reasons
    return []


def _sm90_tile_keys(spec: AttnSpec) -> int:
    """Keys of a tile on Hopper, as FA4 chooses it: a page of this size is loaded by TMA."""
    causal = spec.window_right == 0 and spec.window_left < 0
    local = not causal and max(spec.window_left, spec.window_right) >= 0
    if spec.head_dim <= 64:
        return 128
    if spec.head_dim <= 96:
        return 128 if causal or local else 144
    if spec.head_dim <= 128:
        return 128
    if spec.head_dim <= 192:
        return 96 if local else 128 if spec.head_dim_v <= 128 else 112
    return 64 if local else 80


def _fixed_arguments(problem: Problem) -> dict[str, Any]:
    spec = problem.spec
    causal = spec.window_right == 0
    # There is no splitting outside Blackwell and beside block lists, and its own choice of a count
    # would be refused.
    splits = spec.num_splits
    listed = "block_sparse_tensors" in spec.features
    if listed or device_facts.facts(spec.device).arch[0] not in (10, 11):
        splits = 1
    mods = {"score_mod": spec.score_mod, "mask_mod": spec.mask_mod}
    return {name: mod for name, mod in mods.items() if mod is not None} | {
        "softmax_scale": spec.softmax_scale,
        "causal": causal,
        "window_size": (
            None if spec.window_left < 0 else spec.window_left,
            None if causal or spec.window_right < 0 else spec.window_right,
        ),
        "softcap": spec.softcap,
        "num_splits": splits,
        "pack_gqa": spec.pack_gqa,
        "return_lse": problem.return_lse,
    }


def _is_plain(problem: Problem) -> bool:
    """Whether every sequence is as long as the tensors are."""
    spec, bounds, tensors = problem.spec, problem.bounds, problem.tensors
    return (
        spec.query_layout == spec.key_layout == "dense"
        and tensors.seqused_q is None
        and tensors.seqused_k is None
        and bounds.fixed_seqlen_k == bounds.max_seqlen_k
    )


def _same_lengths(problem: Problem) -> Callable[[], torch.Tensor | None]:
    """The tensor of a key length that was given as one int, None where the shapes say it."""
    spec, bounds = problem.spec, problem.bounds
    full = spec.key_layout == "dense" and bounds.fixed_seqlen_k == bounds.max_seqlen_k
    if bounds.fixed_seqlen_k is None or full:
        return lambda: None
    return fixed_lengths(problem)


def _call(
    function: Callable[..., Any],
    fixed: dict[str, Any],
    tensors: Tensors,
    where: dict[str, torch.Tensor | None],
) -> AttnResult:
    if tensors.aux is not None:
        fixed = fixed | {"aux_tensors": list(tensors.aux)}
    if tensors.blocks is not None:
        lists = importlib.import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
        fixed = fixed | {"block_sparse_tensors": lists(**tensors.blocks._asdict())}
    out, lse = function(
        q=tensors.q,
        k=tensors.k,
        v=tensors.v,
        learnable_sink=tensors.sinks,
        **where,
        **fixed,
    )
    if tensors.out is not None:
        out = tensors.out.copy_(out)
    return AttnResult(out, lse)


BACKEND = FA4Backend()

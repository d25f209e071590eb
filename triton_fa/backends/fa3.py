"""FlashAttention-3's binary: finding a provider that loads, and calling it by keyword.

The same kernels are published by several packages with different signatures, so what a provider
takes is read from its functions once, when it is loaded. What FA3 returns is passed on as it is:
an empty key tensor gives its lse of +inf, a tile without any key leaves the sink out. New keys are
appended by the tiles that read them: those that no query of their sequence sees may be left out,
all of them where a sequence has no query.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from triton_fa import device as device_facts
from triton_fa.backends.base import Run, allocate, fixed_lengths, without_work
from triton_fa.env import cache_dir, settings
from triton_fa.errors import BackendUnavailableError, UnsupportedError
from triton_fa.problem import AttnResult, Problem, Tensors
from triton_fa.spec import AttnSpec

HUB_REPOSITORY = "kernels-community/sgl-flash-attn3"
SUPPORTED_FEATURES = frozenset({"sinks", "scheduler_metadata", "seqused_q", "out"})
# Arguments that a provider takes, or does not, under these names.
OPTIONAL_FEATURES = {
    "k": ("k", "v", "cu_seqlens_k_new"),
    "rotary_cos": ("rotary_cos", "rotary_sin", "rotary_interleaved"),
    "rotary_seqlens": ("rotary_seqlens",),
    "cache_batch_idx": ("cache_batch_idx",),
    "cache_leftpad": ("cache_leftpad",),
    "attention_chunk": ("attention_chunk",),
    "qv": ("qv",),
    "only_qv": ("only_qv",),
    "q_descale": ("q_descale",),
    "k_descale": ("k_descale",),
    "v_descale": ("v_descale",),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float8_e4m3fn)
ONLY_QV_DIM = 64  # of the placeholders that a provider makes for q and k
MAX_SINKS = 64  # FA3 stages them in shared memory of this size, without a check
MAX_SPLITS = 255  # the split number is packed in 8 bits
# What one argument is called by other providers.
SPELLINGS = {
    "num_heads_q": "num_heads",
    "num_heads_kv": "num_heads_k",
    "cache_leftpad": "leftpad_k",
}
_logger = logging.getLogger("triton_fa")


@dataclass(frozen=True, slots=True)
class Function:
    """A function of a provider, and the names of its parameters."""

    call: Callable[..., Any]
    parameters: frozenset[str]

    @classmethod
    def of(cls, module: ModuleType, name: str) -> Function:
        """The function `name` of `module`."""
        function = getattr(module, name)
        return cls(function, frozenset(inspect.signature(function).parameters))

    def spelled(self, name: str) -> str:
        """What the function calls the argument `name`; `name` itself if it has no such."""
        other = SPELLINGS.get(name, name)
        return other if other in self.parameters else name


@dataclass(frozen=True, slots=True)
class Provider:
    """A package that FA3 was loaded from."""

    detail: str
    with_kvcache: Function
    varlen: Function
    metadata: Function | None


class FA3Backend:
    """The FlashAttention-3 binary, on GPUs of compute capability 8.x and 9.x."""

    ver: int | str = 3

    def unavailable(self, device: torch.device) -> str | None:
        """Why FA3 cannot run on `device`; tries to load its providers."""
        reason = _device_reason(device)
        if reason is not None:
            return reason
        provider = load_provider()
        return provider if isinstance(provider, str) else None

    def detail(self) -> str:
        """The provider and its version."""
        provider = load_provider()
        return "" if isinstance(provider, str) else provider.detail

    def unsupported(self, spec: AttnSpec) -> list[str]:
        """What FA3, or the provider that was loaded, does not do."""
        provider = load_provider()
        if isinstance(provider, str):
            return [provider]
        reasons = [
            f"{name} is not supported yet"
            for name in sorted(spec.features - SUPPORTED_FEATURES - OPTIONAL_FEATURES.keys())
        ]
        reasons += _dtype_reasons(spec) + _dim_reasons(spec)
        if spec.num_splits > MAX_SPLITS:
            reasons.append(f"num_splits={spec.num_splits}: expected at most {MAX_SPLITS}")
        function = _function(provider, spec)
        if spec.key_layout == "paged" and "seqused_q" in spec.features:
            reasons.append("seqused_q together with page_table")
        if "scheduler_metadata" in spec.features and function is not provider.with_kvcache:
            reasons.append("scheduler_metadata together with cu_seqlens_k or seqused_q")
        if "sinks" in spec.features:
            reasons += _sink_reasons(spec, provider, function)
        if "qv" in spec.features:
            reasons += _second_part_reasons(spec)
            if "only_qv" in spec.features and function is not provider.with_kvcache:
                reasons.append("only_qv together with cu_seqlens_k or seqused_q")
            if "only_qv" in spec.features and "k" in spec.features:
                reasons.append("only_qv together with k: there is no cache of keys to append to")
        for feature in sorted(spec.features & OPTIONAL_FEATURES.keys()):
            for name in OPTIONAL_FEATURES[feature]:
                if function.spelled(name) not in function.parameters:
                    reasons.append(f"{name}: {provider.detail} does not take it")
        return reasons

    def prepare(self, problem: Problem) -> Run:
        """Put together the arguments that no tensor of the call changes."""
        provider = load_provider()
        if isinstance(provider, str):
            raise BackendUnavailableError(3, provider)
        if problem.spec.rotary_dim and not problem.bounds.total_new:
            raise UnsupportedError(3, ["rotary_cos: nothing is rotated where k has no token"])
        if reasons := _misaligned(problem.tensors):
            raise UnsupportedError(3, reasons)
        if without_work(problem):
            if problem.bounds.total_new:
                raise UnsupportedError(3, ["k: nothing is appended where q has no token"])
            bare = problem.without_tensors()
            return lambda tensors: allocate(bare, tensors)
        function = _function(provider, problem.spec)
        if function is provider.with_kvcache:
            arguments = _kvcache_arguments(problem, function)
        else:
            arguments = _varlen_arguments(problem)
        fixed = _fixed_arguments(problem, function)
        fills_out = "out" in function.parameters

        def run(tensors: Tensors) -> AttnResult:
            optional = {
                "sinks": tensors.sinks,
                "qv": tensors.qv,
                "q_descale": tensors.q_descale,
                "k_descale": tensors.k_descale,
                "v_descale": tensors.v_descale,
            }
            if fills_out:
                optional["out"] = tensors.out
            given = {name: value for name, value in optional.items() if value is not None}
            return _result(function.call(**fixed, **arguments(tensors), **given), tensors.out)

        return run


def _misaligned(tensors: Tensors) -> list[str]:
    """What FA3's copies of 16 bytes cannot read: it does not look, and they fault."""
    reasons = []
    for name in ("q", "k", "v"):
        tensor = getattr(tensors, name)
        size = tensor.element_size()
        strides = zip(tensor.shape[:-1], tensor.stride(), strict=False)
        if tensor.data_ptr() % 16 or any(n > 1 and s * size % 16 for n, s in strides):
            reasons.append(
                f"{name}: strides {tensor.stride()} of {size} bytes at an address of "
                f"{tensor.data_ptr() % 16} past 16: expected multiples of 16 bytes"
            )
    return reasons


def _device_reason(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"FlashAttention-3 needs a CUDA device, got {device.type!r}"
    facts = device_facts.facts(device)
    if facts.kind != "cuda":
        return "FlashAttention-3 needs an NVIDIA GPU"
    if facts.arch[0] not in (8, 9):
        major, minor = facts.arch
        return f"FlashAttention-3 needs compute capability 8.x or 9.x, got {major}.{minor}"
    return None


@functools.cache
def load_provider() -> Provider | str:
    """The first provider that loads, in the order of the settings, or every provider's error."""
    errors = []
    for name in settings().fa3_providers:
        try:
            return _LOADERS[name]()
        except Exception as error:  # noqa: BLE001  # a broken binary raises anything
            text = f"{name}: {type(error).__name__}: {error}"
            _logger.warning("no FlashAttention-3 from %s", text)
            errors.append(text)
    return "no provider of FlashAttention-3 loads: " + "; ".join(errors)


def _load_sgl() -> Provider:
    module = importlib.import_module("sgl_kernel.flash_attn")
    return _provider(module, "sgl_kernel", ("sglang-kernel", "sgl-kernel"))


def _load_hub() -> Provider:
    kernels = importlib.import_module("kernels")
    lock = cache_dir() / "kernels.lock"
    if lock.is_file():
        module = kernels.load_kernel(HUB_REPOSITORY, lockfile=lock)
        return _provider(module, f"{HUB_REPOSITORY} (locked by {lock})", ())
    module = kernels.get_kernel(HUB_REPOSITORY, revision="v1")
    return _provider(module, f"{HUB_REPOSITORY} v1", ())


def _load_upstream() -> Provider:
    module = importlib.import_module("flash_attn_interface")
    return _provider(module, "flash_attn_interface", ("flash-attn-3", "flash_attn_3"))


_LOADERS: dict[str, Callable[[], Provider]] = {
    "sgl": _load_sgl,
    "hub": _load_hub,
    "upstream": _load_upstream,
}


def _provider(module: ModuleType, name: str, distributions: tuple[str, ...]) -> Provider:
    if hasattr(module, "__triton_fa__"):
        raise ImportError(f"{name} is the stand-in of triton_fa.compat")
    metadata = None
    if hasattr(module, "get_scheduler_metadata"):
        metadata = Function.of(module, "get_scheduler_metadata")
    return Provider(
        f"{name} {_version(distributions)}".rstrip(),
        Function.of(module, "flash_attn_with_kvcache"),
        Function.of(module, "flash_attn_varlen_func"),
        metadata,
    )


def _version(distributions: tuple[str, ...]) -> str:
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _dtype_reasons(spec: AttnSpec) -> list[str]:
    reasons = []
    if spec.dtype not in DTYPES:
        expected = "float16, bfloat16 or float8_e4m3fn"
        reasons.append(f"q: dtype {_dtype(spec.dtype)}: expected {expected}")
    elif spec.dtype.itemsize == 1 and device_facts.facts(spec.device).arch[0] != 9:
        reasons.append(f"q: dtype {_dtype(spec.dtype)}: needs compute capability 9.x")
    if spec.kv_dtype != spec.dtype:
        name = "k_cache" if spec.entry == "kvcache" else "k"
        wanted = _dtype(spec.dtype)
        reasons.append(f"{name}: dtype {_dtype(spec.kv_dtype)}: expected that of q, {wanted}")
    return reasons


def _dim_reasons(spec: AttnSpec) -> list[str]:
    reasons = []
    d = ONLY_QV_DIM if "only_qv" in spec.features else spec.head_dim
    dv = spec.head_dim_v
    float8 = spec.dtype.itemsize == 1
    step, most_v = (16, 256) if float8 else (8, 512)
    if d % step or d > 256:
        reasons.append(f"head_dim={d}: expected a multiple of {step} up to 256")
    if dv % step or dv > most_v:
        reasons.append(f"head_dim_v={dv}: expected a multiple of {step} up to {most_v}")
    if d != dv:
        if not (128 < d <= 192 and 96 < dv <= 128) and not (d <= 64 and dv <= 512):
            reasons.append(
                f"head_dim={d} with head_dim_v={dv}: expected equal ones, or head_dim up to 64, "
                "or head_dim in (128, 192] with head_dim_v in (96, 128]"
            )
        if device_facts.facts(spec.device).arch[0] != 9:
            reasons.append(f"head_dim={d} with head_dim_v={dv}: needs compute capability 9.x")
    return reasons


def _second_part_reasons(spec: AttnSpec) -> list[str]:
    reasons = []
    if "only_qv" not in spec.features and spec.head_dim > 64:
        reasons.append(f"qv: head_dim={spec.head_dim}: expected up to 64")
    if spec.head_dim_v < 256:
        reasons.append(f"qv: head_dim_v={spec.head_dim_v}: expected at least 256")
    if device_facts.facts(spec.device).arch[0] != 9:
        reasons.append("qv: needs compute capability 9.x")
    return reasons


def _sink_reasons(spec: AttnSpec, provider: Provider, function: Function) -> list[str]:
    if "sinks" not in function.parameters:
        return [f"sinks: {provider.detail} does not take them"]
    reasons = []
    if spec.sinks_dtype != torch.bfloat16:
        reasons.append(f"sinks: dtype {_dtype(spec.sinks_dtype)}: expected bfloat16")
    if spec.num_heads_q > MAX_SINKS:
        reasons.append(f"sinks: {spec.num_heads_q} query heads: expected at most {MAX_SINKS}")
    if device_facts.facts(spec.device).arch[0] != 9:
        reasons.append("sinks: need compute capability 9.x")
    return reasons


def _dtype(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _function(provider: Provider, spec: AttnSpec) -> Function:
    """The function that serves `spec`; a page table is known to the key/value cache one only."""
    if spec.key_layout == "packed" or "seqused_q" in spec.features:
        return provider.varlen
    return provider.with_kvcache


def _fixed_arguments(problem: Problem, function: Function) -> dict[str, Any]:
    spec = problem.spec
    causal = spec.window_right == 0
    fixed: dict[str, Any] = {
        "softmax_scale": spec.softmax_scale,
        "causal": causal,
        "window_size": (spec.window_left, -1 if causal else spec.window_right),
        "softcap": spec.softcap,
        "num_splits": spec.num_splits,
        "pack_gqa": spec.pack_gqa,
        "sm_margin": spec.sm_margin,
    }
    if spec.attention_chunk:
        fixed["attention_chunk"] = spec.attention_chunk
    if spec.rotary_dim:
        fixed["rotary_interleaved"] = spec.rotary_interleaved
    if problem.return_lse:
        spellings = ("return_softmax_lse", "return_attn_probs")
        fixed[next(name for name in spellings if name in function.parameters)] = True
    return fixed


def _kvcache_arguments(problem: Problem, function: Function) -> Callable[[Tensors], dict[str, Any]]:
    spec = problem.spec
    fixed: dict[str, Any] = {}
    if spec.query_layout == "packed":
        fixed["max_seqlen_q"] = problem.bounds.max_seqlen_q
        if spec.rotary_dim and spec.rotary_moving:
            fixed["max_seqlen_q"] = max(problem.bounds.max_seqlen_q, _least_moving_bound(problem))
    lengths = _same_lengths(problem)
    leftpad = function.spelled("cache_leftpad")
    only_qv = "only_qv" in spec.features

    def arguments(tensors: Tensors) -> dict[str, Any]:
        given = dict(fixed)
        optional = {
            "cache_seqlens": lengths() if tensors.seqused_k is None else tensors.seqused_k,
            "page_table": tensors.page_table,
            "cu_seqlens_q": tensors.cu_seqlens_q,
            "scheduler_metadata": tensors.scheduler_metadata,
            "cache_batch_idx": tensors.cache_batch_idx,
            leftpad: tensors.cache_leftpad,
        }
        if tensors.append is not None:
            optional |= tensors.append._asdict()
        given.update({name: value for name, value in optional.items() if value is not None})
        if only_qv:  # what stands in for q and k would be read as them
            return {"q": None, "k_cache": None, "v_cache": tensors.v, "only_qv": True, **given}
        return {"q": tensors.q, "k_cache": tensors.k, "v_cache": tensors.v, **given}

    return arguments


def _least_moving_bound(problem: Problem) -> int:
    """The least max_seqlen_q with which FA3 turns each query by its own position.

    Whether a window hides keys goes by the bound as it was stated, which q need not fill. FA3 takes
    none above what the cache can hold.
    """
    spec, bounds = problem.spec, problem.bounds
    if spec.window_right + 2 <= bounds.max_seqlen_k:
        return spec.window_right + 2
    if spec.attention_chunk or 0 <= spec.window_left < bounds.max_seqlen_k - 1:
        return 0
    if bounds.max_seqlen_q == 1:  # the first query's position is its own
        return 0
    reason = (
        f"max_seqlen_q: above the window's right side {spec.window_right} by 2 and more, which is "
        f"what a rotation goes by: expected at most the cache's {bounds.max_seqlen_k} keys"
    )
    raise UnsupportedError(3, [reason])


def _same_lengths(problem: Problem) -> Callable[[], torch.Tensor | None]:
    """The tensor of a key length that was given as one int.

    None stands for a dense cache that is used in full; FA3 then needs no schedule.
    """
    spec, bounds, tensors = problem.spec, problem.bounds, problem.tensors
    if tensors.seqused_k is not None:
        return lambda: None
    full = spec.key_layout == "dense" and bounds.fixed_seqlen_k == bounds.max_seqlen_k
    if full and tensors.scheduler_metadata is None and tensors.append is None:
        return lambda: None
    return fixed_lengths(problem)


def _varlen_arguments(problem: Problem) -> Callable[[Tensors], dict[str, Any]]:
    bounds = problem.bounds

    def arguments(tensors: Tensors) -> dict[str, Any]:
        return {
            "q": tensors.q,
            "k": tensors.k,
            "v": tensors.v,
            "cu_seqlens_q": tensors.cu_seqlens_q,
            "cu_seqlens_k": tensors.cu_seqlens_k,
            "max_seqlen_q": bounds.max_seqlen_q,
            "max_seqlen_k": bounds.max_seqlen_k,
            "seqused_q": tensors.seqused_q,
            "seqused_k": tensors.seqused_k,
        }

    return arguments


def _result(returned: Any, out: torch.Tensor | None) -> AttnResult:
    """FA3's answer as a result.

    A provider without `out` had a buffer of its own: all of it is copied, with rows beyond
    `seqused_q` that FA3 never wrote.
    """
    computed, lse, *extra = returned if isinstance(returned, tuple) else (returned, None)
    if out is None:
        out = computed
    elif computed.data_ptr() != out.data_ptr():
        out.copy_(computed)
    return AttnResult(out, lse, tuple(extra))


def scheduler_metadata(arguments: Mapping[str, Any]) -> torch.Tensor:
    """FA3's own schedule, from the package that `ver=3` calls.

    Args:
        arguments: By the names of upstream's `get_scheduler_metadata`; None is left out, and what
            providers spell differently is renamed.

    Raises:
        BackendUnavailableError: No provider loads, or it has no such function.
        UnsupportedError: It does not take one of the arguments, or such a qkv_dtype.
    """
    provider = load_provider()
    if isinstance(provider, str):
        raise BackendUnavailableError(3, provider)
    if provider.metadata is None:
        raise BackendUnavailableError(3, f"{provider.detail} has no get_scheduler_metadata")
    function = provider.metadata
    if (dtype := arguments.get("qkv_dtype", torch.bfloat16)) not in DTYPES:
        expected = "float16, bfloat16 or float8_e4m3fn"
        raise UnsupportedError(3, [f"qkv_dtype: {_dtype(dtype)}: expected {expected}"])
    named = {function.spelled(n): value for n, value in arguments.items() if value is not None}
    if missing := sorted(named.keys() - function.parameters):
        raise UnsupportedError(3, [f"{name}: {provider.detail} has no such" for name in missing])
    metadata: torch.Tensor = function.call(**named)
    return metadata


BACKEND = FA3Backend()

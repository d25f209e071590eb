"""`attn_implementation="triton_fa"` for transformers.

transformers looks attention up by name in two registries: the function that computes it, and the
one that makes its mask. Without the second, padding would be ignored silently, so both are set.

Its continuous batching decodes over block tables only with kernels that the package `kernels`
loads; `register_kernel` makes this package one of those.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from packaging.requirements import Requirement

from triton_fa.env import add_local_kernel, settings
from triton_fa.errors import ArgumentValueError
from triton_fa.integrations import FeatureError, hub_kernel, require

require("transformers", ">=5.17,<6")

from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedModel,
    modeling_flash_attention_utils,
)
from transformers.dependency_versions_table import deps

from triton_fa.integrations.padding import attend_padded
from triton_fa.integrations.torch_library import call

NAME = "triton_fa"
# transformers takes a name for FlashAttention-3's, which it decodes with, by "flash" and the 3.
KERNEL = "triton-fa/flash-attn3"

# Masks that the arguments of the attention call say already, by the function that makes each.
_KNOWN_MASKS = frozenset(
    {
        "bidirectional_mask_function",
        "causal_mask_function",
        "packed_sequence_mask_function",
        "sliding_window_bidirectional_overlay",
        "sliding_window_overlay",
    }
)
# What a configuration may say that no call here can do.
_MAX_HEAD_DIM = 256
_REFUSED_SETTINGS = {
    "index_topk": "attention to chosen keys",
    "output_attentions": "attention weights",
    "relative_attention_num_buckets": "position_bias",
}
# What some models pass to change the scores or the keys. Everything else that models pass along is
# for other implementations, or for other layers.
_REFUSED = (
    "block_indices",
    "head_mask",
    "indices",
    "output_attentions",
    "position_bias",
    "sinks",
)


def register(*, ver: int | str | None = None) -> None:
    """Make `attn_implementation="triton_fa"` known to transformers.

    Where this transformers has paged attention functions for continuous batching, their name
    `"paged|triton_fa"` too. Calling it again replaces what was registered. From here on a model
    that asks for one of the names is refused when it is built if its configuration says that it
    needs something not done here.

    Args:
        ver: As of the attention functions.
    """
    attention = functools.partial(attention_forward, ver=ver)
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, padding_mask)
    if "paged|sdpa" in AttentionInterface().valid_keys():
        AttentionInterface.register(f"paged|{NAME}", functools.partial(paged_forward, ver=ver))
    _refuse_when_built()


def register_kernel(name: str = KERNEL) -> str:
    """Let transformers load this package as a hub kernel: `attn_implementation=register_kernel()`.

    With it, continuous batching decodes over block tables where transformers does so at all, and
    admits it in every version. The package `kernels` finds the folder by the environment variable
    LOCAL_KERNELS, which is set for this process and those it starts; nothing is downloaded. Call it
    before a model is built with that name. The backend is that of `ver=None`.

    Args:
        name: The repository that the folder stands in for. Models that admit certain kernels only
            (gpt-oss) need one of those, "kernels-community/vllm-flash-attn3".

    Returns:
        The name.

    Raises:
        FrameworkVersionError: `kernels` is missing, or of a version that this transformers refuses.
        ArgumentValueError: the name is not that of a repository with "flash" and 2 or 3 in it, or
            another kernel of that name is in use already.
    """
    require("kernels", str(Requirement(deps["kernels"]).specifier))
    if re.fullmatch(r"[^/:@|=]+/[^/:@|=]*flash[^/:@|=]*[23][^/:@|=]*", name) is None:
        raise ArgumentValueError(f"name: expected owner/...flash...3 or ...2, got {name!r}")
    _refuse_loaded(name)
    add_local_kernel(name, kernel_folder())
    _kernels.add(name)
    _refuse_when_built()
    return name


def kernel_folder() -> Path:
    """The folder that `kernels` loads: LOCAL_KERNELS=<repository>=<folder> does it by hand."""
    return Path(hub_kernel.__file__).parent


_kernels: set[str] = set()


def _refuse_loaded(name: str) -> None:
    """transformers keeps the functions of the name that it loaded last."""
    loaded = getattr(modeling_flash_attention_utils, "_loaded_implementation", None) or ""
    function = getattr(modeling_flash_attention_utils, "_flash_varlen_fn", None)
    if loaded.removeprefix("paged|") != name or function is None:
        return
    source = getattr(getattr(function, "__code__", None), "co_filename", "another file")
    if Path(source) != Path(hub_kernel.__file__):
        raise ArgumentValueError(f"name: expected one not in use, {name!r} is loaded from {source}")


def _refuse_when_built() -> None:
    """Look at the configuration where transformers looks whether a model may have a name."""
    for method in ("get_correct_attn_implementation", "_check_and_adjust_attn_implementation"):
        original = getattr(PreTrainedModel, method)
        if not hasattr(original, "__triton_fa__"):
            setattr(PreTrainedModel, method, _checked(original))


def _checked(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def checked(self: Any, *arguments: Any, **options: Any) -> Any:
        found = original(self, *arguments, **options)
        bare = str(found).removeprefix("paged|")
        if bare == NAME:
            _refuse_configuration(self.config, AttentionInterface()[NAME].keywords["ver"])
        elif bare in _kernels:
            _refuse_configuration(self.config, settings().ver)
            softcap = getattr(self.config, "attn_logit_softcapping", None)
            if bare != found and softcap:
                raise FeatureError(
                    f"attn_logit_softcapping: expected none, got {softcap}: this transformers "
                    "does not pass it on in continuous batching"
                )
        return found

    checked.__triton_fa__ = True  # type: ignore[attr-defined]  # so that it is done once
    return checked


def _refuse_configuration(config: Any, ver: int | str | None) -> None:
    def of(name: str) -> Any:
        return getattr(config, name, None)

    heads, hidden = of("num_attention_heads"), of("hidden_size")
    head_dim = of("head_dim")
    if head_dim is None and isinstance(heads, int) and isinstance(hidden, int) and heads:
        head_dim = hidden // heads
    if isinstance(head_dim, int) and head_dim > _MAX_HEAD_DIM and ver != "torch":
        raise FeatureError(f"head_dim: expected at most {_MAX_HEAD_DIM}, got {head_dim}")
    for name, what in _REFUSED_SETTINGS.items():
        if of(name):
            raise FeatureError(f"{name}: expected none, got {of(name)}: no {what} here")


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    *,
    ver: int | str | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, as transformers' models call it.

    Args:
        module: The layer; asked for `is_causal` where the call does not say.
        query: (batch, heads_q, seqlen_q, head_dim).
        key: (batch, heads_kv, seqlen_k, head_dim).
        value: As key, with its own head_dim.
        attention_mask: What `padding_mask` returned.
        dropout: Refused unless 0.
        scaling: Multiplies the scores.
        sliding_window: Keys a query sees on its left, itself included; on its right as many if
            the layer is not causal.
        softcap: As of the attention functions.
        is_causal: Whether a query sees keys up to its own position only.
        s_aux: (heads_q,) sink logits.
        position_ids: (1, seqlen_q), restarting at each of several packed sequences.
        cu_seq_lens_q: (sequences + 1,) prefix sums of packed queries, instead of position_ids.
        cu_seq_lens_k: The same of keys.
        max_length_q: Longest packed query sequence.
        max_length_k: Longest packed key sequence.
        ver: As of the attention functions.
        **kwargs: What models pass for other implementations.

    Returns:
        (batch, seqlen_q, heads_q, head_dim of value), and None in place of attention weights.

    Raises:
        FeatureError: the model asks for something not done here.
    """
    _refuse(dropout, attention_mask, kwargs)
    if kwargs.get("cache") is not None:
        raise FeatureError(
            "continuous batching: expected attn_implementation='paged|triton_fa', "
            "on a transformers that has paged attention functions"
        )
    batch, seqlen_q = query.shape[0], query.shape[2]
    q, k, v = (x.transpose(1, 2) for x in _one_dtype(query, key, value))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    options: dict[str, Any] = {
        "softmax_scale": scaling,
        "causal": causal,
        "window_size": _window(sliding_window, k.shape[1]),
        "softcap": softcap,
        "num_splits": 0,
        "sinks": s_aux,
        "ver": ver,
    }
    if _is_span(attention_mask):
        return _attend_span(q, k, v, attention_mask, options), None
    if attention_mask is not None:
        # Else the queries may be other tokens than the keys, as in cross attention.
        same_tokens = causal or options["window_size"] != (-1, -1)
        return attend_padded(q, k, v, attention_mask, same_tokens=same_tokens, **options), None
    lengths: Any = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    if any(length is None for length in lengths):
        lengths = _packed_lengths(position_ids, batch, k.shape[1])
    if lengths is not None:
        cu_seqlens_q, cu_seqlens_k, max_q, max_k = lengths
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        out = call(
            "flash_attn_varlen_func",
            *(q, k, v, _int32(cu_seqlens_q), _int32(cu_seqlens_k)),
            max_seqlen_q=int(max_q),
            max_seqlen_k=int(max_k),
            **options,
        )
        return out.unflatten(0, (batch, seqlen_q)), None
    return call("flash_attn_func", q, k, v, **options), None


def _is_span(mask: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    """Whether it is what `_span` made, in four dimensions so that models hand it on as it is."""
    return mask is not None and mask.dim() == 4 and mask.dtype == torch.int32


def _attend_span(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, span: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor:
    """Attention against a static cache, whose lengths only the device knows."""
    # Contiguous, unless transformers has copied it.
    ends, *begins = (column.contiguous() for column in span[:, 0, 0].unbind(1))
    out: torch.Tensor = call(
        "flash_attn_with_kvcache",
        *(q, k, v),
        cache_seqlens=ends,
        cache_leftpad=begins[0] if begins else None,
        **options,
    )
    return out


def paged_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    cache: Any,
    cu_seq_lens_q: torch.Tensor,
    cu_seq_lens_k: torch.Tensor | Mapping[str, torch.Tensor],
    max_seqlen_q: int,
    max_seqlen_k: int | Mapping[str, int],
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    *,
    ver: int | str | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer in continuous batching: the cache hands out packed keys.

    Args:
        module: The layer.
        query: (1, heads_q, total_q, head_dim).
        key: (1, heads_kv, total_q, head_dim): new keys.
        value: As key.
        attention_mask: Not read: the lengths say as much.
        cache: transformers' paged cache, which stores the new keys and gathers all.
        cu_seq_lens_q: (sequences + 1,) prefix sums of query lengths.
        cu_seq_lens_k: The same of key lengths, or one for each type of layer.
        max_seqlen_q: Longest query sequence.
        max_seqlen_k: Longest key sequence, or one for each type of layer.
        dropout: Refused unless 0.
        scaling: Multiplies the scores.
        sliding_window: Keys a query sees, itself included.
        softcap: As of the attention functions.
        s_aux: (heads_q,) sink logits.
        ver: As of the attention functions.
        **kwargs: `read_index` and `write_index` for the cache; what models pass for others.

    Returns:
        (1, total_q, heads_q, head_dim), and None in place of attention weights.

    Raises:
        FeatureError: the model asks for something not done here.
    """
    _refuse(dropout, None, kwargs)
    if kwargs.get("block_table") is not None:
        raise FeatureError("block_table: expected None, as for names without 'flash' in them")
    # As the cache tells the types apart: by the layer, not by its call.
    window = getattr(module, "sliding_window", None) or sliding_window
    if isinstance(cu_seq_lens_k, Mapping):
        layer_type = "sliding_attention" if window else "full_attention"
        cu_seq_lens_k = cu_seq_lens_k[layer_type]
        max_seqlen_k = max_seqlen_k[layer_type]  # type: ignore[index]  # a mapping as well
    k, v = cache.update(
        key_states=key,
        value_states=value,
        layer_idx=module.layer_idx,
        read_index=kwargs["read_index"],
        write_index=kwargs["write_index"],
    )
    q, k, v = _one_dtype(query[0].transpose(0, 1), k, v)
    out = call(
        "flash_attn_varlen_func",
        *(q, k, v, _int32(cu_seq_lens_q), _int32(cu_seq_lens_k)),
        max_seqlen_q=int(max_seqlen_q),
        max_seqlen_k=int(max_seqlen_k),  # type: ignore[arg-type]  # no mapping any more
        softmax_scale=scaling,
        causal=True,
        window_size=(window - 1 if window else -1, -1),
        softcap=softcap,
        num_splits=0,
        sinks=s_aux,
        ver=ver,
    )
    return out[None], None


@torch.compiler.disable(  # type: ignore[untyped-decorator]  # torch's own
    reason="reads the values of the mask and the functions it is made of"
)
def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The (batch, seqlen_k) mask of tokens that count, or None if all do.

    Causality and windows come with the attention call. Any other pattern is refused here, because
    this is the only place that transformers shows it. Of a static cache, whose length is a tensor,
    it is the keys in use, (batch, 1, 1, 1 or 2) int32: their end, and where they begin if there
    is padding on the left.

    Raises:
        FeatureError: the mask is none that the attention call can say.
    """
    causal = False
    for name, full_name, held in _parts(mask_function):
        if name == "packed_sequence_mask_function" and batch_size > 1:
            raise FeatureError(
                f"position_ids: expected packed sequences in one row, got {batch_size} rows"
            )
        if name == "chunked_overlay" and kv_length + kv_offset <= held["chunk_size"]:
            continue  # one chunk holds everything
        if name not in _KNOWN_MASKS:
            raise FeatureError(
                "mask: expected causal, sliding-window, padding or packed sequences, "
                f"got {full_name}"
            )
        causal = causal or name == "causal_mask_function"
    if causal and isinstance(q_offset, torch.Tensor):
        span = _span(batch_size, q_offset + (q_length - kv_offset), attention_mask)
        if span is not None:
            return span
    if attention_mask is None:
        used = int(q_offset) + q_length - kv_offset
        if not causal or used >= kv_length:
            return None
        # The rest of a static cache was never written.
        return torch.ones(batch_size, used, dtype=torch.bool, device=kwargs.get("device"))
    attention_mask = attention_mask[:, -kv_length:]
    # A mask shorter than the keys cuts off the unused end of a static cache.
    if attention_mask.shape[1] == kv_length and bool(attention_mask.all()):
        return None
    return attention_mask


def _span(
    batch_size: int, end: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """The keys in use of a static cache, made on the device; None where padding is elsewhere.

    While a graph is captured nothing can be looked at: there the device stops the replay that has
    padding elsewhere.
    """
    ends = end.to(torch.int32).repeat(batch_size)
    if attention_mask is None:
        return ends[:, None, None, None]
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    counts = attention_mask.bool() & (positions < end)
    numbers = counts.sum(1, dtype=torch.int32)
    begins = ends - numbers
    on_the_left = (counts == ((positions >= begins[:, None]) & (positions < end))).all()
    if on_the_left.is_cuda and torch.cuda.is_current_stream_capturing():
        torch._assert_async(on_the_left, "attention_mask: expected padding on the left only")
    elif not bool(on_the_left):
        return None
    return torch.stack((ends, begins)).t()[:, None, None]


def _parts(function: Callable[..., Any] | None) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The functions that transformers nested into a mask: name, full name, captured values."""
    if function is None:
        return
    full_name = getattr(function, "__qualname__", "a callable object")
    own = getattr(function, "__module__", "") == "transformers.masking_utils"
    name = full_name.partition(".")[0] if own else ""
    cells = getattr(function, "__closure__", None) or ()
    names = function.__code__.co_freevars if cells else ()
    held = {n: cell.cell_contents for n, cell in zip(names, cells, strict=True)}
    if name == "and_masks":
        for inner in held["mask_functions"]:
            yield from _parts(inner)
    elif name == "remap_positions_for_packed_sequence":
        yield from _parts(held["mask_function"])
    else:
        yield name, full_name, held


def _refuse(dropout: float, attention_mask: object, kwargs: Mapping[str, Any]) -> None:
    if dropout:
        raise FeatureError(f"dropout: expected 0, got {dropout}; call model.eval()")
    if (
        isinstance(attention_mask, torch.Tensor)
        and attention_mask.dim() != 2
        and not _is_span(attention_mask)
    ):
        raise FeatureError(
            "attention_mask: expected (batch, seqlen_k) or None, "
            f"got shape {tuple(attention_mask.shape)}"
        )
    if attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
        raise FeatureError(f"attention_mask: expected a tensor, got {type(attention_mask)}")
    for name in _REFUSED:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise FeatureError(f"{name}: expected None, got {type(kwargs[name]).__name__}")


def _one_dtype(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Norms and rotations may leave queries and keys in float32; values are as the model is."""
    return query.to(value.dtype), key.to(value.dtype), value


def _window(sliding_window: int | None, seqlen_k: int) -> tuple[int, int]:
    if sliding_window is None or seqlen_k <= sliding_window:
        return -1, -1
    return sliding_window - 1, sliding_window - 1


def _int32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.int32)


def _packed_lengths(position_ids: torch.Tensor | None, batch: int, seqlen_k: int) -> Any:
    """The lengths of packed sequences, whose positions all restart from the same number."""
    if position_ids is None or batch != 1 or position_ids.shape != (1, seqlen_k) or seqlen_k == 1:
        return None
    positions = position_ids[0]
    starts = (positions == positions.min()).nonzero().flatten()
    if starts.numel() == 1:
        return None
    cu_seqlens = torch.nn.functional.pad(starts, (0, 1), value=seqlen_k)
    longest = int(cu_seqlens.diff().max())
    return cu_seqlens, cu_seqlens, longest, longest

"""An attention backend for vLLM 0.33, under its name for other people's backends, `CUSTOM`.

vLLM loads `register` by the entry point of this package, in each of its processes. Nothing changes
until `--attention-backend CUSTOM` chooses it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from triton_fa.integrations import FeatureError, require

require("vllm", ">=0.33,<0.34")

from vllm import envs
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash

from triton_fa.api import flash_attn_varlen_func

_PATH = f"{__name__}.TritonFABackend"
_FLOAT8 = ("fp8", "fp8_e4m3")


def register() -> None:
    """Put our backend behind `CUSTOM`, unless another plug-in is there already.

    Raises:
        ImportError: another plug-in is; vLLM logs it.
    """
    custom = AttentionBackendEnum.CUSTOM
    if custom.is_overridden() and custom.get_path() != _PATH:
        raise ImportError(f"vllm: expected CUSTOM to be free, found {custom.get_path()}")
    register_backend(custom, _PATH)


class TritonFABackend(AttentionBackend):  # type: ignore[misc]  # vLLM's class is not analysed
    """What vLLM asks before it chooses."""

    # The cache is written by `do_kv_cache_update`, outside of `forward`.
    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16", *_FLOAT8]

    @staticmethod
    def get_name() -> str:
        """The member of vLLM's enumeration."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[TritonFAImpl]:
        """The layer's part."""
        return TritonFAImpl

    @staticmethod
    def get_builder_cls() -> type[TritonFAMetadataBuilder]:
        """The step's part."""
        return TritonFAMetadataBuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """As the kernels: multiples of 8."""
        return head_size % 8 == 0 and 8 <= head_size <= 256

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        """What the kernels were compiled for."""
        return bool(capability.major >= 8)

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: str | None,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: Any,
    ) -> str | None:
        """Why not, for settings that are fine each alone."""
        if kv_cache_dtype in _FLOAT8 and device_capability < (8, 9):
            return "float8 needs compute capability 8.9 or more"
        if kv_cache_dtype in _FLOAT8 and dtype == torch.float32:
            return "float8 keys need float16 or bfloat16 queries"
        return None

    @classmethod
    def supports_sink(cls) -> bool:
        """Sink logits."""
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Windows, per layer."""
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Bidirectional attention over the cache."""
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """`VLLM_BATCH_INVARIANT`."""
        return True


@dataclass
class TritonFAMetadata:
    """What the layers of a step share; tensors are vLLM's persistent buffers, never copies."""

    num_actual_tokens: int
    max_query_len: int
    query_start_loc: torch.Tensor
    max_seq_len: int
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    causal: bool


class TritonFAMetadataBuilder(AttentionMetadataBuilder[TritonFAMetadata]):  # type: ignore[misc]
    """Passes on what vLLM knows: there is nothing to plan on the host."""

    # Lengths are read on the device, but no query may be longer than the maximum at capture.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table = True

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> TritonFAMetadata:
        """The metadata of a step."""
        common = common_attn_metadata
        if not isinstance(common.causal, bool):
            raise FeatureError("causal: expected one bool for all requests, got a tensor")
        return TritonFAMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            causal=common.causal,
        )

    def update_block_table(
        self, metadata: TritonFAMetadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> TritonFAMetadata:
        """The same step with another group's pages."""
        updated = copy.copy(metadata)
        updated.block_table = blk_table
        updated.slot_mapping = slot_mapping
        return updated


class TritonFAImpl(AttentionImpl[TritonFAMetadata]):  # type: ignore[misc]
    """Attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        if alibi_slopes is not None:
            raise FeatureError("alibi_slopes: expected None")
        if attn_type != AttentionType.DECODER:
            raise FeatureError(f"attn_type: expected decoder, got {attn_type}")
        if kv_cache_dtype not in TritonFABackend.supported_kv_cache_dtypes:
            supported = ", ".join(TritonFABackend.supported_kv_cache_dtypes)
            raise FeatureError(f"kv_cache_dtype: expected {supported}, got {kv_cache_dtype}")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = logits_soft_cap or 0.0
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        self.window_left = -1 if sliding_window is None else sliding_window - 1
        self.batch_invariant = bool(envs.VLLM_BATCH_INVARIANT)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TritonFAMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of the step's tokens against the cache, which holds the new keys already.

        Args:
            layer: Has the scales of float8 keys and values.
            query: (tokens, heads, head_size), padded behind the step's tokens.
            key: In the cache already.
            value: In the cache already.
            kv_cache: (blocks, kv_heads, block_size, 2 * head_size) with any strides.
            attn_metadata: The step's; None while vLLM measures its memory.
            output: (tokens, heads, head_size), written to.
            output_scale: Refused.
            output_block_scale: Refused.

        Returns:
            output.
        """
        if output_scale is not None or output_block_scale is not None:
            raise FeatureError("output_scale, output_block_scale: expected None")
        if attn_metadata is None:
            return output.fill_(0)
        step = attn_metadata
        k_cache, v_cache = self._caches(kv_cache)
        scales = {}
        if self.kv_cache_dtype in _FLOAT8:
            shape = (step.seq_lens.shape[0], self.num_kv_heads)
            scales["k_descale"] = layer._k_scale.expand(shape)
            scales["v_descale"] = layer._v_scale.expand(shape)
        flash_attn_varlen_func(
            query[: step.num_actual_tokens],
            k_cache,
            v_cache,
            step.query_start_loc,
            None,
            step.max_query_len,
            step.max_seq_len,
            seqused_k=step.seq_lens,
            page_table=step.block_table,
            softmax_scale=self.scale,
            causal=step.causal,
            # Without causality the window is as wide on both sides.
            window_size=(self.window_left, self.window_left),
            softcap=self.logits_soft_cap,
            num_splits=0,
            sinks=self.sinks,
            out=output[: step.num_actual_tokens],
            batch_invariant=self.batch_invariant,
            **scales,
        )
        return output

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write the step's keys and values into their slots, by vLLM's own kernel."""
        triton_reshape_and_cache_flash(
            key,
            value,
            *self._caches(kv_cache),
            slot_mapping,
            self.kv_cache_dtype,
            layer._k_scale,
            layer._v_scale,
        )

    def _caches(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each (blocks, block_size, kv_heads, head_size)."""
        if self.kv_cache_dtype in _FLOAT8:
            kv_cache = kv_cache.view(current_platform.fp8_dtype())
        k_cache, v_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        return k_cache, v_cache

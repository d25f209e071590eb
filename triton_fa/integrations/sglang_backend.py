"""The attention backend `triton_fa` for SGLang 0.5.23; `integrations.sglang` registers it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from triton_fa.integrations import FeatureError, require
from triton_fa.integrations.sglang import BACKEND_VERSIONS, NAME

require("sglang", BACKEND_VERSIONS)

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.kv_loc_plan import IdSpaceKind
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.runtime_context import get_exec, get_parallel, get_spec

from triton_fa.api import flash_attn_with_kvcache
from triton_fa.planner import StepPlanner, StepSchedules

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Step:
    """What the layers of one step share. In graphs, views of memory that every replay refills."""

    cache_seqlens: torch.Tensor  # (batch,) int32, new tokens included
    cu_seqlens_q: torch.Tensor  # (batch + 1,) int32
    max_seqlen_q: int
    page_table: torch.Tensor  # (batch, pages) int32
    # Hybrid pools keep the sliding-window layers' tokens elsewhere.
    window_page_table: torch.Tensor | None  # (batch, pages) int32
    window_slots: torch.Tensor | None  # (tokens,) int64, where new ones are written
    schedules: StepSchedules


@dataclass(frozen=True)
class _GraphMemory:
    """What captured graphs read by address."""

    cache_seqlens: torch.Tensor
    page_table: torch.Tensor
    window_page_table: torch.Tensor | None
    window_slots: torch.Tensor | None
    cu_seqlens_q: dict[int, torch.Tensor]  # by the query length that all requests have


class TritonFABackend(AttentionBackend):  # type: ignore[misc]  # SGLang's class is not analysed
    """Attention of a model runner over SGLang's paged pools."""

    # Lengths are read on the device; the host's copy only narrows eager page tables.
    needs_cpu_seq_lens: bool = False
    # The planner's buffers are as large as the pool of requests.
    extend_dummy_seqs_capped_by_req_pool: bool = True
    forward_metadata: Step | None

    _supported_kv_dtypes: ClassVar[tuple[torch.dtype, ...]] = (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        *_FLOAT8,
    )

    def __init__(self, model_runner: Any) -> None:
        """Read the model's shapes and settings.

        Args:
            model_runner: SGLang's, with its model loaded and its pools allocated.

        Raises:
            FeatureError: they need what is not here, by name.
        """
        super().__init__()
        for what in _unsupported(model_runner):
            raise _error(what)
        config = model_runner.model_config
        self.device = model_runner.device
        self.page_size: int = model_runner.page_size
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.kv_index_translator = model_runner.kv_index_translator
        self.kv_cache_dtype = model_runner.kv_cache_dtype
        # One slot of each page: (requests, pages), a view.
        self._first_slots = self.req_to_token_pool.req_to_token[:, :: self.page_size]
        self._has_window_pool = (
            self.kv_index_translator.space(IdSpaceKind.SLIDING_WINDOW) is not None
        )
        self._batch_invariant = bool(get_exec().deterministic.enable_deterministic_inference)
        self._attention_chunk = _attention_chunk(model_runner)
        window = model_runner.sliding_window_size
        # Of the layers that the second schedule is for: (window, chunk).
        has_windows = window is not None and window >= 0
        self._local = (window, 0) if has_windows else (-1, self._attention_chunk)
        tensor_parallel = get_parallel().attn_tp_size
        text = config.hf_text_config
        self._heads = (
            text.num_attention_heads // tensor_parallel,
            config.get_num_kv_heads(tensor_parallel),
            config.head_dim,
            bool(getattr(text, "attn_logit_softcapping", None)),
        )
        self._planner = self._make_planner(self._first_slots.shape[0])
        self._memory: _GraphMemory | None = None
        self.forward_metadata = None

    def _make_planner(self, max_batch: int) -> StepPlanner:
        heads, heads_kv, head_dim, has_softcap = self._heads
        window, chunk = self._local
        return StepPlanner(
            max_batch,
            heads,
            heads_kv,
            head_dim,
            dtype=self.kv_cache_dtype,
            page_size=self.page_size,
            window_size=(window, 0) if window >= 0 else None,
            attention_chunk=chunk,
            has_softcap=has_softcap,
            batch_invariant=self._batch_invariant,
            device=self.device,
        )

    # A step's metadata

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """The metadata of a step that runs without a graph."""
        mode = forward_batch.forward_mode
        if mode.is_idle():
            self.forward_metadata = None
            return
        batch = forward_batch.batch_size
        length = _uniform_query_length(forward_batch)
        if length is not None:
            cu_seqlens_q = self._uniform_starts(batch, length)
            added = length if mode.is_target_verify() else 0
        else:
            length = max(forward_batch.extend_seq_lens_cpu)
            cu_seqlens_q = torch.nn.functional.pad(
                forward_batch.extend_seq_lens.cumsum(0, dtype=torch.int32), (1, 0)
            )
            added = 0
        pages = self._first_slots.shape[1]
        on_host = forward_batch.seq_lens_cpu
        if on_host is not None and on_host.numel():
            pages = min(pages, -(-(int(on_host.max()) + added) // self.page_size))
        page_table, window_page_table = self._page_tables(forward_batch.req_pool_indices, pages)
        self._set_step(
            (forward_batch.seq_lens + added).int(),
            cu_seqlens_q,
            length,
            page_table,
            window_page_table,
            self._window_slots(forward_batch),
        )

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what graphs of up to so many requests and tokens read."""
        if max_bs > self._planner.max_batch:
            self._planner = self._make_planner(max_bs)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        pages = self._first_slots.shape[1]
        has_window = self._has_window_pool
        self._memory = _GraphMemory(
            cache_seqlens=zeros(max_bs),
            page_table=zeros(max_bs, pages),
            window_page_table=zeros(max_bs, pages) if has_window else None,
            window_slots=zeros(max_num_tokens, dtype=torch.int64) if has_window else None,
            cu_seqlens_q={},
        )

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """The length of requests that only fill up a graph's batch."""
        return 1

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Refill what a graph reads, before its capture and before each replay.

        Raises:
            FeatureError: the graph is not of decoding or of verification.
        """
        length = _uniform_query_length(forward_batch)
        if length is None:
            raise FeatureError("full CUDA graphs of prefill: expected breakable ones, or none")
        memory = self._memory
        assert memory is not None  # SGLang allocates before it captures
        batch = forward_batch.batch_size
        added = length if forward_batch.forward_mode.is_target_verify() else 0
        if length not in memory.cu_seqlens_q:
            most = memory.cache_seqlens.shape[0]
            memory.cu_seqlens_q[length] = self._uniform_starts(most, length)
        cache_seqlens = memory.cache_seqlens[:batch]
        cache_seqlens.copy_(forward_batch.seq_lens[:batch] + added)
        page_table = memory.page_table[:batch]
        window_page_table = window_slots = None
        pages, window_pages = self._page_tables(
            forward_batch.req_pool_indices[:batch], page_table.shape[1]
        )
        page_table.copy_(pages)
        if window_pages is not None:
            assert memory.window_page_table is not None
            assert memory.window_slots is not None
            window_page_table = memory.window_page_table[:batch]
            window_page_table.copy_(window_pages)
            window_slots = memory.window_slots
            # Slot 0 is nobody's: capture writes there, and so do requests that fill up.
            window_slots.zero_()
            slots = None if in_capture else self._window_slots(forward_batch)
            if slots is not None:
                window_slots[: slots.shape[0]].copy_(slots)
        self._set_step(
            cache_seqlens,
            memory.cu_seqlens_q[length][: batch + 1],
            length,
            page_table,
            window_page_table,
            window_slots,
        )

    def _set_step(
        self,
        cache_seqlens: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        max_seqlen_q: int,
        page_table: torch.Tensor,
        window_page_table: torch.Tensor | None,
        window_slots: torch.Tensor | None,
    ) -> None:
        schedules = self._planner.plan(
            cache_seqlens,
            max_seqlen_k=page_table.shape[1] * self.page_size,
            max_seqlen_q=max_seqlen_q,
            cu_seqlens_q=cu_seqlens_q,
        )
        self.forward_metadata = Step(
            cache_seqlens,
            cu_seqlens_q,
            max_seqlen_q,
            page_table,
            window_page_table,
            window_slots,
            schedules,
        )

    def _uniform_starts(self, batch: int, length: int) -> torch.Tensor:
        end = batch * length + 1
        return torch.arange(0, end, length, dtype=torch.int32, device=self.device)

    def _page_tables(
        self, requests: torch.Tensor, pages: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of the full-attention layers, and of the sliding-window layers of a hybrid pool."""
        slots = self._first_slots[:, :pages].index_select(0, requests)
        page_table = (slots // self.page_size).int()
        if not self._has_window_pool:
            return page_table, None
        slots = self.token_to_kv_pool.translate_loc_from_full_to_swa(slots)
        return page_table, (slots // self.page_size).int()

    def _window_slots(self, forward_batch: Any) -> torch.Tensor | None:
        if not self._has_window_pool:
            return None
        slots: torch.Tensor | None = self.kv_index_translator.write_ids(
            forward_batch, IdSpaceKind.SLIDING_WINDOW
        )
        return slots

    # A layer

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        *,
        sinks: torch.Tensor | None = None,
        **unsupported: Any,
    ) -> torch.Tensor:
        """One new token per request; as `forward_extend`."""
        return self.forward_extend(
            q, k, v, layer, forward_batch, save_kv_cache, sinks=sinks, **unsupported
        )

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        *,
        sinks: torch.Tensor | None = None,
        **unsupported: Any,
    ) -> torch.Tensor:
        """Write the new keys, then attend over the cache.

        Args:
            q: (tokens, heads * head_dim) or (tokens, heads, head_dim).
            k: (tokens, kv_heads, head_dim); None where layers share a cache.
            v: As k.
            layer: Heads, scale, window and softcap.
            forward_batch: Where new keys are written.
            save_kv_cache: Whether they are.
            sinks: (heads,) logits.
            **unsupported: What other backends take; refused unless it is off.

        Returns:
            (tokens, heads * v_head_dim).
        """
        for name, value in unsupported.items():
            if value is not None and value is not False:
                raise _error(name)
        step = self.forward_metadata
        assert step is not None  # SGLang makes it once per step
        if save_kv_cache and k is not None:
            self.token_to_kv_pool.set_kv_buffer(
                layer,
                KVWriteLoc.for_layer(forward_batch, layer, swa_loc=step.window_slots),
                k,
                v,
                layer.k_scale,
                layer.v_scale,
            )
        k_cache, v_cache = (
            self._paged(cache, heads, dim)
            for cache, heads, dim in zip(
                self.token_to_kv_pool.get_kv_buffer(layer.layer_id),
                (layer.tp_k_head_num, layer.tp_v_head_num),
                (layer.qk_head_dim, layer.v_head_dim),
                strict=True,
            )
        )
        causal = layer.attn_type != AttentionType.DECODER_BIDIRECTIONAL
        # SGLang's windows do not count the query's own key.
        window = layer.sliding_window_size if layer.sliding_window_size is not None else -1
        chunk = self._attention_chunk if layer.use_irope else 0
        is_local = window >= 0 or chunk > 0
        table = step.page_table
        if is_local and step.window_page_table is not None:
            table = step.window_page_table
        scales = {}
        if self.kv_cache_dtype in _FLOAT8:
            shape = (step.cache_seqlens.shape[0], layer.tp_k_head_num)
            for name, scale in (("k_descale", layer.k_scale), ("v_descale", layer.v_scale)):
                if scale is not None:
                    scales[name] = scale.expand(shape)
        out = flash_attn_with_kvcache(
            q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim),
            k_cache,
            v_cache,
            cache_seqlens=step.cache_seqlens,
            page_table=table,
            cu_seqlens_q=step.cu_seqlens_q,
            max_seqlen_q=step.max_seqlen_q,
            softmax_scale=layer.scaling,
            causal=causal,
            window_size=(window, 0 if causal else window),
            attention_chunk=chunk,
            softcap=layer.logit_cap or 0.0,
            scheduler_metadata=self._schedule(layer, step, causal, window, chunk),
            sinks=sinks,
            batch_invariant=self._batch_invariant,
            **scales,
        )
        assert isinstance(out, torch.Tensor)
        return out.flatten(1)

    def _paged(self, cache: torch.Tensor, heads: int, head_dim: int) -> torch.Tensor:
        """A layer's pool as (pages, page_size, heads, head_dim), by strides."""
        if cache.dim() == 4:  # (pages, heads, page_size, head_dim)
            return cache.transpose(1, 2)
        slots = cache.shape[0]
        return cache.view(slots, heads, head_dim).view(-1, self.page_size, heads, head_dim)

    def _schedule(
        self, layer: Any, step: Step, causal: bool, window: int, chunk: int
    ) -> torch.Tensor | None:
        """The step's, if it was made for layers like this one."""
        heads = (layer.tp_q_head_num, layer.tp_k_head_num, layer.qk_head_dim, layer.logit_cap > 0)
        if not causal or heads != self._heads or layer.v_head_dim != layer.qk_head_dim:
            return None
        if window < 0 and chunk == 0:
            return step.schedules.full
        return step.schedules.sliding if (window, chunk) == self._local else None


def _uniform_query_length(forward_batch: Any) -> int | None:
    """Of a step of decoding or of verifying drafts; None for prefill."""
    mode = forward_batch.forward_mode
    if mode.is_decode():
        if forward_batch.spec_info is not None:
            raise FeatureError("decoding of drafts: expected another draft attention backend")
        return 1
    if mode.is_target_verify():
        return int(forward_batch.spec_info.draft_token_num)
    if mode.is_draft_extend_v2() or mode.is_dllm_extend():
        raise _error(mode.name)
    return None


def _attention_chunk(runner: Any) -> int:
    if not runner.model_config.is_local_attention_model:
        return 0
    return int(runner.attention_chunk_size or 0)


def _error(what: str) -> FeatureError:
    return FeatureError(f"{what}: not supported by the attention backend {NAME}")


def _unsupported(runner: Any) -> Iterator[str]:
    """What the runner needs and is not here."""
    config = runner.model_config
    if runner.use_mla_backend:
        yield "multi-head latent attention (MLA)"
    if config.is_encoder_decoder:
        yield "encoder-decoder models (cross attention)"
    if runner.is_draft_worker:
        yield "draft models (choose --speculative-draft-attention-backend)"
    algorithm = runner.spec_algorithm
    if not (algorithm.is_none() or algorithm.is_eagle() or algorithm.is_standalone()):
        yield f"speculative algorithm {algorithm.name}"
    if (get_spec().speculative_eagle_topk or 0) > 1:
        yield "trees of drafts (--speculative-eagle-topk above 1)"
    if get_parallel().attn_dcp_size > 1:
        yield "decode context parallelism"
    if runner.kv_index_translator.is_translating:
        yield "--enable-unified-memory"
    if getattr(runner, "prefill_aware_swa", False):
        yield "prefill-aware sliding windows"
    cache_dtype = runner.kv_cache_dtype
    if (
        cache_dtype not in TritonFABackend._supported_kv_dtypes
        or runner.kv_cache_dtype_str.startswith(("mx", "fp4", "nvfp4"))
    ):
        yield f"--kv-cache-dtype {runner.kv_cache_dtype_str}"
    if cache_dtype != runner.dtype and (
        cache_dtype not in _FLOAT8 or runner.dtype == torch.float32
    ):
        yield f"a cache of {cache_dtype} beside queries of {runner.dtype}"
    for name, layer in runner.model.named_modules():
        if isinstance(layer, RadixAttention):
            for what in _unsupported_of_layer(layer):
                yield f"{name}: {what}"


def _unsupported_of_layer(layer: Any) -> Iterator[str]:
    if layer.is_cross_attention:
        yield "cross attention"
    if layer.attn_type == AttentionType.ENCODER_ONLY:
        yield "encoder-only attention"
    for dim in (layer.qk_head_dim, layer.v_head_dim):
        if dim % 8 or not 8 <= dim <= 256:
            yield f"head size {dim} (expected a multiple of 8 up to 256)"
    if layer.logit_cap > 0 and layer.logit_capping_method != "tanh":
        yield f"logit_capping_method {layer.logit_capping_method}"
    if layer.pos_encoding_mode != "NONE":
        yield f"pos_encoding_mode {layer.pos_encoding_mode}"
    if (layer.xai_temperature_len or -1) > 0:
        yield "xai_temperature_len"

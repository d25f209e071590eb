"""The backend for SGLang as a model runner uses it: metadata of a step, layers, graphs.

On a GPU the graphs are CUDA's. On a CPU a graph is what was captured, run again: the same tensors
and the same numbers on the host, whatever the step is.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import reference
from tests.integrations import stub_sglang
from triton_fa.integrations import FeatureError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32
# Weights and results below 4, each rounded to float16; or float32 sums of a few dozen numbers.
ATOL = 2 * 4 * 2**-10 if DEVICE == "cuda" else 5e-6
HEADS, HEADS_KV, HEAD_DIM, SCALE = 4, 2, 16, 0.3
REQUESTS, CONTEXT = 4, 24
MODULES = ("triton_fa.integrations.sglang", "triton_fa.integrations.sglang_backend")


def _importable() -> bool:
    if importlib.util.find_spec("sglang") is None:
        return False
    try:
        importlib.import_module("sglang.srt.layers.attention.base_attn_backend")
    except ImportError:
        return False
    return True


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    """Our module, on SGLang itself or on what stands in for it."""
    stubs = {} if _importable() else stub_sglang.modules()
    for name in MODULES:
        sys.modules.pop(name, None)
    before = {n: m for n, m in sys.modules.items() if stubs and n.partition(".")[0] == "sglang"}
    for name in before:
        del sys.modules[name]
    sys.modules.update(stubs)
    try:
        yield importlib.import_module(MODULES[1])
    finally:
        for name in [*stubs, *MODULES]:
            sys.modules.pop(name, None)
        sys.modules.update(before)


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def settings(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What SGLang publishes when it starts."""
    made = SimpleNamespace(
        deterministic=SimpleNamespace(enable_deterministic_inference=False),
        attn_tp_size=1,
        attn_dcp_size=1,
        speculative_eagle_topk=None,
    )
    for name in ("get_exec", "get_parallel", "get_spec"):
        monkeypatch.setattr(module, name, lambda: made)
    return made


def enum(name: str) -> Any:
    where = {
        "ForwardMode": "sglang.srt.model_executor.forward_batch_info",
        "SpeculativeAlgorithm": "sglang.srt.speculative.spec_info",
        "AttentionType": "sglang.srt.layers.radix_attention",
    }
    return getattr(importlib.import_module(where[name]), name)


def mode(name: str) -> Any:
    return enum("ForwardMode")[name]


def ints(values: Any, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


class Pool:
    """Keys and values of each layer by slots; sliding-window layers have slots of their own."""

    def __init__(self, layers: list[Any], slots: int, page_size: int, hybrid: bool) -> None:
        self.hybrid = hybrid
        pages = 1 + torch.randperm(slots // page_size - 1)
        moved = torch.cat([torch.zeros(1, dtype=torch.int64), pages])
        offsets = torch.arange(page_size)
        self.to_window = (moved[:, None] * page_size + offsets).flatten().to(DEVICE)
        self.buffers = [
            tuple(
                torch.full((slots, heads, dim), torch.nan, dtype=DTYPE, device=DEVICE)
                for heads, dim in (
                    (layer.tp_k_head_num, layer.qk_head_dim),
                    (layer.tp_v_head_num, layer.v_head_dim),
                )
            )
            for layer in layers
        ]

    def is_window(self, layer: Any) -> bool:
        return self.hybrid and (layer.sliding_window_size > -1 or layer.use_irope)

    def translate_loc_from_full_to_swa(self, slots: torch.Tensor) -> torch.Tensor:
        assert self.hybrid
        return self.to_window[slots]

    def get_kv_buffer(self, layer_id: int) -> tuple[torch.Tensor, ...]:
        return self.buffers[layer_id]

    def set_kv_buffer(
        self,
        layer: Any,
        loc_info: Any,
        cache_k: torch.Tensor,
        cache_v: torch.Tensor,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
    ) -> None:
        slots = loc_info.swa_loc if self.is_window(layer) else loc_info.loc
        assert slots.shape[0] == cache_k.shape[0]
        for buffer, new, scale in zip(
            self.get_kv_buffer(layer.layer_id),
            (cache_k, cache_v),
            (k_scale, v_scale),
            strict=True,
        ):
            scaled = new if scale is None or buffer.dtype == new.dtype else new / scale
            buffer[slots] = scaled.to(buffer.dtype)


def layer(layer_id: int, window: int = -1, **options: Any) -> Any:
    radix = importlib.import_module("sglang.srt.layers.radix_attention").RadixAttention
    arguments = {
        "num_heads": HEADS,
        "head_dim": HEAD_DIM,
        "scaling": SCALE,
        "num_kv_heads": HEADS_KV,
        "layer_id": layer_id,
        "sliding_window_size": window,
    }
    return radix(**(arguments | options))


class Engine:
    """A model runner and its requests, with every key and value that a request has so far."""

    def __init__(
        self,
        module: ModuleType,
        layers: list[Any],
        *,
        page_size: int = 4,
        hybrid: bool = False,
        **changes: Any,
    ) -> None:
        torch.manual_seed(0)
        self.layers, self.page_size = layers, page_size
        row_pages = CONTEXT // page_size
        slots = page_size * (1 + REQUESTS * row_pages)
        self.pool = Pool(layers, slots, page_size, hybrid)
        # Row 0 is SGLang's for requests that fill up; slot 0 is nobody's.
        pages = 1 + torch.randperm(REQUESTS * row_pages).view(REQUESTS, row_pages)
        table = (pages[..., None] * page_size + torch.arange(page_size)).flatten(1)
        rows = torch.cat([torch.zeros(1, CONTEXT, dtype=torch.int64), table])
        self.req_to_token = rows.int().to(DEVICE)
        kinds = module.IdSpaceKind
        translator = SimpleNamespace(
            is_translating=False,
            space=lambda kind: None if kind == kinds.SLIDING_WINDOW and not hybrid else "space",
            write_ids=lambda batch, kind: self.pool.to_window[batch.out_cache_loc],
        )
        windows = [x.sliding_window_size for x in layers if x.sliding_window_size > -1]
        text = SimpleNamespace(num_attention_heads=HEADS, attn_logit_softcapping=None)
        self.runner = SimpleNamespace(
            device=DEVICE,
            dtype=DTYPE,
            kv_cache_dtype=DTYPE,
            kv_cache_dtype_str="auto",
            page_size=page_size,
            use_mla_backend=False,
            is_draft_worker=False,
            spec_algorithm=enum("SpeculativeAlgorithm").NONE,
            sliding_window_size=windows[0] if windows else None,
            attention_chunk_size=None,
            token_to_kv_pool=self.pool,
            req_to_token_pool=SimpleNamespace(req_to_token=self.req_to_token, size=REQUESTS),
            kv_index_translator=translator,
            model=torch.nn.ModuleList(layers),
            model_config=SimpleNamespace(
                is_encoder_decoder=False,
                is_local_attention_model=False,
                head_dim=HEAD_DIM,
                hf_text_config=text,
                get_num_kv_heads=lambda tensor_parallel: HEADS_KV // tensor_parallel,
            ),
        )
        vars(self.runner).update(changes)
        self.lengths = [0] * (REQUESTS + 1)
        self.history = [
            [
                (
                    torch.empty(0, x.tp_k_head_num, x.qk_head_dim, dtype=DTYPE, device=DEVICE),
                    torch.empty(0, x.tp_v_head_num, x.v_head_dim, dtype=DTYPE, device=DEVICE),
                )
                for _ in self.lengths
            ]
            for x in layers
        ]
        self.backend = module.TritonFABackend(self.runner)

    def batch(self, name: str, new: dict[int, int]) -> Any:
        """Some new tokens of some requests, as SGLang describes them."""
        requests, counts = list(new), list(new.values())
        before = [self.lengths[r] for r in requests]
        after = [b + n for b, n in zip(before, counts, strict=True)]
        verifies = name == "TARGET_VERIFY"
        slots = [self.req_to_token[r, b:a] for r, b, a in zip(requests, before, after, strict=True)]
        lengths = before if verifies else after
        return SimpleNamespace(
            forward_mode=mode(name),
            batch_size=len(requests),
            req_pool_indices=ints(requests),
            seq_lens=ints(lengths),
            seq_lens_cpu=torch.tensor(lengths),
            extend_seq_lens=ints(counts, torch.int32),
            extend_seq_lens_cpu=counts,
            extend_prefix_lens_cpu=before,
            out_cache_loc=torch.cat(slots).long(),
            out_cache_loc_is_physical=True,
            encoder_lens=None,
            spec_info=SimpleNamespace(draft_token_num=counts[0]) if verifies else None,
        )

    def inputs(self, tokens: int) -> list[tuple[torch.Tensor, ...]]:
        """q, k and v of each layer, as a projection gives them."""

        def random(heads: int, dim: int) -> torch.Tensor:
            return torch.randn(tokens, heads * dim, dtype=DTYPE, device=DEVICE)

        return [
            (
                random(x.tp_q_head_num, x.qk_head_dim),
                random(x.tp_k_head_num, x.qk_head_dim).view(tokens, x.tp_k_head_num, x.qk_head_dim),
                random(x.tp_v_head_num, x.v_head_dim).view(tokens, x.tp_v_head_num, x.v_head_dim),
            )
            for x in self.layers
        ]

    def forward(
        self, batch: Any, inputs: list[tuple[torch.Tensor, ...]], **options: Any
    ) -> list[torch.Tensor]:
        """What a model's layers do."""
        return [
            self.backend.forward(q, k, v, x, batch, **options)
            for x, (q, k, v) in zip(self.layers, inputs, strict=True)
        ]

    def wanted(
        self, new: dict[int, int], inputs: list[tuple[torch.Tensor, ...]], **options: Any
    ) -> list[torch.Tensor]:
        """Each request alone, dense, in float64; then its keys belong to its history."""
        bidirectional = enum("AttentionType").DECODER_BIDIRECTIONAL
        results = []
        for x, past, (q, k, v) in zip(self.layers, self.history, inputs, strict=True):
            causal = x.attn_type != bidirectional
            window, chunk = x.sliding_window_size, self.runner.attention_chunk_size
            rules = {
                "softmax_scale": SCALE,
                "causal": causal,
                "window_size": (window, 0 if causal else window),
                "softcap": x.logit_cap,
                "attention_chunk": chunk if x.use_irope else 0,
            }
            rows, begin = [], 0
            for request, count in new.items():
                part = slice(begin, begin + count)
                begin += count
                keys, values = (
                    torch.cat([old, fresh[part]])
                    for old, fresh in zip(past[request], (k, v), strict=True)
                )
                past[request] = keys, values
                heads = q[part].view(count, x.tp_q_head_num, x.qk_head_dim)
                out, _ = reference.flash_attn_func(
                    *(t[None].double() for t in (heads, keys, values)), **rules, **options
                )
                rows.append(out[0].flatten(1))
            results.append(torch.cat(rows))
        for request, count in new.items():
            self.lengths[request] += count
        return results

    def step(self, name: str, new: dict[int, int], **options: Any) -> None:
        """One without a graph, judged."""
        batch, inputs = self.batch(name, new), self.inputs(sum(new.values()))
        self.backend.init_forward_metadata(batch)
        found = self.forward(batch, inputs, **options)
        self.judge(found, self.wanted(new, inputs, **options))

    def judge(self, found: list[torch.Tensor], want: list[torch.Tensor]) -> None:
        for x, y in zip(found, want, strict=True):
            torch.testing.assert_close(x.double(), y.double(), rtol=0, atol=ATOL)

    def reject(self, new: dict[int, int]) -> None:
        """Forget the last tokens of some requests, as after a verification."""
        for request, count in new.items():
            self.lengths[request] -= count
            for past in self.history:
                keys, values = past[request]
                past[request] = keys[:-count], values[:-count]


class Graph:
    """One that SGLang's runner captures for a batch size, over memory of its own."""

    def __init__(self, engine: Engine, name: str, batch_size: int, length: int) -> None:
        self.engine, self.length = engine, length
        tokens = batch_size * length
        self.inputs = engine.inputs(tokens)
        self.static = SimpleNamespace(
            forward_mode=mode(name),
            batch_size=batch_size,
            req_pool_indices=ints([0] * batch_size),
            seq_lens=ints([engine.backend.get_cuda_graph_seq_len_fill_value()] * batch_size),
            seq_lens_cpu=None,
            out_cache_loc=ints([0] * tokens),
            out_cache_loc_is_physical=True,
            encoder_lens=None,
            spec_info=SimpleNamespace(draft_token_num=length) if name != "DECODE" else None,
        )
        backend = engine.backend
        backend.init_forward_metadata_out_graph(self.static, in_capture=True)
        self.step = backend.forward_metadata
        self.run = self._capture()

    def _capture(self) -> Callable[[], list[torch.Tensor]]:
        backend = self.engine.backend

        def run() -> list[torch.Tensor]:
            backend.forward_metadata = self.step
            backend.init_forward_metadata_in_graph(self.static)
            return self.engine.forward(self.static, self.inputs)

        if DEVICE == "cpu":
            return run
        run()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()

        def replay() -> list[torch.Tensor]:
            graph.replay()
            return outputs

        return replay

    def replay(self, new: dict[int, int]) -> None:
        """One step of fewer requests than the graph has, judged."""
        engine, static = self.engine, self.static
        name = static.forward_mode.name
        batch, tokens = engine.batch(name, new), len(new) * self.length
        inputs = engine.inputs(tokens)
        for whole, part in zip(self.inputs, inputs, strict=True):
            for to, x in zip(whole, part, strict=True):
                to[:tokens].copy_(x)
        fill = engine.backend.get_cuda_graph_seq_len_fill_value()
        for to, x, rest in (
            (static.req_pool_indices, batch.req_pool_indices, 0),
            (static.seq_lens, batch.seq_lens, fill),
            (static.out_cache_loc, batch.out_cache_loc, 0),
        ):
            to.fill_(rest)
            to[: x.shape[0]].copy_(x)
        view = SimpleNamespace(**vars(static))
        view.out_cache_loc, view.spec_info = batch.out_cache_loc, batch.spec_info
        engine.backend.init_forward_metadata_out_graph(view)
        found = self.run()
        engine.judge([x[:tokens] for x in found], engine.wanted(new, inputs))


@pytest.mark.parametrize(
    ("page_size", "window", "hybrid"), [(1, -1, False), (4, 3, False), (4, 5, True)]
)
def test_prefill_decode_and_verification(
    module: ModuleType, settings: Any, page_size: int, window: int, hybrid: bool
) -> None:
    engine = Engine(module, [layer(0), layer(1, window)], page_size=page_size, hybrid=hybrid)
    engine.step("EXTEND", {1: 5, 3: 9})
    engine.step("DECODE", {3: 1, 1: 1})
    # One request begins, one has a cached prefix, one decodes among them.
    engine.step("MIXED", {2: 4, 1: 6, 3: 1})
    engine.step("TARGET_VERIFY", {1: 3, 2: 3, 3: 3})
    engine.reject({1: 2, 3: 1})
    engine.step("TARGET_VERIFY", {3: 3, 1: 3})
    engine.step("DECODE", {1: 1, 2: 1, 3: 1})


def test_the_hybrid_pool_of_sglang(module: ModuleType, settings: Any) -> None:
    """SGLang's own pool, and what it translates slots with."""
    if not hasattr(module.KVWriteLoc, "for_batch"):
        pytest.skip("SGLang is not installed")
    pools = importlib.import_module("sglang.srt.mem_cache.swa_memory_pool")
    translators = importlib.import_module("sglang.srt.mem_cache.kv_index_translator")
    engine = Engine(module, [layer(0), layer(1, 5), layer(2, 5)], hybrid=True)
    slots = engine.pool.to_window.shape[0]
    pool = pools.SWAKVPool(
        size=slots - engine.page_size,
        size_swa=slots - engine.page_size,
        page_size=engine.page_size,
        dtype=DTYPE,
        head_num=HEADS_KV,
        head_dim=HEAD_DIM,
        swa_attention_layer_ids=[1, 2],
        full_attention_layer_ids=[0],
        device=DEVICE,
        enable_alt_stream=False,
    )
    pool.register_mapping(torch.cat([engine.pool.to_window, ints([-1])]))
    translator = translators.KVIndexTranslator(
        req_to_token=engine.req_to_token,
        token_to_kv_pool_allocator=SimpleNamespace(),
        token_to_kv_pool=pool,
        page_size=engine.page_size,
        device=DEVICE,
    )
    engine.runner.token_to_kv_pool = pool
    engine.runner.kv_index_translator = translator
    engine.backend = module.TritonFABackend(engine.runner)
    describe = engine.batch

    def bound(name: str, new: dict[int, int]) -> Any:
        batch = describe(name, new)
        translator.own_plan(batch).bind(batch, translator)
        return batch

    engine.batch = bound  # type: ignore[method-assign]
    engine.step("EXTEND", {1: 5, 3: 9})
    engine.step("EXTEND", {1: 4})
    engine.step("DECODE", {3: 1, 1: 1})
    engine.step("TARGET_VERIFY", {1: 3, 3: 3})


def test_lengths_known_on_the_device_only(module: ModuleType, settings: Any) -> None:
    """With SGLang's overlapping scheduler the host may have no copy."""
    engine = Engine(module, [layer(0)])
    engine.step("EXTEND", {1: 5, 2: 7})
    batch, inputs = engine.batch("DECODE", {1: 1, 2: 1}), engine.inputs(2)
    batch.seq_lens_cpu = None
    engine.backend.init_forward_metadata(batch)
    engine.judge(engine.forward(batch, inputs), engine.wanted({1: 1, 2: 1}, inputs))


@pytest.mark.parametrize("hybrid", [False, True])
def test_graphs(module: ModuleType, settings: Any, hybrid: bool) -> None:
    """Captured once; replayed between other steps, with other requests, lengths and pages."""
    engine = Engine(module, [layer(0), layer(1, 5)], hybrid=hybrid)
    engine.backend.init_cuda_graph_state(4, 12)
    verification = Graph(engine, "TARGET_VERIFY", 2, 3)
    decode = Graph(engine, "DECODE", 4, 1)
    engine.step("EXTEND", {1: 6, 2: 3, 4: 9})
    decode.replay({1: 1, 2: 1, 4: 1})
    verification.replay({4: 3, 2: 3})
    engine.reject({4: 2})
    engine.step("EXTEND", {3: 7})
    decode.replay({4: 1, 3: 1, 1: 1, 2: 1})
    verification.replay({1: 3})
    decode.replay({1: 1})


def test_a_graph_reads_the_same_memory(module: ModuleType, settings: Any) -> None:
    engine = Engine(module, [layer(0, 5)], hybrid=True)
    engine.backend.init_cuda_graph_state(4, 12)
    graph = Graph(engine, "DECODE", 2, 1)

    def addresses(step: Any) -> list[int]:
        tensors = [x for x in vars(step).values() if isinstance(x, torch.Tensor)]
        assert len(tensors) == 5
        return [x.data_ptr() for x in [*tensors, *step.schedules]]

    captured = addresses(graph.step)
    engine.step("EXTEND", {1: 6, 2: 3})
    graph.replay({2: 1, 1: 1})
    assert addresses(engine.backend.forward_metadata) == captured
    assert engine.backend.forward_metadata.max_seqlen_q == graph.step.max_seqlen_q
    # Where requests that fill up write stays nobody's slot.
    graph.replay({1: 1})
    assert graph.step.window_slots[1:].eq(0).all()


def test_sinks_and_softcap(module: ModuleType, settings: Any) -> None:
    sinks = torch.randn(HEADS, dtype=DTYPE, device=DEVICE)
    engine = Engine(module, [layer(0, logit_cap=4.0), layer(1, 3, logit_cap=4.0)])
    engine.step("EXTEND", {1: 5, 2: 2}, sinks=sinks)
    engine.step("DECODE", {1: 1, 2: 1}, sinks=sinks)


def test_chunks(module: ModuleType, settings: Any) -> None:
    """Llama 4: layers with rotary embeddings attend inside chunks."""
    engine = Engine(
        module, [layer(0), layer(1, use_irope=True)], hybrid=True, attention_chunk_size=4
    )
    engine.runner.model_config.is_local_attention_model = True
    engine.backend = module.TritonFABackend(engine.runner)
    engine.step("EXTEND", {1: 6, 2: 3})
    engine.step("EXTEND", {1: 5, 2: 1})
    engine.step("DECODE", {1: 1, 2: 1})


def test_bidirectional_layers(module: ModuleType, settings: Any) -> None:
    kind = enum("AttentionType").DECODER_BIDIRECTIONAL
    engine = Engine(module, [layer(0, attn_type=kind), layer(1, 3, attn_type=kind)])
    engine.step("EXTEND", {1: 6, 2: 3})


def test_values_of_another_size(module: ModuleType, settings: Any) -> None:
    engine = Engine(module, [layer(0, v_head_dim=8)])
    engine.step("EXTEND", {1: 6, 2: 3})
    engine.step("DECODE", {1: 1, 2: 1})


def test_float8_cache(module: ModuleType, settings: Any) -> None:
    cache_dtype = torch.float8_e4m3fn
    query_dtype = torch.bfloat16
    engine = Engine(
        module,
        [layer(0)],
        dtype=query_dtype,
        kv_cache_dtype=cache_dtype,
        kv_cache_dtype_str="fp8_e4m3",
    )
    x = engine.layers[0]
    x.k_scale, x.v_scale = (torch.tensor(s, device=DEVICE) for s in (0.5, 0.25))
    engine.pool.buffers = [tuple(b.nan_to_num().to(cache_dtype) for b in engine.pool.buffers[0])]
    for name, new in (("EXTEND", {1: 5, 2: 3}), ("DECODE", {1: 1, 2: 1})):
        batch, inputs = engine.batch(name, new), engine.inputs(sum(new.values()))
        inputs = [tuple(t.to(query_dtype) for t in inputs[0])]
        engine.backend.init_forward_metadata(batch)
        found = engine.forward(batch, inputs)
        rounded = [
            (t.float() / scale).to(cache_dtype).float() * scale
            for t, scale in zip(inputs[0][1:], (0.5, 0.25), strict=True)
        ]
        want = engine.wanted(new, [(inputs[0][0].float(), *rounded)])
        # Weights and results, below 4, are rounded to bfloat16.
        torch.testing.assert_close(found[0].double(), want[0], rtol=0, atol=2 * 4 * 2**-9)


def test_pools_by_heads(module: ModuleType, settings: Any) -> None:
    """Buffers of (pages, heads, page_size, head_dim)."""
    engine = Engine(module, [layer(0)])
    engine.step("EXTEND", {1: 5, 2: 3})
    by_heads = tuple(
        b.unflatten(0, (-1, engine.page_size)).transpose(1, 2).contiguous()
        for b in engine.pool.buffers[0]
    )
    engine.pool.buffers = [tuple(b.transpose(1, 2).flatten(0, 1) for b in by_heads)]
    batch, inputs = engine.batch("DECODE", {1: 1, 2: 1}), engine.inputs(2)
    engine.backend.init_forward_metadata(batch)
    for cache, new in zip(by_heads, inputs[0][1:], strict=True):
        for row, slot in enumerate(batch.out_cache_loc.tolist()):
            cache[slot // engine.page_size, :, slot % engine.page_size] = new[row]
    engine.pool.buffers = [by_heads]
    found = engine.forward(batch, inputs, save_kv_cache=False)
    engine.judge(found, engine.wanted({1: 1, 2: 1}, inputs))


def test_a_layer_that_shares_a_cache(module: ModuleType, settings: Any) -> None:
    engine = Engine(module, [layer(0)])
    batch, inputs = engine.batch("EXTEND", {1: 5}), engine.inputs(5)
    engine.backend.init_forward_metadata(batch)
    engine.forward(batch, inputs)
    found = engine.forward(batch, [(inputs[0][0], None, None)])  # type: ignore[list-item]
    engine.judge(found, engine.wanted({1: 5}, inputs))


def test_idle(module: ModuleType, settings: Any) -> None:
    """A rank without requests takes part without attention."""
    engine = Engine(module, [layer(0)])
    batch = SimpleNamespace(forward_mode=mode("IDLE"), batch_size=0)
    engine.backend.init_forward_metadata(batch)
    (found,) = engine.forward(batch, engine.inputs(0))
    assert found.shape == (0, HEADS * HEAD_DIM)


def test_schedules_are_made_once(
    module: ModuleType, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers with one window share one; layers of another shape or window have none."""
    kinds = [layer(0), layer(1, 5), layer(2), layer(3, 5), layer(4, 3), layer(5, logit_cap=2.0)]
    engine = Engine(module, [*kinds, layer(6, num_heads=8)])
    attend, passed = module.flash_attn_with_kvcache, []

    def spy(*arguments: Any, **options: Any) -> torch.Tensor:
        passed.append(options["scheduler_metadata"])
        assert options["batch_invariant"] is False
        result = attend(*arguments, **options)
        assert isinstance(result, torch.Tensor)
        return result

    monkeypatch.setattr(module, "flash_attn_with_kvcache", spy)
    engine.step("EXTEND", {1: 5, 2: 3})
    full, sliding = engine.backend.forward_metadata.schedules
    assert [x is full for x in passed] == [True, False, True, False, False, False, False]
    assert [x is sliding for x in passed] == [False, True, False, True, False, False, False]
    assert passed[4:] == [None, None, None]


def test_deterministic_inference(
    module: ModuleType, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.deterministic.enable_deterministic_inference = True
    engine, seen = Engine(module, [layer(0)]), []
    attend = module.flash_attn_with_kvcache

    def spy(*arguments: Any, **options: Any) -> Any:
        seen.append(options["batch_invariant"])
        return attend(*arguments, **options)

    monkeypatch.setattr(module, "flash_attn_with_kvcache", spy)
    engine.step("EXTEND", {1: 5, 2: 3})
    assert seen == [True]


RUNNERS: dict[str, dict[str, Any]] = {
    "MLA": {"use_mla_backend": True},
    "draft models": {"is_draft_worker": True},
    "prefill-aware": {"prefill_aware_swa": True},
    "unified-memory": {"kv_index_translator": SimpleNamespace(is_translating=True)},
    "kv-cache-dtype mxfp8": {"kv_cache_dtype_str": "mxfp8"},
    "kv-cache-dtype nvfp4": {"kv_cache_dtype": torch.uint8, "kv_cache_dtype_str": "nvfp4"},
    "a cache of torch.float16 beside": {"kv_cache_dtype": torch.float16, "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("message", RUNNERS)
def test_what_a_runner_may_not_ask(module: ModuleType, settings: Any, message: str) -> None:
    with pytest.raises(FeatureError, match=message):
        Engine(module, [layer(0)], **RUNNERS[message])


@pytest.mark.parametrize("name", ["DFLASH", "NGRAM"])
def test_algorithms_that_draft_otherwise(module: ModuleType, settings: Any, name: str) -> None:
    algorithms = enum("SpeculativeAlgorithm")
    with pytest.raises(FeatureError, match=f"speculative algorithm {name}"):
        Engine(module, [layer(0)], spec_algorithm=algorithms[name])
    Engine(module, [layer(0)], spec_algorithm=algorithms.EAGLE)


@pytest.mark.parametrize(
    ("setting", "message"),
    [("speculative_eagle_topk", "trees of drafts"), ("attn_dcp_size", "context parallelism")],
)
def test_settings_that_are_refused(
    module: ModuleType, settings: Any, setting: str, message: str
) -> None:
    setattr(settings, setting, 2)
    with pytest.raises(FeatureError, match=message):
        Engine(module, [layer(0)])


def test_encoder_decoder_models(module: ModuleType, settings: Any) -> None:
    engine = Engine(module, [layer(0)])
    engine.runner.model_config.is_encoder_decoder = True
    with pytest.raises(FeatureError, match="cross attention"):
        module.TritonFABackend(engine.runner)


LAYERS: dict[str, dict[str, Any]] = {
    "cross attention": {"is_cross_attention": True},
    "head size 20 ": {"head_dim": 20},
    "head size 320 ": {"v_head_dim": 320},
    "logit_capping_method sigmoid": {"logit_cap": 3.0, "logit_capping_method": "sigmoid"},
    "pos_encoding_mode ALIBI": {"pos_encoding_mode": "ALIBI"},
}


@pytest.mark.parametrize("message", LAYERS)
def test_what_a_layer_may_not_ask(module: ModuleType, settings: Any, message: str) -> None:
    """When the model is loaded, naming the layer."""
    with pytest.raises(FeatureError, match=f"^1: {message}"):
        Engine(module, [layer(0), layer(1, **LAYERS[message])])


def test_encoder_only_and_temperature(module: ModuleType, settings: Any) -> None:
    with pytest.raises(FeatureError, match=r"^0: encoder-only"):
        Engine(module, [layer(0, attn_type=enum("AttentionType").ENCODER_ONLY)])
    grok = layer(0)
    grok.xai_temperature_len = 1024
    with pytest.raises(FeatureError, match=r"^0: xai_temperature_len"):
        Engine(module, [grok])


def test_what_a_call_may_not_ask(module: ModuleType, settings: Any) -> None:
    engine = Engine(module, [layer(0)])
    batch, inputs = engine.batch("EXTEND", {1: 5}), engine.inputs(5)
    engine.backend.init_forward_metadata(batch)
    engine.forward(batch, inputs, score_mod=None, return_lse=False)
    for name in ("q_rope", "score_mod", "rel_bias", "return_lse"):
        with pytest.raises(FeatureError, match=name):
            engine.forward(batch, inputs, **{name: True})


@pytest.mark.parametrize("name", ["DRAFT_EXTEND_V2", "DLLM_EXTEND"])
def test_steps_of_other_kinds(module: ModuleType, settings: Any, name: str) -> None:
    engine = Engine(module, [layer(0)])
    batch = engine.batch("EXTEND", {1: 5})
    batch.forward_mode = mode(name)
    with pytest.raises(FeatureError, match=name):
        engine.backend.init_forward_metadata(batch)


def test_graphs_of_other_kinds(module: ModuleType, settings: Any) -> None:
    engine = Engine(module, [layer(0)])
    engine.backend.init_cuda_graph_state(2, 8)
    batch = engine.batch("EXTEND", {1: 5})
    with pytest.raises(FeatureError, match="graphs of prefill"):
        engine.backend.init_forward_metadata_out_graph(batch, in_capture=True)
    batch = engine.batch("DECODE", {1: 1})
    batch.spec_info = SimpleNamespace()
    with pytest.raises(FeatureError, match="decoding of drafts"):
        engine.backend.init_forward_metadata_out_graph(batch, in_capture=True)


def test_more_requests_in_graphs_than_in_the_pool(module: ModuleType, settings: Any) -> None:
    engine = Engine(module, [layer(0)])
    engine.backend.init_cuda_graph_state(8, 8)
    graph = Graph(engine, "DECODE", 8, 1)
    engine.step("EXTEND", {1: 5, 3: 2})
    graph.replay({1: 1, 3: 1})


def test_the_methods_are_those_of_the_interface(module: ModuleType) -> None:
    """Whatever SGLang passes by position or by name arrives."""
    backend = module.TritonFABackend
    (base,) = backend.__bases__
    for name in (
        "init_forward_metadata",
        "init_forward_metadata_out_graph",
        "init_cuda_graph_state",
        "get_cuda_graph_seq_len_fill_value",
        "forward_decode",
        "forward_extend",
    ):
        theirs = inspect.signature(getattr(base, name)).parameters.values()
        ours = inspect.signature(getattr(backend, name)).parameters
        plain = [p.name for p in theirs if p.kind == p.POSITIONAL_OR_KEYWORD]
        assert list(ours)[: len(plain)] == plain, name
    for name in ("needs_cpu_seq_lens", "extend_dummy_seqs_capped_by_req_pool"):
        assert hasattr(base, name), name

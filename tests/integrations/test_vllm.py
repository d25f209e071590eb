"""The backend for vLLM as a model runner uses it: build, write the cache, attend."""

import importlib
import importlib.util
import itertools
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import triton_fa
from tests.integrations import stub_vllm
from triton_fa.integrations import FeatureError

BLOCKS, BLOCK_SIZE, HEADS, HEADS_KV, HEAD_SIZE = 12, 4, 4, 2, 16


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    """Our module, on vLLM itself or on what stands in for it."""
    if importlib.util.find_spec("vllm") is not None:
        yield importlib.import_module("triton_fa.integrations.vllm")
        return
    stubs = stub_vllm.modules()
    sys.modules.update(stubs)
    try:
        yield importlib.import_module("triton_fa.integrations.vllm")
    finally:
        for name in [*stubs, "triton_fa.integrations.vllm"]:
            sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def write_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> None:
    """What vLLM's kernel does: the slots decide how many tokens there are, -1 is none."""
    assert (key_cache.dtype == torch.float8_e4m3fn) == kv_cache_dtype.startswith("fp8")
    key, value = (key / k_scale).to(key_cache.dtype), (value / v_scale).to(value_cache.dtype)
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            key_cache[slot // BLOCK_SIZE, slot % BLOCK_SIZE] = key[token]
            value_cache[slot // BLOCK_SIZE, slot % BLOCK_SIZE] = value[token]


@pytest.fixture
def backend(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(module, "triton_reshape_and_cache_flash", write_cache)
    return module.TritonFABackend


LAYER = SimpleNamespace(_k_scale=torch.ones(()), _v_scale=torch.ones(()))
# (blocks, kv heads, block_size, 2 * head_size) in each order of memory that vLLM has for one layer.
ORDERS = sorted(set(itertools.permutations(range(3))))


def cache(order: tuple[int, ...] = (0, 1, 2)) -> torch.Tensor:
    shape = [(BLOCKS, HEADS_KV, BLOCK_SIZE)[dim] for dim in order]
    memory = torch.full((*shape, 2 * HEAD_SIZE), torch.nan)
    return memory.permute(*(order.index(dim) for dim in range(3)), 3)


class Batch:
    """Requests with some keys in the cache and some new tokens, padded as a runner pads them."""

    def __init__(self, cached: list[int], new: list[int], padding: int = 3) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        self.new, self.lengths = new, [a + b for a, b in zip(cached, new, strict=True)]
        self.keys = [random(n, HEADS_KV, HEAD_SIZE) for n in self.lengths]
        self.values = [random(n, HEADS_KV, HEAD_SIZE) for n in self.lengths]
        self.tokens = sum(new)
        self.query = random(self.tokens + padding, HEADS, HEAD_SIZE)
        pages = torch.randperm(BLOCKS, generator=generator).int()
        width = -(-max(self.lengths) // BLOCK_SIZE) + 1
        self.table = torch.zeros(len(new), width, dtype=torch.int32)
        begin = 0
        for row, length in enumerate(self.lengths):
            count = -(-length // BLOCK_SIZE)
            self.table[row, :count] = pages[begin : begin + count]
            begin += count

    def slots(self, row: int, begin: int, end: int) -> list[int]:
        table = self.table[row].tolist()
        return [table[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(begin, end)]

    def common(self, causal: Any = True) -> Any:
        starts = torch.tensor([0, *itertools.accumulate(self.new)], dtype=torch.int32)
        slots = [
            self.slots(row, length - new, length)
            for row, (length, new) in enumerate(zip(self.lengths, self.new, strict=True))
        ]
        metadata: Any = importlib.import_module("vllm.v1.attention.backend").CommonAttentionMetadata
        return metadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor(self.lengths, dtype=torch.int32),
            num_reqs=len(self.new),
            num_actual_tokens=self.tokens,
            max_query_len=max(self.new),
            max_seq_len=max(self.lengths),
            block_table_tensor=self.table,
            slot_mapping=torch.tensor(list(itertools.chain.from_iterable(slots))),
            causal=causal,
        )

    def fill(self, impl: Any, kv_cache: torch.Tensor, layer: Any) -> None:
        """Earlier tokens as an earlier step wrote them."""
        for row, (length, new) in enumerate(zip(self.lengths, self.new, strict=True)):
            slots = torch.tensor(self.slots(row, 0, length - new))
            impl.do_kv_cache_update(
                layer, self.keys[row][: length - new], self.values[row][: length - new],
                kv_cache, slots,
            )  # fmt: skip

    def new_keys(self) -> tuple[torch.Tensor, ...]:
        """Padded like the queries, unlike the slots."""
        padding = torch.full((self.query.shape[0] - self.tokens, HEADS_KV, HEAD_SIZE), torch.nan)
        return tuple(
            torch.cat([x[-n:] for x, n in zip(whole, self.new, strict=True)] + [padding])
            for whole in (self.keys, self.values)
        )

    def wanted(self, **options: Any) -> torch.Tensor:
        """Each request computed alone."""
        queries = self.query[: self.tokens].split(self.new)
        return torch.cat(
            [
                triton_fa.flash_attn_func(q[None], k[None], v[None], 0.3, ver="torch", **options)[0]
                for q, k, v in zip(queries, self.keys, self.values, strict=True)
            ]
        )


def step(
    backend: Any,
    batch: Batch,
    kv_cache: torch.Tensor,
    causal: Any = True,
    layer: Any = LAYER,
    **settings: Any,
) -> torch.Tensor:
    """What a runner does for one layer."""
    impl = backend.get_impl_cls()(HEADS, HEAD_SIZE, 0.3, HEADS_KV, **settings)
    builder = backend.get_builder_cls()(None, ["layer"], None, torch.device("cpu"))
    batch.fill(impl, kv_cache, layer)
    metadata = builder.build(0, batch.common(causal))
    keys, values = batch.new_keys()
    impl.do_kv_cache_update(layer, keys, values, kv_cache, metadata.slot_mapping)
    output = torch.full_like(batch.query, 7.0)
    found = impl.forward(layer, batch.query, keys, values, kv_cache, metadata, output)
    assert found is output
    assert (output[batch.tokens :] == 7.0).all()
    return output[: batch.tokens]


def close(found: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(found, want, rtol=0, atol=5e-6)


MIXED = ([5, 0, 13], [1, 6, 2])


@pytest.mark.parametrize("order", ORDERS)
def test_mixed_batch_on_any_layout(backend: Any, order: tuple[int, ...]) -> None:
    batch = Batch(*MIXED)
    close(step(backend, batch, cache(order)), batch.wanted(causal=True))


def test_decode_and_prefill(backend: Any) -> None:
    for cached, new in (([5, 9, 0], [1, 1, 1]), ([0, 0], [7, 11])):
        batch = Batch(cached, new)
        close(step(backend, batch, cache()), batch.wanted(causal=True))


def test_windows_softcap_and_sinks(backend: Any) -> None:
    batch, sinks = Batch(*MIXED), torch.randn(HEADS)
    out = step(backend, batch, cache(), sliding_window=4, logits_soft_cap=3.0, sinks=sinks)
    close(out, batch.wanted(causal=True, window_size=(3, 0), softcap=3.0, sinks=sinks))


def test_float8_cache(backend: Any) -> None:
    """Bytes to vLLM; the layer's scales belong to the numbers in it."""
    batch = Batch(*MIXED)
    batch.query = batch.query.bfloat16()
    layer = SimpleNamespace(_k_scale=torch.tensor(0.5), _v_scale=torch.tensor(0.25))
    memory = torch.zeros(BLOCKS, HEADS_KV, BLOCK_SIZE, 2 * HEAD_SIZE, dtype=torch.uint8)
    out = step(backend, batch, memory, layer=layer, kv_cache_dtype="fp8")
    for whole, scale in ((batch.keys, 0.5), (batch.values, 0.25)):
        whole[:] = [(x / scale).to(torch.float8_e4m3fn).float() * scale for x in whole]
    batch.query = batch.query.float()
    # Weights and the result, below 4, are rounded to bfloat16.
    torch.testing.assert_close(out.float(), batch.wanted(causal=True), rtol=0, atol=2 * 4 * 2**-9)


def test_not_causal(backend: Any) -> None:
    batch = Batch(*MIXED)
    close(step(backend, batch, cache(), causal=False), batch.wanted())
    close(
        step(backend, batch, cache(), causal=False, sliding_window=4),
        batch.wanted(window_size=(3, 3)),
    )


def test_batch_invariance(
    backend: Any, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.envs, "VLLM_BATCH_INVARIANT", True, raising=False)
    batch = Batch(*MIXED)
    out = step(backend, batch, cache())
    close(out, batch.wanted(causal=True))
    seen: list[Any] = []
    monkeypatch.setattr(
        module, "flash_attn_varlen_func", lambda *_, **options: seen.append(options)
    )
    step(backend, batch, cache())
    assert seen[0]["batch_invariant"] is True


def test_tables_of_another_group(backend: Any) -> None:
    builder = backend.get_builder_cls()(None, ["layer"], None, torch.device("cpu"))
    metadata = builder.build(0, Batch(*MIXED).common())
    table, slots = torch.zeros(3, 2, dtype=torch.int32), torch.zeros(9, dtype=torch.int64)
    updated = builder.update_block_table(metadata, table, slots)
    assert (updated.block_table is table, updated.slot_mapping is slots) == (True, True)
    assert updated.seq_lens is metadata.seq_lens
    assert metadata.block_table is not table


def test_the_metadata_holds_the_runners_buffers(backend: Any) -> None:
    """A captured graph reads them: none may be a copy."""
    common = Batch(*MIXED).common()
    metadata = backend.get_builder_cls()(None, [], None, torch.device("cpu")).build(0, common)
    for name in ("query_start_loc", "seq_lens", "slot_mapping"):
        assert getattr(metadata, name) is getattr(common, name)
    assert metadata.block_table is common.block_table_tensor


def test_memory_measurement(backend: Any) -> None:
    impl = backend.get_impl_cls()(HEADS, HEAD_SIZE, 0.3, HEADS_KV)
    q, output = torch.randn(3, HEADS, HEAD_SIZE), torch.full((3, HEADS, HEAD_SIZE), torch.nan)
    assert not impl.forward(LAYER, q, q, q, cache(), None, output).any()


def test_what_it_says_of_itself(backend: Any) -> None:
    assert backend.get_name() == "CUSTOM"
    assert backend.forward_includes_kv_cache_update is False
    sizes = [size for size in (4, 8, 20, 96, 256, 264) if backend.supports_head_size(size)]
    assert sizes == [8, 96, 256]
    assert backend.supports_compute_capability(SimpleNamespace(major=9, minor=0))
    assert not backend.supports_compute_capability(SimpleNamespace(major=7, minor=5))
    support = backend.get_builder_cls()._cudagraph_support
    assert support.name == "UNIFORM_BATCH"


def test_vllm_itself_accepts_it(backend: Any) -> None:
    if not hasattr(backend, "validate_configuration"):
        pytest.skip("vLLM is not installed")
    capability = importlib.import_module("vllm.platforms.interface").DeviceCapability(9, 0)
    options: dict[str, Any] = {
        "head_size": 128,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": 16,
        "use_mla": False,
        "has_sink": True,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": False,
        "device_capability": capability,
        "attn_type": "decoder",
        "has_sliding_window": True,
        "use_batch_invariant": True,
    }
    assert backend.validate_configuration(**options) == []
    float8 = options | {"kv_cache_dtype": "fp8"}
    assert backend.validate_configuration(**float8) == []
    assert backend.validate_configuration(**float8 | {"dtype": torch.float32}) != []
    reasons = backend.validate_configuration(**options | {"kv_cache_dtype": "fp8_e5m2"})
    assert reasons == ["kv_cache_dtype not supported"]


def test_registering(backend: Any, module: ModuleType) -> None:
    custom = importlib.import_module(
        "vllm.v1.attention.backends.registry"
    ).AttentionBackendEnum.CUSTOM
    try:
        module.register()
        module.register()
        assert custom.get_path() == "triton_fa.integrations.vllm.TritonFABackend"
        importlib.import_module("vllm.v1.attention.backends.registry").register_backend(
            custom, "elsewhere.Backend"
        )
        with pytest.raises(ImportError, match=r"elsewhere\.Backend"):
            module.register()
        assert custom.get_path() == "elsewhere.Backend"
    finally:
        custom.clear_override()


@pytest.mark.parametrize(
    ("name", "value"),
    [("alibi_slopes", [0.1]), ("attn_type", "encoder_only"), ("kv_cache_dtype", "int8")],
)
def test_settings_that_are_refused(backend: Any, name: str, value: object) -> None:
    with pytest.raises(FeatureError, match=name):
        backend.get_impl_cls()(HEADS, HEAD_SIZE, 0.3, HEADS_KV, **{name: value})


def test_steps_that_are_refused(backend: Any) -> None:
    batch = Batch(*MIXED)
    builder = backend.get_builder_cls()(None, ["layer"], None, torch.device("cpu"))
    with pytest.raises(FeatureError, match="causal"):
        builder.build(0, batch.common(torch.ones(3, dtype=torch.int32)))
    impl = backend.get_impl_cls()(HEADS, HEAD_SIZE, 0.3, HEADS_KV)
    q = batch.query
    with pytest.raises(FeatureError, match="output_scale"):
        impl.forward(LAYER, q, q, q, cache(), None, q, output_scale=torch.ones(1))

"""Our folder as a hub kernel of transformers: block tables in continuous batching, and the rest."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", "5.17", reason="needs transformers 5.17: nox -s integrations"
)
kernels = pytest.importorskip("kernels", reason="needs kernels: nox -s integrations")
pytest.importorskip("psutil", reason="transformers asks psutil for the CPU's memory")

from packaging.requirements import Requirement  # noqa: E402
from packaging.version import Version  # noqa: E402
from transformers import modeling_flash_attention_utils as flash_utils  # noqa: E402
from transformers.dependency_versions_table import deps  # noqa: E402
from transformers.generation.continuous_batching import initialization  # noqa: E402
from transformers.integrations import hub_kernels  # noqa: E402

from triton_fa.errors import ArgumentValueError  # noqa: E402
from triton_fa.integrations import FeatureError, FrameworkVersionError, hub_kernel  # noqa: E402
from triton_fa.integrations import transformers as integration  # noqa: E402
from triton_fa.integrations.transformers import (  # noqa: E402
    KERNEL,
    kernel_folder,
    register_kernel,
)

FITS = Version(kernels.__version__) in Requirement(deps["kernels"]).specifier
GPT_OSS_KERNEL = "kernels-community/vllm-flash-attn3"
PAGE = 16
VOCABULARY = 97
# With a paged function of its own, which knows no softcap.
HAS_PREFIX = "paged|sdpa" in transformers.AttentionInterface().valid_keys()

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 16,
    "initializer_range": 0.2,  # scores far enough from 0 that a wrong key or scale shows
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
    "attn_implementation": "eager",
}
LAYERS = ["sliding_attention", "full_attention"]
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "qwen3-window": lambda: transformers.Qwen3Config(
        **COMMON, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "gemma2-full": lambda: transformers.Gemma2Config(
        **COMMON,
        layer_types=["full_attention"] * 2,
        attn_logit_softcapping=0.05,
        query_pre_attn_scalar=24,
    ),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **COMMON, sliding_window=5, layer_types=LAYERS, num_local_experts=2, num_experts_per_tok=1
    ),
}


def built(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = transformers.AutoModelForCausalLM.from_config(MODELS[name]()).eval()
        for parameter in model.parameters():  # sinks among them, which start empty
            if parameter.dim() == 1 and parameter.shape[0] == COMMON["num_attention_heads"]:
                torch.nn.init.normal_(parameter)
    return model


@pytest.fixture(autouse=True)
def loadable(fresh: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a new process; the kernels at hand stands in for one that this transformers admits."""
    monkeypatch = fresh
    monkeypatch.setenv("TRITON_FA_VER", "torch")
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    monkeypatch.setattr(integration, "_kernels", set())
    if not FITS:
        monkeypatch.setitem(deps, "kernels", f"kernels=={kernels.__version__}")
        monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
        monkeypatch.setattr(hub_kernels, "get_kernel_hub", kernels.get_kernel, raising=False)
    registries = (transformers.AttentionInterface, transformers.AttentionMaskInterface)
    saved = [registry._global_mapping.copy() for registry in registries]
    yield
    for registry, mapping in zip(registries, saved, strict=True):
        registry._global_mapping = mapping


class Calls:
    """What reached our functions, and for each append the keys that were in the pages after it."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.appended: list[tuple[torch.Tensor, torch.Tensor]] = []


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Our functions as `kernels` loaded them, watched."""
    kernel = kernels.get_local_kernel(kernel_folder())
    assert kernel.__name__ == "triton_fa_flash_attn3"
    assert kernel is not hub_kernel
    seen, through = Calls(), kernel.call

    def watched(name: str, *tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.names.append(name)
        out = through(name, *tensors, **options)
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if name == "flash_attn_with_kvcache_append" and not capturing:
            _, k_cache, _, k, _ = tensors
            lengths, table = options["cache_seqlens"].long(), options["page_table"].long()
            rows = torch.arange(len(lengths), device=lengths.device)
            real = lengths >= 0
            pages = table[rows[real], lengths[real] // PAGE]
            seen.appended.append((k_cache[pages, lengths[real] % PAGE].clone(), k[real, 0]))
        return out

    monkeypatch.setattr(kernel, "call", watched)
    return seen


REQUESTS = [[5, 6, 7, 8, 9], [1, 2, 3], list(range(1, 41)), [11] * 15]


def batched(model: Any, name: str, requests: list[list[int]], **options: Any) -> list[list[int]]:
    """Greedy tokens by continuous batching: chunked prompts, mixed steps, steps of decode only."""
    model.set_attn_implementation(name)
    size = (
        "page_size"
        if hasattr(transformers.ContinuousBatchingConfig(), "page_size")
        else "block_size"
    )
    batching = transformers.ContinuousBatchingConfig(
        num_blocks=16,
        max_batch_tokens=24,
        max_blocks_per_request=6,
        **{size: PAGE, "use_cuda_graph": False} | options,
    )
    done = model.generate_batch(
        inputs=requests,
        generation_config=transformers.GenerationConfig(
            max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=batching,
        progress_bar=False,
    )
    return [result.generated_tokens for result in done.values()]


def alone(model: Any, requests: list[list[int]]) -> list[list[int]]:
    """The same tokens by the eager attention, each request without pages."""
    model.set_attn_implementation("eager")
    device = model.device
    return [
        model.generate(torch.tensor([ids], device=device), max_new_tokens=8, do_sample=False)[
            0, len(ids) :
        ].tolist()
        for ids in requests
    ]


@pytest.fixture
def without_gpu_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers decodes over block tables on GPUs only: here it finds one when it asks."""
    decide = initialization.ensure_decode_fast_path_is_available

    def decided(*arguments: Any, **options: Any) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(torch.cuda, "is_available", lambda: True)
            decide(*arguments, **options)

    monkeypatch.setattr(initialization, "ensure_decode_fast_path_is_available", decided)


@pytest.mark.parametrize("name", ["llama", "gemma2-full"])
def test_continuous_batching_over_block_tables(
    name: str, calls: Calls, without_gpu_check: None
) -> None:
    if name == "gemma2-full" and HAS_PREFIX:
        pytest.skip("this transformers does not pass the softcap on")
    model = built(name)
    ours = batched(model, register_kernel(), REQUESTS)
    assert set(calls.names) == {"flash_attn_varlen_func", "flash_attn_with_kvcache_append"}
    layers, longest = 2, 8 - 1  # the first token of each is by the prompt's last chunk
    assert calls.names.count("flash_attn_with_kvcache_append") >= layers * (longest - 4)
    assert len(calls.appended) == calls.names.count("flash_attn_with_kvcache_append")
    for stored, new in calls.appended:
        assert stored.abs().sum() > 0
        assert torch.equal(stored, new)
    assert ours == alone(model, REQUESTS)


def test_block_tables_through_the_kernels(
    calls: Calls, without_gpu_check: None, fresh: pytest.MonkeyPatch
) -> None:
    """Triton's kernels in its interpreter: one request, which crosses a page."""
    fresh.setenv("TRITON_FA_VER", "triton")
    model = built("llama")
    ours = batched(model, register_kernel(), [[11] * 13])
    assert calls.names.count("flash_attn_with_kvcache_append") == 2 * 7
    assert all(torch.equal(stored, new) for stored, new in calls.appended)
    assert ours == alone(model, [[11] * 13])


@pytest.mark.parametrize("name", ["qwen3-window", "gpt-oss"])
def test_continuous_batching_of_sliding_layers(
    name: str, calls: Calls, without_gpu_check: None
) -> None:
    """transformers has no block tables for these; the packed function runs on ours."""
    model = built(name)
    kernel = register_kernel(GPT_OSS_KERNEL if name == "gpt-oss" else KERNEL)
    ours = batched(model, kernel, REQUESTS)
    assert set(calls.names) == {"flash_attn_varlen_func"}
    assert ours == alone(model, REQUESTS)


@pytest.mark.parametrize("name", MODELS)
def test_outside_of_continuous_batching(name: str, calls: Calls) -> None:
    """A left-padded batch: prompt and tokens."""
    model = built(name)
    kernel = register_kernel(GPT_OSS_KERNEL if name == "gpt-oss" else KERNEL)
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(1, VOCABULARY, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    found = []
    for implementation in (kernel, "eager"):
        model.set_attn_implementation(implementation)
        assert model.config._attn_implementation == implementation
        found.append(model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False))
    assert torch.equal(*found)
    assert "flash_attn_varlen_func" in calls.names
    calls.names.clear()
    model.set_attn_implementation(kernel)
    with torch.no_grad():
        ours = model(ids).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(ours, model(ids).logits, rtol=0, atol=2e-5)
    assert calls.names == ["flash_attn_func"] * 2


def test_compiled(calls: Calls) -> None:
    """In one graph; not in float32, of which transformers would warn there."""
    model = built("llama").to(torch.bfloat16)
    model.set_attn_implementation(register_kernel())
    ids = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(7))
    torch.compiler.reset()
    compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        ours = compiled(ids, use_cache=False).logits
        assert calls.names  # while it was traced
        assert torch.equal(ours, model(ids, use_cache=False).logits)


def test_rows_that_fill_up_a_graph() -> None:
    """Length -1 and no pages: nothing is written for them, and other rows do not notice."""
    torch.manual_seed(0)
    k_cache, v_cache = torch.randn(2, 4, PAGE, 2, 16)
    q, (k, v) = torch.randn(3, 1, 4, 16), torch.randn(2, 3, 1, 2, 16)
    table = torch.tensor([[1, 2], [-1, -1], [-1, -1]], dtype=torch.int32)
    lengths = torch.tensor([20, -1, -1])
    want_k = k_cache.clone()
    want_k[2, 4] = k[0, 0]
    out = hub_kernel.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=lengths, block_table=table, causal=True
    )
    assert torch.equal(k_cache, want_k)
    keys, values = (x[1:3].flatten(0, 1)[None, :21] for x in (k_cache, v_cache))
    want = hub_kernel.flash_attn_func(q[:1], keys, values)
    torch.testing.assert_close(out[:1], want, rtol=0, atol=1e-6)


def test_the_folder_takes_its_place_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_KERNELS", f"some/kernel=/elsewhere:{KERNEL}=/before")
    assert register_kernel() == register_kernel() == KERNEL
    assert os.environ["LOCAL_KERNELS"] == f"some/kernel=/elsewhere:{KERNEL}={kernel_folder()}"
    assert {"__init__.py", "metadata.json"} <= {p.name for p in kernel_folder().iterdir()}


@pytest.mark.parametrize(
    "name",
    ["flash_attention_3", "owner/attention3", "owner/flash-attn4", "a/b/flash3", "a/flash3:f"],
)
def test_names_that_decode_with_no_block_table(name: str) -> None:
    with pytest.raises(ArgumentValueError, match=r"name: expected owner/\.\.\.flash\.\.\.3"):
        register_kernel(name)
    assert "LOCAL_KERNELS" not in os.environ


def test_a_name_that_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_utils, "_loaded_implementation", f"paged|{KERNEL}")
    monkeypatch.setattr(flash_utils, "_flash_varlen_fn", test_a_name_that_is_in_use)
    with pytest.raises(
        ArgumentValueError, match=f"'{KERNEL}' is loaded from .*{Path(__file__).name}"
    ):
        register_kernel()


@pytest.mark.parametrize("found", [None, "0.1.0"])
def test_kernels_of_another_version(found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton_fa.integrations._version", lambda _: found)
    with pytest.raises(FrameworkVersionError, match=f"kernels: .*found {found or 'none'}"):
        register_kernel()
    assert "LOCAL_KERNELS" not in os.environ


def test_refused_when_built(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("TRITON_FA_VER", "triton")
    name = register_kernel()
    wide = transformers.LlamaConfig(**COMMON | {"head_dim": 512, "attn_implementation": name})
    with pytest.raises(FeatureError, match="head_dim: expected at most 256, got 512"):
        transformers.AutoModelForCausalLM.from_config(wide)


@pytest.mark.skipif(not HAS_PREFIX, reason="this transformers passes the softcap on")
def test_a_softcap_that_would_be_lost() -> None:
    config = transformers.Gemma2Config(**COMMON, sliding_window=5, layer_types=LAYERS)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(FeatureError, match="attn_logit_softcapping: expected none, got 50"):
        model.set_attn_implementation(f"paged|{register_kernel()}")


def test_dropout() -> None:
    q = torch.randn(1, 3, 2, 16)
    with pytest.raises(FeatureError, match=r"dropout: expected 0, got 0\.5"):
        hub_kernel.flash_attn_func(q, q, q, 0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_block_tables_on_a_gpu(graphs: bool, calls: Calls, fresh: pytest.MonkeyPatch) -> None:
    """With transformers' own choice of the path; with graphs, replays are not seen by `calls`."""
    fresh.setenv("TRITON_FA_VER", "triton")
    model = built("llama").to("cuda")
    ours = batched(model, register_kernel(), REQUESTS, use_cuda_graph=graphs)
    assert calls.appended
    assert all(torch.equal(stored, new) for stored, new in calls.appended)
    assert ours == alone(model, REQUESTS)

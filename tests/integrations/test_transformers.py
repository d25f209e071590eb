"""transformers' models with our attention against its own eager one: logits, tokens, refusals."""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", "5.17", reason="needs transformers 5.17: nox -s integrations"
)

from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402

import triton_fa  # noqa: E402
from triton_fa.integrations import FeatureError  # noqa: E402
from triton_fa.integrations.transformers import (  # noqa: E402
    padding_mask,
    paged_forward,
    register,
)

VOCABULARY = 97
HAS_PAGED = "paged|sdpa" in AttentionInterface().valid_keys()
# Logits are of order one, in float32; eager sums in another order.
ATOL = 2e-5

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 16,
    "initializer_range": 0.2,  # scores far enough from 0 that a wrong mask or scale shows
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
    "attn_implementation": "eager",
}
LAYERS = ["sliding_attention", "full_attention"]
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON),
    "qwen3-window": lambda: transformers.Qwen3Config(
        **COMMON, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **COMMON, sliding_window=5, layer_types=LAYERS, num_local_experts=2, num_experts_per_tok=1
    ),
    "gemma2": lambda: transformers.Gemma2Config(
        **COMMON,
        sliding_window=5,
        layer_types=LAYERS,
        attn_logit_softcapping=0.05,
        query_pre_attn_scalar=24,
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **COMMON | {"head_dim": 256},
        sliding_window=5,
        layer_types=LAYERS,
        query_pre_attn_scalar=256,
    ),
}


@functools.cache
def built(name: str) -> Any:
    config = MODELS[name]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():  # sinks among them, which start empty
            if parameter.dim() == 1 and parameter.shape[0] == COMMON["num_attention_heads"]:
                torch.nn.init.normal_(parameter)
    return model


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return built(request.param)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    saved = [copy.copy(r._global_mapping) for r in (AttentionInterface, AttentionMaskInterface)]
    register(ver="torch")
    yield
    for registry, mapping in zip((AttentionInterface, AttentionMaskInterface), saved, strict=True):
        registry._global_mapping = mapping


def both(model: Any, call: Callable[[], Any]) -> tuple[Any, Any]:
    """What `call` gives with our attention and with eager."""
    found = []
    for name in ("triton_fa", "eager"):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        with torch.no_grad():
            found.append(call())
    return found[0], found[1]


def tokens(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(1, VOCABULARY, shape, generator=generator)


def padded(batch: int, length: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths; the first has no padding."""
    ids, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.long)
    for row in range(1, batch):
        hidden = slice(0, 3 * row) if side == "left" else slice(length - 3 * row, length)
        ids[row, hidden], mask[row, hidden] = 0, 0
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_a_padded_batch(model: Any, side: str) -> None:
    ids, mask = padded(3, 11, side)
    ours, eager = both(model, lambda: model(ids, attention_mask=mask).logits)
    counts = mask.bool()
    torch.testing.assert_close(ours[counts], eager[counts], rtol=0, atol=ATOL)


def test_logits_without_padding(model: Any) -> None:
    ids = tokens(2, 9)
    torch.testing.assert_close(*both(model, lambda: model(ids).logits), rtol=0, atol=ATOL)


@pytest.mark.parametrize("cache", [None, "static"])
def test_greedy_tokens_of_a_left_padded_batch(model: Any, cache: str | None) -> None:
    ids, mask = padded(3, 8, "left")
    generate = functools.partial(
        model.generate,
        ids,
        attention_mask=mask,
        max_new_tokens=8,
        do_sample=False,
        cache_implementation=cache,
        disable_compile=True,
    )
    ours, eager = both(model, generate)
    assert ours.shape == (3, 16)
    assert torch.equal(ours, eager)


def test_static_cache_without_a_mask(model: Any) -> None:
    """What lies behind the prompt in the cache was never written."""
    ids = tokens(2, 9)

    def call() -> torch.Tensor:
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        model(ids[:, :6], past_key_values=cache)
        return model(ids[:, 6:], past_key_values=cache).logits

    torch.testing.assert_close(*both(model, call), rtol=0, atol=ATOL)


@pytest.mark.parametrize("batch", [1, 2])
def test_compiled(batch: int) -> None:
    model = built("llama")
    ids, mask = padded(batch, 9, "left")
    compiled = torch.compile(model.forward, backend="aot_eager")

    def call() -> torch.Tensor:
        torch.compiler.reset()
        return compiled(ids, attention_mask=mask, use_cache=False).logits

    ours, eager = both(model, call)
    counts = mask.bool()
    torch.testing.assert_close(ours[counts], eager[counts], rtol=0, atol=ATOL)


def test_prompt_in_two_chunks(model: Any) -> None:
    """The second chunk has fewer queries than keys, in a left-padded batch."""
    ids, mask = padded(3, 12, "left")

    def call() -> torch.Tensor:
        cache = transformers.DynamicCache(config=model.config)
        model(ids[:, :9], attention_mask=mask[:, :9], past_key_values=cache)
        return model(ids[:, 9:], attention_mask=mask, past_key_values=cache).logits

    torch.testing.assert_close(*both(model, call), rtol=0, atol=ATOL)


PACKED = (4, 7, 1, 3)


def apart(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Eager logits of packed sequences, each computed alone."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return torch.cat([model(part).logits for part in ids.split(PACKED, 1)], 1)


def test_packed_sequences_by_position_ids(model: Any) -> None:
    ids = tokens(1, sum(PACKED))
    positions = torch.cat([torch.arange(n) for n in PACKED])[None]
    want = apart(model, ids)
    model.set_attn_implementation("triton_fa")
    with torch.no_grad():
        ours = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(ours, want, rtol=0, atol=ATOL)


def test_packed_sequences_by_cu_seqlens(model: Any) -> None:
    ids = tokens(1, sum(PACKED))
    positions = torch.cat([torch.arange(n) for n in PACKED])[None]
    cu_seqlens = torch.tensor([0, 4, 11, 12, 15])
    want = apart(model, ids)
    model.set_attn_implementation("triton_fa")
    lengths = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
    with torch.no_grad():
        ours = model(
            ids, position_ids=positions, use_cache=False, max_length_q=7, max_length_k=7, **lengths
        ).logits
    torch.testing.assert_close(ours, want, rtol=0, atol=ATOL)


def test_half_precision() -> None:
    half = copy.deepcopy(built("llama")).to(torch.bfloat16)
    ids, mask = padded(2, 9, "left")
    ours, eager = both(half, lambda: half(ids, attention_mask=mask).logits)
    assert ours.dtype == torch.bfloat16
    wide = copy.deepcopy(built("llama"))
    with torch.no_grad():
        want = wide(ids, attention_mask=mask).logits
    counts = mask.bool()
    error, allowed = ((x - want)[counts].abs().max() for x in (ours, eager))
    assert error <= 2 * allowed


@pytest.mark.parametrize("name", ["llama", "gpt-oss"])
def test_through_the_kernels(name: str) -> None:
    """Triton's kernels: on a GPU, or in its interpreter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    register(ver="triton")
    model = copy.deepcopy(built(name)).to(device)
    ids, mask = (x.to(device) for x in padded(2, 7, "left"))
    ours, eager = both(model, lambda: model(ids, attention_mask=mask).logits)
    counts = mask.bool()
    torch.testing.assert_close(ours[counts], eager[counts], rtol=0, atol=ATOL)
    if name == "llama":
        generate = functools.partial(
            model.generate, ids, attention_mask=mask, max_new_tokens=3, do_sample=False
        )
        assert torch.equal(*both(model, generate))


@pytest.mark.skipif(not HAS_PAGED, reason="this transformers admits no other name to it")
def test_continuous_batching(model: Any) -> None:
    """More requests than one step holds, prompts longer than a step: chunks and mixed batches."""
    pytest.importorskip("psutil", reason="transformers asks psutil for the CPU's memory")
    requests = [[5, 6, 7, 8, 9], [1, 2, 3], list(range(1, 41)), [11] * 17]
    settings = transformers.GenerationConfig(
        max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0
    )

    def tokens_of(name: str) -> list[list[int]]:
        model.set_attn_implementation(name)
        batching = transformers.ContinuousBatchingConfig(
            num_blocks=16, block_size=16, max_batch_tokens=24
        )
        done = model.generate_batch(
            inputs=requests,
            generation_config=settings,
            continuous_batching_config=batching,
            progress_bar=False,
        )
        return [result.generated_tokens for result in done.values()]

    ours = tokens_of("paged|triton_fa")
    # Each alone and without pages: the paged eager function knows no softcap.
    model.set_attn_implementation("eager")
    alone = [
        model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
        for ids in requests
    ]
    assert ours == [tokens.tolist() for tokens in alone]


@pytest.mark.parametrize("window", [None, 4])
def test_one_layer_of_continuous_batching(window: int | None) -> None:
    """What the paged function makes of its arguments, with a cache that hands out packed keys."""
    torch.manual_seed(0)
    q, (k, v) = torch.randn(1, 4, 5, 16), torch.randn(2, 12, 2, 16)
    sinks = torch.randn(4)
    new = torch.randn(1, 2, 5, 16)
    module = torch.nn.Module()
    module.layer_idx, module.sliding_window = 3, window

    class Cache:
        def update(self, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
            assert given["key_states"] is new
            assert (given["layer_idx"], given["read_index"], given["write_index"]) == (3, "r", "w")
            return k, v

    cu_seqlens_q, cu_seqlens_k = torch.tensor([0, 2, 5]), torch.tensor([0, 5, 12])
    wrong = torch.zeros(3, dtype=torch.int64)
    mine, other = "sliding_attention", "full_attention"
    if window is None:
        mine, other = other, mine
    out, weights = paged_forward(
        module,
        q,
        new,
        new,
        attention_mask=object(),
        cache=Cache(),
        cu_seq_lens_q=cu_seqlens_q,
        cu_seq_lens_k={mine: cu_seqlens_k, other: wrong},
        max_seqlen_q=3,
        max_seqlen_k={mine: 7, other: 0},
        scaling=0.3,
        softcap=2.0,
        s_aux=sinks,
        read_index="r",
        write_index="w",
        ver="torch",
    )
    want = triton_fa.flash_attn_varlen_func(
        *(q[0].transpose(0, 1), k, v, cu_seqlens_q.int(), cu_seqlens_k.int(), 3, 7),
        softmax_scale=0.3,
        causal=True,
        window_size=(-1 if window is None else window - 1, 0),
        softcap=2.0,
        sinks=sinks,
        ver="torch",
    )
    assert weights is None
    assert torch.equal(out, want[None])


@pytest.mark.parametrize("masked", [False, True])
def test_values_of_another_size_and_wider_queries(masked: bool) -> None:
    """As in models whose keys have an extra part, and where norms leave queries in float32."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 5, 24), torch.randn(2, 2, 5, 24)
    v = torch.randn(2, 2, 5, 16).bfloat16()
    mask = torch.ones(2, 5, dtype=torch.bool) if masked else None
    out, _ = AttentionInterface()["triton_fa"](torch.nn.Module(), q, k, v, mask, scaling=0.2)
    q, k, v = (x.bfloat16().transpose(1, 2) for x in (q, k, v))
    want = triton_fa.flash_attn_func(q, k, v, 0.2, causal=True, ver="torch")
    assert out.shape == (2, 5, 4, 16)
    assert torch.equal(out, want)


def test_registering_twice() -> None:
    before = AttentionInterface().valid_keys()
    register(ver="torch")
    assert AttentionInterface().valid_keys() == before
    assert before.count("triton_fa") == 1


def test_static_cache_with_a_hole_in_the_mask() -> None:
    """Padding on the right, then more tokens: no run of keys says that."""
    model = built("llama")
    ids, mask = padded(3, 9, "right")
    more = tokens(3, 4)

    def call() -> torch.Tensor:
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        model(ids, attention_mask=mask, past_key_values=cache)
        seen = torch.cat((mask, torch.ones_like(more)), 1)
        return model(more, attention_mask=seen, past_key_values=cache).logits

    torch.testing.assert_close(*both(model, call), rtol=0, atol=ATOL)


def test_the_span_of_a_static_cache() -> None:
    """Ends and beginnings on the device, in four dimensions, which models hand on."""
    causal = transformers.masking_utils.causal_mask_function
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, :3] = False
    options: dict[str, Any] = {"q_offset": torch.tensor(5), "mask_function": causal}
    plain = padding_mask(2, 1, 8, **options)
    assert plain.dtype == torch.int32
    assert plain.tolist() == [[[[6]]], [[[6]]]]
    span = padding_mask(2, 1, 8, attention_mask=mask, **options)
    assert span.tolist() == [[[[6, 0]]], [[[6, 3]]]]
    mask[0, 2] = False
    holes = padding_mask(2, 1, 8, attention_mask=mask, **options)
    assert torch.equal(holes, mask)


def refused_models() -> dict[str, Callable[[], Any]]:
    t5 = {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "num_heads": 4, "num_layers": 1}
    return {
        "head_dim": lambda: transformers.LlamaConfig(**COMMON | {"head_dim": 512}),
        "output_attentions": lambda: transformers.LlamaConfig(**COMMON, output_attentions=True),
        "relative_attention_num_buckets": lambda: transformers.T5Config(**t5),
        "index_topk": lambda: transformers.DeepseekV32Config(
            vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=1, num_attention_heads=4
        ),
    }


@pytest.mark.parametrize("feature", refused_models())
def test_a_refused_model_says_so_when_it_is_built(feature: str) -> None:
    register(ver="triton")
    config = refused_models()[feature]()
    with pytest.raises(FeatureError, match=feature), torch.device("meta"):
        transformers.AutoModel.from_config(config, attn_implementation="triton_fa")


def test_a_refused_model_says_so_when_it_is_switched() -> None:
    register(ver="triton")
    config = refused_models()["head_dim"]()
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config, attn_implementation="eager")
    with pytest.raises(FeatureError, match="head_dim: expected at most 256, got 512"):
        model.set_attn_implementation("triton_fa")
    register(ver="torch")
    model.set_attn_implementation("triton_fa")  # which takes any


def test_ver_reaches_the_call() -> None:
    register(ver="no such backend")
    model = built("llama")
    model.set_attn_implementation("triton_fa")
    with pytest.raises(RuntimeError, match="no such backend"), torch.no_grad():
        model(tokens(1, 3))


def test_gradients_are_refused() -> None:
    model = built("llama")
    model.set_attn_implementation("triton_fa")
    with pytest.raises(RuntimeError, match="no_grad"):
        model(tokens(1, 3))


def test_dropout_is_refused() -> None:
    model = copy.deepcopy(built("llama")).train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    model.set_attn_implementation("triton_fa")
    with pytest.raises(FeatureError, match="dropout"), torch.no_grad():
        model(tokens(1, 3))


def test_a_mask_of_the_callers_own_is_refused() -> None:
    model = built("llama")
    model.set_attn_implementation("triton_fa")
    mask = torch.zeros(1, 1, 3, 3)
    with pytest.raises(FeatureError, match="attention_mask"), torch.no_grad():
        model(tokens(1, 3), attention_mask=mask)


@pytest.mark.parametrize("name", ["position_bias", "indices", "head_mask", "output_attentions"])
def test_arguments_that_change_scores_are_refused(name: str) -> None:
    q = torch.zeros(1, 2, 3, 16)
    call = AttentionInterface()["triton_fa"]
    with pytest.raises(FeatureError, match=name):
        call(torch.nn.Module(), q, q, q, None, **{name: torch.ones(1)})


def test_packed_sequences_in_several_rows_are_refused() -> None:
    model = built("llama")
    model.set_attn_implementation("triton_fa")
    positions = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
    with pytest.raises(FeatureError, match="position_ids"), torch.no_grad():
        model(tokens(2, 4), position_ids=positions, use_cache=False)


def test_masks_that_the_call_cannot_say_are_refused() -> None:
    from transformers import masking_utils

    def image(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx < 2

    union = masking_utils.or_masks(masking_utils.causal_mask_function, image)
    chunked = masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long))
    mask = functools.partial(padding_mask, 1, 6, 6)
    with pytest.raises(FeatureError, match="or_masks"):
        mask(mask_function=union)
    with pytest.raises(FeatureError, match="image"):
        mask(mask_function=masking_utils.and_masks(image, masking_utils.causal_mask_function))
    with pytest.raises(FeatureError, match="chunked_overlay"):
        mask(mask_function=chunked)
    assert padding_mask(1, 4, 4, mask_function=chunked) is None


def test_chunked_attention_is_refused_at_the_first_forward() -> None:
    config = transformers.Llama4TextConfig(
        **COMMON | {"attn_implementation": "triton_fa"},
        attention_chunk_size=4,
        intermediate_size_mlp=96,
        num_local_experts=1,
        interleave_moe_layer_step=1,
    )
    model = transformers.Llama4ForCausalLM(config).eval()
    with pytest.raises(FeatureError, match="chunked_overlay"), torch.no_grad():
        model(tokens(1, 6))


def test_bidirectional_encoders() -> None:
    """No causal mask, and queries of a cross attention are other tokens than its keys."""
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        init_std=0.2,
    )
    torch.manual_seed(3)
    bart = transformers.BartModel(config).eval()
    ids, mask = padded(3, 11, "right")
    decoder_ids = tokens(3, 4)
    ours, eager = both(
        bart,
        lambda: bart(ids, attention_mask=mask, decoder_input_ids=decoder_ids).last_hidden_state,
    )
    torch.testing.assert_close(ours, eager, rtol=0, atol=ATOL)

"""diffusers' dispatcher with our backend against its native one."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip(
    "diffusers", "0.42", reason="needs diffusers 0.42: nox -s integrations"
)

from diffusers.models import attention_dispatch  # noqa: E402
from diffusers.models.attention_dispatch import (  # noqa: E402
    AttentionBackendName,
    attention_backend,
    dispatch_attention_fn,
)

from triton_fa.integrations import FeatureError  # noqa: E402
from triton_fa.integrations.diffusers import register  # noqa: E402


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register(ver="torch")
    active = attention_dispatch._AttentionBackendRegistry._active_backend
    with torch.no_grad():
        yield
    attention_dispatch._AttentionBackendRegistry.set_active_backend(active)


def tensors(seqlen_q: int = 6, seqlen_k: int = 9) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((2, seqlen_q, 4, 16), (2, seqlen_k, 2, 16), (2, seqlen_k, 2, 16))
    return tuple(torch.randn(shape) for shape in shapes)


def both(*arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(
        dispatch_attention_fn(*arguments, **options, enable_gqa=True, backend=name)
        for name in ("triton_fa", "native")
    )


def test_dense() -> None:
    torch.testing.assert_close(*both(*tensors(), scale=0.4))
    torch.testing.assert_close(*both(*tensors(6, 6), is_causal=True))


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_key_masks(rank: int) -> None:
    """With holes, and of every shape that says the same for each query."""
    keep = torch.tensor([[1, 1, 0, 1, 1, 0, 0, 1, 0], [0, 1, 1, 1, 1, 1, 1, 1, 1]]).bool()
    mask = {
        1: keep[0],
        2: keep,
        3: keep[:, None],
        4: keep[:, None, None].expand(2, 4, 6, 9),
    }[rank]
    native = {1: keep[:1].expand(2, 9), 2: keep, 3: keep, 4: keep}[rank]
    query, key, value = tensors()
    ours = dispatch_attention_fn(query, key, value, mask, backend="triton_fa", enable_gqa=True)
    want = dispatch_attention_fn(query, key, value, native, backend="native", enable_gqa=True)
    torch.testing.assert_close(ours, want)


def test_log_sum_exp() -> None:
    out, lse = dispatch_attention_fn(
        *tensors(), backend="triton_fa", attention_kwargs={"return_lse": True}
    )
    assert (out.shape, lse.shape) == ((2, 6, 4, 16), (2, 4, 6))


def test_context_manager() -> None:
    with attention_backend("triton_fa"):
        out = dispatch_attention_fn(*tensors(), enable_gqa=True)
        name, _ = attention_dispatch._AttentionBackendRegistry.get_active_backend()
        assert name == "triton_fa"
    torch.testing.assert_close(out, both(*tensors())[1])


def test_a_model() -> None:
    torch.manual_seed(1)
    model = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 6, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([1.0]),
        "img_ids": torch.randn(16, 3),
        "txt_ids": torch.zeros(6, 3),
    }
    found = []
    for name in ("triton_fa", "native"):
        model.set_attention_backend(name)
        found.append(model(**inputs).sample)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    assert found[0].abs().max() > 1e-3


def test_through_the_kernels() -> None:
    register(ver="triton")
    torch.testing.assert_close(*both(*tensors()), rtol=0, atol=1e-5)


def test_registering_twice() -> None:
    before = list(AttentionBackendName)
    register(ver="torch")
    assert list(AttentionBackendName) == before
    assert [x.value for x in before].count("triton_fa") == 1
    assert AttentionBackendName("triton_fa").value == "triton_fa"
    assert AttentionBackendName.TRITON_FA is AttentionBackendName("triton_fa")
    assert isinstance(AttentionBackendName.TRITON_FA, AttentionBackendName)


def refused(match: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(FeatureError, match=match):
        dispatch_attention_fn(*arguments, **options, backend="triton_fa")


def test_what_is_not_done_is_refused() -> None:
    dense, square = tensors(), tensors(6, 6)
    keep = torch.ones(2, 9, dtype=torch.bool)
    refused("dropout_p", *dense, dropout_p=0.1)
    refused("is_causal", *dense, is_causal=True)
    refused("parallel_config", *dense, parallel_config=object())
    refused("attn_mask.*bool", *dense, attn_mask=keep.float())
    refused("attn_mask.*query", *dense, attn_mask=torch.ones(2, 1, 6, 9, dtype=torch.bool))
    refused("attn_mask.*keys", *dense, attn_mask=keep[:, :8])
    refused("attn_mask.*batch", *dense, attn_mask=torch.ones(3, 9, dtype=torch.bool))
    refused("attn_mask", *square, attn_mask=keep[:, :6], is_causal=True)
    refused("attn_mask", *dense, attn_mask=keep, attention_kwargs={"return_lse": True})
    refused("attn_mask", *dense, attn_mask=keep, attention_kwargs={"window_size": (2, 2)})

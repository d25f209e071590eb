"""PyTorch's own list of flash attention implementations, with us on it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import attention

import triton_fa
from triton_fa.integrations import FeatureError, torch_attention

if not hasattr(attention, "register_flash_attention_impl"):
    pytest.skip(f"torch {torch.__version__} has no such list", allow_module_level=True)

from torch.nn.attention.varlen import AuxRequest, varlen_attn, varlen_attn_out


@pytest.fixture
def active() -> Iterator[None]:
    torch_attention.register()
    attention.activate_flash_attention_impl("triton_fa")
    yield
    attention.restore_flash_attention_impl(_raise_warn=False)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def packed() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    tensors = torch.randn(7, 4, 16), torch.randn(9, 2, 16), torch.randn(9, 2, 16)
    return *tensors, ints(0, 3, 7), ints(0, 4, 9)


def test_registering_switches_nothing_on() -> None:
    torch_attention.register()
    torch_attention.register()
    assert attention.list_flash_attention_impls().count("triton_fa") == 1
    assert attention.current_flash_attention_impl() is None
    with pytest.raises(NotImplementedError, match="_flash_attention_forward"):
        varlen_attn(*packed(), 4, 5, enable_gqa=True)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 0), (1, 1)])
def test_varlen_attn(active: None, window: tuple[int, int]) -> None:
    assert attention.current_flash_attention_impl() == "triton_fa"
    arguments = packed()
    out, lse = varlen_attn(
        *arguments,
        4,
        5,
        enable_gqa=True,
        window_size=window,
        scale=0.3,
        return_aux=AuxRequest(lse=True),
    )
    want, want_lse = triton_fa.flash_attn_varlen_func(
        *arguments, 4, 5, window_size=window, softmax_scale=0.3, return_softmax_lse=True
    )
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    into = torch.empty_like(out)
    varlen_attn_out(into, *arguments, 4, 5, enable_gqa=True, window_size=window, scale=0.3)
    assert torch.equal(into, out)


@pytest.mark.parametrize("with_lengths", [False, True])
def test_varlen_attn_on_pages(active: None, with_lengths: bool) -> None:
    q, *_, cu_seqlens_q, cu_seqlens_k = packed()
    k, v = torch.randn(2, 4, 8, 2, 16)
    table, used = torch.stack((ints(3, 1), ints(0, 2))), ints(9, 13)
    cu_seqlens = cu_seqlens_k if with_lengths else None
    out = varlen_attn(
        *(q, k, v, cu_seqlens_q, cu_seqlens, 4, 16),
        enable_gqa=True,
        seqused_k=used,
        block_table=table,
        num_splits=1,
        window_size=(-1, 0),
    )
    want = triton_fa.flash_attn_varlen_func(
        *(q, k, v, cu_seqlens_q, None, 4), seqused_k=used, page_table=table, causal=True
    )
    torch.testing.assert_close(out, want)


def test_compiled(active: None) -> None:
    arguments = packed()

    def layer(q: torch.Tensor) -> Any:
        return varlen_attn(q, *arguments[1:], 4, 5, enable_gqa=True)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(arguments[0]), layer(arguments[0]))


def test_restored(active: None) -> None:
    attention.restore_flash_attention_impl()
    with pytest.raises(NotImplementedError, match="_flash_attention_forward"):
        varlen_attn(*packed(), 4, 5, enable_gqa=True)


def test_backward_is_refused(active: None) -> None:
    q, *rest = packed()
    out = varlen_attn(q.requires_grad_(), *rest, 4, 5, enable_gqa=True)
    with pytest.raises(FeatureError, match="backward"):
        out.sum().backward()


@pytest.mark.parametrize("causal", [False, True])
def test_dense(causal: bool) -> None:
    """What `scaled_dot_product_attention` calls on a GPU, strides of the result included."""
    q, k, v = (torch.randn(2, 6, heads, 16).transpose(1, 2) for heads in (4, 2, 2))
    out, lse, *_ = torch_attention._dense(q, k, v, is_causal=causal)
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, enable_gqa=True
    )
    torch.testing.assert_close(out, want)
    assert out.stride() == q.stride()
    assert lse.shape == (2, 4, 6)


@pytest.mark.gpu
def test_scaled_dot_product_attention(active: None) -> None:
    q, k, v = torch.randn(3, 2, 4, 64, 64, device="cuda", dtype=torch.bfloat16)
    with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    with attention.sdpa_kernel(attention.SDPBackend.MATH):
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("name", "value"),
    [("dropout_p", 0.1), ("return_debug_mask", True), ("alibi_slopes", torch.ones(4))],
)
def test_what_is_not_done_is_refused(name: str, value: object) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k = packed()
    options = {"dropout_p": 0.0, "is_causal": False, "return_debug_mask": False} | {name: value}
    with pytest.raises(FeatureError, match=name):
        torch_attention._forward(q, k, v, cu_seqlens_q, cu_seqlens_k, 4, 5, **options)

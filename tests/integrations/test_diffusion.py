"""The layer for diffusion engines: what it is passed decides, and is left alone."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import triton_fa
from triton_fa.integrations import diffusion
from triton_fa.integrations.diffusion import FlashAttentionImpl, FlashAttentionMetadata


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def layer(causal: bool = False, ver: str = "torch") -> FlashAttentionImpl:
    return FlashAttentionImpl(4, 16, causal, 0.3, num_kv_heads=2, prefix="blocks.0", ver=ver)


def dense() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(2, 6, 4, 16), torch.randn(2, 9, 2, 16), torch.randn(2, 9, 2, 16)


def wanted(causal: bool = False) -> Any:
    return triton_fa.flash_attn_func(*dense(), 0.3, causal, ver="torch", return_softmax_lse=True)


@pytest.mark.parametrize("ver", ["torch", "triton"])
@pytest.mark.parametrize("causal", [False, True])
def test_dense(ver: str, causal: bool) -> None:
    want, want_lse = wanted(causal)
    out = layer(causal, ver).forward(*dense())
    torch.testing.assert_close(out, want)
    out, lse = layer(causal, ver).forward(*dense(), return_softmax_lse=True)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)


@pytest.mark.parametrize(
    "metadata",
    [
        FlashAttentionMetadata(),
        FlashAttentionMetadata(max_seqlen_q=6),
        FlashAttentionMetadata(max_seqlen_k=9),
        FlashAttentionMetadata(6, 9),
        SimpleNamespace(max_seqlen_q=None, current_timestep=3),
        SimpleNamespace(),
    ],
)
def test_metadata_is_read_and_left_alone(metadata: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each maximum is filled in the call on its own, and only where it is None."""
    seen: list[tuple[int, int]] = []

    def spy(*arguments: Any, **options: Any) -> Any:
        seen.append(arguments[5:7])
        return triton_fa.flash_attn_varlen_func(*arguments, **options)

    monkeypatch.setattr(diffusion, "flash_attn_varlen_func", spy)
    before = copy.copy(metadata)
    out = layer().forward(*dense(), metadata)
    torch.testing.assert_close(out, wanted()[0])
    assert metadata == before
    assert seen == [(6, 9)]


def test_what_the_metadata_says_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def spy(*arguments: Any, **options: Any) -> Any:
        seen.append(arguments[5:7])
        return arguments[0]

    monkeypatch.setattr(diffusion, "flash_attn_varlen_func", spy)
    layer().forward(*dense(), FlashAttentionMetadata(max_seqlen_q=64))
    layer().forward(*dense(), FlashAttentionMetadata(max_seqlen_k=65))
    assert seen == [(64, 9), (6, 65)]


def test_one_layer_serves_calls_of_any_length() -> None:
    """Nothing of an earlier call is kept, metadata shared between calls included."""
    shared, attention = FlashAttentionMetadata(), layer()
    for seqlen in (9, 3, 7):
        q, k, v = (x[:, :seqlen] for x in dense())
        out = attention.forward(q, k, v, shared)
        torch.testing.assert_close(out, triton_fa.flash_attn_func(q, k, v, 0.3, ver="torch"))


def test_into_a_strided_buffer() -> None:
    buffer = torch.full((2, 6, 7, 16), torch.nan)
    assert layer().forward_into(*dense(), None)
    assert layer().forward_into(*dense(), buffer[:, :, 1:5])
    torch.testing.assert_close(buffer[:, :, 1:5], wanted()[0])
    assert buffer[:, :, [0, 5, 6]].isnan().all()


def test_packed() -> None:
    q, k = torch.randn(7, 4, 16), torch.randn(7, 2, 16)
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
    want = triton_fa.flash_attn_varlen_func(
        *(q, k, k, cu_seqlens, cu_seqlens, 4, 4), softmax_scale=0.3, ver="torch"
    )
    out = layer().forward_varlen(
        q, k, k, cu_seqlens=cu_seqlens, max_seqlen=4, cu_seqlens_host=(0, 3, 7)
    )
    torch.testing.assert_close(out, want)
    lengths = FlashAttentionMetadata(cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)
    torch.testing.assert_close(layer().forward(q, k, k, lengths), want)


def test_ring_chunks_merge_to_the_whole() -> None:
    q, k, v = (x[0] for x in dense())
    parts = [layer(True).forward_ring_kv_chunk(q, k[rows], v[rows]) for rows in SLICES]
    out, lse = triton_fa.merge_state(
        *(part for out, lse in parts for part in (out, lse.T.contiguous()))
    )
    want, want_lse = wanted()
    torch.testing.assert_close(out, want[0])
    torch.testing.assert_close(lse.T, want_lse[0])


SLICES = (slice(0, 4), slice(4, 9))

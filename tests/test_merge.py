"""Merging by Triton against merging by PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import triton_fa
from triton_fa import merge
from triton_fa.device import runs_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(
    not runs_triton(DEVICE), reason="needs a GPU or Triton's interpreter"
)


def parts(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and log sums of parts; one in four is empty and its output NaN."""
    rng = torch.Generator().manual_seed(seed)
    out = torch.randn(shape, generator=rng)
    lse = 4 * torch.randn(shape[:-1], generator=rng)
    empty = torch.rand(shape[:-1], generator=rng) < 0.25
    lse[empty] = torch.tensor([-torch.inf, torch.inf])[torch.randint(2, (1,), generator=rng)]
    out[empty] = torch.nan
    return out.to(DEVICE), lse.to(DEVICE)


def expected(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return merge._merge(out.double(), lse.double())


def close(found: torch.Tensor, exact: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found.double(), exact, atol=atol, rtol=atol)


@example(33, 1, 2, 3, 257, 0)  # one more part, and one more dim, than a block holds
@example(1, 1, 5, 8, 5, 0)  # rows whose parts are all empty,
@example(1, 1, 5, 8, 5, 4)  # some by a log-sum of +inf
@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 8, 17, 128, 256]),
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from([1, 3, 8]),
    st.sampled_from([1, 5, 64, 100, 257, 520]),
    st.integers(0, 99),
)
def test_splits(splits: int, batch: int, seqlen: int, heads: int, dim: int, seed: int) -> None:
    out, lse = parts(splits, batch, seqlen, heads, dim, seed=seed)
    found, total = triton_fa.flash_attn_combine(out, lse)
    exact, exact_total = expected(out, lse)
    close(found, exact)
    close(total, exact_total)
    assert total.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_any_strides_and_dtypes(dtype: torch.dtype) -> None:
    out, lse = parts(5, 3, 7, 4, 24)
    exact, exact_total = expected(out, lse)
    strided = out.permute(4, 2, 0, 3, 1).contiguous().permute(2, 4, 1, 3, 0)
    strided_lse = lse.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)
    buffer = torch.full((4, 7, 24, 3), torch.nan, dtype=dtype, device=DEVICE).permute(3, 1, 0, 2)
    found, total = triton_fa.flash_attn_combine(strided, strided_lse, out=buffer)
    assert found is buffer
    close(found, exact, 2e-2)
    close(total, exact_total)


def test_packed_sequences() -> None:
    out, lse = parts(4, 9, 4, 40)
    found, total = triton_fa.flash_attn_combine(out, lse)
    exact, exact_total = expected(out, lse)
    close(found, exact)
    close(total, exact_total)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 70), st.integers(1, 5), st.sampled_from([1, 8, 72, 128]), st.integers(0, 99))
def test_pairs(tokens: int, heads: int, dim: int, seed: int) -> None:
    out, lse = parts(2, tokens, heads, dim, seed=seed)
    v, s = triton_fa.merge_state(out[0], lse[0].t().contiguous().t(), out[1], lse[1])
    exact, exact_total = expected(out, lse)
    close(v, exact)
    close(s, exact_total)


def test_pairs_in_place() -> None:
    out, lse = parts(2, 33, 4, 64)
    exact, exact_total = expected(out, lse)
    for part in (0, 1):
        copies, sums = out.clone(), lse.clone()
        triton_fa.merge_state(copies[0], sums[0], copies[1], sums[1], copies[part], sums[part])
        close(copies[part], exact)
        close(sums[part], exact_total)


def test_no_splits_and_no_rows() -> None:
    out, lse = triton_fa.flash_attn_combine(
        torch.empty(0, 1, 2, 3, 8, device=DEVICE), torch.empty(0, 1, 2, 3, device=DEVICE)
    )
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    out, lse = triton_fa.flash_attn_combine(
        torch.empty(2, 0, 2, 3, 8, device=DEVICE), torch.empty(2, 0, 2, 3, device=DEVICE)
    )
    assert out.shape == (0, 2, 3, 8)
    empty = torch.empty(0, 3, 8, device=DEVICE), torch.empty(0, 3, device=DEVICE)
    assert triton_fa.merge_state(*empty, *empty)[0].shape == (0, 3, 8)

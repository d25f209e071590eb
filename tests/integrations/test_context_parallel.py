"""Two processes with half the keys each, against one with all of them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import triton_fa
from triton_fa.integrations.context_parallel import decode, merge_over_ranks, prefill

RANKS = 2

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed"),
    pytest.mark.xdist_group("ranks"),
]


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def on_rank(rank: int, checks: tuple[Callable[[int], Any], ...], store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    try:
        for check in checks:
            with torch.no_grad():
                found = check(rank)
            for one in found:  # every rank has the same bits
                others = [torch.empty_like(one) for _ in range(RANKS)]
                dist.all_gather(others, one.contiguous())
                assert torch.equal(others[0], others[1]), check.__name__
    finally:
        dist.destroy_process_group()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check_decode(rank: int) -> tuple[torch.Tensor, ...]:
    """Interleaved tokens; one rank has nothing of the last sequence."""
    q, sinks = random(3, 1, 4, 16), random(4, seed=5)
    k, v = random(3, 16, 2, 16, seed=1), random(3, 16, 2, 32, seed=2)
    lengths = ints(16, 9, 1)
    options: dict[str, Any] = {"softmax_scale": 0.3, "softcap": 4.0, "ver": "torch"}
    want, want_lse = triton_fa.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=lengths, sinks=sinks, return_softmax_lse=True, **options
    )
    out, lse = decode(
        q,
        k[:, rank::RANKS].contiguous(),
        v[:, rank::RANKS].contiguous(),
        cache_seqlens=(lengths + RANKS - 1 - rank) // RANKS,
        sinks=sinks,
        **options,
    )
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    return out, lse


def check_paged_decode(rank: int) -> tuple[torch.Tensor, ...]:
    """Through the kernels, on pages; each rank has some pages of each sequence."""
    q = random(2, 1, 4, 16)
    k, v = random(6, 4, 2, 16, seed=1), random(6, 4, 2, 16, seed=2)
    table, lengths = torch.stack((ints(4, 0, 2), ints(1, 5, 3))), ints(11, 6)
    want = triton_fa.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=lengths, page_table=table, ver="torch"
    )
    mine = (table[:, :1], table[:, 1:])[rank]
    out, lse = decode(
        q,
        k,
        v,
        cache_seqlens=(ints(4, 4), lengths - 4)[rank],
        page_table=mine.contiguous(),
        ver="triton",
    )
    torch.testing.assert_close(out, want, rtol=0, atol=1e-5)
    return out, lse


def check_prefill(rank: int) -> tuple[torch.Tensor, ...]:
    """Queries that are the last 7 of 11 tokens; their keys are cut in two at any place."""
    q, sinks = random(2, 7, 4, 16), random(4, seed=5)
    k, v = random(2, 11, 2, 16, seed=1), random(2, 11, 2, 16, seed=2)
    want, want_lse = triton_fa.flash_attn_func(
        q, k, v, causal=True, sinks=sinks, return_softmax_lse=True, ver="torch"
    )
    for cut in (0, 2, 4, 5, 10, 11):
        rows = (slice(0, cut), slice(cut, 11))[rank]
        out, lse = prefill(
            q, k[:, rows], v[:, rows], keys_after=(11 - cut, 0)[rank], sinks=sinks, ver="torch"
        )
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(lse, want_lse)
    return out, lse


def check_packed_merge(rank: int) -> tuple[torch.Tensor, ...]:
    """Parts of packed sequences in bfloat16; a row without any key on either rank."""
    q, k = random(5, 4, 16).bfloat16(), random(8, 2, 16, seed=1).bfloat16()
    cu_seqlens_q, cu_seqlens_k = ints(0, 3, 5), ints(0, 8, 8)
    want, want_lse = triton_fa.flash_attn_varlen_func(
        *(q, k, k, cu_seqlens_q, cu_seqlens_k, 3, 8), return_softmax_lse=True, ver="torch"
    )
    part = k[4 * rank : 4 * rank + 4]
    out, lse = merge_over_ranks(
        *triton_fa.flash_attn_varlen_func(
            *(q, part, part, cu_seqlens_q, ints(0, 4, 4), 3, 4),
            return_softmax_lse=True,
            ver="torch",
        )
    )
    assert out.dtype == torch.bfloat16
    assert lse.shape == want_lse.shape == (4, 5)
    # The parts, below 4, are rounded to bfloat16, and so is their sum.
    torch.testing.assert_close(out, want, rtol=0, atol=2 * 4 * 2**-9)
    torch.testing.assert_close(lse, want_lse)
    assert torch.equal(out[3:], torch.zeros_like(out[3:]))
    assert (lse[:, 3:] == -torch.inf).all()
    return out, lse


def test_on_two_ranks(tmp_path: Path) -> None:
    """Processes are slow to start, so one pair serves all checks; a traceback names the failed."""
    checks = (check_decode, check_paged_decode, check_prefill, check_packed_merge)
    mp.spawn(on_rank, (checks, os.fspath(tmp_path / "store")), nprocs=RANKS, join=True)


def test_masks_that_ranks_cannot_place_are_refused() -> None:
    q, k = random(1, 1, 2, 16), random(1, 4, 2, 16)
    for options in ({"causal": True}, {"window_size": (2, 0)}, {"attention_chunk": 4}):
        with pytest.raises(triton_fa.ArgumentValueError, match=next(iter(options))):
            decode(q, k, k, cache_seqlens=ints(4), **options)
        with pytest.raises(triton_fa.ArgumentValueError, match=next(iter(options))):
            prefill(q, k, k, keys_after=0, **options)
    with pytest.raises(triton_fa.ArgumentValueError, match="keys_after"):
        prefill(q, k, k, keys_after=-1)
    with pytest.raises(triton_fa.ArgumentValueError, match="one token"):
        decode(random(1, 2, 2, 16), k, k, cache_seqlens=ints(4))

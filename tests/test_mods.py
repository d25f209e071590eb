"""score_mod and mask_mod: functions of the caller's inside the kernels, and examples of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch.nn.attention.flex_attention import create_block_mask

import triton_fa
from triton_fa import ArgumentError, ArgumentTypeError, ArgumentValueError, UnsupportedError
from triton_fa.device import runs_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(
    not runs_triton(DEVICE), reason="needs a GPU or Triton's interpreter"
)
Grid = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@triton.jit
def alibi(score, batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):
    """A slope for each head times the distance."""
    distance = q_idx + seqlen_k - seqlen_q - kv_idx
    return score - tl.load(aux[0] + head) * tl.abs(distance)


@triton.jit
def capped(score, batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):
    """softcap=2 spelled out."""
    twice = tl.exp2(score * 1.4426950408889634)
    return 2.0 * (1.0 - 2.0 / (1.0 + twice))


@triton.jit
def causal_mask(batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):
    return kv_idx <= q_idx + seqlen_k - seqlen_q


@triton.jit
def everything(batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):
    return (q_idx >= 0) & (kv_idx >= 0)


@triton.jit
def nothing(batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):
    return (q_idx < 0) & (kv_idx < 0)


@triton.jit
def half_of_keys(batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):
    """Every other key."""
    return (kv_idx % 2 == 0) & (q_idx >= 0)


@triton.jit
def first_keys(batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):
    """Each head sees the first aux[0][batch, head] keys, of two heads."""
    return kv_idx < tl.load(aux[0] + batch * 2 + head) + 0 * q_idx


@triton.jit
def prefix_mask(batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):
    """Causal, but the first aux[0][batch] keys are seen by all."""
    return (kv_idx <= q_idx + seqlen_k - seqlen_q) | (kv_idx < tl.load(aux[0] + batch))


@triton.jit
def document_mask(batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):
    """Tokens of one document see each other; aux[0] numbers the documents of up to 128 tokens."""
    position = q_idx + seqlen_k - seqlen_q
    mine = tl.load(aux[0] + batch * 128 + tl.minimum(position, 127))
    return mine == tl.load(aux[0] + batch * 128 + tl.minimum(kv_idx, 127))


@triton.jit
def tree_mask(batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):
    """Draft tokens see all of the cache and their ancestors: aux[0] is (drafts, drafts) of 0, 1."""
    draft = kv_idx - (seqlen_k - seqlen_q)
    row = tl.minimum(q_idx, seqlen_q - 1)  # a tile has rows behind the last query
    cell = row * seqlen_q + tl.minimum(tl.maximum(draft, 0), seqlen_q - 1)
    return (draft < 0) | (tl.load(aux[0] + cell) != 0)


ONE = torch.ones(1, dtype=torch.int32, device=DEVICE)


class Batch:
    """Paged sequences in float16, and what they should give."""

    def __init__(self, lengths: tuple[int, ...], q_lens: tuple[int, ...]) -> None:
        rng = torch.Generator().manual_seed(0)
        self.lengths, self.q_lens = lengths, q_lens
        self.q = torch.randn(sum(q_lens), 4, 32, generator=rng).half()
        self.table = torch.randperm(len(lengths) * 16, generator=rng).view(-1, 16).int()
        self.k, self.v = torch.randn(2, len(lengths) * 16, 8, 2, 32, generator=rng).half()

    def call(self, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        given: dict[str, Any] = {
            "q": self.q,
            "k_cache": self.k,
            "v_cache": self.v,
            "cache_seqlens": torch.tensor(self.lengths, dtype=torch.int32),
            "page_table": self.table,
            "cu_seqlens_q": torch.tensor([0, *self.q_lens]).cumsum(0).int(),
            "max_seqlen_q": max(self.q_lens),
            "return_softmax_lse": True,
            "ver": "triton",
        } | options
        there = {n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in given.items()}
        if "aux_tensors" in there:
            there["aux_tensors"] = [
                x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in there["aux_tensors"]
            ]
        out, lse = triton_fa.flash_attn_with_kvcache(**there)
        return out.cpu(), lse.cpu()

    def expected(self, change: Any = None, keep: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """`change(score, batch, head, position, key)` and `keep(batch, position, key)`."""
        outs, lses, first = [], [], 0
        for i, (length, rows) in enumerate(zip(self.lengths, self.q_lens, strict=True)):
            token = torch.arange(length)
            pages = self.table[i].long()[token // 8]
            k, v = (c[pages, token % 8].double().repeat_interleave(2, 1) for c in (self.k, self.v))
            q = self.q[first : first + rows].double()
            first += rows
            scores = torch.einsum("qhd,khd->hqk", q, k) * 32**-0.5
            position = (torch.arange(rows) + length - rows)[:, None]
            if change:
                scores = change(scores, i, torch.arange(4)[:, None, None], position, token[None])
            if keep:
                scores = scores.masked_fill(~keep(i, position, token[None]), -math.inf)
            lse = scores.logsumexp(-1)
            weights = (scores - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
            outs.append(torch.einsum("hqk,khd->qhd", weights, v))
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses, 1)


def close(found: Any, exact: Any) -> None:
    torch.testing.assert_close(found[0].double(), exact[0], atol=4e-3, rtol=4e-3)
    torch.testing.assert_close(found[1].double(), exact[1], atol=1e-3, rtol=1e-3)


BATCHES = [((37, 4, 100), (1, 1, 1)), ((37, 40, 9), (3, 40, 1))]


@pytest.mark.parametrize(("lengths", "q_lens"), BATCHES)
def test_alibi(lengths: tuple[int, ...], q_lens: tuple[int, ...]) -> None:
    batch = Batch(lengths, q_lens)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])

    def change(scores: torch.Tensor, _: int, head: Any, position: Any, key: Any) -> torch.Tensor:
        return scores - slopes[head] * (position - key).abs()

    options: dict[str, Any] = {"score_mod": alibi, "aux_tensors": [slopes]}
    close(batch.call(**options), batch.expected(change))
    causal = batch.expected(change, lambda _, position, key: key <= position)
    close(batch.call(**options, causal=True), causal)
    split = batch.call(**options, causal=True, num_splits=3)
    close(split, causal)


@pytest.mark.parametrize(("lengths", "q_lens"), BATCHES)
def test_a_softcap_as_a_function(lengths: tuple[int, ...], q_lens: tuple[int, ...]) -> None:
    batch = Batch(lengths, q_lens)
    found, wanted = batch.call(score_mod=capped), batch.call(softcap=2.0)
    close(found, tuple(x.double() for x in wanted))


@pytest.mark.parametrize(("lengths", "q_lens"), BATCHES)
def test_causal_as_a_function(lengths: tuple[int, ...], q_lens: tuple[int, ...]) -> None:
    batch = Batch(lengths, q_lens)
    found, wanted = batch.call(mask_mod=causal_mask), batch.call(causal=True)
    close(found, tuple(x.double() for x in wanted))


@pytest.mark.parametrize(("lengths", "q_lens"), BATCHES)
def test_a_mask_beside_a_softcap(lengths: tuple[int, ...], q_lens: tuple[int, ...]) -> None:
    """Scores are capped before they are masked: what is hidden weighs nothing."""
    batch = Batch(lengths, q_lens)
    found = batch.call(mask_mod=half_of_keys, softcap=2.0)
    close(found, tuple(x.double() for x in batch.call(mask_mod=half_of_keys, score_mod=capped)))


@pytest.mark.parametrize(("lengths", "q_lens"), BATCHES)
def test_prefix_lm(lengths: tuple[int, ...], q_lens: tuple[int, ...]) -> None:
    batch = Batch(lengths, q_lens)
    prefix = torch.tensor([5, 30, 2], dtype=torch.int32)
    found = batch.call(mask_mod=prefix_mask, aux_tensors=(prefix,))
    wanted = batch.expected(keep=lambda i, position, key: (key <= position) | (key < prefix[i]))
    close(found, wanted)


def test_documents() -> None:
    batch = Batch((37, 40, 100), (3, 40, 1))
    number = (torch.arange(3 * 128).view(3, 128) % 128 // 7).int()
    found = batch.call(mask_mod=document_mask, aux_tensors=[number])
    close(found, batch.expected(keep=lambda i, p, key: number[i][p] == number[i][key]))


def test_a_tree_of_drafts() -> None:
    batch = Batch((37, 40), (4, 4))
    sees = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]).int()
    found = batch.call(mask_mod=tree_mask, aux_tensors=[sees])

    def keep(i: int, position: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        first = batch.lengths[i] - 4
        return (key < first) | (sees[position - first, (key - first).clamp(0)] == 1)

    close(found, batch.expected(keep=keep))


def test_a_row_without_any_key_is_empty() -> None:
    batch = Batch((37,), (3,))
    nowhere = torch.zeros(1, dtype=torch.int32)
    out, lse = batch.call(mask_mod=document_mask, aux_tensors=[torch.arange(128).int()])
    assert torch.isfinite(out).all()
    sees = torch.zeros(3, 3, dtype=torch.int32)
    short = Batch((3,), (3,))
    out, lse = short.call(mask_mod=tree_mask, aux_tensors=[sees, nowhere])
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_packed_keys_take_them_too() -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 50, 2, 32, generator=rng).half().to(DEVICE)
    prefix = torch.tensor([0, 20, 50], dtype=torch.int32, device=DEVICE)
    shared = (q, k, v, prefix, prefix, 30, 30)
    found = triton_fa.flash_attn_varlen_func(*shared, mask_mod=causal_mask, ver="triton")
    wanted = triton_fa.flash_attn_varlen_func(*shared, causal=True, ver="triton")
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3)


def test_keys_are_counted_behind_the_padding() -> None:
    batch = Batch((37,), (3,))
    padded = torch.tensor([6], dtype=torch.int32)
    found = batch.call(mask_mod=causal_mask, cache_leftpad=padded)
    wanted = batch.call(causal=True, cache_leftpad=padded)
    close(found, tuple(x.double() for x in wanted))


def lists(kept: torch.Tensor, size: tuple[int, int]) -> triton_fa.BlockSparseTensors:
    """The lists of a mask (queries, keys) of bools, as torch makes them for flex_attention."""
    queries, keys = kept.shape
    flags = kept.cpu()
    mask = create_block_mask(
        lambda b, h, q, k: flags[q, k], None, None, queries, keys, "cpu", BLOCK_SIZE=size
    )
    made = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    moved = (x.int().contiguous().to(DEVICE) for x in made)
    return triton_fa.BlockSparseTensors(*moved, block_size=size)


def causal_lists(rows: int, length: int, size: tuple[int, int]) -> triton_fa.BlockSparseTensors:
    position = torch.arange(rows)[:, None] + length - rows
    return lists(torch.arange(length)[None] <= position, size)


@pytest.mark.parametrize("size", [(16, 16), (32, 16), (16, 48), (64, 32)])
def test_listed_blocks_change_nothing_but_the_work(size: tuple[int, int]) -> None:
    batch = Batch((100,), (50,))
    listed = causal_lists(50, 100, size)
    found = batch.call(mask_mod=causal_mask, block_sparse_tensors=listed)
    close(found, tuple(x.double() for x in batch.call(causal=True)))


def test_blocks_in_no_list_are_not_read() -> None:
    batch = Batch((128,), (64,))
    kept = (torch.arange(128)[None] // 16 + torch.arange(64)[:, None] // 16) % 2 == 0
    listed = lists(kept, (16, 16))
    # Odd blocks of keys are seen by the second and the fourth block of queries alone.
    exact = batch.expected(keep=lambda i, p, k: kept)
    k, v = (x[batch.table[0].long()].reshape(1, 128, 2, 32) for x in (batch.k, batch.v))
    v[:, (torch.arange(128) // 16) % 2 == 1] = math.nan
    keys: dict[str, Any] = {"k_cache": k, "v_cache": v, "page_table": None}
    out, _ = batch.call(**keys, mask_mod=everything, block_sparse_tensors=listed)
    seen = (torch.arange(64) // 16) % 2 == 0
    torch.testing.assert_close(out[seen].double(), exact[0][seen], atol=4e-3, rtol=4e-3)
    assert out[~seen].isnan().all()


def test_full_blocks_are_not_masked_again() -> None:
    batch = Batch((96,), (48,))
    listed = lists(torch.ones(48, 96, dtype=torch.bool), (16, 16))
    found = batch.call(mask_mod=nothing, block_sparse_tensors=listed)
    close(found, tuple(x.double() for x in batch.call()))


@pytest.mark.parametrize("full", [True, False])
def test_one_list_serves_sequences_of_other_lengths(full: bool) -> None:
    batch = Batch((37, 100, 64), (30, 20, 64))
    listed = lists(torch.ones(64, 128, dtype=torch.bool), (16, 16))
    if not full:
        listed = listed._replace(
            mask_block_cnt=listed.full_block_cnt,
            mask_block_idx=listed.full_block_idx,
            full_block_cnt=None,
            full_block_idx=None,
        )
    found = batch.call(mask_mod=everything, block_sparse_tensors=listed)
    close(found, tuple(x.double() for x in batch.call()))


def test_a_list_for_each_sequence_and_head() -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 64, 2, 32, generator=rng).half().to(DEVICE)
    prefix = torch.tensor([[0, 16], [48, 64]], dtype=torch.int32)
    masks = [torch.arange(64)[None].expand(64, 64) < int(n) for n in prefix.flatten()]
    each = [lists(mask, (16, 16)) for mask in masks]
    joined = triton_fa.BlockSparseTensors(
        *(torch.cat([x[i] for x in each]).unflatten(0, (2, 2)).squeeze(2) for i in range(4)),
        block_size=(16, 16),
    )
    out = triton_fa.flash_attn_varlen_func(
        q,
        k,
        v,
        None,
        None,
        mask_mod=first_keys,
        aux_tensors=[prefix.to(DEVICE)],
        block_sparse_tensors=joined,
        ver="triton",
    )
    for b, h in itertools.product(range(2), range(2)):
        n = int(prefix[b, h])
        weights = (q[b, :, h].double() @ k[b, :n, h].double().T * 32**-0.5).softmax(-1)
        exact = weights @ v[b, :n, h].double()
        torch.testing.assert_close(out[b, :, h].double(), exact, atol=4e-3, rtol=4e-3)


def amid(tensor: torch.Tensor, filling: float) -> torch.Tensor:
    """A copy in the middle of memory that holds nothing else."""
    pool = torch.full((3, *tensor.shape), filling, dtype=tensor.dtype, device=tensor.device)
    pool[1] = tensor
    return pool[1]


def garbage(like: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Any numbers, and as many near those of a list."""
    wild = torch.randint(-(2**31), 2**31 - 1, like.shape, generator=rng)
    near = torch.randint(-2, 8, like.shape, generator=rng)
    return torch.where(torch.rand(like.shape, generator=rng) < 0.5, wild, near).int().to(DEVICE)


@pytest.mark.parametrize("seed", range(3))
def test_lists_of_garbage_stay_inside(seed: int) -> None:
    """What lies around them, and around the keys, changes nothing."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, 100, 1, 32, generator=rng).half().to(DEVICE)
    listed = causal_lists(100, 100, (16, 16))
    wild = [garbage(x, rng) for x in listed[:4] if x is not None]
    found = []
    for filling in (0, 3):
        moved = (amid(x, filling) for x in wild)
        given = triton_fa.BlockSparseTensors(*moved, block_size=(16, 16))
        found.append(
            triton_fa.flash_attn_varlen_func(
                q,
                amid(k, math.nan),
                amid(v, math.nan),
                None,
                None,
                mask_mod=everything,
                block_sparse_tensors=given,
                ver="triton",
            )
        )
    assert found[0].isfinite().all()
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"mask_block_cnt": 9}, "mask_block_cnt: expected 0 to 1, got 9"),
        ({"full_block_cnt": -1}, "full_block_cnt: expected 0 to 1, got -1"),
        ({"mask_block_cnt": 1, "mask_block_idx": -3}, r"mask_block_idx: .* got \[-3\]"),
    ],
)
def test_validation_reads_the_lists(
    fresh: pytest.MonkeyPatch, changed: dict[str, int], says: str
) -> None:
    fresh.setenv("TRITON_FA_VALIDATE", "1")
    batch = Batch((37,), (3,))
    cell = {"cnt": ONE.view(1, 1, 1), "idx": ONE.view(1, 1, 1, 1)}
    given = {f"{kind}_block_{part}": cell[part] * 0 for kind in ("mask", "full") for part in cell}
    batch.call(mask_mod=causal_mask, block_sparse_tensors=listing(given))
    given |= {name: cell[name[-3:]] * value for name, value in changed.items()}
    with pytest.raises(ArgumentError, match=says):
        batch.call(mask_mod=causal_mask, block_sparse_tensors=listing(given))


def listing(given: dict[str, torch.Tensor]) -> triton_fa.BlockSparseTensors:
    return triton_fa.BlockSparseTensors(**given, block_size=(16, 16))


def test_fa4s_own_class_is_taken() -> None:
    batch = Batch((100,), (50,))
    ours = causal_lists(50, 100, (16, 16))
    theirs = SimpleNamespace(**ours._asdict(), dq_write_order=None)
    found = batch.call(mask_mod=causal_mask, block_sparse_tensors=theirs)
    wanted = batch.call(mask_mod=causal_mask, block_sparse_tensors=ours)
    torch.testing.assert_close(found, wanted, atol=0, rtol=0)


def some_lists(**changed: Any) -> dict[str, Any]:
    given = causal_lists(3, 37, (16, 16))._replace(**changed)
    return {"mask_mod": causal_mask, "block_sparse_tensors": given}


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"score_mod": 3}, ArgumentTypeError, "score_mod: expected a function, got int"),
        ({"score_mod": capped, "softcap": 1.0}, ArgumentError, "score_mod.*softcap"),
        ({"mask_mod": causal_mask, "causal": True}, ArgumentError, "mask_mod.*causal"),
        ({"mask_mod": causal_mask, "window_size": (3, -1)}, ArgumentError, "mask_mod.*window"),
        ({"mask_mod": causal_mask, "attention_chunk": 3}, ArgumentError, "mask_mod.*chunk"),
        ({"aux_tensors": [torch.zeros(1)]}, ArgumentError, "aux_tensors: expected None without"),
        ({"score_mod": alibi, "aux_tensors": [3]}, ArgumentTypeError, r"aux_tensors\[0\]"),
        ({"score_mod": lambda *_: 0}, UnsupportedError, "score_mod: expected a @triton.jit"),
        ({"mask_mod": causal_mask, "ver": "torch"}, UnsupportedError, "mask_mod"),
        (some_lists() | {"mask_mod": None}, ArgumentError, "block_sparse.* without mask_mod"),
        (some_lists() | {"block_sparse_tensors": 3}, ArgumentTypeError, "BlockSparseT.*, got int"),
        (some_lists(block_size=None), ArgumentTypeError, "block_size: expected .queries, keys"),
        (some_lists(block_size=(16, 20)), ArgumentValueError, "multiples of 16, got"),
        (some_lists(block_size=(16, 2**20 + 16)), ArgumentValueError, "at most 1048576, got"),
        (some_lists(block_size=(2**31, 16)), ArgumentValueError, "at most 1048576, got"),
        (some_lists(full_block_cnt=None), ArgumentError, "full_block_cnt and full_block_idx"),
        (some_lists(cu_total_m_blocks=ONE), ArgumentError, "cu_total_m_blocks: expected None"),
        (some_lists(mask_block_cnt=ONE), ArgumentError, "mask_block_cnt: expected 3 dim"),
        (some_lists(mask_block_idx=ONE.view(())), ArgumentError, "mask_block_idx: expected 4 dim"),
        (some_lists(mask_block_idx=None), ArgumentTypeError, "mask_block_idx: expected a tensor"),
        (some_lists(mask_block_cnt=ONE.expand(1, 4, 1)), ArgumentError, "heads 1, got shape"),
        (some_lists(mask_block_cnt=ONE.expand(1, 1, 0)), ArgumentError, "max_seqlen_q=3, got 0"),
        (some_lists(mask_block_idx=ONE.expand(1, 1, 1, 1).long()), ArgumentError, "dtype int32"),
        (some_lists(mask_block_idx=ONE.expand(1, 1, 1, 0)), ArgumentError, r"\(1, 1, 1, 1\)"),
        (some_lists(mask_block_idx=ONE.expand(1, 1, 1, 2)), ArgumentError, "last stride 1"),
    ],
)
def test_what_is_not_clear_is_refused(options: dict[str, Any], error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        Batch((37,), (3,)).call(**options)

"""Functions of the caller's, and lists of key blocks, on the Hopper kernel: emulated on a CPU, see
`test_hopper.py`; on a GPU of compute capability 9.0 the same cases run on it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import triton_fa
from tests.portability.compiler import planning_for
from tests.portability.targets import TARGETS
from tests.test_hopper import H200, launched, served
from tests.test_mods import (
    alibi,
    amid,
    capped,
    causal_lists,
    causal_mask,
    everything,
    first_keys,
    garbage,
    lists,
    nothing,
)
from triton_fa.device import DeviceFacts
from triton_fa.kernels import hopper_plans, plans
from triton_fa.problem import Problem

pytestmark = pytest.mark.skipif(
    isinstance(hopper_plans.kernel_module(), str), reason="this Triton's Gluon has other names"
)
Seen = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""(sequence, positions of queries as a column, keys as a row) -> what they see."""


@triton.jit
def prefix_mask(batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):
    """Causal, but the first aux[0][batch] keys are seen by all."""
    return (kv_idx <= q_idx + seqlen_k - seqlen_q) | (kv_idx < tl.load(aux[0] + batch))


@triton.jit
def document_mask(batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):
    """Tokens of one document see each other; aux[0] numbers the documents of up to 512 tokens."""
    position = tl.maximum(tl.minimum(q_idx + seqlen_k - seqlen_q, 511), 0)
    mine = tl.load(aux[0] + batch * 512 + position)
    return mine == tl.load(aux[0] + batch * 512 + tl.maximum(tl.minimum(kv_idx, 511), 0))


@triton.jit
def causal_scores(score, batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):
    """A mask by way of scores: whole tiles may be -inf."""
    return tl.where(kv_idx <= q_idx + seqlen_k - seqlen_q, score, float("-inf"))


@pytest.fixture
def on_hopper(fresh: pytest.MonkeyPatch) -> Iterator[None]:
    """As in `test_hopper.py`."""
    yield from served(fresh)


PAGES = 160


class Batch:
    """Sequences in one layout of keys, and what attention over them gives."""

    def __init__(
        self,
        q_lens: tuple[int, ...],
        k_lens: tuple[int, ...],
        device: str,
        *,
        layout: str = "packed",
        dim: int = 128,
        heads: tuple[int, int] = (2, 1),
        dtype: torch.dtype = torch.float16,
    ) -> None:
        rng = torch.Generator().manual_seed(0)
        self.q_lens, self.k_lens, self.layout, self.dim = q_lens, k_lens, layout, dim
        self.group = heads[0] // heads[1]
        self.q = torch.randn(sum(q_lens), heads[0], dim, generator=rng).to(device, dtype)
        keys = torch.randn(2, sum(k_lens), heads[1], dim, generator=rng).to(device, dtype)
        self.k, self.v = keys
        self.device = device
        self.table = torch.randperm(PAGES, generator=rng).int()

    def prefix(self, lens: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor([0, *lens], device=self.device).cumsum(0).int()

    def cache(self, packed: torch.Tensor) -> torch.Tensor:
        """The packed keys as rows of a batch or as pages of 16; NaN is what no sequence has."""
        most = -(-max(self.k_lens) // 16) * 16
        rows = packed.new_full((len(self.k_lens), most, *packed.shape[1:]), math.nan)
        for row, keys in zip(rows, packed.split(self.k_lens), strict=True):
            row[: len(keys)] = keys
        if self.layout == "dense":
            return rows
        pages = packed.new_full((PAGES, 16, *packed.shape[1:]), math.nan)
        pages[self.pages().long()] = rows.unflatten(1, (-1, 16))
        return pages

    def pages(self) -> torch.Tensor:
        most = -(-max(self.k_lens) // 16)
        return self.table[: most * len(self.k_lens)].view(-1, most).to(self.device)

    def call(self, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        given: dict[str, Any] = {
            "q": self.q,
            "cu_seqlens_q": self.prefix(self.q_lens),
            "max_seqlen_q": max(self.q_lens),
            "return_softmax_lse": True,
            "num_splits": 1,
            "ver": "triton",
        }
        if self.layout == "packed":
            given |= {"k": self.k, "v": self.v, "cu_seqlens_k": self.prefix(self.k_lens)}
            given |= {"max_seqlen_k": max(self.k_lens)}
            return triton_fa.flash_attn_varlen_func(**given | options)
        given |= {"k_cache": self.cache(self.k), "v_cache": self.cache(self.v)}
        given["cache_seqlens"] = torch.tensor(self.k_lens, device=self.device).int()
        if self.layout == "paged":
            given["page_table"] = self.pages()
        return triton_fa.flash_attn_with_kvcache(**given | options)

    def expected(
        self, seen: Seen | None = None, change: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """In float64; `change(scores, sequence, positions, keys)`."""
        outs, lses = [], []
        of_batch = (x.split(n) for x, n in ((self.q, self.q_lens), (self.k, self.k_lens)))
        for i, (q, k, v) in enumerate(zip(*of_batch, self.v.split(self.k_lens), strict=True)):
            q = q.double().cpu()
            k, v = (x.double().cpu().repeat_interleave(self.group, 1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) * self.dim**-0.5
            position = (torch.arange(len(q)) + len(k) - len(q))[:, None]
            key = torch.arange(len(k))[None]
            if change:
                scores = change(scores, i, position, key)
            if seen:
                scores = scores.masked_fill(~seen(i, position, key), -math.inf)
            lse = scores.logsumexp(-1)
            weights = (scores - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
            outs.append(torch.einsum("hqk,khd->qhd", weights, v))
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses, 1)


def close(found: Any, exact: Any, tolerance: float = 4e-3) -> None:
    out, lse = (x.cpu().double() for x in found)
    torch.testing.assert_close(out, exact[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, exact[1], atol=1e-3, rtol=1e-3)


def causal(_: int, position: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return key <= position


LENGTHS = ((150, 70, 300), (310, 70, 290))
LAYOUTS = ["packed", "dense", "paged"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_causal_as_a_function(layout: str, on_hopper: None, device: str) -> None:
    batch = Batch(*LENGTHS, device, layout=layout)
    close(batch.call(mask_mod=causal_mask), batch.expected(causal))


DIMS = sorted({dim for dim, dim_v in hopper_plans.TILES if dim == dim_v})


@pytest.mark.parametrize("dim", DIMS)
def test_head_dims(dim: int, on_hopper: None, device: str) -> None:
    batch = Batch((200,), (330,), device, dim=dim)
    listed = causal_lists(200, 330, (128, 128))
    exact = batch.expected(causal)
    close(batch.call(mask_mod=causal_mask), exact)
    close(batch.call(mask_mod=causal_mask, block_sparse_tensors=listed), exact)
    close(batch.call(score_mod=causal_scores), exact)
    assert len(launched) == 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_function_that_reads(layout: str, on_hopper: None, device: str) -> None:
    batch = Batch(*LENGTHS, device, layout=layout)
    prefix = torch.tensor([200, 30, 290], dtype=torch.int32, device=device)
    found = batch.call(mask_mod=prefix_mask, aux_tensors=(prefix,))
    close(found, batch.expected(lambda i, p, key: (key <= p) | (key < int(prefix[i]))))
    number = (torch.arange(3 * 512).view(3, 512) % 512 // 77).int().to(device)
    found = batch.call(mask_mod=document_mask, aux_tensors=[number])
    of_token = number.cpu()
    close(found, batch.expected(lambda i, p, key: of_token[i][p.clamp(0)] == of_token[i][key]))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (100, 20)}])
def test_alibi(options: dict[str, Any], on_hopper: None, device: str) -> None:
    batch = Batch(*LENGTHS, device, heads=(4, 2))
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], device=device)

    def change(scores: torch.Tensor, _: int, position: Any, key: Any) -> torch.Tensor:
        return scores - slopes.cpu()[:, None, None] * (position - key).abs()

    left, right = options.get("window_size", (1000, 0 if options else 1000))
    exact = batch.expected(lambda _, p, key: (key >= p - left) & (key <= p + right), change)
    close(batch.call(score_mod=alibi, aux_tensors=[slopes], **options), exact)


def test_a_softcap_as_a_function(on_hopper: None, device: str) -> None:
    batch = Batch(*LENGTHS, device)
    found, wanted = (batch.call(causal=True, **o) for o in ({"score_mod": capped}, {"softcap": 2}))
    close(found, tuple(x.cpu().double() for x in wanted))


def test_a_mask_beside_a_softcap_and_a_score(on_hopper: None, device: str) -> None:
    batch = Batch(*LENGTHS, device)
    wanted = tuple(x.cpu().double() for x in batch.call(causal=True, softcap=2.0))
    close(batch.call(mask_mod=causal_mask, softcap=2.0), wanted)
    close(batch.call(mask_mod=causal_mask, score_mod=capped), wanted)


def test_keys_are_counted_behind_the_padding(on_hopper: None, device: str) -> None:
    """And lists, whose blocks begin elsewhere, are left alone."""
    batch = Batch(*LENGTHS, device, layout="dense", heads=(1, 1))
    padding = torch.tensor([60, 0, 129], dtype=torch.int32, device=device)
    wanted = tuple(x.cpu().double() for x in batch.call(causal=True, cache_leftpad=padding))
    close(batch.call(mask_mod=causal_mask, cache_leftpad=padding), wanted)
    hidden = lists(torch.zeros(300, 310, dtype=torch.bool), (128, 128))
    options: dict[str, Any] = {"cache_leftpad": padding, "block_sparse_tensors": hidden}
    close(batch.call(mask_mod=causal_mask, **options), wanted)
    close(batch.call(score_mod=causal_scores, cache_leftpad=padding), wanted)


SIZES = [(128, 128), (256, 128), (128, 384), (1024, 1024)]


@pytest.mark.parametrize(
    ("layout", "size"),
    [("packed", size) for size in SIZES] + [(layout, (128, 128)) for layout in LAYOUTS[1:]],
)
def test_listed_blocks(layout: str, size: tuple[int, int], on_hopper: None, device: str) -> None:
    """The same tiles in the same order as by the flag: the same bits."""
    batch = Batch((300,), (500,), device, layout=layout, heads=(1, 1))
    listed = causal_lists(300, 500, size)
    found = batch.call(mask_mod=causal_mask, block_sparse_tensors=listed)
    assert len(launched) == 1
    wanted = batch.call(causal=True)
    if size[1] == 128:
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])
    close(found, tuple(x.cpu().double() for x in wanted))


def test_scores_by_a_function_in_listed_blocks(on_hopper: None, device: str) -> None:
    batch = Batch((300,), (500,), device, heads=(4, 2))
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], device=device)
    options: dict[str, Any] = {"score_mod": alibi, "aux_tensors": [slopes]}
    listed = causal_lists(300, 500, (128, 128))
    found = batch.call(mask_mod=causal_mask, block_sparse_tensors=listed, **options)
    wanted = batch.call(causal=True, **options)
    close(found, tuple(x.cpu().double() for x in wanted))


def test_listed_blocks_at_head_dim_64(on_hopper: None, device: str) -> None:
    """Tiles of 192 queries would leave their block."""
    batch = Batch((300,), (400,), device, dim=64)
    listed = causal_lists(300, 400, (128, 128))
    found = batch.call(mask_mod=causal_mask, block_sparse_tensors=listed)
    close(found, batch.expected(causal))
    if device == "cpu":
        assert launched == [(3, 1, 1)]


def test_blocks_in_no_list_are_not_read(on_hopper: None, device: str) -> None:
    batch = Batch((300,), (640,), device)
    block = torch.arange(640)[None] // 128 + torch.arange(300)[:, None] // 128
    listed = lists(block % 2 == 0, (128, 128))
    exact = batch.expected(lambda i, p, k: block % 2 == 0)
    odd = (torch.arange(640) // 128) % 2 == 1
    batch.v[odd.to(device)] = math.nan
    out, _ = batch.call(mask_mod=everything, block_sparse_tensors=listed)
    seen = (torch.arange(300) // 128) % 2 == 0
    torch.testing.assert_close(out.cpu()[seen].double(), exact[0][seen], atol=4e-3, rtol=4e-3)
    assert out.cpu()[~seen].isnan().all()


def test_no_block_at_all(on_hopper: None, device: str) -> None:
    """Some rows of blocks see nothing; keys are NaN that would show."""
    batch = Batch((300,), (300,), device)
    kept = torch.arange(300)[:, None].expand(300, 300) // 128 == 1
    listed = lists(kept, (128, 128))
    exact = batch.expected(lambda i, p, k: kept)
    close(batch.call(mask_mod=everything, block_sparse_tensors=listed), exact)


def full_lists(queries: int, keys: int, size: tuple[int, int]) -> triton_fa.BlockSparseTensors:
    """All blocks are full."""
    rows, columns = (-(-n // step) for n, step in zip((queries, keys), size, strict=True))
    return lists(torch.ones(rows * size[0], columns * size[1], dtype=torch.bool), size)


@pytest.mark.parametrize("length", [256, 300, 385])
def test_full_blocks_are_not_masked_again(length: int, on_hopper: None, device: str) -> None:
    batch = Batch((200,), (length,), device)
    for size in SIZES:
        listed = full_lists(200, length, size)
        found = batch.call(mask_mod=nothing, block_sparse_tensors=listed)
        close(found, batch.expected())


def test_a_full_block_on_the_end_is_not_masked(on_hopper: None, device: str) -> None:
    """Beside a block of which nothing is seen."""
    batch = Batch((128,), (300,), device)
    listed = full_lists(128, 300, (128, 128))
    first, rest = (torch.tensor([entries], device=device).int() for entries in ([0], [1, 2]))
    listed = listed._replace(
        mask_block_cnt=first.view(1, 1, 1) + 1,
        mask_block_idx=first.view(1, 1, 1, 1),
        full_block_cnt=first.view(1, 1, 1) + 2,
        full_block_idx=rest.view(1, 1, 1, 2),
    )
    found = batch.call(mask_mod=nothing, block_sparse_tensors=listed)
    close(found, batch.expected(lambda i, p, key: key >= 128 + 0 * p))


@pytest.mark.parametrize("kind", ["full", "masked", "both"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_list_serves_sequences_of_other_lengths(
    kind: str, layout: str, on_hopper: None, device: str
) -> None:
    batch = Batch((150, 260, 64, 300), (310, 129, 512, 1), device, layout=layout)
    listed = full_lists(300, 512, (128, 128))
    if kind == "masked":
        listed = listed._replace(
            mask_block_cnt=listed.full_block_cnt,
            mask_block_idx=listed.full_block_idx,
            full_block_cnt=None,
            full_block_idx=None,
        )
    elif kind == "both":
        counts, entries = listed.full_block_cnt, listed.full_block_idx
        assert counts is not None
        assert entries is not None
        listed = listed._replace(
            mask_block_cnt=torch.ones_like(counts),
            mask_block_idx=entries,
            full_block_cnt=counts - 1,
            full_block_idx=entries[..., 1:].contiguous(),
        )
    found = batch.call(mask_mod=everything, block_sparse_tensors=listed)
    close(found, batch.expected())


def test_more_blocks_than_are_counted_at_once(on_hopper: None, device: str) -> None:
    batch = Batch((128,), (17000,), device, heads=(1, 1), dim=64)
    found = batch.call(
        mask_mod=causal_mask, block_sparse_tensors=causal_lists(128, 17000, (128, 128))
    )
    close(found, batch.expected(causal))


def test_a_list_for_each_sequence_and_head(on_hopper: None, device: str) -> None:
    batch = Batch((200, 200), (200, 200), device, heads=(2, 2), dim=64)
    prefix = torch.tensor([[3, 130], [200, 128]], dtype=torch.int32, device=device)
    masks = [torch.arange(200)[None].expand(200, 200) < int(n) for n in prefix.flatten()]
    each = [lists(mask, (128, 128)) for mask in masks]
    joined = triton_fa.BlockSparseTensors(
        *(torch.cat([x[i] for x in each]).unflatten(0, (2, 2)).squeeze(2) for i in range(4)),
        block_size=(128, 128),
    )
    options: dict[str, Any] = {"block_sparse_tensors": joined, "aux_tensors": [prefix]}
    found = batch.call(mask_mod=first_keys, **options)
    most = prefix.cpu()[:, :, None, None]

    def change(scores: torch.Tensor, i: int, position: torch.Tensor, key: Any) -> torch.Tensor:
        return scores.masked_fill(key >= most[i], -math.inf)

    close(found, batch.expected(change=change))


@pytest.mark.parametrize("seed", range(3))
def test_lists_of_garbage_stay_inside(seed: int, on_hopper: None, device: str) -> None:
    """What lies around them, and around the keys, changes nothing."""
    rng = torch.Generator().manual_seed(seed)
    batch = Batch((300,), (390,), device)
    batch.k, batch.v = amid(batch.k, math.nan), amid(batch.v, math.nan)
    listed = causal_lists(300, 390, (128, 128))
    wild = [garbage(x, rng) for x in listed[:4] if x is not None]
    found = []
    for filling in (0, 3):
        moved = (amid(x, filling) for x in wild)
        given = triton_fa.BlockSparseTensors(*moved, block_size=(128, 128))
        found.append(batch.call(mask_mod=everything, block_sparse_tensors=given)[0])
    assert found[0].isfinite().all()
    assert torch.equal(*found)


@pytest.mark.parametrize("dim", [128, 256])
def test_float8(dim: int, on_hopper: None, device: str) -> None:
    """Limits of e4m3, whose weights have three bits behind the point."""
    batch = Batch((200,), (330,), device, dim=dim)
    exact = batch.expected(causal)
    batch.q, batch.k, batch.v = (x.to(torch.float8_e4m3fn) for x in (batch.q, batch.k, batch.v))
    options = {"mask_mod": causal_mask}
    listed = causal_lists(200, 330, (128, 128))
    found = [
        batch.call(**options),
        batch.call(**options, block_sparse_tensors=listed),
        batch.call(score_mod=causal_scores),
    ]
    wanted = batch.call(causal=True)
    for out, lse in found:
        torch.testing.assert_close(out, wanted[0], atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(lse, wanted[1], atol=1e-3, rtol=1e-3)
    assert (wanted[0].cpu().double() - exact[0]).norm() < 0.2 * exact[0].norm()


# ---------------------------------------------------------------- which kernel takes them


@pytest.mark.parametrize(
    ("dim", "size", "reason"),
    [
        (128, (128, 128), None),
        (128, (64, 128), "head dims 128, 128 with lists of blocks of (64, 128)"),
        (128, (128, 192), "head dims 128, 128 with lists of blocks of (128, 192)"),
        (64, (192, 128), None),
        (64, (128, 128), None),
        (64, (64, 64), "head dims 64, 64 with lists of blocks of (64, 64)"),
        (256, (128, 64), None),
    ],
)
def test_blocks_that_hold_tiles(
    dim: int, size: tuple[int, int], reason: str | None, fresh: pytest.MonkeyPatch, device: str
) -> None:
    """Others are left to the portable kernel, and the debug log says why."""
    made: list[Problem] = []

    def spy(problem: Problem, facts: DeviceFacts) -> plans.Plan:
        made.append(problem)
        raise InterruptedError

    fresh.setattr(plans, "plan", spy)
    batch = Batch((100,), (100,), device, dim=dim)
    with pytest.raises(InterruptedError):
        batch.call(mask_mod=causal_mask, block_sparse_tensors=causal_lists(100, 100, size))
    fresh.setattr(hopper_plans, "unavailable", lambda device: None)
    fresh.setattr(hopper_plans, "fault_of", lambda *given: "")
    found = hopper_plans.refusals(made[0], H200)
    assert found == ([] if reason is None else [reason])
    tile = hopper_plans.tile_of(made[0])
    assert (tile is None) is (reason is not None)
    assert tile is None or size[0] % tile.block_m == size[1] % tile.block_n == 0


@pytest.mark.parametrize(("fault", "kernel"), [("", "hopper_kernel"), ("no", "prefill_kernel")])
def test_functions_that_the_kernel_cannot_hold(
    fault: str, kernel: str, fresh: pytest.MonkeyPatch, device: str
) -> None:
    seen: list[tuple[Any, ...]] = []

    def fault_of(*given: Any) -> str:
        seen.append(given)
        return fault

    with planning_for(TARGETS["sm_90"]) as steps:
        fresh.setattr(hopper_plans, "unavailable", lambda device: None)
        fresh.setattr(hopper_plans, "fault_of", fault_of)
        batch = Batch((200,), (200,), "cpu")
        batch.call(score_mod=alibi, aux_tensors=[torch.ones(2)], mask_mod=causal_mask)
    assert kernel in [step.kernel.__name__ for step in steps]
    assert seen == [(alibi, causal_mask, (torch.float32,), False)]


@triton.jit
def counted(batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):
    """Says for itself how many numbers there are."""
    return kv_idx > tl.arange(0, 128)[None, :]


@triton.jit
def in_columns(score, batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):
    """Sums over queries, which several warps have."""
    return score - tl.sum(score, 0)[None, :]


@triton.jit
def elementwise(score, batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):
    bias = tl.load(aux[0] + tl.minimum(kv_idx, 7), mask=kv_idx >= 0, other=0).to(tl.float32)
    return tl.where(q_idx % 2 == 0, tl.sigmoid(score), tl.exp(score) * tl.cdiv(q_idx, 3)) + bias


FAULTS = {
    "causal_mask": "",
    "elementwise": "",
    "first_keys": "",
    "counted": "counted: TypeError: ",
    "in_columns": "in_columns: scores of several warps depend on each other",
}


def test_what_can_be_part_of_the_kernel() -> None:
    """From a process without the interpreter: there functions are compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_hopper_mods"],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    for name, fault in FAULTS.items():
        assert (fault in found[name]) if fault else not found[name], (name, found[name])
    warnings = [line for line in done.stderr.splitlines() if "prefill does not run on" in line]
    assert len(warnings) == sum(map(bool, FAULTS.values()))  # though each was asked for twice


if __name__ == "__main__":
    kinds = (torch.int64,)
    asked = {}
    for each in (*FAULTS, *FAULTS):
        mod = globals()[each]
        is_mask = mod.arg_names[0] == "batch"
        pair = (None, mod) if is_mask else (mod, None)
        asked[each] = hopper_plans.fault_of(*pair, kinds, False)
    sys.stdout.write(json.dumps(asked))

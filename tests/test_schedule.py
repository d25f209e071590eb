"""The scheduler metadata, its planner, and what splitting and batch invariance promise."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import triton_fa
from triton_fa import api
from triton_fa.errors import ArgumentError, ArgumentValueError, UnsupportedError
from triton_fa.kernels import plans
from triton_fa.kernels.prefill import sequences_in_order

BLOCK_N = 32  # of the interpreter's decode tile
BLOCK_M = 32  # and of its prefill tile


def _metadata(lengths: list[int], **arguments: object) -> torch.Tensor:
    settings: dict[str, object] = {
        "max_seqlen_q": 1,
        "max_seqlen_k": 4096,
        "num_heads": 8,
        "num_heads_k": 2,
        "headdim": 64,
        "qkv_dtype": torch.float16,
        "causal": True,
        "ver": "triton",
    }
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    return triton_fa.get_scheduler_metadata(
        len(lengths), cache_seqlens=seqlens, **settings | arguments
    )


def _segments(metadata: torch.Tensor) -> list[list[int]]:
    """Decode tiles, visible keys, the sequences in prefill order, row tiles."""
    decode, visible, order, rows = metadata[:-1].view(4, -1).tolist()
    return [decode, visible, [entry & 0xFFFF for entry in order], rows]


@pytest.mark.parametrize("batch", [1, 3, 4, 5, 300])
def test_its_length_depends_on_the_batch_alone(batch: int) -> None:
    metadata = _metadata([17] * batch)
    assert metadata.dtype == torch.int32
    assert metadata.shape == (4 * ((batch + 3) // 4 * 4) + 1,)


def test_decode_tiles_are_summed_up() -> None:
    lengths = [100, 0, 37, 300, 5]
    tiles, expected = 0, []
    for length in lengths:
        tiles += max(1, -(-length // BLOCK_N))
        expected.append(tiles)
    decode, visible, order, rows = _segments(_metadata(lengths))
    assert decode == [*expected, 0, 0, 0]
    assert visible == [*lengths, 0, 0, 0]
    assert sorted(order[:5]) == [0, 1, 2, 3, 4]
    assert rows == [0] * 8  # one query each: nothing for the prefill path


def test_a_window_counts_only_what_it_shows() -> None:
    full, _, _, _ = _segments(_metadata([1000, 20]))
    local, visible, _, _ = _segments(_metadata([1000, 20], window_size=(63, 0)))
    assert full[:2] == [32, 33]
    assert local[:2] == [2, 3]
    assert visible[:2] == [64, 20]


def test_prefill_order_is_longest_first() -> None:
    queries = [1, 90, 0, 29, 280]
    prefix = torch.tensor([0, *queries]).cumsum(0).int()
    metadata = _metadata(
        [100, 90, 37, 300, 280], cu_seqlens_q=prefix, max_seqlen_q=280, num_heads_k=8
    )
    _, _, order, rows = _segments(metadata)
    tiles = [-(-n // BLOCK_M) if n > 16 else 0 for n in queries]
    assert order[:2] == [4, 3]
    expected, total = [], 0
    for seq in order[:5]:
        total += tiles[seq]
        expected.append(total)
    assert rows[:5] == expected


def test_the_longest_of_sequences_is_first_whatever_its_length() -> None:
    """Its rows times its keys, times the sequences of a block, are beyond 32 bits."""
    queries = [300, 2**20, 100]
    prefix = torch.tensor([0, *queries]).cumsum(0).int()
    bounds = {"max_seqlen_q": 2**20, "max_seqlen_k": 2**20}
    keys = [300, 2**20 - BLOCK_N, 100]
    metadata = _metadata(keys, cu_seqlens_q=prefix, num_heads_k=8, **bounds)
    assert _segments(metadata)[2][:3] == [1, 0, 2]


def test_sums_go_on_from_block_to_block(fresh: pytest.MonkeyPatch) -> None:
    """Beyond 1024 sequences the batch's own order stays, and sums are carried; so here beyond 4."""
    fresh.setattr(plans, "_block_b", lambda batch: 4)
    queries = [90, 1, 70, 0, 29, 65, 200, 1, 66, 64, 128]
    prefix = torch.tensor([0, *queries]).cumsum(0).int()
    metadata = _metadata(queries, cu_seqlens_q=prefix, max_seqlen_q=200, num_heads_k=8)
    decode, _, order, rows = _segments(metadata)
    decode_tiles = [1 if n > 16 else max(1, -(-n // BLOCK_N)) for n in queries]
    row_tiles = [-(-n // BLOCK_M) if n > 16 else 0 for n in queries]
    assert order[:11] == list(range(11))
    assert decode[:11] == list(itertools.accumulate(decode_tiles))
    assert rows[:11] == list(itertools.accumulate(row_tiles))


def test_a_buffer_is_filled_in_place_and_completely() -> None:
    out = torch.full((4 * 8 + 1,), -7, dtype=torch.int32)
    metadata = _metadata([100, 0, 37, 300, 5], out=out)
    assert metadata is out
    assert torch.equal(out, _metadata([100, 0, 37, 300, 5]))
    assert -7 not in out.tolist()


def test_a_buffer_of_another_length_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"out: expected shape \(33,\)"):
        _metadata([1] * 5, out=torch.zeros(32, dtype=torch.int32))


def test_fa4_has_no_such_tensor() -> None:
    with pytest.raises(UnsupportedError, match="get_scheduler_metadata"):
        _metadata([1], ver=4)


@pytest.mark.parametrize("name", ["attention_chunk", "max_seqlen_k_new"])
def test_a_negative_size_is_refused(name: str) -> None:
    with pytest.raises(ArgumentValueError, match=name):
        _metadata([1], ver="triton", **{name: -1})


def _paged(lengths_q: list[int], lengths_k: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """A cache of its own for each sequence, so that parts of the batch can be taken."""
    rng = torch.Generator().manual_seed(seed)
    page, heads_q, heads_kv, dim = 16, 4, 2, 32
    pages = [-(-n // page) for n in lengths_k]
    table = torch.zeros(len(pages), max(pages), dtype=torch.int32)
    for row, count in enumerate(pages):
        table[row, :count] = torch.arange(sum(pages[:row]), sum(pages[: row + 1]))
    shape = (sum(pages), page, heads_kv, dim)
    return {
        "k": torch.randn(shape, generator=rng),
        "v": torch.randn(shape, generator=rng),
        "q": torch.randn(sum(lengths_q), heads_q, dim, generator=rng),
        "table": table,
        "lengths_q": torch.tensor(lengths_q, dtype=torch.int32),
        "lengths_k": torch.tensor(lengths_k, dtype=torch.int32),
    }


def _attend(data: dict[str, torch.Tensor], rows: list[int], **options: object) -> torch.Tensor:
    """Attention of the sequences `rows` alone, in that order."""
    lengths_q = data["lengths_q"]
    starts = torch.cat([torch.zeros(1), lengths_q.cumsum(0)]).int()
    q = torch.cat([data["q"][starts[r] : starts[r + 1]] for r in rows])
    prefix = torch.cat([torch.zeros(1), lengths_q[rows].cumsum(0)]).int()
    settings: dict[str, object] = {
        "page_table": data["table"][rows],
        "max_seqlen_q": int(lengths_q[rows].max()),
        "causal": True,
        "ver": "triton",
    }
    out = triton_fa.flash_attn_with_kvcache(
        q,
        data["k"],
        data["v"],
        cache_seqlens=data["lengths_k"][rows],
        cu_seqlens_q=prefix,
        **settings | options,
    )
    assert isinstance(out, torch.Tensor)
    return out


@pytest.mark.parametrize("num_splits", [1, 2, 3, 7, 100])
def test_splitting_changes_nothing_but_rounding(num_splits: int) -> None:
    data = _paged([1, 1, 3, 1], [700, 5, 130, 0 + 33])
    rows = [0, 1, 2, 3]
    torch.testing.assert_close(
        _attend(data, rows, num_splits=num_splits), _attend(data, rows), rtol=0, atol=2e-6
    )


def test_unsplit_rows_need_no_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """num_splits=1 writes every sequence directly, without partial results and their merge."""
    planned: list[plans.Plan] = []
    real = plans.plan

    def spied(*given: Any) -> plans.Plan:
        planned.append(real(*given))
        return planned[-1]

    monkeypatch.setattr(plans, "plan", spied)
    data = _paged([1], [300])
    _attend(data, [0], num_splits=1)
    _attend(data, [0], num_splits=4)
    unsplit, split = planned
    assert (len(unsplit.launches), unsplit.partial_floats) == (1, 0)
    assert len(split.launches) == 2
    assert split.partial_floats > 0


INVARIANT = _paged([1, 1, 3, 1, 1], [700, 5, 130, 1, 2300])


@pytest.mark.parametrize("rows", [[4], [0], [2], [4, 0], [3, 1, 4]])
def test_batch_invariant_rows_keep_their_bits(rows: list[int]) -> None:
    whole = _attend(INVARIANT, [0, 1, 2, 3, 4], batch_invariant=True)
    part = _attend(INVARIANT, rows, batch_invariant=True)
    starts = [0, 1, 2, 5, 6, 7]
    expected = torch.cat([whole[starts[r] : starts[r + 1]] for r in rows])
    assert torch.equal(part, expected)


@pytest.mark.parametrize("window_size", [(-1, -1), (40, 0)])
def test_batch_invariant_rows_keep_their_bits_under_other_bounds(
    window_size: tuple[int, int],
) -> None:
    """Neither the bound of the query lengths nor the width of the table is part of a row."""
    data = _paged([1, 1, 3], [300, 5, 130])
    rows = [0, 1, 2]
    options = {"batch_invariant": True, "window_size": window_size}
    expected = _attend(data, rows, **options)
    assert torch.equal(_attend(data, rows, max_seqlen_q=5, **options), expected)
    wide = torch.nn.functional.pad(data["table"], (0, 70))
    assert torch.equal(_attend(data, rows, page_table=wide, **options), expected)
    # Alone, with the bound at its own length: the variant for one query token.
    assert torch.equal(_attend(data, [0], **options), expected[:1])


@pytest.mark.parametrize("entry", ["kvcache", "varlen", "dense"])
@pytest.mark.parametrize("wanted", [True, False])
def test_every_function_passes_the_mode_on(
    entry: str, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    real = plans.plan

    def spied(problem: Any, device: Any) -> plans.Plan:
        seen.append(problem.spec.batch_invariant)
        return real(problem, device)

    monkeypatch.setattr(plans, "plan", spied)
    q, k, v = torch.zeros(3, 1, 4, 2, 16)
    settings: dict[str, Any] = {"batch_invariant": wanted, "ver": "triton"}
    if entry == "kvcache":
        triton_fa.flash_attn_with_kvcache(q, k, v, **settings)
    elif entry == "varlen":
        triton_fa.flash_attn_varlen_func(q, k, v, None, None, **settings)
    else:
        triton_fa.flash_attn_func(q, k, v, **settings)
    assert seen == [wanted]


@pytest.mark.parametrize("programs", [4, 5, 6])
def test_batch_invariant_bits_with_any_number_of_programs(
    programs: int, fresh: pytest.MonkeyPatch
) -> None:
    """Programs that enter one sequence and leave another half-way; last pieces that are short."""
    # 7 and 4 tiles of two heads for four programs: a range ends nearest to the first one's end.
    for lengths in ([224, 128], [700, 1000, 5, 610]):
        data = _paged([1, 2, 1, 3][: len(lengths)], lengths)
        rows = list(range(len(lengths)))
        results = []
        for n in (1, programs):
            fresh.setattr(plans, "decode_programs", lambda *given, n=n: n)
            api._RECORDS.clear()
            results.append(_attend(data, rows, batch_invariant=True))
        assert torch.equal(*results)


@pytest.mark.parametrize("row", range(4))
def test_drafts_keep_their_bits(row: int) -> None:
    """2, 40, 18 and 66 rows: two classes of the decode path, and the prefill path."""
    lengths = [1, 20, 9, 33]
    data = _paged(lengths, [300, 200, 5, 70])
    whole = _attend(data, [0, 1, 2, 3], batch_invariant=True).split(lengths)[row]
    alone = _attend(data, [row], batch_invariant=True, max_seqlen_q=lengths[row])
    assert torch.equal(alone, whole)
    # Where all have as many rows only their own class is launched.
    dense = triton_fa.flash_attn_with_kvcache(
        data["q"].split(lengths)[row][None],
        data["k"],
        data["v"],
        cache_seqlens=data["lengths_k"][[row]],
        page_table=data["table"][[row]],
        causal=True,
        batch_invariant=True,
        ver="triton",
    )
    assert torch.equal(dense[0], whole)


@pytest.mark.parametrize(("queries", "launches"), [(1, 2), (8, 2), (9, 2), (32, 2), (33, 1)])
def test_a_dense_call_launches_one_class(
    queries: int, launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = plans.plan

    def spied(problem: Any, device: Any) -> plans.Plan:
        made = real(problem, device)
        seen.append(len(made.launches))
        return made

    monkeypatch.setattr(plans, "plan", spied)
    q, k, v = torch.zeros(1, queries, 4, 16), *torch.zeros(2, 1, 40, 2, 16)
    triton_fa.flash_attn_with_kvcache(q, k, v, batch_invariant=True, causal=True, ver="triton")
    assert seen == [launches]


def test_without_the_mode_they_do_not() -> None:
    whole = _attend(INVARIANT, [0, 1, 2, 3, 4])
    assert not torch.equal(_attend(INVARIANT, [4]), whole[6:])


def test_batch_invariant_rows_keep_their_bits_beside_a_prefill() -> None:
    data = _paged([1, 1, 3, 1, 40], [700, 5, 130, 1, 2300])
    whole = _attend(data, [0, 1, 2, 3, 4], batch_invariant=True)
    assert torch.equal(_attend(data, [0, 1, 2], batch_invariant=True), whole[:5])
    assert torch.equal(_attend(data, [4], batch_invariant=True), whole[6:])


def _metadata_for(data: dict[str, torch.Tensor], rows: list[int]) -> torch.Tensor:
    return _metadata(
        data["lengths_k"][rows].tolist(), num_heads=4, headdim=32, qkv_dtype=torch.float32
    )


@triton.jit
def order_kernel(into_ptr, plan_ptr, batch, segment, BLOCK_B: tl.constexpr):
    idx = tl.arange(0, BLOCK_B)
    order = sequences_in_order(plan_ptr, batch, segment, BLOCK_B)
    tl.store(into_ptr + idx, order, mask=idx < batch)


def _order(metadata: torch.Tensor, batch: int) -> list[int]:
    into = torch.full((batch,), -1, dtype=torch.int32)
    order_kernel[(1,)](into, metadata, batch, (metadata.shape[0] - 1) // 4, 32)
    return into.tolist()


def test_an_order_is_taken_only_if_it_is_one() -> None:
    queries = [1, 90, 0, 280, 29, 70]
    prefix = torch.tensor([0, *queries]).cumsum(0).int()
    metadata = _metadata(queries, cu_seqlens_q=prefix, max_seqlen_q=280, num_heads_k=8)
    order = _order(metadata, 6)
    assert order[:4] == [3, 1, 5, 4]
    assert [order[place] for place in order] != list(range(6))  # it is not its own inverse
    assert sorted(order) == list(range(6))
    segment = slice(16, 22)  # behind two segments of eight
    for broken in (
        metadata[segment].flip(0),
        torch.zeros(6),
        metadata[segment] & 0xFFFF,
        metadata[segment] + 1,
        torch.full((6,), -1),
        torch.full((6,), 2**31 - 1),
    ):
        other = metadata.clone()
        other[segment] = broken.int()
        assert _order(other, 6) == list(range(6))
    assert _order(_metadata([9] * 6)[: 4 * 8 + 1], 5) == list(range(5))


@pytest.mark.parametrize("kind", ["fresh", "other order", "zero", "random"])
def test_a_plan_for_prefill_is_advice(kind: str) -> None:
    queries = [40, 3, 90, 1, 200, 0]
    data = _paged(queries, [n + 7 for n in queries])
    rows = list(range(6))
    prefix = torch.tensor([0, *queries]).cumsum(0).int()
    model = {"num_heads": 4, "headdim": 32, "qkv_dtype": torch.float32, "max_seqlen_q": 200}
    metadata = _metadata(data["lengths_k"].tolist(), cu_seqlens_q=prefix, **model)
    if kind == "other order":
        backwards = torch.tensor([0, *queries[::-1]]).cumsum(0).int()
        metadata = _metadata(data["lengths_k"].tolist(), cu_seqlens_q=backwards, **model)
    elif kind == "zero":
        metadata.zero_()
    elif kind == "random":
        metadata.random_(-(2**31), 2**31 - 1, generator=torch.Generator().manual_seed(1))
    expected = _attend(data, rows)
    assert torch.equal(_attend(data, rows, scheduler_metadata=metadata), expected)


@pytest.mark.parametrize("given", [True, False])
def test_a_given_plan_is_not_made_again(given: bool, fresh: pytest.MonkeyPatch) -> None:
    queries = [40, 3, 90, 1, 200, 0]
    data = _paged(queries, [n + 7 for n in queries])
    seen: list[plans.Plan] = []
    real = plans.plan

    def spied(problem: Any, device: Any) -> plans.Plan:
        seen.append(real(problem, device))
        return seen[-1]

    fresh.setattr(plans, "plan", spied)
    metadata = torch.zeros(4 * 8 + 1, dtype=torch.int32) if given else None
    _attend(data, list(range(6)), scheduler_metadata=metadata)
    kernels = [launch.kernel.__name__ for launch in seen[0].launches]
    assert ("schedule_kernel" in kernels) is not given
    assert seen[0].plan_entries == (0 if given else 4 * 8 + 1)
    prefill = seen[0].launches[kernels.index("prefill_kernel")]
    assert prefill.values["PLANNED"]


@pytest.mark.parametrize("kind", ["fresh", "zero", "stale", "random"])
def test_metadata_is_advice(kind: str) -> None:
    data = _paged([1, 1, 1, 1], [700, 5, 130, 33])
    rows = [0, 1, 2, 3]
    fresh = _metadata_for(data, rows)
    rng = torch.Generator().manual_seed(1)
    given = {
        "fresh": fresh,
        "zero": torch.zeros_like(fresh),
        "stale": _metadata([1, 2000, 3, 4], num_heads=4, headdim=32, qkv_dtype=torch.float32),
        "random": torch.randint(-(2**31), 2**31 - 1, fresh.shape, generator=rng).int(),
    }[kind]
    assert torch.equal(_attend(data, rows, scheduler_metadata=given), _attend(data, rows))


def test_metadata_of_another_length_raises() -> None:
    data = _paged([1, 1], [70, 5])
    with pytest.raises(ArgumentError, match=r"scheduler_metadata: expected shape \(17,\)"):
        _attend(data, [0, 1], scheduler_metadata=torch.zeros(33, dtype=torch.int32))


def _planner(**options: object) -> triton_fa.StepPlanner:
    settings: dict[str, object] = {"dtype": torch.float16, "page_size": 16, "device": "cpu"}
    return triton_fa.StepPlanner(8, 8, 2, 64, **settings | {"ver": "triton"} | options)


def test_the_planner_keeps_full_and_sliding_layers_apart() -> None:
    planner = _planner(window_size=(63, 0))
    lengths = torch.tensor([1000, 20], dtype=torch.int32)
    full, sliding = planner.plan(lengths, max_seqlen_k=4096)
    assert sliding is not None
    assert torch.equal(full, _metadata([1000, 20], page_size=16))
    assert torch.equal(sliding, _metadata([1000, 20], page_size=16, window_size=(63, 0)))


def test_the_planner_refills_what_a_graph_captured() -> None:
    planner = _planner(window_size=(63, 0))
    lengths = torch.ones(3, dtype=torch.int32)
    captured = planner.plan(lengths, max_seqlen_k=4096)
    before = [t.clone() for t in captured if t is not None]
    lengths.copy_(torch.tensor([900, 7, 300]))
    replayed = planner.plan(lengths, max_seqlen_k=4096)
    for old, now, copy in zip(captured, replayed, before, strict=True):
        assert old is not None
        assert now is not None
        assert old.data_ptr() == now.data_ptr()
        assert old.shape == now.shape
        assert not torch.equal(old, copy)  # the captured tensor reads the new schedule


def test_the_planner_without_a_window_has_one_schedule() -> None:
    assert _planner().plan(torch.ones(2, dtype=torch.int32), max_seqlen_k=64).sliding is None


def test_the_planner_refuses_a_batch_it_has_no_room_for() -> None:
    with pytest.raises(ArgumentValueError, match="at most 8 lengths, got 9"):
        _planner().plan(torch.ones(9, dtype=torch.int32), max_seqlen_k=64)

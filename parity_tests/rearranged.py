"""The same call arranged otherwise, for relations between results that need no exact one.

Cases have an lse, no `only_qv` and no buffer for the result.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch

from parity_tests.budgets import Result, Truth, judge_pair
from parity_tests.caches import differ
from parity_tests.cases import Case
from parity_tests.layouts import bits, int32, kv_buffers, prefix_sum, strided
from parity_tests.runners import Prepared, Ver, public_call

Tensor = torch.Tensor
Arguments = dict[str, Any]

# One number, or one row, of each sequence.
_PER_SEQUENCE = (
    "seqused_q",
    "seqused_k",
    "cache_seqlens",
    "cache_leftpad",
    "cache_batch_idx",
    "rotary_seqlens",
    "q_descale",
    "k_descale",
    "v_descale",
)


def attend(case: Case, arguments: Arguments, ver: Ver, **how: Any) -> Result:
    """The result of a call."""
    out, lse = public_call(case, arguments | how, ver)[:2]
    return Result(out, lse)


def by_sequence(case: Case, result: Result, chosen: Sequence[int] | None = None) -> list[Result]:
    """The rows of each sequence without padding, out (tokens, ...) and lse (heads, tokens).

    `chosen` are the sequences of the call, if those are not all of the case in its order.
    """
    assert result.lse is not None, "the case asks for the lse"
    chosen = range(case.batch) if chosen is None else chosen
    starts = prefix_sum([case.seqlens_q[b] + case.pad_q for b in chosen])
    found = []
    for place, b in enumerate(chosen):
        if case.q_layout == "batched":
            out, lse = result.out[place], result.lse[place]
        else:
            out, lse = result.out[starts[place] :], result.lse[:, starts[place] :]
        tokens = case.seqlens_q[b]
        found.append(Result(out[:tokens], lse[:, :tokens]))
    return found


def packed(parts: Iterable[Result]) -> Result:
    """The rows of several results behind each other."""
    parts = list(parts)
    lses = [part.lse for part in parts if part.lse is not None]
    return Result(torch.cat([part.out for part in parts]), torch.cat(lses, -1))


def packed_truth(case: Case, device: str) -> Truth:
    """What says how far two results of the case may be apart."""
    truth = Prepared.of(case, device).truth
    exact = packed(by_sequence(case, Result(truth.out, truth.lse)))
    baseline = packed(by_sequence(case, Result(truth.baseline, truth.lse)))
    assert exact.lse is not None, "it was given"
    return Truth(exact.out, exact.lse, baseline.out)


def assert_same_bits(one: Result, other: Result) -> None:
    """Fail where a bit differs."""
    for name in ("out", "lse"):
        wrong = differ(getattr(one, name), getattr(other, name))
        assert not wrong.any(), f"{name} differs in {int(wrong.sum())} of {wrong.numel()} numbers"


def assert_close(
    case: Case, one: Result, other: Result, truth: Truth, slack: Tensor | None = None
) -> None:
    """Fail where two packed results are further apart than rounding takes them."""
    problems = judge_pair(case, one, other, truth, slack)
    assert not problems, problems


def key_names(case: Case) -> tuple[str, str]:
    """What the function calls the keys and values that are there already."""
    return ("k_cache", "v_cache") if case.entry == "kvcache" else ("k", "v")


def _with_keys(case: Case, arguments: Arguments, places: Any, shape: tuple[int, ...]) -> Arguments:
    """Keys and values of these places of the call's own, in memory laid out alike."""
    names = key_names(case)
    moved = kv_buffers(shape, case, torch.nan, str(arguments[names[0]].device))
    for name, into in zip(names, moved, strict=True):
        bits(into)[:] = bits(arguments[name])[places]
    return arguments | dict(zip(names, moved, strict=True))


def with_pages(case: Case, arguments: Arguments, source: Tensor, table: Tensor) -> Arguments:
    """The call with another page table; page p of it is a copy of page source[p]."""
    moved = _with_keys(case, arguments, source, (len(source), case.page_size))
    return moved | {"page_table": table.to(arguments["page_table"])}


def pages_in_use(case: Case, arguments: Arguments) -> Tensor:
    """Which entries of the page table are pages; the rest is garbage that nothing reads."""
    table: Tensor = arguments["page_table"]
    return (table >= 0) & (table < len(arguments[key_names(case)[0]]))


def of_sequences(case: Case, arguments: Arguments, chosen: Sequence[int]) -> Arguments:
    """The call with these sequences only, in this order, and no rows behind the last one."""
    index = torch.tensor(chosen)
    changed: Arguments = {
        name: arguments[name][index.to(arguments[name].device)]
        for name in _PER_SEQUENCE
        if isinstance(arguments.get(name), torch.Tensor)
    }
    for names, prefix in ((("q", "qv"), "cu_seqlens_q"), (("k", "v"), "cu_seqlens_k_new")):
        if prefix == "cu_seqlens_k_new" and not case.append:
            continue
        places = _places(arguments, prefix, chosen, changed)
        for name in names:
            if name in arguments:
                rows = bits(arguments[name])[places]
                dtype = case.dtype if prefix == "cu_seqlens_q" else case.of_keys
                where = str(rows.device)
                changed[name] = strided(rows.shape, case.q_strided, torch.nan, dtype, where)
                bits(changed[name])[:] = rows
    if case.batch_idx:  # rows are looked up
        return arguments | changed
    if case.kv_layout == "paged":
        return arguments | changed | {"page_table": arguments["page_table"][index]}
    places = _places(arguments, "cu_seqlens_k", chosen, changed)
    count = len(places) if case.kv_layout == "packed" else len(chosen)
    lead = (count,) if case.kv_layout == "packed" else (count, case.capacity)
    return _with_keys(case, arguments, places, lead) | changed


def _places(arguments: Arguments, prefix: str, chosen: Sequence[int], changed: Arguments) -> Tensor:
    """Rows that belong to these sequences; where they are packed `changed` gets new prefix sums."""
    if arguments.get(prefix) is None:
        return torch.tensor(chosen)
    spans = list(pairwise(arguments[prefix].tolist()))
    lengths = [spans[b][1] - spans[b][0] for b in chosen]
    changed[prefix] = int32(prefix_sum(lengths), str(arguments[prefix].device))
    return torch.cat([torch.arange(*spans[b]) for b in chosen])


def in_chunks(case: Case, arguments: Arguments, size: int, ver: Ver) -> Result:
    """`size` queries of each sequence at a time, the cache as long as it was by then.

    For causal calls on a cache, with packed queries.
    """
    parts: list[list[Result]] = [[] for _ in range(case.batch)]
    starts = prefix_sum(list(case.seqlens_q))
    device = str(arguments["q"].device)
    for first in range(0, max(case.seqlens_q), size):
        spans = [(min(first, n), min(first + size, n)) for n in case.seqlens_q]
        lengths = [end - begin for begin, end in spans]
        ends = zip(case.seqlens_k, case.seqlens_q, spans, strict=True)
        chunk = case.with_changes(seqlens_q=tuple(lengths), tail_q=0)
        changed: Arguments = {
            "cu_seqlens_q": int32(prefix_sum(lengths), device),
            "max_seqlen_q": max(lengths),
            "cache_seqlens": int32([max(0, sk - sq + end) for sk, sq, (_, end) in ends], device),
        }
        rows = [at + i for at, span in zip(starts[:-1], spans, strict=True) for i in range(*span)]
        changed |= {name: arguments[name][rows] for name in ("q", "qv") if name in arguments}
        for b, part in enumerate(by_sequence(chunk, attend(chunk, arguments | changed, ver))):
            parts[b].append(part)
    return packed(packed(each) for each in parts)

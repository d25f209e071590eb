"""What a case makes use of, by name: to have every pair of them in a run, and to say so."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import combinations, product

from parity_tests.cases import Case, unbounded
from parity_tests.legality import FLOAT8

FEATURES: Mapping[str, Callable[[Case], bool]] = {
    "append": lambda case: sum(case.new) > 0,
    "rotary": lambda case: case.rotary_dim > 0 and sum(case.new) > 0,
    "leftpad": lambda case: any(case.leftpads),
    "batch_idx": lambda case: case.batch_idx,
    "chunk": lambda case: case.attention_chunk > 0,
    "window": lambda case: not unbounded(case.window),
    "causal": lambda case: case.causal,
    "softcap": lambda case: case.softcap > 0,
    "sinks": lambda case: case.sinks,
    "num_splits": lambda case: (case.num_splits or 0) > 1,
    "lse": lambda case: case.lse,
    "out": lambda case: case.out,
    "packed q": lambda case: case.q_layout == "packed",
    "q_len > 1": lambda case: max(case.seqlens_q) > 1,
    "paged": lambda case: case.kv_layout == "paged",
    "dense cache": lambda case: case.entry == "kvcache" and case.kv_layout == "batched",
    "qv": lambda case: case.qv,
    "only_qv": lambda case: bool(case.only_qv),
    "float8": lambda case: case.dtype in FLOAT8,
    "float8 cache": lambda case: bool(case.kv_dtype),
    "descales": lambda case: bool(case.descales),
}
# What cannot go together, and what goes with something else only.
APART = frozenset(
    frozenset(pair)
    for pair in (
        ("paged", "dense cache"),
        ("float8", "float8 cache"),
        *product(("rotary",), ("float8", "float8 cache", "descales")),
        *product(("qv", "only_qv"), ("float8",)),
        *product(("only_qv",), ("append", "rotary")),
    )
)
NEEDS = {"rotary": ("append",), "only_qv": ("qv",), "descales": ("float8", "float8 cache")}
PAIRS = tuple(pair for pair in combinations(FEATURES, 2) if frozenset(pair) not in APART)
# What a call of flash_attn_with_kvcache has or has not; a cache that is not dense is paged.
CHOICES = tuple(name for name in FEATURES if name != "paged")
TOGETHER = 6  # choices on at the same time: with more of them one hides what another does wrong


def of(case: Case) -> frozenset[str]:
    """The features that a case makes use of."""
    return frozenset(name for name, used in FEATURES.items() if used(case))


def coverage(cases: Iterable[Case]) -> dict[str, dict[str, int]]:
    """How many of the cases have each feature, and each pair of features that may go together."""
    alone, together = Counter(dict.fromkeys(FEATURES, 0)), Counter(dict.fromkeys(PAIRS, 0))
    for case in cases:
        used = of(case)
        alone.update(used)
        together.update(pair for pair in PAIRS if used.issuperset(pair))
    return {"alone": dict(alone), "pairs": {" + ".join(pair): n for pair, n in together.items()}}


def covering(seed: int) -> list[frozenset[str]]:
    """Choices of a few calls: each one by itself, and any two of them together in some call."""
    pick = random.Random(seed)
    rows = [_with_needs({name}) for name in CHOICES]
    left = {frozenset(pair) for pair in combinations(CHOICES, 2)} - APART - _pairs(rows)
    while left:
        row = _with_needs(set(pick.choice(sorted(left, key=sorted))))
        while len(row) < TOGETHER:
            others = [name for name in pick.sample(CHOICES, len(CHOICES)) if _fits(name, row)]
            best = max(others, key=lambda name: sum({name, on} in left for on in row))
            row = _with_needs(row | {best})
        rows.append(row)
        left -= _pairs(rows[-1:])
    return rows


def _fits(name: str, row: frozenset[str]) -> bool:
    """Whether a choice is not in the row yet and may go together with all that is."""
    return name not in row and not _pairs([_with_needs(row | {name})]) & APART


def _with_needs(row: Iterable[str]) -> frozenset[str]:
    """The row with what its choices are not possible without: the last of the ways, by default."""
    needs = [ways[-1] for name, ways in NEEDS.items() if name in row and not {*ways} & {*row}]
    return frozenset([*row, *needs])


def _pairs(rows: Iterable[frozenset[str]]) -> set[frozenset[str]]:
    return {frozenset(pair) for row in rows for pair in combinations(row, 2)}

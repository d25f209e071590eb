"""What a legal case is, as hypothesis strategies, and the generated cases of a run.

Two steps. A `Spec` holds the axes that each cost a compilation (dtype, head dims, page size,
flags): short lists, few specs per run. A `Case` adds what costs nothing (lengths, padding,
splits): drawn freely, around the edges of pages and tiles.
"""

import itertools
import random
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import hypothesis
from hypothesis import strategies as st

from parity_tests.cases import ENTRIES, KV_STRIDES, Case, Spec

T = TypeVar("T")

# Which entry the specs of a run are for, in turn: decode matters most, dense least.
TURNS = ("kvcache", "varlen", "dense", "kvcache", "varlen", "kvcache", "varlen", "kvcache")
TILES = (16, 32, 64, 128)  # rows and keys that kernels take at a time


@dataclass(frozen=True)
class Scale:
    """How large generated cases may get."""

    batch: int
    seqlen_q: int
    seqlen_k: int
    work: int  # bound on scores over all heads
    heads_kv: tuple[int, ...]
    groups: tuple[int, ...]
    head_dims: tuple[int, ...]
    page_sizes: tuple[int, ...]


FULL = Scale(
    batch=9,
    seqlen_q=1100,
    seqlen_k=4200,
    work=2**25,
    heads_kv=(1, 2, 3, 8),
    groups=(1, 2, 3, 4, 5, 7, 8, 16),
    head_dims=(32, 40, 64, 72, 80, 96, 112, 128, 160, 192, 256),
    page_sizes=(1, 5, 16, 64, 128, 256),
)
SMALL = Scale(  # for Triton's interpreter
    batch=3,
    seqlen_q=20,
    seqlen_k=70,
    work=2**13,
    heads_kv=(1, 2),
    groups=(1, 2, 3, 5, 7),
    head_dims=(16, 40, 64, 72, 128),
    page_sizes=(1, 3, 16, 64),
)


def windows(limit: int) -> st.SearchStrategy[tuple[int | None, int | None]]:
    """Window sides: unbounded in either spelling, nothing but the key itself, small, wide."""
    side = st.sampled_from((-1, None, 0, 1, 7, limit // 8, limit // 2))
    return st.one_of(st.just((-1, -1)), st.tuples(side, side))


@st.composite
def specs(draw: st.DrawFn, scale: Scale, entries: tuple[str, ...] = ENTRIES) -> Spec:
    """The compile-time axes of a legal call."""
    entry = draw(st.sampled_from(entries))
    kv_layout = draw(
        st.sampled_from(
            {
                "kvcache": ("paged", "paged", "batched"),
                "varlen": ("packed", "packed", "paged", "batched"),
                "dense": ("batched",),
            }[entry]
        )
    )
    q_layout = "batched" if entry == "dense" else draw(st.sampled_from(("packed", "batched")))
    heads_kv = draw(st.sampled_from(scale.heads_kv))
    head_dim = draw(st.sampled_from(scale.head_dims))
    strides = [s for s in KV_STRIDES if not (s == "split" and kv_layout == "packed")]
    return Spec(
        entry=entry,
        dtype=draw(st.sampled_from(("bfloat16", "bfloat16", "float16", "float32"))),
        heads_q=heads_kv * draw(st.sampled_from(scale.groups)),
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=draw(
            st.sampled_from((head_dim, head_dim, draw(st.sampled_from(scale.head_dims))))
        ),
        q_layout=q_layout,
        kv_layout=kv_layout,
        page_size=draw(st.sampled_from(scale.page_sizes)) if kv_layout == "paged" else 0,
        kv_strides=draw(st.sampled_from(strides)),
        q_strided=draw(st.booleans()),
        causal=draw(st.booleans()),
        window=draw(windows(scale.seqlen_k)),
        softcap=draw(st.sampled_from((0.0, 0.0, 0.0, 15.0, 50.0))),
        sinks=draw(st.sampled_from((False, False, True))),
        lse=draw(st.sampled_from((True, True, False))),
        out=draw(st.booleans()),
    )


def lengths_around(edges: tuple[int, ...], most: int) -> st.SearchStrategy[int]:
    """Zero, one, one beside every edge, and anything up to the limit."""
    near = {0, 1, *(edge + by for edge in edges for by in (-1, 0, 1))}
    return st.one_of(
        st.sampled_from(sorted(n for n in near if 0 <= n <= most)), st.integers(0, most)
    )


@st.composite
def cases(draw: st.DrawFn, scale: Scale, spec: st.SearchStrategy[Spec] | None = None) -> Case:
    """A legal case; give `spec` to choose the compile-time axes from a list."""
    chosen = draw(spec if spec is not None else specs(scale))
    batch = draw(st.integers(1, scale.batch))
    k_length = lengths_around((*TILES, max(1, chosen.page_size)), scale.seqlen_k)
    q_length = st.one_of(st.integers(0, 5), lengths_around(TILES, scale.seqlen_q))
    if chosen.entry == "kvcache":  # mostly decode
        q_length = st.one_of(st.just(1), st.integers(0, 8), q_length)

    pad_q = draw(st.sampled_from((0, 0, 3))) if chosen.entry == "varlen" else 0
    ragged_q = chosen.q_layout == "packed" or pad_q > 0
    lengths = draw(st.sampled_from(("tensor", "tensor", "int", "none")))
    if chosen.entry != "kvcache" or (lengths == "none" and chosen.kv_layout == "paged"):
        lengths = "tensor"
    ragged_k = chosen.entry != "dense" and lengths == "tensor"

    def several(length: st.SearchStrategy[int], ragged: bool) -> tuple[int, ...]:
        if not ragged:
            return (draw(length),) * batch
        return tuple(draw(st.lists(length, min_size=batch, max_size=batch)))

    slack_k = chosen.entry != "dense" and lengths != "none"
    paged = chosen.kv_layout == "paged"
    seqlens_q, seqlens_k = several(q_length, ragged_q), several(k_length, ragged_k)
    return Case(
        **asdict(chosen),
        seqlens_q=_within(seqlens_q, seqlens_k, scale.work // chosen.heads_q),
        seqlens_k=seqlens_k,
        lengths=lengths,
        softmax_scale=draw(st.sampled_from((None, None, 0.3))),
        num_splits=draw(st.sampled_from((None, None, 0, 1, 3))),
        pad_q=pad_q,
        pad_k=draw(st.sampled_from((0, 1, 19))) if slack_k else 0,
        tail_q=draw(st.sampled_from((0, 0, 3))) if chosen.q_layout == "packed" else 0,
        max_q_slack=draw(st.sampled_from((0, 0, 1, 100))),
        spare_pages=draw(st.integers(0, 3)) if paged else 0,
        table_slack=draw(st.integers(0, 3)) if paged else 0,
        shared_prefix=paged and draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def _within(seqlens_q: tuple[int, ...], seqlens_k: tuple[int, ...], work: int) -> tuple[int, ...]:
    """Halve the query lengths until the call is small enough; equal lengths stay equal."""
    while sum(q * k for q, k in zip(seqlens_q, seqlens_k, strict=True)) > work:
        seqlens_q = tuple(n // 2 for n in seqlens_q)
    return seqlens_q


def generate(count: int, seed: int, scale: Scale, variants: int) -> list[Case]:
    """`count` different cases over at most `variants` specs: the same ones for the same seed."""
    variants = max(1, min(variants, count))
    turns = list(itertools.islice(itertools.cycle(TURNS), variants))
    chosen: list[Spec] = []
    for index, entry in enumerate(ENTRIES):
        strategy = specs(scale, (entry,))
        chosen += _distinct(strategy, turns.count(entry), seed * 1009 + index, key=lambda s: s)

    found: list[Case] = []
    for index, spec in enumerate(chosen):
        share = -(-(count - len(found)) // (len(chosen) - index))
        strategy = cases(scale, st.just(spec))
        found += _distinct(strategy, share, seed * 7919 + index, key=Case.identity)
    return [replace(case, seed=seed * 100_003 + i) for i, case in enumerate(found)]


def _distinct(
    strategy: st.SearchStrategy[T], count: int, seed: int, key: Callable[[T], Hashable]
) -> list[T]:
    """The first `count` different draws under a fixed seed."""
    found: dict[Hashable, Any] = {}
    for attempt in range(20):
        if len(found) >= count:
            break

        @hypothesis.seed(seed + 1_000_003 * attempt)
        @hypothesis.settings(
            max_examples=4 * count + 8,
            database=None,
            deadline=None,
            derandomize=False,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(strategy)
        def collect(drawn: T) -> None:
            found.setdefault(key(drawn), drawn)

        collect()
    if len(found) < count:
        raise RuntimeError(f"only {len(found)} of {count} different cases could be drawn")
    # Hypothesis begins with the simplest example and stays near what it has drawn: mix.
    drawn = list(found.values())
    return random.Random(seed).sample(drawn[1:] if len(drawn) > count else drawn, count)

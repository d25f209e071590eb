"""What a legal case is, as hypothesis strategies, and the generated cases of a run.

Two steps. A `Spec` holds the axes that each cost a compilation (dtype, head dims, page size,
flags): short lists, few specs per run. A `Case` adds what costs nothing (lengths, padding,
splits): drawn freely, around the edges of pages and tiles.
"""

import functools
import itertools
import random
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import hypothesis
from hypothesis import strategies as st

from parity_tests import features
from parity_tests.cases import Case, Spec, unbounded
from parity_tests.legality import DESCALE_STRIDES, DESCALES, ENTRIES, FLOAT8, KV_STRIDES

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
    latent: tuple[tuple[int, int], ...]  # head_dim and head_dim_v of calls with qv


FULL = Scale(
    batch=9,
    seqlen_q=1100,
    seqlen_k=4200,
    work=2**25,
    heads_kv=(1, 2, 3, 8),
    groups=(1, 2, 3, 4, 5, 7, 8, 16),
    head_dims=(32, 40, 64, 72, 80, 96, 112, 128, 160, 192, 256),
    page_sizes=(1, 5, 16, 64, 128, 256),
    latent=((64, 512), (64, 512), (64, 256)),  # what FlashAttention-3 takes
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
    latent=((16, 40), (64, 72), (40, 128)),
)


def windows(limit: int) -> st.SearchStrategy[tuple[int | None, int | None]]:
    """Window sides: unbounded in either spelling, nothing but the key itself, small, wide."""
    side = st.sampled_from((-1, None, 0, 1, 7, limit // 8, limit // 2))
    return st.one_of(st.just((-1, -1)), st.tuples(side, side))


@st.composite
def specs(
    draw: st.DrawFn,
    scale: Scale,
    entries: tuple[str, ...] = ENTRIES,
    wanted: frozenset[str] | None = None,
) -> Spec:
    """The compile-time axes of a legal call; with `wanted` exactly those `features`.

    The latter are in 16 bits and with one head_dim: what FA3 takes, so that it runs them as well.
    """

    def choose(feature: str, usual: tuple[T, ...], off: T) -> T:
        values = usual
        if wanted is not None:
            values = tuple(v for v in usual if v != off) if feature in wanted else (off,)
        return draw(st.sampled_from(values))

    entry = draw(st.sampled_from(entries))
    kv_layouts = {
        "kvcache": ("paged", "paged", "batched"),
        "varlen": ("packed", "packed", "paged", "batched"),
        "dense": ("batched",),
    }
    kv_layout = choose("dense cache", kv_layouts[entry], "paged")
    q_layouts = ("batched",) if entry == "dense" else ("packed", "batched")
    heads_kv = draw(st.sampled_from(scale.heads_kv))
    head_dim = draw(st.sampled_from(scale.head_dims))
    dtypes, head_dim_v = ["bfloat16", "bfloat16", "float16"], head_dim
    if wanted is None:
        dtypes.append("float32")
        other = draw(st.sampled_from(scale.head_dims))
        head_dim_v = draw(st.sampled_from((head_dim, head_dim, other)))
    strides = [s for s in KV_STRIDES if not (s == "split" and kv_layout == "packed")]
    window = windows(scale.seqlen_k)
    if wanted is not None:
        window = window.filter(lambda sides: unbounded(sides) != ("window" in wanted))
    cached = entry == "kvcache"
    rare = (False, False, False, cached)
    append = choose("append", ("", "", "batched", "packed") if cached else ("",), "")
    rotary_dims = (0, 0, 16, head_dim // 32 * 16, head_dim // 16 * 16)
    rotary_dim = choose("rotary", rotary_dims, 0) if append else 0
    chunks = (1, 7, 16, scale.seqlen_k // 20, scale.seqlen_k // 4)
    spec = Spec(
        entry=entry,
        dtype=draw(st.sampled_from(dtypes)),
        heads_q=heads_kv * draw(st.sampled_from(scale.groups)),
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        q_layout=choose("packed q", q_layouts, "batched"),
        kv_layout=kv_layout,
        page_size=draw(st.sampled_from(scale.page_sizes)) if kv_layout == "paged" else 0,
        kv_strides=draw(st.sampled_from(strides)),
        q_strided=draw(st.booleans()),
        causal=choose("causal", (False, True), False),
        window=draw(window),
        softcap=choose("softcap", (0.0, 0.0, 0.0, 15.0, 50.0), 0.0),
        sinks=choose("sinks", (False, False, True), False),
        lse=choose("lse", (True, True, False), False),
        out=choose("out", (False, True), False),
        append=append,
        rotary_dim=rotary_dim,
        rotary_interleaved=rotary_dim == 0 or draw(st.booleans()),
        leftpad=choose("leftpad", rare, False),
        batch_idx=choose("batch_idx", rare, False),
        attention_chunk=choose("chunk", (0,) * 10 + chunks, 0),
    )
    return draw(_scored(spec, scale, wanted))


@st.composite
def _scored(draw: st.DrawFn, spec: Spec, scale: Scale, wanted: frozenset[str] | None) -> Spec:
    """The spec, perhaps with numbers of 8 bits, and with values that scores are made of besides."""
    kinds, second, alone = ["16"] * 6, [False] * 7 + [True], ["", ""]
    if wanted is not None:
        kinds = [next((name for name in ("float8", "float8 cache") if name in wanted), "16")]
        second, alone = ["qv" in wanted], ["bare", "unread"] if "only_qv" in wanted else [""]
    elif spec.rotary_dim == 0:
        kinds += ["float8", *["float8 cache"] * (2 if spec.dtype != "float32" else 0)]
    kind = draw(st.sampled_from(kinds))
    changes: dict[str, Any] = {}
    if kind == "float8":  # FlashAttention-3 has one such dtype, and dims of 16
        changes["dtype"] = FLOAT8[0] if wanted is not None else draw(st.sampled_from(FLOAT8[:2]))
        if wanted is not None:
            dims = [dim for dim in scale.head_dims if dim % 16 == 0]
            changes["head_dim"] = changes["head_dim_v"] = draw(st.sampled_from(dims))
    elif kind == "float8 cache":
        changes["kv_dtype"] = draw(st.sampled_from((FLOAT8[0], *FLOAT8)))
    if kind != "float8":
        changes["qv"] = draw(st.sampled_from(second))
    if changes.get("qv"):
        if wanted is None and spec.entry != "dense" and not spec.append:
            alone += ["bare", "unread"]
        changes["only_qv"] = draw(st.sampled_from(alone))
        dims_of = scale.latent if wanted is not None else (*scale.latent, None)
        if (pair := draw(st.sampled_from(dims_of))) is not None and spec.rotary_dim <= pair[0]:
            changes["head_dim"], changes["head_dim_v"] = pair
    if kind != "16":
        letters = ["", "kv"] if changes.get("qv") else list(DESCALES)
        if wanted is not None:
            letters = [each for each in letters if bool(each) == ("descales" in wanted)]
        changes["descales"] = draw(st.sampled_from(letters))
        if changes["descales"]:
            changes["descale_strides"] = draw(st.sampled_from(DESCALE_STRIDES))
    return replace(spec, **changes)


def lengths_around(edges: tuple[int, ...], most: int) -> st.SearchStrategy[int]:
    """Zero, one, one beside every edge, and anything up to the limit."""
    near = {0, 1, *(edge + by for edge in edges for by in (-1, 0, 1))}
    return st.one_of(
        st.sampled_from(sorted(n for n in near if 0 <= n <= most)), st.integers(0, most)
    )


@st.composite
def cases(
    draw: st.DrawFn,
    scale: Scale,
    spec: st.SearchStrategy[Spec] | None = None,
    wanted: frozenset[str] | None = None,
) -> Case:
    """A legal case; `spec` draws the compile-time axes, `wanted` is what it draws them for."""
    chosen = draw(spec if spec is not None else specs(scale))
    cached, paged = chosen.entry == "kvcache", chosen.kv_layout == "paged"
    batch = draw(st.integers(1, scale.batch))
    k_length = lengths_around((*TILES, max(1, chosen.page_size)), scale.seqlen_k)
    q_length = st.one_of(st.integers(0, 5), lengths_around(TILES, scale.seqlen_q))
    if cached:  # mostly decode
        q_length = st.one_of(st.just(1), st.integers(0, 8), q_length)
    splits: tuple[int | None, ...] = (None, None, 0, 1, 3)
    if wanted is not None:
        q_length = q_length.filter(lambda n: n > 1) if "q_len > 1" in wanted else st.just(1)
        splits = (2, 3, 7) if "num_splits" in wanted else (None, 0, 1)

    pad_q = draw(st.sampled_from((0, 0, 3))) if chosen.entry == "varlen" else 0
    lengths = draw(st.sampled_from(("tensor", "tensor", "int", "none")))
    if not cached or (lengths == "none" and (paged or chosen.append)):
        lengths = "tensor"

    def several(length: st.SearchStrategy[int], ragged: bool) -> tuple[int, ...]:
        if not ragged:
            return (draw(length),) * batch
        return tuple(draw(st.lists(length, min_size=batch, max_size=batch)))

    seqlens_q = several(q_length, chosen.q_layout == "packed" or pad_q > 0)
    seqlens_k = several(k_length, chosen.entry != "dense" and lengths == "tensor")
    totals, overflow = seqlens_k, 0
    new: dict[str, Any] = {}
    if chosen.append:
        seqlens_new = seqlens_q  # as when each query is a new token
        if draw(st.booleans()) or (chosen.append == "batched" and len(set(seqlens_q)) > 1):
            seqlens_new = several(st.one_of(st.integers(0, 5), q_length), chosen.append == "packed")
        totals = tuple(map(sum, zip(seqlens_k, seqlens_new, strict=True)))
        if lengths == "tensor" or chosen.append == "packed":
            overflow = draw(st.sampled_from((0, 0, 0, 1, 9)))
        tail = draw(st.sampled_from((0, 0, 3))) if chosen.append == "packed" else 0
        new = {"seqlens_new": seqlens_new, "overflow": overflow, "tail_new": tail}
    room = max(*seqlens_k, max(totals) - overflow)
    seqlens_q = _within(seqlens_q, totals, scale.work // chosen.heads_q)
    slack_q = draw(st.sampled_from((0, 0, 1, 100)))
    if chosen.append:  # the host sees whether there can be more queries than keys
        seqlens_q = tuple(min(n, room) for n in seqlens_q)
        slack_q = min(slack_q, room - max(seqlens_q))
    slack_k = chosen.entry != "dense" and lengths != "none" and not overflow
    case = Case(
        **asdict(chosen),
        **new,
        seqlens_q=seqlens_q,
        seqlens_k=seqlens_k,
        leftpads=tuple(draw(st.integers(0, min(n, room))) for n in totals if chosen.leftpad),
        lengths=lengths,
        softmax_scale=draw(st.sampled_from((None, None, 0.3))),
        num_splits=draw(st.sampled_from(splits)),
        pad_q=pad_q,
        pad_k=draw(st.sampled_from((0, 1, 19))) if slack_k else 0,
        tail_q=draw(st.sampled_from((0, 0, 3))) if chosen.q_layout == "packed" else 0,
        max_q_slack=slack_q,
        spare_pages=draw(st.integers(0, 3)) if paged else 0,
        table_slack=draw(st.integers(0, 3)) if paged and slack_k else 0,
        spare_rows=draw(st.integers(0, 3)) if chosen.batch_idx else 0,
        shared_prefix=paged and not chosen.leftpad and draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )
    return draw(_positions(case)) if chosen.rotary_dim else case


@st.composite
def _positions(draw: st.DrawFn, case: Case) -> Case:
    """The case with positions to rotate at, and angles that may end before them."""
    least = case.capacity if case.kv_layout == "paged" else draw(st.integers(0, case.capacity))
    starts = tuple(draw(st.integers(0, 2 * case.capacity)) for _ in range(case.batch))
    return case.with_changes(
        rotary_seqlens=draw(st.sampled_from(((), starts))),
        rotary_rows=draw(st.sampled_from((0, 0, max(1, least)))),
    )


def _within(seqlens_q: tuple[int, ...], seqlens_k: tuple[int, ...], work: int) -> tuple[int, ...]:
    """Halve the query lengths until the call is small enough; equal lengths stay equal."""
    while sum(q * k for q, k in zip(seqlens_q, seqlens_k, strict=True)) > work:
        seqlens_q = tuple(n // 2 for n in seqlens_q)
    return seqlens_q


def pairwise(seed: int, scale: Scale) -> list[Case]:
    """Calls with a cache in which any two features that may go together do."""
    return list(_pairwise(seed, scale))


@functools.cache
def _pairwise(seed: int, scale: Scale) -> tuple[Case, ...]:
    found = []
    for index, wanted in enumerate(features.covering(seed)):
        chosen = cases(scale, specs(scale, ("kvcache",), wanted), wanted).filter(
            functools.partial(_shows, wanted)
        )
        found += _distinct(chosen, 1, seed * 104_729 + index, key=Case.identity)
    return tuple(replace(case, seed=seed * 100_003 + 50_000 + i) for i, case in enumerate(found))


def _shows(wanted: frozenset[str], case: Case) -> bool:
    """Whether a case has these features and no others, and keys to see them by."""
    return features.of(case) - {"paged"} == wanted and min(case.keys) > 8


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

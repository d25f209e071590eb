"""What a legal case is, as draws from a `random.Random`, and the generated cases of a run.

Two steps. A `Spec` holds the axes that each cost a compilation (dtype, head dims, page size,
flags): short lists, few specs per run. A `Case` adds what costs nothing (lengths, padding,
splits): drawn freely, around the edges of pages and tiles.

A run draws from a seeded generator: tens of thousands of cases take seconds. Property tests draw
the same cases from hypothesis' own generator (`cases`), which shrinks what fails.
"""

import itertools
from collections.abc import Callable, Container
from dataclasses import dataclass, fields, replace
from random import Random
from typing import Any, TypeVar

from hypothesis import strategies as st

from parity_tests import features
from parity_tests.cases import Case, Spec, unbounded
from parity_tests.legality import DESCALE_STRIDES, DESCALES, ENTRIES, FLOAT8, KV_STRIDES

T = TypeVar("T")

# Which entry the specs of a run are for, in turn: decode matters most, dense least.
TURNS = ("kvcache", "varlen", "dense", "kvcache", "varlen", "kvcache", "varlen", "kvcache")
TILES = (16, 32, 64, 128)  # rows and keys that kernels take at a time
SOAK_VARIANTS = 320  # specs of a soak
SOAK_LAUNCHES = 4  # ways to launch the cases of each: a way is some compilations
ATTEMPTS = 10_000  # draws for one case


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


Window = tuple[int | None, int | None]
Wanted = frozenset[str] | None  # exactly these `features`; None: whatever comes


def _window(pick: Random, limit: int) -> Window:
    """Window sides: unbounded in either spelling, nothing but the key itself, small, wide."""
    sides = (-1, None, 0, 1, 7, limit // 8, limit // 2)
    return pick.choice(((-1, -1), (pick.choice(sides), pick.choice(sides))))


def draw_spec(
    pick: Random, scale: Scale, entries: tuple[str, ...] = ENTRIES, wanted: Wanted = None
) -> Spec:
    """The compile-time axes of a legal call; with `wanted` exactly those `features`.

    The latter are in 16 bits and with one head_dim: what FA3 takes, so that it runs them as well.
    """

    def choose(feature: str, usual: tuple[T, ...], off: T) -> T:
        values = usual
        if wanted is not None:
            values = tuple(v for v in usual if v != off) if feature in wanted else (off,)
        return pick.choice(values)

    entry = pick.choice(entries)
    kv_layouts = {
        "kvcache": ("paged", "paged", "batched"),
        "varlen": ("packed", "packed", "paged", "batched"),
        "dense": ("batched",),
    }
    kv_layout = choose("dense cache", kv_layouts[entry], "paged")
    q_layouts = ("batched",) if entry == "dense" else ("packed", "batched")
    heads_kv = pick.choice(scale.heads_kv)
    head_dim = pick.choice(scale.head_dims)
    dtypes, head_dim_v = ["bfloat16", "bfloat16", "float16"], head_dim
    if wanted is None:
        dtypes.append("float32")
        head_dim_v = pick.choice((head_dim, head_dim, pick.choice(scale.head_dims)))
    strides = [s for s in KV_STRIDES if not (s == "split" and kv_layout == "packed")]
    window = _window(pick, scale.seqlen_k)
    while wanted is not None and unbounded(window) == ("window" in wanted):
        window = _window(pick, scale.seqlen_k)
    cached = entry == "kvcache"
    rare = (False, False, False, cached)
    append = choose("append", ("", "", "batched", "packed") if cached else ("",), "")
    rotary_dims = (0, 0, 16, head_dim // 32 * 16, head_dim // 16 * 16)
    rotary_dim = choose("rotary", rotary_dims, 0) if append else 0
    chunks = (1, 7, 16, scale.seqlen_k // 20, scale.seqlen_k // 4)
    spec = Spec(
        entry=entry,
        dtype=pick.choice(dtypes),
        heads_q=heads_kv * pick.choice(scale.groups),
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        q_layout=choose("packed q", q_layouts, "batched"),
        kv_layout=kv_layout,
        page_size=pick.choice(scale.page_sizes) if kv_layout == "paged" else 0,
        kv_strides=pick.choice(strides),
        q_strided=pick.choice((False, True)),
        causal=choose("causal", (False, True), False),
        window=window,
        softcap=choose("softcap", (0.0, 0.0, 0.0, 15.0, 50.0), 0.0),
        sinks=choose("sinks", (False, False, True), False),
        lse=choose("lse", (True, True, False), False),
        out=choose("out", (False, True), False),
        append=append,
        rotary_dim=rotary_dim,
        rotary_interleaved=rotary_dim == 0 or pick.choice((False, True)),
        leftpad=choose("leftpad", rare, False),
        batch_idx=choose("batch_idx", rare, False),
        attention_chunk=choose("chunk", (0,) * 10 + chunks, 0),
    )
    return _scored(pick, spec, scale, wanted)


def _scored(pick: Random, spec: Spec, scale: Scale, wanted: Wanted) -> Spec:
    """The spec, perhaps with numbers of 8 bits, and with values that scores are made of besides."""
    kinds, second, alone = ["16"] * 6, [False] * 7 + [True], ["", ""]
    if wanted is not None:
        kinds = [next((name for name in ("float8", "float8 cache") if name in wanted), "16")]
        second, alone = ["qv" in wanted], ["bare", "unread"] if "only_qv" in wanted else [""]
    elif spec.rotary_dim == 0:
        kinds += ["float8", *["float8 cache"] * (2 if spec.dtype != "float32" else 0)]
    kind = pick.choice(kinds)
    changes: dict[str, Any] = {}
    if kind == "float8":  # FlashAttention-3 has one such dtype, and dims of 16
        changes["dtype"] = FLOAT8[0] if wanted is not None else pick.choice(FLOAT8[:2])
        if wanted is not None:
            dims = [dim for dim in scale.head_dims if dim % 16 == 0]
            changes["head_dim"] = changes["head_dim_v"] = pick.choice(dims)
    elif kind == "float8 cache":
        changes["kv_dtype"] = pick.choice((FLOAT8[0], *FLOAT8))
    if kind != "float8":
        changes["qv"] = pick.choice(second)
    if changes.get("qv"):
        if wanted is None and spec.entry != "dense" and not spec.append:
            alone += ["bare", "unread"]
        changes["only_qv"] = pick.choice(alone)
        dims_of = scale.latent if wanted is not None else (*scale.latent, None)
        if (pair := pick.choice(dims_of)) is not None and spec.rotary_dim <= pair[0]:
            changes["head_dim"], changes["head_dim_v"] = pair
    if kind != "16":
        letters = ["", "kv"] if changes.get("qv") else list(DESCALES)
        if wanted is not None:
            letters = [each for each in letters if bool(each) == ("descales" in wanted)]
        changes["descales"] = pick.choice(letters)
        if changes["descales"]:
            changes["descale_strides"] = pick.choice(DESCALE_STRIDES)
    return replace(spec, **changes)


def _length(pick: Random, edges: tuple[int, ...], most: int) -> int:
    """Zero, one, one beside every edge, and as often anything up to the limit."""
    near = {0, 1, *(edge + by for edge in edges for by in (-1, 0, 1))}
    return pick.choice((pick.choice([n for n in sorted(near) if n <= most]), pick.randint(0, most)))


def _q_length(pick: Random, scale: Scale, cached: bool) -> int:
    """Of a cache mostly decode."""
    kinds = [pick.randint(0, 5), *[_length(pick, TILES, scale.seqlen_q)] * 2]
    if cached:
        kinds += [1, pick.randint(0, 8)]
    return pick.choice(kinds)


def draw_case(
    pick: Random,
    chosen: Spec,
    scale: Scale,
    wanted: Wanted = None,
    seed: int = 0,
    like: Case | None = None,
) -> Case:
    """A legal case of this spec; `wanted` is what the spec was drawn for.

    Its batch and whatever the host knows besides are those of `like`, a case of the spec, if given.
    """
    cached, paged = chosen.entry == "kvcache", chosen.kv_layout == "paged"
    batch = pick.randint(1, scale.batch) if like is None else like.batch
    splits: tuple[int | None, ...] = (None, None, 0, 1, 3)
    if wanted is not None:
        splits = (2, 3, 7) if "num_splits" in wanted else (None, 0, 1)
    if like is not None:
        splits = (like.num_splits,)

    def k_length() -> int:
        return _length(pick, (*TILES, max(1, chosen.page_size)), scale.seqlen_k)

    def q_length() -> int:
        if wanted is None:
            return _q_length(pick, scale, cached)
        return max(2, _q_length(pick, scale, cached)) if "q_len > 1" in wanted else 1

    pad_q = pick.choice((0, 0, 3)) if chosen.entry == "varlen" else 0
    lengths = pick.choice(("tensor", "tensor", "int", "none"))
    if like is not None:
        pad_q, lengths = like.pad_q, like.lengths
    elif not cached or (lengths == "none" and (paged or chosen.append)):
        lengths = "tensor"

    def several(length: Callable[[], int], ragged: bool) -> tuple[int, ...]:
        return tuple(length() for _ in range(batch)) if ragged else (length(),) * batch

    seqlens_q = several(q_length, chosen.q_layout == "packed" or pad_q > 0)
    seqlens_k = several(k_length, chosen.entry != "dense" and lengths == "tensor")
    totals, overflow = seqlens_k, 0
    new: dict[str, Any] = {}
    if chosen.append:
        seqlens_new = seqlens_q  # as when each query is a new token
        if pick.choice((False, True)) or (chosen.append == "batched" and len(set(seqlens_q)) > 1):
            seqlens_new = several(
                lambda: pick.choice((pick.randint(0, 5), q_length())), chosen.append == "packed"
            )
        totals = tuple(map(sum, zip(seqlens_k, seqlens_new, strict=True)))
        if lengths == "tensor" or chosen.append == "packed":
            overflow = pick.choice((0, 0, 0, 1, 9))
        tail = pick.choice((0, 0, 3)) if chosen.append == "packed" else 0
        new = {"seqlens_new": seqlens_new, "overflow": overflow, "tail_new": tail}
    room = max(*seqlens_k, max(totals) - overflow)
    seqlens_q = _within(seqlens_q, totals, scale.work // chosen.heads_q)
    slack_q = pick.choice((0, 0, 1, 100))
    if chosen.append:  # the host sees whether there can be more queries than keys
        seqlens_q = tuple(min(n, room) for n in seqlens_q)
        slack_q = min(slack_q, room - max(seqlens_q))
    slack_k = chosen.entry != "dense" and lengths != "none" and not overflow
    case = Case(
        **{name: getattr(chosen, name) for name in _SPEC_FIELDS},
        **new,
        seqlens_q=seqlens_q,
        seqlens_k=seqlens_k,
        leftpads=tuple(pick.randint(0, min(n, room)) for n in totals if chosen.leftpad),
        lengths=lengths,
        softmax_scale=pick.choice((None, None, 0.3)),
        num_splits=pick.choice(splits),
        pad_q=pad_q,
        pad_k=pick.choice((0, 1, 19)) if slack_k else 0,
        tail_q=pick.choice((0, 0, 3)) if chosen.q_layout == "packed" else 0,
        max_q_slack=slack_q,
        spare_pages=pick.randint(0, 3) if paged else 0,
        table_slack=pick.randint(0, 3) if paged and slack_k else 0,
        spare_rows=pick.randint(0, 3) if chosen.batch_idx else 0,
        shared_prefix=paged and not chosen.leftpad and pick.choice((False, True)),
        seed=seed,
    )
    return _at_positions(pick, case, like) if chosen.rotary_dim else case


_SPEC_FIELDS = tuple(field.name for field in fields(Spec))


def _at_positions(pick: Random, case: Case, like: Case | None) -> Case:
    """The case with positions to rotate at, and angles that may end before them."""
    least = case.capacity if case.kv_layout == "paged" else pick.randint(0, case.capacity)
    starts = tuple(pick.randint(0, 2 * case.capacity) for _ in range(case.batch))
    given = pick.choice((False, True)) if like is None else bool(like.rotary_seqlens)
    return case.with_changes(
        rotary_seqlens=starts if given else (),
        rotary_rows=pick.choice((0, 0, max(1, least))),
    )


def _within(seqlens_q: tuple[int, ...], seqlens_k: tuple[int, ...], work: int) -> tuple[int, ...]:
    """Halve the query lengths until the call is small enough; equal lengths stay equal."""
    while sum(q * k for q, k in zip(seqlens_q, seqlens_k, strict=True)) > work:
        seqlens_q = tuple(n // 2 for n in seqlens_q)
    return seqlens_q


@st.composite
def cases(
    draw: st.DrawFn,
    scale: Scale,
    entries: tuple[str, ...] = ENTRIES,
    change: Callable[[Spec], Spec] = lambda spec: spec,
) -> Case:
    """A legal case, drawn by hypothesis; `change` is applied to its spec."""
    pick = draw(st.randoms(use_true_random=False))
    seed = draw(st.integers(0, 2**16))
    return draw_case(pick, change(draw_spec(pick, scale, entries)), scale, seed=seed)


def pairwise(seed: int, scale: Scale) -> list[Case]:
    """Calls with a cache in which any two features that may go together do."""
    pick = Random(seed)
    chosen = _specs(pick, scale, _covering(seed))
    return _spread(pick, len(chosen), chosen, scale, seed * 100_003 + 50_000)


def generate(count: int, seed: int, scale: Scale, variants: int) -> list[Case]:
    """`count` different cases over at most `variants` specs: the same ones for the same seed."""
    pick = Random(seed)
    chosen = _specs(pick, scale, _in_turn(max(1, min(variants, count))))
    return _spread(pick, count, chosen, scale, seed * 100_003)


def soak(count: int, seed: int, scale: Scale, variants: int = SOAK_VARIANTS) -> list[Case]:
    """`count` different cases over at most `variants` specs, the first as those of `pairwise`.

    Each spec has an equal share of the cases, so each pair of features has one share at least.
    The cases of a spec are launched in SOAK_LAUNCHES ways: compiling takes longer than running.
    """
    pick = Random(seed)
    asked = _covering(seed)
    asked += _in_turn(variants - len(asked))
    specs = _specs(pick, scale, asked[:count])
    return _spread(pick, count, specs, scale, seed * 100_003, SOAK_LAUNCHES)


Asked = tuple[str, Wanted]  # an entry and what else a spec is drawn for


def _covering(seed: int) -> list[Asked]:
    return [("kvcache", wanted) for wanted in features.covering(seed)]


def _in_turn(count: int) -> list[Asked]:
    turns = itertools.islice(itertools.cycle(TURNS), max(0, count))
    return [(entry, None) for entry in turns]


def _specs(pick: Random, scale: Scale, asked: list[Asked]) -> dict[Spec, Wanted]:
    """A different spec for each, and the features that it was drawn for."""
    found: dict[Spec, Wanted] = {}
    for entry, wanted in asked:
        while (spec := draw_spec(pick, scale, (entry,), wanted)) in found:
            pass
        found[spec] = wanted
    return found


def _spread(
    pick: Random,
    count: int,
    specs: dict[Spec, Wanted],
    scale: Scale,
    seed: int,
    launches: int | None = None,
) -> list[Case]:
    """`count` different cases, spread evenly over the specs; their seeds follow each other.

    With `launches`, those of a spec are launched in so many ways at most.
    """
    found: dict[Case, None] = {}  # as drawn, all with seed 0: in order, and no two alike
    for index, (spec, wanted) in enumerate(specs.items()):
        share = -(-(count - len(found)) // (len(specs) - index))
        first: list[Case] = []
        for _ in range(share):
            like = first[len(found) % launches] if launches and len(first) == launches else None
            case = _another(pick, spec, scale, wanted, found, like)
            first += [case] if like is None else []
            found[case] = None
    return [replace(case, seed=seed + i) for i, case in enumerate(found)]


def launch(case: Case) -> tuple[Any, ...]:
    """What kernels are compiled for besides the spec: what the host sees of the lengths, roughly.

    Numbers of rows count by their next power of two. With more than 64 a sequence is on another
    path, which has no use for them, but for calls with qv, whose lanes they make.
    """
    group = case.heads_q // case.heads_kv
    allotted = [n + case.pad_q for n in case.seqlens_q]
    bound = max(allotted) + (case.max_q_slack if case.q_layout == "packed" else 0)
    rows = bound * group
    mean = -(-sum(allotted) // case.batch) * group if rows <= 64 else 65
    most = 16 if case.qv else 7
    return (bound == 1, *(min(most, max(0, n - 1).bit_length()) for n in (rows, mean)))


def _another(
    pick: Random,
    spec: Spec,
    scale: Scale,
    wanted: Wanted,
    found: Container[Case],
    like: Case | None = None,
) -> Case:
    """A case that is not among those found, with the wanted features and keys to see them by."""
    for _ in range(ATTEMPTS):
        case = draw_case(pick, spec, scale, wanted, like=like)
        if like is not None and launch(case) != launch(like):
            continue
        shown = wanted is None or (features.of(case) - {"paged"} == wanted and min(case.keys) > 8)
        if shown and case not in found:
            return case
    raise RuntimeError(f"no other case in {ATTEMPTS} draws for {spec}")

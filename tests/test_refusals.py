"""Every argument that is not honoured is refused by name, and every wrong input says what it is."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import triton_fa
from triton_fa.checks import one_spelling
from triton_fa.errors import (
    ArgumentError,
    ArgumentTypeError,
    ArgumentValueError,
    LayoutError,
    TritonFAError,
    UnknownVersionError,
    UnsupportedError,
)

pytestmark = pytest.mark.usefixtures("fresh")

Arguments = dict[str, Any]


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def kvcache(**changes: Any) -> Arguments:
    """A legal paged call: two sequences of one query and up to 8 keys."""
    given: Arguments = {
        "q": torch.zeros(2, 1, 4, 16),
        "k_cache": torch.zeros(5, 4, 2, 16),
        "v_cache": torch.zeros(5, 4, 2, 16),
        "page_table": ints(0, 1, 2, 3).view(2, 2),
        "cache_seqlens": ints(3, 8),
    }
    return given | changes


def packed_kvcache(**changes: Any) -> Arguments:
    """The same with packed queries."""
    given = kvcache(q=torch.zeros(2, 4, 16), cu_seqlens_q=ints(0, 1, 2), max_seqlen_q=1)
    return given | changes


def varlen(**changes: Any) -> Arguments:
    """A legal packed call: two sequences."""
    given: Arguments = {
        "q": torch.zeros(5, 4, 16),
        "k": torch.zeros(7, 2, 16),
        "v": torch.zeros(7, 2, 16),
        "cu_seqlens_q": ints(0, 2, 5),
        "cu_seqlens_k": ints(0, 3, 7),
        "max_seqlen_q": 3,
        "max_seqlen_k": 4,
    }
    return given | changes


def dense(**changes: Any) -> Arguments:
    """A legal dense call."""
    given: Arguments = {
        "q": torch.zeros(2, 3, 4, 16),
        "k": torch.zeros(2, 5, 2, 16),
        "v": torch.zeros(2, 5, 2, 16),
    }
    return given | changes


FUNCTIONS: dict[Callable[..., Arguments], Callable[..., Any]] = {
    kvcache: triton_fa.flash_attn_with_kvcache,
    packed_kvcache: triton_fa.flash_attn_with_kvcache,
    varlen: triton_fa.flash_attn_varlen_func,
    dense: triton_fa.flash_attn_func,
}
CALLS = list(FUNCTIONS)


def call(make: Callable[..., Arguments], ver: Any = "torch", **changes: Any) -> Any:
    return FUNCTIONS[make](**make(**changes), ver=ver)


@pytest.mark.parametrize("make", CALLS)
@pytest.mark.parametrize("ver", ["torch", "triton"])
def test_the_legal_calls_of_this_file_are_legal(
    make: Callable[..., Arguments], ver: str, device: str
) -> None:
    given = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in make().items()}
    assert FUNCTIONS[make](**given, ver=ver).isfinite().all()


ONE = torch.ones(1)
REFUSED = {
    function: {"score_mod": max, "mask_mod": max}
    for function in ("flash_attn_with_kvcache", "flash_attn_varlen_func")
}
CALL_OF = {
    "flash_attn_with_kvcache": kvcache,
    "flash_attn_varlen_func": varlen,
    "flash_attn_func": dense,
}


@pytest.mark.parametrize("ver", ["torch", "triton"])
@pytest.mark.parametrize(
    ("function", "name"), [(f, name) for f, names in REFUSED.items() for name in names]
)
def test_an_argument_that_is_not_honoured_is_refused_by_name(
    function: str, name: str, ver: str, device: str
) -> None:
    given = CALL_OF[function]() | {name: REFUSED[function][name]}
    given = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in given.items()}
    with pytest.raises(UnsupportedError, match=rf"\b{name}\b") as caught:
        getattr(triton_fa, function)(**given, ver=ver)
    assert caught.value.ver == ver
    assert any(reason.startswith(name) for reason in caught.value.reasons)


# Arguments that not every backend has had from the start, each with what it needs beside it.
ROTARY = {"rotary_cos": torch.ones(8, 8), "rotary_sin": torch.zeros(8, 8)}
NEW = {"k": torch.ones(2, 1, 2, 16), "v": torch.ones(2, 1, 2, 16), "cache_seqlens": ints(3, 7)}
OPTIONAL: dict[str, Arguments] = {
    "k": NEW,
    "rotary_cos": NEW | ROTARY,
    "rotary_seqlens": NEW | ROTARY | {"rotary_seqlens": ints(0, 2)},
    "cache_batch_idx": {"cache_batch_idx": ints(1, 0)},
    "cache_leftpad": {"cache_leftpad": ints(1, 2)},
    "attention_chunk": {"attention_chunk": 4},
}


@pytest.mark.parametrize("ver", ["torch", "triton"])
@pytest.mark.parametrize("name", OPTIONAL)
def test_an_optional_argument_is_honoured_or_refused_by_name(
    name: str, ver: str, device: str
) -> None:
    module = importlib.import_module(f"triton_fa.backends.{ver}")
    given = {
        n: t.to(device, copy=True) if isinstance(t, torch.Tensor) else t
        for n, t in kvcache(**OPTIONAL[name]).items()
    }
    if name in module.SUPPORTED_FEATURES:
        out, lse = triton_fa.flash_attn_with_kvcache(**given, ver=ver, return_lse=True)
        assert out.isfinite().all()
        if name != "cache_batch_idx":  # both sequences have the same keys
            bare = {n: t for n, t in given.items() if n not in OPTIONAL[name]}
            bare["cache_seqlens"] = given["cache_seqlens"]
            _, other = triton_fa.flash_attn_with_kvcache(**bare, ver=ver, return_lse=True)
            assert not torch.equal(lse, other), "dropped"
    else:
        with pytest.raises(UnsupportedError, match=rf"\b{name}\b") as caught:
            triton_fa.flash_attn_with_kvcache(**given, ver=ver)
        assert any(reason.startswith(name) for reason in caught.value.reasons)


# How scores are made: of values besides, and of float8 numbers with factors.
QV_SHAPES = {"kvcache": (2, 1, 4, 16), "varlen": (5, 4, 16), "dense": (2, 3, 4, 16)}
SCORING = ("qv", "only_qv", "q_descale", "k_descale", "v_descale")


def scoring(make: Callable[..., Arguments], name: str) -> tuple[Arguments, Arguments]:
    """A legal call that uses the argument `name`, and the same without it."""
    rng = torch.Generator().manual_seed(0)
    given = {
        n: torch.randn(x.shape, generator=rng) if x.is_floating_point() else x
        for n, x in make().items()
        if isinstance(x, torch.Tensor)
    }
    given = make() | given
    qv = torch.randn(QV_SHAPES[make.__name__], generator=rng)
    if name in ("qv", "only_qv"):
        given["softmax_scale"] = 1.0
        more = {"qv": qv} | ({"only_qv": True} if name == "only_qv" else {})
        return given | more, given
    given = {
        n: x.to(torch.float8_e4m3fn) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for n, x in given.items()
    }
    return given | {name: torch.full((2, 2), 0.5)}, given


@pytest.mark.parametrize("ver", ["torch", "triton"])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (make, name)
        for make in (kvcache, varlen, dense)
        for name in SCORING
        if make is not dense or name != "only_qv"  # as FlashAttention-3's flash_attn_func
    ],
)
def test_an_argument_of_scores_is_honoured_or_refused_by_name(
    name: str, make: Callable[..., Arguments], ver: str, device: str
) -> None:
    module = importlib.import_module(f"triton_fa.backends.{ver}")
    calls = [
        {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in each.items()}
        for each in scoring(make, name)
    ]
    if name in module.SUPPORTED_FEATURES:
        out, bare = (FUNCTIONS[make](**given, ver=ver) for given in calls)
        assert out.isfinite().all()
        assert not torch.equal(out, bare), "dropped"
    else:
        with pytest.raises(UnsupportedError, match=rf"\b{name}\b") as caught:
            FUNCTIONS[make](**calls[0], ver=ver)
        assert any(reason.startswith(name) for reason in caught.value.reasons)


@pytest.mark.parametrize("make", [varlen, dense])
def test_every_function_takes_a_chunk(make: Callable[..., Arguments]) -> None:
    q = torch.ones_like(make()["q"])
    out, lse = call(make, q=q, attention_chunk=2, return_attn_probs=True)
    assert out.isfinite().all()
    assert lse.max() <= math.log(2) + 1e-6
    with pytest.raises(ArgumentValueError, match="attention_chunk: expected at least 0, got -1"):
        call(make, attention_chunk=-1)


def test_all_reasons_are_named_at_once() -> None:
    with pytest.raises(UnsupportedError) as caught:
        call(kvcache, aux_tensors=[ONE], score_mod=max, mask_mod=max)
    assert [reason.split()[0] for reason in caught.value.reasons] == [
        "aux_tensors",
        "mask_mod",
        "score_mod",
    ]


def test_the_other_spelling_of_leftpad_means_the_same() -> None:
    lse = [
        call(kvcache, **{name: pads}, return_lse=True)[1].flatten().tolist()
        for name, pads in (
            ("cache_leftpad", ints(1, 2)),
            ("leftpad_k", ints(1, 2)),
            ("leftpad_k", ints(0, 2)),
        )
    ]
    assert lse[0] == lse[1] != lse[2]
    with pytest.raises(ArgumentValueError, match="cache_leftpad and leftpad_k"):
        call(kvcache, leftpad_k=ints(0, 0), cache_leftpad=ints(0, 0))


@pytest.mark.parametrize("head_dim", [12, 264])
def test_triton_names_a_head_dim_it_does_not_do(head_dim: int, device: str) -> None:
    shape = (2, 3, 4, head_dim)
    tensors = {name: torch.zeros(shape, device=device) for name in ("q", "k", "v")}
    with pytest.raises(UnsupportedError, match=f"head_dim={head_dim}"):
        triton_fa.flash_attn_func(**tensors, ver="triton")


T = torch.zeros


def appending(**changes: Any) -> Arguments:
    """A legal call that appends one rotated key to each sequence."""
    new = {"k": T(2, 1, 2, 16), "v": T(2, 1, 2, 16), "cache_seqlens": ints(3, 7)}
    rotary = {"rotary_cos": T(8, 8), "rotary_sin": T(8, 8)}
    return kvcache(**new | rotary | changes)


FUNCTIONS[appending] = triton_fa.flash_attn_with_kvcache
# Of `appending`: without rotation, and packed.
NO_ROTARY = {"rotary_cos": None, "rotary_sin": None}
PACKED_NEW = {"k": T(3, 2, 16), "v": T(3, 2, 16), "cu_seqlens_k_new": ints(0, 1, 3)}
DENSE_CACHE = {"page_table": None, "k_cache": T(2, 8, 2, 16), "v_cache": T(2, 8, 2, 16)}

BAD_SHAPES: list[tuple[Callable[..., Arguments], Arguments, type[TritonFAError], str]] = [
    # ranks
    (kvcache, {"q": T(2, 4, 16)}, ArgumentError, "q: expected 4 dimensions"),
    (packed_kvcache, {"q": T(2, 1, 4, 16)}, ArgumentError, "q: expected 3 dimensions"),
    (kvcache, {"k_cache": T(20, 2, 16)}, ArgumentError, "k_cache: expected 4 dimensions"),
    (varlen, {"k": T(2, 4, 2, 16)}, ArgumentError, "k: expected 3 dimensions"),
    (kvcache, {"page_table": ints(0, 1)}, ArgumentError, "page_table: expected 2 dimensions"),
    (varlen, {"cu_seqlens_q": ints(0, 2, 5).view(1, 3)}, ArgumentError, "cu_seqlens_q: expected 1"),
    # sizes
    (kvcache, {"v_cache": T(5, 3, 2, 16)}, ArgumentError, r"v_cache: expected shape \(5, 4, 2"),
    (varlen, {"v": T(6, 2, 16)}, ArgumentError, r"v: expected shape \(7, 2, 16\)"),
    (dense, {"k": T(3, 5, 2, 16)}, ArgumentError, "k: expected batch 2, got 3"),
    (dense, {"k": T(2, 5, 2, 8)}, ArgumentError, "k: expected head_dim 16, got 8"),
    (
        kvcache,
        {"cache_seqlens": ints(1, 2, 3)},
        ArgumentError,
        r"cache_seqlens: expected shape \(2",
    ),
    (kvcache, {"page_table": T(3, 2, dtype=torch.int32)}, ArgumentError, "page_table: expected sh"),
    (varlen, {"cu_seqlens_k": ints(0, 7)}, ArgumentError, r"cu_seqlens_k: expected shape \(3,\)"),
    (varlen, {"seqused_q": ints(1)}, ArgumentError, r"seqused_q: expected shape \(2,\)"),
    (varlen, {"seqused_k": ints(1)}, ArgumentError, r"seqused_k: expected shape \(2,\)"),
    (dense, {"sinks": T(3)}, ArgumentError, r"sinks: expected shape \(4,\)"),
    (dense, {"out": T(2, 3, 4, 8)}, ArgumentError, r"out: expected shape \(2, 3, 4, 16\)"),
    (
        kvcache,
        {"k_cache": T(5, 0, 2, 16), "v_cache": T(5, 0, 2, 16)},
        ArgumentError,
        "k_cache: expected page_size of at least 1",
    ),
    (
        dense,
        {"q": T(2, 3, 4, 0), "k": T(2, 5, 2, 0)},
        ArgumentError,
        "q: expected a head_dim of at least 1",
    ),
    (dense, {"v": T(2, 5, 2, 0)}, ArgumentError, "v: expected a head_dim of at least 1"),
    # head ratio
    (dense, {"q": T(2, 3, 3, 16)}, ArgumentError, "q: expected a number of heads .* got 3 and 2"),
    (dense, {"q": T(2, 3, 0, 16)}, ArgumentError, "q: expected a number of heads .* got 0 and 2"),
    (
        kvcache,
        {"k_cache": T(5, 4, 0, 16), "v_cache": T(5, 4, 0, 16)},
        ArgumentError,
        "multiple of k_cache's, got 4 and 0",
    ),
    # dtypes
    (dense, {"q": T(2, 3, 4, 16, dtype=torch.float64)}, ArgumentError, "q: expected dtype float16"),
    (dense, {"q": T(2, 3, 4, 16, dtype=torch.int32)}, ArgumentError, "q: expected dtype .* int32"),
    (dense, {"k": T(2, 5, 2, 16).half()}, ArgumentError, "k: expected dtype float32, got float16"),
    (kvcache, {"v_cache": T(5, 4, 2, 16).half()}, ArgumentError, "v_cache: expected dtype float32"),
    (kvcache, {"cache_seqlens": T(2).long()}, ArgumentError, "cache_seqlens: .* int32, got int64"),
    (kvcache, {"page_table": T(2, 2).long()}, ArgumentError, "page_table: expected dtype int32"),
    (varlen, {"cu_seqlens_q": T(3).long()}, ArgumentError, "cu_seqlens_q: expected dtype int32"),
    (dense, {"sinks": T(4).int()}, ArgumentError, "sinks: expected dtype"),
    (dense, {"out": T(2, 3, 4, 16).half()}, ArgumentError, "out: expected dtype float32"),
    (kvcache, {"scheduler_metadata": T(9)}, ArgumentError, "scheduler_metadata: expected dtype"),
    # devices
    (dense, {"k": T(2, 5, 2, 16, device="meta")}, ArgumentError, "k: expected device cpu"),
    (dense, {"sinks": T(4, device="meta")}, ArgumentError, "sinks: expected device cpu"),
    (dense, {"out": T(2, 3, 4, 16, device="meta")}, ArgumentError, "out: expected device cpu"),
    (
        kvcache,
        {"page_table": ints(0, 1, 2, 3).view(2, 2).to("meta")},
        ArgumentError,
        "page_table: ",
    ),
    (kvcache, {"cache_seqlens": ints(1, 2).to("meta")}, ArgumentError, "cache_seqlens: .* device"),
    # strides
    (
        kvcache,
        {"k_cache": T(5, 4, 2, 32)[..., ::2]},
        LayoutError,
        "k_cache: expected last stride 1",
    ),
    (
        kvcache,
        {"v_cache": T(5, 4, 2, 32)[..., ::2]},
        LayoutError,
        "v_cache: expected last stride 1",
    ),
    (kvcache, {"page_table": T(2, 4).int()[:, ::2]}, ArgumentError, "page_table: expected last s"),
    (kvcache, {"cache_seqlens": T(4).int()[::2]}, ArgumentError, "cache_seqlens: expected last st"),
    (dense, {"sinks": T(8)[::2]}, ArgumentError, "sinks: expected stride 1"),
    (dense, {"out": T(2, 3, 4, 32)[..., ::2]}, ArgumentError, "out: expected last stride 1"),
    # not tensors
    (dense, {"q": [1.0]}, ArgumentTypeError, "q: expected a tensor, got list"),
    (dense, {"k": None}, ArgumentTypeError, "k: expected a tensor, got NoneType"),
    (kvcache, {"v_cache": 3}, ArgumentTypeError, "v_cache: expected a tensor, got int"),
    (kvcache, {"page_table": [[0, 1]]}, ArgumentTypeError, "page_table: expected a tensor"),
    (kvcache, {"cache_seqlens": [3, 8]}, ArgumentTypeError, "cache_seqlens: expected a tensor"),
    (kvcache, {"cache_seqlens": True}, ArgumentTypeError, "cache_seqlens: expected an int"),
    (varlen, {"seqused_k": 3}, ArgumentTypeError, "seqused_k: expected a tensor"),
    (varlen, {"cu_seqlens_q": [0, 2, 5]}, ArgumentTypeError, "cu_seqlens_q: expected a tensor"),
    (dense, {"sinks": 0.5}, ArgumentTypeError, "sinks: expected a tensor"),
    (dense, {"out": 0}, ArgumentTypeError, "out: expected a tensor"),
    # missing and contradicting
    (varlen, {"max_seqlen_q": None}, ArgumentValueError, "max_seqlen_q: expected an int"),
    (varlen, {"max_seqlen_k": None}, ArgumentValueError, "max_seqlen_k: expected an int"),
    (packed_kvcache, {"max_seqlen_q": None}, ArgumentError, "max_seqlen_q: expected an int"),
    (
        varlen,
        {"cu_seqlens_k": None, "page_table": T(2, 2).int(), "k": T(5, 4, 2, 16)},
        ArgumentValueError,
        "seqused_k: expected the key lengths together with page_table",
    ),
    (varlen, {"page_table": T(2, 2).int()}, ArgumentError, "cu_seqlens_k: expected None together"),
    (kvcache, {"block_table": T(2, 2).int()}, ArgumentValueError, "page_table and block_table"),
    (kvcache, {"seqused_k": ints(3, 8)}, ArgumentValueError, "cache_seqlens and seqused_k"),
    (
        varlen,
        {"seqused_k": ints(3, 4), "cache_seqlens": ints(3, 4)},
        ArgumentValueError,
        "seqused_k",
    ),
    (
        dense,
        {"sinks": T(4), "learnable_sink": T(4)},
        ArgumentValueError,
        "sinks and learnable_sink",
    ),
    (
        varlen,
        {"s_aux": T(4), "learnable_sink": T(4)},
        ArgumentValueError,
        "s_aux and learnable_sink",
    ),
    *(
        (
            make,
            {"aux_tensors": [ONE]},
            ArgumentError,
            "aux_tensors: expected None without score_mod",
        )
        for make in (kvcache, varlen)
    ),
    # appended keys
    (appending, {"k": None}, ArgumentError, "k: expected a tensor together with v, got None"),
    (appending, {"v": None}, ArgumentError, "v: expected a tensor together with k, got None"),
    (appending, {"cache_seqlens": None}, ArgumentError, "cache_seqlens: .* together with k, got N"),
    (
        appending,
        {"cache_seqlens": None} | DENSE_CACHE,
        ArgumentError,
        "cache_seqlens: .* together with k, got None",
    ),
    (appending, {"k": 1}, ArgumentTypeError, "k: expected a tensor, got int"),
    (appending, {"k": T(3, 2, 16)}, ArgumentError, "k: expected 4 dimensions .* without cu_seql"),
    (appending, {"k": T(3, 1, 2, 16)}, ArgumentError, r"k: expected shape \(2, 1, 2, 16\), got"),
    (appending, {"k": T(2, 1, 4, 16)}, ArgumentError, r"k: expected shape \(2, 1, 2, 16\), got"),
    (appending, {"k": T(2, 1, 2, 8)}, ArgumentError, r"k: expected shape \(2, 1, 2, 16\), got"),
    (appending, {"v": T(2, 2, 2, 16)}, ArgumentError, r"v: expected shape \(2, 1, 2, 16\), got"),
    (appending, {"v": T(2, 1, 2, 8)}, ArgumentError, r"v: expected shape \(2, 1, 2, 16\), got"),
    (appending, {"k": T(2, 1, 2, 16).half()}, ArgumentError, "k: expected dtype float32, got f"),
    (appending, {"v": T(2, 1, 2, 16).half()}, ArgumentError, "v: expected dtype float32, got f"),
    (appending, {"k": T(2, 1, 2, 16, device="meta")}, ArgumentError, "k: expected device cpu"),
    (appending, {"v": T(2, 1, 2, 16, device="meta")}, ArgumentError, "v: expected device cpu"),
    (appending, {"k": T(2, 1, 2, 32)[..., ::2]}, LayoutError, "k: expected last stride 1"),
    (appending, {"v": T(2, 1, 2, 32)[..., ::2]}, LayoutError, "v: expected last stride 1"),
    (
        appending,
        {"cu_seqlens_k_new": ints(0, 1, 2)},
        ArgumentError,
        "k: expected 3 dimensions .* with cu_seqlens_k_new",
    ),
    (
        appending,
        PACKED_NEW | {"cu_seqlens_k_new": ints(0, 3)},
        ArgumentError,
        r"cu_seqlens_k_new: expected shape \(3,\)",
    ),
    (
        appending,
        PACKED_NEW | {"cu_seqlens_k_new": T(3).long()},
        ArgumentError,
        "cu_seqlens_k_new: expected dtype int32",
    ),
    (appending, PACKED_NEW | {"k": T(3, 1, 16)}, ArgumentError, r"k: expected shape \(3, 2, 16\)"),
    (appending, PACKED_NEW | {"v": T(2, 2, 16)}, ArgumentError, r"v: expected shape \(3, 2, 16\)"),
    (
        appending,
        {"q": T(2, 9, 4, 16)},
        ArgumentError,
        "k: expected a cache of at least max_seqlen_q=9 keys, got 8",
    ),
    (
        appending,
        {"cache_seqlens": 8},
        ArgumentError,
        r"cache_seqlens: expected at most 7 \(.* beside 1 new keys\), got 8",
    ),
    # rotation
    (appending, {"k": None, "v": None}, ArgumentError, "rotary_cos: expected None without k"),
    (
        kvcache,
        {"rotary_seqlens": ints(0, 0)},
        ArgumentError,
        "rotary_seqlens: expected None without k",
    ),
    (appending, {"rotary_cos": None}, ArgumentError, "rotary_cos: .* together with rotary_sin"),
    (appending, {"rotary_sin": None}, ArgumentError, "rotary_sin: .* together with rotary_cos"),
    (
        appending,
        NO_ROTARY | {"rotary_seqlens": ints(0, 0)},
        ArgumentError,
        "rotary_seqlens: expected None without rotary_cos",
    ),
    (appending, {"rotary_cos": 1.0}, ArgumentTypeError, "rotary_cos: expected a tensor, got float"),
    (appending, {"rotary_cos": T(8)}, ArgumentError, "rotary_cos: expected 2 dimensions"),
    (appending, {"rotary_cos": T(8, 6)}, ArgumentError, "multiple of 16 up to 16, got 12"),
    (appending, {"rotary_cos": T(8, 0)}, ArgumentError, "multiple of 16 up to 16, got 0"),
    (appending, {"rotary_cos": T(8, 16)}, ArgumentError, "multiple of 16 up to 16, got 32"),
    (
        appending,
        {"rotary_cos": T(7, 8)},
        ArgumentError,
        "rotary_cos: .* at least 8 positions, .* 7",
    ),
    (
        appending,
        DENSE_CACHE | {"rotary_cos": T(0, 8), "rotary_sin": T(0, 8)},
        ArgumentError,
        "rotary_cos: expected at least 1 positions",
    ),
    (
        appending,
        {"page_table": T(2, 0).int(), "q": T(2, 0, 4, 16), "cache_seqlens": ints(0, 0)}
        | {"rotary_cos": T(0, 8), "rotary_sin": T(0, 8)},
        ArgumentError,
        "rotary_cos: expected at least 1 positions",
    ),
    (appending, {"rotary_sin": T(9, 8)}, ArgumentError, r"rotary_sin: expected shape \(8, 8\)"),
    (
        appending,
        {"rotary_cos": T(8, 8).half()},
        ArgumentError,
        "rotary_cos: expected dtype float32",
    ),
    (
        appending,
        {"rotary_sin": T(8, 8).half()},
        ArgumentError,
        "rotary_sin: expected dtype float32",
    ),
    (appending, {"rotary_cos": T(8, 8, device="meta")}, ArgumentError, "rotary_cos: .* device cpu"),
    (appending, {"rotary_cos": T(8, 8).T}, LayoutError, "rotary_cos: expected a contiguous tensor"),
    (appending, {"rotary_sin": T(8, 16)[:, :8]}, LayoutError, "rotary_sin: expected a contiguous"),
    (appending, {"rotary_seqlens": ints(0)}, ArgumentError, r"rotary_seqlens: .* shape \(2,\)"),
    (appending, {"rotary_seqlens": T(2)}, ArgumentError, "rotary_seqlens: expected dtype int32"),
    (appending, {"rotary_seqlens": 3}, ArgumentTypeError, "rotary_seqlens: expected a tensor"),
    (
        appending,
        {"rotary_interleaved": 1},
        ArgumentTypeError,
        "rotary_interleaved: expected a bool",
    ),
    # rows and padding
    (kvcache, {"cache_batch_idx": ints(0)}, ArgumentError, r"cache_batch_idx: .* shape \(2,\)"),
    (kvcache, {"cache_batch_idx": T(2)}, ArgumentError, "cache_batch_idx: expected dtype int32"),
    (kvcache, {"cache_batch_idx": [0, 1]}, ArgumentTypeError, "cache_batch_idx: expected a tensor"),
    (
        kvcache,
        {"cache_batch_idx": ints(0, 1), "page_table": T(0, 2).int()},
        ArgumentError,
        "cache_batch_idx: expected a row of page_table to name, got none",
    ),
    (kvcache, {"cache_leftpad": ints(0)}, ArgumentError, r"cache_leftpad: .* shape \(2,\)"),
    (kvcache, {"cache_leftpad": T(2).long()}, ArgumentError, "cache_leftpad: expected dtype int32"),
    (
        kvcache,
        {"cache_leftpad": ints(0, 0).to("meta")},
        ArgumentError,
        "cache_leftpad: expected device cpu",
    ),
    (
        kvcache,
        {"page_table": None, "k_cache": T(3, 8, 2, 16), "v_cache": T(3, 8, 2, 16)},
        ArgumentError,
        "k_cache: expected batch 2, got 3",
    ),
    # numbers
    (kvcache, {"attention_chunk": -1}, ArgumentValueError, "attention_chunk: expected at least 0"),
    (kvcache, {"attention_chunk": True}, ArgumentTypeError, "attention_chunk: .* int, got bool"),
    (dense, {"attention_chunk": 2.0}, ArgumentTypeError, "attention_chunk: .* int, got float"),
    (
        kvcache,
        {"cache_seqlens": 9},
        ArgumentError,
        r"at most 8 \(what page_table can hold\), got 9",
    ),
    (kvcache, {"cache_seqlens": -1}, ArgumentValueError, "cache_seqlens: expected at least 0"),
    (varlen, {"max_seqlen_q": -1}, ArgumentValueError, "max_seqlen_q: expected at least 0"),
    (varlen, {"max_seqlen_k": 2.0}, ArgumentTypeError, "max_seqlen_k: expected an int, got float"),
    (dense, {"softcap": -1.0}, ArgumentValueError, "softcap: expected 0"),
    (dense, {"softcap": float("nan")}, ArgumentValueError, "softcap: expected a finite number"),
    (
        dense,
        {"softmax_scale": float("inf")},
        ArgumentValueError,
        "softmax_scale: expected a finite",
    ),
    (dense, {"softmax_scale": "big"}, ArgumentTypeError, "softmax_scale: expected a number"),
    (dense, {"causal": "yes"}, ArgumentTypeError, "causal: expected a bool, got str"),
    (dense, {"window_size": (1, 2, 3)}, ArgumentTypeError, "window_size: expected a pair"),
    (dense, {"window_size": 3}, ArgumentTypeError, "window_size: expected a pair"),
    (dense, {"window_size": (1.5, 0)}, ArgumentTypeError, "window_size: expected an int"),
    (dense, {"num_splits": 1.5}, ArgumentTypeError, "num_splits: expected an int"),
    (dense, {"sm_margin": -1}, ArgumentValueError, "sm_margin: expected at least 0"),
    (dense, {"pack_gqa": 2}, ArgumentTypeError, "pack_gqa: expected a bool"),
    (dense, {"return_attn_probs": "lse"}, ArgumentTypeError, "expected a bool"),
]


@pytest.mark.parametrize(
    ("make", "changes", "error", "message"),
    BAD_SHAPES,
    ids=[
        f"{make.__name__}-{'-'.join(changes)}-{n}"
        for n, (make, changes, _, _) in enumerate(BAD_SHAPES)
    ],
)
def test_bad_input_raises_and_says_what_was_expected(
    make: Callable[..., Arguments], changes: Arguments, error: type[TritonFAError], message: str
) -> None:
    given = make(**changes)
    out = given.setdefault("out", None)
    if out is None and make is dense:
        given["out"] = torch.full((2, 3, 4, 16), 7.0)
    with pytest.raises(error, match=message):
        FUNCTIONS[make](**given, ver="torch")
    if out is None and make is dense:
        assert (given["out"] == 7.0).all(), "out was written"


def test_a_page_table_too_narrow_for_a_known_length_is_refused_before_anything_is_written() -> None:
    out = torch.full((2, 1, 4, 16), 7.0)
    with pytest.raises(ArgumentError, match="cache_seqlens: expected at most 8"):
        call(kvcache, cache_seqlens=9, out=out)
    assert (out == 7.0).all()


def test_a_dense_cache_too_short_for_a_known_length_is_refused() -> None:
    changes = {"page_table": None, "k_cache": T(2, 8, 2, 16), "v_cache": T(2, 8, 2, 16)}
    with pytest.raises(ArgumentError, match="what k_cache can hold"):
        call(kvcache, **changes, cache_seqlens=9)


@pytest.mark.parametrize("ver", [2, 5, "3", "fa3", "", True, 3.0, b"triton", [3]])
def test_an_unknown_version_is_refused(ver: Any) -> None:
    with pytest.raises(UnknownVersionError, match="unknown flash attention version"):
        call(dense, ver=ver)
    with pytest.raises(RuntimeError):
        call(dense, ver=ver)


@pytest.mark.parametrize("ver", ["torch", "triton"])
def test_a_refused_append_writes_nothing(ver: str, device: str) -> None:
    given = {n: t.to(device) for n, t in appending(k=T(2, 1, 2, 16) + 1).items()}
    with pytest.raises(ArgumentError, match="cache_seqlens: expected at most 7"):
        triton_fa.flash_attn_with_kvcache(**given | {"cache_seqlens": 8}, ver=ver)
    with pytest.raises(UnsupportedError, match="score_mod"):
        triton_fa.flash_attn_with_kvcache(**given, score_mod=max, ver=ver)
    assert (given["k_cache"] == 0).all()


@pytest.mark.parametrize("name", ["k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin"])
def test_a_gradient_of_a_cache_or_of_what_is_appended_is_refused(name: str) -> None:
    given = appending()
    given[name] = given[name].clone().requires_grad_()
    with pytest.raises(ArgumentError, match=f"{name}: expected no gradient"):
        triton_fa.flash_attn_with_kvcache(**given, ver="torch")
    with torch.no_grad():
        triton_fa.flash_attn_with_kvcache(**given, ver="torch")


# What only the tensors say, and TRITON_FA_VALIDATE=1 looks for.
BAD_VALUES: list[tuple[Arguments, str]] = [
    (
        {"cache_seqlens": ints(3, 8)},
        r"k: .* 0 and 0 \(.* less cache_seqlens\), got 1 for sequence 1",
    ),
    (DENSE_CACHE | {"cache_seqlens": ints(8, 7)}, "k: expected between 0 and 0 .* for sequence 0"),
    (PACKED_NEW, "k: expected between 0 and 1 .* got 2 for sequence 1"),
    (PACKED_NEW | {"cu_seqlens_k_new": ints(1, 1, 3)}, "cu_seqlens_k_new: expected 0 as the first"),
    (PACKED_NEW | {"cu_seqlens_k_new": ints(0, 2, 1)}, "cu_seqlens_k_new: .* do not decrease"),
    (PACKED_NEW | {"cu_seqlens_k_new": ints(0, 1, 4)}, r"cu_seqlens_k_new: .* 3 \(the tokens of k"),
    # Page 1 of the first sequence is needed by nothing but the append.
    (
        {"page_table": ints(0, 5, 2, 3).view(2, 2), "cache_seqlens": ints(4, 7)},
        "page_table: expected ids from 0 to 4, got 5 for page 1 of sequence 0",
    ),
    (
        {"cache_batch_idx": ints(0, 2)},
        r"cache_batch_idx: .* between 0 and 1 \(page_table's last row\), got 2 for sequence 1",
    ),
    (
        DENSE_CACHE | {"cache_batch_idx": ints(-1, 0)},
        r"cache_batch_idx: .* \(k_cache's last row\), got -1 for sequence 0",
    ),
    (
        {"cache_batch_idx": ints(1, 0), "page_table": ints(-1, 5, 2, 3).view(2, 2)},
        "page_table: .* got -1 for page 0 of sequence 1",
    ),
    ({"cache_leftpad": ints(4, 0)}, "cache_leftpad: expected between 0 and 3 .* for sequence 0"),
    ({"cache_leftpad": ints(0, -1)}, "cache_leftpad: .* got -1 for sequence 1"),
    (
        {"rotary_seqlens": ints(0, 8)},
        r"rotary_seqlens: .* 0 and 7 \(rotary_cos has 8 rows, .* got 8 for sequence 1",
    ),
    ({"rotary_seqlens": ints(-1, 0)}, "rotary_seqlens: .* got -1 for sequence 0"),
    (
        {"q": T(2, 4, 4, 16), "causal": True, "cache_seqlens": ints(3, 6)},
        "cache_seqlens: expected between 0 and 4 .* for 4 positions.* got 6 for sequence 1",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD_VALUES, ids=[m for _, m in BAD_VALUES])
def test_validation_says_which_value_of_an_append_is_wrong(
    fresh: pytest.MonkeyPatch, changes: Arguments, message: str
) -> None:
    fresh.setenv("TRITON_FA_VALIDATE", "1")
    for _ in range(2):  # on a miss and on a hit
        with pytest.raises(ArgumentError, match=message):
            call(appending, **changes)


@pytest.mark.parametrize("changes", [c for c, _ in BAD_VALUES])
def test_without_validation_a_wrong_value_is_clamped(changes: Arguments) -> None:
    assert call(appending, **changes).isfinite().all()


LEGAL_VALUES: list[Arguments] = [
    {},
    {"cache_leftpad": ints(3, 0), "cache_batch_idx": ints(1, 1)},
    {"q": T(2, 4, 4, 16), "cache_seqlens": ints(3, 6)},
    PACKED_NEW | {"cache_seqlens": ints(7, 6)},
    # Pages that the padding, the window or the chunk hide from every query.
    {"cache_leftpad": ints(0, 4), "page_table": ints(0, 1, -1, 3).view(2, 2)},
    {"window_size": (3, 0), "page_table": ints(0, 1, -1, 3).view(2, 2)},
    {"attention_chunk": 4, "page_table": ints(0, 1, -1, 3).view(2, 2)},
]


@pytest.mark.parametrize("changes", LEGAL_VALUES)
def test_validation_lets_a_legal_append_pass(fresh: pytest.MonkeyPatch, changes: Arguments) -> None:
    fresh.setenv("TRITON_FA_VALIDATE", "1")
    assert call(appending, **changes).isfinite().all()


@pytest.mark.parametrize("name", ["q", "k", "v", "sinks", "out"])
def test_a_gradient_is_refused_and_no_grad_is_the_way_out(name: str) -> None:
    given = dense(sinks=T(4), out=T(2, 3, 4, 16))
    given[name].requires_grad_()
    with pytest.raises(ArgumentError, match=f"{name}: expected no gradient"):
        triton_fa.flash_attn_func(**given, ver="torch")
    with torch.no_grad():
        triton_fa.flash_attn_func(**given, ver="torch")
    with pytest.raises(ArgumentError, match=f"{name}: expected no gradient"):
        triton_fa.flash_attn_func(**given, ver="torch")


def test_a_refusal_is_not_remembered_as_a_legal_call() -> None:
    given = kvcache()
    for _ in range(2):
        with pytest.raises(ArgumentError):
            triton_fa.flash_attn_with_kvcache(**given | {"cache_seqlens": 9}, ver="torch")
    assert triton_fa.flash_attn_with_kvcache(**given, ver="torch").isfinite().all()


def test_the_same_value_under_two_spellings_is_no_contradiction() -> None:
    sinks = T(4)
    assert call(dense, sinks=sinks, learnable_sink=sinks).isfinite().all()
    assert one_spelling(num_heads=int("1000"), num_heads_q=int("1000")) == 1000
    with pytest.raises(ArgumentValueError, match="num_heads and num_heads_q"):
        one_spelling(num_heads=1, num_heads_q=2)


COMBINE_BAD: list[tuple[Arguments, type[TritonFAError], str]] = [
    ({"out_partial": 1}, ArgumentTypeError, "out_partial: expected a tensor"),
    ({"out_partial": T(2, 3, 4)}, ArgumentError, "out_partial: expected 4 or 5 dimensions"),
    (
        {"out_partial": T(2, 1, 3, 4, 8).half()},
        ArgumentError,
        "out_partial: expected dtype float32",
    ),
    ({"lse_partial": T(2, 1, 3, 5)}, ArgumentError, r"lse_partial: expected shape \(2, 1, 3, 4\)"),
    ({"lse_partial": T(2, 1, 3, 4).double()}, ArgumentError, "lse_partial: expected dtype"),
    ({"lse_partial": T(2, 1, 3, 4, device="meta")}, ArgumentError, "that of out_partial"),
    (
        {"out_partial": T(257, 1, 1, 1, 8), "lse_partial": T(257, 1, 1, 1)},
        ArgumentError,
        "at most 256 splits, got 257",
    ),
    ({"out_dtype": torch.float64}, ArgumentError, "out_dtype: expected float16"),
    ({"out_dtype": "half"}, ArgumentTypeError, "out_dtype: expected a dtype, got str"),
    ({"out": T(1, 3, 4, 9)}, ArgumentError, r"out: expected shape \(1, 3, 4, 8\)"),
    ({"out": T(1, 3, 4, 8).half(), "out_dtype": torch.float32}, ArgumentError, "out: expected dt"),
    ({"out": T(1, 3, 4, 8).double()}, ArgumentError, "out: expected dtype"),
    ({"out_partial": T(2, 1, 3, 4, 8).requires_grad_()}, ArgumentError, "expected no gradient"),
]


@pytest.mark.parametrize(("changes", "error", "message"), COMBINE_BAD)
def test_combine_refuses_bad_input(
    changes: Arguments, error: type[TritonFAError], message: str
) -> None:
    given = {"out_partial": T(2, 1, 3, 4, 8), "lse_partial": T(2, 1, 3, 4)} | changes
    with pytest.raises(error, match=message):
        triton_fa.flash_attn_combine(**given)


MERGE_BAD: list[tuple[Arguments, type[TritonFAError], str]] = [
    ({"v_a": None}, ArgumentTypeError, "v_a: expected a tensor"),
    ({"v_a": T(3, 8)}, ArgumentError, "v_a: expected 3 dimensions"),
    ({"v_a": T(3, 4, 8).int()}, ArgumentError, "v_a: expected dtype"),
    ({"v_b": T(3, 4, 9)}, ArgumentError, r"v_b: expected shape \(3, 4, 8\)"),
    ({"v_b": T(3, 4, 8).half()}, ArgumentError, "v_b: expected dtype float32"),
    ({"s_a": T(4, 3)}, ArgumentError, r"s_a: expected shape \(3, 4\)"),
    ({"s_b": T(3, 4).half()}, ArgumentError, "s_b: expected dtype float32"),
    ({"s_b": None}, ArgumentTypeError, "s_b: expected a tensor"),
    ({"v_merged": T(3, 4, 9)}, ArgumentError, "v_merged: expected shape"),
    ({"s_merged": T(3, 4, device="meta")}, ArgumentError, "that of v_a"),
    ({"s_a": T(3, 4).requires_grad_()}, ArgumentError, "s_a: expected no gradient"),
]


@pytest.mark.parametrize(("changes", "error", "message"), MERGE_BAD)
def test_merge_refuses_bad_input(
    changes: Arguments, error: type[TritonFAError], message: str
) -> None:
    given = {"v_a": T(3, 4, 8), "s_a": T(3, 4), "v_b": T(3, 4, 8), "s_b": T(3, 4)} | changes
    with pytest.raises(error, match=message):
        triton_fa.merge_state(**given)

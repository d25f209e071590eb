"""Launch records: what a hit skips, what makes a miss, and what is never remembered."""

import contextlib
import gc
import importlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import triton_fa
from triton_fa import api, dispatch, normalize, records
from triton_fa.backends.base import RunByAddress
from triton_fa.errors import ArgumentError, ArgumentTypeError, TritonFAError, UnknownVersionError
from triton_fa.problem import AttnResult, Tensors

pytestmark = pytest.mark.usefixtures("fresh")

Arguments = dict[str, Any]


def paged(**changes: Any) -> Arguments:
    """A legal paged call in plain PyTorch: two sequences of one query and up to 8 keys."""
    given: Arguments = {
        "q": torch.ones(2, 1, 4, 16),
        "k_cache": torch.ones(5, 4, 2, 16),
        "v_cache": torch.ones(5, 4, 2, 16),
        "page_table": torch.arange(4, dtype=torch.int32).view(2, 2),
        "cache_seqlens": torch.tensor([3, 8], dtype=torch.int32),
        "ver": "torch",
    }
    return given | changes


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in a larger allocation: other strides."""
    *lead, heads, dim = tensor.shape
    wide = tensor.new_zeros(*lead, heads, dim + 16)
    wide[..., :dim] = tensor
    return wide[..., :dim]


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values and strides, one element further into an allocation."""
    flat = tensor.new_zeros(tensor.numel() + 1)
    flat[1:] = tensor.flatten()
    assert flat.data_ptr() % 16 == 0
    return flat[1:].view(tensor.shape)


@pytest.fixture
def misses(fresh: pytest.MonkeyPatch) -> Callable[[Arguments], int]:
    """How often a call is validated and prepared: 0 for a hit, 1 for a miss."""
    validated: list[object] = []
    prepared: list[object] = []
    real_problem, real_prepare = normalize.problem, dispatch.prepare

    def problem(*arguments: Any) -> Any:
        validated.append(arguments)
        return real_problem(*arguments)

    def prepare(*arguments: Any) -> Any:
        prepared.append(arguments)
        return real_prepare(*arguments)

    fresh.setattr(normalize, "problem", problem)
    fresh.setattr(dispatch, "prepare", prepare)

    def count(arguments: Arguments) -> int:
        before = len(validated)
        triton_fa.flash_attn_with_kvcache(**arguments)
        assert len(validated) == len(prepared)
        return len(validated) - before

    return count


# ---------------------------------------------------------------- hits


def test_the_second_call_is_a_hit(misses: Callable[[Arguments], int]) -> None:
    arguments = paged()
    assert misses(arguments) == 1
    assert misses(arguments) == 0


def test_other_tensors_of_the_same_form_are_a_hit_and_are_read(
    misses: Callable[[Arguments], int],
) -> None:
    misses(paged())
    values = torch.randn(5, 4, 2, 16, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([1, 2], dtype=torch.int32)
    arguments = paged(v_cache=values, cache_seqlens=lengths)
    assert misses(arguments) == 0
    out = triton_fa.flash_attn_with_kvcache(**arguments)
    torch.testing.assert_close(out[0, 0, 0], values[0, 0, 0])
    torch.testing.assert_close(out[1, 0, 3], values[2, :2, 1].mean(0))


def test_another_spelling_of_the_same_call_is_a_hit(misses: Callable[[Arguments], int]) -> None:
    given = paged(return_softmax_lse=True, window_size=(3, 0))
    misses(given)
    renamed = paged(return_lse=True, window_size=[3, 0])
    renamed["block_table"] = renamed.pop("page_table")
    renamed["seqused_k"] = renamed.pop("cache_seqlens")
    assert misses(renamed) == 0


def test_a_result_does_not_depend_on_what_was_called_before() -> None:
    generator = torch.Generator().manual_seed(0)
    calls = [
        paged(q=torch.randn(2, 1, 4, 16, generator=generator), causal=causal, softmax_scale=scale)
        for causal in (False, True)
        for scale in (0.5, 2.0)
    ]
    alone = []
    for call in calls:
        api._RECORDS.clear()
        alone.append(triton_fa.flash_attn_with_kvcache(**call))
    for _ in range(2):
        for call, want in zip(calls, alone, strict=True):
            assert torch.equal(triton_fa.flash_attn_with_kvcache(**call), want)


def test_a_hit_plans_and_sizes_nothing(fresh: pytest.MonkeyPatch, device: str) -> None:
    """The same through our own kernels: a plan, and launches, are made once."""
    pytest.importorskip("triton")
    from triton_fa.backends import triton as backend
    from triton_fa.kernels import plans

    planned: list[object] = []
    real = plans.plan
    fresh.setattr(plans, "plan", lambda *given: planned.append(given) or real(*given))
    built: list[object] = []
    real_launch = backend.Launch
    fresh.setattr(backend, "Launch", lambda *given: built.append(given) or real_launch(*given))
    arguments = paged(ver="triton")
    arguments |= {n: t.to(device) for n, t in arguments.items() if isinstance(t, torch.Tensor)}
    first = triton_fa.flash_attn_with_kvcache(**arguments)
    assert (len(planned), len(built)) == (1, 2)
    second = triton_fa.flash_attn_with_kvcache(**arguments)
    assert (len(planned), len(built)) == (1, 2)
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()


# ---------------------------------------------------------------- misses

DIFFERENT: dict[str, Callable[[], Arguments]] = {
    "ver": lambda: {"ver": None},
    "q dtype, and so k and v": lambda: {
        name: tensor.half()
        for name, tensor in paged().items()
        if name in ("q", "k_cache", "v_cache")
    },
    "q shape": lambda: {"q": torch.ones(2, 2, 4, 16)},
    "q strides": lambda: {"q": strided(torch.ones(2, 1, 4, 16))},
    "k_cache strides": lambda: {"k_cache": strided(torch.ones(5, 4, 2, 16))},
    "v_cache alignment": lambda: {"v_cache": misaligned(torch.ones(5, 4, 2, 16))},
    "pages": lambda: {
        "k_cache": torch.ones(6, 4, 2, 16),
        "v_cache": torch.ones(6, 4, 2, 16),
    },
    "page_table width": lambda: {"page_table": torch.zeros(2, 3, dtype=torch.int32)},
    "cache_seqlens as an int": lambda: {"cache_seqlens": 3},
    "another int": lambda: {"cache_seqlens": 4},
    "no cache_seqlens": lambda: {"cache_seqlens": None},
    "sinks": lambda: {"sinks": torch.zeros(4)},
    "sinks dtype": lambda: {"sinks": torch.zeros(4, dtype=torch.bfloat16)},
    "out": lambda: {"out": torch.empty(2, 1, 4, 16)},
    "softmax_scale": lambda: {"softmax_scale": 0.3},
    "causal": lambda: {"causal": True},
    "window_size": lambda: {"window_size": (2, -1)},
    "softcap": lambda: {"softcap": 3.0},
    "num_splits": lambda: {"num_splits": 1},
    "sm_margin": lambda: {"sm_margin": 1},
    "pack_gqa": lambda: {"pack_gqa": True},
    "return_softmax_lse": lambda: {"return_softmax_lse": True},
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_may_change_the_launch_is_a_miss(
    name: str, misses: Callable[[Arguments], int]
) -> None:
    for _ in range(3):  # from the third on by a shortcut
        misses(paged())
        if name == "another int":
            misses(paged(cache_seqlens=3))
        if name == "sinks dtype":
            misses(paged(sinks=torch.zeros(4)))
    changed = paged(**DIFFERENT[name]())
    assert misses(changed) == 1
    assert misses(changed) == 0
    assert misses(paged()) == 0


def test_grad_mode_is_a_miss(misses: Callable[[Arguments], int]) -> None:
    assert [misses(paged()) for _ in range(3)] == [1, 0, 0]
    with torch.no_grad():
        assert misses(paged()) == 1
    with torch.inference_mode():
        assert misses(paged()) == 0
    assert misses(paged()) == 0


def test_a_gradient_is_refused_after_a_hit_without(misses: Callable[[Arguments], int]) -> None:
    learnable = paged(q=torch.ones(2, 1, 4, 16, requires_grad=True))
    misses(paged())
    with torch.no_grad():
        assert [misses(learnable) for _ in range(3)] == [1, 0, 0]
    with pytest.raises(ArgumentError, match="q: expected no gradient"):
        misses(learnable)


def test_strictness_is_a_miss(
    fresh: pytest.MonkeyPatch, misses: Callable[[Arguments], int]
) -> None:
    assert [misses(paged()) for _ in range(3)] == [1, 0, 0]
    with triton_fa.strict():
        assert misses(paged()) == 1
        assert misses(paged()) == 0
    assert misses(paged()) == 0


def test_a_fallback_is_not_remembered_for_strict_calls(
    fresh: pytest.MonkeyPatch, device: str
) -> None:
    pytest.importorskip("triton")
    fresh.setattr(dispatch, "_load", _without_fa3(dispatch._load))
    arguments = paged(ver=3)
    arguments |= {n: t.to(device) for n, t in arguments.items() if isinstance(t, torch.Tensor)}
    with pytest.warns(dispatch.FallbackWarning, match="gone"):
        triton_fa.flash_attn_with_kvcache(**arguments)
    triton_fa.flash_attn_with_kvcache(**arguments)
    with triton_fa.strict(), pytest.raises(triton_fa.BackendUnavailableError, match="gone"):
        triton_fa.flash_attn_with_kvcache(**arguments)
    triton_fa.flash_attn_with_kvcache(**arguments)


class _without_fa3:  # noqa: N801  stands for a function
    """`dispatch._load`, but ver=3 cannot be loaded."""

    def __init__(self, load: Any) -> None:
        self._load = load

    def __call__(self, ver: int | str) -> Any:
        return "ImportError: gone" if ver == 3 else self._load(ver)

    def cache_clear(self) -> None:
        self._load.cache_clear()


def test_the_entry_point_is_part_of_the_key() -> None:
    """A dense batch means the same in three functions; what they return and refuse does not."""
    q, k = torch.ones(1, 2, 2, 16), torch.ones(1, 3, 1, 16)
    triton_fa.flash_attn_func(q, k, k, ver="torch")
    triton_fa.flash_attn_varlen_func(q, k, k, None, None, ver="torch")
    triton_fa.flash_attn_with_kvcache(q, k, k, ver="torch")
    assert len(api._RECORDS) == 3


# ---------------------------------------------------------------- what is not remembered

GARBAGE: dict[str, tuple[Arguments, type[TritonFAError], str]] = {
    "no tensor": ({"q": "text"}, ArgumentTypeError, "q: expected a tensor, got str"),
    "None": ({"k_cache": None}, ArgumentTypeError, "k_cache: expected a tensor, got NoneType"),
    "a list": ({"v_cache": [[1.0]]}, ArgumentTypeError, "v_cache: expected a tensor, got list"),
    "lengths as a list": ({"cache_seqlens": [3, 8]}, ArgumentTypeError, "cache_seqlens"),
    "unhashable scale": ({"softmax_scale": [1.0]}, ArgumentTypeError, "softmax_scale"),
    "unhashable window": ({"window_size": ([1], 0)}, ArgumentTypeError, "window_size"),
    "window of sets": ({"window_size": {1, 2}}, ArgumentTypeError, "window_size"),
    "unhashable splits": ({"num_splits": {}}, ArgumentTypeError, "num_splits"),
    "tensor as a scale": ({"softmax_scale": torch.ones(1)}, ArgumentTypeError, "softmax_scale"),
    "text as a flag": ({"causal": "yes"}, ArgumentTypeError, "causal"),
    "unhashable version": ({"ver": [3]}, UnknownVersionError, "ver"),
    "unknown version": ({"ver": 5}, UnknownVersionError, "ver"),
    "wrong shape": ({"q": torch.ones(2, 4, 16)}, ArgumentError, "q: expected 4 dimensions"),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_named_and_not_remembered(name: str) -> None:
    changes, error, message = GARBAGE[name]
    for _ in range(2):
        with pytest.raises(error, match=message):
            triton_fa.flash_attn_with_kvcache(**paged(**changes))
    assert not api._RECORDS


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ({"num_splits": 1}, {"num_splits": True}),
        ({"sm_margin": 0}, {"sm_margin": False}),
        ({"num_splits": 0}, {"num_splits": 0.0}),
        ({"causal": True}, {"causal": 1}),
        ({"causal": False}, {"causal": 0}),
        ({"window_size": (1, 0)}, {"window_size": (True, False)}),
        ({"cache_seqlens": 1}, {"cache_seqlens": True}),
        ({"return_softmax_lse": True}, {"return_softmax_lse": 1}),
    ],
    ids=str,
)
def test_an_equal_value_of_another_type_is_refused_after_a_hit(
    good: Arguments, bad: Arguments
) -> None:
    """1 == True and 0 == 0.0, also as parts of a key."""
    with pytest.raises(TritonFAError) as alone:
        triton_fa.flash_attn_with_kvcache(**paged(**bad))
    for _ in range(3):
        triton_fa.flash_attn_with_kvcache(**paged(**good))
    with pytest.raises(type(alone.value)) as after:
        triton_fa.flash_attn_with_kvcache(**paged(**bad))
    assert str(after.value) == str(alone.value)


def test_an_error_of_the_run_leaves_the_record_usable(fresh: pytest.MonkeyPatch) -> None:
    triton_fa.flash_attn_with_kvcache(**paged())
    (key,) = api._RECORDS
    good = api._RECORDS[key]

    def broken(tensors: object) -> object:
        raise RuntimeError("out of memory")

    api._RECORDS[key] = api._Record(broken, good.shape_result)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="out of memory"):
        triton_fa.flash_attn_with_kvcache(**paged())
    api._RECORDS[key] = good
    triton_fa.flash_attn_with_kvcache(**paged())


def test_torchs_guards_are_in_use() -> None:
    """Where they are not, calls are looked up by their whole key: slower, and right as well."""
    assert records.guards_work()


def test_without_torchs_guards_a_call_is_found_all_the_same(
    fresh: pytest.MonkeyPatch, misses: Callable[[Arguments], int]
) -> None:
    fresh.setattr(records, "guards_work", lambda: False)
    assert [misses(paged()) for _ in range(3)] == [1, 0, 0]
    assert not api._RECORDS._shortcuts


@pytest.fixture
def guards(fresh: pytest.MonkeyPatch) -> list[Any]:
    """The tensor guards that were made, one for each shortcut."""
    made: list[Any] = []
    real = records._tensor_guard
    records.guards_work()
    fresh.setattr(records, "_tensor_guard", lambda *given: made.append(given) or real(*given))
    return made


def test_a_shortcut_serves_calls_that_are_exactly_alike(
    fresh: pytest.MonkeyPatch, misses: Callable[[Arguments], int]
) -> None:
    assert [misses(paged()) for _ in range(3)] == [1, 0, 0]
    ((shortcut,),) = api._RECORDS._shortcuts.values()
    assert shortcut.record is next(iter(api._RECORDS.values()))
    looked_up: list[object] = []
    real = records.key
    fresh.setattr(records, "key", lambda *given: looked_up.append(given) or real(*given))
    triton_fa.flash_attn_with_kvcache(**paged())
    assert not looked_up
    others = [
        {"k_cache": strided(torch.ones(5, 4, 2, 16))},
        {"k_cache": misaligned(torch.ones(5, 4, 2, 16))},
        {"q": torch.nn.Parameter(torch.ones(2, 1, 4, 16), requires_grad=False)},
        {"page_table": torch.zeros(2, 3, dtype=torch.int32)},
        {"page_table": torch.zeros(2, 2, dtype=torch.int32).t()},
        {"cache_seqlens": torch.zeros(2, dtype=torch.int32, device="meta")},
        {"sinks": torch.zeros(4)},
        {"cache_seqlens": None},
        {"v_cache": None},
        {"v_cache": "text"},
        {"page_table": torch.zeros(2, 2, dtype=torch.int32), "out": torch.empty(2, 1, 4, 16)},
    ]
    for other in others:
        before = len(looked_up)
        with contextlib.suppress(TritonFAError):
            triton_fa.flash_attn_with_kvcache(**paged(**other))
        assert len(looked_up) > before, other
        before = len(looked_up)
        triton_fa.flash_attn_with_kvcache(**paged())
        assert len(looked_up) == before


def test_a_shortcut_serves_equal_numbers_that_are_other_objects(
    guards: list[Any], misses: Callable[[Arguments], int]
) -> None:
    """Engines compute bounds and scales anew for each call."""

    def call(**changes: Any) -> Arguments:
        return paged(
            cache_seqlens=int("7"),
            softmax_scale=float("0.25"),
            window_size=(int("1000"), int("0")),
            ver="".join(("tor", "ch")),
            **changes,
        )

    assert [misses(call()) for _ in range(4)] == [1, 0, 0, 0]
    assert len(guards) == 1
    for other in ({"num_splits": False}, {"sm_margin": 0.0}, {"window_size": (1000.0, 0)}):
        with pytest.raises(TritonFAError):
            triton_fa.flash_attn_with_kvcache(**(call() | other))


def test_shortcuts_of_one_shape_stay_side_by_side(
    guards: list[Any], misses: Callable[[Arguments], int]
) -> None:
    """Layers in turn, with sinks or without, or with caches of other strides."""
    wide = strided(torch.ones(5, 4, 2, 16))
    layers = [paged(), paged(sinks=torch.zeros(4)), paged(k_cache=wide), paged(v_cache=wide)]
    assert len(layers) == records.MAX_SHORTCUTS
    for _ in range(4):
        for layer in layers:
            triton_fa.flash_attn_with_kvcache(**layer)
    assert len(guards) == len(layers)
    for _ in range(2):
        triton_fa.flash_attn_with_kvcache(**paged(k_cache=wide, v_cache=wide))
    (shortcuts,) = api._RECORDS._shortcuts.values()
    assert len(shortcuts) == records.MAX_SHORTCUTS


def test_a_tensor_that_is_given_twice_is_found_by_a_shortcut(guards: list[Any]) -> None:
    """As both prefix sums, say; two tensors there, or others that are one, are told from it."""
    q, k = torch.randn(6, 2, 16), torch.randn(6, 1, 16)
    sums = torch.tensor([0, 2, 6], dtype=torch.int32)

    def call(k: torch.Tensor, v: torch.Tensor, *both: torch.Tensor) -> torch.Tensor:
        return triton_fa.flash_attn_varlen_func(q, k, v, *both, 4, 4, ver="torch")

    v = k + 1
    want = call(k, v, sums, sums)
    swapped = call(v, k, sums, sums)
    same = call(k, k, sums, sums.clone())
    for _ in range(3):
        assert torch.equal(call(k, v, sums, sums), want)
        assert torch.equal(call(k, v, sums, sums.clone()), want)
        assert torch.equal(call(k, v, sums.clone(), sums), want)
        assert torch.equal(call(v, k, sums, sums), swapped)
        assert torch.equal(call(k, k, sums, sums.clone()), same)
    assert [len(given) for given in guards] == [4, 4, 5]  # distinct tensors of each
    assert len(api._RECORDS) == 1


def test_a_call_by_shortcut_gives_its_addresses(fresh: pytest.MonkeyPatch) -> None:
    """To a record that wants them: of every tensor that is given, in the order of `Tensors`."""
    sums = torch.tensor([0, 2, 6], dtype=torch.int32)
    tensors = {
        "q": torch.ones(6, 2, 16),
        "k": torch.ones(6, 1, 16),
        "v": torch.ones(6, 1, 16),
        "out": torch.empty(6, 2, 16),
        "cu_seqlens_q": sums,
        "cu_seqlens_k": sums,
        "sinks": torch.ones(2),
    }
    result = AttnResult(torch.ones(1), None)
    given: list[tuple[Any, list[int]]] = []

    def by_address(tensors: Any, addresses: list[int]) -> AttnResult:
        given.append((Tensors(*tensors), addresses))
        return result

    fresh.setattr(dispatch, "prepare", lambda *_: (RunByAddress(by_address), "torch"))
    for _ in range(4):
        out = triton_fa.flash_attn_varlen_func(**tensors, max_seqlen_q=4, max_seqlen_k=4)
        assert out is result.out
    assert len(api._RECORDS._shortcuts) == 1
    assert len(given) == 4
    for seen, addresses in given:
        assert {n: t for n, t in seen._asdict().items() if t is not None} == tensors
        assert addresses == [tensors[n].data_ptr() for n in Tensors._fields if n in tensors]


def test_the_cache_is_bounded(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(records, "MAX_RECORDS", 4)
    for length in range(1, 9):
        triton_fa.flash_attn_with_kvcache(**paged(cache_seqlens=length))
        assert len(api._RECORDS) <= 4
    misses = len(api._RECORDS)
    triton_fa.flash_attn_with_kvcache(**paged(cache_seqlens=8))
    assert len(api._RECORDS) == misses  # the newest is still there


@pytest.mark.parametrize("validated", ["0", "1"])
@pytest.mark.parametrize("ver", ["torch", "triton"])
def test_a_record_keeps_no_tensor_of_its_first_call(
    fresh: pytest.MonkeyPatch, ver: str, validated: str, device: str
) -> None:
    """A record that held on to q or a cache would keep its memory from everybody else."""
    fresh.setenv("TRITON_FA_VALIDATE", validated)
    arguments = paged(ver=ver)
    arguments |= {n: t.to(device) for n, t in arguments.items() if isinstance(t, torch.Tensor)}
    alive = {n: weakref.ref(t) for n, t in arguments.items() if isinstance(t, torch.Tensor)}
    for _ in range(3):
        triton_fa.flash_attn_with_kvcache(**arguments)
    assert api._RECORDS._shortcuts
    del arguments
    gc.collect()
    assert [n for n, tensor in alive.items() if tensor() is not None] == []


# ---------------------------------------------------------------- threads


def test_threads_that_call_at_once_get_their_own_results() -> None:
    """Misses of one key and of several at the same time, while the cache overflows."""
    generator = torch.Generator().manual_seed(0)
    queries = [torch.randn(2, 1, 4, 16, generator=generator) for _ in range(4)]
    keys = torch.randn(5, 4, 2, 16, generator=generator)
    values = torch.randn(5, 4, 2, 16, generator=generator)
    calls = [
        paged(q=q, k_cache=keys, v_cache=values, cache_seqlens=n)
        for q in queries
        for n in (3, 6, 8)
    ]
    want = [triton_fa.flash_attn_with_kvcache(**call) for call in calls]
    barrier = threading.Barrier(4)
    wrong: list[object] = []

    def work(order: int) -> None:
        barrier.wait()
        for repeat in range(6):
            for i in range(len(calls)):
                index = (i * 5 + order + repeat) % len(calls)
                try:
                    got = triton_fa.flash_attn_with_kvcache(**calls[index])
                except Exception as error:  # noqa: BLE001  reported below
                    wrong.append(error)
                    continue
                if not torch.equal(got, want[index]):
                    wrong.append(index)
                if repeat == order:
                    api._RECORDS.clear()

    threads = [threading.Thread(target=work, args=(order,)) for order in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_strict_in_one_thread_is_not_strict_in_another() -> None:
    seen: list[bool] = []
    with triton_fa.strict():
        thread = threading.Thread(target=lambda: seen.append(dispatch.is_strict()))
        thread.start()
        thread.join()
        assert dispatch.is_strict()
    assert seen == [False]


# ---------------------------------------------------------------- the launch itself


def test_a_launch_needs_every_argument_of_its_kernel() -> None:
    pytest.importorskip("triton")
    from triton_fa.kernels.combine import combine_kernel
    from triton_fa.kernels.launch import Launch

    pointers = [None] * 8
    with pytest.raises(AssertionError):
        Launch(combine_kernel, (1, 1, 1), pointers, {"batch": 1}, {}, torch.device("cpu"))


def test_variants_of_a_kernel_are_told_apart() -> None:
    """What Triton specialises for, and nothing else, makes a variant; True is not 1."""
    triton = pytest.importorskip("triton")

    @triton.jit(do_not_specialize=["size"])
    def kernel(pointer, size, stride, scale, FLAG: triton.language.constexpr):
        pass

    if not hasattr(kernel, "params"):
        kernel = triton.runtime.JITFunction(kernel.fn, do_not_specialize=["size"])
    from triton_fa.kernels.launch import specialisation

    half = torch.zeros(64, dtype=torch.float16)

    def of(*, pointer=half, size=7, stride=32, scale=0.5, FLAG=True) -> object:
        return specialisation(kernel, (pointer, size, stride, scale, FLAG))

    known = of()
    for same in ({"size": 1}, {"size": 2**31 - 1}, {"stride": 48}, {"scale": 1.0}):
        assert of(**same) == known, same
    assert of(pointer=half[8:]) == known
    others = [{"pointer": None}, {"pointer": half.bfloat16()}, {"pointer": half[1:]}]
    others += [{"size": 2**31}, {"size": None}, {"stride": 1}, {"stride": 33}, {"stride": 2**32}]
    others += [{"scale": None}, {"FLAG": False}, {"FLAG": 1}, {"FLAG": None}]
    found = [of(**other) for other in others]
    assert len({known, *found}) == 1 + len(others)


def test_direct_launching_can_be_turned_off(fresh: pytest.MonkeyPatch) -> None:
    """The setting is read, and a bad value is named, whatever device this runs on."""
    from triton_fa import env

    assert env.settings().direct_launch
    env.settings.cache_clear()
    fresh.setenv("TRITON_FA_DIRECT_LAUNCH", "0")
    assert not env.settings().direct_launch
    env.settings.cache_clear()
    fresh.setenv("TRITON_FA_DIRECT_LAUNCH", "no")
    with pytest.raises(TritonFAError, match="DIRECT_LAUNCH"):
        env.settings()


def test_launches_enter_the_tensors_device_when_another_is_current(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two devices, simulated: the kernels go to the one that the tensors are on."""
    module = importlib.import_module("triton_fa.backends.triton")
    current = [0]
    seen: list[int] = []

    @contextlib.contextmanager
    def entered(device: torch.device) -> Iterator[None]:
        before, current[0] = current[0], device.index
        try:
            yield
        finally:
            current[0] = before

    class Recorder:
        submittable = None

        def __call__(self, pointers: object) -> None:
            seen.append(current[0])

    class Step:
        def pointers(self, given: object) -> object:
            return given

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", entered)
    launches = [Recorder(), Recorder()]
    enqueue = module._enqueuer([Step(), Step()], launches, (), torch.device("cuda", 1))
    enqueue(())
    assert seen == [1, 1]
    assert current == [0]
    submitted: list[tuple[list[str], int, list[int], int]] = []

    def submission(steps: object, names: list[str], index: int) -> Callable[[list[int]], None]:
        return lambda addresses: submitted.append((names, index, addresses, current[0]))

    monkeypatch.setattr(module.submit, "submission", submission)
    for launch in launches:
        monkeypatch.setattr(launch, "submittable", object(), raising=False)
    out, q = torch.empty(1), torch.empty(1)
    example = (out, None, None, q)
    enqueue = module._enqueuer([Step(), Step()], launches, example, torch.device("cuda", 1))
    enqueue(example)
    addresses = [out.data_ptr(), q.data_ptr()]
    assert submitted == [(["out_ptr", "q_ptr"], 1, addresses, 1)]
    assert current == [0]
    assert len(seen) == 2

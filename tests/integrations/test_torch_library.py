"""The attention functions as operators: same numbers, traceable, honest about what they write."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import triton_fa
from triton_fa.integrations import torch_library

OPS = torch.ops.triton_fa
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "flash_attn_func": triton_fa.flash_attn_func,
    "flash_attn_varlen_func": triton_fa.flash_attn_varlen_func,
    "flash_attn_with_kvcache": triton_fa.flash_attn_with_kvcache,
    "flash_attn_with_kvcache_append": triton_fa.flash_attn_with_kvcache,
}


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def arguments(name: str, ver: str = "torch") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call of each operator, with values of another size than keys."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    options: dict[str, Any] = {"causal": True, "window_size": [4, 0], "ver": ver}
    if name == "flash_attn_func":
        return (random(2, 5, 4, 16), random(2, 9, 2, 16), random(2, 9, 2, 32)), options
    if name == "flash_attn_varlen_func":
        packed = (random(7, 4, 16), random(9, 2, 16), random(9, 2, 32))
        bounds = {"max_seqlen_q": 4, "max_seqlen_k": 5, "sinks": random(4)}
        return (*packed, ints(0, 3, 7), ints(0, 4, 9)), options | bounds
    cache = (random(2, 1, 4, 16), random(3, 8, 2, 16), random(3, 8, 2, 32))
    paged = {"cache_seqlens": ints(3, 7), "page_table": torch.stack((ints(0, 2), ints(1, 0)))}
    if name == "flash_attn_with_kvcache":
        return cache, options | paged | {"softcap": 5.0}
    new = (random(2, 1, 2, 16), random(2, 1, 2, 32))
    cos, sin = random(16, 8), random(16, 8)
    return (*cache, *new), options | paged | {"rotary_cos": cos, "rotary_sin": sin}


def copies(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.clone() for x in values)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_opcheck(name: str) -> None:
    tensors, options = arguments(name)
    for return_lse in (False, True):
        torch.library.opcheck(
            getattr(OPS, name).default, tensors, options | {"return_lse": return_lse}
        )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_same_as_the_function(name: str) -> None:
    tensors, options = arguments(name)
    ours, theirs = copies(tensors), copies(tensors)
    out, lse = getattr(OPS, name)(*ours, **options, return_lse=True)
    want, want_lse = FUNCTIONS[name](*theirs, **options, return_lse=True)
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    for one, other in zip(ours, theirs, strict=True):  # the caches
        assert torch.equal(one, other)
    out, lse = getattr(OPS, name)(*copies(tensors), **options)
    assert torch.equal(out, want)
    assert lse.numel() == 0


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiles_as_one_graph(name: str, backend: str) -> None:
    tensors, options = arguments(name)
    operator = getattr(OPS, name)

    def layer(q: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return operator(q * 2, *rest, **options)[0] + 1

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    ours, theirs = copies(tensors), copies(tensors)
    assert torch.equal(compiled(*ours), layer(*theirs))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
    if name.endswith("append"):
        assert not torch.equal(ours[1], tensors[1])


def test_float8_and_second_queries() -> None:
    """The result of float8 queries is bfloat16, in the compiler's eyes as well."""
    (q, k, v), options = arguments("flash_attn_func")
    scale = torch.tensor(2.0).expand(2, 2)
    numbers = tuple(x.to(torch.float8_e4m3fn) for x in (q, k, v))
    scales = {"q_descale": scale, "k_descale": scale, "v_descale": scale}
    qv = torch.randn(*q.shape[:-1], v.shape[-1])
    for tensors, extra in ((numbers, scales), ((q, k, v), {"qv": qv})):
        want = triton_fa.flash_attn_func(*tensors, **options, **extra)

        def layer(*tensors: torch.Tensor, extra: Any = extra) -> torch.Tensor:
            return OPS.flash_attn_func(*tensors, **options, **extra)[0] * 1

        torch.compiler.reset()
        out = torch.compile(layer, fullgraph=True, backend="aot_eager")(*tensors)
        assert torch.equal(out, want)
        assert out.dtype == (torch.bfloat16 if extra is scales else torch.float32)


def test_compiles_for_any_number_of_tokens() -> None:
    _, k, v = arguments("flash_attn_func")[0]

    def layer(q: torch.Tensor) -> torch.Tensor:
        return OPS.flash_attn_func(q, k, v, ver="torch")[0]

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for seqlen in (3, 5, 8):
        q = torch.randn(2, seqlen, 4, 16)
        assert torch.equal(compiled(q), layer(q))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_through_the_kernels(name: str) -> None:
    """Triton's kernels: on a GPU, or in its interpreter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors, options = arguments(name)
    want = getattr(OPS, name)(*copies(tensors), **options)[0]
    moved = tuple(x.to(device) for x in tensors)
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    out = getattr(OPS, name)(*moved, **options | {"ver": "triton"})[0]
    torch.testing.assert_close(out.cpu(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_names_and_defaults_are_the_functions(name: str) -> None:
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    for argument in getattr(OPS, name).default._schema.arguments:
        parameter = parameters[argument.name]
        if not argument.has_default_value():
            continue
        default = argument.default_value
        if argument.name in ("window_size", "attention_chunk"):  # a tuple; None and 0 are off
            assert (default or 0) == (
                list(parameter.default) if isinstance(parameter.default, tuple) else 0
            )
        else:
            assert default == parameter.default, argument.name


def test_only_appending_writes() -> None:
    written = {
        name: [a.name for a in getattr(OPS, name).default._schema.arguments if a.is_write]
        for name in FUNCTIONS
    }
    assert written.pop("flash_attn_with_kvcache_append") == ["k_cache", "v_cache"]
    assert not any(written.values())


def test_versions_by_their_text() -> None:
    tensors, _ = arguments("flash_attn_func")
    with pytest.raises(triton_fa.UnknownVersionError, match="'5'"):
        OPS.flash_attn_func(*tensors, ver="5")
    with (
        triton_fa.strict(),
        pytest.raises((triton_fa.UnsupportedError, triton_fa.BackendUnavailableError)) as raised,
    ):
        OPS.flash_attn_func(*tensors, ver="4")
    assert raised.value.ver == 4


@torch.enable_grad()
def test_gradients_are_refused() -> None:
    q, k, v = arguments("flash_attn_func")[0]
    q.requires_grad_()
    with pytest.raises(triton_fa.ArgumentError, match="no_grad"):
        OPS.flash_attn_func(q, k, v, ver="torch")

    def layer(q: torch.Tensor) -> torch.Tensor:
        return OPS.flash_attn_func(q, k, v, ver="torch")[0]

    torch.compiler.reset()
    with pytest.raises(RuntimeError, match="no_grad"):
        torch.compile(layer, fullgraph=True, backend="aot_eager")(q)


def test_call_is_the_function_or_the_operator() -> None:
    tensors, options = arguments("flash_attn_func")

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = torch_library.call("flash_attn_func", q, k, v, **options)
        return out, *torch_library.call("flash_attn_func", q, k, v, **options, return_lse=True)

    torch.compiler.reset()
    found = torch.compile(layer, fullgraph=True, backend="aot_eager")(*tensors)
    for ours, want in zip(found, layer(*tensors), strict=True):
        assert torch.equal(ours, want)

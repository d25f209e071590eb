"""Stand-ins for other packages' modules: their signatures, their results, and leaving no trace."""

import functools
import importlib
import importlib.util
import inspect
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import triton_fa
from triton_fa.compat import install

NAMES = ("flash_attn", "flash_attn_interface", "sgl_kernel.flash_attn", "vllm.vllm_flash_attn")
TOPS = {name.partition(".")[0] for name in NAMES}

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(top) is not None for top in TOPS),
    reason="a package that is stood in for is installed",
)


@pytest.fixture(autouse=True)
def no_trace() -> Iterator[None]:
    def held() -> dict[str, ModuleType]:
        return {n: m for n, m in sys.modules.items() if n.partition(".")[0] in TOPS}

    before = held()
    with torch.no_grad():
        yield
    assert held() == before


# As the packages write them, from their own sources.
SIGNATURES = {
    ("flash_attn", "flash_attn_func"): """
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False""",
    ("flash_attn", "flash_attn_varlen_func"): """
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False, block_table=None""",
    ("flash_attn", "flash_attn_with_kvcache"): """
        q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True,
        alibi_slopes=None, num_splits=0, return_softmax_lse=False""",
    ("flash_attn_interface", "flash_attn_func"): """
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
        v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
        pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False""",
    ("flash_attn_interface", "flash_attn_varlen_func"): """
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
        seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
        v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
        pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False""",
    ("flash_attn_interface", "flash_attn_with_kvcache"): """
        q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None,
        cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None,
        cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None,
        q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
        scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0,
        return_softmax_lse=False""",
    ("flash_attn_interface", "flash_attn_combine"): """
        out_partial, lse_partial, out=None, out_dtype=None""",
    ("flash_attn_interface", "get_scheduler_metadata"): """
        batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens,
        qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
        cache_leftpad=None, page_size=None, max_seqlen_k_new=0, causal=False, window_size=(-1, -1),
        attention_chunk=0, has_softcap=False, num_splits=0, pack_gqa=None, sm_margin=0""",
    ("sgl_kernel.flash_attn", "flash_attn_with_kvcache"): """
        q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None,
        cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None,
        cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None,
        q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False,
        window_size=(-1, -1), attention_chunk=None, softcap=0.0, rotary_interleaved=True,
        scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0,
        return_softmax_lse=False, sinks=None, score_mod=None, aux_tensors=None, ver=3, out=None""",
    ("sgl_kernel.flash_attn", "flash_attn_varlen_func"): """
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, seqused_q=None,
        seqused_k=None, page_table=None, softmax_scale=None, causal=False, qv=None, q_descale=None,
        k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
        num_splits=1, pack_gqa=None, sm_margin=0, return_softmax_lse=False, sinks=None,
        score_mod=None, aux_tensors=None, ver=3, out=None""",
    ("sgl_kernel.flash_attn", "get_scheduler_metadata"): """
        batch_size, max_seqlen_q, max_seqlen_k, num_heads, num_heads_k, headdim, cache_seqlens,
        qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, leftpad_k=None, page_size=None, max_seqlen_k_new=0,
        causal=False, window_size=(-1, -1), attention_chunk=0, has_softcap=False, num_splits=0,
        pack_gqa=None, sm_margin=0""",
    ("sgl_kernel", "merge_state_v2"): "v_a, s_a, v_b, s_b, v_merged=None, s_merged=None",
    ("vllm.vllm_flash_attn", "flash_attn_varlen_func"): """
        q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, seqused_k=None,
        q_v=None, dropout_p=0.0, softmax_scale=None, causal=False, window_size=None, softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
        return_softmax_lse=False, out=None, scheduler_metadata=None, q_descale=None,
        k_descale=None, v_descale=None, num_splits=0, output_scale=None, fa_version=2, s_aux=None,
        cp_world_size=1, cp_rank=0, cp_tot_seqused_k=None, mask_mod=None,
        block_sparse_tensors=None, aux_tensors=None, aux_tensor_leading_dims=None,
        dynamic_causal=None, gather_kv_indices=None, gather_kv_valid_length=None""",
    ("vllm.vllm_flash_attn", "get_scheduler_metadata"): """
        batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens,
        qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
        cache_leftpad=None, page_size=None, max_seqlen_k_new=0, causal=False, window_size=(-1, -1),
        has_softcap=False, num_splits=0, pack_gqa=None, sm_margin=0""",
}
# Set for every call here, whatever is passed; or required there and optional in our own function.
FREE_DEFAULTS = {"ver", "num_heads", "num_heads_k", "headdim", "cache_seqlens"}


@pytest.mark.parametrize(("module", "name"), SIGNATURES, ids=lambda value: str(value))
def test_signature(module: str, name: str) -> None:
    """Every argument at its place and with its default; we may take more, by keyword."""
    text = " ".join(SIGNATURES[module, name].split())
    theirs: Callable[..., Any] = eval(f"lambda {text}: None", {"torch": torch})
    target = next(n for n in NAMES if n == module or n.startswith(f"{module}."))
    with install(target):
        ours = getattr(importlib.import_module(module), name)
    want = inspect.signature(theirs).parameters
    found = inspect.signature(ours).parameters
    places = [p for p in found.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert [p.name for p in places][: len(want)] == list(want)
    for argument, parameter in want.items():
        if argument not in FREE_DEFAULTS and parameter.default is not inspect.Parameter.empty:
            one, other = found[argument].default, parameter.default
            assert one == other or (one or 0) == (other or 0) == 0, argument
    assert not [p for p in places if p.kind is inspect.Parameter.VAR_KEYWORD]


@pytest.mark.parametrize("name", NAMES)
def test_found_while_installed_and_gone_afterwards(name: str) -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)
    with install(name) as installed:
        module = importlib.import_module(name)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec is module.__spec__
        assert module.flash_attn_varlen_func is not None
        namespace: dict[str, Any] = {}
        parent, _, child = name.rpartition(".")
        exec(f"from {parent} import {child}" if parent else f"import {name}", namespace)
        exec(f"import {name} as again", namespace)
        assert namespace["again"] is namespace[child] is module
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(f"{name}.bert_padding")
        assert "triton_fa" in str(module.__file__)
    installed.remove()  # again, without harm
    assert importlib.util.find_spec(name.partition(".")[0]) is None


def test_submodules() -> None:
    with install("flash_attn"):
        import flash_attn
        from flash_attn.flash_attn_interface import flash_attn_func as inner

        assert inner is flash_attn.flash_attn_func
        assert flash_attn.__version__ == "2.8.3"
    with install("vllm.vllm_flash_attn"):
        from vllm.vllm_flash_attn.flash_attn_interface import (
            fa_version_unsupported_reason,
            is_fa_version_supported,
        )

        assert is_fa_version_supported(3)
        assert fa_version_unsupported_reason(2) is None
        with pytest.raises(ValueError, match="fa_version"):
            is_fa_version_supported(5)


def test_nested_and_repeated() -> None:
    with install("flash_attn"), install("flash_attn"), install("sgl_kernel.flash_attn"):
        import sgl_kernel.flash_attn

        assert sgl_kernel.merge_state is triton_fa.merge_state
    assert "flash_attn" not in sys.modules


def test_removed_after_an_error() -> None:
    with pytest.raises(KeyError), install("flash_attn"):
        raise KeyError
    assert "flash_attn" not in sys.modules


def test_unknown_name() -> None:
    with pytest.raises(triton_fa.ArgumentValueError, match="'xformers'"):
        install("xformers")


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages by these names, installed but never imported."""
    for name in NAMES:
        folder = tmp_path.joinpath(*name.split("."))
        for package in (folder, *folder.parents):
            if package == tmp_path:
                break
            package.mkdir(parents=True, exist_ok=True)
            (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
        (folder / "bert_padding.py").write_text("real = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_an_installed_package_is_shadowed_on_request_only(real: Path, name: str) -> None:
    with pytest.raises(triton_fa.ArgumentValueError, match="replace"):
        install(name)
    assert name not in sys.modules
    with install(name, replace=True):
        assert "triton_fa" in str(sys.modules[name].__file__)


def test_other_submodules_of_a_shadowed_package(real: Path) -> None:
    with install("flash_attn", replace=True):
        from flash_attn.bert_padding import real as found

        assert found
        del sys.modules["flash_attn.bert_padding"]


def test_a_loaded_module_comes_back() -> None:
    loaded = ModuleType("flash_attn")
    loaded.__spec__ = ModuleSpec("flash_attn", None)
    sys.modules["flash_attn"] = loaded
    try:
        with pytest.raises(triton_fa.ArgumentValueError, match="replace"):
            install("flash_attn")
        with install("flash_attn", replace=True):
            assert sys.modules["flash_attn"] is not loaded
        assert sys.modules["flash_attn"] is loaded
    finally:
        del sys.modules["flash_attn"]


def test_nothing_is_installed_by_importing() -> None:
    code = """
        import sys
        import triton_fa.compat
        assert not {"flash_attn", "flash_attn_interface", "sgl_kernel", "vllm"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def paged() -> dict[str, Any]:
    torch.manual_seed(2)
    k, v = torch.randn(2, 4, 8, 2, 16)
    return {
        "q": torch.randn(5, 4, 16),
        "k": k,
        "v": v,
        "table": torch.stack((ints(3, 1), ints(0, 2))),
        "cu_seqlens_q": ints(0, 2, 5),
        "used": ints(9, 13),
    }


def wanted(case: dict[str, Any], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = triton_fa.flash_attn_varlen_func(
        *(case["q"], case["k"], case["v"], case["cu_seqlens_q"], None, 3),
        seqused_k=case["used"],
        page_table=case["table"],
        causal=True,
        return_softmax_lse=True,
        **options,
    )
    return out, lse


def close(found: Any, want: torch.Tensor) -> None:
    torch.testing.assert_close(found, want, rtol=0, atol=2e-6)


def test_fa2_pages_with_prefix_sums_of_keys() -> None:
    case = paged()
    want, want_lse = wanted(case, window_size=(6, 0), softcap=9.0)
    with install("flash_attn"):
        from flash_attn import flash_attn_varlen_func

    positional = (case["q"], case["k"], case["v"], case["cu_seqlens_q"], ints(0, 9, 22), 3, 13)
    options = {"causal": True, "window_size": (6, 0), "softcap": 9.0}
    close(flash_attn_varlen_func(*positional, **options, block_table=case["table"]), want)
    out, lse, probabilities = flash_attn_varlen_func(
        *positional, 0.0, None, True, (6, 0), 9.0, None, False, True, case["table"]
    )
    close(out, want)
    close(lse, want_lse)
    assert probabilities.numel() == 0


def test_fa2_dense_and_cache() -> None:
    torch.manual_seed(4)
    q, k, v = torch.randn(2, 1, 4, 16), torch.randn(2, 8, 2, 16), torch.randn(2, 8, 2, 16)
    new = torch.randn(2, 2, 1, 2, 16)
    with install("flash_attn"):
        import flash_attn
    out = flash_attn.flash_attn_func(q, k, v, 0.0, 0.2, True)
    close(out, triton_fa.flash_attn_func(q, k, v, 0.2, causal=True))
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (out.shape, lse.shape) == ((2, 1, 4, 16), (2, 4, 1))
    ours, theirs = (k.clone(), v.clone()), (k.clone(), v.clone())
    want, want_lse = triton_fa.flash_attn_with_kvcache(
        q, *ours, *new, cache_seqlens=3, causal=True, return_softmax_lse=True
    )
    out, lse = flash_attn.flash_attn_with_kvcache(
        q, *theirs, *new, cache_seqlens=3, causal=True, return_softmax_lse=True
    )
    close(out, want)
    close(lse, want_lse)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(theirs[0], k)


@pytest.mark.parametrize("name", ["flash_attn_interface", "sgl_kernel.flash_attn"])
def test_fa3_results(name: str) -> None:
    """Four with a cache, in `sgl_kernel` in any case."""
    case = paged()
    want, want_lse = wanted(case)
    with install(name):
        module = importlib.import_module(name)
    call = {
        "page_table": case["table"],
        "cache_seqlens": case["used"],
        "cu_seqlens_q": case["cu_seqlens_q"],
        "max_seqlen_q": 3,
        "causal": True,
    }
    caches = (case["q"], case["k"], case["v"])
    close(module.flash_attn_with_kvcache(*caches, **call), want)
    out, lse, *accumulators = module.flash_attn_with_kvcache(
        *caches, **call, return_softmax_lse=True
    )
    close(out, want)
    close(lse, want_lse)
    assert [x.numel() for x in accumulators] == [0, 0]
    q, cu_seqlens = case["q"], case["cu_seqlens_q"]
    k = v = torch.randn(5, 2, 16)
    flag = "return_softmax_lse" if "sgl" in name else "return_attn_probs"
    found = module.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 3, 3, **{flag: True})
    assert len(found) == (4 if "sgl" in name else 2)
    close(found[0], triton_fa.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 3, 3))


def test_fa3_dense() -> None:
    q = torch.randn(1, 3, 2, 16)
    with install("flash_attn_interface"):
        from flash_attn_interface import flash_attn_func
    out, lse = flash_attn_func(q, q, q, 0.5, True, return_attn_probs=True)
    assert lse.shape == (1, 2, 3)
    close(out, triton_fa.flash_attn_func(q, q, q, 0.5, True))


def test_sglang_calls_by_position() -> None:
    """Through `sinks`, as SGLang 0.5.11 does, and with the version that it always names."""
    case, sinks = paged(), torch.randn(4)
    want = wanted(case, sinks=sinks)[0]
    with install("sgl_kernel.flash_attn"):
        from sgl_kernel.flash_attn import flash_attn_with_kvcache
    by_position = (
        *(case["q"], case["k"], case["v"], None, None, None, None, None, case["used"]),
        *(None, None, case["table"], case["cu_seqlens_q"], ints(0, 9, 22), 3, None),
        *(None, None, None, None, True, (-1, -1), None, 0.0, True, None, 0, None, 0, False, sinks),
    )
    close(flash_attn_with_kvcache(*by_position), want)
    out = torch.empty_like(case["q"])
    for ver in (3, 4):
        found = flash_attn_with_kvcache(*by_position, ver=ver, out=out)
        assert found is out
        close(out, want)


@pytest.mark.parametrize("fa_version", [2, 3, 4])
def test_vllm_order(fa_version: int) -> None:
    case, scale = paged(), torch.ones(1).expand(2, 2)
    want, want_lse = wanted(case)
    half = {name: case[name].half() for name in "qkv"}
    with install("vllm.vllm_flash_attn"):
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    rest = (3, case["cu_seqlens_q"], 16, None, case["used"])
    options = {
        "causal": True,
        "window_size": [-1, -1],
        "block_table": case["table"],
        "fa_version": fa_version,
    }
    out, lse = flash_attn_varlen_func(
        *(case["q"], case["k"], case["v"], *rest), **options, return_softmax_lse=True
    )
    close(out, want)
    close(lse, want_lse)
    # vLLM passes scales with any dtype.
    scales = {f"{name}_descale": scale for name in "qkv"}
    out = flash_attn_varlen_func(*half.values(), *rest, **options, **scales)
    torch.testing.assert_close(out.float(), want, rtol=0, atol=5e-3)


@pytest.mark.parametrize("name", NAMES)
def test_scheduler_metadata(name: str) -> None:
    if name == "flash_attn":
        pytest.skip("FlashAttention-2 has none")
    with install(name):
        module = importlib.import_module(name)
    lengths = ints(9, 13)
    made = module.get_scheduler_metadata(2, 3, 16, 4, 2, 16, lengths, torch.float32, page_size=8)
    want = triton_fa.get_scheduler_metadata(2, 3, 16, 4, 2, 16, lengths, torch.float32, page_size=8)
    assert torch.equal(made, want)


# What an argument is called by our functions, where that is another name.
OURS = {
    "block_table": "page_table",
    "cache_leftpad": "leftpad_k",
    "num_heads_kv": "num_heads_k",
    "num_heads_q": "num_heads",
    "q_v": "qv",
    "return_attn_probs": "return_softmax_lse",
    "s_aux": "sinks",
}
# Makes no difference to a forward pass here, or is refused.
WITHOUT_EFFECT = {"cp_rank", "deterministic", "fa_version", "ver"}
REFUSED = {
    *("alibi_slopes", "aux_tensor_leading_dims", "block_sparse_tensors", "cp_tot_seqused_k"),
    *("cp_world_size", "dropout_p", "dynamic_causal", "gather_kv_indices"),
    *("gather_kv_valid_length", "output_scale"),
}
REFUSED_BY_VLLM = {"aux_tensors", "mask_mod", "return_attn_probs"}


@pytest.mark.parametrize(
    ("module", "name"), [x for x in SIGNATURES if "merge" not in x[1] and "combine" not in x[1]]
)
def test_every_argument_arrives(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each under its name at our function, or refused by name: none is dropped."""
    stand_in = {"sgl_kernel.flash_attn": "sgl_kernel"}.get(module, module.split(".")[-1])
    source = importlib.import_module(f"triton_fa.compat.{stand_in}")
    own = getattr(triton_fa.api, name)
    seen: list[dict[str, Any]] = []

    @functools.wraps(own)
    def record(*arguments: Any, **options: Any) -> torch.Tensor:
        seen.append(inspect.signature(own).bind(*arguments, **options).arguments)
        return torch.empty(0)

    monkeypatch.setattr(triton_fa.api, name, record)
    importlib.reload(source)  # some of its functions are made of ours when it is loaded
    try:
        text = " ".join(SIGNATURES[module, name].split())
        theirs = inspect.signature(eval(f"lambda {text}: None", {"torch": torch})).parameters
        given = {p: torch.ones(2) for p, v in theirs.items() if v.default is v.empty}
        refused = REFUSED | (REFUSED_BY_VLLM if "vllm" in module else set())
        for argument in theirs.keys() - WITHOUT_EFFECT:
            value: Any = 2 if argument in {"cp_world_size", "dropout_p"} else torch.ones(2)
            if argument in refused:
                with pytest.raises(triton_fa.UnsupportedError, match=argument):
                    getattr(source, name)(**given | {argument: value})
                continue
            getattr(source, name)(**given | {argument: value})
            found = seen.pop()
            place = argument if argument in found else OURS.get(argument, argument)
            assert found[place] is value, argument
    finally:
        monkeypatch.undo()
        importlib.reload(source)


def test_what_has_no_meaning_here_is_refused() -> None:
    q = torch.randn(1, 3, 2, 16)
    with install("flash_attn"), install("vllm.vllm_flash_attn"):
        from flash_attn import flash_attn_func
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    with pytest.raises(triton_fa.UnsupportedError, match="alibi_slopes"):
        flash_attn_func(q, q, q, alibi_slopes=torch.ones(2))
    with pytest.raises(triton_fa.UnsupportedError, match="dropout_p"):
        flash_attn_func(q, q, q, 0.1)
    cu_seqlens = ints(0, 3)
    packed = (q[0], q[0], q[0], 3, cu_seqlens, 3, cu_seqlens)
    for name, value in (("cp_world_size", 2), ("mask_mod", object()), ("output_scale", q[0])):
        with pytest.raises(triton_fa.UnsupportedError, match=name):
            flash_attn_varlen_func(*packed, **{name: value})


def test_the_default_version_is_not_asked(fresh: pytest.MonkeyPatch) -> None:
    """It may be 3, and so the very module that is stood in for."""
    fresh.setenv("TRITON_FA_VER", "3")
    fresh.setenv("TRITON_FA_FALLBACK", "0")
    q = torch.randn(1, 3, 2, 16)
    with install("flash_attn_interface"):
        from flash_attn_interface import flash_attn_func

        assert flash_attn_func(q, q, q).shape == q.shape


def test_transformers_asks_and_is_not_fooled() -> None:
    pytest.importorskip("transformers", reason="needs transformers: nox -s integrations")
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    with install("flash_attn"), install("flash_attn_interface"):
        for available in (is_flash_attn_2_available, is_flash_attn_3_available):
            getattr(available, "cache_clear", lambda: None)()
            assert not available()  # it wants a distribution of that name, too

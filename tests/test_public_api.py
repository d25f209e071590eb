"""The public surface: which names, which signatures, and that the docstrings match them."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

import triton_fa

FUNCTIONS = {
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "merge_state",
}
HELPERS = {"backends", "strict", "warmup"}
TYPES = {
    "StepPlanner",
    "StepSchedules",
    "ArgumentError",
    "ArgumentTypeError",
    "ArgumentValueError",
    "BackendStatus",
    "BackendUnavailableError",
    "BlockSparseTensors",
    "FallbackWarning",
    "LayoutError",
    "TritonFAError",
    "UnknownVersionError",
    "UnsupportedError",
}

# SGLang's order. An engine passes these by position; ours must follow them, keyword-only.
POSITIONAL = {
    "flash_attn_with_kvcache": """
        q k_cache v_cache k=None v=None qv=None rotary_cos=None rotary_sin=None cache_seqlens=None
        cache_batch_idx=None cache_leftpad=None page_table=None cu_seqlens_q=None
        cu_seqlens_k_new=None max_seqlen_q=None rotary_seqlens=None q_descale=None k_descale=None
        v_descale=None softmax_scale=None causal=False window_size=(-1,-1) attention_chunk=None
        softcap=0.0 rotary_interleaved=True scheduler_metadata=None num_splits=0 pack_gqa=None
        sm_margin=0 return_softmax_lse=False sinks=None score_mod=None aux_tensors=None ver=None
        out=None""",
    "flash_attn_varlen_func": """
        q k v cu_seqlens_q cu_seqlens_k max_seqlen_q=None max_seqlen_k=None seqused_q=None
        seqused_k=None page_table=None softmax_scale=None causal=False qv=None q_descale=None
        k_descale=None v_descale=None window_size=(-1,-1) attention_chunk=0 softcap=0.0
        num_splits=1 pack_gqa=None sm_margin=0 return_softmax_lse=False sinks=None score_mod=None
        aux_tensors=None ver=None out=None""",
    "flash_attn_func": """
        q k v softmax_scale=None causal=False qv=None q_descale=None k_descale=None v_descale=None
        window_size=(-1,-1) attention_chunk=0 softcap=0.0 num_splits=1 pack_gqa=None
        deterministic=False sm_margin=0 return_attn_probs=False""",
    "flash_attn_combine": "out_partial lse_partial out=None out_dtype=None",
    "merge_state": "v_a s_a v_b s_b v_merged=None s_merged=None",
}
KEYWORD_ONLY = {
    "flash_attn_with_kvcache": {
        "batch_invariant",
        "block_table",
        "learnable_sink",
        "leftpad_k",
        "mask_mod",
        "block_sparse_tensors",
        "max_seqlen_k",
        "only_qv",
        "return_attn_probs",
        "return_lse",
        "s_aux",
        "seqused_k",
    },
    "flash_attn_varlen_func": {
        "batch_invariant",
        "block_table",
        "cache_seqlens",
        "learnable_sink",
        "mask_mod",
        "block_sparse_tensors",
        "only_qv",
        "return_attn_probs",
        "return_lse",
        "s_aux",
        "scheduler_metadata",
    },
    "flash_attn_func": {
        "batch_invariant",
        "learnable_sink",
        "out",
        "return_lse",
        "return_softmax_lse",
        "sinks",
        "ver",
    },
}


def parameters(name: str) -> list[inspect.Parameter]:
    return list(inspect.signature(getattr(triton_fa, name)).parameters.values())


def spelled(parameter: inspect.Parameter) -> str:
    if parameter.default is inspect.Parameter.empty:
        return parameter.name
    return f"{parameter.name}={parameter.default!r}".replace(" ", "")


def test_exported_names() -> None:
    assert set(triton_fa.__all__) >= FUNCTIONS | HELPERS | TYPES
    extra = set(triton_fa.__all__) - FUNCTIONS - HELPERS - TYPES
    assert not extra


def test_all_is_sorted_and_without_repetition() -> None:
    assert triton_fa.__all__ == sorted(set(triton_fa.__all__))


def test_every_exported_name_exists() -> None:
    for name in triton_fa.__all__:
        assert hasattr(triton_fa, name), name


@pytest.mark.parametrize("name", sorted(POSITIONAL))
def test_positional_order_and_defaults(name: str) -> None:
    positional = [
        spelled(p) for p in parameters(name) if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    assert positional == POSITIONAL[name].split()


@pytest.mark.parametrize("name", sorted(KEYWORD_ONLY))
def test_what_is_ours_is_keyword_only(name: str) -> None:
    keywords = {p.name for p in parameters(name) if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert keywords == KEYWORD_ONLY[name]


@pytest.mark.parametrize("name", sorted(FUNCTIONS | HELPERS))
def test_no_catch_all(name: str) -> None:
    catch_all = {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    assert not [p.name for p in parameters(name) if p.kind in catch_all]


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_an_unknown_argument_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match="no_such_argument"):
        getattr(triton_fa, name)(no_such_argument=1)


@pytest.mark.parametrize("name", sorted(FUNCTIONS | HELPERS))
def test_every_parameter_is_annotated(name: str) -> None:
    function = getattr(triton_fa, name)
    annotated = set(inspect.get_annotations(function))
    assert annotated >= {p.name for p in parameters(name)} | {"return"}


def documented(function: Callable[..., Any]) -> list[str]:
    """Parameter names of the docstring's ``Args:`` section, in order.

    An entry is ``name: text`` or ``name, other: text`` at the section's own indentation; deeper
    lines continue an entry.
    """
    text = inspect.getdoc(function) or ""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    if section is None:
        return []
    names: list[str] = []
    for line in section[1].splitlines():
        if entry := re.match(r" {4}((?:\w+)(?:, ?\w+)*)(?: \([^)]*\))?:", line):
            names += re.split(r", ?", entry[1])
    return names


def test_the_docstring_parser_sees_what_is_written() -> None:
    def example(a: int, b: int, c: int) -> None:
        """Do it.

        Args:
            a: first: with a colon
                continued: not a name
            b, c: two at once

        Returns:
            d: nothing
        """

    assert documented(example) == ["a", "b", "c"]


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_docstring_names_exactly_the_parameters(name: str) -> None:
    names = documented(getattr(triton_fa, name))
    assert sorted(names) == sorted(p.name for p in parameters(name))


@pytest.mark.parametrize("name", sorted(FUNCTIONS | HELPERS | TYPES))
def test_every_public_name_has_a_docstring(name: str) -> None:
    assert (getattr(triton_fa, name).__doc__ or "").strip()


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ArgumentError", RuntimeError),
        ("ArgumentTypeError", TypeError),
        ("ArgumentValueError", ValueError),
        ("LayoutError", AssertionError),
        ("UnknownVersionError", RuntimeError),
        ("UnsupportedError", NotImplementedError),
        ("BackendUnavailableError", ImportError),
    ],
)
def test_errors_are_ours_and_what_a_caller_would_catch(name: str, builtin: type[Exception]) -> None:
    error = getattr(triton_fa, name)
    assert issubclass(error, builtin)
    assert issubclass(error, triton_fa.TritonFAError)

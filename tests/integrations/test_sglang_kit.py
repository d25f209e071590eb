"""SGLang's own tests of attention backends, on ours: its model runner, pools and batches.

Its packages decide whether they can be imported; without a GPU the kernels run in the interpreter.
"""

import importlib
import unittest
from types import ModuleType
from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KIT = "sglang.test.kits.attention_unittest"
SLIDING_WINDOW = ("swa_extend_no_prefix_window_edges", "swa_extend_prefix_window_edges")


@pytest.fixture(scope="module", autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def dense() -> ModuleType:
    """SGLang's cases of dense attention, with our backend registered."""
    try:
        module = importlib.import_module(f"{KIT}.attention_methods.dense_attention")
    except ImportError as error:
        pytest.skip(f"SGLang's test kit: {error}")
    importlib.import_module("triton_fa.integrations.sglang").register()
    module._SWA_DECODE_EXTEND_WINDOW |= {"triton_fa"}
    return module


def runner(dense: ModuleType, name: str) -> Any:
    return importlib.import_module(f"{KIT}.runner_modes.{name}")


def cases(dense: ModuleType) -> list[Any]:
    return [
        *dense.make_dense_cases("triton_fa"),
        *dense.make_swa_no_prefix_input_config_cases("triton_fa"),
        *dense.make_swa_prefix_input_config_cases("triton_fa"),
    ]


def test_prefill_and_decode(dense: ModuleType) -> None:
    names = []
    for case in cases(dense):
        dense.run_dense_attention_case(unittest.TestCase(), case, device=DEVICE)
        names.append(case.name)
    assert set(SLIDING_WINDOW) < set(names)
    assert len(names) >= 14


def test_graphs_of_decode(dense: ModuleType) -> None:
    run = runner(dense, "cuda_graph_decode_runner").run_dense_cuda_graph_decode_case
    decode = [case for case in cases(dense) if case.forward_mode.is_decode()]
    assert len(decode) >= 3
    for case in decode:
        run(unittest.TestCase(), case, device=DEVICE)


@pytest.mark.parametrize("graph", [False, True])
def test_verification(dense: ModuleType, graph: bool) -> None:
    module = runner(dense, "speculative_target_verify_runner")
    kind = "run_dense_spec_verify_cuda_graph_case" if graph else "run_dense_spec_verify_case"
    modes = importlib.import_module("sglang.srt.model_executor.forward_batch_info").ForwardMode
    case = dense.DenseAttentionCase(
        name="verify_ragged_prefix",
        backend="triton_fa",
        forward_mode=modes.TARGET_VERIFY,
        num_heads=4,
        num_kv_heads=2,
        page_size=16,
        prefix_lens=(7, 15, 16),
        extend_lens=(3, 3, 3),
    )
    getattr(module, kind)(unittest.TestCase(), case, topk=1, device=DEVICE)

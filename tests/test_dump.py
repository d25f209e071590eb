"""A failing call becomes a file, and the file that call again."""

import importlib
import json
import logging
import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from click.testing import CliRunner, Result

import triton_fa
from triton_fa import dispatch, dump
from triton_fa.cli import main
from triton_fa.errors import ArgumentError, ArgumentValueError
from triton_fa.kernels.launch import Launch

Arguments = dict[str, Any]


@pytest.fixture
def where(fresh: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The directory of dumps, not there yet."""
    fresh.setenv("TRITON_FA_DUMP_DIR", str(tmp_path / "dumps"))
    fresh.setattr(dump, "_numbers", iter(range(100)))
    return tmp_path / "dumps"


def ints(*values: int, device: str) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def paged(device: str, **changes: Any) -> Arguments:
    """Two sequences in pages; the keys are a view of a larger memory."""
    rng = torch.Generator().manual_seed(0)
    cache = torch.randn(9, 4, 2, 3, 16, generator=rng).to(device, torch.float16)
    given: Arguments = {
        "q": torch.randn(2, 1, 4, 16, generator=rng).to(device, torch.float16),
        "k_cache": cache[:, :, :, 0],
        "v_cache": cache[:, :, :, 1],
        "page_table": ints(3, 1, 8, 5, device=device).view(2, 2),
        "cache_seqlens": ints(3, 8, device=device),
        "ver": "triton",
    }
    return given | changes


def fail_launches(patch: pytest.MonkeyPatch, error: Exception) -> None:
    """Every launch raises, whichever way it goes."""

    def call(*_: object) -> None:
        raise error

    patch.setattr(Launch, "__call__", call)
    patch.setattr(Launch, "_submittable", lambda *_: None)


def failing(patch: pytest.MonkeyPatch, given: Arguments, error: Exception) -> list[Path]:
    """The files that a call leaves which raises `error`; the caller sees that very error."""
    where = Path(os.environ["TRITON_FA_DUMP_DIR"])
    with patch.context() as inner:
        fail_launches(inner, error)
        with pytest.raises(type(error)) as raised:
            triton_fa.flash_attn_with_kvcache(**given)
        assert raised.value is error
    return sorted(where.glob("*")) if where.exists() else []


def replay(path: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["replay", str(path), *options])


def test_a_failing_launch_is_written(
    fresh: pytest.MonkeyPatch, where: Path, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    given = paged(device, causal=True, softcap=30.0, window_size=(5, 0), return_softmax_lse=True)
    given["sinks"] = torch.arange(4.0, device=device)
    (path,) = failing(fresh, given, RuntimeError("out of luck"))
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert str(path) in caplog.text
    found = dump.load(path)
    assert found.error == "RuntimeError: out of luck"
    assert "in enqueue" in found.header["error"]["traceback"]
    assert found.header["versions"]["triton_fa"] == triton_fa.__version__
    assert found.made_up == ["q", "k", "v"]
    assert torch.equal(found.values["sinks"], given["sinks"].cpu())
    assert torch.equal(found.values["page_table"], given["page_table"].cpu())
    assert torch.equal(found.values["seqused_k"], given["cache_seqlens"].cpu())
    problem = dump.problem(found, torch.device(device))
    assert (problem.spec.softcap, problem.spec.window_left) == (30.0, 5)
    assert (problem.spec.dtype, problem.return_lse) == (torch.float16, True)
    for name, was in (("q", "q"), ("k", "k_cache"), ("v", "v_cache"), ("page_table", "page_table")):
        made, old = getattr(problem.tensors, name), given[was]
        assert (made.shape, made.stride(), made.dtype) == (old.shape, old.stride(), old.dtype)
        assert made.data_ptr() % 16 == old.data_ptr() % 16
    assert path.stat().st_size < 20_000  # none of the memory that the views lie in


def test_a_failure_while_preparing_is_written(
    fresh: pytest.MonkeyPatch, where: Path, device: str
) -> None:
    with fresh.context() as patch:
        patch.setattr("triton_fa.kernels.plans.plan", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            triton_fa.flash_attn_with_kvcache(**paged(device))
    (path,) = where.iterdir()
    assert dump.load(path).error.startswith("ZeroDivisionError")


def test_a_later_call_of_the_same_record_is_written(
    fresh: pytest.MonkeyPatch, where: Path, device: str
) -> None:
    if device != "cpu":
        pytest.skip("the launcher is fixed with the record")
    triton_fa.flash_attn_with_kvcache(**paged(device))
    assert not where.exists()
    longer = ints(1, 7, device=device)
    (path,) = failing(fresh, paged(device, cache_seqlens=longer), RuntimeError("later"))
    assert torch.equal(dump.load(path).values["seqused_k"], longer.cpu())


def test_nothing_is_written_unless_asked_for(
    fresh: pytest.MonkeyPatch, where: Path, tmp_path: Path, device: str
) -> None:
    fresh.setenv("TRITON_FA_DUMP_DIR", "")
    fresh.chdir(tmp_path)
    fail_launches(fresh, RuntimeError("unseen"))
    with pytest.raises(RuntimeError, match="unseen"):
        triton_fa.flash_attn_with_kvcache(**paged(device))
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_of_the_caller_is_not_written(
    fresh: pytest.MonkeyPatch, where: Path, device: str
) -> None:
    bad = [
        {"softcap": -1.0},
        {"page_table": None, "cache_seqlens": ints(3, device=device)},
        {"scheduler_metadata": ints(1, 2, device=device)},
        {"qv": torch.zeros(1, device=device)},
    ]
    for change in bad:
        with pytest.raises(triton_fa.TritonFAError):
            triton_fa.flash_attn_with_kvcache(**paged(device, **change))
    assert failing(fresh, paged(device), ArgumentError("found late")) == []
    assert not where.exists()


def test_other_backends_are_not_written(
    fresh: pytest.MonkeyPatch, where: Path, device: str
) -> None:
    fresh.setattr(importlib.import_module("triton_fa.backends.torch"), "_run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        triton_fa.flash_attn_with_kvcache(**paged(device, ver="torch"))
    assert not where.exists()


def test_values_of_all_tensors_on_request(
    fresh: pytest.MonkeyPatch, where: Path, device: str
) -> None:
    fresh.setenv("TRITON_FA_DUMP_VALUES", "1")
    given = paged(device, sinks=torch.zeros(1, device=device).expand(4).contiguous())
    (path,) = failing(fresh, given, RuntimeError("x"))
    found = dump.load(path)
    assert found.made_up == []
    problem = dump.problem(found, torch.device(device))
    assert torch.equal(problem.tensors.q, given["q"])
    assert torch.equal(problem.tensors.k, given["k_cache"])
    assert problem.tensors.k.stride() == given["k_cache"].stride()
    assert torch.equal(triton_fa.flash_attn_with_kvcache(**given), dispatch_triton(problem))
    assert path.stat().st_size < 40_000


def dispatch_triton(problem: Any) -> torch.Tensor:
    run, _ = dispatch.prepare("triton", problem)
    return run(problem.tensors).out


def test_large_tensors_are_left_out(fresh: pytest.MonkeyPatch, where: Path, device: str) -> None:
    fresh.setattr(dump, "SMALL", 3)
    (path,) = failing(fresh, paged(device), RuntimeError("x"))
    found = dump.load(path)
    assert found.made_up == ["q", "k", "v", "page_table"]
    for seed in range(5):
        table = dump.problem(found, torch.device(device), seed).tensors.page_table
        assert table is not None
        assert 0 <= int(table.min()) <= int(table.max()) < 9
    assert replay(path, "--device", device).exit_code == 0


def test_odd_forms_come_back(fresh: pytest.MonkeyPatch, where: Path, device: str) -> None:
    """Expanded, misaligned, appended to, packed: each tensor as it was."""
    flat = torch.zeros(2 * 4 * 16 + 3, dtype=torch.float16, device=device)
    given = paged(
        device,
        q=flat[3:].view(2, 4, 16),
        cu_seqlens_q=ints(0, 1, 2, device=device),
        max_seqlen_q=1,
        page_table=ints(3, 1, device=device).expand(2, 2),
        cache_seqlens=ints(5, device=device).expand(2).contiguous(),
        k=torch.zeros(2, 1, 2, 16, dtype=torch.float16, device=device),
        v=torch.zeros(1, 1, 2, 16, dtype=torch.float16, device=device).expand(2, 1, 2, 16),
        rotary_cos=torch.ones(9, 8, dtype=torch.float16, device=device),
        rotary_sin=torch.zeros(9, 8, dtype=torch.float16, device=device),
        rotary_interleaved=False,
    )
    (path,) = failing(fresh, given, RuntimeError("x"))
    problem = dump.problem(dump.load(path), torch.device(device))
    tensors, append = problem.tensors, problem.tensors.append
    assert append is not None
    assert append.v.stride() == given["v"].stride()
    assert append.rotary_seqlens is None
    assert tensors.q.data_ptr() % 16 == given["q"].data_ptr() % 16 == 6
    assert tensors.page_table is not None
    assert tensors.page_table.stride() == (0, 1)
    assert tensors.page_table.tolist() == [[3, 1], [3, 1]]
    assert problem.spec.rotary_dim == 16
    assert not problem.spec.rotary_interleaved
    done = replay(path, "--device", device)
    assert done.exit_code == 0, done.output


def test_no_file_is_ever_overwritten(fresh: pytest.MonkeyPatch, where: Path, device: str) -> None:
    fresh.setattr("time.strftime", lambda _: "now")
    (first,) = failing(fresh, paged(device), RuntimeError("first"))
    contents = first.read_bytes()
    fresh.setattr(dump, "_numbers", iter(range(100)))
    assert failing(fresh, paged(device), RuntimeError("second")) == [first]
    assert first.read_bytes() == contents
    assert len(failing(fresh, paged(device), RuntimeError("third"))) == 2


def test_a_process_writes_a_bounded_number(
    fresh: pytest.MonkeyPatch, where: Path, device: str
) -> None:
    for _ in range(dump.MOST_FILES + 3):
        files = failing(fresh, paged(device), RuntimeError("again"))
    assert len(files) == dump.MOST_FILES


@pytest.mark.parametrize("fault", ["a file in its place", "torch.save", "json.dumps"])
def test_what_goes_wrong_here_does_not_hide_the_error(
    fresh: pytest.MonkeyPatch,
    where: Path,
    device: str,
    caplog: pytest.LogCaptureFixture,
    fault: str,
) -> None:
    if fault == "a file in its place":
        where.write_text("mine")
    else:
        fresh.setattr(fault, lambda *_: 1 / 0)
    with fresh.context() as patch:
        fail_launches(patch, RuntimeError("the one to see"))
        with pytest.raises(RuntimeError, match="the one to see"):
            triton_fa.flash_attn_with_kvcache(**paged(device))
    assert "cannot be written" in caplog.text


def test_values_that_cannot_be_read_are_left_out(
    fresh: pytest.MonkeyPatch, where: Path, device: str
) -> None:
    """As after an illegal access, when the GPU answers nothing any more."""
    fresh.setattr("torch.Tensor.copy_", lambda *_: 1 / 0)
    (path,) = failing(fresh, paged(device), RuntimeError("x"))
    fresh.undo()
    found = dump.load(path)
    assert found.values == {}
    assert "division by zero" in found.header["missing"]
    problem = dump.problem(found, torch.device(device))
    lengths = problem.tensors.seqused_k
    assert lengths is not None
    assert 0 <= int(lengths.min()) <= int(lengths.max()) <= problem.bounds.max_seqlen_k


def test_packed_lengths_are_invented_in_order() -> None:
    bounds = triton_fa.spec.Bounds(3, 10, 4, 8, None)
    made = dump._invented("cu_seqlens_q", [4], bounds, [20, 2, 16])
    assert made.tolist() == [0, 3, 6, 10]
    assert dump._invented("cu_seqlens_k", [4], bounds, [20, 2, 16]).tolist() == [0, 6, 13, 20]
    assert dump._invented("cu_seqlens_q", [1], bounds, [20, 2, 16]).tolist() == [0]


@triton.jit
def half_scores(score, batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):
    return score * tl.load(aux[0])


@triton.jit
def early_keys(batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):
    return kv_idx < 16 + 0 * q_idx


def with_functions(device: str, **changes: Any) -> Arguments:
    """32 queries in blocks of 16, of which the first block of keys is seen whole."""
    counts = torch.zeros(1, 1, 2, dtype=torch.int32, device=device)
    lists = torch.zeros(1, 1, 2, 2, dtype=torch.int32, device=device)
    given = {
        **{name: torch.randn(32, 2, 16, device=device).half() for name in ("q", "k", "v")},
        "cu_seqlens_q": ints(0, 32, device=device),
        "cu_seqlens_k": ints(0, 32, device=device),
        "max_seqlen_q": 32,
        "max_seqlen_k": 32,
        "score_mod": half_scores,
        "mask_mod": early_keys,
        "aux_tensors": [torch.full((1,), 0.5, device=device)],
        "block_sparse_tensors": triton_fa.BlockSparseTensors(
            counts, lists, torch.ones_like(counts), lists, block_size=(16, 16)
        ),
        "ver": "triton",
    }
    return given | changes


def failing_with_functions(patch: pytest.MonkeyPatch, where: Path, given: Arguments) -> Path:
    with patch.context() as inner:
        fail_launches(inner, RuntimeError("x"))
        with pytest.raises(RuntimeError, match="x"):
            triton_fa.flash_attn_varlen_func(**given)
    (path,) = where.iterdir()
    return path


def test_a_call_with_functions_is_replayed_by_their_names(
    fresh: pytest.MonkeyPatch, where: Path, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.setenv("TRITON_FA_DUMP_VALUES", "1")
    given = with_functions(device)
    path = failing_with_functions(fresh, where, given)
    assert "replay --functions runs it" in caplog.text
    found = dump.load(path)
    assert found.made_up == []
    problem = dump.problem(found, torch.device(device), functions=True)
    assert problem.spec.score_mod is half_scores
    assert problem.spec.mask_mod is early_keys
    lists = problem.tensors.blocks
    assert lists is not None
    for mine, theirs in zip(lists, given["block_sparse_tensors"], strict=True):
        same = torch.equal if isinstance(theirs, torch.Tensor) else operator.eq
        assert same(mine, theirs)
    assert problem.tensors.aux is not None
    assert [x.tolist() for x in problem.tensors.aux] == [[0.5]]
    run, _ = dispatch.prepare("triton", problem)
    want = triton_fa.flash_attn_varlen_func(**given)
    assert torch.equal(run(problem.tensors).out, want)
    assert replay(path, "--device", device, "--functions").exit_code == 0


def test_functions_are_not_imported_unasked(
    fresh: pytest.MonkeyPatch, where: Path, device: str
) -> None:
    path = failing_with_functions(fresh, where, with_functions(device))
    fresh.setattr(importlib, "import_module", lambda name: pytest.fail(f"imported {name}"))
    with pytest.raises(ArgumentValueError, match="half_scores is imported with --functions only"):
        dump.problem(dump.load(path), torch.device(device))


def test_a_function_that_cannot_be_imported_is_said_at_once(
    fresh: pytest.MonkeyPatch, where: Path, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    @triton.jit
    def local(score, batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):
        return score * 0.5

    path = failing_with_functions(fresh, where, with_functions(device, score_mod=local))
    assert "cannot be replayed, for score_mod is" in caplog.text
    assert "local" in caplog.text
    done = replay(path, "--device", device, "--functions")
    assert done.exit_code == 1
    assert "score_mod: a file cannot hold" in done.output


@pytest.mark.parametrize("reference", ["no_such_module:f", "triton_fa:no_such_function", ":", "os"])
def test_a_function_that_is_not_there(
    fresh: pytest.MonkeyPatch, where: Path, device: str, reference: str
) -> None:
    path = failing_with_functions(fresh, where, with_functions(device))
    found = dump.load(path)
    found.header["spec"]["mask_mod"] = {"function": reference}
    with pytest.raises(ArgumentValueError, match="mask_mod: "):
        dump.problem(found, torch.device(device), functions=True)


# ---------------------------------------------------------------- replay


def test_replay_of_a_call_that_works_now(
    fresh: pytest.MonkeyPatch, where: Path, device: str
) -> None:
    (path,) = failing(fresh, paged(device), RuntimeError("out of luck"))
    done = replay(path, "--device", device)
    assert done.exit_code == 0, done.output
    assert "then: RuntimeError: out of luck" in done.output
    assert "q: float16 [2, 1, 4, 16] by [64, 64, 16, 1] (values made up)" in done.output
    assert f"now:  ran on {device}" in done.output
    assert "0 elements not finite" in done.output


def test_replay_of_a_call_that_still_fails(
    fresh: pytest.MonkeyPatch, where: Path, device: str
) -> None:
    (path,) = failing(fresh, paged(device), RuntimeError("out of luck"))
    fail_launches(fresh, RuntimeError("no better"))
    done = replay(path, "--device", device)
    assert done.exit_code == 1
    assert "RuntimeError: no better" in done.output
    assert "Traceback" in done.output


@pytest.mark.parametrize(
    "contents", [b"", b"garbage", b"PK\x03\x04 broken archive"], ids=["empty", "text", "zip"]
)
def test_replay_of_something_else(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "file.pt"
    path.write_bytes(contents)
    done = replay(path)
    assert done.exit_code == 1
    assert "expected a dumped call" in done.output
    assert "Traceback" not in done.output


def test_replay_of_a_file_that_was_cut_short(
    fresh: pytest.MonkeyPatch, where: Path, device: str
) -> None:
    (path,) = failing(fresh, paged(device), RuntimeError("x"))
    path.write_bytes(path.read_bytes()[:-200])
    done = replay(path)
    assert done.exit_code == 1
    assert "expected a dumped call" in done.output


def test_a_file_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"header": Evil(), "values": {}}, tmp_path / "evil.pt")
    with pytest.raises(ArgumentValueError):
        dump.load(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda header: header.update(format=99), "expected format 2, got 99"),
        (lambda header: header["spec"].pop("softcap"), "softcap"),
        (lambda header: header["spec"].update(new_field=1), "new_field"),
        (lambda header: header["bounds"].pop("batch"), "batch"),
        (lambda header: header["spec"].update(softcap={"object": "<f>"}), "cannot hold <f>"),
        (lambda header: header["tensors"]["q"].update(dtype="float9"), "float9"),
        (lambda header: header["tensors"].update(sinks={"object": "<f>"}), "cannot hold <f>"),
    ],
)
def test_a_file_of_another_version_is_refused(
    fresh: pytest.MonkeyPatch,
    where: Path,
    device: str,
    change: Callable[[dict[str, Any]], object],
    said: str,
) -> None:
    (path,) = failing(fresh, paged(device), RuntimeError("x"))
    found = torch.load(path, weights_only=True)
    header = json.loads(found["header"])
    change(header)
    torch.save(found | {"header": json.dumps(header)}, path)
    done = replay(path)
    assert done.exit_code == 1
    assert said in done.output
    assert "Traceback" not in done.output

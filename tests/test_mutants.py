"""The hand-made mutants: they still apply, and their run tells killed from survived."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

from parity_tests.shard import part
from tests.mutants import __main__ as command_line
from tests.mutants.__main__ import KERNELS, KILLED, ROOT, SURVIVED, Outcome, mutated, pytest_in
from tests.mutants.kernels import MUTANTS
from tests.mutants.record import Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_applies(mutant: Mutant) -> None:
    source = (ROOT / KERNELS / mutant.file).read_text()
    changed = mutated(mutant, source)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(), test


def test_every_kernel_file_has_mutants() -> None:
    files = Counter(mutant.file for mutant in MUTANTS)
    for path in (ROOT / KERNELS).glob("*.py"):
        if re.search(r"^@(?:triton|gluon)\.jit", path.read_text(), re.M):
            assert files[path.name] >= 5, path.name
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_a_mutant_of_other_code_is_refused() -> None:
    for source in ("", 2 * MUTANTS[0].text):
        with pytest.raises(ValueError, match="its text occurs"):
            mutated(MUTANTS[0], source)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("pass", ""),
        ("assert False", "test_it.py::test_it"),
        ("import os; os.abort()", "crash: SIGABRT"),
        ("import time; time.sleep(99)", "no end after 2 s"),
    ],
    ids=["passes", "fails", "crashes", "hangs"],
)
def test_what_kills_a_mutant(body: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(f"def test_it():\n    {body}\n")
    run = pytest_in(tmp_path, ["test_it.py"], timeout=2 if "sleep" in body else 99)
    assert run.passed is (said == "")
    assert run.detail == said


@pytest.mark.parametrize("body", ["import pytest\npytest.skip(allow_module_level=True)", ""])
def test_a_test_that_did_not_run_kills_nothing(body: str, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(body)
    with pytest.raises(RuntimeError, match="ran no test"):
        pytest_in(tmp_path, ["test_it.py"])


def test_shares_are_joined(tmp_path: Path) -> None:
    shares = [part(MUTANTS, (i, 3)) for i in (1, 2, 3)]
    assert sorted(m.name for share in shares for m in share) == sorted(m.name for m in MUTANTS)
    for i, share in enumerate(shares):
        command_line.write([Outcome(m, KILLED, "a test") for m in share], tmp_path / str(i))
    reports = [str(tmp_path / str(i) / "mutants.json") for i in range(3)]
    joint = ["--output", str(tmp_path / "joint"), "--join"]
    assert command_line.main([*joint, *reports]) == 0
    page = (tmp_path / "joint" / "mutants.md").read_text()
    assert f"{len(MUTANTS)} mutants: {len(MUTANTS)} killed" in page
    assert all(f"`{m.name}`" in page for m in MUTANTS)
    assert command_line.main([*joint, *reports[:2]]) == 1, "a share is missing"
    command_line.write([Outcome(m, SURVIVED) for m in shares[0]], tmp_path / "0")
    assert command_line.main([*joint, *reports]) == 1


def test_the_page_lists_every_mutant() -> None:
    page = (ROOT / "docs" / "mutants.md").read_text()
    missing = [m.name for m in MUTANTS if f"`{m.name}`" not in page]
    assert not missing, "run python -m tests.mutants, and copy its table"

"""Tuned tiles on disk: whatever is wrong there is a miss, and says so once."""

import errno
import json
import logging
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from triton_fa import store
from triton_fa.errors import ArgumentValueError

KEY = {"kernel": "decode", "rows": 8}
VALUE = {"tile": {"block_n": 64}}


@pytest.fixture
def where(fresh: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The store's directory, not there yet."""
    fresh.setenv("TRITON_FA_CACHE_DIR", str(tmp_path / "cache"))
    store._warned.clear()
    yield store.directory()
    store._warned.clear()


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings of the package's logger so far."""
    caplog.set_level(logging.DEBUG, logger="triton_fa")
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def state(directory: Path) -> dict[str, Any]:
    """Everything about a directory that a program could have touched."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in (directory, *sorted(directory.rglob("*")))
    }


def test_what_was_written_is_read(where: Path) -> None:
    path = store.write(KEY, VALUE)
    assert path is not None
    assert path.parent == where
    assert store.read(KEY) == VALUE
    assert store.read(dict(reversed(KEY.items()))) == VALUE
    assert store.write(KEY, {"tile": "another"}) == path
    assert store.read(KEY) == {"tile": "another"}
    assert os.listdir(where) == [path.name]


def test_nothing_there_is_a_silent_miss(where: Path, warnings: Callable[[], list[str]]) -> None:
    assert store.read(KEY) is None
    store.write(KEY, VALUE)
    assert store.read(KEY | {"rows": 16}) is None
    assert store.read({"kernel": "decode"}) is None
    assert warnings() == []


def test_an_entry_is_readable_by_whoever_may_read_the_directory(where: Path) -> None:
    path = store.write(KEY, VALUE)
    assert path is not None
    plain = where / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


WHOLE = json.dumps({"format": store.FORMAT, "key": KEY, "value": VALUE})
GARBAGE = {
    "empty": b"",
    "truncated": WHOLE[: len(WHOLE) // 2].encode(),
    "without its end": WHOLE[:-1].encode(),
    "binary": bytes(range(256)),
    "zeros": bytes(4096),
    "not text": b'{"format": "\xff"}',
    "another document": b"[1, 2]",
    "a number": b"1" * 5000,
    "nested": b"[" * 60000,
    "endless": WHOLE.encode() + b" " * store.LARGEST,
    "another format": json.dumps({"format": 2, "key": KEY, "value": VALUE}).encode(),
    "a format of another type": json.dumps({"format": "1", "key": KEY, "value": VALUE}).encode(),
    "without key": json.dumps({"format": store.FORMAT, "value": VALUE}).encode(),
    "another key": json.dumps({"format": 1, "key": {"rows": 8}, "value": VALUE}).encode(),
    "a value of another type": json.dumps({"format": 1, "key": KEY, "value": 3}).encode(),
}


@pytest.mark.parametrize("contents", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_a_miss_with_one_warning(
    where: Path, warnings: Callable[[], list[str]], contents: bytes
) -> None:
    path = store.write(KEY, VALUE)
    other = store.write(KEY | {"rows": 1}, VALUE)
    assert path is not None
    assert other is not None
    path.write_bytes(contents)
    other.write_bytes(b"?")
    for _ in range(3):
        assert store.read(KEY) is None
        assert store.read(KEY | {"rows": 1}) is None
    assert len(warnings()) == 1
    assert path.read_bytes() == contents  # not ours to repair
    faults = [bool(entry.fault) for entry in store.entries()]
    # A key can only be compared with one that is looked for.
    assert sorted(faults) == sorted([True, b'{"rows": 8}' not in contents])
    assert store.write(KEY, VALUE) == path
    assert store.read(KEY) == VALUE


def test_a_renamed_entry_is_not_taken_for_another(
    where: Path, warnings: Callable[[], list[str]]
) -> None:
    mine, other = store.write(KEY, VALUE), store.write(KEY | {"rows": 1}, {"tile": "other"})
    assert mine is not None
    assert other is not None
    os.replace(other, mine)
    assert store.read(KEY) is None
    assert len(warnings()) == 1


def test_a_directory_instead_of_an_entry(where: Path, warnings: Callable[[], list[str]]) -> None:
    path = store.write(KEY, VALUE)
    assert path is not None
    path.unlink()
    path.mkdir()
    assert store.read(KEY) is None
    assert store.write(KEY, VALUE) is None
    assert os.listdir(where) == [path.name]  # no temporary file stays
    assert len(warnings()) == 1


def test_a_file_instead_of_the_directory(
    where: Path, tmp_path: Path, warnings: Callable[[], list[str]]
) -> None:
    (tmp_path / "cache").write_text("mine")
    assert store.read(KEY) is None
    assert store.write(KEY, VALUE) is None
    assert list(store.entries()) == []
    assert store.clear() == 0
    assert (tmp_path / "cache").read_text() == "mine"
    assert len(warnings()) == 1


@pytest.mark.parametrize(
    ("function", "number"),
    [
        ("pathlib.Path.mkdir", errno.EROFS),
        ("pathlib.Path.write_text", errno.ENOSPC),
        ("pathlib.Path.write_text", errno.EACCES),
        ("os.replace", errno.EACCES),
    ],
)
def test_a_directory_that_cannot_be_written(
    fresh: pytest.MonkeyPatch,
    where: Path,
    warnings: Callable[[], list[str]],
    function: str,
    number: int,
) -> None:
    store.write(KEY, VALUE)
    before = state(where)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with fresh.context() as patch:
        patch.setattr(function, refuse)
        assert store.write(KEY, {"tile": "new"}) is None
        assert store.write(KEY | {"rows": 1}, VALUE) is None
    assert {path: held for path, (_, held) in state(where).items()} == {
        path: held for path, (_, held) in before.items()
    }
    assert store.read(KEY) == VALUE
    assert len(warnings()) == 1


def _as_nobody() -> None:
    """Read and write as a user who may not write there; exits 0 if both do as they should."""
    if os.getuid() == 0:
        os.setuid(65534)
    logging.disable()
    assert store.read(KEY) == VALUE
    assert store.write(KEY, {"tile": "new"}) is None
    assert store.write(KEY | {"rows": 1}, VALUE) is None
    assert store.read(KEY) == VALUE


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_directory_of_another_user(fresh: pytest.MonkeyPatch) -> None:
    """What the kernel refuses, for pytest's own directories are closed to other users whole."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        fresh.setenv("TRITON_FA_CACHE_DIR", folder)
        store.settings.cache_clear()
        store.write(KEY, VALUE)
        store.directory().chmod(0o555)
        before = state(store.directory())
        process = multiprocessing.get_context("fork").Process(target=_as_nobody)
        process.start()
        process.join()
        assert process.exitcode == 0
        assert state(store.directory()) == before
        store.directory().chmod(0o755)


def test_an_entry_that_may_not_be_read(
    fresh: pytest.MonkeyPatch, where: Path, warnings: Callable[[], list[str]]
) -> None:
    store.write(KEY, VALUE)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with fresh.context() as patch:
        patch.setattr("pathlib.Path.open", refuse)
        assert store.read(KEY) is None
        assert [bool(entry.fault) for entry in store.entries()] == [True]
    assert len(warnings()) == 1


def test_without_a_home_directory_there_is_no_store(
    fresh: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    store._warned.clear()
    fresh.setattr(store, "cache_dir", homeless)
    assert store.read(KEY) is None
    assert store.write(KEY, VALUE) is None
    assert len(warnings()) == 1
    store._warned.clear()


def _killed_while_writing(half: bool) -> None:
    """By SIGKILL, with half of the text on disk, or all of it and not yet in its place."""

    def kill(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write_half(path: Path, text: str) -> None:
        with path.open("w") as file:
            file.write(text[: len(text) // 2])
        kill()

    if half:
        Path.write_text = write_half  # type: ignore[assignment,method-assign]
    os.replace = kill  # type: ignore[assignment]
    store.write(KEY, {"tile": "half"})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("half", [True, False])
def test_a_writer_that_is_killed(
    where: Path, warnings: Callable[[], list[str]], half: bool
) -> None:
    store.write(KEY, VALUE)
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=_killed_while_writing, args=(half,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = [name for name in os.listdir(where) if name.endswith(".tmp")]
    assert len(left) == 1
    assert store.read(KEY) == VALUE
    assert [entry.value for entry in store.entries()] == [VALUE]
    store.write(KEY, {"tile": "new"})
    assert store.read(KEY) == {"tile": "new"}
    assert warnings() == []
    assert store.clear() == 2
    assert os.listdir(where) == []


def _write_often(letter: str) -> None:
    # Long enough that a reader could see a part of it.
    for i in range(150):
        assert store.write(KEY, {"tile": letter * 20000, "round": i}) is not None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_writers_at_once(where: Path, warnings: Callable[[], list[str]]) -> None:
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_write_often, args=(letter,)) for letter in "ab"]
    for process in processes:
        process.start()
    seen = []
    while any(process.is_alive() for process in processes):
        found = store.read(KEY)
        seen.append(None if found is None else found["tile"])
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert set(seen) <= {None, "a" * 20000, "b" * 20000}
    last = store.read(KEY)
    assert last is not None
    assert last["round"] == 149
    assert len(os.listdir(where)) == 1
    assert warnings() == []


def test_clearing_leaves_what_is_not_ours(where: Path) -> None:
    store.write(KEY, VALUE)
    for name in ("notes.json", "kernels.lock", "0123.tmp"):
        (where / name).touch()
    assert len(list(store.entries())) == 1
    assert store.clear() == 1
    assert sorted(os.listdir(where)) == ["0123.tmp", "kernels.lock", "notes.json"]


def test_switched_off_the_store_is_not_touched(fresh: pytest.MonkeyPatch, where: Path) -> None:
    path = store.write(KEY, VALUE)
    bad = store.write(KEY | {"rows": 1}, VALUE)
    assert path is not None
    assert bad is not None
    bad.write_text("garbage")
    old = time.time() - 1000
    for file in (path, bad, where):
        os.utime(file, (old, old))
    before = state(where)
    fresh.setenv("TRITON_FA_AUTOTUNE_CACHE", "0")
    store.settings.cache_clear()
    assert store.read(KEY) is None
    assert store.read(KEY | {"rows": 1}) is None
    with pytest.raises(AssertionError):
        store.write(KEY, VALUE)
    assert state(where) == before


def test_switched_off_no_directory_is_made(fresh: pytest.MonkeyPatch, where: Path) -> None:
    fresh.setenv("TRITON_FA_AUTOTUNE_CACHE", "0")
    store.settings.cache_clear()
    assert store.read(KEY) is None
    assert not where.parent.exists()


def test_a_bad_switch_is_refused(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("TRITON_FA_AUTOTUNE_CACHE", "yes")
    with pytest.raises(ArgumentValueError, match="TRITON_FA_AUTOTUNE_CACHE"):
        store.read(KEY)


def test_runs_never_overwrite(tmp_path: Path) -> None:
    paths = [store.write_run(tmp_path / "runs", "decode", {"i": i}) for i in range(5)]
    assert len(set(paths)) == 5
    assert [json.loads(path.read_text())["i"] for path in paths] == list(range(5))
    assert all(path.name.startswith("decode.20") for path in paths)


def test_the_directory_is_the_same_without_platformdirs(
    fresh: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    platformdirs = pytest.importorskip("platformdirs.unix", reason="the `cli` extra")
    from triton_fa import env

    for home in (None, str(tmp_path), " "):
        if home is None:
            fresh.delenv("XDG_CACHE_HOME", raising=False)
        else:
            fresh.setenv("XDG_CACHE_HOME", home)
        with_it = platformdirs.Unix("triton_fa", appauthor=False).user_cache_dir
        with fresh.context() as patch:
            patch.setattr(env.importlib, "import_module", _no_module)
            assert str(env.cache_dir()) == with_it


def _no_module(name: str) -> None:
    raise ModuleNotFoundError(name)

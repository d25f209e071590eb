"""Small JSON entries on disk, one file for each key. Whatever is wrong with one is a miss.

A file is named by a digest of its key, and repeats the key: what was cut short, or is another's, is
not taken for an answer. Writers replace whole files, so that no lock is needed: the last one wins.
Reading and writing never raise for the state of the disk; a process logs one warning about it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton_fa.env import cache_dir, settings

FORMAT = 1
LARGEST = 1 << 16  # bytes; an entry has some hundred
_NAME = re.compile(r"[0-9a-f]{24}\.json|\.[0-9a-f]{24}\.[0-9a-f]{32}\.tmp")
_logger = logging.getLogger("triton_fa")
_warned = threading.Event()

Key = Mapping[str, str | int]


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the store: what it holds, or what is wrong with it."""

    path: Path
    key: dict[str, Any]
    value: dict[str, Any]
    fault: str = ""


def directory() -> Path:
    """Where the entries are."""
    return cache_dir() / "tiles"


def read(key: Key) -> dict[str, Any] | None:
    """What was written for `key`, or None."""
    if not settings().autotune_cache:
        return None
    try:
        entry = _parsed(_path(key))
        if entry.key != dict(key):
            raise ValueError("it is the entry of another key")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RuntimeError) as error:
        complain(f"a tuned tile cannot be read, the shipped one is used: {error}")
        return None
    return entry.value


def write(key: Key, value: Mapping[str, Any]) -> Path | None:
    """Keep `value` for `key`, in place of what was there; None where that cannot be done."""
    assert settings().autotune_cache
    text = json.dumps({"format": FORMAT, "key": dict(key), "value": dict(value)}, indent=1)
    temporary = None
    try:
        path = _path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.tmp")
        temporary.write_text(text)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
        complain(f"a tuned tile cannot be written: {error}")
        return None
    return path


def entries() -> Iterator[Entry]:
    """Every entry, and every file that should be one, in the order of their names."""
    for path in _files():
        if path.suffix == ".json":
            try:
                yield _parsed(path)
            except (OSError, ValueError, RuntimeError) as error:
                yield Entry(path, {}, {}, str(error))


def clear() -> int:
    """Remove the entries, and what killed writers left; returns how many files there were.

    Raises:
        OSError: a file cannot be removed.
    """
    files = list(_files())
    for path in files:
        path.unlink(missing_ok=True)
    return len(files)


def write_run(where: Path, name: str, value: Mapping[str, Any]) -> Path:
    """Write `value` to a new file `<name>.<time>.json`, outside of the store."""
    where.mkdir(parents=True, exist_ok=True)
    path = where / f"{name}.{time.strftime('%Y%m%d_%H%M%S')}.json"
    while True:
        try:
            with path.open("x") as file:
                json.dump(value, file, indent=1)
        except FileExistsError:
            path = path.with_name(f"{path.stem}.{uuid.uuid4().hex[:8]}.json")
        else:
            return path


def complain(problem: str) -> None:
    """Log a problem of the disk: the first as a warning, for it is likely to be that of all."""
    _logger.log(logging.DEBUG if _warned.is_set() else logging.WARNING, problem)
    _warned.set()


def _path(key: Key) -> Path:
    text = json.dumps([FORMAT, sorted(key.items())])
    return directory() / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def _files() -> list[Path]:
    """The files of ours: the directory may be anyone's."""
    try:
        found = [path for path in directory().iterdir() if _NAME.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(found)


def _parsed(path: Path) -> Entry:
    """The entry in a file; ValueError where there is none."""
    with path.open("rb") as file:
        text = file.read(LARGEST + 1)
    if len(text) > LARGEST:
        raise ValueError(f"{path}: larger than an entry can be")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    match found:
        case {"format": int(form), "key": dict(key), "value": dict(value)}:
            if form != FORMAT:
                raise ValueError(f"{path}: format {form}, expected {FORMAT}")
            return Entry(path, key, value)
    raise ValueError(f"{path}: not an entry")

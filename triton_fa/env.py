"""Every environment variable: name, default, meaning. Read once, on first use; a bad value raises.

None of them changes what is computed. A tuned tile may change the last bits of calls that are not
batch-invariant, and TRITON_FA_HOPPER those of any.
"""

from __future__ import annotations

import functools
import importlib
import os
from dataclasses import dataclass
from pathlib import Path

from triton_fa.errors import ArgumentValueError

FA3_PROVIDERS = ("sgl", "hub", "upstream")


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable, as the README's table shows it."""

    name: str
    default: str
    meaning: str


VARIABLES: tuple[Variable, ...] = (
    Variable(
        "TRITON_FA_VER",
        "",
        "backend for calls with `ver=None`: `triton`, `torch`, `3` or `4`; empty: `triton` on a "
        "device Triton runs on, `torch` elsewhere",
    ),
    Variable("TRITON_FA_FORCE", "", "`triton`: every call runs there, whatever `ver` says"),
    Variable(
        "TRITON_FA_FALLBACK",
        "1",
        "`0`: a call that `ver=3` or `ver=4` cannot serve raises instead of running on Triton",
    ),
    Variable(
        "TRITON_FA_FA3_PROVIDER",
        "sgl,hub,upstream",
        "where `ver=3` comes from: the first of these that loads (`sgl_kernel`, the `kernels` "
        "hub package, `flash_attn_interface`)",
    ),
    Variable(
        "TRITON_FA_VALIDATE",
        "0",
        "`1`: check lengths, page ids and prefix sums on the host before each call (synchronises)",
    ),
    Variable(
        "TRITON_FA_DIRECT_LAUNCH",
        "1",
        "`0`: launch through Triton's own dispatcher not straight by the CUDA driver",
    ),
    Variable(
        "TRITON_FA_HOPPER",
        "",
        "`1`: prefill and latent decode on Hopper run on the Gluon kernels wherever they can, `0`: "
        "nowhere; empty: on Triton versions those kernels were run on",
    ),
    Variable(
        "TRITON_FA_CACHE_DIR",
        "",
        "directory for tuned tiles and `kernels.lock`; empty: the platform's user cache directory",
    ),
    Variable(
        "TRITON_FA_AUTOTUNE_CACHE",
        "1",
        "`0`: tuned tiles on disk are neither read nor changed; `tune` writes what it finds to a "
        "file under `runs/`",
    ),
    Variable(
        "TRITON_FA_DUMP_DIR",
        "",
        "directory to which a call that fails in the Triton backend is written, as a file for "
        "`replay`; empty: nowhere",
    ),
    Variable(
        "TRITON_FA_DUMP_VALUES",
        "0",
        "`1`: that file holds the values of queries, keys and values, too",
    ),
)


@dataclass(frozen=True, slots=True)
class Settings:
    """The parsed values of `VARIABLES`."""

    ver: int | str | None
    force_triton: bool
    fallback: bool
    fa3_providers: tuple[str, ...]
    validate: bool
    direct_launch: bool
    hopper: bool | None
    cache_dir: str
    autotune_cache: bool
    dump_dir: str
    dump_values: bool


def _flag(name: str, default: str) -> bool:
    value = os.environ.get(name, default)
    if value not in ("0", "1"):
        raise ArgumentValueError(f"{name}: expected 0 or 1, got {value!r}")
    return value == "1"


@functools.cache
def settings() -> Settings:
    """The settings of this process. `settings.cache_clear()` makes the next call read them anew."""
    ver_text = os.environ.get("TRITON_FA_VER", "")
    versions: dict[str, int | str | None] = {"": None, "triton": "triton", "torch": "torch"}
    versions |= {"3": 3, "4": 4}
    if ver_text not in versions:
        raise ArgumentValueError(
            f"TRITON_FA_VER: expected triton, torch, 3, 4 or nothing, got {ver_text!r}"
        )
    force = os.environ.get("TRITON_FA_FORCE", "")
    if force not in ("", "triton"):
        raise ArgumentValueError(f"TRITON_FA_FORCE: expected triton or nothing, got {force!r}")
    provider_text = os.environ.get("TRITON_FA_FA3_PROVIDER", ",".join(FA3_PROVIDERS))
    providers = tuple(p.strip() for p in provider_text.split(",") if p.strip())
    if not providers or not set(providers) <= set(FA3_PROVIDERS):
        raise ArgumentValueError(
            f"TRITON_FA_FA3_PROVIDER: expected a comma-separated choice of {FA3_PROVIDERS}, "
            f"got {provider_text!r}"
        )
    return Settings(
        ver=versions[ver_text],
        force_triton=force == "triton",
        fallback=_flag("TRITON_FA_FALLBACK", "1"),
        fa3_providers=providers,
        validate=_flag("TRITON_FA_VALIDATE", "0"),
        direct_launch=_flag("TRITON_FA_DIRECT_LAUNCH", "1"),
        hopper=_flag("TRITON_FA_HOPPER", "0") if os.environ.get("TRITON_FA_HOPPER") else None,
        cache_dir=os.environ.get("TRITON_FA_CACHE_DIR", ""),
        autotune_cache=_flag("TRITON_FA_AUTOTUNE_CACHE", "1"),
        dump_dir=os.environ.get("TRITON_FA_DUMP_DIR", ""),
        dump_values=_flag("TRITON_FA_DUMP_VALUES", "0"),
    )


def in_effect() -> dict[str, str]:
    """What the environment sets of `VARIABLES`, and of Triton's own for the interpreter."""
    names = [*(variable.name for variable in VARIABLES), "TRITON_INTERPRET"]
    return {name: os.environ[name] for name in names if name in os.environ}


def cache_dir() -> Path:
    """What is kept between processes lies here: `TRITON_FA_CACHE_DIR`, or the user's directory."""
    given = settings().cache_dir
    if given:
        return Path(given)
    try:
        platformdirs = importlib.import_module("platformdirs")
    except ImportError:
        # On Linux, where tiles are tuned, the same directory as with platformdirs.
        given = os.environ.get("XDG_CACHE_HOME", "").strip()
        return (Path(given) if given else Path.home() / ".cache") / "triton_fa"
    return Path(platformdirs.user_cache_dir("triton_fa", appauthor=False))


def triton_cache_dir() -> Path:
    """Where Triton keeps what it compiled, by its own variables."""
    given = os.environ.get("TRITON_CACHE_DIR", "").strip()
    if given:
        return Path(given)
    return Path(os.environ.get("TRITON_HOME", "").strip() or Path.home()) / ".triton" / "cache"


def add_local_kernel(repository: str, folder: Path) -> None:
    """Let the package `kernels` load `folder` for a repository (`LOCAL_KERNELS`, its own)."""
    if ":" in str(folder):
        raise ArgumentValueError(f"LOCAL_KERNELS: expected a folder without a colon, got {folder}")
    before = [entry for entry in os.environ.get("LOCAL_KERNELS", "").split(":") if entry]
    others = [entry for entry in before if entry.partition("=")[0] != repository]
    os.environ["LOCAL_KERNELS"] = ":".join([*others, f"{repository}={folder}"])


def triton_interpreted() -> bool:
    """Whether Triton runs its kernels in the interpreter (`TRITON_INTERPRET`, Triton's own)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

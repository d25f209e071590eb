"""Which tile a launch gets: the one that was measured on this chip, else the shipped one.

A measured tile is taken only if it is a candidate here and now, whatever the store says. It is
looked up once in a process, so that all launches of a call, and all calls, agree on it. Calls that
are batch-invariant get the shipped tile: their bits must not depend on what somebody measured.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import torch

from triton_fa import store
from triton_fa.device import DeviceFacts
from triton_fa.kernels.compat import TRITON_VERSION
from triton_fa.schedule import tiles
from triton_fa.schedule.tiles import DecodeTile, PrefillTile
from triton_fa.spec import AttnSpec

Key = tuple[tuple[str, str | int], ...]
Tile = TypeVar("Tile", DecodeTile, PrefillTile)


@dataclass(frozen=True)
class Choice(Generic[Tile]):
    """What is chosen between, and for which calls."""

    key: Key
    candidates: Callable[[], tuple[Tile, ...]]  # the shipped one first


def decode_tile(spec: AttnSpec, device: DeviceFacts, rows: int) -> DecodeTile:
    """The decode tile for `rows` query rows of one sequence and kv head."""
    if spec.batch_invariant or not chip(spec.device):
        return tiles.decode_tile(spec, device, rows)
    return chosen(decode_choice(spec, device, rows))


def prefill_tile(spec: AttnSpec, device: DeviceFacts, max_rows: int) -> PrefillTile:
    """The prefill tile when one sequence has at most `max_rows` rows per kv head."""
    if spec.batch_invariant or not chip(spec.device):
        return tiles.prefill_tile(spec, device, max_rows)
    return chosen(prefill_choice(spec, device, max_rows))


def decode_choice(spec: AttnSpec, device: DeviceFacts, rows: int) -> Choice[DecodeTile]:
    """The choice that `decode_tile` makes."""
    candidates = functools.partial(tiles.decode_candidates, spec, device, rows)
    return Choice(_key("decode", spec, device, rows), candidates)


def prefill_choice(spec: AttnSpec, device: DeviceFacts, max_rows: int) -> Choice[PrefillTile]:
    """The choice that `prefill_tile` makes."""
    candidates = functools.partial(tiles.prefill_candidates, spec, device, max_rows)
    longer = sum(max_rows > most for most in tiles.LONG_ROWS)
    return Choice(_key("prefill", spec, device, longer), candidates)


def chosen(choice: Choice[Tile]) -> Tile:
    """The tile of a choice; the same one in all of a process."""
    tile: Tile | None = _CHOSEN.get(choice.key)
    if tile is None:
        tile = _CHOSEN.setdefault(choice.key, _measured(choice) or choice.candidates()[0])
    return tile


def _measured(choice: Choice[Tile]) -> Tile | None:
    found = store.read(dict(choice.key))
    if found is None:
        return None
    for tile in choice.candidates():
        # By what they look like, because True == 1 and 64.0 == 64.
        if repr(asdict(tile)) == repr(found.get("tile")):
            return tile
    store.complain(f"a tuned tile cannot be used here, the shipped one is: {found.get('tile')}")
    return None


@contextlib.contextmanager
def trying(choice: Choice[Tile], tile: Tile) -> Iterator[None]:
    """Calls prepared within this context get `tile`. For measuring: not for several threads."""
    before = dict(_CHOSEN)
    _CHOSEN[choice.key] = tile
    try:
        yield
    finally:
        _CHOSEN.clear()
        _CHOSEN.update(before)


def forget() -> None:
    """Look tiles up anew from here on."""
    _CHOSEN.clear()


_CHOSEN: dict[Key, Any] = {}


@functools.cache
def chip(device: torch.device) -> str:
    """The chip's name; nothing for a CPU, for which there is nothing to measure."""
    if device.type != "cuda":
        return ""
    props = torch.cuda.get_device_properties(device)
    architecture = props.gcnArchName if torch.version.hip else f"sm_{props.major}{props.minor}"
    return f"{props.name} {architecture}"


def _key(kernel: str, spec: AttnSpec, device: DeviceFacts, rows: int) -> Key:
    """Everything that a measurement holds for; `rows` is a count or, for prefill, a class."""
    page = spec.page_size
    return (
        ("kernel", kernel),
        ("format", tiles.FORMAT),
        ("triton", str(TRITON_VERSION)),
        ("chip", chip(spec.device)),
        ("multiprocessors", device.num_sms),
        ("dtype", str(spec.dtype).removeprefix("torch.")),
        ("kv_dtype", str(spec.kv_dtype).removeprefix("torch.")),
        ("head_dim", spec.head_dim),
        ("head_dim_v", spec.head_dim_v),
        ("qv", len(spec.features & {"qv", "only_qv"})),
        ("rows", rows),
        # Blocks of keys up to this size lie in one page; 0: there are no pages.
        ("page", min(page & -page, 256)),
    )

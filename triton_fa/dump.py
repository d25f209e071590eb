"""A call that failed in the Triton backend, as one file: `TRITON_FA_DUMP_DIR`.

The file holds the spec, the bounds and every tensor's form, and the values of all but queries, keys
and values: lengths, page tables, sinks. `TRITON_FA_DUMP_VALUES=1` adds those. A score_mod or a
mask_mod is held as the name it can be imported by. Loading runs no code, but for the import of
those where that is asked for. What goes wrong here never hides the error that the file is about.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from triton_fa.backends.base import Run
from triton_fa.env import settings
from triton_fa.errors import ArgumentValueError, TritonFAError
from triton_fa.problem import Append, AttnResult, BlockSparseTensors, Problem, Tensors
from triton_fa.spec import AttnSpec, Bounds

FORMAT = 2
MOST_FILES = 16
"""A process writes no more: one that fails in every step would fill the disk."""
DATA = {"q", "k", "v", "qv", "out", "append.k", "append.v"}
"""What a user's text can be told from: kept on request only."""
FUNCTIONS = ("score_mod", "mask_mod")
"""Fields of a spec that are functions of the caller's."""
SMALL = 1 << 22  # elements of any other tensor whose values are kept
_logger = logging.getLogger("triton_fa")
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Dump:
    """A dumped call."""

    header: dict[str, Any]
    values: dict[str, torch.Tensor]

    @property
    def error(self) -> str:
        """What the call raised."""
        return f"{self.header['error']['type']}: {self.header['error']['message']}"

    @property
    def made_up(self) -> list[str]:
        """The tensors whose values are not in the file."""
        return [name for name in self.header["tensors"] if name not in self.values]


def versions() -> dict[str, str | None]:
    """What a report has to say about where it was made."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        "triton_fa": importlib.import_module("triton_fa").__version__,
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def guarded(prepare: Callable[[], Run], problem: Problem) -> Run:
    """What `prepare` makes of `problem`; writes a file if it fails, or a run of it does."""
    try:
        run = prepare()
    except Exception as error:
        write(problem, problem.tensors, error)
        raise
    bare = problem.without_tensors()

    def checked(tensors: Tensors) -> AttnResult:
        try:
            return run(tensors)
        except Exception as error:
            write(bare, tensors, error)
            raise

    return checked


def write(problem: Problem, tensors: Tensors, error: Exception) -> Path | None:
    """Write a call that raised `error` to a new file; None where it is not, or cannot be."""
    if isinstance(error, TritonFAError):  # the caller's mistake, and the message says which
        return None
    try:
        number = next(_numbers)
        if number >= MOST_FILES:
            return None
        where = Path(settings().dump_dir)
        where.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y%m%d_%H%M%S")
        path = where / f"triton_fa.{stamp}.{os.getpid()}.{number}.pt"
        with path.open("xb") as file:
            torch.save(_contents(problem, tensors, error), file)
    except Exception as problem_here:  # noqa: BLE001  # must not hide `error`
        _logger.warning("the failed call cannot be written: %s", problem_here)
        return None
    _logger.warning("the failed call is in %s; %s", path, _how_to_run(problem.spec))
    return path


def _how_to_run(spec: AttnSpec) -> str:
    functions = {name: getattr(spec, name) for name in FUNCTIONS}
    given = {name: _reference(f) for name, f in functions.items() if f is not None}
    for name, reference in given.items():
        if not _is_importable(reference):
            return f"it cannot be replayed, for {name} is {reference}, which cannot be imported"
    return f"python -m triton_fa replay {'--functions ' if given else ''}runs it"


def load(path: Path) -> Dump:
    """A file that `write` wrote.

    Raises:
        ArgumentValueError: it is none, or of another version.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        header, values = json.loads(found["header"]), dict(found["values"])
    except Exception as error:  # a broken archive raises anything
        raise ArgumentValueError(f"{path}: expected a dumped call, got {error}") from error
    if header.get("format") != FORMAT:
        raise ArgumentValueError(
            f"{path}: expected format {FORMAT}, got {header.get('format')!r} "
            f"of triton_fa {header.get('versions', {}).get('triton_fa')}"
        )
    return Dump(header, values)


def problem(dump: Dump, device: torch.device, seed: int = 0, *, functions: bool = False) -> Problem:
    """The dumped call on `device`, random where the file holds no values.

    Args:
        dump: What `load` returned.
        device: Where its tensors are made.
        seed: Of values that are made up.
        functions: Import the score_mod and the mask_mod, which runs the modules they are in.

    Raises:
        ArgumentValueError: this version cannot tell what the file says.
    """
    rng = torch.Generator(device).manual_seed(seed)
    bounds = Bounds(**_fields(Bounds, dump.header["bounds"]))
    fields_of_spec = dict(dump.header["spec"])
    called = {n: _function(n, fields_of_spec.pop(n, None), functions) for n in FUNCTIONS}
    plain = _fields(AttnSpec, fields_of_spec | dict.fromkeys(FUNCTIONS))
    spec = AttnSpec(**(plain | called | {"device": device}))
    given: dict[str, Any] = {}
    for name, form in dump.header["tensors"].items():
        _value(name, form)
        value = dump.values.get(name)
        if value is None and not _dtype(form["dtype"]).is_floating_point:
            value = _invented(name, form["shape"], bounds, dump.header["tensors"]["k"]["shape"])
        given[name] = _tensor(form, value, rng)
    groups: dict[str, dict[str, Any]] = {"append": {}, "blocks": {}, "aux": {}}
    for name in [*given]:
        group, is_member, member = name.partition(".")
        if is_member:
            groups[group][member] = given.pop(name)
    block_size = dump.header["block_size"]
    tensors = Tensors(
        **given,
        append=Append(**groups["append"]) if groups["append"] else None,
        blocks=BlockSparseTensors(**groups["blocks"], block_size=tuple(block_size))
        if block_size
        else None,
        aux=tuple(groups["aux"].values()) or None,
    )
    return Problem(spec, bounds, tensors, dump.header["return_lse"])


def _named(tensors: Tensors) -> dict[str, Any]:
    """The tensors by name, members of a group as `group.member`."""
    named = tensors._asdict()
    append, blocks, aux = (named.pop(name) for name in ("append", "blocks", "aux"))
    members = {
        "append": append._asdict() if append else {},
        "blocks": blocks._replace(block_size=None)._asdict() if blocks else {},
        "aux": dict(enumerate(aux or ())),
    }
    named |= {f"{group}.{n}": t for group, found in members.items() for n, t in found.items()}
    return {name: given for name, given in named.items() if given is not None}


def _contents(problem: Problem, tensors: Tensors, error: Exception) -> dict[str, Any]:
    named = _named(tensors)
    values, missing = _values({n: t for n, t in named.items() if isinstance(t, torch.Tensor)})
    header = {
        "format": FORMAT,
        "error": {
            "type": type(error).__name__,
            "message": str(error),
            "traceback": "".join(traceback.format_exception(error)),
        },
        "versions": versions(),
        "device": _device_name(problem.spec.device),
        "spec": {
            f.name: (_called if f.name in FUNCTIONS else _plain)(getattr(problem.spec, f.name))
            for f in fields(AttnSpec)
        },
        "bounds": {f.name: _plain(getattr(problem.bounds, f.name)) for f in fields(Bounds)},
        "return_lse": problem.return_lse,
        "tensors": {name: _form(given) for name, given in named.items()},
        "block_size": None if tensors.blocks is None else tensors.blocks.block_size,
        "missing": missing,
    }
    return {"header": json.dumps(header), "values": values}


def _values(named: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], str]:
    """Values that are kept, and why they are not where they cannot be read."""
    everything = settings().dump_values
    values: dict[str, torch.Tensor] = {}
    try:
        if next(iter(named.values())).is_cuda and torch.cuda.is_current_stream_capturing():
            return {}, "the stream was being captured"
        for name, tensor in named.items():
            if everything or (name not in DATA and tensor.numel() <= SMALL):
                # A copy of the elements alone: a view would be saved with all of its memory.
                values[name] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    except Exception as error:  # noqa: BLE001  # after some errors a GPU answers nothing any more
        return values, str(error)
    return values, ""


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _form(tensor: object) -> Any:
    if not isinstance(tensor, torch.Tensor):
        return _plain(tensor)
    return {
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "past_16_bytes": tensor.data_ptr() % 16,
    }


def _tensor(
    form: Mapping[str, Any], value: torch.Tensor | None, rng: torch.Generator
) -> torch.Tensor:
    """A tensor of this form, strides and alignment included."""
    shape, stride, dtype = form["shape"], form["stride"], _dtype(form["dtype"])
    reach = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if all(shape) else 0
    before = form["past_16_bytes"] // dtype.itemsize
    memory = torch.zeros(before + reach, dtype=dtype, device=rng.device)
    if dtype.is_floating_point and value is None:
        # Not every dtype has random numbers of its own.
        memory.copy_(torch.randn(memory.shape, generator=rng, device=rng.device))
    tensor = memory.as_strided(shape, stride, before)
    if value is not None:
        # Elements that share their memory are written once.
        once = tuple(slice(0, 1) if s == 0 else slice(None) for s in stride)
        tensor[once].copy_(value[once])
    return tensor


def _invented(name: str, shape: list[int], bounds: Bounds, keys: list[int]) -> torch.Tensor:
    """Lengths and pages that are legal."""
    ends = {
        "cu_seqlens_q": bounds.total_q,
        "cu_seqlens_k": keys[0],
        "append.cu_seqlens_k_new": bounds.total_new,
    }
    if name in ends:
        return torch.arange(shape[0]) * ends[name] // max(1, shape[0] - 1)
    most = {
        "page_table": keys[0] - 1,
        "seqused_k": bounds.max_seqlen_k,
        "seqused_q": bounds.max_seqlen_q,
    }
    return torch.randint(max(1, most.get(name, 0) + 1), shape)


def _plain(value: object) -> Any:
    """A field of a spec as JSON, such that `_value` finds it again."""
    if isinstance(value, torch.dtype | torch.device):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    if isinstance(value, frozenset):
        return {"frozenset": sorted(map(str, value))}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return {"object": repr(value)}


def _called(function: Any) -> Any:
    return None if function is None else {"function": _reference(function)}


def _reference(function: Any) -> str:
    """`module:name` of a jit function, or whatever else is told of it."""
    plain = getattr(function, "fn", function)  # a jit function knows the Python function it is of
    return f"{plain.__module__}:{plain.__qualname__}"


def _is_importable(reference: str) -> bool:
    """Whether another process finds a function by this name."""
    return "<" not in reference and not reference.startswith("__main__:")


def _function(name: str, found: Any, wanted: bool) -> Any:
    """The function that a file names."""
    match found:
        case None:
            return None
        case {"function": str(reference)} if not _is_importable(reference):
            raise ArgumentValueError(f"{name}: a file cannot hold {reference}")
        case {"function": str(reference)} if not wanted:
            raise ArgumentValueError(f"{name}: {reference} is imported with --functions only")
        case {"function": str(reference)}:
            module, _, path = reference.partition(":")
            try:
                return functools.reduce(getattr, path.split("."), importlib.import_module(module))
            except (AttributeError, ImportError, ValueError) as error:
                raise ArgumentValueError(f"{name}: {reference}: {error}") from error
    raise ArgumentValueError(f"{name}: expected the name of a function, got {found!r}")


def _fields(kind: type[Any], found: Mapping[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(kind)}
    if names != found.keys():
        raise ArgumentValueError(
            f"{kind.__name__}: this version has other fields: {sorted(names ^ found.keys())}"
        )
    return {name: _value(name, value) for name, value in found.items()}


def _value(name: str, value: Any) -> Any:
    match value:
        case {"dtype": str(text)}:
            return _dtype(text)
        case {"device": str(text)}:
            return torch.device(text)
        case {"frozenset": list(items)}:
            return frozenset(items)
        case {"object": text}:
            raise ArgumentValueError(f"{name}: a file cannot hold {text}")
    return value


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ArgumentValueError(f"dtype: torch has no {name!r}")
    return found

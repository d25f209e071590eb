"""From `ver` to a backend: what is available, the explicit fallback, and `strict()`."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from triton_fa import device as device_facts
from triton_fa.backends.base import Backend, Run
from triton_fa.env import settings
from triton_fa.errors import BackendUnavailableError, UnknownVersionError, UnsupportedError
from triton_fa.problem import Lengths, Problem, Tensors
from triton_fa.spec import AttnSpec, Bounds, metadata_entries

Version = int | str

_ADAPTERS: dict[Version, str] = {"triton": "triton", "torch": "torch", 3: "fa3", 4: "fa4"}
_STRICT: ContextVar[bool] = ContextVar("triton_fa_strict", default=False)
_logger = logging.getLogger("triton_fa")


class FallbackWarning(UserWarning):
    """A call for the FA3 or FA4 binary ran on Triton; the message names every reason."""


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """Whether one backend can be used; `reason` is set if and only if it cannot."""

    ver: Version
    available: bool
    reason: str | None
    detail: str


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """Within this context a call that `ver` cannot serve raises instead of falling back."""
    token = _STRICT.set(True)
    try:
        yield
    finally:
        _STRICT.reset(token)


in_strict: Callable[[], bool] = _STRICT.get
"""Whether this is within `strict()`."""


def is_strict() -> bool:
    """Whether falling back is off, by `strict()` or by the environment."""
    return _STRICT.get() or not settings().fallback


def resolve(ver: Version | None, device: torch.device) -> Version:
    """The version whose contract a call gets, before any fallback.

    Raises:
        UnknownVersionError: `ver` is none of None, "triton", "torch", 3, 4.
    """
    if ver is not None and (type(ver) not in (int, str) or ver not in _ADAPTERS):
        raise UnknownVersionError(
            f"ver: unknown flash attention version, expected None, 'triton', 'torch', 3 or 4, "
            f"got {ver!r}"
        )
    if ver is None:
        ver = settings().ver
    if ver is None:
        ver = "triton" if device_facts.runs_triton(device) else "torch"
    return ver


@functools.cache
def _load(ver: Version) -> Backend | str:
    """The backend, or the text of the error that importing our adapter for it gave."""
    try:
        module: Any = importlib.import_module(f"triton_fa.backends.{_ADAPTERS[ver]}")
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    return cast(Backend, module.BACKEND)


@functools.lru_cache(maxsize=4096)
def refusals(ver: Version, spec: AttnSpec) -> tuple[str | None, tuple[str, ...]]:
    """(why the backend cannot be used at all, or None; what of `spec` it does not support)."""
    backend = _load(ver)
    if isinstance(backend, str):
        return backend, ()
    missing = backend.unavailable(spec.device)
    return missing, () if missing else tuple(backend.unsupported(spec))


def prepare(ver: Version | None, problem: Problem) -> tuple[Run, Version]:
    """The code that runs `problem`, and the version whose results it returns.

    With `TRITON_FA_FORCE=triton` that code is Triton's, whatever the version. Otherwise a call for
    3 or 4 that cannot be served there is prepared on Triton, with one warning for each
    (ver, reasons); under `strict()` it raises.

    Raises:
        UnsupportedError, BackendUnavailableError: nothing may run this call.
    """
    version = resolve(ver, problem.spec.device)
    chosen = "triton" if settings().force_triton else version
    unavailable, reasons = refusals(chosen, problem.spec)
    if unavailable or reasons:
        if chosen in ("triton", "torch") or is_strict():
            _refuse(chosen, unavailable, reasons)
        fallback_unavailable, fallback_reasons = refusals("triton", problem.spec)
        if fallback_unavailable or fallback_reasons:
            why = fallback_unavailable or "; ".join(fallback_reasons)
            _refuse(version, unavailable, (*reasons, f"nor does ver='triton': {why}"))
        _warn_once(version, unavailable or "; ".join(reasons))
        chosen = "triton"
    foreign_metadata = chosen == "triton" and version in (3, 4)
    run = _prepare(cast(Backend, _load(chosen)), problem, foreign_metadata)
    if settings().validate:
        validate = importlib.import_module("triton_fa.validate")
        run = validate.checked(run, problem)
    _logger.debug("ver=%r runs on %r for %s", ver, chosen, problem.spec)
    return run, version


def prepare_schedule(
    ver: Version | None,
    spec: AttnSpec,
    bounds: Bounds,
    lengths: Lengths,
    arguments: Mapping[str, Any],
) -> Callable[[Lengths, torch.Tensor | None], torch.Tensor]:
    """What makes, or refills, the scheduler metadata of such lengths for `ver`.

    Args:
        ver: As of the public functions; falls back as they do.
        spec: What is scheduled.
        bounds: Its host-known sizes.
        lengths: Tensors like those of every later call.
        arguments: All arguments by upstream FA3's names, for `ver=3`.
    """
    version = resolve(ver, spec.device)
    if version == 4:
        _refuse(4, None, ("get_scheduler_metadata: FA4 takes no metadata tensor",))
    chosen = "triton" if settings().force_triton else version
    if chosen == 3:
        adapter: Any = _load(3)
        reason = adapter if isinstance(adapter, str) else adapter.unavailable(spec.device)
        if reason is None:
            return functools.partial(_fa3_schedule, dict(arguments))
        if is_strict():
            _refuse(3, reason, ())
        _warn_once(3, reason)
        chosen = "triton"
    unavailable, reasons = refusals(chosen, spec)
    if unavailable or reasons:
        _refuse(chosen, unavailable, reasons)
    backend: Any = _load(chosen)
    fill = None if chosen == "torch" else backend.prepare_schedule(spec, bounds, lengths)
    entries = metadata_entries(bounds.batch)

    def run(given: Lengths, out: torch.Tensor | None) -> torch.Tensor:
        if out is None:
            out = torch.empty(entries, dtype=torch.int32, device=spec.device)
        if fill is None:
            return out.zero_()  # plain PyTorch reads the lengths themselves
        fill(given, out)
        return out

    return run


def _fa3_schedule(
    arguments: dict[str, Any], lengths: Lengths, out: torch.Tensor | None
) -> torch.Tensor:
    """FA3's own metadata; into the head of `out`, its tail zeroed, where a buffer is given."""
    adapter: Any = importlib.import_module("triton_fa.backends.fa3")
    given = arguments | {
        "cache_seqlens": lengths.seqused_k,
        "cu_seqlens_q": lengths.cu_seqlens_q,
        "cu_seqlens_k": lengths.cu_seqlens_k,
        "seqused_q": lengths.seqused_q,
        "cu_seqlens_k_new": lengths.cu_seqlens_k_new,
        "cache_leftpad": lengths.cache_leftpad,
    }
    made = cast(torch.Tensor, adapter.scheduler_metadata(given))
    if out is None:
        return made
    view = out[: made.shape[0]]
    view.copy_(made)
    out[made.shape[0] :].zero_()
    return view


def _refuse(version: Version, unavailable: str | None, reasons: tuple[str, ...]) -> None:
    if unavailable and not reasons:
        raise BackendUnavailableError(version, unavailable)
    raise UnsupportedError(version, reasons if not unavailable else (unavailable, *reasons))


@functools.cache
def _warn_once(version: Version, reason: str) -> None:
    message = f"ver={version!r} cannot serve this call, running on Triton instead: {reason}"
    _logger.info(message)
    warnings.warn(message, FallbackWarning, stacklevel=5)


def _prepare(backend: Backend, problem: Problem, foreign_metadata: bool) -> Run:
    """Prepare `problem`, without a schedule that FA3 may have made: it means nothing to Triton."""
    if not foreign_metadata or problem.tensors.scheduler_metadata is None:
        return _dumped_if_it_fails(backend, problem)
    inner = _dumped_if_it_fails(backend, _without_metadata(problem))
    return lambda given: inner(given._replace(scheduler_metadata=None))


def _dumped_if_it_fails(backend: Backend, problem: Problem) -> Run:
    """Prepare `problem`; where the environment asks for it, failing calls are written to files."""
    if backend.ver != "triton" or not settings().dump_dir:
        return _with_contiguous_inputs(backend, problem)
    dump: Any = importlib.import_module("triton_fa.dump")
    run: Run = dump.guarded(functools.partial(_with_contiguous_inputs, backend, problem), problem)
    return run


def _without_metadata(problem: Problem) -> Problem:
    spec = replace(problem.spec, features=problem.spec.features - {"scheduler_metadata"})
    return replace(problem, spec=spec, tensors=problem.tensors._replace(scheduler_metadata=None))


def _with_contiguous_inputs(backend: Backend, problem: Problem) -> Run:
    """Prepare `problem`; inputs whose last dimension is strided are copied on each call."""
    tensors = problem.tensors
    strided = [n for n in ("q", "k", "v") if _is_strided(getattr(tensors, n))]
    if not strided:
        return backend.prepare(problem)

    def contiguous(given: Tensors) -> Tensors:
        return given._replace(**{n: getattr(given, n).contiguous() for n in strided})

    inner = backend.prepare(replace(problem, tensors=contiguous(tensors)))
    return lambda given: inner(contiguous(given))


def _is_strided(tensor: torch.Tensor) -> bool:
    return tensor.shape[-1] > 1 and tensor.stride(-1) != 1


def backends(device: torch.device | str | None = None) -> dict[Version, BackendStatus]:
    """What can be used on `device` (default: the current CUDA device, else the CPU), and why not.

    Importing the binaries is tried here; the first call may take seconds.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.device(device)
    found: dict[Version, BackendStatus] = {}
    for ver in _ADAPTERS:
        backend = _load(ver)
        reason = backend if isinstance(backend, str) else backend.unavailable(where)
        detail = "" if reason or isinstance(backend, str) else backend.detail()
        found[ver] = BackendStatus(ver, reason is None, reason, detail)
    return found

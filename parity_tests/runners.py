"""Run one case on one backend and say what came of it. Nothing is ever skipped in silence."""

import functools
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from unittest import mock

import torch

import reference
import triton_fa
from parity_tests.budgets import Limits, Measures, Result, Truth, judge
from parity_tests.caches import Appended, Caches, at
from parity_tests.cases import Case
from parity_tests.known_differences import BUDGET, CRASH, Difference, known
from parity_tests.legality import FLOAT8
from parity_tests.poison import poisoned_allocations
from triton_fa import dispatch
from triton_fa.device import facts
from triton_fa.errors import BackendUnavailableError, UnsupportedError
from triton_fa.kernels import hopper_plans

Tensor = torch.Tensor
Ver = str | int
Call = Callable[[Case, dict[str, Any], Ver], Any]

VERS: tuple[Ver, ...] = ("triton", "torch", 3, 4)
# Our own: a legal case that one of these refuses is a fault. FA3 and FA4 may refuse.
OWN = ("triton", "torch")

AGREES, KNOWN, REFUSED = "agrees", "known difference", "refused"
UNAVAILABLE, FAILED, NOT_RUN = "unavailable", "failed", "not run"
CRASHED, QUARANTINED = "crashed: ", "quarantined: "  # how the reason of such an outcome begins
CONTEXT_LOST = f"{CRASHED}left CUDA unusable"

# Arguments of the public functions that say how to compute, not what: the reference has none.
_HOW = ("out", "num_splits", "return_softmax_lse")


@dataclass(frozen=True)
class Outcome:
    """What came of one case on one backend."""

    case: Case
    ver: Ver
    verdict: str
    reasons: tuple[str, ...] = ()
    measures: Measures = field(default_factory=Measures)
    differences: tuple[str, ...] = ()  # ids in known_differences
    seconds: float = 0.0
    launched: bool = True  # False: an entry of known_differences kept it from running
    distances: dict[str, float] = field(default_factory=dict)  # max|difference| to other backends

    @property
    def is_failure(self) -> bool:
        """A wrong result, or a legal case that our own code would not take."""
        return self.verdict == FAILED or (
            self.ver in OWN and self.verdict in (REFUSED, UNAVAILABLE)
        )

    @property
    def ran(self) -> bool:
        """Whether the backend computed something that was compared."""
        return self.launched and self.verdict in (AGREES, KNOWN, FAILED)

    @property
    def crashed(self) -> bool:
        """Whether nothing could run after this in the same process."""
        return self.verdict == FAILED and any(r.startswith(CRASHED) for r in self.reasons)

    @property
    def quarantined(self) -> bool:
        """Whether it was not launched because it would crash."""
        return not self.launched and self.reasons[0].startswith(QUARANTINED)

    def to_json(self) -> str:
        """One line of JSON; `from_json` gives an equal outcome back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Outcome":
        """The outcome written by `to_json`."""
        fields = json.loads(text)
        fields |= {name: tuple(fields[name]) for name in ("reasons", "differences")}
        made = {"case": Case(**fields["case"]), "measures": Measures(**fields["measures"])}
        return cls(**fields | made)

    def describe(self) -> str:
        """One line for a terminal."""
        why = "; ".join((*self.differences, *self.reasons))
        return f"{self.ver}: {self.verdict}{': ' if why else ''}{why}  [{self.case.label}]"


@dataclass(frozen=True)
class Prepared:
    """A case with its exact result and its baseline: computed once, used by every backend."""

    case: Case
    device: str
    truth: Truth
    outs: dict[Ver, Tensor] = field(default_factory=dict)  # what each backend made of it

    @classmethod
    def of(cls, case: Case, device: str) -> "Prepared":
        """Compute the truth of a case from its poisoned inputs."""
        if torch.get_float32_matmul_precision() != "highest":  # it would widen every float32 budget
            raise RuntimeError("the float32 baseline needs full float32 products, TF32 is on")
        entry = getattr(reference, case.function)
        arguments = _what(case.materialise(device))
        unused = arguments["v_cache"][..., 0, 0].float().isnan() if case.append else None
        scores: list[float] = [0.0]
        more = {"attend": _noting(scores)} if case.dtype in FLOAT8 else {}
        out, lse = entry(**arguments, **more)
        low_precision: dict[str, Any] = {
            "attend": reference.attend_low_precision,
            "dequantise": reference.dequantise_low_precision,
        }
        if case.dtype == "float8_e4m3fn":  # FlashAttention's tests do so with no other
            attend = functools.partial(
                reference.attend_low_precision, weights_dtype=torch.float8_e4m3fn
            )
            low_precision["attend"] = attend
        if case.rotary_dim > 0:
            low_precision["rotate"] = reference.rotate_low_precision
        again = _what(case.materialise(device)) if case.append else arguments  # not the same cache
        baseline, _ = entry(**again, **low_precision)
        for tensor in (out, baseline):  # a NaN of the judge must not pass for padding
            rows = int((~tensor[..., 0].isnan()).sum())
            if rows != sum(case.seqlens_q) * case.heads_q:
                raise AssertionError(f"the reference is NaN in a row that counts: {case}")
        if unused is None:
            return cls(case, device, Truth(out, lse, baseline, largest_score=max(scores)))
        k_cache, v_cache = arguments["k_cache"], arguments["v_cache"]
        slots = unused & ~v_cache[..., 0, 0].float().isnan()
        if int(slots.sum()) != sum(case.ends) - sum(case.seqlens_k):
            raise AssertionError(f"the reference did not append what the case says: {case}")
        appended = Appended(slots, at(k_cache, slots), at(v_cache, slots))
        return cls(case, device, Truth(out, lse, baseline, appended, max(scores)))

    def arguments(self, *, poison: bool = True) -> dict[str, Any]:
        """Fresh arguments of the public call."""
        return self.case.materialise(self.device, poison=poison)

    def distances(self, ver: Ver, out: Tensor) -> dict[str, float]:
        """How far a result is from those before it; none where one of them is not finite."""
        if out.shape != self.truth.out.shape:
            return {}
        real = ~self.truth.out[..., 0].isnan()
        mine = out[real].double()
        if not real.any() or not mine.isfinite().all():
            return {}
        found = {
            str(before): (mine - other).abs().max().item() for before, other in self.outs.items()
        }
        self.outs[ver] = mine
        return found


def _noting(found: list[float]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The exact attention, which adds the largest |score| before a softcap to `found`."""

    def attend(q: Tensor, k: Tensor, v: Tensor, rules: Any, *more: Any) -> tuple[Tensor, Tensor]:
        for heads, keys in zip(q.double().chunk(k.shape[1], 1), k.double().unbind(1), strict=True):
            for rows in heads.split(1024):
                scores = torch.einsum("qgd,kd->gqk", rows, keys) * rules.softmax_scale
                found.append(scores.abs().max().item() if scores.numel() else 0.0)
        return reference.attend(q, k, v, rules, *more)

    return attend


def multiplies_in_float8(case: Case, ver: Ver, device: str) -> bool:
    """Whether a backend may multiply float8 queries and keys as they are, not in 16 bits."""
    if case.dtype != "float8_e4m3fn":
        return False
    if ver == "triton" and device.startswith("cuda"):
        return hopper_plans.unavailable(facts(torch.device(device))) is None
    return ver == 3


def limits_of(prepared: Prepared, ver: Ver) -> Limits:
    """The rule for a backend."""
    limits = Limits.of(prepared.case)
    if multiplies_in_float8(prepared.case, ver, prepared.device):
        return limits.of_float8_products(prepared.case, prepared.truth)
    return limits


def _what(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in _HOW}


def public_call(case: Case, arguments: dict[str, Any], ver: Ver) -> Any:
    """Call the public function as a user would, without fallback, its own memory poisoned."""
    with triton_fa.strict(), poisoned_allocations():
        return getattr(triton_fa, case.function)(**arguments, ver=ver)


def run_backend(prepared: Prepared, ver: Ver, call: Call = public_call) -> Outcome:
    """Run a prepared case on one backend and judge it."""
    case = prepared.case
    entries = known(case, ver)
    # An entry's own case shows what happens without it.
    clean = [entry for entry in entries if entry.needs_clean_inputs]
    unclean = tuple(entry.id for entry in clean if entry.own_case == case)
    poison = len(clean) == len(unclean)
    for entry in entries:
        if entry.kind == BUDGET:
            continue
        if entry.kind == CRASH:
            refused = refusal(case, prepared.arguments(poison=poison), ver)
            if refused is not None:
                return refused
        said = QUARANTINED if entry.kind == CRASH else f"{entry.kind}: "
        reasons = (said + entry.reason,)
        return Outcome(case, ver, KNOWN, reasons, differences=(entry.id,), launched=False)

    arguments = prepared.arguments(poison=poison)
    started = time.perf_counter()

    def outcome(verdict: str, *reasons: str, **more: Any) -> Outcome:
        return Outcome(case, ver, verdict, reasons, seconds=time.perf_counter() - started, **more)

    try:
        result = _result(case, call(case, arguments, ver), arguments)
        if prepared.device.startswith("cuda"):
            torch.cuda.synchronize()
    except UnsupportedError as error:
        return outcome(REFUSED, *error.reasons)
    except BackendUnavailableError as error:
        return outcome(UNAVAILABLE, str(error.reason))
    except Exception as error:  # noqa: BLE001  whatever a backend raises is a failure of the case
        return outcome(FAILED, *_what_went_wrong(error, prepared.device))

    if case.append:
        before = prepared.arguments(poison=poison)
        caches = (each[name] for each in (arguments, before) for name in ("k_cache", "v_cache"))
        result = replace(result, caches=Caches(*caches))
    distances = prepared.distances(ver, result.out)
    outcome = functools.partial(outcome, distances=distances)
    limits = limits_of(prepared, ver)
    measures, problems = judge(case, result, prepared.truth, limits)
    if not problems:
        return outcome(AGREES, measures=measures)
    used = [entry for entry in entries if entry.widen(limits, case) != limits]
    measures, remaining = judge(case, result, prepared.truth, _wider(limits, case, used))
    if unclean:
        return outcome(KNOWN, *problems, measures=measures, differences=unclean)
    if remaining:
        return outcome(FAILED, *remaining, measures=measures)
    for entry in tuple(used):  # only what was needed is named
        others = [other for other in used if other != entry]
        if not judge(case, result, prepared.truth, _wider(limits, case, others))[1]:
            used = others
    needed = tuple(entry.id for entry in used)
    return outcome(KNOWN, *problems, measures=measures, differences=needed)


def _wider(limits: Limits, case: Case, entries: list[Difference]) -> Limits:
    for entry in entries:
        limits = entry.widen(limits, case)
    return limits


class _Accepted(Exception):  # noqa: N818  # raised where a call would be launched
    pass


def refusal(case: Case, arguments: dict[str, Any], ver: Ver) -> Outcome | None:
    """What the package itself refuses about a call, or None, without ever launching it."""
    with mock.patch.object(dispatch, "_prepare", side_effect=_Accepted):
        try:
            public_call(case, arguments, ver)
        except UnsupportedError as error:
            return Outcome(case, ver, REFUSED, tuple(error.reasons))
        except BackendUnavailableError as error:
            return Outcome(case, ver, UNAVAILABLE, (str(error.reason),))
        except _Accepted:
            return None
    raise AssertionError(f"ver={ver} took a call that must not be launched: {case}")


def context_is_lost() -> bool:
    """Whether an earlier error has left CUDA unusable for the rest of this process."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").add_(1).item()
    except RuntimeError:
        return True
    return False


def _result(case: Case, returned: Any, arguments: dict[str, Any]) -> Result:
    if case.lse:
        if not isinstance(returned, tuple) or len(returned) < 2:
            raise TypeError(f"expected (out, lse, ...), got {type(returned).__name__}")
        out, lse = returned[0], returned[1]
    else:
        out, lse = returned, None
    for tensor in (out, lse) if case.lse else (out,):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"expected a tensor, got {type(tensor).__name__}")
    given = arguments.get("out")
    if given is not None and (out.data_ptr(), out.stride()) != (given.data_ptr(), given.stride()):
        raise ValueError("the returned out is not the buffer given as out=")
    return Result(out, lse)


def _what_went_wrong(error: Exception, device: str) -> tuple[str, ...]:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} in {frame.name}"
    text = " ".join(str(error).split())[:500]
    reasons = (f"{type(error).__name__}: {text} ({where})",)
    lost = device.startswith("cuda") and context_is_lost()
    return (CONTEXT_LOST, *reasons) if lost else reasons

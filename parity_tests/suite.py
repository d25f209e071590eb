"""One run: which cases, on which backends, in which order, and whether it passed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from parity_tests import named, strategies
from parity_tests.cases import Case, Spec
from parity_tests.device import Device
from parity_tests.known_differences import FA4
from parity_tests.model_case import CannotRunError
from parity_tests.runners import (
    CONTEXT_LOST,
    FAILED,
    NOT_RUN,
    UNAVAILABLE,
    VERS,
    Call,
    Outcome,
    Prepared,
    Ver,
    context_is_lost,
    public_call,
    run_backend,
)


@dataclass(frozen=True)
class Options:
    """What was asked for."""

    device: Device
    vers: tuple[Ver, ...] = VERS
    generated: int = 200
    seed: int = 0
    named_only: bool = False
    pattern: str = ""  # only cases whose label contains this
    variants: int = 20  # distinct specs among the generated cases: each is some compilations
    fa4_variants: int = 5  # of those, how many FA4 compiles: 2 to 5 seconds each
    require_peers: bool = False


def plan(options: Options) -> list[Case]:
    """The cases of a run, named ones first."""
    interpreted = options.device.interpreted
    cases = named.small() if interpreted else named.full()
    if not options.named_only and options.generated > 0:
        scale = strategies.SMALL if interpreted else strategies.FULL
        cases += strategies.generate(options.generated, options.seed, scale, options.variants)
    return [case for case in cases if options.pattern.lower() in case.label.lower()]


@dataclass
class Run:
    """State of a run: what happened so far decides what can still happen."""

    options: Options
    call: Call = public_call
    outcomes: list[Outcome] = field(default_factory=list)
    context_lost: bool = False
    _unavailable: dict[Ver, Outcome] = field(default_factory=dict)
    _fa4_specs: set[Spec] = field(default_factory=set)

    def go(
        self,
        cases: list[Case],
        before: Callable[[Case], None] = lambda case: None,
        after: Callable[[Case], None] = lambda case: None,
    ) -> None:
        """Run every case on every backend."""
        for case in cases:
            before(case)
            self.outcomes += self._run_case(case)
            after(case)

    def _run_case(self, case: Case) -> Iterator[Outcome]:
        if self.context_lost:
            yield from self._none_run(case, NOT_RUN, CONTEXT_LOST)
            return
        try:
            prepared = Prepared.of(case, self.options.device.name)
        except CannotRunError as error:
            yield from self._none_run(case, NOT_RUN, str(error))
            return
        except Exception as error:  # noqa: BLE001  reported, and it fails the run
            self.context_lost = context_is_lost()
            yield from self._none_run(case, FAILED, f"no exact result: {error!r}"[:500])
            return
        for ver in self.options.vers:
            outcome = self._run_one(prepared, ver)
            if CONTEXT_LOST in outcome.reasons and outcome.verdict == FAILED:
                self.context_lost = True
            yield outcome

    def _run_one(self, prepared: Prepared, ver: Ver) -> Outcome:
        case = prepared.case
        if self.context_lost:
            return Outcome(case, ver, NOT_RUN, (CONTEXT_LOST,))
        if ver in self._unavailable:
            return Outcome(case, ver, UNAVAILABLE, self._unavailable[ver].reasons)
        limited = ver == FA4 and not case.name and case.spec not in self._fa4_specs
        if limited and len(self._fa4_specs) >= self.options.fa4_variants:
            reason = f"FA4 compiles at most {self.options.fa4_variants} generated variants"
            return Outcome(case, ver, NOT_RUN, (f"{reason} (--fa4-variants)",))
        outcome = run_backend(prepared, ver, self.call)
        if outcome.verdict == UNAVAILABLE:
            self._unavailable[ver] = outcome
        if limited and outcome.ran:
            self._fa4_specs.add(case.spec)
        return outcome

    def _none_run(self, case: Case, verdict: str, reason: str) -> Iterator[Outcome]:
        for ver in self.options.vers:
            yield Outcome(case, ver, verdict, (reason,))

    @property
    def failures(self) -> list[Outcome]:
        """Outcomes that fail the run."""
        return [outcome for outcome in self.outcomes if outcome.is_failure]

    def verdict(self) -> tuple[bool, str]:
        """Whether the run passed, and the sentence that says why."""
        ran = sum(outcome.ran for outcome in self.outcomes)
        if self.context_lost:
            return False, "FAILED: an error left CUDA unusable; the rest was not run"
        if self.failures:
            return False, f"FAILED: {len(self.failures)} of {len(self.outcomes)} outcomes"
        if ran == 0:
            return False, "FAILED: nothing ran at all"
        missing = sorted({str(o.ver) for o in self.outcomes if o.verdict == UNAVAILABLE})
        if missing and self.options.require_peers:
            return False, f"FAILED: peers are required, but {', '.join(missing)} could not run"
        peers = f"; could not run: {', '.join(missing)}" if missing else ""
        return True, f"passed: {ran} comparisons within budget{peers}"


def tally(outcomes: list[Outcome]) -> dict[str, dict[str, int]]:
    """How often each backend got each verdict."""
    counts: dict[str, dict[str, int]] = {}
    for outcome in outcomes:
        row = counts.setdefault(str(outcome.ver), {})
        row[outcome.verdict] = row.get(outcome.verdict, 0) + 1
    return counts

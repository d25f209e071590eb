"""One run: which cases, on which backends, in which order, and whether it passed."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from parity_tests import named, strategies
from parity_tests.cases import Case, Spec
from parity_tests.device import Device
from parity_tests.known_differences import DIFFERENCES, FA4
from parity_tests.model_case import CannotRunError
from parity_tests.runners import (
    CONTEXT_LOST,
    FAILED,
    NOT_RUN,
    OWN,
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

Before = Callable[[Case, Ver | None], None]


@dataclass(frozen=True)
class Options:
    """What was asked for."""

    device: Device
    vers: tuple[Ver, ...] = VERS
    generated: int = 200  # beside those that cover the pairs of features
    soak: int = 0  # instead of both, this many cases over hundreds of specs
    seed: int = 0
    named_only: bool = False
    pattern: str = ""  # only cases whose label contains this
    shard: tuple[int, int] = (1, 1)  # the i-th of n shares
    variants: int = 20  # distinct specs among the generated cases: each is some compilations
    fa4_variants: int = 5  # of those, how many FA4 compiles: 2 to 5 seconds each
    require_peers: bool = False
    strict_known: bool = True  # a known difference that is outlived fails the run


def plan(options: Options) -> list[Case]:
    """The cases of a run, named ones first."""
    interpreted = options.device.interpreted
    cases = named.small() if interpreted else named.full()
    cases = list(dict.fromkeys(cases + own_cases(options)))
    scale = strategies.SMALL if interpreted else strategies.FULL
    if options.soak:
        variants = max(options.variants, strategies.SOAK_VARIANTS)
        cases += strategies.soak(options.soak, options.seed, scale, variants)
    elif not options.named_only and options.generated > 0:
        cases += strategies.pairwise(options.seed, scale)
        cases += strategies.generate(options.generated, options.seed, scale, options.variants)
    chosen = [case for case in cases if options.pattern.lower() in case.label.lower()]
    index, count = options.shard
    return shares(chosen, count)[index - 1]


def own_cases(options: Options) -> list[Case]:
    """The cases that show the known differences of the backends that can run here."""
    runs = [ver for ver in options.vers if ver in OWN or not options.device.interpreted]
    return [
        entry.own_case
        for entry in DIFFERENCES
        if any(entry.applies(entry.own_case, ver) for ver in runs)
    ]


def shares(cases: list[Case], count: int) -> list[list[Case]]:
    """The cases in so many parts: whole specs, so that no two parts compile the same kernels."""
    specs = [case.spec for case in cases]
    place = {spec: index % count for index, spec in enumerate(dict.fromkeys(specs))}
    found: list[list[Case]] = [[] for _ in range(count)]
    for case, spec in zip(cases, specs, strict=True):
        found[place[spec]].append(case)
    return found


@dataclass
class Run:
    """State of a run: what happened so far, in this process or before, decides what still can."""

    options: Options
    call: Call = public_call
    outcomes: list[Outcome] = field(default_factory=list)
    context_lost: bool = False  # nothing more can run in this process
    gave_up: str = ""  # why pairs are left that no process will run
    backends: dict[str, str] | None = None  # what each backend was, where that is known already
    _unavailable: dict[Ver, Outcome] = field(default_factory=dict)
    _fa4_specs: set[Spec] = field(default_factory=set)

    def __post_init__(self) -> None:
        for outcome in self.outcomes:
            self._learn(outcome)

    def go(
        self,
        cases: list[Case],
        before: Before = lambda case, ver: None,
        after: Callable[[Outcome], None] = lambda outcome: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Run every case on every backend, but no pair again, and nothing once CUDA is lost.

        `before` is told the pair that is about to run, or (case, None) for its exact result;
        `stop` is asked before each case.
        """
        left: dict[Case, list[Ver]] = {}
        for case, ver in self.left(cases):
            left.setdefault(case, []).append(ver)
        for case, vers in left.items():
            if self.context_lost or stop():
                return
            for outcome in self._run_case(case, tuple(vers), before):
                self.outcomes.append(outcome)
                after(outcome)

    def left(self, cases: list[Case]) -> list[tuple[Case, Ver]]:
        """The pairs of case and backend that have no outcome yet."""
        done = {(outcome.case, outcome.ver) for outcome in self.outcomes}
        return [(c, ver) for c in cases for ver in self.options.vers if (c, ver) not in done]

    def _run_case(self, case: Case, vers: tuple[Ver, ...], before: Before) -> Iterator[Outcome]:
        before(case, None)
        try:
            prepared = Prepared.of(case, self.options.device.name)
        except CannotRunError as error:
            yield from none_run(case, vers, NOT_RUN, str(error))
            return
        except Exception as error:  # noqa: BLE001  reported, and it fails the run
            self.context_lost = context_is_lost()
            lost = (CONTEXT_LOST,) if self.context_lost else ()
            yield from none_run(case, vers, FAILED, *lost, f"no exact result: {error!r}"[:500])
            return
        for ver in vers:
            before(case, ver)
            outcome = self._run_one(prepared, ver)
            self._learn(outcome)
            yield outcome
            if outcome.crashed:
                self.context_lost = True
                return

    def _run_one(self, prepared: Prepared, ver: Ver) -> Outcome:
        case = prepared.case
        if ver in self._unavailable:
            return Outcome(case, ver, UNAVAILABLE, self._unavailable[ver].reasons)
        limited = ver == FA4 and not case.name and case.spec not in self._fa4_specs
        if limited and len(self._fa4_specs) >= self.options.fa4_variants:
            reason = f"FA4 compiles at most {self.options.fa4_variants} generated variants"
            return Outcome(case, ver, NOT_RUN, (f"{reason} (--fa4-variants)",))
        return run_backend(prepared, ver, self.call)

    def _learn(self, outcome: Outcome) -> None:
        if outcome.verdict == UNAVAILABLE:
            self._unavailable.setdefault(outcome.ver, outcome)
        if outcome.ver == FA4 and not outcome.case.name and outcome.ran:
            self._fa4_specs.add(outcome.case.spec)

    @property
    def failures(self) -> list[Outcome]:
        """Outcomes that fail the run."""
        return [outcome for outcome in self.outcomes if outcome.is_failure]

    def verdict(self) -> tuple[bool, str]:
        """Whether the run passed, and the sentence that says why."""
        ran = sum(outcome.ran for outcome in self.outcomes)
        if self.gave_up:
            return False, f"FAILED: {self.gave_up}; the rest was not run"
        if self.failures:
            crashes = sum(outcome.crashed for outcome in self.failures)
            of_them = f", {crashes} of them crashed" if crashes else ""
            return False, f"FAILED: {len(self.failures)} of {len(self.outcomes)} outcomes{of_them}"
        if ran == 0:
            return False, "FAILED: nothing ran at all"
        missing = sorted({str(o.ver) for o in self.outcomes if o.verdict == UNAVAILABLE})
        if missing and self.options.require_peers:
            return False, f"FAILED: peers are required, but {', '.join(missing)} could not run"
        outlived = [id_ for id_, shown in occurred(self.outcomes).items() if not shown]
        if outlived and self.options.strict_known:
            return False, f"FAILED: known differences that did not occur: {', '.join(outlived)}"
        peers = f"; could not run: {', '.join(missing)}" if missing else ""
        return True, f"passed: {ran} comparisons within budget{peers}"


def occurred(outcomes: list[Outcome]) -> dict[str, bool]:
    """Of each known difference that can be judged, whether it occurred in its own case.

    Judged only where that case ran on every backend that the entry covers: what a share or another
    chip did not run says nothing. One backend where it occurred is enough.
    """
    found = {(outcome.case, outcome.ver): outcome for outcome in outcomes if outcome.ran}
    judged = {}
    for entry in DIFFERENCES:
        case = entry.own_case
        covered = [found.get((case, ver)) for ver in VERS if entry.applies(case, ver)]
        ran = [outcome for outcome in covered if outcome is not None]
        if covered and len(ran) == len(covered):
            judged[entry.id] = any(entry.id in outcome.differences for outcome in ran)
    return judged


def none_run(case: Case, vers: Iterable[Ver], verdict: str, *reasons: str) -> Iterator[Outcome]:
    """The same outcome on every one of these backends."""
    for ver in vers:
        yield Outcome(case, ver, verdict, reasons)


def tally(outcomes: list[Outcome]) -> dict[str, dict[str, int]]:
    """How often each backend got each verdict."""
    counts: dict[str, dict[str, int]] = {}
    for outcome in outcomes:
        row = counts.setdefault(str(outcome.ver), {})
        row[outcome.verdict] = row.get(outcome.verdict, 0) + 1
    return counts

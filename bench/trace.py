"""What a serving loop does, step by step, known before any token is: admit, prefill, decode, evict.

Requests arrive at random steps and ask for a fixed number of tokens, so that the work of a step
does not depend on what the model says, and two runs of a trace do the same.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

DUMMY_PAGE = 0  # that the padding of a batch reads and writes


@dataclass(frozen=True)
class Request:
    """What a client sends."""

    arrival: int  # step
    prompt: int  # tokens
    new: int


@dataclass(frozen=True)
class Limits:
    """What the engine has."""

    batch: int  # sequences at a time
    chunk: int  # prompt tokens in a step
    page: int
    columns: int  # pages of the longest sequence
    pages: int


@dataclass(frozen=True)
class Rows:
    """One batch: the tokens that it runs, and where their keys are and go. Arrays of integers."""

    requests: Ints  # (batch,), -1: padding
    tokens: tuple[int, ...]  # of each row
    history: Ints  # (2, total): request and position of every token
    slots: Ints  # (total,): where its key goes
    lengths: Ints  # (batch,): keys when they are there
    table: Ints  # (batch, columns)
    finished: Ints  # (batch,): position of the new token, -1 where the prompt goes on

    @property
    def batch(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Step:
    """Pieces of prompts in one batch, and one token of each other sequence in another."""

    prefill: Rows | None
    decode: Rows | None


@dataclass
class Sequence:
    number: int
    request: Request
    columns: int
    length: int = 0
    pages: list[int] = field(default_factory=list)
    table: Ints = field(init=False)

    def __post_init__(self) -> None:
        self.table = np.full(self.columns, DUMMY_PAGE, np.int64)

    @property
    def waiting(self) -> int:
        return max(0, self.request.prompt - self.length)

    @property
    def done(self) -> bool:
        # The last new token is never run.
        return self.length == self.request.prompt + self.request.new - 1


def random_trace(
    count: int, prompts: tuple[int, int], new: tuple[int, int], gap: float, seed: int = 0
) -> list[Request]:
    """Prompt lengths uniform in their logarithm, arrivals `gap` steps apart on average."""
    numbers = random.Random(seed)
    low, high = prompts
    requests, arrival = [], 0.0
    for _ in range(count):
        prompt = round(low * (high / low) ** numbers.random())
        requests.append(Request(int(arrival), prompt, numbers.randint(*new)))
        arrival += numbers.expovariate(1 / gap)
    return requests


def schedule(requests: list[Request], limits: Limits, buckets: list[int]) -> Iterator[Step]:
    """The steps that have work, until every request has its tokens.

    First come, first served; prompts in pieces of at most `limits.chunk` tokens a step in all, all
    sequences that have their prompt decode beside them. Decode batches are padded to one of
    `buckets`.
    """
    free = list(range(DUMMY_PAGE + 1, limits.pages))
    random.Random(1).shuffle(free)
    waiting = [Sequence(n, request, limits.columns) for n, request in enumerate(requests)]
    running: list[Sequence] = []
    step = 0
    while waiting or running:
        while waiting and waiting[0].request.arrival <= step and len(running) < limits.batch:
            running.append(waiting.pop(0))
        decode = [(sequence, 1) for sequence in running if not sequence.waiting]
        prefill, budget = [], limits.chunk
        for sequence in running:
            tokens = min(sequence.waiting, budget)
            if tokens:
                prefill.append((sequence, tokens))
                budget -= tokens
        for sequence, tokens in decode + prefill:
            _grow(sequence, tokens, free, limits.page)
        if decode or prefill:
            size = min((b for b in buckets if b >= len(decode)), default=len(decode))
            yield Step(
                _rows(prefill, limits) if prefill else None,
                _rows(decode, limits, size - len(decode)) if decode else None,
            )
        for sequence, tokens in decode + prefill:
            sequence.length += tokens
            if sequence.done:
                free += sequence.pages
                running.remove(sequence)
        step += 1


def _grow(sequence: Sequence, tokens: int, free: list[int], page: int) -> None:
    while len(sequence.pages) * page < sequence.length + tokens:
        sequence.table[len(sequence.pages)] = free[-1]
        sequence.pages.append(free.pop())


def _rows(work: list[tuple[Sequence, int]], limits: Limits, padding: int = 0) -> Rows:
    history, slots = [], []
    for sequence, tokens in work:
        positions = np.arange(sequence.length, sequence.length + tokens)
        history.append(np.stack((np.full(tokens, sequence.number), positions)))
        slots.append(
            sequence.table[positions // limits.page] * limits.page + positions % limits.page
        )
    none = np.full(padding, -1)
    dummy = np.full((padding, limits.columns), DUMMY_PAGE)
    return Rows(
        np.concatenate(([sequence.number for sequence, _ in work], none)),
        (*(tokens for _, tokens in work), *[1] * padding),
        np.concatenate((*history, np.stack((none, 0 * none))), 1),
        np.concatenate((*slots, np.full(padding, DUMMY_PAGE * limits.page))),
        np.concatenate(([sequence.length + tokens for sequence, tokens in work], -none)),
        np.concatenate((np.stack([sequence.table for sequence, _ in work]), dummy)),
        np.concatenate(
            (
                [
                    -1 if tokens < sequence.waiting else sequence.length + tokens
                    for sequence, tokens in work
                ],
                none,
            )
        ),
    )

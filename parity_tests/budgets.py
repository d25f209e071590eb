"""How large an error may be, and why. Every tolerance of the harness is in this file.

The judge is FlashAttention's own rule: an output may be off from exact attention by a small
multiple of what plain PyTorch is off in the same dtype. Exact is float64 here, where
FlashAttention's tests round the exact result to the input dtype first; the rounding terms below
restore what that rounding absorbs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from parity_tests.caches import Appended, Caches, judge_caches
from parity_tests.cases import Case
from parity_tests.legality import FLOAT8

Tensor = torch.Tensor

# max|out - ref| <= MAX_MULT * max|pt - ref| + floor: FlashAttention's test_flash_attn_output.
MAX_MULT = 2.0
# A kernel that caps scores in another order than PyTorch rounds differently: 3, as there.
MAX_MULT_SOFTCAP = 3.0
# mean|out - ref| <= MEAN_MULT * mean|pt - ref| + floor: test_flash_attn_kvcache.
MEAN_MULT = 1.5
# The same two with float8 queries: weights are rounded to so few bits that it matters when.
MAX_MULT_FLOAT8, MEAN_MULT_FLOAT8 = 4.0, 3.0
# The absolute term of test_flash_attn_kvcache.
KVCACHE_ATOL = 1e-5
# The LSE is float32 whatever the input dtype: its error comes from float32 sums and exponentials
# (near 1e-6 for scores of ordinary size), and 1e-3 is what merging states in 16 bits can bear.
LSE_ATOL = 1e-3
# Products of float8 on Hopper: of each 32 products and the sum so far, all are cut off near 2**-13
# of the largest, toward zero. A sum of n products of random sign is then off by about n**0.5 such
# units: the largest score is z standard deviations, n**0.5 * z products more have its sign than
# have not, each loses half a unit on average, and the sum is near its size for a part of them only.
# Emulated so, scores were off by up to 0.75 of that and the LSE, no worse than its worst score, by
# 0.35 (with a bit less 1.5 and 0.62); an H200's LSE by 0.32. The |score| is that before a softcap.
FLOAT8_SUM = 2.0**-13
# How many (token, head) rows it takes until the luck of single rows has averaged out: a row whose
# few weights round to nothing in the baseline gives a mean error of just the output's rounding.
LUCKY_ROWS = 16
# float32 only: exponents are taken in base 2, so scores are multiplied by log2(e) and rounded once
# more than in PyTorch. At |score| <= 16 that is 16 * 2**-24 * ln 2, plus 2 units of the hardware's
# exp2: below 2**-20 relative to the weights. It is part of the mean, and of the maximum over few
# rows: over many of them the baseline has rounded badly somewhere too.
FLOAT32_EXP2 = 2.0**-20
# float32 only: a GPU's product is a sum of n terms in one thread. Each addition rounds the sum so
# far by 2**-24 / 3**0.5 of itself (rms). Of terms of random sign it grows as the square root of
# their number, so it ends up off by 2**-24 * (n / 6)**0.5 of its own size; the largest of many
# thousands is off four times as much.
# Values: n keys make a row of the result, of whatever size. Scores: n = head_dim products make
# n**0.5 (c / 4 times that with a softcap c: queries are so much larger), times the scale. A result
# is off by no more than its largest value times that: two keys share the weight, both at the end of
# their range. PyTorch's product adds in pieces and errs by a third of it. TF32 errs 30 times more.
LARGEST_OF_MANY = 4
FLOAT32_SUM = LARGEST_OF_MANY * 2.0**-24 / 6**0.5
# A rotation is computed in float32: two products and their sum, each rounded by 2**-24 of itself.
# With M the largest of the rotated dims, none of the three is above 1.5 * M: below 2**-21 * M
# together, also where the terms cancel. Rounding to the cache's dtype can then end on either side
# of a border between two numbers: one unit in the last place besides, which is 2**-10 near 1 for
# float16 (the 1e-3 of test_flash_attn_kvcache) and 2**-7 for bfloat16. Whatever else is in a cache
# is compared by its bits.
FLOAT32_ROTATION = 2.0**-21


@dataclass(frozen=True)
class Truth:
    """What a call must return. Rows of padding are NaN in all three tensors."""

    out: Tensor  # float64
    lse: Tensor  # float64
    baseline: Tensor  # what PyTorch computes in the input dtype, held in float64
    appended: Appended | None = None
    largest_score: float = 0.0  # with float8 queries: |score| of any query and key, not capped


@dataclass(frozen=True)
class Result:
    """What a backend returned, and what an appending call made of the caches."""

    out: Tensor
    lse: Tensor | None
    caches: Caches | None = None


@dataclass(frozen=True)
class Limits:
    """The budget of one comparison; a known difference may widen it for its own reason."""

    max_mult: float = MAX_MULT
    mean_mult: float = MEAN_MULT
    lse_atol: float = LSE_ATOL
    empty_lse: tuple[float, ...] = ()  # values accepted for rows without keys, beside the right one
    hidden_keys_may_be_missing: bool = False  # a new key that no query sees need not be stored
    relative: float = 0.0  # added to both rules, as a part of the exact values' size

    @classmethod
    def of(cls, case: Case) -> "Limits":
        """The rule that holds for everybody."""
        if case.dtype in FLOAT8:
            return cls(max_mult=MAX_MULT_FLOAT8, mean_mult=MEAN_MULT_FLOAT8)
        return cls(max_mult=MAX_MULT_SOFTCAP if case.softcap > 0 else MAX_MULT)

    def of_float8_products(self, case: Case, truth: Truth) -> "Limits":
        """The same for a backend that multiplies float8 numbers as they are."""
        slack = FLOAT8_SUM * case.head_dim**0.5 * truth.largest_score
        return replace(self, lse_atol=self.lse_atol + slack)


@dataclass(frozen=True)
class Measures:
    """How far a result is off; None where there was nothing to compare."""

    max_error: float | None = None
    max_budget: float | None = None
    max_ratio: float | None = None  # max|out - ref| over max|pt - ref|
    mean_ratio: float | None = None
    lse_error: float | None = None
    key_error: float | None = None  # of appended keys in the cache


def _floors(case: Case, ref: Tensor) -> tuple[float, float]:
    """Absolute terms of the max and of the mean rule, from the exact values alone."""
    dtype = getattr(torch, case.out_dtype)
    rounded = ref.to(dtype)
    rounding = (rounded.double() - ref).abs()
    if case.entry == "kvcache":
        max_floor = KVCACHE_ATOL + rounding.max().item()
    else:  # twice the rounding of values near 0.3, as in FlashAttention's tests
        max_floor = 2 * (rounded + 0.3 - 0.3 - rounded).abs().max().item()
        max_floor = max(max_floor, rounding.max().item())
    luck = min(1.0, (LUCKY_ROWS / ref.shape[0]) ** 0.5)
    mean_floor = rounding.mean().item() * luck
    if dtype == torch.float32:
        mean_floor += FLOAT32_EXP2 * ref.abs().mean().item()
        max_floor += FLOAT32_EXP2 * ref.abs().max().item() * luck
        scored = case.head_dim
        if case.qv:
            scored = case.head_dim_v + (0 if case.only_qv else case.head_dim)
        scale = scored**-0.5 if case.softmax_scale is None else abs(case.softmax_scale)
        size = case.softcap / 4 if case.softcap > 0 else 1.0
        in_scores = FLOAT32_SUM * scored * scale * size
        in_values = FLOAT32_SUM * max(case.keys) ** 0.5
        row_size = ref.square().mean(-1).sqrt()
        max_floor += in_scores * ref.abs().max().item() + in_values * row_size.max().item()
        mean = in_scores * ref.abs().mean().item() + in_values * row_size.mean().item()
        mean_floor += mean / LARGEST_OF_MANY
    return max_floor, mean_floor


def judge(
    case: Case, result: Result, truth: Truth, limits: Limits
) -> tuple[Measures, tuple[str, ...]]:
    """Measure a result and list everything that is wrong with it; an empty list is agreement."""
    problems = _form(case, result, truth)
    if problems:
        return Measures(), problems
    measures, problems = _judge_out(case, result.out, truth, limits)
    if result.lse is not None:
        lse_error, lse_problems = _judge_lse(result.lse, truth.lse, limits)
        measures = replace(measures, lse_error=lse_error)
        problems += lse_problems
    if result.caches is not None and truth.appended is not None:
        slack = _rotation_error(case, truth.appended.k)
        key_error, cache_problems = judge_caches(
            result.caches, truth.appended, slack, limits.hidden_keys_may_be_missing
        )
        measures = replace(measures, key_error=key_error)
        problems += cache_problems
    return measures, problems


def judge_pair(
    case: Case, one: Result, other: Result, truth: Truth, slack: Tensor | None = None
) -> tuple[str, ...]:
    """What is wrong with two results that may differ by rounding alone; none has padding.

    Each may be one budget off from the exact result, so they may be two budgets apart. `slack`
    is added to that for every number of the result.
    """
    assert one.lse is not None, "pairs are compared with their lse"
    assert other.lse is not None, "pairs are compared with their lse"
    limits = Limits.of(case)
    allowed = (truth.baseline - truth.out).abs()
    max_floor, mean_floor = _floors(case, truth.out)
    error = (one.out.double() - other.out.double()).abs()
    slack = torch.zeros_like(error) if slack is None else slack
    problems = []
    for name, found, budget in (
        ("max", error.max(), limits.max_mult * allowed.max() + max_floor + slack.max() / 2),
        ("mean", error.mean(), limits.mean_mult * allowed.mean() + mean_floor + slack.mean() / 2),
    ):
        if not found <= 2 * budget:  # also where it is NaN
            problems.append(f"{name} difference {found.item():.3e} > 2 x {budget.item():.3e}")
    if one.lse.isnan().any():
        problems.append("lse is NaN")
    twice = replace(limits, lse_atol=2 * limits.lse_atol)
    return (*problems, *_judge_lse(other.lse, one.lse.double(), twice)[1])


def merging_slack(parts: Sequence[Tensor], merged: Tensor) -> Tensor:
    """By how much merging results that were rounded to their dtype may be off from one result.

    The weights of the parts add up to 1 at most, and each part, and then the merged result, is
    rounded by half a unit: of the largest of them, however they are weighted.
    """
    half = torch.finfo(merged.dtype).eps / 2
    largest = torch.stack([part.double().abs() for part in parts]).amax(0)
    return half * (largest + merged.double().abs())


def _form(case: Case, result: Result, truth: Truth) -> tuple[str, ...]:
    """Shapes and dtypes, before any value is looked at."""
    problems = []
    if result.out.shape != truth.out.shape:
        problems.append(f"out has shape {tuple(result.out.shape)}, not {tuple(truth.out.shape)}")
    if result.out.dtype != getattr(torch, case.out_dtype):
        problems.append(f"out is {result.out.dtype}, not {case.out_dtype}")
    if case.lse and result.lse is None:
        problems.append("no lse although it was asked for")
    if result.lse is not None:
        if result.lse.shape != truth.lse.shape:
            shapes = f"{tuple(result.lse.shape)}, not {tuple(truth.lse.shape)}"
            problems.append(f"lse has shape {shapes}")
        if result.lse.dtype != torch.float32:
            problems.append(f"lse is {result.lse.dtype}, not float32")
    return tuple(problems)


def _judge_out(
    case: Case, out: Tensor, truth: Truth, limits: Limits
) -> tuple[Measures, tuple[str, ...]]:
    problems = []
    real = ~truth.out[..., 0].isnan()  # (token, head) rows that belong to a query
    padding = out[~real]
    if case.out and not padding.isnan().all():
        problems.append("rows beyond the query lengths were written")
    if not real.any():
        return Measures(), tuple(problems)

    got, ref, baseline = out[real].double(), truth.out[real], truth.baseline[real]
    bad = ~got.isfinite()
    if bad.any():
        rows = bad.any(-1).nonzero().flatten().tolist()
        kind = "unwritten or NaN" if got.isnan().any() else "infinite"
        problems.append(
            f"out is {kind} in {len(rows)} of {len(got)} (token, head) rows, first {rows[:4]}"
        )
        return Measures(), tuple(problems)

    empty = (ref == 0).all(-1)
    if (got[empty] != 0).any():
        problems.append("out is not zero in a row that sees no key")

    error, allowed = (got - ref).abs(), (baseline - ref).abs()
    max_floor, mean_floor = _floors(case, ref)
    max_error, max_baseline = error.max().item(), allowed.max().item()
    mean_error, mean_baseline = error.mean().item(), allowed.mean().item()
    max_floor += limits.relative * ref.abs().max().item()
    mean_floor += limits.relative * ref.abs().mean().item()
    max_budget = limits.max_mult * max_baseline + max_floor
    mean_budget = limits.mean_mult * mean_baseline + mean_floor
    if max_error > max_budget:
        problems.append(
            f"max error {max_error:.3e} > {max_budget:.3e}"
            f" = {limits.max_mult:g} x {max_baseline:.3e} + {max_floor:.3e}"
        )
    if mean_error > mean_budget:
        problems.append(
            f"mean error {mean_error:.3e} > {mean_budget:.3e}"
            f" = {limits.mean_mult:g} x {mean_baseline:.3e} + {mean_floor:.3e}"
        )
    measures = Measures(
        max_error=max_error,
        max_budget=max_budget,
        max_ratio=_ratio(max_error, max_baseline),
        mean_ratio=_ratio(mean_error, mean_baseline),
    )
    return measures, tuple(problems)


def _ratio(error: float, baseline: float) -> float | None:
    """None where the baseline is exact: a ratio to nothing says nothing."""
    return error / baseline if baseline > 0 else None


def _judge_lse(lse: Tensor, truth: Tensor, limits: Limits) -> tuple[float | None, tuple[str, ...]]:
    real = ~truth.isnan()
    got, ref = lse[real].double(), truth[real]
    if got.isnan().any():
        return None, ("lse is unwritten or NaN",)
    problems = []
    wrong = got.isinf() != ref.isinf()
    wrong |= got.isinf() & ref.isinf() & (got != ref)
    for value in limits.empty_lse:
        wrong &= got != value
    if wrong.any():
        first = int(wrong.nonzero()[0])
        problems.append(
            f"lse is infinite in the wrong places: {int(wrong.sum())} of {len(got)},"
            f" first {got[first].item():g} for {ref[first].item():g}"
        )
    both = got.isfinite() & ref.isfinite()
    if not both.any():
        return None, tuple(problems)
    error = (got[both] - ref[both]).abs().max().item()
    if error > limits.lse_atol:
        problems.append(f"lse error {error:.3e} > {limits.lse_atol:.3e}")
    return error, tuple(problems)


def _rotation_error(case: Case, keys: Tensor) -> Tensor:
    """How far stored keys may be off; negative where the bits decide."""
    dtype = torch.finfo(keys.dtype)
    allowed = torch.full_like(keys, -1.0, dtype=torch.float64)
    turned = keys[..., : case.rotary_dim].double()
    if turned.numel():
        size = 2.0 ** (torch.frexp(turned).exponent.double() - 1)
        unit = dtype.eps * size.clamp(min=dtype.smallest_normal)
        largest = turned.abs().amax(-1, keepdim=True)
        allowed[..., : case.rotary_dim] = unit + FLOAT32_ROTATION * largest
    return allowed

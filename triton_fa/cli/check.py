"""`check`: does it work here? A few small calls against float64."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import click
import torch

import triton_fa
from triton_fa.cli import options
from triton_fa.device import runs_triton

HEADS_Q, HEADS_KV, DIM, PAGE = 8, 2, 64, 16
LSE_BUDGET = 1e-3
COMBINE_BUDGET = 32 * torch.finfo(torch.float32).eps
"""Parts are rounded to float32 once, then meet a few float32 steps."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where and how the calls run."""

    device: torch.device
    ver: str
    dtype: torch.dtype

    def randn(self, *shape: int) -> torch.Tensor:
        """The same numbers on every device."""
        rng = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=rng).to(self.device, self.dtype)

    def ints(self, *values: int) -> torch.Tensor:
        """An int32 tensor."""
        return torch.tensor(values, dtype=torch.int32, device=self.device)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One tensor of a result against float64."""

    what: str
    error: float
    budget: float

    @property
    def good(self) -> bool:
        """Not so for NaN."""
        return self.error <= self.budget


def judge(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of a sequence in float64: out (tokens, heads, dim), lse (heads, tokens)."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), *(t.double().repeat_interleave(group, 1) for t in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
    sees = torch.ones(scores.shape[1:], device=q.device).tril(k.shape[0] - q.shape[0]).bool()
    scores = scores.masked_fill(~sees, -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v), scores.logsumexp(-1)


def _compared(
    out: torch.Tensor, lse: torch.Tensor, want: tuple[torch.Tensor, torch.Tensor], v: torch.Tensor
) -> Iterator[Outcome]:
    # Weights and the result are rounded to the dtype once each, and no value exceeds |v|.
    budget = 2 * torch.finfo(v.dtype).eps * v.abs().max().item()
    yield Outcome("out", _distance(out, want[0]), budget)
    yield Outcome("lse", _distance(lse, want[1]), LSE_BUDGET)


def _distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return (got.double() - want.double()).abs().max().item()


def _decode(place: Place, append: bool = False) -> Iterator[Outcome]:
    """One query token of each sequence, keys in pages that lie anywhere."""
    lengths = (37, 5, 150)
    pages = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    table = pages.view(3, 10).to(place.device, torch.int32)
    kv = place.randn(2, 30, PAGE, HEADS_KV, DIM)
    k_cache, v_cache = kv.clone()
    q = place.randn(3, 1, HEADS_Q, DIM)
    new = place.randn(2, 3, 1, HEADS_KV, DIM).neg() if append else None
    out, lse = triton_fa.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k=None if new is None else new[0],
        v=None if new is None else new[1],
        cache_seqlens=place.ints(*lengths),
        page_table=table,
        causal=True,
        return_softmax_lse=True,
        ver=place.ver,
    )
    for seq, length in enumerate(lengths):
        k, v = (c[table[seq].long()].flatten(0, 1)[:length] for c in kv)
        if new is not None:
            k, v = torch.cat((k, new[0, seq])), torch.cat((v, new[1, seq]))
        yield from _compared(out[seq], lse[seq], judge(q[seq], k, v), kv[1])


def _append(place: Place) -> Iterator[Outcome]:
    return _decode(place, append=True)


def _prefill(place: Place) -> Iterator[Outcome]:
    """Sequences of different lengths, packed."""
    lengths = (3, 70, 33)
    ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    q = place.randn(ends[-1], HEADS_Q, DIM)
    k, v = place.randn(2, ends[-1], HEADS_KV, DIM)
    prefix = place.ints(*ends)
    out, lse = triton_fa.flash_attn_varlen_func(
        q,
        k,
        v,
        prefix,
        prefix,
        max(lengths),
        max(lengths),
        causal=True,
        return_softmax_lse=True,
        ver=place.ver,
    )
    for first, end in pairwise(ends):
        here = slice(first, end)
        yield from _compared(out[here], lse[:, here], judge(q[here], k[here], v[here]), v)


def _combine(place: Place) -> Iterator[Outcome]:
    """Three parts, one of them empty."""
    parts = place.randn(3, 5, HEADS_Q, DIM).float()
    sums = place.randn(3, 5, HEADS_Q).float()
    sums[1, 2:] = -torch.inf
    out, lse = triton_fa.flash_attn_combine(parts, sums)
    weights = sums.double().softmax(0).unsqueeze(-1)
    yield Outcome("out", _distance(out, (weights * parts.double()).sum(0)), COMBINE_BUDGET)
    yield Outcome("lse", _distance(lse, sums.double().logsumexp(0)), COMBINE_BUDGET)


CASES: dict[str, Callable[[Place], Iterator[Outcome]]] = {
    "decode": _decode,
    "append": _append,
    "prefill": _prefill,
    "combine": _combine,
}


@click.command("check")
@options.device(options.gpu_or_cpu)
def command(device: torch.device) -> None:
    """Compile and run a few small calls, and compare them with float64."""
    # The interpreter has no bfloat16 products.
    dtype = torch.float16 if device.type == "cpu" else torch.bfloat16
    place = Place(device, "triton" if runs_triton(device) else "torch", dtype)
    click.echo(f"ver={place.ver} on {device}")
    failed = []
    for name, case in CASES.items():
        begin = time.perf_counter()
        try:
            with triton_fa.strict(), torch.no_grad(), warnings.catch_warnings():
                # numpy's, in the interpreter: the logarithm of 0 is meant.
                warnings.simplefilter("ignore", RuntimeWarning)
                outcomes = list(case(place))
            bad = [o for o in outcomes if not o.good]
            reason = ", ".join(f"{o.what} is off by {o.error:.2g} > {o.budget:.2g}" for o in bad)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is the answer
            outcomes, reason = [], f"{type(error).__name__}: {error}"
        took = time.perf_counter() - begin
        worst = max((o.error / o.budget for o in outcomes), default=0.0)
        click.echo(f"{name:8} " + (reason or f"ok, {worst:.0%} of the allowed error, {took:.1f} s"))
        if reason:
            failed.append(f"{name}: {reason}")
    if failed:
        raise click.ClickException("; ".join(failed))

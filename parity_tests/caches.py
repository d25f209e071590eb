"""What an appending call may change of its caches: the new tokens' places, and nothing else."""

import math
from typing import NamedTuple

import torch

from parity_tests.layouts import bits

Tensor = torch.Tensor


class Appended(NamedTuple):
    """What an appending call has to store, and where."""

    slots: Tensor  # bool (pages, page_size), or (rows, seqlen) of dense caches
    k: Tensor  # (slots, heads_kv, head_dim), in the order of slots.nonzero()
    v: Tensor


class Caches(NamedTuple):
    """The caches after a call, and the same ones as they were before."""

    k: Tensor
    v: Tensor
    k_before: Tensor
    v_before: Tensor


def judge_caches(
    got: Caches, want: Appended, slack: Tensor, hidden_keys_may_be_missing: bool = False
) -> tuple[float | None, tuple[str, ...]]:
    """The largest error of a stored key, and what is wrong with the caches.

    New values are stored bit for bit, and new keys but for `slack` (of want.k's shape, negative
    where the bits decide). All other memory of the caches is as it was, poison included.
    """
    changed_k, changed_v = differ(got.k, got.k_before), differ(got.v, got.v_before)
    places, others = want.slots.nonzero(), ~want.slots
    stored_k, stored_v = at(got.k, want.slots), at(got.v, want.slots)
    error = (stored_k.double() - want.k.double()).abs()
    wrong_k = differ(stored_k, want.k) & ~(error <= slack)
    wrong_v = differ(stored_v, want.v)
    if hidden_keys_may_be_missing:
        stored = (changed_k.flatten(2).any(2) | changed_v.flatten(2).any(2))[want.slots]
        places, error, wrong_k, wrong_v = (x[stored] for x in (places, error, wrong_k, wrong_v))
    problems = [
        *_sentence("k_cache has a wrong new key in", wrong_k, places),
        *_sentence("v_cache has a wrong new value in", wrong_v, places),
        *_sentence("k_cache was overwritten in", changed_k[others], others.nonzero()),
        *_sentence("v_cache was overwritten in", changed_v[others], others.nonzero()),
    ]
    pairs = ((got.k, got.k_before), (got.v, got.v_before))
    memories = {id(_memory(now)): (_memory(now), _memory(before)) for now, before in pairs}
    anywhere = sum(int(differ(*pair).sum()) for pair in memories.values())
    if anywhere != int(changed_k.sum()) + int(changed_v.sum()):
        problems.append("memory beside k_cache and v_cache was written")
    largest = error.max().item() if error.numel() else math.nan
    return (largest if math.isfinite(largest) else None), tuple(problems)


def at(cache: Tensor, slots: Tensor) -> Tensor:
    """What a cache holds in these slots, (slots, heads_kv, head_dim)."""
    return bits(cache)[slots].view(cache.dtype)


def _sentence(what: str, wrong: Tensor, places: Tensor) -> list[str]:
    bad = places[wrong.flatten(1).any(1)]
    if len(bad) == 0:
        return []
    return [f"{what} {len(bad)} of {len(places)} slots, first {tuple(bad[0].tolist())}"]


def differ(x: Tensor, y: Tensor) -> Tensor:
    """Where the bits of two tensors of one dtype differ."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]
    return x.view(integer) != y.view(integer)


def _memory(tensor: Tensor) -> Tensor:
    """The tensor that this one is a view of."""
    return tensor if tensor._base is None else tensor._base

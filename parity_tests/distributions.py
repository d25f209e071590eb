"""How the errors of a run are spread: by backend, by feature, and of two backends side by side."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

from parity_tests import features
from parity_tests.runners import Outcome

QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
EDGES = (*(step / 8 for step in range(25)), float("inf"))  # of a histogram's bins: 0 to 3, and more
Row = dict[str, Any]


def _sizes(values: Iterable[float]) -> Any:
    """The values, a NaN as infinity: it is the largest error of all, and does not hide the rest."""
    found = np.asarray(list(values), dtype=float)
    return np.where(np.isnan(found), np.inf, found)


def of(values: Iterable[float]) -> Row:
    """Count and quantiles; each quantile is one of the values, the first that enough are below."""
    known = _sizes(values)
    quantiles = np.quantile(known, list(QUANTILES.values()), method="inverted_cdf")
    return {"count": len(known), **dict(zip(QUANTILES, quantiles.tolist(), strict=True))}


def distributions(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """Of every backend's largest errors over PyTorch's, and of distances between backends."""
    ratios: dict[str, list[float]] = defaultdict(list)
    by_feature: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    distances: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    of_case: dict[Any, dict[str, float]] = defaultdict(dict)
    for outcome in outcomes:
        ver, ratio = str(outcome.ver), outcome.measures.max_ratio
        for other, distance in outcome.distances.items():
            distances[f"{other} and {ver}"][outcome.case.out_dtype].append(distance)
        if ratio is None:
            continue
        ratios[ver].append(ratio)
        of_case[outcome.case][ver] = ratio
        for name in features.of(outcome.case):
            by_feature[ver][name].append(ratio)
    return {
        "edges": [edge for edge in EDGES if edge < float("inf")],
        "backends": {
            ver: of(values) | {"histogram": histogram(values)} for ver, values in ratios.items()
        },
        "features": {
            ver: {name: of(found[name]) for name in features.FEATURES if name in found}
            for ver, found in by_feature.items()
        },
        "beside": {
            peer: beside(pairs)
            for peer in ("3", "4")
            if (
                pairs := [
                    (r["triton"], r[peer]) for r in of_case.values() if {"triton", peer} <= {*r}
                ]
            )
        },
        "distances": {
            pair: {dtype: of(values) for dtype, values in found.items()}
            for pair, found in distances.items()
        },
    }


def histogram(values: Iterable[float]) -> list[int]:
    """How many values each bin of `EDGES` has; the last one has no end."""
    return np.histogram(_sizes(values), bins=EDGES)[0].tolist()


def beside(pairs: list[tuple[float, float]]) -> Row:
    """Triton's 99.9th percentile and a peer's, on the cases that both ran, and their quotient."""
    triton, peer = (of(values)["p99.9"] for values in zip(*pairs, strict=True))
    quotient = triton / peer if peer > 0 else None
    return {"count": len(pairs), "triton": triton, "peer": peer, "quotient": quotient}

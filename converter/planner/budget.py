"""Uneven shares of the budget: one common price for all layers.

A layer's candidates are the ranks of L, each with its cost and its predicted effect on the network's
output: with Ω the output metric and C the covariance of the response, keeping the r leading
eigenvectors of Ω^½ C Ω^½ leaves the rest of its trace as the relative squared error of the output.

At one common price λ each layer takes the candidate of least effect + λ · cost: no layer can then give
up a multiply-accumulate more cheaply than another. λ is bisected until the whole meets the budget. (A
common level of weighted error that does not look at the cost did worse: `docs/adr/0003`.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from converter.config import Budget
from converter.errors import ConfigError

__all__ = ["Candidates", "choose", "effects_of_rank"]

_BISECTIONS = 100


@dataclass(frozen=True, eq=False)
class Candidates:
    """What one layer may become.

    Attributes
    ----------
    name : str
    ranks : ndarray of shape (k,), int64
        Ascending; every one is cheaper than the layer as it is.
    effects : ndarray of shape (k,), float64
        Predicted relative squared error of the network's output.
    macs, params : ndarray of shape (k,), float64
        Cost of each, for one sample.
    macs_kept, params_kept : float
        Cost of the layer as it is.
    """

    name: str
    ranks: NDArray[np.int64]
    effects: NDArray[np.float64]
    macs: NDArray[np.float64]
    params: NDArray[np.float64]
    macs_kept: float
    params_kept: float


def effects_of_rank(
    covariance: NDArray[np.float64], metric: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Predict the output error that each rank of L leaves.

    Parameters
    ----------
    covariance : ndarray of shape (N, N)
        Of the layer's response, over patches.
    metric : ndarray of shape (N, N)
        Ω.

    Returns
    -------
    ndarray of shape (N + 1,)
        Entry r is the effect of rank r; the last is 0.
    """
    values, vectors = np.linalg.eigh(metric)
    root = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    kept = np.linalg.eigvalsh(root @ covariance @ root)[::-1].clip(min=0.0)
    tail = np.concatenate([np.cumsum(kept[::-1])[::-1], [0.0]])
    return np.asarray(tail, dtype=np.float64)


def choose(
    layers: Sequence[Candidates], budget: Budget, macs_before: float, params_before: float
) -> dict[str, int | None]:
    """Choose a rank for each layer, or None to keep it, so that the whole network meets the budget.

    Parameters
    ----------
    layers : sequence of Candidates
    budget : Budget
    macs_before, params_before : float
        Of the whole network, the parts that cannot be converted too.

    Raises
    ------
    ConfigError
        Where even the smallest candidates cost more; it says what can be reached.
    """
    limits = {}
    if budget.macs is not None:
        limits["macs"] = macs_before / budget.macs
    if budget.params is not None:
        limits["params"] = params_before / budget.params
    totals = {"macs": macs_before, "params": params_before}
    _check_reach(layers, limits, totals)

    def plan(prices: Mapping[str, float]) -> dict[str, int | None]:
        return {layer.name: _cheapest(layer, prices, totals) for layer in layers}

    def excess(ranks: Mapping[str, int | None], unit: str) -> float:
        return _total(layers, ranks, unit, totals[unit]) - limits[unit]

    prices = dict.fromkeys(limits, 0.0)

    def excess_at(unit: str, price: float) -> float:
        return excess(plan({**prices, unit: price}), unit)

    for _ in range(4 if len(limits) == 2 else 1):  # two prices settle by turns
        for unit in limits:
            prices[unit] = _bisect(partial(excess_at, unit))
    ranks = plan(prices)
    while any(excess(ranks, unit) > 1e-6 * limits[unit] for unit in limits):
        prices = {unit: price * 1.05 + 1e-12 for unit, price in prices.items()}
        ranks = plan(prices)
    return ranks


def _bisect(excess_at: Callable[[float], float]) -> float:
    """Least price, on a log scale, at which nothing is in excess."""
    if excess_at(0.0) <= 0:
        return 0.0
    low, high = 1e-15, 1e9
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high)
        if excess_at(middle) > 0:
            low = middle
        else:
            high = middle
    return high


def _cheapest(
    layer: Candidates, prices: Mapping[str, float], totals: Mapping[str, float]
) -> int | None:
    costs = {"macs": (layer.macs, layer.macs_kept), "params": (layer.params, layer.params_kept)}
    values = layer.effects.copy()
    kept = 0.0
    for unit, price in prices.items():
        values += price * costs[unit][0] / totals[unit]
        kept += price * costs[unit][1] / totals[unit]
    if not len(values) or kept <= values.min():
        return None
    return int(layer.ranks[int(values.argmin())])


def _cost(layer: Candidates, rank: int | None, unit: str) -> float:
    costs, kept = (
        (layer.macs, layer.macs_kept) if unit == "macs" else (layer.params, layer.params_kept)
    )
    return kept if rank is None else float(costs[int(np.searchsorted(layer.ranks, rank))])


def _total(
    layers: Sequence[Candidates], ranks: Mapping[str, int | None], unit: str, before: float
) -> float:
    kept = sum(_cost(layer, None, unit) for layer in layers)
    return before - kept + sum(_cost(layer, ranks[layer.name], unit) for layer in layers)


def _check_reach(
    layers: Sequence[Candidates], limits: Mapping[str, float], totals: Mapping[str, float]
) -> None:
    smallest = {layer.name: int(layer.ranks[0]) if len(layer.ranks) else None for layer in layers}
    for unit, limit in limits.items():
        least = _total(layers, smallest, unit, totals[unit])
        if least > limit:
            reach = math.floor(totals[unit] / least * 100) / 100
            raise ConfigError(
                f"the budget --{unit} {totals[unit] / limit:g} is out of reach for this model: with every "
                f"layer at its smallest it is {reach:g}; ask for less"
            )

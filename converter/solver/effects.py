"""What forms of a layer would do to the network's output, predicted from patches of the original."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from converter.solver.parts import Parts, Support, strongest
from converter.solver.problem import metric_roots
from converter.solver.quadratic import Factors, Groups, Quadratic, Second, alternate, damped

__all__ = ["Moments", "effects_of_shared", "effects_of_sparse"]

NEGLIGIBLE = 1e-6
"""Effect, as a share of the variance of the network's output, below which nothing is won any more."""


@dataclass(frozen=True)
class Moments:
    """What the forms of a layer are predicted from: patches that the original delivers.

    Attributes
    ----------
    gram : Tensor of shape (D, D), float32
        Their covariance, not damped.
    unseen : Tensor of shape (m, D), float32
        Patches of images that `gram` has not seen, less the mean patch; none where there are fewer than
        eight images.
    taps : int
        Kernel taps of one input channel.
    """

    gram: Tensor
    unseen: Tensor
    taps: int


def effects_of_shared(
    moments: Moments,
    weight: Tensor,
    metric: Tensor,
    groups: Groups,
    ranks: Sequence[tuple[int, ...]],
    support: int = 0,
) -> list[float]:
    """Predict what forms with a shared first factor do to the network's output.

    Parameters
    ----------
    moments : Moments
    weight : Tensor of shape (N, D), float32
    metric : Tensor of shape (N, N), float64
        Ω of the response.
    groups : Groups
    ranks : sequence of tuple of int
        (r,), or (r₁, r₂); those with the same first rank cost one fit.
    support : int, default 0
        Channels of S beside L.

    Returns
    -------
    list of float
        For each of `ranks`: relative squared error of the network's output, on the unseen patches,
        of a linear fit, at the level that the layer's response has on all patches; the activation is not
        seen.
    """
    half, inverse_half = metric_roots(metric, weight)
    gram = damped(moments.gram.clone())
    quadratic = groups.quadratic(gram, half, inverse_half)
    dense = weight @ gram
    cross = quadratic.grouped(dense)
    basis = quadratic.start(weight, max(each[0] for each in ranks))
    level, wanted = _level(moments, weight, metric), moments.unseen @ weight.T
    found: dict[tuple[int, ...], float] = {}
    least = math.inf
    for rank in sorted({each[0] for each in ranks}):
        limits: list[int | None] = [
            *sorted(each[1] for each in set(ranks) if each[0] == rank and len(each) > 1)
        ]
        middle = limits[len(limits) // 2] if limits else None
        second = _predicted(quadratic, cross, basis[:rank], middle)
        for limit in limits or [None]:
            factors = second.factors(limit)
            parts = Parts(factors)
            if support:
                parts = _beside(quadratic, dense, weight, factors, limit, gram, moments, support)
            key = (rank,) if limit is None else (rank, limit)
            found[key] = level * _left(moments, wanted, weight, parts, groups, metric)
        least = min(found.values())
        if least < NEGLIGIBLE:
            break
    # where a rank leaves next to nothing, larger ones are not fitted: they would only cost more
    return [found.get(each, least) for each in ranks]


def _predicted(quadratic: Quadratic, cross: Tensor, first: Tensor, limit: int | None) -> Second:
    """Alternate as little as is enough to tell forms apart."""
    steps, conjugate = quadratic.predicted_steps, quadratic.predicted_conjugate
    return alternate(quadratic, cross, first, steps, limit, conjugate)


def effects_of_sparse(
    moments: Moments, weight: Tensor, metric: Tensor, supports: Sequence[int]
) -> list[float]:
    """Predict what S alone, on so many channels, does to the network's output.

    Parameters
    ----------
    moments, weight, metric
        As for `effects_of_shared`.
    supports : sequence of int
        Channels that S keeps, each from 1.

    Returns
    -------
    list of float
        Relative squared error of the network's output for each.
    """
    half, _ = metric_roots(metric, weight)
    gram = damped(moments.gram.clone())
    dense = weight @ gram
    level, effects = _level(moments, weight, metric), []
    for support in supports:
        kept = Support(gram, moments.taps, strongest(weight, gram, half, moments.taps, support))
        missed = weight.clone()
        missed[:, kept.columns] -= kept.step(dense)
        effects.append(level * _effect(moments, missed, metric))
    return effects


def _beside(
    quadratic: Quadratic,
    dense: Tensor,
    weight: Tensor,
    alone: Factors,
    limit: int | None,
    gram: Tensor,
    moments: Moments,
    support: int,
) -> Parts:
    """Give S on the channels that an L that stands alone misses most of, and the L beside it."""
    missed = weight - alone.weight(quadratic.groups)
    chosen = strongest(missed, gram, quadratic.half, moments.taps, support)
    kept = Support(gram, moments.taps, chosen)
    beside = quadratic.within(kept.beside(gram))
    start = beside.start(weight, len(alone.first))
    cross = beside.grouped(kept.unreached(dense))
    low = _predicted(beside, cross, start, limit).factors(limit)
    return Parts(low, kept, kept.step(dense, low.weight(beside.groups)))


def _level(moments: Moments, weight: Tensor, metric: Tensor) -> float:
    """Say how many times stronger the response is on the patches of the fit than on the unseen ones.

    Some images answer much louder than others, and the unseen ones are few: errors are taken relative to
    what the layer answers there (a ratio estimate), so that forms that are predicted otherwise compare.
    """
    unseen = _effect(moments, weight, metric)
    everywhere = _effect(Moments(moments.gram, moments.unseen[:0], moments.taps), weight, metric)
    return everywhere / unseen if unseen > 0 and everywhere > 0 else 1.0


def _left(
    moments: Moments,
    wanted: Tensor,
    weight: Tensor,
    parts: Parts,
    groups: Groups,
    metric: Tensor,
) -> float:
    """`_effect` of what parts leave of a weight that answers `wanted` (m, N) to the unseen patches."""
    if not len(moments.unseen):
        return _effect(moments, weight - parts.weight(groups), metric)
    return _mean_square(wanted - parts.of(moments.unseen, groups), metric)


def _effect(moments: Moments, missed: Tensor, metric: Tensor) -> float:
    """Mean of ‖Ω^½ (W − Ŵ) x‖² over the unseen patches; over those of the fit where there are none."""
    if not len(moments.unseen):
        return float(((metric.to(missed.dtype) @ missed) * (missed @ moments.gram)).sum())
    return _mean_square(moments.unseen @ missed.T, metric)


def _mean_square(errors: Tensor, metric: Tensor) -> float:
    """Mean of ‖Ω^½ e‖² over errors (n, N)."""
    weighed = errors @ metric.to(errors.dtype)
    return float((weighed * errors).sum()) / len(errors)

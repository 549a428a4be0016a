"""Forms of a layer, sketched: fitted as little as tells what they would do to the network's output."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from converter.solver.factorize import directions, effects_of_rank
from converter.solver.parts import Parts, Support, strongest
from converter.solver.problem import metric_roots
from converter.solver.quadratic import Factors, Groups, Quadratic, Second, alternate, damped
from converter.solver.solution import Solution

__all__ = ["Moments", "Sketch", "sketches_of_rank", "sketches_of_shared", "sketches_of_sparse"]

NEGLIGIBLE = 1e-6
"""Effect, as a share of the variance of the network's output, below which nothing is won any more."""


@dataclass(frozen=True)
class Moments:
    """What the forms of a layer are predicted from: patches that the original delivers.

    Attributes
    ----------
    mean : Tensor of shape (D,), float32
        The mean patch.
    gram : Tensor of shape (D, D), float32
        Their covariance, not damped.
    unseen : Tensor of shape (m, D), float32
        Patches of images that `gram` has not seen, less the mean patch; none where there are fewer than
        eight images.
    taps : int
        Kernel taps of one input channel.
    """

    mean: Tensor
    gram: Tensor
    unseen: Tensor
    taps: int


@dataclass(frozen=True, eq=False)
class Sketch:
    """A form, fitted linearly and roughly on patches of the original.

    Attributes
    ----------
    effect : float
        Relative squared error of the network's output that is predicted of it.
    solution : callable or None
        Makes what would stand in the place of the layer; None where another rank left next to nothing,
        so that this one was not fitted.
    """

    effect: float
    solution: Callable[[], Solution] | None


def sketches_of_rank(
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    covariance: Tensor,
    metric: Tensor,
    ranks: Sequence[int],
) -> list[Sketch]:
    """Sketch L of `channel`, in closed form: the leading directions of the weighed response.

    Parameters
    ----------
    weight : Tensor of shape (N, D), float32
    bias : Tensor of shape (N,), float32
    mean, covariance : Tensor of shape (N,) and (N, N), float64
        Of the layer's response.
    metric : Tensor of shape (N, N), float64
        Ω of the response.
    ranks : sequence of int

    Returns
    -------
    list of Sketch
        For each of `ranks`.
    """
    tail = effects_of_rank(covariance, metric)
    # few of the sketches are ever looked at
    leading = cache(partial(directions, covariance, metric))

    def solution(rank: int) -> Solution:
        up = leading()[:, :rank]
        into, up = (up.T @ metric).to(weight.dtype), up.to(weight.dtype)
        answered = mean.to(bias.dtype)
        return _solution((into @ weight, up), answered - up @ (into @ (answered - bias)))

    return [Sketch(float(tail[rank]), partial(solution, rank)) for rank in ranks]


def sketches_of_shared(
    moments: Moments,
    weight: Tensor,
    bias: Tensor,
    metric: Tensor,
    groups: Groups,
    ranks: Sequence[tuple[int, ...]],
    support: int = 0,
) -> list[Sketch]:
    """Sketch forms with a shared first factor.

    Parameters
    ----------
    moments : Moments
    weight, bias : Tensor of shape (N, D) and (N,), float32
    metric : Tensor of shape (N, N), float64
        Ω of the response.
    groups : Groups
    ranks : sequence of tuple of int
        (r,), or (r₁, r₂); those with the same first rank cost one fit.
    support : int, default 0
        Channels of S beside L.

    Returns
    -------
    list of Sketch
        For each of `ranks`; its effect is that of a linear fit on the unseen patches, at the level that the
        layer's response has on all patches. The activation is not seen.
    """
    half, inverse_half = metric_roots(metric, weight)
    gram = damped(moments.gram.clone())
    quadratic = groups.quadratic(gram, half, inverse_half)
    dense = weight @ gram
    cross = quadratic.grouped(dense)
    basis = quadratic.start(weight, max(each[0] for each in ranks))
    level, wanted = _level(moments, weight, metric), moments.unseen @ weight.T
    found: dict[tuple[int, ...], Sketch] = {}
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
            effect = level * _left(moments, wanted, weight, parts, groups, metric)
            found[key] = Sketch(effect, partial(_as_solution, parts, groups, moments, weight, bias))
            least = min(least, effect)
        if least < NEGLIGIBLE:
            break
    # where a rank leaves next to nothing, larger ones are not fitted: they would only cost more
    return [found.get(each, Sketch(least, None)) for each in ranks]


def _as_solution(
    parts: Parts, groups: Groups, moments: Moments, weight: Tensor, bias: Tensor
) -> Solution:
    answered = parts.of(moments.mean[None], groups)[0]
    factors, kept, sparse = parts.factors.chain(), parts.kept, parts.sparse
    return _solution(factors, bias + weight @ moments.mean - answered, kept, sparse)


def _solution(
    factors: tuple[Tensor, ...],
    bias: Tensor,
    kept: Support | None = None,
    sparse: Tensor | None = None,
) -> Solution:
    """Of a sketch, whose errors nobody asks for."""
    nothing = torch.zeros(0, dtype=torch.int64, device=bias.device)
    return Solution(
        support=nothing if kept is None else kept.channels,
        sparse=bias.new_zeros(len(bias), 0) if sparse is None else sparse,
        factors=factors,
        bias=bias,
        fitted=0.0,
        unseen=0.0,
        status="closed form",
    )


def _predicted(quadratic: Quadratic, cross: Tensor, first: Tensor, limit: int | None) -> Second:
    """Alternate as little as is enough to tell forms apart."""
    steps, conjugate = quadratic.predicted_steps, quadratic.predicted_conjugate
    return alternate(quadratic, cross, first, steps, limit, conjugate)


def sketches_of_sparse(
    moments: Moments, weight: Tensor, bias: Tensor, metric: Tensor, supports: Sequence[int]
) -> list[Sketch]:
    """Sketch S alone, on so many channels.

    Parameters
    ----------
    moments, weight, bias, metric
        As for `sketches_of_shared`.
    supports : sequence of int
        Channels that S keeps, each from 1.

    Returns
    -------
    list of Sketch
        For each of `supports`.
    """
    half, _ = metric_roots(metric, weight)
    gram = damped(moments.gram.clone())
    dense = weight @ gram
    level, sketches = _level(moments, weight, metric), []
    for support in supports:
        kept = Support(gram, moments.taps, strongest(weight, gram, half, moments.taps, support))
        sparse, missed = kept.step(dense), weight.clone()
        missed[:, kept.columns] -= sparse
        gained = bias + missed @ moments.mean
        solution = partial(_solution, _no_factors(weight), gained, kept, sparse)
        sketches.append(Sketch(level * _effect(moments, missed, metric), solution))
    return sketches


def _no_factors(weight: Tensor) -> tuple[Tensor, Tensor]:
    """L of rank 0."""
    return weight[:0], weight.new_zeros(len(weight), 0)


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
    everywhere = _effect(replace(moments, unseen=moments.unseen[:0]), weight, metric)
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

"""What forms are predicted to do to the output, against direct sums over the patches."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from converter.errors import SolverError
from converter.solver.effects import Moments, effects_of_shared, effects_of_sparse
from converter.solver.problem import DAMPING, METRIC_FLOOR, metric_roots
from converter.solver.quadratic import Groups, Quadratic, alternate, covariance, damped
from tests.converter.solver.conftest import (
    CHANNELS,
    PATCHES,
    ROWS,
    SPATIAL,
    TAPS,
    TUCKER,
    WHOLE,
    WIDTH,
    dense_target,
    generator,
    positive,
    separable_beside,
)


def moments_of(weight: Tensor, seed: int = 6) -> tuple[Moments, Tensor]:
    """Moments of correlated patches, and a metric for the rows of `weight`."""
    mixing = torch.randn(WIDTH, WIDTH, generator=generator(seed)) / 3 + torch.eye(WIDTH)
    patches = torch.randn(PATCHES, WIDTH, generator=generator(seed + 1)) @ mixing + 0.5
    mean = patches[:300].mean(0)
    gram = covariance(patches[:300], mean)
    return Moments(gram, patches[300:] - mean, TAPS), positive(len(weight), seed + 2)


def direct_effect(moments: Moments, metric: Tensor, missed: Tensor, weight: Tensor) -> float:
    """tr Ω Δ C Δᵀ with the second moment C of the unseen patches, times tr Ω W G Wᵀ / tr Ω W C Wᵀ."""
    unseen, weight = moments.unseen.double(), weight.double()
    second = unseen.T @ unseen / len(unseen)

    def squares(matrix: Tensor, moment: Tensor) -> float:
        return float(torch.trace(metric @ matrix @ moment @ matrix.T))

    level = squares(weight, moments.gram.double()) / squares(weight, second)
    return level * squares(missed, second)


@pytest.mark.parametrize(
    ("groups", "ranks"),
    [(SPATIAL, ((1,), (4,), (2,))), (TUCKER, ((3, 4), (1, 2), (3, 2))), (WHOLE, ((2,), (5,)))],
    ids=["spatial", "tucker", "whole"],
)
def test_effects_are_those_of_the_fits(groups: Groups, ranks: tuple[tuple[int, ...], ...]) -> None:
    weight = dense_target().float()
    moments, metric = moments_of(weight)
    found = effects_of_shared(moments, weight, metric, groups, ranks)
    half, inverse_half = metric_roots(metric, weight)
    gram = damped(moments.gram.clone())
    quadratic = Quadratic(gram, half, inverse_half, groups)
    for each, effect in zip(ranks, found, strict=True):
        limits = sorted(other[1] for other in ranks if other[0] == each[0] and len(other) > 1)
        limit = each[1] if limits else None
        middle = limits[len(limits) // 2] if limits else None
        first = quadratic.start(weight, each[0])
        second = alternate(
            quadratic,
            quadratic.grouped(weight @ gram),
            first,
            Quadratic.predicted_steps,
            middle,
            Quadratic.predicted_conjugate,
        )
        missed = (weight - second.factors(limit).weight(groups)).double()
        assert effect == pytest.approx(direct_effect(moments, metric, missed, weight), rel=1e-3)


def test_effects_do_not_depend_on_how_loud_the_unseen_images_are() -> None:
    weight = dense_target().float()
    moments, metric = moments_of(weight)
    louder = dataclasses.replace(moments, unseen=5 * moments.unseen)
    for support in (0, 1):
        one, two = (
            effects_of_shared(each, weight, metric, SPATIAL, [(2,), (4,)], support)
            for each in (moments, louder)
        )
        assert one == pytest.approx(two, rel=1e-4)
    one, two = (effects_of_sparse(each, weight, metric, [1, 3]) for each in (moments, louder))
    assert one == pytest.approx(two, rel=1e-4)


def test_predicting_leaves_the_moments_as_they_were() -> None:
    weight = dense_target().float()
    moments, metric = moments_of(weight)
    gram = moments.gram.clone()
    effects_of_shared(moments, weight, metric, SPATIAL, [(2,)], support=1)
    effects_of_sparse(moments, weight, metric, [1])
    assert torch.equal(moments.gram, gram)


def test_a_sparse_branch_beside_lowers_the_effect_and_all_channels_leave_none() -> None:
    weight = dense_target().float()
    moments, metric = moments_of(weight)
    effects = [
        effects_of_shared(moments, weight, metric, SPATIAL, [(2,)], support)[0]
        for support in range(CHANNELS + 1)
    ]
    for fewer, more in pairwise(effects):
        assert more < fewer
    assert effects[-1] < 1e-6 * effects[0]


def test_the_channel_beside_which_the_rest_is_separable_is_found() -> None:
    weight = separable_beside(2)
    moments, metric = moments_of(weight)
    (alone,) = effects_of_shared(moments, weight, metric, SPATIAL, [(2,)])
    (beside,) = effects_of_shared(moments, weight, metric, SPATIAL, [(2,)], support=1)
    assert beside < 0.01 * alone


def test_effects_of_sparse_regress_on_the_strongest_channels() -> None:
    weight = dense_target().float()
    moments, metric = moments_of(weight)
    found = effects_of_sparse(moments, weight, metric, [1, 3])
    w, gram = weight.double().numpy(), moments.gram.double().numpy()
    gram += DAMPING * np.mean(np.diag(gram)) * np.eye(WIDTH)
    omega = metric.numpy() / np.mean(np.diag(metric.numpy())) + METRIC_FLOOR * np.eye(ROWS)
    strength = []
    for channel in range(CHANNELS):
        own = slice(channel * TAPS, (channel + 1) * TAPS)
        strength.append(np.trace(omega @ w[:, own] @ gram[own, own] @ w[:, own].T))
    for support, effect in zip((1, 3), found, strict=True):
        kept = np.sort(np.argsort(strength)[-support:])
        columns = (kept[:, None] * TAPS + np.arange(TAPS)).reshape(-1)
        missed = w.copy()
        missed[:, columns] -= w @ gram[:, columns] @ np.linalg.inv(gram[np.ix_(columns, columns)])
        expected = direct_effect(moments, metric, torch.from_numpy(missed), weight)
        assert effect == pytest.approx(expected, rel=1e-3)


def test_moments_that_are_not_finite_are_refused() -> None:
    weight = dense_target().float()
    moments, metric = moments_of(weight)
    bad = dataclasses.replace(moments, gram=moments.gram + float("nan"))
    with pytest.raises(SolverError, match="not finite"):
        effects_of_shared(bad, weight, metric, SPATIAL, [(2,)])
    with pytest.raises(SolverError, match="not finite"):
        effects_of_sparse(bad, weight, metric, [1])

"""What forms are predicted to do to the output, against direct sums over the patches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from converter.errors import SolverError
from converter.solver.depthwise import Filters
from converter.solver.effects import (
    Moments,
    Sketch,
    sketches_of_rank,
    sketches_of_shared,
    sketches_of_sparse,
)
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
    return Moments(mean, gram, patches[300:] - mean, TAPS), positive(len(weight), seed + 2)


def effects_of_shared(
    moments: Moments,
    weight: Tensor,
    metric: Tensor,
    groups: Groups,
    ranks: Sequence[tuple[int, ...]],
    support: int = 0,
) -> list[float]:
    bias = torch.zeros(len(weight))
    made = sketches_of_shared(moments, weight, bias, metric, groups, ranks, support)
    return [each.effect for each in made]


def effects_of_sparse(
    moments: Moments, weight: Tensor, metric: Tensor, supports: Sequence[int]
) -> list[float]:
    bias = torch.zeros(len(weight))
    made = sketches_of_sparse(moments, weight, bias, metric, supports)
    return [each.effect for each in made]


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


# ---- What a sketch would put in the place of the layer

BIAS = torch.linspace(-1, 1, ROWS)


def answer(sketch: Sketch, patches: Tensor, groups: Groups | None) -> Tensor:
    """What the solution of a sketch answers to patches (n, D), its factors multiplied out by the patch."""
    assert sketch.solution is not None
    solution = sketch.solution()
    response = solution.bias.expand(len(patches), -1).clone()
    if solution.rank and groups is not None:
        for group, columns in enumerate(groups.columns):
            inner = patches[:, columns] @ solution.factors[0].T
            second = solution.factors[1]
            if isinstance(groups, Filters):  # one filter for each of the repeated channels
                inner = inner.repeat(1, groups.each) * second[:, group]
            else:
                inner = inner @ second[:, group].T
            for factor in solution.factors[2:]:
                inner = inner @ factor.T
            response += inner
    elif solution.rank:
        response += patches @ solution.down.T @ solution.up.T
    columns = (solution.support[:, None] * TAPS + torch.arange(TAPS)).flatten()
    return response + patches[:, columns] @ solution.sparse.T


@pytest.mark.parametrize(
    ("groups", "ranks", "support"),
    [
        (SPATIAL, (2,), 0),
        (SPATIAL, (2,), 2),
        (TUCKER, (3, 2), 0),
        (Filters(torch.arange(WIDTH).view(CHANNELS, TAPS).T.contiguous(), 2), (3,), 0),
        (None, (2,), 0),
        (None, (), 2),
    ],
    ids=["spatial", "spatial beside", "tucker", "depthwise", "channel", "sparse"],
)
def test_a_sketch_answers_as_predicted_and_right_on_the_mean(
    groups: Groups | None, ranks: tuple[int, ...], support: int
) -> None:
    """Its error on the unseen patches is the predicted effect, and none on the mean patch."""
    weight = dense_target().float()
    moments, metric = moments_of(weight)
    if groups is not None:
        (sketch,) = sketches_of_shared(moments, weight, BIAS, metric, groups, [ranks], support)
    elif support:
        (sketch,) = sketches_of_sparse(moments, weight, BIAS, metric, [support])
    else:
        mean = (weight @ moments.mean + BIAS).double()
        covariance_ = (weight @ moments.gram @ weight.T).double()
        (sketch,) = sketches_of_rank(weight, BIAS, mean, covariance_, metric, [ranks[0]])
    mean = moments.mean[None]
    right = mean @ weight.T + BIAS
    torch.testing.assert_close(answer(sketch, mean, groups), right, rtol=1e-4, atol=1e-4)
    if groups is None and not support:  # predicted in closed form, from the response of all patches
        root = torch.linalg.cholesky(moments.gram.double()).float()
        patches = mean + root.T * WIDTH**0.5
    else:
        patches = mean + moments.unseen
    missed = (answer(sketch, patches, groups) - patches @ weight.T - BIAS).double()
    found = float(((missed @ metric) * missed).sum()) / len(patches)
    if groups is not None or support:
        unseen = moments.unseen.double() @ weight.double().T
        here = float(((unseen @ metric) * unseen).sum()) / len(unseen)
        gram = weight.double() @ moments.gram.double() @ weight.double().T
        found *= float((metric * gram).sum()) / here
    assert sketch.effect == pytest.approx(found, rel=2e-3)


def test_ranks_after_one_that_leaves_nothing_are_not_fitted() -> None:
    weight = dense_target().float()
    moments, metric = moments_of(weight)
    made = sketches_of_shared(moments, weight, BIAS, 1e-9 * metric, SPATIAL, [(2,), (4,)])
    assert [each.solution is None for each in made] == [False, True]
    assert made[0].effect == made[1].effect


def test_moments_that_are_not_finite_are_refused() -> None:
    weight = dense_target().float()
    moments, metric = moments_of(weight)
    bad = dataclasses.replace(moments, gram=moments.gram + float("nan"))
    with pytest.raises(SolverError, match="not finite"):
        effects_of_shared(bad, weight, metric, SPATIAL, [(2,)])
    with pytest.raises(SolverError, match="not finite"):
        effects_of_sparse(bad, weight, metric, [1])

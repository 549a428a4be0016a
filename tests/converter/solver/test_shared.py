"""Fits through the activation with a shared first factor, on planted layers."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from converter.errors import SolverError
from converter.solver.problem import METRIC_FLOOR, Problem, damping
from converter.solver.prox import activate
from converter.solver.quadratic import Factors, Groups, Quadratic, alternate, covariance, damped
from converter.solver.shared import polish_shared
from converter.solver.solution import Solution
from passes.activation import IDENTITY, Activation
from tests.converter.solver.conftest import (
    CHANNELS,
    HIGH,
    PATCHES,
    ROWS,
    SPATIAL,
    TAPS,
    TUCKER,
    WIDTH,
    dense_target,
    generator,
    positive,
    separable,
    separable_beside,
    tucker,
)

RELU = Activation("relu")


def layer(weight: Tensor, seed: int = 0, *, noise: float = 0.0, **changes: Any) -> Problem:
    """Correlated patches; with `noise` the features are not what the original saw."""
    random = generator(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=random) / 3 + torch.eye(WIDTH)
    patches = torch.randn(PATCHES, WIDTH, generator=random) @ mixing + 0.5
    bias = torch.randn(ROWS, generator=random)
    built = Problem(
        weight=weight,
        bias=bias,
        channels=CHANNELS,
        features=patches + noise * torch.randn(patches.shape, generator=random),
        basis=None,
        eligible=torch.arange(CHANNELS),
        target=patches @ weight.T + bias,
        offset=None,
        unseen=torch.arange(PATCHES) % 4 == 3,
        activation=RELU,
        metric=positive(ROWS, 2),
    )
    return dataclasses.replace(built, **changes)


def damped_covariance(problem: Problem) -> Tensor:
    seen = problem.features[~problem.unseen]
    return damped(covariance(seen, seen.mean(0)), damping(WIDTH, len(seen)))


def dense(solution: Solution, groups: Groups) -> Tensor:
    """S + L as one matrix (N, D), from the factors as they are handed out."""
    first, *rest = solution.factors
    second = rest[0] if len(rest) == 1 else torch.einsum("qtr,nq->ntr", *rest)
    weight = Factors(first, second).weight(groups)
    blocks = weight.view(ROWS, CHANNELS, TAPS)
    blocks[:, solution.support] += solution.sparse.view(ROWS, -1, TAPS)
    return weight


def error_of(problem: Problem, solution: Solution, groups: Groups, rows: Tensor) -> float:
    """The relative error of the problem's text, from what would be deployed."""
    assert problem.metric is not None
    omega = problem.metric / problem.metric.diagonal().mean() + METRIC_FLOOR * torch.eye(ROWS)
    total = problem.features @ dense(solution, groups).T + solution.bias
    if problem.offset is not None:
        total = total + problem.offset
    wanted = activate(problem.activation, problem.target)
    missed = (activate(problem.activation, total) - wanted)[rows].double()
    seen = wanted[~problem.unseen].double()
    spread = seen - seen.mean(0)
    scale = float(((spread @ omega) * spread).sum()) / len(seen)
    return float(((missed @ omega) * missed).sum()) / len(missed) / scale


def assert_is_the_original(problem: Problem, solution: Solution, groups: Groups) -> None:
    scale = float(problem.weight.abs().max())
    # float32 factors behind a float64 fit
    torch.testing.assert_close(
        dense(solution, groups), problem.weight, rtol=1e-4, atol=1e-4 * scale
    )
    torch.testing.assert_close(solution.bias, problem.bias, rtol=1e-3, atol=1e-3 * scale)
    assert solution.unseen < 1e-8


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_separable_weight_is_recovered(seed: int) -> None:
    problem = layer(separable(2, seed), seed)
    assert_is_the_original(problem, polish_shared(problem, SPATIAL, (2,)), SPATIAL)


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_tucker_weight_is_recovered(seed: int) -> None:
    problem = layer(tucker(2, 3, seed), seed)
    assert_is_the_original(problem, polish_shared(problem, TUCKER, (2, 3)), TUCKER)


@pytest.mark.parametrize(
    ("groups", "ranks"), [(SPATIAL, (CHANNELS * HIGH,)), (TUCKER, (CHANNELS, ROWS))], ids=str
)
def test_full_ranks_are_the_original(groups: Groups, ranks: tuple[int, ...]) -> None:
    problem = layer(dense_target().float())
    assert_is_the_original(problem, polish_shared(problem, groups, ranks), groups)


@pytest.mark.parametrize(("rank", "true"), [(4, 1), (9, 1), (12, 2)])
def test_a_rank_above_that_of_the_weight_does_no_harm(rank: int, true: int) -> None:
    problem = layer(separable(true))
    assert polish_shared(problem, SPATIAL, (rank,)).unseen < 1e-8
    # over many steps round-off in rows of V that K does not see must not grow
    gram = damped_covariance(problem)
    quadratic = Quadratic(gram, torch.eye(ROWS), torch.eye(ROWS), SPATIAL)
    cross = quadratic.grouped(problem.weight @ gram)
    first = quadratic.start(problem.weight, rank)
    found = alternate(quadratic, cross, first, 30).factors().weight(SPATIAL)
    missed = torch.linalg.vector_norm(found - problem.weight)
    assert missed < 1e-4 * torch.linalg.vector_norm(problem.weight)


def test_a_dead_layer_is_fitted() -> None:
    problem = layer(torch.zeros(ROWS, WIDTH))
    for groups, ranks in ((SPATIAL, (2,)), (TUCKER, (2, 2))):
        solution = polish_shared(problem, groups, ranks, support=1)
        assert float(dense(solution, groups).abs().max()) < 1e-6
        torch.testing.assert_close(solution.bias, problem.bias, rtol=1e-4, atol=1e-5)


FORMS = pytest.mark.parametrize(
    ("groups", "ranks", "support"),
    [(SPATIAL, (3,), 0), (SPATIAL, (2,), 1), (TUCKER, (2, 3), 0), (TUCKER, (2, 2), 2)],
    ids=["spatial", "sparse + spatial", "tucker", "sparse + tucker"],
)


@FORMS
@pytest.mark.parametrize("activation", [RELU, Activation("silu"), IDENTITY], ids=str)
def test_the_errors_are_those_of_the_deployed_factors(
    groups: Groups, ranks: tuple[int, ...], support: int, activation: Activation
) -> None:
    problem = layer(dense_target().float(), noise=0.1, activation=activation)
    solution = polish_shared(problem, groups, ranks, support, rounds=3)
    assert solution.ranks == ranks
    assert len(solution.support) == support
    assert solution.support.tolist() == sorted(solution.support.tolist())
    assert solution.sparse.shape == (ROWS, support * TAPS)
    assert solution.status == "closed form"
    for found, rows in ((solution.unseen, problem.unseen), (solution.fitted, ~problem.unseen)):
        assert found == pytest.approx(error_of(problem, solution, groups, rows), rel=1e-3)


@FORMS
def test_rounds_through_the_activation_are_never_worse_than_the_linear_fit(
    groups: Groups, ranks: tuple[int, ...], support: int
) -> None:
    problem = layer(dense_target().float())
    for target in (problem.target, problem.target - 4):  # the second is mostly below zero
        shifted = dataclasses.replace(problem, target=target)
        errors = [
            polish_shared(shifted, groups, ranks, support, rounds).unseen
            for rounds in range(0, 9, 2)
        ]
        for before, after in pairwise(errors):
            assert after <= before * (1 + 1e-6)
    assert errors[-1] < 0.995 * errors[0]


@FORMS
def test_the_fit_beats_the_factors_of_the_weight_alone(
    groups: Groups, ranks: tuple[int, ...], support: int
) -> None:
    """On linear data: what the metric of data and output is for."""
    problem = layer(dense_target().float(), activation=IDENTITY)
    blind = Quadratic(torch.eye(WIDTH), torch.eye(ROWS), torch.eye(ROWS), groups)
    limit = ranks[1] if len(ranks) > 1 else None
    first = blind.start(problem.weight, ranks[0])
    factors = alternate(blind, blind.grouped(problem.weight), first, 30, limit).factors(limit)
    weight = factors.weight(groups)
    bias = (problem.target - problem.features @ weight.T)[~problem.unseen].mean(0)
    plain = Solution(
        support=torch.zeros(0, dtype=torch.int64),
        sparse=torch.zeros(ROWS, 0),
        factors=(factors.first, factors.second),
        bias=bias,
        fitted=0.0,
        unseen=0.0,
        status="closed form",
    )
    solution = polish_shared(problem, groups, ranks, support)
    assert solution.unseen < 0.9 * error_of(problem, plain, groups, problem.unseen)


def test_s_beside_l_finds_what_is_planted() -> None:
    problem = layer(separable_beside(2), activation=IDENTITY)
    solution = polish_shared(problem, SPATIAL, (2,), support=1)
    assert solution.support.tolist() == [2]
    assert solution.unseen < 1e-3 * polish_shared(problem, SPATIAL, (2,)).unseen


@FORMS
def test_s_beside_l_is_the_best_for_that_l(
    groups: Groups, ranks: tuple[int, ...], support: int
) -> None:
    problem = layer(dense_target().float(), activation=IDENTITY)
    solution = polish_shared(problem, groups, ranks, support, rounds=0)
    columns = (solution.support[:, None] * TAPS + torch.arange(TAPS)).flatten().numpy()
    gram = damped_covariance(problem).double().numpy()
    low = dense(dataclasses.replace(solution, sparse=torch.zeros_like(solution.sparse)), groups)
    left = (problem.weight - low).double().numpy()
    expected = left @ gram[:, columns] @ np.linalg.inv(gram[np.ix_(columns, columns)])
    np.testing.assert_allclose(solution.sparse.numpy(), expected, atol=2e-3)


def test_all_channels_in_s_are_the_original() -> None:
    problem = layer(dense_target().float())
    solution = polish_shared(problem, SPATIAL, (1,), support=CHANNELS)
    assert solution.support.tolist() == list(range(CHANNELS))
    assert_is_the_original(problem, solution, SPATIAL)


def test_factors_are_of_one_size() -> None:
    solution = polish_shared(layer(1e-3 * dense_target().float()), TUCKER, (2, 3))
    sizes = [float(each.square().mean().sqrt()) for each in solution.factors]
    assert max(sizes) == pytest.approx(min(sizes), rel=1e-4)


@FORMS
def test_the_layer_recovers_what_its_shortcut_lost(
    groups: Groups, ranks: tuple[int, ...], support: int
) -> None:
    converted = torch.randn(PATCHES, ROWS, generator=generator(5))
    lost = 0.5 * torch.randn(ROWS, WIDTH, generator=generator(6))
    plain = layer(dense_target().float())
    problem = dataclasses.replace(
        plain,
        target=plain.target + converted + plain.features @ lost.T + 1.0,
        offset=converted,
    )
    solution = polish_shared(problem, groups, ranks, support)
    expected = error_of(problem, solution, groups, problem.unseen)
    assert solution.unseen == pytest.approx(expected, rel=1e-3)
    blind = polish_shared(plain, groups, ranks, support)
    assert solution.unseen < 0.8 * error_of(problem, blind, groups, problem.unseen)


def test_at_full_rank_nothing_of_the_shortcut_is_lost() -> None:
    converted = torch.randn(PATCHES, ROWS, generator=generator(5))
    lost = 0.5 * torch.randn(ROWS, WIDTH, generator=generator(6))
    plain = layer(dense_target().float())
    target = plain.target + converted + plain.features @ lost.T + 1.0
    problem = dataclasses.replace(plain, target=target, offset=converted)
    solution = polish_shared(problem, SPATIAL, (CHANNELS * HIGH,))
    assert solution.unseen < 3e-3  # caution shrinks what is learned beside W


def test_without_unseen_patches_the_fit_judges_itself() -> None:
    problem = layer(
        dense_target().float(), noise=0.1, unseen=torch.zeros(PATCHES, dtype=torch.bool)
    )
    solution = polish_shared(problem, SPATIAL, (3,))
    assert solution.unseen == 0.0
    assert solution.fitted < polish_shared(problem, SPATIAL, (3,), rounds=0).fitted


# ---- what is refused


def spoiled(tensor: Tensor, row: int, value: float) -> Tensor:
    changed = tensor.clone()
    changed[row, 0] = value
    return changed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", [0, 3], ids=["seen", "unseen"])
@pytest.mark.parametrize("field", ["features", "target", "offset"])
def test_activations_that_are_not_finite_are_refused(field: str, row: int, value: float) -> None:
    good = layer(dense_target().float(), offset=torch.zeros(PATCHES, ROWS))
    bad = dataclasses.replace(good, **{field: spoiled(getattr(good, field), row, value)})
    with pytest.raises(SolverError, match="not finite"):
        polish_shared(bad, SPATIAL, (2,))


def test_a_metric_that_is_not_finite_is_refused() -> None:
    bad = layer(dense_target().float(), metric=spoiled(positive(ROWS, 2), 1, float("nan")))
    with pytest.raises(SolverError, match="metric is not finite"):
        polish_shared(bad, SPATIAL, (2,))


@pytest.mark.parametrize("left", [0, 1])
def test_fewer_than_2_patches_are_refused(left: int) -> None:
    with pytest.raises(SolverError, match="more images"):
        polish_shared(
            layer(dense_target().float(), unseen=torch.arange(PATCHES) >= left), SPATIAL, (2,)
        )


def test_features_of_patches_are_no_whole_patches() -> None:
    problem = layer(dense_target().float(), basis=torch.eye(WIDTH))
    with pytest.raises(ValueError, match="whole patches"):
        polish_shared(problem, SPATIAL, (2,))


def test_noise_of_few_patches_is_hardly_learned() -> None:
    few = 96  # twelve values a patch
    plain = layer(dense_target().float())
    noise = torch.randn(PATCHES, ROWS, generator=generator(8))
    problem = dataclasses.replace(
        plain,
        features=plain.features[:few],
        target=(plain.target + 0.3 * plain.target.std() * noise)[:few],
        unseen=plain.unseen[:few],
        activation=IDENTITY,
    )
    solution = polish_shared(problem, SPATIAL, (CHANNELS * HIGH,))
    learned = dense(solution, SPATIAL) - problem.weight
    # what least squares would learn of noise alone
    rows = problem.features[~problem.unseen]
    rows = rows - rows.mean(0)
    missed = problem.target[~problem.unseen] - problem.features[~problem.unseen] @ problem.weight.T
    squares = torch.linalg.lstsq(rows, missed - missed.mean(0)).solution.T
    assert torch.linalg.vector_norm(learned) < 0.8 * torch.linalg.vector_norm(squares)

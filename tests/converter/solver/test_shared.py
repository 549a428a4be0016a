"""Fits with a shared first factor against dense linear algebra in float64, and on planted layers."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from converter.errors import SolverError
from converter.solver import shared
from converter.solver.problem import DAMPING, METRIC_FLOOR, Problem, damping
from converter.solver.prox import activate
from converter.solver.shared import (
    Factors,
    Groups,
    Moments,
    Quadratic,
    alternate,
    covariance,
    damped,
    effects_of_shared,
    effects_of_sparse,
    polish_shared,
)
from converter.solver.solution import Solution
from passes.activation import IDENTITY, Activation

ROWS, CHANNELS, HIGH, WIDE = 7, 4, 3, 2
TAPS = HIGH * WIDE
WIDTH = CHANNELS * TAPS
PATCHES = 400
RELU = Activation("relu")

Matrix = NDArray[np.float64]

_COLUMNS = torch.arange(WIDTH).view(CHANNELS, HIGH, WIDE)
SPATIAL = Groups(_COLUMNS.permute(2, 0, 1).reshape(WIDE, CHANNELS * HIGH))
TUCKER = Groups(_COLUMNS.permute(1, 2, 0).reshape(TAPS, CHANNELS))
WHOLE = Groups(torch.arange(WIDTH)[None])
GROUPS = pytest.mark.parametrize(
    "groups", [SPATIAL, TUCKER, WHOLE], ids=["spatial", "tucker", "whole"]
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def positive(size: int, seed: int) -> Tensor:
    """A random symmetric positive definite matrix, float64."""
    factor = torch.randn(size, 2 * size, generator=generator(seed), dtype=torch.float64)
    return factor @ factor.T / size


def roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T


def quadratic_of(groups: Groups) -> Quadratic:
    return Quadratic(positive(WIDTH, 1), *roots(positive(ROWS, 2)), groups)


def dense_target(seed: int = 3) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=generator(seed), dtype=torch.float64)


def first_factor(groups: Groups, rank: int, seed: int = 4) -> Tensor:
    shape = (rank, groups.columns.shape[1])
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def missing(weight: Tensor) -> float:
    """tr Ω (T − Ŵ) G (T − Ŵ)ᵀ for the target, metric and covariance of `quadratic_of`."""
    left = dense_target() - weight
    return float(torch.trace(positive(ROWS, 2) @ left @ positive(WIDTH, 1) @ left.T))


def spread_out(first: Tensor, groups: Groups) -> Matrix:
    """B = I ⊗ V with its columns where the groups have them, (T·r, D)."""
    count, rank = len(groups.columns), len(first)
    matrix = np.zeros((count * rank, WIDTH))
    for group in range(count):
        matrix[group * rank : (group + 1) * rank, groups.columns[group].numpy()] = first.numpy()
    return matrix


# ---- K


@GROUPS
def test_k_is_least_squares(groups: Groups) -> None:
    quadratic, first = quadratic_of(groups), first_factor(groups, 2)
    cross = quadratic.grouped(dense_target() @ positive(WIDTH, 1))
    second = quadratic.second_step(cross, first, quadratic.products(first))
    found = second.factors().weight(groups).numpy()
    b, g = spread_out(first, groups), positive(WIDTH, 1).numpy()
    # Ω cancels where the rank of K is free
    expected = dense_target().numpy() @ g @ b.T @ np.linalg.inv(b @ g @ b.T) @ b
    # the ridge is 1e-7 of the mean diagonal
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@GROUPS
@pytest.mark.parametrize("limit", [1, 3])
def test_k_of_limited_rank_is_the_svd_in_both_metrics(groups: Groups, limit: int) -> None:
    quadratic, first = quadratic_of(groups), first_factor(groups, 3)
    cross = quadratic.grouped(dense_target() @ positive(WIDTH, 1))
    factors = quadratic.second_step(cross, first, quadratic.products(first)).factors(limit)
    b, g = spread_out(first, groups), positive(WIDTH, 1).numpy()
    half, inverse_half = (each.numpy() for each in roots(positive(ROWS, 2)))
    root = np.linalg.cholesky(b @ g @ b.T)
    measured = half @ dense_target().numpy() @ g @ b.T @ np.linalg.inv(root).T
    u, s, vh = np.linalg.svd(measured, full_matrices=False)
    best = inverse_half @ (u[:, :limit] * s[:limit]) @ vh[:limit] @ np.linalg.inv(root) @ b
    np.testing.assert_allclose(factors.weight(groups).numpy(), best, rtol=1e-4, atol=1e-5)
    assert factors.core is not None
    assert factors.outer is not None
    assert factors.core.shape == (limit, len(groups.columns), 3)
    together = torch.einsum("nq,qtr->ntr", factors.outer, factors.core)
    torch.testing.assert_close(together, factors.second)


def test_a_smaller_limit_can_follow_a_larger_one_and_back() -> None:
    quadratic, first = quadratic_of(TUCKER), first_factor(TUCKER, 3)
    cross = quadratic.grouped(dense_target() @ positive(WIDTH, 1))
    second = quadratic.second_step(cross, first, quadratic.products(first))
    errors = [missing(second.factors(limit).weight(TUCKER)) for limit in (4, 1, 6)]
    assert errors[2] < errors[0] < errors[1]
    fresh = quadratic.second_step(cross, first, quadratic.products(first))
    assert missing(fresh.factors(6).weight(TUCKER)) == pytest.approx(errors[2])


# ---- V


def dense_first_step(quadratic: Quadratic, cross: Tensor, second: Tensor) -> Matrix:
    """V of Σ_tu (K_tᵀ Ω K_u) V G_ut = Σ_t K_tᵀ Ω P_t, by one solve of its Kronecker form."""
    count, inner, rank = quadratic.count, quadratic.inner, second.shape[2]
    omega, gram, k = positive(ROWS, 2).numpy(), quadratic.gram.numpy(), second.numpy()
    matrix, wanted = np.zeros((rank * inner, rank * inner)), np.zeros((rank, inner))
    for t in range(count):
        wanted += k[:, t].T @ omega @ cross[:, t].numpy()
        for u in range(count):
            matrix += np.kron(k[:, t].T @ omega @ k[:, u], gram[u, :, t].T)
    return np.linalg.solve(matrix, wanted.reshape(-1)).reshape(rank, inner)


@GROUPS
@pytest.mark.parametrize("limit", [None, 2])
def test_v_solves_its_linear_system(
    groups: Groups, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what ties V to the one before it moves where the steps end
    monkeypatch.setattr(shared, "HELD", 1e-12)
    quadratic, first = quadratic_of(groups), first_factor(groups, 2)
    cross = quadratic.grouped(dense_target() @ positive(WIDTH, 1))
    products = quadratic.products(first)
    factors = quadratic.second_step(cross, first, products).factors(limit)
    expected = dense_first_step(quadratic, cross, factors.second)
    found = quadratic.first_step(cross, factors, products, steps=200).numpy()
    # rows may be mixed, since K is solved anew: what counts is the space that they span
    np.testing.assert_allclose(found @ found.T, np.eye(2), atol=1e-10)
    onto = expected.T @ np.linalg.solve(expected @ expected.T, expected)
    np.testing.assert_allclose(found.T @ found, onto, atol=1e-6)


@GROUPS
def test_the_usual_few_steps_of_v_already_gain(groups: Groups) -> None:
    quadratic, first = quadratic_of(groups), first_factor(groups, 2)
    cross = quadratic.grouped(dense_target() @ positive(WIDTH, 1))
    before = alternate(quadratic, cross, first, 0).factors()
    after = alternate(quadratic, cross, first, 1).factors()
    assert missing(after.weight(groups)) < 0.99 * missing(before.weight(groups))


@GROUPS
@pytest.mark.parametrize("limit", [None, 3])
def test_the_alternation_never_raises_the_error(groups: Groups, limit: int | None) -> None:
    quadratic = quadratic_of(groups)
    cross = quadratic.grouped(dense_target() @ positive(WIDTH, 1))
    first = quadratic.start(dense_target(), 3)
    errors = [
        missing(alternate(quadratic, cross, first, steps, limit).factors(limit).weight(groups))
        for steps in range(8)
    ]
    for before, after in pairwise(errors):
        assert after <= before * (1 + 1e-6)  # of the ridge


def test_with_one_group_the_alternation_ends_at_the_truncated_svd() -> None:
    quadratic = quadratic_of(WHOLE)
    cross = quadratic.grouped(dense_target() @ positive(WIDTH, 1))
    half, _ = roots(positive(ROWS, 2))
    root = torch.linalg.cholesky(positive(WIDTH, 1))
    lost = torch.linalg.svdvals(half @ dense_target() @ root)[2:].square().sum()
    start = quadratic.start(dense_target(), 2)
    assert missing(alternate(quadratic, cross, start, 0).factors().weight(WHOLE)) == pytest.approx(
        float(lost), rel=1e-4
    )
    anywhere = alternate(quadratic, cross, first_factor(WHOLE, 2), 60).factors()
    assert missing(anywhere.weight(WHOLE)) == pytest.approx(float(lost), rel=1e-3)


@GROUPS
def test_starts_of_several_ranks_are_nested(groups: Groups) -> None:
    quadratic = quadratic_of(groups)
    large, small = quadratic.start(dense_target(), 3), quadratic.start(dense_target(), 2)
    torch.testing.assert_close(large[:2].T @ large[:2], small.T @ small)


def test_a_weight_goes_back_to_its_columns() -> None:
    weight = dense_target()
    for groups in (SPATIAL, TUCKER, WHOLE):
        identity = torch.eye(groups.columns.shape[1], dtype=torch.float64)
        grouped = quadratic_of(groups).grouped(weight)
        assert torch.equal(Factors(identity, grouped).weight(groups), weight)


# ---- covariance


@pytest.mark.parametrize("block", [1, 7, 24, 100])
def test_covariance_is_that_of_numpy(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "GRAM_BLOCK", block)
    rows = torch.randn(50, 24, generator=generator(0)) @ torch.randn(24, 24) + 1.5
    found = covariance(rows, rows.mean(0))
    expected = np.cov(rows.double().numpy().T, bias=True)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, found.T)


def test_covariance_of_patches_wider_than_a_block() -> None:
    rows = torch.randn(40, shared.GRAM_BLOCK + 130, generator=generator(0))
    expected = np.cov(rows.double().numpy().T, bias=True)
    np.testing.assert_allclose(covariance(rows, rows.mean(0)).numpy(), expected, atol=1e-5)


def test_a_large_mean_does_not_swallow_the_covariance() -> None:
    rows = torch.randn(2000, 6, generator=generator(0)) + 1000
    expected = np.cov(rows.double().numpy().T, bias=True)
    # E[xy] − E[x]E[y] in float32 would be off by 0.1
    np.testing.assert_allclose(covariance(rows, rows.mean(0)).numpy(), expected, atol=1e-3)


# ---- predicted effects


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
    half, inverse_half = shared.metric_roots(metric, weight)
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
            shared.PREDICT_STEPS,
            middle,
            shared.PREDICT_CONJUGATE_STEPS,
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


# ---- polish


def separable(rank: int, seed: int = 8) -> Tensor:
    """A weight (N, D) that is exactly a kh×1 Conv of `rank` outputs and a 1×kw one behind it."""
    random = generator(seed)
    first = torch.randn(rank, CHANNELS, HIGH, generator=random)
    second = torch.randn(ROWS, WIDE, rank, generator=random)
    return torch.einsum("nwr,rch->nchw", second, first).reshape(ROWS, WIDTH)


def separable_beside(channel: int) -> Tensor:
    """A separable weight of rank 2, and anything on one channel."""
    weight = separable(2)
    own = slice(channel * TAPS, (channel + 1) * TAPS)
    weight[:, own] += 3 * torch.randn(ROWS, TAPS, generator=generator(9))
    return weight


def tucker(first: int, second: int, seed: int = 8) -> Tensor:
    """A weight (N, D) that is exactly of Tucker ranks (first, second)."""
    random = generator(seed)
    inner = torch.randn(first, CHANNELS, generator=random)
    core = torch.randn(second, first, TAPS, generator=random)
    outer = torch.randn(ROWS, second, generator=random)
    return torch.einsum("nq,qrt,rc->nct", outer, core, inner).reshape(ROWS, WIDTH)


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


def test_moments_that_are_not_finite_are_refused() -> None:
    weight = dense_target().float()
    moments, metric = moments_of(weight)
    bad = dataclasses.replace(moments, gram=spoiled(moments.gram, 0, float("nan")))
    with pytest.raises(SolverError, match="not finite"):
        effects_of_shared(bad, weight, metric, SPATIAL, [(2,)])
    with pytest.raises(SolverError, match="not finite"):
        effects_of_sparse(bad, weight, metric, [1])


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

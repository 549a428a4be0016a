"""Fits of a fixed structure against closed forms in float64, and against the layer as deployed."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from converter.solver import problem as problem_module
from converter.solver.factorize import (
    Allowance,
    Structure,
    data_svd,
    effects_of_rank,
    plain_svd,
    polish,
)
from converter.solver.problem import Coordinates, Problem
from converter.solver.prox import activate
from converter.solver.solution import Solution
from passes.activation import IDENTITY, Activation

ROWS, CHANNELS, TAPS, PATCHES = 6, 5, 2, 320
WIDTH = CHANNELS * TAPS
RELU = Activation("relu")
ELIGIBLE = torch.tensor([1, 3, 4])

Matrix = NDArray[np.float64]


def layer(seed: int = 0, *, noise: float = 0.0, **changes: Any) -> Problem:
    """Correlated patches; with `noise` the features are not what the original saw."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, WIDTH, generator=generator)
    bias = torch.randn(ROWS, generator=generator)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator) / 2
    patches = torch.randn(PATCHES, WIDTH, generator=generator) @ mixing + 0.5
    target = patches @ weight.T + bias
    built = Problem(
        weight=weight,
        bias=bias,
        channels=CHANNELS,
        features=patches + noise * torch.randn(patches.shape, generator=generator),
        basis=None,
        eligible=torch.arange(CHANNELS),
        target=target,
        offset=None,
        unseen=torch.arange(PATCHES) % 4 == 3,
        activation=RELU,
    )
    return dataclasses.replace(built, **changes)


def reduced(problem: Problem) -> Problem:
    """The same layer over features W x and the taps of a few channels."""
    columns = (ELIGIBLE[:, None] * TAPS + torch.arange(TAPS)).flatten()
    basis = torch.cat([problem.weight, torch.eye(WIDTH)[columns]])
    return dataclasses.replace(
        problem, basis=basis, eligible=ELIGIBLE, features=problem.features @ basis.T
    )


def random_metric(seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(ROWS, ROWS, generator=generator, dtype=torch.float64)
    return factor @ factor.T


METRICS = pytest.mark.parametrize("metric", [None, random_metric()], ids=["identity", "metric"])


def half_metric(problem: Problem) -> Matrix:
    if problem.metric is None:
        return np.eye(ROWS)
    omega = problem.metric.numpy()
    omega = omega / np.mean(np.diag(omega)) + problem_module.METRIC_FLOOR * np.eye(ROWS)
    values, vectors = np.linalg.eigh(omega)
    return (vectors * np.sqrt(values)) @ vectors.T


def seen_moments(problem: Problem, wanted: Tensor) -> tuple[Matrix, Matrix, Matrix]:
    """Covariance of the seen features, the same damped, and covariance of `wanted` with them."""
    features = problem.features[~problem.unseen].double().numpy()
    answers = wanted[~problem.unseen].double().numpy()
    centred = features - features.mean(0)
    covariance = centred.T @ centred / len(centred)
    share = problem_module.damping(len(covariance), len(centred))
    damping = share * np.mean(np.diag(covariance))
    cross = (answers - answers.mean(0)).T @ centred / len(centred)
    return covariance, covariance + damping * np.eye(len(covariance)), cross


def dense_fit(problem: Problem, wanted: Tensor) -> Matrix:
    """W moved by the damped regression of what it misses: the best dense layer, (N, m)."""
    covariance, damped, cross = seen_moments(problem, wanted)
    weight = problem.weight.double().numpy()
    return weight + (cross - weight @ covariance) @ np.linalg.inv(damped)


def deployed(problem: Problem, solution: Solution, patches: Tensor) -> Tensor:
    """Gather the kept channels and multiply; down, up; add: what the converted graph computes."""
    gathered = patches.view(len(patches), problem.channels, -1)[:, solution.support]
    sparse = gathered.reshape(len(patches), -1) @ solution.sparse.T
    return sparse + (patches @ solution.down.T) @ solution.up.T + solution.bias


def error_of(problem: Problem, total: Tensor, rows: Tensor) -> float:
    """The relative error of the problem's text, of a response plus shortcut (n, N)."""
    half = half_metric(problem)
    wanted = activate(problem.activation, problem.target).double().numpy()
    missed = activate(problem.activation, total).double().numpy() - wanted
    spread = wanted[~problem.unseen]
    scale = (((spread - spread.mean(0)) @ half) ** 2).sum() / len(spread)
    picked = missed[rows.numpy()]
    return float(((picked @ half) ** 2).sum() / len(picked) / scale)


def assert_is_the_original(problem: Problem, solution: Solution) -> None:
    torch.testing.assert_close(
        solution.weight(problem.channels), problem.weight, rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(solution.bias, problem.bias, rtol=1e-3, atol=2e-3)
    assert solution.fitted < 1e-7
    assert solution.unseen < 1e-7


# Allowance


def test_an_allowance_shares_its_total() -> None:
    allowance = Allowance(total=100.0, rank_cost=10.0, channel_cost=25.0, block=8)
    assert [allowance.rank_beside(s, 50) for s in range(6)] == [10, 7, 5, 2, 0, 0]
    assert allowance.rank_beside(0, 4) == 4


def test_counts_from_16_on_are_whole_blocks() -> None:
    allowance = Allowance(total=1.0, rank_cost=1.0, channel_cost=1.0, block=8)
    assert [allowance.usable(n) for n in (-3, 0, 15, 16, 17, 23, 24)] == [0, 0, 15, 16, 16, 16, 24]


@given(
    total=st.floats(1, 1e9),
    rank_cost=st.floats(1e-3, 1e6),
    channel_cost=st.floats(1e-3, 1e6),
    support=st.integers(0, 600),
    most=st.integers(0, 600),
    block=st.sampled_from([1, 4, 8, 16]),
)
def test_a_rank_beside_a_support_is_paid_for(
    total: float, rank_cost: float, channel_cost: float, support: int, most: int, block: int
) -> None:
    allowance = Allowance(total, rank_cost, channel_cost, block)
    rank = allowance.rank_beside(support, most)
    assert 0 <= rank <= most
    assert rank < 16 or rank % block == 0
    if rank:
        assert rank * rank_cost + support * channel_cost <= total * (1 + 1e-6)
    step = 1 if rank < 15 else block
    if rank + step <= most:
        assert (rank + step + 1) * rank_cost + support * channel_cost > total * (1 - 1e-6)


# Effects of a rank


def effects(covariance: Matrix, metric: Matrix) -> Matrix:
    return effects_of_rank(torch.from_numpy(covariance), torch.from_numpy(metric)).numpy()


def test_effects_are_those_of_the_best_projection() -> None:
    rng = np.random.default_rng(3)
    half, other = rng.normal(size=(5, 9)), rng.normal(size=(5, 5))
    covariance, metric = half @ half.T / 9, other @ other.T
    found = effects(covariance, metric)
    assert found.shape == (6,)
    assert found[0] == pytest.approx(np.trace(metric @ covariance))
    assert found[-1] == 0
    assert (np.diff(found) <= 0).all()
    # brute force: the data in the metric's own coordinates, cut by an SVD
    root = np.linalg.cholesky(metric)
    values = np.linalg.svd(root.T @ half / 3, compute_uv=False)
    wanted = [float((values[rank:] ** 2).sum()) for rank in range(6)]
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


def test_no_projection_of_the_rank_leaves_less() -> None:
    rng = np.random.default_rng(4)
    half, other = rng.normal(size=(4, 7)), rng.normal(size=(4, 4))
    covariance, metric = half @ half.T / 7, other @ other.T
    found = effects(covariance, metric)
    for rank in range(1, 4):
        for _ in range(200):
            basis = rng.normal(size=(4, rank))
            # the best fit within this column space, in the metric
            inside = basis @ np.linalg.solve(basis.T @ metric @ basis, basis.T @ metric)
            rest = np.eye(4) - inside
            left = np.trace(metric @ rest @ covariance @ rest.T)
            assert left >= found[rank] * (1 - 1e-9)


def test_a_metric_without_some_directions_forgives_them() -> None:
    found = effects(np.diag([4.0, 1.0, 100.0]), np.diag([1.0, 1.0, 0.0]))
    np.testing.assert_allclose(found, [5, 1, 0, 0], atol=1e-12)


def test_round_off_below_zero_is_no_effect() -> None:
    found = effects(np.diag([1.0, -1e-17]), np.diag([1.0, -1e-17]))
    np.testing.assert_allclose(found, [1, 0, 0], atol=1e-15)


# Plain SVD


@METRICS
@pytest.mark.parametrize("small", [False, True], ids=["patches", "features"])
@pytest.mark.parametrize("rank", [1, 3, ROWS])
def test_plain_svd_is_the_truncated_svd_of_the_weight(
    rank: int, small: bool, metric: Tensor | None
) -> None:
    full = layer(metric=metric)
    solution = plain_svd(reduced(full) if small else full, rank)
    u, s, vh = np.linalg.svd(full.weight.double().numpy(), full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ vh[:rank]
    np.testing.assert_allclose(solution.weight(CHANNELS).numpy(), expected, atol=1e-4)
    assert torch.equal(solution.bias, full.bias)
    assert solution.rank == rank
    assert len(solution.support) == 0
    assert solution.status == "closed form"
    total = deployed(full, solution, full.features)
    assert solution.unseen == pytest.approx(error_of(full, total, full.unseen), rel=1e-2, abs=1e-6)
    assert solution.fitted == pytest.approx(error_of(full, total, ~full.unseen), rel=1e-2, abs=1e-6)


# SVD in the metric of the data


@METRICS
@pytest.mark.parametrize("small", [False, True], ids=["patches", "features"])
def test_data_svd_of_full_rank_is_the_original(small: bool, metric: Tensor | None) -> None:
    full = layer(metric=metric)
    problem = reduced(full) if small else full
    assert_is_the_original(problem, data_svd(problem, ROWS))


@METRICS
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_data_svd_has_the_error_of_the_closed_form(rank: int, metric: Tensor | None) -> None:
    problem = layer(activation=IDENTITY, metric=metric)
    half = half_metric(problem)
    weight = problem.weight.double().numpy()
    covariance, damped, _ = seen_moments(problem, problem.target)
    root = np.linalg.cholesky(damped)
    u, s, vh = np.linalg.svd(half @ weight @ root, full_matrices=False)
    missed = (u[:, rank:] * s[rank:]) @ vh[rank:] @ np.linalg.inv(root)
    whole = half @ weight
    expected = np.trace(missed @ covariance @ missed.T) / np.trace(whole @ covariance @ whole.T)
    assert data_svd(problem, rank).fitted == pytest.approx(expected, rel=1e-3)


@METRICS
def test_without_damping_data_svd_is_eckart_young(
    metric: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(problem_module, "damping", lambda *_: 1e-8)
    problem = layer(activation=IDENTITY, metric=metric)
    answers = problem.target[~problem.unseen].double().numpy()
    s = np.linalg.svd((answers - answers.mean(0)) @ half_metric(problem), compute_uv=False)
    for rank in range(1, ROWS):
        expected = (s[rank:] ** 2).sum() / (s**2).sum()
        assert data_svd(problem, rank).fitted == pytest.approx(expected, rel=5e-3, abs=1e-6)


def test_data_svd_with_few_features_agrees_with_all_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # the damping is of the features, so the two agree exactly only without it
    monkeypatch.setattr(problem_module, "damping", lambda *_: 1e-6)
    full = layer()
    for rank in (1, 3):
        few, all_of_them = data_svd(reduced(full), rank), data_svd(full, rank)
        assert few.unseen == pytest.approx(all_of_them.unseen, rel=0.05)
        assert few.down.shape == (rank, WIDTH)


def test_data_svd_beats_plain_svd_on_linear_data() -> None:
    problem = layer(activation=IDENTITY)
    for rank in range(1, ROWS):
        assert data_svd(problem, rank).fitted < plain_svd(problem, rank).fitted


# What is reported is what is deployed


@METRICS
@pytest.mark.parametrize("small", [False, True], ids=["patches", "features"])
@pytest.mark.parametrize(
    "structure",
    [Structure((), 2), Structure((0, 2), 0), Structure((0, 2), 2), Structure((1,), 3)],
    ids=str,
)
def test_errors_and_weight_agree_with_the_deployed_form(
    structure: Structure, small: bool, metric: Tensor | None
) -> None:
    full = layer(noise=0.1, metric=metric)
    problem = reduced(full) if small else full
    solution = polish(Coordinates(problem), structure, 4)
    assert solution.support.tolist() == problem.eligible[list(structure.support)].tolist()
    assert solution.sparse.shape == (ROWS, len(structure.support) * TAPS)
    assert solution.rank == structure.rank
    total = deployed(full, solution, full.features)
    torch.testing.assert_close(
        full.features @ solution.weight(CHANNELS).T + solution.bias, total, rtol=1e-4, atol=1e-4
    )
    assert solution.unseen == pytest.approx(error_of(full, total, full.unseen), rel=1e-2)
    assert solution.fitted == pytest.approx(error_of(full, total, ~full.unseen), rel=1e-2)


def test_weight_can_be_asked_twice() -> None:
    solution = polish(Coordinates(layer()), Structure((0, 2), 2), 1)
    assert torch.equal(solution.weight(CHANNELS), solution.weight(CHANNELS))


def test_channels_come_out_ascending_whatever_the_order_of_the_eligible() -> None:
    full = layer()
    order = torch.tensor([3, 0, 4, 1, 2])
    columns = (order[:, None] * TAPS + torch.arange(TAPS)).flatten()
    basis = torch.cat([full.weight, torch.eye(WIDTH)[columns]])
    mixed = dataclasses.replace(full, basis=basis, eligible=order, features=full.features @ basis.T)
    solution = polish(Coordinates(mixed), Structure((0, 1, 3), 1), 2)
    assert solution.support.tolist() == [0, 1, 3]
    total = deployed(full, solution, full.features)
    assert solution.unseen == pytest.approx(error_of(full, total, full.unseen), rel=1e-2)


# Polish


@METRICS
@pytest.mark.parametrize("small", [False, True], ids=["patches", "features"])
@pytest.mark.parametrize(
    "activation",
    [RELU, Activation("clip", low=0.0, high=2.0), Activation("leaky_relu"), Activation("silu")],
    ids=str,
)
def test_polish_is_never_worse_than_data_svd(
    activation: Activation, small: bool, metric: Tensor | None
) -> None:
    full = layer(noise=0.1, activation=activation, metric=metric)
    problem = reduced(full) if small else full
    coordinates = Coordinates(problem)
    for rank in (1, 2, 4):
        first = data_svd(problem, rank, coordinates).unseen
        assert polish(coordinates, Structure((), rank), 0).unseen == pytest.approx(first, rel=1e-5)
        assert polish(coordinates, Structure((), rank), 6).unseen <= first * (1 + 1e-5)


@pytest.mark.parametrize("structure", [Structure((), 2), Structure((0, 3), 1)], ids=str)
def test_more_rounds_are_never_worse_and_pay_with_a_relu(structure: Structure) -> None:
    coordinates = Coordinates(layer(noise=0.1))
    errors = [polish(coordinates, structure, rounds).unseen for rounds in range(7)]
    for before, after in pairwise(errors):
        assert after <= before * (1 + 1e-6)
    assert errors[-1] < 0.95 * errors[0]


def test_polish_judges_on_the_fit_where_no_patch_is_unseen() -> None:
    problem = layer(noise=0.1, unseen=torch.zeros(PATCHES, dtype=torch.bool))
    solution = polish(Coordinates(problem), Structure((), 2), 6)
    assert solution.unseen == 0.0
    assert solution.fitted < data_svd(problem, 2).fitted


@METRICS
def test_all_channels_alone_are_the_original(metric: Tensor | None) -> None:
    problem = layer(metric=metric)
    solution = polish(Coordinates(problem), Structure(tuple(range(CHANNELS)), 0), 2)
    assert solution.rank == 0
    assert solution.down.shape == (0, WIDTH)
    assert solution.up.shape == (ROWS, 0)
    assert_is_the_original(problem, solution)


@METRICS
def test_s_on_a_support_is_least_squares(metric: Tensor | None) -> None:
    problem = layer(noise=0.3, activation=IDENTITY, metric=metric)
    support = (0, 2, 3)
    columns = [channel * TAPS + tap for channel in support for tap in range(TAPS)]
    damped = seen_moments(problem, problem.target)[1]
    dense = dense_fit(problem, problem.target)
    expected = dense @ damped[:, columns] @ np.linalg.inv(damped[np.ix_(columns, columns)])
    solution = polish(Coordinates(problem), Structure(support, 0), 3)
    np.testing.assert_allclose(solution.sparse.numpy(), expected, atol=1e-3)
    means = problem.features[~problem.unseen].double().numpy().mean(0)
    answered = problem.target[~problem.unseen].double().numpy().mean(0)
    np.testing.assert_allclose(
        solution.bias.numpy(), answered - expected @ means[columns], atol=3e-3
    )


def test_s_beside_l_is_least_squares_for_that_l() -> None:
    problem = layer(activation=IDENTITY)
    solution = polish(Coordinates(problem), Structure((1, 4), 2), 0)
    columns = [channel * TAPS + tap for channel in (1, 4) for tap in range(TAPS)]
    damped = seen_moments(problem, problem.target)[1]
    left_over = (problem.weight - solution.up @ solution.down).double().numpy()
    expected = left_over @ damped[:, columns] @ np.linalg.inv(damped[np.ix_(columns, columns)])
    np.testing.assert_allclose(solution.sparse.numpy(), expected, atol=1e-3)


def test_a_fit_on_fewer_patches_is_close_to_one_on_all() -> None:
    coordinates = Coordinates(layer(noise=0.1))
    for structure in (Structure((), 2), Structure((0, 3), 1)):
        few = polish(coordinates, structure, 8, most=120).unseen
        assert few == pytest.approx(polish(coordinates, structure, 8).unseen, rel=0.25)


def test_a_fit_of_linear_data_on_fewer_patches_is_still_exact() -> None:
    coordinates = Coordinates(layer(activation=IDENTITY))
    assert polish(coordinates, Structure((), ROWS), 0, most=40).unseen < 1e-7


# Shortcuts


def with_shortcuts(seed: int = 8) -> Problem:
    """A layer whose converted shortcut lacks D x + c of the original's."""
    generator = torch.Generator().manual_seed(seed)
    plain = layer()
    converted = torch.randn(PATCHES, ROWS, generator=generator)
    lost = torch.randn(ROWS, WIDTH, generator=generator)
    constant = torch.randn(ROWS, generator=generator)
    original = converted + plain.features @ lost.T + constant
    return dataclasses.replace(plain, target=plain.target + original, offset=converted)


def test_the_layer_recovers_what_its_shortcut_lost() -> None:
    problem = with_shortcuts()
    assert problem.offset is not None
    solution = data_svd(problem, ROWS)
    expected = dense_fit(problem, problem.target - problem.offset)
    np.testing.assert_allclose(solution.weight(CHANNELS).numpy(), expected, atol=2e-3)
    blind = dataclasses.replace(problem, offset=None)
    assert solution.unseen < 2e-3
    assert solution.unseen < 0.01 * data_svd(blind, ROWS).unseen
    total = deployed(problem, solution, problem.features) + problem.offset
    assert solution.unseen == pytest.approx(error_of(problem, total, problem.unseen), rel=2e-2)


@pytest.mark.parametrize("structure", [Structure((), 3), Structure((0, 2), 2)], ids=str)
def test_polish_honours_the_shortcut(structure: Structure) -> None:
    problem = with_shortcuts()
    assert problem.offset is not None
    coordinates = Coordinates(problem)
    solution = polish(coordinates, structure, 6)
    assert solution.unseen <= polish(coordinates, structure, 0).unseen * (1 + 1e-6)
    total = deployed(problem, solution, problem.features) + problem.offset
    assert solution.unseen == pytest.approx(error_of(problem, total, problem.unseen), rel=1e-2)


def test_a_perfect_shortcut_changes_nothing_without_an_activation() -> None:
    plain = layer(activation=IDENTITY)
    offset = torch.randn(PATCHES, ROWS, generator=torch.Generator().manual_seed(3))
    shifted = dataclasses.replace(plain, target=plain.target + offset, offset=offset)
    torch.testing.assert_close(
        data_svd(shifted, 3).weight(CHANNELS),
        data_svd(plain, 3).weight(CHANNELS),
        rtol=1e-3,
        atol=1e-3,
    )


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, ROWS))
def test_fits_of_random_layers_are_finite_and_ordered(seed: int, rank: int) -> None:
    problem = layer(seed, noise=0.05)
    coordinates = Coordinates(problem)
    alone = polish(coordinates, Structure((), rank), 3)
    assert np.isfinite([alone.fitted, alone.unseen]).all()
    assert alone.unseen <= data_svd(problem, rank, coordinates).unseen * (1 + 1e-5)

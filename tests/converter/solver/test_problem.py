"""The whitened coordinates of a layer against their definitions in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from converter.errors import SolverError
from converter.solver import problem as problem_module
from converter.solver.problem import Coordinates, Problem, factor_of, metric_roots
from converter.solver.prox import activate
from passes.activation import IDENTITY, Activation

ROWS, CHANNELS, TAPS, PATCHES = 5, 3, 2, 120
RELU = Activation("relu")


def layer(seed: int = 0, **changes: Any) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    width = CHANNELS * TAPS
    weight = torch.randn(ROWS, width, generator=generator)
    bias = torch.randn(ROWS, generator=generator)
    mixing = torch.randn(width, width, generator=generator)
    patches = torch.randn(PATCHES, width, generator=generator) @ mixing + 1.0
    built = Problem(
        weight=weight,
        bias=bias,
        channels=CHANNELS,
        features=patches,
        basis=None,
        eligible=torch.arange(CHANNELS),
        target=patches @ weight.T + bias,
        offset=None,
        unseen=torch.arange(PATCHES) % 4 == 3,
        activation=RELU,
    )
    return dataclasses.replace(built, **changes)


def random_metric(seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(ROWS, ROWS, generator=generator, dtype=torch.float64)
    return factor @ factor.T


def test_a_problem_knows_its_taps() -> None:
    assert layer().taps == TAPS


def test_the_original_answers_the_same_over_features() -> None:
    plain = layer()
    basis = torch.cat([plain.weight, torch.eye(CHANNELS * TAPS)[2:4]])
    reduced = dataclasses.replace(
        plain, basis=basis, features=plain.features @ basis.T, eligible=torch.tensor([1])
    )
    answers = []
    for problem in (plain, reduced):
        coordinates = Coordinates(problem)
        answers.append(coordinates.seen.q @ coordinates.original.T)
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 1, 3, ROWS])
def test_roots_of_a_metric_of_any_rank(rank: int) -> None:
    metric = random_metric()[:, :rank] @ random_metric()[:, :rank].T
    half, inverse_half = (each.double() for each in metric_roots(metric, torch.zeros(ROWS, 1)))
    mean = float(metric.diagonal().mean())
    wanted = torch.eye(ROWS, dtype=torch.float64)
    if rank:
        wanted = metric / mean + problem_module.METRIC_FLOOR * wanted
    # the results are float32
    torch.testing.assert_close(half @ half, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(half, half.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        half @ inverse_half, torch.eye(ROWS, dtype=torch.float64), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("rank", [1, 3, ROWS])
def test_a_factor_has_the_rank_of_its_matrix(rank: int) -> None:
    thin = random_metric()[:, :rank]
    factor = factor_of(thin @ thin.T)
    assert factor.shape == (ROWS, rank)
    torch.testing.assert_close(factor @ factor.T, thin @ thin.T, rtol=1e-9, atol=1e-9)


def test_features_are_white_up_to_the_damping() -> None:
    problem = layer()
    coordinates = Coordinates(problem)
    seen = problem.features[~problem.unseen].double()
    centred = seen - seen.mean(0)
    covariance = centred.T @ centred / len(centred)
    share = problem_module.damping(len(covariance), len(seen))
    damped = covariance + share * covariance.diagonal().mean() * torch.eye(len(covariance))
    root = coordinates.root.double()
    torch.testing.assert_close(root @ root.T, damped, rtol=1e-4, atol=1e-4)
    q = coordinates.seen.q.double()
    torch.testing.assert_close(q @ root.T + seen.mean(0), seen, rtol=1e-4, atol=1e-4)
    assert float(q.mean(0).abs().max()) < 1e-4
    assert float(torch.linalg.eigvalsh(q.T @ q / len(q)).max()) < 1 + 1e-4
    assert len(coordinates.seen.q) + len(coordinates.unseen.q) == PATCHES


@pytest.mark.parametrize("metric", [None, random_metric()], ids=["identity", "metric"])
def test_the_original_answers_the_target_on_both_sides(metric: Tensor | None) -> None:
    coordinates = Coordinates(layer(metric=metric))
    bias = coordinates.seen.response.mean(0)
    for side in (coordinates.seen, coordinates.unseen):
        answered = coordinates.respond(side, coordinates.original, bias)
        torch.testing.assert_close(answered, side.target, rtol=1e-3, atol=1e-3)
        assert coordinates.error(side, answered) < 1e-8


def test_an_offset_is_added_to_what_the_layer_answers() -> None:
    offset = torch.randn(PATCHES, ROWS, generator=torch.Generator().manual_seed(9))
    plain = layer()
    coordinates = Coordinates(layer(offset=offset, target=plain.target + offset))
    side = coordinates.seen
    torch.testing.assert_close(side.response, plain.target[~plain.unseen])
    zero = torch.zeros_like(coordinates.original)
    torch.testing.assert_close(
        coordinates.respond(side, zero, torch.ones(ROWS)), offset[~plain.unseen] + 1
    )
    answered = coordinates.respond(side, coordinates.original, side.response.mean(0))
    torch.testing.assert_close(answered, side.target, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("metric", [None, random_metric()], ids=["identity", "metric"])
def test_the_error_is_1_for_the_best_constant(metric: Tensor | None) -> None:
    coordinates = Coordinates(layer(activation=IDENTITY, metric=metric))
    constant = coordinates.seen.wanted.mean(0).expand_as(coordinates.seen.wanted)
    assert coordinates.error(coordinates.seen, constant) == pytest.approx(1.0, rel=1e-4)


def test_the_error_is_measured_after_the_activation_and_in_the_metric() -> None:
    metric = random_metric()
    coordinates = Coordinates(layer(metric=metric))
    side = coordinates.unseen
    total = side.target + torch.randn(side.target.shape, generator=torch.Generator().manual_seed(2))
    omega = metric / metric.diagonal().mean() + 1e-2 * torch.eye(ROWS, dtype=torch.float64)

    def mean_square(rows: Tensor) -> float:
        rows = rows.double()
        return float(torch.einsum("ni,ij,nj->", rows, omega, rows)) / len(rows)

    wanted = coordinates.seen.wanted
    missed = mean_square(activate(RELU, total) - activate(RELU, side.target))
    expected = missed / mean_square(wanted - wanted.mean(0))
    assert coordinates.error(side, total) == pytest.approx(expected, rel=1e-4)


def test_the_metric_loses_its_scale_and_gains_a_floor() -> None:
    metric = torch.diag(torch.tensor([4.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    coordinates = Coordinates(layer(metric=metric))
    expected = metric + 1e-2 * torch.eye(ROWS, dtype=torch.float64)
    half = coordinates.half.double()
    torch.testing.assert_close(half @ half, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        coordinates.half @ coordinates.inverse_half, torch.eye(ROWS), rtol=0, atol=1e-5
    )
    scaled = Coordinates(layer(metric=1000 * metric))
    torch.testing.assert_close(scaled.half, coordinates.half)


def test_a_metric_of_zeros_is_the_identity() -> None:
    coordinates = Coordinates(layer(metric=torch.zeros(ROWS, ROWS, dtype=torch.float64)))
    assert torch.equal(coordinates.half, torch.eye(ROWS))


def test_few_patches_for_their_length_are_damped_more() -> None:
    assert problem_module.damping(100, 1_000_000) == problem_module.DAMPING
    assert problem_module.damping(4608, 7000) == pytest.approx(0.2 * 4608 / 7000)
    assert problem_module.damping(10, 0) > 1  # no patch says anything of any feature
    for size in ((100, 1_000_000), (576, 16_000), (4608, 7000), (10, 0)):
        assert problem_module.caution(*size) >= problem_module.damping(*size)


def test_the_norm_of_a_change_is_the_error_it_causes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem_module, "damping", lambda *_: 1e-8)
    coordinates = Coordinates(layer(activation=IDENTITY, metric=random_metric()))
    change = torch.randn(coordinates.original.shape, generator=torch.Generator().manual_seed(4))
    answered = coordinates.respond(
        coordinates.seen, coordinates.original + change, coordinates.seen.response.mean(0)
    )
    expected = float(change.square().sum()) / coordinates.spread
    assert coordinates.error(coordinates.seen, answered) == pytest.approx(expected, rel=1e-3)


def test_regress_and_unwhiten_match_their_definitions() -> None:
    coordinates = Coordinates(layer(metric=random_metric()))
    side = coordinates.seen
    residual = torch.randn(side.target.shape, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(
        coordinates.regress(side, residual),
        torch.einsum("ij,nj,nk->ik", coordinates.half, residual, side.q) / len(residual),
        rtol=1e-4,
        atol=1e-5,
    )
    rows = torch.randn(4, CHANNELS * TAPS, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(
        coordinates.unwhiten(rows @ coordinates.root), rows, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("most", [1, 7, 30, 89, 90, 1000])
def test_thinned_patches_are_at_most_so_many_and_stay_together(most: int) -> None:
    offset = torch.randn(PATCHES, ROWS, generator=torch.Generator().manual_seed(9))
    side = Coordinates(layer(offset=offset)).seen
    few = side.thinned(most)
    assert 1 <= len(few.q) <= most
    step = -(-len(side.q) // most)
    assert few.offset is not None
    assert side.offset is not None
    for thin, full in (
        (few.q, side.q),
        (few.wanted, side.wanted),
        (few.target, side.target),
        (few.offset, side.offset),
    ):
        assert torch.equal(thin, full[::step])


def test_without_unseen_patches_the_unseen_error_is_0() -> None:
    coordinates = Coordinates(layer(unseen=torch.zeros(PATCHES, dtype=torch.bool)))
    assert len(coordinates.unseen.q) == 0
    assert coordinates.error(coordinates.unseen, coordinates.unseen.target) == 0.0


def test_constant_features_and_targets_are_no_failure() -> None:
    constant = layer(
        features=torch.ones(PATCHES, CHANNELS * TAPS), target=torch.zeros(PATCHES, ROWS)
    )
    coordinates = Coordinates(constant)
    assert coordinates.spread == 1.0
    assert torch.isfinite(coordinates.root).all()
    assert not coordinates.seen.q.any()


def spoiled(tensor: Tensor, row: int, value: float) -> Tensor:
    changed = tensor.clone()
    changed[row, 0] = value
    return changed


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("field", "row"),
    [
        ("features", 0),
        ("target", 0),
        ("target", 3),
        ("features", 3),
        ("offset", 0),
        ("offset", 3),
    ],
)
def test_activations_that_are_not_finite_are_refused(field: str, row: int, value: float) -> None:
    good = layer(offset=torch.zeros(PATCHES, ROWS))
    bad = dataclasses.replace(good, **{field: spoiled(getattr(good, field), row, value)})
    with pytest.raises(SolverError, match="not finite"):
        Coordinates(bad)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(SolverError, match="metric is not finite"):
        Coordinates(layer(metric=spoiled(random_metric(), 1, value)))


@pytest.mark.parametrize("left", [0, 1])
def test_fewer_than_2_patches_are_refused(left: int) -> None:
    with pytest.raises(SolverError, match="more images"):
        Coordinates(layer(unseen=torch.arange(PATCHES) >= left))

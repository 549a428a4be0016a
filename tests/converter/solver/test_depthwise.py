"""1×1, depthwise and 1×1 fitted together, against dense linear algebra in float64."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from converter.errors import SolverError
from converter.solver import depthwise as module
from converter.solver.depthwise import Depthwise, DepthwiseFactors, Filters
from converter.solver.quadratic import Groups, Quadratic, Second, alternate
from tests.converter.solver.conftest import generator, positive, roots

ROWS, CHANNELS, TAPS, RANK = 7, 4, 5, 3
WIDTH = CHANNELS * TAPS
OMEGA, GRAM = positive(ROWS, 2), positive(WIDTH, 1)
TARGET = torch.randn(ROWS, WIDTH, generator=generator(3), dtype=torch.float64)
CROSS = TARGET @ GRAM

EACH = pytest.mark.parametrize("each", [1, 2])


def filters_of(each: int) -> Filters:
    return Filters(torch.arange(WIDTH).view(CHANNELS, TAPS).T.contiguous(), each)


def fit_of(each: int) -> Depthwise:
    return filters_of(each).quadratic(GRAM, *roots(OMEGA))


def some_first(each: int) -> Tensor:
    shape = (RANK, CHANNELS + each * TAPS)
    return torch.randn(shape, generator=generator(4), dtype=torch.float64)


def some_factors(each: int) -> DepthwiseFactors:
    second = torch.randn(ROWS, RANK * each, generator=generator(5), dtype=torch.float64)
    return fit_of(each).factors(some_first(each), second)


def all_filters(first: Tensor, each: int) -> NDArray[np.float64]:
    """F, (r·M, D), written out: what a filter of a channel makes of a patch."""
    inputs = first[:, :CHANNELS].numpy()
    filters = first[:, CHANNELS:].view(len(first), each, TAPS).numpy()
    return np.array(
        [
            np.outer(inputs[rank], filters[rank, one]).reshape(-1)  # a patch has channels first
            for rank in range(len(first))
            for one in range(each)
        ]
    )


def missing(weight: Tensor, target: Tensor = TARGET) -> float:
    left = target - weight
    return float(torch.trace(OMEGA @ left @ GRAM @ left.T))


def test_each_kind_of_groups_has_its_fit() -> None:
    columns = filters_of(1).columns
    assert type(Groups(columns).quadratic(GRAM, *roots(OMEGA))) is Quadratic
    assert type(fit_of(1)) is Depthwise
    within = fit_of(2).within(2 * GRAM)
    assert type(within) is Depthwise
    torch.testing.assert_close(
        within.products(some_first(2)), 2 * fit_of(2).products(some_first(2))
    )


@EACH
def test_what_factors_answer_and_cover_is_that_of_their_weight(each: int) -> None:
    factors, groups = some_factors(each), filters_of(each)
    weight = factors.weight(groups)
    dense = factors.second.reshape(ROWS, -1).numpy() @ all_filters(factors.first, each)
    np.testing.assert_allclose(weight.numpy(), dense, atol=1e-12)
    patches = torch.randn(20, WIDTH, generator=generator(6), dtype=torch.float64)
    torch.testing.assert_close(factors.respond(patches, groups), patches @ weight.T)
    covered = factors.covered(groups, fit_of(each).products(factors.first))
    torch.testing.assert_close(covered, weight @ GRAM)


@EACH
def test_the_chain_filters_repeated_channels(each: int) -> None:
    """The channels come `each` times, one after another all of them, and each copy has a filter."""
    factors = some_factors(each)
    inputs, filters, outputs = factors.chain()
    assert (inputs.shape, filters.shape) == ((RANK, CHANNELS), (each * RANK, TAPS))
    total = torch.einsum("nq,qt,qc->nct", outputs, filters, inputs.repeat(each, 1))
    torch.testing.assert_close(total.reshape(ROWS, -1), factors.weight(filters_of(each)))


@EACH
def test_u_is_a_least_squares(each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Depthwise, "ridge", 1e-13)
    fit, first = fit_of(each), some_first(each)
    second = fit.second_step(fit.grouped(CROSS), first, fit.products(first))
    f, g = all_filters(first, each), GRAM.numpy()
    expected = CROSS.numpy() @ f.T @ np.linalg.inv(f @ g @ f.T) @ f
    found = second.factors().weight(filters_of(each)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("each", [1, 2, 3])  # with 3 there are more filters than outputs
def test_a_step_is_that_of_gauss_and_newton_on_what_u_leaves(
    each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken to its end, it is the least squares of what A and D change, less what U makes up for."""
    monkeypatch.setattr(module, "TIE", 1e-12)
    monkeypatch.setattr(Depthwise, "ridge", 1e-13)
    fit, groups, first = fit_of(each), filters_of(each), some_first(each)
    second = fit.second_step(fit.grouped(CROSS), first, fit.products(first))
    factors = second.factors()
    found = fit.first_step(fit.grouped(CROSS), second, None, steps=500)

    half, _ = roots(OMEGA)
    root = torch.linalg.cholesky(GRAM)
    rows = torch.from_numpy(all_filters(first, each)) @ root
    made_up = torch.linalg.pinv(rows) @ rows  # what any U reaches

    def left_by(change: Tensor) -> Tensor:
        seen = half @ change @ root
        return (seen - seen @ made_up).reshape(-1)

    def slope(direction: Tensor) -> Tensor:  # of U (D ∘ A), which is linear in A and in D
        second = factors.second.flatten(1)
        one, other = (fit.factors(first + sign * direction, second) for sign in (1, -1))
        return (one.weight(groups) - other.weight(groups)) / 2

    units = torch.eye(first.numel(), dtype=torch.float64)
    matrix = torch.stack([left_by(slope(unit.view_as(first))) for unit in units], 1)
    wanted = left_by(TARGET - factors.weight(groups))
    best = matrix @ torch.linalg.lstsq(matrix, wanted[:, None], driver="gelsd").solution
    # sizes and turns that change nothing are free, so what is reached is compared
    torch.testing.assert_close(left_by(slope(found - first)), best[:, 0], rtol=1e-4, atol=1e-4)
    assert torch.linalg.vector_norm(best) > 0.1 * torch.linalg.vector_norm(wanted)


@EACH
@pytest.mark.parametrize("rank", [2, 6])
def test_steps_lower_the_error(each: int, rank: int) -> None:
    """With fewer filters than outputs, and with more, and with more ranks than channels."""
    fit = fit_of(each)
    cross, first = fit.grouped(CROSS), fit.start(TARGET, rank)
    assert len(first) == rank
    errors = [
        missing(alternate(fit, cross, first, steps).factors().weight(filters_of(each)))
        for steps in range(8)
    ]
    for before, after in pairwise(errors):
        assert after <= before * (1 + 1e-6)
    assert errors[-1] < 0.97 * errors[0]


@pytest.mark.parametrize("times", [4.0, -1.0])
def test_a_step_for_the_worse_is_shortened_or_left(
    times: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = fit_of(1)
    cross, start = fit.grouped(CROSS), fit.start(TARGET, RANK)
    before, right = alternate(fit, cross, start, 0), alternate(fit, cross, start, 1)
    step, asked = Depthwise.first_step, []

    def wrong(self: Depthwise, cross: Tensor, second: Second, *others: Any) -> Tensor:
        asked.append(times)
        return second.first + times * (step(self, cross, second, *others) - second.first)

    monkeypatch.setattr(Depthwise, "first_step", wrong)
    monkeypatch.setattr(module, "LENGTHS", (1.0, 0.25))
    found = alternate(fit, cross, start, 1 if times > 0 else 3)
    torch.testing.assert_close(found.first, right.first if times > 0 else before.first)
    assert len(asked) == 1  # where nothing helps, it is not tried again


@EACH
def test_directions_have_one_variance_and_filters_are_orthonormal(each: int) -> None:
    fit = fit_of(each)
    second = alternate(fit, fit.grouped(CROSS), fit.start(TARGET, RANK), 2)
    factors = second.factors()
    assert isinstance(factors, DepthwiseFactors)
    tap = torch.stack([GRAM[t::TAPS, t::TAPS] for t in range(TAPS)]).mean(0)
    variances = torch.einsum("rc,cd,rd->r", factors.inputs, tap, factors.inputs)
    torch.testing.assert_close(variances, torch.ones(RANK).double())
    squares = factors.filters @ factors.filters.mT
    torch.testing.assert_close(squares, torch.eye(each).double().expand(RANK, -1, -1))


@EACH
def test_a_layer_that_is_such_a_chain_is_found(each: int) -> None:
    planted = some_factors(each).weight(filters_of(each))
    fit = fit_of(each)
    cross = fit.grouped(planted @ GRAM)
    found = alternate(fit, cross, fit.start(planted, RANK), 100).factors().weight(filters_of(each))
    whole = missing(torch.zeros_like(planted), planted)
    assert missing(found, planted) < 1e-4 * whole


def test_a_start_takes_a_direction_twice_where_its_second_filter_is_stronger() -> None:
    """One channel with two filters, and a faint other: both of the first come before the other."""
    fit = Filters(torch.arange(8).view(2, 4).T.contiguous()).quadratic(
        torch.eye(8, dtype=torch.float64), *roots(torch.eye(3, dtype=torch.float64))
    )
    weight = torch.zeros(3, 2, 4, dtype=torch.float64)
    weight[0, 0, 0], weight[1, 0, 1], weight[2, 1, 2] = 3.0, 2.0, 1.0
    first = fit.start(weight.reshape(3, -1), 2)
    torch.testing.assert_close(first[:, :2].abs(), torch.tensor([[1.0, 0.0]] * 2).double())
    torch.testing.assert_close(first[:, 2:].abs(), torch.eye(4).double()[:2])


def test_equal_rows_are_fitted() -> None:
    """More ranks than the layer has: rows of F are then the same, or nothing."""
    patches = torch.randn(400, WIDTH, generator=generator(8))
    gram = patches.T @ patches / 400
    target = torch.zeros(ROWS, CHANNELS, TAPS)
    target[:, :, 2] = torch.randn(ROWS, 1, generator=generator(9)) * torch.ones(CHANNELS)
    weight = target.reshape(ROWS, -1)
    fit = filters_of(1).quadratic(gram, torch.eye(ROWS), torch.eye(ROWS))
    found = alternate(fit, fit.grouped(weight @ gram), fit.start(weight, 6), 6).factors()
    missed = torch.linalg.vector_norm(found.weight(filters_of(1)) - weight)
    assert missed < 1e-3 * torch.linalg.vector_norm(weight)


def test_patches_that_are_not_finite_are_refused() -> None:
    fit, first = fit_of(1), some_first(1)
    with pytest.raises(SolverError, match="not finite"):
        fit.second_step(fit.grouped(CROSS), first, fit.products(first) * float("nan"))

"""Two halves fitted together, against dense linear algebra in float64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from converter.errors import SolverError
from converter.solver import crossed as module
from converter.solver.crossed import Crossed, CrossedFactors, Crossing, quadratic_of
from converter.solver.quadratic import Quadratic, alternate
from tests.converter.solver.conftest import SPATIAL, generator, positive, roots

ROWS, CHANNELS, SIDE, RANK = 6, 3, 3, 2
WIDTH = CHANNELS * SIDE * SIDE
_COLUMNS = torch.arange(WIDTH).view(CHANNELS, SIDE, SIDE)
CROSSING = Crossing(
    torch.stack(
        [
            _COLUMNS.permute(2, 0, 1).reshape(SIDE, -1),  # columns of the kernel: k×1, then 1×k
            _COLUMNS.permute(1, 0, 2).reshape(SIDE, -1),  # rows of it: 1×k, then k×1
        ]
    )
)
OMEGA, GRAM = positive(ROWS, 2), positive(WIDTH, 1)
TARGET = torch.randn(ROWS, WIDTH, generator=generator(3), dtype=torch.float64)
CROSS = TARGET @ GRAM


@pytest.fixture
def quadratic() -> Quadratic:
    return quadratic_of(GRAM, *roots(OMEGA), CROSSING)


def first_factors(seed: int = 4) -> Tensor:
    shape = (2, RANK, CHANNELS * SIDE)
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def missing(weight: Tensor) -> float:
    left = TARGET - weight
    return float(torch.trace(OMEGA @ left @ GRAM @ left.T))


def spread_out(first: Tensor) -> NDArray[np.float64]:
    """B, (2·T·r, D): V of each half where the columns of each of its groups are."""
    rows = []
    for half in (0, 1):
        for group in range(SIDE):
            block = np.zeros((RANK, WIDTH))
            block[:, CROSSING.columns[half, group].numpy()] = first[half].numpy()
            rows.append(block)
    return np.concatenate(rows)


def some_factors() -> CrossedFactors:
    second = torch.randn(ROWS, 2, SIDE, RANK, generator=generator(5), dtype=torch.float64)
    return CrossedFactors(first_factors(), second)


def test_each_kind_of_groups_has_its_fit() -> None:
    square = positive(4 * 3 * 2, 1)
    assert type(quadratic_of(square, *roots(OMEGA), SPATIAL)) is Quadratic
    assert type(quadratic_of(GRAM, *roots(OMEGA), CROSSING)) is Crossed


def test_what_factors_answer_and_cover_is_that_of_their_weight(quadratic: Quadratic) -> None:
    factors = some_factors()
    weight = factors.weight(CROSSING)
    dense = factors.second.reshape(ROWS, -1).numpy() @ spread_out(factors.first)
    np.testing.assert_allclose(weight.numpy(), dense, atol=1e-12)
    patches = torch.randn(20, WIDTH, generator=generator(6), dtype=torch.float64)
    torch.testing.assert_close(factors.respond(patches, CROSSING), patches @ weight.T)
    covered = factors.covered(CROSSING, quadratic.products(factors.first))
    torch.testing.assert_close(covered, weight @ GRAM)


def test_each_chain_is_one_half() -> None:
    factors = some_factors()
    total = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    for (first, second), columns in zip(factors.chains(), CROSSING.columns, strict=True):
        total[:, columns.reshape(-1)] += torch.einsum("ntr,rd->ntd", second, first).reshape(
            ROWS, -1
        )
    torch.testing.assert_close(total, factors.weight(CROSSING))


def test_all_k_are_one_least_squares(quadratic: Quadratic) -> None:
    first = first_factors()
    second = quadratic.second_step(CROSS, first, quadratic.products(first))
    b, g = spread_out(first), GRAM.numpy()
    expected = CROSS.numpy() @ b.T @ np.linalg.inv(b @ g @ b.T) @ b
    found = second.factors().weight(CROSSING).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)  # of the ridge


def test_both_v_are_one_linear_system(
    quadratic: Quadratic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HELD", 1e-12)
    factors = some_factors()
    found = quadratic.first_step(CROSS, factors, quadratic.products(factors.first), steps=300)
    # the weight is linear in all values of both V: least squares in the two metrics
    half, _ = roots(OMEGA)
    root = torch.linalg.cholesky(GRAM)
    units = torch.eye(factors.first.numel(), dtype=torch.float64)
    columns = [
        (half @ CrossedFactors(unit.view_as(factors.first), factors.second).weight(CROSSING) @ root)
        for unit in units
    ]
    matrix = torch.stack([each.reshape(-1) for each in columns], 1)
    wanted = (half @ TARGET @ root).reshape(-1, 1)
    best = torch.linalg.lstsq(matrix, wanted, driver="gelsd").solution.view_as(factors.first)
    for one, other in zip(found, best, strict=True):
        basis = torch.linalg.qr(other.T).Q
        torch.testing.assert_close(one.T @ one, basis @ basis.T, rtol=1e-5, atol=1e-5)


def test_the_alternation_never_raises_the_error(quadratic: Quadratic) -> None:
    first = quadratic.start(TARGET, RANK)
    errors = [
        missing(alternate(quadratic, CROSS, first, steps).factors().weight(CROSSING))
        for steps in range(12)
    ]
    for before, after in pairwise(errors):
        assert after <= before * (1 + 1e-6)
    assert errors[-1] < 0.9 * errors[0]


def test_a_sum_of_a_tall_and_a_wide_part_is_found() -> None:
    random = generator(7)
    planted = CrossedFactors(
        torch.randn(2, 1, CHANNELS * SIDE, generator=random, dtype=torch.float64),
        torch.randn(ROWS, 2, SIDE, 1, generator=random, dtype=torch.float64),
    ).weight(CROSSING)
    both = quadratic_of(GRAM, *roots(OMEGA), CROSSING)

    def left(quadratic: Quadratic, rank: int) -> float:
        start = quadratic.start(planted, rank)
        cross = quadratic.grouped(planted @ GRAM)
        found = alternate(quadratic, cross, start, 200).factors().weight(quadratic.groups)
        return float(torch.linalg.vector_norm(found - planted) / torch.linalg.vector_norm(planted))

    assert left(both, 1) < 1e-3
    for half in (0, 1):  # at the same cost, one chain of twice the rank
        alone = quadratic_of(GRAM, *roots(OMEGA), module.Groups(CROSSING.columns[half]))
        assert left(alone, 2) > 0.05


def test_halves_that_answer_the_same_are_fitted() -> None:
    """A kernel with nothing but its middle: either half may have it, and B's rows are then the same."""
    generator_ = generator(8)
    patches = torch.randn(400, WIDTH, generator=generator_)
    gram = patches.T @ patches / 400
    middle = torch.zeros(ROWS, CHANNELS, SIDE, SIDE)
    middle[:, :, 1, 1] = torch.randn(ROWS, CHANNELS, generator=generator_)
    target = middle.reshape(ROWS, -1)
    single = quadratic_of(gram, torch.eye(ROWS), torch.eye(ROWS), CROSSING)
    first = single.start(target, CHANNELS)
    factors = alternate(single, target @ gram, first, 4).factors()
    missed = torch.linalg.vector_norm(factors.weight(CROSSING) - target)
    assert missed < 1e-3 * torch.linalg.vector_norm(target)


def test_patches_that_are_not_finite_are_refused(quadratic: Quadratic) -> None:
    first = first_factors()
    with pytest.raises(SolverError, match="not finite"):
        quadratic.second_step(CROSS, first, quadratic.products(first) * float("nan"))


def test_fewer_ranks_start_with_the_first_rows(quadratic: Quadratic) -> None:
    first = first_factors()
    torch.testing.assert_close(quadratic.leading(first, 1), first[:, :1])
    found = quadratic.factors(first, torch.zeros(ROWS, 2 * SIDE * RANK))
    assert isinstance(found, CrossedFactors)

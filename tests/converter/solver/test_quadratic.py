"""Fits with a shared first factor against dense linear algebra in float64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from converter.solver import quadratic as module
from converter.solver.quadratic import Factors, Groups, Quadratic, alternate, covariance
from tests.converter.solver.conftest import (
    GROUPS,
    ROWS,
    SPATIAL,
    TUCKER,
    WHOLE,
    WIDTH,
    dense_target,
    generator,
    positive,
    roots,
)

Matrix = NDArray[np.float64]


def quadratic_of(groups: Groups) -> Quadratic:
    return Quadratic(positive(WIDTH, 1), *roots(positive(ROWS, 2)), groups)


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
    monkeypatch.setattr(module, "HELD", 1e-12)
    quadratic, first = quadratic_of(groups), first_factor(groups, 2)
    cross = quadratic.grouped(dense_target() @ positive(WIDTH, 1))
    second = quadratic.second_step(cross, first, quadratic.products(first))
    expected = dense_first_step(quadratic, cross, second.factors(limit).second)
    found = quadratic.first_step(cross, second, limit, steps=200).numpy()
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
    monkeypatch.setattr(module, "GRAM_BLOCK", block)
    rows = torch.randn(50, 24, generator=generator(0)) @ torch.randn(24, 24) + 1.5
    found = covariance(rows, rows.mean(0))
    expected = np.cov(rows.double().numpy().T, bias=True)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, found.T)


def test_covariance_of_patches_wider_than_a_block() -> None:
    rows = torch.randn(40, module.GRAM_BLOCK + 130, generator=generator(0))
    expected = np.cov(rows.double().numpy().T, bias=True)
    np.testing.assert_allclose(covariance(rows, rows.mean(0)).numpy(), expected, atol=1e-5)


def test_a_large_mean_does_not_swallow_the_covariance() -> None:
    rows = torch.randn(2000, 6, generator=generator(0)) + 1000
    expected = np.cov(rows.double().numpy().T, bias=True)
    # E[xy] − E[x]E[y] in float32 would be off by 0.1
    np.testing.assert_allclose(covariance(rows, rows.mean(0)).numpy(), expected, atol=1e-3)

"""Proximal maps against brute force, closed forms and random perturbations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from converter.solver import prox
from converter.solver.prox import activate, group_shrink, response_prox, singular_shrink, truncate
from passes.activation import IDENTITY, Activation

PIECEWISE = [
    IDENTITY,
    Activation("relu"),
    Activation("clip", low=0.0, high=6.0),
    Activation("clip", low=-1.0),
    Activation("clip", high=2.0),
    Activation("leaky_relu", slope=0.1),
    Activation("leaky_relu", slope=1.5),
]
SMOOTH = [Activation("silu"), Activation("hard_swish")]

TORCH_VERSION = {
    "identity": lambda y: y,
    "relu": functional.relu,
    "leaky_relu": lambda y: functional.leaky_relu(y, 0.1),
    "silu": functional.silu,
    "hard_swish": functional.hardswish,
    "clip": functional.relu6,
}

GRID = 2001

responses = st.lists(st.floats(-8, 8), min_size=2, max_size=12)
penalties = st.sampled_from([0.05, 0.3, 1.0, 5.0, 40.0])


def cost(activation: Activation, wanted: Tensor, v: Tensor, rho: float, z: Tensor) -> Tensor:
    return 0.5 * (wanted - activate(activation, z)) ** 2 + rho / 2 * (z - v) ** 2


def least_on_grid(activation: Activation, wanted: Tensor, v: Tensor, rho: float) -> Tensor:
    """No minimum lies farther from v than where the penalty alone exceeds the cost at v."""
    reach = (wanted - activate(activation, v)).abs() / math.sqrt(rho) + 1e-9
    grid = v + reach * torch.linspace(-1, 1, GRID, dtype=v.dtype)[:, None]
    return cost(activation, wanted, v, rho, grid).amin(0)


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize(
    "activation", [PIECEWISE[at] for at in (0, 1, 2, 5)] + SMOOTH, ids=lambda a: a.kind
)
def test_activate_is_the_function_of_torch(activation: Activation) -> None:
    y = torch.linspace(-9, 9, 181, dtype=torch.float64)
    expected = TORCH_VERSION[activation.kind](y)
    torch.testing.assert_close(activate(activation, y), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", [*PIECEWISE, Activation("hard_swish")], ids=str)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), original=responses, rho=penalties)
def test_response_prox_with_a_closed_form_is_nowhere_above_the_grid(
    activation: Activation, data: st.DataObject, original: list[float], rho: float
) -> None:
    wanted = activate(activation, torch.tensor(original, dtype=torch.float64))
    v = torch.tensor(
        data.draw(st.lists(st.floats(-8, 8), min_size=len(original), max_size=len(original))),
        dtype=torch.float64,
    )
    z = response_prox(activation, wanted, v, rho)
    assert z.shape == v.shape
    found = cost(activation, wanted, v, rho, z)
    assert torch.all(found <= least_on_grid(activation, wanted, v, rho) * (1 + 1e-12) + 1e-12)


@pytest.mark.parametrize("activation", [Activation("silu")], ids=str)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), original=responses, rho=penalties)
def test_response_prox_of_a_smooth_activation_is_nowhere_above_the_grid(
    activation: Activation, data: st.DataObject, original: list[float], rho: float
) -> None:
    wanted = activate(activation, torch.tensor(original, dtype=torch.float64))
    v = torch.tensor(
        data.draw(st.lists(st.floats(-8, 8), min_size=len(original), max_size=len(original))),
        dtype=torch.float64,
    )
    found = cost(activation, wanted, v, rho, response_prox(activation, wanted, v, rho))
    # not a closed form: Newton steps leave this much
    assert torch.all(found <= least_on_grid(activation, wanted, v, rho) * (1 + 1e-3) + 1e-5)
    assert torch.all(found <= cost(activation, wanted, v, rho, v))


@pytest.mark.parametrize(
    ("activation", "within"),
    [(Activation("hard_swish"), (1e-12, 1e-12)), (Activation("silu"), (1e-3, 1e-5))],
    ids=str,
)
def test_response_prox_of_a_curved_activation_is_right_all_over(
    activation: Activation, within: tuple[float, float]
) -> None:
    lowest = -0.375 if activation.kind == "hard_swish" else -0.278
    wanted, v = torch.meshgrid(
        torch.linspace(lowest, 8, 168, dtype=torch.float64),
        torch.linspace(-8, 8, 161, dtype=torch.float64),
        indexing="ij",
    )
    for rho in (0.05, 0.3, 1.0, 5.0):
        found = cost(activation, wanted, v, rho, response_prox(activation, wanted, v, rho))
        least = torch.stack(
            [least_on_grid(activation, w, x, rho) for w, x in zip(wanted, v, strict=True)]
        )
        relative, absolute = within
        assert torch.all(found <= least * (1 + relative) + absolute)


@pytest.mark.parametrize("activation", PIECEWISE + SMOOTH, ids=str)
def test_response_prox_leaves_what_is_already_right(activation: Activation) -> None:
    v = torch.linspace(-8, 8, 65, dtype=torch.float64)
    z = response_prox(activation, activate(activation, v), v, 1.0)
    torch.testing.assert_close(z, v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", [*PIECEWISE, *SMOOTH], ids=str)
def test_response_prox_is_the_same_for_parts(
    monkeypatch: pytest.MonkeyPatch, activation: Activation
) -> None:
    wanted, v = activate(activation, 3 * seeded(7, 5)), 3 * seeded(7, 5, seed=1)
    whole = response_prox(activation, wanted, v, 0.5)
    for together in (1, 12, 35):
        monkeypatch.setattr(prox, "TOGETHER", together)
        torch.testing.assert_close(
            response_prox(activation, wanted, v, 0.5), whole, rtol=0, atol=1e-12
        )
    assert response_prox(activation, wanted[:0], v[:0], 0.5).shape == (0, 5)


@pytest.mark.parametrize("rho", [0.25, 5.0, 1e4])
def test_response_prox_of_hard_swish_is_as_good_in_single_precision(rho: float) -> None:
    activation = Activation("hard_swish")
    wanted, v = activate(activation, 4 * seeded(2000)), 4 * seeded(2000, seed=1)
    exact = response_prox(activation, wanted, v, rho)
    found = response_prox(activation, wanted.float(), v.float(), rho).double()
    least = cost(activation, wanted, v, rho, exact)
    assert torch.all(cost(activation, wanted, v, rho, found) <= least * (1 + 1e-4) + 1e-8 * rho)


def test_response_prox_of_relu_leaves_free_what_the_relu_hides() -> None:
    wanted, v = torch.tensor([0.0, 0.0, 2.0]), torch.tensor([-3.0, 1.0, -0.1])
    z = response_prox(Activation("relu"), wanted, v, 1.0)
    torch.testing.assert_close(z, torch.tensor([-3.0, 0.5, 0.95]))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), threshold=st.floats(0, 4))
def test_group_shrink_minimises_its_objective(seed: int, threshold: float) -> None:
    blocks = seeded(3, 5, 2, seed=seed)

    def objective(x: Tensor) -> float:
        norms = torch.linalg.vector_norm(x, dim=(0, 2))
        return float(0.5 * (x - blocks).square().sum() + threshold * norms.sum())

    shrunk = group_shrink(blocks, threshold)
    norms = torch.linalg.vector_norm(blocks, dim=(0, 2))
    after = torch.linalg.vector_norm(shrunk, dim=(0, 2))
    torch.testing.assert_close(after, (norms - threshold).clamp_min(0))
    least = objective(shrunk)
    for step in range(20):
        direction = seeded(3, 5, 2, seed=seed + step + 1)
        assert least <= objective(shrunk + 0.05 * direction) + 1e-12
    removed = blocks * (seeded(5, seed=seed + 50) > 0)[:, None]
    assert least <= objective(removed) + 1e-12


def test_group_shrink_of_zeros_is_zero() -> None:
    assert not group_shrink(torch.zeros(2, 3, 4), 0.5).any()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), threshold=st.floats(0.05, 4), wide=st.booleans())
def test_singular_shrink_minimises_its_objective(seed: int, threshold: float, wide: bool) -> None:
    matrix = seeded(5, 8, seed=seed) if wide else seeded(8, 5, seed=seed)

    def objective(x: Tensor) -> float:
        nuclear = torch.linalg.matrix_norm(x, "nuc")
        return float(0.5 * (x - matrix).square().sum() + threshold * nuclear)

    shrunk, rank, nuclear = singular_shrink(matrix, threshold, 8)
    u, s, vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
    left = np.maximum(s - threshold, 0)
    np.testing.assert_allclose(shrunk.numpy(), (u * left) @ vh, atol=1e-9)
    assert rank == int((s > threshold).sum())
    assert nuclear == pytest.approx(left.sum(), abs=1e-9)
    least = objective(shrunk)
    for step in range(10):
        direction = seeded(*matrix.shape, seed=seed + step + 1)
        assert least <= objective(shrunk + 0.05 * direction) + 1e-9


def test_singular_shrink_cuts_ranks_above_the_most() -> None:
    matrix = seeded(6, 9)
    shrunk, rank, nuclear = singular_shrink(matrix, 0.01, 2)
    s = np.linalg.svd(matrix.numpy(), compute_uv=False)
    assert rank == 2
    assert np.linalg.matrix_rank(shrunk.numpy()) == 2
    assert nuclear == pytest.approx(s[:2].sum() - 0.02)


def test_singular_shrink_above_every_value_is_zero() -> None:
    shrunk, rank, nuclear = singular_shrink(seeded(4, 6), 100.0, 4)
    assert (rank, nuclear) == (0, 0.0)
    assert shrunk.shape == (4, 6)
    assert not shrunk.any()


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
@pytest.mark.parametrize("rank", [0, 1, 3, 6])
def test_truncate_is_the_best_of_its_rank(shape: tuple[int, int], rank: int) -> None:
    matrix = seeded(*shape)
    left, right = truncate(matrix, rank)
    assert left.shape == (shape[0], rank)
    assert right.shape == (rank, shape[1])
    s = np.linalg.svd(matrix.numpy(), compute_uv=False)
    missed = float((matrix - left @ right).square().sum())
    assert missed == pytest.approx((s[rank:] ** 2).sum(), rel=1e-9, abs=1e-18)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_truncate_in_single_precision_keeps_a_steep_spectrum(shape: tuple[int, int]) -> None:
    # 1e-3 and 1e-4 of the largest: what float32 holds well, but its Gram matrix would not
    u = torch.linalg.qr(seeded(shape[0], 5, seed=1)).Q
    v = torch.linalg.qr(seeded(shape[1], 5, seed=2)).Q
    spectrum = torch.tensor([1.0, 1e-1, 1e-2, 1e-3, 1e-4], dtype=torch.float64)
    matrix = ((u * spectrum) @ v.T).float()
    left, right = truncate(matrix, 4)
    missed = torch.linalg.matrix_norm(matrix.double() - left.double() @ right.double())
    assert float(missed) == pytest.approx(1e-4, rel=0.05)


def decaying(rows: int, columns: int, decay: float) -> Tensor:
    small = min(rows, columns)
    u = torch.linalg.qr(seeded(rows, small, seed=1)).Q
    v = torch.linalg.qr(seeded(columns, small, seed=2)).Q
    return (u * decay ** torch.arange(small, dtype=torch.float64)) @ v.T


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_the_randomised_branch_is_close_to_the_exact_one(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = decaying(*shape, decay=0.7)
    exact_left, exact_right = truncate(matrix, 6)
    exact, exact_rank, exact_nuclear = singular_shrink(matrix, 0.7**5 * 0.9, 10)
    monkeypatch.setattr(prox, "DENSE_LIMIT", 8)
    left, right = truncate(matrix, 6)
    assert (left.shape, right.shape) == (exact_left.shape, exact_right.shape)
    torch.testing.assert_close(left @ right, exact_left @ exact_right, rtol=0, atol=1e-6)
    shrunk, rank, nuclear = singular_shrink(matrix, 0.7**5 * 0.9, 10)
    assert rank == exact_rank
    assert nuclear == pytest.approx(exact_nuclear, abs=1e-6)
    torch.testing.assert_close(shrunk, exact, rtol=0, atol=1e-6)


def test_the_randomised_branch_is_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prox, "DENSE_LIMIT", 8)
    matrix = decaying(40, 60, decay=0.9)
    first = truncate(matrix, 5)
    torch.manual_seed(3)  # the caller's generator neither matters nor is used
    state = torch.get_rng_state()
    second = truncate(matrix, 5)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(state, torch.get_rng_state())

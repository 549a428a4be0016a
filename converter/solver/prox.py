"""Proximal maps: of the activation error, of the group norm, of the nuclear norm, of a rank.

Sources: Boyd, Parikh, Chu, Peleato, Eckstein, "Distributed Optimization and Statistical Learning via
the Alternating Direction Method of Multipliers" (2011); Cai, Candès, Shen, arXiv:0810.3286 (singular
value thresholding); Halko, Martinsson, Tropp, arXiv:0909.4061 (the randomised range finder).
"""

from __future__ import annotations

import torch
from torch import Tensor

from passes.activation import Activation

__all__ = ["activate", "group_shrink", "response_prox", "singular_shrink", "truncate"]

DENSE_LIMIT = 1024
"""Up to so many rows a full eigendecomposition is used; above it, a randomised one of the rank asked for."""

NEWTON_STEPS = 8
NEWTON_STARTS = (-2.99, -1.5, 0.0, 1.5, 2.99)


def activate(activation: Activation, y: Tensor) -> Tensor:
    """Apply φ elementwise."""
    if activation.kind == "relu":
        return y.clamp_min(0)
    if activation.kind == "clip":
        return y.clamp(activation.low, activation.high)
    if activation.kind == "leaky_relu":
        return torch.where(y >= 0, y, activation.slope * y)
    if activation.kind == "silu":
        return y * torch.sigmoid(y)
    if activation.kind == "hard_swish":
        return y * (y / 6 + 0.5).clamp(0, 1)
    return y


def response_prox(activation: Activation, wanted: Tensor, v: Tensor, rho: float) -> Tensor:
    """Minimise ½ (wanted − φ(z))² + ρ/2 (z − v)² over z, elementwise.

    Parameters
    ----------
    activation : Activation
    wanted : Tensor
        φ of the original response.
    v : Tensor
        What the constraint asks of z; same shape as `wanted`.
    rho : float
        Penalty, above 0.

    Returns
    -------
    Tensor
        The exact minimum where φ is piecewise linear; for SiLU and HardSwish the best of a few
        safeguarded Newton descents and of the starting points.
    """
    if activation.kind == "identity":
        return (wanted + rho * v) / (1 + rho)
    if activation.kind in ("relu", "leaky_relu", "clip"):
        return _best_candidate(
            activation, wanted, v, rho, _piecewise_minima(activation, wanted, v, rho)
        )
    return _newton(activation, wanted, v, rho)


def _piecewise_minima(
    activation: Activation, wanted: Tensor, v: Tensor, rho: float
) -> list[Tensor]:
    """Give the minimum of each linear branch of φ, held inside its branch."""
    middle = (wanted + rho * v) / (1 + rho)
    if activation.kind == "relu":
        return [middle.clamp_min(0), v.clamp_max(0)]
    if activation.kind == "leaky_relu":
        slope = activation.slope
        return [
            middle.clamp_min(0),
            ((slope * wanted + rho * v) / (slope * slope + rho)).clamp_max(0),
        ]
    candidates = [middle.clamp(activation.low, activation.high)]
    if activation.low > float("-inf"):
        candidates.append(v.clamp_max(activation.low))
    if activation.high < float("inf"):
        candidates.append(v.clamp_min(activation.high))
    return candidates


def _best_candidate(
    activation: Activation, wanted: Tensor, v: Tensor, rho: float, candidates: list[Tensor]
) -> Tensor:
    def cost(z: Tensor) -> Tensor:
        return (wanted - activate(activation, z)).square() + rho * (z - v).square()

    best, least = candidates[0], cost(candidates[0])
    for candidate in candidates[1:]:
        value = cost(candidate)
        better = value < least
        best, least = torch.where(better, candidate, best), torch.where(better, value, least)
    return best


def _slopes(activation: Activation, z: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivative of φ for the smooth (or piecewise quadratic) activations."""
    if activation.kind == "silu":
        s = torch.sigmoid(z)
        first = s * (1 + z * (1 - s))
        return first, s * (1 - s) * (2 + z * (1 - 2 * s))
    inside = ((z > -3) & (z < 3)).to(z.dtype)
    above = (z >= 3).to(z.dtype)
    return inside * (z / 3 + 0.5) + above, inside / 3


def _newton(activation: Activation, wanted: Tensor, v: Tensor, rho: float) -> Tensor:
    starts = [v, wanted, *(torch.full_like(v, at) for at in NEWTON_STARTS)]
    candidates = list(starts)
    if activation.kind == "hard_swish":  # its outer branches are linear: exact there
        candidates += [v.clamp_max(-3), ((wanted + rho * v) / (1 + rho)).clamp_min(3)]
    for start in starts:
        z = start
        for _ in range(NEWTON_STEPS):
            first, second = _slopes(activation, z)
            error = activate(activation, z) - wanted
            gradient = error * first + rho * (z - v)
            # the Gauss-Newton curvature is positive where the true one may not be
            curvature = (first.square() + error * second + rho).clamp_min(rho)
            z = z - (gradient / curvature).clamp(-4, 4)
        candidates.append(z)
    return _best_candidate(activation, wanted, v, rho, candidates)


def group_shrink(blocks: Tensor, threshold: float) -> Tensor:
    """Shrink each group's norm by `threshold`: prox of threshold · Σ‖S_c‖.

    Parameters
    ----------
    blocks : Tensor of shape (N, g, k)
        Groups along the second axis.
    """
    norms = torch.linalg.vector_norm(blocks, dim=(0, 2), keepdim=True)
    kept: Tensor = (1 - threshold / norms.clamp_min(1e-30)).clamp_min(0)
    return blocks * kept


def _left_vectors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Leading singular values and left vectors of `matrix` (N, m), descending; at least `rank` of them."""
    rows, columns = matrix.shape
    if min(rows, columns) <= DENSE_LIMIT and rows <= columns:
        # the Gram matrix squares the condition number, hence float64
        values, vectors = torch.linalg.eigh(matrix.double() @ matrix.double().T)
        return values.flip(0).clamp_min(0).sqrt().to(matrix.dtype), vectors.flip(1).to(matrix.dtype)
    if min(rows, columns) <= DENSE_LIMIT:
        vectors, values, _ = torch.linalg.svd(matrix, full_matrices=False)
        return values, vectors
    generator = torch.Generator(device="cpu").manual_seed(0)
    width = min(rank + 16, rows, columns)
    probe = torch.randn(columns, width, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ probe).Q
    for _ in range(2):
        basis = torch.linalg.qr(matrix @ (matrix.T @ basis)).Q
    vectors, values, _ = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return values, basis @ vectors


def singular_shrink(matrix: Tensor, threshold: float, most: int) -> tuple[Tensor, int, float]:
    """Shrink singular values by `threshold`: prox of threshold · ‖L‖_*.

    Parameters
    ----------
    matrix : Tensor of shape (N, m)
    threshold : float
    most : int
        Ranks above it are cut off; only larger matrices than `DENSE_LIMIT` gain by it.

    Returns
    -------
    tuple of (Tensor, int, float)
        The shrunk matrix, its rank, and its nuclear norm.
    """
    values, vectors = _left_vectors(matrix, most)
    rank = min(int((values > threshold).sum()), max(most, 1))
    kept = values[:rank] - threshold
    factor = kept / values[:rank].clamp_min(1e-30)
    left = vectors[:, :rank]
    return (left * factor) @ (left.T @ matrix), rank, float(kept.sum())


def truncate(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best rank-`rank` factors (N, r), (r, m) of a matrix in the Frobenius norm."""
    left = _left_vectors(matrix, rank)[1][:, :rank]
    return left, left.T @ matrix

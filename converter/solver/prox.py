"""Proximal maps: of the activation error, of the group norm, of the nuclear norm, of a rank.

Sources: Boyd, Parikh, Chu, Peleato, Eckstein, "Distributed Optimization and Statistical Learning via
the Alternating Direction Method of Multipliers" (2011); Cai, Candès, Shen, arXiv:0810.3286 (singular
value thresholding); Halko, Martinsson, Tropp, arXiv:0909.4061 (the randomised range finder).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from passes.activation import Activation

__all__ = ["activate", "group_shrink", "response_prox", "singular_shrink", "truncate"]

DENSE_LIMIT = 1024
"""Up to so many rows a full eigendecomposition is used; above it, a randomised one of the rank asked for."""

NEWTON_STEPS, LEAST_CURVATURE = 4, 0.3
"""Of each descent through SiLU: steps, and the least curvature that one counts with, in units of ρ. With ρ
itself some of them creep."""
RISING = -0.8
"""Where the descent on the rising side of SiLU, whose lowest point is at -1.28, starts at the least."""
TOGETHER = 2**17
"""Elements that a CPU works on at once, so that what is made of them on the way stays in its caches."""


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
        The exact minimum; for SiLU the best of two safeguarded Newton descents and of where they started,
        one for each side of the least value of φ.
    """
    if activation.kind == "identity":
        return (wanted + rho * v) / (1 + rho)
    minima = _MINIMA.get(activation.kind, _piecewise_minima)

    def least(wanted: Tensor, v: Tensor) -> Tensor:
        return _best_candidate(activation, wanted, v, rho, minima(activation, wanted, v, rho))

    together = TOGETHER * len(v) // max(v.numel(), 1) if v.device.type == "cpu" else len(v)
    parts = [torch.split(each, max(together, 1)) for each in (wanted, v)]
    return torch.cat([least(*part) for part in zip(*parts, strict=True)])


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


def _silu_minima(activation: Activation, wanted: Tensor, v: Tensor, rho: float) -> list[Tensor]:
    del activation
    starts = [v, ((wanted + rho * v) / (1 + rho)).clamp_min(RISING)]
    candidates = list(starts)
    for start in starts:
        z = start
        for _ in range(NEWTON_STEPS):
            s = torch.sigmoid(z)
            value, rest = z * s, 1 - s
            first = s + value * rest
            second = rest * (first + s - value * s)
            error = value - wanted
            gradient = error * first + rho * (z - v)
            curvature = first.square() + error * second + rho  # not positive everywhere
            curvature = curvature.clamp_min(LEAST_CURVATURE * rho)
            z = z - (gradient / curvature).clamp(-4, 4)
        candidates.append(z)
    return candidates


def _hard_swish_minima(
    activation: Activation, wanted: Tensor, v: Tensor, rho: float
) -> list[Tensor]:
    """Give the minimum of both linear branches, and the least and the largest of the one between them.

    There φ = (t² − 9/4) / 6 with t = z + 3/2, so that a minimum is a root of a cubic, t³ + p t + q.
    """
    del activation
    p = 18 * rho - 6 * wanted - 2.25
    q = -18 * rho * (1.5 + v)
    scale = (p.abs() / 3).sqrt().clamp_min(1e-4)
    x = q / (2 * scale**3)
    far = x.abs().clamp_min(1)
    single = torch.where(
        p > 0,
        torch.sinh(torch.asinh(x) / 3),
        torch.cosh(torch.acosh(far) / 3).copysign(x),
    )
    angle = torch.acos(-x.clamp(-1, 1)) / 3
    several = (p < 0) & (x.abs() < 1)
    largest = torch.where(several, torch.cos(angle), -single)
    least = torch.where(several, torch.cos(angle + 2 * math.pi / 3), -single)
    inner = [(2 * scale * each - 1.5).clamp(-3, 3) for each in (largest, least)]
    return [v, *inner, v.clamp_max(-3), ((wanted + rho * v) / (1 + rho)).clamp_min(3)]


_MINIMA = {"silu": _silu_minima, "hard_swish": _hard_swish_minima}


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

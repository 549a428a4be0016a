"""One layer's problem, and the coordinates in which it is solved.

Symbols
-------
W : weight of shape (N, D); D = C · k for C input channels and k kernel taps.
x̂ : a patch as the converted layers before deliver it; f = basis · x̂ its features, of length m.
p : the original's response (plus its shortcut), what is wanted is φ(p).
o : the shortcut that the converted graph adds, 0 without one.
Ω : output metric (N, N): ‖Ω^½ e‖² is what a response error e does to the network's output.
R : Cholesky factor of the features' damped covariance; q = R⁻¹(f − mean) are whitened features.

The objective is 1/2n · Σ ‖Ω^½ (φ(p) − φ(A f + b + o))‖², over 1/2n · Σ ‖Ω^½ (φ(p) − mean)‖², so that 1
is as bad as a constant and errors of layers can be compared. Matrices with a tilde in the comments are
Ω^½ · A · R: in these coordinates the Frobenius norm is the error that a change of A causes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from converter.errors import SolverError
from converter.solver.prox import activate
from passes.activation import Activation

__all__ = [
    "DAMPING",
    "Coordinates",
    "Patches",
    "Problem",
    "caution",
    "damping",
    "factor_of",
    "metric_roots",
]

DAMPING = 1e-2
"""Share of the mean variance that is added to every feature's; directions that the patches hardly
know are then hardly moved, which also keeps the fit from learning its own patches by heart."""

SCARCE = 0.2
"""Where patches are few for their length, this times length over number is added instead: on the deep
layers of a VGG-16 (4,608 values, 7,000 to 16,000 patches) it lowered the error on patches and on images
that the fits did not see, and raised it on those they saw."""

UNCERTAIN = 3.0
"""What is learned beside W, to undo what the layers before have lost, is mostly noise of the patches it is
learned from where those are few: on the last six layers of a VGG-16 it took the error of the network from
0.0017 to 0.0010 on the images of the fit, and from 0.0018 to 0.0024 on others. It is damped by this times
length over number; with 1 and with 3 the error on others fell to 0.0023, on those of the fit it rose."""

METRIC_FLOOR = 1e-2
"""Share of the mean of Ω's diagonal that is added to it: no direction of the response is free."""


def damping(width: int, patches: int) -> float:
    """Share of the mean variance that is added to that of each of `width` features, known by `patches`."""
    return max(DAMPING, SCARCE * width / max(patches, 1))


def caution(width: int, patches: int) -> float:
    """Share of the mean variance that damps what is learned beside W, at least that of `damping`."""
    return max(DAMPING, UNCERTAIN * width / max(patches, 1))


@dataclass(frozen=True)
class Problem:
    """What a solver gets.

    Attributes
    ----------
    weight : Tensor of shape (N, D), float32
    bias : Tensor of shape (N,), float32
    channels : int
        Input channels C; each has D / C consecutive columns.
    features : Tensor of shape (n, m), float32
        Features of the patches: the patches themselves (m = D) where `basis` is None.
    basis : Tensor of shape (m, D) or None
        Features as a function of patches. Its last rows must be unit vectors: the taps of the
        channels in `eligible`. Its first rows must hold W itself.
    eligible : Tensor of shape (g,), int64
        Channels that S may keep; their taps are the last g · k features, in this order.
    target : Tensor of shape (n, N), float32
        p: the original before the activation.
    offset : Tensor of shape (n, N) or None
        o: what the converted graph adds to the response.
    unseen : Tensor of shape (n,), bool
        Patches that are kept back from the fit.
    activation : Activation
    metric : Tensor of shape (N, N), float64, or None
        Ω; None is the identity.
    """

    weight: Tensor
    bias: Tensor
    channels: int
    features: Tensor
    basis: Tensor | None
    eligible: Tensor
    target: Tensor
    offset: Tensor | None
    unseen: Tensor
    activation: Activation
    metric: Tensor | None = None

    @property
    def taps(self) -> int:
        """Kernel taps of one channel, k."""
        return self.weight.shape[1] // self.channels


@dataclass(frozen=True)
class Patches:
    """Some of the patches: whitened features (n, m), φ(p), p and o, each (n, N)."""

    q: Tensor
    wanted: Tensor
    target: Tensor
    offset: Tensor | None

    @property
    def response(self) -> Tensor:
        """What the layer itself should answer, (n, N): p − o."""
        return self.target if self.offset is None else self.target - self.offset

    def thinned(self, most: int) -> Patches:
        """Every so many-th patch, at most `most` of them."""
        step = -(-len(self.q) // most)
        offset = None if self.offset is None else self.offset[::step]
        return Patches(self.q[::step], self.wanted[::step], self.target[::step], offset)


class Coordinates:
    """The whitened problem: computed once, shared by every candidate of a layer.

    Raises
    ------
    SolverError
        Where features, targets or metric are not finite.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        seen = ~problem.unseen
        features = problem.features[seen]
        if len(features) < 2:
            raise SolverError(
                "a layer has fewer than 2 patches to fit on; calibrate with more images"
            )
        self.mean = features.mean(0)
        centred = features - self.mean
        covariance = (centred.T @ centred).double() / len(centred)
        scale = float(covariance.diagonal().mean())
        recorded = [problem.features, problem.target, covariance]
        recorded += [] if problem.offset is None else [problem.offset]
        if not all(bool(torch.isfinite(each).all()) for each in recorded):
            raise SolverError(
                "a layer's recorded activations are not finite; look for NaN or infinite values"
            )
        share = damping(len(covariance), len(features))
        covariance.diagonal().add_(share * scale if scale > 0 else 1.0)
        self.root = torch.linalg.cholesky(covariance).to(features.dtype)
        self.half, self.inverse_half = metric_roots(problem.metric, problem.weight)
        self.seen = self._side(features, seen)
        self.unseen = self._side(problem.features[problem.unseen], problem.unseen)
        weight = self.root[: len(problem.weight)] if problem.basis is not None else None
        self.original = self.half @ (problem.weight @ self.root if weight is None else weight)
        wanted = self.seen.wanted
        spread = ((wanted - wanted.mean(0)) @ self.half).square().sum() / len(wanted)
        self.spread = float(spread) if float(spread) > 0 else 1.0

    def _side(self, features: Tensor, rows: Tensor) -> Patches:
        problem = self.problem
        q = torch.linalg.solve_triangular(
            self.root, (features - self.mean).T, upper=False
        ).T.contiguous()
        offset = None if problem.offset is None else problem.offset[rows]
        return Patches(
            q, activate(problem.activation, problem.target[rows]), problem.target[rows], offset
        )

    def respond(self, side: Patches, matrix: Tensor, bias: Tensor) -> Tensor:
        """Give the response plus shortcut of Ã = `matrix` (N, m): shape (n, N)."""
        response = (side.q @ matrix.T) @ self.inverse_half + bias
        return response if side.offset is None else response + side.offset

    def error(self, side: Patches, total: Tensor) -> float:
        """Relative squared error after the activation of a response plus shortcut (n, N), in the metric."""
        if not len(total):
            return 0.0
        missed = (activate(self.problem.activation, total) - side.wanted) @ self.half
        return float(missed.square().sum()) / len(total) / self.spread

    def regress(self, side: Patches, residual: Tensor) -> Tensor:
        """Correlate a response residual (n, N) with the whitened features: Ω^½ dᵀq/n, (N, m)."""
        return self.half @ (residual.T @ side.q) / len(residual)

    def unwhiten(self, matrix: Tensor) -> Tensor:
        """Turn rows over whitened features (·, m) into rows over features."""
        rows: Tensor = torch.linalg.solve_triangular(self.root, matrix, upper=False, left=False)
        return rows


def metric_roots(metric: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Ω^½ and its inverse, scaled so that the mean of Ω's diagonal is 1.

    Parameters
    ----------
    metric : Tensor of shape (N, N), float64, or None
        Ω; None is the identity.
    like : Tensor of shape (N, ...)
        Gives N, dtype and device of the result.

    Raises
    ------
    SolverError
        Where Ω is not finite.
    """
    identity = torch.eye(len(like), dtype=like.dtype, device=like.device)
    if metric is None:
        return identity, identity
    metric = metric.double()
    mean = float(metric.diagonal().mean())
    if not torch.isfinite(metric).all():
        raise SolverError("a layer's output metric is not finite; look for NaN or infinite values")
    if mean <= 0:
        return identity, identity
    # Ω + floor · I = U (s + floor) Uᵀ + floor · (I − U Uᵀ), U being few columns where Ω is of low rank
    factor = factor_of(metric / mean)
    values, vectors = torch.linalg.eigh(factor.T @ factor)
    values = values.clamp_min(torch.finfo(values.dtype).tiny)
    vectors = factor @ (vectors / values.sqrt())
    root, floor = (values + METRIC_FLOOR).sqrt(), math.sqrt(METRIC_FLOOR)
    whole = torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
    half = floor * whole + (vectors * (root - floor)) @ vectors.T
    inverse_half = whole / floor + (vectors * (1 / root - 1 / floor)) @ vectors.T
    return half.to(like.dtype), inverse_half.to(like.dtype)


def factor_of(matrix: Tensor) -> Tensor:
    """Give F with F Fᵀ = `matrix`, with as many columns as its numerical rank: a pivoted Cholesky factor.

    Metrics and covariances of long responses are of low rank, since images are few: a 4,096-long one
    took a minute for its eigenvalues, and takes a second for this and those of FᵀF.

    Parameters
    ----------
    matrix : Tensor of shape (N, N), float64
        Symmetric and positive semidefinite.

    Returns
    -------
    Tensor of shape (N, k), float64
        At least one column.
    """
    from scipy.linalg import lapack

    lower, pivots, rank, _ = lapack.dpstrf(matrix.cpu().numpy(), lower=1)
    rank = max(int(rank), 1)
    factor = np.zeros((len(lower), rank))
    factor[pivots - 1] = np.tril(lower)[:, :rank]
    return torch.from_numpy(factor).to(matrix.device)

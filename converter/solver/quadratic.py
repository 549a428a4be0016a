"""L with a shared first factor: Ŵ_t = K_t V for groups t of columns, fitted in the metric of the data.

Symbols
-------
W : weight of shape (N, D), its columns split into T groups of d: W_t of shape (N, d).
V : first factor (r, d), the same for all groups; K_t : (N, r), K = [K_1 … K_T] of shape (N, T·r).
G : damped covariance of the patches (D, D); Ω : output metric (N, N).
P : T G (N, D), where T is the dense layer that is wanted. Nothing here needs T itself.

Two factorisations have this shape. `spatial` (Jaderberg et al., arXiv:1405.3866) has one group for
each column of the kernel and d = C·kh: V is the kh×1 Conv, K the 1×kw one. `tucker` (Kim et al.,
arXiv:1511.06530) has one group for each tap and d = C, and K of rank r₂: V is the first 1×1 Conv,
K = U · core the other two.

The error tr Ω (T − Ŵ) G (T − Ŵ)ᵀ is least over K in closed form, K = P Bᵀ (B G Bᵀ)⁻¹ with B = I_T ⊗ V,
for any Ω (with the rank of K limited, by a truncated SVD in both metrics). Over V it is a linear system
Σ_tu (K_tᵀ Ω K_u) V G_ut = Σ_t K_tᵀ Ω P_t, which a few conjugate-gradient steps solve well enough, with
(Σ_t K_tᵀ Ω K_t) ⊗ (Σ_t G_tt / T) as preconditioner. The two alternate. A step costs about r·D² for each
product with G.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from converter.errors import SolverError
from converter.solver.problem import DAMPING
from converter.solver.prox import truncate

__all__ = [
    "Factors",
    "Groups",
    "Quadratic",
    "Second",
    "alternate",
    "covariance",
    "damped",
    "regular",
]

CONJUGATE_STEPS = 6
"""Of a step of V, where a form is fitted."""
RIDGE = 1e-7
"""Share of the mean diagonal that keeps the small normal matrices regular; they are float64."""
HELD = 1e-4
"""Share of K's mean energy for one rank that ties a step of V to the V before it: where the rank is above
that of the target, nothing else does, and round-off would grow without bound."""
GRAM_BLOCK = 1024


@dataclass(frozen=True)
class Groups:
    """How columns share the first factor.

    Attributes
    ----------
    columns : Tensor of shape (T, d), int64
        Columns of W, group by group; each once.
    """

    columns: Tensor

    @property
    def order(self) -> Tensor:
        """All columns, group by group, (D,)."""
        return self.columns.reshape(-1)


@dataclass(frozen=True)
class Factors:
    """V (r, d) and K (N, T, r); where the rank of K is limited, K = outer (N, r₂) · core (r₂, T, r)."""

    first: Tensor
    second: Tensor
    core: Tensor | None = None
    outer: Tensor | None = None

    def weight(self, groups: Groups) -> Tensor:
        """Return Ŵ (N, D), its columns where they belong."""
        grouped = torch.einsum("ntr,rd->ntd", self.second, self.first)
        total = torch.empty(len(grouped), groups.order.numel()).to(grouped)
        total[:, groups.order] = grouped.reshape(len(grouped), -1)
        return total


@dataclass
class Second:
    """The best K for one V, before its rank is limited.

    Attributes
    ----------
    quadratic : Quadratic
    first : Tensor of shape (r, d)
    root : Tensor of shape (T·r, T·r)
        Cholesky factor of B G Bᵀ.
    whitened : Tensor of shape (N, T·r)
        K · root.
    products : Tensor of shape (T, r, T, d)
        `Quadratic.products` of V; the dearest part of a step, so they are handed on.
    """

    quadratic: Quadratic
    first: Tensor
    root: Tensor
    whitened: Tensor
    products: Tensor
    _left: Tensor | None = None

    def factors(self, limit: int | None = None) -> Factors:
        """V and K; of rank `limit` at most, which truncates an SVD in the metrics of data and output."""
        shape = (self.quadratic.count, len(self.first))
        if limit is None:
            second = torch.linalg.solve_triangular(
                self.root, self.whitened, upper=False, left=False
            )
            return Factors(self.first, second.view(-1, *shape))
        measured = self.quadratic.half @ self.whitened
        if self._left is None or self._left.shape[1] < limit:
            self._left = truncate(measured, max(limit, min(measured.shape)))[0]
        left = self._left[:, :limit]
        core = torch.linalg.solve_triangular(
            self.root, left.T @ measured, upper=False, left=False
        ).view(-1, *shape)
        outer = self.quadratic.inverse_half @ left
        return Factors(self.first, torch.einsum("nq,qtr->ntr", outer, core), core, outer)


class Quadratic:
    """What a fit in the metric of the data needs of the patches, sorted into groups.

    Parameters
    ----------
    gram : Tensor of shape (D, D)
        G, damped.
    half, inverse_half : Tensor of shape (N, N)
        Ω^½ and its inverse.
    groups : Groups
    """

    def __init__(self, gram: Tensor, half: Tensor, inverse_half: Tensor, groups: Groups) -> None:
        self.groups = groups
        self.count, self.inner = groups.columns.shape
        order = groups.order
        shape = (self.count, self.inner, self.count, self.inner)
        self.gram = gram[order][:, order].view(shape)
        self.half, self.inverse_half = half, inverse_half
        self.metric = half @ half
        self._mean = torch.stack([self.gram[t, :, t] for t in range(self.count)]).mean(0)
        self._root = torch.linalg.cholesky(regular(self._mean.double())).to(gram.dtype)

    def within(self, gram: Tensor) -> Quadratic:
        """Give the same in another metric of the data (D, D)."""
        return Quadratic(gram, self.half, self.inverse_half, self.groups)

    def grouped(self, matrix: Tensor) -> Tensor:
        """Sort the columns of a matrix (N, D) into (N, T, d)."""
        return matrix[:, self.groups.order].view(len(matrix), self.count, self.inner)

    def products(self, first: Tensor) -> Tensor:
        """V G_ut for all groups u and t: (T_u, r, T_t, d)."""
        rows = [first @ self.gram[u].reshape(self.inner, -1) for u in range(self.count)]
        return torch.stack(rows).view(self.count, len(first), self.count, self.inner)

    def start(self, weight: Tensor, rank: int) -> Tensor:
        """V of an SVD of the groups side by side, in the mean metric of one group: (r, d)."""
        grouped = self.half @ self.grouped(weight).reshape(len(weight), -1)
        stacked = grouped.view(-1, self.inner) @ self._root
        vectors, _ = truncate(stacked.T, rank)
        return _orthonormal(torch.linalg.solve_triangular(self._root.T, vectors, upper=True).T)

    def precondition(self, residual: Tensor, inner: Tensor) -> Tensor:
        """Apply the inverse of `inner` ⊗ mean G to a residual (r, d); `inner` is a Cholesky factor."""
        right = torch.cholesky_solve(residual.T, self._root).T
        return torch.cholesky_solve(right, inner)

    def second_step(self, cross: Tensor, first: Tensor, products: Tensor) -> Second:
        """Best K for V, of any rank."""
        rank = len(first)
        normal = (products @ first.T).reshape(self.count * rank, -1).double()
        root = torch.linalg.cholesky(regular((normal + normal.T) / 2)).to(first.dtype)
        seen = (cross @ first.T).reshape(len(cross), -1)
        whitened = torch.linalg.solve_triangular(root, seen.T, upper=False).T
        return Second(self, first, root, whitened, products)

    def first_step(self, cross: Tensor, factors: Factors, products: Tensor, steps: int) -> Tensor:
        """Better V for K: conjugate gradients from the V at hand, which `HELD` ties it to."""
        first, second = factors.first, factors.second
        rank = len(first)
        weighed = torch.einsum("mn,ntr->mtr", self.metric, second)
        pairs = torch.einsum("ntr,nus->trus", weighed, second)
        inner = torch.stack([pairs[t, :, t] for t in range(self.count)]).sum(0).double()
        held = HELD * float(inner.diagonal().mean()) or 1.0
        inner.diagonal().add_(held)
        factor = torch.linalg.cholesky(inner).to(first.dtype)
        matrix = pairs.permute(1, 2, 3, 0).reshape(rank, -1)

        def apply(given: Tensor) -> Tensor:  # Σ_tu (K_tᵀ Ω K_u) · (V G_ut)
            return matrix @ given.reshape(-1, self.inner)

        wanted = torch.einsum("ntr,ntd->rd", weighed, cross)
        residual = wanted - apply(products)
        direction = ahead = self.precondition(residual, factor)
        before = float((residual * ahead).sum())
        for _ in range(steps):
            if before <= 0:
                break
            moved = apply(self.products(direction)) + held * (direction @ self._mean)
            curvature = float((direction * moved).sum())
            if curvature <= 0 or not math.isfinite(curvature):
                break
            length = before / curvature
            first = first + length * direction
            residual = residual - length * moved
            ahead = self.precondition(residual, factor)
            after = float((residual * ahead).sum())
            direction = ahead + (after / before) * direction
            before = after
        return _orthonormal(first)


def alternate(
    quadratic: Quadratic,
    cross: Tensor,
    first: Tensor,
    steps: int,
    limit: int | None = None,
    conjugate_steps: int = CONJUGATE_STEPS,
    products: Tensor | None = None,
) -> Second:
    """Alternate K and V from a first V, and end with K.

    Parameters
    ----------
    quadratic : Quadratic
    cross : Tensor of shape (N, T, d)
        P, grouped.
    first : Tensor of shape (r, d)
    steps : int
        Steps of V, from 0.
    limit : int or None, default None
        Most that the rank of K may be (r₂ of `tucker`) while V is sought.
    conjugate_steps : int, default CONJUGATE_STEPS
        Of each step of V.
    products : Tensor of shape (T, r, T, d) or None, default None
        Those of `first`, where they are known.
    """
    if products is None:
        products = quadratic.products(first)
    second = quadratic.second_step(cross, first, products)
    for _ in range(steps):
        first = quadratic.first_step(cross, second.factors(limit), products, conjugate_steps)
        products = quadratic.products(first)
        second = quadratic.second_step(cross, first, products)
    return second


def covariance(rows: Tensor, mean: Tensor) -> Tensor:
    """Covariance (D, D) of rows (n, D) about `mean`, one triangle of blocks computed and mirrored."""
    width = rows.shape[1]
    result = torch.empty(width, width).to(rows)
    for low in range(0, width, GRAM_BLOCK):
        high = min(low + GRAM_BLOCK, width)
        # centred before the product: the square of a large mean would swallow a small variance
        centred = rows[:, low:high] - mean[low:high]
        strip = centred.T @ rows[:, low:] / len(rows)
        strip -= centred.mean(0)[:, None] * mean[None, low:]
        result[low:high, low:] = strip
        result[low:, low:high] = strip.T
    return result


def damped(gram: Tensor, share: float = DAMPING) -> Tensor:
    """Add a share of the mean variance to that of each feature, in place.

    Raises
    ------
    SolverError
        Where a variance is not finite.
    """
    scale = float(gram.diagonal().mean())
    if not math.isfinite(scale):
        raise SolverError(
            "a layer's recorded activations are not finite; look for NaN or infinite values"
        )
    gram.diagonal().add_(share * scale if scale > 0 else 1.0)
    return gram


def _orthonormal(first: Tensor) -> Tensor:
    """Rows that span the same space: K is solved anew for every V."""
    basis: Tensor = torch.linalg.qr(first.T).Q
    return basis.T.contiguous()


def regular(matrix: Tensor) -> Tensor:
    """Add `RIDGE` of the mean diagonal, so that round-off leaves a square matrix positive definite."""
    mean = float(matrix.diagonal().mean())
    ridge = RIDGE * mean if mean > 0 else 1.0
    return matrix + ridge * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)

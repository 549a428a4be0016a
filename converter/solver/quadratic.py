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
from collections.abc import Callable
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
    "conjugate",
    "covariance",
    "damped",
    "orthonormal",
    "regular",
]

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

    def quadratic(self, gram: Tensor, half: Tensor, inverse_half: Tensor) -> Quadratic:
        """Give what a fit in the metric of the data needs of the patches; see `Quadratic`."""
        return Quadratic(gram, half, inverse_half, self)


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

    def respond(self, patches: Tensor, groups: Groups) -> Tensor:
        """Response (n, N) to patches (n, D): factor by factor, which is less work than by Ŵ."""
        inner = self.second if self.core is None else self.core
        response = torch.zeros(len(patches), len(inner)).to(patches)
        for group, columns in enumerate(groups.columns):
            response.addmm_(patches[:, columns] @ self.first.T, inner[:, group].T)
        return response if self.outer is None else response @ self.outer.T

    def covered(self, groups: Groups, products: Tensor) -> Tensor:
        """Ŵ G (N, D), by way of the products of V, which are small."""
        grouped = torch.einsum("nur,urtd->ntd", self.second, products)
        covered = torch.empty(len(grouped), groups.order.numel()).to(grouped)
        covered[:, groups.order] = grouped.reshape(len(grouped), -1)
        return covered

    def chain(self) -> tuple[Tensor, ...]:
        """Give the factors from the input on."""
        if self.core is None or self.outer is None:
            return self.first, self.second
        return self.first, self.core, self.outer


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

    @property
    def reached(self) -> float:
        """How much less the error is than without any Ŵ: tr Ω Ŵ G Ŵᵀ, but for the ridge."""
        return float((self.quadratic.half @ self.whitened).square().sum())

    def factors(self, limit: int | None = None) -> Factors:
        """V and K; of rank `limit` at most, which truncates an SVD in the metrics of data and output."""
        if limit is None:
            second = torch.linalg.solve_triangular(
                self.root, self.whitened, upper=False, left=False
            )
            return self.quadratic.factors(self.first, second)
        shape = (self.quadratic.count, len(self.first))
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

    start_steps = 10
    """Alternations before the polish."""
    predicted_steps = 1
    """Alternations where a form is only predicted."""
    conjugate_steps = 6
    """Of a step of V, where a form is fitted."""
    predicted_conjugate = 2
    """The same where it is only predicted: with 4, effects changed by 1 to 5 % and took a quarter longer."""
    ridge = RIDGE
    """Of B G Bᵀ."""

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
        return type(self)(gram, self.half, self.inverse_half, self.groups)

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
        return orthonormal(torch.linalg.solve_triangular(self._root.T, vectors, upper=True).T)

    def seen(self, grouped: Tensor, first: Tensor) -> Tensor:
        """Apply Bᵀ from the right to rows (…, T, d) as products or `grouped` gives them: (n, T·r)."""
        return (grouped @ first.T).reshape(-1, self.count * len(first))

    def factors(self, first: Tensor, second: Tensor) -> Factors:
        """V and K, of K in one piece (N, T·r)."""
        return Factors(first, second.view(len(second), self.count, len(first)))

    def precondition(self, residual: Tensor, inner: Tensor) -> Tensor:
        """Apply the inverse of `inner` ⊗ mean G to a residual (r, d); `inner` is a Cholesky factor."""
        right = torch.cholesky_solve(residual.T, self._root).T
        return torch.cholesky_solve(right, inner)

    def step(self, cross: Tensor, second: Second, limit: int | None, steps: int) -> Second:
        """Better V, and the best K for it; what was given where nothing better is found."""
        first = self.first_step(cross, second, limit, steps)
        return self.second_step(cross, first, self.products(first))

    def second_step(self, cross: Tensor, first: Tensor, products: Tensor) -> Second:
        """Best K for V, of any rank."""
        normal = self.seen(products, first).double()
        root = self._root_of((normal + normal.T) / 2).to(first.dtype)
        whitened = torch.linalg.solve_triangular(root, self.seen(cross, first).T, upper=False).T
        return Second(self, first, root, whitened, products)

    def _root_of(self, normal: Tensor) -> Tensor:
        """Cholesky factor of B G Bᵀ with as much of a ridge as its round-off needs."""
        ridge = self.ridge
        while ridge < 1.0:
            root: Tensor
            root, failed = torch.linalg.cholesky_ex(regular(normal, ridge))
            if not int(failed):
                return root
            ridge *= 10
        raise SolverError(
            "the features of a layer's factors are not finite; calibrate with other images"
        )

    def first_step(self, cross: Tensor, second: Second, limit: int | None, steps: int) -> Tensor:
        """Better V for K: conjugate gradients from the V at hand, which `HELD` ties it to."""
        first, outputs = second.first, second.factors(limit).second
        rank = len(first)
        weighed = torch.einsum("mn,ntr->mtr", self.metric, outputs)
        pairs = torch.einsum("ntr,nus->trus", weighed, outputs)
        inner = torch.stack([pairs[t, :, t] for t in range(self.count)]).sum(0).double()
        held = HELD * float(inner.diagonal().mean()) or 1.0
        inner.diagonal().add_(held)
        factor = torch.linalg.cholesky(inner).to(first.dtype)
        matrix = pairs.permute(1, 2, 3, 0).reshape(rank, -1)

        def apply(given: Tensor) -> Tensor:  # Σ_tu (K_tᵀ Ω K_u) · (V G_ut)
            return matrix @ given.reshape(-1, self.inner)

        wanted = torch.einsum("ntr,ntd->rd", weighed, cross)

        def moved(direction: Tensor) -> Tensor:
            return apply(self.products(direction)) + held * (direction @ self._mean)

        residual = wanted - apply(second.products)
        return orthonormal(
            conjugate(first, residual, moved, lambda each: self.precondition(each, factor), steps)
        )


def conjugate(
    first: Tensor,
    residual: Tensor,
    apply: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    steps: int,
) -> Tensor:
    """Take steps of preconditioned conjugate gradients (Hestenes and Stiefel, 1952) from `first`.

    Parameters
    ----------
    first, residual : Tensor of one shape
        Where it starts, and what is left of the right side there.
    apply, precondition : callable
        The positive definite operator, and about its inverse.
    steps : int
        Fewer are taken where nothing is left, or where the operator does not curve upwards in float32.
    """
    direction = ahead = precondition(residual)
    before = float((residual * ahead).sum())
    for _ in range(steps):
        if before <= 0:
            break
        moved = apply(direction)
        curvature = float((direction * moved).sum())
        if curvature <= 0 or not math.isfinite(curvature):
            break
        length = before / curvature
        first = first + length * direction
        residual = residual - length * moved
        ahead = precondition(residual)
        after = float((residual * ahead).sum())
        direction = ahead + (after / before) * direction
        before = after
    return first


def alternate(
    quadratic: Quadratic,
    cross: Tensor,
    first: Tensor,
    steps: int,
    limit: int | None = None,
    conjugate_steps: int | None = None,
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
    conjugate_steps : int or None, default None
        Of each step of V; None takes what suits a fit.
    products : Tensor of shape (T, r, T, d) or None, default None
        Those of `first`, where they are known.
    """
    if conjugate_steps is None:
        conjugate_steps = quadratic.conjugate_steps
    if products is None:
        products = quadratic.products(first)
    second = quadratic.second_step(cross, first, products)
    for _ in range(steps):
        before, second = second, quadratic.step(cross, second, limit, conjugate_steps)
        if second is before:
            break
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


def orthonormal(first: Tensor) -> Tensor:
    """Rows that span the same space: K is solved anew for every V."""
    basis: Tensor = torch.linalg.qr(first.mT).Q
    return basis.mT.contiguous()


def regular(matrix: Tensor, share: float = RIDGE) -> Tensor:
    """Add a share of the mean diagonal, so that round-off leaves a square matrix positive definite."""
    mean = float(matrix.diagonal().mean())
    ridge = share * mean if mean > 0 else 1.0
    return matrix + ridge * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)

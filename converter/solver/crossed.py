"""L as two halves with a shared first factor each, fitted together: Ŵ = Σ_h Σ_t K_ht V_h.

`crossed` has a kernel's columns as the groups t of the one half, and its rows as those of the other: a k×1
Conv and then a 1×k one, beside a 1×k Conv and then a k×1 one. All K are one closed form, since the halves
answer the same patches; both V are one linear system, preconditioned half by half. Halves that take turns,
each with the other one held, need many times the steps (docs/adr/0020-two-chains-that-cross.md).

Symbols are those of `quadratic`; h, of 2 halves, comes before the groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from converter.solver.prox import truncate
from converter.solver.quadratic import (
    HELD,
    Factors,
    Groups,
    Quadratic,
    conjugate,
    orthonormal,
    regular,
)

__all__ = ["Crossed", "CrossedFactors", "Crossing", "quadratic_of"]


@dataclass(frozen=True)
class Crossing(Groups):
    """How columns share the first factor of each half.

    Attributes
    ----------
    columns : Tensor of shape (2, T, d), int64
        Columns of W; each once in each half.
    """


@dataclass(frozen=True)
class CrossedFactors(Factors):
    """V (2, r, d) and K (N, 2, T, r)."""

    def weight(self, groups: Groups) -> Tensor:
        """Return Ŵ (N, D), its columns where they belong."""
        count = len(self.second)
        total = torch.zeros(count, groups.columns[0].numel()).to(self.first)
        for half, columns in enumerate(groups.columns):
            grouped = torch.einsum("ntr,rd->ntd", self.second[:, half], self.first[half])
            total[:, columns.reshape(-1)] += grouped.reshape(count, -1)
        return total

    def respond(self, patches: Tensor, groups: Groups) -> Tensor:
        """Response (n, N) to patches (n, D), factor by factor."""
        response = torch.zeros(len(patches), len(self.second)).to(patches)
        for half, of_half in enumerate(groups.columns):
            for group, columns in enumerate(of_half):
                inner = patches[:, columns] @ self.first[half].T
                response.addmm_(inner, self.second[:, half, group].T)
        return response

    def covered(self, groups: Groups, products: Tensor) -> Tensor:
        """Ŵ G (N, D), of the products of V."""
        del groups  # the products have their columns as G has them
        return self.second.reshape(len(self.second), -1) @ products

    def chains(self) -> tuple[tuple[Tensor, ...], ...]:
        """V (r, d) and K (N, T, r) of each half."""
        return tuple((self.first[half], self.second[:, half].contiguous()) for half in (0, 1))


class Crossed(Quadratic):
    """What a fit of both halves in the metric of the data needs of the patches.

    Products of V are rows of B G, for all groups of both halves: (2·T·r, D), columns as in G.
    """

    # the halves share out what they fit only step by step; more gradients in one step gain nothing
    start_steps = 24
    predicted_steps = 8
    conjugate_steps = 2
    # what a kernel has in its middle alone, either half may take over: then rows of B are nearly the same
    ridge = 1e-5

    def __init__(self, gram: Tensor, half: Tensor, inverse_half: Tensor, groups: Groups) -> None:
        self.groups = groups
        self.half, self.inverse_half = half, inverse_half
        self.metric = half @ half
        columns = groups.columns
        self.count, self.inner = columns.shape[1:]
        self._rows = gram[columns]  # (2, T, d, D)
        own = torch.stack(
            [torch.stack([gram[each][:, each] for each in of_half]).mean(0) for of_half in columns]
        )
        self._mean = own
        self._root = torch.linalg.cholesky(
            torch.stack([regular(each.double()) for each in own])
        ).to(gram.dtype)

    def grouped(self, matrix: Tensor) -> Tensor:
        """Leave a matrix (n, D) as it is: each half sorts its columns in its own way."""
        return matrix

    def _sorted(self, matrix: Tensor) -> Tensor:
        """Sort the columns of a matrix (n, D) for both halves: (n, 2, T, d)."""
        return matrix[:, self.groups.columns]

    def products(self, first: Tensor) -> Tensor:
        """B G: (2·T·r, D)."""
        return (first[:, None] @ self._rows).reshape(-1, self._rows.shape[-1])

    def start(self, weight: Tensor, rank: int) -> Tensor:
        """V of each half as if it stood alone: (2, r, d)."""
        grouped = self.half @ weight
        found = []
        for columns, root in zip(self.groups.columns, self._root, strict=True):
            stacked = grouped[:, columns].reshape(-1, self.inner) @ root
            vectors, _ = truncate(stacked.T, rank)
            found.append(torch.linalg.solve_triangular(root.T, vectors, upper=True).T)
        return orthonormal(torch.stack(found))

    def leading(self, first: Tensor, rank: int) -> Tensor:
        """First rows of V of both halves."""
        return first[:, :rank]

    def seen(self, grouped: Tensor, first: Tensor) -> Tensor:
        """Apply Bᵀ from the right to rows (n, D): (n, 2·T·r)."""
        return torch.einsum("nhtd,hrd->nhtr", self._sorted(grouped), first).flatten(1)

    def factors(self, first: Tensor, second: Tensor) -> Factors:
        """V and K, of K in one piece (N, 2·T·r)."""
        return CrossedFactors(first, second.view(len(second), 2, self.count, first.shape[1]))

    def first_step(self, cross: Tensor, factors: Factors, products: Tensor, steps: int) -> Tensor:
        """Better V of both halves for K."""
        first, second = factors.first, factors.second
        weighed = torch.einsum("mn,nhtr->mhtr", self.metric, second)
        inner = torch.einsum("nhtr,nhts->hrs", weighed, second).double()
        held = HELD * inner.diagonal(dim1=1, dim2=2).mean(1)
        held = torch.where(held > 0, held, torch.ones_like(held))
        inner.diagonal(dim1=1, dim2=2).add_(held[:, None])
        factor = torch.linalg.cholesky(inner).to(first.dtype)
        ties = held.to(first.dtype)[:, None, None]
        pairs = torch.einsum("nhtr,nq->htrq", weighed, second.flatten(1))

        def apply(
            given: Tensor,
        ) -> Tensor:  # Σ_t Σ_gu (K_htᵀ Ω K_gu) · (V_g G)_u, columns of (h, t)
            return torch.einsum("htrq,qhtd->hrd", pairs, self._sorted(given))

        def moved(direction: Tensor) -> Tensor:
            return apply(self.products(direction)) + ties * (direction @ self._mean)

        def preconditioned(residual: Tensor) -> Tensor:
            right = torch.cholesky_solve(residual.mT, self._root).mT
            return torch.cholesky_solve(right, factor)

        wanted = torch.einsum("nhtr,nhtd->hrd", weighed, self._sorted(cross))
        residual = wanted - apply(products)
        return orthonormal(conjugate(first, residual, moved, preconditioned, steps))


def quadratic_of(gram: Tensor, half: Tensor, inverse_half: Tensor, groups: Groups) -> Quadratic:
    """Give what fits the kind of groups."""
    kind = Crossed if isinstance(groups, Crossing) else Quadratic
    return kind(gram, half, inverse_half, groups)

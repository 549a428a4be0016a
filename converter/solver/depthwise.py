"""L as a 1×1 Conv, filters of its own for every channel, and a 1×1 Conv: Ŵ_t = Σ_jm U_jm D_jmt A_j.

With one filter for each channel that is the canonical decomposition of W over outputs, taps and inputs
(Lebedev et al., arXiv:1412.6553); with M of them a decomposition in terms of rank (M, M, 1) (De Lathauwer,
SIAM J. Matrix Anal. Appl. 30, 2008). Turns of A, D and U, each with the others held, hardly move after a
while. Here U follows A and D in closed form, and these two take steps of Gauss and Newton together, on what
U cannot make up for (variable projection as by Kaufman, BIT 15, 1975). A step is a few conjugate gradients,
each of one product with G, N·D² or r·M·D², whichever is less, and some of that many rows and r·M·D.

Symbols are those of `quadratic`; taps are the groups t, so that d is C, and U is the second factor. And

A : (r, C), what the first Conv makes of the input. D : (r, M, T), the filters of each row of A.
F : D ∘ A (r·M, D), all filters as they see a patch: Ŵ = U F.

A and D travel side by side in one tensor (r, C + M·T), which is the first factor of `quadratic`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from converter.solver.prox import truncate
from converter.solver.quadratic import Factors, Groups, Quadratic, Second, conjugate, regular

__all__ = ["Depthwise", "DepthwiseFactors", "Filters"]

TIE = 1e-3
"""Share of the mean curvature that holds a step back: terms that cancel each other out would grow without
bound, as those of a canonical decomposition may."""

LENGTHS = (1.0, 0.5, 0.25)
"""Of a step, the first that is not for the worse."""


@dataclass(frozen=True)
class Filters(Groups):
    """Columns of W tap by tap, and how many filters a channel has.

    Attributes
    ----------
    columns : Tensor of shape (T, C), int64
    each : int, default 1
        M.
    """

    each: int = 1

    def quadratic(self, gram: Tensor, half: Tensor, inverse_half: Tensor) -> Depthwise:
        """Give what a fit of A, D and U needs of the patches."""
        return Depthwise(gram, half, inverse_half, self)

    def parts(self, first: Tensor) -> tuple[Tensor, Tensor]:
        """Take apart A (r, C) and D (r, M, T)."""
        taps, channels = self.columns.shape
        return first[:, :channels], first[:, channels:].reshape(len(first), self.each, taps)


@dataclass(frozen=True, kw_only=True)
class DepthwiseFactors(Factors):
    """A and D, also side by side as `first`, and U (N, r, M)."""

    inputs: Tensor
    filters: Tensor

    def weight(self, groups: Groups) -> Tensor:
        """Return Ŵ (N, D), its columns where they belong."""
        grouped = torch.einsum("njm,jmt->ntj", self.second, self.filters) @ self.inputs
        total = torch.empty(len(grouped), groups.order.numel()).to(grouped)
        total[:, groups.order] = grouped.flatten(1)
        return total

    def respond(self, patches: Tensor, groups: Groups) -> Tensor:
        """Response (n, N) to patches (n, D), factor by factor."""
        filtered = torch.zeros(len(patches), *self.filters.shape[:2]).to(patches)
        for tap, columns in enumerate(groups.columns):
            thinned = patches[:, columns] @ self.inputs.T
            filtered.addcmul_(thinned[:, :, None], self.filters[:, :, tap])
        return filtered.flatten(1) @ self.second.flatten(1).T

    def covered(self, groups: Groups, products: Tensor) -> Tensor:
        """Ŵ G (N, D), of the products of A and D."""
        grouped = self.second.flatten(1) @ products.flatten(1)
        covered = torch.empty_like(grouped)
        covered[:, groups.order] = grouped
        return covered

    def chain(self) -> tuple[Tensor, ...]:
        """Give A (r, C), D (M·r, T) and U (N, M·r): one filter of every channel, then the next of each."""
        by_filter = self.filters.transpose(0, 1).flatten(0, 1)
        return self.inputs, by_filter, self.second.transpose(1, 2).flatten(1)


def joined(inputs: Tensor, filters: Tensor) -> Tensor:
    """Put A and D side by side."""
    return torch.cat([inputs, filters.flatten(1)], 1)


class Depthwise(Quadratic):
    """What a fit of A, D and U in the metric of the data needs of the patches.

    Products of A and D are rows of F G: (r·M, T, C).
    """

    start_steps = 24
    predicted_steps = 4
    predicted_conjugate = 6
    conjugate_steps = 8
    # rows of F may come close to each other
    ridge = 1e-5

    def __init__(self, gram: Tensor, half: Tensor, inverse_half: Tensor, groups: Filters) -> None:
        super().__init__(gram, half, inverse_half, groups)
        self.filters = groups
        # how taps go together, whatever the channel; its inverse preconditions D
        taps = self.gram.diagonal(dim1=1, dim2=3).sum(2).double()
        taps = regular(taps / taps.diagonal().mean(), TIE)
        self._taps_inverse = torch.linalg.inv(taps).to(gram.dtype)

    def products(self, first: Tensor) -> Tensor:
        """F G: (r·M, T, C)."""
        return self._measured(self._rows(*self.filters.parts(first)))

    def _rows(self, inputs: Tensor, filters: Tensor) -> Tensor:
        """D ∘ A (r·M, T, C)."""
        return torch.einsum("jmt,jc->jmtc", filters, inputs).flatten(0, 1)

    def _measured(self, rows: Tensor) -> Tensor:
        """Multiply rows (n, T, C) by G."""
        size = self.count * self.inner
        return (rows.flatten(1) @ self.gram.view(size, size)).view_as(rows)

    def start(self, weight: Tensor, rank: int) -> Tensor:
        """Leading directions in the mean metric of a tap, each as often as it has strong filters."""
        grouped = (self.half @ self.grouped(weight).flatten(1)).view(-1, self.inner) @ self._root
        vectors, _ = truncate(grouped.T, min(rank, self.inner))
        along = (grouped @ vectors).view(len(weight), self.count, -1).permute(2, 0, 1)
        _, strengths, filters = torch.linalg.svd(along, full_matrices=False)
        each = self.filters.each
        whole = strengths.shape[1] // each  # sets of filters of one direction
        sets = strengths[:, : whole * each].square().view(-1, whole, each).sum(2).flatten()
        chosen = sets.argsort(descending=True, stable=True)[:rank]
        inputs = torch.linalg.solve_triangular(self._root.T, vectors, upper=True).T
        taken = filters[:, : whole * each].reshape(len(sets), each, -1)
        return self._even(joined(inputs[chosen // whole], taken[chosen]))

    def _even(self, first: Tensor) -> Tensor:
        """Give each row of A the variance 1 on patches, and orthonormal filters: U is solved anew."""
        inputs, filters = self.filters.parts(first)
        variances = ((inputs @ self._mean) * inputs).sum(1, keepdim=True)
        return joined(inputs / variances.clamp_min(1e-30).sqrt(), torch.linalg.qr(filters.mT).Q.mT)

    def seen(self, grouped: Tensor, first: Tensor) -> Tensor:
        """Apply Fᵀ from the right to rows (n, T, C): (n, r·M)."""
        return grouped.flatten(1) @ self._rows(*self.filters.parts(first)).flatten(1).T

    def factors(self, first: Tensor, second: Tensor) -> DepthwiseFactors:
        """Give A, D and U, of U in one piece (N, r·M)."""
        inputs, filters = self.filters.parts(first)
        shaped = second.view(len(second), *filters.shape[:2])
        return DepthwiseFactors(first, shaped, inputs=inputs, filters=filters)

    def step(self, cross: Tensor, second: Second, limit: int | None, steps: int) -> Second:
        """Better A and D, and the best U for them; a step that goes too far is shortened."""
        first, before = second.first, second.reached
        towards = self.first_step(cross, second, limit, steps) - first
        for length in LENGTHS:
            tried = self._even(first + length * towards)
            found = self.second_step(cross, tried, self.products(tried))
            if found.reached >= before:
                return found
        return second

    def first_step(self, cross: Tensor, second: Second, limit: int | None, steps: int) -> Tensor:
        """Where A and D would fit best together with U, were what they change linear.

        What a change of the filters does is looked at as they see it, r·M rows in place of N, and goes
        through the outputs only where these are fewer.
        """
        del limit  # of the rank of U: there is none
        first, products = second.first, second.products.flatten(1)
        inputs, filters = self.filters.parts(first)
        outputs = second.factors().second.flatten(1)
        weighed = outputs.T @ self.metric
        pairs = weighed @ outputs  # Uᵀ Ω U
        few = len(outputs) < len(pairs)

        # curvatures along A, the same for all its columns, and along the filters of each of its rows
        alike = filters.flatten(0, 1) @ filters.flatten(0, 1).T
        of_inputs = (pairs * alike).view(2 * filters.shape[:2]).sum((1, 3)).double()
        tie = TIE * float(of_inputs.diagonal().mean()) or 1.0
        of_inputs.diagonal().add_(tie)
        inputs_root = torch.linalg.cholesky(of_inputs).to(first.dtype)
        sizes = ((inputs @ self._mean) * inputs).sum(1)
        of_filters = pairs.view(2 * filters.shape[:2]).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        of_filters = of_filters * sizes[:, None, None]
        ties = TIE * of_filters.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
        of_filters.diagonal(dim1=1, dim2=2).add_(ties[:, None])
        filters_inverse = torch.linalg.inv(of_filters)

        def gradient(error: Tensor) -> Tensor:  # rows (r·M, T·C), as A and D see them
            by_filter = error.view(*filters.shape, self.inner)
            by_inputs = torch.einsum("jmtc,jmt->jc", by_filter, filters)
            return joined(by_inputs, torch.einsum("jmtc,jc->jmt", by_filter, inputs))

        def moved(direction: Tensor) -> Tensor:
            to_inputs, to_filters = self.filters.parts(direction)
            rows = self._rows(to_inputs, filters) + self._rows(inputs, to_filters)
            change = outputs @ rows.flatten(1) if few else rows.flatten(1)
            answer = self._measured(change.view(-1, self.count, self.inner)).flatten(1)
            made_up = torch.cholesky_solve(products @ change.T, second.root).T
            answer.addmm_(made_up, products, alpha=-1)
            held = joined(tie * (to_inputs @ self._mean), ties[:, None, None] * to_filters)
            return gradient((weighed if few else pairs) @ answer) + held

        def preconditioned(residual: Tensor) -> Tensor:
            to_inputs, to_filters = self.filters.parts(residual)
            right = torch.cholesky_solve(to_inputs.T, self._root).T
            return joined(
                torch.cholesky_solve(right, inputs_root),
                filters_inverse @ to_filters @ self._taps_inverse,
            )

        left = weighed @ cross.flatten(1) - pairs @ products
        return conjugate(first, gradient(left), moved, preconditioned, steps)

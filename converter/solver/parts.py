"""S beside an L with a shared first factor: which channels it keeps, and what both answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from converter.solver.problem import DAMPING
from converter.solver.quadratic import Factors, Groups, regular

__all__ = ["Parts", "Support", "strongest"]


class Support:
    """Columns of the channels that S keeps, the best S beside an L, and what L is then to fit.

    S in closed form leaves of L's error tr Ω Δ G Δᵀ the same with G − G_·c G_cc⁻¹ G_c· in the place of G,
    which is zero on the columns c of S: L is fitted in that metric, and meets its S exactly.
    """

    def __init__(self, gram: Tensor, taps: int, channels: Tensor) -> None:
        self.channels = channels
        steps = torch.arange(taps, device=channels.device)
        self.columns = (channels[:, None] * taps + steps).flatten()
        self.rows = gram[self.columns]
        self._root = torch.linalg.cholesky(regular(self.rows[:, self.columns].double()))
        self._taken = torch.cholesky_solve(self.rows.double(), self._root).to(gram.dtype)

    def beside(self, gram: Tensor) -> Tensor:
        """G of what S cannot reach, (D, D), damped on the columns of S."""
        left = gram - self.rows.T @ self._taken
        left[self.columns] = 0.0
        left[:, self.columns] = 0.0
        left[self.columns, self.columns] = DAMPING * gram.diagonal().mean()
        return left

    def unreached(self, cross: Tensor) -> Tensor:
        """P of what S cannot reach, (N, D)."""
        left = cross - cross[:, self.columns] @ self._taken
        left[:, self.columns] = 0.0
        return left

    def step(self, cross: Tensor, low: Tensor | None = None) -> Tensor:
        """Best S (N, s · k) beside Ŵ = `low`, for P = `cross`."""
        left = cross[:, self.columns]
        if low is not None:
            left = left - low @ self.rows.T
        return torch.cholesky_solve(left.double().T, self._root).T.to(cross.dtype)


def strongest(missed: Tensor, gram: Tensor, half: Tensor, taps: int, count: int) -> Tensor:
    """Channels through which most of a missing weight (N, D) acts on the output, ascending."""
    weighed = half @ missed
    blocks = weighed.view(len(weighed), -1, taps)
    own = gram.view(blocks.shape[1], taps, blocks.shape[1], taps)
    own = own.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (C, k, k)
    strength = torch.einsum("nck,ckl,ncl->c", blocks, own, blocks)
    return strength.topk(count).indices.sort().values


@dataclass(frozen=True)
class Parts:
    """L by its factors, and S (N, s · k) on the columns of a support beside it."""

    factors: Factors
    kept: Support | None = None
    sparse: Tensor | None = None

    def weight(self, groups: Groups) -> Tensor:
        """Ŵ (N, D)."""
        weight = self.factors.weight(groups)
        if self.kept is not None and self.sparse is not None:
            weight[:, self.kept.columns] += self.sparse
        return weight

    def of(self, patches: Tensor, groups: Groups) -> Tensor:
        """Response (n, N) to patches (n, D)."""
        response = self.factors.respond(patches, groups)
        if self.kept is not None and self.sparse is not None:
            response.addmm_(patches[:, self.kept.columns], self.sparse.T)
        return response

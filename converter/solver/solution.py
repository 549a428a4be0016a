"""What a solver gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Iteration", "Solution", "Status"]

Status = Literal["converged", "iteration limit", "stalled", "closed form"]


@dataclass(frozen=True)
class Iteration:
    """One line of the ADMM log.

    `primal` and `dual` are residuals over their tolerance: both at most 1 means converged.
    `objective` is the data term plus both penalties; `rank` and `support` are those of L and S.
    """

    iteration: int
    primal: float
    dual: float
    objective: float
    rho: float
    rank: int
    support: int
    seconds: float


@dataclass(frozen=True)
class Solution:
    """One layer as S + L: y ≈ S x[support] + L x + bias.

    Attributes
    ----------
    support : Tensor of shape (s,), int64
        Input channels that S keeps, sorted; empty without S.
    sparse : Tensor of shape (N, s · k)
        S on these channels; k is the number of kernel taps.
    factors : tuple of Tensor
        L, the factor that reads the input first; what their shapes mean is up to the scheme. Of
        `channel`: (r, D) and (N, r), whose product is L; r is 0 without L.
    bias : Tensor of shape (N,)
    fitted, unseen : float
        Relative squared error after the activation, in the problem's metric, on the patches of
        the fit and on those kept back from it.
    status : {"converged", "iteration limit", "stalled", "closed form"}
        How the ADMM ended; the problem is not convex, so no status means optimal.
    history : tuple of Iteration
        The ADMM log; empty for the closed forms.
    """

    support: Tensor
    sparse: Tensor
    factors: tuple[Tensor, ...]
    bias: Tensor
    fitted: float
    unseen: float
    status: Status
    history: tuple[Iteration, ...] = ()

    @property
    def down(self) -> Tensor:
        """The factor that reads the input."""
        return self.factors[0]

    @property
    def up(self) -> Tensor:
        """The factor that writes the response."""
        return self.factors[-1]

    @property
    def rank(self) -> int:
        """First rank of L; 0 without L."""
        return len(self.down)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks of L, the width between each factor and the next; (0,) without L."""
        return tuple(len(factor) for factor in self.factors[:-1])

    def weight(self, channels: int) -> Tensor:
        """Return S + L of `channel` as one matrix of shape (N, D), for `channels` input channels."""
        total = self.up @ self.down
        blocks = total.view(len(total), channels, -1)
        blocks[:, self.support] += self.sparse.view(len(total), len(self.support), blocks.shape[2])
        return total

"""Mean and scatter matrix of rows that come in parts.

Parts are merged as by Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing
sample variances" (1979), which does not cancel where the mean is large.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["Moments"]


@dataclass(eq=False)
class Moments:
    """Count, mean and scatter of the rows seen so far.

    Attributes
    ----------
    count : int
    mean : ndarray of shape (d,), float64
        Zeros where nothing was seen.
    scatter : ndarray of shape (d, d), float32 or float64
        Σ (x − mean)(x − mean)ᵀ.
    """

    count: int
    mean: NDArray[np.float64]
    scatter: NDArray[Any]

    @classmethod
    def none(cls, size: int, dtype: DTypeLike = np.float64) -> Moments:
        """Return the moments of no rows of `size` numbers; `dtype` is that of the scatter."""
        return cls(0, np.zeros(size), np.zeros((size, size), dtype))

    @property
    def covariance(self) -> NDArray[Any]:
        """The scatter over the count, (d, d)."""
        covariance: NDArray[Any] = self.scatter / self.count
        return covariance

    def add(self, rows: NDArray[Any]) -> None:
        """Take in some rows (n, d); none change nothing."""
        if not len(rows):
            return
        import torch

        mean = rows.mean(axis=0, dtype=np.float64)
        values = np.subtract(rows, mean, dtype=self.scatter.dtype, casting="same_kind")
        # torch adds in place, and may have threads where numpy was started with one
        square = torch.from_numpy(values)
        torch.from_numpy(self.scatter).addmm_(square.T, square)
        self._shift(len(rows), mean)

    def joined(self, other: Moments) -> Moments:
        """Return the moments of the rows of both; neither is changed."""
        both = Moments(self.count, self.mean, self.scatter + other.scatter)
        both._shift(other.count, other.mean)
        return both

    def _shift(self, count: int, mean: NDArray[np.float64]) -> None:
        """Count `count` rows about `mean`, whose scatter about it is added already."""
        import torch

        total = self.count + count
        if not count or not total:
            return
        shift = mean - self.mean
        column = torch.from_numpy(shift.astype(self.scatter.dtype))
        torch.from_numpy(self.scatter).addr_(column, column, alpha=self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total

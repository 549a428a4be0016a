"""`spatial`: Conv kh×1 from C to r channels, then Conv 1×kw from r to N (arXiv:1405.3866).

r(C·kh + N·kw) weights. The first Conv takes the layer's stride and pads along the first axis, the second
along the other; it has no bias, so that the zeros around its output are what zeros around the input give.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from converter.schemes.base import LONG_PATCH, spread, usable_ranks
from converter.schemes.form import Geometry
from converter.schemes.shared import SharedFactor
from passes.split import Factor

if TYPE_CHECKING:
    from converter.solver.quadratic import Groups

__all__ = ["Spatial"]

ANCHORS = (1 / 48, 1 / 24, 1 / 12, 1 / 6, 1 / 3, 1 / 2, 3 / 4)
"""Fractions of the rank that saves nothing, whose effect is measured."""


class Spatial(SharedFactor):
    """Two Convs, one along each axis of a two-dimensional kernel."""

    name = "spatial"

    def ranks(self, geometry: Geometry) -> Sequence[tuple[int, ...]]:
        """All usable ranks that save weights, where the kernel has two sides longer than 1."""
        if len(geometry.kernel) != 2 or min(geometry.kernel) < 2:
            return []
        return [(rank,) for rank in usable_ranks(geometry, self._most(geometry))]

    def anchors(self, geometry: Geometry) -> Sequence[tuple[int, ...]]:
        """Ranks over the whole range."""
        ranks = [rank[0] for rank in self.ranks(geometry)]
        most = self._most(geometry) if ranks else 0
        fractions = ANCHORS[:-1] if geometry.columns > LONG_PATCH else ANCHORS
        return [(rank,) for rank in spread(ranks, most, fractions)]

    def _most(self, geometry: Geometry) -> int:
        high, wide = geometry.kernel
        each = geometry.channels * high + geometry.outputs * wide
        return (geometry.outputs * geometry.columns - 1) // each

    def cost(self, geometry: Geometry, ranks: tuple[int, ...]) -> tuple[float, float]:
        """Count the first Conv at every column of the input, the second at every position."""
        high, wide = geometry.kernel
        first = ranks[0] * geometry.channels * high
        second = ranks[0] * geometry.outputs * wide
        between = geometry.fold * geometry.out_shape[0] * geometry.in_shape[1]
        macs = first * between + second * geometry.positions
        return float(macs), float(first + second)

    def groups(self, geometry: Geometry, device: str) -> Groups:
        """One group for each column of the kernel: (kw, C·kh)."""
        import torch

        from converter.solver.quadratic import Groups

        high, wide = geometry.kernel
        columns = torch.arange(geometry.columns, device=device)
        return Groups(
            columns.view(geometry.channels, high, wide).permute(2, 0, 1).reshape(wide, -1)
        )

    def shapes(self, geometry: Geometry, ranks: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """V (r, C·kh) and K (N, kw, r)."""
        high, wide = geometry.kernel
        return (ranks[0], geometry.channels * high), (geometry.outputs, wide, ranks[0])

    def subgraph(
        self, geometry: Geometry, factors: Sequence[NDArray[np.float32]]
    ) -> tuple[Factor, ...]:
        """From V (r, C·kh) and K (N, kw, r): Conv kh×1, Conv 1×kw."""
        first, second = factors
        high = geometry.kernel[0]
        return (
            Factor(first.reshape(len(first), geometry.channels, high, 1), (0,)),
            Factor(np.ascontiguousarray(second.transpose(0, 2, 1))[:, :, None, :], (1,)),
        )

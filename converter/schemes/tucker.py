"""`tucker`: Conv 1×1 from C to r₁, Conv kh×kw from r₁ to r₂, Conv 1×1 from r₂ to N (arXiv:1511.06530).

C·r₁ + r₁·r₂·kh·kw + r₂·N weights. The middle Conv takes the layer's strides and pads.
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

__all__ = ["Tucker"]

FIRST = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8)
"""r₁ as fractions of C."""
SECOND = (0.75, 1.0, 1.5)
"""r₂ as fractions of r₁ · N / C."""


class Tucker(SharedFactor):
    """A small Conv between two 1×1 Convs, for kernels of more than one tap."""

    name = "tucker"
    interpolates = False

    def ranks(self, geometry: Geometry) -> Sequence[tuple[int, ...]]:
        """Pairs over a grid that save weights."""
        if geometry.taps < 2 or geometry.channels < 8 or geometry.outputs < 8:
            return []
        pairs = []
        shares = FIRST[:-1] if geometry.columns > LONG_PATCH else FIRST
        firsts = spread(usable_ranks(geometry, geometry.channels), geometry.channels, shares)
        for first in firsts:
            middle = first * geometry.outputs / geometry.channels
            seconds = usable_ranks(geometry, min(geometry.outputs, first * geometry.taps))
            for second in spread(seconds, 1, [share * middle for share in SECOND]):
                weights = self.cost(geometry, (first, second))[1]
                if weights < geometry.outputs * geometry.columns:
                    pairs.append((first, second))
        return pairs

    def anchors(self, geometry: Geometry) -> Sequence[tuple[int, ...]]:
        """All of the grid: pairs with the same r₁ share a fit."""
        return self.ranks(geometry)

    def cost(self, geometry: Geometry, ranks: tuple[int, ...]) -> tuple[float, float]:
        """Count the first Conv at all positions of the input, the others at those of the response."""
        first, second = ranks
        opening = geometry.channels * first
        rest = first * second * geometry.taps + second * geometry.outputs
        macs = opening * geometry.in_positions + rest * geometry.positions
        return float(macs), float(opening + rest)

    def groups(self, geometry: Geometry, device: str) -> Groups:
        """One group for each tap: (k, C)."""
        import torch

        from converter.solver.quadratic import Groups

        columns = torch.arange(geometry.columns, device=device)
        return Groups(columns.view(geometry.channels, geometry.taps).T.contiguous())

    def shapes(self, geometry: Geometry, ranks: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """V (r₁, C), core (r₂, k, r₁) and outer (N, r₂)."""
        first, second = ranks
        return (
            (first, geometry.channels),
            (second, geometry.taps, first),
            (geometry.outputs, second),
        )

    def subgraph(
        self, geometry: Geometry, factors: Sequence[NDArray[np.float32]]
    ) -> tuple[Factor, ...]:
        """From V (r₁, C), core (r₂, k, r₁) and outer (N, r₂): the three Convs."""
        first, core, outer = factors
        ones = [1] * len(geometry.kernel)
        middle = np.ascontiguousarray(core.transpose(0, 2, 1))
        return (
            Factor(first.reshape(*first.shape, *ones), ()),
            Factor(
                middle.reshape(*middle.shape[:2], *geometry.kernel),
                tuple(range(len(geometry.kernel))),
            ),
            Factor(outer.reshape(*outer.shape, *ones), ()),
        )

"""`crossed`: the sum of two `spatial` chains, one down and then across, the other across and then down.

    x → Conv kh×1, C→r → Conv 1×kw, r→N ┐
    x → Conv 1×kw, C→r → Conv kh×1, r→N ┴ Add

2r(C + N)·k weights. At the cost of `spatial`, which has twice the rank in one chain, it left 16 to 38 %
less of a layer's error (docs/objectives.md): what is thin along one axis is not along the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from converter.schemes.base import LONG_PATCH, spread, usable_ranks
from converter.schemes.form import Geometry
from converter.schemes.shared import SharedFactor
from converter.schemes.spatial import Spatial, chain_along
from passes.split import Factor

if TYPE_CHECKING:
    from converter.solver.quadratic import Groups

__all__ = ["Crossed"]

ANCHORS = (1 / 24, 1 / 12, 1 / 6, 1 / 3, 1 / 2, 3 / 4)
"""Fractions of the rank that saves nothing, whose effect is measured."""
_HALF = Spatial()


class Crossed(SharedFactor):
    """Two chains of two Convs each, for a square kernel."""

    name = "crossed"
    takes_sparse = False

    def ranks(self, geometry: Geometry) -> Sequence[tuple[int, ...]]:
        """All usable ranks of a half that save weights, where a kernel has two equal sides longer than 1."""
        kernel = geometry.kernel
        square = len(kernel) == 2 and kernel[0] == kernel[1] > 1
        if not square or geometry.columns > LONG_PATCH:
            return []
        return [(rank,) for rank in usable_ranks(geometry, self._most(geometry))]

    def anchors(self, geometry: Geometry) -> Sequence[tuple[int, ...]]:
        """Ranks over the whole range."""
        ranks = [rank[0] for rank in self.ranks(geometry)]
        most = self._most(geometry) if ranks else 0
        return [(rank,) for rank in spread(ranks, most, ANCHORS)]

    def _most(self, geometry: Geometry) -> int:
        each = 2 * (geometry.channels + geometry.outputs) * geometry.kernel[0]
        return (geometry.outputs * geometry.columns - 1) // each

    def cost(self, geometry: Geometry, ranks: tuple[int, ...]) -> tuple[float, float]:
        """Count both halves; the second is `spatial` on the image turned on its side."""
        turned = dataclasses.replace(
            geometry, in_shape=geometry.in_shape[::-1], out_shape=geometry.out_shape[::-1]
        )
        halves = [_HALF.cost(each, ranks) for each in (geometry, turned)]
        return sum(macs for macs, _ in halves), sum(params for _, params in halves)

    def groups(self, geometry: Geometry, device: str) -> Groups:
        """One group for each column of the kernel in one half, for each row in the other: (2, k, C·k)."""
        import torch

        from converter.solver.crossed import Crossing

        side = geometry.kernel[0]
        columns = torch.arange(geometry.columns, device=device).view(-1, side, side)
        return Crossing(
            torch.stack([columns.permute(axis, 0, 3 - axis).reshape(side, -1) for axis in (2, 1)])
        )

    def shapes(self, geometry: Geometry, ranks: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """V (r, C·k) and K (N, k, r) of each half."""
        return _HALF.shapes(geometry, ranks) * 2

    def chains(
        self, geometry: Geometry, factors: Sequence[NDArray[np.float32]]
    ) -> tuple[tuple[Factor, ...], ...]:
        """From V (r, C·k) and K (N, k, r) of each half: Convs k×1 and 1×k, and Convs 1×k and k×1."""
        return chain_along(0, geometry, *factors[:2]), chain_along(1, geometry, *factors[2:])

"""`sparse`: S alone, one Conv that reads some of the input channels; no L.

N·k weights for each channel that is kept. The ADMM decides which ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from converter.schemes.base import Effort, Evidence, block_of
from converter.schemes.form import Form, Geometry
from passes.split import Factor

if TYPE_CHECKING:
    from converter.solver.effects import Sketch
    from converter.solver.problem import Problem
    from converter.solver.solution import Solution

__all__ = ["Sparse", "usable_supports"]

SHARES = (1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)
"""Channels that S alone may keep, as fractions of all."""


class Sparse:
    """A Gather of the kept channels, and a smaller Conv."""

    name = "sparse"
    whole_patches = True
    takes_sparse = True
    interpolates = False

    def ranks(self, geometry: Geometry) -> Sequence[tuple[int, ...]]:
        """One: there is no L."""
        del geometry
        return [()]

    def anchors(self, geometry: Geometry) -> Sequence[tuple[int, ...]]:
        """One, as for `ranks`."""
        return self.ranks(geometry)

    def cost(self, geometry: Geometry, ranks: tuple[int, ...]) -> tuple[float, float]:
        """Nothing but S, which is counted for every form alike."""
        del geometry, ranks
        return 0.0, 0.0

    def sketches(
        self, evidence: Evidence, geometry: Geometry, ranks: Sequence[tuple[int, ...]], support: int
    ) -> list[Sketch]:
        """Regress the response on the strongest channels."""
        del geometry
        from converter.solver.effects import sketches_of_sparse

        assert evidence.moments is not None, "the scheme asked for whole patches"
        weight, bias, metric = evidence.weight, evidence.bias, evidence.metric
        return sketches_of_sparse(evidence.moments, weight, bias, metric, [support] * len(ranks))

    def fit(self, problem: Problem, geometry: Geometry, form: Form, effort: Effort) -> Solution:
        """Run the ADMM with an allowance that holds the channels but no rank."""
        from converter.solver.admm import Admm
        from converter.solver.factorize import Allowance

        allowance = Allowance(
            total=float(form.support),
            rank_cost=2.0 * form.support,
            channel_cost=1.0,
            block=block_of(geometry),
        )
        return Admm(iterations=effort.iterations, rounds=effort.rounds).solve(problem, allowance)

    def shapes(self, geometry: Geometry, ranks: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """None."""
        del geometry, ranks
        return ()

    def subgraph(
        self, geometry: Geometry, factors: Sequence[NDArray[np.float32]]
    ) -> tuple[Factor, ...]:
        """No chain."""
        del geometry, factors
        return ()


def usable_supports(geometry: Geometry, shares: Sequence[float]) -> list[int]:
    """Numbers of channels near shares of all, that the runtime's layout runs fast, ascending."""
    found = set()
    for share in shares:
        count = round(share * geometry.channels)
        block = block_of(geometry) if count >= 16 else 1
        found.add(count // block * block)
    return sorted(each for each in found if 0 < each < geometry.channels)

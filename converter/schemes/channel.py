"""`channel`, the paper's own scheme: Conv kh×kw from C to r channels, then Conv 1×1 from r to N.

L = up · down of rank r over whole patches (arXiv:1807.10119); r(D + N) weights. In the metric of the data
and of the output its best fit is a truncated SVD, so every rank is predicted in closed form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from converter.schemes.base import Effort, Evidence, block_of, usable_ranks
from converter.schemes.form import Form, Geometry
from passes.split import Factor

if TYPE_CHECKING:
    from converter.solver.effects import Sketch
    from converter.solver.problem import Problem
    from converter.solver.solution import Solution

__all__ = ["Channel"]


class Channel:
    """A Conv with the layer's own kernel, then a 1×1 Conv; two Gemms for a Gemm or MatMul."""

    name = "channel"
    whole_patches = False
    takes_sparse = True
    interpolates = True

    def ranks(self, geometry: Geometry) -> Sequence[tuple[int, ...]]:
        """All usable ranks that save weights."""
        each = geometry.outputs + geometry.columns
        most = (geometry.outputs * geometry.columns - 1) // each
        return [(rank,) for rank in usable_ranks(geometry, most)]

    def anchors(self, geometry: Geometry) -> Sequence[tuple[int, ...]]:
        """All: the closed form costs nothing."""
        return self.ranks(geometry)

    def cost(self, geometry: Geometry, ranks: tuple[int, ...]) -> tuple[float, float]:
        """r(D + N) weights, each used at every position of the response."""
        weights = float(ranks[0] * (geometry.outputs + geometry.columns))
        return weights * geometry.positions, weights

    def sketches(
        self, evidence: Evidence, geometry: Geometry, ranks: Sequence[tuple[int, ...]], support: int
    ) -> list[Sketch]:
        """Project the response on the leading directions of Ω^½ C Ω^½; with S, fit on the patches."""
        from converter.solver.effects import sketches_of_rank, sketches_of_shared

        weight, bias, metric = evidence.weight, evidence.bias, evidence.metric
        if not support:
            response = evidence.mean, evidence.covariance
            return sketches_of_rank(weight, bias, *response, metric, [rank for (rank,) in ranks])
        import torch

        from converter.solver.quadratic import Groups

        assert evidence.moments is not None, "forms with S are offered where patches are whole"
        groups = Groups(torch.arange(geometry.columns)[None].to(weight.device))
        return sketches_of_shared(evidence.moments, weight, bias, metric, groups, ranks, support)

    def fit(self, problem: Problem, geometry: Geometry, form: Form, effort: Effort) -> Solution:
        """Run the ADMM, which decides which channels S keeps, then polish; polish alone where none may."""
        from converter.solver.admm import Admm
        from converter.solver.factorize import Allowance, Structure, polish
        from converter.solver.problem import Coordinates

        if form.support == 0 and not (effort.trade and len(problem.eligible)):
            return polish(Coordinates(problem), Structure((), form.ranks[0]), effort.rounds)
        per_rank = float(geometry.outputs + geometry.columns)
        per_channel = float(geometry.outputs * geometry.taps)
        allowance = Allowance(
            total=form.ranks[0] * per_rank + form.support * per_channel,
            rank_cost=per_rank,
            channel_cost=per_channel,
            block=block_of(geometry),
        )
        sizes = None if effort.trade else (form.ranks[0], form.support)
        admm = Admm(iterations=effort.iterations, rounds=effort.rounds)
        return admm.solve(problem, allowance, sizes)

    def shapes(self, geometry: Geometry, ranks: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Shapes of down (r, D) and up (N, r)."""
        return (ranks[0], geometry.columns), (geometry.outputs, ranks[0])

    def subgraph(
        self, geometry: Geometry, factors: Sequence[NDArray[np.float32]]
    ) -> tuple[Factor, ...]:
        """Conv kh×kw with the layer's strides and pads, then Conv 1×1."""
        down, up = factors
        axes = tuple(range(len(geometry.kernel)))
        ones = [1] * len(geometry.kernel)
        return (
            Factor(down.reshape(len(down), geometry.channels, *geometry.kernel), axes),
            Factor(up.reshape(len(up), -1, *ones), ()),
        )

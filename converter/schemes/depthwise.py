"""`depthwise`: Conv 1×1 from C to r channels, a kh×kw filter (or several) for each, Conv 1×1 to N.

r(C + M·kh·kw + M·N) weights, with M filters for each of the r channels. The filters take the layer's strides
and pads. Where M is more than 1 the r channels are repeated so often: onnxruntime has a fast kernel for one
filter to a channel only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from converter.schemes.base import LONG_PATCH, Effort, Evidence, spread
from converter.schemes.form import Form, Geometry
from passes.split import Factor

if TYPE_CHECKING:
    from converter.solver.depthwise import Filters
    from converter.solver.effects import Sketch
    from converter.solver.problem import Problem
    from converter.solver.solution import Solution

__all__ = ["Depthwise"]

ANCHORS = (1 / 24, 1 / 12, 1 / 6, 1 / 3, 1 / 2)
"""Fractions of the rank that saves nothing, whose effect is measured."""
FILTERS = (1, 2)
"""How many filters a channel may have."""
SEVERAL = 1152
"""On layers with longer patches a channel has one filter: two gained next to nothing there."""
BLOCK = 16
"""Ranks are multiples of it, or half of it: others leave onnxruntime's blocked layout, and filters of 14
channels took longer there than those of 32."""


class Depthwise:
    """A Conv that filters each channel alone, between two 1×1 Convs."""

    name = "depthwise"
    whole_patches = True
    takes_sparse = False
    interpolates = True

    def ranks(self, geometry: Geometry) -> Sequence[tuple[int, ...]]:
        """All pairs r and M·r that save weights, for several taps and patches that are not long."""
        return sorted(
            (rank, filters * rank)
            for filters in self._filters(geometry)
            for rank in self._usable(geometry, filters)
        )

    def anchors(self, geometry: Geometry) -> Sequence[tuple[int, ...]]:
        """For each M ranks over the lower half of the range: where more is left, others are as good."""
        return sorted(
            (rank, filters * rank)
            for filters in self._filters(geometry)
            for rank in spread(
                self._usable(geometry, filters), self._most(geometry, filters), ANCHORS
            )
        )

    def _filters(self, geometry: Geometry) -> Sequence[int]:
        if geometry.taps < 2 or min(geometry.channels, geometry.outputs) < 8:
            return []
        if geometry.columns > LONG_PATCH:
            return []
        return FILTERS if geometry.columns <= SEVERAL else FILTERS[:1]

    def _usable(self, geometry: Geometry, filters: int) -> list[int]:
        most = self._most(geometry, filters)
        return [rank for rank in (BLOCK // 2, *range(BLOCK, most + 1, BLOCK)) if rank <= most]

    def _most(self, geometry: Geometry, filters: int) -> int:
        each = self.cost(geometry, (1, filters))[1]
        return int((geometry.outputs * geometry.columns - 1) // each)

    def cost(self, geometry: Geometry, ranks: tuple[int, ...]) -> tuple[float, float]:
        """Count the first Conv at all positions of the input, the others at those of the response."""
        first, second = ranks
        opening = first * geometry.channels
        rest = second * (geometry.taps + geometry.outputs)
        macs = opening * geometry.in_positions + rest * geometry.positions
        return float(macs), float(opening + rest)

    def sketches(
        self, evidence: Evidence, geometry: Geometry, ranks: Sequence[tuple[int, ...]], support: int
    ) -> list[Sketch]:
        """Fit each of `ranks`, linearly, on patches of the original."""
        del support  # S does not stand beside it
        from converter.solver.effects import sketches_of_shared

        assert evidence.moments is not None, "the scheme asked for whole patches"
        weight, bias, metric = evidence.weight, evidence.bias, evidence.metric
        found: dict[tuple[int, ...], Sketch] = {}
        for filters in sorted({second // first for first, second in ranks}):
            chosen = [each for each in ranks if each[1] == filters * each[0]]
            groups = self.groups(geometry, str(weight.device), filters)
            firsts = [(first,) for first, _ in chosen]
            made = sketches_of_shared(evidence.moments, weight, bias, metric, groups, firsts)
            found |= dict(zip(chosen, made, strict=True))
        return [found[each] for each in ranks]

    def fit(self, problem: Problem, geometry: Geometry, form: Form, effort: Effort) -> Solution:
        """Fit all factors, linearly first, then through the activation."""
        from converter.solver.shared import polish_shared

        first, second = form.ranks
        groups = self.groups(geometry, str(problem.weight.device), second // first)
        return polish_shared(problem, groups, (first,), rounds=effort.rounds)

    def groups(self, geometry: Geometry, device: str, filters: int) -> Filters:
        """One group for each tap, (k, C), and M."""
        import torch

        from converter.solver.depthwise import Filters

        columns = torch.arange(geometry.columns, device=device)
        return Filters(columns.view(geometry.channels, geometry.taps).T.contiguous(), filters)

    def shapes(self, geometry: Geometry, ranks: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Shapes of A (r, C), D (M·r, k) and U (N, M·r)."""
        first, second = ranks
        return (first, geometry.channels), (second, geometry.taps), (geometry.outputs, second)

    def subgraph(
        self, geometry: Geometry, factors: Sequence[NDArray[np.float32]]
    ) -> tuple[Factor, ...]:
        """From A (r, C), D (M·r, k) and U (N, M·r): the three Convs."""
        inputs, filters, outputs = factors
        ones = [1] * len(geometry.kernel)
        return (
            Factor(inputs.reshape(*inputs.shape, *ones)),
            Factor(
                filters.reshape(len(filters), 1, *geometry.kernel),
                tuple(range(len(geometry.kernel))),
                len(filters) // len(inputs),
            ),
            Factor(outputs.reshape(*outputs.shape, *ones)),
        )

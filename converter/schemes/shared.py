"""What `spatial` and `tucker` have in common: prediction and fit with shared first factors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from converter.schemes.base import Effort, Evidence
from converter.schemes.form import Form, Geometry

if TYPE_CHECKING:
    from converter.solver.effects import Sketch
    from converter.solver.problem import Problem
    from converter.solver.quadratic import Groups
    from converter.solver.solution import Solution

__all__ = ["SharedFactor"]


class SharedFactor(ABC):
    """A scheme whose first factor groups of columns share; see `converter.solver.quadratic`."""

    whole_patches = True
    takes_sparse = True
    interpolates = True

    @abstractmethod
    def groups(self, geometry: Geometry, device: str) -> Groups:
        """Say which columns share a first factor."""

    def sketches(
        self, evidence: Evidence, geometry: Geometry, ranks: Sequence[tuple[int, ...]], support: int
    ) -> list[Sketch]:
        """Fit each of `ranks`, linearly, on patches of the original."""
        from converter.solver.effects import sketches_of_shared

        assert evidence.moments is not None, "the scheme asked for whole patches"
        groups = self.groups(geometry, str(evidence.weight.device))
        weight, bias, metric = evidence.weight, evidence.bias, evidence.metric
        return sketches_of_shared(evidence.moments, weight, bias, metric, groups, ranks, support)

    def fit(self, problem: Problem, geometry: Geometry, form: Form, effort: Effort) -> Solution:
        """Alternate the first factor and the others, linearly first, then through the activation."""
        from converter.solver.shared import polish_shared

        groups = self.groups(geometry, str(problem.weight.device))
        return polish_shared(problem, groups, form.ranks, form.support, effort.rounds)

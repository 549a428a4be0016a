"""A form as the branches that stand in the graph: those of a solution, or random ones to be timed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from converter.schemes import SCHEMES, Form, Geometry
from passes.split import Branches, Factor

if TYPE_CHECKING:
    from converter.solver.solution import Solution

__all__ = ["branches_of", "branches_of_form"]


def branches_of(geometry: Geometry, form: Form, solution: Solution) -> Branches:
    """Give a solution the shapes of the layer's graph; float32 on the CPU."""
    support = solution.support.cpu().numpy()
    sparse = None
    if len(support):
        shape = (geometry.outputs, len(support), *geometry.kernel)
        sparse = solution.sparse.cpu().numpy().reshape(shape)
    factors: tuple[Factor, ...] = ()
    if solution.rank:
        arrays: Sequence[NDArray[np.float32]] = [each.cpu().numpy() for each in solution.factors]
        factors = SCHEMES[form.scheme].subgraph(geometry, arrays)
    return Branches(
        support=support if len(support) else None,
        sparse=sparse,
        factors=factors,
        bias=solution.bias.cpu().numpy(),
    )


def branches_of_form(geometry: Geometry, form: Form, seed: int = 0) -> Branches:
    """Make branches of a form with random weights: what is timed before anything is fitted."""
    random = np.random.default_rng(seed)

    # responses neither grow nor fade over many layers: denormal numbers would slow what is timed
    def draw(*shape: int) -> NDArray[np.float32]:
        size = math.sqrt(4.5 / math.prod(shape[1:]))
        return random.uniform(-size, size, shape).astype(np.float32)

    support = sparse = None
    if form.support:
        support = np.arange(form.support, dtype=np.int64)
        sparse = draw(geometry.outputs, form.support, *geometry.kernel)
    factors: tuple[Factor, ...] = ()
    if form.ranks:
        scheme = SCHEMES[form.scheme]
        arrays = [draw(*shape) for shape in scheme.shapes(geometry, form.ranks)]
        factors = scheme.subgraph(geometry, arrays)
    return Branches(
        support=support, sparse=sparse, factors=factors, bias=np.zeros(geometry.outputs, np.float32)
    )

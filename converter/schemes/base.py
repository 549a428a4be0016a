"""The interface that every scheme implements: cost, fit and subgraph of one way to write L."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from converter.schemes.form import Form, Geometry
from passes.split import Factor

if TYPE_CHECKING:
    from torch import Tensor

    from converter.solver.effects import Moments, Sketch
    from converter.solver.problem import Problem
    from converter.solver.solution import Solution

__all__ = [
    "LONG_PATCH",
    "Effort",
    "Evidence",
    "Scheme",
    "block_of",
    "spread",
    "usable_ranks",
]


LONG_PATCH = 2304
"""On layers with longer patches the dearest forms are not offered: predicting them took more than a third of
the time of all forms, and they save a third of the weights at most. `depthwise` is not at all: of a VGG-16's
such layers, which have few directions that matter, `tucker` leaves as little."""


@dataclass(frozen=True)
class Evidence:
    """What forms of a layer are predicted from: the original's weight, answers and patches.

    Attributes
    ----------
    weight, bias : Tensor of shape (N, D) and (N,), float32
    metric : Tensor of shape (N, N), float64
        The output metric Ω of the response.
    mean, covariance : Tensor of shape (N,) and (N, N), float64
        Of the original's response.
    moments : Moments or None
        Of its patches; None where patches are too long to be looked at whole.
    """

    weight: Tensor
    bias: Tensor
    metric: Tensor
    mean: Tensor
    covariance: Tensor
    moments: Moments | None


@dataclass(frozen=True)
class Effort:
    """How hard a fit works, and how free it is.

    Attributes
    ----------
    iterations : int, default 25
        Most ADMM iterations for one point of the path.
    rounds : int, default 8
        Most rounds of polish.
    trade : bool, default True
        Whether the ADMM may give part of what L of `channel` costs to S. Where the budget is in time it may
        not: S costs what no count of weights shows.
    """

    iterations: int = 25
    rounds: int = 8
    trade: bool = True


class Scheme(Protocol):
    """One way to write L: one file in this folder, a line in its `__init__`, a name in `config/solver.py`."""

    name: str
    whole_patches: bool
    """Whether prediction and fit need patches as they are, of all channels and taps."""
    takes_sparse: bool
    """Whether S may stand beside L; it takes several fits for each form."""
    interpolates: bool
    """Whether ranks between anchors are offered, at effects that are read off between these."""

    def ranks(self, geometry: Geometry) -> Sequence[tuple[int, ...]]:
        """Ranks that L may take, each cheaper in weights than the layer; empty where it does not apply."""

    def anchors(self, geometry: Geometry) -> Sequence[tuple[int, ...]]:
        """Ranks, out of `ranks`, whose effect is measured."""

    def cost(self, geometry: Geometry, ranks: tuple[int, ...]) -> tuple[float, float]:
        """Multiply-accumulates of one sample, and weights, of L."""

    def sketches(
        self, evidence: Evidence, geometry: Geometry, ranks: Sequence[tuple[int, ...]], support: int
    ) -> list[Sketch]:
        """Fit each of `ranks` roughly, and predict what it does to the network's output."""

    def fit(self, problem: Problem, geometry: Geometry, form: Form, effort: Effort) -> Solution:
        """Fit L, and S where the form has a support, on what the converted layers before deliver."""

    def shapes(self, geometry: Geometry, ranks: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Shapes of a solution's factors."""

    def subgraph(
        self, geometry: Geometry, factors: Sequence[NDArray[np.float32]]
    ) -> tuple[Factor, ...]:
        """Give the factors of a solution the shapes of a chain of Convs (or Gemms)."""


def block_of(geometry: Geometry) -> int:
    """Step of ranks and supports from 16 on: onnxruntime's blocked layout pads channels to 8 or 16."""
    return 16 if geometry.outputs >= 128 else 8 if geometry.outputs >= 64 else 4


def usable_ranks(geometry: Geometry, most: int) -> list[int]:
    """Ranks from 1 to `most` that the runtime's layout runs fast, ascending."""
    block = block_of(geometry)
    return [rank for rank in range(1, most + 1) if rank < 16 or rank % block == 0]


def spread(values: Sequence[int], most: int, fractions: Sequence[float]) -> list[int]:
    """Those of ascending `values` nearest to fractions of `most`, each once."""
    if not values:
        return []
    array = np.asarray(values)
    near = {int(array[np.abs(array - fraction * most).argmin()]) for fraction in fractions}
    return sorted(near)

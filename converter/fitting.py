"""The fit of a chosen form: a layer and its recordings make the solver's problem, and that is solved."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from converter.calibration.gather import Inputs, Sample
from converter.config import SolverSettings
from converter.errors import SolverError
from converter.geometry import bias_of, weight_of
from converter.schemes import SCHEMES, Effort, Form, Geometry
from passes.layers import Layer

if TYPE_CHECKING:
    from torch import Tensor

    from converter.solver.problem import Problem
    from converter.solver.solution import Solution

__all__ = ["FULL_PATCH_LIMIT", "UNSEEN_EVERY", "fit", "problem_of", "unseen_of", "writable"]

UNSEEN_EVERY = 8
"""Every eighth image is kept back from the fits, to choose between structures and to report errors."""

FULL_PATCH_LIMIT = 1536
"""Up to so many values a patch is fitted as it is by `channel`; a longer one through the layer's own
responses. S beside L, and S alone, are offered up to here: on larger layers S beside `spatial` never paid
(docs/objectives.md)."""


def fit(
    layer: Layer,
    geometry: Geometry,
    sample: Sample,
    inputs: Inputs,
    metric: NDArray[np.float64],
    form: Form,
    solver: SolverSettings,
    *,
    trade: bool,
) -> Solution:
    """Solve one layer for a planned form.

    Parameters
    ----------
    layer : Layer
    geometry : Geometry
    sample : Sample
        What the original answers.
    inputs : Inputs
        What the graph as converted so far delivers to the layer.
    metric : ndarray of shape (N, N)
        The output metric Ω; the baselines do not use it.
    form : Form
        From the plan.
    solver : SolverSettings
    trade : bool
        Whether the ADMM may trade ranks of `channel` for channels of S at equal cost.

    Raises
    ------
    SolverError
        Where the fit becomes non-finite; it names the layer.
    """
    from converter.solver.factorize import data_svd, plain_svd

    scheme = SCHEMES[form.scheme]
    whole = scheme.whole_patches and form.scheme != "sparse"
    baseline = solver.name != "admm"
    problem = problem_of(
        layer, sample, inputs, None if baseline else metric, solver.device, whole=whole
    )
    try:
        if solver.name == "svd":
            return plain_svd(problem, form.ranks[0])
        if solver.name == "data-svd":
            return data_svd(problem, form.ranks[0])
        effort = Effort(iterations=solver.iterations, rounds=solver.polish, trade=trade)
        return scheme.fit(problem, geometry, form, effort)
    except SolverError as error:
        raise SolverError(f"layer {layer.name}: {error}") from error


def problem_of(
    layer: Layer,
    sample: Sample,
    inputs: Inputs,
    metric: NDArray[np.float64] | None,
    device: str,
    *,
    whole: bool = False,
) -> Problem:
    """Make the solver's problem of a layer and its recordings, on a torch device.

    Parameters
    ----------
    layer : Layer
    sample : Sample
    inputs : Inputs
    metric : ndarray of shape (N, N) or None
        The output metric Ω; None counts all errors alike.
    device : str
    whole : bool, default False
        Keep patches as they are, however long.
    """
    import torch

    from converter.solver.problem import Problem

    rows = writable(weight_of(layer).reshape(len(weight_of(layer)), -1))
    weight = torch.from_numpy(rows).to(device)
    columns = weight.shape[1]
    channels = weight_of(layer).shape[1]
    patches = torch.from_numpy(inputs.features).to(device)
    eligible = torch.arange(channels, device=device)
    basis = None
    if columns > FULL_PATCH_LIMIT and not whole:  # L alone, as a function of the layer's responses
        basis, patches, eligible = weight, patches @ weight.T, eligible[:0]
    return Problem(
        weight=weight,
        bias=torch.from_numpy(bias_of(layer)).to(device),
        channels=channels,
        features=patches,
        basis=basis,
        eligible=eligible,
        target=torch.from_numpy(sample.target).to(device),
        offset=None if inputs.offset is None else torch.from_numpy(inputs.offset).to(device),
        unseen=unseen_of(len(patches), sample, device),
        activation=layer.activation,
        metric=None if metric is None else torch.from_numpy(metric).to(device),
    )


def writable(array: NDArray[np.generic]) -> NDArray[np.generic]:
    """Copy an array that may not be written to: torch warns of those."""
    return np.require(array, requirements=["C", "W"])


def unseen_of(count: int, sample: Sample, device: str) -> Tensor:
    """Say which of `count` patches of a sample are of images kept back, (count,) bool."""
    import torch

    image = torch.arange(count, device=device) // sample.positions.shape[1]
    unseen: Tensor = (image % UNSEEN_EVERY) == UNSEEN_EVERY - 1
    return unseen

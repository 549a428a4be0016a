"""One layer between the graph and the solver: its candidates, its problem, its solution as branches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from converter.calibration.record import Inputs, Sample
from converter.config import SolverSettings
from converter.errors import SolverError
from converter.planner.budget import Candidates, effects_of_rank
from passes.layers import Layer
from passes.split import Branches

if TYPE_CHECKING:
    from torch import Tensor

    from converter.solver.factorize import Allowance
    from converter.solver.problem import Problem
    from converter.solver.solution import Solution

__all__ = ["allowance_of", "branches_of", "candidates_of", "fit", "problem_of", "weight_of"]

UNSEEN_EVERY = 8
"""Every eighth image is kept back from the fits, to choose between structures and to report errors."""

FULL_PATCH_LIMIT = 1536
"""Up to so many values a patch is fitted as it is; a longer one through the layer's own responses
and the taps of its strongest channels."""

ELIGIBLE_TAPS = 512
"""So many taps at most are recorded for the sparse part of such a layer."""


def weight_of(layer: Layer) -> NDArray[np.float32]:
    """Return the weight of a convertible layer, (N, C, *kernel), float32."""
    assert layer.weight is not None, "a convertible layer has a constant weight"
    return np.asarray(layer.weight, dtype=np.float32)


def candidates_of(layer: Layer, sample: Sample, metric: NDArray[np.float64]) -> Candidates:
    """List the ranks that a layer may take, with their cost and their effect on the output.

    Parameters
    ----------
    layer : Layer
    sample : Sample
        What the original answers.
    metric : ndarray of shape (N, N)
        The output metric Ω of its response.
    """
    rows, columns = weight_of(layer).reshape(len(weight_of(layer)), -1).shape
    positions = int(np.prod(sample.out_shape)) if sample.out_shape else 1
    effects = effects_of_rank(sample.covariance, metric)
    block = _block(layer)
    gained = rows if layer.bias is None else 0  # the fit gives every layer a bias
    ranks = np.array(
        [
            rank
            for rank in range(1, min(rows, columns) + 1)
            if rank * (rows + columns) + gained < rows * columns
            and (rank < 16 or rank % block == 0)
        ],
        dtype=np.int64,
    )
    cost = ranks.astype(np.float64) * (rows + columns)
    return Candidates(
        name=layer.name,
        ranks=ranks,
        effects=effects[ranks],
        macs=cost * positions,
        params=cost + gained,
        macs_kept=float(rows * columns * positions),
        params_kept=float(rows * columns),
    )


def allowance_of(layer: Layer, rank: int) -> Allowance:
    """Say what S and L may cost together, in weights, where the plan gave the layer this rank."""
    from converter.solver.factorize import Allowance

    rows, columns = weight_of(layer).reshape(len(weight_of(layer)), -1).shape
    return Allowance(
        total=float(rank * (rows + columns)),
        rank_cost=float(rows + columns),
        channel_cost=float(rows * columns / weight_of(layer).shape[1]),
        block=_block(layer),
    )


def _block(layer: Layer) -> int:
    """Step of ranks and supports: onnxruntime's blocked layout pads channels to 8 or 16."""
    outputs = weight_of(layer).shape[0]
    return 16 if outputs >= 128 else 8 if outputs >= 64 else 4


def fit(
    layer: Layer,
    sample: Sample,
    inputs: Inputs,
    metric: NDArray[np.float64],
    rank: int,
    solver: SolverSettings,
) -> Solution:
    """Solve one layer for a planned rank.

    Parameters
    ----------
    layer : Layer
    sample : Sample
        What the original answers.
    inputs : Inputs
        What the graph as converted so far delivers to the layer.
    metric : ndarray of shape (N, N)
        The output metric Ω; the baselines do not use it.
    rank : int
        From the plan; S and L together may cost what L of this rank costs.
    solver : SolverSettings

    Raises
    ------
    SolverError
        Where the fit becomes non-finite; it names the layer.
    """
    from converter.solver.admm import Admm
    from converter.solver.factorize import data_svd, plain_svd

    problem = problem_of(
        layer, sample, inputs, None if solver.name != "admm" else metric, solver.device
    )
    try:
        if solver.name == "svd":
            return plain_svd(problem, rank)
        if solver.name == "data-svd":
            return data_svd(problem, rank)
        admm = Admm(iterations=solver.iterations, rounds=solver.polish)
        return admm.solve(problem, allowance_of(layer, rank))
    except SolverError as error:
        raise SolverError(f"layer {layer.name}: {error}") from error


def problem_of(
    layer: Layer, sample: Sample, inputs: Inputs, metric: NDArray[np.float64] | None, device: str
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
    """
    import torch

    from converter.solver.problem import Problem

    weight = torch.from_numpy(weight_of(layer).reshape(len(weight_of(layer)), -1)).to(device)
    rows, columns = weight.shape
    channels = weight_of(layer).shape[1]
    patches = torch.from_numpy(inputs.features).to(device)
    eligible = torch.arange(channels, device=device)
    basis = None
    if columns > FULL_PATCH_LIMIT:
        taps = columns // channels
        strength = _channel_strength(weight, patches, channels)
        eligible = strength.topk(min(channels, ELIGIBLE_TAPS // taps)).indices.sort().values
        wanted = (eligible[:, None] * taps + torch.arange(taps, device=device)).flatten()
        basis = torch.cat([weight, torch.eye(columns, device=device)[wanted]])
        patches = torch.cat([patches @ weight.T, patches[:, wanted]], dim=1)
    per = sample.positions.shape[1]
    image = torch.arange(len(patches), device=device) // per
    unseen = (image % UNSEEN_EVERY) == UNSEEN_EVERY - 1
    if layer.bias is None:
        bias = torch.zeros(rows, device=device)
    else:
        bias = torch.from_numpy(np.array(layer.bias, dtype=np.float32)).to(device)
    return Problem(
        weight=weight,
        bias=bias,
        channels=channels,
        features=patches,
        basis=basis,
        eligible=eligible,
        target=torch.from_numpy(sample.target).to(device),
        offset=None if inputs.offset is None else torch.from_numpy(inputs.offset).to(device),
        unseen=unseen,
        activation=layer.activation,
        metric=None if metric is None else torch.from_numpy(metric).to(device),
    )


def _channel_strength(weight: Tensor, patches: Tensor, channels: int) -> Tensor:
    """How much of the response comes through each input channel."""
    spread = patches.var(0).view(channels, -1).mean(1)
    return weight.view(len(weight), channels, -1).square().sum((0, 2)) * spread


def branches_of(layer: Layer, solution: Solution) -> Branches:
    """Give a solution the shapes of the layer's graph; float32 on the CPU."""
    shape = weight_of(layer).shape
    kernel = shape[2:]
    support = solution.support.cpu().numpy()
    has_sparse, has_low = len(support) > 0, solution.rank > 0
    return Branches(
        support=support if has_sparse else None,
        sparse=(
            solution.sparse.cpu().numpy().reshape(shape[0], len(support), *kernel)
            if has_sparse
            else None
        ),
        down=solution.down.cpu().numpy().reshape(-1, shape[1], *kernel) if has_low else None,
        up=solution.up.cpu().numpy() if has_low else None,
        bias=solution.bias.cpu().numpy(),
    )

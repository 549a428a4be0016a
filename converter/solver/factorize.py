"""Fits with the structure fixed: plain SVD, data-metric SVD, and the polish through the activation.

The best rank-r L of a target in the metric of the data is a truncated SVD in whitened coordinates;
S on a support is a solve with the whitened taps. The polish alternates the prox of the activation
error with these two, and keeps the best iterate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from converter.solver.best import Best
from converter.solver.problem import Coordinates, Patches, Problem, factor_of
from converter.solver.prox import response_prox, truncate
from converter.solver.solution import Iteration, Solution, Status

__all__ = [
    "Allowance",
    "Structure",
    "data_svd",
    "directions",
    "effects_of_rank",
    "plain_svd",
    "polish",
]

POLISH_PENALTY = 0.25
"""Of the prox; with 1 a round goes half the way, and with 0.05 fits on a VGG-16 ended where they do so."""


@dataclass(frozen=True)
class Allowance:
    """What one layer may cost, in the unit of the budget (say, multiply-accumulates).

    Attributes
    ----------
    total : float
        Cost that S and L may have together.
    rank_cost, channel_cost : float
        Cost of one rank of L and of one input channel of S.
    block : int
        Ranks and supports from 16 on are multiples of it.
    """

    total: float
    rank_cost: float
    channel_cost: float
    block: int

    def rank_beside(self, support: int, most: int) -> int:
        """Largest usable rank beside a support of so many channels, at most `most`; 0 where none fits."""
        left = self.total - support * self.channel_cost
        return self.usable(min(int(left / self.rank_cost + 1e-9), most))

    def usable(self, count: int) -> int:
        """Round a rank or support down to what the runtime's layout runs fast."""
        count = max(count, 0)
        return count if count < 16 else count - count % self.block


@dataclass(frozen=True)
class Structure:
    """Which input channels S keeps (feature blocks, ascending), and the rank of L."""

    support: tuple[int, ...]
    rank: int


def effects_of_rank(covariance: Tensor, metric: Tensor) -> Tensor:
    """Predict the output error that each rank of L leaves.

    The r leading eigenvectors of Ω^½ C Ω^½ are what a rank-r L keeps; the rest of its trace is lost.

    Parameters
    ----------
    covariance : Tensor of shape (N, N)
        C, of the layer's response over patches.
    metric : Tensor of shape (N, N)
        Ω.

    Returns
    -------
    Tensor of shape (N + 1,)
        Entry r is the relative squared error of the network's output at rank r; the last is 0.
    """
    factor = factor_of(covariance)  # C = F Fᵀ: the eigenvalues of Ω^½ C Ω^½ are those of Fᵀ Ω F
    kept = torch.linalg.eigvalsh(factor.T @ metric @ factor).clamp_min(0)  # ascending
    tail = torch.zeros(len(metric) + 1, dtype=metric.dtype, device=metric.device)
    tail[: len(kept)] = kept.cumsum(0).flip(0)
    return tail


def directions(covariance: Tensor, metric: Tensor) -> Tensor:
    """Give the directions of a response that count, the strongest first: (N, q), q its numerical rank.

    With U the leading r of them, U Uᵀ Ω y is the best that L of rank r can make of a response y.

    Parameters
    ----------
    covariance, metric : Tensor of shape (N, N)
        As for `effects_of_rank`.
    """
    factor = factor_of(covariance)
    values, vectors = torch.linalg.eigh(factor.T @ metric @ factor)
    # Ω^½ F v / √λ are orthonormal, and Ω^½ cancels in the projection on them
    scale = values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt()
    found: Tensor = factor @ (vectors * scale)
    return found.flip(1)


def plain_svd(problem: Problem, rank: int) -> Solution:
    """Truncate the SVD of the weight; no data but for the reported error, the bias stays."""
    coordinates = Coordinates(problem)
    left, right = truncate(problem.weight, rank)
    weight = left @ right
    unfolded = weight if problem.basis is None else _on_features(weight, problem)
    bias = problem.bias + unfolded @ coordinates.mean
    matrix = coordinates.half @ (unfolded @ coordinates.root)
    return _solution(coordinates, left, right, problem.bias, matrix, bias)


def _on_features(weight: Tensor, problem: Problem) -> Tensor:
    """Express a weight (N, D) whose rows lie in the row space of W over features that start with W x̂."""
    rows = problem.weight.shape[0]
    driver = "gelsd" if weight.device.type == "cpu" else "gels"  # all that CUDA has
    mix = torch.linalg.lstsq(problem.weight.T.double(), weight.T.double(), driver=driver).solution.T
    padded = torch.zeros(rows, problem.features.shape[1], dtype=weight.dtype, device=weight.device)
    padded[:, :rows] = mix.to(weight.dtype)
    return padded


def data_svd(problem: Problem, rank: int, coordinates: Coordinates | None = None) -> Solution:
    """Truncate the SVD in the metric of the data, on patches x̂; the activation is not seen."""
    coordinates = coordinates or Coordinates(problem)
    matrix, bias = _linear_target(coordinates, coordinates.seen)
    left, right = truncate(matrix, rank)
    return _finish(coordinates, left, right, None, None, bias, "closed form")


def _linear_target(coordinates: Coordinates, seen: Patches) -> tuple[Tensor, Tensor]:
    """Ã and bias of the best dense layer for x̂, ignoring the activation: the asymmetric correction."""
    missed = seen.response - (seen.q @ coordinates.original.T) @ coordinates.inverse_half
    bias = missed.mean(0)  # not that of the response alone: the mean of thinned features is not 0
    return coordinates.original + coordinates.regress(seen, missed - bias), bias


class SupportBlock:
    """The whitened taps of chosen channels: S̃ = S̄ · taps for S over features.

    Attributes
    ----------
    taps : Tensor of shape (s · k, m)
    """

    def __init__(self, coordinates: Coordinates, support: tuple[int, ...]) -> None:
        problem = coordinates.problem
        taps, width = problem.taps, problem.features.shape[1]
        first = width - len(problem.eligible) * taps
        columns = [first + block * taps + tap for block in support for tap in range(taps)]
        self.taps = coordinates.root[columns]
        gram = (self.taps @ self.taps.T).double()
        gram.diagonal().add_(1e-9 * float(gram.diagonal().mean()))
        self._gram = torch.linalg.cholesky(gram)

    def project(self, matrix: Tensor) -> Tensor:
        """Return S (N, s · k) whose S̃ is nearest to `matrix` (N, m)."""
        right = (matrix @ self.taps.T).double()
        return torch.cholesky_solve(right.T, self._gram).T.to(matrix.dtype)


def polish(
    coordinates: Coordinates, structure: Structure, rounds: int, most: int | None = None
) -> Solution:
    """Fit S and L of a fixed structure through the activation.

    Parameters
    ----------
    coordinates : Coordinates
    structure : Structure
    most : int or None, default None
        Fit on at most so many patches; None takes all.
    rounds : int
        At most so many rounds; it stops where one gains next to nothing on the unseen patches.

    Returns
    -------
    Solution
        The best iterate by the error on unseen patches.
    """
    problem, unseen = coordinates.problem, coordinates.unseen
    seen = coordinates.seen if most is None else coordinates.seen.thinned(most)
    block = SupportBlock(coordinates, structure.support) if structure.support else None
    target, bias = _linear_target(coordinates, seen)
    best = Best[tuple[Tensor, Tensor, Tensor | None, Tensor]]()
    sparse: Tensor | None = None
    left = right = torch.zeros(0)
    for step in range(rounds + 1):
        left, right, sparse = _project(target, structure, block, sparse)
        matrix = left @ right if structure.rank else torch.zeros_like(target)
        if block is not None and sparse is not None:
            matrix = matrix + sparse @ block.taps
        judged = unseen if len(unseen.q) else seen
        error = coordinates.error(judged, coordinates.respond(judged, matrix, bias))
        worth_another = best.take(error, (left, right, sparse, bias))
        if not worth_another or step == rounds or problem.activation.kind == "identity":
            break
        response = coordinates.respond(seen, matrix, bias)
        wanted = response_prox(problem.activation, seen.wanted, response, POLISH_PENALTY)
        moved = wanted - response
        shift = moved.mean(0)
        target, bias = matrix + coordinates.regress(seen, moved - shift), bias + shift
    assert best.made is not None, "the loop runs at least once"
    left, right, sparse, bias = best.made
    return _finish(coordinates, left, right, sparse, structure.support, bias, "closed form", block)


def _project(
    target: Tensor, structure: Structure, block: SupportBlock | None, sparse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Split `target` into L of the rank and S on the support, by turns from the last S."""
    rows, width = target.shape
    nothing = torch.zeros(rows, 0).to(target), torch.zeros(0, width).to(target)
    if block is None:
        return *truncate(target, structure.rank), None
    if structure.rank == 0:
        return *nothing, block.project(target)
    if sparse is None:
        sparse = block.project(target - _product(truncate(target, structure.rank)))
    for _ in range(3):
        left, right = truncate(target - sparse @ block.taps, structure.rank)
        sparse = block.project(target - left @ right)
    return left, right, sparse


def _product(factors: tuple[Tensor, Tensor]) -> Tensor:
    return factors[0] @ factors[1]


def _finish(
    coordinates: Coordinates,
    left: Tensor,
    right: Tensor,
    sparse: Tensor | None,
    support: tuple[int, ...] | None,
    bias: Tensor,
    status: Status,
    block: SupportBlock | None = None,
) -> Solution:
    """Go back from whitened coordinates to weights over patches, and measure both errors."""
    problem = coordinates.problem
    matrix = left @ right
    if sparse is not None and block is not None:
        matrix = matrix + sparse @ block.taps
    up = coordinates.inverse_half @ left
    down = coordinates.unwhiten(right)
    total = up @ down
    if problem.basis is not None:
        down = down @ problem.basis
    kept = torch.zeros(len(problem.weight), 0).to(problem.weight)
    chosen = problem.eligible[:0]
    if sparse is not None and support is not None:
        kept = coordinates.inverse_half @ sparse
        chosen = problem.eligible[list(support)]
        first = total.shape[1] - len(problem.eligible) * problem.taps
        columns = [
            first + one * problem.taps + tap for one in support for tap in range(problem.taps)
        ]
        total = total.clone()
        total[:, columns] += kept
        order = torch.argsort(chosen)
        chosen = chosen[order]
        kept = kept.view(len(kept), len(chosen), problem.taps)[:, order].reshape(len(kept), -1)
    plain_bias = bias - total @ coordinates.mean
    return _solution(
        coordinates, *_balanced(up, down), plain_bias, matrix, bias, kept, chosen, status
    )


def _balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Give both factors of each rank the same norm, so that neither is tiny."""
    above = torch.linalg.vector_norm(up, dim=0).clamp_min(1e-30)
    below = torch.linalg.vector_norm(down, dim=1).clamp_min(1e-30)
    scale = (below / above).sqrt()
    return up * scale, down / scale[:, None]


def _solution(
    coordinates: Coordinates,
    up: Tensor,
    down: Tensor,
    plain_bias: Tensor,
    matrix: Tensor,
    bias: Tensor,
    sparse: Tensor | None = None,
    support: Tensor | None = None,
    status: Status = "closed form",
    history: tuple[Iteration, ...] = (),
) -> Solution:
    problem = coordinates.problem
    fitted, unseen = (
        coordinates.error(side, coordinates.respond(side, matrix, bias))
        for side in (coordinates.seen, coordinates.unseen)
    )
    nothing = torch.zeros(len(problem.weight), 0).to(problem.weight)
    return Solution(
        support=problem.eligible[:0] if support is None else support,
        sparse=nothing if sparse is None else sparse,
        factors=(down, up),
        bias=plain_bias,
        fitted=fitted,
        unseen=unseen if math.isfinite(unseen) else math.inf,
        status=status,
        history=history,
    )

"""ADMM for one layer: which input channels S keeps and which rank L has.

    minimise  1/2n ‖φ(P) − φ(Z)‖² + λ_s Σ‖S_c‖ + λ_l ‖L‖_*   subject to   Z = A X̂ + b + O,  A = S + L

with all norms in the metric of the data and of the network's output (see `problem`), as in
arXiv:1807.10119 with the splitting of Boyd et al. (2011). In whitened coordinates one iteration is

1. Z   ← prox of the activation error at A X̂ + b + O + U_z            (elementwise; `response_prox`)
2. A,b ← ridge regression of Z − U_z with normal matrix ρ (Q̂ + I) (one ρ for both: factorised once)
3. S   ← prox of (λ_s/ρ_a) Σ‖S_c‖ at A − L + U_a                        (few accelerated steps: taps of
                                                                       different channels correlate)
4. L   ← singular value shrinkage of A − S + U_a by λ_l/ρ_a
5. U_z, U_a ← duals; then ρ by residual balancing (Boyd §3.4.1), in the first quarter of the iterations only,
   so that it settles.

Stops on primal and dual residuals (Boyd §3.3.1). The prox of step 1 is exact in a diagonal metric; with
the full output metric it is the elementwise one, and the kept structure is judged by its polished fit.

The budget fixes what S and L may cost together, so λ runs along a warm-started path until the cost is
met; each structure (s, r) that the path proposes is polished, beside the one without S, and the one
with the least error on unseen patches is kept.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from converter.solver.factorize import Allowance, Structure, polish
from converter.solver.problem import Coordinates, Problem
from converter.solver.prox import group_shrink, response_prox, singular_shrink
from converter.solver.solution import Iteration, Solution, Status

__all__ = ["Admm"]

SUPPORT_STEPS = 2
POINTS = 6
PATH_PATCHES = 2048
JUDGED_PATCHES = 4096
JUDGED_ROUNDS = 2
PATH_START = 0.01
PATH_STEP = 2.2
BALANCE = 10.0
LEAST_PENALTY = 5.0
SUPPORT_SHARES = (0.5, 1.0)
SUPPORT_GAIN = 0.03
"""A sparse branch costs a Gather and an Add that no count of MACs shows: it must lower the unseen
error by this share to be worth its place."""


@dataclass
class _State:
    """Iterates, all in whitened coordinates: A, S, L, U_a (N, m); Z, U_z (n, N); b (N,)."""

    a: Tensor
    bias: Tensor
    blocks: Tensor  # S̄, (N, g, k): S over block-whitened taps
    s: Tensor
    low: Tensor
    z: Tensor
    u_z: Tensor
    u_a: Tensor
    response: Tensor  # A X̂ + b + O
    z_seen: Tensor  # Ω^½ Zᵀ Q / n
    u_seen: Tensor  # Ω^½ U_zᵀ Q / n
    rho: float
    rank: int = 0
    nuclear: float = 0.0


@dataclass(frozen=True)
class _Point:
    """One finished point of the path."""

    order: tuple[int, ...]  # eligible channels by falling ‖S_c‖, those kept only
    rank: int
    cost: float
    status: Status


@dataclass(frozen=True)
class Admm:
    """Hyperparameters; the state of a run is explicit and lives in `solve`.

    Attributes
    ----------
    iterations : int, default 25
        Most iterations for one point of the path.
    rounds : int, default 8
        Most rounds of polish.
    eps_abs, eps_rel : float, default 1e-3, 1e-2
        Stopping tolerances of Boyd et al. (2011), eq. 3.12.
    rho : float, default 10.0
        First penalty, on both constraints; the error after a ReLU is not convex, and below about 5
        the iterates were seen to cycle.
    work : float, default 2e11
        Bound on the multiply-accumulates of the iterations of one layer; large layers get fewer.
    """

    iterations: int = 25
    rounds: int = 8
    eps_abs: float = 1e-3
    eps_rel: float = 1e-2
    rho: float = 10.0
    work: float = 2e11

    def solve(
        self, problem: Problem, allowance: Allowance, sizes: tuple[int, int] | None = None
    ) -> Solution:
        """Choose S and L within `allowance`.

        Parameters
        ----------
        problem : Problem
        allowance : Allowance
            At least one rank or one channel must fit into it.
        sizes : tuple of (int, int) or None, default None
            Rank of L and channels of S where they are settled, and only which channels is not.

        Returns
        -------
        Solution
            With the ADMM's log and status; the structure without S is always among the candidates.
        """
        coordinates = Coordinates(problem)
        most = allowance.rank_beside(0, min(problem.weight.shape))
        path, history, status = self._path(coordinates, allowance, max(most, 1))
        order = _order(path)
        if not most or sizes is not None:  # S must have channels, however few the path has kept
            kept = set(order)
            order += [each for each in _by_strength(coordinates) if each not in kept]
        if sizes is None:
            candidates = _structures(path, order, allowance, most)
        else:
            rank, support = sizes
            candidates = [Structure(tuple(sorted(order[:support])), rank)]
        chosen, least = candidates[0], math.inf
        if len(candidates) > 1:
            for structure in candidates:
                judged = polish(coordinates, structure, JUDGED_ROUNDS, JUDGED_PATCHES)
                # of fewer than eight images none is kept back
                error = judged.unseen if len(coordinates.unseen.q) else judged.fitted
                if error < least * (1 - SUPPORT_GAIN if structure.support else 1.0):
                    chosen, least = structure, error
        best = polish(coordinates, chosen, self.rounds)
        return dataclasses.replace(best, status=status, history=history)

    def _path(
        self, coordinates: Coordinates, allowance: Allowance, most: int
    ) -> tuple[list[_Point], tuple[Iteration, ...], Status]:
        """Raise λ from little to much, warm-started, until S and L cost what is allowed."""
        run = _Run(self, coordinates, allowance, most)
        state = run.start()
        rows, width = coordinates.original.shape
        each = (
            2 * len(run.patches.q) * rows * width
            + 2 * rows * width * width
            + rows * rows * (2 * width + 8 * rows)
        )
        affordable = max(int(self.work / each), 2 * POINTS)
        limit = min(self.iterations, affordable // POINTS)
        level = PATH_START * math.sqrt(_largest_eigenvalue(coordinates.original))
        found: list[_Point] = []
        for _ in range(POINTS):
            status = run.iterate(state, level, limit)
            norms = state.blocks.square().sum((0, 2))
            kept = int((norms > 0).sum())
            order = torch.argsort(norms, descending=True, stable=True)[:kept]
            cost = kept * allowance.channel_cost + state.rank * allowance.rank_cost
            found.append(_Point(tuple(order.tolist()), state.rank, cost, status))
            if cost <= allowance.total:
                break
            level *= PATH_STEP
        return found, tuple(run.history), found[-1].status


class _Run:
    """What stays the same over the iterations of one layer: taps, factorizations, the log."""

    def __init__(
        self, settings: Admm, coordinates: Coordinates, allowance: Allowance, most: int
    ) -> None:
        self.settings, self.coordinates = settings, coordinates
        self.most = most
        thinned = coordinates.seen.thinned(PATH_PATCHES)
        self.patches = dataclasses.replace(thinned, q=thinned.q - thinned.q.mean(0))
        problem = coordinates.problem
        # a channel is as dear as its cost in ranks: both penalties then buy at the same price
        self.channel_price = math.sqrt(allowance.channel_cost / allowance.rank_cost)
        self.taps, self.blocks = _block_whitened_taps(coordinates)
        self.step = 1.0 / max(_largest_eigenvalue(self.taps), 1.0)
        self.history: list[Iteration] = []
        self.started = time.monotonic()
        # both constraints share ρ, which cancels from the normal matrix: one factorisation serves all
        self.normal = self.patches.q.T @ self.patches.q / len(self.patches.q)
        identity = torch.eye(len(self.normal)).to(self.normal)
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.normal + identity))
        offset = self.patches.offset
        self.offset_seen = 0.0 if offset is None else coordinates.regress(self.patches, offset)
        self.scale = math.sqrt(coordinates.spread)
        self.kernel = problem.taps

    def start(self) -> _State:
        """Begin at the original layer, all of it in L."""
        c = self.coordinates
        rows, _ = c.original.shape
        bias = self.patches.response.mean(0)
        response = c.respond(self.patches, c.original, bias)
        return _State(
            a=c.original.clone(),
            bias=bias,
            blocks=torch.zeros(rows, self.blocks, self.kernel).to(c.original),
            s=torch.zeros_like(c.original),
            low=c.original.clone(),
            z=response,
            u_z=torch.zeros_like(response),
            u_a=torch.zeros_like(c.original),
            response=response,
            z_seen=c.regress(self.patches, response),
            u_seen=torch.zeros_like(c.original),
            rho=self.settings.rho,
        )

    def iterate(self, state: _State, level: float, limit: int) -> Status:
        """Run the ADMM at one level of λ from `state`, in place; say how it ended."""
        best, since = math.inf, 0
        for k in range(limit):
            primal, dual, objective = self._update(state, level)
            self.history.append(
                Iteration(
                    iteration=len(self.history),
                    primal=primal[0] / primal[1],
                    dual=dual[0] / dual[1],
                    objective=objective,
                    rho=state.rho,
                    rank=state.rank,
                    support=int((state.blocks.square().sum((0, 2)) > 0).sum()),
                    seconds=time.monotonic() - self.started,
                )
            )
            if primal[0] <= primal[1] and dual[0] <= dual[1]:
                return "converged"
            worst = max(primal[0] / primal[1], dual[0] / dual[1])
            best, since = (worst, 0) if worst < best * 0.999 else (best, since + 1)
            if since >= 15 and k > limit // 2:
                return "stalled"
            if k < limit // 4:
                self._balance(state, primal[0] / primal[1], dual[0] / dual[1])
        return "iteration limit"

    def _update(
        self, state: _State, level: float
    ) -> tuple[tuple[float, float], tuple[float, float], float]:
        """One iteration; returns (residual, tolerance) for primal and dual, and the objective."""
        c, rho, patches = self.coordinates, state.rho, self.patches
        problem = c.problem
        low_before, z_seen_before = state.low, state.z_seen
        parts_before = state.s + state.low

        state.z = response_prox(problem.activation, patches.wanted, state.response + state.u_z, rho)
        state.z_seen = c.regress(patches, state.z)

        wanted = (state.z - state.u_z).mean(0)
        state.bias = wanted if patches.offset is None else wanted - patches.offset.mean(0)
        known = state.z_seen - state.u_seen - self.offset_seen
        state.a = (known + parts_before - state.u_a) @ self.inverse

        state.blocks, state.s = self._sparse_step(state, level)
        state.low, state.rank, state.nuclear = singular_shrink(
            state.a - state.s + state.u_a, level / rho, self.most * 2
        )

        state.response = c.respond(patches, state.a, state.bias)
        gap_z, gap_a = state.response - state.z, state.a - state.s - state.low
        state.u_z = state.u_z + gap_z
        state.u_a = state.u_a + gap_a
        # what the features see of A X̂ + b + O needs no pass over the patches
        state.u_seen = state.u_seen + state.a @ self.normal + self.offset_seen - state.z_seen

        root = math.sqrt(len(state.z)) * self.scale
        parts = state.s + state.low
        primal = math.hypot(_norm(gap_z @ c.half) / root, _norm(gap_a) / self.scale)
        # what S and L exchange between them does not show in their sum, hence the second term
        moved = _norm(state.z_seen - z_seen_before + parts - parts_before)
        dual = rho * math.hypot(moved, _norm(state.low - low_before)) / self.scale
        size = math.sqrt(state.a.shape[0])
        primal_tolerance = size * self.settings.eps_abs + self.settings.eps_rel * max(
            math.hypot(_norm(state.response @ c.half) / root, _norm(state.a) / self.scale),
            math.hypot(_norm(state.z @ c.half) / root, _norm(parts) / self.scale),
        )
        pull = max(_norm(state.u_seen), _norm(state.u_a)) / self.scale
        dual_tolerance = size * self.settings.eps_abs + self.settings.eps_rel * rho * pull
        penalty = level * (
            state.nuclear
            + self.channel_price * float(torch.linalg.vector_norm(state.blocks, dim=(0, 2)).sum())
        )
        objective = c.error(patches, state.response) / 2 + penalty / c.spread
        return (primal, primal_tolerance), (dual, dual_tolerance), objective

    def _sparse_step(self, state: _State, level: float) -> tuple[Tensor, Tensor]:
        """Group-sparse S: a few accelerated proximal gradient steps from the last S."""
        if not self.blocks:
            return state.blocks, state.s
        target = state.a - state.low + state.u_a
        threshold = self.step * level * self.channel_price / state.rho
        rows = len(target)
        current = ahead = state.blocks
        momentum = 1.0
        for _ in range(SUPPORT_STEPS):
            missed = ahead.reshape(rows, -1) @ self.taps - target
            moved = ahead - self.step * (missed @ self.taps.T).view_as(ahead)
            shrunk = group_shrink(moved, threshold)
            following = (1 + math.sqrt(1 + 4 * momentum * momentum)) / 2
            ahead = shrunk + (momentum - 1) / following * (shrunk - current)
            current, momentum = shrunk, following
        return current, current.reshape(rows, -1) @ self.taps

    def _balance(self, state: _State, primal: float, dual: float) -> None:
        """Double or halve ρ where one residual is ten times the other; the scaled duals follow."""
        factor = 2.0 if primal > BALANCE * dual else 0.5 if dual > BALANCE * primal else 1.0
        if state.rho * factor < LEAST_PENALTY:
            return
        state.rho *= factor
        state.u_z = state.u_z / factor
        state.u_seen = state.u_seen / factor
        state.u_a = state.u_a / factor


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


def _block_whitened_taps(coordinates: Coordinates) -> tuple[Tensor, int]:
    """Taps (g · k, m) over whitened features, orthonormal within each eligible channel, and g."""
    problem = coordinates.problem
    groups = len(problem.eligible)
    taps = coordinates.root[coordinates.root.shape[0] - groups * problem.taps :]
    if not groups:
        return taps, 0
    blocks = taps.view(groups, problem.taps, -1).double()
    gram = blocks @ blocks.mT
    mean = gram.diagonal(dim1=1, dim2=2).mean(1)
    gram = gram + (1e-6 * mean + 1e-30)[:, None, None] * torch.eye(problem.taps).to(gram)
    factor = torch.linalg.cholesky(gram)
    white = torch.linalg.solve_triangular(factor, blocks, upper=False)
    return white.reshape_as(taps).to(taps.dtype), groups


def _largest_eigenvalue(matrix: Tensor) -> float:
    """Bound that of M Mᵀ: power iteration from a fixed start, with a margin."""
    if not len(matrix):
        return 1.0
    vector = torch.ones(matrix.shape[0]).to(matrix)
    value = 1.0
    for _ in range(30):
        vector = matrix @ (matrix.T @ vector)
        value = _norm(vector)
        vector = vector / max(value, 1e-30)
    return 1.1 * value


def _order(path: list[_Point]) -> list[int]:
    """Channels that the path has kept at all, the last to be removed first."""
    rank_of: dict[int, tuple[int, int]] = {}
    for at, point in enumerate(path):
        for place, channel in enumerate(point.order):
            rank_of[channel] = (-at, place)
    return sorted(rank_of, key=lambda channel: rank_of[channel])


def _by_strength(coordinates: Coordinates) -> list[int]:
    """All eligible channels by falling share in the original's response, as if they were independent."""
    problem = coordinates.problem
    groups = len(problem.eligible)
    # the last features are the patches of these channels, also where the first ones are a basis
    energy = coordinates.root[len(coordinates.root) - groups * problem.taps :].square().sum(1)
    steps = torch.arange(problem.taps, device=problem.eligible.device)
    columns = (problem.eligible[:, None] * problem.taps + steps).flatten()
    weight = (coordinates.half @ problem.weight)[:, columns].square().sum(0)
    strength = (weight * energy).view(groups, problem.taps).sum(1)
    return torch.argsort(strength, descending=True, stable=True).tolist()


def _structures(
    path: list[_Point], order: list[int], allowance: Allowance, most: int
) -> list[Structure]:
    """Structures worth a polish: L alone, the path's own, and shares of the budget given to S.

    Channels are taken in `order`.
    """
    affordable = int(allowance.total / allowance.channel_cost + 1e-9)
    sizes = [len(point.order) for point in path[-2:]]
    sizes += [round(share * affordable) for share in SUPPORT_SHARES]
    chosen = [Structure((), most)] if most else []
    for wanted in sizes:
        size = allowance.usable(min(wanted, affordable, len(order)))
        structure = Structure(tuple(sorted(order[:size])), allowance.rank_beside(size, most))
        if size and structure not in chosen:
            chosen.append(structure)
    return chosen

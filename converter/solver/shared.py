"""L with a shared first factor, and S beside it, fitted through the activation; see `quadratic`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from converter.errors import SolverError
from converter.solver.best import Best
from converter.solver.factorize import POLISH_PENALTY
from converter.solver.parts import Parts, Support, strongest
from converter.solver.problem import Patches, Problem, caution, damping, metric_roots
from converter.solver.prox import activate, response_prox
from converter.solver.quadratic import Groups, alternate, covariance, damped
from converter.solver.solution import Solution

__all__ = ["polish_shared"]


class _Fit:
    """One layer's patches in plain coordinates: moments, errors, and what a new target looks like."""

    def __init__(self, problem: Problem, groups: Groups) -> None:
        if problem.basis is not None:
            raise ValueError("a shared factor is fitted on whole patches, not on features of them")
        self.problem = problem
        seen = ~problem.unseen
        features = problem.features[seen]
        if len(features) < 2:
            raise SolverError(
                "a layer has fewer than 2 patches to fit on; calibrate with more images"
            )
        self.mean = features.mean(0)
        gram = covariance(features, self.mean)
        size = features.shape[1], len(features)
        # by how much more P's gains are damped than G
        self._held = (caution(*size) - damping(*size)) * float(gram.diagonal().mean())
        self._cautious = torch.linalg.cholesky(damped(gram.clone(), caution(*size)))
        self.gram = damped(gram, damping(*size))
        recorded = [self.gram, problem.target, problem.features[problem.unseen]]
        recorded += [] if problem.offset is None else [problem.offset]
        if not all(bool(torch.isfinite(each).all()) for each in recorded):
            raise SolverError(
                "a layer's recorded activations are not finite; look for NaN or infinite values"
            )
        self.half, self.inverse_half = metric_roots(problem.metric, problem.weight)
        self.seen = self._side(features, seen)
        self.unseen = self._side(problem.features[problem.unseen], problem.unseen)
        wanted = self.seen.wanted
        spread = ((wanted - wanted.mean(0)) @ self.half).square().sum() / len(wanted)
        self.spread = float(spread) if float(spread) > 0 else 1.0
        self.groups = groups
        self.quadratic = groups.quadratic(self.gram, self.half, self.inverse_half)

    def _side(self, features: Tensor, rows: Tensor) -> Patches:
        problem = self.problem
        offset = None if problem.offset is None else problem.offset[rows]
        target = problem.target[rows]
        return Patches(features, activate(problem.activation, target), target, offset)

    def respond(self, side: Patches, parts: Parts, bias: Tensor) -> Tensor:
        """Response plus shortcut of the parts, with `bias` about the mean patch: (n, N)."""
        response = parts.of(side.q, self.groups) + (bias - self._of_mean(parts))
        return response if side.offset is None else response.add_(side.offset)

    def _of_mean(self, parts: Parts) -> Tensor:
        return parts.of(self.mean[None], self.groups)[0]

    def plain_bias(self, parts: Parts, bias: Tensor) -> Tensor:
        """Turn a bias about the mean patch into one about zero, (N,)."""
        return bias - self._of_mean(parts)

    def error(self, side: Patches, total: Tensor) -> float:
        """Relative squared error after the activation, in the metric."""
        if not len(total):
            return 0.0
        missed = (activate(self.problem.activation, total) - side.wanted) @ self.half
        return float(missed.square().sum()) / len(total) / self.spread

    def linear_target(self) -> tuple[Tensor, Tensor]:
        """P (N, D) and bias of the layer that undoes what the layers before have lost; φ is not seen."""
        weight = self.problem.weight
        missed = self.seen.response - self.seen.q @ weight.T
        bias = missed.mean(0)
        return weight @ self.gram + self._learn(missed - bias), bias + weight @ self.mean

    def moved_target(
        self, parts: Parts, bias: Tensor, products: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """P and bias of where the activation error is less: the prox of it, regressed on the patches."""
        response = self.respond(self.seen, parts, bias)
        moved = response_prox(self.problem.activation, self.seen.wanted, response, POLISH_PENALTY)
        moved -= response
        shift = moved.mean(0)
        moved -= shift
        return self._covered(parts, products) + self._learn(moved), bias + shift

    def _covered(self, parts: Parts, products: Tensor | None) -> Tensor:
        """Ŵ G (N, D)."""
        if products is None:
            products = self.quadratic.products(parts.factors.first)
        covered = parts.factors.covered(self.groups, products)
        if parts.kept is not None and parts.sparse is not None:
            covered += parts.sparse @ parts.kept.rows
        return covered

    def _learn(self, residual: Tensor) -> Tensor:
        """Regress a residual (n, N) on the patches, with caution; what P gains by it, (N, D).

        With C the covariance, that is E[r qᵀ] (C + c)⁻¹ (C + d) for the two dampings c ≥ d, and
        (C + c)⁻¹ (C + d) = 1 − (c − d) (C + c)⁻¹ needs no product with C.
        """
        seen = residual.T @ self.seen.q / len(residual)
        if self._held <= 0:
            return seen
        return seen - self._held * torch.cholesky_solve(seen.T, self._cautious).T


def polish_shared(
    problem: Problem,
    groups: Groups,
    ranks: tuple[int, ...],
    support: int = 0,
    rounds: int = 8,
) -> Solution:
    """Fit L with a shared first factor, and S beside it, through the activation.

    Parameters
    ----------
    problem : Problem
        On whole patches (no basis).
    groups : Groups
    ranks : tuple of int
        (r,), or (r₁, r₂) where the rank of K is limited.
    support : int, default 0
        So many channels S keeps: those through which most of the response comes that L leaves.
    rounds : int, default 8
        At most so many rounds through the activation; it stops where one gains next to nothing on
        the unseen patches.

    Returns
    -------
    Solution
        The best iterate by the error on unseen patches; its factors are V (r, d) and K (N, T, r), or V
        (r₁, d), core (r₂, T, r₁) and outer (N, r₂), or those of `depthwise`.
    """
    fit = _Fit(problem, groups)
    quadratic = fit.quadratic
    limit = ranks[1] if len(ranks) > 1 else None
    cross, bias = fit.linear_target()
    first = quadratic.start(problem.weight, ranks[0])
    kept: Support | None = None
    if support:
        alone = alternate(quadratic, quadratic.grouped(cross), first, 1, limit).factors(limit)
        missed = problem.weight - alone.weight(groups)
        chosen = strongest(missed, fit.gram, fit.half, problem.taps, support)
        kept = Support(fit.gram, problem.taps, chosen)
        quadratic = quadratic.within(kept.beside(fit.gram))
        first = quadratic.start(problem.weight, ranks[0])
    best = Best[tuple[Parts, Tensor]]()
    products: Tensor | None = None
    for step in range(rounds + 1):
        target = quadratic.grouped(cross if kept is None else kept.unreached(cross))
        steps = 1 if step else quadratic.start_steps
        second = alternate(quadratic, target, first, steps, limit, products=products)
        factors, first, products = second.factors(limit), second.first, second.products
        sparse = None if kept is None else kept.step(cross, factors.weight(groups))
        parts = Parts(factors, kept, sparse)
        judged = fit.unseen if len(fit.unseen.q) else fit.seen
        error = fit.error(judged, fit.respond(judged, parts, bias))
        worth_another = best.take(error, (parts, bias))
        if not worth_another or step == rounds or problem.activation.kind == "identity":
            break
        # beside S, L is fitted in a metric of its own, whose products are not those of G
        cross, bias = fit.moved_target(parts, bias, products if kept is None else None)
    assert best.made is not None, "the loop runs at least once"
    parts, bias = best.made
    if not math.isfinite(best.error):
        raise SolverError("the fit became infinite or NaN; lower the learning from outliers")
    factors, sparse = parts.factors, parts.sparse
    nothing = torch.zeros(len(problem.weight), 0).to(problem.weight)
    return Solution(
        support=problem.eligible[:0] if kept is None else kept.channels,
        sparse=nothing if sparse is None else sparse,
        factors=_balanced(factors.chain()),
        bias=fit.plain_bias(parts, bias),
        fitted=fit.error(fit.seen, fit.respond(fit.seen, parts, bias)),
        unseen=best.error if len(fit.unseen.q) else 0.0,
        status="closed form",
    )


def _balanced(factors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Give all factors the same size, so that none is tiny."""
    norms = [float(torch.linalg.vector_norm(each)) / math.sqrt(each.numel()) for each in factors]
    if min(norms) <= 0:
        return factors
    mean = math.prod(norms) ** (1 / len(norms))
    return tuple(each * (mean / norm) for each, norm in zip(factors, norms, strict=True))

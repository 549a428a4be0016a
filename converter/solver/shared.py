"""L with a shared first factor: Ŵ_t = K_t V for groups t of columns, fitted in the metric of the data.

Symbols
-------
W : weight of shape (N, D), its columns split into T groups of d: W_t of shape (N, d).
V : first factor (r, d), the same for all groups; K_t : (N, r), K = [K_1 … K_T] of shape (N, T·r).
G : damped covariance of the patches (D, D); Ω : output metric (N, N).
P : T G (N, D), where T is the dense layer that is wanted. Nothing here needs T itself.

Two factorisations have this shape. `spatial` (Jaderberg et al., arXiv:1405.3866) has one group for
each column of the kernel and d = C·kh: V is the kh×1 Conv, K the 1×kw one. `tucker` (Kim et al.,
arXiv:1511.06530) has one group for each tap and d = C, and K of rank r₂: V is the first 1×1 Conv,
K = U · core the other two.

The error tr Ω (T − Ŵ) G (T − Ŵ)ᵀ is least over K in closed form, K = P Bᵀ (B G Bᵀ)⁻¹ with B = I_T ⊗ V,
for any Ω (with the rank of K limited, by a truncated SVD in both metrics). Over V it is a linear system
Σ_tu (K_tᵀ Ω K_u) V G_ut = Σ_t K_tᵀ Ω P_t, which a few conjugate-gradient steps solve well enough, with
(Σ_t K_tᵀ Ω K_t) ⊗ (Σ_t G_tt / T) as preconditioner. The two alternate. A step costs about r·D² for each
product with G.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from converter.errors import SolverError
from converter.solver.factorize import POLISH_GAIN, POLISH_PENALTY
from converter.solver.problem import DAMPING, Patches, Problem, caution, damping, metric_roots
from converter.solver.prox import activate, response_prox, truncate
from converter.solver.solution import Solution

__all__ = [
    "Factors",
    "Groups",
    "Moments",
    "Quadratic",
    "Second",
    "alternate",
    "covariance",
    "effects_of_shared",
    "effects_of_sparse",
    "polish_shared",
]

CONJUGATE_STEPS = 6
PREDICT_CONJUGATE_STEPS = 2
"""Where a form is only predicted: with 4, effects changed by 1 to 5 % and took a quarter longer."""
START_STEPS = 10
"""Alternations before the polish."""
PREDICT_STEPS = 1
"""Alternations where a form is only predicted."""
NEGLIGIBLE = 1e-6
"""Effect, as a share of the variance of the network's output, below which nothing is won any more."""
RIDGE = 1e-7
"""Share of the mean diagonal that keeps the small normal matrices regular; they are float64."""
HELD = 1e-4
"""Share of K's mean energy for one rank that ties a step of V to the V before it: where the rank is above
that of the target, nothing else does, and round-off would grow without bound."""
GRAM_BLOCK = 1024


@dataclass(frozen=True)
class Groups:
    """How columns share the first factor.

    Attributes
    ----------
    columns : Tensor of shape (T, d), int64
        Columns of W, group by group; each once.
    """

    columns: Tensor

    @property
    def order(self) -> Tensor:
        """All columns, group by group, (D,)."""
        return self.columns.reshape(-1)


@dataclass(frozen=True)
class Factors:
    """V (r, d) and K (N, T, r); where the rank of K is limited, K = outer (N, r₂) · core (r₂, T, r)."""

    first: Tensor
    second: Tensor
    core: Tensor | None = None
    outer: Tensor | None = None

    def weight(self, groups: Groups) -> Tensor:
        """Return Ŵ (N, D), its columns where they belong."""
        grouped = torch.einsum("ntr,rd->ntd", self.second, self.first)
        total = torch.empty(len(grouped), groups.order.numel()).to(grouped)
        total[:, groups.order] = grouped.reshape(len(grouped), -1)
        return total


@dataclass
class Second:
    """The best K for one V, before its rank is limited.

    Attributes
    ----------
    quadratic : Quadratic
    first : Tensor of shape (r, d)
    root : Tensor of shape (T·r, T·r)
        Cholesky factor of B G Bᵀ.
    whitened : Tensor of shape (N, T·r)
        K · root.
    products : Tensor of shape (T, r, T, d)
        `Quadratic.products` of V; the dearest part of a step, so they are handed on.
    """

    quadratic: Quadratic
    first: Tensor
    root: Tensor
    whitened: Tensor
    products: Tensor
    _left: Tensor | None = None

    def factors(self, limit: int | None = None) -> Factors:
        """V and K; of rank `limit` at most, which truncates an SVD in the metrics of data and output."""
        shape = (self.quadratic.count, len(self.first))
        if limit is None:
            second = torch.linalg.solve_triangular(
                self.root, self.whitened, upper=False, left=False
            )
            return Factors(self.first, second.view(-1, *shape))
        measured = self.quadratic.half @ self.whitened
        if self._left is None or self._left.shape[1] < limit:
            self._left = truncate(measured, max(limit, min(measured.shape)))[0]
        left = self._left[:, :limit]
        core = torch.linalg.solve_triangular(
            self.root, left.T @ measured, upper=False, left=False
        ).view(-1, *shape)
        outer = self.quadratic.inverse_half @ left
        return Factors(self.first, torch.einsum("nq,qtr->ntr", outer, core), core, outer)


class Quadratic:
    """What a fit in the metric of the data needs of the patches, sorted into groups.

    Parameters
    ----------
    gram : Tensor of shape (D, D)
        G, damped.
    half, inverse_half : Tensor of shape (N, N)
        Ω^½ and its inverse.
    groups : Groups
    """

    def __init__(self, gram: Tensor, half: Tensor, inverse_half: Tensor, groups: Groups) -> None:
        self.groups = groups
        self.count, self.inner = groups.columns.shape
        order = groups.order
        shape = (self.count, self.inner, self.count, self.inner)
        self.gram = gram[order][:, order].view(shape)
        self.half, self.inverse_half = half, inverse_half
        self.metric = half @ half
        self._mean = torch.stack([self.gram[t, :, t] for t in range(self.count)]).mean(0)
        self._root = torch.linalg.cholesky(_regular(self._mean.double())).to(gram.dtype)

    def within(self, gram: Tensor) -> Quadratic:
        """Give the same in another metric of the data (D, D)."""
        return Quadratic(gram, self.half, self.inverse_half, self.groups)

    def grouped(self, matrix: Tensor) -> Tensor:
        """Sort the columns of a matrix (N, D) into (N, T, d)."""
        return matrix[:, self.groups.order].view(len(matrix), self.count, self.inner)

    def products(self, first: Tensor) -> Tensor:
        """V G_ut for all groups u and t: (T_u, r, T_t, d)."""
        rows = [first @ self.gram[u].reshape(self.inner, -1) for u in range(self.count)]
        return torch.stack(rows).view(self.count, len(first), self.count, self.inner)

    def start(self, weight: Tensor, rank: int) -> Tensor:
        """V of an SVD of the groups side by side, in the mean metric of one group: (r, d)."""
        grouped = self.half @ self.grouped(weight).reshape(len(weight), -1)
        stacked = grouped.view(-1, self.inner) @ self._root
        vectors, _ = truncate(stacked.T, rank)
        return _orthonormal(torch.linalg.solve_triangular(self._root.T, vectors, upper=True).T)

    def precondition(self, residual: Tensor, inner: Tensor) -> Tensor:
        """Apply the inverse of `inner` ⊗ mean G to a residual (r, d); `inner` is a Cholesky factor."""
        right = torch.cholesky_solve(residual.T, self._root).T
        return torch.cholesky_solve(right, inner)

    def second_step(self, cross: Tensor, first: Tensor, products: Tensor) -> Second:
        """Best K for V, of any rank."""
        rank = len(first)
        normal = (products @ first.T).reshape(self.count * rank, -1).double()
        root = torch.linalg.cholesky(_regular((normal + normal.T) / 2)).to(first.dtype)
        seen = (cross @ first.T).reshape(len(cross), -1)
        whitened = torch.linalg.solve_triangular(root, seen.T, upper=False).T
        return Second(self, first, root, whitened, products)

    def first_step(self, cross: Tensor, factors: Factors, products: Tensor, steps: int) -> Tensor:
        """Better V for K: conjugate gradients from the V at hand, which `HELD` ties it to."""
        first, second = factors.first, factors.second
        rank = len(first)
        weighed = torch.einsum("mn,ntr->mtr", self.metric, second)
        pairs = torch.einsum("ntr,nus->trus", weighed, second)
        inner = torch.stack([pairs[t, :, t] for t in range(self.count)]).sum(0).double()
        held = HELD * float(inner.diagonal().mean()) or 1.0
        inner.diagonal().add_(held)
        factor = torch.linalg.cholesky(inner).to(first.dtype)
        matrix = pairs.permute(1, 2, 3, 0).reshape(rank, -1)

        def apply(given: Tensor) -> Tensor:  # Σ_tu (K_tᵀ Ω K_u) · (V G_ut)
            return matrix @ given.reshape(-1, self.inner)

        wanted = torch.einsum("ntr,ntd->rd", weighed, cross)
        residual = wanted - apply(products)
        direction = ahead = self.precondition(residual, factor)
        before = float((residual * ahead).sum())
        for _ in range(steps):
            if before <= 0:
                break
            moved = apply(self.products(direction)) + held * (direction @ self._mean)
            curvature = float((direction * moved).sum())
            if curvature <= 0 or not math.isfinite(curvature):
                break
            length = before / curvature
            first = first + length * direction
            residual = residual - length * moved
            ahead = self.precondition(residual, factor)
            after = float((residual * ahead).sum())
            direction = ahead + (after / before) * direction
            before = after
        return _orthonormal(first)


def alternate(
    quadratic: Quadratic,
    cross: Tensor,
    first: Tensor,
    steps: int,
    limit: int | None = None,
    conjugate_steps: int = CONJUGATE_STEPS,
    products: Tensor | None = None,
) -> Second:
    """Alternate K and V from a first V, and end with K.

    Parameters
    ----------
    quadratic : Quadratic
    cross : Tensor of shape (N, T, d)
        P, grouped.
    first : Tensor of shape (r, d)
    steps : int
        Steps of V, from 0.
    limit : int or None, default None
        Most that the rank of K may be (r₂ of `tucker`) while V is sought.
    conjugate_steps : int, default CONJUGATE_STEPS
        Of each step of V.
    products : Tensor of shape (T, r, T, d) or None, default None
        Those of `first`, where they are known.
    """
    if products is None:
        products = quadratic.products(first)
    second = quadratic.second_step(cross, first, products)
    for _ in range(steps):
        first = quadratic.first_step(cross, second.factors(limit), products, conjugate_steps)
        products = quadratic.products(first)
        second = quadratic.second_step(cross, first, products)
    return second


def covariance(rows: Tensor, mean: Tensor) -> Tensor:
    """Covariance (D, D) of rows (n, D) about `mean`, one triangle of blocks computed and mirrored."""
    width = rows.shape[1]
    result = torch.empty(width, width).to(rows)
    for low in range(0, width, GRAM_BLOCK):
        high = min(low + GRAM_BLOCK, width)
        # centred before the product: the square of a large mean would swallow a small variance
        centred = rows[:, low:high] - mean[low:high]
        strip = centred.T @ rows[:, low:] / len(rows)
        strip -= centred.mean(0)[:, None] * mean[None, low:]
        result[low:high, low:] = strip
        result[low:, low:high] = strip.T
    return result


def damped(gram: Tensor, share: float = DAMPING) -> Tensor:
    """Add a share of the mean variance to that of each feature, in place.

    Raises
    ------
    SolverError
        Where a variance is not finite.
    """
    scale = float(gram.diagonal().mean())
    if not math.isfinite(scale):
        raise SolverError(
            "a layer's recorded activations are not finite; look for NaN or infinite values"
        )
    gram.diagonal().add_(share * scale if scale > 0 else 1.0)
    return gram


class _Support:
    """Columns of the channels that S keeps, the best S beside an L, and what L is then to fit.

    S in closed form leaves of L's error tr Ω Δ G Δᵀ the same with G − G_·c G_cc⁻¹ G_c· in the place of G,
    which is zero on the columns c of S: L is fitted in that metric, and meets its S exactly.
    """

    def __init__(self, gram: Tensor, taps: int, channels: Tensor) -> None:
        self.channels = channels
        steps = torch.arange(taps, device=channels.device)
        self.columns = (channels[:, None] * taps + steps).flatten()
        self.rows = gram[self.columns]
        self._root = torch.linalg.cholesky(_regular(self.rows[:, self.columns].double()))
        self._taken = torch.cholesky_solve(self.rows.double(), self._root).to(gram.dtype)

    def beside(self, gram: Tensor) -> Tensor:
        """G of what S cannot reach, (D, D), damped on the columns of S."""
        left = gram - self.rows.T @ self._taken
        left[self.columns] = 0.0
        left[:, self.columns] = 0.0
        left[self.columns, self.columns] = DAMPING * gram.diagonal().mean()
        return left

    def unreached(self, cross: Tensor) -> Tensor:
        """P of what S cannot reach, (N, D)."""
        left = cross - cross[:, self.columns] @ self._taken
        left[:, self.columns] = 0.0
        return left

    def step(self, cross: Tensor, low: Tensor | None = None) -> Tensor:
        """Best S (N, s · k) beside Ŵ = `low`, for P = `cross`."""
        left = cross[:, self.columns]
        if low is not None:
            left = left - low @ self.rows.T
        return torch.cholesky_solve(left.double().T, self._root).T.to(cross.dtype)


def _strongest(missed: Tensor, gram: Tensor, half: Tensor, taps: int, count: int) -> Tensor:
    """Channels through which most of a missing weight (N, D) acts on the output, ascending."""
    weighed = half @ missed
    blocks = weighed.view(len(weighed), -1, taps)
    own = gram.view(blocks.shape[1], taps, blocks.shape[1], taps)
    own = own.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (C, k, k)
    strength = torch.einsum("nck,ckl,ncl->c", blocks, own, blocks)
    return strength.topk(count).indices.sort().values


@dataclass(frozen=True)
class Moments:
    """What the forms of a layer are predicted from: patches that the original delivers.

    Attributes
    ----------
    gram : Tensor of shape (D, D), float32
        Their covariance, not damped.
    unseen : Tensor of shape (m, D), float32
        Patches of images that `gram` has not seen, less the mean patch; none where there are fewer than
        eight images.
    taps : int
        Kernel taps of one input channel.
    """

    gram: Tensor
    unseen: Tensor
    taps: int


def effects_of_shared(
    moments: Moments,
    weight: Tensor,
    metric: Tensor,
    groups: Groups,
    ranks: Sequence[tuple[int, ...]],
    support: int = 0,
) -> list[float]:
    """Predict what forms with a shared first factor do to the network's output.

    Parameters
    ----------
    moments : Moments
    weight : Tensor of shape (N, D), float32
    metric : Tensor of shape (N, N), float64
        Ω of the response.
    groups : Groups
    ranks : sequence of tuple of int
        (r,), or (r₁, r₂); those with the same first rank cost one fit.
    support : int, default 0
        Channels of S beside L.

    Returns
    -------
    list of float
        For each of `ranks`: relative squared error of the network's output, on the unseen patches,
        of a linear fit, at the level that the layer's response has on all patches; the activation is not
        seen.
    """
    half, inverse_half = metric_roots(metric, weight)
    gram = damped(moments.gram.clone())
    quadratic = Quadratic(gram, half, inverse_half, groups)
    dense = weight @ gram
    cross = quadratic.grouped(dense)
    basis = quadratic.start(weight, max(each[0] for each in ranks))
    level, wanted = _level(moments, weight, metric), moments.unseen @ weight.T
    found: dict[tuple[int, ...], float] = {}
    least = math.inf
    for rank in sorted({each[0] for each in ranks}):
        limits: list[int | None] = [
            *sorted(each[1] for each in set(ranks) if each[0] == rank and len(each) > 1)
        ]
        middle = limits[len(limits) // 2] if limits else None
        second = _predicted(quadratic, cross, basis[:rank], middle)
        for limit in limits or [None]:
            factors = second.factors(limit)
            parts = _Parts(factors)
            if support:
                parts = _beside(quadratic, dense, weight, factors, limit, gram, moments, support)
            key = (rank,) if limit is None else (rank, limit)
            found[key] = level * _left(moments, wanted, weight, parts, groups, metric)
        least = min(found.values())
        if least < NEGLIGIBLE:
            break
    # where a rank leaves next to nothing, larger ones are not fitted: they would only cost more
    return [found.get(each, least) for each in ranks]


def _predicted(quadratic: Quadratic, cross: Tensor, first: Tensor, limit: int | None) -> Second:
    """Alternate as little as is enough to tell forms apart."""
    return alternate(quadratic, cross, first, PREDICT_STEPS, limit, PREDICT_CONJUGATE_STEPS)


def effects_of_sparse(
    moments: Moments, weight: Tensor, metric: Tensor, supports: Sequence[int]
) -> list[float]:
    """Predict what S alone, on so many channels, does to the network's output.

    Parameters
    ----------
    moments, weight, metric
        As for `effects_of_shared`.
    supports : sequence of int
        Channels that S keeps, each from 1.

    Returns
    -------
    list of float
        Relative squared error of the network's output for each.
    """
    half, _ = metric_roots(metric, weight)
    gram = damped(moments.gram.clone())
    dense = weight @ gram
    level, effects = _level(moments, weight, metric), []
    for support in supports:
        kept = _Support(gram, moments.taps, _strongest(weight, gram, half, moments.taps, support))
        missed = weight.clone()
        missed[:, kept.columns] -= kept.step(dense)
        effects.append(level * _effect(moments, missed, metric))
    return effects


def _beside(
    quadratic: Quadratic,
    dense: Tensor,
    weight: Tensor,
    alone: Factors,
    limit: int | None,
    gram: Tensor,
    moments: Moments,
    support: int,
) -> _Parts:
    """Give S on the channels that an L that stands alone misses most of, and the L beside it."""
    missed = weight - alone.weight(quadratic.groups)
    chosen = _strongest(missed, gram, quadratic.half, moments.taps, support)
    kept = _Support(gram, moments.taps, chosen)
    beside = quadratic.within(kept.beside(gram))
    start = beside.start(weight, len(alone.first))
    cross = beside.grouped(kept.unreached(dense))
    low = _predicted(beside, cross, start, limit).factors(limit)
    return _Parts(low, kept, kept.step(dense, low.weight(beside.groups)))


def _level(moments: Moments, weight: Tensor, metric: Tensor) -> float:
    """Say how many times stronger the response is on the patches of the fit than on the unseen ones.

    Some images answer much louder than others, and the unseen ones are few: errors are taken relative to
    what the layer answers there (a ratio estimate), so that forms that are predicted otherwise compare.
    """
    unseen = _effect(moments, weight, metric)
    everywhere = _effect(Moments(moments.gram, moments.unseen[:0], moments.taps), weight, metric)
    return everywhere / unseen if unseen > 0 and everywhere > 0 else 1.0


def _left(
    moments: Moments,
    wanted: Tensor,
    weight: Tensor,
    parts: _Parts,
    groups: Groups,
    metric: Tensor,
) -> float:
    """`_effect` of what parts leave of a weight that answers `wanted` (m, N) to the unseen patches."""
    if not len(moments.unseen):
        return _effect(moments, weight - parts.weight(groups), metric)
    return _mean_square(wanted - parts.of(moments.unseen, groups), metric)


def _effect(moments: Moments, missed: Tensor, metric: Tensor) -> float:
    """Mean of ‖Ω^½ (W − Ŵ) x‖² over the unseen patches; over those of the fit where there are none."""
    if not len(moments.unseen):
        return float(((metric.to(missed.dtype) @ missed) * (missed @ moments.gram)).sum())
    return _mean_square(moments.unseen @ missed.T, metric)


def _mean_square(errors: Tensor, metric: Tensor) -> float:
    """Mean of ‖Ω^½ e‖² over errors (n, N)."""
    weighed = errors @ metric.to(errors.dtype)
    return float((weighed * errors).sum()) / len(errors)


@dataclass(frozen=True)
class _Parts:
    """L by its factors, and S (N, s · k) on the columns of a support beside it."""

    factors: Factors
    kept: _Support | None = None
    sparse: Tensor | None = None

    def weight(self, groups: Groups) -> Tensor:
        """Ŵ (N, D)."""
        weight = self.factors.weight(groups)
        if self.kept is not None and self.sparse is not None:
            weight[:, self.kept.columns] += self.sparse
        return weight

    def of(self, patches: Tensor, groups: Groups) -> Tensor:
        """Response (n, N) to patches (n, D): factor by factor, which is less work than by Ŵ."""
        factors = self.factors
        inner = factors.second if factors.core is None else factors.core
        response = torch.zeros(len(patches), len(inner)).to(patches)
        for group, columns in enumerate(groups.columns):
            response.addmm_(patches[:, columns] @ factors.first.T, inner[:, group].T)
        if factors.outer is not None:
            response = response @ factors.outer.T
        if self.kept is not None and self.sparse is not None:
            response.addmm_(patches[:, self.kept.columns], self.sparse.T)
        return response


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
        self.quadratic = Quadratic(self.gram, self.half, self.inverse_half, groups)

    def _side(self, features: Tensor, rows: Tensor) -> Patches:
        problem = self.problem
        offset = None if problem.offset is None else problem.offset[rows]
        target = problem.target[rows]
        return Patches(features, activate(problem.activation, target), target, offset)

    def respond(self, side: Patches, parts: _Parts, bias: Tensor) -> Tensor:
        """Response plus shortcut of the parts, with `bias` about the mean patch: (n, N)."""
        response = parts.of(side.q, self.groups) + (bias - self._of_mean(parts))
        return response if side.offset is None else response.add_(side.offset)

    def _of_mean(self, parts: _Parts) -> Tensor:
        return parts.of(self.mean[None], self.groups)[0]

    def plain_bias(self, parts: _Parts, bias: Tensor) -> Tensor:
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
        self, parts: _Parts, bias: Tensor, products: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """P and bias of where the activation error is less: the prox of it, regressed on the patches."""
        response = self.respond(self.seen, parts, bias)
        moved = response_prox(self.problem.activation, self.seen.wanted, response, POLISH_PENALTY)
        moved -= response
        shift = moved.mean(0)
        moved -= shift
        return self._covered(parts, products) + self._learn(moved), bias + shift

    def _covered(self, parts: _Parts, products: Tensor | None) -> Tensor:
        """Ŵ G (N, D), by way of V G, which is small."""
        if products is None:
            products = self.quadratic.products(parts.factors.first)
        grouped = torch.einsum("nur,urtd->ntd", parts.factors.second, products)
        covered = torch.empty(len(grouped), len(self.mean)).to(grouped)
        covered[:, self.groups.order] = grouped.reshape(len(grouped), -1)
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
        The best iterate by the error on unseen patches; its factors are V (r, d) and K (N, T, r), or
        V (r₁, d), core (r₂, T, r₁) and outer (N, r₂).
    """
    fit = _Fit(problem, groups)
    quadratic = fit.quadratic
    limit = ranks[1] if len(ranks) > 1 else None
    cross, bias = fit.linear_target()
    first = quadratic.start(problem.weight, ranks[0])
    kept: _Support | None = None
    if support:
        alone = alternate(quadratic, quadratic.grouped(cross), first, 1, limit).factors(limit)
        missed = problem.weight - alone.weight(groups)
        chosen = _strongest(missed, fit.gram, fit.half, problem.taps, support)
        kept = _Support(fit.gram, problem.taps, chosen)
        quadratic = quadratic.within(kept.beside(fit.gram))
        first = quadratic.start(problem.weight, ranks[0])
    best: tuple[float, _Parts, Tensor] | None = None
    products: Tensor | None = None
    for step in range(rounds + 1):
        target = quadratic.grouped(cross if kept is None else kept.unreached(cross))
        steps = 1 if step else START_STEPS
        second = alternate(quadratic, target, first, steps, limit, products=products)
        factors, first, products = second.factors(limit), second.first, second.products
        sparse = None if kept is None else kept.step(cross, factors.weight(groups))
        parts = _Parts(factors, kept, sparse)
        judged = fit.unseen if len(fit.unseen.q) else fit.seen
        error = fit.error(judged, fit.respond(judged, parts, bias))
        before = math.inf if best is None else best[0]
        if error < before or best is None:
            best = error, parts, bias
        last = step == rounds or error > before * (1 - POLISH_GAIN)
        if last or problem.activation.kind == "identity":
            break
        # beside S, L is fitted in a metric of its own, whose products are not those of G
        cross, bias = fit.moved_target(parts, bias, products if kept is None else None)
    assert best is not None, "the loop runs at least once"
    error, parts, bias = best
    if not math.isfinite(error):
        raise SolverError("the fit became infinite or NaN; lower the learning from outliers")
    factors, sparse = parts.factors, parts.sparse
    nothing = torch.zeros(len(problem.weight), 0).to(problem.weight)
    chain = (
        (factors.first, factors.second)
        if factors.core is None or factors.outer is None
        else (factors.first, factors.core, factors.outer)
    )
    return Solution(
        support=problem.eligible[:0] if kept is None else kept.channels,
        sparse=nothing if sparse is None else sparse,
        factors=_balanced(chain),
        bias=fit.plain_bias(parts, bias),
        fitted=fit.error(fit.seen, fit.respond(fit.seen, parts, bias)),
        unseen=error if len(fit.unseen.q) else 0.0,
        status="closed form",
    )


def _balanced(factors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Give all factors the same size, so that none is tiny."""
    norms = [float(torch.linalg.vector_norm(each)) / math.sqrt(each.numel()) for each in factors]
    if min(norms) <= 0:
        return factors
    mean = math.prod(norms) ** (1 / len(norms))
    return tuple(each * (mean / norm) for each, norm in zip(factors, norms, strict=True))


def _orthonormal(first: Tensor) -> Tensor:
    """Rows that span the same space: K is solved anew for every V."""
    basis: Tensor = torch.linalg.qr(first.T).Q
    return basis.T.contiguous()


def _regular(matrix: Tensor) -> Tensor:
    mean = float(matrix.diagonal().mean())
    ridge = RIDGE * mean if mean > 0 else 1.0
    return matrix + ridge * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)

"""What a layer may become: its forms with their costs and predicted effects, before one is chosen.

Some forms of each family are fitted roughly, to what the original delivers and answers; the effects of those
between are interpolated. A few of these rough fits go on as probes, to be tried in the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from converter.branches import branches_of
from converter.calibration.gather import Inputs, Sample
from converter.config import SolverSettings
from converter.errors import SolverError
from converter.fitting import FULL_PATCH_LIMIT, unseen_of, writable
from converter.geometry import bias_of, weight_of
from converter.schemes import (
    KEEP,
    Candidate,
    Evidence,
    Form,
    Geometry,
    Scheme,
    cost_of,
    families_of,
)
from passes.layers import Layer
from passes.split import Branches

if TYPE_CHECKING:
    from torch import Tensor

    from converter.solver.effects import Sketch

__all__ = [
    "PROBED",
    "ROUND_OFF",
    "STRONG",
    "UNSEEN_PATCHES",
    "Prediction",
    "Probe",
    "Task",
    "predict",
    "task_of",
    "wants_patches",
]

UNSEEN_PATCHES = 1024
"""At most so many patches of the images kept back judge a predicted form."""

WHOLE_PATCH_LIMIT = 8192
"""Up to so many values a patch is looked at whole by the schemes that need it: its covariance has the
square of that, 256 MiB."""

ONE_THREAD = 640
"""Forms of layers with patches up to so long are predicted by one thread: their many small steps took
2.5 times as long on two."""

ROUND_OFF = 1e-9
"""Effects below it are round-off, which differs from machine to machine, and count as so much: a layer
that a part of the way has replaced already fits some forms exactly, and no plan should turn on which of
them does so best."""

STRONG = 0.005
"""Predicted effect of a plan for a strong budget, whose forms are like those that layers are tried in."""
PROBED = (4.0, 1.0, 0.25)
"""Effects that the probes of a layer have about, as multiples of its even share in such a plan."""
PROBED_WEIGHTS = 0.5
"""Share of a layer's weights that a probe has at most: strong budgets take smaller forms, and all probes are
held until the last layer is predicted."""
NEAR = math.log(10)
"""A probe may lose less than such an effect by this logarithm: of forms that do, the cheapest is tried."""

BESIDE_ANCHORS = 3
"""About so many ranks of a family with S beside L are measured."""


def _families(geometry: Geometry, schemes: tuple[str, ...]) -> list[tuple[Scheme, int]]:
    """Schemes that apply, with the supports of S that they are offered with."""
    short = geometry.columns <= FULL_PATCH_LIMIT
    return [
        (scheme, support)
        for scheme, support in families_of(geometry, schemes, beside=short)
        if scheme.ranks(geometry)
        and (not (scheme.whole_patches or support) or geometry.columns <= WHOLE_PATCH_LIMIT)
        and (scheme.name != "sparse" or short)
    ]


def wants_patches(geometry: Geometry, schemes: tuple[str, ...]) -> bool:
    """Whether any form that a layer may take is predicted from its patches."""
    families = _families(geometry, schemes)
    return any(scheme.whole_patches or support for scheme, support in families)


@dataclass(frozen=True, eq=False)
class Task:
    """Everything that predicting one layer's forms needs; plain data, to be sent where there is room.

    Attributes
    ----------
    name : str
    geometry : Geometry
    schemes : tuple of str
    share : float
        Its even share in the effect of a plan of `STRONG`.
    weight, bias : ndarray of shape (N, D) and (N,), float32
    metric : ndarray of shape (N, N), float64
        Ω.
    mean, covariance : ndarray of shape (N,) and (N, N), float64
        Of the original's response.
    patch : ndarray of shape (D,), float32, or None
        Mean of the original's patches.
    gram : ndarray of shape (D, D), float32, or None
        Their covariance.
    unseen : ndarray of shape (m, D), float32, or None
        Patches that `gram` has not seen, less the mean one.
    device : str
        torch device.
    """

    name: str
    geometry: Geometry
    schemes: tuple[str, ...]
    share: float
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    metric: NDArray[np.float64]
    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    patch: NDArray[np.float32] | None
    gram: NDArray[np.float32] | None
    unseen: NDArray[np.float32] | None
    device: str


@dataclass(frozen=True, eq=False)
class Probe:
    """A form of a layer as it was fitted to predict its effect, to be tried in the network.

    Attributes
    ----------
    form : Form
    effect : float
        As predicted.
    branches : Branches
        What stands in the place of the layer.
    """

    form: Form
    effect: float
    branches: Branches


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a layer may become.

    Attributes
    ----------
    candidates : tuple of Candidate
        With cost and predicted effect; the layer as it is comes first.
    probes : tuple of Probe
        For each of `PROBED` the cheapest form that loses so much or somewhat less, or that whose effect is
        nearest to it, of those of half the weights at most; each once, and none where no effect is above
        round-off.
    """

    candidates: tuple[Candidate, ...]
    probes: tuple[Probe, ...]


def task_of(
    layer: Layer,
    geometry: Geometry,
    sample: Sample,
    metric: NDArray[np.float64],
    inputs: Inputs | None,
    solver: SolverSettings,
    share: float,
) -> Task:
    """Make the task of predicting a layer's forms.

    Parameters
    ----------
    layer : Layer
    geometry : Geometry
    sample : Sample
        What the original answers.
    metric : ndarray of shape (N, N)
        The output metric Ω of its response.
    inputs : Inputs or None
        What the original delivers to the layer; None where `wants_patches` says no.
    solver : SolverSettings
    share : float
        As in `Task`.
    """
    patch = gram = unseen = None
    if inputs is not None:
        import torch

        from converter.solver.quadratic import covariance

        patches = torch.from_numpy(inputs.features).to(solver.device)
        kept_back = unseen_of(len(patches), sample, solver.device)
        seen = patches[~kept_back]
        mean = seen.mean(0)
        patch, gram = mean.cpu().numpy(), covariance(seen, mean).cpu().numpy()
        rows = patches[kept_back]
        unseen = (rows[:: max(1, -(-len(rows) // UNSEEN_PATCHES))] - mean).cpu().numpy()
    return Task(
        name=layer.name,
        geometry=geometry,
        schemes=solver.schemes,
        share=share,
        weight=weight_of(layer).reshape(geometry.outputs, -1),
        bias=bias_of(layer),
        metric=metric,
        mean=sample.mean,
        covariance=sample.covariance,
        patch=patch,
        gram=gram,
        unseen=unseen,
        device=solver.device,
    )


def predict(task: Task) -> Prediction:
    """List what a layer may become, with cost and predicted effect.

    Anchors of each family are fitted; between them the logarithm of the effect is interpolated over the
    first rank, along rays of ranks, where the scheme says so.
    """
    import torch

    from converter.solver.effects import Moments

    def tensor(array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(writable(array)).to(task.device)

    moments = None
    if task.patch is not None and task.gram is not None and task.unseen is not None:
        patches = tensor(task.patch), tensor(task.gram), tensor(task.unseen)
        moments = Moments(*patches, task.geometry.taps)
    evidence = Evidence(
        weight=tensor(task.weight),
        bias=tensor(task.bias),
        metric=tensor(task.metric),
        mean=tensor(task.mean),
        covariance=tensor(task.covariance),
        moments=moments,
    )
    found = [_candidate(task.geometry, KEEP, 0.0)]
    probing = _Probing(task)
    with _one_thread(task.geometry.columns <= ONE_THREAD):
        for scheme, support in _families(task.geometry, task.schemes):
            if moments is None and (scheme.whole_patches or support):
                continue
            try:
                forms = _family(scheme, support, evidence, task.geometry, probing.offer)
            except SolverError as error:
                raise SolverError(f"layer {task.name}: {error}") from error
            found += [_candidate(task.geometry, form, effect) for form, effect in forms]
        return Prediction(tuple(found), probing.probes())


class _Probing:
    """Which sketches of a layer are tried in the network; of the others nothing is held."""

    def __init__(self, task: Task) -> None:
        self._geometry = task.geometry
        self._most = PROBED_WEIGHTS * task.weight.size
        self._levels = [task.share * multiple for multiple in PROBED]
        self._best: dict[float, tuple[tuple[bool, float], Form, Sketch]] = {}

    def offer(self, form: Form, sketch: Sketch) -> None:
        """Take a sketch where it is better than the one at hand."""
        if sketch.solution is None or not ROUND_OFF < sketch.effect < math.inf:
            return
        macs, weights = cost_of(self._geometry, form)
        if weights > self._most:
            return
        for level in self._levels:
            apart = math.log(level / sketch.effect)
            near = 0 <= apart <= NEAR
            rating = (not near, macs if near else abs(apart))
            if level not in self._best or rating < self._best[level][0]:
                self._best[level] = rating, form, sketch

    def probes(self) -> tuple[Probe, ...]:
        """Make those that were taken, each once."""
        made: dict[Form, Probe] = {}
        for _, form, sketch in self._best.values():
            if form not in made and sketch.solution is not None:
                branches = branches_of(self._geometry, form, sketch.solution())
                made[form] = Probe(form, sketch.effect, branches)
        return tuple(made.values())


@contextmanager
def _one_thread(wanted: bool) -> Iterator[None]:
    """Have torch work with one thread for a while."""
    import torch

    before = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _candidate(geometry: Geometry, form: Form, effect: float) -> Candidate:
    macs, params = cost_of(geometry, form)
    least = 0.0 if form == KEEP else ROUND_OFF
    return Candidate(form, max(effect, least), macs, params)


def _family(
    scheme: Scheme,
    support: int,
    evidence: Evidence,
    geometry: Geometry,
    offer: Callable[[Form, Sketch], None],
) -> list[tuple[Form, float]]:
    """Forms of one scheme beside one support that cost less than the layer, with their effects."""
    whole = cost_of(geometry, KEEP)[1]

    def form_of(ranks: tuple[int, ...]) -> Form:
        return Form(scheme.name, ranks, support)

    anchors = scheme.anchors(geometry)
    if support:  # S beside L takes several fits for each, and seldom pays
        anchors = anchors[:: max(1, len(anchors) // BESIDE_ANCHORS)]
    anchors = [ranks for ranks in anchors if cost_of(geometry, form_of(ranks))[1] < whole]
    if not anchors:
        return []
    sketches = scheme.sketches(evidence, geometry, anchors, support)
    known = {ranks: each.effect for ranks, each in zip(anchors, sketches, strict=True)}
    for ranks, sketch in zip(anchors, sketches, strict=True):
        offer(form_of(ranks), sketch)
    if not scheme.interpolates:
        return [(form_of(ranks), effect) for ranks, effect in known.items()]
    found: list[tuple[Form, float]] = []
    for ray in dict.fromkeys(map(_ray, anchors)):
        measured = [ranks for ranks in anchors if _ray(ranks) == ray]
        # a larger rank can only do better: what says otherwise is noise of the fit
        falling = np.minimum.accumulate(np.maximum([known[each] for each in measured], 1e-30))
        offered = [
            ranks
            for ranks in scheme.ranks(geometry)
            if _ray(ranks) == ray
            and measured[0] <= ranks <= measured[-1]
            and cost_of(geometry, form_of(ranks))[1] < whole
        ]
        firsts = [ranks[0] for ranks in measured]
        interpolated = np.exp(np.interp([ranks[0] for ranks in offered], firsts, np.log(falling)))
        found += [
            (form_of(ranks), float(effect))
            for ranks, effect in zip(offered, interpolated, strict=True)
        ]
    return found


def _ray(ranks: tuple[int, ...]) -> tuple[Fraction, ...]:
    """Say how many times the first rank the others are: along a ray effects are interpolated."""
    return tuple(Fraction(rank, ranks[0]) for rank in ranks[1:])

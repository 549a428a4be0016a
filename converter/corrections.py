"""Predicted effects, corrected by measured ones: each layer alone takes one form, and outputs are compared.

Ω counts an error to first order, and as if errors at different positions had nothing to do with each other.
What a layer's error really does to the outputs was 1.9 to 4.7 times that on a VGG-16, another factor for each
layer. So of each layer one form, as it was fitted for the prediction, stands in the network alone. What that
does to the outputs, over what was predicted, is a factor on the (odds of the) effects of all its forms
([ADR 19](../docs/adr/0019-effects-corrected-by-measured-ones.md)).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from converter.calibration.sets import CalibrationSet, fixed_batch, padded
from converter.calibration.subset import Subset
from converter.config import Runtime
from converter.planner.choice import Choice, frontier
from converter.prediction import STRONG, Probe
from converter.preparation import Prepared
from converter.progress import Progress
from converter.realisation import rewritten
from converter.runtime import model_inputs, open_session, run
from converter.schemes import Candidate
from converter.sensitivity import NO_VARIANCE, output_sources
from converter.work import key_of
from passes.expose import expose

__all__ = ["correct_effects", "strong_plan"]

POINTS = 7
"""Plans among which one of about `STRONG` is looked for."""
MOST_IMAGES, LEAST_IMAGES, WORK = 128, 32, 5e11
"""Images that a layer is measured on, and multiply-accumulates that they take where a network is large."""
MOST = 10.0
"""Factor by which an effect is corrected at most, up or down."""
_ALL = 1 - 1e-6
_BATCH, _BATCH_BYTES = 32, 2**22
"""Images that run at once, and bytes of them: at 224×224 one tensor of 32 images has 400 MiB."""


def correct_effects(prepared: Prepared, runtime: Runtime, progress: Progress) -> None:
    """Scale the predicted effects of each layer's forms by what one of them was measured to do.

    Layers without probes stay as they are, and all do where no output is of floating-point type with a row
    for each image.

    Parameters
    ----------
    prepared : Prepared
        Its `candidates` are changed, and its `probes` used up.
    runtime : Runtime
        Where the network runs.
    progress : Progress

    Raises
    ------
    ModelError, CalibrationError
        As `open_session` and `run`.
    """
    outputs = _Outputs(prepared.original, prepared.data, runtime, prepared.cost.macs)
    with progress.stage("measure effects", len(prepared.convertible)) as advance:
        chosen = _chosen(prepared.candidates, prepared.probes) if outputs.names else {}
        prepared.probes.clear()
        for layer in prepared.convertible:
            advance(0, layer.name)
            if layer.name in chosen:
                found = _corrected(prepared, layer.name, chosen.pop(layer.name), outputs)
                prepared.candidates[layer.name] = found
            advance(1)


def strong_plan(candidates: Mapping[str, Sequence[Candidate]]) -> Choice | None:
    """Give the plan whose effect is nearest to `STRONG`, of a few; None where no form has an effect."""
    plans = [each for each in frontier(candidates, "macs", POINTS) if each.effect > 0]
    return min(plans, key=lambda each: abs(math.log(each.effect / STRONG)), default=None)


def _chosen(
    candidates: Mapping[str, Sequence[Candidate]], probes: Mapping[str, Sequence[Probe]]
) -> dict[str, Probe]:
    """Take each layer's probe whose effect is most like what the layer has in a plan of about `STRONG`."""
    plan = strong_plan(candidates)
    if plan is None:
        return {}
    # of a layer that the plan keeps, what others usually have there
    usual = float(np.median([each.effect for each in plan.chosen.values() if each.effect > 0]))
    wanted = {name: each.effect or usual for name, each in plan.chosen.items()}
    return {
        name: min(offered, key=lambda each: abs(math.log(each.effect / wanted[name])))
        for name, offered in probes.items()
        if offered
    }


def _corrected(
    prepared: Prepared, name: str, probe: Probe, outputs: _Outputs
) -> tuple[Candidate, ...]:
    """Give the candidates of a layer with corrected effects, or what is kept of an earlier run."""
    candidates = prepared.candidates[name]
    key, work = "", prepared.work
    if work is not None:
        known = (prepared.digest, outputs.digest, name, probe, candidates)
        key = key_of("predict", "corrected", *known)
        kept = work.candidates(key)
        if kept is not None:
            return kept
    model = rewritten(prepared, {name: probe.branches}, reorder=False)
    factor = _odds(outputs.error(model)) / _odds(probe.effect)
    factor = min(max(factor, 1 / MOST), MOST)
    found = tuple(
        dataclasses.replace(each, effect=_scaled(each.effect, factor)) for each in candidates
    )
    if work is not None:
        work.keep_candidates(key, found)
    return found


def _odds(share: float) -> float:
    """Turn a share of the outputs' variance into odds: small ones stay, and no error gets much above all."""
    return share / (1 - share) if share < _ALL else _ALL / (1 - _ALL)


def _scaled(effect: float, factor: float) -> float:
    """Scale the odds of an effect."""
    odds = factor * _odds(effect)
    return odds / (1 + odds) if effect < _ALL else effect


def _differs(rows: NDArray[np.float64]) -> bool:
    """Whether an output differs between images by more than rounding, as for Ω."""
    return float(rows.var(0).sum()) > NO_VARIANCE * float(np.square(rows.mean(0)).sum())


class _Outputs:
    """What a network answers to some images, beside what its original does."""

    def __init__(
        self, original: onnx.ModelProto, data: CalibrationSet, runtime: Runtime, macs: int
    ) -> None:
        self._original, self._runtime = original, runtime
        self._sources = tuple(output_sources(original)[0])
        self._fixed = fixed_batch(model_inputs(original))
        wanted = min(MOST_IMAGES, max(LEAST_IMAGES, int(WORK / max(macs, 1))))
        self._data = Subset(data, wanted) if wanted < len(data) else data

    @cached_property
    def digest(self) -> str:
        """Digest of the images."""
        return self._data.digest()

    @cached_property
    def _feeds(self) -> list[tuple[Mapping[str, NDArray[Any]], int]]:
        batches = self._data.batches(self._fixed or self._together())
        filled = (padded(each, self._fixed) if self._fixed else each for each in batches)
        return [(each.feeds, each.count) for each in filled]

    def _together(self) -> int:
        one = next(iter(self._data.batches(1)))
        size = sum(feed.nbytes for feed in one.feeds.values())
        return max(1, min(_BATCH, _BATCH_BYTES // max(size, 1)))

    @cached_property
    def _right(self) -> dict[str, NDArray[np.float64]]:
        """What the original answers, of outputs that differ between images."""
        found = self._answers(self._original, self._sources)
        return {name: rows for name, rows in found.items() if rows.size and _differs(rows)}

    @property
    def names(self) -> tuple[str, ...]:
        """Outputs that are compared."""
        return tuple(self._right)

    def error(self, model: onnx.ModelProto) -> float:
        """Squared error of a model's outputs relative to their variance over the images, a mean of them."""
        errors = []
        for name, rows in self._answers(model, self.names).items():
            right = self._right[name]
            spread = float(np.square(right - right.mean(0)).sum())
            errors.append(float(np.square(rows - right).sum()) / spread)
        return float(np.mean(errors)) if len(errors) == len(self.names) else math.inf

    def _answers(
        self, model: onnx.ModelProto, names: Sequence[str]
    ) -> dict[str, NDArray[np.float64]]:
        """Run a model; outputs with a row for each image, (n, elements) each."""
        if not names:  # onnxruntime would give all of them
            return {}
        label = "the network with one layer in another form"
        if not {value.name for value in model.graph.output}.issuperset(names):
            model = expose(model, names)  # a copy, which a large model has no room for
        session = open_session(model, self._runtime, spinning=False, label=label)
        parts: dict[str, list[NDArray[np.float64]]] = {name: [] for name in names}
        for feeds, count in self._feeds:
            filled = next(len(each) for each in feeds.values())
            for name, rows in zip(
                names, run(session, list(names), feeds, label=label), strict=True
            ):
                if rows.shape[:1] == (filled,):
                    parts[name].append(rows[:count].reshape(count, -1).astype(np.float64))
        whole = {name: each for name, each in parts.items() if len(each) == len(self._feeds)}
        return {
            name: np.concatenate(each)
            for name, each in whole.items()
            if len({rows.shape[1] for rows in each}) == 1
        }

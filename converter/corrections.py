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

import numpy as np
import onnx
from numpy.typing import NDArray

from converter.answers import OfImages, affordable
from converter.calibration.segment import Segment
from converter.calibration.sets import fixed_batch
from converter.calibration.subset import Subset
from converter.calibration.walk import Walk
from converter.config import Runtime
from converter.planner.choice import Choice, frontier
from converter.prediction import STRONG, Probe
from converter.preparation import Prepared
from converter.progress import Progress
from converter.realisation import rewritten
from converter.runtime import model_inputs
from converter.schemes import Candidate
from converter.sensitivity import output_sources
from converter.work import key_of
from passes.base import PassError
from passes.layers import Layer
from passes.split import Branches, Split

__all__ = ["correct_effects", "strong_plan"]

POINTS = 7
"""Plans among which one of about `STRONG` is looked for."""
MOST_IMAGES = 128
"""Images that a layer is measured on."""
MOST = 10.0
"""Factor by which an effect is corrected at most, up or down."""
_ALL = 1 - 1e-6


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
    outputs = _Outputs(prepared, runtime)
    with progress.stage("measure effects", len(prepared.convertible)) as advance:
        chosen = _chosen(prepared.candidates, prepared.probes) if outputs.names else {}
        prepared.recorder.forget()
        prepared.probes.clear()
        for layer in prepared.convertible:
            advance(0, layer.name)
            if layer.name in chosen:
                found = _corrected(prepared, layer, chosen.pop(layer.name), outputs)
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
    prepared: Prepared, layer: Layer, probe: Probe, outputs: _Outputs
) -> tuple[Candidate, ...]:
    """Give the candidates of a layer with corrected effects, or what is kept of an earlier run."""
    candidates = prepared.candidates[layer.name]
    key, work = "", prepared.work
    if work is not None:
        known = (prepared.digest, outputs.digest, layer.name, probe, candidates)
        key = key_of("predict", "corrected", *known)
        kept = work.candidates(key)
        if kept is not None:
            return kept
    error = outputs.error(layer, probe.branches)
    # what shows in no output that is compared tells nothing of the others
    factor = _odds(error) / _odds(probe.effect) if error > 0 else 1.0
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


class _Outputs:
    """What a network answers to some images with one layer replaced, beside what its original does."""

    def __init__(self, prepared: Prepared, runtime: Runtime) -> None:
        self._prepared, self._runtime = prepared, runtime
        wanted = affordable(prepared.cost.macs, MOST_IMAGES)
        data = prepared.data
        self._data = Subset(data, wanted) if wanted < len(data) else data
        self._inputs = model_inputs(prepared.original)

    @cached_property
    def _images(self) -> OfImages:
        original = self._prepared.original
        written = {name for node in original.graph.node for name in node.output}
        sources = [name for name in output_sources(original)[0] if name in written]
        whole = self._whole(original, sources)
        return OfImages(self._data, fixed_batch(self._inputs), whole.run)

    @cached_property
    def digest(self) -> str:
        """Digest of the images."""
        return self._data.digest()

    @property
    def names(self) -> tuple[str, ...]:
        """Outputs that are compared."""
        return self._images.names

    def error(self, layer: Layer, branches: Branches) -> float:
        """Give the error of the outputs with one layer replaced; layers come in the order of the graph."""
        return self._images.error(self._with(layer, branches))

    def _with(self, layer: Layer, branches: Branches) -> Mapping[str, NDArray[np.float32]]:
        """Let the network answer with one layer replaced."""
        try:
            answers = self._walk.answers(layer, [Split(layer, branches)], self.names)
            return self._images.gathered(answers)
        except PassError:  # nobody knows the type of a tensor there
            whole = rewritten(self._prepared, {layer.name: branches}, reorder=False)
            return self._images.answers(self._whole(whole, self.names).run)

    def _whole(self, model: onnx.ModelProto, names: Sequence[str]) -> Segment:
        return Segment(model, [each.name for each in self._inputs], names, self._runtime)

    @cached_property
    def _walk(self) -> Walk:
        prepared, feeds = self._prepared, [each.feeds for each in self._images.batches]
        # the other half holds what was sampled of the layers' answers
        return Walk(prepared.original, feeds, self._runtime, prepared.recorder.memory_bytes // 2)

"""Families of forms that gain too little of int8, found before anything is planned.

Milliseconds in float do not tell what int8 gains: products of matrices run up to four times as fast, one
filter to a channel hardly faster, and how much so differs between processors and batches. So where int8
follows, a strong plan is made with all families and again, at no more multiply-accumulates, without some. All
are quantized, with random weights, and timed in turns. What the plan of most speed for the root of its effect
does without, all plans do without ([ADR 22](../docs/adr/0022-plans-that-int8-follows.md)).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import onnx
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData

from converter.branches import branches_of_form
from converter.corrections import strong_plan
from converter.errors import ConfigError, ModelError
from converter.latency import OPENINGS, measure_latency, speedup
from converter.pace import LEAST_EFFECT, TRIAL_ROUNDS, TRIAL_SECONDS, Paced
from converter.planner.choice import Choice, Limit, choose
from converter.preparation import Prepared
from converter.progress import Progress
from converter.quantization.integers import (
    ARITHMETICS,
    in_int8,
    quantizable_tensors,
    ready_for_int8,
)
from converter.realisation import rewritten
from converter.schemes import KEEP, Candidate

__all__ = ["suited_to_int8"]

Families: TypeAlias = tuple[str, ...]

DOUBTFUL: tuple[Families, ...] = (("depthwise ×2",), ("depthwise", "depthwise ×2"))
"""What plans may have to do without: several filters to a channel, or any filters of single channels."""
TYPES = ("u8 × s8", "s8 × s8")
"""Activations × weights that plans are timed in: the product of x86, and that of other processors."""
CLEARLY = 1.02
"""By how many times a plan without them must be worth more: two readings of one plan differ by so much."""
_LARGEST = np.float32(4.0)
"""Of every tensor; what its range is takes no time."""


def suited_to_int8(prepared: Prepared, paced: Paced, progress: Progress) -> Paced:
    """Leave out the families that cost more time in int8 than their smaller effect is worth.

    A hundredth of the time is worth a hundredth of how far the outputs are off, the root of the effect.

    Parameters
    ----------
    prepared : Prepared
    paced : Paced
    progress : Progress

    Returns
    -------
    Paced
        The same object where nothing is left out; otherwise a note says what, and why.

    Raises
    ------
    ModelError
        Where onnxruntime's quantizer refuses the model.
    ConfigError, CalibrationError
        As `measure_latency`.
    """
    plans = _plans(paced.candidates)
    if len(plans) < 2:
        return paced
    with progress.stage("time plans in int8", 1) as advance:
        times = _times(prepared, paced, plans)
        advance(1)

    def worth(left_out: Families) -> float:
        return 1 / (times[left_out] * math.sqrt(max(plans[left_out].effect, LEAST_EFFECT)))

    best = max(plans, key=worth)
    if worth(best) < CLEARLY * worth(()):
        return paced
    off = math.sqrt(plans[best].effect / plans[()].effect)
    note = (
        f"plans do without {' and '.join(best)}: in int8 at batch {paced.target.batch} one with them took "
        f"{times[()] / times[best]:.2f} times as long as one without, for {1 / off:.2f} times the error"
    )
    model = dataclasses.replace(paced.model, notes=(*paced.model.notes, note))
    return dataclasses.replace(paced, model=model, candidates=_without(paced.candidates, best))


def _plans(candidates: Mapping[str, Sequence[Candidate]]) -> dict[Families, Choice]:
    """Make a strong plan, and what can do without families in its place; that of all families is ()."""
    plan = strong_plan(candidates)
    if plan is None:
        return {}
    plans: dict[Families, Choice] = {(): plan}
    used = {each.form.family for each in plan.chosen.values()}
    limit = Limit("macs", plan.totals["macs"], None, "a strong plan")
    for families in DOUBTFUL:
        if used.isdisjoint(families):
            continue
        try:
            plans[families] = choose(_without(candidates, families), [limit])
        except ConfigError:
            continue  # the others do not get as far down
    return plans


def _without(
    candidates: Mapping[str, Sequence[Candidate]], families: Families
) -> dict[str, tuple[Candidate, ...]]:
    return {
        name: tuple(one for one in each if one.form.family not in families)
        for name, each in candidates.items()
    }


def _times(
    prepared: Prepared, paced: Paced, plans: Mapping[Families, Choice]
) -> dict[Families, float]:
    """Time the plans in int8, each in the types that are fastest for it, relative to the first one."""
    models: dict[str, onnx.ModelProto] = {}
    whose: dict[str, Families] = {}
    refusal: ModelError | None = None
    for families, plan in plans.items():
        branches = {
            name: branches_of_form(prepared.geometries[name], each.form)
            for name, each in plan.chosen.items()
            if each.form != KEEP
        }
        ready = ready_for_int8(rewritten(prepared, branches), prepared.path)
        tensors = dict.fromkeys(quantizable_tensors(ready), (-_LARGEST, _LARGEST))
        ranges = TensorsData(CalibrationMethod.MinMax, tensors)
        for types in (each for each in ARITHMETICS if each.name in TYPES):
            name = f"without {' and '.join(families) or 'nothing'}, {types.name}"
            try:
                models[name] = in_int8(ready, ranges, types)
                whose[name] = families
            except ModelError as error:
                refusal = error
    if not models:
        assert refusal is not None, "each of the types was tried"
        raise refusal
    timings = measure_latency(
        models,
        paced.feeds,
        paced.target.runtime,
        seconds=TRIAL_SECONDS,
        rounds=TRIAL_ROUNDS,
        openings=OPENINGS,
    )
    first = next(iter(timings.values()))
    times = dict.fromkeys(plans, math.inf)
    for name, families in whose.items():
        times[families] = min(times[families], 1 / speedup(first, timings[name]).ratio)
    return times

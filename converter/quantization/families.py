"""Families of forms that gain too little of int8, found before anything is planned.

Milliseconds in float do not tell what int8 gains: products of matrices run up to four times as fast, one
filter to a channel hardly faster, and how much so differs between processors and batches. So where int8
follows, a strong plan is made with all families and again, at no more multiply-accumulates, without some. All
are quantized, with random weights, and timed in turns. What the plan of most speed for the root of its effect
does without, all plans do without ([ADR 22](../../docs/adr/0022-plans-that-int8-follows.md)).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData

from converter.corrections import strong_plan
from converter.errors import ConfigError, ModelError, SolverError
from converter.latency import CLOSE, OPENINGS, measure_latency, speedup
from converter.pace import (
    LEAST_EFFECT,
    TRIAL_ROUNDS,
    TRIAL_SECONDS,
    Paced,
    with_random_weights,
)
from converter.planner.choice import Choice, Limit, choose
from converter.preparation import Prepared
from converter.progress import Progress
from converter.quantization.integers import (
    ARITHMETICS,
    in_int8,
    quantizable_tensors,
    ready_for_int8,
)
from converter.runtime import open_session, run
from converter.schemes import Candidate

__all__ = ["ALL", "LeftOut", "slow_in_int8", "without"]

Families: TypeAlias = tuple[str, ...]

DOUBTFUL: tuple[Families, ...] = (("depthwise ×2",), ("depthwise", "depthwise ×2"))
"""What plans may have to do without: several filters to a channel, or any filters of single channels."""
TYPES = ("u8 × s8", "s8 × s8")
"""Activations × weights that plans are timed in: the product of x86, and that of other processors."""
CLEARLY = 1.02
"""By how many times a plan must be worth more to do without more: readings of one plan differ by so much."""
_LARGEST = np.float32(4.0)
"""Of every tensor; what its range is takes no time."""


@dataclass(frozen=True)
class LeftOut:
    """Families that plans do without, and why.

    Attributes
    ----------
    families : tuple of str
        By `Form.family`; none where all pay.
    notes : tuple of str
        What is left out, or why that could not be found out.
    """

    families: Families = ()
    notes: tuple[str, ...] = ()


ALL = LeftOut()
"""Nothing is left out."""


def slow_in_int8(prepared: Prepared, paced: Paced, progress: Progress) -> LeftOut:
    """Find the families that cost more time in int8 than their smaller effect is worth.

    A hundredth of the time is worth a hundredth of how far the outputs are off, the root of the effect.

    Parameters
    ----------
    prepared : Prepared
    paced : Paced
    progress : Progress

    Raises
    ------
    ModelError
        Where the model's opset is too old for int8, and cannot be raised.
    ConfigError, CalibrationError
        As `measure_latency`.
    """
    plans = _plans(paced.candidates)
    if len(plans) < 2:
        return ALL
    with progress.stage("time plans in int8", 1) as advance:
        times, refusals = _times(prepared, paced, plans)
        advance(1)
    if () not in times:
        return LeftOut(notes=(f"plans were not timed in int8: {refusals[-1]}",))

    def worth(families: Families) -> float:
        return 1 / (times[families] * math.sqrt(max(plans[families].effect, LEAST_EFFECT)))

    best: Families = ()
    for families in times:
        if worth(families) > CLEARLY * worth(best):
            best = families
    if not best:
        return ALL
    off = math.sqrt(plans[best].effect / plans[()].effect)
    note = (
        f"plans do without {' and '.join(best)}: in int8 at batch {paced.target.batch} one with them took "
        f"{times[()] / times[best]:.2f} times as long as one without, for {1 / off:.2f} times the error"
    )
    return LeftOut(best, (note,))


def without(paced: Paced, families: Families) -> Paced:
    """Give what plans are made of, without some families; layers as they are always stay."""
    return dataclasses.replace(paced, candidates=_without(paced.candidates, families))


def _plans(candidates: Mapping[str, Sequence[Candidate]]) -> dict[Families, Choice]:
    """Make a strong plan, and what can do without families in its place; that of all families is ()."""
    plan = strong_plan(candidates)
    if plan is None:
        return {}
    plans: dict[Families, Choice] = {(): plan}
    limit = Limit("macs", plan.totals["macs"], None, "a strong plan")
    for families in DOUBTFUL:
        others = _without(candidates, families)
        if _cheapest(others) > _cheapest(candidates):
            continue  # some budgets would be out of reach
        try:
            made = choose(others, [limit])
        except (ConfigError, SolverError):
            continue
        if all(made.chosen != each.chosen for each in plans.values()):
            plans[families] = made
    return plans


def _cheapest(candidates: Mapping[str, Sequence[Candidate]]) -> tuple[float, float]:
    """Count the least multiply-accumulates, and the least weights, that any plan has."""
    layers = candidates.values()
    macs = math.fsum(min(one.macs for one in each) for each in layers)
    return macs, math.fsum(min(one.params for one in each) for each in layers)


def _without(
    candidates: Mapping[str, Sequence[Candidate]], families: Families
) -> dict[str, tuple[Candidate, ...]]:
    return {
        name: tuple(one for one in each if one.form.family not in families)
        for name, each in candidates.items()
    }


def _times(
    prepared: Prepared, paced: Paced, plans: Mapping[Families, Choice]
) -> tuple[dict[Families, float], list[ModelError]]:
    """Time the plans in int8, each in the types that are fastest for it; relative to one of them.

    Those that onnxruntime refuses in all types have no time; why is told.
    """
    models: dict[str, onnx.ModelProto] = {}
    whose: dict[str, Families] = {}
    refusals: list[ModelError] = []
    runtime = paced.target.runtime
    for families, plan in plans.items():
        model = with_random_weights(prepared, plan.chosen)
        ready = ready_for_int8(model, prepared.path)
        tensors = dict.fromkeys(quantizable_tensors(ready), (-_LARGEST, _LARGEST))
        ranges = TensorsData(CalibrationMethod.MinMax, tensors)
        for types in (each for each in ARITHMETICS if each.name in TYPES):
            name = f"without {' and '.join(families) or 'nothing'}, {types.name}"
            try:
                quantized = in_int8(ready, ranges, types)
                run(open_session(quantized, runtime, label=name), None, paced.feeds, label=name)
            except ModelError as error:  # types that this provider has no kernel for
                refusals.append(error)
                continue
            models[name], whose[name] = quantized, families
    if not models:
        return {}, refusals
    timings = measure_latency(
        models,
        paced.feeds,
        runtime,
        seconds=TRIAL_SECONDS,
        rounds=TRIAL_ROUNDS,
        openings=OPENINGS,
        within=CLOSE,
    )
    first = next(iter(timings.values()))
    times: dict[Families, float] = {}
    for name, families in whose.items():
        taken = 1 / speedup(first, timings[name]).ratio
        times[families] = min(times.get(families, math.inf), taken)
    return times, refusals

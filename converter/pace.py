"""Milliseconds in a plan: candidates get theirs, plans are tried, and no result is slower.

A plan is tried before anything is fitted: with random weights it takes the same time. Where it misses
what was asked, the limit of the next one moves by as much. What whole plans read also corrects what the
measurements of single layers add up to. The finished model is timed again, in turns with the original, and
layers that do not pay are put back. Where a prediction is far off by then, the plan is timed once more as it
was tried: what has changed of that is the machine's pace.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from converter.branches import branches_of_form
from converter.calibration.sets import CalibrationSet
from converter.config import Budget, CalibrationSettings, SolverSettings, Target
from converter.corrections import correct_effects
from converter.errors import ConfigError, SolverError
from converter.latency import (
    CLOSE,
    OPENINGS,
    Speedup,
    Timing,
    measure_latency,
    speedup,
    until_no_slower,
)
from converter.outcome import Latency
from converter.planner.choice import Choice, Limit, choose
from converter.planner.measurements import Measurements
from converter.planner.milliseconds.forms import Point
from converter.planner.milliseconds.measure import measure_layers
from converter.planner.milliseconds.model import LatencyModel
from converter.preparation import Clock, Prepared, Start, prepare, target_batch
from converter.progress import Progress
from converter.realisation import rewritten
from converter.schemes import KEEP, Candidate
from converter.work import Work
from passes.split import Branches

__all__ = [
    "Paced",
    "begin",
    "never_slower",
    "pace",
    "plan",
    "read_plans",
    "time_against",
    "with_random_weights",
]

POINTS = 4
"""Forms of each family that are measured; two where S stands beside L."""
TRIALS = 5
MARGIN = 0.02
"""A plan must be so much faster than asked, so that it still is when it is measured again."""
ENOUGH = 1.05
"""A plan that is faster than asked by more than this is made again with more time."""
STEP = 1.05
"""By how much more a plan must promise after one that was not as fast as its MACs let hope."""
WORTH = 1.25
"""How many times the effect of the best plan within a budget a faster one may have: its outputs are then off
by 1.12 times as much at most."""
DEARER = 1.5
"""The same where the best plan is slower than the original. Where work goes slowly from core to core, a
ResNet-20 at half its MACs was no slower only at twice the error."""
READ_PLANS = 3
"""Plans of a front, from the cheapest on, that are read as wholes to correct predictions by."""
HELD = 0.1
"""A prediction that is off by more is read into: the plan behind it is timed again, as it was tried. One of
so much gain is waited for, where the model reads slower than the original."""
LEAST_EFFECT = 1e-12
"""Plans of no effect are all alike."""
LEAST_MS = 1e-6
"""No model takes less: what nothing was measured of would divide by zero."""
TRIAL_SECONDS, TRIAL_ROUNDS = 1.0, 12
FINAL_SECONDS, FINAL_ROUNDS = 2.0, 24
"""Rounds of a trial are few and long: most of a round is waiting for threads to sleep, and a ResNet-20's
speed-up read the same in ten trials within 0.6 % (standard deviation), with twice as many within 0.4 %."""


@dataclass(frozen=True, eq=False)
class Tried:
    """A plan that was timed with random weights, and how many times faster than the original it read."""

    chosen: Mapping[str, Candidate]
    speedup: float


@dataclass(frozen=True, eq=False)
class Paced:
    """Candidates with their milliseconds on the target.

    Attributes
    ----------
    target : Target
    feeds : dict of str to ndarray
        One batch.
    model : LatencyModel
    candidates : dict of str to tuple of Candidate
        By layer; forms whose time could not be measured are left out.
    tried : list of Tried
        Whole plans that were timed against the original; `_tried` adds to them.
    """

    target: Target
    feeds: dict[str, NDArray[Any]]
    model: LatencyModel
    candidates: dict[str, tuple[Candidate, ...]]
    tried: list[Tried] = field(default_factory=list)

    def added_up(self, chosen: Mapping[str, Candidate]) -> float:
        """Speed-up of the whole model with these forms, as its layers add up."""
        ms = self.model.rest_ms + sum(each.ms or 0.0 for each in chosen.values())
        return self.model.original_ms / max(ms, LEAST_MS)

    def predicted_speedup(self, chosen: Mapping[str, Candidate]) -> float:
        """Speed-up of the whole model with these forms, corrected by the plans that were read.

        The correction is interpolated over the logarithm of the speed-up. It is 1 for the original and
        stays what it is beyond the outermost plan.
        """
        added_up = self.added_up(chosen)
        read = {self.added_up(each.chosen): each.speedup for each in self.tried}
        known = sorted({1.0: 1.0, **read}.items())
        at = [math.log(promised) for promised, _ in known]
        off = [math.log(found / promised) for promised, found in known]
        return added_up * math.exp(float(np.interp(math.log(added_up), at, off)))

    def predicted_ms(self, chosen: Mapping[str, Candidate]) -> float:
        """Milliseconds of the whole model with these forms."""
        return self.model.original_ms / self.predicted_speedup(chosen)


def begin(
    model: Path,
    data: CalibrationSet,
    *,
    calibration: CalibrationSettings,
    solver: SolverSettings,
    target: Target,
    timing: bool,
    cache: Path | None,
    progress: Progress,
    clock: Clock,
    executor: Executor | None = None,
    work: Work | None = None,
    start: Start | None = None,
) -> tuple[Prepared, Paced | None]:
    """Do what does not depend on a budget: record, predict forms, and time them where that is wanted.

    Parameters are those of `prepare` and `pace`; without `timing` there is no `Paced`.

    Raises
    ------
    ConfigError, ModelError, CalibrationError, SolverError
        As they do.
    """
    prepared = prepare(
        model,
        data,
        calibration=calibration,
        solver=solver,
        runtime=target.runtime,
        batch=target.batch if timing else None,
        progress=progress,
        clock=clock,
        executor=executor,
        work=work,
        start=start,
    )
    with clock.stage("measure effects"):
        correct_effects(prepared, target.runtime, progress)
    if not timing:
        return prepared, None
    with clock.stage("measure layers"):
        return prepared, pace(prepared, target, Measurements(cache), progress)


def pace(prepared: Prepared, target: Target, cache: Measurements, progress: Progress) -> Paced:
    """Measure what the candidates take on the target.

    Raises
    ------
    ConfigError
        Where the model's own batch is another one.
    """
    feeds = target_batch(prepared.original, prepared.sample, target, prepared.path)
    points = {name: _points(each) for name, each in prepared.candidates.items()}
    model = measure_layers(
        prepared.original,
        prepared.convertible,
        points,
        lambda layer, form: branches_of_form(prepared.geometries[layer.name], form),
        feeds,
        target,
        cache,
        progress=progress,
    )
    candidates = {}
    for name, each in prepared.candidates.items():
        timed = [
            dataclasses.replace(one, ms=model.layer_ms(name, one.form, one.macs)) for one in each
        ]
        kept = dataclasses.replace(timed[0], ms=timed[0].ms or 0.0)
        candidates[name] = (kept, *(one for one in timed[1:] if one.ms is not None))
    return Paced(target, feeds, model, candidates)


def read_plans(prepared: Prepared, paced: Paced, front: Sequence[Choice]) -> None:
    """Time a few plans of a front, so that predictions of all others are corrected by them.

    Single layers are measured in one session or in few, and many of them on another day; a whole plan in
    turns with the original has neither fault. Where one plan is made, `plan` reads that very one; this is
    for who looks at the front.
    """
    picked = np.unique(np.linspace(0, len(front) - 1, READ_PLANS + 1)[:-1].round().astype(int))
    _tried(prepared, paced, {str(index): front[index] for index in picked})


def _points(candidates: Sequence[Candidate]) -> list[Point]:
    """Forms that are measured: of each family some from the cheapest to the dearest."""
    points: list[Point] = []
    ordered = sorted(candidates, key=lambda each: (each.form.family, each.macs))
    for family, members in itertools.groupby(ordered, key=lambda each: each.form.family):
        forms = list(members)
        if family == KEEP.family:
            continue
        wanted = 2 if forms[0].form.support and forms[0].form.ranks else POINTS
        picked = np.unique(np.linspace(0, len(forms) - 1, wanted).round().astype(int))
        points += [(forms[index].form, forms[index].macs) for index in picked]
    return points


def plan(prepared: Prepared, paced: Paced | None, budget: Budget, *, more: float = 1.0) -> Choice:
    """Choose a form for each layer within the budget.

    With milliseconds the choice is tried, with random weights, and made again where it misses what was
    asked. Where no time was asked for, it is still to be faster, as far as that costs little; where the
    budget leaves no plan that is no slower than the original, `never_slower` has the last word.

    Parameters
    ----------
    prepared : Prepared
    paced : Paced or None
        None plans without milliseconds.
    budget : Budget
    more : float, default 1.0
        How many times faster than asked a plan must be, where the budget is in time: what an earlier one
        turned out too slow by.

    Raises
    ------
    ConfigError
        Where the budget is out of reach.
    """
    limits = _limits(prepared, budget)
    if paced is None:
        return choose(prepared.candidates, limits)
    if budget.timed:
        return _in_time(prepared, paced, budget, limits, more)
    return _as_hoped(prepared, paced, budget, limits)


def _in_time(
    prepared: Prepared, paced: Paced, budget: Budget, limits: Sequence[Limit], more: float
) -> Choice:
    """Meet a speed-up or a latency as measured; of the plans that do, take that of least effect."""
    if budget.latency_ms is None:
        assert budget.speedup is not None, "a budget in time is one of the two"
        wanted, option = budget.speedup, f"--speedup {budget.speedup:g}"
    else:
        original = time_against(prepared.original, {}, paced, TRIAL_SECONDS)["original"]
        wanted = original.median_ms / budget.latency_ms
        option = f"--latency-ms {budget.latency_ms:g}"
    factor = budget.speedup is not None
    least = wanted * more
    aim = asked = least * (1 + MARGIN)
    met: list[Choice] = []
    fastest: tuple[float, Choice] | None = None
    for _ in range(TRIALS):
        try:
            within = _time_limit(paced, asked, option, factor=factor)
            choice = choose(paced.candidates, [*limits, within])
        except ConfigError:
            if fastest is not None:
                break
            if asked == least:
                raise
            asked = least  # what is within reach is tried, though without a margin
            continue
        found = _tried(prepared, paced, {"plan": choice})["plan"]
        if fastest is None or found > fastest[0]:
            fastest = found, choice
        if found >= aim:
            met.append(choice)
            if found <= aim * ENOUGH:
                break
        asked *= aim / found * (1.0 if found >= aim else 1.005)
    assert fastest is not None, "the first choice was made, or its refusal raised"
    return min(met, key=lambda choice: choice.effect) if met else fastest[1]


def _as_hoped(prepared: Prepared, paced: Paced, budget: Budget, limits: Sequence[Limit]) -> Choice:
    """Meet a budget that is not in time, by a plan as fast as its MACs promise where one costs little.

    Small layers can be slower in a form of half their MACs. Of plans that are not as fast, the fastest.
    """
    hoped = budget.macs or 1.0
    choice = choose(paced.candidates, limits)
    least = choice.effect
    tried: list[tuple[float, Choice]] = []
    for _ in range(TRIALS):
        read = _tried(prepared, paced, {"plan": choice})["plan"]
        tried.append((read, choice))
        if read >= hoped:
            return choice
        faster = _faster(paced, limits, choice, read, hoped, least)
        if faster is None:
            break
        choice = faster
    return max(tried, key=lambda each: each[0])[1]


def _faster(
    paced: Paced, limits: Sequence[Limit], than: Choice, read: float, hoped: float, least: float
) -> Choice | None:
    """Find the plan that gains most for what it costs, of those that promise more and no more than is hoped.

    A hundredth of the time is worth a hundredth of how far the outputs are off, the root of the effect. Where
    `than` reads slower than the original, and no plan that is worth it promises not to be, it is the one of
    least effect that does. None where there is none.
    """
    promised = paced.added_up(than.chosen)
    plans = []
    for step in range(1, 1 + math.ceil(math.log(max(hoped / read, STEP)) / math.log(STEP))):
        try:
            limit = _time_limit(paced, promised * STEP**step, "faster", factor=True)
            plan = choose(paced.candidates, [*limits, limit])
        except (ConfigError, SolverError):
            break
        if plan.effect > DEARER * least:  # and so have all that are faster
            break
        plans.append(plan)

    def worth(plan: Choice) -> float:
        return paced.added_up(plan.chosen) / math.sqrt(max(plan.effect, LEAST_EFFECT))

    enough = [plan for plan in plans if min(read, 1.0) * paced.added_up(plan.chosen) >= promised]
    paying = [plan for plan in enough if plan.effect <= WORTH * least and worth(plan) > worth(than)]
    if paying or read >= 1.0:
        return max(paying, key=worth, default=None)
    affordable = [plan for plan in enough if plan.effect <= DEARER * least]
    return min(affordable, key=lambda plan: plan.effect, default=None)


def _time_limit(paced: Paced, speedup: float, option: str, *, factor: bool) -> Limit:
    """Bound the time of the convertible layers so that the whole is so many times faster."""
    rest, before = paced.model.rest_ms, paced.model.original_ms
    return Limit("ms", before / speedup - rest, before - rest if factor else None, option, rest)


def _limits(prepared: Prepared, budget: Budget) -> list[Limit]:
    """Bound what the convertible layers may cost, so that the whole model meets the factors asked for."""
    kept = [each[0] for each in prepared.candidates.values()]
    macs, params = sum(each.macs for each in kept), sum(each.params for each in kept)
    limits = []
    if budget.macs is not None:
        rest = prepared.cost.macs - macs
        most = prepared.cost.macs / budget.macs - rest
        limits.append(Limit("macs", most, macs, f"--macs {budget.macs:g}", rest))
    if budget.params is not None:
        rest = prepared.cost.params - params
        most = prepared.cost.params / budget.params - rest
        limits.append(Limit("params", most, params, f"--params {budget.params:g}", rest))
    return limits


def _tried(prepared: Prepared, paced: Paced, plans: Mapping[str, Choice]) -> dict[str, float]:
    """Time plans with random weights against the original; their speed-ups, which `paced` keeps too."""
    read = _read(prepared, paced, {name: choice.chosen for name, choice in plans.items()})
    paced.tried.extend(Tried(plans[name].chosen, ratio) for name, ratio in read.items())
    return {**dict.fromkeys(plans, 1.0), **read}


def _read(
    prepared: Prepared, paced: Paced, plans: Mapping[str, Mapping[str, Candidate]]
) -> dict[str, float]:
    """Time plans with random weights against the original: speed-ups of those that change something."""
    models = {
        plan_name: with_random_weights(prepared, chosen)
        for plan_name, chosen in plans.items()
        if any(each.form != KEEP for each in chosen.values())
    }
    if not models:
        return {}
    timings = time_against(prepared.original, models, paced, TRIAL_SECONDS, TRIAL_ROUNDS)
    return {name: speedup(timings["original"], timings[name]).ratio for name in models}


def with_random_weights(prepared: Prepared, chosen: Mapping[str, Candidate]) -> onnx.ModelProto:
    """Give the model with layers in the forms of a plan: it takes the time of the fitted one."""
    branches = {
        name: branches_of_form(prepared.geometries[name], each.form)
        for name, each in chosen.items()
        if each.form != KEEP
    }
    return rewritten(prepared, branches)


def time_against(
    original: onnx.ModelProto | Path,
    models: Mapping[str, onnx.ModelProto | Path],
    paced: Paced,
    seconds: float,
    rounds: int = FINAL_ROUNDS,
) -> dict[str, Timing]:
    """Time models in turns with the original, whose timing is there too."""
    return measure_latency(
        {"original": original, **models},
        paced.feeds,
        paced.target.runtime,
        seconds=seconds,
        rounds=rounds,
        openings=OPENINGS,
        within=CLOSE,
    )


def never_slower(
    prepared: Prepared,
    paced: Paced,
    chosen: Mapping[str, Candidate],
    branches: Mapping[str, Branches],
    model: onnx.ModelProto,
) -> tuple[onnx.ModelProto | None, dict[str, Branches], Latency]:
    """Time the finished model, and put layers back until it is no slower than the original.

    First those go that the measurements say do not pay, then, half of the rest at a time, those that
    gain least.

    Parameters
    ----------
    prepared : Prepared
    paced : Paced
    chosen : mapping of str to Candidate
        The plan.
    branches : mapping of str to Branches
        What its layers became.
    model : onnx.ModelProto
        The finished model.

    Returns
    -------
    tuple of (onnx.ModelProto or None, dict of str to Branches, Latency)
        The model that is no slower (None where only the original is), what is replaced in it, and how
        it was timed.
    """
    gains = {name: _gain(paced, name, chosen[name]) for name in branches}
    # the machine is given time once: what is slower after that is put back without delay
    seen_faster = paced.predicted_speedup(chosen) > 1.0 + HELD
    left = dict(branches)
    while left:
        read = partial(time_against, prepared.path, {"converted": model}, paced, FINAL_SECONDS)
        timings, gained = until_no_slower(read, "converted", "original", seen_faster=seen_faster)
        if gained.ratio >= 1.0:
            forms = {
                name: chosen[name] if name in left else each[0]
                for name, each in paced.candidates.items()
            }
            return model, left, _latency(prepared, paced, timings, gained, forms)
        seen_faster = False
        paying = {name: each for name, each in left.items() if gains[name] > 0}
        if len(paying) == len(left):
            order = sorted(left, key=lambda name: gains[name], reverse=True)
            paying = {name: left[name] for name in order[: len(order) // 2]}
        left = paying
        if left:
            model = rewritten(prepared, left)
    timings = time_against(prepared.path, {"converted": prepared.path}, paced, TRIAL_SECONDS)
    forms = {name: each[0] for name, each in paced.candidates.items()}
    return None, {}, _latency(prepared, paced, timings, Speedup(1.0, 1.0, 1.0), forms)


def _gain(paced: Paced, name: str, candidate: Candidate) -> float:
    """Milliseconds that a form saves in its layer."""
    kept = paced.candidates[name][0].ms or 0.0
    return kept - (candidate.ms if candidate.ms is not None else kept)


def _latency(
    prepared: Prepared,
    paced: Paced,
    timings: Mapping[str, Timing],
    gained: Speedup,
    forms: Mapping[str, Candidate],
) -> Latency:
    # at the speed that the machine had in these very turns, round by round
    predicted = timings["converted"].median_ms * gained.ratio / paced.predicted_speedup(forms)
    latency = Latency(
        provider=paced.target.runtime.provider,
        threads=paced.target.runtime.thread_count,
        batch=paced.target.batch,
        original_ms=timings["original"].median_ms,
        converted_ms=timings["converted"].median_ms,
        speedup=gained.ratio,
        low=gained.low,
        high=gained.high,
        predicted_ms=predicted,
    )
    if abs(latency.off) <= HELD or not paced.tried:
        return latency
    return dataclasses.replace(latency, pace=_pace_since(prepared, paced, forms))


def _pace_since(prepared: Prepared, paced: Paced, forms: Mapping[str, Candidate]) -> float | None:
    """Say how many times as fast a plan that was tried reads now as it did then, relative to the original.

    The faster a network, the more it depends on how fast cores hand work to each other: of several that plan
    is read again whose speed-up was to be most like that of `forms`, and none that was to be quite another.
    A difference that single readings have anyway is no change of pace. Both give None.
    """

    def apart(tried: Tried) -> float:
        return abs(math.log(paced.added_up(tried.chosen) / paced.added_up(forms)))

    nearest = min(
        reversed(paced.tried), key=apart
    )  # the last reading of a plan is what it is predicted by
    if apart(nearest) > HELD:
        return None
    pace = _read(prepared, paced, {"plan": nearest.chosen})["plan"] / nearest.speedup
    return pace if abs(pace - 1.0) > HELD else None

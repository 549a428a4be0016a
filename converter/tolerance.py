"""The fastest model within a tolerance: budgets are tried until one fits and the next does not.

The front that was predicted once says where to begin and how far to step: from a model that passes
or fails to one whose predicted error is as many times larger or smaller as its drop is from the
tolerance. Between a budget that passes and one that fails, the next lies in the middle (of their
logarithms). Drops are measured on images that no layer was fitted on; they are noisy, and what counts
is what was measured. The choice among a few models is made on the same images, so that the drop of the
one that is taken is a little flattered; its standard error says by how much it may be off.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from converter.attempt import Attempt, attempt
from converter.calibration.sets import CalibrationSet
from converter.config import Budget, SolverSettings, Target
from converter.drop import Evaluation, measure_drop
from converter.errors import ConfigError, ValidationError
from converter.front import FrontPoint, predicted_front
from converter.outcome import Drop, Probe, Search
from converter.pace import Paced, plan
from converter.preparation import Clock, Prepared
from converter.progress import Progress

__all__ = ["Tolerance", "search"]

PROBES = 6
CLOSE = 1.03
"""The search ends where the budgets that pass and fail differ by less than this factor."""
LEAST_GAIN = 1.03
"""Budgets below are not tried: what they gain is hardly to be measured."""
EFFECT_PER_POINT = 0.005
"""Predicted error that was about one point of agreement or accuracy (ResNet-20, VGG-16, AlexNet); it
only decides where the search begins."""
STEPS = (1.5, 8.0)
"""Least and largest factor between the predicted errors of a probe and the next one."""
WITHIN_REACH = 0.96
"""Share of the largest gain predicted that is tried; a plan needs room to move when it is timed."""
TINY = 1e-9


@dataclass(frozen=True)
class Tolerance:
    """How much a model may lose.

    Attributes
    ----------
    max_drop : float
        Percentage points of accuracy or agreement, or percent of output error, as `Drop.points`; from 0
        to below 100.
    evaluation : Evaluation
        What it is measured on.
    """

    max_drop: float
    evaluation: Evaluation

    def __post_init__(self) -> None:
        if not 0 <= self.max_drop < 100:  # nor NaN
            raise ConfigError(
                f"the tolerance {self.max_drop} is not from 0 to below 100 percentage points; "
                "--max-drop 0.5 allows half a point"
            )


def search(
    prepared: Prepared,
    paced: Paced | None,
    tolerance: Tolerance,
    images: CalibrationSet,
    solver: SolverSettings,
    target: Target,
    *,
    batch: int,
    progress: Progress,
    clock: Clock,
) -> tuple[Attempt, Search]:
    """Find the fastest model within a tolerance; by multiply-accumulates where nothing is timed.

    Parameters
    ----------
    prepared : Prepared
    paced : Paced or None
    tolerance : Tolerance
    images : CalibrationSet
        What drops are measured on; no layer was fitted on them.
    solver : SolverSettings
    target : Target
    batch : int
        Images that run at once for the drop.
    progress : Progress
    clock : Clock
        Gets the seconds of each stage.

    Raises
    ------
    ValidationError
        Where no model is faster and within the tolerance; it names the closest.
    SolverError
        Where a fit becomes non-finite.
    """
    with clock.stage("choose"):
        steps = _Steps([point for _, point in predicted_front(prepared, paced)])
    best: tuple[Attempt, Probe] | None = None
    probes: list[Probe] = []
    gain = steps.first(tolerance.max_drop)
    while gain is not None and len(probes) < PROBES:
        budget = Budget(macs=gain) if paced is None else Budget(speedup=gain)
        with progress.stage(f"try {gain:.2f} times, {len(probes) + 1} of {PROBES} at most", 1):
            try:
                with clock.stage("choose"):
                    choice = plan(prepared, paced, budget)
            except ConfigError:  # a plan is asked for a little more than the budget says
                gain = steps.below(gain)
                continue
            done = attempt(prepared, paced, choice, solver, progress, clock, trade=not budget.timed)
            with clock.stage("compare"):
                drop = measure_drop(
                    prepared.path,
                    done.model,
                    images,
                    target.runtime,
                    batch=batch,
                    progress=progress,
                )
        kept_within = drop.points <= tolerance.max_drop
        probe = Probe(
            asked=gain,
            effect=choice.effect,
            macs_reduction=prepared.cost.macs / done.cost.macs,
            latency=done.latency,
            drop=drop,
            within=kept_within and done.replaced > 0,
        )
        probes.append(probe)
        if probe.within and (best is None or probe.gained > best[1].gained):
            best = done, probe
        gain = steps.after(gain, drop.points, tolerance.max_drop)
    if best is None:
        raise ValidationError(_nothing_found(prepared, tolerance, probes))
    found, chosen = best
    found = dataclasses.replace(
        found, notes=(*found.notes, *_doubts(chosen.drop, tolerance.max_drop))
    )
    return found, Search(tolerance.max_drop, images.describe(), tuple(probes))


class _Steps:
    """Which gain to try next; knows what passed, what failed, and the predicted front.

    Parameters
    ----------
    front : sequence of FrontPoint
        By rising gain and rising effect.
    """

    def __init__(self, front: Sequence[FrontPoint]) -> None:
        self._gains = np.log([max(point.gained, TINY) for point in front])
        self._effects = np.log([max(point.effect, TINY) for point in front])
        self._most = 1.0 + WITHIN_REACH * (front[-1].gained - 1.0) if front else 1.0
        self._passed: float | None = None
        self._failed: float | None = None

    def first(self, max_drop: float) -> float | None:
        """Begin where the tolerance may be; None where there is nothing to gain."""
        if self._most < LEAST_GAIN:
            return None
        return self._allowed(self._gain_at(EFFECT_PER_POINT * max(max_drop, 0.1)))

    def after(self, gain: float, drop: float, max_drop: float) -> float | None:
        """Take in what `gain` has lost; return what to try next, or None where that is enough."""
        if drop <= max_drop:
            self._passed = max(gain, self._passed or gain)
        else:
            self._failed = min(gain, self._failed or gain)
        if self._passed is not None and self._failed is not None:
            # noise may let a larger gain pass than one that failed: nothing lies between then
            wide = min(self._failed, self._most) / self._passed >= CLOSE
            return min(math.sqrt(self._passed * self._failed), self._most) if wide else None
        effect = math.exp(float(np.interp(math.log(gain), self._gains, self._effects)))
        if self._failed is None:
            room = max_drop / drop if drop > 0 else math.inf
            following = self._allowed(self._gain_at(effect * _step(room)))
            return following if following > gain * CLOSE else None
        if gain < LEAST_GAIN * CLOSE:
            return None
        excess = drop / max(max_drop, TINY)
        return self._allowed(min(self._gain_at(effect / _step(excess)), gain / CLOSE))

    def below(self, gain: float) -> float | None:
        """Take in that no plan gains so much; return what to try next, or None where that is enough."""
        least = LEAST_GAIN if self._passed is None else self._passed * CLOSE
        self._most = max(min(self._most, gain / CLOSE), least)
        return self._most if self._most < gain else None

    def _gain_at(self, effect: float) -> float:
        return math.exp(float(np.interp(math.log(effect), self._effects, self._gains)))

    def _allowed(self, gain: float) -> float:
        return min(max(gain, LEAST_GAIN), self._most)


def _step(ratio: float) -> float:
    return min(max(ratio, STEPS[0]), STEPS[1])


def _doubts(drop: Drop, max_drop: float) -> list[str]:
    """Say what makes the drop doubtful, as too few images to tell the tolerance from nothing."""
    if drop.standard_error is None or 2 * drop.standard_error <= max(max_drop, TINY):
        return [*drop.notes]
    return [
        *drop.notes,
        f"on {drop.images} images the drop is {drop}, which says little of a tolerance of "
        f"{max_drop:g}; give more of them",
    ]


def _nothing_found(prepared: Prepared, tolerance: Tolerance, probes: Sequence[Probe]) -> str:
    gained = [probe for probe in probes if probe.gained > 1.0]
    if not gained:
        return (
            f"no form of {prepared.path}'s layers makes it faster here, so nothing was written; "
            "use it as it is"
        )
    closest = min(gained, key=lambda probe: (probe.drop.points, -probe.gained))
    times = "times the speed" if closest.latency is not None else "times fewer MACs"
    return (
        f"no faster model within --max-drop {tolerance.max_drop:g} was found, so nothing was written: "
        f"the closest loses {closest.drop} at {closest.gained:.2f} {times}; allow a larger drop, or "
        "give more calibration images" + "".join(f"; {note}" for note in closest.drop.notes)
    )

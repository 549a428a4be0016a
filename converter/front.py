"""What a model could become: effect on the output against time or MACs, verified at a few points."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from converter.attempt import attempt
from converter.calibration.opening import open_calibration_set
from converter.calibration.sets import CalibrationSet, DataReader
from converter.config import CalibrationSettings, Preprocessing, SolverSettings, Target
from converter.drop import Evaluation, measure_drop, set_apart
from converter.errors import ConfigError
from converter.model_file import load_model, model_digest
from converter.outcome import Drop, Latency, Stage
from converter.pace import Paced, begin, read_plans
from converter.planner.choice import Choice, frontier
from converter.preparation import Clock, Prepared
from converter.progress import SILENT, Progress
from converter.runtime import machine, model_inputs
from converter.work import Work

__all__ = ["Front", "FrontPoint", "Verified", "plan", "predicted_front", "predicted_point"]

POINTS = 16
WORST_EFFECT = 0.5
"""Plans whose predicted error is above half of the output's variance are left out: such a model is
of no use to anyone, and beside it the useful ones could not be told apart."""


@dataclass(frozen=True)
class Verified:
    """What a plan gave when it was carried out.

    Attributes
    ----------
    latency : Latency or None
        None where nothing is timed.
    macs_reduction, params_reduction : float
    drop : Drop
    """

    latency: Latency | None
    macs_reduction: float
    params_reduction: float
    drop: Drop

    @property
    def gained(self) -> float:
        """Measured speed-up; reduction of the multiply-accumulates where nothing is timed."""
        return self.macs_reduction if self.latency is None else self.latency.speedup


@dataclass(frozen=True)
class FrontPoint:
    """The best plan for one budget.

    Attributes
    ----------
    effect : float
        Predicted squared error of the network's output, relative to its variance.
    macs_reduction, params_reduction : float
        Original over planned, of the whole network.
    ms, speedup : float or None
        Predicted milliseconds of the whole network, and how many times faster that is than the
        predicted original; None where nothing is timed.
    forms : dict of str to str
        What each convertible layer becomes, as "spatial r 16".
    verified : Verified or None, default None
    """

    effect: float
    macs_reduction: float
    params_reduction: float
    ms: float | None
    speedup: float | None
    forms: dict[str, str]
    verified: Verified | None = None

    @property
    def gained(self) -> float:
        """Predicted speed-up; reduction of the multiply-accumulates where nothing is timed."""
        return self.macs_reduction if self.speedup is None else self.speedup


@dataclass(frozen=True)
class Front:
    """What `plan` returns; the JSON of `twofold plan` is this.

    Attributes
    ----------
    source : Path
    points : tuple of FrontPoint
        From the original on, by rising gain and rising effect.
    judged_on : str or None
        What the drops were measured on; None where nothing was verified.
    stages : tuple of Stage
    notes : tuple of str
    settings, calibration, machine : dict
        As of `Conversion`.
    source_digest : str
        SHA-256 of the model's file.
    """

    source: Path
    points: tuple[FrontPoint, ...]
    judged_on: str | None
    stages: tuple[Stage, ...]
    notes: tuple[str, ...]
    settings: dict[str, Any]
    calibration: dict[str, Any]
    machine: dict[str, Any]
    source_digest: str
    format: str = field(default="twofold-front-1")

    @property
    def timed(self) -> bool:
        """Whether the points are planned by milliseconds rather than by multiply-accumulates."""
        return any(point.ms is not None for point in self.points)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        return {**dataclasses.asdict(self), "source": str(self.source)}


def plan(
    model: Path,
    calib: Path | DataReader | CalibrationSet,
    *,
    evaluation: Evaluation,
    verify: int,
    preprocessing: Preprocessing,
    calibration: CalibrationSettings,
    solver: SolverSettings,
    target: Target,
    timing: bool = True,
    cache: Path | None = None,
    work: Path | None = None,
    executor: Executor | None = None,
    progress: Progress = SILENT,
) -> Front:
    """Predict the front of `model`, and verify it at `verify` points; see `converter.plan`."""
    if not 0 <= verify <= POINTS:
        raise ConfigError(f"{verify} points to verify are not from 0 to {POINTS}; correct it")
    clock = Clock()
    kept = None if work is None else Work(work)

    with clock.stage("read"):
        inputs = model_inputs(load_model(model), label=str(model))
        data = open_calibration_set(calib, inputs, preprocessing, images=calibration.images)
        judged_on = None
        if verify:
            data, judged_on = set_apart(data, evaluation, inputs, preprocessing)

    prepared, paced = begin(
        model,
        data,
        calibration=calibration,
        solver=solver,
        target=target,
        timing=timing,
        cache=cache,
        progress=progress,
        clock=clock,
        executor=executor,
        work=kept,
    )
    with clock.stage("choose"):
        planned = predicted_front(prepared, paced)
        points = [point for _, point in planned]

    # carried out as `convert` would, but for a file
    if judged_on is not None:
        for number, index in enumerate(_spread(len(points), verify), 1):
            title = f"verify point {number}, {points[index].gained:.2f} times"
            with progress.stage(title, 1):
                done = attempt(
                    prepared,
                    paced,
                    planned[index][0],
                    solver,
                    progress,
                    clock,
                    trade=paced is None,
                )
                with clock.stage("compare"):
                    drop = measure_drop(
                        prepared.path,
                        done.model,
                        judged_on,
                        target.runtime,
                        batch=calibration.batch,
                        progress=progress,
                    )
            points[index] = dataclasses.replace(
                points[index],
                verified=Verified(
                    latency=done.latency,
                    macs_reduction=prepared.cost.macs / done.cost.macs,
                    params_reduction=prepared.cost.params / done.cost.params,
                    drop=drop,
                ),
            )

    return Front(
        source=model,
        points=tuple(points),
        judged_on=None if judged_on is None else judged_on.describe(),
        stages=clock.stages(),
        notes=(
            *prepared.notes,
            *prepared.recorder.notes,
            *(() if paced is None else paced.model.notes),
            *(() if kept is None else kept.notes),
            *_doubts(points),
        ),
        settings={
            "verify": verify,
            "preprocessing": dataclasses.asdict(preprocessing),
            "calibration": dataclasses.asdict(calibration),
            "solver": dataclasses.asdict(solver),
            "target": dataclasses.asdict(target),
        },
        calibration={
            "data": data.describe(),
            "digest": data.digest(),
            **prepared.recorder.describe(),
        },
        machine=machine(),
        source_digest=model_digest(model),
    )


def _doubts(points: Sequence[FrontPoint]) -> tuple[str, ...]:
    """Say what makes drops doubtful, each once."""
    verified = [each.verified for each in points if each.verified is not None]
    return tuple(dict.fromkeys(note for each in verified for note in each.drop.notes))


def predicted_front(
    prepared: Prepared, paced: Paced | None, *, read: bool = True
) -> list[tuple[Choice, FrontPoint]]:
    """Choose the best plans for budgets from the original to the cheapest that is of use.

    Parameters
    ----------
    prepared : Prepared
    paced : Paced or None
        None plans by multiply-accumulates.
    read : bool, default True
        Whether some of the plans are timed first, so that predictions are corrected by them; that takes
        seconds. Without, what was timed before corrects them.

    Returns
    -------
    list of tuple of (Choice, FrontPoint)
        By rising gain and rising effect.
    """
    if paced is None:
        choices = frontier(prepared.candidates, "macs", POINTS)
    else:
        choices = frontier(paced.candidates, "ms", POINTS)
        if read:
            read_plans(prepared, paced, choices)
    planned = [
        (choice, predicted_point(prepared, paced, choice))
        for choice in reversed(choices)
        if choice.effect <= WORST_EFFECT
    ]
    # what whole plans read may put one behind another that loses less: it is no part of the front then
    front = planned[:1]
    for choice, point in planned[1:]:
        if point.gained > front[-1][1].gained:
            front.append((choice, point))
    return front


def predicted_point(prepared: Prepared, paced: Paced | None, choice: Choice) -> FrontPoint:
    """Say what a plan comes to for the whole network; `paced` as in `predicted_front`."""
    kept = [each[0] for each in prepared.candidates.values()]
    cost = prepared.cost
    macs = cost.macs - sum(each.macs for each in kept) + choice.totals["macs"]
    params = cost.params - sum(each.params for each in kept) + choice.totals["params"]
    ms = None if paced is None else paced.predicted_ms(choice.chosen)
    return FrontPoint(
        effect=choice.effect,
        macs_reduction=cost.macs / macs,
        params_reduction=cost.params / params,
        ms=ms,
        speedup=None if paced is None or ms is None else paced.model.original_ms / ms,
        forms={name: str(each.form) for name, each in choice.chosen.items()},
    )


def _spread(count: int, wanted: int) -> list[int]:
    """Positions of `wanted` points, evenly between the original, which is the first, and the last."""
    inner = np.linspace(0, count - 1, wanted + 2).round().astype(int)[1:-1]
    return sorted({int(index) for index in inner} - {0})

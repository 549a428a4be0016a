"""The conversion, as one flat function of named stages."""

from __future__ import annotations

import dataclasses
import resource
import sys
from collections.abc import Mapping
from concurrent.futures import Executor
from pathlib import Path

import numpy as np
import onnx

from converter.calibration.sets import CalibrationSet, DataReader, open_calibration_set
from converter.config import Budget, CalibrationSettings, Preprocessing, SolverSettings, Target
from converter.drop import set_apart
from converter.errors import ConfigError, SolverError
from converter.model_file import check_output_path, file_digest, load_model, save_model
from converter.outcome import Conversion, LayerOutcome
from converter.pace import never_slower, pace, plan
from converter.planner.cost import count_cost
from converter.planner.measurements import Measurements
from converter.preparation import Clock, Prepared, prepare
from converter.progress import SILENT, Progress
from converter.realisation import realise, unchanged
from converter.runtime import machine, model_inputs, open_session, run
from converter.tolerance import Tolerance, search

__all__ = ["convert", "peak_memory_mib"]


def convert(
    model: Path,
    calib: Path | DataReader | CalibrationSet,
    out: Path,
    budget: Budget | None,
    *,
    tolerance: Tolerance | None = None,
    preprocessing: Preprocessing,
    calibration: CalibrationSettings,
    solver: SolverSettings,
    target: Target,
    timing: bool = True,
    cache: Path | None = None,
    executor: Executor | None = None,
    progress: Progress = SILENT,
) -> Conversion:
    """Convert `model` and write the result to `out`; see `converter.convert`.

    One of `budget` and `tolerance` is given.
    """
    check_output_path(out, model)
    if budget is not None and budget.timed and not timing:
        raise ConfigError("a budget in time needs timing; leave --no-timing out")
    clock = Clock()

    with clock.stage("read"):
        source = load_model(model)
        inputs = model_inputs(source, label=str(model))
        data = open_calibration_set(calib, inputs, preprocessing, images=calibration.images)
        judged_on = None
        if tolerance is not None:
            data, judged_on = set_apart(data, tolerance.evaluation, inputs, preprocessing)

    # what does not depend on the budget: recordings, effects on the output, candidates
    prepared = prepare(
        model,
        data,
        source,
        calibration=calibration,
        solver=solver,
        runtime=target.runtime,
        progress=progress,
        clock=clock,
        executor=executor,
    )

    # what candidates take on the target, and the best choice among them
    paced = None
    if timing:
        with clock.stage("measure layers"):
            paced = pace(prepared, target, Measurements(cache), progress)

    # for a tolerance, several budgets are tried
    searched = None
    converted: onnx.ModelProto | None
    if tolerance is not None and judged_on is not None:
        done, searched = search(
            prepared,
            paced,
            tolerance,
            judged_on,
            solver,
            target,
            batch=calibration.batch,
            progress=progress,
            clock=clock,
        )
        converted, layers, latency, passes = done.model, done.layers, done.latency, done.passes
        notes = [*prepared.notes, *prepared.recorder.notes, *done.notes]
        if paced is not None:
            notes += paced.model.notes
    else:
        assert budget is not None, "a budget is given where no tolerance is"
        with clock.stage("choose"):
            choice = plan(prepared, paced, budget)

        # in graph order, each layer on what the converted ones before it deliver
        with clock.stage("fit layers"):
            realised = realise(prepared, choice.chosen, solver, progress, trade=not budget.timed)

        # the finished model against the original; layers that do not pay are put back
        converted = realised.model
        layers, latency, notes = realised.layers, None, [*prepared.notes, *prepared.recorder.notes]
        if paced is not None:
            with clock.stage("time the result"):
                converted, left, latency = never_slower(
                    prepared, paced, choice.chosen, realised.branches, realised.model
                )
            layers = tuple(_put_back(each, left, prepared, realised.branches) for each in layers)
            notes += [*paced.model.notes, *_verdict(realised.branches, left)]
        passes = realised.passes

    with clock.stage("finish"):
        result = source if converted is None else converted
        after = count_cost(result, prepared.sample, label="the converted model")
        _check_result(result, prepared, target, out)
        save_model(result, out)

    return Conversion(
        source=model,
        out=out,
        macs_before=prepared.cost.macs,
        macs_after=after.macs,
        params_before=prepared.cost.params,
        params_after=after.params,
        layers=layers,
        passes=(*prepared.passes, *passes),
        latency=latency,
        stages=clock.stages(),
        notes=tuple(notes),
        settings={
            "budget": None if budget is None else dataclasses.asdict(budget),
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
        source_digest=file_digest(model),
        out_digest=file_digest(out),
        peak_memory_mib=peak_memory_mib(),
        search=searched,
    )


def _put_back(
    layer: LayerOutcome,
    left: Mapping[str, object],
    prepared: Prepared,
    branches: Mapping[str, object],
) -> LayerOutcome:
    """What became of a layer in the end."""
    if layer.name in left or layer.name not in branches:
        return layer
    original = next(each for each in prepared.layers if each.name == layer.name)
    return unchanged(original, prepared, "put back: the replacement did not make the model faster")


def _verdict(branches: Mapping[str, object], left: Mapping[str, object]) -> list[str]:
    """What a reader must know of layers that were put back."""
    if branches and not left:
        return [
            "no plan within this budget made the model faster than the original on this machine, so "
            "the original was written as it is"
        ]
    if len(left) < len(branches):
        return [
            f"{len(branches) - len(left)} layers were put back, since the model was slower with their "
            "replacements; the budget may be missed for that"
        ]
    return []


def _check_result(model: onnx.ModelProto, prepared: Prepared, target: Target, out: Path) -> None:
    """Refuse to write a model that onnxruntime does not load, or that answers with NaN."""
    session = open_session(model, target.runtime, label="the converted model")
    answers = run(session, None, prepared.sample, label="the converted model")
    if not all(np.isfinite(each).all() for each in answers if each.dtype.kind == "f"):
        raise SolverError(
            f"the converted model answers with NaN or infinity, so {out} was not written"
        )


def peak_memory_mib() -> float:
    """Highest resident memory of this program so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / 1024

"""The conversion, as one flat function of named stages."""

from __future__ import annotations

import dataclasses
import functools
import math
import resource
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx

from converter.answers import compare_answers
from converter.attempt import meet
from converter.calibration.opening import open_calibration_set
from converter.calibration.sets import CalibrationSet, DataReader, ModelInput
from converter.config import (
    Budget,
    CalibrationSettings,
    Preprocessing,
    QuantizationSettings,
    RecoverySettings,
    Runtime,
    SolverSettings,
    Target,
)
from converter.drop import measure_drop, not_judged_on, set_apart
from converter.errors import CalibrationError, ConfigError, ConverterError, ModelError, SolverError
from converter.front import predicted_front, predicted_point
from converter.gradual import go_on_from_parts, shares_of
from converter.model_file import external_files, load_model, model_digest, save_model
from converter.outcome import Answers, Conversion, Drop
from converter.output_file import check_output_path
from converter.pace import Paced, begin
from converter.preparation import Clock, Prepared, Start, normalised_model
from converter.progress import SILENT, Progress
from converter.provenance import mark
from converter.quantization.families import ALL, slow_in_int8, without
from converter.quantization.quantizing import (
    Quantized,
    images_to_see,
    quantize,
    require_quantizable,
)
from converter.refine.pipeline import checkpoint_of
from converter.refine.recovery import Recovered, Teacher, require_recoverable
from converter.runtime import machine, model_inputs, open_session, run
from converter.tolerance import Tolerance, search
from converter.work import Work

__all__ = ["convert", "peak_memory_mib"]

FAR_OFF = 0.1
"""Squared error of the answers, relative to their variance between images, that a note warns of."""

Source: TypeAlias = Path | DataReader | CalibrationSet


def convert(
    model: Path,
    calib: Source,
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
    work: Path | None = None,
    recovery: RecoverySettings | None = None,
    recover_images: Source | None = None,
    quantization: QuantizationSettings | None = None,
    executor: Executor | None = None,
    progress: Progress = SILENT,
) -> Conversion:
    """Convert `model` and write the result to `out`; see `converter.convert`.

    One of `budget` and `tolerance` is given.
    """
    check_output_path(out, model, *external_files(model))
    if budget is not None and budget.timed and not timing:
        raise ConfigError("a budget in time needs timing; leave --no-timing out")
    clock = Clock()
    kept = None if work is None else Work(work)

    with clock.stage("read"):
        images = _opened(
            model,
            calib,
            recover_images,
            tolerance=tolerance,
            preprocessing=preprocessing,
            calibration=calibration,
            target=target,
            recovery=recovery,
            quantization=quantization,
        )
    data, judged_on, lessons = images.data, images.judged_on, images.lessons

    # recordings, effects on the output, candidates; again from where each part of the way ended
    teacher = None
    if recovery is not None and lessons is not None:
        teacher = functools.cache(
            lambda: Teacher(load_model(model), lessons, recovery, target.runtime, progress)
        )

    plans_in_int8 = timing and quantization is not None and quantization.precision == "int8"
    left_out = ALL

    def begin_from(start: Start | None) -> tuple[Prepared, Paced | None]:
        nonlocal left_out
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
            start=start,
        )
        if paced is None or not plans_in_int8:
            return prepared, paced
        if start is None:  # once: what is slow in int8 is so in all parts
            with clock.stage("time plans in int8"):
                left_out = slow_in_int8(prepared, paced, progress)
        return prepared, without(paced, left_out.families)

    prepared, paced, parts, on_the_way = go_on_from_parts(
        begin_from,
        budget,
        recovery,
        solver=solver,
        runtime=target.runtime,
        teacher=teacher,
        checkpoint=lambda part: checkpoint_of(out, part),
        progress=progress,
        clock=clock,
    )

    # one plan is carried out for a budget, or two where time runs short or layers were put back; several
    # for a tolerance
    searched = None
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
    else:
        assert budget is not None, "a budget is given where no tolerance is"
        done = meet(prepared, paced, budget, solver, progress, clock)
    with clock.stage("predict the front"):
        front = [point for _, point in predicted_front(prepared, paced, read=False)]

    with clock.stage("finish"):
        _check_result(done.model, prepared, target, out)
        source_digest = model_digest(model)
        if done.replaced:  # otherwise it is the original, which is written as it is
            mark(done.model, source_digest, done.layers)
        save_model(done.model, out)

    def drop_now(changed: onnx.ModelProto) -> Drop:
        assert judged_on is not None, "set apart for a tolerance"
        return measure_drop(
            model, changed, judged_on, target.runtime, batch=calibration.batch, progress=progress
        )

    # the written model stays what it is until a better one is there
    recovered, as_converted = None, tuple[str, ...]()
    if teacher is not None and done.replaced:
        with clock.stage("recover"):
            recovered, as_converted = _recovered(
                teacher, done.model, shares_of(parts)[-1], checkpoint_of(out), progress
            )
            if recovered is not None and recovered.improved and tolerance is not None:
                recovered = _still_within(
                    tolerance, recovered, drop_now(recovered.model), done.model
                )
            if recovered is not None and recovered.improved:
                save_model(recovered.model, out)

    # the model is there, whatever comes of this
    answers: Answers | None = None
    answered: tuple[str, ...] = ()
    if done.replaced:
        with clock.stage("compare answers"), progress.stage("compare answers", 1):
            prepared.recorder.forget()
            answers, answered = _compared(
                model,
                done.model if recovered is None else recovered.model,
                data,
                target.runtime,
                prepared.cost.macs,
            )
        if tolerance is None:
            answered += _far_off(answers, None if recovered is None else recovery)

    # a quantized model takes its place; last, since nothing can be fitted or trained any more
    quantized, in_float = None, tuple[str, ...]()
    if quantization is not None:
        with clock.stage("quantize"):
            given = done.model if recovered is None else recovered.model
            quantized, in_float = _quantized(
                *(model, given, data, quantization, target, out), timing=timing, progress=progress
            )
            if quantized is not None and quantized.shipped and tolerance is not None:
                quantized = _within(tolerance, quantized, drop_now(quantized.model), given)
            if quantized is not None and quantized.shipped:
                mark(quantized.model, source_digest, done.layers)
                save_model(quantized.model, out)

    # what was learned is needed until the last model is there: a run may be cut off before, and the next one
    # may be able to learn what this one was not
    if recovery is not None and not as_converted:
        # an earlier run may have measured two parts where this has one, or a part may have failed
        for part in range(max(parts + 1, 2)):
            checkpoint_of(out, part).unlink(missing_ok=True)

    measured = () if paced is None else paced.model.notes
    kept_notes = () if kept is None else kept.notes
    return Conversion(
        source=model,
        out=out,
        macs_before=prepared.cost.macs,
        macs_after=done.cost.macs,
        params_before=prepared.cost.params,
        params_after=done.cost.params,
        layers=done.layers,
        passes=(*prepared.passes, *done.passes),
        latency=done.latency,
        stages=clock.stages(),
        notes=_each_once(
            *on_the_way,
            *prepared.notes,
            *prepared.recorder.notes,
            *measured,
            *left_out.notes,
            *done.notes,
            *(() if recovered is None else recovered.notes),
            *as_converted,
            *answered,
            *in_float,
            *kept_notes,
        ),
        settings={
            "budget": _plain(budget),
            "preprocessing": _plain(preprocessing),
            "calibration": _plain(calibration),
            "solver": _plain(solver),
            "target": _plain(target),
            "recovery": _plain(recovery),
            "quantization": _plain(quantization),
            "timing": timing,
            "max_drop": None if tolerance is None else tolerance.max_drop,
        },
        calibration={
            "data": data.describe(),
            "digest": data.digest(),
            **prepared.recorder.describe(),
            "val": _described(judged_on),
            "recover_images": _described(lessons),
        },
        machine=machine(),
        source_digest=source_digest,
        out_digest=model_digest(out),
        peak_memory_mib=peak_memory_mib(),
        search=searched,
        recovery=None if recovered is None else recovered.to_dict(),
        quantization=None if quantized is None else quantized.to_dict(),
        front=tuple(front),
        planned=predicted_point(prepared, paced, done.choice),
        answers=answers,
    )


@dataclass(frozen=True)
class _Images:
    """What a conversion sees.

    Attributes
    ----------
    data : CalibrationSet
        What it is calibrated on.
    judged_on : CalibrationSet or None
        What a tolerance is judged on; none of `data` is among them.
    lessons : CalibrationSet or None
        What a recovery learns from.
    """

    data: CalibrationSet
    judged_on: CalibrationSet | None
    lessons: CalibrationSet | None


def _opened(
    model: Path,
    calib: Source,
    recover_images: Source | None,
    *,
    tolerance: Tolerance | None,
    preprocessing: Preprocessing,
    calibration: CalibrationSettings,
    target: Target,
    recovery: RecoverySettings | None,
    quantization: QuantizationSettings | None,
) -> _Images:
    """Open all images, and refuse at once what could not be done with the model or with them later on."""
    source = load_model(model)
    inputs = model_inputs(source, label=str(model))
    if quantization is not None:
        require_quantizable(source, model, quantization, target.runtime)
    lessons = None
    if recovery is not None:
        own = recover_images is None or _same_source(recover_images, calib)
        calib, learned_from = _read_once(calib, recover_images, inputs, preprocessing)
        lessons = open_calibration_set(learned_from, inputs, preprocessing, labels=recovery.labels)
        if own and tolerance is not None and tolerance.evaluation.source is None:
            # what is judged on is some of these images then, and nothing is learned from it
            lessons = not_judged_on(lessons, min(calibration.images or len(lessons), len(lessons)))
        # as it will be converted: what the exporter left in nodes is a weight then
        require_recoverable(normalised_model(source, model), lessons, recovery)
    data = open_calibration_set(calib, inputs, preprocessing, images=calibration.images)
    judged_on = None
    if tolerance is not None:
        data, judged_on = set_apart(data, tolerance.evaluation, inputs, preprocessing)
    if quantization is not None:
        images_to_see(data, quantization)
    return _Images(data, judged_on, lessons)


def _same_source(first: Source, second: Source) -> bool:
    if isinstance(first, Path) and isinstance(second, Path):
        return first.resolve() == second.resolve()
    return first is second


def _each_once(*notes: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(notes))


def _plain(settings: Any) -> dict[str, Any] | None:
    return None if settings is None else dataclasses.asdict(settings)


def _read_once(
    calib: Source, others: Source | None, inputs: Sequence[ModelInput], preprocessing: Preprocessing
) -> tuple[Source, Source]:
    """Give where images come from to calibrate, and to learn; a reader for both may not start again."""
    if isinstance(calib, Path) or others not in (None, calib):
        return calib, calib if others is None else others
    opened = open_calibration_set(calib, inputs, preprocessing)
    return opened, opened


def _still_within(
    tolerance: Tolerance, recovered: Recovered, drop: Drop, given: onnx.ModelProto
) -> Recovered:
    """Take back what was learned where it loses more than is tolerated: it follows other answers then."""
    if drop.points <= tolerance.max_drop:
        return recovered
    note = (
        f"the recovered model loses {drop}, more than --max-drop {tolerance.max_drop:g}, so the one before "
        "was written"
    )
    return dataclasses.replace(
        recovered,
        model=given,
        improved=False,
        after=recovered.before,
        notes=(*recovered.notes, note),
    )


def _within(
    tolerance: Tolerance, quantized: Quantized, drop: Drop, given: onnx.ModelProto
) -> Quantized:
    """Take back a quantized model that loses more than is tolerated."""
    if drop.points <= tolerance.max_drop:
        return quantized
    return quantized.withheld(
        given,
        f"the quantized model loses {drop}, more than --max-drop {tolerance.max_drop:g}, so the float one "
        "was written",
    )


def _described(images: CalibrationSet | None) -> dict[str, str] | None:
    return None if images is None else {"data": images.describe(), "digest": images.digest()}


def _check_result(model: onnx.ModelProto, prepared: Prepared, target: Target, out: Path) -> None:
    """Refuse to write a model that onnxruntime does not load, or that answers with NaN."""
    session = open_session(model, target.runtime, label="the converted model")
    answers = run(session, None, prepared.sample, label="the converted model")
    if not all(np.isfinite(each).all() for each in answers if each.dtype.kind == "f"):
        raise SolverError(
            f"the converted model answers with NaN or infinity, so {out} was not written"
        )


def _compared(
    original: Path, converted: onnx.ModelProto, data: CalibrationSet, runtime: Runtime, macs: int
) -> tuple[Answers | None, tuple[str, ...]]:
    """Compare the answers, or say why that is not possible."""
    try:
        return compare_answers(original, converted, data, runtime, macs), ()
    except ConverterError as error:
        return None, (f"how far the answers are off is not known: {error}",)


def _recovered(
    teacher: Callable[[], Teacher],
    given: onnx.ModelProto,
    share: float,
    checkpoint: Path,
    progress: Progress,
) -> tuple[Recovered | None, tuple[str, ...]]:
    """Let the model learn, or say why that is not possible: the one that was converted is there."""
    try:
        return teacher().teach(given, share=share, checkpoint=checkpoint, progress=progress), ()
    except ConverterError as error:
        return None, (f"the model could not be recovered, and stays as it was converted: {error}",)


def _quantized(
    original: Path,
    given: onnx.ModelProto,
    data: CalibrationSet,
    settings: QuantizationSettings,
    target: Target,
    out: Path,
    *,
    timing: bool,
    progress: Progress,
) -> tuple[Quantized | None, tuple[str, ...]]:
    """Quantize, or say why that is not possible: the model in float is there."""
    source = load_model(original)
    try:
        found = quantize(
            *(source, given, data, settings, target), path=out, timing=timing, progress=progress
        )
        return found, ()
    except (ModelError, CalibrationError, SolverError) as error:
        return None, (f"the model could not be quantized, and stays in float32: {error}",)


def _far_off(answers: Answers | None, recovery: RecoverySettings | None) -> tuple[str, ...]:
    """Warn of answers that are another network's, unless they were to be."""
    follows_others = recovery is not None and (recovery.mirrored or recovery.labels)
    if answers is None or answers.error < FAR_OFF or follows_others:
        return ()
    how = "--recover" if recovery is None else "a longer --recover"
    off = f"{100 * answers.error:.0f} %" if math.isfinite(answers.error) else "far beyond"
    return (
        f"the squared error of the answers is {off} of their variance between images: ask for less, let "
        f"--max-drop find what is possible, or let the model learn with {how}",
    )


def peak_memory_mib() -> float:
    """Highest resident memory of this program so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / 1024

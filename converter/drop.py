"""What a converted model has lost, on images that no layer was fitted on."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from converter.calibration.opening import open_calibration_set
from converter.calibration.samples import spread
from converter.calibration.sets import CalibrationSet, DataReader, ModelInput
from converter.calibration.subset import Subset
from converter.config import Preprocessing, Runtime
from converter.errors import CalibrationError
from converter.outcome import Drop
from converter.progress import Progress
from converter.validation.findings import Validation
from converter.validation.pipeline import OtherShapesError, validate

__all__ = [
    "HELD_BACK_EVERY",
    "Evaluation",
    "drop_of",
    "held_back",
    "measure_drop",
    "not_judged_on",
    "set_apart",
]

HELD_BACK_EVERY = 5
"""Without images to validate on, every fifth one of the calibration set is kept from the fits."""


@dataclass(frozen=True)
class Evaluation:
    """Where the images to validate on come from.

    Attributes
    ----------
    source : Path, DataReader, CalibrationSet or None, default None
        As for `open_calibration_set`; None holds back every fifth calibration image.
    labels : bool, default False
        Whether its subfolders are classes.
    """

    source: Path | DataReader | CalibrationSet | None = None
    labels: bool = False


class _Rest(Subset):
    """All samples of a set but some, given by their positions."""

    def __init__(self, whole: CalibrationSet, taken: Collection[int]) -> None:
        super().__init__(whole, 1)
        self._chosen = [row for row in range(len(whole)) if row not in taken]


def set_apart(
    data: CalibrationSet,
    evaluation: Evaluation,
    inputs: Sequence[ModelInput],
    preprocessing: Preprocessing,
) -> tuple[CalibrationSet, CalibrationSet]:
    """Give the images to fit on, and those to judge on; the same ones every time.

    Parameters
    ----------
    data : CalibrationSet
        All calibration images.
    evaluation : Evaluation
    inputs : sequence of ModelInput
        What the model takes.
    preprocessing : Preprocessing

    Raises
    ------
    CalibrationError
        Where the images to validate on cannot be read or do not fit the model, or where there are too
        few calibration images to hold some back.
    """
    if evaluation.source is not None:
        return data, open_calibration_set(
            evaluation.source, inputs, preprocessing, labels=evaluation.labels
        )
    count = len(data) // HELD_BACK_EVERY
    if count < 1:
        raise CalibrationError(
            f"{data.describe()} are too few to hold every fifth one back for validation; "
            "give more, or others with --val"
        )
    return held_back(data, count)


def held_back(data: CalibrationSet, count: int) -> tuple[CalibrationSet, CalibrationSet]:
    """Part a set into what is left and `count` samples, spread evenly; the same ones every time."""
    return _Rest(data, set(spread(len(data), count))), Subset(data, count)


def not_judged_on(whole: CalibrationSet, used: int) -> CalibrationSet:
    """Give all samples but those that `set_apart` judges on, where `used` of them are calibrated on."""
    calibrated_on = spread(len(whole), used)
    judged = spread(len(calibrated_on), len(calibrated_on) // HELD_BACK_EVERY)
    return _Rest(whole, {calibrated_on[position] for position in judged})


def measure_drop(
    original: onnx.ModelProto | Path,
    converted: onnx.ModelProto,
    data: CalibrationSet,
    runtime: Runtime,
    *,
    batch: int,
    progress: Progress,
) -> Drop:
    """Run both models on the same images, and say what the converted one has lost.

    Parameters
    ----------
    original : onnx.ModelProto or Path
    converted : onnx.ModelProto
    data : CalibrationSet
        With labels for accuracy.
    runtime : Runtime
    batch : int
        Images that run at once; a model with a fixed batch overrides it.
    progress : Progress

    Raises
    ------
    ValidationError, ModelError, CalibrationError, ConfigError
        As `converter.validation.pipeline.validate`.
    """
    with progress.stage("compare with the original", len(data)) as advance:
        seen = 0

        def count(done: int, total: int) -> None:
            nonlocal seen
            del total
            advance(done - seen)
            seen = done

        try:
            found = validate(
                original,
                converted,
                data,
                runtime,
                batch=batch,
                time_batches=(),
                worst=0,
                progress=count,
            )
        except OtherShapesError:  # as far off as can be
            return Drop("output error", math.inf, None, len(data))
        return drop_of(found)


def drop_of(validation: Validation) -> Drop:
    """Read the drop off a comparison: accuracy before agreement, agreement before output error.

    An accuracy that is no better than chance would stay so, whatever became of the model, and is passed over.
    """
    finite, accuracy = validation.finite, validation.accuracy
    if accuracy is not None and not accuracy.by_chance:
        points = accuracy.drop_points if finite else math.inf
        return Drop(
            "accuracy", points, accuracy.standard_error_points, accuracy.images, validation.notes
        )
    count, notes = validation.images, validation.notes
    if validation.agreement is not None:
        # from the count: one image of a hundred is one point, and not a little more
        other = round((1.0 - validation.agreement.top1) * count) / count
        # one image at least: that none of a few differs says little
        error = 100.0 * max(math.sqrt(other * (1.0 - other) / count), 1.0 / count)
        return Drop("agreement", 100.0 * other if finite else math.inf, error, count, notes)
    errors = [each.relative_l2 for each in validation.outputs]
    known = [math.inf if error is None else error for error in errors]
    error = 100.0 * max(known, default=0.0) if finite else math.inf
    return Drop("output error", error, None, count, notes)

"""Two models and images to what there is to say: images stream through both, then both are timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from converter.calibration.sets import Batch, CalibrationSet, fixed_batch, padded
from converter.config import Runtime
from converter.errors import CalibrationError, ConfigError, ValidationError
from converter.latency import CLOSE, OPENINGS, measure_latency, speedup
from converter.model_file import EXTERNAL_ABOVE, load_model, model_digest
from converter.planner.cost import count_cost
from converter.runtime import open_session, run, weight_bytes
from converter.validation.findings import Latency, Size, Validation
from converter.validation.interface import common_interface
from converter.validation.meters import Array, Comparison
from converter.worst import WORST

__all__ = ["OtherShapesError", "validate"]


class OtherShapesError(ValidationError):
    """Two models answer an image with other shapes, as detectors do that list what they find."""


def validate(
    original: Path | onnx.ModelProto,
    converted: Path | onnx.ModelProto,
    data: CalibrationSet,
    runtime: Runtime,
    *,
    batch: int = 32,
    time_batches: Sequence[int] = (1, 32),
    seconds: float = 2.0,
    spinning: bool = True,
    worst: int = WORST,
    progress: Callable[[int, int], None] | None = None,
) -> Validation:
    """Compare two models under onnxruntime.

    Parameters
    ----------
    original, converted : Path or onnx.ModelProto
        Their inputs and outputs must have the same names, types and shapes; where one has a fixed
        size and the other a free one, the fixed one is fed.
    data : CalibrationSet
        What both run on, once; with labels for accuracy.
    runtime : Runtime
        Provider and threads.
    batch : int, default 32
        Images that run at once, from 1; a model with a fixed batch overrides it.
    time_batches : sequence of int, default (1, 32)
        Batch sizes to time, each from 1; those that a fixed batch rules out are skipped, and the
        result says so.
    seconds : float, default 2.0
        Timed seconds for each model and batch size, above 0.
    spinning : bool, default True
        How `converter.latency.measure_latency` treats idle threads.
    worst : int, default WORST
        How many of the images that they answer most differently to keep, from 0.
    progress : callable or None, default None
        Called with the images done and their number after each batch.

    Raises
    ------
    ValidationError
        Where the inputs or outputs of the two differ.
    ModelError, CalibrationError, ConfigError
        Where a model or the images cannot be used.
    """
    if min((batch, *time_batches)) < 1:
        raise ConfigError("a batch has fewer than 1 image; give batch sizes from 1")
    labels = tuple(
        str(model) if isinstance(model, Path) else f"the {role} model"
        for model, role in ((original, "original"), (converted, "converted"))
    )
    models = tuple(
        load_model(model) if isinstance(model, Path) else model for model in (original, converted)
    )
    inputs, names = common_interface(models, labels)
    forced = fixed_batch(inputs)
    comparison = Comparison(names, worst)
    _compare(comparison, models, labels, data, runtime, forced or batch, forced, progress)
    first = next(iter(data.batches(1)))
    sizes = tuple(
        _size(model, _resized(first, forced or 1), label, source)
        for model, label, source in zip(models, labels, (original, converted), strict=True)
    )
    named = data.class_names
    return Validation(
        images=comparison.images,
        outputs=tuple(meter.result() for meter in comparison.meters),
        agreement=comparison.agreement(),
        accuracy=comparison.accuracy(),
        latencies=tuple(
            _latency(models, data, runtime, size, forced, seconds, spinning=spinning)
            for size in time_batches
        ),
        original=sizes[0],
        converted=sizes[1],
        notes=(*comparison.notes, *comparison.doubts()),
        data=data.describe(),
        class_names=named if named and len(named) == comparison.classes else None,
        worst=comparison.worst.images(data),
    )


def _compare(
    comparison: Comparison,
    models: Sequence[onnx.ModelProto],
    labels: Sequence[str],
    data: CalibrationSet,
    runtime: Runtime,
    size: int,
    forced: int | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    # They take turns, so the idle threads of one must not take the cores from the other.
    sessions = [
        open_session(model, runtime, spinning=False, label=label)
        for model, label in zip(models, labels, strict=True)
    ]
    names = [meter.name for meter in comparison.meters]
    total = len(data)
    for given in data.batches(size):
        fed = padded(given, forced) if forced else given
        results = [
            run(session, names, fed.feeds, label=label)
            for session, label in zip(sessions, labels, strict=True)
        ]
        pairs = [
            _real_rows(one, other, fed, name)
            for one, other, name in zip(*results, names, strict=True)
        ]
        if not comparison.images:
            comparison.choose_scores([one for one, _ in pairs], given.count)
        comparison.add(pairs, given.count, _usable_labels(given, data, comparison))
        if progress is not None:
            progress(comparison.images, total)
    if not comparison.images:
        raise CalibrationError("the data to validate on is empty; give at least one image")


def _real_rows(one: Array, other: Array, fed: Batch, name: str) -> tuple[Array, Array]:
    """Leave out the rows that only fill a fixed batch."""
    if one.shape != other.shape:
        raise OtherShapesError(
            f"output '{name}' has shape {list(one.shape)} in the original and {list(other.shape)} "
            "in the converted model; compare two forms of one model"
        )
    if one.dtype.kind not in "biuf":
        raise ValidationError(
            f"output '{name}' holds {one.dtype} values; compare models whose outputs are numbers"
        )
    filled = next(len(feed) for feed in fed.feeds.values())
    if fed.count < filled and one.ndim and len(one) == filled:
        return one[: fed.count], other[: fed.count]
    return one, other


def _usable_labels(given: Batch, data: CalibrationSet, comparison: Comparison) -> Array | None:
    """Return the labels of the real images; a note says where they are no classes of the model."""
    if given.labels is None or comparison.scores is None:
        return None
    names, classes = data.class_names, comparison.classes
    if names is not None and len(names) != classes:
        note = (
            f"the images have {len(names)} classes and output '{comparison.scores}' has {classes}, "
            "so accuracy is left out"
        )
        if note not in comparison.notes:
            comparison.notes.append(note)
        return None
    found = given.labels[: given.count]
    if found.min() < 0 or found.max() >= classes:
        raise CalibrationError(
            f"the labels go from {int(found.min())} to {int(found.max())}, and output "
            f"'{comparison.scores}' has the classes 0 to {classes - 1}; correct the labels"
        )
    return found


def _size(
    model: onnx.ModelProto, feeds: Mapping[str, Array], label: str, source: Path | onnx.ModelProto
) -> Size:
    cost = count_cost(model, feeds, label=label)
    weights = weight_bytes(model.graph)  # beyond the limit, protobuf cannot tell the whole
    size = weights if weights > EXTERNAL_ABOVE else model.ByteSize()
    file = source if isinstance(source, Path) else None
    return Size(
        bytes=size,
        params=cost.params,
        macs=cost.macs,
        uncounted=cost.uncounted,
        file=None if file is None else str(file),
        digest=None if file is None else model_digest(file),
    )


def _resized(given: Batch, size: int) -> dict[str, Array]:
    """Return feeds of exactly `size` samples, repeated where there are fewer."""
    return {name: np.resize(feed, (size, *feed.shape[1:])) for name, feed in given.feeds.items()}


def _latency(
    models: Sequence[onnx.ModelProto],
    data: CalibrationSet,
    runtime: Runtime,
    size: int,
    forced: int | None,
    seconds: float,
    *,
    spinning: bool,
) -> Latency:
    if forced is not None and size != forced:
        return Latency(size, skipped=f"the model has a fixed batch of {forced}")
    feeds = _resized(next(iter(data.batches(size))), size)
    before, after = models
    timings = measure_latency(
        {"original": before, "converted": after},
        feeds,
        runtime,
        seconds=seconds,
        openings=OPENINGS,
        within=CLOSE,
        spinning=spinning,
    )
    original, converted = timings["original"], timings["converted"]
    return Latency(size, original, converted, speedup(original, converted))

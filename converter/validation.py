"""Original against converted under onnxruntime: error, agreement, accuracy, latency, size, cost.

Images stream through both models batch by batch. Sums, maxima and counts are exact over all of
them. Medians and quantiles are exact up to `SAMPLE` elements of an output; beyond that they come
from a uniform random sample of so many, so memory stays bounded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from converter.calibration.sets import Batch, CalibrationSet, ModelInput, fixed_batch, padded
from converter.config import Runtime
from converter.errors import CalibrationError, ConfigError, ValidationError
from converter.latency import CLOSE, OPENINGS, Speedup, Timing, measure_latency, speedup
from converter.model_file import EXTERNAL_ABOVE, file_digest, load_model
from converter.planner.cost import count_cost
from converter.runtime import declared_shape, model_inputs, open_session, run, weight_bytes
from converter.worst import WORST, Worst, WorstImage

__all__ = [
    "Accuracy",
    "Agreement",
    "Latency",
    "OutputComparison",
    "Size",
    "Validation",
    "common_interface",
    "validate",
]

SAMPLE = 2**20
"""Elements of each output that are kept for quantiles."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class OutputComparison:
    """How far one output of the converted model is from the original's, over all images.

    Errors are taken over the elements that are finite in both; None where there are none.

    Attributes
    ----------
    name : str
    elements : int
        Elements compared, over all images.
    max_abs, mean_abs, median_abs, p99_abs : float or None
        Of |converted − original|.
    span : float or None
        Largest minus smallest element of the original.
    max_relative : float or None
        `max_abs` over `span`; 0 where both are 0, None where only `span` is.
    relative_l2 : float or None
        ‖converted − original‖ / ‖original‖; as `max_relative` where that is 0.
    tolerance : float or None
        The t that would have been enough in |converted − original| ≤ t + t·|original|.
    sampled : int or None
        Elements that the median and the quantile were taken from, where not all of them.
    nonfinite_original, nonfinite_converted : int
        Elements that are NaN or infinite.
    """

    name: str
    elements: int
    max_abs: float | None
    mean_abs: float | None
    median_abs: float | None
    p99_abs: float | None
    span: float | None
    max_relative: float | None
    relative_l2: float | None
    tolerance: float | None
    sampled: int | None
    nonfinite_original: int
    nonfinite_converted: int


@dataclass(frozen=True)
class Agreement:
    """How often the two models answer alike, from 0 to 1, without labels.

    Attributes
    ----------
    output : str
        The output that was taken for the scores of classes.
    top1 : float
        Share of images with the same best class. An image with a non-finite score never agrees.
    top5 : float or None
        Share of images whose best class in the original is among the five best of the converted
        model; None with five classes or fewer.
    """

    output: str
    top1: float
    top5: float | None


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy of both models on the labelled images.

    An image with a non-finite score counts as wrong.

    Attributes
    ----------
    images : int
    original, converted : float
        Share of right answers, from 0 to 1.
    drop_points : float
        Original minus converted, in percentage points; negative where the converted model is
        better.
    standard_error_points : float
        Standard error of `drop_points`, in percentage points, from the images that only one model
        gets right (as in McNemar's test, 1947): √(b + c − (b − c)²/n) / n for b lost and c won
        images of n.
    lost, won : int
        Images that only the original, and only the converted model gets right.
    """

    images: int
    original: float
    converted: float
    drop_points: float
    standard_error_points: float
    lost: int
    won: int


@dataclass(frozen=True)
class Latency:
    """Time for one batch size: both models measured in turns, or the reason why they were not."""

    batch: int
    original: Timing | None = None
    converted: Timing | None = None
    speedup: Speedup | None = None
    skipped: str | None = None


@dataclass(frozen=True)
class Size:
    """What one model weighs.

    Attributes
    ----------
    bytes : int
        Size of the model in one file, its external data within; of the weights alone over 2 GiB.
    params : int
        Parameters, as `converter.planner.cost` counts them.
    macs : int
        Multiply-accumulates of one sample, likewise.
    uncounted : tuple of str
        Layers inside If, Loop or Scan that `macs` misses.
    file, digest : str or None, default None
        The model's file and its SHA-256; None for a model that came from none.
    """

    bytes: int
    params: int
    macs: int
    uncounted: tuple[str, ...]
    file: str | None = None
    digest: str | None = None


@dataclass(frozen=True)
class Validation:
    """What a conversion gained and cost.

    Attributes
    ----------
    images : int
        Images that both models saw.
    outputs : tuple of OutputComparison
        One for each output, in the original's order.
    agreement : Agreement or None
        None where no output looks like scores of classes.
    accuracy : Accuracy or None
        None where there are no labels or they do not fit the model.
    latencies : tuple of Latency
        One for each batch size that was asked for.
    original, converted : Size
    notes : tuple of str
        What was left out and why, one sentence each.
    data : str, default ""
        What the images are and where they come from.
    class_names : tuple of str or None, default None
        Names of the classes by number, where the images name one for each score.
    worst : tuple of WorstImage, default ()
        Images that they answer most differently, the worst first; () without scores of classes.
    """

    images: int
    outputs: tuple[OutputComparison, ...]
    agreement: Agreement | None
    accuracy: Accuracy | None
    latencies: tuple[Latency, ...]
    original: Size
    converted: Size
    notes: tuple[str, ...] = ()
    data: str = ""
    class_names: tuple[str, ...] | None = None
    worst: tuple[WorstImage, ...] = ()
    format: str = field(default="twofold-validation-1")

    @property
    def macs_reduction(self) -> float | None:
        """Original multiply-accumulates over converted ones; None where there are none left."""
        return _ratio(self.original.macs, self.converted.macs)

    @property
    def params_reduction(self) -> float | None:
        """Original parameters over converted ones; None where there are none left."""
        return _ratio(self.original.params, self.converted.params)

    @property
    def bytes_reduction(self) -> float | None:
        """Original size over converted size."""
        return _ratio(self.original.bytes, self.converted.bytes)

    @property
    def finite(self) -> bool:
        """Whether no output of the converted model has more non-finite elements than before."""
        return all(each.nonfinite_converted <= each.nonfinite_original for each in self.outputs)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists, strings, numbers and None, fit for JSON."""
        plain = dataclasses.asdict(self)
        plain["macs_reduction"] = self.macs_reduction
        plain["params_reduction"] = self.params_reduction
        plain["bytes_reduction"] = self.bytes_reduction
        plain["finite"] = self.finite
        return plain


def _ratio(before: float, after: float) -> float | None:
    return before / after if after else None


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
    comparison = _Comparison(names, worst)
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
        notes=tuple(comparison.notes),
        data=data.describe(),
        class_names=named if named and len(named) == comparison.classes else None,
        worst=comparison.worst.images(data),
    )


# ---- the two models' interfaces


def common_interface(
    models: Sequence[onnx.ModelProto], labels: Sequence[str]
) -> tuple[tuple[ModelInput, ...], tuple[str, ...]]:
    """Give the inputs that two models share, and the names of their outputs.

    Parameters
    ----------
    models : sequence of onnx.ModelProto
    labels : sequence of str
        What messages call them.

    Raises
    ------
    ValidationError
        Where inputs or outputs differ in name, type or a fixed size.
    """
    return _common_inputs(models, labels), _common_outputs(models, labels)


def _common_inputs(
    models: Sequence[onnx.ModelProto], labels: Sequence[str]
) -> tuple[ModelInput, ...]:
    first, second = (
        {each.name: each for each in model_inputs(model, label=label)}
        for model, label in zip(models, labels, strict=True)
    )
    _same_names("input", first, second, labels)
    common = []
    for name, mine in first.items():
        other = second[name]
        if mine.dtype != other.dtype or not _shapes_meet(mine.shape, other.shape):
            raise ValidationError(
                f"input '{name}' is {mine.dtype} {list(mine.shape)} in {labels[0]} but "
                f"{other.dtype} {list(other.shape)} in {labels[1]}; compare two forms of one model"
            )
        shape = tuple(
            b if isinstance(b, int) else a for a, b in zip(mine.shape, other.shape, strict=True)
        )
        common.append(ModelInput(name, shape, mine.dtype))
    return tuple(common)


def _common_outputs(models: Sequence[onnx.ModelProto], labels: Sequence[str]) -> tuple[str, ...]:
    first, second = ({value.name: value.type for value in model.graph.output} for model in models)
    _same_names("output", first, second, labels)
    for name, mine in first.items():
        other = second[name]
        kinds = [kind.tensor_type.elem_type for kind in (mine, other)]
        shapes = [declared_shape(kind) for kind in (mine, other)]
        known = [shape for shape in shapes if shape is not None]
        if kinds[0] != kinds[1] or (len(known) == 2 and not _shapes_meet(*known)):
            types = [onnx.TensorProto.DataType.Name(kind).lower() for kind in kinds]
            raise ValidationError(
                f"output '{name}' is {types[0]} {list(shapes[0] or ())} in {labels[0]} but "
                f"{types[1]} {list(shapes[1] or ())} in {labels[1]}; "
                "compare two forms of one model"
            )
    return tuple(first)


def _same_names(
    kind: str, first: Mapping[str, object], second: Mapping[str, object], labels: Sequence[str]
) -> None:
    for here, there, label in ((first, second, labels[1]), (second, first, labels[0])):
        missing = sorted(here.keys() - there.keys())
        if missing:
            raise ValidationError(
                f"{label} has no {kind} '{missing[0]}'; compare two forms of one model"
            )


def _shapes_meet(one: Sequence[int | str | None], other: Sequence[int | str | None]) -> bool:
    """Whether two declared shapes can be one: equal ranks, and equal sizes where both are fixed."""
    return len(one) == len(other) and all(
        a == b or not isinstance(a, int) or not isinstance(b, int)
        for a, b in zip(one, other, strict=True)
    )


# ---- what the outputs say


class _Meter:
    """Running comparison of one output."""

    def __init__(self, name: str, sample: int = SAMPLE) -> None:
        self.name = name
        self.elements = 0
        self.finite = 0
        self.nonfinite = [0, 0]
        self.highest = -math.inf
        self.lowest = math.inf
        self.max_abs = 0.0
        self.sum_abs = 0.0
        self.sum_squares = 0.0
        self.sum_original = 0.0
        self.tolerance = 0.0
        self._sample = sample
        self._random = np.random.default_rng(0)
        self._errors: Array = np.empty(0)
        self._keys: Array = np.empty(0)

    def add(self, original: Array, converted: Array) -> None:
        """Take in one batch; the arrays have the same shape."""
        for start in range(0, original.size, SAMPLE):
            part = slice(start, start + SAMPLE)
            self._add(
                original.ravel()[part].astype(np.float64),
                converted.ravel()[part].astype(np.float64),
            )

    def _add(self, first: Array, second: Array) -> None:
        good = np.isfinite(first) & np.isfinite(second)
        self.elements += first.size
        self.finite += int(good.sum())
        self.nonfinite[0] += int((~np.isfinite(first)).sum())
        self.nonfinite[1] += int((~np.isfinite(second)).sum())
        first, second = first[good], second[good]
        if not first.size:
            return
        errors = np.abs(second - first)
        self.highest = max(self.highest, float(first.max()))
        self.lowest = min(self.lowest, float(first.min()))
        self.max_abs = max(self.max_abs, float(errors.max()))
        self.sum_abs += float(errors.sum())
        self.sum_squares += float(errors @ errors)
        self.sum_original += float(first @ first)
        self.tolerance = max(self.tolerance, float((errors / (1.0 + np.abs(first))).max()))
        self._keep(errors)

    def _keep(self, errors: Array) -> None:
        """Keep the elements with the smallest random keys: a uniform sample without replacement."""
        self._errors = np.concatenate((self._errors, errors))
        self._keys = np.concatenate((self._keys, self._random.random(errors.size)))
        if self._errors.size > self._sample:
            kept = np.argpartition(self._keys, self._sample)[: self._sample]
            self._errors, self._keys = self._errors[kept], self._keys[kept]

    def result(self) -> OutputComparison:
        """Return what was seen so far."""
        span = self.highest - self.lowest
        any_finite = self.finite > 0
        return OutputComparison(
            name=self.name,
            elements=self.elements,
            max_abs=self.max_abs if any_finite else None,
            mean_abs=self.sum_abs / self.finite if any_finite else None,
            median_abs=float(np.median(self._errors)) if any_finite else None,
            p99_abs=float(np.quantile(self._errors, 0.99)) if any_finite else None,
            span=span if any_finite else None,
            max_relative=_relative(self.max_abs, span) if any_finite else None,
            relative_l2=_relative(math.sqrt(self.sum_squares), math.sqrt(self.sum_original))
            if any_finite
            else None,
            tolerance=self.tolerance if any_finite else None,
            sampled=self._errors.size if self._errors.size < self.finite else None,
            nonfinite_original=self.nonfinite[0],
            nonfinite_converted=self.nonfinite[1],
        )


def _relative(error: float, size: float) -> float | None:
    if size > 0:
        return error / size
    return 0.0 if error == 0 else None


class _Comparison:
    """Running comparison of all outputs, and of the classes where one output holds scores."""

    def __init__(self, names: Sequence[str], worst: int) -> None:
        self.meters = [_Meter(name) for name in names]
        self.worst = Worst(worst)
        self.images = 0
        self.notes: list[str] = []
        self.scores: str | None = None
        self.classes = 0
        self._alike = 0
        self._alike_five = 0
        self._labelled = 0
        self._right = [0, 0]
        self._lost = 0
        self._won = 0

    def choose_scores(self, outputs: Sequence[Array], count: int) -> None:
        """Take the first float output of shape (batch, classes ≥ 2) for scores.

        Trailing axes of length 1 are left aside.
        """
        for meter, output in zip(self.meters, outputs, strict=True):
            flat = _flat(output)
            scored = flat.ndim == 2 and len(flat) == count and flat.shape[1] > 1
            if scored and flat.dtype.kind == "f":
                self.scores, self.classes = meter.name, flat.shape[1]
                return
        self.notes.append(
            "no output has one score for each class, so agreement and accuracy are left out"
        )

    def add(self, pairs: Sequence[tuple[Array, Array]], count: int, labels: Array | None) -> None:
        """Take in one batch of `count` images.

        `pairs` are the outputs of both models; `labels` has shape (count,), or is None.
        """
        self.images += count
        for meter, (first, second) in zip(self.meters, pairs, strict=True):
            meter.add(first, second)
            if meter.name == self.scores:
                self._add_scores(_flat(first), _flat(second), labels)

    def _add_scores(self, first: Array, second: Array, labels: Array | None) -> None:
        best = _best(first), _best(second)
        self.worst.add((first, second), best, labels)
        sound = (best[0] >= 0) & (best[1] >= 0)
        self._alike += int((sound & (best[0] == best[1])).sum())
        if self.classes > 5:
            five = np.argsort(-second, axis=1, kind="stable")[:, :5]
            self._alike_five += int((sound & (five == best[0][:, None]).any(axis=1)).sum())
        if labels is not None:
            right = [answers == labels for answers in best]
            self._labelled += len(labels)
            for model in (0, 1):
                self._right[model] += int(right[model].sum())
            self._lost += int((right[0] & ~right[1]).sum())
            self._won += int((right[1] & ~right[0]).sum())

    def agreement(self) -> Agreement | None:
        """Return how often both answer alike."""
        if self.scores is None:
            return None
        top5 = self._alike_five / self.images if self.classes > 5 else None
        return Agreement(output=self.scores, top1=self._alike / self.images, top5=top5)

    def accuracy(self) -> Accuracy | None:
        """Return how often each is right."""
        if not self._labelled:
            return None
        count, lost, won = self._labelled, self._lost, self._won
        return Accuracy(
            images=count,
            original=self._right[0] / count,
            converted=self._right[1] / count,
            drop_points=100.0 * (lost - won) / count,
            standard_error_points=100.0 * math.sqrt(lost + won - (lost - won) ** 2 / count) / count,
            lost=lost,
            won=won,
        )


def _flat(output: Array) -> Array:
    """Drop trailing axes of length 1, down to rank 2."""
    while output.ndim > 2 and output.shape[-1] == 1:
        output = output[..., 0]
    return output


def _best(scores: Array) -> npt.NDArray[np.int64]:
    """Best class of each row, shape (batch,); −1 where a score is not finite."""
    return np.where(np.isfinite(scores).all(axis=1), scores.argmax(axis=1), -1)


def _compare(
    comparison: _Comparison,
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
        raise ValidationError(
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


def _usable_labels(given: Batch, data: CalibrationSet, comparison: _Comparison) -> Array | None:
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


# ---- what the models cost


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
        digest=None if file is None else file_digest(file),
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

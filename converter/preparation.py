"""Everything about a model that does not depend on the budget: recorded once, planned with often."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from converter.calibration.gather import Sample
from converter.calibration.patches import shape_for_each
from converter.calibration.record import Recorder
from converter.calibration.sets import CalibrationSet, ModelInput, fixed_batch, padded
from converter.config import CalibrationSettings, Runtime, SolverSettings, Target
from converter.differentiable import UnsupportedOperatorError
from converter.errors import CalibrationError, ConfigError, ModelError
from converter.geometry import geometry_of
from converter.model_file import load_model, model_digest
from converter.outcome import Stage
from converter.place import Asked, Here, Place
from converter.planner.cost import ModelCost, count_cost, tensor_shapes
from converter.prediction import STRONG, Probe
from converter.progress import Progress
from converter.runtime import model_inputs
from converter.schemes import Candidate, Geometry
from converter.sensitivity import FlatOutputError, NoGradientError, output_metrics
from converter.work import Work, key_of
from passes.base import PassError, PassResult, run_passes
from passes.exchange import export_model, import_graph
from passes.fold_batchnorm import FoldBatchNorm
from passes.layers import Layer, find_layers
from passes.normalise import import_with_shapes, normalising

__all__ = [
    "Clock",
    "Prepared",
    "Start",
    "normalised",
    "normalised_model",
    "one_sample",
    "prepare",
    "target_batch",
]

METRIC_IMAGES = 512
METRIC_WORK = 1e12
"""Effects are measured on so many images at most, and on fewer where a network is large: all of them
together take about five times this number of multiply-accumulates, and at least 64 images are taken."""


@dataclass
class Clock:
    """Seconds of each stage, in order; a stage that comes again adds to its time."""

    _seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        started = time.monotonic()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - started

    def stages(self) -> tuple[Stage, ...]:
        """Everything timed so far."""
        return tuple(Stage(name, seconds) for name, seconds in self._seconds.items())


@dataclass(frozen=True, eq=False)
class Start:
    """The network that is converted.

    Attributes
    ----------
    model : onnx.ModelProto
        Normalised, with BatchNormalization folded.
    passes : tuple of PassResult
        What that changed.
    digest : str
        Tells it from others.
    """

    model: onnx.ModelProto
    passes: tuple[PassResult, ...]
    digest: str


@dataclass(eq=False)
class Prepared:
    """A model, what was recorded of it, and what each layer may become.

    Attributes
    ----------
    path : Path
        The model's file.
    original : onnx.ModelProto
        The model, normalised and with BatchNormalization folded; the only copy of its weights that stays.
    digest : str
        Tells it from others.
    passes : tuple of PassResult
        What that changed.
    data : CalibrationSet
    sample : dict of str to ndarray
        Feeds of one sample, or of one whole batch where the model fixes it.
    layers : tuple of Layer
        All of them; those that can be converted have no `reason`.
    cost : ModelCost
        Of `original`.
    recorder : Recorder
    samples : dict of str to Sample
    metrics : dict of str to ndarray of shape (N, N)
        Ω of each convertible layer.
    geometries : dict of str to Geometry
    candidates : dict of str to tuple of Candidate
        By layer: the layer as it is, then everything else it may become.
    probes : dict of str to tuple of Probe
        By layer: forms that are fitted already, to be tried in the network.
    notes : tuple of str
    work : Work or None
        Where finished layers are kept.
    """

    path: Path
    original: onnx.ModelProto
    digest: str
    passes: tuple[PassResult, ...]
    data: CalibrationSet
    sample: dict[str, NDArray[Any]]
    layers: tuple[Layer, ...]
    cost: ModelCost
    recorder: Recorder
    samples: dict[str, Sample]
    metrics: dict[str, NDArray[np.float64]]
    geometries: dict[str, Geometry]
    candidates: dict[str, tuple[Candidate, ...]]
    probes: dict[str, tuple[Probe, ...]]
    notes: tuple[str, ...]
    work: Work | None = None

    @property
    def convertible(self) -> tuple[Layer, ...]:
        """The layers that can be converted."""
        return tuple(layer for layer in self.layers if layer.reason is None)


def prepare(
    model: Path,
    data: CalibrationSet,
    *,
    calibration: CalibrationSettings,
    solver: SolverSettings,
    runtime: Runtime,
    progress: Progress,
    clock: Clock,
    batch: int | None = None,
    executor: Executor | None = None,
    work: Work | None = None,
    start: Start | None = None,
) -> Prepared:
    """Record the original and predict what each layer may become.

    Parameters
    ----------
    model : Path
    data : CalibrationSet
    calibration, solver, runtime
        Settings.
    progress : Progress
    clock : Clock
        Gets the seconds of each stage.
    batch : int or None, default None
        Images that the model is timed with later on; None times nothing.
    executor : Executor or None, default None
        Where layers are predicted, and recorded too where it is a `Place`, as a cluster is; None does it
        in threads of this process.
    work : Work or None, default None
        Where effects, predictions and fits are kept, and taken from; None keeps nothing.
    start : Start or None, default None
        What is converted in place of the file's own network.

    Raises
    ------
    ModelError, CalibrationError, SolverError
        As `converter.convert`.
    ConfigError
        Where the model takes other batches than the one that is to be timed.
    """
    # a GPU holds one layer at a time, and works on it as a whole
    together = None if solver.device == "cpu" else 1
    place = executor if isinstance(executor, Place) else Here(executor, together, work)

    # names of tensors stay, so that what is found now stays true while layers are replaced; shortcuts are
    # found by shapes, which were not exported
    with clock.stage("normalise"):
        start = _start(model) if start is None else start
        original, digest = start.model, start.digest
        layers = find_layers(import_with_shapes(original))
        inputs = model_inputs(original, label=str(model))
        if batch is not None:
            _require_batch(inputs, batch, model)
        sample = one_sample(data, inputs)
        layers = _by_image(layers, original, data, sample, label=str(model))
        convertible = [layer for layer in layers if layer.reason is None]
        _require_convertible(layers, model)
        cost = count_cost(original, sample, label=str(model))

    # targets: what the original answers, before anything changes
    with (
        clock.stage("record the original"),
        progress.stage("record the original", len(data)) as advance,
    ):
        recorder = Recorder(data, calibration, runtime, fixed_batch=fixed_batch(inputs))
        samples = place.originals(recorder, original, convertible, advance)

    # what an error of each layer does to the network's output
    with clock.stage("measure effects"):
        metrics, notes = _metrics(
            original,
            convertible,
            data,
            calibration,
            solver,
            samples,
            cost.macs,
            progress,
            digest,
            work,
        )

    # candidates are predicted once, on what the original delivers
    with clock.stage("predict forms"), progress.stage("predict forms", len(convertible)) as advance:
        shapes = tensor_shapes(
            original, sample, [name for each in convertible for name in (each.input, each.response)]
        )
        fed = len(next(iter(sample.values())))
        geometries = {}
        for layer in convertible:
            fold, in_shape = _spatial(layer, shapes[layer.input], fed)
            _, out_shape = _spatial(layer, shapes[layer.response], fed)
            geometries[layer.name] = geometry_of(layer, in_shape, out_shape, fold)

        share = STRONG / len(convertible)

        def asked() -> Iterator[Asked]:
            for layer in convertible:
                name = layer.name
                advance(0, name)
                known = layer, geometries[name], samples[name], metrics[name]
                yield Asked(*known, solver, share)

        predictions = {}
        for name, found in place.predicted(recorder, original, asked()):
            predictions[name] = found
            advance(1)

    return Prepared(
        path=model,
        original=original,
        digest=digest,
        passes=start.passes,
        data=data,
        sample=sample,
        layers=layers,
        cost=cost,
        recorder=recorder,
        samples=samples,
        metrics=metrics,
        geometries=geometries,
        candidates={layer.name: predictions[layer.name].candidates for layer in convertible},
        probes={name: each.probes for name, each in predictions.items()},
        notes=notes,
        work=work,
    )


def normalised(source: onnx.ModelProto, path: Path) -> tuple[gs.Graph, tuple[PassResult, ...]]:
    """Import a model and bring it into the form that layers are found in; the same every time."""
    try:
        graph = import_graph(source)
        return graph, run_passes(graph, [*normalising(), FoldBatchNorm()])
    except PassError as error:
        raise ModelError(f"{path}: {error}") from error


def normalised_model(source: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """Give a model in that form; the one that is given stays as it is."""
    return export_model(normalised(source, path)[0], source)


def _start(path: Path) -> Start:
    """Read a model in that form; what was read does not stay in memory."""
    source = load_model(path)
    graph, passes = normalised(source, path)
    return Start(export_model(graph, source), passes, model_digest(path))


def one_sample(data: CalibrationSet, inputs: Sequence[Any]) -> dict[str, NDArray[Any]]:
    """Give the feeds of one sample, or of one whole batch where the model fixes it."""
    batch = next(iter(data.batches(fixed_batch(inputs) or 1)), None)
    if batch is None:
        raise CalibrationError("the calibration set has no images; name a folder that has some")
    size = fixed_batch(inputs)
    return dict((padded(batch, size) if size else batch).feeds)


def target_batch(
    model: onnx.ModelProto, sample: Mapping[str, NDArray[Any]], target: Target, path: Path
) -> dict[str, NDArray[Any]]:
    """Make one batch for the target out of one sample.

    Raises
    ------
    ConfigError
        Where the model's own batch is another one.
    """
    _require_batch(model_inputs(model), target.batch, path)
    return {
        name: np.resize(feed, (target.batch, *feed.shape[1:])) if feed.ndim else feed
        for name, feed in sample.items()
    }


def _require_batch(inputs: Sequence[ModelInput], batch: int, path: Path) -> None:
    fixed = fixed_batch(inputs)
    if fixed is not None and fixed != batch:
        raise ConfigError(
            f"{path} takes batches of {fixed} only, and {batch} was asked for; "
            f"give --batch {fixed}, or export the model with a free batch"
        )


def _spatial(layer: Layer, shape: tuple[int, ...], fed: int) -> tuple[int, tuple[int, ...]]:
    """Split a layer's input or response to `fed` samples: blocks of each sample, and axes of a block."""
    if layer.op == "Conv":
        return shape[0] // fed, shape[2:]
    rows = math.prod(shape[:-1]) // fed
    # where the samples lie along another axis than the first, each row is a block
    axes = shape[1:-1] if shape[0] % fed == 0 else ()
    return rows // math.prod(axes), axes


def _by_image(
    layers: Sequence[Layer],
    model: onnx.ModelProto,
    data: CalibrationSet,
    sample: Mapping[str, NDArray[Any]],
    *,
    label: str,
) -> tuple[Layer, ...]:
    """Refuse layers that have not the same number of positions for each of the first two images."""
    convertible = [layer for layer in layers if layer.reason is None]
    names = [layer.response for layer in convertible]
    fixed = fixed_batch(model_inputs(model))
    batches = (
        dict((padded(each, fixed) if fixed else each).feeds) for each in data.batches(fixed or 2)
    )
    # two images at once, or one after the other
    others = next(islice(batches, 1 if fixed else 0, None), None)
    seen = []
    for feeds in (sample, others):
        if feeds is None or not convertible:
            continue
        fed = len(next(iter(feeds.values())))
        try:
            seen.append((fed, tensor_shapes(model, feeds, names, label=label)))
        except ModelError as error:
            if fixed or fed == 1:
                raise
            raise ModelError(
                f"{label} has a free batch and does not run on two images at once, though on one it does; "
                f"export it with a batch of 1, or without sizes written into its Reshapes: {error}"
            ) from error

    def judged(layer: Layer) -> Layer:
        found = {shape_for_each(layer, shapes[layer.response], fed) for fed, shapes in seen}
        if len(found) == 1 and None not in found:
            return layer
        return replace(layer, reason="it has not the same number of positions for each image")

    return tuple(judged(layer) if layer.reason is None else layer for layer in layers)


def _require_convertible(layers: Sequence[Layer], path: Path) -> None:
    if not layers:
        raise ModelError(f"{path} has no Conv, Gemm or MatMul, so there is nothing to convert")
    if all(layer.reason for layer in layers):
        raise ModelError(
            f"{path} has no layer that can be converted: {layers[0].name}: {layers[0].reason}; "
            f"`twofold inspect` lists all {len(layers)}"
        )


def _metrics(
    model: onnx.ModelProto,
    layers: Sequence[Layer],
    data: CalibrationSet,
    calibration: CalibrationSettings,
    solver: SolverSettings,
    samples: Mapping[str, Sample],
    macs: int,
    progress: Progress,
    digest: str,
    work: Work | None,
) -> tuple[dict[str, NDArray[np.float64]], tuple[str, ...]]:
    """Output metric Ω of each layer; where the graph cannot be differentiated, its own relative error."""
    responses = {layer.response: 1 if layer.op == "Conv" else -1 for layer in layers}
    how: dict[str, Any] = {
        "images": min(METRIC_IMAGES, max(64, int(METRIC_WORK / max(macs, 1))), max(len(data), 2)),
        "batch": calibration.batch,
        "memory_mib": calibration.memory_mib,
        "seed": calibration.seed,
        "device": solver.device,
    }
    key, measured = "", None
    if work is not None:
        key = key_of("effects", digest, data.digest(), *responses.items(), *how.items())
        measured = work.metrics(key)
    try:
        if measured is None:
            measured = output_metrics(model, responses, data, **how, progress=progress)
            if work is not None:
                work.keep_metrics(key, measured)
    except (UnsupportedOperatorError, FlatOutputError, NoGradientError) as error:
        note = f"the effect on the output could not be measured, every layer counts alike: {error}"
        return {layer.name: _relative(samples[layer.name]) for layer in layers}, (note,)
    notes = tuple(
        f"output {name} was left out of the effects: {why}"
        for name, why in measured.left_out.items()
    )
    metrics = {layer.name: measured.metric[layer.response] for layer in layers}
    # what leads to such outputs alone would be free to have any error
    blind = [name for name, metric in metrics.items() if not metric.any()]
    metrics |= {name: _relative(samples[name]) for name in blind}
    if blind:
        notes += (
            f"errors of {', '.join(blind)} reach no output that is weighed, so they count relative to these "
            "layers' own responses",
        )
    return metrics, notes


def _relative(sample: Sample) -> NDArray[np.float64]:
    """Build the metric in which a layer's error counts relative to its own response."""
    total = float(np.trace(sample.covariance))
    return np.eye(len(sample.covariance)) / (total if total > 0 else 1.0)

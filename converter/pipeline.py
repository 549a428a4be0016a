"""The conversion, as one flat function of named stages."""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from converter.calibration.record import Recorder, Sample
from converter.calibration.sets import (
    CalibrationSet,
    DataReader,
    fixed_batch,
    open_calibration_set,
    padded,
)
from converter.config import Budget, CalibrationSettings, Preprocessing, Runtime, SolverSettings
from converter.differentiable import UnsupportedOperatorError
from converter.errors import CalibrationError, ModelError, SolverError
from converter.fitting import branches_of, candidates_of, fit, weight_of
from converter.model_file import check_output_path, file_digest, load_model, save_model
from converter.outcome import Conversion, LayerOutcome, Scheme, Stage
from converter.planner.budget import Candidates, choose
from converter.planner.cost import ModelCost, count_cost
from converter.progress import SILENT, Progress
from converter.runtime import machine, model_inputs, open_session, run
from converter.sensitivity import FlatOutputError, output_metrics
from passes.base import PassError, PassResult, run_passes
from passes.exchange import export_model, import_graph
from passes.fold_batchnorm import FoldBatchNorm
from passes.layers import Layer, find_layers
from passes.normalise import normalising
from passes.reorder_sums import ReorderSums
from passes.split import Split

if TYPE_CHECKING:
    from converter.solver.solution import Solution

__all__ = ["convert"]

METRIC_IMAGES = 512


def convert(
    model: Path,
    calib: Path | DataReader | CalibrationSet,
    out: Path,
    budget: Budget,
    *,
    preprocessing: Preprocessing,
    calibration: CalibrationSettings,
    solver: SolverSettings,
    runtime: Runtime,
    progress: Progress = SILENT,
) -> Conversion:
    """Convert `model` within `budget` and write the result to `out`; see `converter.convert`."""
    check_output_path(out, model)
    clock = _Clock()

    with clock.stage("read"):
        source = load_model(model)
        inputs = model_inputs(source, label=str(model))
        data = open_calibration_set(calib, inputs, preprocessing, images=calibration.images)

    # names of tensors stay, so that what is found now stays true while layers are replaced
    with clock.stage("normalise"):
        graph, results = _prepared(source, model)
        layers = find_layers(graph)
        convertible = [layer for layer in layers if layer.reason is None]
        _require_convertible(layers, model)
        original = export_model(graph, source)
        before = count_cost(original, _one_sample(data, inputs), label=str(model))

    # targets: what the original answers, before anything changes
    with (
        clock.stage("record the original"),
        progress.stage("record the original", len(data)) as advance,
    ):
        recorder = Recorder(data, calibration, runtime, fixed_batch=fixed_batch(inputs))
        samples = recorder.originals(original, convertible, advance)

    # what an error of each layer does to the network's output
    with clock.stage("measure effects"):
        metrics, notes = _metrics(
            original, convertible, data, calibration, solver, samples, progress
        )

    with clock.stage("share the budget"):
        candidates = [
            candidates_of(layer, samples[layer.name], metrics[layer.name]) for layer in convertible
        ]
        ranks = choose(candidates, budget, before.macs, before.params)

    # in graph order, each layer on what the converted ones before it deliver
    outcomes: dict[str, LayerOutcome] = {}
    chosen = [layer for layer in convertible if ranks[layer.name] is not None]
    with clock.stage("fit layers"), progress.stage("fit layers", len(chosen)) as advance:
        current = original
        for layer, options in zip(convertible, candidates, strict=True):
            rank = ranks[layer.name]
            if rank is None:
                why = (
                    "the budget is met more cheaply elsewhere"
                    if len(options.ranks)
                    else "no rank makes it cheaper"
                )
                outcomes[layer.name] = _kept(layer, options, why)
                continue
            advance(0, layer.name)
            started = time.monotonic()
            fitted = fit(
                layer,
                samples[layer.name],
                recorder.inputs(current, layer, samples[layer.name]),
                metrics[layer.name],
                rank,
                solver,
            )
            results += run_passes(graph, [Split(layer, branches_of(layer, fitted))])
            current = export_model(graph, source)
            effect = float(options.effects[int(np.searchsorted(options.ranks, rank))])
            outcomes[layer.name] = _outcome(
                layer, options, fitted, effect, time.monotonic() - started
            )
            advance(1)

    with clock.stage("finish"):
        results += run_passes(graph, [ReorderSums()])
        converted = export_model(graph, source)
        after = count_cost(converted, _one_sample(data, inputs), label="the converted model")
        _check_result(converted, data, inputs, runtime, out)
        save_model(converted, out)

    return Conversion(
        source=model,
        out=out,
        macs_before=before.macs,
        macs_after=after.macs,
        params_before=before.params,
        params_after=after.params,
        layers=tuple(outcomes.get(layer.name) or _left_alone(layer, before) for layer in layers),
        passes=results,
        stages=clock.stages(),
        notes=(*notes, *recorder.notes),
        settings={
            "budget": dataclasses.asdict(budget),
            "preprocessing": dataclasses.asdict(preprocessing),
            "calibration": dataclasses.asdict(calibration),
            "solver": dataclasses.asdict(solver),
            "runtime": dataclasses.asdict(runtime),
        },
        calibration={"data": data.describe(), "digest": data.digest(), **recorder.describe()},
        machine=machine(),
        source_digest=file_digest(model),
        out_digest=file_digest(out),
        peak_memory_mib=_peak_memory_mib(),
    )


def _prepared(source: onnx.ModelProto, path: Path) -> tuple[gs.Graph, tuple[PassResult, ...]]:
    try:
        graph = import_graph(source)
        return graph, run_passes(graph, [*normalising(), FoldBatchNorm()])
    except PassError as error:
        raise ModelError(f"{path}: {error}") from error


def _require_convertible(layers: Sequence[Layer], path: Path) -> None:
    if not layers:
        raise ModelError(f"{path} has no Conv, Gemm or MatMul, so there is nothing to convert")
    if all(layer.reason for layer in layers):
        raise ModelError(
            f"{path} has no layer that can be converted: {layers[0].name}: {layers[0].reason}; "
            f"`twofold inspect` lists all {len(layers)}"
        )


def _one_sample(data: CalibrationSet, inputs: Sequence[Any]) -> dict[str, NDArray[Any]]:
    """Give the feeds of one sample, or of one whole batch where the model fixes it."""
    batch = next(iter(data.batches(fixed_batch(inputs) or 1)), None)
    if batch is None:
        raise CalibrationError("the calibration set has no images; name a folder that has some")
    size = fixed_batch(inputs)
    return dict((padded(batch, size) if size else batch).feeds)


def _metrics(
    model: onnx.ModelProto,
    layers: Sequence[Layer],
    data: CalibrationSet,
    calibration: CalibrationSettings,
    solver: SolverSettings,
    samples: Mapping[str, Sample],
    progress: Progress,
) -> tuple[dict[str, NDArray[np.float64]], tuple[str, ...]]:
    """Output metric Ω of each layer; where the graph cannot be differentiated, its own relative error."""
    responses = {layer.response: 1 if layer.op == "Conv" else -1 for layer in layers}
    try:
        measured = output_metrics(
            model,
            responses,
            data,
            images=min(METRIC_IMAGES, max(len(data), 2)),
            batch=calibration.batch,
            memory_mib=calibration.memory_mib,
            seed=calibration.seed,
            device=solver.device,
            progress=progress,
        )
    except (UnsupportedOperatorError, FlatOutputError) as error:
        note = f"the effect on the output could not be measured, every layer counts alike: {error}"
        return {layer.name: _relative(samples[layer.name]) for layer in layers}, (note,)
    notes = tuple(
        f"output {name} was left out of the effects: {why}"
        for name, why in measured.left_out.items()
    )
    return {layer.name: measured.metric[layer.response] for layer in layers}, notes


def _relative(sample: Sample) -> NDArray[np.float64]:
    """Build the metric in which a layer's error counts relative to its own response."""
    total = float(np.trace(sample.covariance))
    return np.eye(len(sample.covariance)) / (total if total > 0 else 1.0)


def _outcome(
    layer: Layer, options: Candidates, solution: Solution, effect: float, seconds: float
) -> LayerOutcome:
    weight = weight_of(layer)
    rows, columns = weight.reshape(len(weight), -1).shape
    kept = len(solution.support)
    cost = solution.rank * (rows + columns) + kept * rows * columns // weight.shape[1]
    biases = 0 if layer.bias is None else rows
    scheme: Scheme = (
        "sparse + channel" if kept and solution.rank else "sparse" if kept else "channel"
    )
    return LayerOutcome(
        name=layer.name,
        op=layer.op,
        shape=tuple(weight.shape),
        activation=str(layer.activation),
        scheme=scheme,
        rank=solution.rank,
        support=kept,
        macs_before=round(options.macs_kept),
        macs_after=round(options.macs_kept * cost / (rows * columns)),
        params_before=rows * columns + biases,
        params_after=cost + rows,
        error=solution.unseen,
        effect=effect,
        status=solution.status,
        iterations=len(solution.history),
        seconds=seconds,
        trace=solution.history,
    )


def _kept(layer: Layer, options: Candidates, reason: str) -> LayerOutcome:
    biases = 0 if layer.bias is None else len(layer.bias)
    macs, params = round(options.macs_kept), round(options.params_kept) + biases
    return _unchanged(layer, macs, params, reason)


def _left_alone(layer: Layer, before: ModelCost) -> LayerOutcome:
    cost = next((each for each in before.layers if each.name == layer.name), None)
    macs = 0 if cost is None or cost.macs is None else cost.macs
    return _unchanged(layer, macs, 0 if cost is None else cost.params, layer.reason or "")


def _unchanged(layer: Layer, macs: int, params: int, reason: str) -> LayerOutcome:
    return LayerOutcome(
        name=layer.name,
        op=layer.op,
        shape=() if layer.weight is None else tuple(layer.weight.shape),
        activation=str(layer.activation),
        scheme="kept",
        rank=0,
        support=0,
        macs_before=macs,
        macs_after=macs,
        params_before=params,
        params_after=params,
        reason=reason,
    )


def _check_result(
    model: onnx.ModelProto, data: CalibrationSet, inputs: Sequence[Any], runtime: Runtime, out: Path
) -> None:
    """Refuse to write a model that onnxruntime does not load, or that answers with NaN."""
    session = open_session(model, runtime, label="the converted model")
    answers = run(session, None, _one_sample(data, inputs), label="the converted model")
    if not all(np.isfinite(each).all() for each in answers if each.dtype.kind == "f"):
        raise SolverError(
            f"the converted model answers with NaN or infinity, so {out} was not written"
        )


@dataclass
class _Clock:
    """Seconds of each stage, in order."""

    def __post_init__(self) -> None:
        self._stages: list[Stage] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        started = time.monotonic()
        yield
        self._stages.append(Stage(name, time.monotonic() - started))

    def stages(self) -> tuple[Stage, ...]:
        """Everything timed so far."""
        return tuple(self._stages)


def _peak_memory_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / 1024

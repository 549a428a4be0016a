"""A small Conv with a ReLU behind it, recorded; forms to fit it in, and the model with their branches."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from converter.calibration.gather import Inputs, Sample
from converter.calibration.opening import open_calibration_set
from converter.calibration.record import Recorder
from converter.config import CalibrationSettings, Preprocessing, Runtime, SolverSettings
from converter.fitting import fit
from converter.geometry import geometry_of
from converter.prediction import Task, predict, task_of
from converter.runtime import model_inputs
from converter.schemes import Candidate, Form, Geometry
from converter.solver.solution import Solution
from passes.base import run_passes
from passes.exchange import export_model, import_graph
from passes.layers import Layer, find_layers
from passes.normalise import normalising
from passes.split import Branches, Split

__all__ = [
    "CHANNELS",
    "FORMS",
    "IMAGES",
    "ROWS",
    "SHARE",
    "Recorded",
    "answers",
    "fitted",
    "recorded_in",
    "replaced",
    "rows_of",
]

Floats = NDArray[np.float32]

IMAGES, SIDE = 48, 5
ROWS, CHANNELS = 12, 10
SOLVER = SolverSettings()
SHARE = 8.0
TEXT = f"""<ir_version: 8, opset_import: ["": 17]>
one (float[batch, {CHANNELS}, {SIDE}, {SIDE}] x) => (float[batch, {ROWS}, {SIDE}, {SIDE}] y) {{
    [conv] response = Conv<pads = [1, 1, 1, 1]>(x, w, b)
    [relu] y = Relu(response)
}}"""

FORMS = pytest.mark.parametrize(
    "form",
    [
        Form("channel", (4,)),
        Form("channel", (3,), 2),
        Form("spatial", (5,)),
        Form("spatial", (4,), 1),
        Form("tucker", (4, 5)),
        Form("tucker", (3, 4), 2),
        Form("depthwise", (8, 8)),
        Form("depthwise", (4, 8)),
        Form("sparse", (), 4),
    ],
    ids=str,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Recorded:
    """A small layer, and everything that was recorded of it."""

    model: onnx.ModelProto
    images: Floats
    layer: Layer
    geometry: Geometry
    sample: Sample
    inputs: Inputs
    metric: NDArray[np.float64]

    def task(self, solver: SolverSettings = SOLVER) -> Task:
        known = self.layer, self.geometry, self.sample, self.metric
        return task_of(*known, self.inputs, solver, SHARE)

    def candidates(self, solver: SolverSettings = SOLVER) -> tuple[Candidate, ...]:
        return predict(self.task(solver)).candidates


def recorded_in(folder: Path) -> Recorded:
    """Write the images into `folder` and record the layer on them."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(TEXT)
    # a spectrum that falls, over channels that correlate, as in trained networks
    weight = (
        rng.normal(size=(ROWS, CHANNELS, 3, 3)) * np.exp(-np.arange(CHANNELS) / 4)[:, None, None]
    )
    for name, array in (("w", weight), ("b", 0.3 * rng.normal(size=ROWS))):
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    mixing = rng.normal(size=(CHANNELS, CHANNELS)) / 3 + np.eye(CHANNELS)
    images = np.einsum("dc,ncij->ndij", mixing, rng.normal(size=(IMAGES, CHANNELS, SIDE, SIDE)))
    images = images.astype(np.float32)
    graph = import_graph(model)
    run_passes(graph, normalising())
    (layer,) = find_layers(graph)
    original = export_model(graph, model)
    file = folder / "images.npy"
    np.save(file, images)
    data = open_calibration_set(file, model_inputs(original), Preprocessing())
    recorder = Recorder(data, CalibrationSettings(batch=16), Runtime(threads=1))
    sample = recorder.originals(original, [layer])[layer.name]
    factor = rng.normal(size=(ROWS, ROWS))
    return Recorded(
        model=original,
        images=images,
        layer=layer,
        geometry=geometry_of(layer, (SIDE, SIDE), sample.out_shape),
        sample=sample,
        inputs=recorder.inputs(original, layer, sample),
        metric=factor @ factor.T / ROWS,
    )


def answers(model: onnx.ModelProto, images: Floats) -> Floats:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": images})[0])


def fitted(
    recorded: Recorded, form: Form, solver: SolverSettings = SOLVER, *, trade: bool = False
) -> Solution:
    layer, geometry, sample = recorded.layer, recorded.geometry, recorded.sample
    return fit(layer, geometry, sample, recorded.inputs, recorded.metric, form, solver, trade=trade)


def replaced(recorded: Recorded, branches: Branches) -> onnx.ModelProto:
    graph = import_graph(recorded.model)
    run_passes(graph, [Split(recorded.layer, branches)])
    return export_model(graph, recorded.model)


def rows_of(images: Floats) -> NDArray[np.float64]:
    return images.transpose(0, 2, 3, 1).reshape(-1, ROWS).astype(np.float64)

"""Two Convs with a ReLU between, prepared, and their forms with made-up milliseconds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from numpy.typing import NDArray

from converter.calibration.opening import open_calibration_set
from converter.config import CalibrationSettings, Preprocessing, Runtime, SolverSettings, Target
from converter.model_file import save_model
from converter.pace import Paced
from converter.planner.milliseconds.model import LatencyModel
from converter.preparation import Clock, Prepared, prepare
from converter.progress import SILENT
from converter.runtime import model_inputs
from converter.schemes import KEEP

__all__ = ["FIRST", "SECOND", "paced", "prepared_in"]

FIRST, SECOND = "first", "second"


def prepared_in(folder: Path) -> Prepared:
    """Write the model into `folder` and prepare it for sixteen images."""
    random = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> two (float[n, 8, 8, 8] x) => (float[n, 12, 8, 8] y)'
        "<float[16, 8, 3, 3] a, float[12, 16, 3, 3] b> {"
        "  h = Conv <pads=[1,1,1,1]> (x, a)  r = Relu(h)  y = Conv <pads=[1,1,1,1]> (r, b) }"
    )
    for node, name in ((0, FIRST), (2, SECOND)):
        model.graph.node[node].name = name
    del model.graph.initializer[:]
    for name, shape in (("a", (16, 8, 3, 3)), ("b", (12, 16, 3, 3))):
        weight = random.standard_normal(shape).astype(np.float32) / 10
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    path = folder / "two.onnx"
    save_model(model, path)
    images: NDArray[np.float32] = random.standard_normal((16, 8, 8, 8)).astype(np.float32)
    data = open_calibration_set(_Reader(images), model_inputs(model), Preprocessing())
    return prepare(
        path,
        data,
        calibration=CalibrationSettings(patches=256),
        solver=SolverSettings(),
        runtime=Runtime(threads=1),
        progress=SILENT,
        clock=Clock(),
    )


class _Reader:
    """A calibration data reader over one array, one image at a time."""

    def __init__(self, images: NDArray[np.float32]) -> None:
        self._images = images
        self.rewind()

    def rewind(self) -> None:
        self._rows = iter(self._images)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        row = next(self._rows, None)
        return None if row is None else {"x": row[None]}


def paced(prepared: Prepared, ms_per_mac: float, rest_ms: float = 0.0) -> Paced:
    """Candidates whose milliseconds are their MACs, times a factor."""
    candidates = {
        name: tuple(dataclasses.replace(one, ms=one.macs * ms_per_mac) for one in each)
        for name, each in prepared.candidates.items()
    }
    curves = {
        name: {KEEP.family: (np.array([each[0].macs]), np.array([each[0].ms]))}
        for name, each in candidates.items()
    }
    model = LatencyModel(rest_ms, curves, ())
    return Paced(Target(Runtime(threads=1)), prepared.sample, model, candidates)

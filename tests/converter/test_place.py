from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

from converter.calibration.opening import open_calibration_set
from converter.calibration.record import Recorder
from converter.calibration.sets import DataReader
from converter.config import CalibrationSettings, Preprocessing, Runtime, SolverSettings
from converter.geometry import geometry_of
from converter.place import WAITING, Asked, Here
from converter.prediction import Prediction
from converter.progress import SILENT
from converter.runtime import model_inputs
from converter.work import key_of
from passes.exchange import import_graph
from passes.layers import Layer, find_layers

DEPTH = 5


class Reader:
    """A data reader of a few random images."""

    def __init__(self) -> None:
        self.left = [np.random.default_rng(0).standard_normal((32, 4, 6, 6)).astype(np.float32)]

    def get_next(self) -> dict[str, Any] | None:
        return {"x": self.left.pop()} if self.left else None


class Counting(Executor):
    """Runs everything at once, and counts what nobody has asked for yet."""

    _max_workers = 1

    def __init__(self) -> None:
        self.most = self.waiting = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        outer = self
        outer.waiting += 1
        outer.most = max(outer.most, outer.waiting)

        class Counted(Future[Any]):
            def result(self, timeout: float | None = None) -> Any:
                outer.waiting -= 1
                return super().result(timeout)

        future = Counted()
        future.set_result(fn(*args, **kwargs))
        return future


def chain() -> onnx.ModelProto:
    """Conv 3×3 and Relu, five times, on 4 channels of 6×6."""
    lines, tensor, weights = [], "x", []
    for index in range(DEPTH):
        lines.append(
            f"[conv{index}] y{index} = Conv<pads = [1, 1, 1, 1]>({tensor}, w{index}) "
            f"a{index} = Relu(y{index})"
        )
        weight = np.random.default_rng(index).standard_normal((4, 4, 3, 3)) / 6
        weights.append(numpy_helper.from_array(weight.astype(np.float32), f"w{index}"))
        tensor = f"a{index}"
    graph = f"g (float[n, 4, 6, 6] x) => (float[n, 4, 6, 6] {tensor}) {{ {' '.join(lines)} }}"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {graph}')
    model.graph.initializer.extend(weights)
    return onnx.shape_inference.infer_shapes(model)


def layers_of(model: onnx.ModelProto) -> list[Layer]:
    """All layers, with weights of their own: onnx gives read-only ones, which torch warns of."""
    found = find_layers(import_graph(model))
    return [replace(layer, weight=np.array(layer.weight)) for layer in found]


def predictions(executor: Executor | None) -> dict[str, Prediction]:
    model = chain()
    layers = layers_of(model)
    reader: DataReader = Reader()
    data = open_calibration_set(reader, model_inputs(model), Preprocessing())
    recorder = Recorder(data, CalibrationSettings(patches=512), Runtime(threads=1))
    place = Here(executor)
    with SILENT.stage("record", 32) as advance:
        samples = place.originals(recorder, model, layers, advance)
    solver = SolverSettings()
    asked = [
        Asked(
            layer, geometry_of(layer, (6, 6), (6, 6)), samples[layer.name], np.eye(4), solver, 1e-3
        )
        for layer in layers
    ]
    return dict(place.predicted(recorder, model, asked))


def test_an_executor_changes_nothing_but_where_it_is_done() -> None:
    alone = predictions(None)
    with ThreadPoolExecutor(2) as executor:
        shared = predictions(executor)
    assert list(alone) == list(shared) == [f"conv{index}" for index in range(DEPTH)]
    # the key takes in every candidate, and every number of the probes
    assert [key_of("predict", each) for each in alone.values()] == [
        key_of("predict", each) for each in shared.values()
    ]
    assert all(len(each.candidates) > 1 and each.probes for each in alone.values())


def test_few_layers_wait_with_their_patches() -> None:
    executor = Counting()
    predictions(executor)
    assert executor.most == WAITING + 1 < DEPTH
    assert executor.waiting == 0

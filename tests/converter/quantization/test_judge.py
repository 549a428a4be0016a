"""What counts as an error of the answers, and on how many images."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from converter.calibration.opening import open_calibration_set
from converter.calibration.sets import CalibrationSet
from converter.config import Preprocessing, Runtime
from converter.quantization.judge import Deviation, Judge, held_batches
from converter.runtime import model_inputs

Network = Callable[..., onnx.ModelProto]
RUNTIME = Runtime(threads=1)


class _Reader:
    def __init__(self, images: NDArray[np.float32]) -> None:
        self._rows = iter(images)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        row = next(self._rows, None)
        return None if row is None else {"image": row[None]}


def held(model: onnx.ModelProto, images: NDArray[np.float32]) -> CalibrationSet:
    return open_calibration_set(_Reader(images), model_inputs(model), Preprocessing())


def judge(model: onnx.ModelProto, images: NDArray[np.float32], batch: int = 7) -> Judge:
    batches = held_batches(model, held(model, images), RUNTIME, batch, memory_mib=64)
    return Judge(model, batches, RUNTIME)


def scaled(model: onnx.ModelProto, factor: float) -> onnx.ModelProto:
    """The same network with scores that are so many times larger."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for tensor in changed.graph.initializer:
        if tensor.name in ("w5", "b5"):
            values = factor * numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
    return changed


@pytest.mark.parametrize("batch", ["n", 8])
def test_a_model_agrees_with_itself(
    network: Network, images: NDArray[np.float32], batch: str | int
) -> None:
    model = network(batch=batch)
    judged = judge(model, images)
    assert judged.images == 60
    assert judged.of(model) == Deviation(0.0, 1.0)


def test_errors_are_relative_to_the_variance(network: Network, images: NDArray[np.float32]) -> None:
    model = network()
    found = judge(model, images).of(scaled(model, 1.1))
    scores = Judge(model, held_batches(model, held(model, images), RUNTIME, 60, 64), RUNTIME)
    wanted = scores._wanted[0].astype(np.float64)
    expected = np.square(0.1 * wanted).sum() / np.square(wanted - wanted.mean(0)).sum()
    assert found.error == pytest.approx(expected, rel=1e-4)  # float32 answers
    assert found.agreement == 1.0  # the largest score stays the largest
    assert judge(model, images).of(scaled(model, -1.0)).agreement == 0.0


def test_answers_that_are_not_finite_or_not_alike_are_infinitely_far(
    network: Network, images: NDArray[np.float32]
) -> None:
    model = network()
    judged = judge(model, images)
    assert judged.of(scaled(model, math.inf)) == Deviation(math.inf, None)
    other = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[n, 3, 8, 8] image) => (float[n, 3] scores)'
        "{ p = GlobalAveragePool (image)  scores = Flatten (p) }"
    )
    assert judged.of(other) == Deviation(math.inf, None)


def test_a_small_bound_holds_fewer_images(network: Network, images: NDArray[np.float32]) -> None:
    model = network()
    large = np.concatenate([images] * 30)
    batches = held_batches(model, held(model, large), RUNTIME, 64, memory_mib=1)
    count = sum(each.count for each in batches)
    assert count == 2**20 // (4 * 192 + 3 * 4 * 5)


def test_outputs_without_scores_have_no_agreement(images: NDArray[np.float32]) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[n, 3, 8, 8] image) => (float[n, 3, 8, 8] y)'
        "{ y = Relu (image) }"
    )
    assert judge(model, images).of(model) == Deviation(0.0, None)

"""A small network, the same network damaged, and what most tests of its recovery ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from converter.config import RecoverySettings, Runtime
from converter.refine.training import Training

RUNTIME = Runtime(threads=1)
TEXT = """<ir_version: 8, opset_import: ["": 17]>
    small (float[n, 3, 8, 8] x) => (float[n, 5] y)
    <float[8, 3, 3, 3] a, float[8] b, float[8, 8, 3, 3] e, float[5, 8] c, float[5] d> {
        h = Conv <pads = [1, 1, 1, 1]> (x, a, b)
        r = Relu (h)
        k = Conv <pads = [1, 1, 1, 1]> (r, e)
        s = Relu (k)
        p = GlobalAveragePool (s)
        f = Flatten (p)
        y = Gemm <transB = 1> (f, c, d)
    }"""
SHAPES = {"a": (8, 3, 3, 3), "b": (8,), "e": (8, 8, 3, 3), "c": (5, 8), "d": (5,)}


def network(noise: float = 0.0) -> onnx.ModelProto:
    """The same network, its weights off by a share of their size."""
    model = onnx.parser.parse_model(TEXT)
    random, other = np.random.default_rng(0), np.random.default_rng(1)
    del model.graph.initializer[:]
    for name, shape in SHAPES.items():
        values = random.standard_normal(shape) * (2 / max(np.prod(shape[1:]), 1)) ** 0.5
        values += noise * values.std() * other.standard_normal(shape)
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    return model


def settings(**changes: Any) -> RecoverySettings:
    given: dict[str, Any] = {
        "epochs": 12,
        "batch": 16,
        "rate": 0.02,
        "precision": "float32",
        **changes,
    }
    return RecoverySettings(**given)


def cut_off(patched: pytest.MonkeyPatch, at: int) -> None:
    """Interrupt a training before its step `at`, as Ctrl-C would."""
    step = Training._one_step

    def interrupted(training: Training) -> None:
        if training.step == at:
            raise KeyboardInterrupt
        step(training)

    patched.setattr(Training, "_one_step", interrupted)


def weights(path: Path) -> dict[str, NDArray[np.float32]]:
    return {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}

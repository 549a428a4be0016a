"""A network that converts in a second, for what needs many conversions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

__all__ = ["write_small_network"]

TEXT = """
    <ir_version: 8, opset_import: ["": 17]>
    deep (float[batch, 3, 8, 8] image) => (float[batch, 10] logits)
    {
        c1 = Conv<pads = [1, 1, 1, 1]>(image, w1)
        r1 = Relu(c1)
        c2 = Conv<pads = [1, 1, 1, 1]>(r1, w2)
        r2 = Relu(c2)
        c3 = Conv<pads = [1, 1, 1, 1]>(r2, w3)
        s = Add(c3, r2)
        r3 = Relu(s)
        c4 = Conv<pads = [1, 1, 1, 1]>(r3, w4)
        r4 = Relu(c4)
        p = GlobalAveragePool(r4)
        f = Flatten(p)
        logits = Gemm<transB = 1>(f, w5)
    }
"""
SHAPES = {
    "w1": (12, 3, 3, 3),
    "w2": (16, 12, 3, 3),
    "w3": (16, 16, 3, 3),
    "w4": (24, 16, 3, 3),
    "w5": (10, 24),
}


def write_small_network(folder: Path) -> None:
    """Write `model.onnx`, four Convs with a shortcut and a Gemm, and 48 samples as `images.npy`."""
    model = onnx.parser.parse_model(TEXT)
    random = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        weight = random.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))
        model.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), name))
    onnx.save(model, folder / "model.onnx")
    np.save(folder / "images.npy", random.normal(size=(48, 3, 8, 8)).astype(np.float32))

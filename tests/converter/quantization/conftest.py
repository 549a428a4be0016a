"""A small residual network, random images for it, and its file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from converter.model_file import save_model

Network = Callable[..., onnx.ModelProto]

TEXT = """<ir_version: 8, opset_import: ["": {opset}]>
    small (float[{batch}, 3, 8, 8] image) => (float[{batch}, 5] scores) {{
        [first] a = Conv <pads = [1, 1, 1, 1]> (image, w1, b1)
        [relu1] r = Relu (a)
        [left] s = Conv <pads = [1, 1, 1, 1]> (r, w2)
        [down] d = Conv (r, w3)
        [up] l = Conv <pads = [1, 1, 1, 1]> (d, w4, b4)
        [sum] t = Add (s, l)
        u = Relu (t)
        p = GlobalAveragePool (u)
        f = Flatten (p)
        [last] scores = Gemm <transB = 1> (f, w5, b5)
    }}"""
SHAPES = {
    "w1": (12, 3, 3, 3), "b1": (12,), "w2": (8, 12, 3, 3), "w3": (3, 12, 1, 1),
    "w4": (8, 3, 3, 3), "b4": (8,), "w5": (5, 8), "b5": (5,),
}  # fmt: skip


@pytest.fixture
def network() -> Network:
    """Make the network, with free or fixed batch."""

    def made(batch: str | int = "n", opset: int = 17) -> onnx.ModelProto:
        model = onnx.parser.parse_model(TEXT.format(batch=batch, opset=opset))
        rng = np.random.default_rng(0)
        for name, shape in SHAPES.items():
            values = rng.standard_normal(shape) * (2 / max(np.prod(shape[1:]), 1)) ** 0.5
            values[0] *= 4  # one channel is larger, as in real networks
            stored = numpy_helper.from_array(values.astype(np.float32), name)
            model.graph.initializer.append(stored)
        onnx.checker.check_model(model, full_check=True)
        return model

    return made


@pytest.fixture
def images() -> NDArray[np.float32]:
    """Sixty images of the network."""
    return np.random.default_rng(1).standard_normal((60, 3, 8, 8)).astype(np.float32)


@pytest.fixture
def files(network: Network, images: NDArray[np.float32], tmp_path: Path) -> tuple[Path, Path]:
    """The network and its images as files."""
    save_model(network(), tmp_path / "model.onnx")
    np.save(tmp_path / "images.npy", images)
    return tmp_path / "model.onnx", tmp_path / "images.npy"

"""A shared folder as the tools expect it, with a tiny network in the place of a reference model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper
from PIL import Image

CLASSES = ("blue", "green", "red")
TEXT = """
    <ir_version: 8, opset_import: ["": 17]>
    tiny (float[batch, 3, 8, 8] input) => (float[batch, 3] logits)
    {
        [conv1] c1 = Conv<pads = [1, 1, 1, 1]>(input, w1, b1)
        r1 = Relu(c1)
        [conv2] c2 = Conv<pads = [1, 1, 1, 1]>(r1, w2, b2)
        r2 = Relu(c2)
        [conv3] c3 = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(r2, w3, b3)
        r3 = Relu(c3)
        pooled = GlobalAveragePool(r3)
        flat = Flatten(pooled)
        [classifier] logits = Gemm<transB = 1>(flat, w4, b4)
    }
"""
SHAPES = {
    "w1": (16, 3, 3, 3), "b1": (16,), "w2": (32, 16, 3, 3), "b2": (32,),
    "w3": (32, 32, 3, 3), "b3": (32,), "w4": (3, 32), "b4": (3,),
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shared folder with one reference model, eight images a class to fit and four to judge."""
    folder = tmp_path_factory.mktemp("shared")
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(TEXT)
    for name, shape in SHAPES.items():
        scale = np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.1
        values = (scale * rng.normal(size=shape)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    onnx.checker.check_model(model, full_check=True)
    (folder / "models").mkdir()
    onnx.save(model, folder / "models" / "vgg16_cifar10.onnx")
    for part, count in (("calib", 8), ("val", 4)):
        for channel, label in enumerate(reversed(CLASSES)):
            place = folder / "data" / "cifar10" / part / label
            place.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 120, (8, 8, 3), dtype=np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(place / f"{index}.png")
    return folder

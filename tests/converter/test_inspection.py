"""Inspection: what it lists, with closed-form costs, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

import converter
from converter.errors import ConfigError, ModelError
from converter.report.files import report_text

TWO_CONVS = """
    <ir_version: 8, opset_import: ["": 17]>
    net (float[batch, 3, {size}] image) => (float[batch, 10] scores)
    <float[8, 3, 3, 3] w1, float[8] b1, float[8, 1, 3, 3] w2, float[10, 8] w3,
     float[8] scale, float[8] shift, float[8] mean, float[8] variance>
    {{
        a = Conv <pads = [1, 1, 1, 1]> (image, w1, b1)
        b = BatchNormalization (a, scale, shift, mean, variance)
        c = Relu (b)
        d = Conv <group = 8, pads = [1, 1, 1, 1]> (c, w2)
        e = GlobalAveragePool (d)
        f = Flatten (e)
        scores = Gemm <transB = 1> (f, w3)
    }}
"""


def saved(tmp_path: Path, size: str = "16, 12") -> Path:
    """File of two Convs, the second depthwise, and a Gemm; weights are seeded."""
    model = onnx.parser.parse_model(TWO_CONVS.format(size=size))
    random = np.random.default_rng(0)
    shapes = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 1, 3, 3), "w3": (10, 8)}
    shapes |= dict.fromkeys(("scale", "shift", "mean", "variance"), (8,))
    for name, shape in shapes.items():
        value = np.abs(random.standard_normal(shape)).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    kept = [value for value in model.graph.input if value.name == "image"]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    path = tmp_path / "net.onnx"
    onnx.save(model, path)
    return path


def test_layers_costs_and_reasons(tmp_path: Path) -> None:
    found = converter.inspect(saved(tmp_path))
    first, depthwise, last = found.layers
    assert [layer.op for layer in found.layers] == ["Conv", "Conv", "Gemm"]
    assert first.weight_shape == (8, 3, 3, 3)
    assert first.output_shape == (1, 8, 16, 12)
    assert first.macs == 8 * 16 * 12 * 27
    assert first.params == 8 * 27 + 8
    assert first.activation == "relu"  # through the BatchNormalization, which is folded
    assert first.convertible
    assert not depthwise.convertible
    assert "depthwise" in str(depthwise.reason)
    assert depthwise.macs == 8 * 16 * 12 * 9
    assert (last.macs, last.params, last.output_shape) == (80, 80, (1, 10))
    assert found.macs == sum(layer.macs or 0 for layer in found.layers)
    assert found.params == 8 * 27 + 8 + 72 + 80 + 4 * 8  # the BatchNormalization counts as stored
    assert found.folded > 0
    assert found.convertible_macs == found.macs - (depthwise.macs or 0)


def test_report_is_json(tmp_path: Path) -> None:
    found = converter.inspect(str(saved(tmp_path)))
    plain = json.loads(report_text(found.to_dict()))
    assert plain["layers"][0]["convertible"] is True
    assert plain["layers"][1]["reason"]
    assert plain["inputs"] == [{"name": "image", "shape": ["batch", 3, 16, 12], "dtype": "float32"}]


def test_free_size_needs_one(tmp_path: Path) -> None:
    path = saved(tmp_path, "h, w")
    with pytest.raises(ConfigError, match=r"'image'.*--size 224"):
        converter.inspect(path)
    found = converter.inspect(path, (20, 10))
    assert found.layers[0].output_shape == (1, 8, 20, 10)


def test_size_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not fit"):
        converter.inspect(saved(tmp_path), (20, 10))
    assert converter.inspect(saved(tmp_path), (16, 12)).layers


def test_no_layer_is_said(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> net (float[n, 4] x) => (float[n, 4] y) '
        "{ y = Relu (x) }"
    )
    path = tmp_path / "relu.onnx"
    onnx.save(model, path)
    found = converter.inspect(path)
    assert found.layers == ()
    assert "nothing to convert" in found.notes[0]


def test_a_quantized_model_is_said_to_be_one(tmp_path: Path) -> None:
    quantized = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> q (float[n, 4] x) => (float[n, 4] y)
        <float s = {0.1}, int8[4, 4] w = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}> {
            f = DequantizeLinear (w, s)
            y = MatMul (x, f)
        }"""
    )
    onnx.save(quantized, tmp_path / "q.onnx")
    found = converter.inspect(tmp_path / "q.onnx")
    assert found.notes[0].startswith("the model is quantized already")
    assert "--int8" in found.notes[0]
    assert found.layers[0].reason is not None


def test_missing_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.onnx"):
        converter.inspect(tmp_path / "none.onnx")


def test_layer_in_a_body(tmp_path: Path) -> None:
    """It is listed with its reason; an output of the same name outside does not lend its shape."""
    model = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["": 17]>
        net (bool yes, float[1, 4] x) => (float[1, 4] y)
        <float[4, 4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}>
        {
            y = If (yes) <
                then_branch = one () => (float[1, 4] p) { p = MatMul (x, w) },
                else_branch = two () => (float[1, 4] q) { q = Identity (x) }
            >
        }
        """
    )
    path = tmp_path / "body.onnx"
    onnx.save(model, path)
    (layer,) = converter.inspect(path).layers
    assert not layer.convertible
    assert layer.output_shape is None


def test_real_networks(shared: Path) -> None:
    found = converter.inspect(shared / "models" / "resnet20_cifar10.onnx")
    assert len(found.layers) == 20
    assert all(layer.convertible and layer.output_shape for layer in found.layers)
    assert found.macs == sum(layer.macs or 0 for layer in found.layers)

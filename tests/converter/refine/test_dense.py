"""A converted network, read off into the original's graph, computes the same."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from converter.config import Runtime
from converter.refine import dense as module
from converter.refine.dense import dense
from passes.base import run_passes
from passes.exchange import export_model, import_graph
from passes.layers import Layer, find_layers
from passes.split import Branches, Factor, Split

RUNTIME = Runtime(threads=1)
TEXT = """<ir_version: 8, opset_import: ["": 17]>
net (float[n, 3, 17, 16] x) => (float[n, 5] y) {
    [first] a = Conv <pads = [1, 2, 1, 0]> (x, w1, b1)
    r = Relu (a)
    [same] s = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (r, w2)
    t = Relu (s)
    [dilated] d = Conv <dilations = [2, 1], pads = [2, 1, 2, 1], strides = [1, 1]> (t, w3, b3)
    u = Add (d, t)
    v = Relu (u)
    [kept] k = Conv (v, w4, b4)
    p = GlobalAveragePool (k)
    f = Flatten (p)
    [gemm] g = Gemm <alpha = 0.5, transB = 1> (f, w5, b5)
    h = Relu (g)
    [matmul] y = MatMul (h, w6)
}"""
SHAPES = {
    "w1": (8, 3, 3, 3),
    "b1": (8,),
    "w2": (8, 8, 3, 3),
    "w3": (8, 8, 3, 3),
    "b3": (8,),
    "w4": (8, 8, 1, 1),
    "b4": (8,),
    "w5": (6, 8),
    "b5": (6,),
    "w6": (6, 5),
}


def network() -> onnx.ModelProto:
    model = onnx.parser.parse_model(TEXT)
    random = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        values = random.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


def branches(layer: Layer, scheme: str) -> Branches:
    """Random ones of that scheme, with a bias also where the layer had none."""
    assert layer.weight is not None
    random = np.random.default_rng(len(layer.name))

    def values(*shape: int) -> NDArray[np.float32]:
        return random.standard_normal(shape).astype(np.float32)

    outputs, channels, *kernel = layer.weight.shape
    axes = tuple(range(len(kernel)))
    ones = [1] * len(kernel)
    support, sparse = None, None
    factors: tuple[Factor, ...] = ()
    if scheme in ("sparse", "channel beside sparse"):
        support = np.arange(0, channels, 2, dtype=np.int64)
        sparse = values(outputs, len(support), *kernel)
    if scheme in ("channel", "channel beside sparse") or (scheme != "sparse" and not kernel):
        factors = (Factor(values(2, channels, *kernel), axes), Factor(values(outputs, 2, *ones)))
    elif scheme == "spatial":
        first, second = values(2, channels, kernel[0], 1), values(outputs, 2, 1, kernel[1])
        factors = (Factor(first, (0,)), Factor(second, (1,)))
    elif scheme == "depthwise":
        filters = Factor(values(6, 1, *kernel), axes, 2)
        factors = (Factor(values(3, channels, *ones)), filters, Factor(values(outputs, 6, *ones)))
    return Branches(support, sparse, factors, values(outputs))


def answers(model: onnx.ModelProto) -> NDArray[np.float32]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(5).standard_normal((2, 3, 17, 16)).astype(np.float32)
    found: NDArray[np.float32] = session.run(["y"], {"x": x})[0]
    return found


@pytest.mark.parametrize(
    "scheme", ["sparse", "channel", "spatial", "depthwise", "channel beside sparse"]
)
@pytest.mark.parametrize("patches", [1 << 12, 1 << 26], ids=["a few at a time", "all at once"])
def test_it_computes_what_the_converted_one_does(
    scheme: str, patches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATCH_BYTES", patches)
    original = network()
    graph = import_graph(original)
    before = {layer.name: layer for layer in find_layers(graph)}
    splits = [
        Split(layer, branches(layer, scheme)) for name, layer in before.items() if name != "kept"
    ]
    run_passes(graph, splits)
    converted = export_model(graph, original)
    trained = numpy_helper.to_array(next(t for t in converted.graph.initializer if t.name == "w4"))
    for tensor in converted.graph.initializer:
        if tensor.name == "w4":  # a layer that was left as it is, and trained
            tensor.CopyFrom(numpy_helper.from_array(trained + np.float32(0.5), "w4"))

    found = dense(original, converted, RUNTIME)
    onnx.checker.check_model(found)
    wanted = answers(converted)
    np.testing.assert_allclose(answers(found), wanted, rtol=0, atol=1e-5 * np.ptp(wanted))
    assert np.abs(answers(original) - wanted).max() > 0.1 * np.ptp(wanted)
    after = {layer.name: layer for layer in find_layers(import_graph(found))}
    assert after.keys() == before.keys()
    for name, layer in after.items():
        assert layer.reason is None
        assert layer.weight is not None
        was = before[name]
        assert was.weight is not None
        assert layer.weight.shape == was.weight.shape
        assert (layer.input, layer.response) == (was.input, was.response)
        assert (layer.strides, layer.pads, layer.dilations, layer.auto_pad) == (
            was.strides,
            was.pads,
            was.dilations,
            was.auto_pad,
        )


def test_nothing_changes_where_nothing_was_replaced() -> None:
    original = network()
    np.testing.assert_array_equal(answers(dense(original, original, RUNTIME)), answers(original))

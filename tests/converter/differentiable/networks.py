"""Networks from text, and what onnxruntime and torch say of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import torch
from onnx import numpy_helper

from converter.differentiable import TorchGraph


def parse(graph: str, opset: int = 17, ir: int = 8, imports: str = "") -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        f'<ir_version: {ir}, opset_import: ["": {opset}{imports}]>\n{graph}'
    )
    onnx.checker.check_model(model)
    return model


def answers(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def random_feeds(model: onnx.ModelProto, seed: int = 0, batch: int = 2) -> dict[str, np.ndarray]:
    """Standard normal values for every input; a free size becomes `batch`."""
    rng = np.random.default_rng(seed)
    given = {tensor.name for tensor in model.graph.initializer}
    return {
        value.name: rng.standard_normal(
            [dim.dim_value or batch for dim in value.type.tensor_type.shape.dim], dtype=np.float32
        )
        for value in model.graph.input
        if value.name not in given
    }


def computed(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    with torch.no_grad():
        outputs, _ = TorchGraph(model).forward({n: torch.tensor(a) for n, a in feeds.items()})
    return {name: value.numpy() for name, value in outputs.items()}


def assert_same(
    model: onnx.ModelProto, feeds: Mapping[str, np.ndarray], tolerance: float = 1e-5
) -> None:
    """At most `tolerance` of the output's range apart, and of the same shape and type."""
    found, wanted = computed(model, feeds), answers(model, feeds)
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert found[name].shape == value.shape
        assert found[name].dtype == value.dtype
        scale = max(float(np.ptp(value)), float(np.abs(value).max())) if value.size else 1.0
        difference = np.abs(found[name].astype(np.float64) - value)
        assert difference.max(initial=0.0) <= tolerance * scale


X4 = "float[2,3,7,8] x"
Y4 = "float[n,c,h,w] y"
CONV_W = "float[4,3,3,3] w"


def one(node: str, inputs: str = X4, output: str = Y4, constants: str = "") -> str:
    """Text of a graph with one or more nodes."""
    return f"g ({inputs}) => ({output}) {f'<{constants}>' if constants else ''} {{ {node} }}"


SMALL = """
g (float[2,2,6,6] x, float[3,2,3,3] w, float[3] b, float[3,3] v) => (float[n,3] y) {
  a = Conv <pads=[1,1,1,1]> (x, w, b)
  p = AveragePool <kernel_shape=[2,2], strides=[2,2]> (a)
  t = Tanh (p)
  s = Sigmoid (a)
  m = GlobalAveragePool (s)
  q = GlobalAveragePool (t)
  r = Mul (m, q)
  f = Flatten (r)
  y = Gemm <transB=1> (f, v)
}
"""


def small() -> onnx.ModelProto:
    """A smooth network with random weights; `a` is read by two nodes."""
    model = parse(SMALL)
    for name, values in random_feeds(model, seed=1).items():
        if name != "x":
            model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model

"""What the tests of splitting layers share: small models, factors, and what onnxruntime makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from passes.base import PassResult, run_passes
from passes.exchange import export_model, import_graph
from passes.layers import Layer, find_layers
from passes.normalise import normalising
from passes.split import Branches, Factor, Split

Run = Callable[..., dict[str, np.ndarray]]
Exact = Callable[..., Branches]
Arrays = Mapping[str, np.ndarray]

WAYS = ["sparse", "low rank", "parts", "overlap"]


def random(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(
    body: str,
    arrays: Arrays,
    *,
    x: tuple[int, ...],
    opset: int = 17,
    ir: int = 8,
) -> onnx.ModelProto:
    """Model that computes y from x; valid, with the shape of y."""
    nodes = onnx.parser.parse_graph(f"g (float x) => (float y) {{ {body} }}").node
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    if ir < 4:
        graph.input.extend(
            helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in graph.initializer
        )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    model.graph.output[0].CopyFrom(onnx.shape_inference.infer_shapes(model).graph.output[0])
    onnx.checker.check_model(model)
    return model


def split(
    model: onnx.ModelProto, make: Callable[[Layer], Branches]
) -> tuple[onnx.ModelProto, list[PassResult]]:
    """Split every layer that can be; check what comes out."""
    graph = import_graph(model)
    run_passes(graph, normalising())
    layers = [layer for layer in find_layers(graph) if layer.reason is None]
    results = [Split(layer, make(layer))(graph) for layer in layers]
    changed = export_model(graph, model)
    onnx.checker.check_model(changed)
    assert export_model(graph, model).SerializeToString() == changed.SerializeToString()
    return changed, results


def assert_same(run: Run, model: onnx.ModelProto, changed: onnx.ModelProto) -> None:
    """Outputs agree to float32 round-off: sums of some hundred products, relative to the range."""
    dims = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    feeds = {"x": random(*dims, seed=9)}
    wanted, found = run(model, feeds)["y"], run(changed, feeds)["y"]
    assert wanted.shape == found.shape
    scale = max(float(np.ptp(wanted)), float(np.abs(wanted).max()), 1e-3)
    assert np.abs(wanted - found).max() <= 2e-5 * scale


def chain(
    *weights: np.ndarray, axes: tuple[tuple[int, ...], ...] | None = None
) -> tuple[Factor, ...]:
    """Factors with these weights; without `axes`, the first has all the kernel."""
    if axes is None:
        axes = (tuple(range(weights[0].ndim - 2)), *[()] * (len(weights) - 1))
    return tuple(Factor(weight, own) for weight, own in zip(weights, axes, strict=True))


def names(model: onnx.ModelProto) -> list[str]:
    return [node.name for node in model.graph.node]


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def optimised(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """Return what onnxruntime makes of a model at its default level."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimised.onnx")

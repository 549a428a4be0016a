"""A small residual network whose layers are measured, and forms for them."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from converter.config import Runtime, Target
from converter.planner.milliseconds.forms import Point
from converter.schemes.form import Form
from passes.layers import Layer, find_layers
from passes.normalise import import_with_shapes
from passes.split import Branches, Factor

TARGET = Target(Runtime(threads=1), batch=2)
SIZE = 24
FEEDS = {"x": np.ones((2, 16, SIZE, SIZE), np.float32)}
WIDE = 64


def network(*, blocks: int = 2) -> onnx.ModelProto:
    """Conv, then residual blocks that are alike, then a Gemm: all that attribution has to tell apart."""
    generator = np.random.default_rng(0)
    weights = []

    def weight(name: str, *shape: int) -> str:
        values = generator.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def conv(source: str, name: str, channels: int) -> onnx.NodeProto:
        inputs = [source, weight(f"{name}.w", WIDE, channels, 3, 3), weight(f"{name}.b", WIDE)]
        return helper.make_node("Conv", inputs, [name], name=f"node/{name}", pads=[1, 1, 1, 1])

    nodes = [conv("x", "stem", 16), helper.make_node("Relu", ["stem"], ["r0"])]
    for index in range(blocks):
        nodes += [
            conv(f"r{index}", f"first{index}", WIDE),
            helper.make_node("Relu", [f"first{index}"], [f"inner{index}"]),
            conv(f"inner{index}", f"second{index}", WIDE),
            helper.make_node("Add", [f"second{index}", f"r{index}"], [f"sum{index}"]),
            helper.make_node("Relu", [f"sum{index}"], [f"r{index + 1}"]),
        ]
    last = f"r{blocks}"
    nodes += [
        helper.make_node("GlobalAveragePool", [last], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", weight("head.w", 32, WIDE)], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 16, SIZE, SIZE])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 32])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def layers_of(model: onnx.ModelProto) -> tuple[Layer, ...]:
    return find_layers(import_with_shapes(model))


def replace(layer: Layer, form: Form) -> Branches:
    assert layer.weight is not None
    outputs, channels, *kernel = layer.weight.shape

    def weight(*shape: int) -> NDArray[np.float32]:
        return np.full(shape, 0.01, np.float32)

    support = sparse = None
    factors: tuple[Factor, ...] = ()
    if form.support:
        support = np.arange(form.support, dtype=np.int64) * 2
        sparse = weight(outputs, form.support, *kernel)
    if form.ranks:
        (rank,) = form.ranks
        down = Factor(weight(rank, channels, *kernel), tuple(range(len(kernel))))
        factors = (down, Factor(weight(outputs, rank, *[1] * len(kernel))))
    return Branches(support, sparse, factors, weight(outputs, 1)[:, 0])


def channel(layer: Layer, rank: int, support: int = 0) -> Point:
    assert layer.weight is not None
    outputs, columns = len(layer.weight), layer.weight[0].size
    return Form("channel", (rank,), support), float(rank * (columns + outputs))


def points_of(layers: tuple[Layer, ...], *ranks: int) -> dict[str, list[Point]]:
    return {layer.name: [channel(layer, rank) for rank in ranks] for layer in layers}

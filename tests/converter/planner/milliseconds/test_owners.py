"""Whose each node of an optimised graph is."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import helper, numpy_helper

from converter.planner.milliseconds.forms import Subject, with_forms
from converter.planner.milliseconds.owners import Owners, by_layer
from converter.planner.milliseconds.profiling import Profile, profiled
from tests.converter.planner.milliseconds.residual import (
    FEEDS,
    TARGET,
    channel,
    layers_of,
    network,
    replace,
)


@pytest.mark.parametrize("support", [0, 6, 16])
def test_every_node_of_the_optimised_graph_is_counted_once(support: int) -> None:
    model = network()
    layers = layers_of(model)
    forms = {layer.name: channel(layer, 6, min(support, 8))[0] for layer in layers}
    subject = Subject(model, tuple(layers), {}, replace, FEEDS, TARGET.runtime)
    profile = profiled(with_forms(subject, forms), FEEDS, TARGET.runtime, 0.01)
    times = by_layer(profile, layers, 0.0)
    assert set(times) == {layer.name for layer in layers}
    assert {node.name for node in profile.graph.node} == set(profile.nodes)
    free = [
        node
        for node in profile.graph.node
        if Owners(layers).of_node(node) is None
        and node.op_type not in ("ReorderInput", "ReorderOutput")
    ]
    assert {node.op_type for node in free} == {"GlobalAveragePool", "Flatten"}
    rest = profile.total(0.0) - sum(times.values())
    assert rest >= sum(profile.nodes[node.name] for node in free) - 1e-9
    assert rest < 0.5 * profile.total(0.0)


@pytest.mark.parametrize("activation", ["Relu", "Tanh", "Sigmoid", "Softplus"])
@pytest.mark.parametrize("rank", [0, 4])
def test_an_activation_within_a_gemm_leaves_it_its_layer(activation: str, rank: int) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> mlp (float[n, 24] x) => (float[n, 8] y) {'
        f"  [first] h = Gemm <transB = 1> (x, a)  t = {activation} (h)"
        "  [last] y = Gemm <transB = 1> (t, b) }"
    )
    for name, shape in (("a", (16, 24)), ("b", (8, 16))):
        weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, name))
    layers = layers_of(model)
    feeds = {"x": np.ones((1, 24), np.float32)}
    forms = {layer.name: channel(layer, rank, 0)[0] for layer in layers} if rank else {}
    subject = Subject(model, tuple(layers), {}, replace, feeds, TARGET.runtime)
    profile = profiled(with_forms(subject, forms), feeds, TARGET.runtime, 0.01)
    assert any(node.op_type == "FusedGemm" for node in profile.graph.node)
    assert set(by_layer(profile, layers, 0.0)) == {"first", "last"}


def test_reorders_belong_to_those_who_ask_for_them() -> None:
    layers = [layer for layer in layers_of(network(blocks=1)) if layer.op == "Conv"]
    stem, first, second = layers
    nodes = [
        helper.make_node("Conv", ["x"], ["token0"], name="r0_nchwc"),
        helper.make_node("ReorderOutput", ["token0"], ["r0"], name="ReorderOutput"),
        helper.make_node(
            "Gather", ["r0"], ["node/first0/gather_output"], name="node/first0/gather_output"
        ),
        helper.make_node(
            "ReorderInput", ["node/first0/gather_output"], ["token1"], name="ReorderInput"
        ),
        helper.make_node("Conv", ["token1", "r0"], ["token2"], name="inner0_nchwc"),
        helper.make_node("Conv", ["token2", "r0"], ["token3"], name="sum0_nchwc"),
        helper.make_node("ReorderOutput", ["token3"], ["r1"], name="ReorderOutput_token_4"),
        helper.make_node("GlobalAveragePool", ["r1"], ["pooled"], name="pooled"),
    ]
    graph = helper.make_graph(nodes, "optimised", [], [])
    times = {node.name: float(2**index) for index, node in enumerate(nodes)}
    profile = Profile(graph, times, 1.0)
    # the first reorder is read by two layers, the last one by no layer
    assert by_layer(profile, layers, 0.0) == {
        stem.name: 1.0,
        first.name: 0.5 * 2 + 4 + 8 + 16,
        second.name: 0.5 * 2 + 32,
    }

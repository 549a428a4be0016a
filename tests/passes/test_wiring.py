from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from passes.exchange import export_model, import_graph
from passes.wiring import (
    Wiring,
    constant_value,
    element_type,
    fresh_name,
    label,
    names_in,
    per_output,
    replace_nodes,
)

Parse = Callable[..., onnx.ModelProto]

BRANCHING = """
    g (bool c, float[2] x) => (float[2] y, float[2] h) <float[2] w = {1, 2}> {
        h = Relu(x)
        k = Mul(h, h)
        m = Add(k, w)
        y = If(c) <then_branch = t () => (float[2] p) { p = Add(x, m) },
                   else_branch = e () => (float[2] q) { q = Identity(x) }>
    }"""


def test_consumers_count_nodes_outputs_and_subgraphs(parse: Parse) -> None:
    graph = import_graph(parse(BRANCHING))
    wiring = Wiring(graph)
    relu, mul, add, _ = graph.nodes
    assert wiring.is_output(relu.outputs[0])
    assert wiring.sole_consumer(relu.outputs[0]) is None  # an output of the graph as well
    assert wiring.consumers(relu.outputs[0]) == [mul]  # once, although it reads it twice
    assert wiring.sole_consumer(mul.outputs[0]) is add
    assert [node.op for node in wiring.consumers(add.outputs[0])] == ["Add"]
    assert wiring.inner_consumers(add.outputs[0]) is None  # read in a subgraph
    assert len(wiring.consumers(graph.inputs[1])) == 3


def test_names_of_subgraphs_are_taken(parse: Parse) -> None:
    names = names_in(import_graph(parse(BRANCHING)))
    assert {"c", "x", "y", "h", "k", "m", "w", "p", "q"} <= names
    assert fresh_name(names, "p") == "p_1"
    assert fresh_name(names, "p") == "p_2"
    assert fresh_name(names, "new") == "new"


def test_a_node_without_a_name_is_called_by_its_output(parse: Parse) -> None:
    graph = import_graph(parse(BRANCHING))
    assert label(graph.nodes[0]) == "h"
    graph.nodes[0].name = "relu"
    assert label(graph.nodes[0]) == "relu"


def test_reading_a_constant_neither_loads_nor_opens_it(parse: Parse) -> None:
    model = parse("g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Add(x, w) }")
    graph = import_graph(model)
    x, w = graph.nodes[0].inputs
    value = constant_value(w)
    assert value is not None
    np.testing.assert_array_equal(value, [1, 2])
    with pytest.raises(ValueError, match="read-only"):
        value[0] = 5
    assert constant_value(x) is None
    assert element_type(x) == element_type(w) == onnx.TensorProto.FLOAT
    assert element_type(gs.Variable("unknown")) is None
    assert export_model(graph, model).SerializeToString() == model.SerializeToString()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_per_output_is_what_broadcasting_says(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4)))
    axis = data.draw(st.integers(0, len(shape) - 1))
    dims = st.lists(st.sampled_from([1, 1, 1, shape[axis], 2]), max_size=5).map(tuple)
    constant = data.draw(
        hnp.arrays(np.float32, dims, elements=st.integers(-9, 9).map(float), unique=False)
    )
    found = per_output(constant, len(shape), axis, shape[axis])
    try:
        total = np.zeros(shape) + constant
    except ValueError:
        assert found is None
        return
    fits = total.shape == shape
    along = [1] * len(shape)
    along[axis] = -1
    if found is not None:
        assert fits
        np.testing.assert_array_equal(total, np.zeros(shape) + found.reshape(along))
    else:
        assert not fits or constant.ndim > len(shape) or max(constant.shape) > 1


def test_nodes_are_replaced_at_their_place(parse: Parse) -> None:
    model = parse("g (float[2] x) => (float[2] y) { a = Relu(x) b = Neg(a) y = Abs(b) }")
    graph = import_graph(model)
    first, middle, last = graph.nodes
    new = gs.Node("Exp", "new", inputs=[first.outputs[0]], outputs=[gs.Variable("c")])
    output = middle.outputs[0]
    replace_nodes(graph, [middle], [new])
    new.outputs = [output]
    assert [node.op for node in graph.nodes] == ["Relu", "Exp", "Abs"]
    assert list(last.inputs[0].inputs) == [new]
    assert not middle.inputs
    assert not middle.outputs
    onnx.checker.check_model(export_model(graph, model), full_check=True)

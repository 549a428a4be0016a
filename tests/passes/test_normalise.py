from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from passes.base import PassResult, run_passes
from passes.exchange import export_model, import_graph
from passes.normalise import FoldConstants, InferShapes, RemoveUnused, normalising

Parse = Callable[..., onnx.ModelProto]
Run = Callable[..., dict[str, np.ndarray]]


def normalised(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[PassResult, ...]]:
    graph = import_graph(model)
    results = run_passes(graph, normalising())
    return export_model(graph, model), results


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


# Each reads constants only and ends in c, which is added to x.
FOLDED = [
    (7, "float[2] x", "c = Constant<value = float[2] {1, 2}>()"),
    (13, "float[2] x", "c = Constant<value_float = 1.5>()"),
    (13, "float[2] x", "c = Constant<value_floats = [1.5, 2.5]>()"),
    (13, "int64[2] x", "c = Constant<value_int = 3>()"),
    (13, "int64[2] x", "c = Constant<value_ints = [3, 4]>()"),
    (9, "float[2] x", "a = Identity(w2) c = Identity(a)"),
    (9, "float[2] x", "c = Cast<to = 1>(i2)"),
    (13, "float[2, 3] x", "s = Constant<value_ints = [2, 3]>() c = ConstantOfShape(s)"),
    (
        9,
        "int64[2, 3] x",
        "s = Constant<value = int64[2] {2, 3}>() c = ConstantOfShape<value = int64[1] {7}>(s)",
    ),
    (
        13,
        "float x",
        "s = Constant<value_ints: ints = []>() c = ConstantOfShape<value = float[1] {7}>(s)",
    ),
    (7, "float[3, 2] x", "c = Reshape(w23, s31)"),
    (9, "float[2, 1, 3] x", "s = Constant<value = int64[3] {0, 1, 3}>() c = Reshape(w23, s)"),
    (
        14,
        "float[0, 3] x",
        "s = Constant<value = int64[2] {0, 3}>() c = Reshape<allowzero = 1>(w03, s)",
    ),
    (9, "float[2, 1, 1] x", "c = Unsqueeze<axes = [1, 2]>(w2)"),
    (11, "float[2, 1] x", "c = Unsqueeze<axes = [-1]>(w2)"),
    (13, "float[1, 2, 1] x", "s = Constant<value_ints = [0, -1]>() c = Unsqueeze(w2, s)"),
    (9, "float[2, 3] x", "c = Squeeze<axes = [0]>(w123)"),
    (13, "float[2, 3] x", "s = Constant<value_ints = [0]>() c = Squeeze(w123, s)"),
    (13, "float[2, 3] x", "c = Squeeze(w123)"),
    (9, "float[3, 2] x", "c = Transpose(w23)"),
    (9, "float[3, 1, 2] x", "c = Transpose<perm = [2, 0, 1]>(w123)"),
    (9, "float[1, 6] x", "c = Flatten(w123)"),
    (11, "float[2, 3] x", "c = Flatten<axis = -1>(w123)"),
    (9, "float[1, 6] x", "c = Flatten<axis = 0>(w123)"),
    (9, "float[4] x", "c = Concat<axis = 0>(w2, w2)"),
    (9, "float[2, 2] x", "c = Slice<axes = [1], starts = [1], ends = [9]>(w23)"),
    (
        13,
        "float[2, 2] x",
        "b = Constant<value_ints = [-1]>() e = Constant<value_ints = [-9]>() "
        "a = Constant<value_ints = [1]>() s = Constant<value_ints = [-2]>() "
        "c = Slice(w23, b, e, a, s)",
    ),
    (13, "float[1, 3] x", "b = Constant<value_ints = [1]>() c = Slice(w23, b, i2)"),
]
CONSTANTS = (
    "float[2] w2 = {1, 2}, float[2, 3] w23 = {1, 2, 3, 4, 5, 6}, int64[2] i2 = {4, 9}, "
    "float[1, 2, 3] w123 = {1, 2, 3, 4, 5, 6}, float[0, 3] w03 = {}, "
    "int64[2] s31 = {3, -1}"
)


@pytest.mark.parametrize(("opset", "shape", "body"), FOLDED)
@pytest.mark.parametrize("ir", [3, 8])
def test_constant_expressions_become_initializers(
    parse: Parse, run: Run, opset: int, shape: str, body: str, ir: int
) -> None:
    kind = shape.removesuffix(" x")
    if "i2)" in body and "Slice" in body:
        constants = CONSTANTS.replace("int64[2] i2 = {4, 9}", "int64[1] i2 = {2}")
    else:
        constants = CONSTANTS
    model = parse(
        f"g ({shape}) => ({kind} y) <{constants}> {{ {body} y = Add(x, c) }}", opset=opset
    )
    if ir == 3:  # as the exporters of its time wrote it
        for tensor in model.graph.initializer:
            value = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            model.graph.input.append(value)
    model.ir_version = ir
    changed, results = normalised(model)
    assert ops(changed) == ["Add"]
    assert results[0].modified
    assert not results[0].skips
    onnx.checker.check_model(changed, full_check=True)
    dims = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    dtype = np.int64 if shape.startswith("int64") else np.float32
    feeds = {"x": np.arange(np.prod(dims, dtype=int)).reshape(dims).astype(dtype)}
    np.testing.assert_array_equal(run(changed, feeds)["y"], run(model, feeds)["y"])


def test_texts_become_initializers(parse: Parse, run: Run) -> None:
    model = parse(
        """g (int64 i) => (string y)
        { c = Constant<value_strings = ["a", "ü"]>() y = Gather(c, i) }"""
    )
    changed, _ = normalised(model)
    assert ops(changed) == ["Gather"]
    assert run(changed, {"i": np.array(1)})["y"] == "ü"


def test_constants_keep_their_name_and_a_shared_weight_stays_one(parse: Parse) -> None:
    model = parse(
        """g (float[2] x) => (float[2] y) <float[2] w = {1, 2}>
        { a = Identity(w) b = Constant<value = float[2] {3, 4}>()
          h = Add(x, a) k = Mul(h, w) y = Mul(k, b) }"""
    )
    changed, _ = normalised(model)
    assert [tensor.name for tensor in changed.graph.initializer] == ["w", "b"]
    assert [list(node.input) for node in changed.graph.node] == [["x", "w"], ["h", "w"], ["k", "b"]]


def test_a_constant_reaches_the_subgraphs_that_read_it(parse: Parse, run: Run) -> None:
    model = parse(
        """g (bool c, float[2] x) => (float[2] y) <float[2] w = {1, 2}> {
            a = Identity(w)
            b = Constant<value = float[2] {3, 4}>()
            y = If(c) <then_branch = t () => (float[2] p) { p = Add(x, a) },
                       else_branch = e () => (float[2] q) { q = Add(x, b) }>
        }"""
    )
    changed, _ = normalised(model)
    assert ops(changed) == ["If"]
    onnx.checker.check_model(changed, full_check=True)
    for choice, wanted in ((True, [2, 3]), (False, [4, 5])):
        feeds = {"c": np.array(choice), "x": np.ones(2, np.float32)}
        np.testing.assert_array_equal(run(changed, feeds)["y"], wanted)


LEFT = [
    ("(float[2] y, float[2] c)", "c = Identity(w2)", "is an output of the model"),
    ("(float[2] y)", "c = ConstantOfShape(big)", "is too large to be stored"),
    ("(float[2] y)", "s = Cast<to = 7>(nan) c = Reshape(w2, s)", "cannot hold"),
    ("(float[2] y)", "b = Cast<to = 16>(w2) c = Cast<to = 1>(b)", "FLOAT to BFLOAT16 is left"),
    ("(float[2] y)", "a = Cast<to = 8>(i2) c = Cast<to = 1>(a)", "INT64 to STRING is left"),
    ("(float[2] y)", "s = Constant<value_ints = [0, 0]>() c = Reshape(w2, s)", "lacks"),
    ("(float[2] y)", "s = Constant<value_ints = [3]>() c = Reshape(w2, s)", "reshape"),
    ("(float[2] y)", "s = Constant<value_ints = [0]>() c = Squeeze(w2, s)", "squeeze"),
]


@pytest.mark.parametrize(("outputs", "body", "why"), LEFT)
def test_what_cannot_be_folded_stays_with_its_reason(outputs: str, body: str, why: str) -> None:
    text = f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[2] x) => {outputs}
        <float[2] w2 = {{1, 2}}, int64[2] i2 = {{4, 9}}, int64[2] big = {{1000000, 1000000}},
         float[1] nan = {{1e30}}> {{ {body} y = Add(x, c) }}"""
    model = onnx.parser.parse_model(text)
    graph = import_graph(model)
    result = FoldConstants()(graph)
    assert any(why in skip.why for skip in result.skips)
    assert len(graph.nodes) > 1


def test_both_bounds_on_size_hold(parse: Parse) -> None:
    model = parse(
        """g (float[4] x) => (float[4] y) <int64[1] s = {4}>
        { a = ConstantOfShape(s) b = ConstantOfShape(s) h = Add(x, a) y = Add(h, b) }"""
    )
    for bounds, folded in (((16, 32), 2), ((16, 31), 1), ((15, 32), 0)):
        graph = import_graph(model)
        result = FoldConstants(*bounds)(graph)
        assert (len(result.changes), len(result.skips)) == (folded, 2 - folded)


def test_a_sparse_constant_stays_a_node() -> None:
    values = numpy_helper.from_array(np.array([1, 2], np.float32))
    indices = numpy_helper.from_array(np.array([0, 3], np.int64))
    sparse = helper.make_sparse_tensor(values, indices, [4])
    graph = helper.make_graph(
        [
            helper.make_node("Constant", [], ["c"], sparse_value=sparse),
            helper.make_node("Add", ["x", "c"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    changed, results = normalised(model)
    assert changed.SerializeToString() == model.SerializeToString()
    assert results[0].skips[0].why == "its value is no dense tensor"


def test_an_operator_of_another_domain_is_left_alone(parse: Parse) -> None:
    model = parse(
        """g (float[2] x) => (float[2] y) <float[2] w = {1, 2}>
        { c = own.Identity(w) y = Add(x, c) }""",
        imports=', "own": 1',
    )
    graph = import_graph(model)
    assert not FoldConstants()(graph).modified
    assert len(graph.nodes) == 2


def test_folding_a_weight_that_callers_may_override_is_said(parse: Parse) -> None:
    model = parse(
        """g (float[2] x, float[2] w) => (float[2, 1] y) <float[2] w = {1, 2}>
        { s = Constant<value_ints = [2, 1]>() c = Reshape(w, s) d = Reshape(x, s) y = Add(d, c) }"""
    )
    changed, results = normalised(model)
    assert results[0].changes[1].what.endswith("it no longer follows the input w")
    assert [value.name for value in changed.graph.input] == ["x"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_slices_agree_with_onnxruntime(run: Run, data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    axes = data.draw(st.permutations(range(len(shape))).map(lambda p: p[: len(shape) // 2 + 1]))
    bound = st.integers(-6, 6) | st.sampled_from([np.iinfo(np.int64).max, np.iinfo(np.int32).min])
    starts, ends = ([data.draw(bound) for _ in axes] for _ in range(2))
    steps = [data.draw(st.sampled_from([1, 2, -1, -2])) for _ in axes]
    value = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    given_as = {"w": value}
    for name, numbers in (("b", starts), ("e", ends), ("a", axes), ("s", steps)):
        given_as[name] = np.array(numbers, np.int64)
    graph = helper.make_graph(
        [
            helper.make_node("Slice", list(given_as), ["c"]),
            helper.make_node("Add", ["x", "c"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in given_as.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    changed, results = normalised(model)
    assert ops(changed) == ["Add"] or "backwards to the end" in results[0].skips[0].why
    feeds = {"x": np.array(1, np.float32)}
    np.testing.assert_array_equal(run(changed, feeds)["y"], run(model, feeds)["y"])


def test_what_reaches_no_output_is_removed(parse: Parse) -> None:
    model = parse(
        """g (float[2] x, float[2] z) => (float[2] y) <float[2] w = {1, 2}, float[2] v = {3, 4}>
        { a = Relu(z) b = Add(a, w) y = Relu(x) }"""
    )
    graph = import_graph(model)
    result = RemoveUnused()(graph)
    assert [change.node for change in result.changes] == ["Relu", "Add", "v"]
    changed = export_model(graph, model)
    assert ops(changed) == ["Relu"]
    assert not changed.graph.initializer
    assert [value.name for value in changed.graph.input] == ["x", "z"]
    assert not RemoveUnused()(graph).modified


def test_branches_of_what_is_removed_read_nothing_any_more(parse: Parse) -> None:
    model = parse(
        """g (bool c, float[2] x) => (float[2] y) {
            a = Relu(x)
            z = If(c) <then_branch = t () => (float[2] p) { p = Abs(a) },
                       else_branch = e () => (float[2] q) { q = Identity(a) }>
            y = Sigmoid(a)
        }"""
    )
    graph = import_graph(model)
    RemoveUnused()(graph)
    (response,) = graph.nodes[0].outputs
    assert [node.op for node in response.outputs] == ["Sigmoid"]
    assert ops(export_model(graph, model)) == ["Relu", "Sigmoid"]


def test_an_identity_of_what_callers_may_set_follows_it_still(parse: Parse) -> None:
    model = parse(
        """g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1, 2}>
        { c = Identity(w) y = Add(x, c) }"""
    )
    changed, results = normalised(model)
    assert not any("no longer follows" in change.what for change in results[0].changes)
    assert list(changed.graph.node[0].input) == ["x", "w"]
    assert [value.name for value in changed.graph.input] == ["x", "w"]


def test_what_a_subgraph_reads_is_not_unused(parse: Parse) -> None:
    model = parse(
        """g (bool c, float[2] x) => (float[2] y) <float[2] w = {1, 2}> {
            a = Relu(x)
            y = If(c) <then_branch = t () => (float[2] p) { p = Add(a, w) },
                       else_branch = e () => (float[2] q) { q = Identity(w) }>
        }"""
    )
    changed, results = normalised(model)
    assert not any(result.changes for result in results[:2])
    assert changed.SerializeToString() == model.SerializeToString()


def test_shapes_are_known_and_a_dynamic_batch_stays_so(parse: Parse) -> None:
    model = parse(
        """g (float[batch, 3, 8, 8] x) => (float[batch, 36] y)
        <float[4, 3, 1, 1] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}>
        { h = Conv<strides = [3, 3]>(x, w) y = Flatten(h) }"""
    )
    graph = import_graph(model)
    result = InferShapes()(graph)
    assert result.modified
    assert graph.nodes[0].outputs[0].shape == ["batch", 4, 3, 3]
    assert not InferShapes()(graph).modified
    assert export_model(graph, model).SerializeToString() == model.SerializeToString()


def test_an_unknown_shape_is_told(parse: Parse) -> None:
    model = parse(
        "g (float[2] x) => (float[2] y) { h = own.Mystery(x) y = Relu(h) }", imports=', "own": 1'
    )
    result = InferShapes()(import_graph(model))
    assert [(skip.node, skip.why) for skip in result.skips] == [
        ("h", "the shape of its output is not known")
    ]


def test_a_graph_whose_shapes_cannot_be_inferred_is_told() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[2] x) => (float[2] y) { h = own.Mystery(x) y = Relu(h) }"""
    )
    result = InferShapes()(import_graph(model))
    assert not result.modified
    assert [skip.node for skip in result.skips] == ["g"]
    assert "No opset import for domain own" in result.skips[0].why


def test_nothing_to_do_changes_nothing(parse: Parse) -> None:
    model = parse("g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Add(x, w) }")
    changed, results = normalised(model)
    assert not any(result.changes for result in results[:2])
    assert changed.SerializeToString() == model.SerializeToString()


def test_weights_of_the_light_networks_become_initializers(light_models: dict[str, Path]) -> None:
    assert len(light_models) == 9
    for name in ("squeezenet", "shufflenet", "densenet121"):
        model = onnx.load(light_models[name])
        given = {tensor.name for tensor in model.graph.initializer}
        fed = {value.name for value in model.graph.input} - given
        changed, _ = normalised(model)
        onnx.checker.check_model(changed)
        assert not {"ConstantOfShape", "Unsqueeze"}.intersection(ops(changed))
        assert {v.name for v in changed.graph.input} == {
            *(tensor.name for tensor in changed.graph.initializer),
            *fed,
        }
        assert changed.graph.output == model.graph.output


def test_pads_that_an_exporter_computes_become_constants(shared: Path) -> None:
    model = onnx.load(shared / "models" / "resnet20_cifar10.onnx")
    graph = import_graph(model)
    run_passes(graph, normalising())
    assert not any(node.op in ("Constant", "ConstantOfShape", "Cast") for node in graph.nodes)
    pads = [node for node in graph.nodes if node.op == "Pad"]
    assert [node.outputs[0].shape for node in pads] == [["batch", 32, 16, 16], ["batch", 64, 8, 8]]

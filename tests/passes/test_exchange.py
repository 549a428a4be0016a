from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from passes.base import PassError
from passes.exchange import export_model, export_skeleton, import_graph, origin_of

Parse = Callable[..., onnx.ModelProto]

# What graphsurgeon alone loses or breaks on, one model each.
UNUSUAL = {
    "optional inputs left out": """
        g (float[n] x) => (float[n] y) <float high = {2.0}> { y = Clip(x, , high) }""",
    "empty list attribute": """
        g (float[n] x) => (float[n] y, int64[0] c)
        { c = Constant<value_ints: ints = []>()  y = Relu(x) }""",
    "sequence": """
        g (float[n] x) => (seq(float[n]) s) { s = SequenceConstruct(x, x) }""",
    "optional with a type attribute": """
        g (float[n] x) => (bool y)
        { o = Optional<type: type_proto = float[n]>() y = OptionalHasElement(o) }""",
    "texts": """
        g (int64 i) => (string y)
        { c = Constant<value_strings = ["a", "ü"]>() y = Gather(c, i) }""",
    "If that reads outer weights": """
        g (bool c, float[2] x) => (float[2] y) <float[2] w = {1, 2}, float[2] v = {3, 4}> {
            z = Add(x, w)
            y = If(c) <
                then_branch = t () => (float[2] a) <float[2] own = {5, 6}>
                    { b = Mul(z, v) a = Add(b, own) },
                else_branch = e () => (float[2] a) { a = Mul(z, w) }
            >
        }""",
    "If inside If": """
        g (bool c, float[2] x) => (float[2] y) <float[2] w = {1, 2}> {
            y = If(c) <
                then_branch = t () => (float[2] a) <float[2] own = {5, 6}> {
                    a = If(c) <
                        then_branch = tt () => (float[2] b) { b = Add(x, own) },
                        else_branch = te () => (float[2] b) { b = Add(own, w) }
                    >
                },
                else_branch = e () => (float[2] a) { a = Mul(x, w) }
            >
        }""",
    "Loop": """
        g (int64 n, bool c, float[2] x) => (float[2] y) <float[2] w = {1, 2}> {
            y = Loop(n, c, x) <
                body = b (int64 i, bool ci, float[2] a) => (bool co, float[2] s)
                    { co = Identity(ci) s = Add(a, w) }
            >
        }""",
    "Scan": """
        g (float[2] x, float[3, 2] xs) => (float[2] y, float[3, 2] ys) {
            y, ys = Scan<num_scan_inputs = 1, body = b (float[2] a, float[2] e) =>
                (float[2] s, float[2] o) { s = Add(a, e) o = Identity(s) }>(x, xs)
        }""",
    "an output that is a weight": """
        g (float[2] x) => (float[2] y, float[2] w) <float[2] w = {1, 2}> { y = Add(x, w) }""",
    "an output that is an input": """
        g (float[2] x) => (float[2] y, float[2] x) { y = Relu(x) }""",
    "an unused weight": """
        g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Relu(x) }""",
    "weights that callers may override": """
        g (float[2] w, float[2] x, float[2] u) => (float[2] y)
        <float[2] u = {1, 2}, float[2] w = {1, 2}> { y = Add(x, w) }""",
    "annotated shapes": """
        g (float[n, 2] x) => (float[n, 2] y) <float[n, 2] h> { h = Relu(x) y = Relu(h) }""",
}


def untouched(model: onnx.ModelProto) -> onnx.ModelProto:
    return export_model(import_graph(model), model)


def names(values: Iterable[onnx.TensorProto | onnx.ValueInfoProto]) -> list[str]:
    return [value.name for value in values]


@pytest.mark.parametrize("text", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_an_untouched_model_comes_back_byte_for_byte(
    parse: Parse, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    model = parse(text)
    before = model.SerializeToString()
    assert untouched(model).SerializeToString() == before
    assert model.SerializeToString() == before
    assert capsys.readouterr() == ("", "")


def test_models_of_the_onnx_package_come_back_byte_for_byte() -> None:
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data"
    paths = [path for path in sorted(folder.rglob("*.onnx")) if path.stat().st_size < 1 << 20]
    assert len(paths) > 100
    for path in paths:
        content = path.read_bytes()
        assert untouched(onnx.load_from_string(content)).SerializeToString() == content, path


def test_everything_said_about_a_model_is_kept(parse: Parse) -> None:
    model = parse("g (float[n, 2] x) => (float[n, 2] y) <float[2] w = {1, 2}> { y = Add(x, w) }")
    model.producer_name, model.producer_version = "someone", "1.2"
    model.domain, model.model_version, model.doc_string = "org.example", 7, "a model"
    helper.set_model_props(model, {"author": "me", "labels": "a,b"})
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    graph = model.graph
    graph.doc_string, graph.node[0].doc_string = "a graph", "a node"
    graph.node[0].metadata_props.add(key="namespace", value="layer1")
    graph.input[0].doc_string = "an image"
    graph.input[0].type.denotation = "IMAGE"
    graph.initializer[0].doc_string = "a weight"
    scale = numpy_helper.from_array(np.float32(0.5), "w_scale")
    graph.initializer.append(scale)
    annotation = graph.quantization_annotation.add(tensor_name="w")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="w_scale")
    model.functions.append(
        onnx.parser.parse_function(
            '<opset_import: ["": 17], domain: "own"> Twice (a) => (b) { b = Add(a, a) }'
        )
    )
    model.opset_import.append(helper.make_opsetid("own", 1))
    onnx.checker.check_model(model)
    assert untouched(model).SerializeToString() == model.SerializeToString()


def test_numbers_that_numpy_lacks_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    kinds = (TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT16, TensorProto.INT4)
    initializers = [
        helper.make_tensor(f"w{kind}", kind, [4], rng.integers(-3, 4, 4).tolist()) for kind in kinds
    ]
    nodes = [
        helper.make_node("Identity", [tensor.name], [f"y{tensor.data_type}"])
        for tensor in initializers
    ]
    outputs = [helper.make_tensor_value_info(f"y{kind}", kind, [4]) for kind in kinds]
    graph = helper.make_graph(nodes, "g", [], outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    assert untouched(model).SerializeToString() == model.SerializeToString()
    assert capsys.readouterr() == ("", "")


def test_sparse_weights_are_kept() -> None:
    values = numpy_helper.from_array(np.array([1, 2], np.float32), "w")
    indices = numpy_helper.from_array(np.array([0, 3], np.int64), "w_indices")
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
        sparse_initializer=[helper.make_sparse_tensor(values, indices, [4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert untouched(model).SerializeToString() == model.SerializeToString()


def test_outer_weights_are_written_once(parse: Parse, run: Callable[..., dict]) -> None:
    model = parse(UNUSUAL["If that reads outer weights"])
    graph = import_graph(model)
    outer = next(t for t in graph.nodes[0].inputs if t.name == "w")
    outer.values = np.array([10, 20], np.float32)
    changed = export_model(graph, model)
    onnx.checker.check_model(changed, full_check=True)
    assert names(changed.graph.initializer) == ["w", "v"]
    branches = {attribute.name: attribute.g for attribute in changed.graph.node[1].attribute}
    assert names(branches["then_branch"].initializer) == ["own"]
    assert names(branches["else_branch"].initializer) == []
    feeds = {"c": np.array(False), "x": np.ones(2, np.float32)}
    np.testing.assert_array_equal(run(changed, feeds)["y"], [110, 420])


@pytest.mark.parametrize(("ir", "listed"), [(3, ["x", "b", "c"]), (8, ["x", "b"])])
def test_weights_among_the_inputs_follow_what_exists(
    parse: Parse, ir: int, listed: list[str]
) -> None:
    model = parse(
        """g (float[2] a, float[2] x, float[2] b) => (float[2] y)
        <float[2] a = {1, 2}, float[2] b = {3, 4}> { h = Add(x, a) y = Mul(h, b) }""",
        ir=ir,
    )
    graph = import_graph(model)
    assert origin_of(graph).overridable == (frozenset() if ir < 4 else {"a", "b"})
    graph.nodes[0].inputs[1] = gs.Constant("c", np.array([5, 6], np.float32))
    changed = export_model(graph, model)
    onnx.checker.check_model(changed, full_check=True)
    assert names(changed.graph.input) == listed
    assert changed.graph.input[1] == model.graph.input[2]
    assert export_model(graph, model).SerializeToString() == changed.SerializeToString()


def test_changed_nodes_keep_their_documentation_and_attribute_types(parse: Parse) -> None:
    model = parse(
        """g (float[1, 1, 4, 4] x) => (float[1, 1, h, w] y) <float[1, 1, 1, 1] w = {2}>
        { y = Conv<pads = [0, 0, 0, 0], strides = [1, 1]>(x, w) }"""
    )
    node = model.graph.node[0]
    node.name, node.doc_string = "first", "a node"
    node.metadata_props.add(key="namespace", value="layer1")
    node.attribute[0].doc_string = "no padding"
    graph = import_graph(model)
    graph.nodes[0].attrs["strides"] = [2, 2]
    graph.nodes[0].attrs["dilations"] = [1, 1]
    bias = gs.Constant("bias", np.zeros(1, np.float32))
    graph.nodes[0].inputs.append(bias)
    changed = export_model(graph, model).graph.node[0]
    assert changed.doc_string == "a node"
    assert changed.metadata_props == node.metadata_props
    assert changed.attribute[0] == node.attribute[0]
    assert [(a.name, list(a.ints)) for a in changed.attribute] == [
        ("pads", [0, 0, 0, 0]),
        ("strides", [2, 2]),
        ("dilations", [1, 1]),
    ]


def test_a_node_that_writes_another_tensor_is_still_found_by_its_name(parse: Parse) -> None:
    model = parse("g (float[2] x) => (float[2] y) { h = Relu(x) y = Identity(h) }")
    model.graph.node[0].name, model.graph.node[0].doc_string = "first", "a node"
    graph = import_graph(model)
    first, second = graph.nodes
    second.inputs.clear()
    second.outputs.clear()
    first.outputs = [graph.outputs[0]]
    graph.nodes = [first]
    changed = export_model(graph, model)
    assert [(n.doc_string, list(n.output)) for n in changed.graph.node] == [("a node", ["y"])]


def test_a_renamed_constant_leaves_the_original_alone(parse: Parse) -> None:
    model = parse("g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Add(x, w) }")
    graph = import_graph(model)
    graph.nodes[0].inputs[1].name = "renamed"
    assert names(export_model(graph, model).graph.initializer) == ["renamed"]
    assert names(model.graph.initializer) == ["w"]


def test_a_graph_that_is_done_with_goes_before_a_large_model_is_read(
    parse: Parse, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = parse("g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }")
    gc.disable()  # as if it did not run by itself for a while
    try:
        for limit, left in ((2**24, True), (-1, False)):
            monkeypatch.setattr("passes.exchange._LARGE", limit)
            done = weakref.ref(import_graph(model).nodes[0])
            import_graph(model)
            assert (done() is not None) is left
    finally:
        gc.enable()


def test_a_skeleton_holds_small_constants_only(parse: Parse) -> None:
    model = parse(
        """g (float[n, 3] x, float[3, 2] w, float[2] b) => (float[n, 2] y)
        <float[3, 2] w = {1, 2, 3, 4, 5, 6}, float[2] b = {1, 2}> { h = MatMul(x, w) y = Add(h, b) }
        """,
        ir=3,
    )
    skeleton = export_skeleton(import_graph(model), largest=2)
    assert sorted(names(skeleton.graph.input)) == ["w", "x"]
    assert names(skeleton.graph.initializer) == ["b"]
    onnx.checker.check_model(skeleton, full_check=True)


def bad_external(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL


def bad_text(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("note", b"\xff"))


def bad_graphs(model: onnx.ModelProto) -> None:
    attribute = onnx.AttributeProto(name="bodies", type=onnx.AttributeProto.GRAPHS)
    model.graph.node[0].attribute.append(attribute)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (bad_external, "'w' lies in a file that was not loaded"),
        (bad_text, "'note' of node 'y' .Add. is text that is not UTF-8"),
        (bad_graphs, "'bodies' of node 'y' .Add. is a list of graphs"),
    ],
)
def test_what_cannot_be_read_is_refused(
    parse: Parse, spoil: Callable[[onnx.ModelProto], None], message: str
) -> None:
    model = parse("g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Add(x, w) }")
    spoil(model)
    with pytest.raises(PassError, match=message):
        import_graph(model)


def test_a_changed_interface_is_refused(parse: Parse) -> None:
    model = parse("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    graph = import_graph(model)
    graph.outputs[0].name = "z"
    with pytest.raises(PassError, match=r"no longer has the outputs \['y'\]"):
        export_model(graph, model)
    graph = import_graph(model)
    graph.inputs = []
    with pytest.raises(PassError, match=r"no longer has the inputs \['x'\]"):
        export_model(graph, model)


def test_another_model_is_refused(parse: Parse) -> None:
    graph = import_graph(parse(UNUSUAL["an unused weight"]))
    other = parse("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    with pytest.raises(PassError, match="was read from another model: 'w'"):
        export_model(graph, other)


def test_a_new_subgraph_is_refused(parse: Parse) -> None:
    model = parse("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    graph = import_graph(model)
    graph.nodes[0].attrs["body"] = gs.Graph()
    with pytest.raises(PassError, match="new subgraph 'body'"):
        export_model(graph, model)


def test_a_graph_of_unknown_origin_is_refused() -> None:
    with pytest.raises(PassError, match="was not read by import_graph"):
        origin_of(gs.Graph(name="g"))

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto

from passes.base import PassError
from passes.expose import expose, extract

Parse = Callable[..., onnx.ModelProto]
Run = Callable[..., dict[str, np.ndarray]]

CHAIN = """
    g (float[n, 2] x, float[n, 2] z) => (float[n, 2] y)
    <float[2] u = {1, 2}, float[2] v = {3, 4}, float[2] w = {5, 6}> {
        a = Add(x, u)
        b = Mul(a, v)
        c = Add(b, z)
        y = Mul(c, w)
    }"""
FEEDS = {
    "x": np.array([[1, 2]], np.float32),
    "z": np.array([[10, 20]], np.float32),
}


def names(values: Iterable[onnx.TensorProto | onnx.ValueInfoProto]) -> list[str]:
    return [value.name for value in values]


def test_inner_tensors_become_further_outputs(parse: Parse, run: Run) -> None:
    model = parse(CHAIN)
    before = model.SerializeToString()
    exposed = expose(model, ["c", "a", "y", "c"])
    onnx.checker.check_model(exposed, full_check=True)
    assert names(exposed.graph.output) == ["y", "c", "a"]
    assert exposed.graph.output[0] == model.graph.output[0]
    answers = run(exposed, FEEDS)
    np.testing.assert_array_equal(answers["a"], [[2, 4]])
    np.testing.assert_array_equal(answers["c"], [[16, 36]])
    np.testing.assert_array_equal(answers["y"], run(model, FEEDS)["y"])
    assert model.SerializeToString() == before


def test_an_exposed_tensor_has_its_type_and_a_dynamic_batch(parse: Parse) -> None:
    exposed = expose(
        parse(
            """g (float[n, 2] x) => (bool y)
            { a = Shape(x) b = Size(a) c = Cast<to = 9>(b) y = Not(c) }"""
        ),
        ["a", "c"],
    )
    kinds = [value.type.tensor_type for value in exposed.graph.output]
    assert [kind.elem_type for kind in kinds] == [
        TensorProto.BOOL,
        TensorProto.INT64,
        TensorProto.BOOL,
    ]
    kept = expose(parse(CHAIN), ["a"]).graph.output[1].type.tensor_type.shape
    assert [dim.dim_param or dim.dim_value for dim in kept.dim] == ["n", 2]


def test_a_tensor_of_unknown_type_is_exposed_by_its_name(run: Run) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
        g (float[2] x) => (float[2] y) { a = com.microsoft.QuickGelu(x) y = Relu(a) }"""
    )
    exposed = expose(model, ["a"])
    assert exposed.graph.output[1] == onnx.ValueInfoProto(name="a")
    assert run(exposed, {"x": np.ones(2, np.float32)})["a"].shape == (2,)


@pytest.mark.parametrize("name", ["x", "u", "nothing", ""])
def test_what_no_node_writes_cannot_be_exposed(parse: Parse, name: str) -> None:
    with pytest.raises(PassError, match="no node of the model writes"):
        expose(parse(CHAIN), [name])


def test_a_part_computes_what_the_whole_does(parse: Parse, run: Run) -> None:
    model = parse(CHAIN)
    model.producer_name = "someone"
    before = model.SerializeToString()
    part = extract(model, ["a", "z"], ["c"])
    onnx.checker.check_model(part, full_check=True)
    assert names(part.graph.input) == ["a", "z"]
    assert names(part.graph.output) == ["c"]
    assert names(part.graph.initializer) == ["v"]
    assert part.producer_name == "someone"
    assert part.opset_import == model.opset_import
    answers = run(part, {"a": np.array([[2, 4]], np.float32), "z": FEEDS["z"]})
    np.testing.assert_array_equal(answers["c"], [[16, 36]])
    assert model.SerializeToString() == before


def test_parts_chain_to_the_whole(parse: Parse, run: Run) -> None:
    model = parse(CHAIN)
    first = run(extract(model, ["x"], ["a", "b"]), {"x": FEEDS["x"]})
    second = run(extract(model, ["b", "z"], ["y"]), {"b": first["b"], "z": FEEDS["z"]})
    np.testing.assert_array_equal(second["y"], run(model, FEEDS)["y"])


def test_an_input_that_nothing_reads_may_be_fed(parse: Parse, run: Run) -> None:
    part = extract(parse(CHAIN), ["x", "z", "b"], ["a"])
    feeds = {**FEEDS, "b": np.zeros((1, 2), np.float32)}
    np.testing.assert_array_equal(run(part, feeds)["a"], [[2, 4]])


def test_an_output_of_the_model_may_be_an_input(parse: Parse, run: Run) -> None:
    model = parse("g (float[2] x) => (float[2] y, float[2] a) { a = Neg(x) y = Abs(a) }")
    part = extract(model, ["a"], ["y"])
    assert len(part.graph.node) == 1
    np.testing.assert_array_equal(run(part, {"a": -np.ones(2, np.float32)})["y"], [1, 1])


def test_old_models_keep_their_weights_among_the_inputs(parse: Parse, run: Run) -> None:
    model = parse(
        """g (float[2] v, float[2] x, float[2] u) => (float[2] y)
        <float[2] u = {1, 2}, float[2] v = {3, 4}> { a = Add(x, u) y = Mul(a, v) }""",
        ir=3,
    )
    part = extract(model, ["a"], ["y"])
    onnx.checker.check_model(part, full_check=True)
    assert names(part.graph.input) == ["a", "v"]
    np.testing.assert_array_equal(run(part, {"a": np.ones(2, np.float32)})["y"], [3, 4])


def test_what_subgraphs_and_functions_read_comes_along(run: Run) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "own": 1]>
        g (bool c, float[2] x) => (float[2] y) <float[2] w = {1, 2}, float[2] v = {3, 4}> {
            a = Neg(x)
            b = Abs(x)
            z = If(c) <
                then_branch = t () => (float[2] p) { k = Add(a, w) p = own.Twice(k) },
                else_branch = e () => (float[2] q) { q = Add(b, a) }
            >
            y = Mul(z, v)
        }
        <opset_import: ["": 17], domain: "own"> Twice (m) => (o) { o = Add(m, m) }"""
    )
    onnx.checker.check_model(model, full_check=True)
    part = extract(model, ["c", "a", "b"], ["z"])
    assert names(part.graph.initializer) == ["w"]
    feeds = {"c": np.array(True), "a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}
    np.testing.assert_array_equal(run(part, feeds)["z"], [4, 6])


def test_a_sequence_may_be_cut(parse: Parse) -> None:
    model = parse(
        """g (float[2] x) => (float[2] y) {
            s = SequenceConstruct(x, x) i = Constant<value_int = 1>() y = SequenceAt(s, i) }"""
    )
    assert extract(model, ["x"], ["s"]).graph.output[0].type.HasField("sequence_type")
    assert len(extract(model, ["s"], ["y"]).graph.node) == 2


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        (["x"], [], "no output was named"),
        (["nothing"], ["a"], "'nothing' is neither an input of the model nor written"),
        (["u"], ["a"], "'u' is neither an input"),
        (["x"], ["nothing"], "no node of the model writes 'nothing'"),
        (["x"], ["x"], "'x' is both an input and an output"),
        (["x", "a"], ["a"], "'a' is both an input and an output"),
        (["a"], ["c"], "also need the input 'z' of the model"),
        ([], ["a"], "also need the input 'x' of the model"),
    ],
)
def test_ends_that_make_no_part_are_refused(
    parse: Parse, inputs: list[str], outputs: list[str], message: str
) -> None:
    with pytest.raises(PassError, match=message):
        extract(parse(CHAIN), inputs, outputs)


def test_an_input_of_unknown_type_is_refused() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
        g (float[2] x) => (float[2] y) { a = com.microsoft.QuickGelu(x) y = Relu(a) }"""
    )
    with pytest.raises(PassError, match="the type of 'a' is not known"):
        extract(model, ["a"], ["y"])


def test_shapes_that_contradict_do_not_stop_what_is_stated() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[2] x) => (float[2] y) { a = own.Mystery(x) y = Relu(a) }"""
    )
    assert expose(model, ["a"]).graph.output[1] == onnx.ValueInfoProto(name="a")


def test_a_network_runs_stage_by_stage(shared: Path, run: Run) -> None:
    model = onnx.load(shared / "models" / "resnet20_cifar10.onnx")
    cut = "/layer2/layer2.0/Relu_1_output_0"
    feeds = {"input": np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)}
    whole = run(expose(model, [cut]), feeds)
    first = run(extract(model, ["input"], [cut]), feeds)
    second = run(extract(model, [cut], ["logits"]), {cut: first[cut]})
    # The same kernels on the same numbers, in other memory layouts.
    np.testing.assert_allclose(first[cut], whole[cut], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(second["logits"], whole["logits"], rtol=1e-4, atol=1e-4)

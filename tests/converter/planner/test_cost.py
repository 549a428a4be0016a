"""MACs and parameters against hand counts, and against sums of models made of ones.

The oracle: with all data and weights 1 and nothing padded, each product is 1, so the sum of a
layer's output is its number of multiply-accumulates.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.parser import parse_model

from converter.config import Runtime
from converter.errors import CalibrationError, ConfigError, ModelError
from converter.planner.cost import ModelCost, count_cost
from converter.runtime import open_session, run

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'


def build(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    model = parse_model(HEAD + text)
    model.graph.initializer.extend(
        numpy_helper.from_array(value, name) for name, value in weights.items()
    )
    return model


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def layer_model(
    op: str, data: tuple[int, ...], weight: tuple[int, ...], **attributes: object
) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["y"], **attributes)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *data[1:]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(ones(*weight), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def summed(model: onnx.ModelProto, x: np.ndarray) -> int:
    (y,) = run(open_session(model, Runtime(threads=1)), ["y"], {"x": x})
    return round(float(y.sum(dtype=np.float64)))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_convs_against_ones(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3))
    group = data.draw(st.integers(1, 3))
    into, out = (group * data.draw(st.integers(1, 3)) for _ in range(2))
    axes = st.lists(st.integers(1, 3), min_size=rank, max_size=rank)
    kernel, strides, dilations = (data.draw(axes) for _ in range(3))
    op = data.draw(st.sampled_from(["Conv", "ConvTranspose"]))
    sizes = [
        (k - 1) * d + 1 + data.draw(st.integers(0, 4))
        for k, d in zip(kernel, dilations, strict=True)
    ]
    weight = (out, into // group) if op == "Conv" else (into, out // group)
    model = layer_model(
        op,
        (1, into, *sizes),
        (*weight, *kernel),
        group=group,
        strides=strides,
        dilations=dilations,
        kernel_shape=kernel,
    )
    cost = count_cost(model)
    assert cost.macs == summed(model, ones(1, into, *sizes))
    assert cost.params == cost.layers[0].params == int(np.prod((*weight, *kernel)))


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["MatMul", "Gemm"]),
    st.lists(st.integers(1, 5), min_size=3, max_size=4),
    st.booleans(),
)
def test_matrices_against_ones(op: str, sizes: list[int], transposed: bool) -> None:
    if op == "MatMul":
        *_, inner, outer = sizes
        model = layer_model(op, (1, *sizes[1:-1]), (inner, outer))
        feed = ones(1, *sizes[1:-1])
    else:
        rows, inner, outer = sizes[:3]
        shape = (inner, rows) if transposed else (rows, inner)
        model = layer_model(op, shape, (inner, outer), transA=int(transposed))
        feed = ones(*shape)
    expected = summed(model, feed)
    assert count_cost(model, {"x": feed}).macs == round(expected / feed.shape[0])


def test_padding_counts_as_if_it_were_data() -> None:
    model = layer_model("Conv", (1, 3, 8, 8), (5, 3, 3, 3), pads=[1, 1, 1, 1])
    assert count_cost(model).macs == 5 * 8 * 8 * 3 * 9


def test_auto_pad_and_stride() -> None:
    model = layer_model(
        "Conv", (1, 4, 7, 7), (6, 2, 3, 3), group=2, strides=[2, 2], auto_pad="SAME_UPPER"
    )
    assert count_cost(model).macs == 6 * 4 * 4 * 2 * 9


def test_a_fixed_batch_is_counted_for_one_sample() -> None:
    free = layer_model("Conv", (1, 3, 8, 8), (5, 3, 3, 3))
    fixed = layer_model("Conv", (1, 3, 8, 8), (5, 3, 3, 3))
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    assert count_cost(fixed) == count_cost(free)
    assert count_cost(free, {"x": ones(4, 3, 8, 8)}) == count_cost(free)


def test_shapes_that_are_computed_at_run_time() -> None:
    model = build(
        """g (float[N, 3, H, W] x) => (float[N, P] y)
        <int64[1] first = {0}, int64[1] rest = {-1}> {
            size = Shape(x)
            n = Gather(size, first)
            target = Concat<axis = 0>(n, rest)
            flat = Reshape(x, target)
            y = MatMul(flat, w)
        }""",
        w=ones(3 * 4 * 5, 7),
    )
    cost = count_cost(model, {"x": ones(2, 3, 4, 5)})
    assert cost.macs == 3 * 4 * 5 * 7
    assert cost.params == 3 * 4 * 5 * 7


def test_a_free_size_needs_feeds() -> None:
    model = build(
        "g (float[N, 3, H, 8] x) => (float[N, 2, H, 8] y) { y = Conv(x, w) }", w=ones(2, 3, 1, 1)
    )
    with pytest.raises(ConfigError, match=r"^net: axis 2 of input 'x' has no fixed size"):
        count_cost(model, label="net")
    assert count_cost(model, {"x": ones(1, 3, 4, 8)}).macs == 2 * 3 * 4 * 8


def test_the_model_stays_as_it_is() -> None:
    model = layer_model("Conv", (1, 3, 8, 8), (5, 3, 3, 3))
    before = model.SerializeToString()
    count_cost(model)
    assert model.SerializeToString() == before


def test_layers_come_in_order_with_their_names() -> None:
    model = build(
        """g (float[N, 3, 4, 4] x) => (float[N, 5, 4, 4] y)
        { a = Conv(x, w, b) r = Relu(a) y = Conv(r, v) }""",
        w=ones(4, 3, 1, 1),
        b=ones(4),
        v=ones(5, 4, 1, 1),
    )
    model.graph.node[0].name = "first"
    layers = count_cost(model).layers
    assert [(each.name, each.op, each.output) for each in layers] == [
        ("first", "Conv", "a"),
        ("y", "Conv", "y"),
    ]
    assert [(each.macs, each.params) for each in layers] == [(16 * 12, 16), (16 * 20, 20)]


# ---- parameters


def params(text: str, **weights: np.ndarray) -> int:
    return count_cost(build(text, **weights)).params


def test_a_shared_weight_counts_once() -> None:
    cost = count_cost(
        build(
            "g (float[N, 4] x) => (float[N, 4] y) { a = MatMul(x, w) y = MatMul(a, w) }",
            w=ones(4, 4),
        )
    )
    assert cost.params == 16
    assert [each.params for each in cost.layers] == [16, 16]


def test_a_weight_counts_as_stored_however_it_arrives() -> None:
    assert params(
        """g (float[N, 4] x) => (float[N, 4] y) {
            t = Transpose(w)
            u = Identity(w)
            a = MatMul(x, t)
            y = MatMul(a, u)
        }""",
        w=ones(4, 4),
    ) == 16  # fmt: skip


def test_constants_and_constant_of_shape() -> None:
    assert params(
        """g (float[N, 3, 4, 4] x) => (float[N, 2, 4, 4] y) <int64[4] s = {2, 3, 1, 1}> {
            w = ConstantOfShape(s)
            b = Constant<value = float[2] {1, 2}>()
            c = Constant<value_floats = [1.0]>()
            a = Conv(x, w, b)
            y = Mul(a, c)
        }"""
    ) == 6 + 2 + 1  # fmt: skip


def test_what_is_no_parameter() -> None:
    assert params(
        """g (float[N, 4] x) => (float[N, 4] y)
        <int64[2] shape = {-1, 4}, float six = {6}, float[9] unread = {1,2,3,4,5,6,7,8,9}> {
            zero = Constant<value_float = 0.0>()
            dead = Transpose(unread)
            a = Reshape(x, shape)
            y = Clip(a, zero, six)
        }"""
    ) == 0  # fmt: skip


def test_eight_bit_weights_count_and_integer_biases_do_not() -> None:
    cost = count_cost(
        build(
            """g (uint8[N, 3, 4, 4] x) => (uint8[N, 2, 4, 4] y)
            <float s = {0.1}, uint8 z = {0}, int8 wz = {0}, int32[2] b = {1, 2}>
            { y = QLinearConv(x, s, z, w, s, wz, s, z, b) }""",
            w=np.ones((2, 3, 1, 1), np.int8),
        )
    )
    assert cost.params == 6
    assert cost.macs == 2 * 16 * 3


def test_dequantized_weights_count_as_stored() -> None:
    assert params(
        """g (float[N, 4] x) => (float[N, 3] y) <float s = {0.1}, int8 z = {0}>
        { v = DequantizeLinear(w, s, z) y = MatMul(x, v) }""",
        w=np.ones((4, 3), np.int8),
    ) == 12  # fmt: skip


def test_dequantized_biases_count_and_scales_do_not() -> None:
    model = build(
        """g (float[n, 3, 4, 4] x) => (float[n, 2, 4, 4] y) {
            f = DequantizeLinear <axis = 0> (w, s, z)
            b = DequantizeLinear <axis = 0> (c, s)
            y = Conv (x, f, b)
        }""",
        w=np.ones((2, 3, 1, 1), np.int8),
        s=ones(2),
        z=np.zeros(2, np.int8),
        c=np.ones(2, np.int32),
    )
    cost = count_cost(model)
    assert (cost.params, cost.layers[0].params) == (8, 8)
    assert cost.macs == 2 * 3 * 16


def test_a_sparse_initializer_counts_what_it_stores() -> None:
    model = build("g (float[N, 4] x) => (float[N, 3] y) { y = MatMul(x, w) }")
    values = numpy_helper.from_array(ones(2), "w")
    indices = numpy_helper.from_array(np.int64([1, 7]), "")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4, 3]))
    cost = count_cost(model)
    assert (cost.params, cost.macs) == (2, 12)


def test_a_constant_that_is_an_output_counts() -> None:
    assert (
        params(
            "g (float[N] x) => (float[N] y, float[3] c) { y = Relu(x) c = Identity(w) }", w=ones(3)
        )
        == 3
    )


def test_old_models_list_initializers_among_the_inputs() -> None:
    model = parse_model(
        '<ir_version: 3, opset_import: ["" : 9]>'
        "g (float[1, 3, 4, 4] x, float[2, 3, 1, 1] w) => (float[1, 2, 4, 4] y) { y = Conv(x, w) }"
    )
    model.graph.initializer.append(numpy_helper.from_array(ones(2, 3, 1, 1), "w"))
    assert count_cost(model).macs == 2 * 16 * 3


# ---- bodies and functions


def test_both_branches_of_an_if_count() -> None:
    model = build(
        """g (float[N, 3, 4, 4] x, bool c) => (float[N, 2, 4, 4] y) {
            r = Relu(x)
            y = If(c) <
                then_branch = g1 () => (float[N, 2, 4, 4] t) { t = Conv(r, w) },
                else_branch = g2 () => (float[N, 2, 4, 4] e)
                    { v = Constant<value = float[2, 3, 1, 1] {1, 2, 3, 4, 5, 6}>() e = Conv(r, v) }
            >
        }""",
        w=ones(2, 3, 1, 1),
    )
    cost = count_cost(model)
    assert [each.output for each in cost.layers] == ["t", "e"]
    assert cost.macs == 2 * (2 * 16 * 3)
    assert cost.params == 12
    assert cost.uncounted == ()


LOOP = """g (float[N, 4] x, int64 trips, bool go) => (float[N, 4] y) {
    y = Loop(trips, go, x) <
        body = b (int64 i, bool c, float%s s) => (bool d, float%s t)
            { d = Identity(c) t = MatMul(s, w) }
    >
}"""


def test_the_body_of_a_loop_counts_once() -> None:
    cost = count_cost(build(LOOP % ("[1, 4]", "[1, 4]"), w=ones(4, 4)))
    assert (cost.macs, cost.params, cost.uncounted) == (16, 16, ())


def test_a_body_with_unknown_shapes_is_said_to_be_missing() -> None:
    cost = count_cost(build(LOOP % ("[A, B]", "[A, B]"), w=ones(4, 4)))
    assert (cost.macs, cost.params, cost.uncounted) == (0, 16, ("t",))


def test_bodies_may_repeat_names() -> None:
    cost = count_cost(
        build(
            """g (float[1, 4] x, bool c) => (float[1, M] y) {
                y = If(c) <
                    then_branch = g1 () => (float[1, 2] t)
                    {
                        v = Constant<value = float[4, 2] {1, 2, 3, 4, 5, 6, 7, 8}>()
                        t = MatMul(x, v)
                    },
                    else_branch = g2 () => (float[1, 1] e)
                        { v = Constant<value = float[4, 1] {1, 2, 3, 4}>() e = MatMul(x, v) }
                >
            }"""
        )
    )
    assert (cost.params, cost.macs, cost.uncounted) == (12, 12, ())


def test_functions_count_wherever_they_are_called() -> None:
    model = parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[N, 2] x) => (float[N, 2] y) <float[2, 2] w = {1, 2, 3, 4}>
        { a = local.twice(x, w) y = local.twice(a, w) }
        <domain: "local", opset_import: ["" : 17]>
        twice (p, q) => (s) { r = MatMul(p, q) s = MatMul(r, q) }"""
    )
    cost = count_cost(model)
    assert (cost.macs, cost.params, len(cost.layers)) == (4 * 4, 4, 4)


# ---- refusals and real models


def test_a_model_without_layers() -> None:
    assert count_cost(
        build("g (float[N, H] x) => (float[N, H] y) { y = Relu(x) }"), {"x": ones(1, 2)}
    ) == ModelCost(0, 0, ())


def test_what_onnxruntime_refuses() -> None:
    model = build(
        "g (float[N, 4] x) => (float[N, 3] y) { a = Foo(x) y = MatMul(a, w) }", w=ones(4, 3)
    )
    with pytest.raises(ModelError, match=r"^net: .*Foo"):
        count_cost(model, label="net")


def test_feeds_that_do_not_fit() -> None:
    model = layer_model("Conv", (1, 3, 8, 8), (5, 3, 3, 3))
    with pytest.raises(CalibrationError):
        count_cost(model, {"x": ones(1, 4, 8, 8)})


@pytest.mark.parametrize(
    ("name", "macs", "parameters", "layers"),
    [
        ("vgg16", 313.2e6, 14.72e6, 14),
        ("alexnet", 224.6e6, 6.66e6, 7),
        ("googlenet", 479.7e6, 5.98e6, 58),
        ("resnet20", 40.55e6, 0.27e6, 20),
    ],
)
def test_reference_models(
    shared: Path, name: str, macs: float, parameters: float, layers: int
) -> None:
    cost = count_cost(onnx.load(shared / "models" / f"{name}_cifar10.onnx"))
    assert cost.macs == pytest.approx(macs, rel=1e-3)
    assert cost.params == pytest.approx(parameters, rel=5e-3)  # the figures have three digits
    assert len(cost.layers) == layers
    assert cost.macs == sum(each.macs or 0 for each in cost.layers)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("bvlc_alexnet", 60_965_224), ("squeezenet", 1_235_496), ("shufflenet", 1_420_152)],
)
def test_weights_from_constant_of_shape(name: str, parameters: int) -> None:
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    assert count_cost(onnx.load(folder / f"light_{name}.onnx")).params == parameters

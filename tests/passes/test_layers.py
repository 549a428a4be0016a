from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from passes.activation import IDENTITY, Activation
from passes.base import run_passes
from passes.exchange import export_model, import_graph
from passes.layers import Layer, find_layers
from passes.normalise import normalising

Arrays = Mapping[str, np.ndarray]


def random(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


W = random(4, 3, 3, 3)
VECTOR = random(4, seed=2)


def layers_of(
    body: str,
    arrays: Arrays,
    *,
    x: tuple[int | str, ...] = ("n", 3, 8, 8),
    opset: int = 17,
    also: tuple[str, ...] = (),
) -> tuple[Layer, ...]:
    """Layers of the model that computes y, and the tensors in `also`, from x."""
    nodes = onnx.parser.parse_graph(f"g (float x) => (float y) {{ {body} }}").node
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("y", *also)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    read = import_graph(model)
    run_passes(read, normalising())
    before = export_model(read, model).SerializeToString()
    found = find_layers(read)
    assert export_model(read, model).SerializeToString() == before
    return found


def only(layers: tuple[Layer, ...]) -> Layer:
    assert len(layers) == 1
    return layers[0]


def test_a_conv_is_read_whole() -> None:
    layer = only(
        layers_of(
            "h = Conv<strides = [2, 1], pads = [1, 0, 1, 2], dilations = [1, 2]>(x, w, b) "
            "y = Relu(h)",
            {"w": W, "b": VECTOR},
        )
    )
    assert (layer.name, layer.op, layer.reason) == ("h", "Conv", None)
    assert (layer.input, layer.output, layer.response) == ("x", "h", "h")
    assert (layer.strides, layer.pads, layer.dilations) == ((2, 1), (1, 0, 1, 2), (1, 2))
    assert (layer.auto_pad, layer.group) == ("NOTSET", 1)
    assert layer.weight is not None
    assert layer.bias is not None
    np.testing.assert_array_equal(layer.weight, W)
    np.testing.assert_array_equal(layer.bias, VECTOR)
    assert (layer.activation, layer.activated) == (Activation("relu"), "y")
    assert (layer.shortcut, layer.sum) == (None, None)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_defaults_have_one_number_for_each_axis(axes: int) -> None:
    x = ("n", 3, *[8] * axes)
    layer = only(
        layers_of('y = Conv<auto_pad = "SAME_UPPER">(x, w)', {"w": random(4, 3, *[3] * axes)}, x=x)
    )
    assert layer.strides == layer.dilations == (1,) * axes
    assert layer.pads == (0,) * 2 * axes
    assert layer.auto_pad == "SAME_UPPER"
    assert layer.bias is None
    assert (layer.activation, layer.activated) == (IDENTITY, "y")


@pytest.mark.parametrize(
    ("attributes", "stored"),
    [
        ("", (3, 4)),
        ("<transB = 1>", (4, 3)),
        ("<alpha = 0.5, beta = 3.0>", (3, 4)),
        ("<alpha = 0.5, beta = 3.0, transB = 1>", (4, 3)),
    ],
)
@pytest.mark.parametrize("bias", [None, (), (1,), (4,), (1, 4), (1, 1)])
def test_a_gemm_is_read_as_outputs_by_inputs(
    attributes: str, stored: tuple[int, int], bias: tuple[int, ...] | None
) -> None:
    arrays = {"w": random(*stored)}
    if bias is not None:
        arrays["b"] = random(*bias)
    operands = "x, w" if bias is None else "x, w, b"
    layer = only(layers_of(f"y = Gemm{attributes}({operands})", arrays, x=("n", 3)))
    assert layer.reason is None
    alpha, beta = (0.5, 3.0) if "alpha" in attributes else (1.0, 1.0)
    matrix = arrays["w"] if "transB" in attributes else arrays["w"].T
    np.testing.assert_allclose(layer.weight, alpha * matrix, rtol=1e-6)
    if bias is None:
        assert layer.bias is None
    else:
        wanted = np.broadcast_to(beta * arrays["b"], (1, 4)).reshape(-1)
        np.testing.assert_allclose(layer.bias, wanted, rtol=1e-6)
    assert (layer.strides, layer.pads, layer.dilations) == ((), (), ())


@pytest.mark.parametrize("x", [(5, 3), ("n", 7, 3), (2, 2, 7, 3)])
@pytest.mark.parametrize("bias", [(4,), (1, 4), (1,), (), "first"])
def test_a_bias_behind_a_matmul_belongs_to_it(
    x: tuple[int | str, ...], bias: tuple[int, ...] | str
) -> None:
    shape = (4,) if bias == "first" else bias
    arrays = {"w": random(3, 4), "b": random(*shape)}
    add = "k = Add(b, h)" if bias == "first" else "k = Add(h, b)"
    layer = only(layers_of(f"h = MatMul(x, w) {add} y = Relu(k)", arrays, x=x))
    assert (layer.output, layer.response, layer.activated) == ("h", "k", "y")
    np.testing.assert_array_equal(layer.weight, arrays["w"].T)
    np.testing.assert_array_equal(layer.bias, np.broadcast_to(arrays["b"], (1, 4)).reshape(-1))


@pytest.mark.parametrize(
    ("body", "arrays", "x"),
    [
        ("h = MatMul(x, w) y = Add(h, b)", {"w": random(3, 4), "b": random(1, 1, 4)}, ("n", 3)),
        ("h = MatMul(x, w) y = Add(h, b)", {"w": random(3, 4), "b": random(2, 4)}, (2, 3)),
        ("h = Conv(x, w) y = Add(h, b)", {"w": W, "b": random(6)}, ("n", 3, 8, 8)),
        (
            "h = MatMul(x, w) k = Relu(h) l = Add(h, b) y = Add(k, l)",
            {"w": random(3, 4), "b": VECTOR},
            (2, 3),
        ),
    ],
)
def test_an_add_of_another_kind_does_not(body: str, arrays: Arrays, x: tuple[int, ...]) -> None:
    layer = only(layers_of(body, arrays, x=x))
    assert layer.reason is None
    assert layer.response == layer.output == "h"
    assert layer.bias is None
    assert layer.sum is None


def test_a_bias_behind_a_conv_adds_to_its_own() -> None:
    arrays = {"w": W, "b": VECTOR, "c": random(4, 1, 1, seed=3)}
    layer = only(layers_of("h = Conv(x, w, b) y = Add(h, c)", arrays))
    assert layer.response == "y"
    np.testing.assert_allclose(layer.bias, VECTOR + arrays["c"].reshape(-1), rtol=1e-6)


NUMBERS = {
    "zero": np.float32(0),
    "three": np.float32(3),
    "six": np.float32(6),
    "sixth": np.float32(1 / 6),
    "four": np.float32([4]),
}
SIXTH = 1 / 6
ACTIVATIONS = {
    "relu": (17, "y = Relu(h)", Activation("relu"), "y"),
    "clip by attributes": (7, "y = Clip<min = 0.0, max = 6.0>(h)", Activation("clip", 0, 6), "y"),
    "clip without bounds": (7, "y = Clip(h)", Activation("clip", -math.inf, math.inf), "y"),
    "clip as exporters write no bound": (
        7,
        "y = Clip<min = 0.0, max = 3.4028234663852886e38>(h)",
        Activation("clip", 0, math.inf),
        "y",
    ),
    "clip by inputs": (17, "y = Clip(h, zero, six)", Activation("clip", 0, 6), "y"),
    "clip from above": (17, "y = Clip(h, , six)", Activation("clip", -math.inf, 6), "y"),
    "leaky": (17, "y = LeakyRelu<alpha = 0.2>(h)", Activation("leaky_relu", slope=0.2), "y"),
    "leaky by default": (17, "y = LeakyRelu(h)", Activation("leaky_relu", slope=0.01), "y"),
    "hard swish": (17, "y = HardSwish(h)", Activation("hard_swish"), "y"),
    "hard swish by a hard sigmoid": (
        17,
        f"s = HardSigmoid<alpha = {SIXTH:.9f}, beta = 0.5>(h) y = Mul(h, s)",
        Activation("hard_swish"),
        "y",
    ),
    "hard swish, divided last": (
        17,
        "a = Add(h, three) c = Clip(a, zero, six) m = Mul(h, c) y = Div(m, six)",
        Activation("hard_swish"),
        "y",
    ),
    "hard swish, divided first": (
        17,
        "a = Add(three, h) c = Clip(a, zero, six) d = Div(c, six) y = Mul(d, h)",
        Activation("hard_swish"),
        "y",
    ),
    "hard swish by a sixth": (
        17,
        "a = Add(h, three) c = Clip(a, zero, six) m = Mul(c, h) y = Mul(sixth, m)",
        Activation("hard_swish"),
        "y",
    ),
    "silu": (17, "s = Sigmoid(h) y = Mul(h, s)", Activation("silu"), "y"),
    "silu, turned round": (17, "s = Sigmoid(h) y = Mul(s, h)", Activation("silu"), "y"),
    # None of these is one of ours.
    "sigmoid": (17, "y = Sigmoid(h)", IDENTITY, "h"),
    "computed bound": (17, "m = ReduceMax<keepdims = 0>(x) y = Clip(h, zero, m)", IDENTITY, "h"),
    "two readers": (17, "r = Relu(h) s = Neg(h) y = Add(r, s)", IDENTITY, "h"),
    "three readers": (
        17,
        "s = Sigmoid(h) m = Mul(h, s) r = Neg(h) y = Add(m, r)",
        IDENTITY,
        "h",
    ),
    "a gate with another reader": (17, "s = Sigmoid(h) m = Mul(h, s) y = Add(m, s)", IDENTITY, "h"),
    "a gate of something else": (
        17,
        "s = Sigmoid(x) t = Sigmoid(h) u = ReduceMax<keepdims = 0>(s) m = Mul(h, u) y = Add(m, t)",
        IDENTITY,
        "h",
    ),
    "another hard sigmoid": (17, "s = HardSigmoid(h) y = Mul(h, s)", IDENTITY, "h"),
    "nearly a hard swish": (
        17,
        "a = Add(h, four) c = Clip(a, zero, six) m = Mul(h, c) y = Div(m, six)",
        IDENTITY,
        "h",
    ),
    "an undivided hard swish": (
        17,
        "a = Add(h, three) c = Clip(a, zero, six) y = Mul(h, c)",
        IDENTITY,
        "h",
    ),
    "six over the product": (
        17,
        "a = Add(h, three) c = Clip(a, zero, six) m = Mul(h, c) y = Div(six, m)",
        IDENTITY,
        "h",
    ),
}


@pytest.mark.parametrize(
    ("opset", "body", "activation", "activated"), ACTIVATIONS.values(), ids=ACTIVATIONS.keys()
)
def test_activations_are_recognised_in_all_their_forms(
    opset: int, body: str, activation: Activation, activated: str
) -> None:
    layer = only(layers_of(f"h = Conv(x, w) {body}", {"w": W, **NUMBERS}, opset=opset))
    assert layer.activation.kind == activation.kind
    for name in ("low", "high", "slope"):
        assert math.isclose(
            getattr(layer.activation, name), getattr(activation, name), rel_tol=1e-6
        )
    assert layer.activated == activated


@pytest.mark.parametrize("body", ["y = Relu(h)", "s = Sigmoid(h) y = Mul(h, s)"])
def test_an_output_before_the_activation_hides_it(body: str) -> None:
    layer = only(layers_of(f"h = Conv(x, w) {body}", {"w": W}, also=("h",)))
    assert (layer.activation, layer.activated) == (IDENTITY, "h")


def test_an_output_inside_the_activation_hides_it() -> None:
    body = "h = Conv(x, w) s = Sigmoid(h) y = Mul(h, s)"
    assert only(layers_of(body, {"w": W}, also=("s",))).activation == IDENTITY


@pytest.mark.parametrize("add", ["Add(h, r)", "Add(r, h)", "Sum(h, r)", "Sum(r, h)"])
def test_a_shortcut_is_recognised_and_the_activation_acts_on_the_sum(add: str) -> None:
    body = f"h = Conv<pads = [1, 1, 1, 1]>(x, w) r = Neg(x) k = {add} y = Relu(k)"
    layer = only(layers_of(body, {"w": random(3, 3, 3, 3)}))
    assert (layer.response, layer.shortcut, layer.sum) == ("h", "r", "k")
    assert (layer.activation, layer.activated) == (Activation("relu"), "y")


def test_both_sides_of_a_sum_may_be_layers() -> None:
    arrays = {"v": random(4, 3, 1, 1), "w": random(4, 3, 1, 1, seed=3)}
    first, second = layers_of("h = Conv(x, v) i = Conv(x, w) k = Add(h, i) y = Relu(k)", arrays)
    assert (first.shortcut, first.sum, first.activated) == ("i", "k", "y")
    assert (second.shortcut, second.sum, second.activated) == ("h", "k", "y")


def test_a_bias_comes_before_a_shortcut() -> None:
    body = "h = MatMul(x, w) i = Add(h, b) k = Add(i, x) y = Relu(k)"
    layer = only(layers_of(body, {"w": random(3, 3), "b": random(3)}, x=("n", 5, 3)))
    assert (layer.response, layer.shortcut, layer.sum) == ("i", "x", "k")


@pytest.mark.parametrize(
    ("body", "x"),
    [
        ("h = Conv(x, w) k = Add(h, h) y = Relu(k)", ("n", 3, 8, 8)),
        ("h = Conv(x, w) r = Relu(h) y = Add(h, r)", ("n", 3, 8, 8)),  # seen twice
        ("h = Conv(x, w) y = Sum(h, x, x)", ("n", 3, 8, 8)),
        ("h = Conv(x, w) r = ReduceMax<axes = [2, 3]>(x) y = Add(h, r)", ("n", 3, 8, 8)),
        ("h = Conv(x, w) y = Add(h, x)", (None, 3, 8, 8)),  # sizes without a name
    ],
)
def test_what_is_no_shortcut(body: str, x: tuple[int | str, ...]) -> None:
    layer = only(layers_of(body, {"w": random(3, 3, 1, 1)}, x=x))
    assert layer.reason is None
    assert (layer.shortcut, layer.sum) == (None, None)


QUANTISED = {
    "q": np.ones((4, 3, 3, 3), np.int8),
    "scale": np.float32(0.1),
    "zero": np.int8(0),
}
REASONS = {
    "grouped": ("y = Conv<group = 3>(x, w)", {"w": random(6, 1, 3, 3)}, "it is a depthwise Conv"),
    "two groups": (
        "a = Concat<axis = 1>(x, x) y = Conv<group = 2>(a, w)",
        {"w": random(4, 3, 3, 3)},
        "it is a Conv of 2 groups",
    ),
    "ConvTranspose": ("y = ConvTranspose(x, w)", {"w": random(3, 4, 3, 3)}, "not supported"),
    "computed weight": (
        "v = Relu(w) y = Conv(x, v)",
        {"w": W},
        "its weight is computed in the model, by 'v' .Relu.",
    ),
    "shared weight": (
        "h = Conv(x, w) i = Conv(x, w) y = Add(h, i)",
        {"w": W},
        "its weight 'w' is shared with '[hi]'",
    ),
    "weight that is shared otherwise": (
        "h = Conv(x, w) i = ReduceMax<keepdims = 0>(w) y = Add(h, i)",
        {"w": W},
        "its weight 'w' is shared with 'i'",
    ),
    "half precision": (
        "c = Cast<to = 10>(x) h = Conv(c, w) y = Cast<to = 1>(h)",
        {"w": W.astype(np.float16)},
        "its weight is float16; only float32 is converted",
    ),
    "double precision": (
        "c = Cast<to = 11>(x) h = Conv(c, w) y = Cast<to = 1>(h)",
        {"w": W.astype(np.float64)},
        "its weight is double; only float32 is converted",
    ),
    "quantized weight": (
        "w = DequantizeLinear(q, scale, zero) y = Conv(x, w)",
        QUANTISED,
        "its weight is already quantized",
    ),
    "quantized input": (
        "a = QuantizeLinear(x, scale, zero) d = DequantizeLinear(a, scale, zero) y = Conv(d, w)",
        {**QUANTISED, "w": W},
        "its input is already quantized",
    ),
    "quantized": (
        "a = QuantizeLinear(x, scale, zero) "
        "h = QLinearConv(a, scale, zero, q, scale, zero, scale, zero) "
        "y = DequantizeLinear(h, scale, zero)",
        QUANTISED,
        "it is already quantized; convert the float model",
    ),
    "quantized with integers": (
        "a = Cast<to = 3>(x) h = ConvInteger(a, q) y = Cast<to = 1>(h)",
        QUANTISED,
        "it is already quantized",
    ),
    "fused": (
        'y = com.microsoft.FusedConv<activation = "Relu">(x, w)',
        {"w": W},
        "was fused by a runtime's optimiser",
    ),
    "computed bias": (
        "c = Relu(b) y = Conv(x, w, c)",
        {"w": W, "b": VECTOR},
        "its bias 'c' is computed in the model",
    ),
    "not a number": ("y = Conv(x, w)", {"w": W * np.float32(np.nan)}, "weight holds NaN"),
    "infinite bias": (
        "y = Conv(x, w, b)",
        {"w": W, "b": VECTOR * np.float32(np.inf)},
        "bias holds NaN or infinity",
    ),
    "no outputs": ("y = Conv(x, w)", {"w": random(0, 3, 3, 3)}, "is empty"),
    "constant input": (
        "h = Conv(c, w) i = ReduceMax<keepdims = 0>(h) y = Add(i, x)",
        {"w": W, "c": random(1, 3, 8, 8)},
        "its input is a constant",
    ),
    "nothing but constants before it": (
        "r = Relu(c) h = Conv(r, w) i = ReduceMax<keepdims = 0>(h) y = Add(i, x)",
        {"w": W, "c": random(1, 3, 8, 8)},
        "no input of the model reaches it",
    ),
}


@pytest.mark.parametrize(("body", "arrays", "why"), REASONS.values(), ids=REASONS.keys())
def test_what_cannot_be_converted_says_why(body: str, arrays: Arrays, why: str) -> None:
    for layer in layers_of(body, arrays):
        assert layer.reason is not None
        assert re.search(why, layer.reason)
        assert layer.bias is None


MATRIX_REASONS = {
    "transposed input": ("y = Gemm<transA = 1>(x, w)", {"w": random(5, 4)}, "transA=1"),
    "constant in front": ("y = MatMul(w, x)", {"w": random(4, 5)}, "is the first operand"),
    "Gemm with the constant in front": ("y = Gemm(w, x)", {"w": random(4, 5)}, "first operand"),
    "no constant": ("r = Relu(x) y = Gemm<transB = 1>(x, r)", {}, "computed in the model, by 'r'"),
    "a weight for each sample": (
        "y = MatMul(x, w)",
        {"w": random(2, 3, 4)},
        r"its weight of shape \[2, 3, 4\] is not a matrix",
    ),
    "a vector": ("y = MatMul(x, w)", {"w": random(3)}, r"of shape \[3\] is not a matrix"),
    "a bias for each row": (
        "y = Gemm(x, w, b)",
        {"w": random(3, 4), "b": random(5, 1)},
        r"its bias of shape \[5, 1\] is not one number for each output",
    ),
}


@pytest.mark.parametrize(
    ("body", "arrays", "why"), MATRIX_REASONS.values(), ids=MATRIX_REASONS.keys()
)
def test_matrices_that_cannot_be_converted_say_why(body: str, arrays: Arrays, why: str) -> None:
    layer = only(layers_of(body, arrays, x=(5, 3)))
    assert layer.reason is not None
    assert re.search(why, layer.reason)


def test_a_refused_layer_still_shows_its_shape_and_activation() -> None:
    layer = only(layers_of("h = Conv<group = 3>(x, w) y = Relu(h)", {"w": random(6, 1, 3, 3)}))
    assert layer.weight is not None
    assert layer.weight.shape == (6, 1, 3, 3)
    assert (layer.group, layer.activation.kind, layer.activated) == (3, "relu", "y")
    transposed = only(layers_of("y = ConvTranspose(x, w)", {"w": random(3, 4, 2, 2)}))
    assert transposed.weight is not None
    assert transposed.weight.shape == (4, 3, 2, 2)


def test_a_weight_that_is_an_input_or_an_output_says_why() -> None:
    layer = only(layers_of("y = Conv(x, w)", {"w": W}, also=("w",)))
    assert layer.reason == "its weight 'w' is an output of the model"
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[1, 3, 8, 8] x, float[4, 3, 3, 3] w) => (float[1, 4, 6, 6] y) { y = Conv(x, w) }"""
    )
    layer = only(find_layers(import_graph(model)))
    assert layer.reason == "its weight 'w' is an input of the model without a value"
    assert layer.weight is None


def test_a_weight_that_callers_may_override_is_convertible() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[1, 1, 8, 8] x, float[1, 1, 1, 1] w) => (float[1, 1, 8, 8] y)
        <float[1, 1, 1, 1] w = {2}> { y = Conv(x, w) }"""
    )
    assert only(find_layers(import_graph(model))).reason is None


def test_models_before_opset_7_say_so() -> None:
    layer = only(layers_of("y = Conv(x, w)", {"w": W}, opset=6))
    assert layer.reason == (
        "the model's opset 6 is older than 7; update it with onnx.version_converter"
    )


def test_layers_inside_of_others_are_listed_with_their_place() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "own": 1]>
        g (bool c, float[2, 2] x) => (float[2, 2] y) <float[2, 2] w = {1, 2, 3, 4}> {
            z = If(c) <then_branch = t () => (float[2, 2] p) { p = MatMul(x, w) },
                       else_branch = e () => (float[2, 2] q) { q = Relu(x) }>
            v = own.Twice(z)
            y = MatMul(v, v)
        }
        <opset_import: ["": 17], domain: "own"> Twice (a) => (b) { b = Gemm(a, a) }"""
    )
    inner, outer, local = find_layers(import_graph(model))
    assert inner.reason == "it lies in a subgraph of 'z' (If), which is left as it is"
    assert inner.weight is not None
    assert (outer.name, outer.op) == ("y", "MatMul")
    assert local.reason == "it lies in the model-local function 'Twice', which is left as it is"


def test_a_conv_whose_groups_a_function_leaves_to_its_caller_is_listed() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "own": 1]>
        g (float[1, 2, 4, 4] x, float[2, 1, 1, 1] w) => (float[1, 2, 4, 4] y) {
            y = own.Grouped<groups = 2>(x, w)
        }
        <opset_import: ["": 17], domain: "own"> Grouped <groups> (a, b) => (c) {
            c = Conv<group: int = @groups>(a, b)
        }"""
    )
    (layer,) = find_layers(import_graph(model))
    assert layer.reason == "it lies in the model-local function 'Grouped', which is left as it is"


def test_a_weight_that_a_subgraph_reads_is_shared() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (bool c, float[2, 2] x) => (float[2, 2] y) <float[2, 2] w = {1, 2, 3, 4}> {
            h = MatMul(x, w)
            y = If(c) <then_branch = t () => (float[2, 2] p) { p = Add(h, w) },
                       else_branch = e () => (float[2, 2] q) { q = Relu(x) }>
        }"""
    )
    layer = only(find_layers(import_graph(model)))
    assert layer.reason == "its weight 'w' is shared with 'p'"


def test_names_are_those_of_nodes_where_these_tell_them_apart() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "u"], ["a"], name="twice"),
        helper.make_node("Conv", ["x", "v"], ["b"], name="twice"),
        helper.make_node("Conv", ["x", "w"], ["c"], name="once"),
        helper.make_node("Sum", ["a", "b", "c"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 3, 4, 4))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 4, 2, 2))],
        [numpy_helper.from_array(W, name) for name in "uvw"],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert [layer.name for layer in find_layers(import_graph(model))] == ["a", "b", "once"]


def test_a_sparse_weight_says_so() -> None:
    values = numpy_helper.from_array(np.array([1, 2], np.float32), "w")
    indices = numpy_helper.from_array(np.array([[0, 0], [1, 1]], np.int64), "w_indices")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])],
        sparse_initializer=[helper.make_sparse_tensor(values, indices, [2, 2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    layer = only(find_layers(import_graph(model)))
    assert layer.reason == "its weight 'w' is a sparse initializer; store it densely"


def test_resnet_blocks_have_their_shortcuts(shared: Path) -> None:
    model = onnx.load(shared / "models" / "resnet20_cifar10.onnx")
    graph = import_graph(model)
    run_passes(graph, normalising())
    layers = find_layers(graph)
    assert [layer.op for layer in layers] == ["Conv"] * 19 + ["Gemm"]
    assert all(layer.reason is None for layer in layers)
    assert [layer.shortcut is not None for layer in layers[1:-1]] == [False, True] * 9
    assert all(layer.activation.kind == "relu" for layer in layers[:-1])


def test_a_node_called_as_what_another_one_writes_has_a_name_of_its_own() -> None:
    body = (
        "[h] a = Conv<pads = [1, 1, 1, 1]>(x, w) h = Conv<pads = [1, 1, 1, 1]>(x, w2) y = Add(a, h)"
    )
    first, second = layers_of(body, {"w": W, "w2": 2 * W})
    assert (first.name, second.name) == ("h", "h_1")
    assert (first.response, second.response) == ("a", "h")

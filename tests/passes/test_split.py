from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from passes.base import PassError, PassResult, run_passes
from passes.exchange import export_model, import_graph
from passes.layers import Layer, find_layers
from passes.normalise import normalising
from passes.split import Branches, Factor, Split

Run = Callable[..., dict[str, np.ndarray]]
Exact = Callable[..., Branches]
Arrays = Mapping[str, np.ndarray]

WAYS = ["sparse", "low rank", "parts", "overlap"]
SCHEMES = ["channel", "spatial", "depthwise", "tucker"]


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


KERNEL = ((0, 3), (1, 5))
"""Axes and lengths of a kernel for factors of any kind."""


def names(model: onnx.ModelProto) -> list[str]:
    return [node.name for node in model.graph.node]


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_conv_is_replaced_exactly(run: Run, exact: Exact, data: st.DataObject) -> None:
    small = st.lists(st.integers(1, 3), min_size=1, max_size=3)
    kernel = data.draw(small | st.sampled_from([[1, 7], [7, 1], [5, 5], [5]]), label="kernel")
    axes = len(kernel)

    def each(strategy: st.SearchStrategy[int], count: int, label: str) -> list[int]:
        return data.draw(st.lists(strategy, min_size=count, max_size=count), label=label)

    attributes = [f"strides = {each(st.integers(1, 3), axes, 'strides')}"]
    padding = data.draw(st.sampled_from(["pads", "SAME_UPPER", "SAME_LOWER", "VALID", "none"]))
    if padding == "pads":
        attributes.append(f"pads = {each(st.integers(0, 2), 2 * axes, 'pads')}")
    elif padding != "none":
        attributes.append(f'auto_pad = "{padding}"')
    if not padding.startswith("SAME"):  # onnxruntime has no dilation with SAME padding
        attributes.append(f"dilations = {each(st.integers(1, 2), axes, 'dilations')}")
    if data.draw(st.booleans(), label="kernel_shape"):
        attributes.append(f"kernel_shape = {kernel}")
    outputs, channels = each(st.integers(1, 9), 2, "outputs, channels")
    arrays = {"w": random(outputs, channels, *kernel)}
    operands = "x, w"
    if data.draw(st.booleans(), label="bias"):
        operands, arrays["b"] = "x, w, b", random(outputs, seed=2)
    sides = [13 if length > 3 else 7 for length in kernel]  # room for a dilated kernel
    model = build(
        f"h = Conv<{', '.join(attributes)}>({operands}) y = Relu(h)",
        arrays,
        x=(2, channels, *sides),
        opset=data.draw(st.sampled_from([7, 11, 17]), label="opset"),
        ir=data.draw(st.sampled_from([3, 8]), label="ir"),
    )
    way = data.draw(st.sampled_from(WAYS), label="way")
    scheme = data.draw(st.sampled_from(SCHEMES), label="scheme")
    select = data.draw(st.sampled_from(["gather", "conv"]), label="select")
    changed, _ = split(model, lambda layer: replace(exact(layer, way, scheme), select=select))
    assert_same(run, model, changed)
    selects = way in ("parts", "overlap") and channels > 1
    assert ("Gather" in ops(changed)) == (selects and select == "gather")
    assert ("h/select" in names(changed)) == (selects and select == "conv")
    assert changed.graph.node[-2].output == ["h"]
    assert changed.graph.output == model.graph.output


@pytest.mark.parametrize(
    "axes",
    [
        ((), (0, 1), ()),
        ((0,), (1,), ()),
        ((1,), (0,), ()),
        ((), (1,), (0,)),
        ((0,), (), (1,)),
        ((), (), (1, 0)),
        ((), (0,), (), (1,)),
    ],
)
@pytest.mark.parametrize("padding", ["pads = [0, 2, 3, 1], dilations = [2, 1]", "SAME_LOWER"])
def test_any_factor_may_take_over_any_axis(
    run: Run, axes: tuple[tuple[int, ...], ...], padding: str
) -> None:
    if padding.startswith("SAME"):
        padding = f'auto_pad = "{padding}"'
    widths = [5, *range(3, 2 + len(axes)), 4]
    factors = chain(
        *(
            random(
                widths[i + 1], widths[i], *(side if axis in own else 1 for axis, side in KERNEL)
            ).astype(np.float64)
            for i, own in enumerate(axes)
        ),
        axes=axes,
    )
    product = factors[0].weight
    for factor in factors[1:]:
        # The kernels broadcast: along each axis all but one of them have length 1.
        product = (factor.weight[:, :, None] * product[None]).sum(1)
    model = build(
        f"h = Conv<strides = [3, 2], {padding}>(x, w, b) y = Relu(h)",
        {"w": product.astype(np.float32), "b": random(4)},
        x=(2, 5, 14, 13),
    )
    changed, _ = split(model, lambda layer: Branches(factors=factors, bias=layer.bias))
    assert_same(run, model, changed)
    assert ops(changed) == [*["Conv"] * len(axes), "Relu"]


@pytest.mark.parametrize("filters", [1, 2])
def test_filters_of_each_channel_read_it_repeated(run: Run, filters: int) -> None:
    model = build(
        "h = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(x, w, b) y = Relu(h)",
        {"w": random(16, 8, 3, 3), "b": random(16, seed=2)},
        x=(1, 8, 7, 7),
    )
    width = 4 * filters
    factors = (
        Factor(random(4, 8, 1, 1)),
        Factor(random(width, 1, 3, 3), (0, 1), filters),
        Factor(random(16, width, 1, 1)),
    )
    changed, results = split(model, lambda layer: Branches(factors=factors, bias=layer.bias))
    repeat = ["Concat"] if filters > 1 else []
    assert ops(changed) == ["Conv", *repeat, "Conv", "Conv", "Relu"]
    _, middle, last = (node for node in changed.graph.node if node.op_type == "Conv")
    attributes = {each.name: helper.get_attribute_value(each) for each in middle.attribute}
    assert (attributes["group"], attributes["strides"]) == (width, [2, 2])
    assert (len(middle.input), len(last.input)) == (2, 3)
    said = " ".join(change.what for result in results for change in result.changes)
    assert f"factors of rank 4×{width}" in said

    # the same layer, whole: a channel of the first factor comes once for each filter, all before any twice
    first, each, last_weight = (factor.weight for factor in factors)
    dense = np.einsum(
        "nq,qhw,qc->nchw",
        last_weight[..., 0, 0],
        each[:, 0],
        np.tile(first[..., 0, 0], (filters, 1)),
    )
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    weight = next(each for each in whole.graph.initializer if each.name == "w")
    weight.CopyFrom(numpy_helper.from_array(dense.astype(np.float32), "w"))
    assert_same(run, whole, changed)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("opset", [7, 11, 17])
@pytest.mark.parametrize("bias", [None, (), (1,), (6,), (1, 6)])
@pytest.mark.parametrize("scheme", ["channel", "tucker"])
@pytest.mark.parametrize("attributes", ["", "<transB = 1>", "<alpha = 0.5, beta = 2.0>"])
def test_a_gemm_is_replaced_exactly(
    run: Run,
    exact: Exact,
    way: str,
    scheme: str,
    opset: int,
    bias: tuple[int, ...] | None,
    attributes: str,
) -> None:
    if bias is None and opset < 11:
        opset = 11  # before it a Gemm has its bias
    arrays = {"w": random(6, 5) if "transB" in attributes else random(5, 6)}
    operands = "x, w"
    if bias is not None:
        operands, arrays["b"] = "x, w, b", random(*bias, seed=2)
    ir = 3 if opset == 7 else 8
    model = build(
        f"h = Gemm{attributes}({operands}) y = Relu(h)", arrays, x=(4, 5), opset=opset, ir=ir
    )
    changed, _ = split(model, lambda layer: exact(layer, way, scheme))
    assert_same(run, model, changed)
    factors = 3 if scheme == "tucker" else 2
    assert Counter(ops(changed)) == {
        "Gemm": {"sparse": 1, "low rank": factors}.get(way, 1 + factors),
        "Relu": 1,
        **({"Gather": 1} if way in ("parts", "overlap") else {}),
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("x", [(4, 5), (2, 4, 5), (2, 3, 4, 5), (5,)])
@pytest.mark.parametrize("bias", [None, (6,), (1,)])
@pytest.mark.parametrize("scheme", ["channel", "tucker"])
def test_a_matmul_is_replaced_exactly(
    run: Run, exact: Exact, way: str, scheme: str, x: tuple[int, ...], bias: tuple[int, ...] | None
) -> None:
    arrays = {"w": random(5, 6)}
    body = "h = MatMul(x, w) y = Relu(h)"
    if bias is not None:
        arrays["b"] = random(*bias, seed=2)
        body = "h = MatMul(x, w) k = Add(h, b) y = Relu(k)"
    model = build(body, arrays, x=x, opset=13)
    changed, results = split(model, lambda layer: exact(layer, way, scheme))
    assert len(results) == 1
    assert_same(run, model, changed)
    assert changed.graph.node[-2].output == ["h" if bias is None else "k"]
    assert not {"w", "b"}.intersection(tensor.name for tensor in changed.graph.initializer)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_pointwise_conv_is_replaced_exactly(
    run: Run, exact: Exact, way: str, scheme: str
) -> None:
    body = "y = Conv<strides = [2, 2]>(x, w, b)"
    model = build(body, {"w": random(6, 5, 1, 1), "b": random(6)}, x=(2, 5, 7, 7))
    changed, _ = split(model, lambda layer: exact(layer, way, scheme))
    assert_same(run, model, changed)


def test_the_nodes_are_those_that_were_promised(exact: Exact) -> None:
    model = build(
        "h = Conv<pads = [1, 1, 1, 1]>(x, w, b) y = Relu(h)",
        {"w": random(6, 4, 3, 3), "b": random(6)},
        x=(1, 4, 5, 5),
    )
    model.graph.node[0].name = "conv1"
    changed, results = split(model, lambda layer: exact(layer, "parts"))
    assert [(node.name, node.op_type, list(node.output)) for node in changed.graph.node] == [
        ("conv1/gather", "Gather", ["conv1/gather_output"]),
        ("conv1/sparse", "Conv", ["conv1/sparse_output"]),
        ("conv1/down", "Conv", ["conv1/down_output"]),
        ("conv1/up", "Conv", ["conv1/up_output"]),
        ("conv1/sum", "Add", ["h"]),
        ("", "Relu", ["y"]),
    ]
    assert [len(node.input) for node in changed.graph.node] == [2, 2, 2, 3, 2, 1]  # bias once
    assert [tensor.name for tensor in changed.graph.initializer] == [
        "conv1/bias",
        "conv1/down/weight",
        "conv1/sparse/weight",
        "conv1/support",
        "conv1/up/weight",
    ]
    assert [(c.node, c.what) for c in results[0].changes] == [
        ("conv1", "Conv became a sparse branch of 2 of 4 channels and factors of rank 6")
    ]


def attributes_of(node: onnx.NodeProto) -> dict[str, object]:
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def test_each_factor_has_the_attributes_of_its_axes(exact: Exact) -> None:
    body = "y = Conv<strides = [2, 3], pads = [1, 2, 3, 4], dilations = [2, 1]>(x, w)"
    model = build(body, {"w": random(6, 4, 3, 5)}, x=(1, 4, 9, 9))
    changed, _ = split(model, lambda layer: exact(layer, "low rank", "spatial"))
    assert names(changed) == ["y/down", "y/up"]
    down, up = (attributes_of(node) for node in changed.graph.node)
    assert (down["kernel_shape"], up["kernel_shape"]) == ([3, 1], [1, 5])
    assert (down["strides"], up["strides"]) == ([2, 1], [1, 3])
    assert (down["pads"], up["pads"]) == ([1, 0, 3, 0], [0, 2, 0, 4])
    assert (down["dilations"], up["dilations"]) == ([2, 1], [1, 1])


def test_three_factors_and_a_selecting_conv_have_their_names(exact: Exact) -> None:
    model = build("y = Conv(x, w, b)", {"w": random(6, 4, 3, 3), "b": random(6)}, x=(1, 4, 5, 5))
    model.graph.node[0].name = "conv1"
    changed, results = split(
        model, lambda layer: replace(exact(layer, "parts", "tucker"), select="conv")
    )
    roles = ["select", "sparse", "in", "core", "out", "sum"]
    assert names(changed) == [f"conv1/{role}" for role in roles]
    assert [len(node.input) for node in changed.graph.node] == [2, 2, 2, 2, 3, 2]  # bias once
    stored = {t.name: numpy_helper.to_array(t) for t in changed.graph.initializer}
    one_hot = stored["conv1/select/weight"]
    assert one_hot.shape == (2, 4, 1, 1)
    assert (one_hot.sum(), one_hot.max()) == (2, 1)
    assert [(c.node, c.what) for c in results[0].changes] == [
        ("conv1", "Conv became a sparse branch of 2 of 4 channels and factors of rank 4×6")
    ]


def test_new_names_are_new_to_subgraphs_too(run: Run, exact: Exact) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[2, 2] x) => (float[2, 2] y) <float[2, 2] w = {1, 2, 3, 4}, bool c = {1}> {
            h = MatMul(x, w)
            y = If(c) <then_branch = t () => (float[2, 2] p) { p = Relu(h) },
                       else_branch = e () => (float[2, 2] q) { q = Neg(h) }>
        }"""
    )
    then = model.graph.node[1].attribute[0].g
    then.node[0].name = "h/up"
    then.node[0].output[0] = then.output[0].name = "h/down/weight"
    onnx.checker.check_model(model, full_check=True)
    changed, _ = split(model, lambda layer: exact(layer, "low rank"))
    assert [node.name for node in changed.graph.node] == ["h/down", "h/up_1", ""]
    assert "h/down/weight_1" in [tensor.name for tensor in changed.graph.initializer]
    assert_same(run, model, changed)


def test_layers_are_split_one_after_another(run: Run, exact: Exact) -> None:
    arrays = {"v": random(5, 3, 3, 3), "w": random(4, 5, 1, 1, seed=2), "b": random(5)}
    model = build("h = Conv(x, v, b) i = Relu(h) y = Conv(i, w)", arrays, x=(1, 3, 6, 6), ir=3)
    changed, results = split(model, lambda layer: exact(layer, "overlap"))
    assert len(results) == 2
    assert len({node.name for node in changed.graph.node}) == len(changed.graph.node) == 11
    assert_same(run, model, changed)


def test_a_bias_that_others_read_stays_for_them(run: Run, exact: Exact) -> None:
    arrays = {"v": random(4, 3, 1, 1), "b": random(4)}
    model = build("h = Conv(x, v, b) r = ReduceMax(b) y = Add(h, r)", arrays, x=(1, 3, 4, 4))
    changed, _ = split(model, lambda layer: exact(layer, "low rank"))
    assert {"b", "h/bias"} <= {tensor.name for tensor in changed.graph.initializer}
    assert_same(run, model, changed)


def test_losing_an_input_is_said(exact: Exact) -> None:
    model = build(
        "y = Conv(x, w, b)", {"w": random(4, 3, 1, 1), "b": random(4)}, x=(1, 3, 4, 4), ir=3
    )
    model.ir_version = 8  # the old habit of listing weights, under rules that let callers set them
    changed, results = split(model, lambda layer: exact(layer, "low rank"))
    assert [value.name for value in changed.graph.input] == ["x"]
    assert results[0].changes[0].what.endswith("; the model no longer has the input w, b")


def test_denormal_weights_become_zero() -> None:
    model = build("y = Conv(x, w)", {"w": random(4, 3, 1, 1)}, x=(1, 3, 4, 4))
    tiny = np.full((1, 3, 1, 1), 1e-40)
    tiny[0, 0] = 1e-37  # small, yet normal
    up = np.array([1e-50, -1e-39, 1.0, 0.0]).reshape(4, 1, 1, 1)
    changed, _ = split(model, lambda _: Branches(factors=chain(tiny, up)))
    stored = {t.name: numpy_helper.to_array(t) for t in changed.graph.initializer}
    assert stored["y/down/weight"].dtype == np.float32
    np.testing.assert_array_equal(
        stored["y/down/weight"].reshape(-1), np.array([1e-37, 0, 0], np.float32)
    )
    np.testing.assert_array_equal(stored["y/up/weight"].reshape(-1), [0, 0, 1, 0])


def low_rank(*shapes: tuple[int, ...], **others: np.ndarray) -> Branches:
    """Branches with factors of ones; the first has all the kernel."""
    return Branches(factors=chain(*map(np.ones, shapes)), **others)


def test_a_layer_that_cannot_be_converted_is_refused() -> None:
    model = build("y = Conv<group = 3>(x, w)", {"w": random(6, 1, 1, 1)}, x=(1, 3, 4, 4))
    layer = find_layers(import_graph(model))[0]
    with pytest.raises(ValueError, match="layer 'y' cannot be converted: it is a depthwise Conv"):
        Split(layer, Branches(factors=chain(np.ones((1, 1, 1, 1)), np.ones((6, 1, 1, 1)))))


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        (low_rank((2, 5, 3, 3), (4, 2, 1, 1)), "the factors of shapes"),
        (low_rank((2, 3, 1, 1), (4, 2, 1, 1)), "the factors of shapes"),
        (low_rank((2, 3, 3, 3), (5, 2, 1, 1)), "the factors of shapes"),
        (low_rank((2, 3, 3), (4, 2, 1)), "the factors of shapes"),
        (Branches(np.array([0, 3]), np.ones((4, 2, 3, 3))), "the sparse branch of shape"),
        (Branches(np.array([0, 1]), np.ones((4, 2, 1, 1))), "the sparse branch of shape"),
    ],
)
def test_branches_of_another_layer_are_refused(branches: Branches, message: str) -> None:
    model = build("y = Conv(x, w)", {"w": random(4, 3, 3, 3)}, x=(1, 3, 4, 4))
    layer = find_layers(import_graph(model))[0]
    with pytest.raises(ValueError, match=message):
        Split(layer, branches)


PAIR = chain(np.ones((2, 3)), np.ones((4, 2)))
"""Factors of a matrix (4, 3)."""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "neither branch is given"),
        ({"bias": np.ones(4)}, "neither branch is given"),
        ({"support": np.array([0])}, "needs both its support and its weight"),
        ({"factors": chain(np.ones((2, 3)))}, "a single factor is no low-rank branch"),
        ({"support": np.array([0.0]), "sparse": np.ones((4, 1))}, "not a list of int64"),
        ({"support": np.array([], int), "sparse": np.ones((4, 0))}, "not a list of int64"),
        ({"support": np.array([1, 0]), "sparse": np.ones((4, 2))}, "ascending order"),
        ({"support": np.array([1, 1]), "sparse": np.ones((4, 2))}, "ascending order"),
        ({"support": np.array([-1, 1]), "sparse": np.ones((4, 2))}, "ascending order"),
        ({"support": np.array([0, 1]), "sparse": np.ones((4, 3))}, "does not fit a support"),
        ({"factors": chain(np.ones((2, 3)), np.ones((4, 3)))}, "do not chain"),
        ({"factors": chain(np.ones((2, 3)), np.ones((4, 2, 1)))}, "do not chain"),
        (
            {"factors": chain(np.ones((2, 3)), np.ones((2, 2)), np.ones((4, 3)))},
            "shapes \\(2, 2\\) and \\(4, 3\\) do not chain",
        ),
        (
            {"factors": chain(np.ones((2, 3, 3)), np.ones((4, 2, 1)), axes=((0,), (0,)))},
            "take over the axes \\[0, 0\\], not each of 1 exactly once",
        ),
        (
            {"factors": chain(np.ones((2, 3, 3, 1)), np.ones((4, 2, 1, 1)), axes=((0,), ()))},
            "take over the axes \\[0\\], not each of 2 exactly once",
        ),
        (
            {"factors": (Factor(np.ones((2, 1, 3)), (0,), 1), Factor(np.ones((4, 2, 1))))},
            "reads each channel alone",
        ),
        (
            {
                "factors": (
                    Factor(np.ones((2, 3, 1))),
                    Factor(np.ones((6, 1, 3)), (0,), 2),
                    Factor(np.ones((4, 6, 1))),
                )
            },
            "do not chain",
        ),
        ({"factors": PAIR, "bias": np.ones(5)}, "differ in their outputs"),
        ({"factors": PAIR, "bias": np.ones((4, 1))}, "not a vector"),
        ({"factors": PAIR, "bias": np.full(4, np.nan)}, "not finite"),
        ({"factors": PAIR, "select": "conv"}, "nothing selects channels by 'conv' here"),
        ({"factors": PAIR, "select": "slice"}, "nothing selects channels by 'slice' here"),
        (
            {"support": np.array([0]), "sparse": np.ones((4, 1, 3)), "factors": PAIR},
            "differ in their kernels",
        ),
    ],
)
def test_branches_that_do_not_fit_together_are_refused(
    given: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Branches(**given)


@pytest.mark.parametrize("shape", [(5, 1, 3), (4, 2, 3), (4, 1)])
def test_a_factor_that_is_not_so_many_filters_is_refused(shape: tuple[int, ...]) -> None:
    axes = tuple(range(len(shape) - 2))
    with pytest.raises(ValueError, match="is not 2 filters for each of its channels"):
        Factor(np.ones(shape), axes, 2)


@pytest.mark.parametrize(
    ("weight", "axes", "message"),
    [
        (np.ones(3), (), "is not \\(out, in, \\*kernel\\)"),
        (np.ones((0, 3)), (), "is not \\(out, in, \\*kernel\\)"),
        (np.ones((2, 3)), (0,), "are not some of its 0 spatial axes"),
        (np.ones((2, 3, 3)), (-1,), "are not some of its 1 spatial axes"),
        (np.ones((2, 3, 3)), (0, 0), "are not some of its 1 spatial axes"),
        (np.ones((2, 3, 1, 3)), (0,), "has a kernel along axis 1"),
        (np.full((4, 2), np.nan), (), "not finite"),
        (np.full((4, 2), 1e39), (), "not finite"),
        (np.ones((2, 3), int), (), "not a floating-point array"),
    ],
)
def test_a_factor_with_another_kernel_than_its_axes_is_refused(
    weight: np.ndarray, axes: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Factor(weight, axes)


def test_the_size_of_the_branches_is_told() -> None:
    support, sparse = np.array([0, 2]), np.ones((4, 2))
    factors = chain(np.ones((3, 5)), np.ones((2, 3)), np.ones((4, 2)))
    assert Branches(support, sparse, factors).kept == 2
    assert Branches(support, sparse, factors).ranks == (3, 2)
    assert Branches(support, sparse).ranks == ()
    assert Branches(factors=factors).kept == 0


def test_a_graph_without_the_layer_is_refused(exact: Exact) -> None:
    model = build("y = Conv(x, w)", {"w": random(4, 3, 1, 1)}, x=(1, 3, 4, 4))
    graph = import_graph(model)
    layer = find_layers(graph)[0]
    once = Split(layer, exact(layer, "parts"))
    once(graph)
    with pytest.raises(PassError, match="the graph has no Conv 'y' that writes 'y'"):
        once(graph)


def optimised(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """Return what onnxruntime makes of a model at its default level."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimised.onnx")


on_x86 = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"),
    reason="what onnxruntime fuses was read off on x86",
)


@on_x86
@pytest.mark.parametrize(
    ("channels", "outputs", "kept", "rank", "activation"),
    [
        (64, 64, 16, 16, "Relu"),
        (64, 64, 16, 16, "HardSwish"),
        (32, 48, 32, 16, "Relu"),  # all channels: no Gather
        (64, 64, 0, 32, "Relu"),  # no Add at all
        (60, 62, 20, 12, "Relu"),  # multiples of 4
        (30, 44, 6, 6, "Relu"),  # below the block
        (60, 60, 6, 30, "Relu"),  # the 1×1 Conv outside of the blocked layout
        (60, 60, 30, 6, "Relu"),  # S outside of it
        (60, 60, 30, 30, "Relu"),  # both
        (60, 60, 30, 30, "LeakyRelu"),
    ],
)
def test_onnxruntime_fuses_the_sum_and_the_activation_into_a_conv(
    tmp_path: Path, channels: int, outputs: int, kept: int, rank: int, activation: str
) -> None:
    factors = chain(random(rank, channels, 3, 3), random(outputs, rank, 1, 1))
    found = optimised_between_convs(tmp_path, factors, activation, kept)
    assert set(found) <= {"Conv", "FusedConv", "Gather", "ReorderInput", "ReorderOutput"}
    assert found["Conv"] + found["FusedConv"] == (5 if kept else 4)
    assert found["Gather"] == (0 < kept < channels)


@on_x86
@pytest.mark.parametrize(
    ("scheme", "kept", "ranks"),
    [
        ("spatial", 16, (16,)),
        ("spatial", 16, (30,)),  # the last factor outside of the blocked layout
        ("spatial", 30, (16,)),  # S outside of it
        ("spatial", 30, (30,)),  # both
        ("spatial", 0, (30,)),
        ("tucker", 16, (16, 32)),
        ("tucker", 16, (30, 16)),  # the middle factor outside of it: it takes no sum
        ("tucker", 16, (16, 30)),
        ("tucker", 30, (30, 16)),
        ("tucker", 0, (16, 32)),
    ],
)
def test_onnxruntime_fuses_the_sum_behind_any_chain(
    tmp_path: Path, scheme: str, kept: int, ranks: tuple[int, ...]
) -> None:
    if scheme == "spatial":
        weights = (random(*ranks, 64, 3, 1), random(64, *ranks, 1, 3))
        factors = chain(*weights, axes=((0,), (1,)))
    else:
        first, second = ranks
        weights = (random(first, 64, 1, 1), random(second, first, 3, 3), random(64, second, 1, 1))
        factors = chain(*weights, axes=((), (0, 1), ()))
    found = optimised_between_convs(tmp_path, factors, "Relu", kept)
    assert set(found) <= {"Conv", "FusedConv", "Gather", "ReorderInput", "ReorderOutput"}
    assert found["Conv"] + found["FusedConv"] == 2 + len(factors) + (kept > 0)


@on_x86
def test_a_selecting_conv_stays_in_the_blocked_layout(tmp_path: Path) -> None:
    factors = chain(random(16, 64, 3, 3), random(64, 16, 1, 1))
    counts = {
        select: optimised_between_convs(tmp_path, factors, "Relu", 32, select)
        for select in ("gather", "conv")
    }
    assert counts["gather"] == {"Conv": 5, "Gather": 1, "ReorderInput": 1, "ReorderOutput": 2}
    assert counts["conv"] == {"Conv": 6, "ReorderOutput": 1}  # that of the model's output


def optimised_between_convs(
    folder: Path, factors: tuple[Factor, ...], activation: str, kept: int, select: str = "gather"
) -> Counter[str]:
    """Operators that onnxruntime leaves of Conv, split 3×3 Conv, activation, Conv."""
    channels, outputs = factors[0].weight.shape[1], len(factors[-1].weight)
    arrays = {
        "v": random(channels, 3, 3, 3),
        "w": random(outputs, channels, 3, 3),
        "b": random(outputs),
        "u": random(8, outputs, 3, 3),
    }
    body = f"h = Conv(x, v) i = Relu(h) j = Conv(i, w, b) k = {activation}(j) y = Conv(k, u)"
    model = build(body, arrays, x=(1, 3, 16, 16))
    graph = import_graph(model)
    layer = next(layer for layer in find_layers(graph) if layer.output == "j")
    branches = Branches(
        support=np.arange(kept) if kept else None,
        sparse=random(outputs, kept, 3, 3) if kept else None,
        factors=factors,
        bias=layer.bias,
        select=select,
    )
    Split(layer, branches)(graph)
    changed = export_model(graph, model)
    assert {activation, *(["Add"] if kept else [])} <= set(ops(changed))
    return Counter(ops(optimised(changed, folder)))


def test_onnxruntime_fuses_relu_into_the_last_gemm(tmp_path: Path, exact: Exact) -> None:
    arrays = {"w": random(6, 5), "b": random(6), "v": random(3, 6)}
    body = "h = Gemm<transB = 1>(x, w, b) i = Relu(h) y = Gemm<transB = 1>(i, v)"
    changed, _ = split(build(body, arrays, x=(4, 5)), lambda layer: exact(layer, "parts"))
    found = Counter(ops(optimised(changed, tmp_path)))
    assert set(found) <= {"Gemm", "FusedGemm", "Gather"}
    assert found["FusedGemm"] == 1

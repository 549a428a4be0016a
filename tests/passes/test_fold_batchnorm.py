from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from passes.base import PassResult
from passes.exchange import export_model, import_graph
from passes.fold_batchnorm import FoldBatchNorm

Run = Callable[..., dict[str, np.ndarray]]
Arrays = dict[str, np.ndarray]

# A few float32 operations on numbers around 1: round-off stays far below this.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def build(
    body: str,
    arrays: Arrays,
    *,
    x: tuple[int, ...] = (2, 4, 7, 7),
    opset: int = 17,
    ir: int = 8,
    also: tuple[str, ...] = (),
) -> onnx.ModelProto:
    """Model that computes y, and the tensors in `also`, from x."""
    nodes = onnx.parser.parse_graph(f"g (float x) => (float y) {{ {body} }}").node
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("y", *also)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    if ir < 4:
        graph.input.extend(
            helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in graph.initializer
        )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    inferred = onnx.shape_inference.infer_shapes(model).graph.output
    for value, known in zip(graph.output, inferred, strict=True):
        value.CopyFrom(known)
    model.graph.CopyFrom(graph)
    return model


def batch_norm(channels: int, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        "gamma": rng.uniform(0.5, 2, channels).astype(np.float32),
        "beta": rng.normal(size=channels).astype(np.float32),
        "mean": rng.normal(size=channels).astype(np.float32),
        "var": rng.uniform(0.1, 2, channels).astype(np.float32),
    }


def random(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) / 3


def folded(model: onnx.ModelProto) -> tuple[onnx.ModelProto, PassResult]:
    graph = import_graph(model)
    result = FoldBatchNorm()(graph)
    changed = export_model(graph, model)
    onnx.checker.check_model(changed)
    return changed, result


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def feeds(model: onnx.ModelProto) -> Arrays:
    dims = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    return {"x": random(*dims, seed=7)}


BN = "BatchNormalization(h, gamma, beta, mean, var)"
FOLDS = {
    "Conv": ("h = Conv(x, w) y = " + BN, {"w": random(6, 4, 3, 3)}),
    "Conv with a bias": ("h = Conv(x, w, b) y = " + BN, {"w": random(6, 4, 3, 3), "b": random(6)}),
    "grouped Conv": ("h = Conv<group = 2>(x, w) y = " + BN, {"w": random(6, 2, 3, 3)}),
    "depthwise Conv": ("h = Conv<group = 4>(x, w) y = " + BN, {"w": random(4, 1, 3, 3)}),
    "epsilon": (
        "h = Conv(x, w) y = BatchNormalization<epsilon = 0.5>(h, gamma, beta, mean, var)",
        {"w": random(6, 4, 1, 1)},
    ),
    "a Caffe scale layer": (
        f"h = Conv(x, w) k = {BN} l = Mul(k, s) y = Add(l, t)",
        {"w": random(6, 4, 1, 1), "s": random(6, 1, 1), "t": random(1, 6, 1, 1)},
    ),
    "all of arithmetic": (
        "h = Conv(x, w) i = Sub(h, s) j = Sub(t, i) k = Div(j, u) l = Mul(v, k) y = Add(v, l)",
        {
            "w": random(6, 4, 1, 1),
            "s": random(6, 1, 1),
            "t": random(1, 6, 1, 1),
            "u": random(6, 1, 1) + np.float32(3),
            "v": random(),
        },
    ),
    "Conv in one dimension": ("h = Conv(x, w) y = " + BN, {"w": random(6, 4, 3)}),
    "Conv in three dimensions": ("h = Conv(x, w) y = " + BN, {"w": random(6, 4, 2, 2, 2)}),
}


@pytest.mark.parametrize(("body", "arrays"), FOLDS.values(), ids=FOLDS.keys())
@pytest.mark.parametrize(("opset", "ir"), [(7, 3), (9, 4), (17, 8)])
def test_what_follows_a_conv_folds_into_it(
    run: Run, body: str, arrays: Arrays, opset: int, ir: int
) -> None:
    spatial = arrays["w"].ndim - 2
    model = build(
        body,
        {**arrays, **batch_norm(len(arrays["w"]))},
        x=(2, 4, *[5] * spatial),
        opset=opset,
        ir=ir,
    )
    changed, result = folded(model)
    assert ops(changed) == ["Conv"]
    assert len(result.changes) == len(model.graph.node) - 1
    assert not result.skips
    assert changed.graph.node[0].output == ["y"]
    np.testing.assert_allclose(
        run(changed, feeds(model))["y"], run(model, feeds(model))["y"], **TOLERANCE
    )
    assert not folded(changed)[1].modified


@pytest.mark.parametrize("attributes", ["", "<transB = 1>", "<alpha = 0.5, beta = 2.0>"])
@pytest.mark.parametrize("bias", [None, (), (1,), (6,), (1, 6)])
@pytest.mark.parametrize("ir", [3, 8])
def test_what_follows_a_gemm_folds_into_it(
    run: Run, attributes: str, bias: tuple[int, ...] | None, ir: int
) -> None:
    arrays = {"w": random(6, 4) if "transB" in attributes else random(4, 6), "s": random(6)}
    operands = "x, w"
    if bias is not None:
        operands, arrays["b"] = "x, w, b", random(*bias)
    body = f"h = Gemm{attributes}({operands}) k = {BN} y = Mul(k, s)"
    model = build(body, {**arrays, **batch_norm(6)}, x=(3, 4), ir=ir)
    changed, _ = folded(model)
    assert ops(changed) == ["Gemm"]
    np.testing.assert_allclose(
        run(changed, feeds(model))["y"], run(model, feeds(model))["y"], **TOLERANCE
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    group=st.integers(1, 3),
    per_group=st.integers(1, 3),
    channels=st.integers(1, 3),
    kernel=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    bias=st.booleans(),
)
def test_convs_of_all_shapes_fold(
    run: Run, group: int, per_group: int, channels: int, kernel: list[int], bias: bool
) -> None:
    outputs = group * per_group
    arrays = {"w": random(outputs, channels, *kernel), **batch_norm(outputs)}
    operands = "x, w"
    if bias:
        operands, arrays["b"] = "x, w, b", random(outputs, seed=3)
    body = f"h = Conv<group = {group}>({operands}) y = {BN}"
    model = build(body, arrays, x=(1, group * channels, *[4] * len(kernel)))
    changed, _ = folded(model)
    assert ops(changed) == ["Conv"]
    np.testing.assert_allclose(
        run(changed, feeds(model))["y"], run(model, feeds(model))["y"], **TOLERANCE
    )


W = {"w": random(6, 4, 1, 1)}
STAYS = {
    "a second consumer": (f"h = Conv(x, w) k = {BN} y = Add(h, k)", W, "has other consumers"),
    "no Conv before it": (
        f"h = Relu(x) y = {BN}",
        batch_norm(4),
        "comes from 'h' .Relu., not from a Conv",
    ),
    "the input of the model before it": (
        "y = BatchNormalization(x, gamma, beta, mean, var)",
        batch_norm(4),
        "its input 'x' comes from no Conv or Gemm",
    ),
    "ConvTranspose": (
        f"h = ConvTranspose(x, w) y = {BN}",
        {"w": random(4, 6, 1, 1)},
        "ConvTranspose 'h', which is left alone",
    ),
    "training": (
        "h = Conv(x, w) y, m, v = BatchNormalization<training_mode = 1>(h, gamma, beta, mean, var)",
        W,
        "in training mode",
    ),
    "shared weight": (
        f"h = Conv(x, w) i = Conv(x, w) k = {BN} y = Add(i, k)",
        W,
        "its weight 'w' is shared with 'i'",
    ),
    "computed weight": (
        f"v = Relu(w) h = Conv(x, v) y = {BN}",
        W,
        "its weight is not a constant",
    ),
    "computed bias": (
        f"v = Relu(b) h = Conv(x, w, v) y = {BN}",
        {**W, "b": random(6)},
        "its bias is not a constant",
    ),
    "computed parameter": (
        "h = Conv(x, w) v = Relu(gamma) y = BatchNormalization(h, v, beta, mean, var)",
        W,
        "its parameter 'v' is not a constant",
    ),
    "variance below zero": (
        f"h = Conv(x, w) y = {BN}",
        {**W, "var": np.full(6, -1, np.float32)},
        "variance is not above 0",
    ),
    "not along the channels": (
        "h = Conv(x, w) y = Mul(h, s)",
        {**W, "s": random(7)},
        "is not one number for each channel",
    ),
    "a constant that enlarges": (
        "h = Conv(x, w) y = Mul(h, s)",
        {**W, "s": random(1, 1, 1, 1, 1)},
        "is not one number for each channel",
    ),
    "division by the response": (
        "h = Conv(x, w) y = Div(s, h)",
        {**W, "s": random(6, 1, 1)},
        "it divides by 'h'",
    ),
    "division by zero": (
        "h = Conv(x, w) y = Div(h, s)",
        {**W, "s": np.zeros((6, 1, 1), np.float32)},
        "it divides by 0",
    ),
    "overflow": (
        "h = Conv(x, w) y = Mul(h, s)",
        {"w": np.full((6, 4, 1, 1), 1e30, np.float32), "s": np.float32(1e30)},
        "would not be finite",
    ),
    "not a number": (
        "h = Conv(x, w) y = Mul(h, s)",
        {**W, "s": np.float32(np.nan)},
        "its scale or shift is not finite",
    ),
}


@pytest.mark.parametrize(("body", "arrays", "why"), STAYS.values(), ids=STAYS.keys())
def test_what_cannot_fold_stays_with_its_reason(body: str, arrays: Arrays, why: str) -> None:
    model = build(body, {**batch_norm(6), **arrays})
    graph = import_graph(model)
    result = FoldBatchNorm()(graph)
    assert not result.modified
    assert len(result.skips) == 1
    assert re.search(why, result.skips[0].why)
    assert ops(export_model(graph, model)) == ops(model)


def test_a_chain_folds_as_far_as_it_can(run: Run) -> None:
    arrays = {**W, **batch_norm(6), "s": random(7)}
    model = build(f"h = Conv(x, w) k = {BN} y = Mul(k, s)", arrays)
    changed, result = folded(model)
    assert ops(changed) == ["Conv", "Mul"]
    assert changed.graph.node[0].output == ["k"]
    assert [skip.node for skip in result.skips] == ["y"]
    np.testing.assert_allclose(
        run(changed, feeds(model))["y"], run(model, feeds(model))["y"], **TOLERANCE
    )


def test_a_response_that_is_an_output_stays(run: Run) -> None:
    model = build(f"h = Conv(x, w) y = {BN}", {**W, **batch_norm(6)}, also=("h",))
    changed, result = folded(model)
    assert changed.SerializeToString() == model.SerializeToString()
    assert result.skips[0].why == "the response 'h' before it is an output of the model"
    assert set(run(changed, feeds(model))) == {"y", "h"}


def test_a_shared_bias_is_not_changed_for_the_other(run: Run) -> None:
    arrays = {**W, **batch_norm(6), "v": random(6, 4, 1, 1, seed=5), "b": random(6)}
    model = build(f"h = Conv(x, w, b) i = Conv(x, v, b) k = {BN} y = Add(i, k)", arrays)
    changed, _ = folded(model)
    assert ops(changed) == ["Conv", "Conv", "Add"]
    assert [node.input[2] for node in changed.graph.node[:2]] == ["h/bias", "b"]
    np.testing.assert_allclose(
        run(changed, feeds(model))["y"], run(model, feeds(model))["y"], **TOLERANCE
    )


def test_half_precision_stays() -> None:
    arrays = {name: array.astype(np.float16) for name, array in {**W, **batch_norm(6)}.items()}
    model = build(f"h = Conv(x, w) y = {BN}", arrays)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    result = FoldBatchNorm()(import_graph(model))
    assert not result.modified
    assert result.skips[0].why.endswith("its weight is float16, not float32")


def test_per_position_normalisation_of_old_models_stays() -> None:
    body = "h = Conv(x, w) y = BatchNormalization<spatial = 0>(h, gamma, beta, mean, var)"
    result = FoldBatchNorm()(import_graph(build(body, {**W, **batch_norm(6)}, opset=7)))
    assert "each position by itself" in result.skips[0].why


def test_models_before_opset_7_stay() -> None:
    model = build(f"h = Conv(x, w) y = {BN}", {**W, **batch_norm(6)}, opset=6, ir=3)
    result = FoldBatchNorm()(import_graph(model))
    assert not result.modified
    assert result.skips[0].why == "opset 6 is too old; at least 7"


def test_losing_an_input_is_said() -> None:
    model = build(f"h = Conv(x, w) y = {BN}", {**W, **batch_norm(6)}, ir=3)
    model.ir_version = 8  # the old habit of listing weights, under rules that let callers set them
    changed, result = folded(model)
    # a caller who feeds w means the weight as it was, which is not scaled
    assert [value.name for value in changed.graph.input] == ["x"]
    assert "no longer has the input gamma, beta, mean, var, w" in result.changes[0].what
    biased = build(
        f"h = Conv(x, w, b) y = {BN}", {**W, "b": np.ones(6, np.float32), **batch_norm(6)}, ir=3
    )
    biased.ir_version = 8
    changed, result = folded(biased)
    assert [value.name for value in changed.graph.input] == ["x"]
    assert "var, w, b" in result.changes[0].what

"""Gradients are those of the function, and what a graph needs, keeps and refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from onnx import numpy_helper

from converter.differentiable import TorchGraph, UnsupportedOperatorError
from converter.errors import CalibrationError, ModelError
from tests.converter.differentiable.networks import (
    X4,
    Y4,
    computed,
    one,
    parse,
    random_feeds,
    small,
)


@pytest.mark.parametrize("name", ["x", "a", "p"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    model = small()
    rng = np.random.default_rng(2)
    x = torch.tensor(random_feeds(model)["x"])
    weights = torch.tensor(rng.standard_normal((2, 3), dtype=np.float32))
    if name == "x":
        x.requires_grad_()
        outputs, tapped = TorchGraph(model).forward({"x": x})
        (gradient,) = torch.autograd.grad((outputs["y"] * weights).sum(), x)
        value = x.detach()
    else:
        outputs, tapped = TorchGraph(model).forward({"x": x}, taps=[name])
        (gradient,) = torch.autograd.grad((outputs["y"] * weights).sum(), tapped[name])
        value = tapped[name].detach()
    direction = torch.tensor(rng.standard_normal(tuple(value.shape), dtype=np.float32))
    # The cubic term leaves some 1e-3 of the slope, float32's rounding 1e-7 / 0.01 in all.
    step, ends = 0.005, []
    for sign in (1, -1):
        moved = value + sign * step * direction
        ends.append(float((answer_from(model, {"x": x, name: moved}) * weights).sum()))
    slope = (ends[0] - ends[1]) / (2 * step)
    wanted = float((gradient * direction).sum())
    assert slope == pytest.approx(wanted, rel=5e-3, abs=5e-5)


@pytest.mark.parametrize("filters", ["float[3,3,1,1] w", "float[6,1,1,1] w"], ids=["one", "two"])
def test_convs_leave_images_pixel_by_pixel_whatever_they_read(filters: str) -> None:
    group = 1 if filters.startswith("float[3") else 3
    body = f"c = Gather <axis = 1> (x, i) y = Conv <group = {group}> (c, w)"
    text = one(body, f"float[2,5,4,4] x, {filters}", constants="int64[3] i = {4, 0, 2}")
    model = parse(text)
    feeds = {name: torch.tensor(each) for name, each in random_feeds(model).items()}
    found = TorchGraph(model).forward(feeds)[0]["y"]
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert not found.is_contiguous()


def answer_from(model: onnx.ModelProto, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """`y` of a model in which inner tensors have given values."""
    cut = onnx.ModelProto()
    cut.CopyFrom(model)
    for node in [node for node in cut.graph.node if node.output[0] in values]:
        cut.graph.node.remove(node)
    del cut.graph.input[:]
    cut.graph.input.extend(onnx.ValueInfoProto(name=name) for name in values)
    with torch.no_grad():
        return TorchGraph(cut).forward(values)[0]["y"]


def test_two_names_of_one_tensor_have_gradients_of_their_own() -> None:
    model = parse(
        "g (float[2,3] x) => (float[2,3] y) { a = Relu (x) b = Identity (a) y = Add (a, b) }"
    )
    outputs, tapped = TorchGraph(model).forward({"x": torch.ones(2, 3)}, taps=["a", "b"])
    gradients = torch.autograd.grad(outputs["y"].sum(), [tapped["a"], tapped["b"]])
    assert [float(each[0, 0]) for each in gradients] == [2.0, 1.0]


def test_a_tapped_output_and_what_leaves_no_gradient() -> None:
    model = parse("g (float[2,3] x) => (float[2,3] y) { y = Relu (x) s = Shape (y) }")
    graph = TorchGraph(model, outputs=["y", "s"])
    outputs, tapped = graph.forward({"x": torch.ones(2, 3)}, taps=["y", "s"])
    assert outputs["y"].requires_grad
    assert not tapped["s"].requires_grad
    (gradient,) = torch.autograd.grad(outputs["y"].sum(), tapped["y"])
    assert gradient.tolist() == [[1.0] * 3] * 2


# ---- the graph


def test_only_what_the_outputs_need_is_run_and_has_to_be_known() -> None:
    model = parse(
        "g (float[2,3] x) => (float[2,3] y, int64[2] c) "
        "{ y = Relu (x) z = Neg (y) c = ArgMax <axis=1, keepdims=0> (z) }"
    )
    with pytest.raises(UnsupportedOperatorError, match=r"ArgMax of node 'c' .* export"):
        TorchGraph(model)
    graph = TorchGraph(model, outputs=["z"])
    outputs, _ = graph.forward({"x": torch.ones(2, 3)})
    assert list(outputs) == ["z"]
    assert outputs["z"].tolist() == [[-1.0] * 3] * 2


def test_half_and_double_become_single() -> None:
    model = parse(
        "g (float16[2] x, float16[2] w) => (float16[2] y) "
        "{ a = Mul (x, w) b = Cast <to=11> (a) c = Mul (b, b) y = Cast <to=10> (c) }"
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array([0.5, 2], np.float16), "w"))
    outputs, _ = TorchGraph(model).forward({"x": torch.tensor([2.0, 3.0]).half()})
    assert outputs["y"].dtype == torch.float32
    assert outputs["y"].tolist() == [1.0, 36.0]


def test_activations_are_let_go_and_counted() -> None:
    model = parse("g (float[2,3] x) => (float[2,3] y) { a = Relu (x) b = Neg (a) y = Exp (b) }")
    graph = TorchGraph(model)
    assert graph.activation_bytes({"x": torch.ones(2, 3)}) == 3 * 24
    released = [set(step.released) for step in graph._steps]
    assert released == [{"x"}, {"a"}, {"b"}]


def test_weights_share_memory_and_stay_as_they_are() -> None:
    model = small()
    before = model.SerializeToString()
    graph = TorchGraph(model)
    graph.forward({"x": torch.ones(2, 2, 6, 6)}, taps=["a"])
    assert model.SerializeToString() == before
    assert not any(value.requires_grad for value in graph._constants.values())


def test_images_lie_channels_last_behind_a_convolution() -> None:
    """So that training and gradients take torch's faster kernels."""
    graph = TorchGraph(small())
    _, tapped = graph.forward({"x": torch.ones(2, 2, 6, 6)}, taps=["a"])
    assert tapped["a"].is_contiguous(memory_format=torch.channels_last)


REFUSED = {
    "a training batch normalisation": (
        15,
        one(
            "y, m2, v2 = BatchNormalization <training_mode=1> (x, s, s, s, s)",
            f"{X4}, float[3] s",
        ),
        "BatchNormalization node 'y' has training_mode = 1",
    ),
    "the indices of a pool": (
        12,
        one("y, i = MaxPool <kernel_shape=[2,2]> (x)", output=f"{Y4}, int64[n,c,h,w] i"),
        "MaxPool node 'y' writes the further output 'i'",
    ),
    "a cubic resize": (
        13,
        one('y = Resize <mode="cubic"> (x, "", s)', constants="float[4] s = {1,1,2,2}"),
        "Resize node 'y' has mode = cubic",
    ),
    "a wrapping pad": (
        19,
        one('y = Pad <mode="wrap"> (x, p)', constants="int64[8] p = {0,0,1,1,0,0,1,1}"),
        "Pad node 'y' has mode = wrap",
    ),
    "another domain": (17, one("y = other.Relu (x)"), "operator other.Relu of node 'y'"),
    "an old opset": (6, one("y = Relu (x)"), "opset 6, below 7"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_at_once(case: str) -> None:
    opset, graph, said = REFUSED[case]
    imports = ', "other": 1' if "other." in graph else ""
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}{imports}]> {graph}'
    )
    with pytest.raises(UnsupportedOperatorError, match=said) as caught:
        TorchGraph(model)
    assert "export" in str(caught.value)


REFUSED_IN_A_RUN = {
    "training dropout": (
        13,
        one("y = Dropout (x, r, t)", constants="float r = {0.5}, bool t = {1}"),
        "Dropout node 'y' is in training mode",
    ),
    "smaller by an old rule": (
        10,
        one("y = Resize (x, s)", constants="float[4] s = {1,1,0.5,1}"),
        "Resize node 'y' makes its input smaller",
    ),
    "a long reflection": (
        13,
        one('y = Pad <mode="reflect"> (x, p)', constants="int64[8] p = {0,0,7,0,0,0,0,0}"),
        "reflects more than the 7 values",
    ),
    "an average with dilations": (
        19,
        one("y = AveragePool <kernel_shape=[2,2], dilations=[2,2]> (x)"),
        "AveragePool node 'y' has dilations",
    ),
    "too many axes": (
        17,
        one(
            "y = Conv (x, w)",
            "float[1,1,2,2,2,2] x, float[1,1,1,1,1,1] w",
            "float[1,1,2,2,2,2] y",
        ),
        "Conv node 'y' has 4 spatial axes",
    ),
}


@pytest.mark.parametrize("case", REFUSED_IN_A_RUN)
def test_what_only_a_run_can_tell_is_refused_there(case: str) -> None:
    opset, graph, said = REFUSED_IN_A_RUN[case]
    model = parse(graph, opset)
    with pytest.raises(UnsupportedOperatorError, match=said):
        computed(model, random_feeds(model))


def test_wrong_feeds_and_names() -> None:
    graph = TorchGraph(small())
    with pytest.raises(CalibrationError, match="input 'x' is not fed"):
        graph.forward({})
    with pytest.raises(ModelError, match="Conv node 'a' does not run in torch"):
        graph.forward({"x": torch.ones(2, 5, 6, 6)})
    with pytest.raises(ValueError, match="no node writes the tensor 'nothing'"):
        graph.forward({"x": torch.ones(2, 2, 6, 6)}, taps=["nothing"])
    with pytest.raises(ValueError, match="has no tensor 'nothing'"):
        TorchGraph(small(), outputs=["nothing"])


def test_weights_that_are_elsewhere_or_sparse() -> None:
    model = small()
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="/etc/passwd")
    with pytest.raises(ModelError, match="'w' is in a file that was not loaded"):
        TorchGraph(model)
    sparse = small()
    stored = sparse.graph.initializer.pop(0)
    values = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [1], [1.0])
    places = onnx.helper.make_tensor("places", onnx.TensorProto.INT64, [1], [0])
    sparse.graph.sparse_initializer.append(
        onnx.helper.make_sparse_tensor(values, places, list(stored.dims))
    )
    with pytest.raises(UnsupportedOperatorError, match="sparse weight 'w'"):
        TorchGraph(sparse)


def test_torch_is_not_loaded_with_the_module() -> None:
    code = (
        "import sys, converter.differentiable, converter.sensitivity; "
        "sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0

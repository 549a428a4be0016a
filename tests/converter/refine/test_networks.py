"""ONNX to torch and back: equal to onnxruntime, with the gradients of the weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from onnx import numpy_helper

from converter.config import Runtime
from converter.differentiable import TorchGraph, UnsupportedOperatorError
from converter.errors import ModelError
from converter.model_file import load_model
from converter.preparation import normalised
from converter.refine.networks import Networks, output_channels, trainable_weights
from converter.runtime import model_inputs
from passes.exchange import export_model

LIGHT = sorted((Path(onnx.__file__).parent / "backend/test/data/light").glob("light_*.onnx"))
RUNTIME = Runtime(threads=1)
TEXT = """<ir_version: 8, opset_import: ["": 17]>
    small (float[n, 3, 8, 8] x) => (float[n, 5] y)
    <float[6, 3, 3, 3] a, float[6] b, float[5, 6] c, float[5] d, float[1] scale> {
        h = Conv <pads = [1, 1, 1, 1]> (x, a, b)
        r = Relu (h)
        p = GlobalAveragePool (r)
        f = Flatten (p)
        g = Gemm <transB = 1> (f, c, d)
        y = Mul (g, scale)
    }"""


def small(seed: int = 0) -> onnx.ModelProto:
    model = onnx.parser.parse_model(TEXT)
    random = np.random.default_rng(seed)
    shapes = {"a": (6, 3, 3, 3), "b": (6,), "c": (5, 6), "d": (5,), "scale": (1,)}
    del model.graph.initializer[:]
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


def images(count: int = 4) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))}


def test_what_is_trained_are_the_weights_of_linear_layers() -> None:
    assert trainable_weights(small()) == ["a", "b", "c", "d"]


def test_channels_lie_where_each_operator_has_them() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        mixed (float[n, 4] x) => (float[n, 3] y)
        <float[6, 4] a, float[6, 5] b, float[5, 3] c, float[3] d, float[4, 4] e> {
            f = MatMul (x, e)
            h = MatMul (f, e)
            o = Gemm <transB = 1> (h, e)
            i = Gemm <transB = 1> (o, a)
            j = Gemm (i, b)
            k = MatMul (j, c)
            y = Add (k, d)
        }"""
    )
    del model.graph.initializer[:]
    for name, shape in {"a": (6, 4), "b": (6, 5), "c": (5, 3), "d": (3,), "e": (4, 4)}.items():
        values = np.ones(shape, np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    assert output_channels(model) == {"a": 0, "b": 1, "c": 1}  # `e` is read in two ways


def test_factors_of_channels_start_as_they_are_and_have_their_gradients() -> None:
    networks = Networks(small(), small(1), scales=True)
    shapes = {name: tuple(each.shape) for name, each in networks.parameters.items()}
    assert shapes == {"a": (6, 1, 1, 1), "b": (6,), "c": (5, 1), "d": (5,)}
    plain = Networks(small(), small(1))
    for each in (networks, plain):
        each.converted(images())["y"].square().sum().backward()
    gradients = {name: value.grad for name, value in networks.parameters.items()}
    for name, value in plain.parameters.items():
        assert value.grad is not None
        dims = tuple(range(1, value.ndim))
        expected = (value.grad * value).sum(dims) if dims else value.grad
        torch.testing.assert_close(
            gradients[name].view(-1), expected.detach(), rtol=1e-4, atol=1e-4
        )
    doubled = networks.written({"c": np.full((5, 1), 2.0, np.float32)})
    written = {each.name: numpy_helper.to_array(each) for each in doubled.graph.initializer}
    given = {each.name: numpy_helper.to_array(each) for each in small(1).graph.initializer}
    np.testing.assert_array_equal(written["c"], 2 * given["c"])
    np.testing.assert_array_equal(written["a"], given["a"])


def test_a_bias_of_one_row_is_trained_beside_the_factors() -> None:
    model = small(1)
    for tensor in model.graph.initializer:
        if tensor.name == "d":
            tensor.dims[:] = [1, 5]
    networks = Networks(small(), model, scales=True)
    shapes = {name: tuple(each.shape) for name, each in networks.parameters.items()}
    assert shapes == {"a": (6, 1, 1, 1), "b": (6,), "c": (5, 1), "d": (1, 5)}


def test_gradients_are_those_of_finite_differences() -> None:
    networks = Networks(small(), small(1))
    networks.converted(images())["y"].square().sum().backward()
    for name in ("a", "c", "d"):
        value = networks.parameters[name]
        weight = value.detach()
        assert value.grad is not None
        for number in (0, weight.numel() // 2, weight.numel() - 1):
            place = np.unravel_index(number, weight.shape)
            sums = []
            for step in (1e-2, -2e-2):
                weight[place] += step
                with torch.no_grad():
                    sums.append(float(networks.converted(images())["y"].double().square().sum()))
            weight[place] += 1e-2
            expected = (sums[0] - sums[1]) / 2e-2
            assert float(value.grad[place]) == pytest.approx(expected, rel=2e-2, abs=1e-2)


def test_weights_go_back_where_they_were_and_nothing_else_changes() -> None:
    model = small(1)
    networks = Networks(small(), model)
    changed = {"c": np.full((5, 6), 2.0, np.float32)}
    written = networks.written(changed)
    after = {each.name: numpy_helper.to_array(each) for each in written.graph.initializer}
    before = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    np.testing.assert_array_equal(after["c"], changed["c"])
    for name in before.keys() - {"c"}:
        np.testing.assert_array_equal(after[name], before[name])
    assert written.graph.node == model.graph.node
    np.testing.assert_array_equal(before["c"], numpy_helper.to_array(small(1).graph.initializer[2]))


def test_inner_responses_of_equal_names_and_shapes_are_compared() -> None:
    networks = Networks(small(), small(1))
    networks.check(images(), RUNTIME)
    assert networks.inner == ("r",)
    assert networks.original(images())["r"].shape == (4, 6, 8, 8)
    assert not networks.original(images())["r"].requires_grad
    assert networks.converted(images())["r"].requires_grad


def test_mirrored_scores_are_the_mean_of_both_and_inner_responses_of_one() -> None:
    plain, both = Networks(small(), small(1)), Networks(small(), small(1), mirrored=True)
    assert both.of_scales().mirrored
    turned = {"x": images()["x"].flip(3)}
    wanted = (plain.original(images())["y"] + plain.original(turned)["y"]) / 2
    torch.testing.assert_close(both.original(images())["y"], wanted)
    torch.testing.assert_close(both.original(turned)["y"], wanted)
    assert torch.equal(both.original(images())["r"], plain.original(images())["r"])
    assert torch.equal(both.converted(images())["y"], plain.converted(images())["y"])
    both.check(images(), RUNTIME)  # each of the two networks is still compared with onnxruntime


def test_an_operator_that_is_missing_is_named() -> None:
    model = small()
    model.graph.node[1].op_type = "Softsign"
    model.graph.node[1].domain = "elsewhere"
    with pytest.raises(UnsupportedOperatorError, match=r"elsewhere\.Softsign"):
        Networks(model, small())


def test_two_models_that_do_not_belong_together() -> None:
    other = small()
    other.graph.output[0].name = "z"
    other.graph.node[-1].output[0] = "z"
    with pytest.raises(ModelError, match="only one of the two models has the output"):
        Networks(small(), other)


def test_what_leads_to_classes_alone_is_not_trained() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        two (float[n, 3, 4, 4] x) => (float[n, 2, 4, 4] y, int64[n, 1, 4, 4] mask)
        <float[2, 3, 1, 1] a = {0,1,2,3,4,5}, float[2, 3, 1, 1] b = {0,1,2,3,4,5}> {
            y = Conv (x, a)
            k = Conv (x, b)
            mask = ArgMax <axis = 1> (k)
        }"""
    )
    for scales in (False, True):
        networks = Networks(model, model, scales=scales)
        assert list(networks.parameters) == ["a"]
        assert networks.outputs == ("y",)


def test_outputs_without_a_row_for_each_image_are_left_out() -> None:
    text = TEXT.replace("(float[n, 5] y)", "(float[n, 5] y, float total)").replace(
        "y = Mul (g, scale)", "y = Mul (g, scale)\n total = ReduceMean <keepdims = 0> (g)"
    )
    model = small()
    model.graph.CopyFrom(onnx.parser.parse_model(text).graph)
    del model.graph.initializer[:]
    model.graph.initializer.extend(small().graph.initializer)
    networks = Networks(model, model)
    networks.check(images(), RUNTIME)
    assert (networks.outputs, networks.left_out) == (("y",), ("total",))
    assert networks.of_scales().outputs == ("y",)
    del model.graph.output[0]
    with pytest.raises(ModelError, match="'total' has not one row for each image"):
        Networks(model, model).check(images(), RUNTIME)


def test_an_input_of_another_precision_is_fed_as_it_is_declared() -> None:
    model = small()
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    cast = onnx.helper.make_node("Cast", ["x"], ["x32"], to=onnx.TensorProto.FLOAT)
    model.graph.node[0].input[0] = "x32"
    model.graph.node.insert(0, cast)
    Networks(model, model).check(images(), RUNTIME)  # else onnxruntime does not take it


def test_no_weight_to_train() -> None:
    with pytest.raises(ValueError, match="'q' is no weight"):
        TorchGraph(small(), trained=["q"])


def round_trip(path: Path) -> None:
    """Through torch and back the weights are the same bits, and torch computes what onnxruntime does.

    Also where they were changed in torch: what is written back answers, under onnxruntime, as torch does.
    """
    source = load_model(path)
    model = export_model(normalised(source, path)[0], source)
    networks = Networks(source, model)
    (given,) = model_inputs(model)
    shape = [side if isinstance(side, int) else 2 for side in given.shape]
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    feeds = {given.name: torch.from_numpy(values)}
    networks.check(feeds, RUNTIME)
    kept = {name: value.detach().numpy() for name, value in networks.parameters.items()}
    back = networks.written(kept)
    first, second = (
        {each.name: numpy_helper.to_array(each) for each in each_model.graph.initializer}
        for each_model in (model, back)
    )
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])

    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in networks.parameters.values():
            value.mul_(1 + 0.1 * torch.rand(value.shape, generator=random))
        changed = networks.converted(feeds)
    trained = networks.written(
        {name: each.detach().numpy() for name, each in networks.parameters.items()}
    )
    answers = networks.under_onnxruntime(1, trained, RUNTIME)({given.name: values})
    before = networks.original(feeds)
    for name, answer in answers.items():
        wanted = changed[name].numpy()
        reach = float(np.ptp(wanted)) or float(np.abs(wanted).max())
        np.testing.assert_allclose(answer, wanted, atol=1e-3 * reach, rtol=0)
        if reach and np.ptp(wanted):
            assert float(np.abs(wanted - before[name].numpy()).max()) > 2e-3 * reach


@pytest.mark.parametrize(
    "name", ["resnet20_cifar10", "alexnet_cifar10", "googlenet_cifar10", "vgg16_cifar10"]
)
def test_reference_models_go_through_torch_and_back(shared: Path, name: str) -> None:
    round_trip(shared / "models" / f"{name}.onnx")


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: path.stem)
def test_light_networks_go_through_torch_and_back(path: Path) -> None:
    round_trip(path)

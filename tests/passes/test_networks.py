"""Whole networks: with S + L = W in every layer they compute what the original does.

This separates mistakes in the surgery from errors of an approximation.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from passes.base import run_passes
from passes.exchange import export_model, import_graph
from passes.expose import expose
from passes.fold_batchnorm import FoldBatchNorm
from passes.layers import Layer, find_layers
from passes.normalise import normalising
from passes.split import Branches, Factor
from tools.exact import in_rotation, split_all

Run = Callable[..., dict[str, np.ndarray]]

# How many layers of each can be converted.
TRAINED = {"alexnet": 7, "googlenet": 58, "resnet20": 20, "vgg16": 14}
LIGHT = {
    "bvlc_alexnet": 5,
    "densenet121": 121,
    "inception_v1": 58,
    "inception_v2": 70,
    "resnet50": 54,
    "shufflenet": 2,
    "squeezenet": 26,
    "vgg19": 19,
    "zfnet512": 8,
}


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    """Float32 round-off through all layers: at most 1e-4 of the output's range."""
    assert found.shape == wanted.shape
    scale = max(float(np.ptp(wanted)), float(np.abs(wanted).max()))
    assert scale > 0
    assert np.abs(found - wanted).max() <= 1e-4 * scale


@pytest.mark.parametrize(("way", "start"), [("low rank", 0), ("parts", 1)])
@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_network_is_replaced_exactly(
    run: Run, shared: Path, name: str, way: str, start: int
) -> None:
    model = onnx.load(shared / "models" / f"{name}_cifar10.onnx")
    changed, layers = split_all(model, in_rotation(way, start))
    assert len(layers) == TRAINED[name]
    onnx.checker.check_model(changed, full_check=True)
    assert changed.graph.input == model.graph.input
    assert changed.graph.output == model.graph.output
    rng = np.random.default_rng(0)
    feeds = {"input": rng.normal(size=(2, 3, 32, 32)).astype(np.float32)}
    # Some responses too: an error in the middle may hide behind what follows.
    seen = [layer.response for layer in layers[:: max(1, len(layers) // 4)]]
    wanted = run(expose(model, seen), feeds)
    found = run(expose(changed, seen), feeds)
    assert list(found) == list(wanted) == list(dict.fromkeys(["logits", *seen]))
    for tensor, value in wanted.items():
        assert_close(found[tensor], value)


def rank_one_branches(layer: Layer) -> Branches:
    """Branches of a weight whose rows are constant, as in the light networks; no SVD needed."""
    assert layer.weight is not None
    weight = np.asarray(layer.weight, np.float32)
    outputs, channels = weight.shape[:2]
    rows = weight.reshape(outputs, -1)
    level = rows[:, :1]  # (N, 1)
    assert (rows == level).all()
    support = np.arange(0, channels, max(4, channels // 16))  # few: these are large networks
    down = np.ones((1, *weight.shape[1:]), np.float32)
    down[:, support] = 0
    axes = len(weight.shape[2:])
    factors = (
        Factor(down, tuple(range(axes))),
        Factor(level.reshape(*level.shape, *[1] * axes)),
    )
    return Branches(support, weight[:, support], factors, layer.bias)


def source_of(model: onnx.ModelProto) -> str:
    """Name of the one input that is no weight."""
    constants = {tensor.name for tensor in model.graph.initializer}
    (source,) = (value.name for value in model.graph.input if value.name not in constants)
    return source


def image() -> NDArray[np.float32]:
    return np.random.default_rng(0).uniform(size=(1, 3, 224, 224)).astype(np.float32)


@pytest.mark.parametrize("name", LIGHT)
def test_a_light_network_is_replaced_exactly_as_it_comes(
    run: Run, light_models: dict[str, Path], name: str
) -> None:
    model = onnx.load(light_models[name])
    changed, layers = split_all(model, rank_one_branches)
    assert len(layers) == LIGHT[name]
    onnx.checker.check_model(changed)
    assert changed.graph.output == model.graph.output
    feeds = {source_of(model): image()}
    seen = [layers[0].response, layers[-1].response]
    wanted = run(expose(model, seen), feeds)
    found = run(expose(changed, seen), feeds)
    for tensor, value in wanted.items():
        assert_close(found[tensor], value)


NARROW = 64
"""Width of the classifiers that have 4096: with it their exact factors take no time."""


def normalised(model: onnx.ModelProto) -> onnx.ModelProto:
    """Make the constants initializers, so that they can be set."""
    graph = import_graph(model)
    run_passes(graph, normalising())
    return export_model(graph, model)


def random_constant(
    op: str, operand: int, shape: tuple[int, ...], seed: int
) -> NDArray[np.float32]:
    """Values that keep the signal's size: He for weights, around 1 for scales and variances."""
    rng = np.random.default_rng(seed)
    if op in ("Conv", "Gemm") and operand == 1:
        spread = np.float32(np.sqrt(2 / np.prod(shape[1:])))
        return rng.standard_normal(size=shape, dtype=np.float32) * spread
    if op == "Mul" or (op == "BatchNormalization" and operand in (1, 4)):
        return rng.uniform(0.5, 1.5, size=shape).astype(np.float32)
    return rng.normal(scale=0.1, size=shape).astype(np.float32)


def randomise(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give a normalised model random weights, in place, and narrow classifiers."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    declared = {value.name: value for value in model.graph.input}
    done = set()
    for node in model.graph.node:
        for operand, name in enumerate(node.input):
            tensor = constants.get(name)
            if tensor is None or tensor.data_type != onnx.TensorProto.FLOAT or name in done:
                continue
            done.add(name)
            shape = tuple(tensor.dims)
            if node.op_type == "Gemm":
                shape = tuple(NARROW if size == 4096 else size for size in shape)
            values = random_constant(node.op_type, operand, shape, seed=len(done))
            tensor.CopyFrom(numpy_helper.from_array(values, name))
            if name in declared:
                declared[name].CopyFrom(
                    onnx.helper.make_tensor_value_info(name, tensor.data_type, shape)
                )
    del model.graph.value_info[:]
    return model


def scale_answers(model: onnx.ModelProto, layer: Layer, spread: float) -> None:
    """Divide the last layer by the spread of its responses: a softmax is then not saturated."""
    node = next(each for each in model.graph.node if layer.output in each.output)
    for tensor in model.graph.initializer:
        if tensor.name in node.input[1:]:
            values = numpy_helper.to_array(tensor) / np.float32(spread)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


@pytest.mark.parametrize("name", LIGHT)
def test_a_light_network_of_random_weights_is_replaced_exactly(
    run: Run, light_models: dict[str, Path], name: str
) -> None:
    model = randomise(normalised(onnx.load(light_models[name])))
    graph = import_graph(model)
    run_passes(graph, (*normalising(), FoldBatchNorm()))
    layers = [layer for layer in find_layers(graph) if layer.reason is None]
    last = layers[-1]
    feeds = {source_of(model): image()}
    scale_answers(
        model, last, float(run(expose(model, [last.response]), feeds)[last.response].std())
    )
    onnx.checker.check_model(model)
    seen = [layer.response for layer in layers[:: max(1, len(layers) // 3)]] + [last.response]
    wanted = run(expose(model, seen), feeds)
    for value in wanted.values():
        assert value.std() > 0.02 * np.abs(value).max()  # a constant would hide errors
    for way in ("low rank", "sparse"):
        changed, converted = split_all(model, in_rotation(way))
        assert len(converted) == LIGHT[name]
        onnx.checker.check_model(changed)
        found = run(expose(changed, seen), feeds)
        assert list(found) == list(wanted)
        for tensor, value in wanted.items():
            assert_close(found[tensor], value)

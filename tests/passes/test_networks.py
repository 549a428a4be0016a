"""Whole networks: with S + L = W in every layer they compute what the original does.

This separates mistakes in the surgery from errors of an approximation.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from passes.base import run_passes
from passes.exchange import export_model, import_graph
from passes.expose import expose
from passes.fold_batchnorm import FoldBatchNorm
from passes.layers import Layer, find_layers
from passes.normalise import normalising
from passes.split import Branches, Split

Run = Callable[..., dict[str, np.ndarray]]
Exact = Callable[..., Branches]

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


def split_all(
    model: onnx.ModelProto, make: Callable[[Layer], Branches]
) -> tuple[onnx.ModelProto, list[Layer]]:
    """Convert every layer that can be; return also which ones."""
    graph = import_graph(model)
    run_passes(graph, (*normalising(), FoldBatchNorm()))
    layers = [layer for layer in find_layers(graph) if layer.reason is None]
    for layer in layers:
        Split(layer, make(layer))(graph)
    return export_model(graph, model), layers


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    """Float32 round-off through all layers: at most 1e-4 of the output's range."""
    assert found.shape == wanted.shape
    scale = max(float(np.ptp(wanted)), float(np.abs(wanted).max()))
    assert scale > 0
    assert np.abs(found - wanted).max() <= 1e-4 * scale


@pytest.mark.parametrize("way", ["low rank", "parts"])
@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_network_is_replaced_exactly(
    run: Run, exact: Exact, shared: Path, name: str, way: str
) -> None:
    model = onnx.load(shared / "models" / f"{name}_cifar10.onnx")
    changed, layers = split_all(model, lambda layer: exact(layer, way))
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
    return Branches(support, weight[:, support], down, level, layer.bias)


@pytest.mark.parametrize("name", LIGHT)
def test_a_light_network_is_replaced_exactly(
    run: Run, light_models: dict[str, Path], name: str
) -> None:
    model = onnx.load(light_models[name])
    changed, layers = split_all(model, rank_one_branches)
    assert len(layers) == LIGHT[name]
    onnx.checker.check_model(changed)
    assert changed.graph.output == model.graph.output
    constants = {tensor.name for tensor in model.graph.initializer}
    source = next(value.name for value in model.graph.input if value.name not in constants)
    rng = np.random.default_rng(0)
    feeds = {source: rng.uniform(size=(1, 3, 224, 224)).astype(np.float32)}
    seen = [layers[0].response, layers[-1].response]
    wanted = run(expose(model, seen), feeds)
    found = run(expose(changed, seen), feeds)
    for tensor, value in wanted.items():
        assert_close(found[tensor], value)

"""Small networks, and what onnxruntime says that their layers read and answer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper

from converter.calibration.gather import Inputs, Sample
from converter.calibration.sets import Batch
from converter.config import Runtime
from passes.exchange import export_model, import_graph
from passes.expose import expose
from passes.layers import Layer, find_layers
from passes.split import Branches, Factor, Split

ONE_THREAD = Runtime(threads=1)

# Optimised and plain graphs, and the sums of numpy and onnxruntime, differ by float32 round-off:
# some units in the last place of the largest number for the few hundred products of a patch.
CLOSE = 2e-5


class Stacks:
    """A calibration set of arrays in memory."""

    class_names = None

    def __init__(self, announced: int | None = None, **stacks: NDArray[Any]) -> None:
        self.stacks = stacks
        self.count = len(next(iter(stacks.values())))
        self.announced = self.count if announced is None else announced
        self.passes = 0

    def __len__(self) -> int:
        return self.announced

    def batches(self, size: int) -> Iterator[Batch]:
        self.passes += 1
        for start in range(0, self.count, size):
            feeds = {name: stack[start : start + size] for name, stack in self.stacks.items()}
            yield Batch(feeds, None, len(next(iter(feeds.values()))))

    def describe(self) -> str:
        return "arrays of a test"

    def digest(self) -> str:
        return "0"


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def parsed(text: str, weights: Mapping[str, NDArray[Any]], opset: int = 17) -> onnx.ModelProto:
    """Model from the text of its graph and its weights, with shapes inferred."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]>\n{text}')
    model.graph.initializer.extend(
        numpy_helper.from_array(weight, name) for name, weight in weights.items()
    )
    onnx.checker.check_model(model)
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def layers_of(model: onnx.ModelProto) -> dict[str, Layer]:
    """Layers that can be converted, by the tensor they write."""
    found = find_layers(import_graph(model))
    return {layer.output: layer for layer in found if layer.reason is None}


def tensors_of(
    model: onnx.ModelProto, feeds: Mapping[str, NDArray[Any]], names: Sequence[str]
) -> dict[str, NDArray[Any]]:
    """Tensors of a model run plainly: one batch, without the optimiser."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    inner = [name for name in names if name not in feeds]
    session = ort.InferenceSession(
        expose(model, inner).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found = dict(zip(inner, session.run(inner, dict(feeds)), strict=True))
    return {name: found[name] if name in found else feeds[name] for name in names}


def with_weight(model: onnx.ModelProto, name: str, weight: NDArray[Any]) -> onnx.ModelProto:
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for tensor in changed.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(weight, name))
    return changed


def at_positions(op: str, tensor: NDArray[Any], sample: Sample) -> NDArray[Any]:
    """Channels of a whole tensor at the positions of a sample, image by image."""
    images = len(sample.positions)
    last = np.moveaxis(tensor, 1, -1) if op == "Conv" else tensor
    by_image = last.reshape(images, -1, last.shape[-1])
    return np.concatenate(
        [rows[places] for rows, places in zip(by_image, sample.positions, strict=True)]
    )


def answers(layer: Layer, inputs: Inputs) -> NDArray[np.float32]:
    """What the layer makes of the recorded patches, the shortcut included."""
    assert layer.weight is not None
    response = inputs.features @ layer.weight.reshape(len(layer.weight), -1).T
    if layer.bias is not None:
        response = response + layer.bias
    return response if inputs.offset is None else response + inputs.offset


def assert_close(found: NDArray[Any], wanted: NDArray[Any]) -> None:
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= CLOSE * np.abs(wanted).max()


def half(layer: Layer, seed: int = 0) -> Branches:
    """Branches that are far from the layer's weight: a rank of 2."""
    assert layer.weight is not None
    outputs, *patch = layer.weight.shape
    axes = len(patch) - 1
    factors = (
        Factor(0.3 * normal(2, *patch, seed=seed), tuple(range(axes))),
        Factor(0.3 * normal(outputs, 2, *[1] * axes, seed=seed + 1)),
    )
    return Branches(factors=factors, bias=layer.bias)


def split(model: onnx.ModelProto, layer: Layer, seed: int = 0) -> onnx.ModelProto:
    graph = import_graph(model)
    Split(layer, half(layer, seed))(graph)
    return export_model(graph, model)


# Patches -------------------------------------------------------------------------------------


def residual(*, shortcut_first: bool = False, offset: float = 0.0) -> onnx.ModelProto:
    """conv1 → Relu → (conv2 + 1×1 convs) → Relu; the shortcut behind or before conv2 in order."""
    own = "[conv2] y2 = Conv<pads = [1, 1, 1, 1]>(a, w2, b2)"
    other = "[convs] ys = Conv(a, ws)"
    order = [other, own] if shortcut_first else [own, other]
    text = f"""
        g (float[n, 3, 8, 8] x) => (float[n, 6, 8, 8] out) {{
            [conv1] y1 = Conv<pads = [1, 1, 1, 1]>(x, w1)
            a = Relu(y1)
            {order[0]}
            {order[1]}
            s = Add(y2, ys)
            out = Relu(s)
        }}
    """
    return parsed(
        text,
        {
            "w1": normal(4, 3, 3, 3, seed=1),
            "w2": normal(6, 4, 3, 3, seed=2),
            "b2": normal(6, seed=3) + np.float32(offset),
            "ws": normal(6, 4, 1, 1, seed=4),
        },
    )


def chain(depth: int, channels: int = 2, side: str = "h, w") -> onnx.ModelProto:
    """Conv → Relu, `depth` times."""
    lines = []
    tensor = "x"
    for index in range(depth):
        lines.append(
            f"[conv{index}] y{index} = Conv<pads = [1, 1, 1, 1]>({tensor}, w{index})\n"
            f"a{index} = Relu(y{index})"
        )
        tensor = f"a{index}"
    text = (
        f"g (float[n, {channels}, {side}] x) => (float[n, {channels}, {side}] {tensor})"
        f" {{ {' '.join(lines)} }}"
    )
    # Scaled so that activations neither grow nor fade.
    scale = np.float32(math.sqrt(2 / (9 * channels)))
    weights = {f"w{i}": scale * normal(channels, channels, 3, 3, seed=i) for i in range(depth)}
    return parsed(text, weights)

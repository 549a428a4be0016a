"""A converted network as a dense one: each replaced layer has the weight that its branches compute with.

What replaces a layer is linear in the layer's input, whatever the form. So its weight is what it answers to
patches with a single one, without borders and strides, less what it answers to zeros, which is its bias.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx
from numpy.typing import NDArray

from converter.config import Runtime
from converter.runtime import open_session, run
from passes.base import run_passes
from passes.densify import Densify
from passes.exchange import export_model
from passes.expose import extract
from passes.layers import Layer, find_layers
from passes.normalise import import_with_shapes

__all__ = ["dense"]

_BORDERS = ("pads", "auto_pad", "strides")
_PATCH_BYTES = 64 << 20
"""Patches that are answered at once take so much at most."""


def dense(
    original: onnx.ModelProto, converted: onnx.ModelProto, runtime: Runtime
) -> onnx.ModelProto:
    """Return the original's graph with the weights that a converted model computes with.

    Parameters
    ----------
    original : onnx.ModelProto
        Normalised, as its layers were found and replaced in.
    converted : onnx.ModelProto
        The same with some layers replaced, whose responses are still there; its weights may have been
        trained since.
    runtime : Runtime

    Returns
    -------
    onnx.ModelProto
        It answers as `converted` does, to round-off, at the cost of the original.
    """
    weights = {tensor.name: tensor for tensor in converted.graph.initializer}
    model = onnx.ModelProto()
    model.CopyFrom(original)
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(weights[tensor.name])
    graph = import_with_shapes(model)
    nodes = {node.output[0]: node for node in original.graph.node if node.output}
    kept = {_plain(node) for node in converted.graph.node}
    for layer in find_layers(graph):
        if layer.reason is None and _plain(nodes[layer.output]) not in kept:
            run_passes(graph, [Densify(layer, *_read_off(layer, converted, runtime))])
    return export_model(graph, model)


def _plain(node: onnx.NodeProto) -> tuple[str, ...]:
    return (node.op_type, *node.input[:2], *node.output)


def _read_off(
    layer: Layer, converted: onnx.ModelProto, runtime: Runtime
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Read weight and bias off the answers to single ones and to zeros."""
    assert layer.weight is not None, "a layer that was replaced has a weight"
    shape = layer.weight.shape
    session = open_session(_borderless(layer, converted), runtime, label=layer.name)

    def answers(patches: NDArray[np.float32]) -> NDArray[np.float32]:
        found = run(session, [layer.response], {layer.input: patches}, label=layer.name)[0]
        return found.reshape(len(patches), shape[0])

    bias = answers(np.zeros((1, *_extent(layer)), np.float32))[0]
    rows = [answers(patches) - bias for patches in _single_ones(layer)]
    return np.concatenate(rows).T.reshape(shape), bias


def _borderless(layer: Layer, converted: onnx.ModelProto) -> onnx.ModelProto:
    """Cut out what replaces a layer, without the borders and strides of its Convs."""
    part = extract(converted, [layer.input], [layer.response])
    for value in (*part.graph.input, *part.graph.output):
        value.type.tensor_type.ClearField("shape")
    del part.graph.value_info[:]
    for node in part.graph.node:
        others = [each for each in node.attribute if each.name not in _BORDERS]
        del node.attribute[:]
        node.attribute.extend(others)
    return part


def _extent(layer: Layer) -> tuple[int, ...]:
    """Shape of the input that one answer of a Conv looks at."""
    assert layer.weight is not None, "a layer that was replaced has a weight"
    channels, *kernel = layer.weight.shape[1:]
    sizes = (
        (size - 1) * step + 1
        for size, step in zip(kernel, layer.dilations or [1] * len(kernel), strict=True)
    )
    return (channels, *sizes)


def _single_ones(layer: Layer) -> Iterator[NDArray[np.float32]]:
    """Yield all patches with a single one, in the order of the weight's entries, some at a time."""
    assert layer.weight is not None, "a layer that was replaced has a weight"
    entries = layer.weight.shape[1:]
    extent = _extent(layer)
    count, size = math.prod(entries), math.prod(extent)
    together = max(1, _PATCH_BYTES // (4 * size))
    places = np.indices(entries).reshape(len(entries), count)
    for axis, step in enumerate(layer.dilations, start=1):
        places[axis] *= step
    for start in range(0, count, together):
        some = places[:, start : start + together]
        patches = np.zeros((some.shape[1], *extent), np.float32)
        at = (np.arange(some.shape[1]), *some)
        patches[at] = 1
        yield patches

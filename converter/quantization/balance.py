"""Balanced factors: the channels between two layers get such scales that few levels are wasted.

Between the factors of a layer nothing but channels passes, so channel i may be multiplied by s_i in the first
factor and divided by it in the second: y = B·diag(1/s)·diag(s)·A·x. In float32 that changes nothing. In
integers a tensor has one scale for all its channels, and a factorisation leaves the first ones many times
larger than the last. With s_i = √(b_i / a_i), where a_i is the largest response of channel i on the
calibration images and b_i the largest weight that reads it, both become √(a_i·b_i): what a channel brings to
the sum decides how many levels it gets on either side (Nagel et al., arXiv:1906.04721, §4.1, there with the
weights of both layers).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

__all__ = ["Pair", "balanced", "find_pairs", "largest_by_channel"]


@dataclass(frozen=True)
class Pair:
    """Two layers with nothing between them.

    Attributes
    ----------
    first, second : str
        Names of the nodes.
    response : str
        Tensor that the one writes and the other reads.
    """

    first: str
    second: str
    response: str


def find_pairs(model: onnx.ModelProto) -> list[Pair]:
    """List the pairs of Convs, and of Gemms, that can be balanced.

    Each has weights of its own, and nothing else sees what passes between them.
    """
    graph = model.graph
    stored = {tensor.name for tensor in graph.initializer}
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(output.name for output in graph.output)

    def has_own_weights(node: onnx.NodeProto) -> bool:
        return all(name in stored and readers[name] == 1 for name in node.input[1:] if name)

    layers = [
        node for node in graph.node if node.op_type in ("Conv", "Gemm") and has_own_weights(node)
    ]
    by_output = {node.output[0]: node for node in layers if readers[node.output[0]] == 1}
    pairs = []
    for second in layers:
        first = by_output.get(second.input[0])
        if first is not None and first.op_type == second.op_type and _plain(second):
            pairs.append(Pair(first.name, second.name, second.input[0]))
    return pairs


def _plain(node: onnx.NodeProto) -> bool:
    """Whether each input channel of the layer is one slice of its weight."""
    return _number(node, "group", 1) == 1 and _number(node, "transA", 0) == 0


def _number(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(each.i) for each in node.attribute if each.name == name), default)


def largest_by_channel(
    batches: Iterable[Mapping[str, NDArray[np.float32]]],
) -> dict[str, NDArray[np.float32]]:
    """Largest absolute value of each channel, shape (channels,), over batches of responses by name."""
    found: dict[str, NDArray[np.float32]] = {}
    for values in batches:
        for name, array in values.items():
            axes = tuple(axis for axis in range(array.ndim) if axis != 1)
            largest = np.abs(array).max(axes)
            found[name] = np.maximum(found[name], largest) if name in found else largest
    return found


def balanced(
    model: onnx.ModelProto, pairs: Iterable[Pair], largest: Mapping[str, NDArray[np.float32]]
) -> onnx.ModelProto:
    """Scale the channels between the layers of each pair; the model's answers stay, to round-off.

    Parameters
    ----------
    model : onnx.ModelProto
        It is not changed.
    pairs : iterable of Pair
        Of `find_pairs`.
    largest : mapping of str to ndarray of shape (channels,)
        `largest_by_channel` of each pair's response.
    """
    scaled = onnx.ModelProto()
    scaled.CopyFrom(model)
    nodes = {node.name: node for node in scaled.graph.node}
    stored = {tensor.name: tensor for tensor in scaled.graph.initializer}
    for pair in pairs:
        first, second = nodes[pair.first], nodes[pair.second]
        reading = numpy_helper.to_array(stored[second.input[1]])
        axis = 1 if second.op_type == "Conv" or _number(second, "transB", 0) else 0
        weights = np.abs(reading).max(tuple(each for each in range(reading.ndim) if each != axis))
        responses = largest[pair.response]
        alive = (weights > 0) & (responses > 0)
        scale = np.ones_like(weights)
        scale[alive] = np.sqrt(weights[alive] / responses[alive])
        _multiply(stored[second.input[1]], 1 / scale, axis)
        writing = 0 if first.op_type == "Conv" or _number(first, "transB", 0) else 1
        _multiply(stored[first.input[1]], scale, writing)
        if len(first.input) > 2 and first.input[2]:
            _multiply(stored[first.input[2]], scale, -1)
    return scaled


def _multiply(tensor: onnx.TensorProto, scale: NDArray[np.float32], axis: int) -> None:
    values = numpy_helper.to_array(tensor)
    shape = [1] * max(values.ndim, 1)
    shape[axis] = len(scale)
    result = (values * scale.reshape(shape)).astype(values.dtype)
    tensor.CopyFrom(numpy_helper.from_array(result, tensor.name))

"""What a model costs: multiply-accumulates and parameters, from shapes as they really are.

The model runs once under onnxruntime, unoptimised, with a Shape node behind every tensor whose
shape the count needs. So chains of Shape, Gather and Reshape need no symbolic inference, and
nothing but the shapes comes out.

Multiply-accumulates (MACs) of one sample, for the node's output Y, data X and weight W:

===========================  ==============================================================
Conv                         elements(Y) · elements(W) / W.shape[0]: groups and all ranks
ConvTranspose                elements(X) · elements(W) / W.shape[0], with what pads crop
Gemm, MatMul                 elements(Y) · the length that is summed over
===========================  ==============================================================

and likewise for their integer kinds (ConvInteger, QLinearConv, MatMulInteger, QLinearMatMul,
QGemm). Biases and all other operators count nothing. A node in the body of an If, Loop or Scan
counts once, as if the body ran once; its shapes come from shape inference.

Parameters are the elements of all constants of rank 1 or more that hold floats or integers of at
most 8 bits (quantized weights): initializers, Constant and ConstantOfShape, each counted once,
where they meet a value that depends on the model's input, or are an output. Reshaped, transposed or
cast on the way there, they still count once, as they are stored; dequantized, the integers count, wide
ones (biases) too, and not their scales and zero points, so that a network and its quantized form have the
same number. Scalars (bounds, scales), other wide integers (shapes, indices) and what is never read do not
count.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnx.inliner
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto

from converter.calibration.sets import ModelInput
from converter.config import Runtime
from converter.errors import ConfigError
from converter.runtime import model_inputs, open_session, run

__all__ = ["LayerCost", "ModelCost", "count_cost", "tensor_shapes"]

Shape: TypeAlias = tuple[int, ...]
ShapeOf: TypeAlias = Callable[[str], "Shape | None"]
Root: TypeAlias = tuple[int, str]
"""A stored constant: the number of its graph (bodies may repeat names) and its name."""
Constants: TypeAlias = MutableMapping[str, frozenset[Root]]

_CONVS = {"Conv": (0, 1), "ConvInteger": (0, 1), "QLinearConv": (0, 3), "ConvTranspose": (0, 1)}
"""Position of data and weight among the inputs."""
_GEMMS = ("Gemm", "QGemm")
_MATMULS = ("MatMul", "MatMulInteger", "QLinearMatMul")

_QUANTIZING = ("QuantizeLinear", "DequantizeLinear")

_RANDOM = ("RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial")
"""What is no constant although all its inputs are."""

_PROPAGATED = 1024
"""Constants of at most so many elements take part in shape inference with their values."""

_WEIGHT_TYPES = frozenset(
    number
    for name, number in TensorProto.DataType.items()
    if name.startswith(
        ("FLOAT", "DOUBLE", "BFLOAT16", "INT2", "INT4", "INT8", "UINT2", "UINT4", "UINT8")
    )
)
_STORED_TYPES = _WEIGHT_TYPES | {TensorProto.INT32}


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs.

    Attributes
    ----------
    name : str
        Name of the node, or of its output where it has none.
    op : str
        Operator, such as "Conv".
    output : str
        Name of the node's output tensor.
    macs : int or None
        Multiply-accumulates of one sample; None where the shapes inside an If, Loop or Scan are not
        known.
    params : int
        Elements of the constants that reach the node. A shared constant counts in each layer that
        it reaches.
    """

    name: str
    op: str
    output: str
    macs: int | None
    params: int


@dataclass(frozen=True)
class ModelCost:
    """What a model costs.

    Attributes
    ----------
    macs : int
        Multiply-accumulates of one sample, over all layers whose shapes are known.
    params : int
        Parameters of the whole model, each counted once.
    layers : tuple of LayerCost
        Every node that multiplies and accumulates, in the order of the graph, bodies after their
        node.
    """

    macs: int
    params: int
    layers: tuple[LayerCost, ...]

    @property
    def uncounted(self) -> tuple[str, ...]:
        """Names of the layers whose multiply-accumulates are not known; `macs` lacks them."""
        return tuple(layer.name for layer in self.layers if layer.macs is None)


def count_cost(
    model: onnx.ModelProto,
    feeds: Mapping[str, npt.NDArray[Any]] | None = None,
    *,
    label: str = "the model",
) -> ModelCost:
    """Count the multiply-accumulates of one sample and the parameters of `model`.

    Parameters
    ----------
    model : onnx.ModelProto
        A model with its weights in memory; it stays as it is.
    feeds : mapping of str to ndarray or None, default None
        What the model runs on once, on the CPU. The counts are divided by the length of the first
        axis where all feeds share it, so a fixed batch is counted for one sample. None takes zeros
        in the model's input shapes, with batch 1 where it is free.
    label : str, default "the model"
        What messages call the model.

    Raises
    ------
    ConfigError
        Where an axis other than the first is free and no feeds are given.
    ModelError, CalibrationError
        Where onnxruntime refuses the model or the feeds.
    """
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    if feeds is None:
        feeds = {each.name: _zeros(each, label) for each in model_inputs(model, label=label)}
    census = _Census()
    _survey(model.graph, {}, census)
    shape_of = _shapes(model, feeds, census, label)
    batch = _batch(feeds)
    layers = tuple(
        _layer_cost(node, roots, shape_of, census, batch) for node, roots in census.layers
    )
    return ModelCost(
        macs=sum(layer.macs for layer in layers if layer.macs is not None),
        params=sum(_elements(root, census, shape_of) for root in sorted(census.used)),
        layers=layers,
    )


def tensor_shapes(
    model: onnx.ModelProto,
    feeds: Mapping[str, npt.NDArray[Any]],
    names: Sequence[str],
    *,
    label: str = "the model",
) -> dict[str, tuple[int, ...]]:
    """Run `model` once on `feeds` and return the shapes of some tensors of its main graph.

    Raises
    ------
    ModelError, CalibrationError
        Where onnxruntime refuses the model or the feeds.
    """
    inputs = {name: tuple(feed.shape) for name, feed in feeds.items() if name in names}
    computed = list(dict.fromkeys(name for name in names if name not in inputs))
    return {**inputs, **_measured_shapes(model, feeds, computed, label)}


def _zeros(model_input: ModelInput, label: str) -> npt.NDArray[Any]:
    shape = []
    for axis, size in enumerate(model_input.shape):
        if isinstance(size, int):
            shape.append(size)
        elif axis == 0:
            shape.append(1)
        else:
            raise ConfigError(
                f"{label}: axis {axis} of input '{model_input.name}' has no fixed size, and the "
                "cost depends on it; give the size of the images"
            )
    return np.zeros(shape, model_input.dtype)


def _batch(feeds: Mapping[str, npt.NDArray[Any]]) -> int:
    sizes = {feed.shape[0] for feed in feeds.values() if feed.ndim}
    return max(sizes.pop(), 1) if len(sizes) == 1 else 1


@dataclass
class _Census:
    """What one walk over the graph finds.

    `layers` are the nodes that count, each with the constants that reach it; `stored` has the
    stored shape of each constant that may count, None for a ConstantOfShape; `used` are the
    constants that reach a value depending on the input; `wide` are 32-bit integers, which count once they are
    dequantized; `outer` are the tensors of the main graph,
    `needed` those of all tensors whose shapes must be known; `graphs` counts the graphs walked so
    far.
    """

    layers: list[tuple[NodeProto, frozenset[Root]]] = field(default_factory=list)
    stored: dict[Root, Shape | None] = field(default_factory=dict)
    used: set[Root] = field(default_factory=set)
    wide: set[Root] = field(default_factory=set)
    outer: set[str] = field(default_factory=set)
    needed: set[str] = field(default_factory=set)
    graphs: int = 0

    def store(self, root: Root, kind: int, shape: Shape | None) -> frozenset[Root]:
        """Note a stored constant; return it alone, or nothing where its kind does not count."""
        if kind not in _STORED_TYPES or shape == ():
            return frozenset()
        if kind == TensorProto.INT32:
            self.wide.add(root)
        self.stored[root] = shape
        return frozenset({root})


def _survey(graph: GraphProto, constants: Constants, census: _Census) -> None:
    """Walk `graph` and its bodies.

    `constants` maps each constant tensor to the stored constants that it is made of.
    """
    number = census.graphs
    census.graphs += 1
    values = (*graph.initializer, *(sparse.values for sparse in graph.sparse_initializer))
    for tensor in values:
        constants[tensor.name] = census.store(
            (number, tensor.name), tensor.data_type, tuple(tensor.dims)
        )
    if number == 0:
        census.outer.update(value.name for value in graph.input)
        census.outer.update(name for node in graph.node for name in node.output if name)
    for node in graph.node:
        reaching = _survey_node(node, number, constants, census)
        if node.op_type in _CONVS or node.op_type in _GEMMS or node.op_type in _MATMULS:
            census.layers.append((node, reaching))
            census.needed.update(_operands(node))
        for inner in _bodies(node):
            _survey(inner, ChainMap({}, constants), census)
    for value in graph.output:
        census.used |= constants.get(value.name, frozenset()) - census.wide


def _survey_node(
    node: NodeProto, number: int, constants: Constants, census: _Census
) -> frozenset[Root]:
    """Note whether `node`, of graph `number`, makes a constant or uses some.

    Returns the stored constants that reach it.
    """
    inputs = [name for name in node.input if name]
    if node.op_type in _QUANTIZING:  # scales and zero points are none
        reaching = constants.get(inputs[0], frozenset())
        census.wide -= reaching
    else:
        found = (constants.get(name, frozenset()) for name in inputs)
        reaching = frozenset().union(*found) - census.wide
    fixed = (
        all(name in constants for name in inputs)
        and not any(_bodies(node))
        and node.op_type not in _RANDOM
    )
    if node.op_type == "Constant":
        constants[node.output[0]] = census.store((number, node.output[0]), *_constant(node))
    elif node.op_type == "ConstantOfShape" and fixed:
        kind = next((attribute.t.data_type for attribute in node.attribute), int(TensorProto.FLOAT))
        constants[node.output[0]] = census.store((number, node.output[0]), kind, None)
        census.needed.add(node.output[0])
    elif fixed and inputs:
        constants.update((name, reaching) for name in node.output if name)
    else:
        census.used |= reaching
    return reaching


def _constant(node: NodeProto) -> tuple[int, Shape]:
    """Element type and stored shape of a Constant node's value."""
    for attribute in node.attribute:
        if attribute.name == "value":
            return attribute.t.data_type, tuple(attribute.t.dims)
        if attribute.name == "sparse_value":
            return attribute.sparse_tensor.values.data_type, tuple(
                attribute.sparse_tensor.values.dims
            )
        if attribute.name == "value_floats":
            return TensorProto.FLOAT, (len(attribute.floats),)
    return TensorProto.INT64, ()  # integers, strings and scalars: nothing that counts


def _bodies(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def _operands(node: NodeProto) -> tuple[str, str, str]:
    """Return the names of data, weight and output; Gemms do without the weight's shape."""
    data, weight = _CONVS.get(node.op_type, (0, 0))
    return node.input[data], node.input[weight], node.output[0]


def _shapes(
    model: onnx.ModelProto, feeds: Mapping[str, npt.NDArray[Any]], census: _Census, label: str
) -> ShapeOf:
    known: dict[str, Shape] = {name: feed.shape for name, feed in feeds.items()}
    known |= {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    known |= {sparse.values.name: tuple(sparse.dims) for sparse in model.graph.sparse_initializer}
    unknown = sorted(census.needed - known.keys())
    measured = [name for name in unknown if name in census.outer]
    if measured:
        known |= _measured_shapes(model, feeds, measured, label)
    if len(measured) < len(unknown):
        known |= _inferred_shapes(model, feeds)
    return known.get


def _measured_shapes(
    model: onnx.ModelProto, feeds: Mapping[str, npt.NDArray[Any]], names: list[str], label: str
) -> dict[str, Shape]:
    """Run the model once and read the shapes of `names`, all tensors of the main graph."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    taken = {name for node in model.graph.node for name in (*node.input, *node.output)}
    prefix = "shape"
    while any(name.startswith(prefix) for name in taken):
        prefix += "_"
    del probe.graph.output[:]
    for index, name in enumerate(names):
        shape_name = f"{prefix}{index}"
        probe.graph.node.append(onnx.helper.make_node("Shape", [name], [shape_name]))
        probe.graph.output.append(
            onnx.helper.make_tensor_value_info(shape_name, TensorProto.INT64, [None])
        )
    session = open_session(probe, Runtime(), optimise=False, label=label)
    shapes = run(session, None, feeds, label=label)
    return {
        name: tuple(int(size) for size in shape) for name, shape in zip(names, shapes, strict=True)
    }


def _inferred_shapes(
    model: onnx.ModelProto, feeds: Mapping[str, npt.NDArray[Any]]
) -> dict[str, Shape]:
    """Infer the shapes inside the bodies of If, Loop and Scan, where they are whole and one."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    graph = fixed.graph
    del graph.value_info[:]  # it may name the batch that is a number now
    types = {
        value.name: value.type.tensor_type.elem_type for value in graph.input if value.name in feeds
    }
    shapes: dict[str, Shape] = {name: feeds[name].shape for name in types}
    # Weights tell inference nothing but their shape: as inputs they need not be copied through it.
    weights = [tensor for tensor in graph.initializer if math.prod(tensor.dims) > _PROPAGATED]
    types |= {tensor.name: tensor.data_type for tensor in weights}
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in weights}
    for tensor in weights:
        graph.initializer.remove(tensor)
    others = [value for value in graph.input if value.name not in types]
    del graph.input[:]
    graph.input.extend(
        onnx.helper.make_tensor_value_info(name, types[name], shapes[name]) for name in types
    )
    graph.input.extend(others)
    inferred = onnx.shape_inference.infer_shapes(fixed, data_prop=True)
    found: dict[str, set[Shape]] = {}
    for name, shape in _body_shapes(inferred.graph, body=False):
        found.setdefault(name, set()).add(shape)
    return {name: options.pop() for name, options in found.items() if len(options) == 1}


def _body_shapes(graph: GraphProto, *, body: bool) -> Iterator[tuple[str, Shape]]:
    if body:
        for tensor in graph.initializer:
            yield tensor.name, tuple(tensor.dims)
        for value in (*graph.input, *graph.value_info, *graph.output):
            dims = value.type.tensor_type.shape.dim
            if value.type.tensor_type.HasField("shape") and all(
                dim.HasField("dim_value") for dim in dims
            ):
                yield value.name, tuple(dim.dim_value for dim in dims)
    for node in graph.node:
        for inner in _bodies(node):
            yield from _body_shapes(inner, body=True)


def _layer_cost(
    node: NodeProto, roots: frozenset[Root], shape_of: ShapeOf, census: _Census, batch: int
) -> LayerCost:
    macs = _macs(node, shape_of)
    return LayerCost(
        name=node.name or node.output[0],
        op=node.op_type,
        output=node.output[0],
        macs=None if macs is None else round(macs / batch),
        params=sum(_elements(root, census, shape_of) for root in roots),
    )


def _macs(node: NodeProto, shape_of: ShapeOf) -> int | None:
    data, weight, output = map(shape_of, _operands(node))
    if data is None or weight is None or output is None:
        return None
    if node.op_type in _CONVS:
        each = data if node.op_type == "ConvTranspose" else output
        return math.prod(each) * math.prod(weight[1:])
    summed = -1
    if node.op_type in _GEMMS and any(item.name == "transA" and item.i for item in node.attribute):
        summed = 0
    return math.prod(output) * data[summed]


def _elements(root: Root, census: _Census, shape_of: ShapeOf) -> int:
    shape = census.stored[root] or shape_of(root[1])
    return (
        math.prod(shape) if shape else 0
    )  # a ConstantOfShape may be a scalar, or not known inside a body

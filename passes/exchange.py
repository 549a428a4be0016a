"""ONNX model ↔ graphsurgeon graph, with nothing lost on the way.

graphsurgeon reads a model lazily, which suits large weights. Its exporter drops what the passes
must keep: metadata, documentation, the types of graph inputs and outputs, attributes of types that
it does not know, initializers that are also graph inputs or that nobody reads, quantization
annotations, model-local functions, and it writes weights of an outer graph into every subgraph
that reads them. So the export here starts from the model that the graph was read from and writes
only what the passes may have changed: nodes and initializers. A graph that no pass changed comes
back as the same model.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from onnx import numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues
from onnx_graphsurgeon.logger import G_LOGGER

from passes.base import PassError

__all__ = [
    "REBUILT_FIELDS",
    "Origin",
    "carry",
    "export_model",
    "export_skeleton",
    "import_graph",
    "initializers_of",
    "origin_of",
]

_LARGE = 2**24
"""Weights of a model from which on the graphs before it are cleared away when it is read: nodes and tensors
point at each other and hold the weights, and Python may leave them for long, since they are few objects."""
_FIRST_IR_WITH_FREE_INITIALIZERS = 4  # before it every initializer is a graph input as well

REBUILT_FIELDS = frozenset(
    {
        "node",
        "initializer",
        "sparse_initializer",
        "input",
        "output",
        "value_info",
        "quantization_annotation",
    }
)
"""Fields of a GraphProto that follow from its nodes; the others are carried over as they are."""

# Attributes that graphsurgeon drops on import; they name no tensor, so they are carried over.
_CARRIED_ATTRIBUTES = frozenset(
    {
        onnx.AttributeProto.TENSORS,
        onnx.AttributeProto.SPARSE_TENSOR,
        onnx.AttributeProto.SPARSE_TENSORS,
        onnx.AttributeProto.TYPE_PROTO,
        onnx.AttributeProto.TYPE_PROTOS,
    }
)


@dataclass
class Origin:
    """What a graphsurgeon graph cannot hold about the model it was read from.

    Attributes
    ----------
    model : onnx.ModelProto
        That model; not to be changed while the graph is in use (weights are read lazily).
    unused : set of str
        Initializers of the main graph that nothing reads; a pass that removes one takes it out.
    overridable : frozenset of str
        Initializers that are graph inputs too, in a model whose callers may thus override them
        (IR version 4 or later).
    """

    model: onnx.ModelProto
    unused: set[str]
    overridable: frozenset[str]


def origin_of(graph: gs.Graph) -> Origin:
    """Return what `import_graph` noted about `graph`.

    Raises
    ------
    PassError
        Where the graph was not made by `import_graph`.
    """
    origin = graph.__dict__.get("origin")
    if not isinstance(origin, Origin):
        raise PassError(f"the graph {graph.name!r} was not read by import_graph; read it so")
    return origin


def import_graph(model: onnx.ModelProto) -> gs.Graph:
    """Read a model as a graphsurgeon graph; weights stay where they are until they are needed.

    Parameters
    ----------
    model : onnx.ModelProto
        A valid model with its weights in memory; it is not changed.

    Raises
    ------
    PassError
        Where the model holds what graphsurgeon cannot read: weights in a file that was not
        loaded, an attribute that is a list of graphs, or a text attribute that is not UTF-8.
    """
    if sum(math.prod(tensor.dims) for tensor in initializers_of(model.graph)) > _LARGE:
        gc.collect()
    for tensor in initializers_of(model.graph):
        _require_loaded(tensor)
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        _require_readable(nodes)
    # Above its highest level: what it would print is either refused above or restored below.
    with G_LOGGER.suppress(G_LOGGER.CRITICAL + 1):
        graph = gs.import_onnx(model)
    initializers = {tensor.name for tensor in initializers_of(model.graph)}
    listed = initializers.intersection(value.name for value in model.graph.input)
    graph.origin = Origin(
        model=model,
        unused=initializers - _names_read(graph),
        overridable=frozenset(
            listed if model.ir_version >= _FIRST_IR_WITH_FREE_INITIALIZERS else ()
        ),
    )
    return graph


def export_model(graph: gs.Graph, like: onnx.ModelProto) -> onnx.ModelProto:
    """Write a graph as a model; everything but nodes and initializers is taken from `like`.

    Initializers that are also graph inputs stay so while they exist; before IR version 4, where
    every initializer must be one, new ones become so too. Equal graphs give equal bytes.

    Parameters
    ----------
    graph : gs.Graph
        A graph from `import_graph`, its nodes in topological order.
    like : onnx.ModelProto
        The model that the graph was read from; it is not changed.

    Raises
    ------
    PassError
        Where the graph was read from another model than `like`, has other inputs or outputs, or
        where a pass has added a subgraph.
    """
    return _export(graph, like, largest=None)


def export_skeleton(graph: gs.Graph, largest: int = 1024) -> onnx.ModelProto:
    """Write a graph without its weights, for shape inference.

    Parameters
    ----------
    graph : gs.Graph
        A graph from `import_graph`.
    largest : int, default 1024
        Initializers with more elements than this become graph inputs of their type and shape.
    """
    return _export(graph, origin_of(graph).model, largest=largest)


def _export(graph: gs.Graph, like: onnx.ModelProto, largest: int | None) -> onnx.ModelProto:
    model = onnx.ModelProto()
    carry(like, model, except_for={"graph"})
    if largest is not None:
        model.ir_version = max(like.ir_version, _FIRST_IR_WITH_FREE_INITIALIZERS)
    unused = origin_of(graph).unused
    _require_same_origin(graph, like.graph)
    # Written straight into the model: each step between would copy every weight once more.
    written = _write_graph(model.graph, graph, like.graph, frozenset(), unused, largest)
    inputs = {tensor.name for tensor in graph.inputs}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    listed = set()
    for value in like.graph.input:
        if value.name in inputs or (largest is None and value.name in written):
            listed.add(value.name)
            if _describes(value, stored.get(value.name)):
                model.graph.input.add().CopyFrom(value)
            else:
                model.graph.input.append(_described(stored[value.name]))
    if model.ir_version < _FIRST_IR_WITH_FREE_INITIALIZERS:
        model.graph.input.extend(_described(t) for t in stored.values() if t.name not in listed)
    return model


def _require_same_origin(graph: gs.Graph, like: onnx.GraphProto) -> None:
    initializers = {tensor.name for tensor in initializers_of(like)}
    strange = origin_of(graph).unused - initializers
    if strange:
        raise PassError(f"the graph {graph.name!r} was read from another model: {min(strange)!r}")
    inputs = [value.name for value in like.input if value.name not in initializers]
    if [tensor.name for tensor in graph.inputs] != inputs:
        raise PassError(f"the graph {graph.name!r} no longer has the inputs {inputs}")
    outputs = [value.name for value in like.output]
    if [tensor.name for tensor in graph.outputs] != outputs:
        raise PassError(f"the graph {graph.name!r} no longer has the outputs {outputs}")


def _write_graph(
    target: onnx.GraphProto,
    graph: gs.Graph,
    like: onnx.GraphProto,
    outer: frozenset[str],
    unused: Collection[str],
    largest: int | None,
) -> frozenset[str]:
    """Write nodes, initializers and what hangs on them; return the initializers in scope."""
    carry(like, target, except_for=REBUILT_FIELDS)
    target.output.extend(like.output)
    constants = _own_constants(graph, like, outer)
    _write_constants(target, constants, like, unused, largest)
    scope = outer.union(constants, unused)
    originals = _Originals(like.node)
    for node in graph.nodes:
        _write_node(target.node.add(), node, originals.match(node), scope, largest)
    present = _names_written(target) | {tensor.name for tensor in graph.inputs}
    stored = {tensor.name: tensor for tensor in target.initializer}
    target.value_info.extend(
        v for v in like.value_info if v.name in present and _describes(v, stored.get(v.name))
    )
    target.quantization_annotation.extend(
        annotation
        for annotation in like.quantization_annotation
        if annotation.tensor_name in present
        and all(entry.value in present for entry in annotation.quant_parameter_tensor_names)
    )
    return scope


def _own_constants(
    graph: gs.Graph, like: onnx.GraphProto, outer: frozenset[str]
) -> dict[str, gs.Constant]:
    """Constants that this graph holds itself: those it reads, and those it lends to subgraphs."""
    lent = {tensor.name for tensor in initializers_of(like)}
    own: dict[str, gs.Constant] = {}
    for tensor, depth in _tensors_read(graph):
        if (
            isinstance(tensor, gs.Constant)
            and tensor.name not in outer
            and (depth == 0 or tensor.name in lent)
        ):
            own[tensor.name] = tensor
    return own


def _write_constants(
    target: onnx.GraphProto,
    constants: dict[str, gs.Constant],
    like: onnx.GraphProto,
    unused: Collection[str],
    largest: int | None,
) -> None:
    order = [tensor.name for tensor in initializers_of(like)]
    position = {name: index for index, name in enumerate(order)}
    dense = {tensor.name: tensor for tensor in like.initializer}
    sparse = {tensor.values.name: tensor for tensor in like.sparse_initializer}
    for name in sorted(
        {*constants, *unused}, key=lambda name: (position.get(name, len(order)), name)
    ):
        if name not in constants:
            if largest is not None:
                continue
            if name in dense:
                target.initializer.add().CopyFrom(dense[name])
            else:
                target.sparse_initializer.add().CopyFrom(sparse[name])
        elif isinstance(constants[name]._values, SparseValues):
            target.sparse_initializer.add().CopyFrom(constants[name]._values.tensor)
        else:
            _write_dense(target, constants[name], largest)


def _write_dense(target: onnx.GraphProto, constant: gs.Constant, largest: int | None) -> None:
    values = constant._values
    if isinstance(values, LazyValues):
        elements, dtype = _volume(values.shape), values.tensor.data_type
    else:
        elements, dtype = values.size, onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
    if largest is not None and elements > largest:
        target.input.append(_value_info(constant.name, dtype, values.shape))
        return
    _write_tensor(target.initializer.add(), constant)


def _write_tensor(target: onnx.TensorProto, constant: gs.Constant) -> None:
    values = constant._values
    if isinstance(values, LazyValues):
        target.CopyFrom(values.tensor)
    else:
        target.CopyFrom(numpy_helper.from_array(values))
    if target.name != constant.name:
        target.name = constant.name


def _write_node(
    target: onnx.NodeProto,
    node: gs.Node,
    original: onnx.NodeProto | None,
    scope: frozenset[str],
    largest: int | None,
) -> None:
    if original is not None:
        carry(original, target, except_for={"input", "output", "attribute"})
    target.op_type = node.op
    if target.name != node.name:
        target.name = node.name
    if node.domain is not None:
        target.domain = node.domain
    target.input.extend(tensor.name for tensor in node.inputs)
    target.output.extend(tensor.name for tensor in node.outputs)
    known = [] if original is None else list(original.attribute)
    for attribute in known:
        if attribute.name in node.attrs:
            value = node.attrs[attribute.name]
            _write_attribute(target, node, attribute.name, value, attribute, scope, largest)
        elif attribute.type in _CARRIED_ATTRIBUTES:
            target.attribute.add().CopyFrom(attribute)
    names = {attribute.name for attribute in known}
    for name, value in node.attrs.items():
        if name not in names:
            _write_attribute(target, node, name, value, None, scope, largest)


def _write_attribute(
    target: onnx.NodeProto,
    node: gs.Node,
    name: str,
    value: Any,
    original: onnx.AttributeProto | None,
    scope: frozenset[str],
    largest: int | None,
) -> None:
    attribute = target.attribute.add()
    if isinstance(value, gs.Graph):
        if original is None:
            raise PassError(f"node {node.name!r} has a new subgraph {name!r}; none can be added")
        carry(original, attribute, except_for={"g"})
        _write_graph(attribute.g, value, original.g, scope, (), largest)
        attribute.g.input.extend(original.g.input)
    elif isinstance(value, gs.Constant):
        if original is not None:
            carry(original, attribute, except_for={"t"})
        attribute.name, attribute.type = name, onnx.AttributeProto.TENSOR
        _write_tensor(attribute.t, value)
    else:
        kind = None if original is None else original.type
        attribute.CopyFrom(onnx.helper.make_attribute(name, value, attr_type=kind))
        if original is not None and original.doc_string:
            attribute.doc_string = original.doc_string


class _Originals:
    """Nodes of the original graph, found by what they write or, failing that, by their name."""

    def __init__(self, nodes: Iterable[onnx.NodeProto]) -> None:
        self._by_outputs = {tuple(node.output): node for node in nodes}
        self._by_name: dict[str, list[onnx.NodeProto]] = {}
        for node in nodes:
            self._by_name.setdefault(node.name, []).append(node)

    def match(self, node: gs.Node) -> onnx.NodeProto | None:
        named = self._by_name.get(node.name, []) if node.name else []
        candidates = [
            self._by_outputs.get(tuple(tensor.name for tensor in node.outputs)),
            named[0] if len(named) == 1 else None,
        ]
        for original in candidates:
            if original is not None and (original.op_type, original.domain) == (
                node.op,
                node.domain or "",
            ):
                return original
        return None


def _require_loaded(tensor: onnx.TensorProto) -> None:
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise PassError(
            f"the weight {tensor.name!r} lies in a file that was not loaded; "
            "load the model with its external data"
        )


def _require_readable(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        label = node.name or next(iter(node.output), "")
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPHS:
                raise PassError(
                    f"attribute {attribute.name!r} of node {label!r} ({node.op_type}) is a list "
                    "of graphs, which cannot be read"
                )
            for text in (attribute.s, *attribute.strings):
                try:
                    text.decode()
                except UnicodeDecodeError:
                    raise PassError(
                        f"attribute {attribute.name!r} of node {label!r} ({node.op_type}) is "
                        "text that is not UTF-8, which cannot be read"
                    ) from None
            _require_loaded(attribute.t)
            for tensor in initializers_of(attribute.g):
                _require_loaded(tensor)
            _require_readable(attribute.g.node)


def initializers_of(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Dense initializers, then the values of the sparse ones, which carry their names."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values


def _tensors_read(graph: gs.Graph, depth: int = 0) -> Iterator[tuple[gs.Tensor, int]]:
    """Yield every tensor that nodes or outputs read, with how deep in subgraphs they do."""
    for node in graph.nodes:
        for tensor in node.inputs:
            yield tensor, depth
        for subgraph in node.subgraphs():
            yield from _tensors_read(subgraph, depth + 1)
    for tensor in graph.outputs:
        yield tensor, depth


def _names_read(graph: gs.Graph) -> set[str]:
    return {tensor.name for tensor, _ in _tensors_read(graph)}


def _names_written(graph: onnx.GraphProto) -> set[str]:
    names = {tensor.name for tensor in initializers_of(graph)}
    for node in graph.node:
        names.update(node.output)
    return names


def _describes(value: onnx.ValueInfoProto, tensor: onnx.TensorProto | None) -> bool:
    """Whether what is said about a tensor still holds; a pass may have changed a constant."""
    kind = value.type.tensor_type
    if tensor is None or not kind.HasField("shape"):
        return True
    sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim]
    return len(sizes) == len(tensor.dims) and all(
        said in (None, size) for said, size in zip(sizes, tensor.dims, strict=True)
    )


def _described(tensor: onnx.TensorProto) -> onnx.ValueInfoProto:
    return _value_info(tensor.name, tensor.data_type, tensor.dims)


def _value_info(name: str, dtype: int, shape: Iterable[int]) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, dtype, list(shape))


def _volume(shape: Iterable[int]) -> int:
    volume = 1
    for size in shape:
        volume *= size
    return volume


def carry(source: Any, target: Any, except_for: Collection[str]) -> None:
    """Copy every field of a message that is set, whatever it is called, but those named."""
    for descriptor, value in source.ListFields():
        name = descriptor.name
        if name in except_for:
            continue
        if hasattr(value, "CopyFrom"):
            getattr(target, name).CopyFrom(value)
        elif isinstance(value, (str, bytes, int, float)):
            setattr(target, name, value)
        else:
            getattr(target, name).extend(value)

"""Make inner tensors visible: as further outputs of a model, or as the ends of a sub-model.

Both work on the model itself, not on a graph, and copy each weight that the result needs once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import onnx

from passes.base import PassError
from passes.exchange import REBUILT_FIELDS, carry, export_skeleton, import_graph, initializers_of

__all__ = ["expose", "extract", "types_of"]


def expose(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """Return a copy of a model with inner tensors as further outputs.

    Parameters
    ----------
    model : onnx.ModelProto
        It is not changed.
    tensors : sequence of str
        Tensors that nodes of the main graph write; those that are outputs already are not
        added again.

    Returns
    -------
    onnx.ModelProto
        Its first outputs are those of `model`, then come `tensors` in their order. An output
        whose type nobody states or infers (after operators that ONNX does not know) has a name
        alone: onnxruntime finds the type, the ONNX checker asks for it.

    Raises
    ------
    PassError
        Where no node of the main graph writes a tensor of this name.
    """
    written = _written(model.graph)
    outputs = {value.name for value in model.graph.output}
    added = [name for name in dict.fromkeys(tensors) if name not in outputs]
    for name in added:
        if name not in written:
            raise PassError(f"no node of the model writes {name!r}; it cannot become an output")
    types = types_of(model, added)
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    exposed.graph.output.extend(_value_info(name, types) for name in added)
    return exposed


def extract(
    model: onnx.ModelProto,
    inputs: Sequence[str],
    outputs: Sequence[str],
    types: Mapping[str, onnx.TypeProto] | None = None,
) -> onnx.ModelProto:
    """Return the part of a model that computes some tensors from others.

    Parameters
    ----------
    model : onnx.ModelProto
        It is not changed.
    inputs : sequence of str
        Tensors that are fed: inputs of the model, or tensors that its nodes write. All become
        inputs of the result, in this order, even one that nothing reads.
    outputs : sequence of str
        Tensors that are wanted, at least one; none of them an input.
    types : mapping of str to onnx.TypeProto or None, default None
        From `types_of`, where many parts are taken of one model; None finds them.

    Returns
    -------
    onnx.ModelProto
        Nodes, weights and functions that are needed; names, opset and metadata as in `model`.

    Raises
    ------
    PassError
        Where a tensor does not exist, is both input and output, or where the outputs need an
        input of the model that is not among `inputs`.
    """
    inputs, outputs = list(dict.fromkeys(inputs)), list(dict.fromkeys(outputs))
    graph = model.graph
    constants = {tensor.name for tensor in initializers_of(graph)}
    fed = {value.name for value in graph.input} - constants
    written = _written(graph)
    _require_ends(inputs, outputs, fed, written)
    nodes = _needed_nodes(graph, inputs, outputs)
    names = set(outputs).union(*(_reads(node) for node in nodes))
    missing = names.intersection(fed).difference(inputs)
    if missing:
        raise PassError(
            f"{outputs} also need the input {min(missing)!r} of the model; name it as an input"
        )
    types = types_of(model, [*inputs, *outputs]) if types is None else types
    part = onnx.ModelProto()
    carry(model, part, except_for={"graph"})
    carry(graph, part.graph, except_for=REBUILT_FIELDS)
    part.graph.node.extend(nodes)
    part.graph.initializer.extend(t for t in graph.initializer if t.name in names)
    part.graph.sparse_initializer.extend(
        t for t in graph.sparse_initializer if t.values.name in names
    )
    part.graph.input.extend(_typed_value_info(name, types) for name in inputs)
    # Initializers that are inputs too stay so: before IR version 4 they must.
    part.graph.input.extend(v for v in graph.input if v.name in names & constants)
    part.graph.output.extend(_value_info(name, types) for name in outputs)
    inner = names.union(*(node.output for node in nodes)).difference(inputs, outputs)
    part.graph.value_info.extend(v for v in graph.value_info if v.name in inner)
    part.graph.quantization_annotation.extend(
        a for a in graph.quantization_annotation if a.tensor_name in inner
    )
    return part


def types_of(
    model: onnx.ModelProto, names: Iterable[str] | None = None
) -> dict[str, onnx.TypeProto]:
    """Return types of tensors as the model states them, or, where it does not, as ONNX infers them.

    Parameters
    ----------
    model : onnx.ModelProto
        It is not changed.
    names : iterable of str or None, default None
        Tensors that are asked for; None asks for all that nodes of the main graph write. Others may be
        there too, and those that nobody knows are missing.
    """
    graph = model.graph
    names = _written(graph) if names is None else names
    known = {
        value.name: value.type
        for value in (*graph.value_info, *graph.input, *graph.output)
        if _is_stated(value.type)
    }
    if all(name in known for name in names):
        return known
    skeleton = export_skeleton(import_graph(model))
    try:
        inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True)
    except onnx.shape_inference.InferenceError:
        return known  # the callers tell what they do without a type
    found = {
        value.name: value.type for value in inferred.graph.value_info if value.HasField("type")
    }
    return {**found, **known}


def _require_ends(
    inputs: Sequence[str], outputs: Sequence[str], fed: Collection[str], written: Collection[str]
) -> None:
    if not outputs:
        raise PassError("no output was named; name at least one tensor to compute")
    for name in inputs:
        if name not in fed and name not in written:
            raise PassError(f"{name!r} is neither an input of the model nor written by a node")
        if name in outputs:
            raise PassError(f"{name!r} is both an input and an output; take it as it is fed")
    for name in outputs:
        if name not in written:
            raise PassError(f"no node of the model writes {name!r}; it cannot be computed")


def _written(graph: onnx.GraphProto) -> set[str]:
    return {name for node in graph.node for name in node.output if name}


def _reads(node: onnx.NodeProto) -> set[str]:
    """Tensors that a node reads, what its subgraphs take from outside included."""
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            inner = {value.name for value in graph.input} | _written(graph)
            inner.update(tensor.name for tensor in initializers_of(graph))
            names.update(*(_reads(each) - inner for each in graph.node))
    return names


def _needed_nodes(
    graph: onnx.GraphProto, inputs: Collection[str], outputs: Iterable[str]
) -> list[onnx.NodeProto]:
    """Nodes between two sets of tensors, in the order of the graph."""
    wanted = set(outputs)
    nodes = []
    for node in reversed(graph.node):  # topological order: consumers come after producers
        if wanted.isdisjoint(set(node.output).difference(inputs, [""])):
            continue
        nodes.append(node)
        wanted |= _reads(node).difference(inputs)
    return nodes[::-1]


def _is_stated(kind: onnx.TypeProto) -> bool:
    """Whether a type says enough: for a tensor its element type and its number of axes."""
    if kind.HasField("tensor_type"):
        return bool(kind.tensor_type.elem_type) and kind.tensor_type.HasField("shape")
    return kind.WhichOneof("value") is not None


def _value_info(name: str, types: Mapping[str, onnx.TypeProto]) -> onnx.ValueInfoProto:
    value = onnx.ValueInfoProto(name=name)
    if name in types:
        value.type.CopyFrom(types[name])
    return value


def _typed_value_info(name: str, types: Mapping[str, onnx.TypeProto]) -> onnx.ValueInfoProto:
    value = _value_info(name, types)
    if value.type.WhichOneof("value") is None or (
        value.type.HasField("tensor_type") and not value.type.tensor_type.elem_type
    ):
        raise PassError(f"the type of {name!r} is not known, so it cannot be an input")
    return value

"""A part of a graph that is run by itself, and what tells whether its inputs are still good."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper

from converter.calibration.patches import Tensors
from converter.config import Runtime
from converter.runtime import open_session, run
from passes.base import Pass, run_passes
from passes.exchange import export_model, import_graph
from passes.expose import extract
from passes.layers import Layer

__all__ = ["Segment", "frontier_of", "provenance_of"]

_SEQUENCES = frozenset(
    {"SplitToSequence", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert"}
)
"""Operators that give sequences of tensors."""


class Segment:
    """Computes some tensors of a model from others; what is given is passed through.

    `changes` rewrite the part that computes them before it is opened, `label` is what refusals call it, and
    `types` are those of the model's tensors where they are known already. Raises `PassError` where the wanted
    tensors cannot be computed from these, the type of one of these is not known, or a change does not fit.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        given: Sequence[str],
        wanted: Sequence[str],
        runtime: Runtime,
        *,
        changes: Sequence[Pass] = (),
        label: str = "the model",
        types: Mapping[str, onnx.TypeProto] | None = None,
    ) -> None:
        self._label = label
        self.given = tuple(given)
        self._wanted = tuple(dict.fromkeys(wanted))
        self._computed = [name for name in self._wanted if name not in self.given]
        self._session: ort.InferenceSession | None = None
        if self._computed:
            part = extract(model, self.given, self._computed, types)
            _free_batch(part, model)
            if changes:
                graph = import_graph(part)
                run_passes(graph, changes)
                part = export_model(graph, part)
            self._session = open_session(part, runtime, spinning=False, label=label)

    def run(self, tensors: Tensors) -> Tensors:
        """Return the wanted tensors of one batch."""
        results: dict[str, NDArray[Any]] = {}
        if self._session is not None:
            arrays = run(self._session, self._computed, tensors, label=self._label)
            results = dict(zip(self._computed, arrays, strict=True))
        return {name: results[name] if name in results else tensors[name] for name in self._wanted}


def _free_batch(part: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """Leave the first axis of what is fed free, where all inputs of the model leave it free.

    Stated shapes may be those of a batch that the model had before somebody freed it.
    """
    weights = _initializer_names(model.graph)
    fed = [value for value in model.graph.input if value.name not in weights]
    if any(axis.HasField("dim_value") for value in fed for axis in _first_axis(value)):
        return
    for value in part.graph.input:
        if value.name not in weights:
            for axis in _first_axis(value):
                axis.ClearField("dim_value")


def _first_axis(value: onnx.ValueInfoProto) -> Sequence[onnx.TensorShapeProto.Dimension]:
    return list(value.type.tensor_type.shape.dim[:1])


def frontier_of(
    graph: onnx.GraphProto, layer: Layer, wanted: Collection[str] = ()
) -> tuple[str, ...]:
    """Return the tensors that exist before the layer's node and that it or later nodes read, or are wanted.

    Those that no input of the model changes are left out: they are computed where they are needed. So are
    sequences, which no run takes or gives as arrays: what they are made of stands for them.
    """
    reads = [_reads(node) for node in graph.node]
    at = next(
        (
            index
            for index, node in enumerate(graph.node)
            if node.op_type == layer.op
            and layer.input in node.input
            and layer.output in node.output
        ),
        None,
    )
    if at is None:
        raise ValueError(f"the graph has no {layer.op} {layer.name!r}: it was replaced already")
    varying = {value.name for value in graph.input}.difference(_initializer_names(graph))
    for node, names in zip(graph.node[:at], reads, strict=False):
        if not varying.isdisjoint(names):
            varying.update(name for name in node.output if name)
    frontier = varying.intersection(set(wanted).union(*reads[at:]))
    for node, names in zip(reversed(graph.node[:at]), reversed(reads[:at]), strict=True):
        if node.op_type in _SEQUENCES and not frontier.isdisjoint(node.output):
            frontier = frontier.difference(node.output) | varying.intersection(names)
    return tuple(sorted(frontier))


def _reads(node: onnx.NodeProto) -> set[str]:
    """Return the tensors that a node reads; names inside of its subgraphs are among them."""
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            names.update(*(_reads(inner) for inner in graph.node))
    return names


def _initializer_names(graph: onnx.GraphProto) -> set[str]:
    names = {tensor.name for tensor in graph.initializer}
    return names | {tensor.values.name for tensor in graph.sparse_initializer}


def provenance_of(graph: onnx.GraphProto, names: Collection[str]) -> str:
    """Return a SHA-256 over all nodes and weights that tensors are computed by.

    A stored cut is only as good as the graph before it: where that changed since, so does this.
    """
    wanted = set(names)
    digest = hashlib.sha256()
    for node in reversed(graph.node):
        if wanted.isdisjoint(name for name in node.output if name):
            continue
        wanted |= _reads(node)
        attributes = sorted(a.SerializeToString(deterministic=True) for a in node.attribute)
        ends = (list(node.input), list(node.output))
        digest.update(repr((node.domain, node.op_type, *ends, attributes)).encode())
    weights = {tensor.name: tensor for tensor in graph.initializer if tensor.name in wanted}
    for name in sorted(weights):
        tensor = weights[name]
        digest.update(repr((name, tensor.data_type, list(tensor.dims))).encode())
        if tensor.data_type == onnx.TensorProto.STRING:
            digest.update(tensor.SerializeToString(deterministic=True))
        else:
            array = np.ascontiguousarray(numpy_helper.to_array(tensor))
            digest.update(array.reshape(-1).view(np.uint8).data)
    for sparse in graph.sparse_initializer:
        if sparse.values.name in wanted:
            digest.update(sparse.SerializeToString(deterministic=True))
    return digest.hexdigest()

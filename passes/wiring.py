"""What passes ask of a graph: constants, consumers, names; and the one way to replace nodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

__all__ = [
    "Wiring",
    "constant_value",
    "element_type",
    "fresh_name",
    "is_standard",
    "label",
    "names_in",
    "per_output",
    "replace_nodes",
]


class Wiring:
    """Who reads what in one graph; valid while no node is added to it.

    Parameters
    ----------
    graph : gs.Graph
        The main graph; nodes of its subgraphs count as consumers, never as a sole one.
    """

    def __init__(self, graph: gs.Graph) -> None:
        self._nodes = {id(node) for node in graph.nodes}
        self._outputs = {tensor.name for tensor in graph.outputs}

    def is_output(self, tensor: gs.Tensor) -> bool:
        """Whether `tensor` is an output of the graph."""
        return tensor.name in self._outputs

    def consumers(self, tensor: gs.Tensor) -> list[gs.Node]:
        """Return the nodes that read `tensor`, each once, those of subgraphs included."""
        return list({id(node): node for node in tensor.outputs}.values())

    def inner_consumers(self, tensor: gs.Tensor) -> list[gs.Node] | None:
        """Return the nodes that read `tensor`; None where anything beyond this graph sees it."""
        nodes = self.consumers(tensor)
        if self.is_output(tensor) or any(id(node) not in self._nodes for node in nodes):
            return None
        return nodes

    def sole_consumer(self, tensor: gs.Tensor) -> gs.Node | None:
        """Return the only thing that sees `tensor`, where that is one node of this graph."""
        nodes = self.inner_consumers(tensor)
        return nodes[0] if nodes is not None and len(nodes) == 1 else None


def label(node: gs.Node) -> str:
    """Return the name of `node`, or that of its first output where it has none."""
    return str(node.name or next((tensor.name for tensor in node.outputs if tensor.name), node.op))


def is_standard(node: gs.Node) -> bool:
    """Whether the operator of `node` is one of ONNX itself."""
    return (node.domain or "") in ("", "ai.onnx")


def constant_value(tensor: gs.Tensor) -> NDArray[np.generic] | None:
    """Return the value of a dense constant, read-only; None for any other tensor.

    The tensor itself stays as it is, so that what is only looked at is exported as it came.
    """
    if not isinstance(tensor, gs.Constant) or isinstance(tensor._values, SparseValues):
        return None
    stored = tensor._values
    array = numpy_helper.to_array(stored.tensor) if isinstance(stored, LazyValues) else stored
    value: NDArray[np.generic] = np.asarray(array).view()
    value.flags.writeable = False
    return value


def element_type(tensor: gs.Tensor) -> int | None:
    """Return the element type of `tensor` as `onnx.TensorProto.DataType`; None if unknown."""
    if tensor.dtype is None:
        return None
    if isinstance(tensor.dtype, int):  # what numpy has no type for, bfloat16 among them
        return tensor.dtype
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)))


def per_output(
    constant: NDArray[np.generic], rank: int, axis: int, size: int
) -> NDArray[np.float64] | None:
    """Return an operand that broadcasts along one axis only, as one value for each index of it.

    Parameters
    ----------
    constant : ndarray
        Constant operand of an elementwise operator.
    rank : int
        Number of axes of the other operand, from 1.
    axis : int
        The axis, in [0, rank).
    size : int
        Size of the other operand along `axis`.

    Returns
    -------
    ndarray of shape (size,), dtype float64, or None
        None where the constant varies along another axis or would enlarge the other operand.
    """
    if constant.ndim > rank:
        return None
    shape = (1,) * (rank - constant.ndim) + constant.shape
    if shape[axis] not in (1, size) or any(n != 1 for i, n in enumerate(shape) if i != axis):
        return None
    return np.array(np.broadcast_to(constant.reshape(-1), (size,)), dtype=np.float64)


def names_in(graph: gs.Graph) -> set[str]:
    """Return all names of nodes and tensors in `graph` and its subgraphs."""
    names = {tensor.name for tensor in (*graph.inputs, *graph.outputs)}
    for node in graph.nodes:
        names.add(node.name)
        names.update(tensor.name for tensor in node.inputs)
        names.update(tensor.name for tensor in node.outputs)
    for subgraph in graph.subgraphs():
        names |= names_in(subgraph)
    return names


def fresh_name(names: set[str], stem: str) -> str:
    """Return `stem`, numbered where `names` has it already, and add it to `names`."""
    name, number = stem, 1
    while name in names:
        name, number = f"{stem}_{number}", number + 1
    names.add(name)
    return name


def replace_nodes(graph: gs.Graph, old: Sequence[gs.Node], new: Iterable[gs.Node]) -> None:
    """Put `new` at the place of the last of `old`, and detach and remove all of `old`.

    The place of the last one keeps the nodes in topological order. By identity: equality of
    graphsurgeon nodes compares all that they hold.
    """
    gone = {id(node) for node in old}
    place = max(index for index, node in enumerate(graph.nodes) if id(node) in gone)
    kept_before = [node for node in graph.nodes[:place] if id(node) not in gone]
    graph.nodes = [*kept_before, *new, *graph.nodes[place + 1 :]]
    for node in old:
        node.inputs.clear()
        node.outputs.clear()

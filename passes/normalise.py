"""Bring a graph into the form that the other passes read: constants, shapes, nothing dead.

Three passes, in this order:

1. `FoldConstants`: a constant that reaches its consumers through Constant, Identity, Cast,
   ConstantOfShape, Reshape, Unsqueeze, Squeeze, Transpose, Flatten, Concat or Slice becomes an
   initializer. Weights are then initializers, and so are the shapes and pads that exporters
   compute from constants.
2. `RemoveUnused`: nodes that reach no output, and initializers that nothing reads.
3. `InferShapes`: shapes and types of all tensors, as far as ONNX can tell them. They serve the
   passes and are not exported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from passes.base import Pass, PassLog, run_passes
from passes.exchange import export_skeleton, import_graph, origin_of
from passes.wiring import Wiring, constant_value, element_type, is_standard, label

__all__ = ["FoldConstants", "InferShapes", "RemoveUnused", "import_with_shapes", "normalising"]

Array = NDArray[np.generic]
_GIB = 1 << 30


def normalising(max_bytes: int = _GIB) -> tuple[Pass, ...]:
    """Return the passes that normalise a graph, in order; `max_bytes` as in `FoldConstants`."""
    return FoldConstants(max_bytes), RemoveUnused(), InferShapes()


def import_with_shapes(model: onnx.ModelProto) -> gs.Graph:
    """Import a model that was normalised and exported, with the shapes that no export has.

    `passes.layers.find_layers` sees no shortcut without them, nor the activation behind it.

    Raises
    ------
    PassError
        As `import_graph`.
    """
    graph = import_graph(model)
    run_passes(graph, [InferShapes()])
    return graph


class FoldConstants(Pass):
    """Turn what is computed from constants alone, and by rearrangement alone, into initializers.

    The new initializer has the name of the tensor that it replaces. An output of the graph stays
    the output of a node. Subgraphs of If, Loop and Scan are left as they are.

    Parameters
    ----------
    max_bytes : int, default 1 GiB
        Largest tensor that is made, in bytes; larger ones stay computed.
    max_total_bytes : int, default 2 GiB
        The most that is made altogether, in bytes: no model beyond it fits one ONNX file.
    """

    name = "fold-constants"

    def __init__(self, max_bytes: int = _GIB, max_total_bytes: int = 2 * _GIB) -> None:
        self.max_bytes = max_bytes
        self.max_total_bytes = max_total_bytes

    def rewrite(self, graph: gs.Graph, log: PassLog) -> None:
        """Fold node by node, in topological order."""
        overridable = origin_of(graph).overridable
        wiring = Wiring(graph)
        left = self.max_total_bytes
        kept = []
        for node in graph.nodes:
            if not _is_constant_expression(node):
                kept.append(node)
                continue
            sources = [tensor.name for tensor in node.inputs if tensor.name in overridable]
            try:
                left -= self._fold(node, wiring, left)
            except ValueError as reason:
                log.skipped(label(node), str(reason))
                kept.append(node)
                continue
            # what passes an input on is replaced by that very input
            fixed = bool(sources) and node.op != "Identity"
            lost = f"; it no longer follows the input {', '.join(sources)}" if fixed else ""
            log.changed(label(node), f"{node.op} of constants became an initializer{lost}")
            node.outputs.clear()
            node.inputs.clear()
        graph.nodes = kept

    def _fold(self, node: gs.Node, wiring: Wiring, left: int) -> int:
        """Replace the output of `node`; return the bytes that this took, or raise ValueError."""
        output = node.outputs[0]
        if wiring.is_output(output):
            raise ValueError(f"{output.name!r} is an output of the model and stays computed")
        if node.op == "Identity":
            for consumer in wiring.consumers(output):
                for index, tensor in enumerate(consumer.inputs):
                    if tensor is output:
                        consumer.inputs[index] = node.inputs[0]
            return 0
        if node.op == "Constant" and "value" in node.attrs:
            output.to_constant(node.attrs["value"]._values)
            return 0
        inputs = [None if tensor.is_empty() else constant_value(tensor) for tensor in node.inputs]
        size = _result_bytes(node, inputs)
        if size > self.max_bytes or size > left:
            raise ValueError(
                f"its value of {size / _GIB:.2f} GiB is too large to be stored in the model"
            )
        value = _RULES[node.op](node, inputs)
        output.to_constant(np.ascontiguousarray(value).reshape(value.shape))
        return size


def _is_constant_expression(node: gs.Node) -> bool:
    return (
        is_standard(node)
        and (node.op in _RULES or node.op == "Identity")
        and len(node.outputs) == 1
        and all(t.is_empty() or isinstance(t, gs.Constant) for t in node.inputs)
    )


def _result_bytes(node: gs.Node, inputs: Sequence[Array | None]) -> int:
    if node.op == "ConstantOfShape":
        return math.prod(_integers(inputs[0])) * _fill_value(node).itemsize
    total = sum(value.nbytes for value in inputs if value is not None)
    if node.op == "Cast":
        return total // _operand(inputs).itemsize * _cast_type(node).itemsize
    return total


def _operand(inputs: Sequence[Array | None], index: int = 0) -> Array:
    value = inputs[index] if index < len(inputs) else None
    if value is None:
        raise ValueError(f"its operand {index} is no dense constant")
    return value


def _integers(value: Array | None) -> list[int]:
    """Return a shape, a list of axes or of indices as Python integers, which cannot overflow."""
    if value is None or value.ndim > 1 or value.dtype.kind not in "iu":
        raise ValueError("its shape, axes or indices are no dense list of integers")
    return [int(number) for number in value.reshape(-1)]


def _axes(node: gs.Node, inputs: Sequence[Array | None]) -> list[int] | None:
    """Axes of Squeeze and Unsqueeze: an attribute before opset 13, an input from then on."""
    if "axes" in node.attrs:
        return [int(axis) for axis in node.attrs["axes"]]
    if len(inputs) > 1 and not node.inputs[1].is_empty():
        return _integers(inputs[1])
    return None


def _constant(node: gs.Node, _: Sequence[Array | None]) -> Array:
    for name, dtype in (
        ("value_float", np.float32),
        ("value_floats", np.float32),
        ("value_int", np.int64),
        ("value_ints", np.int64),
        ("value_string", np.object_),
        ("value_strings", np.object_),
    ):
        if name in node.attrs:
            return np.array(node.attrs[name], dtype=dtype)
    raise ValueError("its value is no dense tensor")


def _fill_value(node: gs.Node) -> Array:
    if "value" not in node.attrs:
        return np.zeros(1, np.float32)
    return _operand([constant_value(node.attrs["value"])]).reshape(-1)[:1]


def _constant_of_shape(node: gs.Node, inputs: Sequence[Array | None]) -> Array:
    shape, fill = _integers(_operand(inputs)), _fill_value(node)
    return np.full(shape, fill[0], dtype=fill.dtype)


# Types that numpy computes with as ONNX does; bfloat16 and the 8-bit floats are not among them.
_NUMPY_TYPES = frozenset(
    {
        onnx.TensorProto.BOOL,
        onnx.TensorProto.INT8,
        onnx.TensorProto.INT16,
        onnx.TensorProto.INT32,
        onnx.TensorProto.INT64,
        onnx.TensorProto.UINT8,
        onnx.TensorProto.UINT16,
        onnx.TensorProto.UINT32,
        onnx.TensorProto.UINT64,
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.DOUBLE,
    }
)


def _cast_type(node: gs.Node) -> np.dtype[np.generic]:
    source, target = element_type(node.inputs[0]), int(node.attrs["to"])
    if source not in _NUMPY_TYPES or target not in _NUMPY_TYPES:
        names = [onnx.TensorProto.DataType.Name(kind) for kind in (source, target)]
        raise ValueError(f"a cast from {names[0]} to {names[1]} is left to the runtime")
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(target))


def _cast(node: gs.Node, inputs: Sequence[Array | None]) -> Array:
    value, target = _operand(inputs), _cast_type(node)
    if value.dtype.kind == "f" and target.kind in "iu":
        limits = np.iinfo(target.name)
        # Written so that NaN fails as well; limits of 64 bits are not floats, hence "<" above.
        whole = np.trunc(value.astype(np.float64))
        if not np.all((whole >= float(limits.min)) & (whole < float(limits.max) + 1.0)):
            raise ValueError(f"it casts numbers that {target} cannot hold")
    with np.errstate(over="ignore"):  # beyond the largest float is infinity, as in ONNX
        return value.astype(target)


def _reshape(node: gs.Node, inputs: Sequence[Array | None]) -> Array:
    value = _operand(inputs)
    wanted = node.attrs["shape"] if "shape" in node.attrs else _integers(_operand(inputs, 1))
    if node.attrs.get("allowzero", 0) == 0:
        if any(size == 0 and axis >= value.ndim for axis, size in enumerate(wanted)):
            raise ValueError(f"it cannot copy an axis that {list(value.shape)} lacks")
        wanted = [value.shape[axis] if size == 0 else size for axis, size in enumerate(wanted)]
    return value.reshape(wanted)


def _unsqueeze(node: gs.Node, inputs: Sequence[Array | None]) -> Array:
    axes = _axes(node, inputs)
    if axes is None:
        raise ValueError("its axes are missing")
    return np.expand_dims(_operand(inputs), tuple(axes))


def _squeeze(node: gs.Node, inputs: Sequence[Array | None]) -> Array:
    axes = _axes(node, inputs)
    return np.squeeze(_operand(inputs), None if axes is None else tuple(axes))


def _transpose(node: gs.Node, inputs: Sequence[Array | None]) -> Array:
    return np.transpose(_operand(inputs), node.attrs.get("perm"))


def _flatten(node: gs.Node, inputs: Sequence[Array | None]) -> Array:
    value, axis = _operand(inputs), int(node.attrs.get("axis", 1))
    if not -value.ndim <= axis <= value.ndim:
        raise ValueError(f"it flattens at axis {axis}, which {list(value.shape)} lacks")
    axis = axis + value.ndim if axis < 0 else axis
    return value.reshape(math.prod(value.shape[:axis]), math.prod(value.shape[axis:]))


def _concat(node: gs.Node, inputs: Sequence[Array | None]) -> Array:
    parts = [_operand(inputs, index) for index in range(len(inputs))]
    if len({part.dtype for part in parts}) != 1:  # numpy would promote, ONNX refuses
        raise ValueError("its operands differ in type")
    return np.concatenate(parts, axis=int(node.attrs.get("axis", 1)))


_TO_THE_END = (np.iinfo(np.int32).max, np.iinfo(np.int64).max)


def _slice(node: gs.Node, inputs: Sequence[Array | None]) -> Array:
    value = _operand(inputs)
    if "starts" in node.attrs:  # before opset 10
        starts, ends = list(node.attrs["starts"]), list(node.attrs["ends"])
        axes = list(node.attrs.get("axes", range(len(starts))))
        steps = [1] * len(starts)
    else:
        starts, ends = _integers(_operand(inputs, 1)), _integers(_operand(inputs, 2))
        given = [*node.inputs[3:], *[gs.Variable.empty()] * 2][:2]
        axes = list(range(len(starts))) if given[0].is_empty() else _integers(inputs[3])
        steps = [1] * len(starts) if given[1].is_empty() else _integers(inputs[4])
    if not len(starts) == len(ends) == len(axes) == len(steps):
        raise ValueError("its starts, ends, axes and steps differ in number")
    index = [slice(None)] * value.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if not -value.ndim <= axis < value.ndim:
            raise ValueError(f"it slices axis {axis}, which {list(value.shape)} lacks")
        index[axis] = _slice_of_axis(start, end, step, value.shape[axis])
    return value[tuple(index)]


def _slice_of_axis(start: int, end: int, step: int, size: int) -> slice:
    """Translate one axis of ONNX's Slice; Python clamps a start before the axis differently."""
    if step >= 0:
        return slice(start, end, step)
    if end in _TO_THE_END:
        raise ValueError("it slices backwards to the end, which runtimes read differently")
    start = min(max(start + size if start < 0 else start, 0), size - 1)
    end = end + size if end < 0 else end
    return slice(start, end if end >= 0 else None, step)


_RULES: dict[str, Callable[[gs.Node, Sequence[Array | None]], Array]] = {
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Cast": _cast,
    "Reshape": _reshape,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Flatten": _flatten,
    "Concat": _concat,
    "Slice": _slice,
}


class RemoveUnused(Pass):
    """Remove nodes that reach no output of the graph, and initializers that nothing reads."""

    name = "remove-unused"

    def rewrite(self, graph: gs.Graph, log: PassLog) -> None:
        """Walk back from the outputs; subgraphs keep all their nodes."""
        before = list(graph.nodes)
        graph.cleanup(recurse_subgraphs=False, recurse_functions=False)
        kept = {id(node) for node in graph.nodes}
        for node in before:
            if id(node) not in kept:
                # what its branches read would seem to be read still
                for subgraph in node.subgraphs(recursive=True):
                    for inner in subgraph.nodes:
                        inner.inputs.clear()
                log.changed(node.name or node.op, f"{node.op} was removed: it reaches no output")
        unused = origin_of(graph).unused
        for name in sorted(unused):
            log.changed(name, "the initializer was removed: nothing reads it")
        unused.clear()


class InferShapes(Pass):
    """Note the type and shape of every tensor, as far as ONNX infers them; best effort.

    A dynamic dimension stays dynamic: a name where it has one (equal names are equal sizes), or
    None.
    """

    name = "infer-shapes"

    def rewrite(self, graph: gs.Graph, log: PassLog) -> None:
        """Infer on the graph without its weights, which makes even large models quick."""
        try:
            inferred = onnx.shape_inference.infer_shapes(export_skeleton(graph), data_prop=True)
        except onnx.shape_inference.InferenceError as error:
            reason = str(error).splitlines()[0]
            log.skipped(graph.name, f"ONNX cannot infer the shapes of this graph: {reason}")
            return
        known = {value.name: value.type for value in inferred.graph.value_info}
        tensors = [tensor for node in graph.nodes for tensor in node.outputs]
        learnt = sum(_learn(tensor, known.get(tensor.name)) for tensor in tensors)
        if learnt:
            log.changed(graph.name, f"{learnt} tensors have a known shape now")
        for node in graph.nodes:
            if any(_is_opaque(tensor) and tensor.outputs for tensor in node.outputs):
                log.skipped(label(node), "the shape of its output is not known")


def _learn(tensor: gs.Tensor, kind: onnx.TypeProto | None) -> bool:
    """Take over type and shape where they say more than is known; return whether they did."""
    if kind is None or not kind.HasField("tensor_type") or not isinstance(tensor, gs.Variable):
        return False
    if element_type(tensor) is None and kind.tensor_type.elem_type:
        tensor.dtype = kind.tensor_type.elem_type  # as ONNX numbers it: numpy lacks some types
    if not kind.tensor_type.HasField("shape"):
        return False
    shape = [
        dim.dim_param or None if not dim.HasField("dim_value") else dim.dim_value
        for dim in kind.tensor_type.shape.dim
    ]
    if tensor.shape is not None and list(tensor.shape) == shape:
        return False
    tensor.shape = shape
    return True


def _is_opaque(tensor: gs.Tensor) -> bool:
    return bool(tensor.name) and isinstance(tensor, gs.Variable) and tensor.shape is None

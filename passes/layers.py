"""Find the linear layers of a graph: weight, response, activation, shortcut, and why not.

Every Conv, ConvTranspose, Gemm and MatMul is listed, the quantized and fused kinds of other
exporters too. One that cannot be converted carries the reason, in words for the person who asked.

What follows the layer is read off the graph: a constant bias that is added to the response belongs
to the layer; an Add with another computed tensor of the same shape is a shortcut, and the
activation then acts on the sum. An activation is recognised only where nothing else sees the tensor
before it, so that an error there shows nowhere else.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from passes.activation import IDENTITY, Activation
from passes.precision import INTEGER_OPERATORS
from passes.wiring import (
    Wiring,
    constant_value,
    element_type,
    fresh_name,
    is_standard,
    label,
    per_output,
)

__all__ = ["WIDEST", "Layer", "find_layers"]

Array = NDArray[np.generic]

WIDEST = 16_384
"""Most outputs of a layer that is converted: how its errors count takes the square of that, 2 GiB."""

_FIRST_OPSET = 7  # before it Gemm and Add broadcast by attributes
_LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_RANDOM = frozenset({"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike"})
_BLOCKED_DOMAIN = "com.microsoft.nchwc"  # of onnxruntime's optimised models
_FUSED = frozenset({"FusedConv", "FusedGemm", "FusedMatMul", "NhwcFusedConv"})


@dataclass(frozen=True, eq=False)
class Layer:
    """One linear layer, as plain data; arrays are not to be written to.

    Attributes
    ----------
    name : str
        Name of the node; that of its output tensor where it has none or shares it with another.
    op : str
        Operator: "Conv", "Gemm", "MatMul", or one that is only listed.
    weight : ndarray or None
        (N, C, *kernel) for Conv, with C the channels of one group; (N, C) for Gemm and MatMul,
        however it is stored and with Gemm's alpha. None where it is not a constant.
    bias : ndarray of shape (N,) or None
        Everything constant that is added to the response: the bias, with Gemm's beta, and a
        constant Add behind the node. None where there is nothing.
    input, output, response : str
        Tensors: what the node reads, what it writes, and what is written once the whole bias is
        added. The last two differ where the bias is added by a node of its own.
    strides, pads, dilations : tuple of int
        As in ONNX, pads at the beginning of all axes first; empty for Gemm and MatMul, and where
        neither the node nor a constant weight says how many axes there are.
    auto_pad : str
        "NOTSET", "SAME_UPPER", "SAME_LOWER" or "VALID".
    group : int
        Groups of the Conv.
    shortcut, sum : str or None
        The tensor that is added to the response, and their sum, where nothing but that Add sees
        the response.
    activation : Activation
        The function that acts on the sum, or on the response where there is no shortcut.
    activated : str
        Tensor after the activation; the one before it where it is the identity.
    reason : str or None
        Why the layer cannot be converted; None where it can.
    """

    name: str
    op: str
    weight: Array | None
    bias: NDArray[np.float32] | None
    input: str
    output: str
    response: str
    strides: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    auto_pad: str = "NOTSET"
    group: int = 1
    shortcut: str | None = None
    sum: str | None = None
    activation: Activation = IDENTITY
    activated: str = ""
    reason: str | None = None


class _NotConvertibleError(Exception):
    """Why a layer is left as it is."""


def find_layers(graph: gs.Graph) -> tuple[Layer, ...]:
    """List the linear layers of a graph, in the order of its nodes.

    Normalise the graph and fold BatchNormalization first: weights that are not initializers yet
    count as computed, and without shapes no shortcut is recognised.

    Parameters
    ----------
    graph : gs.Graph
        A graph from `import_graph`; it is not changed.

    Returns
    -------
    tuple of Layer
        Those in subgraphs of If, Loop and Scan and in model-local functions are listed too, with
        that as their reason, and without what follows them.
    """
    found = list(_linear_nodes(graph))
    count = Counter(node.name for node, _ in found)
    wiring, unfed = Wiring(graph), _unfed(graph)
    layers: list[Layer] = []
    taken: set[str] = set()
    for node, place in found:
        unique = node.name and count[node.name] == 1
        name = node.name if unique else next((t.name for t in node.outputs), node.name)
        name = fresh_name(taken, name)  # a node may be called as what another one writes
        if place is None:
            layer = _read_layer(graph, node, name, wiring)
            if layer.reason is None and id(node) in unfed:
                reason = "no input of the model reaches it, so it is the same for every image"
                layer = dataclasses.replace(layer, reason=reason)
            layers.append(layer)
        else:
            output = next((tensor.name for tensor in node.outputs), "")
            layers.append(
                Layer(
                    name=name,
                    op=node.op,
                    weight=_any_weight(node),
                    bias=None,
                    input=next((tensor.name for tensor in node.inputs), ""),
                    output=output,
                    response=output,
                    group=_stated_group(node),
                    activated=output,
                    reason=f"it lies in {place}, which is left as it is",
                )
            )
    return tuple(layers)


def _unfed(graph: gs.Graph) -> set[int]:
    """Ids of the nodes that compute the same whatever the model is fed; one with a body may read anything."""
    fed = {id(tensor) for tensor in graph.inputs}
    unfed = set()
    for node in graph.nodes:
        alone = not any(id(tensor) in fed for tensor in node.inputs)
        if alone and not any(True for _ in node.subgraphs()) and node.op not in _RANDOM:
            unfed.add(id(node))
        else:
            fed.update(id(tensor) for tensor in node.outputs)
    return unfed


def _linear_nodes(graph: gs.Graph) -> Iterator[tuple[gs.Node, str | None]]:
    """Yield the linear nodes with where they lie; None for the main graph."""
    yield from _nodes_below(graph, None)
    for function in graph.functions:
        yield from _nodes_below(function, f"the model-local function {function.name!r}")


def _nodes_below(graph: gs.Graph, place: str | None) -> Iterator[tuple[gs.Node, str | None]]:
    for node in graph.nodes:
        if _is_linear(node):
            yield node, place
        for subgraph in node.subgraphs():
            yield from _nodes_below(subgraph, place or f"a subgraph of {label(node)!r} ({node.op})")


def _is_linear(node: gs.Node) -> bool:
    if node.op in _LINEAR:
        return is_standard(node) or node.domain == _BLOCKED_DOMAIN
    return node.op in INTEGER_OPERATORS or node.op in _FUSED


def _read_layer(graph: gs.Graph, node: gs.Node, name: str, wiring: Wiring) -> Layer:
    reason = None
    bias = None
    response = node.outputs[0]
    try:
        _refuse_operator(graph, node)
        _refuse_computed(node)
        _refuse_shared(node, wiring)
        readable = _weight(node)
        bias, response = _whole_bias(node, readable, wiring)
        weight: Array | None = readable
    except _NotConvertibleError as error:
        reason = str(error)
        weight = _any_weight(node)
    shortcut, total = _shortcut(response, wiring)
    activation, activated = _activation(total or response, wiring)
    axes = weight.ndim - 2 if weight is not None else 0
    return Layer(
        name=name,
        op=node.op,
        weight=weight,
        bias=bias,
        input=node.inputs[0].name,
        output=node.outputs[0].name,
        response=response.name,
        strides=tuple(node.attrs.get("strides", [1] * axes)),
        pads=tuple(node.attrs.get("pads", [0] * 2 * axes)),
        dilations=tuple(node.attrs.get("dilations", [1] * axes)),
        auto_pad=str(node.attrs.get("auto_pad", "NOTSET")),
        group=int(node.attrs.get("group", 1)),
        shortcut=None if shortcut is None else shortcut.name,
        sum=None if total is None else total.name,
        activation=activation,
        activated=activated.name,
        reason=reason,
    )


def _any_weight(node: gs.Node) -> Array | None:
    """Return the weight of a layer that stays as it is, for its shape; None where unknown."""
    if not is_standard(node) or node.op not in _LINEAR or len(node.inputs) < 2:
        return None
    value = constant_value(node.inputs[1])
    return None if value is None else _outputs_first(node, value)


def _outputs_first(node: gs.Node, weight: Array) -> Array | None:
    """Bring a stored weight into the layout (N, C, …); None where it has no such layout."""
    if node.op in ("Gemm", "MatMul"):
        if weight.ndim != 2:
            return None
        return weight if node.attrs.get("transB", 0) else np.transpose(weight)
    if weight.ndim < 3:
        return None
    if node.op == "ConvTranspose":
        return weight.swapaxes(0, 1) if node.attrs.get("group", 1) == 1 else None
    return weight


def _stated_group(node: gs.Node) -> int:
    """Return the groups of a Conv; 1 where a function leaves them to its caller."""
    group = node.attrs.get("group", 1)
    return group if isinstance(group, int) else 1


def _refuse_operator(graph: gs.Graph, node: gs.Node) -> None:
    if node.op in INTEGER_OPERATORS:
        raise _NotConvertibleError(
            "it is already quantized; convert the float model and quantize the result"
        )
    if node.op in _FUSED or not is_standard(node):
        raise _NotConvertibleError(
            "it was fused by a runtime's optimiser; convert the model as it was before that"
        )
    if graph.opset < _FIRST_OPSET:
        raise _NotConvertibleError(
            f"the model's opset {graph.opset} is older than {_FIRST_OPSET}; "
            "update it with onnx.version_converter"
        )
    if node.op == "ConvTranspose":
        raise _NotConvertibleError("ConvTranspose is not supported")
    if node.op == "Gemm" and node.attrs.get("transA", 0):
        raise _NotConvertibleError("its input is transposed (transA=1)")


def _refuse_computed(node: gs.Node) -> None:
    """Refuse a node unless its first operand is computed and its second a dense constant."""
    first, second = node.inputs[0], node.inputs[1]
    for tensor, role in ((second, "weight"), (first, "input")):
        if any(producer.op == "DequantizeLinear" for producer in tensor.inputs):
            raise _NotConvertibleError(
                f"its {role} is already quantized (DequantizeLinear); "
                "convert the float model and quantize the result"
            )
    if isinstance(first, gs.Constant):
        raise _NotConvertibleError(
            "its input is a constant"
            if isinstance(second, gs.Constant) or node.op == "Conv"
            else "its constant is the first operand; only a constant second operand is a weight"
        )
    if isinstance(second, gs.Constant):
        return
    if second.inputs:
        producer = second.inputs[0]
        raise _NotConvertibleError(
            f"its weight is computed in the model, by {label(producer)!r} ({producer.op})"
        )
    raise _NotConvertibleError(
        f"its weight {second.name!r} is an input of the model without a value"
    )


def _refuse_shared(node: gs.Node, wiring: Wiring) -> None:
    weight = node.inputs[1]
    others = [label(other) for other in wiring.consumers(weight) if other is not node]
    if others:
        raise _NotConvertibleError(f"its weight {weight.name!r} is shared with {others[0]!r}")
    if wiring.is_output(weight):
        raise _NotConvertibleError(f"its weight {weight.name!r} is an output of the model")


def _weight(node: gs.Node) -> Array:
    """Return the weight in the layout (N, C, …), alpha included."""
    kind = element_type(node.inputs[1])
    if kind != onnx.TensorProto.FLOAT:
        name = onnx.TensorProto.DataType.Name(kind).lower()
        raise _NotConvertibleError(
            f"its weight is {name}; only float32 is converted, so export the model in float32"
        )
    stored = constant_value(node.inputs[1])
    if stored is None:
        raise _NotConvertibleError(
            f"its weight {node.inputs[1].name!r} is a sparse initializer; store it densely"
        )
    weight = _outputs_first(node, stored)
    if weight is None:
        wanted = "a kernel" if node.op == "Conv" else "a matrix"
        raise _NotConvertibleError(f"its weight of shape {list(stored.shape)} is not {wanted}")
    group = int(node.attrs.get("group", 1))
    if group != 1:
        raise _NotConvertibleError(
            "it is a depthwise Conv" if weight.shape[1] == 1 else f"it is a Conv of {group} groups"
        )
    if 0 in stored.shape:
        raise _NotConvertibleError(f"its weight of shape {list(stored.shape)} is empty")
    if not np.isfinite(stored).all():
        raise _NotConvertibleError("its weight holds NaN or infinity")
    if len(weight) > WIDEST:
        raise _NotConvertibleError(f"it has {len(weight)} outputs, more than {WIDEST}")
    alpha = float(node.attrs.get("alpha", 1.0)) if node.op == "Gemm" else 1.0
    if alpha != 1.0:
        weight = (weight.astype(np.float64) * alpha).astype(np.float32)
    return weight


def _own_bias(node: gs.Node, outputs: int) -> NDArray[np.float64] | None:
    """Return the bias of the node itself as one number for each output, beta included."""
    if len(node.inputs) < 3 or node.inputs[2].is_empty():
        return None
    value = constant_value(node.inputs[2])
    if value is None:
        raise _NotConvertibleError(f"its bias {node.inputs[2].name!r} is computed in the model")
    rank = 2 if node.op == "Gemm" else 1
    bias = per_output(value, rank=rank, axis=rank - 1, size=outputs)
    if bias is None:
        raise _NotConvertibleError(
            f"its bias of shape {list(value.shape)} is not one number for each output"
        )
    if not np.isfinite(bias).all():
        raise _NotConvertibleError("its bias holds NaN or infinity")
    return bias * float(node.attrs.get("beta", 1.0)) if node.op == "Gemm" else bias


def _whole_bias(
    node: gs.Node, weight: Array, wiring: Wiring
) -> tuple[NDArray[np.float32] | None, gs.Tensor]:
    """Return the bias, with a constant Add behind the node taken in, and the tensor after it."""
    bias = _own_bias(node, len(weight))
    response = node.outputs[0]
    follower = wiring.sole_consumer(response)
    if follower is not None and follower.op == "Add" and is_standard(follower):
        added = _added_bias(node, follower, weight)
        if added is not None:
            bias = added if bias is None else bias + added
            response = follower.outputs[0]
    return (None if bias is None else bias.astype(np.float32)), response


def _added_bias(node: gs.Node, add: gs.Node, weight: Array) -> NDArray[np.float64] | None:
    constants = [tensor for tensor in add.inputs if isinstance(tensor, gs.Constant)]
    value = constant_value(constants[0]) if len(constants) == 1 else None
    if value is None or value.dtype != np.float32 or not np.isfinite(value).all():
        return None
    if node.op == "MatMul":
        # The last axis; where the rank is not known, only a vector cannot add axes of its own.
        shape = node.outputs[0].shape
        rank = 1 if shape is None else len(shape)
        return per_output(value, rank=rank, axis=rank - 1, size=len(weight)) if rank else None
    rank = 2 if node.op == "Gemm" else weight.ndim
    return per_output(value, rank=rank, axis=1, size=len(weight))


def _shortcut(response: gs.Tensor, wiring: Wiring) -> tuple[gs.Tensor | None, gs.Tensor | None]:
    """Return what is added to the response, and the sum; None where there is no such Add."""
    add = wiring.sole_consumer(response)
    if add is None or not is_standard(add) or add.op not in ("Add", "Sum"):
        return None, None
    others = [tensor for tensor in add.inputs if tensor is not response]
    if len(add.inputs) != 2 or len(others) != 1 or isinstance(others[0], gs.Constant):
        return None, None
    if not _same_shape(response, others[0]):
        return None, None
    return others[0], add.outputs[0]


def _same_shape(first: gs.Tensor, second: gs.Tensor) -> bool:
    """Whether both shapes are known and equal; equal names of dimensions are equal sizes."""
    if first.shape is None or second.shape is None or None in first.shape:
        return False
    return list(first.shape) == list(second.shape)


def _activation(tensor: gs.Tensor, wiring: Wiring) -> tuple[Activation, gs.Tensor]:
    """Return the activation that acts on `tensor`, and the tensor after it."""
    readers = wiring.inner_consumers(tensor)
    if readers is None or not all(is_standard(node) for node in readers):
        return IDENTITY, tensor
    found = None
    if len(readers) == 1:
        found = _single_activation(readers[0], tensor)
    elif len(readers) == 2:
        found = _gated_activation(readers, tensor, wiring)
    return (IDENTITY, tensor) if found is None else found


def _single_activation(node: gs.Node, tensor: gs.Tensor) -> tuple[Activation, gs.Tensor] | None:
    if not node.inputs or node.inputs[0] is not tensor:
        return None
    if node.op == "Relu":
        return Activation("relu"), node.outputs[0]
    if node.op == "LeakyRelu":
        slope = float(node.attrs.get("alpha", 0.01))
        return Activation("leaky_relu", slope=slope), node.outputs[0]
    if node.op == "HardSwish":
        return Activation("hard_swish"), node.outputs[0]
    if node.op == "Swish" and node.attrs.get("alpha", 1.0) == 1.0:
        return Activation("silu"), node.outputs[0]
    if node.op == "Clip":
        bounds = _clip_bounds(node)
        return None if bounds is None else (Activation("clip", *bounds), node.outputs[0])
    return None


def _clip_bounds(node: gs.Node) -> tuple[float, float] | None:
    """Bounds of a Clip: attributes before opset 11, inputs from then on; None where computed."""
    bounds = [
        float(node.attrs.get("min", -math.inf)),
        float(node.attrs.get("max", math.inf)),
    ]
    for index, tensor in enumerate(node.inputs[1:3]):
        if tensor.is_empty():
            continue
        value = constant_value(tensor)
        if value is None or value.size != 1:
            return None
        bounds[index] = float(value.reshape(-1)[0])
    largest = float(np.finfo(np.float32).max)  # how exporters write "no bound"
    low = -math.inf if bounds[0] <= -largest else bounds[0]
    high = math.inf if bounds[1] >= largest else bounds[1]
    return (low, high) if low <= high else None


def _gated_activation(
    readers: list[gs.Node], tensor: gs.Tensor, wiring: Wiring
) -> tuple[Activation, gs.Tensor] | None:
    """Recognise x · gate(x), where x is read by the Mul and by the first node of the gate."""
    products = [node for node in readers if node.op == "Mul"]
    gates = [node for node in readers if node.op != "Mul"]
    if len(products) != 1 or len(gates) != 1:
        return None
    product, gate = products[0], gates[0]
    if gate.op == "Sigmoid" and _multiplies(product, tensor, gate.outputs[0], wiring):
        return Activation("silu"), product.outputs[0]
    if (
        gate.op == "HardSigmoid"
        and math.isclose(gate.attrs.get("alpha", 0.2), 1 / 6, rel_tol=1e-6)
        and math.isclose(gate.attrs.get("beta", 0.5), 0.5, rel_tol=1e-6)
        and _multiplies(product, tensor, gate.outputs[0], wiring)
    ):
        return Activation("hard_swish"), product.outputs[0]
    if gate.op == "Add" and _scalar_operand(gate, tensor) == 3.0:
        return _written_out_hard_swish(gate, product, tensor, wiring)
    return None


def _written_out_hard_swish(
    gate: gs.Node, product: gs.Node, tensor: gs.Tensor, wiring: Wiring
) -> tuple[Activation, gs.Tensor] | None:
    """Recognise x · Clip(x + 3, 0, 6) / 6, divided after the product or before it."""
    clip = wiring.sole_consumer(gate.outputs[0])
    if clip is None or clip.op != "Clip" or _clip_bounds(clip) != (0.0, 6.0):
        return None
    clipped = clip.outputs[0]
    if _multiplies(product, tensor, clipped, wiring):
        sixth = wiring.sole_consumer(product.outputs[0])
        if sixth is not None and _divides_by_six(sixth, product.outputs[0]):
            return Activation("hard_swish"), sixth.outputs[0]
        return None
    sixth = wiring.sole_consumer(clipped)
    if (
        sixth is not None
        and _divides_by_six(sixth, clipped)
        and _multiplies(product, tensor, sixth.outputs[0], wiring)
    ):
        return Activation("hard_swish"), product.outputs[0]
    return None


def _multiplies(product: gs.Node, first: gs.Tensor, second: gs.Tensor, wiring: Wiring) -> bool:
    """Whether `product` is first · second, and alone in seeing the second."""
    operands = list(product.inputs)
    return (
        len(operands) == 2
        and any(tensor is first for tensor in operands)
        and any(tensor is second for tensor in operands)
        and wiring.sole_consumer(second) is product
    )


def _scalar_operand(node: gs.Node, tensor: gs.Tensor) -> float | None:
    """Value of the other operand of an elementwise node, where it is one constant number."""
    others = [other for other in node.inputs if other is not tensor]
    value = constant_value(others[0]) if len(others) == 1 else None
    return None if value is None or value.size != 1 else float(value.reshape(-1)[0])


def _divides_by_six(node: gs.Node, tensor: gs.Tensor) -> bool:
    value = _scalar_operand(node, tensor)
    if value is None:
        return False
    if node.op == "Div":
        return node.inputs[0] is tensor and value == 6.0
    return node.op == "Mul" and math.isclose(value, 1 / 6, rel_tol=1e-6)

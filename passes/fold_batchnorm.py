r"""Fold BatchNormalization, and other constant scales and shifts, into the Conv or Gemm before it.

BatchNormalization computes γ (y − μ) / √(σ² + ε) + β for each channel of y = W x + b. With
s = γ / √(σ² + ε) this is the layer W' = s W, b' = s (b − μ) + β, scaled along the output axis of W.
Mul, Add, Sub and Div by a constant that varies along the channels only are the same with (s, t) of
their own; Caffe's Scale layers arrive as BatchNormalization → Mul → Add. A chain of these composes
to one (s, t) in float64, is applied once, and is stored in float32. Grouped and depthwise Convs
fold just so: each output channel has its own s.

The tensor that the chain ends with keeps its name, so nothing downstream changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from passes.base import Pass, PassLog
from passes.exchange import origin_of
from passes.wiring import (
    Wiring,
    constant_value,
    element_type,
    fresh_name,
    is_standard,
    label,
    names_in,
    per_output,
    replace_nodes,
)

__all__ = ["FoldBatchNorm"]

_ARITHMETIC = frozenset({"Mul", "Add", "Sub", "Div"})
_FIRST_OPSET = 7  # before it operators broadcast, and normalise, by attributes
_OUTPUT_AXIS = 1  # of the response, (batch, outputs, …), for Conv as for Gemm


class _NotFoldableError(Exception):
    """Why a node is left alone."""


@dataclass(frozen=True)
class _Affine:
    """y ↦ scale · y + shift, one value for each output; float64."""

    scale: NDArray[np.float64]
    shift: NDArray[np.float64]

    def then(self, after: _Affine) -> _Affine:
        return _Affine(after.scale * self.scale, after.scale * self.shift + after.shift)

    def is_finite(self) -> bool:
        return bool(np.isfinite(self.scale).all() and np.isfinite(self.shift).all())


class FoldBatchNorm(Pass):
    """Fold what scales and shifts the outputs of a Conv or Gemm into its weight and bias.

    Only float32 layers whose weight is a constant of their own; the response between the two must
    have no other consumer. Whatever stays is noted with its reason.
    """

    name = "fold-batchnorm"

    def rewrite(self, graph: gs.Graph, log: PassLog) -> None:
        """Fold layer by layer, each with all that follows it."""
        if graph.opset < _FIRST_OPSET:
            log.skipped(graph.name, f"opset {graph.opset} is too old; at least {_FIRST_OPSET}")
            return
        wiring = Wiring(graph)
        names = names_in(graph)
        overridable = origin_of(graph).overridable
        for node in list(graph.nodes):
            if is_standard(node) and node.op in ("Conv", "Gemm"):
                _fold_chain(graph, node, wiring, names, overridable, log)
        noted = {skip.node for skip in log.skips}
        for node in graph.nodes:
            if node.op == "BatchNormalization" and label(node) not in noted:
                log.skipped(label(node), _why_left(node, wiring))


def _fold_chain(
    graph: gs.Graph,
    node: gs.Node,
    wiring: Wiring,
    names: set[str],
    overridable: frozenset[str],
    log: PassLog,
) -> None:
    first = wiring.sole_consumer(node.outputs[0])
    if first is None or not _is_candidate(first, node.outputs[0]):
        return
    try:
        weight = _weight(node, wiring)
        bias = _bias(node, weight)
        chain, affine = _collect(node, weight, wiring, log)
        new_weight, new_bias = _folded(node, weight, bias, affine)
    except _NotFoldableError as reason:
        log.skipped(label(first), f"it stays behind {label(node)!r}: {reason}")
        return
    if not chain:
        return
    own = [node.inputs[1], *node.inputs[2:3]]
    for folded in chain:
        what = f"{folded.op} was folded into {label(node)!r}"
        read = (*folded.inputs, *(own if folded is chain[0] else ()))
        lost = [tensor.name for tensor in read if tensor.name in overridable]
        if lost:
            what += f"; the model no longer has the input {', '.join(lost)}"
        log.changed(label(folded), what)
    if node.inputs[1].name in overridable:
        # what a caller may feed in its place is not scaled
        name = fresh_name(names, f"{label(node)}/weight")
        node.inputs[1] = gs.Constant(name, new_weight)
    else:
        node.inputs[1].values = new_weight
    _set_bias(node, new_bias, wiring, names, overridable)
    end = chain[-1].outputs[0]
    replace_nodes(graph, chain, ())
    node.outputs = [end]


def _is_candidate(node: gs.Node, response: gs.Tensor) -> bool:
    if not is_standard(node):
        return False
    if node.op == "BatchNormalization":
        return True
    return node.op in _ARITHMETIC and any(
        isinstance(tensor, gs.Constant) for tensor in node.inputs if tensor is not response
    )


def _output_axis(node: gs.Node) -> int:
    """Axis of the weight along which the outputs lie."""
    return 1 if node.op == "Gemm" and not node.attrs.get("transB", 0) else 0


def _weight(node: gs.Node, wiring: Wiring) -> NDArray[np.generic]:
    tensor = node.inputs[1]
    value = constant_value(tensor)
    if value is None:
        raise _NotFoldableError("its weight is not a constant")
    if element_type(tensor) != onnx.TensorProto.FLOAT:
        raise _NotFoldableError(f"its weight is {value.dtype}, not float32")
    if wiring.is_output(tensor):
        raise _NotFoldableError(f"its weight {tensor.name!r} is an output of the model")
    others = [label(other) for other in wiring.consumers(tensor) if other is not node]
    if others:
        raise _NotFoldableError(f"its weight {tensor.name!r} is shared with {others[0]!r}")
    return value


def _bias(node: gs.Node, weight: NDArray[np.generic]) -> NDArray[np.float64]:
    outputs = weight.shape[_output_axis(node)]
    if len(node.inputs) < 3 or node.inputs[2].is_empty():
        return np.zeros(outputs)
    value = constant_value(node.inputs[2])
    if value is None:
        raise _NotFoldableError("its bias is not a constant")
    rank = 2 if node.op == "Gemm" else 1
    bias = per_output(value, rank=rank, axis=rank - 1, size=outputs)
    if bias is None:
        raise _NotFoldableError(f"its bias of shape {list(value.shape)} differs from row to row")
    return bias * float(node.attrs.get("beta", 1.0)) if node.op == "Gemm" else bias


def _collect(
    node: gs.Node, weight: NDArray[np.generic], wiring: Wiring, log: PassLog
) -> tuple[list[gs.Node], _Affine]:
    """Follow the chain after `node` as far as it folds."""
    rank = 2 if node.op == "Gemm" else weight.ndim
    outputs = weight.shape[_output_axis(node)]
    chain: list[gs.Node] = []
    affine = _Affine(np.ones(outputs), np.zeros(outputs))
    response = node.outputs[0]
    while True:
        follower = wiring.sole_consumer(response)
        if follower is None or not _is_candidate(follower, response):
            return chain, affine
        try:
            if follower.op == "BatchNormalization":
                step = _batch_normalization(follower, outputs)
            else:
                step = _arithmetic(follower, response, rank, outputs)
            longer = affine.then(step)
            if not longer.is_finite():
                raise _NotFoldableError("its scale or shift is not finite")
        except _NotFoldableError as reason:
            log.skipped(label(follower), f"it stays behind {label(node)!r}: {reason}")
            return chain, affine
        chain.append(follower)
        affine = longer
        response = follower.outputs[0]


def _batch_normalization(node: gs.Node, outputs: int) -> _Affine:
    if node.attrs.get("training_mode", 0) or any(t.name for t in node.outputs[1:]):
        raise _NotFoldableError("it is in training mode; export the model for inference")
    if not node.attrs.get("spatial", 1):
        raise _NotFoldableError("it normalises each position by itself (spatial=0)")
    values = [constant_value(tensor) for tensor in node.inputs[1:5]]
    parameters = []
    for tensor, value in zip(node.inputs[1:5], values, strict=True):
        if value is None:
            raise _NotFoldableError(f"its parameter {tensor.name!r} is not a constant")
        if value.dtype != np.float32:
            raise _NotFoldableError(f"its parameter {tensor.name!r} is {value.dtype}, not float32")
        if value.shape != (outputs,):
            raise _NotFoldableError(f"its parameter {tensor.name!r} is not one for each channel")
        parameters.append(value.astype(np.float64))
    gamma, beta, mean, variance = parameters
    spread = variance + float(node.attrs.get("epsilon", 1e-5))
    if not np.all(spread > 0):
        raise _NotFoldableError("its variance is not above 0 in every channel")
    scale = gamma / np.sqrt(spread)
    return _Affine(scale, beta - scale * mean)


def _arithmetic(node: gs.Node, response: gs.Tensor, rank: int, outputs: int) -> _Affine:
    position = next(i for i, tensor in enumerate(node.inputs) if isinstance(tensor, gs.Constant))
    value = constant_value(node.inputs[position])
    if value is None or value.dtype != np.float32:
        raise _NotFoldableError("its constant is not a dense float32 tensor")
    operand = per_output(value, rank=rank, axis=_OUTPUT_AXIS, size=outputs)
    if operand is None:
        raise _NotFoldableError(
            f"its constant of shape {list(value.shape)} is not one number for each channel"
        )
    one, zero = np.ones(outputs), np.zeros(outputs)
    if node.op == "Mul":
        return _Affine(operand, zero)
    if node.op == "Add":
        return _Affine(one, operand)
    if node.op == "Sub":
        return _Affine(one, -operand) if position == 1 else _Affine(-one, operand)
    if position == 0:
        raise _NotFoldableError(f"it divides by {response.name!r}")
    if not np.all(operand):
        raise _NotFoldableError("it divides by 0")
    return _Affine(one / operand, zero)


def _folded(
    node: gs.Node,
    weight: NDArray[np.generic],
    bias: NDArray[np.float64],
    affine: _Affine,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    # (N,) → (N, 1, …) for Conv and transposed Gemm, (1, N) for Gemm
    shape = [1] * weight.ndim
    shape[_output_axis(node)] = -1
    with np.errstate(over="ignore"):  # told below, as the reason
        new_weight = (weight.astype(np.float64) * affine.scale.reshape(shape)).astype(np.float32)
        new_bias = (affine.scale * bias + affine.shift).astype(np.float32)
    if not (np.isfinite(new_weight).all() and np.isfinite(new_bias).all()):
        raise _NotFoldableError("the folded weight would not be finite in float32")
    return new_weight, new_bias


def _set_bias(
    node: gs.Node,
    bias: NDArray[np.float32],
    wiring: Wiring,
    names: set[str],
    overridable: frozenset[str],
) -> None:
    """Give `node` the bias: in place where the old one is its own, else as a new constant."""
    if node.op == "Gemm":
        node.attrs["beta"] = 1.0
    if len(node.inputs) > 2 and not node.inputs[2].is_empty():
        old = node.inputs[2]
        own = wiring.sole_consumer(old) is node and list(old.inputs) == []
        if own and old.name not in overridable:
            old.values = bias
            return
        del node.inputs[2]
    elif len(node.inputs) > 2:
        del node.inputs[2]
    node.inputs.append(gs.Constant(fresh_name(names, f"{label(node)}/bias"), bias))


def _why_left(node: gs.Node, wiring: Wiring) -> str:
    source = node.inputs[0]
    if not source.inputs:
        return f"its input {source.name!r} comes from no Conv or Gemm"
    producer = source.inputs[0]
    if producer.op == "ConvTranspose":
        return f"its input comes from the ConvTranspose {label(producer)!r}, which is left alone"
    if producer.op not in ("Conv", "Gemm"):
        return f"its input comes from {label(producer)!r} ({producer.op}), not from a Conv or Gemm"
    if wiring.is_output(source):
        return f"the response {source.name!r} before it is an output of the model"
    return f"the response {source.name!r} before it has other consumers"

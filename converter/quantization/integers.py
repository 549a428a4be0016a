"""Static int8: QuantizeLinear and DequantizeLinear around every operator, by onnxruntime's quantizer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

from converter.errors import ModelError
from converter.preparation import normalised_model

__all__ = [
    "ARITHMETICS",
    "Arithmetic",
    "in_int8",
    "layer_groups",
    "quantizable_tensors",
    "ready_for_int8",
]

_OPERATORS = frozenset({*QDQRegistry, *QLinearOpsRegistry})
"""What onnxruntime's quantizer quantizes."""
_LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_LEAST_OPSET = 13
"""The first whose DequantizeLinear has a scale for each channel."""


@dataclass(frozen=True)
class Arithmetic:
    """Integer types of a quantized model.

    Attributes
    ----------
    name : str
    activation, weight : QuantType
    reduced : bool, default False
        Whether weights have 7 bits: where the processor adds two products of 8 bits in 16, they
        saturate otherwise.
    """

    name: str
    activation: QuantType
    weight: QuantType
    reduced: bool = False


ARITHMETICS = (
    Arithmetic("u8 × s8", QuantType.QUInt8, QuantType.QInt8),
    Arithmetic("u8 × s7", QuantType.QUInt8, QuantType.QInt8, reduced=True),
    Arithmetic("u8 × u8", QuantType.QUInt8, QuantType.QUInt8),
    Arithmetic("s8 × s8", QuantType.QInt8, QuantType.QInt8),
)
"""Activations × weights: the product of x86, the same without saturation, and those of other processors."""


def ready_for_int8(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """Give the model in the form that is quantized: normalised, every node named, shapes inferred.

    Parameters
    ----------
    model : onnx.ModelProto
        It is not changed.
    path : Path
        Where it came from, for messages.

    Raises
    ------
    ModelError
        Where its opset is too old and cannot be raised.
    """
    ready = normalised_model(model, path)
    opset = next(each for each in ready.opset_import if each.domain in ("", "ai.onnx"))
    if opset.version < _LEAST_OPSET:
        try:
            ready = onnx.version_converter.convert_version(ready, _LEAST_OPSET)
        except Exception as error:  # a C++ library that raises what it likes
            raise ModelError(
                f"{path} has opset {opset.version}, int8 needs {_LEAST_OPSET}, and onnx cannot raise it: "
                f"{' '.join(str(error).split())}; export the model with a newer opset"
            ) from error
    taken: set[str] = set()
    for index, node in enumerate(ready.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}#{index}"
        taken.add(node.name)
    return onnx.shape_inference.infer_shapes(ready)


def quantizable_tensors(model: onnx.ModelProto) -> list[str]:
    """Name the float tensors that a range is needed of: read or written by an operator that is quantized."""
    stored = {tensor.name for tensor in model.graph.initializer}
    graph = model.graph
    floats = {
        value.name
        for value in (*graph.input, *graph.value_info, *graph.output)
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }
    named = (
        name
        for node in graph.node
        if node.op_type in _OPERATORS
        for name in (*node.input, *node.output)
    )
    return [name for name in dict.fromkeys(named) if name in floats - stored]


def layer_groups(model: onnx.ModelProto, most: int) -> list[tuple[str, ...]]:
    """Part the nodes that are quantized into runs of neighbours, each with a linear layer or a few.

    What follows a layer (its activation, its sum, its pooling) is in its group.

    Parameters
    ----------
    model : onnx.ModelProto
    most : int
        Groups at most, from 1; where there are more layers, groups have several.

    Returns
    -------
    list of tuple of str
        Names of nodes.
    """
    layers: list[list[str]] = [[]]
    seen = False
    for node in model.graph.node:
        if node.op_type not in _OPERATORS:
            continue
        if node.op_type in _LINEAR:
            if seen:
                layers.append([])
            seen = True
        layers[-1].append(node.name)
    groups: list[list[str]] = [[] for _ in range(min(most, len(layers)))]
    for index, names in enumerate(layers):
        groups[index * len(groups) // len(layers)] += names
    return [tuple(names) for names in groups if names]


def in_int8(
    model: onnx.ModelProto,
    ranges: TensorsData,
    arithmetic: Arithmetic,
    left: Collection[str] = (),
) -> onnx.ModelProto:
    """Quantize a model that is `ready_for_int8`.

    Weights get a scale for each output channel, biases are int32, and each branch of a sum has a range of
    its own.

    Parameters
    ----------
    model : onnx.ModelProto
        It is not changed.
    ranges : TensorsData
        Of its `quantizable_tensors`.
    arithmetic : Arithmetic
    left : collection of str
        Nodes that stay in float.

    Raises
    ------
    ModelError
        Where onnxruntime's quantizer refuses the model.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    try:
        return _quantized(copy, ranges, arithmetic, left)
    except Exception as error:  # asserts, ValueErrors and RuntimeErrors of a library
        raise ModelError(
            f"onnxruntime's quantizer refuses the model: {' '.join(str(error).split())}; keep it in float"
        ) from error


def _quantized(
    copy: onnx.ModelProto, ranges: TensorsData, arithmetic: Arithmetic, left: Collection[str]
) -> onnx.ModelProto:
    quantizer = QDQQuantizer(
        copy,
        per_channel=True,
        reduce_range=arithmetic.reduced,
        weight_qType=arithmetic.weight,
        activation_qType=arithmetic.activation,
        tensors_range=ranges,
        nodes_to_quantize=[],
        nodes_to_exclude=list(left),
        op_types_to_quantize=sorted(_OPERATORS),
        extra_options={},
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    made: onnx.ModelProto = quantizer.model.model
    del made.graph.value_info[:]  # of tensors that may have gone
    return made

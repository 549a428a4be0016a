"""What numbers a model computes with, where it is not float32."""

from __future__ import annotations

import onnx

__all__ = ["INTEGER_OPERATORS", "precision_of"]

INTEGER_OPERATORS = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "MatMulBnb4",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QGemm",
        "QLinearConv",
        "QLinearConvTranspose",
        "QLinearMatMul",
    }
)
"""Linear layers whose weights are integers."""
_MARKS = INTEGER_OPERATORS | {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
_LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def precision_of(model: onnx.ModelProto) -> str | None:
    """Say "quantized" for a model with integer operators, "float16" for one with such weights; else None.

    Parameters
    ----------
    model : onnx.ModelProto
    """
    graph = model.graph
    if any(node.op_type in _MARKS for node in graph.node):
        return "quantized"
    halves = {
        tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16
    }
    if any(name in halves for node in graph.node if node.op_type in _LINEAR for name in node.input):
        return "float16"
    return None

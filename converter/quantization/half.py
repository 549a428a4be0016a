"""Half precision: float16 weights and activations, by onnxruntime's own conversion."""

from __future__ import annotations

import onnx
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.transformers.float16 import convert_float_to_float16

__all__ = ["in_float16"]


def in_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a float32 model with weights and activations in float16; inputs and outputs stay float32.

    Operators that need the range of float32 stay in it, as onnxruntime lists them.

    Parameters
    ----------
    model : onnx.ModelProto
        It is not changed.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    half: onnx.ModelProto = convert_float_to_float16(copy, keep_io_types=True)
    in_order = ONNXModel(half)
    in_order.topological_sort()
    return half

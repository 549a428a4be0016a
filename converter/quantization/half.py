"""Half precision: float16 weights and activations, by onnxruntime's own conversion."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.transformers.float16 import convert_float_to_float16

from converter.errors import ModelError
from converter.preparation import normalised_model

__all__ = ["in_float16"]

_FREE_WEIGHTS = 4
"""First version of ONNX's files in which weights need not be inputs."""


def in_float16(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """Return a float32 model with weights and activations in float16; inputs and outputs stay float32.

    Weights that are inputs too are no inputs any more: they would stay float32, and be cast in every run.
    Operators that need the range of float32 stay in it, as onnxruntime lists them.

    Parameters
    ----------
    model : onnx.ModelProto
        It is not changed.
    path : Path
        Where it came from, for messages.

    Raises
    ------
    ModelError
        Where onnxruntime's conversion refuses the model.
    """
    ready = normalised_model(model, path)
    stored = {tensor.name for tensor in ready.graph.initializer}
    fed = [value for value in ready.graph.input if value.name not in stored]
    del ready.graph.input[:]
    ready.graph.input.extend(fed)
    ready.ir_version = max(ready.ir_version, _FREE_WEIGHTS)
    try:
        half: onnx.ModelProto = convert_float_to_float16(ready, keep_io_types=True)
    except Exception as error:  # asserts, ValueErrors and RuntimeErrors of a library
        raise ModelError(
            f"onnxruntime cannot put {path} into float16: {' '.join(str(error).split())}; keep it in float32"
        ) from error
    in_order = ONNXModel(half)
    in_order.topological_sort()
    return half

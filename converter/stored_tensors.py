"""Every tensor that a model holds, and the bytes that it needs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx
from google.protobuf.message import Message

__all__ = ["expected_bytes", "raw_bytes", "tensors"]

_T = onnx.TensorProto
_BITS: dict[int, int] = {
    _T.FLOAT: 32,
    _T.UINT8: 8,
    _T.INT8: 8,
    _T.UINT16: 16,
    _T.INT16: 16,
    _T.INT32: 32,
    _T.INT64: 64,
    _T.BOOL: 8,
    _T.FLOAT16: 16,
    _T.DOUBLE: 64,
    _T.UINT32: 32,
    _T.UINT64: 64,
    _T.COMPLEX64: 64,
    _T.COMPLEX128: 128,
    _T.BFLOAT16: 16,
    _T.FLOAT8E4M3FN: 8,
    _T.FLOAT8E4M3FNUZ: 8,
    _T.FLOAT8E5M2: 8,
    _T.FLOAT8E5M2FNUZ: 8,
    _T.UINT4: 4,
    _T.INT4: 4,
}


def tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """Give every tensor of a message, wherever it lies.

    The walk follows the message itself rather than a list of places: initializers, sparse ones,
    attributes, subgraphs, functions, training graphs, and whatever a later onnx adds.
    """
    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for item in [value] if isinstance(value, Message) else value:
                yield from tensors(item)


def raw_bytes(model: onnx.ModelProto) -> int:
    """Return the bytes that a model's tensors hold as raw data."""
    return sum(len(tensor.raw_data) for tensor in tensors(model))


def expected_bytes(tensor: onnx.TensorProto) -> int | None:
    """Return the bytes that a tensor's shape and type need; None where the type is not known."""
    bits = _BITS.get(tensor.data_type)
    return None if bits is None else -(-math.prod(tensor.dims) * bits // 8)

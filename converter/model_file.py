"""Model files: read without trusting them, written whole or not at all.

A model may name other files that hold its weights (`external_data`).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import IO, Any

import onnx
from google.protobuf.message import DecodeError, EncodeError, Message

from converter.errors import ModelError
from converter.external_data import external_locations, load_external_data
from converter.output_file import data_path, written_together
from converter.plain_file import file_digest, first_line, open_plain, reason
from converter.stored_tensors import expected_bytes, raw_bytes, tensors

__all__ = [
    "EXTERNAL_ABOVE",
    "PROTOBUF_LIMIT",
    "external_files",
    "load_model",
    "model_digest",
    "save_model",
]

PROTOBUF_LIMIT = 2**31 - 1
"""Most bytes that one protobuf file can have."""

EXTERNAL_ABOVE = 2**31 - 2**26
"""Weights of more bytes than this go to a file of their own; 64 MiB are left to the graph."""

_EXTERNAL_TENSOR = 1024  # bytes; smaller tensors stay inside the model, as in onnx
_ALIGNMENT = 4096  # bytes; a page, so that a runtime can map the weights
_T = onnx.TensorProto


def load_model(path: Path) -> onnx.ModelProto:
    """Read an ONNX model and all of its external data into memory, and check it.

    Parameters
    ----------
    path : Path
        The `.onnx` file.

    Returns
    -------
    onnx.ModelProto
        The model; none of its tensors refers to another file.

    Raises
    ------
    ModelError
        Where the file is missing, is no ONNX model, is truncated or above 2 GB; where external data
        is missing, lies outside the model's folder or is too short; where onnx's checker refuses
        the model or its graph is empty.
    """
    data = _read_whole(path)
    model = _parsed(data, path)
    external = load_external_data(model, path)
    _check_weight_sizes(model, path)
    _check_with_onnx(model if external else data, path)
    if not model.graph.node:
        raise ModelError(f"{path} has a graph without any node; export the model again")
    _free_unknown_sizes(model)
    return model


def _free_unknown_sizes(model: onnx.ModelProto) -> None:
    """Let sizes of −1, by which some exporters mean any, be free: onnx would compute with them."""
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.HasField("dim_value") and size.dim_value < 0:
                size.ClearField("dim_value")


def save_model(model: onnx.ModelProto, path: Path, *, external_above: int = EXTERNAL_ABOVE) -> None:
    """Write a model, whole or not at all; the same model always gives the same bytes.

    Weights of more than `external_above` bytes in total go to `<name>.data` beside the model.

    Parameters
    ----------
    model : onnx.ModelProto
        What is written; it stays as it is.
    path : Path
        The file to write or to replace.
    external_above : int, default EXTERNAL_ABOVE
        Bytes of weights that a model may have inside its own file.

    Raises
    ------
    ConfigError
        Where the file cannot be written.
    ModelError
        Where the model is above what one protobuf file can hold, even without its weights.
    """
    if raw_bytes(model) <= external_above:
        with written_together(path) as (file,):
            file.write(_serialised(model, path))
        return
    beside = data_path(path)
    # The weights are put in place first: a model never stands beside weights that are not there.
    with written_together(beside, path) as (data_file, file):
        slim = onnx.ModelProto()
        _copy_with_weights_in_file(model, slim, data_file, beside.name)
        file.write(_serialised(slim, path))


def model_digest(path: Path) -> str:
    """Return the SHA-256 of a model, in hexadecimal.

    It is that of the file or, where weights lie in other files, that of the digests of all of them: the
    model's first, then the others' in the order of their paths.

    Raises
    ------
    ModelError
        Where a file is missing or lies outside of the model's folder.
    """
    files = external_files(path)
    if not files:
        return file_digest(path)
    digest = hashlib.sha256()
    for each in (path, *files):
        digest.update(bytes.fromhex(file_digest(each)))
    return digest.hexdigest()


def external_files(path: Path) -> list[Path]:
    """List the files beside a model that its weights lie in, in the order of their paths.

    Raises
    ------
    ModelError
        Where the model cannot be read, or a file is missing or lies outside of the model's folder.
    """
    return external_locations(_parsed(_read_whole(path), path), path)


def _read_whole(path: Path) -> bytes:
    try:
        with open_plain(path) as (file, size):
            if size == 0:
                raise ModelError(f"the model {path} is an empty file; export it again")
            if size > PROTOBUF_LIMIT:
                raise ModelError(
                    f"the model {path} has more than 2 GB in one file; "
                    "export it again with its weights as external data"
                )
            return file.read(size)
    except FileNotFoundError as error:
        raise ModelError(f"there is no model {path}; correct the path") from error
    except IsADirectoryError as error:
        raise ModelError(f"{path} is a folder; give the .onnx file in it") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"the model {path} cannot be read: {reason(error)}") from error


def _parsed(data: bytes, path: Path) -> onnx.ModelProto:
    if data.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path} is only a Git LFS pointer to the model; run git lfs pull")
    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise ModelError(
            f"{path} is not an ONNX model or is truncated; export it or copy it again"
        ) from error
    # Bytes of something else may pass as a message of unknown fields.
    if not model.ir_version and not model.HasField("graph"):
        raise ModelError(f"{path} is not an ONNX model; give a file that ONNX exported")
    _require_text(model, path)
    return model


def _require_text(message: Message, path: Path) -> None:
    """Refuse text that is not UTF-8, which protobuf gives as bytes and every name could be."""
    for field, value in message.ListFields():
        items = [value] if isinstance(value, (Message, str, bytes)) else value
        if field.type == field.TYPE_MESSAGE:
            for item in items:
                _require_text(item, path)
        elif field.type == field.TYPE_STRING and not all(isinstance(item, str) for item in items):
            raise ModelError(
                f"{path} has a {field.name} that is not UTF-8; the file is damaged, or export it again"
            )


def _check_with_onnx(model: onnx.ModelProto | bytes, path: Path) -> None:
    try:
        if not isinstance(model, bytes) and raw_bytes(model) > EXTERNAL_ABOVE:
            onnx.checker.check_model(str(path))  # too large to serialise, so from its files
        else:
            onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, RuntimeError, ValueError, EncodeError) as error:
        raise ModelError(
            f"{path} is not a valid ONNX model or is truncated ({first_line(error)}); "
            "export it again"
        ) from error


def _check_weight_sizes(model: onnx.ModelProto, path: Path) -> None:
    for tensor in tensors(model):
        if tensor.data_type not in _T.DataType.values() or tensor.data_type == _T.UNDEFINED:
            raise ModelError(
                f"the tensor {tensor.name!r} of {path} has the unknown type {tensor.data_type}; "
                "export the model again or update onnx"
            )
        expected = expected_bytes(tensor)
        if (expected or 0) > PROTOBUF_LIMIT:
            raise ModelError(
                f"the tensor {tensor.name!r} of {path} takes {(expected or 0) / 2**30:.1f} GiB alone, and "
                "protobuf copies none above 2 GiB; part it into two"
            )
        if tensor.HasField("raw_data") and expected not in (None, len(tensor.raw_data)):
            raise ModelError(
                f"the tensor {tensor.name!r} of {path} has {len(tensor.raw_data)} bytes where its "
                f"shape needs {expected}; export the model again"
            )


def _serialised(model: onnx.ModelProto, path: Path) -> bytes:
    try:
        data = model.SerializeToString(deterministic=True)
    except (EncodeError, ValueError) as error:
        raise ModelError(
            f"the model for {path} is above 2 GB without its large weights; give a smaller model"
        ) from error
    if len(data) > PROTOBUF_LIMIT:
        raise ModelError(
            f"the model for {path} is above 2 GB without its large weights; give a smaller model"
        )
    return bytes(data)


def _copy_with_weights_in_file(
    source: Message, target: Message, data_file: IO[bytes], location: str, *, move: bool = False
) -> None:
    """Copy a message field by field, with the large initializers' bytes going to `data_file`.

    A plain copy of the whole would need the weights twice in memory, and some versions of protobuf
    cannot copy more than 2 GB. Tensors in attributes stay inside, since not every runtime looks for
    them in other files.
    """
    for field, value in source.ListFields():
        if move and field.name == "raw_data" and len(value) >= _EXTERNAL_TENSOR:
            _move_to_file(value, target, data_file, location)
        elif field.message_type is None:
            _copy_scalars(field.name, value, target)
        elif isinstance(value, Message):
            child = getattr(target, field.name)
            child.SetInParent()
            _copy_with_weights_in_file(value, child, data_file, location)
        else:
            for item in value:
                child = getattr(target, field.name).add()
                weights = field.name == "initializer"
                _copy_with_weights_in_file(item, child, data_file, location, move=weights)


def _copy_scalars(name: str, value: Any, target: Message) -> None:
    if isinstance(value, (bytes, str, bool, int, float)):
        setattr(target, name, value)
    else:
        getattr(target, name).extend(value)


def _move_to_file(data: bytes, tensor: Message, data_file: IO[bytes], location: str) -> None:
    data_file.write(b"\0" * (-data_file.tell() % _ALIGNMENT))
    tensor.data_location = _T.EXTERNAL
    for key, value in (
        ("location", location),
        ("offset", data_file.tell()),
        ("length", len(data)),
    ):
        tensor.external_data.add(key=key, value=str(value))
    data_file.write(data)

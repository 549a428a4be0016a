"""Model files: read without trusting them, written whole or not at all.

A model may name other files that hold its weights (external data). Every such name is checked
before anything is read: it must be a plain file inside the model's own folder, and the bytes asked
for must be in it. onnx checks some of this as well, but not for every tensor and not in every
version that Twofold runs with.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

import onnx
from google.protobuf.message import (  # type: ignore[import-untyped]  # its stubs are a package apart
    DecodeError,
    EncodeError,
    Message,
)

from converter.errors import ConfigError, ModelError
from converter.limits import WEIGHTS_GIB

__all__ = [
    "EXTERNAL_ABOVE",
    "PROTOBUF_LIMIT",
    "check_output_path",
    "external_files",
    "file_digest",
    "load_model",
    "model_digest",
    "save_model",
    "write_bytes_atomically",
    "write_text_atomically",
]

PROTOBUF_LIMIT = 2**31 - 1
"""Most bytes that one protobuf file can have."""

EXTERNAL_ABOVE = 2**31 - 2**26
"""Weights of more bytes than this go to a file of their own; 64 MiB are left to the graph."""

_EXTERNAL_TENSOR = 1024  # bytes; smaller tensors stay inside the model, as in onnx
_ALIGNMENT = 4096  # bytes; a page, so that a runtime can map the weights
_CHUNK = 2**20

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
    external = _load_external_data(model, path)
    _check_weight_sizes(model, path)
    _check_with_onnx(model if external else data, path)
    if not model.graph.node:
        raise ModelError(f"{path} has a graph without any node; export the model again")
    return model


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
    if sum(len(tensor.raw_data) for tensor in _tensors(model)) <= external_above:
        with _written_together(path) as (file,):
            file.write(_serialised(model, path))
        return
    data_path = _data_path(path)
    # The weights are put in place first: a model never stands beside weights that are not there.
    with _written_together(data_path, path) as (data_file, file):
        slim = onnx.ModelProto()
        _copy_with_weights_in_file(model, slim, data_file, data_path.name)
        file.write(_serialised(slim, path))


def write_text_atomically(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all.

    Raises
    ------
    ConfigError
        Where the file cannot be written.
    """
    write_bytes_atomically(path, text.encode())


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Write `content`, whole or not at all.

    Raises
    ------
    ConfigError
        Where the file cannot be written.
    """
    with _written_together(path) as (file,):
        file.write(content)


def check_output_path(out: Path, *inputs: Path) -> None:
    """Refuse an output path that cannot be written or that would destroy an input.

    A file is made in the folder and removed again, since access rights alone say nothing to root.

    Parameters
    ----------
    out : Path
        The file that is to be written.
    *inputs : Path
        Files that are read, those with a model's weights among them; neither `out` nor its `.data` file
        may be one of them.

    Raises
    ------
    ConfigError
        Where `out` is an input under any name, a folder or a special file, or where its folder is
        missing or not writable.
    """
    try:
        mode = out.lstat().st_mode
    except FileNotFoundError:
        mode = None
    except (OSError, ValueError) as error:
        raise ConfigError(_cannot_write(out, error)) from error
    if mode is not None and out.is_dir():
        raise ConfigError(f"the output {out} is a folder; give the name of a file in it")
    if mode is not None and not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise ConfigError(f"the output {out} is not a plain file; give another name")
    if not out.parent.is_dir():
        raise ConfigError(f"the folder of the output {out} does not exist; make {out.parent} first")
    for source in inputs:
        if _is_same_file(out, source) or _is_same_file(_data_path(out), source):
            raise ConfigError(
                f"the output {out} would overwrite the input {source}; give another name"
            )
    probe = _temporary_beside(out)
    try:
        probe.open("xb").close()
    except OSError as error:
        raise ConfigError(_cannot_write(out, error)) from error
    finally:
        _remove(probe)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal, read piece by piece.

    Raises
    ------
    OSError
        Where the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


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
    model = _parsed(_read_whole(path), path)
    whose = f"the external data of {path}"
    locations = {
        entry.value
        for tensor in _tensors(model)
        if tensor.data_location == _T.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return sorted(_checked_location(location, path, whose) for location in locations)


# Reading -------------------------------------------------------------------------------------


def _read_whole(path: Path) -> bytes:
    try:
        with _open_plain(path) as (file, size):
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
        raise ModelError(f"the model {path} cannot be read: {_reason(error)}") from error


@contextmanager
def _open_plain(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """Open a plain file and give it with its size; anything else is refused, a pipe included."""
    mode = path.stat().st_mode  # before opening: a pipe would wait for its other end
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(path)
    if not stat.S_ISREG(mode):
        raise ValueError("it is not a plain file; copy the model to one")
    with path.open("rb") as file:
        yield file, os.fstat(file.fileno()).st_size


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
        if not isinstance(model, bytes) and _weight_bytes(model) > EXTERNAL_ABOVE:
            onnx.checker.check_model(str(path))  # too large to serialise, so from its files
        else:
            onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, RuntimeError, ValueError, EncodeError) as error:
        raise ModelError(
            f"{path} is not a valid ONNX model or is truncated ({_first_line(error)}); "
            "export it again"
        ) from error


def _check_weight_sizes(model: onnx.ModelProto, path: Path) -> None:
    for tensor in _tensors(model):
        if tensor.data_type not in _T.DataType.values() or tensor.data_type == _T.UNDEFINED:
            raise ModelError(
                f"the tensor {tensor.name!r} of {path} has the unknown type {tensor.data_type}; "
                "export the model again or update onnx"
            )
        expected = _expected_bytes(tensor)
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


def _tensors(message: Message) -> Iterator[onnx.TensorProto]:
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
                yield from _tensors(item)


def _weight_bytes(model: onnx.ModelProto) -> int:
    return sum(len(tensor.raw_data) for tensor in _tensors(model))


def _expected_bytes(tensor: onnx.TensorProto) -> int | None:
    """Return the bytes that a tensor's shape and type need; None where the type is not known."""
    bits = _BITS.get(tensor.data_type)
    return None if bits is None else -(-math.prod(tensor.dims) * bits // 8)


# External data -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Region:
    """Where the bytes of one tensor lie: a real path inside the model's folder, and a range."""

    tensor: onnx.TensorProto
    file: Path
    offset: int
    length: int


def _load_external_data(model: onnx.ModelProto, path: Path) -> bool:
    """Read all external data into the model; say whether there was any.

    All regions are checked before the first one is read.
    """
    regions = [
        _checked_region(tensor, path)
        for tensor in _tensors(model)
        if tensor.data_location == _T.EXTERNAL
    ]
    total = sum(region.length for region in regions)
    if total > WEIGHTS_GIB.value << 30:
        raise ModelError(
            f"the external data of {path} has {total} bytes, more than {WEIGHTS_GIB.value} GiB; give a "
            f"smaller model, or {WEIGHTS_GIB}"
        )
    for region in regions:
        region.tensor.raw_data = _read_region(region, path)
        region.tensor.ClearField("data_location")
        region.tensor.ClearField("external_data")
    return bool(regions)


def _checked_region(tensor: onnx.TensorProto, path: Path) -> _Region:
    whose = f"the external data of the tensor {tensor.name!r} of {path}"
    entries = {entry.key: entry.value for entry in tensor.external_data}
    file = _checked_location(entries.get("location", ""), path, whose)
    size = file.stat().st_size
    offset = _whole_number(entries.get("offset", "0"), "offset", whose)
    if tensor.data_type == _T.STRING or any(size < 0 for size in tensor.dims):
        raise ModelError(f"{whose} has a type or a shape that ONNX forbids; export the model again")
    expected = _expected_bytes(tensor)
    if "length" in entries:
        length = _whole_number(entries["length"], "length", whose)
    elif expected is not None:
        length = expected
    else:
        length = max(size - offset, 0)
    if expected is not None and length != expected:
        raise ModelError(
            f"{whose} has {length} bytes where its shape needs {expected}; export the model again"
        )
    if offset + length > size:
        raise ModelError(
            f"{whose} ends at byte {offset + length}, but {file.name} has {size}; "
            "copy that file again whole"
        )
    return _Region(tensor, file, offset, length)


def _checked_location(location: str, path: Path, whose: str) -> Path:
    # Windows' notation is looked at everywhere: what is safe must not depend on the machine.
    notations = (PurePosixPath(location), PureWindowsPath(location))
    if not location or "\0" in location:
        raise ModelError(f"{whose} names no file; export the model again")
    if any(notation.anchor for notation in notations):
        raise ModelError(
            f"{whose} has the absolute path {location!r}; "
            "export the model again with the file in its own folder"
        )
    if any(".." in notation.parts for notation in notations):
        raise ModelError(
            f"{whose} climbs out of the model's folder with {location!r}; "
            "export the model again with the file in its own folder"
        )
    folder = os.path.realpath(path.parent)
    real = Path(os.path.realpath(path.parent / location))
    if not real.is_relative_to(folder):
        raise ModelError(
            f"{whose} is a link, {location!r}, that leaves the model's folder; "
            "put the file itself beside the model"
        )
    try:
        mode = real.stat().st_mode
    except OSError as error:
        raise ModelError(
            f"{whose} is missing: {location!r} cannot be read ({_reason(error)}); "
            "put it beside the model"
        ) from error
    if not stat.S_ISREG(mode):
        raise ModelError(
            f"{whose} is {location!r}, which is not a plain file; put the file beside the model"
        )
    return real


def _whole_number(text: str, what: str, whose: str) -> int:
    # Digits alone: int() would also take signs, blanks and underscores.
    if not (text.isascii() and text.isdigit() and len(text) <= 19):
        raise ModelError(
            f"{whose} has the {what} {text[:40]!r}, which is no byte count; export the model again"
        )
    return int(text)


def _read_region(region: _Region, path: Path) -> bytes:
    try:
        with _open_plain(region.file) as (file, _):
            file.seek(region.offset)
            data = file.read(region.length)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the external data {region.file} of {path} cannot be read: {_reason(error)}"
        ) from error
    if len(data) != region.length:
        raise ModelError(
            f"the external data {region.file} of {path} became shorter while it was read; try again"
        )
    return data


# Writing -------------------------------------------------------------------------------------


@contextmanager
def _written_together(*paths: Path) -> Iterator[Sequence[IO[bytes]]]:
    """Open a new file for each path; they take their places at the end, or none of them does."""
    temporaries = [_temporary_beside(path) for path in paths]
    placed: list[Path] = []
    complete = False
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(each.open("xb")) for each in temporaries]
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        for temporary, path in zip(temporaries, paths, strict=True):
            temporary.replace(path)
            placed.append(path)
        complete = True
    except OSError as error:
        raise ConfigError(_cannot_write(paths[-1], error)) from error
    finally:
        for path in temporaries if complete else [*temporaries, *placed]:
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a file of ours if it is there; a file system that is read-only says so of those that are not."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _temporary_beside(path: Path) -> Path:
    # Opened with "x" rather than by tempfile, whose files nobody else may read. The name is short,
    # so that it fits wherever the file's own does.
    return path.with_name(f".twofold-{secrets.token_hex(6)}.tmp")


def _data_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")


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


# Words ---------------------------------------------------------------------------------------


def _is_same_file(first: Path, second: Path) -> bool:
    if os.path.realpath(first) == os.path.realpath(second):
        return True
    try:
        return first.samefile(second)  # hard links, and names that differ only in case
    except OSError:
        return False  # one of them does not exist, so they cannot be one file


def _cannot_write(path: Path, error: Exception) -> str:
    return f"the output {path} cannot be written ({_reason(error)}); give another --out"


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or _first_line(error)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

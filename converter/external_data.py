"""External data: weights that a model names in other files, which are checked before anything is read.

Each name must be a plain file inside the model's own folder, and the bytes asked for must be in it.
onnx checks some of this as well, but not for every tensor and not in every version that Twofold runs with.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx

from converter.errors import ModelError
from converter.limits import WEIGHTS_GIB
from converter.plain_file import open_plain, reason
from converter.stored_tensors import expected_bytes, tensors

__all__ = ["external_locations", "load_external_data"]

_T = onnx.TensorProto


def external_locations(model: onnx.ModelProto, path: Path) -> list[Path]:
    """List the files that the weights of the model at `path` lie in, in the order of their paths.

    Raises
    ------
    ModelError
        Where a file is missing or lies outside of the model's folder.
    """
    whose = f"the external data of {path}"
    locations = {
        entry.value
        for tensor in tensors(model)
        if tensor.data_location == _T.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return sorted(_located(location, path, whose) for location in locations)


@dataclass(frozen=True)
class _Region:
    """Where the bytes of one tensor lie: a real path inside the model's folder, and a range."""

    tensor: onnx.TensorProto
    file: Path
    offset: int
    length: int


def load_external_data(model: onnx.ModelProto, path: Path) -> bool:
    """Read all external data of the model at `path` into it; say whether there was any.

    All regions are checked before the first one is read.

    Raises
    ------
    ModelError
        Where data is missing, lies outside of the model's folder, is too short, or is too much.
    """
    regions = [
        _checked_region(tensor, path)
        for tensor in tensors(model)
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
    file = _located(entries.get("location", ""), path, whose)
    size = file.stat().st_size
    offset = _whole_number(entries.get("offset", "0"), "offset", whose)
    if tensor.data_type == _T.STRING or any(size < 0 for size in tensor.dims):
        raise ModelError(f"{whose} has a type or a shape that ONNX forbids; export the model again")
    expected = expected_bytes(tensor)
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


def _located(location: str, path: Path, whose: str) -> Path:
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
            f"{whose} is missing: {location!r} cannot be read ({reason(error)}); "
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
        with open_plain(region.file) as (file, _):
            file.seek(region.offset)
            data = file.read(region.length)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the external data {region.file} of {path} cannot be read: {reason(error)}"
        ) from error
    if len(data) != region.length:
        raise ModelError(
            f"the external data {region.file} of {path} became shorter while it was read; try again"
        )
    return data

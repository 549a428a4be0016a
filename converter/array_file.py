"""Arrays and what they are about in one `.npz` file: whole or absent, without pickle, of bounded size."""

from __future__ import annotations

import io
import json
import lzma
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converter.errors import ConfigError
from converter.output_file import write_bytes_atomically

__all__ = ["UNREADABLE", "DamagedFileError", "load_arrays", "save_arrays"]

MOST_BYTES = 2**32
"""Of a file that is read."""

_ABOUT = "about"
UNREADABLE = (
    *(
        OSError,
        ValueError,
        TypeError,
        LookupError,
        EOFError,
        AttributeError,
        MemoryError,
        RuntimeError,
    ),
    *(SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)
"""What zipfile, its decompressors, numpy's reader of headers and json raise on damaged files."""


class DamagedFileError(Exception):
    """A file that is missing, damaged, too large, or written by something else."""


def save_arrays(path: Path, about: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays and what they are about, fit for JSON.

    Raises
    ------
    ConfigError
        Where the file cannot be written, or is larger than what `load_arrays` reads.
    """
    size = sum(array.nbytes for array in arrays.values())
    if size > MOST_BYTES:
        raise ConfigError(
            f"{path} would have {size} bytes, more than the {MOST_BYTES} that are kept"
        )
    buffer = io.BytesIO()
    named: dict[str, Any] = {_ABOUT: np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays}
    np.savez(buffer, **named)
    write_bytes_atomically(path, buffer.getvalue())


def load_arrays(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Read what `save_arrays` wrote.

    Raises
    ------
    DamagedFileError
        Where it cannot be used.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise DamagedFileError(f"{path} has more than {MOST_BYTES} bytes")
        with path.open("rb") as stream:
            with zipfile.ZipFile(stream) as archive:
                # what is packed could be any size once unpacked, and we pack nothing
                if any(each.compress_type != zipfile.ZIP_STORED for each in archive.infolist()):
                    raise DamagedFileError(f"{path} was not written by Twofold")
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as kept:
                about = json.loads(bytes(kept[_ABOUT]).decode())
                arrays = {name: kept[name] for name in kept.files if name != _ABOUT}
    except UNREADABLE as error:
        raise DamagedFileError(f"{path} cannot be read ({type(error).__name__})") from error
    if not isinstance(about, dict):
        raise DamagedFileError(f"{path} was not written by Twofold")
    return about, arrays

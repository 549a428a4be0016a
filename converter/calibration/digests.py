"""Digests of the samples of a calibration set, by their files or by their values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from converter.calibration.samples import Sample
from converter.errors import CalibrationError
from converter.plain_file import file_digest

__all__ = ["digest_of_files", "digest_of_samples"]

_Digest: TypeAlias = "hashlib._Hash"


def digest_of_files(folder: Path, files: Sequence[Path]) -> str:
    """Return a SHA-256 over the files' names in the folder and their bytes, in hexadecimal."""
    digest = hashlib.sha256()
    for path in files:
        try:
            content = file_digest(path)
        except OSError as error:
            raise CalibrationError(
                f"{path} cannot be read ({error.strerror}); make it readable"
            ) from error
        _add_text(digest, path.relative_to(folder).as_posix())
        _add_text(digest, content)
    return digest.hexdigest()


def digest_of_samples(samples: Iterator[Sample]) -> str:
    """Return a SHA-256 over names, types, shapes and values of all feeds, in hexadecimal."""
    digest = hashlib.sha256()
    for sample in samples:
        for name, array in sample.feeds.items():
            _add_text(digest, f"{name} {array.dtype.str} {array.shape}")
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _add_text(digest: _Digest, text: str) -> None:
    data = text.encode(errors="surrogateescape")
    digest.update(len(data).to_bytes(8, "little") + data)

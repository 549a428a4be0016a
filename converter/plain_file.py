"""Plain files, their digests, and why one could not be read."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ["file_digest", "first_line", "open_plain", "reason"]

_CHUNK = 2**20


@contextmanager
def open_plain(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """Open a plain file and give it with its size; anything else is refused, a pipe included."""
    mode = path.stat().st_mode  # before opening: a pipe would wait for its other end
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(path)
    if not stat.S_ISREG(mode):
        raise ValueError("it is not a plain file; copy the model to one")
    with path.open("rb") as file:
        yield file, os.fstat(file.fileno()).st_size


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


def reason(error: Exception) -> str:
    """Say in a few words why something failed."""
    return (error.strerror if isinstance(error, OSError) else None) or first_line(error)


def first_line(error: Exception) -> str:
    """Give the first line of what an error says, or its kind."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

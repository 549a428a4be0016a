"""Output files: written whole or not at all, and never over an input."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from converter.errors import ConfigError
from converter.plain_file import reason

__all__ = [
    "check_output_path",
    "data_path",
    "write_bytes_atomically",
    "write_text_atomically",
    "written_together",
]


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
        if _is_same_file(out, source) or _is_same_file(data_path(out), source):
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
    with written_together(path) as (file,):
        file.write(content)


@contextmanager
def written_together(*paths: Path) -> Iterator[Sequence[IO[bytes]]]:
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


def data_path(path: Path) -> Path:
    """Name the file beside a model that its weights go to where they are many."""
    return path.with_name(f"{path.name}.data")


def _is_same_file(first: Path, second: Path) -> bool:
    if os.path.realpath(first) == os.path.realpath(second):
        return True
    try:
        return first.samefile(second)  # hard links, and names that differ only in case
    except OSError:
        return False  # one of them does not exist, so they cannot be one file


def _cannot_write(path: Path, error: Exception) -> str:
    return f"the output {path} cannot be written ({reason(error)}); give another --out"

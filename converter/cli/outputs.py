"""The files that a command writes, checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["check_outputs"]


def check_outputs(outputs: Sequence[Path | None], *, read: Sequence[Path | None]) -> None:
    """Refuse a file that cannot be written, or that would overwrite another one of the command.

    Parameters
    ----------
    outputs : sequence of (Path or None)
        Files to write; None is one that is not asked for.
    read : sequence of (Path or None)
        Files and folders that are read; None likewise.

    Raises
    ------
    ConfigError
        See `converter.output_file.check_output_path`.
    """
    taken = [path for path in read if path is not None]
    for path in outputs:
        if path is not None:
            from converter.output_file import check_output_path

            check_output_path(path, *taken)
            taken.append(path)

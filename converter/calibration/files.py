"""The files of a calibration folder."""

from __future__ import annotations

import os
from pathlib import Path

from converter.errors import CalibrationError

__all__ = ["files_below"]


def files_below(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    """Return the files below a folder with one of these endings, sorted by their parts.

    Hidden files and folders are passed over. So are links to folders: a loop is then impossible,
    and what they lead to inside the folder is found by itself. A link that leaves the folder is
    refused: it would read what the user did not point at.
    """
    found = []
    for parent, folders, names in os.walk(folder, onerror=_refuse_folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = [Path(parent, name) for name in names if not name.startswith(".")]
        wanted = [path for path in files if path.suffix.lower() in suffixes]
        for path in [*(Path(parent, name) for name in folders), *wanted]:
            if path.is_symlink():
                _check_inside(path, folder)
        for path in wanted:
            if not path.is_file():
                raise CalibrationError(f"{path} is not a plain file; take it out of the folder")
        found += wanted
    return sorted(found, key=lambda path: path.parts)


def _refuse_folder(error: OSError) -> None:
    raise CalibrationError(
        f"the folder {error.filename} cannot be read ({error.strerror}); make it readable"
    ) from error


def _check_inside(link: Path, folder: Path) -> None:
    if not Path(os.path.realpath(link)).is_relative_to(os.path.realpath(folder)):
        raise CalibrationError(
            f"the link {link} leaves the calibration folder; put what it leads to into the folder"
        )

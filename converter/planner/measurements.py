"""Measured milliseconds, kept on disk from one plan to the next.

One small JSON file for each machine and way of running, in the user's cache folder or where
`TWOFOLD_CACHE` says. The file is an aid and never needed: what cannot be read, is damaged or was
written by something else is left out with a note, and what cannot be written is measured again the
next time.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import platformdirs

from converter.errors import ConfigError
from converter.output_file import write_text_atomically

__all__ = ["Measurements", "measurement_key"]

_FORMAT = 2  # raise it where what a layer's time is changes
_MOST_ENTRIES = 50_000
"""Of one file; the oldest go first. Some 3 MB."""
_MOST_BYTES = 2**24
_MOST_FILES = 64
"""In the folder; those that were not written for the longest time go first."""
_PREFIX = "milliseconds-"


class Measurements:
    """Milliseconds by key, in one file for each context.

    Parameters
    ----------
    folder : Path or None, default None
        Where the files lie; it is made when something is kept. None takes the environment variable
        `TWOFOLD_CACHE`, or else the user's cache folder.

    Attributes
    ----------
    folder : Path
    """

    def __init__(self, folder: Path | None = None) -> None:
        named = os.environ.get("TWOFOLD_CACHE")
        self.folder = folder or Path(named or platformdirs.user_cache_dir("twofold"))
        self._notes: dict[str, None] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        """What could not be read or written so far, each once."""
        return tuple(self._notes)

    def read(self, context: str) -> dict[str, float]:
        """Return all that is kept for `context`, oldest first; nothing where that cannot be used.

        Parameters
        ----------
        context : str
            Everything that holds for all keys alike: machine, provider, versions, batch.
        """
        path = self._path(context)
        try:
            if not path.is_file():
                return {}
            if path.stat().st_size > _MOST_BYTES:
                raise ValueError(f"it has more than {_MOST_BYTES} bytes")
            return _checked(json.loads(path.read_text(encoding="utf-8")), context)
        except (OSError, ValueError, RecursionError) as error:
            self._notes[
                f"the kept measurements {path} were left out ({error}); delete the file"
            ] = None
            return {}

    def write(self, context: str, milliseconds: Mapping[str, float]) -> None:
        """Keep `milliseconds` beside what is there, in place of what has the same key.

        Parameters
        ----------
        context : str
            As for `read`.
        milliseconds : mapping of str to float
            From 0, by `measurement_key`.
        """
        if not milliseconds:
            return
        kept = self.read(context)  # again: another plan may have written in the meantime
        for key, value in milliseconds.items():
            kept.pop(key, None)  # so that it counts as new
            kept[key] = value
        newest = dict(list(kept.items())[-_MOST_ENTRIES:])
        content = {"format": _FORMAT, "context": context, "milliseconds": newest}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text_atomically(self._path(context), json.dumps(content, indent=0))
            self._remove_oldest()
        except (OSError, ConfigError) as error:
            self._notes[f"the measurements could not be kept in {self.folder}: {error}"] = None

    def _path(self, context: str) -> Path:
        return self.folder / f"{_PREFIX}{measurement_key(context)}.json"

    def _remove_oldest(self) -> None:
        files = sorted(self.folder.glob(f"{_PREFIX}*.json"), key=lambda path: path.stat().st_mtime)
        for path in files[:-_MOST_FILES]:
            path.unlink(missing_ok=True)


def measurement_key(*parts: str) -> str:
    """Return a short key for what `parts` describe together, whatever they hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _checked(content: object, context: str) -> dict[str, float]:
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError("it is not of this version of Twofold")
    if content.get("context") != context:
        raise ValueError("it belongs to another machine or version")
    values = content.get("milliseconds")
    if not isinstance(values, dict) or not all(map(_is_duration, values.values())):
        raise ValueError("it holds something else than milliseconds")
    return {key: float(value) for key, value in values.items()}


def _is_duration(value: object) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value >= 0
    )

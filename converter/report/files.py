"""Reports as JSON files, written whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converter.output_file import write_text_atomically

__all__ = ["report_text", "write_report"]


def report_text(content: Mapping[str, Any]) -> str:
    """Return `content` as indented JSON, keys in the order they have.

    Paths become text and numpy's numbers plain ones. JSON knows no NaN and no infinity, so a number
    that is not finite becomes null.

    Raises
    ------
    TypeError
        Where a value has no form in JSON.
    """
    return json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_report(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to `path` as JSON.

    Raises
    ------
    ConfigError
        Where the file cannot be written.
    TypeError
        Where a value has no form in JSON.
    """
    write_text_atomically(path, report_text(content))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy's numbers and arrays
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

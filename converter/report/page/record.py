"""Saved reports, read as what they are: JSON that nobody vouches for.

What is missing, of another kind or without bounds counts as absent, so that a page can be made of any
report, whoever wrote it; only a file that is no report at all is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from converter.errors import ConfigError
from converter.report.words import printable

__all__ = [
    "COMPARISONS",
    "FILE_LIMIT",
    "LIST_LIMIT",
    "TEXT_LIMIT",
    "Kind",
    "Record",
    "kind_of",
    "read_report",
]

Kind = Literal["conversion", "front", "validation", "verdict"]

COMPARISONS: frozenset[Kind] = frozenset({"validation", "verdict"})
"""Kinds that compare two models; a verdict holds a validation."""

FILE_LIMIT = 2**26
"""Most bytes of a saved report."""
TEXT_LIMIT = 300
"""Most characters of a text; longer ones are cut."""
LIST_LIMIT = 2000
"""Most entries of a list, from its start."""
NUMBER_LIMIT = 1e18
"""Numbers beyond are nothing that was measured."""

_KINDS: Mapping[str, Kind] = {
    "twofold-conversion-2": "conversion",
    "twofold-front-1": "front",
    "twofold-validation-1": "validation",
    "twofold-verdict-1": "verdict",
}


class Record:
    """One object of a report, with its entries by name.

    Parameters
    ----------
    content : object
        What JSON holds; anything but an object counts as an empty one.
    """

    def __init__(self, content: object = None) -> None:
        self._content: Mapping[Any, Any] = content if isinstance(content, Mapping) else {}

    def __bool__(self) -> bool:
        """Whether it has any entry."""
        return bool(self._content)

    def number(self, key: str) -> float | None:
        """Return a finite number below `NUMBER_LIMIT`, or None."""
        return _number(self._content.get(key))

    def count(self, key: str) -> int:
        """Return a whole number from 0, or 0."""
        return max(0, int(self.number(key) or 0))

    def flag(self, key: str) -> bool | None:
        """Return True or False where it is one of them, else None."""
        value = self._content.get(key)
        return value if isinstance(value, bool) else None

    def text(self, key: str, most: int = TEXT_LIMIT) -> str:
        """Return a text on one line, cut at `most` characters; "" where there is none."""
        return _text(self._content.get(key), most)

    def shown(self, key: str) -> str:
        """Return a text, a number or a flag in words; "" for anything else."""
        return _shown(self._content.get(key))

    def record(self, key: str) -> Record:
        """Return an object."""
        return Record(self._content.get(key))

    def records(self, key: str) -> list[Record]:
        """Return a list of objects."""
        return [Record(each) for each in self._list(key)]

    def texts(self, key: str) -> list[str]:
        """Return a list of texts, without the empty ones."""
        return [text for text in (_text(each) for each in self._list(key)) if text]

    def numbers(self, key: str) -> list[float]:
        """Return a list of numbers, without what is none."""
        return [one for one in map(_number, self._list(key)) if one is not None]

    def entries(self, depth: int = 3) -> Iterator[tuple[str, str]]:
        """Give all that can be shown as (name, words), objects within by names with points."""
        for key, value in list(self._content.items())[:LIST_LIMIT]:
            name = _text(key)
            if isinstance(value, Mapping):
                if depth > 0:
                    yield from (
                        (f"{name}.{inner}", words)
                        for inner, words in Record(value).entries(depth - 1)
                    )
                continue
            if isinstance(value, (list, tuple)):
                words = ", ".join(_shown(each) for each in value[:LIST_LIMIT])[:TEXT_LIMIT]
            else:
                words = _shown(value)
            if words:
                yield name, words

    def _list(self, key: str) -> list[Any]:
        value = self._content.get(key)
        return list(value[:LIST_LIMIT]) if isinstance(value, (list, tuple)) else []


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    # compared before it becomes a float, which an integer may be too large for; NaN is below nothing
    return float(value) if abs(value) < NUMBER_LIMIT else None


def _text(value: object, most: int = TEXT_LIMIT) -> str:
    if not isinstance(value, str):
        return ""
    text = printable(value[: 4 * most])
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    number = _number(value)
    return _text(value) if number is None else f"{number:,.6g}" if number % 1 else f"{number:,.0f}"


def read_report(path: Path) -> dict[str, Any]:
    """Read a saved JSON report of `convert`, `plan`, `validate` or `check`.

    Raises
    ------
    ConfigError
        Where the file cannot be read, is too large, or is no such report.
    """
    try:
        with path.open("rb") as file:
            content = file.read(FILE_LIMIT + 1)
    except OSError as error:
        raise ConfigError(
            f"the report {path} cannot be read ({error.strerror}); correct the path"
        ) from error
    if len(content) > FILE_LIMIT:
        raise ConfigError(
            f"the report {path} has more than {FILE_LIMIT >> 20} MiB, which none of Twofold's has; "
            "give a JSON report of convert, plan, validate or check"
        )
    try:
        report = json.loads(content, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not JSON; give a JSON report of convert, plan, validate or check"
        ) from error
    if not isinstance(report, dict):
        report = {}
    kind_of(report, str(path))
    return report


def kind_of(report: Mapping[str, Any], label: str) -> Kind:
    """Say what a report is of.

    Parameters
    ----------
    report : mapping
    label : str
        What messages call it.

    Raises
    ------
    ConfigError
        Where it is none of `convert`, `plan`, `validate` or `check`, or of another version of Twofold.
    """
    name = Record(report).text("format", 40)
    if name in _KINDS:
        return _KINDS[name]
    known = ", ".join(_KINDS)
    found = f"has the format '{name}'" if name else "names no format"
    raise ConfigError(
        f"{label} {found}, and a page is made of {known}; give a JSON report of convert, plan, "
        "validate or check, made with this version of Twofold"
    )

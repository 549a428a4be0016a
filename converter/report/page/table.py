"""Tables without anything to sort or to open."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Table"]


@dataclass(frozen=True)
class Table:
    """Heads, and one row for each thing."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

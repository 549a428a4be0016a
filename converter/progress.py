"""How long work tells of its progress, without knowing who listens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

__all__ = ["SILENT", "Advance", "Progress"]


class Advance(Protocol):
    """Called by a stage as it gets on."""

    def __call__(self, steps: int = 1, note: str = "") -> None:
        """Count `steps` as done; `note` says what is being worked on now."""


class Progress(Protocol):
    """Something that shows stages: a terminal, a log, or nothing."""

    def stage(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """Open a stage of `total` steps; a context manager that yields its `Advance`."""


class _Silent:
    @contextmanager
    def _nothing(self) -> Iterator[Advance]:
        def advance(steps: int = 1, note: str = "") -> None:
            del steps, note

        yield advance

    def stage(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """Show nothing."""
        del title, total
        return self._nothing()


SILENT: Progress = _Silent()

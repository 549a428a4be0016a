"""Stages of long work on the terminal: bars, or a few plain lines where it is none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from converter.progress import Advance
from converter.report.words import printable

__all__ = ["ConsoleProgress"]

_QUIET_SECONDS = 10.0
"""Where there is no terminal, a long stage says how far it is this often."""
_LOOK_BACK_SECONDS = 3600.0


class ConsoleProgress:
    """Shows stages as they go: bars on a terminal, a few plain lines elsewhere.

    Parameters
    ----------
    console : Console
        Where to; `output_console(stderr=True)` as a rule.
    clock : callable, default time.monotonic
        Seconds that go on.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._bars: Progress | None = None

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Advance]:
        """Show a stage of `total` steps; one may be opened within another.

        A stage of one step gets a line on a terminal too: bars are drawn by a thread, and such a
        stage may be a timing, which nothing must disturb.
        """
        shown = self._bar if self._console.is_terminal and total > 1 else self._lines
        with shown(printable(title), total) as advance:
            yield advance

    @contextmanager
    def _bar(self, title: str, total: int) -> Iterator[Advance]:
        with self._live() as bars:
            task = bars.add_task(title, total=total, note="")

            def advance(steps: int = 1, note: str = "") -> None:
                bars.update(task, advance=steps, note=printable(note))

            yield advance
            bars.update(task, completed=total, note="")

    @contextmanager
    def _live(self) -> Iterator[Progress]:
        """Give the bars that are shown now; a stage within another shares them."""
        if self._bars is not None:
            yield self._bars
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False, style="dim"),
        )
        # a layer may take minutes: the estimate looks back further than that
        with Progress(
            *columns, console=self._console, speed_estimate_period=_LOOK_BACK_SECONDS
        ) as self._bars:
            try:
                yield self._bars
            finally:
                self._bars = None

    @contextmanager
    def _lines(self, title: str, total: int) -> Iterator[Advance]:
        begun = said = self._clock()
        done = 0
        self._line(f"{title} ...")

        def advance(steps: int = 1, note: str = "") -> None:
            nonlocal done, said
            done += steps
            now = self._clock()
            if now - said >= _QUIET_SECONDS:
                said = now
                left = f", {_duration((now - begun) / done * (total - done))} left" if done else ""
                self._line(f"{title}: {done}/{total}{left} {printable(note)}".rstrip())

        yield advance
        self._line(f"{title}: done in {self._clock() - begun:.1f} s")

    def _line(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)


def _duration(seconds: float) -> str:
    """Say about how long something takes."""
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"

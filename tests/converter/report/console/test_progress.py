"""Progress with and without a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from converter.report.console.progress import ConsoleProgress
from tests.converter.report.console.samples import wide


def test_lines_where_there_is_no_terminal() -> None:
    console, stream = wide()
    now = [0.0]
    progress = ConsoleProgress(console, clock=lambda: now[0])
    with progress.stage("recording", 40) as advance:
        advance(2, "first")
        now[0] = 11.0
        advance(3, "conv1\x1b")
        advance(1)
    lines = stream.getvalue().splitlines()
    assert lines == [
        "recording ...",
        "recording: 5/40, about 77 s left conv1�",
        "recording: done in 11.0 s",
    ]


@pytest.mark.parametrize(
    ("elapsed", "left"), [(20.0, "about 20 s"), (3600.0, "about 60 min"), (7200.0, "about 2.0 h")]
)
def test_an_estimate_goes_on_at_the_pace_so_far(elapsed: float, left: str) -> None:
    console, stream = wide()
    now = [0.0]
    with ConsoleProgress(console, clock=lambda: now[0]).stage("fit", 4) as advance:
        now[0] = elapsed
        advance(2, "half")
    assert stream.getvalue().splitlines()[1] == f"fit: 2/4, {left} left half"


def test_no_done_where_a_stage_fails() -> None:
    console, stream = wide()
    with pytest.raises(ValueError, match="broken"), ConsoleProgress(console).stage("fit", 3):
        raise ValueError("broken")
    assert "done" not in stream.getvalue()


def test_bars_on_a_terminal_also_within_each_other() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=100, force_terminal=True, markup=False)
    progress = ConsoleProgress(console)
    with progress.stage("outer", 2) as outer:
        with progress.stage("inner", 5) as inner:
            inner(5, "note")
        outer(2)
    with progress.stage("again", 2):
        pass
    text = stream.getvalue()
    assert "5/5" in text
    assert "2/2" in text
    assert "again" in text


def test_one_step_draws_no_bar() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=100, force_terminal=True, color_system=None)
    with ConsoleProgress(console).stage("timing", 1) as advance:
        advance()
    assert stream.getvalue().startswith("timing ...\n")

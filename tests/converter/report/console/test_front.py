"""The table of a front."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from converter.front import Front, FrontPoint, Verified
from converter.outcome import Stage
from converter.report.console.front import print_front
from tests.converter.report.console.samples import DROP, TIMED, line_with, wide

FRONT = Front(
    source=Path("in.onnx"),
    points=(
        FrontPoint(0.0, 1.0, 1.0, 12.0, 1.0, {}),
        FrontPoint(0.012, 3.5, 2.5, 4.2, 2.86, {}, Verified(TIMED, 3.4, 2.4, DROP)),
    ),
    judged_on="500 images of val",
    stages=(Stage("record", 1.5),),
    notes=("a note",),
    settings={},
    calibration={},
    machine={},
    source_digest="",
)


@pytest.mark.parametrize("terminal", [100, 240])
def test_a_front(terminal: int) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=terminal, markup=False, highlight=False)
    print_front(FRONT, [Path("front.png")], console)
    text = stream.getvalue()
    (row,) = [line for line in text.splitlines() if "2.86" in line]
    parts = ("4.20", "3.50", "2.50", "1.2 %", "3.00 (2.90–3.10)", "0.42 ± 0.10 points of accuracy")
    for part in parts:
        assert part in row
    assert "500 images of val" in line_with(text, "drop  ")
    assert "front.png" in line_with(text, "written")
    assert "note: a note" in text


def test_a_front_without_times_or_verified_points() -> None:
    console, stream = wide()
    points = tuple(replace(each, ms=None, speedup=None, verified=None) for each in FRONT.points)
    print_front(replace(FRONT, points=points, judged_on=None), (), console)
    text = stream.getvalue()
    assert "speed-up" not in text
    assert "drop" not in text
    assert "3.50" in text
    done = replace(points[1], verified=Verified(None, 3.4, 2.4, DROP))
    print_front(replace(FRONT, points=(points[0], done)), (), console)
    assert "÷ 3.40" in line_with(stream.getvalue(), "0.42")

"""Where marks stand: inside the area, in the order of their values."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from converter.report.page.chart import draw_bars, draw_chart

NUMBERS = st.floats(0, 1e18)


def words(value: float) -> str:
    return f"{value:g}"


def test_marks_stand_where_their_values_are() -> None:
    chart = draw_chart(
        "label",
        ("x", "y"),
        [("predicted", [(1.0, 0.0), (2.0, 0.01), (4.0, 1.0)])],
        [("chosen", 2.0, 0.1, "here")],
        words=(words, words),
        x_from=1.0,
    )
    assert chart is not None
    (line,) = chart.lines
    points = [tuple(map(float, point.split(","))) for point in line.points.split()]
    assert len(points) == 2  # an error of 0 has no place
    assert [y for _, y in points] == [100, 0]  # a whole number of powers of ten: 0.01 to 1
    (dot,) = chart.dots
    assert dot.y == 50
    assert dot.x == points[0][0]
    assert [tick.label for tick in chart.y_ticks] == ["0.01", "0.1", "1"]
    assert chart.x_ticks[0].at == 0


def test_too_little_for_a_chart() -> None:
    assert draw_chart("", ("", ""), [("primal", [(0.0, 1.0)])], words=(words, words)) is None
    assert draw_bars("", [], words, "") is None
    assert draw_bars("", [(0.0, 0.0, "")], words, "") is None


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=5))
def test_any_numbers_can_be_drawn(points: list[tuple[float, float]]) -> None:
    chart = draw_chart("", ("", ""), [("dual", points)], words=(words, words), level=1.0)
    if chart is None:
        return
    numbers = [
        float(each)
        for line in chart.lines
        for point in line.points.split()
        for each in point.split(",")
    ]
    numbers += [tick.at for tick in (*chart.x_ticks, *chart.y_ticks)]
    assert all(math.isfinite(each) and -0.1 <= each <= 100.1 for each in numbers)
    assert chart.level is not None
    assert 0 <= chart.level <= 100


@given(st.lists(st.tuples(st.floats(-1, 1e18), NUMBERS), min_size=1, max_size=200))
def test_bars_fill_the_width_in_order(values: list[tuple[float, float]]) -> None:
    bars = draw_bars("", [(*each, "") for each in values], words, "")
    if bars is None:
        assert max(map(max, values)) <= 0
        return
    assert len(bars.bars) == len(values)
    assert all(0 <= each.before <= 100 and 0 <= each.after <= 100 for each in bars.bars)
    edges = [edge for each in bars.bars for edge in (each.x, each.x + each.width)]
    assert edges == sorted(edges)
    assert edges[-1] <= 100


def test_bars_are_as_high_as_their_values() -> None:
    bars = draw_bars("macs", [(10.0, 5.0, "a"), (20.0, 20.0, "b")], words, "")
    assert bars is not None
    first, second = bars.bars
    assert first.before == second.after / 2
    assert first.after == second.after / 4

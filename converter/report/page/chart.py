"""Where the marks of a chart stand, in percent of its area, so that it fits any width.

Texts are not scaled with the area: they stand at percentages too, and keep their size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from matplotlib.ticker import LogLocator, MaxNLocator

__all__ = ["Bar", "Bars", "Chart", "Dot", "Line", "Tick", "draw_bars", "draw_chart"]

MarkClass = Literal["predicted", "chosen", "measured", "primal", "dual"]
Series = Sequence[tuple[float, float]]

_TICKS = 5
_LEAST = 1e-12
"""What is below has no place on a logarithmic axis."""


@dataclass(frozen=True)
class Tick:
    """A line of the grid and its label; `at` in percent from the left or from the top."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """A line through points, as the `points` of an SVG polyline in an area of 100 by 100."""

    mark: MarkClass
    points: str


@dataclass(frozen=True)
class Dot:
    """One point, in percent from the left and from the top, and what it says."""

    mark: MarkClass
    x: float
    y: float
    words: str


@dataclass(frozen=True)
class Chart:
    """Lines and dots over two axes.

    Attributes
    ----------
    label : str
        What the chart shows, for who cannot see it.
    x_title, y_title : str
    x_ticks, y_ticks : tuple of Tick
    lines : tuple of Line
    dots : tuple of Dot
    level : float or None
        Where a height that counts for something stands, in percent from the top.
    """

    label: str
    x_title: str
    y_title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    dots: tuple[Dot, ...] = ()
    level: float | None = None


@dataclass(frozen=True)
class Bar:
    """One layer before and after, in percent of the height; `x` and `width` of the width."""

    x: float
    width: float
    before: float
    after: float
    words: str


@dataclass(frozen=True)
class Bars:
    """Two bars for each layer over the depth of a network.

    Attributes
    ----------
    title, label : str
        `label` says what the chart shows, for who cannot see it.
    y_ticks : tuple of Tick
    bars : tuple of Bar
        In the order of the graph.
    """

    title: str
    label: str
    y_ticks: tuple[Tick, ...]
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class _Axis:
    """Values from `low` to `high` on one side of the area."""

    low: float
    high: float
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """Say how far along the axis a value is, in percent."""
        low, high, value = (
            (math.log(each) for each in (self.low, self.high, value))
            if self.logarithmic
            else (self.low, self.high, value)
        )
        return round(100.0 * (value - low) / (high - low), 2)

    def ticks(self, words: Callable[[float], str], *, upwards: bool) -> tuple[Tick, ...]:
        """Give round values on the axis; `upwards` for the one whose zero is at the bottom."""
        locator = (
            LogLocator(numticks=_TICKS)
            if self.logarithmic
            else MaxNLocator(_TICKS, steps=[1, 2, 2.5, 5, 10])
        )
        values = [float(each) for each in locator.tick_values(self.low, self.high)]
        inside = [each for each in values if self.low <= each <= self.high * (1 + 1e-9)]
        shares = [(self.share(each), words(each)) for each in inside]
        return tuple(Tick(100.0 - at if upwards else at, label) for at, label in shares)


def draw_chart(
    label: str,
    titles: tuple[str, str],
    lines: Sequence[tuple[MarkClass, Series]],
    dots: Sequence[tuple[MarkClass, float, float, str]] = (),
    *,
    words: tuple[Callable[[float], str], Callable[[float], str]],
    x_from: float | None = None,
    level: float | None = None,
) -> Chart | None:
    """Draw lines and dots over a linear axis and, upwards, a logarithmic one.

    Parameters
    ----------
    label : str
        What the chart shows, for who cannot see it.
    titles : tuple of two str
        Of the axes.
    lines : sequence of (mark, points)
        Points whose height is 0 or nearly so have no place and are left out.
    dots : sequence of (mark, x, y, words)
        Likewise.
    words : tuple of two callables
        How values on each axis are written.
    x_from : float or None, default None
        Where the horizontal axis begins; None for the least value.
    level : float or None, default None
        A height that is marked, and that the axis reaches.

    Returns
    -------
    Chart or None
        None where fewer than two points have a place.
    """
    drawn = [(mark, [point for point in points if point[1] > _LEAST]) for mark, points in lines]
    marked = [each for each in dots if each[2] > _LEAST]
    xs = [x for _, points in drawn for x, _ in points] + [x for _, x, _, _ in marked]
    ys = [y for _, points in drawn for _, y in points] + [y for _, _, y, _ in marked]
    ys += [] if level is None else [level]
    if len(xs) < 2:
        return None
    across = _axis(min(xs) if x_from is None else min(x_from, *xs), max(xs))
    upwards = _log_axis(min(ys), max(ys))
    return Chart(
        label=label,
        x_title=titles[0],
        y_title=titles[1],
        x_ticks=across.ticks(words[0], upwards=False),
        y_ticks=upwards.ticks(words[1], upwards=True),
        lines=tuple(
            Line(
                mark,
                " ".join(f"{across.share(x):g},{100 - upwards.share(y):.4g}" for x, y in points),
            )
            for mark, points in drawn
            if len(points) > 1
        ),
        dots=tuple(
            Dot(mark, across.share(x), round(100 - upwards.share(y), 2), said)
            for mark, x, y, said in marked
        ),
        level=None if level is None else round(100 - upwards.share(level), 2),
    )


def draw_bars(
    title: str,
    layers: Sequence[tuple[float, float, str]],
    words: Callable[[float], str],
    label: str,
) -> Bars | None:
    """Draw what each layer takes, before and after, over the depth of the network.

    Parameters
    ----------
    title : str
    layers : sequence of (before, after, words)
        In the order of the graph; numbers below 0 count as 0.
    words : callable
        How values are written.
    label : str
        What the chart shows, for who cannot see it.

    Returns
    -------
    Bars or None
        None where no layer takes anything.
    """
    highest = max((max(before, after) for before, after, _ in layers), default=0.0)
    if highest <= 0:
        return None
    axis = _Axis(0.0, highest * 1.02)
    step = 100.0 / len(layers)
    gap = 0.24 * step
    return Bars(
        title=title,
        label=label,
        y_ticks=axis.ticks(words, upwards=True),
        bars=tuple(
            Bar(
                x=round(index * step + gap / 2, 3),
                width=round(step - gap, 3),
                before=axis.share(max(before, 0.0)),
                after=axis.share(max(after, 0.0)),
                words=said,
            )
            for index, (before, after, said) in enumerate(layers)
        ),
    )


def _axis(low: float, high: float) -> _Axis:
    axis = _Axis(low, high if high > low else low + max(abs(low), 1.0))
    return replace(axis, high=axis.high + 0.03 * (axis.high - axis.low))


def _log_axis(low: float, high: float) -> _Axis:
    """Span whole powers of ten, so that at least two of them are on the axis."""
    bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return _Axis(10.0**bottom, 10.0 ** max(top, bottom + 1), logarithmic=True)

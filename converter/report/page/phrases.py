"""Numbers and short phrases that several parts of a page share."""

from __future__ import annotations

from collections.abc import Sequence

from converter.report.page.record import Record
from converter.report.words import milliseconds, shape

__all__ = ["bare_milliseconds", "gained", "lost", "percent", "sizes", "three", "times", "two"]


def times(ratio: float) -> str:
    """Write a factor with two digits or three: 1.05×, 3.9×, 12×."""
    digits = 2 if ratio < 1.095 else 1 if ratio < 9.95 else 0
    return f"{ratio:,.{digits}f}×"


def bare_milliseconds(number: float) -> str:
    """Give milliseconds as elsewhere, without the unit."""
    return milliseconds(number).removesuffix(" ms")


def percent(share: float | None) -> str:
    """Write an error with two digits after the point, as the ones above and below it."""
    if share is None:
        return "–"
    return "< 0.01 %" if 0 < share < 5e-5 else f"{100 * share:,.2f} %"


def two(number: float | None) -> str:
    """Write a factor with two digits after the point."""
    return "–" if number is None else f"{number:.2f}"


def three(number: float | None) -> str:
    """Write a number with three digits."""
    return "–" if number is None else f"{number:.3g}"


def sizes(numbers: Sequence[float]) -> str:
    """Write a shape as 64×32×3×3; "" for none."""
    return shape([int(number) for number in numbers]) if numbers else ""


def lost(drop: Record) -> str:
    """Say what a model that was carried out has lost: 0.42 points of accuracy lost."""
    points, measure = drop.number("points"), drop.text("measure", 40)
    if points is None:
        return "drop not known"
    unit = "% output error" if measure == "output error" else f"points of {measure} lost"
    return f"{points:.2f} {unit}"


def gained(done: Record) -> float | None:
    """Give the measured speed-up of what was carried out, or how many times fewer MACs it has."""
    speedup = done.record("latency").number("speedup")
    return done.number("macs_reduction") if speedup is None else speedup

"""Numbers and names as people read them: the same on the terminal and on the page."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "count",
    "effect",
    "factor",
    "interval",
    "mebibytes",
    "milliseconds",
    "printable",
    "shape",
    "signed_points",
    "visible",
]


def printable(text: str) -> str:
    """Return `text` on one line, with � for what a terminal might take as a command."""
    return visible(" ".join(text.split()))


def visible(line: str) -> str:
    """Return `line` with � for all that cannot be printed."""
    return "".join(c if c.isprintable() else "�" for c in line)


def milliseconds(number: float) -> str:
    """Give milliseconds with three digits, as measurements have."""
    digits = 2 if number < 10 else 1 if number < 100 else 0
    return f"{number:,.{digits}f} ms"


def mebibytes(number: float) -> str:
    """Give bytes as 1.04 MiB."""
    return f"{number / 2**20:,.2f} MiB"


def effect(share: float) -> str:
    """Give a predicted error in percent, with two digits."""
    percent = 100 * share
    return f"{percent:.2g} %" if percent < 99.5 else f"{percent:,.0f} %"


def factor(reduction: float | None) -> str:
    """Say how many times smaller: ÷ 2.00."""
    return "–" if reduction is None else f"÷ {reduction:.2f}"


def interval(ratio: float, low: float, high: float) -> str:
    """Give a ratio with its bounds: 3.00 (2.90–3.10)."""
    return f"{ratio:.2f} ({low:.2f}–{high:.2f})"


def signed_points(drop: float, standard_error: float) -> str:
    """Say percentage points that were won, or lost: -0.68 ± 0.30 points."""
    return f"{0.0 - drop:+.2f} ± {standard_error:.2f} points"


def shape(sizes: Sequence[int | str | None] | None) -> str:
    """Write a shape as 64×32×3×3."""
    return "?" if sizes is None else "×".join("?" if n is None else str(n) for n in sizes)


def count(number: float | None) -> str:
    """Return a count with three digits and a unit: 313 M."""
    if number is None:
        return "?"
    scaled = float(number)
    for unit in ("", " k", " M", " G"):
        if scaled < 999.5:
            return f"{scaled:.3g}{unit}"
        scaled /= 1000
    return f"{scaled:,.4g} T"

"""The front as a picture: error against gain, and the drop where points were carried out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from converter.front import Front, FrontPoint

__all__ = ["check_picture", "draw_front"]

_SUFFIXES = (".png", ".svg")
_PREDICTED, _MEASURED = "#1f5fa8", "#c4501b"
_WIDE = 4.0
"""A front that gains more is drawn over logarithms."""
_TICKS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256)


def check_picture(path: Path) -> None:
    """Refuse the name of a picture that cannot be drawn.

    Raises
    ------
    ConfigError
        Where it ends neither in .png nor in .svg.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigError(
            f"the picture {path} ends neither in .png nor in .svg; give it one of these"
        )


def draw_front(front: Front, path: Path) -> None:
    """Draw the front and write it, whole or not at all.

    Parameters
    ----------
    front : Front
    path : Path
        Ends in .png or .svg.

    Raises
    ------
    ConfigError
        Where the file cannot be written.
    """
    from matplotlib.figure import Figure

    check_picture(path)
    done = [point for point in front.points if point.verified is not None]
    figure = Figure(figsize=(7.2, 6.4 if done else 4.0), dpi=160, layout="constrained")
    axes = figure.subplots(2 if done else 1, sharex=True, squeeze=False)[:, 0]
    figure.suptitle(_title(front), fontsize=11, x=0.02, ha="left", parse_math=False)
    _draw_errors(axes[0], front, done)
    if done:
        _draw_drops(axes[1], front, done)
    axes[-1].set_xlabel(
        "times faster than the original" if front.timed else "times fewer multiply-accumulates"
    )
    _write(figure, path)


def _title(front: Front) -> str:
    target = front.settings["target"]
    shown = f"{front.source.name}: what it could become"
    if not front.timed:
        return shown
    runtime = target["runtime"]
    threads = f", {runtime['threads']} threads" if runtime["threads"] else ""
    return f"{shown}, batch {target['batch']}, {runtime['provider']}{threads}"


def _draw_errors(axes: Axes, front: Front, done: list[FrontPoint]) -> None:
    lossy = [point for point in front.points if point.effect > 0]  # the axis has no zero
    axes.plot(
        [point.gained for point in lossy],
        [point.effect for point in lossy],
        "o-",
        color=_PREDICTED,
        markersize=4,
        label="predicted",
    )
    if done:
        _draw_measured(axes, done, [point.effect for point in done], None)
        axes.legend(frameon=False, loc="lower right")
    axes.set_yscale("log")
    axes.set_ylabel("squared error of the output,\nrelative to its variance")
    _finish(axes, front)


def _draw_drops(axes: Axes, front: Front, done: list[FrontPoint]) -> None:
    drops = [point.verified.drop for point in done if point.verified is not None]
    spreads = [2 * (drop.standard_error or 0.0) for drop in drops]
    _draw_measured(axes, done, [drop.points for drop in drops], spreads)
    axes.plot([1.0], [0.0], "o", color="0.5", markersize=4)
    axes.annotate("original", (1.0, 0.0), (6, 6), textcoords="offset points", color="0.4")
    axes.axhline(0.0, color="0.6", linewidth=0.8)
    if drops[0].measure == "output error":
        axes.set_ylabel("error of the output, %")
    else:
        axes.set_ylabel(f"{drops[0].measure} lost, points\n(± 2 standard errors)")
    _finish(axes, front)


def _draw_measured(
    axes: Axes, done: list[FrontPoint], heights: list[float], spreads: list[float] | None
) -> None:
    """Mark points at what was measured of their gain, with its 95 % interval."""
    results = [point.verified for point in done if point.verified is not None]
    sides: Any = [
        [0.0 if each.latency is None else each.gained - each.latency.low for each in results],
        [0.0 if each.latency is None else each.latency.high - each.gained for each in results],
    ]
    axes.errorbar(
        [each.gained for each in results],
        heights,
        xerr=[[max(side, 0.0) for side in each] for each in sides],
        yerr=spreads,
        fmt="D",
        color=_MEASURED,
        markersize=6,
        markerfacecolor="white",
        markeredgewidth=1.6,
        capsize=3,
        label="carried out and measured",
        zorder=3,
    )


def _finish(axes: Axes, front: Front) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    if front.points[-1].gained > _WIDE:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(_TICKS))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _write(figure: Any, path: Path) -> None:
    import matplotlib

    kind = path.suffix.lower().removeprefix(".")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # without a date and random names, the same front gives the same file
        with matplotlib.rc_context({"svg.hashsalt": "twofold"}):
            figure.savefig(
                temporary, format=kind, metadata={"Date": None} if kind == "svg" else None
            )
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(
            f"the picture {path} cannot be written ({error.strerror}); give another name"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)

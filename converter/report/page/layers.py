"""What became of each layer: drawn over the depth of the network, and one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from converter.report.page.chart import Bars, Chart, MarkClass, draw_bars, draw_chart
from converter.report.page.phrases import bare_milliseconds, percent, sizes, three
from converter.report.page.record import Record
from converter.report.page.table import Table
from converter.report.words import count, effect

__all__ = ["TRACE_POINTS", "Layer", "show_depth", "show_layers"]

TRACE_POINTS = 80
"""Iterations of a layer that are drawn, at most."""
TRACE_ROWS = 12
"""Iterations of a layer that are written down, at most."""


@dataclass(frozen=True)
class Layer:
    """One row of the plan.

    Attributes
    ----------
    number : int
        Its place in the graph, from 1.
    name, weight, form, macs_before, macs_after, reduction, ms_before, ms_after, error : str
        As they are shown.
    kept : bool
    scheme : str
    keys : dict of str to float
        What columns are sorted by; what is not known sorts last.
    facts : tuple of (name, words)
    trace : Chart or None
    iterations : Table or None
    """

    number: int
    name: str
    weight: str
    scheme: str
    form: str
    kept: bool
    macs_before: str
    macs_after: str
    reduction: str
    ms_before: str
    ms_after: str
    error: str
    keys: dict[str, float]
    facts: tuple[tuple[str, str], ...]
    trace: Chart | None
    iterations: Table | None


def show_depth(run: Record) -> tuple[Bars, ...]:
    """Draw milliseconds and multiply-accumulates of each layer, before and after."""
    found = run.records("layers")
    charts = []
    units: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("ms", "milliseconds", lambda number: f"{number:.3g}"),
        ("macs", "multiply-accumulates", count),
    )
    for unit, title, words in units:
        rows = [
            (
                layer.number(f"{unit}_before") or 0.0,
                layer.number(f"{unit}_after") or 0.0,
                f"{layer.text('name')}: {_change(layer, unit, words) or 'not known'}",
            )
            for layer in found
        ]
        label = (
            f"{title.capitalize()} of {len(rows)} layers from the input to the output, before and after; "
            "the table of layers has the numbers"
        )
        drawn = draw_bars(title, rows, words, label)
        if drawn is not None:
            charts.append(drawn)
    return tuple(charts)


def show_layers(run: Record) -> tuple[Layer, ...]:
    """List what became of every layer."""
    return tuple(_layer(number, each) for number, each in enumerate(run.records("layers"), 1))


def _layer(number: int, layer: Record) -> Layer:
    scheme = layer.text("scheme", 60) or "?"
    macs = layer.number("macs_before"), layer.number("macs_after")
    ms = layer.number("ms_before"), layer.number("ms_after")
    error = layer.number("error")
    reduction = macs[0] / macs[1] if macs[0] is not None and macs[1] else None
    trace = layer.records("trace")
    numbers = {
        "number": float(number),
        "macs_before": macs[0],
        "macs_after": macs[1],
        "reduction": reduction,
        "ms_before": ms[0],
        "ms_after": ms[1],
        "error": error,
    }
    return Layer(
        number=number,
        name=layer.text("name") or f"layer {number}",
        weight=sizes(layer.numbers("shape")),
        scheme=scheme,
        form=_form(layer, scheme),
        kept=scheme == "kept",
        macs_before="–" if macs[0] is None else count(macs[0]),
        macs_after="–" if macs[1] is None else count(macs[1]),
        reduction="–" if reduction is None else f"{reduction:,.2f}",
        ms_before="–" if ms[0] is None else bare_milliseconds(ms[0]),
        ms_after="–" if ms[1] is None else bare_milliseconds(ms[1]),
        error=percent(error),
        keys={key: value for key, value in numbers.items() if value is not None},
        facts=_layer_facts(layer),
        trace=_trace_chart(trace),
        iterations=_trace_table(trace),
    )


def _form(layer: Record, scheme: str) -> str:
    ranks, support = layer.numbers("ranks"), layer.count("support")
    parts = [scheme]
    if ranks:
        parts.append("rank " + sizes(ranks))
    if support:
        parts.append(f"{support} channels")
    return ", ".join(parts)


def _layer_facts(layer: Record) -> tuple[tuple[str, str], ...]:
    """Say what the columns of the table do not, and on a narrow screen cannot."""
    error, on_output = layer.number("error"), layer.number("effect")
    seconds, iterations = layer.number("seconds"), layer.count("iterations")
    status = layer.text("status", 60)
    ended = f"{status}, {iterations} iterations" if status and iterations else status
    facts = {
        "kept, because": layer.text("reason"),
        "operator": layer.text("op", 40),
        "weight": sizes(layer.numbers("shape")),
        "activation": layer.text("activation", 60),
        "MACs": _change(layer, "macs", count),
        "parameters": _change(layer, "params", count),
        "milliseconds": _change(layer, "ms", bare_milliseconds),
        "error after the activation": "" if error is None else percent(error),
        "error of the output, predicted": "" if on_output is None else effect(on_output),
        "solver": ended,
        "fitted in": f"{seconds:,.1f} s" if seconds else "",
    }
    return tuple((name, words) for name, words in facts.items() if words)


def _change(layer: Record, key: str, words: Callable[[float], str]) -> str:
    before, after = layer.number(f"{key}_before"), layer.number(f"{key}_after")
    return "" if before is None or after is None else f"{words(before)} → {words(after)}"


def _trace_chart(trace: Sequence[Record]) -> Chart | None:
    """Draw how the residuals fell; at 1 both are within their tolerance."""
    picked = _picked(trace, TRACE_POINTS)
    if len(picked) < 2:
        return None
    lines: list[tuple[MarkClass, list[tuple[float, float]]]] = []
    marks: tuple[MarkClass, ...] = ("primal", "dual")
    for mark in marks:
        pairs = [(each.number("iteration"), each.number(mark)) for each in picked]
        lines.append((mark, [(x, y) for x, y in pairs if x is not None and y is not None]))
    last = picked[-1]
    return draw_chart(
        f"Residuals of the solver over {len(trace)} iterations; at the end primal "
        f"{three(last.number('primal'))}, dual {three(last.number('dual'))} of their tolerance",
        ("iteration", "residual over tolerance"),
        lines,
        words=(lambda value: f"{value:g}", lambda value: f"{value:g}"),
        level=1.0,
    )


def _trace_table(trace: Sequence[Record]) -> Table | None:
    if not trace:
        return None
    return Table(
        ("iteration", "primal", "dual", "objective", "rho", "rank", "channels"),
        tuple(
            (
                f"{each.count('iteration')}",
                *(three(each.number(key)) for key in ("primal", "dual", "objective", "rho")),
                f"{each.count('rank')}",
                f"{each.count('support')}",
            )
            for each in _picked(trace, TRACE_ROWS)
        ),
    )


def _picked(trace: Sequence[Record], most: int) -> list[Record]:
    """Take so many entries at most, evenly, with the first and the last."""
    if len(trace) <= most:
        return list(trace)
    return [trace[round(index * (len(trace) - 1) / (most - 1))] for index in range(most)]

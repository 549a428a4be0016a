"""The best plans for some budgets, and what was carried out of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from converter.report.page.chart import Chart, Dot, MarkClass, draw_chart
from converter.report.page.phrases import bare_milliseconds, gained, lost, two
from converter.report.page.quantization import quantization_of
from converter.report.page.record import Record
from converter.report.page.table import Table
from converter.report.words import effect

__all__ = ["Front", "show_front"]


@dataclass(frozen=True)
class Front:
    """The best plans: drawn, and as a table."""

    chart: Chart | None
    table: Table
    legend: tuple[tuple[MarkClass, str], ...]
    beside: str


def show_front(run: Record) -> Front | None:
    """Draw the predicted front of a conversion or of a plan, and what was carried out of it."""
    points = run.records("points") or run.records("front")
    planned = run.record("planned")
    if not points and not planned:
        return None
    timed = any(point.number("ms") is not None for point in (*points, planned))
    gain = "speedup" if timed else "macs_reduction"
    line = [(point.number(gain), point.number("effect")) for point in points]
    known = [(x, y) for x, y in line if x is not None and y is not None]
    dots: list[tuple[MarkClass, float, float, str]] = [
        ("predicted", x, y, f"predicted: {x:.2f} times, error {effect(y)}") for x, y in known
    ]
    done = [*_probed(run.record("search")), *_verified(points), *_carried_out(run)]
    dots += [("measured", x, y, words) for x, y, words in done]
    at, error = planned.number(gain), planned.number("effect")
    if at is not None and error is not None:
        dots.append(("chosen", at, error, f"chosen: {at:.2f} times, error {effect(error)}"))
    unit = "times faster" if timed else "times fewer multiply-accumulates"
    chart = draw_chart(
        f"Predicted error of the output against {unit}, for {len(known)} plans; the table below has the "
        "numbers",
        (unit, "error of the output, predicted"),
        [("predicted", known)],
        dots,
        words=(lambda value: f"{value:g}×", effect),
        x_from=1.0,
    )
    return Front(
        chart, _front_table(run, points, planned, timed=timed), _legend(chart), _beside(run, done)
    )


def _probed(search: Record) -> list[tuple[float, float, str]]:
    found = []
    for probe in search.records("probes"):
        gain, error = gained(probe), probe.number("effect")
        if gain is not None and error is not None:
            found.append((gain, error, f"tried: {gain:.2f} times, {lost(probe.record('drop'))}"))
    return found


def _verified(points: Sequence[Record]) -> list[tuple[float, float, str]]:
    found = []
    for point in points:
        done = point.record("verified")
        gain, error = gained(done), point.number("effect")
        if gain is not None and error is not None:
            found.append(
                (gain, error, f"carried out: {gain:.2f} times, {lost(done.record('drop'))}")
            )
    return found


def _carried_out(run: Record) -> list[tuple[float, float, str]]:
    """Give the model that was planned, in float, unless the search lists it."""
    speedup = run.record("latency").number("speedup")
    error = run.record("planned").number("effect")
    if speedup is None or error is None or run.record("search"):
        return []
    beside = ", before it was quantized" if quantization_of(run) else ""
    return [(speedup, error, f"measured: {speedup:.2f} times{beside}")]


def _front_table(run: Record, points: Sequence[Record], planned: Record, *, timed: bool) -> Table:
    heads = (*(("ms", "times faster") if timed else ()), "÷ MACs", "÷ parameters", "error", "")
    found = [(point, _measured(point)) for point in points]
    if planned:
        found.append((planned, "chosen"))
    found += [_tried(probe) for probe in run.record("search").records("probes")]
    gain = "speedup" if timed else "macs_reduction"
    found.sort(key=lambda each: each[0].number(gain) or 0.0)
    rows = tuple((*_front_cells(point, timed=timed), words) for point, words in found)
    return Table(heads, rows)


def _tried(probe: Record) -> tuple[Record, str]:
    """Give a budget that a search carried out as a point of the front, with what it lost."""
    measured = {
        "speedup": probe.record("latency").number("speedup"),
        "macs_reduction": probe.number("macs_reduction"),
        "effect": probe.number("effect"),
    }
    verdict = "within" if probe.flag("within") else "not within"
    return Record(measured), f"tried: {lost(probe.record('drop'))}, {verdict}"


def _front_cells(point: Record, *, timed: bool) -> list[str]:
    cells = [two(point.number("macs_reduction")), two(point.number("params_reduction"))]
    ms = point.number("ms")
    before = (
        ["–" if ms is None else bare_milliseconds(ms), two(point.number("speedup"))]
        if timed
        else []
    )
    error = point.number("effect")
    return [*before, *cells, "–" if error is None else effect(error)]


def _measured(point: Record) -> str:
    done = point.record("verified")
    if not done:
        return ""
    return f"measured: {two(gained(done))} times, {lost(done.record('drop'))}"


def _legend(chart: Chart | None) -> tuple[tuple[MarkClass, str], ...]:
    words: dict[MarkClass, str] = {
        "predicted": "predicted",
        "chosen": "the plan that was chosen",
        "measured": "carried out and measured",
    }
    dots: Sequence[Dot] = () if chart is None else chart.dots
    present = {dot.mark for dot in dots}
    return tuple((mark, said) for mark, said in words.items() if mark in present)


def _beside(run: Record, done: Sequence[object]) -> str:
    """Say what the measured points were judged on, and how far the prediction was off."""
    judged = run.text("judged_on") or run.record("search").text("images")
    if judged and done:
        return f"Drops were measured on {judged}."
    off = run.record("latency").number("off")
    if off is None:
        return ""
    result = "model in float" if quantization_of(run) else "result"
    said = f"The predicted latency of the {result} was off by {100 * off:+.0f} %"
    pace = run.record("latency").number("pace")
    if pace is None:
        return f"{said}."
    left = run.record("latency").number("off_at_pace") or 0.0
    return (
        f"{said}: the plan, timed again, read {pace:.2f} times its speed of the planning, and at that pace "
        f"it was off by {100 * left:+.0f} %."
    )

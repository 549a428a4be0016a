"""The parts of a page below its headline, each made of what a report holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from converter.report.page.chart import Bars, Chart, Dot, MarkClass, draw_bars, draw_chart
from converter.report.page.record import Record
from converter.report.words import count, effect, milliseconds, shape

__all__ = [
    "Front",
    "Layer",
    "Section",
    "Table",
    "WorstImage",
    "depth",
    "front",
    "layers",
    "made",
    "outputs",
    "passes",
    "recovery",
    "worst",
]

TRACE_POINTS = 80
"""Iterations of a layer that are drawn, at most."""
TRACE_ROWS = 12
"""Iterations of a layer that are written down, at most."""
IMAGES = 24
_PICTURE_LIMIT = 2**16
_JPEG = re.compile(r"/9j/[A-Za-z0-9+/]+={0,2}")  # base64 of a file that begins as a JPEG does
_PASS_ENTRIES = 200


@dataclass(frozen=True)
class Table:
    """Heads, and one row for each thing."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Front:
    """The best plans: drawn, and as a table."""

    chart: Chart | None
    table: Table
    legend: tuple[tuple[MarkClass, str], ...]
    beside: str


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


@dataclass(frozen=True)
class WorstImage:
    """One image, and how both models answered it; `original_right` is None without a label."""

    name: str
    picture: str
    original: str
    converted: str
    label: str
    original_right: bool | None
    converted_right: bool | None
    error: str


@dataclass(frozen=True)
class Section:
    """Named facts under one title."""

    title: str
    facts: tuple[tuple[str, str], ...]


# ---- the front


def front(run: Record) -> Front | None:
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
        speedup = probe.record("latency").number("speedup")
        gained = probe.number("macs_reduction") if speedup is None else speedup
        error = probe.number("effect")
        if gained is not None and error is not None:
            found.append(
                (gained, error, f"tried: {gained:.2f} times, {_drop(probe.record('drop'))}")
            )
    return found


def _verified(points: Sequence[Record]) -> list[tuple[float, float, str]]:
    found = []
    for point in points:
        done = point.record("verified")
        speedup = done.record("latency").number("speedup")
        gained = done.number("macs_reduction") if speedup is None else speedup
        error = point.number("effect")
        if gained is not None and error is not None:
            found.append(
                (gained, error, f"carried out: {gained:.2f} times, {_drop(done.record('drop'))}")
            )
    return found


def _carried_out(run: Record) -> list[tuple[float, float, str]]:
    """Give the model that was written, unless the search lists it."""
    speedup = run.record("latency").number("speedup")
    error = run.record("planned").number("effect")
    if speedup is None or error is None or run.record("search"):
        return []
    return [(speedup, error, f"measured: {speedup:.2f} times")]


def _drop(drop: Record) -> str:
    points, measure = drop.number("points"), drop.text("measure", 40)
    if points is None:
        return "drop not known"
    unit = "% output error" if measure == "output error" else f"points of {measure} lost"
    return f"{points:.2f} {unit}"


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
    return Record(measured), f"tried: {_drop(probe.record('drop'))}, {verdict}"


def _front_cells(point: Record, *, timed: bool) -> list[str]:
    cells = [_two(point.number("macs_reduction")), _two(point.number("params_reduction"))]
    ms = point.number("ms")
    before = ["–" if ms is None else _ms(ms), _two(point.number("speedup"))] if timed else []
    error = point.number("effect")
    return [*before, *cells, "–" if error is None else effect(error)]


def _measured(point: Record) -> str:
    done = point.record("verified")
    if not done:
        return ""
    speedup = done.record("latency").number("speedup")
    reduction = done.number("macs_reduction")
    gained = (
        "" if speedup is None and reduction is None else f"{_two(speedup or reduction)} times, "
    )
    return f"measured: {gained}{_drop(done.record('drop'))}"


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
    return (
        "" if off is None else f"The predicted latency of the result was off by {100 * off:+.0f} %."
    )


# ---- the layers


def depth(run: Record) -> tuple[Bars, ...]:
    """Draw milliseconds and multiply-accumulates of each layer, before and after."""
    found = run.records("layers")
    charts = []
    for unit, title, words in (
        ("ms", "milliseconds", lambda number: f"{number:.3g}"),
        ("macs", "multiply-accumulates", count),
    ):
        rows = []
        for layer in found:
            before, after = layer.number(f"{unit}_before"), layer.number(f"{unit}_after")
            known = before is not None and after is not None
            said = f"{words(before)} → {words(after)}" if known else "not known"
            rows.append((before or 0.0, after or 0.0, f"{layer.text('name')}: {said}"))
        label = (
            f"{title.capitalize()} of {len(rows)} layers from the input to the output, before and after; "
            "the table of layers has the numbers"
        )
        drawn = draw_bars(title, rows, words, label)
        if drawn is not None:
            charts.append(drawn)
    return tuple(charts)


def layers(run: Record) -> tuple[Layer, ...]:
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
        weight=_sizes(layer.numbers("shape")),
        scheme=scheme,
        form=_form(layer, scheme),
        kept=scheme == "kept",
        macs_before="–" if macs[0] is None else count(macs[0]),
        macs_after="–" if macs[1] is None else count(macs[1]),
        reduction="–" if reduction is None else f"{reduction:,.2f}",
        ms_before="–" if ms[0] is None else _ms(ms[0]),
        ms_after="–" if ms[1] is None else _ms(ms[1]),
        error=_percent(error),
        keys={key: value for key, value in numbers.items() if value is not None},
        facts=_layer_facts(layer),
        trace=_trace_chart(trace),
        iterations=_trace_table(trace),
    )


def _form(layer: Record, scheme: str) -> str:
    ranks, support = layer.numbers("ranks"), layer.count("support")
    parts = [scheme]
    if ranks:
        parts.append("rank " + _sizes(ranks))
    if support:
        parts.append(f"{support} channels")
    return ", ".join(parts)


def _layer_facts(layer: Record) -> tuple[tuple[str, str], ...]:
    """Say what the columns of the table do not, and on a narrow screen cannot."""
    error, on_output = layer.number("error"), layer.number("effect")
    seconds, iterations = layer.number("seconds"), layer.count("iterations")
    ms = layer.number("ms_before"), layer.number("ms_after")
    status = layer.text("status", 60)
    ended = f"{status}, {iterations} iterations" if status and iterations else status
    changes = [
        (key, layer.number(f"{key}_before"), layer.number(f"{key}_after"))
        for key in ("macs", "params")
    ]
    facts = {
        "kept, because": layer.text("reason"),
        "operator": layer.text("op", 40),
        "weight": _sizes(layer.numbers("shape")),
        "activation": layer.text("activation", 60),
        **{
            "MACs" if key == "macs" else "parameters": f"{count(before)} → {count(after)}"
            for key, before, after in changes
            if before is not None and after is not None
        },
        "milliseconds": "" if None in ms else f"{_ms(ms[0] or 0.0)} → {_ms(ms[1] or 0.0)}",
        "error after the activation": "" if error is None else _percent(error),
        "error of the output, predicted": "" if on_output is None else effect(on_output),
        "solver": ended,
        "fitted in": f"{seconds:,.1f} s" if seconds else "",
    }
    return tuple((name, words) for name, words in facts.items() if words)


def _trace_chart(trace: Sequence[Record]) -> Chart | None:
    """Draw how the residuals fell; at 1 both are within their tolerance."""
    picked = _picked(trace, TRACE_POINTS)
    if len(picked) < 2:
        return None
    lines: list[tuple[MarkClass, list[tuple[float, float]]]] = []
    marks: tuple[tuple[MarkClass, str], ...] = (("primal", "primal"), ("dual", "dual"))
    for mark, key in marks:
        pairs = [(each.number("iteration"), each.number(key)) for each in picked]
        lines.append((mark, [(x, y) for x, y in pairs if x is not None and y is not None]))
    last = picked[-1]
    return draw_chart(
        f"Residuals of the solver over {len(trace)} iterations; at the end primal "
        f"{_three(last.number('primal'))}, dual {_three(last.number('dual'))} of their tolerance",
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
                *(_three(each.number(key)) for key in ("primal", "dual", "objective", "rho")),
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


# ---- what the validation saw


def worst(validation: Record) -> tuple[WorstImage, ...]:
    """Show the images that the two models answer most differently."""
    names = validation.texts("class_names")
    return tuple(_worst(each, names) for each in validation.records("worst")[:IMAGES])


def _worst(image: Record, names: Sequence[str]) -> WorstImage:
    label = image.number("label")
    original, converted = image.number("original"), image.number("converted")
    error = image.number("error")
    parts = image.text("file").replace("\\", "/").split("/")
    picture = image.text("picture", _PICTURE_LIMIT)
    return WorstImage(
        name="/".join(parts[-2:]) or f"image {image.count('index')}",
        picture=picture if _JPEG.fullmatch(picture) else "",
        original=_class(original, names),
        converted=_class(converted, names),
        label="" if label is None else _class(label, names),
        original_right=None if label is None else original == label,
        converted_right=None if label is None else converted == label,
        error="not finite" if error is None else f"{100 * error:,.0f} %",
    )


def _class(number: float | None, names: Sequence[str]) -> str:
    if number is None:
        return "?"
    if number < 0:
        return "no number"
    index = int(number)
    return names[index] if index < len(names) else f"class {index}"


def outputs(validation: Record) -> Table | None:
    """Say how far each output is from the original's."""
    found = validation.records("outputs")
    if not found:
        return None
    return Table(
        ("output", "max error", "mean", "median", "99 %", "max, of range", "L2, relative"),
        tuple(
            (
                each.text("name") or "?",
                *(_three(each.number(f"{key}_abs")) for key in ("max", "mean", "median", "p99")),
                *(_percent(each.number(key)) for key in ("max_relative", "relative_l2")),
            )
            for each in found
        ),
    )


# ---- how it was made


def recovery(run: Record) -> Section | None:
    """Say what a recovery has come to."""
    found = run.record("recovery")
    if not found:
        return None
    return Section("Recovery", tuple(found.entries()))


def made(run: Record, validation: Record) -> tuple[Section, ...]:
    """Say what a run was asked, on what, where, and for how long."""
    stages = [(each.text("name"), each.number("seconds")) for each in run.records("stages")]
    latency = next(iter(validation.records("latencies")), Record()).record("original")
    sections = [
        Section(
            "Files",
            tuple(
                (name, words)
                for name, words in (
                    ("original", run.text("source") or validation.record("original").text("file")),
                    ("its SHA-256", run.text("source_digest") or _digest(validation, "original")),
                    ("converted", run.text("out") or validation.record("converted").text("file")),
                    ("its SHA-256", run.text("out_digest") or _digest(validation, "converted")),
                    ("calibrated on", run.record("calibration").text("data")),
                    ("their SHA-256", run.record("calibration").text("digest")),
                    ("validated on", validation.text("data")),
                )
                if words
            ),
        ),
        Section("Settings", tuple(run.record("settings").entries())),
        Section(
            "Machine",
            (
                *run.record("machine").entries(),
                *(
                    (f"validation.{name}", latency.shown(name))
                    for name in ("provider", "threads")
                    if latency.shown(name)
                ),
            ),
        ),
        Section(
            "Time",
            tuple((name, f"{seconds:,.1f} s") for name, seconds in stages if seconds is not None),
        ),
    ]
    return tuple(section for section in sections if section.facts)


def passes(run: Record) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    """Say of each graph pass how much it changed, and what it left alone and why."""
    merged: dict[str, tuple[int, list[str]]] = {}
    for each in run.records("passes"):
        name = each.text("name", 80)
        changed, skipped = merged.get(name, (0, []))
        skipped += [f"{skip.text('node')}: {skip.text('why')}" for skip in each.records("skips")]
        merged[name] = changed + len(each.records("changes")), skipped
    return tuple(
        (name, f"{changed:,} changed, {len(skipped):,} left alone", tuple(skipped[:_PASS_ENTRIES]))
        for name, (changed, skipped) in merged.items()
        if changed or skipped
    )


def _digest(validation: Record, role: str) -> str:
    return validation.record(role).text("digest")


# ---- words


def _ms(number: float) -> str:
    return milliseconds(number).removesuffix(" ms")


def _percent(share: float | None) -> str:
    """Write an error with two digits after the point, as the ones above and below it."""
    if share is None:
        return "–"
    return "< 0.01 %" if 0 < share < 5e-5 else f"{100 * share:,.2f} %"


def _sizes(numbers: Sequence[float]) -> str:
    return shape([int(number) for number in numbers]) if numbers else ""


def _two(number: float | None) -> str:
    return "–" if number is None else f"{number:.2f}"


def _three(number: float | None) -> str:
    return "–" if number is None else f"{number:.3g}"

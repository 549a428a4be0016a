"""What became of each layer of a conversion, and of the whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from converter.report.console.output import (
    headed,
    output_console,
    print_lines,
    print_notes,
    texts,
    threads,
)
from converter.report.console.quantization import print_quantized
from converter.report.console.recovery import recovery_lines
from converter.report.words import count, effect, interval, milliseconds, printable, shape

if TYPE_CHECKING:
    from converter.outcome import Answers, Conversion, Latency, LayerOutcome, Probe, Search

__all__ = ["print_conversion"]


def print_conversion(
    conversion: Conversion, reports: Sequence[Path] = (), console: Console | None = None
) -> None:
    """Print what became of each layer, of the whole, and where the files lie."""
    console = console or output_console()
    sparse = any(layer.support for layer in conversion.layers)
    table = headed(
        *("layer", "weight", "scheme", ">rank", *([">channels"] if sparse else [])),
        *(">MACs", ">after", ">error", "status"),
    )
    for layer in conversion.layers:
        table.add_row(*texts(_layer_cells(layer, sparse=sparse)))
    console.print(table)
    print_lines(console, list(_kept_lines(conversion.layers)))
    if conversion.search is not None:
        _print_search(console, conversion.search)
    print_lines(
        console,
        [
            *_latency_lines(conversion.latency),
            *recovery_lines(conversion.recovery),
            *_answers_lines(conversion.answers),
            f"MACs        {count(conversion.macs_before)} → {count(conversion.macs_after)}"
            f"  (÷ {conversion.macs_reduction:.2f})",
            f"parameters  {count(conversion.params_before)} → {count(conversion.params_after)}"
            f"  (÷ {conversion.params_reduction:.2f})",
            f"took        {sum(stage.seconds for stage in conversion.stages):.1f} s, "
            f"{conversion.peak_memory_mib:,.0f} MiB of memory at most",
            "error: squared error of the layer's response after its activation, relative to the "
            "response, on patches that the fit did not see",
        ],
    )
    if conversion.quantization is not None:
        print_quantized(console, conversion.quantization)
    print_notes(console, conversion.notes)
    files = [f"report      {path}" for path in reports]
    print_lines(console, [f"model       {conversion.out}", *files])


def _layer_cells(layer: LayerOutcome, *, sparse: bool) -> list[str]:
    channels = f"{layer.support}/{layer.shape[1]}" if layer.support else "–"
    return [
        layer.name,
        shape(layer.shape),
        layer.scheme,
        "×".join(map(str, layer.ranks)) or "–",
        *([channels] if sparse else []),
        count(layer.macs_before),
        count(layer.macs_after),
        "–" if layer.error is None else f"{100 * layer.error:.3g} %",
        layer.status,
    ]


def _kept_lines(layers: Iterable[LayerOutcome]) -> Iterator[str]:
    """Say why layers were kept, each reason once."""
    kept: dict[str, list[str]] = {}
    for layer in layers:
        if layer.reason is not None:
            kept.setdefault(layer.reason, []).append(printable(layer.name))
    for reason, names in kept.items():
        yield f"kept        {', '.join(names)}: {printable(reason)}"


def _latency_lines(latency: Latency | None) -> Iterator[str]:
    if latency is None:
        return
    yield (
        f"latency     {milliseconds(latency.original_ms)} → {milliseconds(latency.converted_ms)}"
        f"  ({latency.speedup:.2f} times faster, {latency.low:.2f}–{latency.high:.2f}; "
        f"batch {latency.batch}, {latency.provider}, {threads(latency.threads)})"
    )
    predicted = f"{milliseconds(latency.predicted_ms)}, off by {100 * latency.off:+.0f} %"
    if latency.pace is None:
        yield f"predicted   {predicted}"
        return
    yield (
        f"predicted   {predicted}; the plan, timed again, reads {latency.pace:.2f} times its speed of then, "
        f"and at this pace it is off by {100 * latency.off_at_pace:+.0f} %"
    )


def _answers_lines(answers: Answers | None) -> Iterator[str]:
    if answers is None:
        return
    same = ""
    if answers.agreement is not None:
        same = f", the same best class for {100 * answers.agreement:.2f} %"
    images = f"{answers.images:,} calibration images"
    yield f"answers     off by {effect(answers.error)} of their variance{same}, on {images}"


def _print_search(console: Console, search: Search) -> None:
    """Print the budgets that were tried for a tolerance."""
    console.print()
    timed = any(probe.latency is not None for probe in search.probes)
    table = headed(
        *(">tried", *([">speed-up"] if timed else []), ">÷ MACs", ">error, predicted"),
        *(">drop", ""),
    )
    for probe in search.probes:
        table.add_row(*texts(_probe_cells(probe)))
    console.print(table)
    print_lines(console, [f"tolerance   {search.max_drop:g}, on {search.images}", ""])


def _probe_cells(probe: Probe) -> list[str]:
    latency = probe.latency
    return [
        f"{probe.asked:.2f}",
        *([] if latency is None else [interval(latency.speedup, latency.low, latency.high)]),
        f"{probe.macs_reduction:.2f}",
        effect(probe.effect),
        str(probe.drop),
        "within" if probe.within else "",
    ]

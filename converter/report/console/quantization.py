"""What a quantization tried, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from converter.report.console.output import (
    headed,
    output_console,
    print_lines,
    print_notes,
    texts,
    threads,
)
from converter.report.words import effect, interval, milliseconds, printable

if TYPE_CHECKING:
    from converter.quantization.quantizing import Quantized

__all__ = ["print_quantization", "print_quantized"]


def print_quantization(quantized: Quantized, out: Path, console: Console | None = None) -> None:
    """Print what was tried, what a quantization has come to, and where the model lies."""
    console = console or output_console()
    print_quantized(console, quantized.to_dict())
    print_lines(console, [f"model       {out}"])


def print_quantized(console: Console, quantized: Mapping[str, Any]) -> None:
    """Print the figures of a quantization, as they stand in a report too."""
    timed = any(trial["time"] is not None for trial in quantized["trials"])
    table = headed(
        *("quantized", ">in float", ">error", ">same class"), *([">time"] if timed else [])
    )
    for trial in quantized["trials"]:
        table.add_row(*texts(_trial_cells(trial)[: len(table.columns)]))
    console.print()
    console.print(table)
    beside = "error, same class and time are beside the float model"
    print_lines(console, [beside, "", *_quantization_lines(quantized)])
    print_notes(console, quantized["notes"])


def _trial_cells(trial: Mapping[str, Any]) -> list[str]:
    agreement, time = trial["agreement"], trial["time"]
    return [
        trial["name"],
        str(trial["left"] or "–"),
        effect(trial["error"]),
        "–" if agreement is None else f"{100 * agreement:.1f} %",
        "–" if time is None else f"× {time:.2f}",
    ]


def _quantization_lines(quantized: Mapping[str, Any]) -> Iterator[str]:
    """Say in what form the model is, how far that is from the original, and what it takes."""
    how = quantized["precision"]
    if quantized["types"]:
        how += (
            f", activations × weights {quantized['types']}, ranges by {quantized['ranges']} of "
            f"{quantized['images']:,} images"
        )
    verdict = "" if quantized["shipped"] else " (not written)"
    yield f"quantized   {how}{verdict}"
    if quantized["balanced"]:
        yield f"balanced    channels between factors, {quantized['balanced']} times"
    if quantized["left"]:
        names = [printable(name) for each in quantized["left"] for name in each["layers"]]
        yield f"in float    {len(names)} of {quantized['layers']} layers: {', '.join(names)}"
    before, after = quantized["before"], quantized["after"]
    agreement = ""
    if before["agreement"] is not None and after["agreement"] is not None:
        agreement = (
            f", the same best class for {100 * before['agreement']:.2f} → "
            f"{100 * after['agreement']:.2f} %"
        )
    yield (
        f"off by      {effect(before['error'])} → {effect(after['error'])} from the original"
        f"{agreement} of {quantized['held_out']:,} held-out images"
    )
    small, large = quantized["bytes_after"], quantized["bytes_before"]
    yield f"size        {large / 2**20:.2f} → {small / 2**20:.2f} MiB  (÷ {large / small:.2f})"
    latency = quantized["latency"]
    if latency is not None:
        yield from _latency_lines(latency)
    alone = quantized["alone"]
    if alone is not None:
        yield from _alone_lines(alone, quantized["precision"])


def _latency_lines(latency: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"latency     original {milliseconds(latency['original_ms'])}, "
        f"float {milliseconds(latency['float_ms'])}, "
        f"quantized {milliseconds(latency['quantized_ms'])}  "
        f"(batch {latency['batch']}, {latency['provider']}, {threads(latency['threads'])})"
    )
    yield (
        f"            {interval(**latency['speedup'])} times as fast as the original, "
        f"{interval(**latency['over_float'])} times as the float model"
    )


def _alone_lines(alone: Mapping[str, Any], precision: str) -> Iterator[str]:
    """Say what the original is in the same precision, and how much faster the conversion is."""
    deviation = alone["deviation"]
    agreement = ""
    if deviation["agreement"] is not None:
        agreement = f", the same best class for {100 * deviation['agreement']:.2f} %"
    yield (
        f"unconverted the original in {precision}: off by {effect(deviation['error'])}{agreement}, "
        f"{alone['bytes'] / 2**20:.2f} MiB"
    )
    if alone["ms"] is not None:
        yield (
            f"            it takes {milliseconds(alone['ms'])}; the quantized conversion is "
            f"{interval(**alone['speedup'])} times as fast"
        )

"""A quantization: what it has come to, and which model's figures are those of the written one."""

from __future__ import annotations

from collections.abc import Callable

from converter.report.page.made import Section
from converter.report.page.record import Record
from converter.report.words import effect, factor, interval, mebibytes, milliseconds

__all__ = ["latency_of", "quantization_of", "show_quantization"]

_NAMES = 100
"""Layers in float that are named, at most."""


def quantization_of(run: Record) -> Record:
    """Return the quantization of the model that was written; an empty one where that is in float."""
    found = run.record("quantization")
    return found if found.flag("shipped") is True else Record()


def latency_of(run: Record) -> Record:
    """Return what the written model takes, with the names of a conversion's latency.

    A report's own `latency` is that of the float model, which was timed before it was quantized. It says
    nothing of a quantized one, even where that was not timed.
    """
    quantized = quantization_of(run)
    if not quantized:
        return run.record("latency")
    timed = quantized.record("latency")
    speedup = timed.record("speedup")
    return Record(
        {
            "provider": timed.text("provider"),
            "threads": timed.number("threads"),
            "batch": timed.number("batch"),
            "original_ms": timed.number("original_ms"),
            "converted_ms": timed.number("quantized_ms"),
            "speedup": speedup.number("ratio"),
            "low": speedup.number("low"),
            "high": speedup.number("high"),
        }
    )


def show_quantization(run: Record) -> Section | None:
    """Say what a quantization has come to, and whether its model is the one that was written."""
    found = run.record("quantization")
    if not found:
        return None
    before, after, latency = (found.record(part) for part in ("before", "after", "latency"))
    images, held_out = found.count("images"), found.count("held_out")
    pairs, ranges = found.count("balanced"), found.text("ranges", 80)
    facts = {
        "written": _written(found.flag("shipped")),
        "precision": found.text("precision", 40),
        "types, activations × weights": found.text("types", 40),
        "ranges": f"{ranges}, of {images:,} images" if ranges and images else ranges,
        "balanced": f"the channels of {pairs:,} pairs of factors" if pairs else "",
        "layers left in float": _in_float(found),
        "error against the original": _turned(
            before.number("error"), after.number("error"), effect
        ),
        "same best class": _turned(
            before.number("agreement"),
            after.number("agreement"),
            lambda part: f"{100 * part:.2f} %",
        ),
        "judged on": f"{held_out:,} held-out images" if held_out else "",
        "size": _shrunk(found.number("bytes_before"), found.number("bytes_after")),
        "latency": _latencies(latency),
        "times as fast as the original": _ratio(latency.record("speedup")),
        "times as fast as the float model": _ratio(latency.record("over_float")),
        **_unconverted(found),
    }
    return Section("Quantization", tuple((name, words) for name, words in facts.items() if words))


def _unconverted(quantized: Record) -> dict[str, str]:
    """Say what the original is in the same precision, and how much faster the conversion is."""
    alone = quantized.record("alone")
    deviation = alone.record("deviation")
    error, agreement = deviation.number("error"), deviation.number("agreement")
    size, ms = alone.number("bytes"), alone.number("ms")
    known = (
        "" if error is None else f"error {effect(error)}",
        "" if agreement is None else f"the same best class for {100 * agreement:.2f} %",
        "" if size is None else mebibytes(size),
        "" if ms is None else milliseconds(ms),
    )
    return {
        "the original in the same types, not converted": ", ".join(filter(None, known)),
        "times as fast as that": _ratio(alone.record("speedup")),
    }


def _written(shipped: bool | None) -> str:
    if shipped is None:
        return ""
    return "the quantized model" if shipped else "the float model, and not the quantized one"


def _in_float(quantized: Record) -> str:
    """Say how many layers stay in float, and which."""
    layers = quantized.count("layers")
    names = [name for each in quantized.records("left") for name in each.texts("layers")]
    of = f" of {layers:,}" if layers else ""
    if not names:
        return f"none{of}" if of else ""
    more = f" and {len(names) - _NAMES:,} more" if len(names) > _NAMES else ""
    return f"{len(names):,}{of}: {', '.join(names[:_NAMES])}{more}"


def _turned(before: float | None, after: float | None, words: Callable[[float], str]) -> str:
    return "" if before is None or after is None else f"{words(before)} → {words(after)}"


def _shrunk(before: float | None, after: float | None) -> str:
    if before is None or after is None or after <= 0:
        return ""
    return f"{_turned(before, after, mebibytes)} ({factor(before / after)})"


def _latencies(timed: Record) -> str:
    """Say what each model takes, and at which batch."""
    found = [
        f"{name} {milliseconds(ms)}"
        for name in ("original", "float", "quantized")
        if (ms := timed.number(f"{name}_ms")) is not None
    ]
    batch = timed.number("batch")
    return ", ".join(found if batch is None or not found else [*found, f"batch {batch:.0f}"])


def _ratio(speedup: Record) -> str:
    ratio, low, high = (speedup.number(key) for key in ("ratio", "low", "high"))
    if ratio is None:
        return ""
    return f"{ratio:.2f}" if low is None or high is None else interval(ratio, low, high)

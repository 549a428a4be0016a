"""The table of a comparison."""

from __future__ import annotations

from dataclasses import replace

from converter.latency import Speedup, Timing
from converter.report.console.validation import print_validation
from converter.validation.findings import (
    Accuracy,
    Agreement,
    Latency,
    OutputComparison,
    Size,
    Validation,
)
from tests.converter.report.console.samples import line_with, wide

SIZE = Size(bytes=2**20, params=1000, macs=10**6, uncounted=())
TIMING = Timing(4.0, 3.9, 4.1, 100, (4.0,), 1, "cpu", 2, spinning=True, settled=True)
VALIDATION = Validation(
    images=100,
    outputs=(
        OutputComparison("logits", 1000, 0.5, 0.1, 0.05, 0.4, 20.0, 0.025, 0.01, 0.2, None, 0, 0),
    ),
    agreement=Agreement("logits", 0.97, 0.999),
    accuracy=Accuracy(100, 0.9, 0.88, 2.0, 1.4, 3, 1),
    latencies=(
        Latency(1, TIMING, replace(TIMING, median_ms=2.0), Speedup(2.0, 1.9, 2.1)),
        Latency(32, skipped="the model has a fixed batch of 1"),
    ),
    original=SIZE,
    converted=replace(SIZE, macs=5 * 10**5),
)


def test_validation_table() -> None:
    console, stream = wide()
    print_validation(VALIDATION, console)
    text = stream.getvalue()
    assert "÷ 2.00" in line_with(text, "MACs")
    assert "-2.00 ± 1.40 points" in line_with(text, "accuracy")
    assert "4.000 ms" in line_with(text, "latency, batch 1")
    assert "speed-up 2.00 (1.90 to 2.10)" in line_with(text, "latency, batch 1")
    assert "cpu, threads: 2" in text
    assert "97.00%" in line_with(text, "agreement")
    assert "not timed, the model has a fixed batch of 1" in text


def test_validation_without_labels_or_numbers() -> None:
    console, stream = wide()
    empty = OutputComparison("y", 4, None, None, None, None, None, None, None, None, None, 4, 4)
    print_validation(
        replace(VALIDATION, accuracy=None, agreement=None, outputs=(empty,), latencies=()), console
    )
    assert "accuracy" not in stream.getvalue()
    assert "–" in line_with(stream.getvalue(), "y ")

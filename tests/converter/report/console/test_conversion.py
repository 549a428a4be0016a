"""The table of a conversion, its latency, and the search for a tolerance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from converter.outcome import Answers, Probe, Search
from converter.quantization.quantizing import Quantized
from converter.report.console.conversion import print_conversion
from tests.converter.report.console.samples import CONVERSION, DROP, LAYER, TIMED, line_with, wide


def test_conversion_table() -> None:
    console, stream = wide()
    print_conversion(CONVERSION, [Path("out.json")], console)
    text = stream.getvalue()
    converted = line_with(text, "conv1")
    for part in ("64×32×3×3", "sparse + channel", "16", "8/32", "18.9 M", "6.29 M", "1.23 %"):
        assert part in converted
    assert "converged" in converted
    assert line_with(text, "depthwise") == "kept        conv2: depthwise"
    assert "÷ 2.00" in line_with(text, "parameters")
    assert "out.onnx" in line_with(text, "model ")
    assert "out.json" in line_with(text, "report ")
    assert "note: the memory bound halved the patches" in text


def test_columns_without_content_are_left_out() -> None:
    console, stream = wide()
    layer = replace(LAYER, scheme="tucker", ranks=(16, 24), support=0)
    print_conversion(replace(CONVERSION, layers=(layer,)), (), console)
    assert "16×24" in line_with(stream.getvalue(), "conv1")
    assert "channels" not in stream.getvalue()
    assert "kept" not in stream.getvalue()
    assert "latency" not in stream.getvalue()


def test_quantization_is_part_of_a_conversion(quantized: Quantized) -> None:
    console, stream = wide()
    kept = replace(quantized, shipped=False, latency=None, alone=None, left=())
    print_conversion(replace(CONVERSION, quantization=kept.to_dict()), (), console)
    assert line_with(stream.getvalue(), "of 1,800 images").endswith("(not written)")
    assert "\nin float" not in stream.getvalue()
    assert "times as" not in stream.getvalue()
    assert "unconverted" not in stream.getvalue()


@pytest.mark.parametrize(
    ("agreement", "said"), [(0.984, ", the same best class for 98.40 %"), (None, "")]
)
def test_how_far_the_answers_are_off(agreement: float | None, said: str) -> None:
    console, stream = wide()
    print_conversion(replace(CONVERSION, answers=Answers(0.0132, agreement, 250)), (), console)
    assert line_with(stream.getvalue(), "answers") == (
        f"answers     off by 1.3 % of their variance{said}, on 250 calibration images"
    )
    console, stream = wide()
    print_conversion(CONVERSION, (), console)
    assert "answers" not in stream.getvalue()


def test_latency_measured_and_predicted() -> None:
    console, stream = wide()
    print_conversion(replace(CONVERSION, latency=TIMED), (), console)
    text = stream.getvalue()
    assert line_with(text, "latency") == (
        "latency     12.3 ms → 4.11 ms  (3.00 times faster, 2.90–3.10; batch 1, cpu, 2 threads)"
    )
    assert line_with(text, "predicted") == "predicted   4.20 ms, off by +2 %"


def test_a_prediction_at_another_pace() -> None:
    console, stream = wide()
    print_conversion(
        replace(CONVERSION, latency=replace(TIMED, predicted_ms=6.576, pace=1.5)), (), console
    )
    assert line_with(stream.getvalue(), "predicted") == (
        "predicted   6.58 ms, off by +60 %; the plan, timed again, reads 1.50 times its speed of then, and "
        "at this pace it is off by +7 %"
    )


@pytest.mark.parametrize("timed", [True, False])
def test_the_search_for_a_tolerance(timed: bool) -> None:
    console, stream = wide()
    latency = TIMED if timed else None
    probes = (
        Probe(2.5, 0.004, 2.9, latency, DROP, within=True),
        Probe(5.0, 0.04, 6.2, latency, replace(DROP, points=3.0), within=False),
    )
    searched = Search(0.5, "500 images of val", probes)
    print_conversion(replace(CONVERSION, search=searched), (), console)
    text = stream.getvalue()
    first = line_with(text, "0.42 ± 0.10 points of accuracy")
    assert "within" in first
    assert "2.50" in first
    assert ("3.00 (2.90–3.10)" in first) == timed == ("speed-up" in text)
    assert "within" not in line_with(text, "3.00 ± 0.10")
    assert line_with(text, "tolerance") == "tolerance   0.5, on 500 images of val"

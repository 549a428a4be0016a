"""What a page says of a quantization: the figures are those of the model that was written."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from converter.report.page.made import Section
from converter.report.page.quantization import latency_of, quantization_of, show_quantization
from converter.report.page.record import Record

Report = dict[str, Any]


def facts(report: Report) -> dict[str, str]:
    section = show_quantization(Record(report))
    assert isinstance(section, Section)
    assert section.title == "Quantization"
    return dict(section.facts)


def test_all_that_the_terminal_says_stands_in_the_section(quantized: Report) -> None:
    assert facts(quantized) == {
        "written": "the quantized model",
        "precision": "int8",
        "types, activations × weights": "u8 × s8",
        "ranges": "percentile 99.99, of 1,800 images",
        "balanced": "the channels of 2 pairs of factors",
        "layers left in float": "2 of 5: /block1/conv1/Conv/core, /block1/conv1/Conv/out",
        "error against the original": "0.91 % → 1.2 %",
        "same best class": "96.00 % → 95.50 %",
        "judged on": "200 held-out images",
        "size": "3.00 MiB → 1.00 MiB (÷ 3.00)",
        "latency": "original 12.3 ms, float 4.10 ms, quantized 1.60 ms, batch 32",
        "times as fast as the original": "7.70 (7.50–7.90)",
        "times as fast as the float model": "2.56 (2.50–2.60)",
        "the original in the same types, not converted": (
            "error 0.3 %, the same best class for 99.00 %, 2.00 MiB, 2.40 ms"
        ),
        "times as fast as that": "1.50 (1.40–1.60)",
    }


def test_what_was_not_measured_is_left_out(quantized: Report) -> None:
    quantized["quantization"] |= {
        **{"precision": "float16", "types": "", "ranges": "", "balanced": 0, "left": []},
        **{"latency": None, "alone": None},
    }
    for state in ("before", "after"):
        quantized["quantization"][state]["agreement"] = None
    assert facts(quantized) == {
        "written": "the quantized model",
        "precision": "float16",
        "layers left in float": "none of 5",
        "error against the original": "0.91 % → 1.2 %",
        "judged on": "200 held-out images",
        "size": "3.00 MiB → 1.00 MiB (÷ 3.00)",
    }


def test_one_that_was_not_written_is_said_to_be_so(quantized: Report) -> None:
    quantized["quantization"]["shipped"] = False
    assert facts(quantized)["written"] == "the float model, and not the quantized one"
    assert not quantization_of(Record(quantized))
    assert latency_of(Record(quantized)).number("speedup") == 3.0


def test_the_written_model_has_its_own_latency_or_none(quantized: Report, run: Report) -> None:
    found = latency_of(Record(quantized))
    assert found.text("provider") == "cpu"
    numbers = ("threads", "batch", "original_ms", "converted_ms", "speedup", "low", "high")
    assert [found.number(key) for key in numbers] == [1, 32, 12.3, 1.6, 7.7, 7.5, 7.9]
    quantized["quantization"]["latency"] = None
    assert latency_of(Record(quantized)).number("speedup") is None
    assert latency_of(Record(run)).number("speedup") == 3.0
    assert show_quantization(Record(run)) is None


def test_a_report_from_before_the_original_stood_beside_is_shown(quantized: Report) -> None:
    del quantized["quantization"]["alone"]
    assert not any("not converted" in name for name in facts(quantized))


def test_a_few_names_of_many(quantized: Report) -> None:
    names = [f"layer{index}" for index in range(150)]
    quantized["quantization"] |= {"left": [{"layers": names}], "layers": 400}
    assert facts(quantized)["layers left in float"].startswith("150 of 400: layer0, layer1,")
    assert facts(quantized)["layers left in float"].endswith(", layer99 and 50 more")


@pytest.mark.parametrize("shipped", ["yes", 1, None, [True]])
def test_only_what_says_so_was_written(quantized: Report, shipped: Any) -> None:
    quantized["quantization"]["shipped"] = shipped
    assert not quantization_of(Record(quantized))
    assert "written" not in facts(quantized)


@pytest.mark.parametrize("value", [None, "x", -1, 0, 1e-300, 10**400, [[]], {"a": 1}])
def test_sizes_and_ratios_may_be_anything(quantized: Report, value: Any) -> None:
    for key in ("bytes_before", "bytes_after"):
        changed = deepcopy(quantized)
        changed["quantization"][key] = value
        facts(changed)
    quantized["quantization"]["latency"]["speedup"]["low"] = value
    assert facts(quantized)["times as fast as the original"].startswith("7.70")

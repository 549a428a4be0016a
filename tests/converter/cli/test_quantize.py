"""`twofold quantize`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import converter
from converter.config import QuantizationSettings, Runtime, Target
from tests.converter.cli.conftest import Run


def test_quantize_takes_int8_where_nothing_is_said(
    twofold: Run,
    monkeypatch: pytest.MonkeyPatch,
    net: Path,
    pictures: Path,
    tmp_path: Path,
    quantized: converter.Quantized,
) -> None:
    given: list[Any] = []

    def quantize(*positional: Any, **named: Any) -> Any:
        given.append((positional, named))
        return quantized

    monkeypatch.setattr(converter, "quantize", quantize)
    out, report = tmp_path / "q.onnx", tmp_path / "q.json"
    asked = ("quantize", net, net, "--calib", pictures, "--out", out)
    ended = twofold(*asked, "--images", 5, "--batch", 8, "--threads", 1, "--json", report)
    assert ended.code == 0
    positional, named = given[0]
    assert positional == (net, net, pictures, out, QuantizationSettings(images=5))
    assert named["target"] == Target(Runtime(threads=1), 8)
    assert named["timing"] is True
    assert json.loads(report.read_text(encoding="utf-8"))["format"] == "twofold-quantization-1"
    for part in ("u8 × s7", "1 of 2 layers: conv1", "a note", str(out)):
        assert part in ended.out
    assert twofold(*asked, "--fp16", "-q").out == ""
    assert given[1][0][4] == QuantizationSettings("float16")
    refused = twofold(*asked, "--int8", "--fp16")
    assert refused.code == 2
    assert "leave one of them out" in refused.err

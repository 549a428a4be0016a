"""`twofold convert`: options to settings, what goes where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from converter.config import (
    PRESETS,
    Budget,
    CalibrationSettings,
    QuantizationSettings,
    Runtime,
    SolverSettings,
    Target,
)
from tests.converter.cli.conftest import Called, Run


def test_options_become_settings(
    twofold: Run, called: Called, net: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "small.onnx"
    ended = twofold(
        *("convert", net, "--calib", pictures, "--out", out, "--macs", 2, "--params", 3),
        *("--solver", "svd", "--preset", "cifar10", "--size", "8x8", "--channels", "bgr"),
        *("--images", 10, "--patches", 512, "--memory", 128, "--calib-batch", 4, "--seed", 7),
        *("--threads", 1, "--device", "cuda", "--batch", 32, "--no-timing", "--cache", tmp_path),
    )
    assert ended.code == 0
    assert called.positional == (net, pictures, out, Budget(macs=2, params=3))
    cifar10 = PRESETS["cifar10"]
    assert called.named["preprocessing"] == cifar10.replace(
        size=(8, 8), channels="bgr", mean=cifar10.mean[::-1], std=cifar10.std[::-1]
    )
    assert called.named["calibration"] == CalibrationSettings(10, 4, 512, 128, 7)
    assert called.named["solver"] == SolverSettings("svd", "cuda")
    assert called.named["target"] == Target(Runtime("cpu", 1), 32)
    assert called.named["timing"] is False
    assert called.named["cache"] == tmp_path
    assert called.named["max_drop"] is None


def test_defaults_are_those_of_the_settings(
    twofold: Run, called: Called, net: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "small.onnx"
    assert twofold("convert", net, "--calib", pictures, "--out", out, "--speedup", 2).code == 0
    assert called.positional == (net, pictures, out, Budget(speedup=2))
    assert called.named["calibration"] == CalibrationSettings()
    assert called.named["solver"] == SolverSettings()
    assert called.named["target"] == Target()
    assert called.named["timing"] is True
    assert called.named["cache"] is None


@pytest.mark.parametrize(
    ("options", "budget"),
    [
        (("--latency-ms", "4.5"), Budget(latency_ms=4.5)),
        (("--speedup", "3", "--params", "2"), Budget(speedup=3, params=2)),
        (("--latency-ms", "4.5", "--macs", "2"), Budget(latency_ms=4.5, macs=2)),
    ],
)
def test_budgets(
    twofold: Run, called: Called, net: Path, tmp_path: Path, options: tuple[str], budget: Budget
) -> None:
    twofold("convert", net, "--calib", "x.npy", "--out", tmp_path / "s.onnx", *options)
    assert called.positional[3] == budget


def test_a_tolerance_in_place_of_a_budget(
    twofold: Run, called: Called, net: Path, pictures: Path, tmp_path: Path
) -> None:
    ended = twofold(
        *("convert", net, "--calib", pictures, "--out", tmp_path / "s.onnx", "--max-drop", 0.5),
        *("--val", tmp_path, "--schemes", "spatial, tucker"),
    )
    assert ended.code == 0
    assert called.positional[3] is None
    assert (called.named["max_drop"], called.named["val"]) == (0.5, tmp_path)
    assert called.named["solver"].schemes == ("spatial", "tucker")


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ((), None),
        (("--int8",), QuantizationSettings(memory_mib=CalibrationSettings.memory_mib)),
        (
            ("--int8", "--harmless", 0.5, "--calib-batch", 4, "--memory", 128),
            QuantizationSettings(error=0.005, batch=4, memory_mib=128),
        ),
        (("--fp16",), QuantizationSettings("float16", memory_mib=CalibrationSettings.memory_mib)),
    ],
)
def test_convert_quantizes_where_it_is_asked_to(
    twofold: Run,
    called: Called,
    net: Path,
    pictures: Path,
    tmp_path: Path,
    options: tuple[Any, ...],
    settings: QuantizationSettings | None,
) -> None:
    out = tmp_path / "small.onnx"
    ended = twofold("convert", net, "--calib", pictures, "--out", out, "--macs", 2, *options)
    assert ended.code == 0
    assert called.named["quantization"] == settings


def test_the_report_overwrites_no_image_list(
    twofold: Run, called: Called, net: Path, tmp_path: Path
) -> None:
    val = tmp_path / "val.npy"
    val.touch()
    ended = twofold(
        *("convert", net, "--calib", "x.npy", "--out", tmp_path / "s.onnx", "--max-drop", 1),
        *("--val", val, "--report", val),
    )
    assert ended.code == 2
    assert "overwrite" in ended.err
    assert called.positional == ()


def test_table_report_and_files(
    twofold: Run, called: Called, net: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "small.onnx"
    ended = twofold("convert", net, "--calib", pictures, "--out", out, "--macs", 2)
    assert ended.code == 0
    assert "too small" in ended.out
    assert "nothing was left to gain" in ended.out
    assert str(out) in ended.out
    report = tmp_path / "small.json"
    assert str(report) in ended.out
    assert json.loads(report.read_text(encoding="utf-8"))["layers"][0]["reason"] == "too small"
    assert "--preset unit" in ended.err  # nothing was said about pixels
    assert called.named["preprocessing"] == PRESETS["unit"]


def test_quiet_prints_nothing(
    twofold: Run, called: Called, net: Path, pictures: Path, tmp_path: Path
) -> None:
    report = tmp_path / "elsewhere.json"
    ended = twofold(
        *("convert", net, "--calib", pictures, "--out", tmp_path / "s.onnx", "--macs", 2),
        *("--report", report, "-q"),
    )
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    assert called.positional
    assert report.is_file()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((), "--macs 2"),
        (("--macs", "1"), "not a factor above 1"),
        (("--macs", "nan"), "not a factor above 1"),
        (("--speedup", "1"), "not a factor above 1"),
        (("--latency-ms", "0"), "milliseconds above 0"),
        (("--speedup", "2", "--latency-ms", "4"), "one of them"),
        (("--max-drop", "1", "--macs", "2"), "takes the place of a budget"),
        (("--macs", "2", "--schemes", "magic"), "magic"),
        (("--macs", "2", "--schemes", ","), "schemes none"),
        (("--macs", "2", "--batch", "0"), "batch 0"),
        (("--macs", "2", "--solver", "magic"), "magic"),
        (("--macs", "2", "--preset", "magic"), "imagenet"),
        (("--macs", "2", "--mean", "a,b"), "'a,b'"),
        (("--macs", "2", "--size", "0"), "size"),
        (("--macs", "2", "--provider", "tpu"), "tpu"),
        (("--macs", "2", "--patches", "1"), "patches"),
        (("--macs", "2", "--memory", "1"), "memory"),
        (("--macs", "2", "--report", "net.onnx"), "net.onnx"),
        (("--macs", "2", "--report", "small.onnx"), "small.onnx"),
        (("--macs", "2", "--report", "none/report.json"), "none"),
        (("--macs", "2", "--out", "."), "folder"),
        (("--macs", "2", "--out", "net.onnx"), "overwrite"),
    ],
)
def test_settings_that_make_no_sense(
    twofold: Run,
    called: Called,
    net: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    sentence: str,
) -> None:
    monkeypatch.chdir(net.parent)
    before = sorted(net.parent.rglob("*"))
    ended = twofold("convert", "net.onnx", "--calib", pictures, "--out", "small.onnx", *options)
    assert ended.code == 2
    assert ended.err.startswith("twofold: error: ")
    assert ended.err.count("\n") == 1
    assert sentence in ended.err
    assert called.positional == ()  # refused before any work
    assert sorted(net.parent.rglob("*")) == before

"""Failures: one sentence and an exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from converter.cli.terminal import DEBUG
from converter.errors import (
    CalibrationError,
    ConfigError,
    ConverterError,
    ModelError,
    SolverError,
    ValidationError,
)
from tests.converter.cli.conftest import Called, Run


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValidationError("v"), 1),
        (ConfigError("c"), 2),
        (ModelError("m"), 3),
        (CalibrationError("d"), 4),
        (SolverError("s"), 5),
        (ConverterError("e"), 5),
    ],
)
def test_exit_codes(
    twofold: Run, called: Called, net: Path, tmp_path: Path, error: ConverterError, code: int
) -> None:
    called.error = error
    out = tmp_path / "s.onnx"
    ended = twofold("convert", net, "--calib", "x.npy", "--out", out, "--macs", 2)
    assert ended.code == code
    assert (ended.out, ended.err) == ("", f"twofold: error: {error}\n")


def test_unexpected_error_is_one_sentence(
    twofold: Run, called: Called, net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called.error = KeyError("lost\nkey")
    arguments = ("convert", net, "--calib", "x.npy", "--out", tmp_path / "s.onnx", "--macs", 2)
    ended = twofold(*arguments)
    assert ended.code == 5
    assert "KeyError" in ended.err
    assert "TWOFOLD_DEBUG=1" in ended.err
    assert ended.err.count("\n") == 1
    monkeypatch.setenv(DEBUG, "1")
    ended = twofold(*arguments)
    assert ended.code == 5
    assert "Traceback" in ended.err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 8 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("[ONNXRuntimeError] : 6 : std::bad_alloc"),
    ],
)
def test_too_little_memory_is_named(
    twofold: Run, called: Called, net: Path, tmp_path: Path, error: Exception
) -> None:
    called.error = error
    ended = twofold("convert", net, "--calib", "x.npy", "--out", tmp_path / "s.onnx", "--macs", 2)
    assert ended.code == 5
    assert "not enough memory" in ended.err
    assert "--patches" in ended.err


def test_interrupt(twofold: Run, called: Called, net: Path, tmp_path: Path) -> None:
    called.error = KeyboardInterrupt()
    ended = twofold("convert", net, "--calib", "x.npy", "--out", tmp_path / "s.onnx", "--macs", 2)
    assert ended.code == 130
    assert ended.err.startswith("twofold: interrupted")
    assert ended.err.count("\n") == 1

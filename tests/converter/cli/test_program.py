"""The program itself: how it starts, its help, wrong usage."""

from __future__ import annotations

import subprocess
import sys

import pytest

import converter
from tests.converter.cli.conftest import Run


def test_starting_loads_nothing_slow() -> None:
    slow = (
        "{'torch', 'onnx', 'onnxruntime', 'onnx_graphsurgeon', 'PIL', 'rich.progress', "
        "'matplotlib', 'scipy'}"
    )
    check = f"import sys, converter.cli; print({slow} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_module_is_the_same_program() -> None:
    command = [sys.executable, "-m", "converter", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"twofold {converter.__version__}\n"
    assert done.stderr == ""


@pytest.mark.parametrize(
    "command",
    [(), *((name,) for name in ("convert", "plan", "inspect", "validate", "run", "check", "init"))],
)
def test_help(twofold: Run, command: tuple[str, ...]) -> None:
    ended = twofold(*command, "--help")
    assert ended.code == 0
    assert "Usage: twofold" in ended.out


@pytest.mark.parametrize(
    "arguments",
    [
        ("unknown",),
        ("convert",),
        ("convert", "a.onnx", "--calib", "b"),
        ("convert", "a.onnx", "--calib", "b", "--out", "c", "--macs", "half"),
        ("plan", "a.onnx"),
        ("plan", "a.onnx", "--calib", "b", "--macs", "2"),
        ("validate", "a.onnx", "--data", "d"),
        ("inspect", "a.onnx", "--wrong"),
    ],
)
def test_wrong_usage_is_two(twofold: Run, arguments: tuple[str, ...]) -> None:
    ended = twofold(*arguments)
    assert ended.code == 2
    assert "Traceback" not in ended.err
    assert ended.out == ""

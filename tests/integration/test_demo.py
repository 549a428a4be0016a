"""The demo: what a person sees first must work, with little of everything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from tools.demo import ROOT, commands


def test_every_command_is_shown_and_works(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    folder = tmp_path / "demo"
    options = ["--folder", str(folder), "--epochs", "1", "--macs", "2", "--seconds", "0.05"]
    options += ["--solver", "data-svd"]  # the quick one: what ADMM does is tested elsewhere
    done = subprocess.run(
        [sys.executable, "-m", "tools.demo", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shown = [line for line in done.stdout.splitlines() if line.startswith("$ ")]
    assert [line.split()[1].rpartition("/")[2] for line in shown] == [
        Path(sys.executable).name,
        *["twofold"] * 3,
    ]
    converted = folder / "digits-small.onnx"
    onnx.checker.check_model(str(converted))
    report = json.loads((folder / "digits-small.json").read_text(encoding="utf-8"))
    assert report["macs_reduction"] >= 2 * 0.99  # ranks are whole numbers
    validation = json.loads((folder / "validation.json").read_text(encoding="utf-8"))
    assert validation["accuracy"]["images"] == 360
    assert validation["finite"]
    for name in ("digits.onnx", "digits-small.onnx", "digits-small.json", "validation.json"):
        assert name in done.stdout


def test_it_stops_at_the_first_failure(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    (tmp_path / "calib").touch()  # where a folder should go
    done = subprocess.run(
        [sys.executable, "-m", "tools.demo", "--folder", str(tmp_path), "--epochs", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "the demo stops here" in done.stdout
    assert done.stdout.count("$ ") == 1


def test_commands_name_files_in_one_folder() -> None:
    for command in commands(Path("demo"), epochs=4, macs=3, seconds=2):
        assert any("demo" in argument for argument in command)

"""A run that is killed goes on from its work folder, to the file of an undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import converter
from converter import Budget, CalibrationSettings, Conversion, Runtime, SolverSettings, Target
from converter import place as placing
from converter import preparation as preparing
from converter import realisation as realising
from tools.small_network import write_small_network

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model and images."""
    write_small_network(tmp_path)
    return tmp_path


def convert(folder: Path, out: str, work: str | None, macs: float = 4) -> Conversion:
    return converter.convert(
        folder / "model.onnx",
        folder / "images.npy",
        folder / out,
        Budget(macs=macs),
        calibration=CalibrationSettings(batch=16, patches=512),
        solver=SolverSettings(iterations=4, polish=2),
        target=Target(Runtime(threads=1)),
        timing=False,
        work=None if work is None else folder / work,
    )


def test_a_work_folder_changes_nothing_but_the_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = convert(folder, "plain.onnx", None)
    fitted = []
    fit = realising.fit
    monkeypatch.setattr(
        realising, "fit", lambda *problem, trade: fitted.append(1) or fit(*problem, trade=trade)
    )
    predicted, measured = [], []
    predict, metrics = placing.predict, preparing.output_metrics
    monkeypatch.setattr(
        placing, "predict", lambda task: predicted.append(task.name) or predict(task)
    )
    monkeypatch.setattr(
        preparing,
        "output_metrics",
        lambda *given, **how: measured.append(1) or metrics(*given, **how),
    )
    first = convert(folder, "first.onnx", "work")
    count = len(fitted)
    whole = len(predicted)
    assert whole > 2
    assert measured == [1]
    assert count == sum(layer.scheme != "kept" for layer in plain.layers) > 2
    again = convert(folder, "again.onnx", "work")
    assert len(fitted) == count  # nothing was fitted twice
    assert len(predicted) == whole
    assert measured == [1]
    assert plain.out.read_bytes() == first.out.read_bytes() == again.out.read_bytes()
    assert [layer.trace for layer in again.layers] == [layer.trace for layer in first.layers]
    assert again.notes == plain.notes

    damaged = sorted((folder / "work").glob("fit-*.npz"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    mended = convert(folder, "mended.onnx", "work")
    assert len(fitted) == count + 1
    assert mended.out.read_bytes() == plain.out.read_bytes()
    assert any(damaged.name in note and "made again" in note for note in mended.notes)

    other = convert(folder, "other.onnx", "work", macs=3)
    assert len(fitted) > count + 1  # another plan is another fit
    assert other.out.read_bytes() == convert(folder, "x.onnx", None, macs=3).out.read_bytes()


def test_killed_at_several_moments(folder: Path) -> None:
    def begin(out: str, work: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "converter", "convert", folder / "model.onnx"),
                *("--calib", folder / "images.npy", "--out", folder / out, "--macs", "4"),
                *("--no-timing", "--threads", "1", "--patches", "512", "--calib-batch", "16"),
                *("--work", folder / work, "--quiet"),
            ],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
        )

    whole = begin("whole.onnx", "other")
    assert whole.communicate() == (None, b"")
    fits = len(list((folder / "other").glob("fit-*.npz")))
    assert fits > 2
    before = (folder / "model.onnx").read_bytes()
    # among the predictions, and among the fits; tools/faults.py does it at random moments
    for files, kept in (("predict-*.npz", 2), ("fit-*.npz", fits - 1)):
        run = begin("small.onnx", "work")
        while run.poll() is None and len(list((folder / "work").glob(files))) < kept:
            time.sleep(0.002)
        run.kill()
        run.communicate()
        assert run.returncode == -signal.SIGKILL, "the run was over before it could be killed"
        assert not (folder / "small.onnx").exists()
        assert not (folder / "small.json").exists()

    run = begin("small.onnx", "work")
    assert run.communicate()[1] == b""
    assert run.returncode == 0
    assert (folder / "small.onnx").read_bytes() == (folder / "whole.onnx").read_bytes()
    assert (folder / "model.onnx").read_bytes() == before

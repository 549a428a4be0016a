"""The front of a small network: rising, verified where asked for, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

import converter
from converter import CalibrationSettings, ConfigError, Front, SolverSettings, Target
from converter import front as module
from converter.config import Runtime
from converter.report.files import report_text

TEXT = """<ir_version: 8, opset_import: ["": 17]>
net (float[n, 3, 16, 16] image) => (float[n, 4] scores) {
    [conv1] a = Conv<pads = [1, 1, 1, 1]>(image, w1)
    b = Relu(a)
    [conv2] c = Conv<pads = [1, 1, 1, 1]>(b, w2)
    d = Relu(c)
    e = GlobalAveragePool(d)
    f = Flatten(e)
    [classifier] scores = Gemm<transB = 1>(f, w3)
}"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    random = np.random.default_rng(0)
    model = onnx.parser.parse_model(TEXT)
    for name, shape in (("w1", (16, 3, 3, 3)), ("w2", (32, 16, 3, 3)), ("w3", (4, 32))):
        weight = (random.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, name))
    onnx.save(model, tmp_path / "net.onnx")
    np.save(tmp_path / "images.npy", random.normal(size=(30, 3, 16, 16)).astype(np.float32))
    return tmp_path / "net.onnx", tmp_path / "images.npy"


def plan(files: tuple[Path, Path], verify: int, *, timing: bool, schemes: str = "spatial") -> Front:
    return converter.plan(
        *files,
        verify=verify,
        calibration=CalibrationSettings(batch=16, patches=512),
        solver=SolverSettings(schemes=(schemes,)),
        target=Target(Runtime(threads=1)),
        timing=timing,
        cache=files[0].parent / "cache",
    )


@pytest.fixture(autouse=True)
def _whole_front(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of random weights loses much by any plan; those that do are looked at too."""
    monkeypatch.setattr(module, "WORST_EFFECT", 3.0)


def check_rising(front: Front) -> None:
    gains = [point.gained for point in front.points]
    effects = [point.effect for point in front.points]
    assert len(gains) > 3
    assert gains == sorted(gains)
    assert effects == sorted(effects)
    assert effects[0] == 0.0
    assert gains[0] == pytest.approx(1.0)
    assert effects[-1] <= module.WORST_EFFECT


def test_by_multiply_accumulates(files: tuple[Path, Path]) -> None:
    front = plan(files, 2, timing=False)
    check_rising(front)
    assert not front.timed
    done = [point for point in front.points if point.verified is not None]
    assert len(done) == 2
    for point in done:
        assert point.verified is not None
        assert point.effect > 0
        # what was predicted is what was built: costs are exact without timing
        assert point.verified.macs_reduction == pytest.approx(point.macs_reduction, rel=1e-3)
        assert point.verified.params_reduction == pytest.approx(point.params_reduction, rel=1e-3)
        assert point.verified.latency is None
        assert point.verified.drop.images == 6  # every fifth
        assert "spatial r " in point.forms["conv2"]
    assert front.judged_on is not None
    assert sorted(path.name for path in files[0].parent.iterdir()) == ["images.npy", "net.onnx"]
    content = json.loads(report_text(front.to_dict()))
    assert content["format"] == "twofold-front-1"
    assert len(content["points"]) == len(front.points)


def test_by_milliseconds(files: tuple[Path, Path]) -> None:
    front = plan(files, 1, timing=True)
    assert front.timed
    gains = [point.gained for point in front.points]
    assert gains == sorted(gains)
    assert all(point.ms is not None and point.ms > 0 for point in front.points)
    done = [point.verified for point in front.points if point.verified is not None]
    assert len(done) == min(1, len(gains) - 1)  # noise may leave nothing that is faster
    for each in done:
        assert each.latency is not None
        assert each.latency.speedup >= 1.0  # what is not faster is put back


def test_plans_that_lose_too_much_are_left_out(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = plan(files, 0, timing=False)
    monkeypatch.setattr(module, "WORST_EFFECT", 0.5)
    front = plan(files, 0, timing=False)
    useful = [each.effect for each in whole.points if each.effect <= 0.5]
    assert [each.effect for each in front.points] == useful
    assert 1 < len(useful) < len(whole.points)


def test_nothing_verified_needs_no_images_to_spare(files: tuple[Path, Path]) -> None:
    np.save(files[1], np.load(files[1])[:4])
    front = plan(files, 0, timing=False)
    check_rising(front)
    assert front.judged_on is None
    assert all(point.verified is None for point in front.points)


def test_points_and_images_that_make_no_sense(files: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="0 to 16"):
        plan(files, 17, timing=False)
    with pytest.raises(ConfigError, match="--verify 0"):
        converter.plan(*files, val=files[1].parent, verify=0)

"""A budget that is met in parts: each is converted, recovered, and what the next one starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

import converter
from converter.config import Budget, RecoverySettings
from converter.errors import ConfigError, SolverError
from converter.gradual import _some_of, parts_of, shares_of
from converter.model_file import save_model
from converter.refine import training
from converter.refine.pipeline import checkpoint_of

TEXT = """<ir_version: 8, opset_import: ["": 17]>
small (float[n, 3, 8, 8] x) => (float[n, 5] y) {
    [first] h = Conv <pads = [1, 1, 1, 1]> (x, a, b)
    r = Relu (h)
    [second] k = Conv <pads = [1, 1, 1, 1]> (r, e)
    s = Relu (k)
    p = GlobalAveragePool (s)
    f = Flatten (p)
    [last] y = Gemm <transB = 1> (f, c, d)
}"""
SHAPES = {"a": (16, 3, 3, 3), "b": (16,), "e": (16, 16, 3, 3), "c": (5, 16), "d": (5,)}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Model and images."""
    random = np.random.default_rng(0)
    model = onnx.parser.parse_model(TEXT)
    for name, shape in SHAPES.items():
        values = random.standard_normal(shape) * (2 / max(np.prod(shape[1:]), 1)) ** 0.5
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    save_model(model, tmp_path / "original.onnx")
    images = random.standard_normal((160, 3, 8, 8)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    return tmp_path / "original.onnx", tmp_path / "images.npy"


def convert(files: tuple[Path, Path], name: str, **changes: Any) -> converter.Conversion:
    model, images = files
    given: dict[str, Any] = {
        "epochs": 18,
        "batch": 16,
        "rate": 0.01,
        "precision": "float32",
        **changes,
    }
    return converter.convert(
        model,
        images,
        model.parent / name,
        Budget(macs=4),
        calibration=converter.CalibrationSettings(patches=512, batch=16),
        timing=False,
        recovery=RecoverySettings(**given),
    )


def weights(path: Path) -> dict[str, NDArray[np.float32]]:
    return {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}


def test_two_parts_meet_the_budget_and_leave_nothing_behind(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "PATIENCE", 10_000)  # to the end of the epochs
    model = files[0]
    given = model.read_bytes()
    found = convert(files, "two.onnx")
    once = convert(files, "one.onnx", gradual=1)
    for each in (found, once):
        assert each.macs_before / each.macs_after >= 4
        assert each.recovery is not None
        assert each.recovery["improved"]
    assert [layer.name for layer in found.layers] == ["first", "second", "last"]
    [note] = [note for note in found.notes if note.startswith("part 1 of 2: MACs ÷ ")]
    assert 2 <= float(note.split("÷ ")[1].split(",")[0]) < 3
    assert not any(note.startswith("part") for note in once.notes)
    assert found.recovery is not None
    assert found.recovery["epochs"] == pytest.approx(12, abs=0.2)  # of 18, two thirds
    assert model.read_bytes() == given
    assert sorted(path.suffix for path in model.parent.iterdir()) == [".npy"] + [".onnx"] * 3
    for out in ("one.onnx", "two.onnx"):
        converter.validate(model, model.parent / out, files[1], time_batches=(), seconds=0.01)


@pytest.mark.parametrize("at", [10, 70], ids=["in the first part", "in the second part"])
def test_a_run_that_is_cut_off_has_finished_parts_behind_it(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    convert(files, "whole.onnx")
    step = training.Training._one_step
    taken = 0

    def interrupted(self: training.Training) -> None:
        nonlocal taken
        if taken == at:
            raise KeyboardInterrupt
        taken += 1
        step(self)

    def counted(self: training.Training) -> None:
        nonlocal taken
        taken += 1
        step(self)

    out = files[0].parent / "parts.onnx"
    with monkeypatch.context() as patched:
        patched.setattr(training.Training, "_one_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(files, out.name)
    assert checkpoint_of(out, 1).exists()
    assert out.exists() == (at == 70)  # of 54 steps in the first part
    with monkeypatch.context() as patched:
        taken = 0
        patched.setattr(training.Training, "_one_step", counted)
        convert(files, out.name)
    assert taken < 162 - at / 2
    assert not checkpoint_of(out, 1).exists()
    assert not checkpoint_of(out).exists()
    for name, array in weights(files[0].parent / "whole.onnx").items():
        np.testing.assert_allclose(weights(out)[name], array, rtol=1e-4, atol=1e-5)


def test_a_part_that_cannot_be_recovered_is_the_last(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise SolverError("it diverged")

    monkeypatch.setattr(training.Training, "_one_step", broken)
    done = convert(files, "one.onnx")
    assert done.macs_before / done.macs_after >= 4
    assert done.recovery is None
    said = [note for note in done.notes if "it diverged" in note]
    assert [note.partition(" recovered")[0] for note in said] == [
        "part 1 of 2 could not be",
        "the model could not be",
    ]
    converter.validate(files[0], files[0].parent / "one.onnx", files[1], time_batches=())


def test_what_is_out_of_reach_is_refused_before_anything_is_trained(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.Training, "run", lambda *_: pytest.fail("it was trained"))
    with pytest.raises(ConfigError, match="--macs 5000"):
        converter.convert(
            *files,
            files[0].parent / "out.onnx",
            Budget(macs=5000),
            timing=False,
            recovery=RecoverySettings(epochs=1, gradual=2),
        )


def test_parts_and_their_shares() -> None:
    training_for = RecoverySettings(epochs=1)
    assert parts_of(None, training_for, 9.0) == 1
    assert parts_of(Budget(macs=1.9, params=1.5), training_for, None) == 1
    assert parts_of(Budget(macs=1.5, params=2), training_for, 9.0) == 2
    assert parts_of(Budget(speedup=3), training_for, 9.0) == 2
    assert parts_of(Budget(latency_ms=3), training_for, 5.9) == 1
    assert parts_of(Budget(latency_ms=3), training_for, 6.1) == 2
    assert parts_of(Budget(macs=4), None, 9.0) == 1
    assert parts_of(Budget(macs=1.5), RecoverySettings(epochs=1, gradual=3), 9.0) == 3
    assert shares_of(1) == (1.0,)
    assert shares_of(2) == pytest.approx((1 / 3, 2 / 3))
    assert sum(shares_of(5)) == pytest.approx(1)
    assert _some_of(Budget(macs=4, params=9), 0.5, None) == Budget(macs=2, params=3)
    assert _some_of(Budget(latency_ms=1), 0.5, 4.0) == Budget(latency_ms=2)
    assert _some_of(Budget(latency_ms=5), 0.5, 4.0) == Budget(latency_ms=4)
    with pytest.raises(ConfigError, match="gradual 9 is not from 1 to 8"):
        RecoverySettings(epochs=1, gradual=9)

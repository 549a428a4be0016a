"""How far a conversion is off, as numpy says it, and what is not compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from converter.answers import Judge, NothingToJudgeError, _differs, compare_answers
from converter.calibration.opening import open_calibration_set
from converter.calibration.sets import CalibrationSet
from converter.config import Preprocessing, Runtime
from converter.model_file import save_model
from converter.outcome import Answers
from converter.runtime import model_inputs

RUNTIME = Runtime(threads=1)
TEXT = """<ir_version: 8, opset_import: ["": 17]>
scored (float[%s, 3, 4, 4] x) => (%s) {
    c = Conv (x, w)
    p = GlobalAveragePool (c)
    y = Flatten (p)
    %s
}"""
SCORES = "float[n, 5] y"


def model(
    outputs: str = SCORES, more: str = "", *, batch: str = "n", noise: float = 0.0
) -> onnx.ModelProto:
    """A network of random weights, and with noise on them."""
    made = onnx.parser.parse_model(TEXT % (batch, outputs, more))
    random = np.random.default_rng(0)
    weight = random.standard_normal((5, 3, 2, 2)) + noise * random.standard_normal((5, 3, 2, 2))
    made.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), "w"))
    return made


def pictures(count: int) -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((count, 3, 4, 4)).astype(np.float32)


def calibration(folder: Path, network: onnx.ModelProto, count: int) -> CalibrationSet:
    np.save(folder / "x.npy", pictures(count))
    return open_calibration_set(folder / "x.npy", model_inputs(network), Preprocessing())


def compared(
    folder: Path,
    original: onnx.ModelProto,
    converted: onnx.ModelProto,
    data: CalibrationSet,
    macs: int = 1000,
) -> Answers | None:
    save_model(original, folder / "original.onnx")
    return compare_answers(folder / "original.onnx", converted, data, RUNTIME, macs)


def scores(network: onnx.ModelProto, rows: Sequence[int], count: int) -> NDArray[np.float64]:
    weight = numpy_helper.to_array(network.graph.initializer[0]).astype(np.float64)
    windows = np.lib.stride_tricks.sliding_window_view(
        pictures(count)[list(rows)].astype(np.float64), (2, 2), (2, 3)
    )
    answers: NDArray[np.float64] = np.einsum("nchwij,ocij->no", windows, weight) / 9
    return answers


@pytest.mark.parametrize("batch", ["n", "5"])
@pytest.mark.parametrize(
    ("count", "macs", "judged"),
    [
        (60, 1000, range(7, 60, 8)),
        (16, 1000, (7, 15)),
        (15, 1000, range(15)),
        (80, 10**12, (23, 63)),
    ],
    ids=["those kept back", "just enough", "too few to keep back", "a large network"],
)
def test_errors_on_the_images_that_fits_kept_back(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch: str,
    count: int,
    macs: int,
    judged: Sequence[int],
) -> None:
    monkeypatch.setattr("converter.answers.LEAST_IMAGES", 1)
    original, converted = model(batch=batch), model(batch=batch, noise=0.5)
    data = calibration(tmp_path, original, count)
    found = compared(tmp_path, original, converted, data, macs)
    right, other = (scores(each, judged, count) for each in (original, converted))
    assert found is not None
    assert found.images == len(judged)
    assert found.error == pytest.approx(
        np.square(other - right).sum() / np.square(right - right.mean(0)).sum(), rel=1e-3
    )
    assert found.agreement == (other.argmax(1) == right.argmax(1)).mean()


def test_outputs_without_a_row_for_each_image_do_not_count(tmp_path: Path) -> None:
    more = "best = ArgMax <axis = 1> (y) m = ReduceMean <axes = [0]> (y)"
    outputs = f"int64[n, 1] best, float[1, 5] m, float[1, 4] anchors, {SCORES}"
    found = []
    for given in ((), (outputs, more)):
        pair = [model(*given, noise=noise) for noise in (0.0, 0.5)]
        for each in pair:
            if given:
                fixed = numpy_helper.from_array(np.ones((1, 4), np.float32), "anchors")
                each.graph.initializer.append(fixed)
        data = calibration(tmp_path, pair[0], 60)
        found.append(compared(tmp_path, *pair, data))
    assert found[0] is not None
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("outputs", "more", "count"),
    [
        ("int64[n, 1] best", "best = ArgMax <axis = 1> (y)", 40),
        ("float[n, 5] still", "none = Sub (y, y) still = Exp (none)", 40),
        (SCORES, "", 1),
    ],
    ids=["integers", "no difference between images", "one image"],
)
def test_where_there_is_nothing_to_compare_it_says_nothing(
    tmp_path: Path, outputs: str, more: str, count: int
) -> None:
    original = model(outputs, more)
    data = calibration(tmp_path, original, count)
    assert compared(tmp_path, original, model(outputs, more), data) is None


def test_large_answers_are_held_of_fewer_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, other = model(), model(noise=0.5)
    # of three batches, of two images with 48 numbers and 5 answers each
    held = 3 * 2 * 4 * (48 + 5)
    monkeypatch.setattr("converter.answers.Judge", partial(Judge, together=2, held=held))
    found = compared(tmp_path, original, other, calibration(tmp_path, original, 80))
    rows = np.arange(7, 80, 8).reshape(5, 2)[[0, 2, 4]].ravel()
    right, answers = (scores(each, rows, 80) for each in (original, other))
    assert found is not None
    assert found.images == 6
    assert found.error == pytest.approx(
        np.square(answers - right).sum() / np.square(right - right.mean(0)).sum(), rel=1e-3
    )


def test_answers_that_are_not_finite_are_infinitely_far(tmp_path: Path) -> None:
    original, broken = model(), model(noise=math.inf)
    found = compared(tmp_path, original, broken, calibration(tmp_path, original, 40))
    assert found is not None
    assert found.error == math.inf


def test_maps_have_no_best_class(tmp_path: Path) -> None:
    outputs = "float[n, 5, 3, 3] c"
    original, other = model(outputs), model(outputs, noise=0.1)
    found = compared(tmp_path, original, other, calibration(tmp_path, original, 40))
    assert found is not None
    assert found.agreement is None
    assert 0 < found.error < 0.1


def test_answers_of_another_shape_are_infinitely_far(tmp_path: Path) -> None:
    original = model("float[n, 5, 3, 3] c")
    other = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[n, 3, 4, 4] x) => (float[n, 3, 4, 4] c)'
        "{ c = Relu (x) }"
    )
    found = compared(tmp_path, original, other, calibration(tmp_path, original, 40))
    assert found == Answers(math.inf, None, 5)


@pytest.mark.parametrize("batch", ["n", "8"])
def test_a_network_agrees_with_itself_and_others_are_judged_on_the_same_images(
    tmp_path: Path, batch: str
) -> None:
    first, second = model(batch=batch), model(batch=batch, noise=0.5)
    judge = Judge(first, calibration(tmp_path, first, 60), RUNTIME, together=7)
    assert judge.of(first) == Answers(0.0, 1.0, 60)
    apart = judge.of(second)
    assert apart.error > 0
    beside = judge.beside(second)
    assert beside.of(second) == Answers(0.0, 1.0, 60)
    right, other = (scores(each, range(60), 60) for each in (second, first))
    assert beside.of(first).error == pytest.approx(
        np.square(other - right).sum() / np.square(right - right.mean(0)).sum(), rel=1e-3
    )
    assert judge.of(second) == apart  # the first one stays what it is


def test_a_small_bound_holds_fewer_images(tmp_path: Path) -> None:
    network = model()
    data = calibration(tmp_path, network, 600)
    # 20 batches of 30 images, each image of 48 numbers with answers of 5
    judge = Judge(network, data, RUNTIME, together=30, held=4 * 30 * 4 * (48 + 5))
    assert judge.images == 120


def test_without_an_output_to_be_judged_by_there_is_no_judge(tmp_path: Path) -> None:
    network = model("int64[n, 1] best", "best = ArgMax <axis = 1> (y)")
    with pytest.raises(NothingToJudgeError, match="answers cannot be compared"):
        Judge(network, calibration(tmp_path, network, 40), RUNTIME)


def test_an_output_that_differs_by_rounding_alone_does_not_count() -> None:
    rows = np.random.default_rng(0).normal(size=(20, 3))
    assert _differs(rows)
    assert not _differs(1.0 + 1e-8 * rows)
    assert not _differs(np.zeros((20, 3)))

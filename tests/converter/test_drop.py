"""What is held back for validation, and how a drop is read off a comparison."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import onnx.parser
import pytest

from converter.calibration.opening import open_calibration_set
from converter.calibration.sets import CalibrationSet, ModelInput
from converter.calibration.subset import Subset
from converter.config import Preprocessing, Runtime
from converter.drop import Evaluation, drop_of, measure_drop, not_judged_on, set_apart
from converter.errors import CalibrationError
from converter.progress import SILENT
from converter.validation.findings import Accuracy, Agreement, OutputComparison, Size, Validation

INPUT = (ModelInput("x", ("n", 2), np.dtype(np.float32)),)
SIZE = Size(bytes=1, params=1, macs=1, uncounted=())
OUTPUT = OutputComparison("y", 4, 0.5, 0.1, 0.05, 0.4, 20.0, 0.025, 0.03, 0.2, None, 0, 0)
VALIDATION = Validation(
    images=400,
    outputs=(OUTPUT, dataclasses.replace(OUTPUT, relative_l2=0.01)),
    agreement=Agreement("y", 0.96, None),
    accuracy=Accuracy(400, 0.9, 0.88, 2.0, 1.4, 9, 1),
    latencies=(),
    original=SIZE,
    converted=SIZE,
)


def open_rows(path: Path, count: int) -> CalibrationSet:
    """A set whose samples are their own numbers."""
    np.save(path, np.repeat(np.arange(count, dtype=np.float32)[:, None], 2, axis=1))
    return open_calibration_set(path, INPUT, Preprocessing())


def rows(data: CalibrationSet, size: int = 7) -> list[int]:
    batches = list(data.batches(size))
    assert [each.count for each in batches[:-1]] == [size] * (len(batches) - 1)
    return [int(row[0]) for each in batches for row in each.feeds["x"]]


@pytest.mark.parametrize("count", [5, 9, 52])
def test_every_fifth_image_is_held_back(tmp_path: Path, count: int) -> None:
    whole = open_rows(tmp_path / "a.npy", count)
    fitted, judged = set_apart(whole, Evaluation(), INPUT, Preprocessing())
    assert len(judged) == count // 5 == len(rows(judged))
    assert len(fitted) == count - count // 5
    assert sorted(rows(fitted) + rows(judged)) == list(range(count))
    gaps = np.diff(rows(judged))
    assert all(4 <= gap <= 6 for gap in gaps)  # evenly, so that no class is left out
    as_many = Subset(whole, len(fitted))
    assert (fitted.digest() == as_many.digest()) == (rows(fitted) == rows(as_many))
    assert fitted.digest() != judged.digest()
    again, _ = set_apart(whole, Evaluation(), INPUT, Preprocessing())
    assert rows(again) == rows(fitted)
    # of all images, where some alone are calibrated on
    assert rows(not_judged_on(whole, count)) == rows(fitted)
    few = Subset(whole, 5 + count // 2)
    _, judged = set_apart(few, Evaluation(), INPUT, Preprocessing())
    left = set(range(count)) - set(rows(judged))
    assert rows(not_judged_on(whole, len(few))) == sorted(left)


def test_images_of_their_own_leave_the_others_alone(tmp_path: Path) -> None:
    whole = open_rows(tmp_path / "a.npy", 6)
    open_rows(tmp_path / "b.npy", 3)
    fitted, judged = set_apart(whole, Evaluation(tmp_path / "b.npy"), INPUT, Preprocessing())
    assert fitted is whole
    assert len(judged) == 3


def test_too_few_to_hold_some_back(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="--val"):
        set_apart(open_rows(tmp_path / "a.npy", 4), Evaluation(), INPUT, Preprocessing())


def test_accuracy_comes_before_agreement_and_that_before_errors() -> None:
    drop = drop_of(VALIDATION)
    assert (drop.measure, drop.points, drop.standard_error) == ("accuracy", 2.0, 1.4)
    assert str(drop) == "2.00 ± 1.40 points of accuracy"
    drop = drop_of(dataclasses.replace(VALIDATION, accuracy=None))
    assert drop.measure == "agreement"
    assert drop.points == pytest.approx(4.0)
    assert drop.standard_error == pytest.approx(100 * math.sqrt(0.04 * 0.96 / 400))
    drop = drop_of(dataclasses.replace(VALIDATION, accuracy=None, agreement=None))
    assert (drop.measure, drop.points, drop.standard_error) == ("output error", 3.0, None)
    assert str(drop) == "3 % output error"


@pytest.mark.parametrize("without", [(), ("accuracy",), ("accuracy", "agreement")])
def test_nan_is_no_small_drop(without: tuple[str, ...]) -> None:
    broken = dataclasses.replace(OUTPUT, nonfinite_converted=1)
    validation = dataclasses.replace(VALIDATION, outputs=(broken,), **dict.fromkeys(without))
    assert math.isinf(drop_of(validation).points)


@pytest.mark.parametrize(
    ("other", "images", "points"), [(1, 100, 1.0), (5, 1000, 0.5), (1, 200, 0.5)]
)
def test_a_drop_is_what_the_count_says(other: int, images: int, points: float) -> None:
    """At the tolerance itself, not a little above by round-off."""
    agreement = Agreement("y", 1.0 - other / images, None)
    drop = drop_of(
        dataclasses.replace(VALIDATION, images=images, accuracy=None, agreement=agreement)
    )
    assert drop.points == points


def test_none_of_a_few_images_says_little() -> None:
    agreement = Agreement("y", 1.0, None)
    drop = drop_of(dataclasses.replace(VALIDATION, images=20, accuracy=None, agreement=agreement))
    assert (drop.points, drop.standard_error) == (0.0, 5.0)


def test_outputs_of_other_shapes_are_as_far_off_as_can_be(tmp_path: Path) -> None:
    """As a detector's are that lists another number of boxes."""
    listing = """<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 2] x) => (int64[2, K] y) { %s y = NonZero(z) }"""
    first = onnx.parser.parse_model(listing % "z = Identity(x)")
    second = onnx.parser.parse_model(listing % "z = Sub(x, x)")
    data = open_rows(tmp_path / "a.npy", 4)
    drop = measure_drop(first, second, data, Runtime(threads=1), batch=2, progress=SILENT)
    assert math.isinf(drop.points)


def test_an_accuracy_of_chance_gives_way_to_agreement() -> None:
    accuracy = Accuracy(400, 0.11, 0.11, 0.0, 0.25, 0, 0, chance=0.1, chance_error=0.015)
    doubted = dataclasses.replace(VALIDATION, accuracy=accuracy, notes=("by chance",))
    drop = drop_of(doubted)
    assert (drop.measure, drop.points, drop.notes) == ("agreement", 4.0, ("by chance",))
    better = dataclasses.replace(doubted, accuracy=dataclasses.replace(accuracy, original=0.14))
    assert drop_of(better).measure == "accuracy"

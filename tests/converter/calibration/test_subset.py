"""Calibration sets that are a part of another one."""

from __future__ import annotations

from converter.calibration.opening import open_calibration_set
from converter.calibration.subset import Subset
from tests.converter.calibration.conftest import RAW, OwnSet, labels_of, model_input, values


def test_a_set_is_taken_as_it_is_or_in_part() -> None:
    own = OwnSet()
    assert open_calibration_set(own, [model_input()], RAW) is own
    assert open_calibration_set(own, [model_input()], RAW, images=70) is own
    part = open_calibration_set(own, [model_input()], RAW, images=10)
    assert values(part, 4) == [3, 10, 17, 24, 31, 38, 45, 52, 59, 66]
    assert labels_of(part) == [1, 0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert part.class_names == ("odd", "even")
    assert part.describe() == "10 of seventy numbers"
    assert part.digest() != Subset(own, 11).digest()

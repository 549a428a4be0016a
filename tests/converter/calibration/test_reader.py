"""Calibration sets of a data reader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from converter.calibration.opening import open_calibration_set
from converter.calibration.reader import ReaderSet
from converter.calibration.subset import Subset
from converter.errors import CalibrationError
from tests.converter.calibration.conftest import (
    RAW,
    Reader,
    RewindingReader,
    labels_of,
    model_input,
    refused,
    stack,
    values,
)


@pytest.mark.parametrize("kind", [Reader, RewindingReader])
@pytest.mark.parametrize("sizes", [[1, 1, 1], [4, 3, 2], [7], [2, 9, 1]])
def test_items_of_a_reader_are_regrouped(kind: type[Reader], sizes: list[int]) -> None:
    opened = open_calibration_set(kind(sizes), [model_input()], RAW)
    total = sum(sizes)
    assert len(opened) == total
    for size in (1, 3, 20):
        assert values(opened, size) == list(range(total))
    assert labels_of(opened) is None
    assert opened.describe() == f"{total} samples of the data reader {kind.__name__}"


def test_onnxruntime_s_own_base_class_is_a_reader() -> None:
    from onnxruntime.quantization import CalibrationDataReader

    class Own(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is untyped
        def __init__(self) -> None:
            self.left = 3

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            self.left -= 1
            return {"input": stack(1, 3, 8, 8, first=self.left)} if self.left >= 0 else None

    opened = open_calibration_set(Own(), [model_input()], RAW)
    assert isinstance(opened, ReaderSet)
    assert values(opened) == values(opened) == [2, 1, 0]


@pytest.mark.parametrize("kind", [Reader, RewindingReader])
def test_a_reader_s_samples_can_be_limited(kind: type[Reader]) -> None:
    opened = open_calibration_set(kind([4, 6]), [model_input()], RAW, images=5)
    assert isinstance(opened, Subset)
    assert len(opened) == 5
    assert values(opened, 2) == [1, 3, 5, 7, 9]
    assert values(opened, 2) == [1, 3, 5, 7, 9]
    assert opened.describe().startswith("5 of 10 samples")
    assert opened.class_names is None


@pytest.mark.parametrize("kind", [Reader, RewindingReader])
def test_a_reader_may_fill_one_array_again_and_again(kind: type[Reader]) -> None:
    class Reusing(kind):  # type: ignore[misc, valid-type]  # a class that is given
        buffer = np.zeros((1, 3, 8, 8), np.float32)

        def get_next(self) -> Mapping[str, NDArray[Any]] | None:
            feeds = super().get_next()
            if feeds is None:
                return None
            self.buffer[:] = feeds["input"]
            return {"input": self.buffer}

    assert values(ReaderSet(Reusing([1] * 5), [model_input()]), 3) == [0, 1, 2, 3, 4]


def test_what_is_kept_of_a_reader_is_bounded() -> None:
    sample = 3 * 8 * 8 * 4
    assert len(ReaderSet(Reader([2, 2]), [model_input()], kept_bytes=4 * sample)) == 4
    with pytest.raises(CalibrationError, match=r"give it a method rewind\(\)"):
        ReaderSet(Reader([2, 2]), [model_input()], kept_bytes=4 * sample - 1)
    ReaderSet(RewindingReader([2, 2]), [model_input()], kept_bytes=0)


def test_a_reader_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOFOLD_MAX_SAMPLES", "10")
    assert "return None at the end" in refused(RewindingReader([1] * 11))


def test_a_reader_that_gives_less_the_second_time_is_refused() -> None:
    class Tiring(RewindingReader):
        def rewind(self) -> None:
            super().rewind()
            self.sizes = self.sizes[1:]

    assert "after rewind()" in refused(Tiring([1, 1, 1]))


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([], "no samples"),
        ([{"other": stack(1, 3, 8, 8)}], "no array for the model's input 'input'"),
        ([{"input": [1.0]}], "no array"),
        ([[stack(1, 3, 8, 8)]], "no dict"),
        ([{"input": stack(1, 3, 8, 8, dtype=np.uint8)}], "uint8"),
        ([{"input": stack(3, 8, 8)}], "array[None]"),
        ([{"input": stack(1, 3, 8, 9)}], "(n, 3, 8, 8)"),
        ([{"input": stack(1, 3, 8, 8) * np.nan}], "item 0"),
        ([{"input": stack(0, 3, 8, 8)}], "no samples"),
    ],
)
def test_items_that_do_not_fit_are_refused(items: list[Any], words: str) -> None:
    class Items:
        def __init__(self) -> None:
            self.left = iter(items)

        def get_next(self) -> Any:
            return next(self.left, None)

    assert words in refused(Items())


def test_a_reader_s_inputs_and_items_must_agree() -> None:
    class Pairs:
        def __init__(self, *items: dict[str, NDArray[Any]]) -> None:
            self.left = iter(items)

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            return next(self.left, None)

    inputs = (model_input("n", "k", name="a"), model_input("n", "k", name="b"))
    good = {"a": stack(2, 3), "b": stack(2, 4)}
    assert len(open_calibration_set(Pairs(good, good), inputs, RAW)) == 4
    assert "batch sizes" in refused(Pairs({"a": stack(2, 3), "b": stack(1, 3)}), *inputs)
    assert "one shape" in refused(Pairs(good, {"a": stack(2, 4), "b": stack(2, 4)}), *inputs)

"""Samples that are known again by their values, and what is asked of every kind of set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from converter.calibration.opening import open_calibration_set
from converter.calibration.sets import Batch, CalibrationSet, ModelInput
from converter.config import Preprocessing
from converter.errors import CalibrationError

F32 = np.dtype(np.float32)
RAW = Preprocessing(scale=1.0)


def model_input(
    *shape: int | str | None, name: str = "input", dtype: Any = np.float32
) -> ModelInput:
    return ModelInput(name, shape or ("n", 3, 8, 8), np.dtype(dtype))


def plain(path: Path, value: int, side: int = 8) -> Path:
    """Write an image of one gray value, by which it is known again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), (value, value, value)).save(path)
    return path


def values(opened: CalibrationSet, size: int = 3, name: str = "input") -> list[int]:
    """First element of every sample, in order."""
    found = []
    for batch in opened.batches(size):
        assert all(len(array) == batch.count for array in batch.feeds.values())
        found += [int(row.flat[0]) for row in batch.feeds[name]]
    return found


def labels_of(opened: CalibrationSet, size: int = 3) -> list[int] | None:
    batches = list(opened.batches(size))
    if any(batch.labels is None for batch in batches):
        assert all(batch.labels is None for batch in batches)
        return None
    found = []
    for batch in batches:
        assert batch.labels is not None
        assert batch.labels.dtype == np.int64
        assert batch.labels.shape == (batch.count,)
        found += [int(label) for label in batch.labels]
    return found


def refused(source: Any, *inputs: ModelInput, **options: Any) -> str:
    """Open and go through the set; return the one sentence that it is refused with."""

    def use() -> None:
        opened = open_calibration_set(source, inputs or (model_input(),), RAW, **options)
        list(opened.batches(2))

    with pytest.raises(CalibrationError) as caught:
        use()
    message = str(caught.value)
    assert ";" in message
    assert "\n" not in message
    return message


def stack(count: int, *shape: int, dtype: Any = np.float32, first: int = 0) -> NDArray[Any]:
    """Samples whose elements are all their number."""
    numbers = np.arange(first, first + count).reshape(-1, *[1] * len(shape))
    return np.broadcast_to(numbers, (count, *shape)).astype(dtype)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images in three class folders, one of them nested, and things that are no images."""
    root = tmp_path / "calib"
    for name, value in {
        "b/1.png": 3,
        "b/0.png": 2,
        "a/x/y.PNG": 1,
        "a/0.jpg": 0,
        "c/0.bmp": 4,
        "c/1.png": 5,
    }.items():
        plain(root / name, 10 * value)
    (root / "labels.txt").write_text("no image")
    (root / "b" / "._1.png").write_bytes(b"what macOS leaves behind")
    plain(root / ".cache" / "hidden.png", 99)
    (root / "a" / "z").mkdir()
    return root


class Reader:
    """Items of the given batch sizes; each sample's elements are its number."""

    def __init__(self, sizes: Sequence[int], shape: tuple[int, ...] = (3, 8, 8)) -> None:
        self.sizes = list(sizes)
        self.shape = shape
        self.item = 0

    def get_next(self) -> Mapping[str, NDArray[Any]] | None:
        if self.item == len(self.sizes):
            return None
        first = sum(self.sizes[: self.item])
        self.item += 1
        return {"input": stack(self.sizes[self.item - 1], *self.shape, first=first)}


class RewindingReader(Reader):
    def rewind(self) -> None:
        self.item = 0


class OwnSet:
    """The least that a set must be."""

    class_names = ("odd", "even")

    def __len__(self) -> int:
        return 70

    def batches(self, size: int) -> Iterator[Batch]:
        for first in range(0, 70, size):
            count = min(size, 70 - first)
            numbers = stack(count, 3, 8, 8, first=first)
            yield Batch({"input": numbers}, np.arange(first, first + count) % 2, count)

    def describe(self) -> str:
        return "seventy numbers"

    def digest(self) -> str:
        return "0"

"""The images that two models answer most differently, against a plain sort."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from converter.calibration.image_folder import image_file
from converter.calibration.opening import open_calibration_set
from converter.calibration.sets import ModelInput
from converter.calibration.subset import Subset
from converter.config import Preprocessing
from converter.worst import Worst, WorstImage

INPUT = ModelInput("image", (None, 3, 4, 4), np.dtype(np.float32))


def kept(worst: Worst) -> tuple[WorstImage, ...]:
    data: Any = object()  # a set without files; nothing of it is asked for
    return worst.images(data)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 7), st.integers(0, 6), st.integers(0, 2**32 - 1))
def test_the_worst_of_all_batches_are_kept(images: int, batch: int, count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    one, other = random.normal(size=(2, images, 3))
    best = one.argmax(1), other.argmax(1)
    worst = Worst(count)
    for start in range(0, images, batch):
        part = slice(start, start + batch)
        worst.add((one[part], other[part]), (best[0][part], best[1][part]), None)
    errors = np.linalg.norm(other - one, axis=1) / np.linalg.norm(one, axis=1)
    order = sorted(range(images), key=lambda row: (best[0][row] == best[1][row], -errors[row]))
    found = kept(worst)
    assert [each.index for each in found] == order[:count]
    assert [each.error for each in found] == [pytest.approx(errors[row]) for row in order[:count]]
    assert all(each.original == best[0][each.index] for each in found)
    assert all(each.label is each.file is each.picture is None for each in found)


def test_what_is_not_finite_is_worst_and_has_no_number() -> None:
    one = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    other = np.array([[0.0, 9.0], [np.nan, 0.0], [0.0, 0.0], [1.0, 0.0]])
    worst = Worst(4)
    worst.add(
        (one, other), (np.array([0, 0, 0, 0]), np.array([1, -1, 0, 0])), np.array([0, 1, 0, 0])
    )
    found = kept(worst)
    assert [each.index for each in found] == [1, 0, 3, 2]
    assert [each.error for each in found] == [None, pytest.approx(np.sqrt(82)), None, 0.0]
    assert (found[0].converted, found[0].label) == (-1, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(6):
        Image.new("RGB", (4, 4), (40 * index, 0, 0)).save(tmp_path / f"{index}.png")
    return tmp_path


def test_images_have_their_files_and_pictures(folder: Path) -> None:
    data = open_calibration_set(folder, [INPUT], Preprocessing())
    worst = Worst(1)
    scores = np.eye(6)[:, :2]
    worst.add((scores, scores[::-1]), (np.zeros(6, int), np.array([0, 0, 0, 0, 0, 1])), None)
    (found,) = worst.images(data)
    assert found.file == str(folder / "5.png")
    assert found.picture is not None
    with Image.open(io.BytesIO(base64.b64decode(found.picture))) as image:
        assert image.size == (4, 4)
        red = image.getpixel((0, 0))
    assert isinstance(red, tuple)
    assert abs(red[0] - 200) < 5  # JPEG is nearly exact on a plain colour


@pytest.mark.parametrize("count", [2, 6])
def test_a_part_of_a_set_knows_the_files_of_its_samples(folder: Path, count: int) -> None:
    whole = open_calibration_set(folder, [INPUT], Preprocessing())
    part: Any = Subset(whole, count)
    reds = [batch.feeds["image"][0, 0, 0, 0] for batch in part.batches(1)]
    for index, red in enumerate(reds):
        path = image_file(part, index)
        assert path is not None
        assert round(float(red) * 255 / 40) == int(path.stem)

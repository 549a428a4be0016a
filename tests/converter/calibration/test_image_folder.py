"""Calibration sets of image files."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from converter.calibration import image_folder
from converter.calibration.image_folder import ImageFolder
from converter.calibration.images import open_image, prepare_image
from converter.calibration.opening import open_calibration_set
from converter.calibration.subset import Subset
from converter.config import PRESETS
from converter.errors import CalibrationError
from tests.converter.calibration.conftest import (
    F32,
    RAW,
    labels_of,
    model_input,
    plain,
    refused,
    values,
)


def open_files() -> int:
    """Count this program's open files; 0 where the system does not tell."""
    own = Path("/proc/self/fd")
    return len(list(own.iterdir())) if own.is_dir() else 0


def test_a_folder_is_walked_whole_in_sorted_order(folder: Path) -> None:
    opened = open_calibration_set(folder, [model_input()], RAW)
    assert isinstance(opened, ImageFolder)
    assert len(opened) == 6
    for size in (1, 2, 4, 6, 100):
        assert values(opened, size) == [0, 10, 20, 30, 40, 50]
    assert [batch.count for batch in opened.batches(4)] == [4, 2]
    assert opened.class_names is None
    assert labels_of(opened) is None
    assert opened.describe() == f"6 images of {folder}"


def test_samples_are_what_prepare_image_makes_of_each_file(folder: Path) -> None:
    wanted = model_input("n", 3, 6, 5)
    opened = open_calibration_set(folder, [wanted], PRESETS["cifar10"])
    (batch,) = opened.batches(10)
    assert batch.feeds["input"].dtype == F32
    first = prepare_image(folder / "a" / "0.jpg", PRESETS["cifar10"], (6, 5), 3)
    np.testing.assert_array_equal(batch.feeds["input"][0], first)


def test_labels_are_positions_of_class_folders(folder: Path) -> None:
    (folder / "aa").mkdir()  # a class without images counts, as in torchvision
    opened = open_calibration_set(str(folder), [model_input()], RAW, labels=True)
    assert opened.class_names == ("a", "aa", "b", "c")
    assert labels_of(opened) == [0, 0, 2, 2, 3, 3]
    assert opened.describe() == f"6 images of {folder}, 4 classes"


def test_a_folder_without_subfolders_has_no_labels(tmp_path: Path) -> None:
    plain(tmp_path / "0.png", 1)
    opened = open_calibration_set(tmp_path, [model_input()], RAW, labels=True)
    assert opened.class_names is None
    assert labels_of(opened) is None


def test_images_beside_class_folders_are_refused_where_labels_are_asked_for(folder: Path) -> None:
    plain(folder / "loose.png", 7)
    assert "loose.png" in refused(folder, labels=True)
    assert len(open_calibration_set(folder, [model_input()], RAW)) == 7


@pytest.mark.parametrize(
    ("images", "expected"),
    [(1, [30]), (2, [10, 40]), (3, [10, 30, 50]), (6, None), (7, None), (None, None)],
)
def test_a_limit_is_spread_evenly(
    folder: Path, images: int | None, expected: list[int] | None
) -> None:
    opened = open_calibration_set(folder, [model_input()], RAW, images=images, labels=True)
    assert values(opened) == (expected or [0, 10, 20, 30, 40, 50])
    assert len(opened) == len(expected or range(6))
    if images == 3:
        assert labels_of(opened) == [0, 1, 2]
        assert opened.describe() == f"3 of 6 images of {folder}, 3 classes"


def test_iterating_twice_and_at_once_gives_the_same(folder: Path) -> None:
    opened = open_calibration_set(folder, [model_input()], RAW)
    assert values(opened) == values(opened)
    for left, right in zip(opened.batches(2), opened.batches(2), strict=True):
        np.testing.assert_array_equal(left.feeds["input"], right.feeds["input"])


def test_an_iteration_that_is_given_up_leaves_no_thread_and_no_open_file(tmp_path: Path) -> None:
    for index in range(120):
        plain(tmp_path / f"{index:03}.png", index)
    opened = open_calibration_set(tmp_path, [model_input()], RAW)
    before = threading.active_count()
    files = open_files()
    batches: Any = opened.batches(4)  # a generator
    next(batches)
    batches.close()
    assert threading.active_count() == before
    assert open_files() == files
    assert values(opened, 7) == list(range(120))


def test_look_ahead_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(100):
        plain(tmp_path / f"{index:03}.png", index)
    opened_images = []

    def counting(path: Path) -> Image.Image:
        opened_images.append(path)
        return open_image(path)

    monkeypatch.setattr(image_folder, "open_image", counting)
    monkeypatch.setattr(image_folder, "_LOOK_AHEAD_BYTES", 10 * 3 * 8 * 8 * 4)
    batches: Any = open_calibration_set(tmp_path, [model_input()], RAW).batches(4)
    next(batches)
    assert 4 < len(opened_images) <= 4 + 10
    batches.close()


def test_a_part_of_a_folder_opens_no_other_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in range(40):
        plain(tmp_path / f"{value:02}.png", value)
    opened: list[str] = []
    real = image_folder.open_image

    def noted(path: Path) -> Any:
        opened.append(path.name)
        return real(path)

    monkeypatch.setattr(image_folder, "open_image", noted)
    whole = open_calibration_set(tmp_path, [model_input()], RAW)
    part = Subset(Subset(whole, 10), 3)
    assert values(part) == [6, 22, 34]
    assert opened == ["06.png", "22.png", "34.png"]


def test_an_unreadable_image_ends_the_iteration_with_its_name(folder: Path) -> None:
    whole = (folder / "b" / "0.png").read_bytes()
    (folder / "b" / "0.png").write_bytes(whole[: len(whole) // 2])
    assert "0.png" in refused(folder)
    (folder / "b" / "0.png").write_text("no image at all")
    assert "0.png" in refused(folder)


def test_uint8_and_nhwc_models_get_what_they_take(folder: Path) -> None:
    wanted = model_input("n", 8, 8, 3, dtype=np.uint8)
    opened = open_calibration_set(folder, [wanted], PRESETS["cifar10"].replace(layout="nhwc"))
    (batch,) = opened.batches(6)
    assert batch.feeds["input"].dtype == np.uint8
    assert batch.feeds["input"].shape == (6, 8, 8, 3)
    assert values(opened) == [0, 10, 20, 30, 40, 50]


def test_a_grayscale_model_gets_gray_images(folder: Path) -> None:
    opened = open_calibration_set(folder, [model_input("n", 1, 8, 8)], RAW.replace(channels="gray"))
    assert values(opened) == [0, 10, 20, 30, 40, 50]
    assert "--channels gray" in refused(folder, model_input("n", 1, 8, 8))


def test_a_model_without_a_fixed_size_needs_one(folder: Path) -> None:
    free = model_input("n", 3, "h", "w")
    assert "--size 224" in refused(folder, free)
    opened = open_calibration_set(folder, [free], RAW.replace(size=(4, 6)))
    assert next(iter(opened.batches(1))).feeds["input"].shape == (1, 3, 4, 6)


def test_images_do_not_fit_every_model(folder: Path) -> None:
    assert "npz" in refused(folder, model_input(), model_input(name="other"))
    assert "int64" in refused(folder, model_input(dtype=np.int64))
    assert "npy" in refused(folder, model_input("n", 10))
    with pytest.raises(CalibrationError, match="takes no input"):
        open_calibration_set(folder, [], RAW)


def test_links_inside_the_folder_are_safe(folder: Path) -> None:
    (folder / "a" / "loop").symlink_to(folder)
    (folder / "self").symlink_to("self")
    (folder / "c" / "2.png").symlink_to("../b/0.png")
    opened = open_calibration_set(folder, [model_input()], RAW)
    assert values(opened) == [0, 10, 20, 30, 40, 50, 20]


def test_a_folder_that_is_itself_a_link_is_fine(folder: Path) -> None:
    link = folder.parent / "link"
    link.symlink_to(folder)
    opened = open_calibration_set(link, [model_input()], RAW, labels=True)
    assert labels_of(opened) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("whole_folder", [False, True])
def test_links_that_leave_the_folder_are_refused(folder: Path, whole_folder: bool) -> None:
    outside = plain(folder.parent / "calib-outside" / "secret.png", 200)
    (folder / "b" / "link.png").symlink_to(outside.parent if whole_folder else outside)
    assert "leaves the calibration folder" in refused(folder)


def test_a_pipe_and_a_broken_link_are_refused(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    assert "pipe.png" in refused(folder)
    (folder / "pipe.png").unlink()
    (folder / "broken.png").symlink_to("nothing.png")
    assert "broken.png" in refused(folder)


def test_a_folder_s_digest_is_of_names_and_content(folder: Path, tmp_path: Path) -> None:
    def digest(root: Path = folder, images: int | None = None) -> str:
        return open_calibration_set(root, [model_input()], RAW, images=images).digest()

    before = digest()
    assert before == digest()
    assert len(before) == 64
    moved = tmp_path / "moved"
    folder.rename(moved)
    assert digest(moved) == before
    assert digest(moved, images=5) != before
    (moved / "labels.txt").write_text("other notes")
    assert digest(moved) == before
    (moved / "a" / "0.jpg").rename(moved / "c" / "2.jpg")
    renamed = digest(moved)
    assert renamed != before
    plain(moved / "c" / "1.png", 77)
    assert digest(moved) not in (before, renamed)


def test_the_reference_images_open_with_labels(shared: Path) -> None:
    opened = open_calibration_set(
        shared / "data" / "cifar10" / "calib",
        [model_input("n", 3, 32, 32)],
        PRESETS["cifar10"],
        images=100,
        labels=True,
    )
    labels = labels_of(opened, 32)
    assert labels is not None
    assert np.bincount(labels, minlength=10).tolist() == [10] * 10
    assert opened.class_names is not None
    assert opened.class_names[0] == "airplane"
    (batch,) = opened.batches(100)
    # Normalised natural images: mean near 0 and deviation near 1 for each channel.
    assert np.abs(batch.feeds["input"].mean(axis=(0, 2, 3))).max() < 0.3
    assert np.abs(batch.feeds["input"].std(axis=(0, 2, 3)) - 1).max() < 0.3


def test_images_prepared_otherwise_have_another_digest(folder: Path) -> None:
    """Results that are kept, or gone on from, depend on it."""
    settings = [RAW, RAW.replace(scale=0.5), RAW.replace(channels="bgr"), RAW.replace(mean=(1.0,))]
    opened = [open_calibration_set(folder, [model_input()], each) for each in settings]
    digests = [each.digest() for each in opened]
    assert len(set(digests)) == len(digests)

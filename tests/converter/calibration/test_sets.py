from __future__ import annotations

import io
import os
import threading
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray
from PIL import Image

from converter.calibration import sets
from converter.calibration.images import open_image, prepare_image
from converter.calibration.sets import (
    Batch,
    CalibrationSet,
    ImageFolder,
    ModelInput,
    ReaderSet,
    Subset,
    fixed_batch,
    open_calibration_set,
    padded,
)
from converter.config import PRESETS, Preprocessing
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
    for batch in batches:
        assert batch.labels is not None
        assert batch.labels.dtype == np.int64
        assert batch.labels.shape == (batch.count,)
    return [int(label) for batch in batches for label in batch.labels]  # type: ignore[union-attr]


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


def open_files() -> int:
    """Count this program's open files; 0 where the system does not tell."""
    own = Path("/proc/self/fd")
    return len(list(own.iterdir())) if own.is_dir() else 0


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


# Image folders --------------------------------------------------------------------------------


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


@given(st.integers(1, 500), st.integers(1, 500))
def test_spread_takes_every_part_of_a_set(total: int, wanted: int) -> None:
    chosen = sets._spread(total, wanted)
    assert len(chosen) == min(total, wanted)
    assert sorted(set(chosen)) == chosen
    assert 0 <= chosen[0] <= chosen[-1] < total
    for parts in (2, 5, 10):  # equal classes get equal shares, give or take one
        if total % parts == 0 and wanted <= total:
            per = total // parts
            counts = [sum(k * per <= i < (k + 1) * per for i in chosen) for k in range(parts)]
            assert max(counts) - min(counts) <= 1


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
    batches = opened.batches(4)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
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

    monkeypatch.setattr(sets, "open_image", counting)
    monkeypatch.setattr(sets, "_LOOK_AHEAD_BYTES", 10 * 3 * 8 * 8 * 4)
    batches = open_calibration_set(tmp_path, [model_input()], RAW).batches(4)
    next(batches)
    assert 4 < len(opened_images) <= 4 + 10
    batches.close()  # type: ignore[attr-defined]


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


def test_folders_without_samples_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    assert "neither images nor" in refused(tmp_path)
    plain(tmp_path / "a.png", 0)
    np.save(tmp_path / "a.npy", np.zeros((1, 3, 8, 8), np.float32))
    assert "as well as" in refused(tmp_path)


@pytest.mark.parametrize("name", ["absent", "absent.npy", "nul\0"])
def test_a_missing_source_is_refused(tmp_path: Path, name: str) -> None:
    assert "no calibration data at" in refused(tmp_path / name)


def test_other_kinds_of_source_are_refused(tmp_path: Path) -> None:
    assert "npz" in refused(plain(tmp_path / "one.png", 1))
    (tmp_path / "x.zip").write_bytes(b"PK")
    assert "npz" in refused(tmp_path / "x.zip")
    assert "list" in refused([1, 2, 3])


# Links ----------------------------------------------------------------------------------------


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


# Arrays ---------------------------------------------------------------------------------------


def stack(count: int, *shape: int, dtype: Any = np.float32, first: int = 0) -> NDArray[Any]:
    """Samples whose elements are all their number."""
    numbers = np.arange(first, first + count).reshape(-1, *[1] * len(shape))
    return np.broadcast_to(numbers, (count, *shape)).astype(dtype)


def test_an_npy_file_is_a_stack_along_its_first_axis(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    array = np.random.default_rng(0).normal(size=(7, 3, 8, 8)).astype(np.float32)
    np.save(path, array)
    opened = open_calibration_set(path, [model_input()], PRESETS["imagenet"], labels=True)
    assert len(opened) == 7
    batches = list(opened.batches(3))
    assert [batch.count for batch in batches] == [3, 3, 1]
    # As they are: no preprocessing.
    np.testing.assert_array_equal(np.concatenate([b.feeds["input"] for b in batches]), array)
    assert labels_of(opened) is None
    assert opened.class_names is None
    assert opened.describe() == f"7 samples of {path}"


def test_a_folder_of_npy_files_is_their_samples_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    np.save(tmp_path / "b.npy", stack(2, 3, 8, 8, first=1))
    np.save(tmp_path / "a.npy", stack(1, 3, 8, 8, first=0))
    np.save(tmp_path / "sub" / "c.npy", stack(4, 3, 8, 8, first=3))
    opened = open_calibration_set(tmp_path, [model_input()], RAW)
    assert values(opened) == list(range(7))
    assert [batch.count for batch in opened.batches(5)] == [5, 2]
    few = open_calibration_set(tmp_path, [model_input()], RAW, images=3)
    assert values(few) == [1, 3, 5]
    assert few.describe() == f"3 of 7 samples of {tmp_path}"


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    array=npst.arrays(
        np.float32,
        st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, 3)),
        elements=st.floats(-100, 100, width=32),
    ),
    tokens=st.integers(0, 2**31),
    size=st.integers(1, 10),
    images=st.none() | st.integers(1, 12),
    compressed=st.booleans(),
)
def test_npz_round_trip(
    tmp_path: Path,
    array: NDArray[np.float32],
    tokens: int,
    size: int,
    images: int | None,
    compressed: bool,
) -> None:
    count = len(array)
    ids = np.arange(tokens, tokens + count, dtype=np.int64)
    labels = np.arange(count, dtype=np.int32) % 3
    save = np.savez_compressed if compressed else np.savez
    arrays: dict[str, Any] = {"in/x": array, "ids": ids, "labels": labels, "extra": np.zeros(2)}
    save(tmp_path / "x.npz", **arrays)
    inputs = [
        ModelInput("in/x", ("n", *array.shape[1:]), F32),
        ModelInput("ids", (None,), np.dtype(np.int64)),
    ]
    opened = open_calibration_set(tmp_path / "x.npz", inputs, RAW, images=images, labels=True)
    chosen = sets._spread(count, images)
    assert len(opened) == len(chosen)
    batches = list(opened.batches(size))
    assert all(batch.count == size for batch in batches[:-1])
    for name, expected in (("in/x", array), ("ids", ids)):
        fed = np.concatenate([batch.feeds[name] for batch in batches])
        assert fed.dtype == expected.dtype
        np.testing.assert_array_equal(fed, expected[chosen])
    assert labels_of(opened, size) == labels[chosen].tolist()
    unlabelled = open_calibration_set(tmp_path / "x.npz", inputs, RAW)
    assert labels_of(unlabelled) is None


def test_an_input_may_itself_be_named_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", labels=stack(3, 2))
    opened = open_calibration_set(
        tmp_path / "x.npz", [model_input("n", 2, name="labels")], RAW, labels=True
    )
    assert values(opened, name="labels") == [0, 1, 2]
    assert labels_of(opened) is None


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (np.float64, np.float32),
        (np.float16, np.float32),
        (">f4", np.float32),
        (np.float32, np.float16),
        (np.float32, np.float64),
        (np.uint8, np.uint8),
        (np.uint8, np.int32),
        (np.int32, np.int64),
        (np.bool_, np.bool_),
    ],
)
def test_casts_that_keep_the_meaning_are_made(tmp_path: Path, stored: Any, wanted: Any) -> None:
    array = np.random.default_rng(0).integers(0, 2, (4, 5)).astype(stored)
    np.save(tmp_path / "x.npy", array)
    opened = open_calibration_set(tmp_path / "x.npy", [model_input("n", 5, dtype=wanted)], RAW)
    (batch,) = opened.batches(4)
    assert batch.feeds["input"].dtype == wanted
    np.testing.assert_array_equal(batch.feeds["input"], array)


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (np.uint8, np.float32),
        (np.int64, np.float32),
        (np.bool_, np.float32),
        (np.float32, np.uint8),
        (np.int64, np.int32),
        (np.int8, np.uint8),
        (np.complex64, np.float32),
        ("<U3", np.float32),
        ("<M8[s]", np.int64),
        ([("a", "<f4")], np.float32),
        ([("é", "<f4")], np.float32),  # needs version 3 of the format
    ],
)
def test_casts_that_change_the_meaning_are_refused(
    tmp_path: Path, stored: Any, wanted: Any
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # numpy tells of version 3
        np.save(tmp_path / "x.npy", np.zeros((4, 5), stored))
    assert "x.npy" in refused(tmp_path / "x.npy", model_input("n", 5, dtype=wanted))


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    np.save(tmp_path / "x.npy", np.array([Trap()], object), allow_pickle=True)
    np.savez(tmp_path / "y.npz", allow_pickle=True, input=np.array([Trap()], object))
    assert "not numbers" in refused(tmp_path / "x.npy", model_input("n"))
    assert "not numbers" in refused(tmp_path / "y.npz", model_input("n"))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((3, 8, 8), "array[None]"),
        ((2, 1, 8, 8), "(n, 3, 8, 8)"),
        ((2, 8, 8, 3), "(n, 3, 8, 8)"),
        ((2, 3, 8), "(n, 3, 8, 8)"),
        ((0, 3, 8, 8), "no samples"),
        ((2, 3, 0, 8), "no samples"),
        ((), "single number"),
    ],
)
def test_wrong_shapes_are_refused(tmp_path: Path, shape: tuple[int, ...], words: str) -> None:
    np.save(tmp_path / "x.npy", np.zeros(shape, np.float32))
    assert words in refused(tmp_path / "x.npy")


def test_sizes_that_are_not_fixed_take_any_but_one(tmp_path: Path) -> None:
    free = model_input("n", 3, "h", None)
    np.save(tmp_path / "a.npy", stack(2, 3, 4, 5))
    assert values(open_calibration_set(tmp_path, [free], RAW)) == [0, 1]
    np.save(tmp_path / "b.npy", stack(2, 3, 4, 6))
    assert "one shape" in refused(tmp_path, free)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, bad: float, kind: str) -> None:
    array = stack(5, 3, 8, 8)
    array[3, 1, 2, 3] = bad
    path = tmp_path / f"x.{kind}"
    if kind == "npy":
        np.save(path, array)
    else:
        np.savez(path, input=array)
    message = refused(path)
    assert "sample 3" in message
    assert "NaN or infinite" in message


def test_numbers_too_large_for_the_model_s_type_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.full((1, 5), 1e39))
    assert "infinite as float32" in refused(tmp_path / "x.npy", model_input("n", 5))


def test_damaged_array_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, stack(4, 3, 8, 8))
    data = path.read_bytes()
    for length in (0, 5, 20, 100, 200, len(data) - 1):
        path.write_bytes(data[:length])
        assert "x.npy" in refused(path)
    path.write_bytes(data.replace(b"(4, 3", b"(4,-3"))
    assert "no samples" in refused(path)
    path.write_bytes(b"not numpy at all")
    assert "cannot be read" in refused(path)


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, input=np.random.default_rng(0).normal(size=(4, 3, 8, 8)))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert "cannot be read" in refused(path)
    path.write_bytes(data[:500] + b"\0" * 100 + data[600:])
    assert "'input' in" in refused(path)
    path.write_bytes(b"")
    assert "cannot be read" in refused(path)


def test_an_array_that_claims_more_than_it_has_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (10**12, 3, 8, 8)}
        np.lib.format.write_array_header_1_0(file, header)
    assert "truncated" in refused(path)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.write(path, "input.npy")
    assert "truncated" in refused(tmp_path / "x.npz")


def test_a_large_sample_is_refused_unless_the_limit_is_lifted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = 300  # 3 · 300 · 300 float32 are 1.03 MiB
    np.save(tmp_path / "x.npy", stack(1, 3, side, side))
    wanted = model_input("n", 3, side, side)
    monkeypatch.setenv("TWOFOLD_MAX_SAMPLE_MIB", "1")
    assert "set TWOFOLD_MAX_SAMPLE_MIB above 1" in refused(tmp_path / "x.npy", wanted)
    monkeypatch.setenv("TWOFOLD_MAX_SAMPLE_MIB", "2")
    assert len(open_calibration_set(tmp_path / "x.npy", [wanted], Preprocessing())) == 1


def test_an_archive_that_claims_to_hold_a_trillion_samples_is_refused(tmp_path: Path) -> None:
    """Its directory claims the size that its header needs, so that only the number can show it."""
    header = io.BytesIO()
    shape = (10**12, 3, 8, 8)
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": shape}
    )
    content, claimed = header.getvalue() + bytes(10**6), len(header.getvalue()) + 768 * 10**12
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("input.npy", content)
        archive.infolist()[0].file_size = claimed
    assert "set TWOFOLD_MAX_SAMPLES above" in refused(path)


def test_names_in_an_archive_are_never_paths(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    array = io.BytesIO()
    np.save(array, stack(2, 3, 8, 8))
    with zipfile.ZipFile(inner / "x.npz", "w") as archive:
        for name in ("input.npy", "../outside.npy", "/tmp/outside.npy", "..\\outside.npy"):
            archive.writestr(name, array.getvalue())
    data = open_calibration_set(inner / "x.npz", [model_input()], Preprocessing())
    assert sum(batch.count for batch in data.batches(1)) == 2
    assert [path.name for path in tmp_path.rglob("*")] == ["inner", "x.npz"]


def test_arrays_stored_column_by_column_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.asfortranarray(np.zeros((4, 5), np.float32)))
    assert "ascontiguousarray" in refused(tmp_path / "x.npy", model_input("n", 5))


def test_an_archive_must_have_every_input(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, a=stack(2, 5), labels=np.zeros(2, int))
    inputs = (model_input("n", 5, name="a"), model_input("n", 5, name="b"))
    message = refused(path, *inputs)
    assert "'b'" in message
    assert "'a', 'labels'" in message
    np.savez(path, a=stack(2, 5), b=stack(3, 5))
    assert "as many of each" in refused(path, *inputs)
    np.savez(path)
    assert "none at all" in refused(path, *inputs)


@pytest.mark.parametrize(
    "labels",
    [np.zeros(3, int), np.zeros((2, 1), int), np.zeros(2), np.array([0, -1]), np.array([0, 2**40])],
)
def test_labels_must_be_classes(tmp_path: Path, labels: NDArray[Any]) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, input=stack(2, 3, 8, 8), labels=labels)
    assert "x.npz" in refused(path, labels=True)
    assert len(open_calibration_set(path, [model_input()], RAW)) == 2


def test_npy_files_are_for_one_input(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", stack(2, 3, 8, 8))
    for source in (tmp_path / "x.npy", tmp_path):
        assert "npz" in refused(source, model_input(), model_input(name="other"))


# Data readers ---------------------------------------------------------------------------------


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

    class Own(CalibrationDataReader):  # type: ignore[misc]
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


def test_a_reader_may_fill_one_array_again_and_again() -> None:
    class Reusing(Reader):
        buffer = np.zeros((1, 3, 8, 8), np.float32)

        def get_next(self) -> Mapping[str, NDArray[Any]] | None:
            feeds = super().get_next()
            if feeds is None:
                return None
            self.buffer[:] = feeds["input"]
            return {"input": self.buffer}

    assert values(ReaderSet(Reusing([1] * 5), [model_input()])) == [0, 1, 2, 3, 4]


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


# Sets as sources ------------------------------------------------------------------------------


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


@pytest.mark.parametrize("kind", ["folder", "npy", "npz", "reader", "subset"])
def test_every_kind_keeps_the_protocol(folder: Path, tmp_path: Path, kind: str) -> None:
    np.save(tmp_path / "x.npy", stack(2, 3, 8, 8))
    np.savez(tmp_path / "x.npz", input=stack(2, 3, 8, 8))
    source: Any = {
        "folder": folder,
        "npy": tmp_path / "x.npy",
        "npz": tmp_path / "x.npz",
        "reader": Reader([2]),
        "subset": OwnSet(),
    }[kind]
    opened = open_calibration_set(source, [model_input()], RAW, images=2)
    assert isinstance(opened, CalibrationSet)
    assert len(opened) == 2
    with pytest.raises(ValueError, match="batch of 0"):
        next(opened.batches(0))


# Digests --------------------------------------------------------------------------------------


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


def test_digests_of_arrays_and_readers_follow_the_samples(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"

    def digest(array: NDArray[Any], images: int | None = None) -> str:
        np.save(path, array)
        return open_calibration_set(path, [model_input()], RAW, images=images).digest()

    one, other = stack(4, 3, 8, 8), stack(4, 3, 8, 8, first=1)
    assert len({digest(one), digest(other), digest(one, images=2)}) == 3
    assert digest(one) == digest(one)
    readers = [RewindingReader([4]), Reader([1, 3]), Reader([3])]
    first, second, third = (ReaderSet(each, [model_input()]).digest() for each in readers)
    assert first == second != third


# Batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batches", "expected"),
    [((4,), 4), (("n",), None), ((None,), None), ((4, 4), 4), ((4, "n"), 4), (("n", "m"), None)],
)
def test_the_batch_that_a_model_insists_on(
    batches: tuple[int | str | None, ...], expected: int | None
) -> None:
    inputs = [model_input(batch, 3, name=f"i{k}") for k, batch in enumerate(batches)]
    assert fixed_batch(inputs) == expected


def test_inputs_without_one_common_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="agree"):
        fixed_batch([model_input(4, 3, name="a"), model_input(2, 3, name="b")])
    with pytest.raises(CalibrationError, match="'s' has no batch axis"):
        fixed_batch([ModelInput("s", (), F32)])
    np.savez(tmp_path / "x.npz", s=np.float32(1))
    assert "no batch axis" in refused(tmp_path / "x.npz", ModelInput("s", (), F32))


def test_padding_repeats_the_last_sample() -> None:
    labels = np.array([5, 6])
    batch = Batch({"a": stack(2, 3), "b": stack(2, dtype=np.int64)}, labels, 2)
    full = padded(batch, 4)
    assert full.count == 2
    assert full.labels is labels
    np.testing.assert_array_equal(full.feeds["a"], [[0] * 3, [1] * 3, [1] * 3, [1] * 3])
    np.testing.assert_array_equal(full.feeds["b"], [0, 1, 1, 1])
    assert full.feeds["b"].dtype == np.int64
    assert padded(full, 4) is full
    for size in (1, 0):
        with pytest.raises(ValueError, match="cannot be filled"):
            padded(batch, size)


# Real images ----------------------------------------------------------------------------------


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

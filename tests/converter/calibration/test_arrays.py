"""Calibration sets of `.npy` and `.npz` files."""

from __future__ import annotations

import io
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from converter.calibration.opening import open_calibration_set
from converter.calibration.samples import spread
from converter.calibration.sets import ModelInput
from converter.calibration.subset import Subset
from converter.config import PRESETS, Preprocessing
from tests.converter.calibration.conftest import (
    F32,
    RAW,
    labels_of,
    model_input,
    refused,
    stack,
    values,
)


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
    assert values(Subset(opened, 3)) == values(Subset(few, 3)) == [1, 3, 5]
    assert values(Subset(few, 1)) == [3]


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
    chosen = spread(count, images)
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

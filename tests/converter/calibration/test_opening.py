"""Opening a calibration set, of whatever kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from converter.calibration.opening import open_calibration_set
from converter.calibration.reader import ReaderSet
from converter.calibration.sets import CalibrationSet
from tests.converter.calibration.conftest import (
    RAW,
    OwnSet,
    Reader,
    RewindingReader,
    model_input,
    plain,
    refused,
    stack,
)


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

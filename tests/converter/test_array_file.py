"""Arrays on disk: what was written comes back, and nothing else is taken for it."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converter import array_file
from converter.array_file import DamagedFileError, load_arrays, save_arrays

ARRAYS = {"a/b": np.arange(6, dtype=np.float32).reshape(2, 3), "empty": np.empty((0, 2))}


def test_round_trip(tmp_path: Path) -> None:
    about = {"key": "k", "numbers": [1, 0.1, float("inf")], "name": "größe"}
    save_arrays(tmp_path / "a.npz", about, ARRAYS)
    found, arrays = load_arrays(tmp_path / "a.npz")
    assert found == about
    assert set(arrays) == set(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], array)
        assert arrays[name].dtype == array.dtype
    assert list(tmp_path.iterdir()) == [tmp_path / "a.npz"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_a_damaged_file_is_refused_or_read_right(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.npz"
    save_arrays(path, {"key": "k"}, ARRAYS)
    content = bytearray(path.read_bytes())
    end = data.draw(st.integers(0, len(content)))
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content[:end] if data.draw(st.booleans()) else content)
    try:
        found, arrays = load_arrays(path)
    except DamagedFileError as error:
        assert str(path) in str(error)  # noqa: PT017  # either end is right
    else:
        assert found == {"key": "k"}
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, ARRAYS.get(name, array))


def test_what_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(DamagedFileError, match="cannot be read"):
        load_arrays(path)
    np.savez_compressed(path, about=np.zeros(1 << 20, np.uint8))  # could be any size, unpacked
    with pytest.raises(DamagedFileError, match="not written by Twofold"):
        load_arrays(path)
    np.savez(path, about=np.frombuffer(b"[1]", np.uint8))
    with pytest.raises(DamagedFileError, match="not written by Twofold"):
        load_arrays(path)
    save_arrays(path, {}, ARRAYS)
    monkeypatch.setattr(array_file, "MOST_BYTES", 10)
    with pytest.raises(DamagedFileError, match="more than 10 bytes"):
        load_arrays(path)


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("a pickle was loaded",))


def test_no_pickle_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    buffer = io.BytesIO()
    header = {"descr": "|O", "fortran_order": False, "shape": (1,)}
    np.lib.format.write_array_header_1_0(buffer, header)
    pickle.dump(np.array([Hostile()], dtype=object), buffer)
    save_arrays(path, {}, {})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("bad.npy", buffer.getvalue())
    with pytest.raises(DamagedFileError):
        load_arrays(path)


def test_a_header_that_no_tokenizer_reads_is_refused(tmp_path: Path) -> None:
    """numpy reads headers of Python 2 with the tokenizer, whose errors are of a kind of their own."""
    path = tmp_path / "a.npz"
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (3, \n"
    member = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(24)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("about.npy", member)
    with pytest.raises(DamagedFileError, match="TokenError"):
        load_arrays(path)

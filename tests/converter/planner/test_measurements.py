"""Kept measurements: what comes back, what is left out, and that nothing of it is ever fatal."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from converter.planner import measurements
from converter.planner.measurements import Measurements, measurement_key

HERE = "this machine"


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_what_is_kept_comes_back_for_the_same_context_only(tmp_path: Path) -> None:
    Measurements(tmp_path).write(HERE, {"a": 1.5, "b": 0.0})
    again = Measurements(tmp_path)
    assert again.read(HERE) == {"a": 1.5, "b": 0.0}
    assert again.read("another machine") == {}
    assert again.notes == ()


def test_new_values_replace_old_ones_and_leave_the_others(tmp_path: Path) -> None:
    cache = Measurements(tmp_path)
    cache.write(HERE, {"a": 1.0, "b": 2.0})
    Measurements(tmp_path).write(HERE, {"c": 3.0})  # another plan, in the meantime
    cache.write(HERE, {"a": 4.0})
    assert cache.read(HERE) == {"b": 2.0, "c": 3.0, "a": 4.0}


def test_the_oldest_entries_and_files_go_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurements, "_MOST_ENTRIES", 2)
    monkeypatch.setattr(measurements, "_MOST_FILES", 2)
    cache = Measurements(tmp_path)
    cache.write("first", {"a": 1.0, "b": 2.0})
    cache.write("first", {"a": 3.0, "c": 4.0})
    assert cache.read("first") == {"a": 3.0, "c": 4.0}
    os.utime(only_file(tmp_path), (0, 0))
    cache.write("second", {"a": 1.0})
    cache.write("third", {"a": 1.0})
    assert cache.read("first") == {}
    assert cache.read("second") == cache.read("third") == {"a": 1.0}


def content(**changes: object) -> str:
    return json.dumps({"format": 2, "context": HERE, "milliseconds": {"a": 1.0}, **changes})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        "[]",
        content(format=1),
        content(context="another machine"),
        content(milliseconds=[1.0]),
        content(milliseconds={"a": "1"}),
        content(milliseconds={"a": True}),
        content(milliseconds={"a": -1.0}),
        content(milliseconds={"a": float("nan")}),
        content() + " " * 2**24,
    ],
    ids=lambda text: text[:60],
)
def test_a_file_that_cannot_be_used_is_left_out_and_replaced(tmp_path: Path, text: str) -> None:
    Measurements(tmp_path).write(HERE, {"a": 1.0})
    path = only_file(tmp_path)
    path.write_text(text, encoding="utf-8")
    cache = Measurements(tmp_path)
    assert cache.read(HERE) == {}
    assert cache.read(HERE) == {}
    (note,) = cache.notes
    assert str(path) in note
    cache.write(HERE, {"b": 2.0})
    assert Measurements(tmp_path).read(HERE) == {"b": 2.0}


def test_bytes_that_are_no_text_are_left_out(tmp_path: Path) -> None:
    Measurements(tmp_path).write(HERE, {"a": 1.0})
    only_file(tmp_path).write_bytes(b"\xff\xfe\x00")
    assert Measurements(tmp_path).read(HERE) == {}


def test_a_folder_that_cannot_be_written_is_a_note(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    cache = Measurements(tmp_path / "file" / "cache")
    cache.write(HERE, {"a": 1.0})
    (note,) = cache.notes
    assert "could not be kept" in note
    assert cache.read(HERE) == {}


def test_the_environment_names_the_folder_unless_the_caller_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / "named"))
    assert Measurements().folder == tmp_path / "named"
    assert Measurements(tmp_path).folder == tmp_path
    monkeypatch.delenv("TWOFOLD_CACHE")
    assert Measurements().folder.name == "twofold"


def test_nothing_to_keep_makes_no_file(tmp_path: Path) -> None:
    Measurements(tmp_path / "new").write(HERE, {})
    assert not (tmp_path / "new").exists()


def test_keys_are_short_and_tell_parts_apart() -> None:
    keys = {
        measurement_key("ab", "c"),
        measurement_key("a", "bc"),
        measurement_key("abc"),
        measurement_key("x" * 100_000),
    }
    assert len(keys) == 4
    assert {len(key) for key in keys} == {32}

"""Reading what nobody vouches for: wrong kinds count as absent, other files are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.errors import ConfigError
from converter.report.page import record
from converter.report.page.record import LIST_LIMIT, TEXT_LIMIT, Record, kind_of, read_report

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=10,
)


@pytest.mark.parametrize(
    "value", [None, True, "3", [], {}, float("nan"), float("inf"), 1e300, 10**400]
)
def test_what_is_no_number_of_this_world_is_absent(value: object) -> None:
    assert Record({"a": value}).number("a") is None
    assert Record({"a": value}).count("a") == 0


def test_numbers_texts_and_lists() -> None:
    found = Record(
        {"n": -2, "t": "a\n b\x1b", "l": ["x", 1, None, "y"], "f": False, "long": "z" * 10**6}
    )
    assert found.number("n") == -2.0
    assert found.count("n") == 0
    assert found.text("t") == "a b�"
    assert found.texts("l") == ["x", "y"]
    assert found.numbers("l") == [1.0]
    assert found.flag("f") is False
    assert found.flag("n") is None
    assert len(found.text("long")) == TEXT_LIMIT
    assert found.text("missing") == ""
    assert not found.record("n")
    assert len(Record({"l": [{}] * (LIST_LIMIT + 5)}).records("l")) == LIST_LIMIT


@given(JSON)
def test_anything_can_be_asked(value: Any) -> None:
    for found in (Record(value), Record({"a": value})):
        found.number("a"), found.count("a"), found.text("a"), found.shown("a"), found.flag("a")
        found.numbers("a"), found.texts("a"), found.records("a"), found.record("a")
        assert all(name is not None and words for name, words in found.entries())


def test_entries_within_entries() -> None:
    nested = Record({"a": {"b": {"c": 1.5}}, "d": [1, 2], "e": None, "f": True})
    assert dict(nested.entries()) == {"a.b.c": "1.5", "d": "1, 2", "f": "yes"}


def test_a_saved_report_is_read(tmp_path: Path, run: dict[str, Any]) -> None:
    path = tmp_path / "fast.json"
    path.write_text(json.dumps(run), encoding="utf-8")
    assert read_report(path) == run
    assert kind_of(run, "it") == "conversion"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x80\x04pickle", "is not JSON"),
        (b"", "is not JSON"),
        (b"[" * 10**6, "is not JSON"),
        (b"9" * 10**5, "is not JSON"),
        (b"[]", "names no format"),
        (b'{"format": 3}', "names no format"),
        (b'{"format": "twofold-conversion-1"}', "has the format 'twofold-conversion-1'"),
        (b'{"format": "<script>\\n"}', "has the format '<script>'"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        read_report(path)
    assert "some.json" in str(caught.value)


def test_missing_and_too_large_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_report(tmp_path / "missing.json")
    monkeypatch.setattr(record, "FILE_LIMIT", 2**20)
    (tmp_path / "large.json").write_bytes(b" " * (2**20 + 1))
    with pytest.raises(ConfigError, match="more than 1 MiB"):
        read_report(tmp_path / "large.json")

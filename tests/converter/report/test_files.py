"""Reports: valid JSON whatever the numbers, the same text each time, whole or not at all."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from converter.errors import ConfigError
from converter.report.files import report_text, write_report


def test_values_become_plain() -> None:
    content = {
        "path": Path("a/b"),
        "rows": ((1, 2.5), None, True),
        "number": np.float32(0.5),
        "array": np.arange(3),
        "name": "größe",
    }
    assert json.loads(report_text(content)) == {
        "path": "a/b",
        "rows": [[1, 2.5], None, True],
        "number": 0.5,
        "array": [0, 1, 2],
        "name": "größe",
    }


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_numbers_that_json_does_not_know_become_null(number: float) -> None:
    assert json.loads(report_text({"x": [number]})) == {"x": [None]}


def test_keys_keep_their_order() -> None:
    text = report_text({"b": 1, "a": 2})
    assert text == report_text({"b": 1, "a": 2})
    assert text.index('"b"') < text.index('"a"')
    assert text.endswith("}\n")


def test_unknown_value_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_report(tmp_path / "r.json", {"x": object()})
    assert list(tmp_path.iterdir()) == []


def test_written_over_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text("old")
    write_report(path, {"x": 1})
    assert json.loads(path.read_text()) == {"x": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none"):
        write_report(tmp_path / "none" / "r.json", {})

"""Two reports side by side."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import converter
from converter.errors import ConfigError

REPORT: dict[str, Any] = {
    "format": "twofold-conversion-2",
    "settings": {"budget": {"macs": 2, "params": None}, "solver": {"iterations": 25}},
    "machine": {"processor": "Z80", "versions": {"numpy": "2.4"}},
    "calibration": {"digest": "aa", "val": {"data": "val", "digest": "bb"}},
    "source_digest": "cc",
    "out_digest": "dd",
    "layers": [
        {"name": "conv1", "scheme": "kept", "ranks": [], "support": 0},
        {"name": "conv2", "scheme": "sparse + tucker", "ranks": [4, 6], "support": 3},
    ],
    "stages": [{"name": "read", "seconds": 1.5}, {"name": "fit", "seconds": 2.0}],
    "latency": {"original_ms": 4.0, "converted_ms": 2.0, "speedup": 2.0},
    "answers": {"error": 0.01, "agreement": 0.98, "images": 250},
    "macs_reduction": 2.1,
    "peak_memory_mib": 500.0,
}
QUANTIZED: dict[str, Any] = {
    "shipped": True,
    "before": {"error": 0.01, "agreement": 0.96},
    "after": {"error": 0.012, "agreement": None},
    "bytes_before": 4000,
    "bytes_after": 1000,
    "latency": {"quantized_ms": 0.5, "speedup": {"ratio": 8.0}, "over_float": {"ratio": 4.0}},
    "alone": {"speedup": {"ratio": 2.0}},
}


def write(folder: Path, name: str, **changes: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps({**copy.deepcopy(REPORT), **changes}), encoding="utf-8")
    return path


def test_equal_runs_differ_in_nothing_but_figures(tmp_path: Path) -> None:
    slower = {"original_ms": 4.0, "converted_ms": 3.0, "speedup": 1.3}
    found = converter.diff(
        write(tmp_path, "a.json"), write(tmp_path, "b.json", latency=slower, recovery=None)
    )
    assert found.alike
    figures = {each.name: (each.before, each.after) for each in found.figures}
    assert figures["speedup"] == (2.0, 1.3)
    assert figures["original_ms"] == (4.0, 4.0)
    assert figures["error of answers"] == (0.01, 0.01)
    assert figures["agreement of answers"] == (0.98, 0.98)
    assert figures["seconds"] == (3.5, 3.5)


def test_figures_of_a_quantization_stand_beside_those_of_the_float_model(tmp_path: Path) -> None:
    withheld = {**copy.deepcopy(QUANTIZED), "shipped": False, "bytes_after": 1200, "latency": None}
    paths = [
        write(tmp_path, f"{name}.json", quantization=each)
        for name, each in (("float", None), ("int8", QUANTIZED), ("withheld", withheld))
    ]
    figures = {each.name: (each.before, each.after) for each in converter.diff(*paths[:2]).figures}
    assert figures["speedup"] == (2.0, 2.0)
    assert {name: each for name, each in figures.items() if "quantiz" in name} == {
        "quantized model written": (None, True),
        "error before quantization": (None, 0.01),
        "agreement before quantization": (None, 0.96),
        "bytes before quantization": (None, 4000),
        "error after quantization": (None, 0.012),
        "bytes after quantization": (None, 1000),
        "quantized_ms": (None, 0.5),
        "speedup after quantization": (None, 8.0),
        "speedup over float after quantization": (None, 4.0),
        "speedup over the original quantized": (None, 2.0),
    }
    figures = {each.name: (each.before, each.after) for each in converter.diff(*paths[1:]).figures}
    assert figures["quantized model written"] == (True, False)
    assert figures["bytes after quantization"] == (1000, 1200)
    assert figures["speedup after quantization"] == (8.0, None)
    plain = converter.diff(paths[0], write(tmp_path, "older.json"))
    assert not any("quantiz" in each.name for each in plain.figures)


def test_what_differs_is_named(tmp_path: Path) -> None:
    layers = [
        {"name": "conv1", "scheme": "channel", "ranks": [7], "support": 0},
        {"name": "conv3", "scheme": "kept", "ranks": [], "support": 0},
    ]
    found = converter.diff(
        write(tmp_path, "a.json"),
        write(
            tmp_path,
            "b.json",
            settings={"budget": {"macs": 2, "params": 3}, "solver": {"iterations": 25}},
            machine={"processor": "Z80", "versions": {"numpy": "2.5", "torch": "2.1"}},
            calibration={"digest": "aa", "val": None},
            out_digest="ee",
            layers=layers,
            latency=None,
        ),
    )
    assert not found.alike
    changes = {
        part: {each.name: (each.before, each.after) for each in getattr(found, part)}
        for part in ("settings", "machine", "hashes", "layers")
    }
    assert changes == {
        "settings": {"budget.params": (None, 3)},
        "machine": {"versions.numpy": ("2.4", "2.5"), "versions.torch": (None, "2.1")},
        "hashes": {"images of val": ("bb", None), "result": ("dd", "ee")},
        "layers": {
            "conv1": ("kept", "channel 7"),
            "conv2": ("sparse + tucker 4×6, 3 channels", None),
            "conv3": (None, "kept"),
        },
    }
    assert {each.name: each.after for each in found.figures}["speedup"] is None
    assert json.loads(json.dumps(found.to_dict(), default=str))["alike"] is False


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("3", "its top"),
        ("{}", "its top"),
        (json.dumps({**REPORT, "format": "twofold-verdict-1"}), "format"),
        (json.dumps({**REPORT, "layers": [{"name": 3}]}), "layers.0"),
        (json.dumps({**REPORT, "stages": 3}), "stages"),
        (json.dumps({**REPORT, "quantization": 3}), "quantization"),
    ],
)
def test_what_is_no_report(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "b.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=words) as refused:
        converter.diff(write(tmp_path, "a.json"), path)
    assert str(path) in str(refused.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        converter.diff(tmp_path / "none.json", path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(sorted({*REPORT, "recovery", "quantization"})), JSON, max_size=3
    )
    | st.dictionaries(st.sampled_from(sorted(QUANTIZED)), JSON).map(
        lambda parts: {"quantization": {**QUANTIZED, **parts}}
    )
)
def test_whatever_a_report_holds_it_is_compared_or_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    first, second = write(tmp_path, "a.json"), write(tmp_path, "b.json", **changes)
    try:
        found = converter.diff(first, second)
    except ConfigError as refused:
        assert str(second) in str(refused)  # noqa: PT017  # either end is right
    else:
        assert found.figures

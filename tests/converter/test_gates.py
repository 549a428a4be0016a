"""Gates on comparisons whose numbers are known, and on files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from onnx.parser import parse_model

import converter
from converter.config import Gates, Runtime, Target, gates_from_options
from converter.errors import ConfigError
from converter.gates import GateResult, judge, require_judgeable
from converter.latency import Speedup, Timing
from converter.plain_file import file_digest
from converter.report.files import report_text
from converter.validation.findings import (
    Accuracy,
    Agreement,
    Latency,
    OutputComparison,
    Size,
    Validation,
)

OUTPUT = OutputComparison("y", 10, 1, 1, 1, 1, 2, 0.5, 0.04, 1, None, 0, 0)


def timing(ms: float) -> Timing:
    return Timing(ms, 0.9 * ms, 1.2 * ms, 10, (ms,), 1, "cpu", 1, True, True)


VALIDATION = Validation(
    images=400,
    outputs=(OUTPUT, dataclasses.replace(OUTPUT, name="z", relative_l2=0.01)),
    agreement=Agreement("y", 0.97, None),
    accuracy=Accuracy(400, 0.9, 0.89, 1.0, 0.25, 6, 2),
    latencies=(Latency(1, timing(4.0), timing(2.0), Speedup(2.0, 1.9, 2.2)),),
    original=Size(8_000_000, 100, 1000, ()),
    converted=Size(2_000_000, 50, 250, ()),
)

FOUND = {
    "min_speedup": 2.0,
    "max_latency_ms": 2.0,
    "max_accuracy_drop": 1.0,
    "min_accuracy": 89.0,
    "min_agreement": 97.0,
    "max_output_error": 4.0,  # of the worst output
    "max_file_mb": 2.0,
    "min_macs_reduction": 4.0,
    "min_params_reduction": 2.0,
}


def one(validation: Validation = VALIDATION, **gate: float) -> GateResult:
    return judge(Gates(**gate), validation)[0]


def test_every_gate_has_its_figure() -> None:
    assert set(FOUND) == {each.name for each in dataclasses.fields(Gates)}


@pytest.mark.parametrize(("name", "found"), FOUND.items())
def test_each_gate_passes_at_its_threshold_and_fails_beyond(name: str, found: float) -> None:
    worse = 1.01 if name.startswith("min") else 0.99
    if name in ("min_accuracy", "min_agreement"):
        worse = 1.001
    met, missed = one(**{name: found}), one(**{name: found * worse})
    assert met.found == pytest.approx(found)
    assert (met.status, missed.status) == ("passed", "failed")
    assert met.passed
    assert not missed.passed


@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_the_ratio_decides(found: float, wanted: float) -> None:
    latency = Latency(1, timing(found), timing(1.0), Speedup(found, 0.5 * found, 2 * found))
    result = one(dataclasses.replace(VALIDATION, latencies=(latency,)), min_speedup=wanted)
    assert result.passed == (found >= wanted)
    assert ("too near" in result.detail) == (0.5 * found <= wanted <= 2 * found)


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("max_accuracy_drop", {"accuracy": None}, "no labels"),
        ("min_accuracy", {"accuracy": None}, "no labels"),
        ("min_agreement", {"agreement": None}, "max_output_error"),
        ("max_output_error", {"outputs": (dataclasses.replace(OUTPUT, relative_l2=None),)}, "zero"),
        ("min_speedup", {"latencies": (Latency(4, skipped="a fixed batch of 1"),)}, "fixed batch"),
        ("max_latency_ms", {"latencies": ()}, "nothing was timed"),
        ("min_macs_reduction", {"converted": Size(1, 1, 1, ("loop",))}, "Loop"),
    ],
)
def test_what_cannot_be_judged_does_not_pass(
    name: str, changes: dict[str, object], why: str
) -> None:
    result = one(dataclasses.replace(VALIDATION, **changes), **{name: FOUND[name]})
    assert result.status == "cannot be judged"
    assert not result.passed
    assert result.found is None
    assert why in result.detail


def test_new_nan_always_fails() -> None:
    broken = dataclasses.replace(OUTPUT, nonfinite_original=1, nonfinite_converted=4)
    results = judge(Gates(max_file_mb=5), dataclasses.replace(VALIDATION, outputs=(OUTPUT, broken)))
    assert [(each.name, each.passed, each.found) for each in results] == [
        ("max_file_mb", True, 2.0),
        ("finite", False, 3.0),
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["min_spedup=2"], "did you mean 'min_speedup'"),
        (["zzz=2"], "give one of min_speedup"),
        (["min_speedup"], "min_speedup=1.8"),
        (["min_speedup=fast"], "min_speedup=1.8"),
        (["min_speedup=nan"], "no number"),
        (["min_speedup=0"], "not above 0"),
        (["min_agreement=0.99"], "99 asks for 99 %"),
        (["min_accuracy=101"], "percentage"),
        (["max_accuracy_drop=-101"], "percentage points"),
        (["max_output_error=-1"], "below 0"),
    ],
)
def test_gates_that_make_no_sense(options: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        gates_from_options(options)


def test_of_one_name_the_later_counts() -> None:
    gates = gates_from_options(["min-speedup=2", "max_file_mb = 4", "min_speedup=3"])
    assert gates.asked() == {"min_speedup": 3.0, "max_file_mb": 4.0}


def test_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "loose.png").touch()
    with pytest.raises(ConfigError, match="no gate was given"):
        require_judgeable(Gates(), tmp_path)
    with pytest.raises(ConfigError, match="class folders"):
        require_judgeable(Gates(min_speedup=1, max_accuracy_drop=1), tmp_path)
    require_judgeable(Gates(min_agreement=99), tmp_path)


# On files ----------------------------------------------------------------------------------------


def linear(path: Path, weight: np.ndarray) -> Path:
    model = parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> '
        "g (float[N, 3] x) => (float[N, 3] y) { y = MatMul(x, w) }"
    )
    model.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), "w"))
    onnx.save(model, path)
    return path


def test_check(tmp_path: Path) -> None:
    weight = np.eye(3)
    first = linear(tmp_path / "a.onnx", weight)
    second = linear(tmp_path / "b.onnx", weight[:, ::-1])
    np.savez(tmp_path / "x.npz", x=np.eye(3, dtype=np.float32), labels=np.arange(3))
    verdict = converter.check(
        first,
        second,
        tmp_path / "x.npz",
        Gates(max_accuracy_drop=50, min_agreement=30, max_latency_ms=1e6),
        target=Target(Runtime(threads=1)),
        seconds=0.01,
    )
    assert {each.name: each.status for each in verdict.gates} == {
        "max_latency_ms": "passed",
        "max_accuracy_drop": "failed",  # one of three is left: 66.7 points
        "min_agreement": "passed",
        "finite": "passed",
    }
    assert not verdict.passed
    assert [each.name for each in verdict.failed] == ["max_accuracy_drop"]
    assert "max_accuracy_drop failed: 66.67 points, at most 50 points" in verdict.sentence()
    content = json.loads(report_text(verdict.to_dict()))
    assert content["format"] == "twofold-verdict-1"
    assert content["passed"] is False
    assert content["original_digest"] == file_digest(first)
    assert content["converted_digest"] == file_digest(second)
    assert content["settings"]["gates"]["min_agreement"] == 30
    assert content["data"]["digest"]
    assert content["speedup"] == pytest.approx(verdict.speedup)


def test_a_drop_from_an_accuracy_of_chance_cannot_be_judged() -> None:
    accuracy = Accuracy(400, 0.1, 0.1, 0.0, 0.25, 0, 0, chance=0.1, chance_error=0.015)
    doubted = dataclasses.replace(VALIDATION, accuracy=accuracy)
    found = one(doubted, max_accuracy_drop=1.0)
    assert (found.found, found.status) == (None, "cannot be judged")
    assert "10.0% of the images, no more often than by chance" in found.detail
    assert one(doubted, min_accuracy=5.0).passed

"""The choice among types, ranges and layers in float, with errors and times that are given."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import onnx
import pytest

from converter.errors import ModelError
from converter.outcome import Answers
from converter.planner.cost import LayerCost
from converter.progress import SILENT
from converter.quantization import search as module
from converter.quantization.integers import ARITHMETICS
from converter.quantization.ranges import METHODS
from converter.quantization.search import Found, search_int8

HARMLESS = 0.001
ErrorOf = Callable[[str, str, frozenset[str]], float]
TimeOf = Callable[[str, int], float]


class _Ranges:
    def by(self, method: str) -> str:
        return method


class _Judge:
    def __init__(self, error_of: ErrorOf) -> None:
        self._error_of = error_of
        self.asked = 0

    def of(self, model: onnx.ModelProto) -> Answers:
        self.asked += 1
        types, method, left = json.loads(model.doc_string)
        return Answers(self._error_of(types, method, frozenset(left)), None, 100)


def chain(layers: int) -> onnx.ModelProto:
    nodes = [onnx.helper.make_node("Conv", ["x"], ["y"], name=f"c{at}") for at in range(layers)]
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], []))


@pytest.fixture
def sought(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Found, int]]:
    """Search where models are notes of what they are; the result, and how many were judged."""

    def noted(_: Any, ranges: str, types: Any, left: Any = ()) -> onnx.ModelProto:
        return onnx.ModelProto(doc_string=json.dumps([types.name, ranges, sorted(left)]))

    monkeypatch.setattr(module, "in_int8", noted)

    def search(
        error_of: ErrorOf, time_of: TimeOf | None, layers: int = 4, macs: Mapping[str, int] = {}
    ) -> tuple[Found, int]:
        ranges: Any = _Ranges()
        judge: Any = _Judge(error_of)
        costs = {
            f"c{at}": LayerCost(f"c{at}", "Conv", "y", macs.get(f"c{at}", 100), 10)
            for at in range(layers)
        }

        def times_of(models: Mapping[str, onnx.ModelProto]) -> dict[str, float]:
            assert time_of is not None
            known = {name: json.loads(each.doc_string) for name, each in models.items()}
            return {name: time_of(each[0], len(each[2])) for name, each in known.items()}

        found = search_int8(
            chain(layers),
            ranges,
            judge,
            None if time_of is None else times_of,
            costs,
            HARMLESS,
            SILENT,
        )
        return found, judge.asked

    return search


def test_saturation_shows_as_an_error(sought: Any) -> None:
    found, _ = sought(lambda types, *_: 0.03 if types == "u8 × s8" else 0.0009, lambda *_: 0.5)
    assert found.types == "u8 × s7"  # the first of those that do no harm
    assert found.left == ()


def test_the_faster_is_taken_where_errors_are_harmless(sought: Any) -> None:
    times = {"u8 × s8": 0.6, "u8 × s7": 0.7, "u8 × u8": 0.5, "s8 × s8": 0.9}
    errors = {"u8 × s8": 0.0009, "u8 × s7": 0.0005, "u8 × u8": 0.0008, "s8 × s8": 0.0001}
    found, asked = sought(lambda types, *_: errors[types], lambda types, _: times[types])
    assert found.types == "u8 × u8"
    assert asked == len(ARITHMETICS) + len(METHODS) - 1


def test_one_percent_of_time_buys_one_percent_of_error(sought: Any) -> None:
    errors = {"u8 × s8": 0.004, "u8 × s7": 0.0031, "u8 × u8": 0.1, "s8 × s8": 0.1}
    for time, wanted in ((0.6, "u8 × s7"), (0.7, "u8 × s8")):
        found, _ = sought(
            lambda types, *_: errors[types],
            lambda types, left, time=time: {"u8 × s8": 0.5, "u8 × s7": time}.get(types, 0.5) + left,
        )
        assert found.types == wanted


def test_what_is_slower_than_float_comes_last(sought: Any) -> None:
    found, _ = sought(
        lambda types, *_: 0.0009 if types == "u8 × u8" else 0.002,
        lambda types, _: 1.1 if types == "u8 × u8" else 0.9,
    )
    assert found.types == "u8 × s8"


def test_nothing_is_left_in_float_where_all_are_slower(sought: Any) -> None:
    found, asked = sought(lambda *_: 0.5, lambda *_: 1.2)
    assert asked == len(ARITHMETICS) + len(METHODS) - 1
    assert found.left == ()


def test_the_ranges_of_least_error_are_taken(sought: Any) -> None:
    found, _ = sought(
        lambda _, method, __: 0.0001 if method == "percentile 99.99" else 0.0005, lambda *_: 0.5
    )
    assert found.ranges == "percentile 99.99"
    assert [trial.name for trial in found.trials][-3:] == [
        f"u8 × s8, {method}" for method in METHODS[1:]
    ]


def by_layer(shares: Mapping[str, float]) -> ErrorOf:
    """Errors that add up over the layers that are not in float."""
    return lambda _, __, left: sum(each for name, each in shares.items() if name not in left)


def test_layers_that_do_the_harm_stay_in_float(sought: Any) -> None:
    shares = {"c0": 0.0001, "c1": 0.01, "c2": 0.0001, "c3": 0.0002}
    found, _ = sought(by_layer(shares), lambda _, left: 0.5 + 0.01 * left)
    (left,) = found.left
    assert left.layers == ("c1",)
    assert left.gained == pytest.approx(0.01 / 0.0104)
    assert found.deviation.error == pytest.approx(0.0004)
    assert [trial.left for trial in found.trials][-1] == 1


def test_layers_stay_in_int8_where_float_costs_more_than_it_gains(sought: Any) -> None:
    shares = {"c0": 0.001, "c1": 0.001, "c2": 0.001, "c3": 0.002}
    found, _ = sought(by_layer(shares), lambda _, left: 0.3 + 0.4 * left)
    assert found.left == ()
    assert max(trial.left for trial in found.trials) == 2  # it was tried


def test_gains_count_for_their_multiply_accumulates(sought: Any) -> None:
    shares = {"c0": 0.004, "c1": 0.002, "c2": 0.0001, "c3": 0.0001}
    found, _ = sought(
        by_layer(shares), lambda _, left: 0.5 + 0.01 * left, macs={"c0": 1000, "c1": 10}
    )
    assert [each.layers for each in found.left] == [("c1",), ("c0",)]


def test_untimed_an_integer_counts_half(sought: Any) -> None:
    # one of four layers in float: 0.5 → 0.625 of the cost, so it must take a fifth of the error off
    for share, stays in ((0.3, True), (0.15, False)):
        rest = (1 - share) / 3
        shares = {"c0": share, "c1": rest, "c2": rest, "c3": rest}

        def error_of(_: str, __: str, left: frozenset[str], shares: Any = shares) -> float:
            # nothing but c0 gains anything
            return 0.01 * (1 - (shares["c0"] if "c0" in left else 0))

        found, _ = sought(error_of, None)
        assert bool(found.left) is stays
        assert {trial.time for trial in found.trials} == {None}
        assert {trial.name.split(",")[0] for trial in found.trials} == {"u8 × s8", "u8 × s7"}


@pytest.mark.parametrize("layers", [1, 2, 24, 200])
def test_the_number_of_trials_is_bounded(sought: Any, layers: int) -> None:
    _, asked = sought(lambda *_: 0.5 - 0.001 * len(_[2]), lambda *_: 0.5, layers=layers)
    assert asked <= 36


def test_a_model_that_is_never_finite_is_found_to_be_so(sought: Any) -> None:
    found, _ = sought(lambda *_: math.inf, lambda *_: 0.5)
    assert math.isinf(found.deviation.error)


def test_types_that_are_refused_are_passed_over(
    sought: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = module.in_int8

    def refusing(*given: Any) -> onnx.ModelProto:
        if given[2].name in refused:
            raise ModelError("no kernel")
        return noted(*given)

    monkeypatch.setattr(module, "in_int8", refusing)
    refused = {"u8 × s8"}
    assert sought(lambda *_: 0.0, lambda *_: 0.5)[0].types == "u8 × s7"
    refused = {each.name for each in ARITHMETICS}
    with pytest.raises(ModelError, match="no kernel"):
        sought(lambda *_: 0.0, lambda *_: 0.5)

"""A seeded share of the random graphs, and that a wrong result would be seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from tools import fuzz
from tools.exact import split_all
from tools.fuzz import check_surgery, try_graphs


def test_random_graphs_are_replaced_exactly() -> None:
    tally = try_graphs(30, seeded=1, convert=False)
    assert tally["graphs"] >= 30
    assert tally["layers"] > 20


def model() -> onnx.ModelProto:
    found = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]>'
        "net (float[2, 3, 6, 6] x) => (float[2, 4, 6, 6] y) { y = Conv<pads = [1, 1, 1, 1]>(x, w) }"
    )
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    found.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return found


def test_a_wrong_result_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_surgery(model(), 0) == 1

    def off(given: onnx.ModelProto, make: Any) -> object:
        changed, layers = split_all(given, make)
        tensor = changed.graph.initializer[0]
        values = numpy_helper.to_array(tensor) * np.float32(1.001)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        return changed, layers

    monkeypatch.setattr(fuzz, "split_all", off)
    with pytest.raises(AssertionError, match="output 0 is off"):
        check_surgery(model(), 0)


def test_the_smallest_graph_that_fails_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(given: onnx.ModelProto, turn: int) -> int:
        del turn
        raise AssertionError(f"{len(given.graph.node)} nodes are too many")

    monkeypatch.setattr(fuzz, "check_surgery", refuse)
    with pytest.raises(AssertionError, match="nodes are too many"):
        try_graphs(5, seeded=0, failing=tmp_path / "kept" / "graph.onnx")
    kept = onnx.load(tmp_path / "kept" / "graph.onnx")
    assert len(kept.graph.node) <= 4

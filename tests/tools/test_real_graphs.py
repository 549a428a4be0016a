"""Some graphs of real exporters, converted and checked; and that the checks see what is wrong."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from converter.model_file import load_model
from tools import real_graphs
from tools.architectures import ARCHITECTURES
from tools.real_graphs import Row, backend_cases, examine, export


@pytest.mark.parametrize(
    ("name", "opset", "new"),
    [("ESPCN", 11, False), ("Two streams", 13, False), ("FCOS", 18, True)],
)
def test_a_graph_is_converted_and_keeps_its_interface(
    tmp_path: Path, name: str, opset: int, new: bool
) -> None:
    architecture = next(each for each in ARCHITECTURES if each.name == name)
    path = tmp_path / "model.onnx"
    assert export(architecture, path, opset, new=new) == opset
    row = Row(name, architecture.family, "here", opset)
    examine(row, path, sizes=(1, 2) if architecture.free_size else (1,))
    assert row.wrong is None
    assert row.converted > 0
    assert row.exact is not None
    assert row.macs > 1.2


def test_there_are_networks_of_every_family() -> None:
    families = Counter(each.family for each in ARCHITECTURES)
    assert sum(families.values()) >= 25
    assert {"classification", "detection", "segmentation", "super-resolution"} <= set(families)
    assert len({each.name for each in ARCHITECTURES}) == len(ARCHITECTURES)


def test_a_backend_case_with_its_weights_bound_is_replaced_exactly(tmp_path: Path) -> None:
    cases = {name: (model, feeds) for name, model, feeds in backend_cases()}
    assert len(cases) > 50
    model, feeds = cases["test_conv_with_strides_and_asymmetric_padding"]
    bound = real_graphs._bound(model, feeds)
    assert bound is not None
    onnx.save(bound, tmp_path / "model.onnx")
    row = Row("case", "backend cases", "weights bound", 1)
    examine(row, tmp_path / "model.onnx", batches=())
    assert row.wrong is None
    assert row.exact is not None


def test_what_does_not_hold_is_seen(tmp_path: Path) -> None:
    architecture = next(each for each in ARCHITECTURES if each.name == "ESPCN")
    export(architecture, tmp_path / "model.onnx", 17, new=False)
    model, other = (load_model(tmp_path / "model.onnx") for _ in range(2))
    other.graph.output[0].name = "another"
    with pytest.raises(real_graphs._WrongError, match="outputs"):
        real_graphs._require_same_interface(model, other)
    other = load_model(tmp_path / "model.onnx")
    del other.metadata_props[:]
    with pytest.raises(real_graphs._WrongError, match="metadata"):
        real_graphs._require_same_interface(model, other)
    a = np.random.default_rng(0).normal(size=(8, 5))
    assert real_graphs._output_error([a * 1.1], [a])[0] == pytest.approx(0.01, rel=0.2)

"""Files that mean harm: sizes that are claimed, nests, and what only looks like a path."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import pytest
from onnx import TensorProto, numpy_helper

import converter
from converter.errors import ConfigError, ConverterError, ModelError

FLOAT = TensorProto.FLOAT


def saved(
    path: Path,
    nodes: list[onnx.NodeProto],
    weights: list[TensorProto],
    shape: tuple[int | str, ...] = ("batch", 3, 8, 8),
    rank: int = 4,
) -> Path:
    graph = oh.make_graph(
        nodes,
        "net",
        [oh.make_tensor_value_info("x", FLOAT, list(shape))],
        [oh.make_tensor_value_info("y", FLOAT, [None] * rank)],
        weights,
    )
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def kernel(name: str = "w") -> TensorProto:
    values = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    return numpy_helper.from_array(values, name)


def refused(path: Path) -> str:
    with pytest.raises(ConverterError) as caught:
        converter.inspect(path)
    sentence = str(caught.value)
    assert path.name in sentence
    assert "\n" not in sentence
    assert len(sentence) < 1000
    return sentence


@pytest.mark.parametrize("shape", [(1, 3, 10**9, 10**9), (2**40, 3, 8, 8), (1, 3, 2**62, 2**62)])
def test_inputs_of_huge_shapes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = saved(
        tmp_path / "wide.onnx", [oh.make_node("Conv", ["x", "w"], ["y"])], [kernel()], shape
    )
    assert "set TWOFOLD_MAX_SAMPLE_MIB" in refused(path)


def test_the_limit_on_inputs_can_be_lifted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [oh.make_node("Conv", ["x", "w"], ["y"])]
    path = saved(tmp_path / "wide.onnx", nodes, [kernel()], (1, 3, 400, 400))
    monkeypatch.setenv("TWOFOLD_MAX_SAMPLE_MIB", "1")
    assert "more than 1;" in refused(path)
    monkeypatch.setenv("TWOFOLD_MAX_SAMPLE_MIB", "2")
    assert len(converter.inspect(path).layers) == 1


@pytest.mark.parametrize("field", ["raw_data", "float_data"])
def test_weights_that_claim_huge_shapes(tmp_path: Path, field: str) -> None:
    weight = kernel()
    weight.ClearField("raw_data")
    if field == "raw_data":
        weight.raw_data = b"\0" * 16
    else:
        weight.float_data.extend([0.0] * 4)
    weight.dims[0] = 2**40
    refused(saved(tmp_path / "w.onnx", [oh.make_node("Conv", ["x", "w"], ["y"])], [weight]))


def test_values_that_would_be_made_huge_are_not_made(tmp_path: Path) -> None:
    shape = numpy_helper.from_array(np.array([2**20, 2**20], np.int64), "shape")
    nodes = [
        oh.make_node("ConstantOfShape", ["shape"], ["huge"]),
        oh.make_node("Conv", ["x", "w"], ["c"]),
        oh.make_node("ReduceMax", ["huge"], ["m"], keepdims=0),
        oh.make_node("Add", ["c", "m"], ["y"]),
    ]
    refused(saved(tmp_path / "huge.onnx", nodes, [shape, kernel()]))


def nested(depth: int) -> onnx.NodeProto:
    inner = oh.make_node("Identity", ["x"], ["y"])
    for _ in range(depth):
        out = oh.make_tensor_value_info("y", FLOAT, [None] * 4)
        body = oh.make_graph([inner], "body", [], [out])
        inner = oh.make_node("If", ["which"], ["y"], then_branch=body, else_branch=body)
    return inner


def test_bodies_that_are_nested_deeper_than_protobuf_reads(tmp_path: Path) -> None:
    # by hand, since protobuf does not write such a message either
    def field(number: int, content: bytes) -> bytes:
        size, length = len(content), b""
        while size > 127:
            length += bytes([size & 127 | 128])
            size >>= 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + content

    graph = b""
    for _ in range(2000):  # attribute 5 of node 1 of graph has graph 6
        graph = field(1, field(5, field(6, graph)))
    path = tmp_path / "deep.onnx"
    path.write_bytes(b"\x08\x08" + field(7, graph))
    assert "not an ONNX model" in refused(path)


def test_a_body_in_a_body_is_left_as_it_is(tmp_path: Path) -> None:
    which = numpy_helper.from_array(np.array(True), "which")
    nodes = [oh.make_node("Conv", ["image", "w"], ["x"]), nested(8)]
    path = saved(tmp_path / "nest.onnx", nodes, [kernel(), which])
    model = onnx.load(path)
    model.graph.input[0].name = "image"
    onnx.save(model, path)
    assert [layer.reason for layer in converter.inspect(path).layers] == [None]


def test_a_chain_of_thousands_of_nodes(tmp_path: Path) -> None:
    nodes = [oh.make_node("Conv", ["x", "w"], ["t0"])]
    nodes += [oh.make_node("Relu", [f"t{i}"], [f"t{i + 1}"]) for i in range(3000)]
    nodes += [oh.make_node("Identity", ["t3000"], ["y"])]
    assert len(converter.inspect(saved(tmp_path / "long.onnx", nodes, [kernel()])).layers) == 1


def test_a_layer_with_too_many_outputs_is_kept(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((20_000, 192), np.float32), "wide")
    nodes = [
        oh.make_node("Flatten", ["x"], ["f"]),
        oh.make_node("Gemm", ["f", "wide"], ["y"], transB=1),
    ]
    path = saved(tmp_path / "wide.onnx", nodes, [weight], rank=2)
    (layer,) = converter.inspect(path).layers
    assert layer.reason == "it has 20000 outputs, more than 16384"


@pytest.mark.parametrize(("open_", "close"), [("[", "]"), ('{"a":', "}")])
def test_reports_that_are_nested_deep(tmp_path: Path, open_: str, close: str) -> None:
    for depth in (40, 700, 100_000):
        deep = f"{open_ * depth}1{close * depth}"
        path = tmp_path / "report.json"
        about = json.dumps({"format": "twofold-conversion-2"})[:-1]
        path.write_text(f'{about}, "settings": {{"x": {deep}}}, "machine": {{}}}}')
        with pytest.raises(ConfigError, match=r"report\.json"):
            converter.diff(path, path)


def test_a_model_error_is_one_for_the_program_too(tmp_path: Path) -> None:
    """The errors above are those that the program ends with code 3 for."""
    weight = kernel()
    weight.raw_data = b"\0" * 16
    path = saved(tmp_path / "w.onnx", [oh.make_node("Conv", ["x", "w"], ["y"])], [weight])
    with pytest.raises(ModelError):
        converter.inspect(path)

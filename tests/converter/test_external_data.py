"""Weights in other files: read where they are safe, and refused where they are not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from converter import external_data
from converter.limits import Limit
from converter.model_file import (
    load_model,
)
from tests.converter.model_files import conv_model, make_external, refused


@pytest.mark.parametrize("entries", [{}, {"offset": 0}, {"offset": 0, "length": 768}])
def test_external_data_is_loaded(external: Callable[..., Path], entries: dict[str, int]) -> None:
    assert load_model(external(**entries)) == conv_model()


def test_external_data_is_found_from_any_folder(
    external: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = external()
    monkeypatch.chdir(path.parent)
    assert load_model(Path(path.name)) == conv_model()


def test_a_file_shared_by_tensors_is_read_at_each_offset(external: Callable[..., Path]) -> None:
    path = external(offset=8, length=768)
    weights = path.parent / "weights.bin"
    weights.write_bytes(b"\xff" * 8 + weights.read_bytes() + b"\xff" * 8)
    assert load_model(path) == conv_model()


def test_a_link_within_the_folder_is_followed(external: Callable[..., Path]) -> None:
    path = external("link.bin")
    (path.parent / "link.bin").symlink_to("weights.bin")
    assert load_model(path) == conv_model()


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("absent.bin", "missing"),
        ("", "names no file"),
        ("weights.bin\0", "names no file"),
        ("/etc/passwd", "absolute"),
        ("\\windows\\system.ini", "absolute"),
        ("c:weights.bin", "absolute"),
        ("\\\\server\\share\\weights.bin", "absolute"),
        ("../secret.bin", "climbs out"),
        ("..\\secret.bin", "climbs out"),
        ("sub/../../secret.bin", "climbs out"),
        ("sub/../weights.bin", "climbs out"),
        (".", "not a plain file"),
        ("*/_ORT_MEM_ADDR_/*", "missing"),
    ],
)
def test_external_paths_that_are_not_safe_are_refused(
    external: Callable[..., Path], tmp_path: Path, location: str, words: str
) -> None:
    (tmp_path / "secret.bin").write_bytes(b"\0" * 768)
    message = refused(external(location))
    assert words in message
    assert "'w'" in message


@pytest.mark.parametrize("through_folder", [False, True])
def test_a_link_out_of_the_folder_is_refused(
    external: Callable[..., Path], tmp_path: Path, through_folder: bool
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.bin").write_bytes(b"\0" * 768)
    path = external("link/secret.bin" if through_folder else "link")
    link = path.parent / "link"
    link.symlink_to(outside if through_folder else outside / "secret.bin")
    assert "leaves the model's folder" in refused(path)


def test_a_folder_whose_name_only_begins_like_the_model_s_is_outside(
    external: Callable[..., Path], tmp_path: Path
) -> None:
    outside = tmp_path / "model-2"
    outside.mkdir()
    (outside / "secret.bin").write_bytes(b"\0" * 768)
    path = external("link.bin")
    (path.parent / "link.bin").symlink_to(outside / "secret.bin")
    assert "leaves the model's folder" in refused(path)


def test_a_pipe_as_external_data_is_refused(external: Callable[..., Path]) -> None:
    path = external("pipe")
    os.mkfifo(path.parent / "pipe")
    assert "not a plain file" in refused(path)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"offset": 8}, "ends at byte 776"),
        ({"offset": 2**60}, "ends at byte"),
        ({"length": 764}, "needs 768"),
        ({"length": 2**62}, "needs 768"),
        ({"offset": -8}, "no byte count"),
        ({"offset": "0x10"}, "no byte count"),
        ({"offset": "1_0"}, "no byte count"),
        ({"offset": "9" * 5000}, "no byte count"),
        ({"length": ""}, "no byte count"),
    ],
)
def test_external_ranges_outside_the_file_are_refused(
    external: Callable[..., Path], entries: dict[str, object], words: str
) -> None:
    assert words in refused(external(**entries))


def test_a_huge_amount_of_external_data_is_refused(
    external: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external_data, "WEIGHTS_GIB", Limit("TWOFOLD_MAX_WEIGHTS_GIB", 0))
    assert "set TWOFOLD_MAX_WEIGHTS_GIB above 0" in refused(external())


def test_unknown_keys_of_external_data_do_no_harm(external: Callable[..., Path]) -> None:
    assert load_model(external(raw_data="x", __class__="y")) == conv_model()


def _constant(model: onnx.ModelProto, tensor: TensorProto) -> None:
    node = model.graph.node.add(op_type="Constant", output=["k"])
    node.attribute.append(helper.make_attribute("value", tensor))


def _tensor_list(model: onnx.ModelProto, tensor: TensorProto) -> None:
    attribute = model.graph.node[0].attribute.add(name="ts", type=onnx.AttributeProto.TENSORS)
    attribute.tensors.append(tensor)


def _subgraph_initializer(model: onnx.ModelProto, tensor: TensorProto) -> None:
    body = helper.make_graph([], "body", [], [], [tensor])
    model.graph.node.add(op_type="If").attribute.append(helper.make_attribute("then_branch", body))


def _nested_constant(model: onnx.ModelProto, tensor: TensorProto) -> None:
    inner = helper.make_graph([helper.make_node("Constant", [], ["k"], value=tensor)], "i", [], [])
    outer = helper.make_graph([helper.make_node("If", [], [], then_branch=inner)], "o", [], [])
    model.graph.node.add(op_type="Loop").attribute.append(helper.make_attribute("body", outer))


def _function_constant(model: onnx.ModelProto, tensor: TensorProto) -> None:
    node = helper.make_node("Constant", [], ["k"], value=tensor)
    model.functions.append(
        helper.make_function("d", "f", [], ["k"], [node], [helper.make_opsetid("", 17)])
    )


def _sparse_initializer(model: onnx.ModelProto, tensor: TensorProto) -> None:
    model.graph.sparse_initializer.add(dims=[8]).values.CopyFrom(tensor)


def _sparse_indices(model: onnx.ModelProto, tensor: TensorProto) -> None:
    model.graph.sparse_initializer.add(dims=[8]).indices.CopyFrom(tensor)


def _sparse_attribute(model: onnx.ModelProto, tensor: TensorProto) -> None:
    attribute = model.graph.node[0].attribute.add(name="s")
    attribute.sparse_tensor.values.CopyFrom(tensor)


def _training(model: onnx.ModelProto, tensor: TensorProto) -> None:
    model.training_info.add().algorithm.initializer.append(tensor)


@pytest.mark.parametrize(
    "place",
    [
        _constant,
        _tensor_list,
        _subgraph_initializer,
        _nested_constant,
        _function_constant,
        _sparse_initializer,
        _sparse_indices,
        _sparse_attribute,
        _training,
    ],
)
def test_external_data_is_checked_wherever_a_tensor_may_lie(
    tmp_path: Path, place: Callable[[onnx.ModelProto, TensorProto], None]
) -> None:
    tensor = TensorProto(name="hidden", data_type=TensorProto.FLOAT, dims=[2])
    make_external(tensor, location="/etc/passwd")
    model = conv_model()
    place(model, tensor)
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    message = refused(path)
    assert "absolute" in message
    assert "'hidden'" in message


def test_external_constants_in_subgraphs_are_loaded(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        net (bool c) => (float[2] y)
        {
          y = If (c) <
            then_branch = g1 () => (float[2] a) { a = Constant <value = float[2] {1, 2}> () },
            else_branch = g2 () => (float[2] b) { b = Constant <value = float[2] {3, 4}> () }
          >
        }
        """
    )
    tensor = model.graph.node[0].attribute[0].g.node[0].attribute[0].t
    tensor.ClearField("float_data")
    make_external(tensor, location="k.bin", offset=4, length=8)
    (tmp_path / "k.bin").write_bytes(b"skip" + np.array([5, 6], np.float32).tobytes())
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    loaded = load_model(path).graph.node[0].attribute[0].g.node[0].attribute[0].t
    assert loaded.data_location == TensorProto.DEFAULT
    np.testing.assert_array_equal(numpy_helper.to_array(loaded), [5, 6])

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import converter
from converter import model_file
from converter.errors import ConfigError, ConverterError, ModelError
from converter.limits import Limit
from converter.model_file import (
    PROTOBUF_LIMIT,
    check_output_path,
    external_files,
    file_digest,
    load_model,
    model_digest,
    save_model,
    write_text_atomically,
)

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"

CONV = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[n, 3, 8, 8] x) => (float[n, 4, 8, 8] y)
<float[4, 3, 1, 1] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}>
{ c = Conv(x, w)  y = Relu(c) }
"""


def conv_model(channels: int = 64) -> onnx.ModelProto:
    """Model whose weight has 12 · channels bytes as raw data, above onnx's external threshold."""
    weight = np.random.default_rng(0).normal(size=(channels, 3, 1, 1)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", channels, 4, 4])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def make_external(tensor: TensorProto, **entries: object) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))


@pytest.fixture
def external(tmp_path: Path) -> Callable[..., Path]:
    """Write a model whose weight lies, it says, in another file; return the model's path."""

    def write(name: str = "weights.bin", **entries: object) -> Path:
        model = conv_model()
        data = model.graph.initializer[0].raw_data
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "weights.bin").write_bytes(data)
        make_external(model.graph.initializer[0], **({"location": name} | entries))
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        return folder / "model.onnx"

    return write


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(path)
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message
    assert ";" in message  # what is wrong; what to do
    return message


# Loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.name for path in LIGHT.glob("*.onnx")))
def test_onnx_s_own_networks_load_and_pass_the_full_checker(name: str) -> None:
    model = load_model(LIGHT / name)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == 3
    assert len(model.graph.input) > 1  # initializers among the inputs, as they came


def test_a_model_is_loaded_unchanged(tmp_path: Path) -> None:
    model = conv_model()
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert load_model(tmp_path / "m.onnx") == model


def test_reference_models_load(shared: Path) -> None:
    for path in sorted((shared / "models").glob("*.onnx")):
        assert load_model(path).graph.node


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty file"),
        (b"\x89PNG\r\n\x1a\n not a model at all", "not an ONNX model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS"),
        (b"\xa2\x06\x03abc", "not an ONNX model"),  # a message of one unknown field
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    assert words in refused(path)


def test_a_missing_file_a_folder_and_a_pipe_are_refused(tmp_path: Path) -> None:
    assert "no model" in refused(tmp_path / "absent.onnx")
    (tmp_path / "folder.onnx").mkdir()
    assert "folder" in refused(tmp_path / "folder.onnx")
    os.mkfifo(tmp_path / "pipe.onnx")
    assert "plain file" in refused(tmp_path / "pipe.onnx")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    data = onnx.parser.parse_model(CONV).SerializeToString()
    path = tmp_path / "cut.onnx"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        refused(path)
    path.write_bytes(data)
    load_model(path)


def test_more_than_two_gigabytes_are_refused_without_reading_them(tmp_path: Path) -> None:
    path = tmp_path / "large.onnx"
    with path.open("wb") as file:
        file.truncate(PROTOBUF_LIMIT + 1)  # takes no room on the disk
    assert "external data" in refused(path)


def test_the_checker_s_first_line_is_told(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(CONV)
    model.graph.node[1].op_type = "Rellu"
    path = tmp_path / "bad.onnx"
    path.write_bytes(model.SerializeToString())
    assert "No Op registered for Rellu" in refused(path)


def test_a_graph_without_nodes_is_refused(tmp_path: Path) -> None:
    model = conv_model()
    del model.graph.node[:]
    del model.graph.output[:]
    path = tmp_path / "bare.onnx"
    path.write_bytes(model.SerializeToString())
    assert "without any node" in refused(path)


@pytest.mark.parametrize("length", [0, 4, 764, 772])
def test_weights_that_do_not_fill_their_shape_are_refused(tmp_path: Path, length: int) -> None:
    model = conv_model()
    model.graph.initializer[0].raw_data = b"\0" * length
    path = tmp_path / "bad.onnx"
    path.write_bytes(model.SerializeToString())
    refused(path)


def test_an_unknown_type_is_refused(tmp_path: Path) -> None:
    model = conv_model()
    model.graph.initializer[0].data_type = 999
    path = tmp_path / "bad.onnx"
    path.write_bytes(model.SerializeToString())
    assert "unknown type 999" in refused(path)


# External data --------------------------------------------------------------------------------


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
    monkeypatch.setattr(model_file, "WEIGHTS_GIB", Limit("TWOFOLD_MAX_WEIGHTS_GIB", 0))
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


# Saving ---------------------------------------------------------------------------------------


def test_saving_and_loading_gives_the_same_model_and_the_same_bytes(tmp_path: Path) -> None:
    model = conv_model()
    model.metadata_props.add(key="k", value="v")
    for name in ("a.onnx", "b.onnx"):
        save_model(model, tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert load_model(tmp_path / "a.onnx") == model
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]


def test_a_large_model_s_weights_go_to_a_file_of_their_own(tmp_path: Path) -> None:
    model = conv_model()
    extra = numpy_helper.from_array(np.arange(300, dtype=np.float32), "extra")
    small = numpy_helper.from_array(np.arange(3, dtype=np.int64), "small")
    model.graph.initializer.extend([extra, small])
    attribute = helper.make_attribute("value", numpy_helper.from_array(np.zeros(400), "k"))
    model.graph.node.add(op_type="Constant", output=["k"]).attribute.append(attribute)
    before = model.SerializeToString()
    path = tmp_path / "m.onnx"
    save_model(model, path, external_above=1500)
    assert model.SerializeToString() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert load_model(path) == model
    # onnx itself reads it, and every initializer of 1 KiB and more is outside.
    onnx.checker.check_model(str(path))
    theirs = onnx.load(path)
    for ours, read in zip(model.graph.initializer, theirs.graph.initializer, strict=True):
        assert ours.raw_data == read.raw_data
    bare = onnx.load(path, load_external_data=False)
    outside = {t.name: t.data_location for t in bare.graph.initializer}
    assert outside == {"w": 0, "extra": TensorProto.EXTERNAL, "small": 0}
    entries = {e.key: e.value for e in bare.graph.initializer[1].external_data}
    assert entries == {"location": "m.onnx.data", "offset": "0", "length": "1200"}
    assert (tmp_path / "m.onnx.data").read_bytes() == extra.raw_data
    assert bare.graph.node[1].attribute[0].t.raw_data == np.zeros(400).tobytes()
    # The same bytes again.
    first = [(tmp_path / name).read_bytes() for name in ("m.onnx", "m.onnx.data")]
    save_model(model, path, external_above=1500)
    assert first == [(tmp_path / name).read_bytes() for name in ("m.onnx", "m.onnx.data")]


def test_weights_stay_inside_up_to_the_limit(tmp_path: Path) -> None:
    model = conv_model()
    save_model(model, tmp_path / "m.onnx", external_above=768)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    save_model(conv_model(128), tmp_path / "n.onnx", external_above=1535)
    assert (tmp_path / "n.onnx.data").stat().st_size == 1536


def test_weights_in_a_file_begin_at_pages_and_run_as_before(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[1, 300] x) => (float[1, 300] y) { a = Mul(x, s)  y = Add(a, t) }
        """
    )
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=300).astype(np.float32) for name in "st"}
    for name, values in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    path = tmp_path / "m.onnx"
    save_model(model, path, external_above=0)
    assert (tmp_path / "m.onnx.data").stat().st_size == 4096 + 1200
    assert load_model(path) == model
    x = rng.normal(size=(1, 300)).astype(np.float32)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    np.testing.assert_allclose(y, x * weights["s"] + weights["t"], rtol=1e-6)


def test_a_tensor_above_what_protobuf_copies_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.onnx"
    save_model(conv_model(128), path, external_above=0)
    monkeypatch.setattr(model_file, "PROTOBUF_LIMIT", 1535)
    with pytest.raises(ModelError, match="part it into two"):
        load_model(path)


def test_a_file_system_that_is_read_only_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "open", refused)
    monkeypatch.setattr(Path, "unlink", refused)  # Linux: also where there is no such file
    with pytest.raises(ConfigError, match="Read-only file system"):
        check_output_path(tmp_path / "m.onnx")
    with pytest.raises(ConfigError, match="Read-only file system"):
        save_model(conv_model(), tmp_path / "m.onnx")


def test_a_model_above_what_protobuf_holds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_file, "PROTOBUF_LIMIT", 100)
    with pytest.raises(ModelError, match="above 2 GB"):
        save_model(conv_model(), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_new_file_s_rights_follow_the_umask(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    save_model(conv_model(), tmp_path / "m.onnx")
    expected = (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "m.onnx").stat().st_mode == expected


@pytest.mark.parametrize(
    ("external_above", "failing"),
    [(2**31, "fsync"), (2**31, "replace"), (0, "fsync"), (0, "replace"), (0, "second replace")],
)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_failed_write_leaves_nothing_behind(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    external_above: int,
    failing: str,
    error: BaseException,
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"what was there")
    if failing == "fsync":

        def fsync(_: int) -> None:
            raise error

        monkeypatch.setattr(os, "fsync", fsync)
    else:
        real = Path.replace
        allowed = [True] if failing == "second replace" else []

        def replace(self: Path, target: Path) -> Path:
            if not allowed:
                raise error
            allowed.pop()
            return real(self, target)

        monkeypatch.setattr(Path, "replace", replace)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ConfigError
    with pytest.raises(expected):
        save_model(conv_model(128), path, external_above=external_above)
    assert path.read_bytes() == b"what was there"
    assert [each.name for each in tmp_path.iterdir()] == ["m.onnx"]


def test_writing_into_a_folder_that_is_missing_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be written \(No such file"):
        save_model(conv_model(), tmp_path / "absent" / "m.onnx")


def test_text_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_text_atomically(path, "é = 1\n")
    write_text_atomically(path, "λ = 2\n")
    assert path.read_bytes() == "λ = 2\n".encode()
    assert [each.name for each in tmp_path.iterdir()] == ["report.json"]
    with pytest.raises(UnicodeEncodeError):
        write_text_atomically(path, "\ud800")
    assert path.read_bytes() == "λ = 2\n".encode()
    assert [each.name for each in tmp_path.iterdir()] == ["report.json"]


# Output paths ---------------------------------------------------------------------------------


def output_refused(out: Path, *inputs: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        check_output_path(out, *inputs)
    message = str(caught.value)
    assert str(out) in message
    assert ";" in message
    assert "\n" not in message
    return message


def test_a_usable_output_passes_and_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    source.write_bytes(b"x")
    (tmp_path / "old.onnx").write_bytes(b"y")
    for name in ("out.onnx", "old.onnx"):
        check_output_path(tmp_path / name, source, tmp_path / "absent")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.onnx", "old.onnx"]
    assert (tmp_path / "old.onnx").read_bytes() == b"y"


def test_an_output_in_the_current_folder_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_output_path(Path("out.onnx"))


def test_an_output_that_is_an_input_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "in.onnx"
    source.write_bytes(b"x")
    (tmp_path / "soft.onnx").symlink_to("in.onnx")
    (tmp_path / "hard.onnx").hardlink_to(source)
    (tmp_path / "folder").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for out in (
        source,
        Path("in.onnx"),
        tmp_path / "soft.onnx",
        tmp_path / "hard.onnx",
        tmp_path / "folder" / "in.onnx",
        tmp_path / "folder" / ".." / tmp_path.name / "in.onnx",
    ):
        assert "overwrite the input" in output_refused(out, tmp_path / "other", source)
    assert "overwrite" in output_refused(source, tmp_path / "soft.onnx")


def test_an_output_whose_weights_would_overwrite_an_input_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "out.onnx.data"
    source.write_bytes(b"x")
    assert "overwrite the input" in output_refused(tmp_path / "out.onnx", source)


def test_the_files_that_a_models_weights_lie_in_are_inputs_too(
    external: Callable[..., Path],
) -> None:
    source = external()
    assert external_files(source) == [source.with_name("weights.bin").resolve()]
    with pytest.raises(ConfigError, match=r"would overwrite the input .*weights\.bin"):
        converter.convert(source, "images", source.with_name("weights.bin"), converter.Budget(2))


def test_outputs_that_cannot_be_files_are_refused(tmp_path: Path) -> None:
    assert "is a folder" in output_refused(tmp_path)
    assert "does not exist" in output_refused(tmp_path / "absent" / "out.onnx")
    (tmp_path / "file").write_bytes(b"")
    assert "Not a directory" in output_refused(tmp_path / "file" / "out.onnx")
    os.mkfifo(tmp_path / "pipe")
    assert "plain file" in output_refused(tmp_path / "pipe")
    assert "too long" in output_refused(tmp_path / ("n" * 300))


def test_a_folder_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, _: str) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    assert "Permission denied" in output_refused(tmp_path / "out.onnx")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder nobody can write to")
def test_a_folder_that_not_even_root_can_write_to_is_refused() -> None:
    assert re.search(r"cannot be written \(.+\)", output_refused(Path("/proc/self/out.onnx")))


# Digest ---------------------------------------------------------------------------------------


def test_the_digest_is_sha_256_of_the_content(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(3 * 2**20 + 5)
    (tmp_path / "f").write_bytes(data)
    assert file_digest(tmp_path / "f") == hashlib.sha256(data).hexdigest()
    with pytest.raises(FileNotFoundError):
        file_digest(tmp_path / "absent")


def test_errors_have_the_exit_codes_of_the_command_line() -> None:
    assert (ModelError.exit_code, ConfigError.exit_code) == (3, 2)
    assert issubclass(ModelError, ConverterError)


def test_the_digest_of_a_model_covers_its_external_data(external: Callable[..., Path]) -> None:
    path = external()
    before = model_digest(path)
    assert before == model_digest(path) != file_digest(path)
    data = next(each for each in path.parent.iterdir() if each != path)
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    assert model_digest(path) != before
    data.unlink()
    with pytest.raises(ModelError, match="missing"):
        model_digest(path)


def test_the_digest_of_a_model_in_one_file_is_the_files(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(conv_model(), path)
    assert model_digest(path) == file_digest(path)


@pytest.mark.parametrize("text", [b"weights.bin", b"location"])
def test_text_that_is_not_utf_8_is_refused(external: Callable[..., Path], text: bytes) -> None:
    path = external()
    content = path.read_bytes()
    assert text in content
    path.write_bytes(content.replace(text, b"\xff" + text[1:]))
    assert "not UTF-8" in refused(path)

"""Model files: read without trusting them, and written whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from converter import model_file
from converter.errors import ConfigError, ModelError
from converter.model_file import (
    PROTOBUF_LIMIT,
    load_model,
    model_digest,
    save_model,
)
from converter.plain_file import file_digest
from tests.converter.model_files import conv_model, refused

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"

CONV = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[n, 3, 8, 8] x) => (float[n, 4, 8, 8] y)
<float[4, 3, 1, 1] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}>
{ c = Conv(x, w)  y = Relu(c) }
"""


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


def test_sizes_of_minus_one_are_free(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(CONV)
    sizes = model.graph.input[0].type.tensor_type.shape.dim
    for axis in (0, 2, 3):
        sizes[axis].dim_value = -1
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    loaded = load_model(tmp_path / "m.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [size.HasField("dim_value") for size in loaded] == [False, True, False, False]


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

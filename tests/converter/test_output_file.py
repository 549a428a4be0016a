"""Output files: written whole, and never over an input."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import converter
from converter.errors import ConfigError
from converter.model_file import (
    external_files,
    save_model,
)
from converter.output_file import check_output_path, write_text_atomically
from tests.converter.model_files import conv_model


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


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc, where nobody can write")
def test_a_folder_that_not_even_root_can_write_to_is_refused() -> None:
    assert re.search(r"cannot be written \(.+\)", output_refused(Path("/proc/self/out.onnx")))


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

"""`twofold run`: a project file, with a conversion that is made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import converter
from converter.config import Budget, Runtime, Target
from converter.errors import SolverError
from converter.outcome import Conversion
from tests.converter.cli.conftest import Called, Run


def project(folder: Path, gates: str = "max_file_mb = 1") -> Path:
    """Write a project whose conversion is made by `converting`."""
    path = folder / "twofold.toml"
    path.write_text(
        f"""
        model = "net.onnx"
        calib = "pictures"
        out = "small.onnx"
        [budget]
        macs = 2
        [preprocessing]
        preset = "unit"
        [running]
        threads = 1
        patches = 512
        [gates]
        data = "pictures"
        seconds = 0.01
        {gates}
        """,
        encoding="utf-8",
    )
    return path


@pytest.fixture
def converting(called: Called, recoloured: Path, monkeypatch: pytest.MonkeyPatch) -> Called:
    """Stands for `converter.convert`, and writes the recoloured model."""

    def convert(*positional: Any, **named: Any) -> Conversion:
        positional[2].write_bytes(recoloured.read_bytes())
        return called(*positional, **named)

    monkeypatch.setattr(converter, "convert", convert)
    return called


def test_run_takes_the_file_and_options_override_it(
    twofold: Run, converting: Called, net: Path, pictures: Path, tmp_path: Path
) -> None:
    path = project(tmp_path)
    ended = twofold("run", "--config", path, "--patches", 1024, "--gate", "max_accuracy_drop=40")
    assert ended.code == 0
    assert converting.positional == (net, pictures, tmp_path / "small.onnx", Budget(2))
    assert converting.named["calibration"].patches == 1024  # typed
    assert converting.named["target"] == Target(Runtime(threads=1))  # from the file
    assert "max_file_mb" in ended.out  # typed gates stand beside those of the file
    assert "max_accuracy_drop" in ended.out
    assert (tmp_path / "small.json").is_file()

    ended = twofold("run", "--config", path, "--gate", "max_accuracy_drop=39.9")
    assert ended.code == 1
    assert "max_accuracy_drop failed" in ended.err
    assert (tmp_path / "small.onnx").is_file()  # it is there to be looked at


def test_run_and_check_find_the_file_where_they_are_started(
    twofold: Run,
    converting: Called,
    net: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    del converting, net, pictures
    monkeypatch.chdir(tmp_path)
    missing = twofold("run")
    assert missing.code == 2
    assert "twofold init" in missing.err
    project(tmp_path, "max_accuracy_drop = 30")
    assert twofold("run", "--gate", "max_accuracy_drop=50").code == 0
    checked = twofold("check")  # the two models are the project's
    assert checked.code == 1
    assert "max_accuracy_drop failed: 40 points, at most 30" in checked.err


def test_run_refuses_before_it_converts(
    twofold: Run, converting: Called, net: Path, pictures: Path, tmp_path: Path
) -> None:
    del net
    path = project(tmp_path, "")
    assert "no gate was given" in twofold("run", "--config", path).err
    path = project(tmp_path, "max_accuracy_drop = 1")
    Image.new("RGB", (8, 8)).save(pictures / "loose.png")
    ended = twofold("run", "--config", path)
    assert ended.code == 2
    assert "class folders" in ended.err
    assert converting.positional == ()


@pytest.mark.parametrize(
    "twice", [["--json", "small.json"], ["--junit", "page.html", "--html", "page.html"]]
)
def test_no_file_is_written_over_another(
    twofold: Run, converting: Called, net: Path, pictures: Path, tmp_path: Path, twice: list[str]
) -> None:
    del net, pictures
    paths = [str(tmp_path / each) if "." in each else each for each in twice]
    ended = twofold("run", "--config", project(tmp_path), *paths)
    assert ended.code == 2
    assert "would overwrite" in ended.err
    assert converting.positional == ()


def test_check_judges_on_the_images_that_run_falls_back_to(
    twofold: Run, converting: Called, net: Path, pictures: Path, tmp_path: Path
) -> None:
    del converting, net, pictures
    path = project(tmp_path)
    text = path.read_text(encoding="utf-8").replace('data = "pictures"', "")
    path.write_text(
        text.replace("macs = 2", 'max_drop = 50\n        val = "pictures"'), encoding="utf-8"
    )
    assert twofold("run", "--config", path).code == 0
    assert twofold("check", "--config", path).code == 0


def test_a_failed_conversion_is_not_judged(
    twofold: Run, converting: Called, net: Path, pictures: Path, tmp_path: Path
) -> None:
    del net, pictures
    converting.error = SolverError("broken")
    ended = twofold("run", "--config", project(tmp_path))
    assert ended.code == 5
    assert "gates" not in ended.out + ended.err

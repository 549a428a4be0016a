"""`twofold validate`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from tests.converter.cli.conftest import QUICK, Run


def test_validate(twofold: Run, net: Path, pictures: Path, tmp_path: Path) -> None:
    report = tmp_path / "v.json"
    ended = twofold("validate", net, net, "--data", pictures, *QUICK, "--json", report)
    assert ended.code == 0
    assert "comparing outputs" in ended.err
    content = json.loads(report.read_text(encoding="utf-8"))
    assert content["format"] == "twofold-validation-1"
    assert content["images"] == 5
    assert content["accuracy"]["original"] == 0.8  # the subfolders are classes
    assert [each["batch"] for each in content["latencies"]] == [1]
    assert content["agreement"]["top1"] == 1.0


@pytest.mark.parametrize(("option", "labelled"), [("--labels", True), ("--no-labels", False)])
def test_validate_labels(
    twofold: Run, net: Path, pictures: Path, option: str, labelled: bool
) -> None:
    ended = twofold("validate", net, net, "--data", pictures, *QUICK, option)
    assert ended.code == 0
    assert ("accuracy" in ended.out) == labelled


def test_loose_images_are_no_classes(twofold: Run, net: Path, pictures: Path) -> None:
    Image.new("RGB", (8, 8)).save(pictures / "loose.png")
    assert "accuracy" not in twofold("validate", net, net, "--data", pictures, *QUICK).out
    asked = twofold("validate", net, net, "--data", pictures, *QUICK, "--labels")
    assert asked.code == 4


def test_validate_quietly(twofold: Run, net: Path, pictures: Path) -> None:
    ended = twofold("validate", net, net, "--data", pictures, *QUICK, "--quiet", "--images", 2)
    assert (ended.code, ended.out, ended.err) == (0, "", "")


def test_models_that_do_not_match(twofold: Run, net: Path, pictures: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    renamed = onnx.printer.to_text(onnx.load(net)).replace("scores", "answers")
    onnx.save(onnx.parser.parse_model(renamed), other)
    ended = twofold("validate", net, other, "--data", pictures, *QUICK)
    assert ended.code == 1
    assert "'scores'" in ended.err or "'answers'" in ended.err


def test_converted_model_that_gives_nan(
    twofold: Run, net: Path, pictures: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.onnx"
    model = onnx.load(net)
    broken = np.full((4, 3), np.nan, np.float32)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(broken, "w"))
    onnx.save(model, other)
    ended = twofold("validate", net, other, "--data", pictures, *QUICK)
    assert ended.code == 1
    assert "do not use it" in ended.err
    assert "scores" in ended.out  # the tables are there nevertheless

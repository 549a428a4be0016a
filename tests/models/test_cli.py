"""`python -m models` as it is typed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from typer.testing import CliRunner

from models import build, initialise
from models.cli import app

ROOT = Path(__file__).resolve().parents[2]


def typed(*words: str | Path) -> tuple[int, str, str]:
    """Run the command line in this process: exit code, what it prints, what it prints as errors."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def test_as_a_command(tmp_path: Path) -> None:
    out = tmp_path / "resnet20.onnx"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "models", "export", "resnet20", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "random weights (seed 0): the answers mean nothing" in result.stdout
    assert f"wrote {out}: 269,722 parameters" in result.stdout
    assert onnx.load(out).graph.output[0].name == "logits"


def test_list_names_every_network() -> None:
    code, printed, _ = typed("list")
    assert code == 0
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line.strip()}
    assert rows["vgg16"][1:4] == ["224×224", "1000", "138,357,544"]
    assert rows["resnet20"][1:4] == ["32×32", "10", "269,722"]
    assert len(rows) == 12


def test_export_with_weights_and_settings(tmp_path: Path) -> None:
    net = build("resnet20", classes=7)
    initialise(net, 5, size=24)
    torch.save({"state_dict": net.state_dict()}, tmp_path / "trained.pth")
    out = tmp_path / "net.onnx"
    code, printed, complaints = typed(
        *("export", "resnet20", "--weights", tmp_path / "trained.pth", "--out", out),
        *("--classes", 7, "--size", 24, "--opset", 18),
    )
    assert (code, complaints) == (0, "")
    assert "random" not in printed
    assert "input (batch, 3, 24, 24), opset 18" in printed
    model = onnx.load(out)
    assert model.opset_import[0].version == 18
    assert model.graph.output[0].type.tensor_type.shape.dim[1].dim_value == 7


def test_seed_decides_the_random_weights(tmp_path: Path) -> None:
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        files.append(tmp_path / f"{name}.onnx")
        code, _, _ = typed("export", "resnet20", "--out", files[-1], "--seed", seed)
        assert code == 0
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()


@pytest.mark.parametrize(
    ("weights", "words", "transformed"),
    [(True, (), True), (True, ("--no-transform-input",), False), (False, (), False)],
)
def test_googlenet_transforms_its_input_where_weights_are_given(
    weights: bool, words: tuple[str, ...], transformed: bool, tmp_path: Path
) -> None:
    given: tuple[str | Path, ...] = words
    if weights:
        net = build("googlenet", classes=2)
        initialise(net, 0, size=32)
        torch.save(net.state_dict(), tmp_path / "w.pth")
        given = (*words, "--weights", tmp_path / "w.pth")
    out = tmp_path / "g.onnx"
    code, _, complaints = typed(
        "export", "googlenet", "--out", out, "--classes", 2, "--size", 32, *given
    )
    assert (code, complaints) == (0, "")
    assert (onnx.load(out).graph.node[0].op_type == "Mul") == transformed


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("lenet",), "there is no network 'lenet'"),
        (("vgg16", "--size", "64"), "give --size 224"),
        (("vgg16_cifar", "--size", "40", "--classes", "0"), "1 to 4096 pixels"),
        (("vgg16_cifar", "--size", "16"), "cannot take 16×16 images"),
        (("resnet20", "--opset", "9"), "opset 9 is not from 13 to 20"),
        (("resnet20", "--weights", "none.pth"), "none.pth cannot be read: No such file"),
        (("resnet20", "--transform-input"), "only googlenet does"),
    ],
)
def test_errors_are_one_sentence_and_code_2(
    words: tuple[str, ...], complaint: str, tmp_path: Path
) -> None:
    code, _, complaints = typed("export", *words, "--out", tmp_path / "net.onnx")
    assert code == 2
    assert complaint in complaints
    assert complaints.startswith("Error: ")
    assert complaints.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_target_in_no_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    code, printed, complaints = typed("export", "vgg16", "--out", tmp_path / "no" / "net.onnx")
    assert (code, printed) == (2, "")
    assert "there is no folder" in complaints


def test_digits(tmp_path: Path) -> None:
    code, printed, complaints = typed("digits", "--out", tmp_path / "digits", "--epochs", 1)
    assert (code, complaints) == (0, "")
    assert "(360 images, unseen): " in printed
    dims = onnx.load(tmp_path / "digits" / "digits.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in dims][1:] == [1, 16, 16]
    for part, count in (("calib", 400), ("val", 360)):
        files = list((tmp_path / "digits" / part).glob("*/*.png"))
        assert len(files) == count
        assert {file.parent.name for file in files} == set("0123456789")


def test_digits_leaves_other_files_alone(tmp_path: Path) -> None:
    mine = tmp_path / "val" / "mine.png"
    mine.parent.mkdir()
    mine.write_text("mine")
    code, _, complaints = typed("digits", "--out", tmp_path, "--epochs", 1)
    assert code == 2
    assert f"{mine} is in the way" in complaints
    assert mine.read_text() == "mine"
    assert not (tmp_path / "digits.onnx").exists()


def test_digits_without_epochs_is_refused(tmp_path: Path) -> None:
    code, _, complaints = typed("digits", "--out", tmp_path, "--epochs", 0)
    assert code == 2
    assert "give --epochs 1 or more" in complaints

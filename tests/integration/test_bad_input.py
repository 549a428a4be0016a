"""Bad input: one clear sentence, the right exit code, no traceback, and no file left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx.parser
import pytest
from onnx.external_data_helper import set_external_data
from PIL import Image

from converter import cli
from converter.cli.terminal import DEBUG

NET = """
    <ir_version: 8, opset_import: ["": {opset}, "custom": 1]>
    net (float[batch, 3, 8, 8] image) => (float[batch, 4] scores)
    <float[16, 3, 3, 3] w1, float[32, 16, 3, 3] w2, float[4, 32] w3>
    {{
        a = Conv <pads = [1, 1, 1, 1]> (image, w1)
        b = {activation} (a)
        c = Conv <pads = [1, 1, 1, 1]> (b, w2)
        d = Relu (c)
        e = GlobalAveragePool (d)
        f = Flatten (e)
        scores = Gemm <transB = 1> (f, w3)
    }}
"""
SHAPES = {"w1": (16, 3, 3, 3), "w2": (32, 16, 3, 3), "w3": (4, 32)}


def network(activation: str = "Relu", opset: int = 17) -> onnx.ModelProto:
    """Two Convs and a Gemm with seeded weights."""
    model = onnx.parser.parse_model(NET.format(activation=activation, opset=opset))
    random = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        value = (random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    return model


@dataclass(frozen=True)
class Ended:
    """How a run of the program ended."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The error; whatever progress there was stands above it."""
        *above, last = self.err.splitlines()
        assert not [line for line in above if "twofold: error" in line], self.err
        assert last.startswith("twofold: error: "), self.err
        assert "Traceback" not in self.err
        return last


Run = Callable[..., Ended]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder to work in, with `net.onnx` and some images to calibrate on."""
    folder = tmp_path / "place"
    (folder / "images").mkdir(parents=True)
    onnx.save(network(), folder / "net.onnx")
    random = np.random.default_rng(1)
    for index in range(6):
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
    monkeypatch.chdir(folder)
    monkeypatch.delenv(DEBUG, raising=False)
    return folder


@pytest.fixture
def fails(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """Run the program in this process; it must leave nothing behind, and change nothing."""
    begun = dict[Path, tuple[int, int]]()

    def state() -> dict[Path, tuple[int, int]]:
        found = ((path, path.lstat()) for path in place.rglob("*"))
        return {path: (it.st_size, it.st_mtime_ns) for path, it in found if path.is_file()}

    def run(*arguments: object) -> Ended:
        begun.update(state())
        monkeypatch.setattr(sys, "argv", ["twofold", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert isinstance(exit_.value.code, int)
        return Ended(exit_.value.code, *capsys.readouterr())

    yield run
    assert state() == begun


def converting(
    model: str = "net.onnx", calib: str = "images", out: str = "small.onnx", macs: float = 1.5
) -> list[object]:
    return ["convert", model, "--calib", calib, "--out", out, "--macs", macs, "--preset", "unit"]


# The model -----------------------------------------------------------------------------------


def not_onnx(path: Path) -> None:
    path.write_text("this is a text, not a model\n" * 20)


def truncated(path: Path) -> None:
    data = network().SerializeToString()
    path.write_bytes(data[: len(data) // 2])


def empty(path: Path) -> None:
    path.touch()


def folder(path: Path) -> None:
    path.mkdir()


def above_2_gb(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**31 + 1)  # a sparse file: it takes no room on the disk


def external(path: Path, location: str) -> None:
    model = network()
    set_external_data(model.graph.initializer[0], location)
    model.graph.initializer[0].ClearField("raw_data")
    path.write_bytes(model.SerializeToString())


def external_missing(path: Path) -> None:
    external(path, "weights.bin")


def external_outside(path: Path) -> None:
    path.parent.with_name("weights.bin").write_bytes(bytes(4 * 16 * 27))
    external(path, "../weights.bin")


def external_absolute(path: Path) -> None:
    outside = path.parent.with_name("weights.bin")
    outside.write_bytes(bytes(4 * 16 * 27))
    external(path, str(outside))


def external_link(path: Path) -> None:
    outside = path.parent.with_name("weights.bin")
    outside.write_bytes(bytes(4 * 16 * 27))
    path.with_name("weights.bin").symlink_to(outside)
    external(path, "weights.bin")


def external_too_short(path: Path) -> None:
    path.with_name("weights.bin").write_bytes(bytes(10))
    external(path, "weights.bin")


def unknown_op(path: Path) -> None:
    path.write_bytes(network("custom.Mystery").SerializeToString())


def future_opset(path: Path) -> None:
    path.write_bytes(network(opset=10_000).SerializeToString())


MODELS = {
    not_onnx: "not",
    truncated: "truncated",
    empty: "empty",
    folder: "folder",
    above_2_gb: "2 GB",
    external_missing: "weights.bin",
    external_outside: "climbs out",
    external_absolute: "absolute",
    external_link: "leaves",
    external_too_short: "weights.bin",
    unknown_op: "Mystery",
    future_opset: "10000",
}


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("command", ["convert", "inspect", "validate"])
def test_model_that_cannot_be_used(
    place: Path, fails: Run, make: Callable[[Path], None], command: str
) -> None:
    make(place / "bad.onnx")
    arguments = {
        "convert": converting(model="bad.onnx"),
        "inspect": ["inspect", "bad.onnx"],
        "validate": ["validate", "net.onnx", "bad.onnx", "--data", "images", "--preset", "unit"],
    }
    ended = fails(*arguments[command])
    assert ended.code == 3
    assert "bad.onnx" in ended.sentence
    assert MODELS[make] in ended.sentence


def test_no_model(fails: Run) -> None:
    ended = fails(*converting(model="none.onnx"))
    assert ended.code == 3
    assert "none.onnx" in ended.sentence


def test_nothing_to_convert(place: Path, fails: Run) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> '
        "net (float[n, 3, 8, 8] image) => (float[n, 3, 8, 8] y) { y = Relu (image) }"
    )
    onnx.save(model, place / "relu.onnx")
    ended = fails(*converting(model="relu.onnx"))
    assert ended.code == 3
    assert "relu.onnx" in ended.sentence
    assert "Conv" in ended.sentence


def test_as_a_program_of_its_own(place: Path) -> None:
    """The same as above, with nothing between the program and its output."""
    not_onnx(place / "bad.onnx")
    command = [sys.executable, "-m", "converter", *map(str, converting(model="bad.onnx"))]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    ended = Ended(done.returncode, done.stdout, done.stderr)
    assert ended.code == 3
    assert ended.out == ""
    assert ended.err == f"{ended.sentence}\n"
    assert not list(place.glob("small*"))


# The calibration data ------------------------------------------------------------------------


def no_folder(_: Path) -> str:
    return "none"


def no_images(place: Path) -> str:
    (place / "data").mkdir()
    (place / "data" / "readme.txt").touch()
    return "data"


def unreadable_image(place: Path) -> str:
    (place / "images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return "images"


def truncated_image(place: Path) -> str:
    path = place / "images" / "3.png"
    path.write_bytes(path.read_bytes()[:-60])
    return "images"


def wrong_shape(place: Path) -> str:
    np.save(place / "data.npy", np.zeros((4, 3, 9, 8), np.float32))
    return "data.npy"


def wrong_channels(place: Path) -> str:
    np.save(place / "data.npy", np.zeros((4, 1, 8, 8), np.float32))
    return "data.npy"


def no_samples(place: Path) -> str:
    np.save(place / "data.npy", np.zeros((0, 3, 8, 8), np.float32))
    return "data.npy"


def wrong_count(place: Path) -> str:
    """As many labels as nobody can use: the archive says 4 samples and 3 of them."""
    images = np.zeros((4, 3, 8, 8), np.float32)
    np.savez(place / "data.npz", image=images, labels=np.zeros(3, np.int64))
    return "data.npz"


def other_input(place: Path) -> str:
    np.savez(place / "data.npz", picture=np.zeros((4, 3, 8, 8), np.float32))
    return "data.npz"


def pickled(place: Path) -> str:
    np.save(place / "data.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return "data.npy"


def nan_in_data(place: Path) -> str:
    np.save(place / "data.npy", np.full((4, 3, 8, 8), np.nan, np.float32))
    return "data.npy"


DATA = {
    no_folder: "none",
    no_images: "images",
    unreadable_image: "broken.png",
    truncated_image: "3.png",
    wrong_shape: "data.npy",
    wrong_channels: "data.npy",
    no_samples: "data.npy",
    other_input: "'image'",
    pickled: "data.npy",
    nan_in_data: "data.npy",
}


@pytest.mark.parametrize("make", DATA, ids=lambda make: make.__name__)
@pytest.mark.parametrize("command", ["convert", "validate"])
def test_data_that_cannot_be_used(
    place: Path, fails: Run, make: Callable[[Path], str], command: str
) -> None:
    data = make(place)
    arguments = {
        "convert": converting(calib=data),
        "validate": ["validate", "net.onnx", "net.onnx", "--data", data, "--preset", "unit"],
    }
    ended = fails(*arguments[command])
    assert ended.code == 4
    assert DATA[make] in ended.sentence


def test_labels_of_another_count(place: Path, fails: Run) -> None:
    ended = fails("validate", "net.onnx", "net.onnx", "--data", wrong_count(place))
    assert ended.code == 4
    assert "labels" in ended.sentence


def test_channels_that_the_model_does_not_take(fails: Run) -> None:
    ended = fails(*converting(), "--channels", "gray")
    assert ended.code == 4
    assert "--channels" in ended.sentence


def test_size_that_the_model_does_not_take(fails: Run) -> None:
    ended = fails(*converting(), "--size", "9")
    assert ended.code == 4
    assert "--size" in ended.sentence


def test_no_image_at_all(fails: Run) -> None:
    ended = fails(*converting(), "--images", 0)
    assert ended.code == 2
    assert "image" in ended.sentence


def test_activations_that_are_nan(place: Path, fails: Run) -> None:
    onnx.save(network("Log"), place / "nan.onnx")  # of the first Conv's negative responses
    ended = fails(*converting(model="nan.onnx"))
    assert ended.code == 4
    assert "NaN" in ended.sentence


# The budget and the output -------------------------------------------------------------------


@pytest.mark.parametrize("budget", [("--macs", 10_000), ("--macs", 1.5, "--params", 10_000)])
def test_budget_out_of_reach(fails: Run, budget: tuple[object, ...]) -> None:
    ended = fails(*converting(), *budget)
    assert ended.code == 2
    assert "10000" in ended.sentence.replace(",", "") or "reach" in ended.sentence


def test_output_that_is_the_input(fails: Run) -> None:
    ended = fails(*converting(out="net.onnx"))
    assert ended.code == 2
    assert "overwrite" in ended.sentence


def test_output_that_links_to_the_input(place: Path, fails: Run) -> None:
    (place / "link.onnx").symlink_to("net.onnx")
    ended = fails(*converting(out="link.onnx"))
    assert ended.code == 2
    assert "overwrite" in ended.sentence


@pytest.mark.parametrize("out", ["none/small.onnx", "images", "/proc/small.onnx"])
def test_output_that_cannot_be_written(fails: Run, out: str) -> None:
    ended = fails(*converting(out=out))
    assert ended.code == 2
    assert out in ended.sentence


def test_ctrl_c_midway(place: Path) -> None:
    """The signal is sent while a stage is at work; nothing but the input is left."""
    before = sorted(place.rglob("*"))
    data = np.random.default_rng(2).standard_normal((4000, 3, 8, 8)).astype(np.float32)
    data_path = place.parent / "data.npy"
    np.save(data_path, data)
    command = [sys.executable, "-m", "converter", *map(str, converting(calib=str(data_path)))]
    with subprocess.Popen(
        command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stderr is not None
        first = program.stderr.readline()
        assert first.rstrip().endswith("..."), first
        program.send_signal(signal.SIGINT)
        out, rest = program.communicate(timeout=120)
    assert program.returncode == 130, rest
    assert out == ""
    assert "Traceback" not in rest
    assert rest.splitlines()[-1].startswith("twofold: interrupted")
    assert sorted(place.rglob("*")) == before

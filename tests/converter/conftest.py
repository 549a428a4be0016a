"""Models, images and results that several tests take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx.parser
import pytest
from PIL import Image

from converter.latency import Speedup
from converter.outcome import Answers
from converter.preparation import Prepared
from converter.quantization.quantizing import Alone, InTurns, Quantized
from converter.quantization.search import LeftInFloat, Trial
from tests.converter.model_files import conv_model, make_external
from tests.converter.recorded_layer import Recorded, recorded_in
from tests.converter.two_layers import prepared_in

NET = """
    <ir_version: 8, opset_import: ["": 17]>
    net (float[batch, 3, 8, 8] image) => (float[batch, 4] scores)
    <float[4, 3] w = {1,0,0, 0,1,0, 0,0,1, 0.5,0.5,0.5}>
    {
        a = GlobalAveragePool (image)
        b = Flatten (a)
        scores = Gemm <transB = 1> (b, w)
    }
"""


@pytest.fixture
def net(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    onnx.save(onnx.parser.parse_model(NET), path)
    return path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Two Convs, ready to be planned; nobody changes them."""
    return prepared_in(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """One Conv and everything that was recorded of it; nobody changes it."""
    return recorded_in(tmp_path_factory.mktemp("recorded"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Four class folders; the network is right on each, but for one of the last."""
    folder = tmp_path / "pictures"
    colours = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255), "d": (255, 255, 255)}
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), colour).save(folder / name / "1.png")
    Image.new("RGB", (8, 8), colours["a"]).save(folder / "d" / "2.png")
    return folder


@pytest.fixture
def quantized() -> Quantized:
    """An int8 model, twice as fast, with one layer in float."""
    return Quantized(
        model=onnx.ModelProto(),
        shipped=True,
        precision="int8",
        types="u8 × s7",
        ranges="entropy",
        layers=2,
        balanced=1,
        left=(LeftInFloat(("conv1",), 0.5),),
        trials=(
            Trial("u8 × s8, min-max", 0, 0.03, 0.9, 0.7),
            Trial("u8 × s7, entropy", 1, 0.0021, 0.97, 0.8),
        ),
        before=Answers(0.01, 0.95, 100),
        after=Answers(0.012, 0.945, 100),
        images=1800,
        held_out=200,
        bytes_before=4 * 2**20,
        bytes_after=2**20,
        latency=InTurns(
            *("cpu", 1, 8, 12.0, 6.0, 4.0), Speedup(3.0, 2.9, 3.1), Speedup(1.5, 1.4, 1.6)
        ),
        alone=Alone(Answers(0.002, 0.99, 100), 3 * 2**20, 5.0, Speedup(1.25, 1.2, 1.3)),
        notes=("a note",),
    )


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

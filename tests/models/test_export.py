"""The ONNX files: clean graphs, the same answers, and no file where something is wrong."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from models import ExportError, build, export_onnx, initialise
from models.export import TOLERANCE

CLEAN = {
    "Add",
    "Concat",
    "Conv",
    "Flatten",
    "Gemm",
    "GlobalAveragePool",
    "MaxPool",
    "Pad",
    "Relu",
    "Slice",
}


@pytest.mark.parametrize(
    ("name", "size", "convs"),
    [
        ("googlenet", 64, 57),
        ("resnet18", 64, 20),
        ("resnet50", 64, 53),
        ("alexnet_cifar", 32, 5),
        ("vgg16_cifar", 32, 13),
        ("googlenet_cifar", 32, 57),
        ("resnet20", 32, 19),
    ],
)
def test_exported_graphs_are_clean_and_agree(
    name: str, size: int, convs: int, tmp_path: Path
) -> None:
    net = build(name, classes=6, size=size)
    initialise(net, 0, size=size)
    out = tmp_path / "net.onnx"
    exported = export_onnx(net, out, size=size)
    assert exported.path == out
    assert exported.error <= TOLERANCE
    assert exported.parameters == sum(p.numel() for p in net.parameters())
    assert exported.size_bytes == out.stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]

    model = onnx.load(out, load_external_data=False)
    onnx.checker.check_model(model)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    assert model.ir_version <= 8  # what opset 17 was released with
    counts = Counter(node.op_type for node in model.graph.node)
    assert set(counts) <= CLEAN
    assert counts["Conv"] == convs
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {"input": ["batch", 3, size, size], "logits": ["batch", 6]}

    session = ort.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    x = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(4))
    (got,) = session.run(None, {"input": x.numpy()})
    with torch.no_grad():
        expected = net(x).numpy()
    np.testing.assert_allclose(got, expected, atol=TOLERANCE * np.ptp(expected), rtol=0)


@pytest.mark.parametrize("opset", [13, 18, 20])
def test_opset_is_the_one_asked_for(opset: int, tmp_path: Path) -> None:
    net = build("resnet20")
    initialise(net, 0, size=32)
    export_onnx(net, tmp_path / "net.onnx", size=32, opset=opset)
    assert onnx.load(tmp_path / "net.onnx").opset_import[0].version == opset


def test_transform_of_the_input_is_exported(tmp_path: Path) -> None:
    net = build("googlenet", classes=3, transform_input=True)
    initialise(net, 0, size=64)
    export_onnx(net, tmp_path / "net.onnx", size=64)
    nodes = [n.op_type for n in onnx.load(tmp_path / "net.onnx").graph.node]
    assert nodes[:3] == ["Mul", "Add", "Conv"]
    assert "Constant" not in nodes


def test_another_count_of_channels(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 2))
    export_onnx(net, tmp_path / "net.onnx", size=8, channels=1)
    dims = onnx.load(tmp_path / "net.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in dims][1:] == [1, 8, 8]


def test_equal_biases_are_each_written(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 4))
    for layer in (net[1], net[3]):
        nn.init.zeros_(layer.bias)
    export_onnx(net, tmp_path / "net.onnx", size=2)
    nodes = onnx.load(tmp_path / "net.onnx").graph.node
    assert [n.op_type for n in nodes] == ["Flatten", "Gemm", "Relu", "Gemm"]


class Wrong(nn.Module):
    """A network that answers otherwise once it has been traced."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x.mean((2, 3)))
        return y if torch.onnx.is_in_onnx_export() else y * 1.001


def test_a_file_that_disagrees_does_not_appear(tmp_path: Path) -> None:
    out = tmp_path / "net.onnx"
    out.write_text("what was here before")
    with pytest.raises(ExportError, match="onnxruntime and torch differ by"):
        export_onnx(Wrong(), out, size=4)
    assert out.read_text() == "what was here before"
    assert list(tmp_path.iterdir()) == [out]


def test_answers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    net = build("resnet20")
    initialise(net, 0, size=32)
    with torch.no_grad():
        net.linear.bias[3] = torch.nan
    with pytest.raises(ExportError, match="not finite; check the weights"):
        export_onnx(net, tmp_path / "net.onnx", size=32)
    assert list(tmp_path.iterdir()) == []


def test_images_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"cannot take 64×64 images \(.+\); give another --size"):
        export_onnx(build("vgg16_cifar"), tmp_path / "net.onnx", size=64)
    with pytest.raises(ExportError, match="cannot take 4×4 images"):
        export_onnx(build("alexnet_cifar"), tmp_path / "net.onnx", size=4)


@pytest.mark.parametrize("opset", [12, 21])
def test_opsets_out_of_range_are_refused(opset: int, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"opset {opset} is not from 13 to 20"):
        export_onnx(build("resnet20"), tmp_path / "net.onnx", size=32, opset=opset)


def test_targets_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    net = build("resnet20")
    with pytest.raises(ExportError, match=r"is a folder; give --out the name of a file"):
        export_onnx(net, tmp_path, size=32)
    with pytest.raises(ExportError, match=r"there is no folder .*nowhere"):
        export_onnx(net, tmp_path / "nowhere" / "net.onnx", size=32)


def test_a_network_over_two_gibibytes_is_refused(tmp_path: Path) -> None:
    net = nn.Linear(12, 50_000_000, device="meta")
    with pytest.raises(ExportError, match="would not fit the 2 GiB"):
        export_onnx(net, tmp_path / "net.onnx", size=2)

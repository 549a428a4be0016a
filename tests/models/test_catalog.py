"""The networks: their sizes and parameter names, and the trained files that they reproduce."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from models import NETWORKS, NetworkError, build
from models.pooling import pool_to_grid


def on_meta(name: str, **settings: int) -> nn.Module:
    """Build without allocating: 138 million parameters take a second otherwise."""
    with torch.device("meta"):
        return build(name, **settings)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("alexnet", 61_100_840),  # these six as torchvision documents them
        ("vgg16", 138_357_544),
        ("vgg16_bn", 138_365_992),
        ("googlenet", 6_624_904),
        ("resnet18", 11_689_512),
        ("resnet50", 25_557_032),
        ("alexnet_cifar", 6_657_994),
        ("vgg16_cifar", 14_728_266),  # kuangliu/pytorch-cifar
        ("googlenet_cifar", 5_983_402),
        ("resnet20", 269_722),  # akamaster: 0.27 M
        ("resnet56", 853_018),  # akamaster: 0.85 M
    ],
)
def test_parameter_count(name: str, count: int) -> None:
    assert NETWORKS[name].parameter_count() == count
    assert sum(p.numel() for p in on_meta(name).parameters()) == count


@pytest.mark.parametrize(
    ("name", "keys", "total"),
    [
        (
            "alexnet",
            ["features.0.weight", "features.10.bias", "classifier.1.weight", "classifier.6.bias"],
            16,
        ),
        (
            "vgg16",
            ["features.0.weight", "features.28.bias", "classifier.0.weight", "classifier.6.bias"],
            32,
        ),
        (
            "vgg16_bn",
            [
                "features.1.running_var",
                "features.40.weight",
                "features.41.num_batches_tracked",
                "classifier.3.weight",
            ],
            97,
        ),
        (
            "googlenet",
            [
                "conv1.conv.weight",
                "conv3.bn.running_mean",
                "inception3a.branch1.conv.weight",
                "inception4b.branch2.1.bn.bias",
                "inception4e.branch3.0.conv.weight",
                "inception5b.branch4.1.conv.weight",
                "fc.weight",
            ],
            57 * 6 + 2,
        ),
        (
            "resnet18",
            ["conv1.weight", "bn1.running_mean", "layer2.0.downsample.0.weight", "fc.bias"],
            122,
        ),
        (
            "resnet50",
            ["layer1.0.downsample.1.running_var", "layer3.5.conv3.weight", "layer4.2.bn3.bias"],
            320,
        ),
        (
            "vgg16_cifar",
            ["features.0.weight", "features.41.running_var", "classifier.weight"],
            13 * 7 + 2,
        ),
        (
            "resnet20",
            [
                "conv1.weight",
                "bn1.weight",
                "layer2.0.conv1.weight",
                "layer3.2.bn2.bias",
                "linear.bias",
            ],
            19 * 6 + 2,
        ),
    ],
)
def test_parameter_names_are_those_of_the_usual_state_dicts(
    name: str, keys: list[str], total: int
) -> None:
    state = on_meta(name).state_dict()
    assert [k for k in keys if k not in state] == []
    assert len(state) == total


def test_shapes_tell_the_torchvision_variants() -> None:
    googlenet = on_meta("googlenet").state_dict()
    # torchvision has 3×3 where the paper has 5×5
    assert googlenet["inception3a.branch3.1.conv.weight"].shape == (32, 16, 3, 3)
    resnet50 = on_meta("resnet50")
    # ResNet v1.5: the 3×3 Conv strides
    assert resnet50.layer2[0].conv1.stride == (1, 1)
    assert resnet50.layer2[0].conv2.stride == (2, 2)
    assert build("googlenet", classes=3).conv1.bn.eps == 0.001


@pytest.mark.parametrize("name", ["alexnet", "vgg16", "googlenet", "resnet18"])
def test_logits_at_224(name: str) -> None:
    assert on_meta(name, classes=7)(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("name", [n for n, network in NETWORKS.items() if network.size == 32])
def test_logits_at_32(name: str) -> None:
    assert on_meta(name)(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)


def test_option_a_shortcut_takes_every_second_pixel_and_pads_channels() -> None:
    shortcut = build("resnet20").layer2[0].shortcut
    x = torch.rand(1, 16, 4, 4)
    y = shortcut(x)
    assert y.shape == (1, 32, 2, 2)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def test_transform_input_is_torchvisions() -> None:
    net = build("googlenet", classes=4, transform_input=True).eval()
    plain = build("googlenet", classes=4).eval()
    plain.load_state_dict(net.state_dict())  # the buffers of the transform are in no state dict
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    moved = torch.stack([x[:, c] * (std[c] / 0.5) + (mean[c] - 0.5) / 0.5 for c in range(3)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(net(x), plain(moved))
        assert not torch.allclose(net(x), plain(x))


@pytest.mark.parametrize(("side", "grid"), [(7, 7), (14, 7), (18, 6)])
def test_pool_to_grid_is_adaptive_pooling(side: int, grid: int) -> None:
    x = torch.rand(2, 3, side, side)
    torch.testing.assert_close(pool_to_grid(side, grid, 224)(x), nn.AdaptiveAvgPool2d(grid)(x))


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("lenet", {}, "no network 'lenet'; choose one of alexnet"),
        ("vgg16", {"size": 64}, "images of 64×64 leave maps of 2×2"),
        ("alexnet", {"size": 256}, "do not divide into the 6×6"),
        ("alexnet", {"size": 1}, "maps of 0×0"),
        ("resnet18", {"classes": 0}, "0 classes"),
        ("resnet18", {"size": -1}, "1 to 4096 pixels"),
        ("resnet18", {"transform_input": True}, "only googlenet"),
    ],
)
def test_what_cannot_be_built_is_refused(name: str, settings: dict[str, int], words: str) -> None:
    with pytest.raises(NetworkError, match=words):
        build(name, **settings)


def fill_from_onnx(net: nn.Module, path: Path) -> None:
    """Give `net` the weights of an ONNX file whose BatchNorms are folded, layer by layer in order.

    A folded Conv is a Conv without bias and a BatchNorm that only adds the bias.
    """
    model = onnx.load(path)
    values = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    layers = [
        tuple(torch.tensor(values[name]) for name in node.input[1:3])
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm")
    ]
    ours = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    norms = iter([m for m in net.modules() if isinstance(m, nn.BatchNorm2d)])
    assert [tuple(w.shape) for w, _ in layers] == [tuple(m.weight.shape) for m in ours]
    with torch.no_grad():
        for (weight, bias), layer in zip(layers, ours, strict=True):
            layer.weight.copy_(weight)
            if layer.bias is not None:
                layer.bias.zero_()
            if isinstance(layer, nn.Linear):
                layer.bias.copy_(bias)
                continue
            norm = next(norms)
            norm.running_mean.zero_()
            norm.running_var.fill_(1 - norm.eps)
            norm.bias.copy_(bias)


@pytest.mark.parametrize("name", ["alexnet", "vgg16", "googlenet", "resnet20"])
def test_networks_reproduce_the_trained_files(name: str, shared: Path) -> None:
    path = shared / "models" / f"{name}_cifar10.onnx"
    net = build(name if name == "resnet20" else f"{name}_cifar").eval()
    fill_from_onnx(net, path)
    images = np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (expected,) = session.run(["logits"], {"input": images})
    with torch.no_grad():
        got = net(torch.from_numpy(images)).numpy()
    # float32 round-off over at most 57 layers; a wrong kernel, pad or order is off by 0.1 and more
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.ptp(expected), rtol=0)

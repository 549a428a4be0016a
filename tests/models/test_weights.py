"""State dicts as they come, and random values where none come."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import NETWORKS, WeightsError, build, initialise, load_weights
from models.weights import read_state_dict


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    net = build("resnet20")
    initialise(net, 3, size=32)
    return net


def saved(content: object, folder: Path) -> Path:
    path = folder / "weights.pth"
    torch.save(content, path)
    return path


def prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{k}": v for k, v in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state},
        lambda state: {"model": state, "epoch": 3, "optimizer": {"lr": [0.1]}},
        lambda state: {"net": prefixed(state), "acc": 91.2},
        prefixed,
        lambda state: {"state_dict": prefixed(state), "best_prec1": torch.tensor(0.9)},
    ],
    ids=["bare", "state_dict", "model", "net-prefixed", "prefixed", "akamaster"],
)
def test_round_trip(
    wrap: Callable[[dict[str, Tensor]], Any], trained: nn.Module, tmp_path: Path
) -> None:
    net = build("resnet20")
    load_weights(net, saved(wrap(dict(trained.state_dict())), tmp_path))
    for (name, got), (_, expected) in zip(
        net.state_dict().items(), trained.state_dict().items(), strict=True
    ):
        assert torch.equal(got, expected), name


def test_batch_counters_may_be_missing(trained: nn.Module, tmp_path: Path) -> None:
    old = {k: v for k, v in trained.state_dict().items() if "num_batches_tracked" not in k}
    net = build("resnet20")
    load_weights(net, saved(old, tmp_path))
    assert torch.equal(net.bn1.running_var, trained.bn1.running_var)


def test_auxiliary_heads_of_googlenet_are_passed_over(tmp_path: Path) -> None:
    net = build("googlenet", classes=2)
    state = dict(net.state_dict())
    state["aux1.conv.conv.weight"] = torch.zeros(128, 512, 1, 1)
    state["aux2.fc2.bias"] = torch.zeros(2)
    load_weights(net, saved(state, tmp_path))
    with pytest.raises(WeightsError, match=r"does not know aux1\.conv"):
        load_weights(build("resnet20"), saved({"aux1.conv": torch.zeros(1)}, tmp_path))


def test_every_fault_is_named_and_counted(trained: nn.Module, tmp_path: Path) -> None:
    state = dict(trained.state_dict())
    del state["conv1.weight"]
    for extra in range(5):
        state[f"extra{extra}"] = torch.zeros(1)
    state["linear.weight"] = torch.zeros(100, 64)
    net = build("resnet20")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    path = saved(state, tmp_path)
    with pytest.raises(WeightsError) as caught:
        load_weights(net, path)
    message = str(caught.value)
    assert message.startswith(f"{path} does not fit the network: it lacks conv1.weight, ")
    assert "does not know extra0, extra1, extra2 and 2 more" in message
    assert "differs in linear.weight ((100, 64) instead of (10, 64))" in message
    assert "\n" not in message
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


class Malicious:
    """What a pickle may hold: a call of the author's choice."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = saved({"state_dict": Malicious(marker)}, tmp_path)
    with pytest.raises(WeightsError, match="not a file of plain tensors"):
        read_state_dict(path)
    path.write_bytes(pickle.dumps(Malicious(marker)))
    with pytest.raises(WeightsError, match="not a file of plain tensors"):
        read_state_dict(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content", [[1, 2], {}, {"state_dict": {}}, {"state_dict": {"a": 1}}, torch.zeros(3)]
)
def test_a_file_without_state_dict_is_refused(content: object, tmp_path: Path) -> None:
    path = saved(content, tmp_path)
    with pytest.raises(WeightsError, match=re.escape(f"{path} holds no state dict")):
        read_state_dict(path)


@pytest.mark.parametrize("cut", [0, 3, 100, -20])
def test_a_damaged_file_is_refused(cut: int, trained: nn.Module, tmp_path: Path) -> None:
    path = saved(trained.state_dict(), tmp_path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(WeightsError, match=re.escape(str(path))):
        read_state_dict(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"none\.pth cannot be read: No such file"):
        read_state_dict(tmp_path / "none.pth")
    with pytest.raises(WeightsError, match="cannot be read: Is a directory"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vgg16_cifar", 32),
        ("alexnet_cifar", 32),
        ("googlenet", 64),
        ("resnet50", 64),
        ("resnet56", 32),
    ],
)
def test_random_activations_neither_vanish_nor_blow_up(name: str, size: int) -> None:
    net = build(name, classes=10)
    initialise(net, 0, size=size)
    assert not net.training
    scales: dict[str, float] = {}
    for part, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
            module.register_forward_hook(
                lambda _m, _i, output, part=part: scales.update({part: float(output.std())})
            )
    coarse = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        net(nn.functional.interpolate(coarse, size=(size, size), mode="bilinear"))
    assert len(scales) > 6
    # BatchNorm brings its outputs near 1; after k summed residual branches a Conv sees about √k
    assert min(scales.values()) > 0.1
    assert max(scales.values()) < 30


def test_random_values_follow_the_seed() -> None:
    first, again, other = (build("resnet20") for _ in range(3))
    momentum = first.bn1.momentum
    for net, seed in ((first, 1), (again, 1), (other, 2)):
        initialise(net, seed, size=32)
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert not torch.equal(first.conv1.weight, other.conv1.weight)
    assert first.bn1.momentum == momentum


def test_random_values_without_batchnorm_keep_their_scale() -> None:
    net = build("alexnet", classes=5)
    initialise(net, 0, size=NETWORKS["alexnet"].size)
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        spread = float(net(x).std())
    # He's values keep the variance from layer to layer: √2 at the last, but for pooling's maxima
    assert 0.3 < spread < 10

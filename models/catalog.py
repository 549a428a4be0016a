"""The networks by name, and how each is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from models.alexnet import AlexNet, AlexNetCifar
from models.errors import NetworkError
from models.googlenet import GoogLeNet, GoogLeNetCifar
from models.resnet import resnet18, resnet50
from models.resnet_cifar import resnet20, resnet56
from models.vgg import VGG16, VGG16Cifar

__all__ = ["NETWORKS", "Network", "build"]

_MOST_CLASSES = 100_000
_LARGEST_SIDE = 4096  # pixels


@dataclass(frozen=True)
class Network:
    """One network of the catalog.

    Attributes
    ----------
    name : str
        What the command line calls it.
    size : int
        Side of the square images that it was designed for, in pixels.
    classes : int
        Classes that it was designed for.
    state_dicts : str
        Whose state dicts load into it.
    make : callable
        (classes, size) → the network, with torch's default initialisation.
    """

    name: str
    size: int
    classes: int
    state_dicts: str
    make: Callable[[int, int], nn.Module]

    def parameter_count(self) -> int:
        """Return the number of trainable parameters, without allocating them."""
        with torch.device("meta"):
            return sum(p.numel() for p in self.make(self.classes, self.size).parameters())


def _imagenet(name: str, make: Callable[[int, int], nn.Module]) -> Network:
    return Network(name, 224, 1000, f"torchvision {name}", make)


def _cifar(name: str, state_dicts: str, make: Callable[[int], nn.Module]) -> Network:
    return Network(name, 32, 10, state_dicts, lambda classes, _: make(classes))


def _vgg16_bn(classes: int, size: int) -> nn.Module:
    return VGG16(classes, size, batch_norm=True)


_AKAMASTER = "akamaster"

NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        _imagenet("alexnet", AlexNet),
        _imagenet("vgg16", VGG16),
        _imagenet("vgg16_bn", _vgg16_bn),
        _imagenet("googlenet", lambda classes, _: GoogLeNet(classes)),
        _imagenet("resnet18", lambda classes, _: resnet18(classes)),
        _imagenet("resnet50", lambda classes, _: resnet50(classes)),
        _cifar("alexnet_cifar", "this project", AlexNetCifar),
        _cifar("vgg16_cifar", "kuangliu VGG16", VGG16Cifar),
        _cifar("googlenet_cifar", "this project", GoogLeNetCifar),
        _cifar("resnet20", f"{_AKAMASTER} resnet20", resnet20),
        _cifar("resnet56", f"{_AKAMASTER} resnet56", resnet56),
    )
}
"""Every network, by name, in the order in which they are listed."""


def build(
    name: str,
    *,
    classes: int | None = None,
    size: int | None = None,
    transform_input: bool = False,
) -> nn.Module:
    """Build a network, with torch's default initialisation.

    Parameters
    ----------
    name : str
        A key of `NETWORKS`.
    classes : int or None, default None
        Classes, 1 to 100,000; None takes what the network was designed for.
    size : int or None, default None
        Side of its images, in pixels, 1 to 4096; None takes what the network was designed for.
    transform_input : bool, default False
        For `googlenet`: bring images from ImageNet's mean and std to (pixel/255 − 0.5)/0.5, which
        torchvision's published weights need.

    Returns
    -------
    nn.Module
        (n, 3, size, size) float32 → (n, classes) float32.

    Raises
    ------
    NetworkError
        Where there is no such network, or it cannot take such images, classes or settings.
    """
    if name not in NETWORKS:
        raise NetworkError(f"there is no network {name!r}; choose one of {', '.join(NETWORKS)}")
    network = NETWORKS[name]
    classes = network.classes if classes is None else classes
    size = network.size if size is None else size
    if not (1 <= classes <= _MOST_CLASSES and 1 <= size <= _LARGEST_SIDE):
        raise NetworkError(
            f"{name} cannot have {classes} classes of {size}×{size} images; "
            f"give 1 to {_MOST_CLASSES} classes and images of 1 to {_LARGEST_SIDE} pixels"
        )
    net = network.make(classes, size)
    if transform_input:
        if not isinstance(net, GoogLeNet):
            raise NetworkError(
                f"{name} does not transform its input, only googlenet does; "
                "leave --transform-input out"
            )
        net.transform_input = True
    return net

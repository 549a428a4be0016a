"""ResNet-20 and ResNet-56 for 32×32 images.

Source: He, Zhang, Ren, Sun, arXiv:1512.03385, section 4.2. The shortcuts are the paper's option A,
without parameters; parameter names are those of akamaster/pytorch_resnet_cifar10.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ResNetCifar", "resnet20", "resnet56"]


class _PaddedShortcut(nn.Module):
    """Option A: every second pixel, and zeros for the new channels, half of them on each side."""

    def __init__(self, pad: int) -> None:
        super().__init__()
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        # (n, c, h, w) → (n, c + 2·pad, ⌈h/2⌉, ⌈w/2⌉)
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad), value=0.0)


class _Block(nn.Module):
    """Two 3×3 Convs and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut = nn.Identity() if stride == 1 else _PaddedShortcut((outputs - inputs) // 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        z: Tensor = self.relu(y + self.shortcut(x))
        return z


def _stage(inputs: int, outputs: int, count: int, stride: int) -> nn.Sequential:
    rest = (_Block(outputs, outputs, 1) for _ in range(count - 1))
    return nn.Sequential(_Block(inputs, outputs, stride), *rest)


class ResNetCifar(nn.Module):
    """ResNet of 6·count + 2 layers: (n, 3, h, w) float32 → (n, classes).

    Parameters
    ----------
    count : int
        Blocks in each of the three stages.
    classes : int, default 10
    """

    def __init__(self, count: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _stage(16, 16, count, 1)
        self.layer2 = _stage(16, 32, count, 2)
        self.layer3 = _stage(32, 64, count, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(torch.flatten(self.avgpool(x), 1))
        return logits


def resnet20(classes: int = 10) -> ResNetCifar:
    """Return ResNet-20."""
    return ResNetCifar(3, classes)


def resnet56(classes: int = 10) -> ResNetCifar:
    """Return ResNet-56."""
    return ResNetCifar(9, classes)

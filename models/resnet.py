"""ResNet-18 and ResNet-50 for 224×224 images, as in torchvision.

Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", arXiv:1512.03385.
As in torchvision, the bottleneck strides in its 3×3 Conv.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ResNet", "resnet18", "resnet50"]


class _Basic(nn.Module):
    """Two 3×3 Convs and a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        y: Tensor = self.relu(self.bn2(self.conv2(x)) + shortcut)
        return y


class _Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 Convs and a shortcut; four times as wide outside as inside."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU()
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        y: Tensor = self.relu(self.bn3(self.conv3(x)) + shortcut)
        return y


def _stage(
    block: type[_Basic | _Bottleneck], inputs: int, width: int, count: int, stride: int
) -> nn.Sequential:
    """Return `count` blocks; the first strides, and its shortcut has a Conv where shapes differ."""
    outputs = width * block.expansion
    downsample = None
    if stride != 1 or inputs != outputs:
        downsample = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )
    first = block(inputs, width, stride, downsample)
    return nn.Sequential(first, *(block(outputs, width, 1, None) for _ in range(count - 1)))


class ResNet(nn.Module):
    """ResNet with torchvision's parameter names: (n, 3, h, w) float32 → (n, classes).

    Parameters
    ----------
    block : type
        The residual block: two 3×3 Convs, or a bottleneck.
    counts : tuple of four int
        Blocks in each stage.
    classes : int, default 1000
    """

    def __init__(
        self,
        block: type[_Basic | _Bottleneck],
        counts: tuple[int, int, int, int],
        classes: int = 1000,
    ) -> None:
        super().__init__()
        outer = block.expansion
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = _stage(block, 64, 64, counts[0], 1)
        self.layer2 = _stage(block, 64 * outer, 128, counts[1], 2)
        self.layer3 = _stage(block, 128 * outer, 256, counts[2], 2)
        self.layer4 = _stage(block, 256 * outer, 512, counts[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * outer, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def resnet18(classes: int = 1000) -> ResNet:
    """Return ResNet-18."""
    return ResNet(_Basic, (2, 2, 2, 2), classes)


def resnet50(classes: int = 1000) -> ResNet:
    """Return ResNet-50."""
    return ResNet(_Bottleneck, (3, 4, 6, 3), classes)

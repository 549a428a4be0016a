"""GoogLeNet: torchvision's for 224×224 images, and one for 32×32.

Source: Szegedy et al., "Going Deeper with Convolutions", arXiv:1409.4842. As in torchvision, each
Conv has BatchNorm, and the third branch of the 224 network is 3×3 where the paper has 5×5. The
auxiliary heads serve training alone and are left out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["GoogLeNet", "GoogLeNetCifar"]

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class _Widths(NamedTuple):
    """Channels of one Inception module: what comes in, then what each Conv gives out."""

    inputs: int
    one: int
    reduce_three: int
    three: int
    reduce_wide: int
    wide: int
    pool: int


class _ConvUnit(nn.Module):
    """Conv without bias, BatchNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.bn(self.conv(x)))
        return y


class _Inception(nn.Module):
    """Four branches side by side: 1×1; 1×1 and 3×3; 1×1 and wide × wide; pooling and 1×1."""

    def __init__(self, widths: _Widths, wide_kernel: int) -> None:
        super().__init__()
        self.branch1 = _ConvUnit(widths.inputs, widths.one, 1)
        self.branch2 = nn.Sequential(
            _ConvUnit(widths.inputs, widths.reduce_three, 1),
            _ConvUnit(widths.reduce_three, widths.three, 3),
        )
        self.branch3 = nn.Sequential(
            _ConvUnit(widths.inputs, widths.reduce_wide, 1),
            _ConvUnit(widths.reduce_wide, widths.wide, wide_kernel),
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(3, 1, 1), _ConvUnit(widths.inputs, widths.pool, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)), 1)


class _Inceptions(nn.Module):
    """What both networks share: nine Inception modules and the classifier.

    A subclass makes what is before them and the poolings `maxpool3` and `maxpool4` between them,
    then calls `_add_inceptions`, so that parameters are in the order in which they are used.
    """

    maxpool3: nn.Module
    maxpool4: nn.Module

    def _add_inceptions(self, classes: int, wide_kernel: int) -> None:
        def inception(*widths: int) -> _Inception:
            return _Inception(_Widths(*widths), wide_kernel)

        self.inception3a = inception(192, 64, 96, 128, 16, 32, 32)
        self.inception3b = inception(256, 128, 128, 192, 32, 96, 64)
        self.inception4a = inception(480, 192, 96, 208, 16, 48, 64)
        self.inception4b = inception(512, 160, 112, 224, 24, 64, 64)
        self.inception4c = inception(512, 128, 128, 256, 24, 64, 64)
        self.inception4d = inception(512, 112, 144, 288, 32, 64, 64)
        self.inception4e = inception(528, 256, 160, 320, 32, 128, 128)
        self.inception5a = inception(832, 256, 160, 320, 32, 128, 128)
        self.inception5b = inception(832, 384, 192, 384, 48, 128, 128)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(1024, classes)

    def classify(self, x: Tensor) -> Tensor:
        """Return the logits of maps (n, 192, h, w)."""
        x = self.maxpool3(self.inception3b(self.inception3a(x)))
        x = self.inception4c(self.inception4b(self.inception4a(x)))
        x = self.maxpool4(self.inception4e(self.inception4d(x)))
        x = self.inception5b(self.inception5a(x))
        logits: Tensor = self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))
        return logits


class GoogLeNet(_Inceptions):
    """GoogLeNet with torchvision's parameter names: (n, 3, h, w) float32 → (n, classes).

    Parameters
    ----------
    classes : int, default 1000
    transform_input : bool, default False
        Whether images that are prepared with ImageNet's mean and std are first brought back to
        (pixel/255 − 0.5)/0.5. torchvision's published weights were trained on those and need it.
    """

    input_scale: Tensor
    input_shift: Tensor

    def __init__(self, classes: int = 1000, transform_input: bool = False) -> None:
        super().__init__()
        self.transform_input = transform_input
        mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in _IMAGENET)
        self.register_buffer("input_scale", std / 0.5, persistent=False)
        self.register_buffer("input_shift", (mean - 0.5) / 0.5, persistent=False)
        self.conv1 = _ConvUnit(3, 64, 7, stride=2)
        self.maxpool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2 = _ConvUnit(64, 64, 1)
        self.conv3 = _ConvUnit(64, 192, 3)
        self.maxpool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.maxpool3 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.maxpool4 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self._add_inceptions(classes, wide_kernel=3)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        if self.transform_input:
            x = x * self.input_scale + self.input_shift
        x = self.maxpool1(self.conv1(x))
        x = self.maxpool2(self.conv3(self.conv2(x)))
        return self.classify(x)


class GoogLeNetCifar(_Inceptions):
    """GoogLeNet for 32×32 images: (n, 3, h, w) float32 → (n, classes).

    57 Convs; the third branch of its nine Inception modules is 5×5.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = _ConvUnit(3, 64, 3)
        self.conv2 = _ConvUnit(64, 64, 1)
        self.conv3 = _ConvUnit(64, 192, 3)
        self.maxpool2 = nn.MaxPool2d(3, 2, 1)
        self.maxpool3 = nn.MaxPool2d(3, 2, 1)
        self.maxpool4 = nn.MaxPool2d(3, 2, 1)
        self._add_inceptions(classes, wide_kernel=5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.classify(self.maxpool2(self.conv3(self.conv2(self.conv1(x)))))

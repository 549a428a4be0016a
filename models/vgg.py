"""VGG-16: torchvision's for 224×224 images, with and without BatchNorm, and one for 32×32.

Source: Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
arXiv:1409.1556, configuration D.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.pooling import pool_to_grid

__all__ = ["VGG16", "VGG16Cifar"]

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def _features(batch_norm: bool) -> nn.Sequential:
    """Return the 13 Convs; each stage ends with a pooling that halves the maps."""
    layers: list[nn.Module] = []
    inputs = 3
    for stage in _STAGES:
        for outputs in stage:
            layers.append(nn.Conv2d(inputs, outputs, 3, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(outputs))
            layers.append(nn.ReLU())
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


class VGG16(nn.Module):
    """VGG-16 with torchvision's parameter names: (n, 3, size, size) float32 → (n, classes).

    Parameters
    ----------
    classes : int, default 1000
    size : int, default 224
        Side of the images, in pixels; its maps (a 32nd of it) must divide into 7×7.
    batch_norm : bool, default False
        Whether BatchNorm follows each Conv, as in torchvision's `vgg16_bn`.

    Raises
    ------
    NetworkError
        Where the maps do not divide so.
    """

    def __init__(self, classes: int = 1000, size: int = 224, batch_norm: bool = False) -> None:
        super().__init__()
        self.features = _features(batch_norm)
        self.avgpool = pool_to_grid(size // 32, 7, size)
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(4096, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.avgpool(self.features(x))
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


class VGG16Cifar(nn.Module):
    """VGG-16 with BatchNorm for 32×32 images: (n, 3, 32, 32) float32 → (n, classes).

    13 Convs and one Linear. Parameter names are those of kuangliu/pytorch-cifar (`features.N`,
    `classifier`).
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = _features(batch_norm=True)
        self.dropout = nn.Dropout()
        self.classifier = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.dropout(torch.flatten(self.features(x), 1))
        logits: Tensor = self.classifier(x)
        return logits

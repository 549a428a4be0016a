"""AlexNet: torchvision's for 224×224 images, and one with BatchNorm for 32×32.

Source: Krizhevsky, "One weird trick for parallelizing convolutional neural networks",
arXiv:1404.5997.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.pooling import pool_to_grid

__all__ = ["AlexNet", "AlexNetCifar"]


def _map_side(size: int) -> int:
    """Side of the maps after the last pooling; 6 for 224."""
    side = (size + 2 * 2 - 11) // 4 + 1
    for _ in range(3):
        side = (side - 3) // 2 + 1
    return side


class AlexNet(nn.Module):
    """AlexNet with torchvision's parameter names: (n, 3, size, size) float32 → (n, classes).

    Parameters
    ----------
    classes : int, default 1000
    size : int, default 224
        Side of the images, in pixels; its maps must divide into 6×6.

    Raises
    ------
    NetworkError
        Where they do not.
    """

    def __init__(self, classes: int = 1000, size: int = 224) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
        )
        self.avgpool = pool_to_grid(_map_side(size), 6, size)
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Linear(4096, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.avgpool(self.features(x))
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


def _conv(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


class AlexNetCifar(nn.Module):
    """AlexNet for 32×32 images: (n, 3, 32, 32) float32 → (n, classes).

    Five Convs (two of them 5×5) with BatchNorm, and two Linear.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_conv(3, 64, 5),
            nn.MaxPool2d(2),
            *_conv(64, 192, 5),
            nn.MaxPool2d(2),
            *_conv(192, 384, 3),
            *_conv(384, 256, 3),
            *_conv(256, 256, 3),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(256 * 4 * 4, 1024),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(1024, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.classifier(torch.flatten(self.features(x), 1))
        return logits

"""Classifiers without sums: one layer after another, or branches side by side."""

from __future__ import annotations

from torch import nn

from tools.architectures.blocks import Concat, head, head_only, unit


def alexnet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 24, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(24, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(32, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 32, 3, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Dropout(), nn.Linear(288, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def vgg_bn() -> nn.Module:
    layers: list[nn.Module] = []
    inputs = 3
    for width in (16, 16, 0, 32, 32, 0, 48, 48, 0):
        layers.append(unit(inputs, width) if width else nn.MaxPool2d(2))
        inputs = width or inputs
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(48 * 16, 64), nn.ReLU(), head_only(64))


def squeezenet() -> nn.Module:
    def fire(inputs: int, squeeze: int, expand: int) -> nn.Module:
        branches = (
            nn.Sequential(nn.Conv2d(squeeze, expand, kernel, padding=kernel // 2), nn.ReLU())
            for kernel in (1, 3)
        )
        return nn.Sequential(nn.Conv2d(inputs, squeeze, 1), nn.ReLU(), Concat(*branches))

    return nn.Sequential(
        *(nn.Conv2d(3, 24, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)),
        *(fire(24, 8, 24), fire(48, 12, 32), nn.Dropout(), nn.Conv2d(64, 10, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


def googlenet() -> nn.Module:
    def inception(inputs: int) -> nn.Module:
        return Concat(
            unit(inputs, 16, 1),
            nn.Sequential(unit(inputs, 12, 1), unit(12, 24)),
            nn.Sequential(unit(inputs, 8, 1), unit(8, 12, 5)),
            nn.Sequential(nn.MaxPool2d(3, 1, 1), unit(inputs, 12, 1)),
        )

    return nn.Sequential(
        unit(3, 24, 3, 2), inception(24), nn.MaxPool2d(3, 2, 1), inception(64), head(64)
    )


def inception_v3() -> nn.Module:
    return nn.Sequential(
        unit(3, 24, 3, 2),
        Concat(
            unit(24, 16, 1),
            nn.Sequential(unit(24, 16, 1), unit(16, 16, (1, 7)), unit(16, 24, (7, 1))),
            nn.Sequential(unit(24, 16, 1), Concat(unit(16, 16, (1, 3)), unit(16, 16, (3, 1)))),
            nn.Sequential(nn.AvgPool2d(3, 1, 1), unit(24, 16, 1)),
        ),
        Concat(unit(88, 32, 3, 2), nn.MaxPool2d(3, 2, 1)),
        head(120),
    )


def densenet() -> nn.Module:
    def dense(inputs: int, growth: int = 12) -> nn.Module:
        body = nn.Sequential(
            *(nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, 4 * growth, 1, bias=False)),
            *(nn.BatchNorm2d(4 * growth), nn.ReLU()),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )
        return Concat(nn.Identity(), body)

    def transition(inputs: int, outputs: int) -> list[nn.Module]:
        return [
            *(nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, outputs, 1, bias=False)),
            nn.AvgPool2d(2),
        ]

    return nn.Sequential(
        *(unit(3, 24, 3, 2), dense(24), dense(36), *transition(48, 24)),
        *(dense(24), dense(36), nn.BatchNorm2d(48), nn.ReLU(), head(48)),
    )

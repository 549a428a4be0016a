"""Classifiers of residual blocks: the ResNets and what came of them, up to attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # what all torch code calls it

from tools.architectures.blocks import (
    Excite,
    Lambda,
    Residual,
    basic,
    bottleneck,
    head,
    inverted,
    unit,
)


def resnet() -> nn.Module:
    return nn.Sequential(unit(3, 16), basic(16, 16), basic(16, 32, 2), basic(32, 48, 2), head(48))


def resnet_bottleneck() -> nn.Module:
    return nn.Sequential(
        *(unit(3, 16, 7, 2), nn.MaxPool2d(3, 2, 1)),
        *(bottleneck(16, 64), bottleneck(64, 64), bottleneck(64, 96, 2), head(96)),
    )


def resnext() -> nn.Module:
    return nn.Sequential(
        unit(3, 16), bottleneck(16, 64, groups=4), bottleneck(64, 96, 2, groups=4), head(96)
    )


def regnet_y() -> nn.Module:
    return nn.Sequential(
        unit(3, 16, 3, 2), bottleneck(16, 48, 1, 3, 8), bottleneck(48, 96, 2, 6, 8), head(96)
    )


def res2net() -> nn.Module:
    def scales(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        a, b, c, d = torch.chunk(parts["enter"](x), 4, 1)
        b = parts["b"](b)
        c = parts["c"](c + b)
        d = parts["d"](d + c)
        y: Tensor = parts["leave"](torch.cat([a, b, c, d], 1))
        return torch.relu(x + y)

    block = Lambda(
        scales,
        enter=unit(32, 48, 1),
        b=unit(12, 12),
        c=unit(12, 12),
        d=unit(12, 12),
        leave=unit(48, 32, 1, act=None),
    )
    return nn.Sequential(unit(3, 32, 3, 2), block, head(32))


def csp_darknet() -> nn.Module:
    def leaky() -> nn.Module:
        return nn.LeakyReLU(0.1)

    def split(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        first, second = parts["enter"](x).chunk(2, 1)
        y: Tensor = parts["leave"](torch.cat([first, parts["body"](second)], 1))
        return y

    body = nn.Sequential(
        Residual(nn.Sequential(unit(24, 24, 1, act=leaky), unit(24, 24, act=leaky)), nn.Identity())
    )
    csp = Lambda(
        split, enter=unit(24, 48, 1, act=leaky), body=body, leave=unit(48, 48, 1, act=leaky)
    )
    return nn.Sequential(unit(3, 24, 3, 2, act=leaky), csp, unit(48, 64, 3, 2, act=leaky), head(64))


class StandardConv(nn.Conv2d):
    """Conv whose weight is standardised in the graph, as in NFNet and BiT."""

    def forward(self, x: Tensor) -> Tensor:
        """Standardise, then convolve."""
        spread, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (spread + 1e-5) * self.weight[0].numel() ** -0.5
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def nfnet() -> nn.Module:
    def body() -> nn.Module:
        return nn.Sequential(
            *(nn.GELU(), StandardConv(24, 24, 3, padding=1)),
            *(nn.GELU(), StandardConv(24, 24, 3, padding=1), Excite(24, 8)),
        )

    return nn.Sequential(
        StandardConv(3, 24, 3, 2, 1), Residual(body(), nn.Identity()), nn.GELU(), head(24)
    )


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of an image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise with the channels last."""
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]  # modules give Any


def convnext() -> nn.Module:
    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
            self.norm = nn.LayerNorm(width)
            self.enter, self.leave = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            self.scale = nn.Parameter(torch.full((width,), 0.5))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
            y = self.scale * self.leave(F.gelu(self.enter(y)))
            return x + y.permute(0, 3, 1, 2)  # type: ignore[no-any-return]  # modules give Any

    return nn.Sequential(
        *(nn.Conv2d(3, 24, 4, 4), LayerNorm2d(24), Block(24)),
        *(LayerNorm2d(24), nn.Conv2d(24, 48, 2, 2), Block(48)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(48), nn.Linear(48, 10)),
    )


def convmixer() -> nn.Module:
    def block(width: int) -> list[nn.Module]:
        mixed = nn.Sequential(
            nn.Conv2d(width, width, 5, groups=width, padding="same"),
            *(nn.GELU(), nn.BatchNorm2d(width)),
        )
        return [
            *(Residual(mixed, nn.Identity()), nn.Conv2d(width, width, 1)),
            *(nn.GELU(), nn.BatchNorm2d(width)),
        ]

    return nn.Sequential(
        *(nn.Conv2d(3, 48, 4, 4), nn.GELU(), nn.BatchNorm2d(48)), *block(48), *block(48), head(48)
    )


def coatnet() -> nn.Module:
    class Attention(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:
            batch, channels, height, width = x.shape
            tokens = x.flatten(2).transpose(1, 2)
            q, k, v = self.qkv(self.norm(tokens)).chunk(3, -1)
            weight = torch.softmax(q @ k.transpose(1, 2) * channels**-0.5, -1)
            tokens = tokens + self.out(weight @ v)
            return tokens.transpose(1, 2).reshape(batch, channels, height, width)  # type: ignore[no-any-return]  # modules give Any

    return nn.Sequential(
        *(unit(3, 24, 3, 2, act=nn.GELU), inverted(24, 48, 2, 4, nn.GELU, Excite(96, 12))),
        *(Attention(48), head(48)),
    )

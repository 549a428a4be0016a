"""Segmenters: maps that are brought back to the size of the image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # what all torch code calls it

from tools.architectures.blocks import (
    Concat,
    Lambda,
    backbone,
    basic,
    bottleneck,
    inverted,
    levels,
    unit,
)


def unet(grow: Callable[[int, int], nn.Module]) -> nn.Module:
    def double(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(unit(inputs, outputs), unit(outputs, outputs))

    def run(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        first = parts["down1"](x)
        second = parts["down2"](F.max_pool2d(first, 2))
        third = parts["down3"](F.max_pool2d(second, 2))
        y = parts["join2"](torch.cat([parts["grow2"](third), second], 1))
        y = parts["join1"](torch.cat([parts["grow1"](y), first], 1))
        answer: Tensor = parts["answer"](y)
        return answer

    return Lambda(
        run,
        down1=double(3, 12),
        down2=double(12, 24),
        down3=double(24, 48),
        grow2=grow(48, 24),
        grow1=grow(24, 12),
        join2=double(48, 24),
        join1=double(24, 12),
        answer=nn.Conv2d(12, 3, 1),
    )


def unet_transposed() -> nn.Module:
    return unet(lambda inputs, outputs: nn.ConvTranspose2d(inputs, outputs, 2, 2))


def unet_resized() -> nn.Module:
    return unet(
        lambda inputs, outputs: nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(inputs, outputs, 1),
        )
    )


def resized_to(y: Tensor, x: Tensor) -> Tensor:
    """Bring a map to the size of the image."""
    return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


def fcn() -> nn.Module:
    def run(parts: nn.ModuleDict, x: Tensor) -> tuple[Tensor, Tensor]:
        _, middle, deep = levels(parts["stages"], x)
        return resized_to(parts["main"](deep), x), resized_to(parts["aux"](middle), x)

    def answer(inputs: int) -> nn.Module:
        return nn.Sequential(unit(inputs, inputs // 2), nn.Dropout(), nn.Conv2d(inputs // 2, 5, 1))

    return Lambda(run, stages=backbone(), main=answer(64), aux=answer(32))


def deeplab_v3() -> nn.Module:
    class ImagePool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(64, 16, 1), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return resized_to(self.body(x), x)

    aspp = Concat(
        unit(64, 16, 1), *(unit(64, 16, 3, dilation=rate) for rate in (2, 4, 6)), ImagePool()
    )
    body = nn.Sequential(
        *(unit(3, 32, 3, 2), bottleneck(32, 64, 2), bottleneck(64, 64, dilation=2), aspp),
        *(unit(80, 32, 1), unit(32, 32), nn.Conv2d(32, 5, 1)),
    )
    return Lambda(lambda parts, x: resized_to(parts["body"](x), x), body=body)


def lraspp() -> nn.Module:
    def run(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        low = parts["low"](x)
        high = parts["high"](low)
        y = resized_to(parts["body"](high) * parts["gate"](high), low)
        return resized_to(parts["low_answer"](low) + parts["high_answer"](y), x)

    hard = nn.Hardswish
    return Lambda(
        run,
        low=nn.Sequential(unit(3, 16, 3, 2, act=hard), inverted(16, 24, 1, 3, hard)),
        high=nn.Sequential(inverted(24, 48, 2, 3, hard), unit(48, 64, 1, act=hard)),
        body=unit(64, 32, 1),
        gate=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(64, 32, 1), nn.Sigmoid()),
        low_answer=nn.Conv2d(24, 5, 1),
        high_answer=nn.Conv2d(32, 5, 1),
    )


def pspnet() -> nn.Module:
    def run(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        y = levels(parts["stages"], x)[-1]
        found = [y]
        for bins in (1, 2, 4):
            found.append(resized_to(parts[f"bin{bins}"](F.adaptive_avg_pool2d(y, bins)), y))
        return resized_to(parts["answer"](torch.cat(found, 1)), x)

    return Lambda(
        run,
        stages=backbone(),
        **{f"bin{bins}": unit(64, 16, 1) for bins in (1, 2, 4)},
        answer=nn.Sequential(unit(112, 32), nn.Conv2d(32, 5, 1)),
    )


def hrnet() -> nn.Module:
    def run(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        x = parts["stem"](x)
        high, low = parts["high"](x), parts["low"](x)
        grown = F.interpolate(parts["grow"](low), scale_factor=2.0, mode="nearest")
        high, low = torch.relu(high + grown), torch.relu(low + parts["shrink"](high))
        high, low = parts["high2"](high), parts["low2"](low)
        grown = F.interpolate(low, scale_factor=2.0, mode="bilinear", align_corners=True)
        y: Tensor = parts["answer"](torch.cat([high, grown], 1))
        return y

    return Lambda(
        run,
        stem=unit(3, 24, 3, 2),
        high=basic(24, 24),
        low=basic(24, 48, 2),
        grow=unit(48, 24, 1, act=None),
        shrink=unit(24, 48, 3, 2, act=None),
        high2=basic(24, 24),
        low2=basic(48, 48),
        answer=nn.Sequential(unit(72, 32, 1), nn.Conv2d(32, 6, 1)),
    )

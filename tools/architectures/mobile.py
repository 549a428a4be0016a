"""Classifiers of few operations: depthwise Convs, squeeze and excitation, channel shuffles."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tools.architectures.blocks import Excite, Lambda, head, inverted, unit


def mobilenet_v2() -> nn.Module:
    six = nn.ReLU6
    return nn.Sequential(
        *(unit(3, 16, 3, 2, act=six), inverted(16, 16, 1, 4, six), inverted(16, 24, 2, 4, six)),
        *(inverted(24, 24, 1, 4, six), unit(24, 96, 1, act=six), head(96)),
    )


def mobilenet_v3() -> nn.Module:
    hard = nn.Hardswish
    return nn.Sequential(
        unit(3, 16, 3, 2, act=hard),
        inverted(16, 16, 1, 3, hard, Excite(48, 12, nn.Hardsigmoid)),
        inverted(16, 32, 2, 4, hard, Excite(64, 16, nn.Hardsigmoid)),
        *(unit(32, 96, 1, act=hard), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(96, 64), nn.Hardswish(), nn.Linear(64, 10)),
    )


def efficientnet() -> nn.Module:
    silu = nn.SiLU
    return nn.Sequential(
        unit(3, 16, 3, 2, act=silu),
        inverted(16, 24, 1, 4, silu, Excite(64, 8)),
        inverted(24, 24, 1, 4, silu, Excite(96, 8)),
        inverted(24, 32, 2, 4, silu, Excite(96, 8)),
        *(unit(32, 96, 1, act=silu), head(96)),
    )


def efficientnet_v2() -> nn.Module:
    silu = nn.SiLU
    return nn.Sequential(
        unit(3, 16, 3, 2, act=silu),
        inverted(16, 16, 1, 2, silu, fused=True),
        inverted(16, 24, 2, 4, silu, fused=True),
        inverted(24, 32, 1, 4, silu, Excite(96, 8)),
        *(unit(32, 96, 1, act=silu), head(96)),
    )


def shuffled(x: Tensor, groups: int = 2) -> Tensor:
    """Interleave the channels of groups."""
    batch, channels, height, width = x.shape
    split = x.reshape(batch, groups, channels // groups, height, width)
    return split.transpose(1, 2).reshape(batch, channels, height, width)


def shufflenet_v2() -> nn.Module:
    def halves(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        return shuffled(torch.cat([first, parts["body"](second)], 1))

    def block() -> nn.Module:
        body = nn.Sequential(unit(24, 24, 1), unit(24, 24, 3, 1, 24, act=None), unit(24, 24, 1))
        return Lambda(halves, body=body)

    return nn.Sequential(unit(3, 48, 3, 2), block(), block(), unit(48, 64, 1), head(64))


def ghostnet() -> nn.Module:
    def ghost(inputs: int, outputs: int) -> nn.Module:
        def both(parts: nn.ModuleDict, x: Tensor) -> Tensor:
            first = parts["primary"](x)
            return torch.cat([first, parts["cheap"](first)], 1)

        half = outputs // 2
        return Lambda(both, primary=unit(inputs, half, 1), cheap=unit(half, half, 3, 1, half))

    return nn.Sequential(unit(3, 16, 3, 2), ghost(16, 48), ghost(48, 64), Excite(64, 16), head(64))

"""What networks of several kinds are made of: Convs with their norm, residual blocks, stages, heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Concat",
    "Excite",
    "Lambda",
    "Residual",
    "backbone",
    "basic",
    "bottleneck",
    "head",
    "head_only",
    "inverted",
    "levels",
    "unit",
]


def unit(
    inputs: int,
    outputs: int,
    kernel: int | tuple[int, int] = 3,
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
    act: Callable[[], nn.Module] | None = nn.ReLU,
) -> nn.Sequential:
    """Conv, BatchNorm and activation, padded so that a stride of 1 keeps the size."""
    kernels = (kernel, kernel) if isinstance(kernel, int) else kernel
    pads = (dilation * (kernels[0] - 1) // 2, dilation * (kernels[1] - 1) // 2)
    conv = nn.Conv2d(
        inputs, outputs, kernels, stride, pads, dilation=dilation, groups=groups, bias=False
    )
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([] if act is None else [act()]))


class Lambda(nn.Module):
    """A function of tensors with named parts, as a module."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleDict(parts)

    def forward(self, *inputs: Tensor) -> Any:
        """Call the function with the parts and the inputs."""
        return self.function(self.parts, *inputs)


class Residual(nn.Module):
    """The sum of branches; without any shortcut given, the input itself is one."""

    def __init__(self, *branches: nn.Module, act: nn.Module | None = None) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.act = act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Add them."""
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        y: Tensor = self.act(total)
        return y


class Concat(nn.Module):
    """What branches give, side by side."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate them."""
        return torch.cat([branch(x) for branch in self.branches], 1)


class Excite(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int, inner: int, gate: type[nn.Module] = nn.Sigmoid) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, inner, 1),
            nn.ReLU(),
            nn.Conv2d(inner, channels, 1),
            gate(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scale each channel."""
        y: Tensor = x * self.gate(x)
        return y


def head(channels: int, classes: int = 10) -> nn.Sequential:
    """Pool and classify."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def head_only(width: int) -> nn.Module:
    return nn.Sequential(nn.Dropout(), nn.Linear(width, 10), nn.LogSoftmax(1))


def basic(inputs: int, outputs: int, stride: int = 1) -> Residual:
    """Build the basic block of a ResNet."""
    body = nn.Sequential(unit(inputs, outputs, 3, stride), unit(outputs, outputs, act=None))
    same = stride == 1 and inputs == outputs
    shortcut = nn.Identity() if same else unit(inputs, outputs, 1, stride, act=None)
    return Residual(body, shortcut, act=nn.ReLU())


def bottleneck(
    inputs: int, outputs: int, stride: int = 1, groups: int = 1, excite: int = 0, dilation: int = 1
) -> Residual:
    """Build the bottleneck of ResNet, ResNeXt (groups) and RegNetY (groups, excitation)."""
    width = outputs // 2
    body = nn.Sequential(
        unit(inputs, width, 1),
        unit(width, width, 3, stride, groups, dilation),
        Excite(width, excite) if excite else nn.Identity(),
        unit(width, outputs, 1, act=None),
    )
    same = stride == 1 and inputs == outputs
    shortcut = nn.Identity() if same else unit(inputs, outputs, 1, stride, act=None)
    return Residual(body, shortcut, act=nn.ReLU())


def inverted(
    inputs: int,
    outputs: int,
    stride: int,
    expand: int,
    act: type[nn.Module],
    excite: nn.Module | None = None,
    fused: bool = False,
) -> nn.Module:
    """Build the inverted residual of MobileNetV2 and V3, EfficientNet, and EfficientNetV2 (fused)."""
    width = inputs * expand
    if fused:
        body = nn.Sequential(
            unit(inputs, width, 3, stride, act=act), unit(width, outputs, 1, act=None)
        )
    else:
        body = nn.Sequential(
            unit(inputs, width, 1, act=act),
            unit(width, width, 3, stride, width, act=act),
            excite or nn.Identity(),
            unit(width, outputs, 1, act=None),
        )
    return Residual(body, nn.Identity()) if stride == 1 and inputs == outputs else body


def backbone(width: int = 16) -> nn.ModuleList:
    """Build three stages of a ResNet, at a half, a quarter and an eighth of the size."""
    return nn.ModuleList(
        [
            nn.Sequential(unit(3, width, 3, 2), basic(width, width)),
            basic(width, 2 * width, 2),
            basic(2 * width, 4 * width, 2),
        ]
    )


def levels(stages: Any, x: Tensor) -> list[Tensor]:
    """Run stages, the modules of a Sequential, one after another and give what each of them gives."""
    found = []
    for stage in stages:
        x = stage(x)
        found.append(x)
    return found

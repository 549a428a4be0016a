"""Networks whose graphs look like those that people export: the families, narrow, with random weights.

Each is written after its paper or its usual code, with the blocks that make its graph what it is (grouped
and depthwise Convs, channel shuffles, squeeze and excitation, attention, shared heads, transposed Convs,
resizes) and with few channels and few blocks. `tools.real_graphs` exports and converts them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # what all torch code calls it

__all__ = ["ARCHITECTURES", "Architecture"]


@dataclass(frozen=True)
class Architecture:
    """One network.

    Attributes
    ----------
    name, family : str
    build : callable
        Gives the module; seed torch first.
    inputs : tuple of tuple of int
        Shape of each input without the batch.
    outputs : int
    free_size : bool
        Whether height and width may vary.
    jumps : bool
        Whether outputs jump (by comparisons, TopK): a small error may then change them wholly.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: tuple[tuple[int, ...], ...] = ((3, 32, 32),)
    outputs: int = 1
    free_size: bool = False
    jumps: bool = False


# Blocks --------------------------------------------------------------------------------------


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


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of an image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise with the channels last."""
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


def head(channels: int, classes: int = 10) -> nn.Sequential:
    """Pool and classify."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


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


def levels(stages: Iterable[nn.Module], x: Tensor) -> list[Tensor]:
    """Run stages one after another and give what each of them gives."""
    found = []
    for stage in stages:
        x = stage(x)
        found.append(x)
    return found


def shuffled(x: Tensor, groups: int = 2) -> Tensor:
    """Interleave the channels of groups."""
    batch, channels, height, width = x.shape
    split = x.reshape(batch, groups, channels // groups, height, width)
    return split.transpose(1, 2).reshape(batch, channels, height, width)


# Classification ------------------------------------------------------------------------------


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


def head_only(width: int) -> nn.Module:
    return nn.Sequential(nn.Dropout(), nn.Linear(width, 10), nn.LogSoftmax(1))


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
            return tokens.transpose(1, 2).reshape(batch, channels, height, width)  # type: ignore[no-any-return]

    return nn.Sequential(
        *(unit(3, 24, 3, 2, act=nn.GELU), inverted(24, 48, 2, 4, nn.GELU, Excite(96, 12))),
        *(Attention(48), head(48)),
    )


# Detection -----------------------------------------------------------------------------------


def ssd() -> nn.Module:
    def run(parts: nn.ModuleDict, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = levels(parts["stages"], x)[1:]  # type: ignore[arg-type]  # a Sequential
        boxes: list[Tensor] = []
        scores: list[Tensor] = []
        for number, each in enumerate(maps):
            for found, kind, width in ((boxes, "boxes", 4), (scores, "scores", 5)):
                answer = parts[f"{kind}{number}"](each).permute(0, 2, 3, 1)
                found.append(answer.reshape(answer.shape[0], -1, width))
        return torch.cat(boxes, 1), torch.softmax(torch.cat(scores, 1), -1)

    heads = {
        f"{kind}{number}": nn.Conv2d(width, 3 * size, 3, padding=1)
        for number, width in enumerate((32, 64))
        for kind, size in (("boxes", 4), ("scores", 5))
    }
    return Lambda(run, stages=backbone(), **heads)


def pyramid(parts: nn.ModuleDict, x: Tensor) -> list[Tensor]:
    """Run the backbone, and a feature pyramid over it."""
    _, middle, deep = levels(parts["stages"], x)  # type: ignore[arg-type]  # a Sequential
    top = parts["lateral2"](deep)
    grown = F.interpolate(top, size=middle.shape[-2:], mode="nearest")
    return [parts["smooth"](parts["lateral1"](middle) + grown), top]


def pyramid_parts() -> dict[str, nn.Module]:
    return {
        "stages": backbone(),
        "lateral1": nn.Conv2d(32, 32, 1),
        "lateral2": nn.Conv2d(64, 32, 1),
        "smooth": nn.Conv2d(32, 32, 3, padding=1),
    }


def retinanet() -> nn.Module:
    def run(parts: nn.ModuleDict, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = pyramid(parts, x)
        scores = [torch.sigmoid(parts["scores"](each)).flatten(2) for each in maps]
        boxes = [parts["boxes"](each).flatten(2) for each in maps]
        return torch.cat(scores, 2), torch.cat(boxes, 2)

    def tower(outputs: int) -> nn.Module:  # the same for every level
        return nn.Sequential(unit(32, 32), nn.Conv2d(32, outputs, 3, padding=1))

    return Lambda(run, **pyramid_parts(), scores=tower(6), boxes=tower(8))


def fcos() -> nn.Module:
    def run(parts: nn.ModuleDict, x: Tensor) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        for level, each in enumerate(pyramid(parts, x)):
            y = parts[f"tower{level}"](each)
            found += [parts[f"scores{level}"](y), torch.exp(0.1 * parts[f"boxes{level}"](y))]
        return tuple(found)

    heads: dict[str, nn.Module] = {}
    for level in range(2):
        heads[f"tower{level}"] = nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU()
        )
        heads[f"scores{level}"] = nn.Conv2d(32, 5, 3, padding=1)
        heads[f"boxes{level}"] = nn.Conv2d(32, 4, 3, padding=1)
    return Lambda(run, **pyramid_parts(), **heads)


def region_proposals() -> nn.Module:
    """Build the first stage of Faster R-CNN: the best proposals, by TopK and gathering."""

    def run(parts: nn.ModuleDict, x: Tensor) -> tuple[Tensor, Tensor]:
        y = parts["body"](levels(parts["stages"], x)[-1])  # type: ignore[arg-type]  # a Sequential
        scores = parts["scores"](y).flatten(1)
        boxes = parts["boxes"](y).flatten(2).transpose(1, 2).reshape(y.shape[0], -1, 4)
        best, where = torch.topk(scores, 8, 1)
        return best, torch.gather(boxes, 1, where.unsqueeze(-1).expand(-1, -1, 4))

    return Lambda(
        run,
        stages=backbone(),
        body=unit(64, 48),
        scores=nn.Conv2d(48, 3, 1),
        boxes=nn.Conv2d(48, 12, 1),
    )


def centernet() -> nn.Module:
    def run(parts: nn.ModuleDict, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = parts["up"](levels(parts["stages"], x)[-1])  # type: ignore[arg-type]  # a Sequential
        heat = torch.sigmoid(parts["heat"](y))
        peaks = heat * (F.max_pool2d(heat, 3, 1, 1) == heat)
        return peaks, parts["size"](y), parts["offset"](y)

    def branch(outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, outputs, 1))

    up = nn.Sequential(
        nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()
    )
    return Lambda(run, stages=backbone(), up=up, heat=branch(4), size=branch(2), offset=branch(2))


def c2f(inputs: int, outputs: int) -> nn.Module:
    """Build YOLOv8's block: all that its bottlenecks give, side by side."""

    def run(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        found = list(parts["enter"](x).chunk(2, 1))
        found.append(found[-1] + parts["body"](found[-1]))
        y: Tensor = parts["leave"](torch.cat(found, 1))
        return y

    half = outputs // 2
    body = nn.Sequential(unit(half, half, act=nn.SiLU), unit(half, half, act=nn.SiLU))
    return Lambda(
        run,
        enter=unit(inputs, outputs, 1, act=nn.SiLU),
        body=body,
        leave=unit(3 * half, outputs, 1, act=nn.SiLU),
    )


def sppf(width: int) -> nn.Module:
    """Build YOLO's pyramid of poolings."""

    def run(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        found = [parts["enter"](x)]
        for _ in range(3):
            found.append(F.max_pool2d(found[-1], 5, 1, 2))
        y: Tensor = parts["leave"](torch.cat(found, 1))
        return y

    half = width // 2
    return Lambda(
        run, enter=unit(width, half, 1, act=nn.SiLU), leave=unit(4 * half, width, 1, act=nn.SiLU)
    )


def yolo_parts(outputs: int) -> dict[str, nn.Module]:
    return {
        "stem": nn.Sequential(unit(3, 16, 3, 2, act=nn.SiLU), c2f(16, 32)),
        "deep": nn.Sequential(unit(32, 48, 3, 2, act=nn.SiLU), c2f(48, 48), sppf(48)),
        "join": c2f(80, 32),
        "fine": nn.Conv2d(32, outputs, 1),
        "coarse": nn.Conv2d(48, outputs, 1),
    }


def yolo_maps(parts: nn.ModuleDict, x: Tensor) -> tuple[Tensor, Tensor]:
    shallow = parts["stem"](x)
    deep = parts["deep"](shallow)
    grown = F.interpolate(deep, scale_factor=2.0, mode="nearest")
    joined = parts["join"](torch.cat([grown, shallow], 1))
    return parts["fine"](joined), parts["coarse"](deep)


def yolov5() -> nn.Module:
    """Build one with the Focus layer and anchors: an output for each level."""

    def run(parts: nn.ModuleDict, x: Tensor) -> tuple[Tensor, ...]:
        corners = [x[..., i::2, j::2] for j in (0, 1) for i in (0, 1)]
        answers = yolo_maps(parts, parts["focus"](torch.cat(corners, 1)))
        return tuple(
            torch.sigmoid(each).reshape(each.shape[0], 3, 8, *each.shape[-2:]) for each in answers
        )

    return Lambda(run, focus=unit(12, 3, act=nn.SiLU), **yolo_parts(24))


def yolov8() -> nn.Module:
    """Build one with a distribution over distances, decoded in the graph."""

    def run(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        answers = torch.cat([each.flatten(2) for each in yolo_maps(parts, x)], 2)
        distances, scores = answers[:, :32], answers[:, 32:]
        spread = distances.reshape(distances.shape[0], 4, 8, -1).softmax(2)
        steps = torch.arange(8, dtype=torch.float32).reshape(1, 1, 8, 1)
        return torch.cat([(spread * steps).sum(2), scores.sigmoid()], 1)

    return Lambda(run, **yolo_parts(37))


# Segmentation --------------------------------------------------------------------------------


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
        _, middle, deep = levels(parts["stages"], x)  # type: ignore[arg-type]  # a Sequential
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
        y = levels(parts["stages"], x)[-1]  # type: ignore[arg-type]  # a Sequential
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


# Images from images --------------------------------------------------------------------------


def espcn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 5, padding=2), nn.Tanh(), nn.Conv2d(32, 24, 3, padding=1), nn.Tanh()),
        *(nn.Conv2d(24, 9, 3, padding=1), nn.PixelShuffle(3)),
    )


def edsr() -> nn.Module:
    def block() -> nn.Module:
        body = nn.Sequential(
            nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1)
        )
        return Residual(body, nn.Identity())

    body = nn.Sequential(block(), block(), nn.Conv2d(24, 24, 3, padding=1))
    return nn.Sequential(
        *(nn.Conv2d(3, 24, 3, padding=1), Residual(body, nn.Identity())),
        *(nn.Conv2d(24, 96, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(24, 3, 3, padding=1)),
    )


def srresnet() -> nn.Module:
    def block() -> nn.Module:
        body = nn.Sequential(unit(24, 24, act=nn.PReLU), unit(24, 24, act=None))
        return Residual(body, nn.Identity())

    return nn.Sequential(
        *(nn.Conv2d(3, 24, 9, padding=4), nn.PReLU(24), block(), block()),
        *(nn.Conv2d(24, 96, 3, padding=1), nn.PixelShuffle(2), nn.PReLU(24)),
        *(nn.Conv2d(24, 3, 9, padding=4), nn.Tanh()),
    )


def style_transfer() -> nn.Module:
    def layer(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, padding_mode="reflect"),
            *(nn.InstanceNorm2d(outputs, affine=True), nn.ReLU()),
        ]

    return nn.Sequential(
        *(*layer(3, 16, 9), *layer(16, 32, 3, 2)),
        Residual(nn.Sequential(*layer(32, 32, 3)), nn.Identity()),
        *(nn.Upsample(scale_factor=2, mode="nearest"), *layer(32, 16, 3)),
        nn.Conv2d(16, 3, 9, padding=4),
    )


def autoencoder() -> nn.Module:
    return nn.Sequential(
        *(unit(3, 16, 3, 2), unit(16, 32, 3, 2), nn.Flatten(), nn.Linear(2048, 24)),
        *(nn.Linear(24, 2048), nn.ReLU(), nn.Unflatten(1, (32, 8, 8))),
        *(nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1)),
        nn.Sigmoid(),
    )


# Other shapes --------------------------------------------------------------------------------


def siamese() -> nn.Module:
    """Build one that compares two images with one network, so that all of its weights are shared."""

    def run(parts: nn.ModuleDict, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        a, b = parts["body"](left), parts["body"](right)
        return F.cosine_similarity(a, b), parts["judge"](torch.cat([a, b, (a - b).abs()], 1))

    return Lambda(
        run, body=resnet(), judge=nn.Sequential(nn.Linear(30, 32), nn.ReLU(), head_only(32))
    )


def two_streams() -> nn.Module:
    """Build one with an image and a depth map, each with a network of its own."""

    def run(parts: nn.ModuleDict, image: Tensor, depth: Tensor) -> Tensor:
        y = torch.cat([parts["image"](image), parts["depth"](depth)], 1)
        answer: Tensor = parts["answer"](y)
        return answer

    return Lambda(
        run,
        image=nn.Sequential(unit(3, 24, 3, 2), basic(24, 32, 2)),
        depth=nn.Sequential(unit(1, 16, 3, 2), unit(16, 24, 3, 2)),
        answer=nn.Sequential(unit(56, 48, 3), head(48)),
    )


def channels_last() -> nn.Module:
    """Build one that takes images with the channels last, as TensorFlow's do."""
    return Lambda(lambda parts, x: parts["body"](x.permute(0, 3, 1, 2)), body=resnet())


def audio() -> nn.Module:
    def layer(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
        return [nn.Conv1d(inputs, outputs, kernel, stride), nn.BatchNorm1d(outputs), nn.ReLU()]

    return nn.Sequential(
        *(*layer(1, 24, 16, 4), nn.MaxPool1d(4), *layer(24, 32, 3, 1), *layer(32, 48, 3, 1)),
        *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(48, 10)),
    )


def video() -> nn.Module:
    def layer(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv3d(inputs, outputs, 3, stride, 1, bias=False)
        return [conv, nn.BatchNorm3d(outputs), nn.ReLU()]

    return nn.Sequential(
        *(*layer(3, 12, 1), *layer(12, 24, 2), *layer(24, 24, 2)),
        *(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(24, 10)),
    )


_TWO = ((3, 32, 32), (3, 32, 32))
_MAP = (3, 48, 48)

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("AlexNet", "classification", alexnet, ((3, 64, 64),)),
    Architecture("VGG-BN", "classification", vgg_bn),
    Architecture("ResNet, basic", "classification", resnet, free_size=True),
    Architecture("ResNet, bottleneck", "classification", resnet_bottleneck),
    Architecture("ResNeXt", "classification", resnext),
    Architecture("RegNetY", "classification", regnet_y),
    Architecture("Res2Net", "classification", res2net),
    Architecture("SqueezeNet", "classification", squeezenet),
    Architecture("GoogLeNet", "classification", googlenet),
    Architecture("Inception v3", "classification", inception_v3),
    Architecture("DenseNet", "classification", densenet),
    Architecture("MobileNetV2", "classification", mobilenet_v2),
    Architecture("MobileNetV3", "classification", mobilenet_v3),
    Architecture("EfficientNet", "classification", efficientnet),
    Architecture("EfficientNetV2", "classification", efficientnet_v2),
    Architecture("ShuffleNetV2", "classification", shufflenet_v2),
    Architecture("GhostNet", "classification", ghostnet),
    Architecture("CSPDarknet", "classification", csp_darknet),
    Architecture("NFNet", "classification", nfnet),
    Architecture("ConvNeXt", "classification", convnext),
    Architecture("ConvMixer", "classification", convmixer),
    Architecture("CoAtNet", "classification", coatnet),
    Architecture("SSD", "detection", ssd, outputs=2),
    Architecture("RetinaNet", "detection", retinanet, outputs=2),
    Architecture("FCOS", "detection", fcos, outputs=4),
    Architecture("Faster R-CNN, proposals", "detection", region_proposals, outputs=2, jumps=True),
    Architecture("CenterNet", "detection", centernet, outputs=3, jumps=True),
    Architecture("YOLOv5", "detection", yolov5, ((3, 64, 64),), outputs=2),
    Architecture("YOLOv8", "detection", yolov8),
    Architecture("U-Net, transposed", "segmentation", unet_transposed, free_size=True),
    Architecture("U-Net, resized", "segmentation", unet_resized),
    Architecture("FCN", "segmentation", fcn, (_MAP,), outputs=2, free_size=True),
    Architecture("DeepLabV3", "segmentation", deeplab_v3, (_MAP,), free_size=True),
    Architecture("LR-ASPP", "segmentation", lraspp, (_MAP,)),
    Architecture("PSPNet", "segmentation", pspnet),
    Architecture("HRNet", "segmentation", hrnet),
    Architecture("ESPCN", "super-resolution", espcn, ((1, 24, 24),), free_size=True),
    Architecture("EDSR", "super-resolution", edsr, ((3, 24, 24),), free_size=True),
    Architecture("SRResNet", "super-resolution", srresnet, ((3, 24, 24),)),
    Architecture("Style transfer", "image to image", style_transfer),
    Architecture("Autoencoder", "image to image", autoencoder),
    Architecture("Siamese", "two inputs", siamese, _TWO, outputs=2),
    Architecture("Two streams", "two inputs", two_streams, ((3, 32, 32), (1, 32, 32))),
    Architecture("ResNet, channels last", "other shapes", channels_last, ((32, 32, 3),)),
    Architecture("M5, 1-D", "other shapes", audio, ((1, 1024),)),
    Architecture("R3D, 3-D", "other shapes", video, ((3, 8, 16, 16),)),
)

"""Images from images, two inputs, channels last, and networks of one and three dimensions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # what all torch code calls it

from tools.architectures.blocks import Lambda, Residual, basic, head, head_only, unit
from tools.architectures.residual import resnet


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

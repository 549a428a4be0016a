"""Detectors: maps of several sizes, heads on each of them, boxes decoded in the graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # what all torch code calls it

from tools.architectures.blocks import Lambda, backbone, levels, unit


def ssd() -> nn.Module:
    def run(parts: nn.ModuleDict, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = levels(parts["stages"], x)[1:]
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
    _, middle, deep = levels(parts["stages"], x)
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
        y = parts["body"](levels(parts["stages"], x)[-1])
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
        y = parts["up"](levels(parts["stages"], x)[-1])
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

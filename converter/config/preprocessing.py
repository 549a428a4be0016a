"""How an image file becomes a model's input: settings, named presets, and both as they are typed."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from converter.config.require import require
from converter.errors import ConfigError

__all__ = ["PRESETS", "Preprocessing", "preprocessing_from_options", "preset_resize"]


@dataclass(frozen=True)
class Preprocessing:
    """How an image file becomes a model's input: x = (pixel · scale − mean) / std, per channel.

    Attributes
    ----------
    size : tuple of (int, int) or None, default None
        Height and width that the model gets; None takes them from the model's input.
    resize : int or None, default None
        Shorter side, in pixels, that an image is resized to before the crop; None resizes
        straight to `size`, without a crop.
    crop : {"center", "none"}, default "center"
        What happens after `resize`: a centred crop of `size`, or nothing.
    layout : {"nchw", "nhwc"}, default "nchw"
        Axis order of the model's input.
    channels : {"rgb", "bgr", "gray"}, default "rgb"
        Channel order of the model's input.
    scale : float, default 1/255
        Factor on pixel values (0 to 255), above 0.
    mean, std : tuple of float, default (0,), (1,)
        One value for all channels or one per channel, after `scale`; each std above 0.
    in_proportion : bool, default False
        Whether `resize` belongs to a crop of 224 and another crop gets it in proportion: that of a preset
        does, where no size is given.
    """

    size: tuple[int, int] | None = None
    resize: int | None = None
    crop: Literal["center", "none"] = "center"
    layout: Literal["nchw", "nhwc"] = "nchw"
    channels: Literal["rgb", "bgr", "gray"] = "rgb"
    scale: float = 1.0 / 255.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    in_proportion: bool = False

    def __post_init__(self) -> None:
        count = 1 if self.channels == "gray" else 3
        if self.size is not None:
            require(
                len(self.size) == 2 and all(0 < side <= 16384 for side in self.size),
                f"size {self.size} is not a height and a width from 1 to 16384; "
                "give one or two such numbers",
            )
        if self.resize is not None:
            require(
                0 < self.resize <= 16384,
                f"resize {self.resize} is not from 1 to 16384 pixels; correct it",
            )
        for name, values, allowed in (
            ("crop", self.crop, ("center", "none")),
            ("layout", self.layout, ("nchw", "nhwc")),
            ("channels", self.channels, ("rgb", "bgr", "gray")),
        ):
            require(
                values in allowed,
                f"{name} {values!r} is none of {', '.join(allowed)}; give one of these",
            )
        require(
            math.isfinite(self.scale) and self.scale > 0,
            f"scale {self.scale} is not a number above 0; 1/255 maps pixels to 0..1",
        )
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            require(
                len(numbers) in (1, count) and all(math.isfinite(n) for n in numbers),
                f"{name} {numbers} is not 1 or {count} finite numbers; give one for each channel",
            )
        require(
            all(s > 0 for s in self.std),
            f"std {self.std} has a value that is not above 0; correct it",
        )

    def replace(self, **changes: Any) -> Preprocessing:
        """Return a copy with some settings changed, validated again; a `resize` is what it says."""
        if "resize" in changes:
            changes.setdefault("in_proportion", False)
        return dataclasses.replace(self, **changes)


PRESETS: dict[str, Preprocessing] = {
    "imagenet": Preprocessing(
        resize=256, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), in_proportion=True
    ),
    "cifar10": Preprocessing(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
    "unit": Preprocessing(),
    "none": Preprocessing(scale=1.0),
}
"""Named ways to prepare images. `unit` maps pixels to 0..1, `none` keeps 0..255. `imagenet`
resizes the shorter side to 256 and crops the centre (scaled in proportion where the model's
input is not 224)."""


def preset_resize(size: tuple[int, int]) -> int:
    """Return the shorter side that the preset `imagenet` resizes to before it crops `size`.

    The preset's 256 belong to a crop of 224; another crop gets them in proportion to its longer
    side, so that it always fits: 256/224 · max(size), rounded.
    """
    return round(256 / 224 * max(size))


def preprocessing_from_options(
    preset: str | None = None,
    size: str | None = None,
    resize: int | None = None,
    crop: str | None = None,
    layout: str | None = None,
    channels: str | None = None,
    scale: float | None = None,
    mean: str | None = None,
    std: str | None = None,
) -> Preprocessing:
    """Lay options, as they are typed, over a preset; None leaves what the preset says.

    Parameters
    ----------
    preset : str or None
        A key of `PRESETS`; None starts from the defaults of `Preprocessing`.
    size : str or None
        "224" for a square, or height and width as in "224x256".
    resize : int or None
        Shorter side before the crop, in pixels. Where only `size` is given, the preset's own is
        scaled to it (`preset_resize`).
    crop, layout, channels : str or None
        As in `Preprocessing`. With "bgr" the preset's mean and std turn round with the channels.
    scale : float or None
        Factor on pixel values.
    mean, std : str or None
        Numbers with commas between, as in "0.485,0.456,0.406".

    Raises
    ------
    ConfigError
        Where the preset is unknown, or an option cannot be read or makes no sense.
    """
    require(
        preset is None or preset in PRESETS,
        f"the preset {preset!r} is none of {', '.join(PRESETS)}; give one of these",
    )
    base = Preprocessing() if preset is None else PRESETS[preset]
    changes: dict[str, object] = {
        name: value
        for name, value in (
            ("resize", resize),
            ("crop", crop),
            ("layout", layout),
            ("channels", channels),
            ("scale", scale),
        )
        if value is not None
    }
    if size is not None:
        changes["size"] = sides = _size_from(size)
        if resize is None and base.resize is not None:
            changes["resize"] = preset_resize(sides)
    if channels == "bgr":
        changes.update(mean=base.mean[::-1], std=base.std[::-1])
    for name, text in (("mean", mean), ("std", std)):
        if text is not None:
            changes[name] = _numbers_from(name, text)
    return base.replace(**changes)


def _size_from(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    require(
        len(sides) in (1, 2) and all(s.isascii() and s.isdigit() and len(s) <= 5 for s in sides),
        f"the size {text!r} is neither one number nor two, such as 224 or 224x256; correct it",
    )
    return int(sides[0]), int(sides[-1])


def _numbers_from(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"{name} {text!r} is not a list of numbers such as 0.485,0.456,0.406; correct it"
        ) from error

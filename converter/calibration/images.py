"""Image files made into a model's input.

The order is: decode, turn upright, to RGB, BGR or gray with 8 bits, resize and crop, then
x = (pixel · scale − mean) / std, then the layout. Resize and crop do what torchvision's
`Resize(shorter side)` (bilinear, with antialias) and `CenterCrop` do on a Pillow image, since most
models were trained and measured behind these two.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from PIL import Image, ImageOps

from converter.config import Preprocessing, preset_resize
from converter.errors import CalibrationError
from converter.limits import PIXELS

__all__ = [
    "IMAGE_SUFFIXES",
    "THUMBNAIL_SIDE",
    "arrange_image",
    "open_image",
    "prepare_image",
    "resolve_preprocessing",
    "thumbnail",
]

IMAGE_SUFFIXES = frozenset(
    {
        ".bmp",
        ".gif",
        ".jpeg",
        ".jpg",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    }
)
"""What the names of image files end with, in lower case."""

THUMBNAIL_SIDE = 128
"""Longer side of a small copy in pixels: sharp at the size at which a report shows it."""

_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")

# What Pillow's decoders raise on damaged files, beside OSError.
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)


def resolve_preprocessing(
    preprocessing: Preprocessing, input_shape: tuple[int | str | None, ...]
) -> Preprocessing:
    """Complete the settings from the shape of the model's input, and check them against it.

    Where the settings have no `size`, it is the model's, and the `resize` of the preset `imagenet`
    (256) is scaled to it (`preset_resize`). Where they have one, `resize` is taken as it is.

    Parameters
    ----------
    preprocessing : Preprocessing
        The settings as they were given.
    input_shape : tuple of (int, str or None), length 4
        Shape of the model's input; a name or None stands for a size that is not fixed.

    Returns
    -------
    Preprocessing
        The same settings with `size` set and `resize` in pixels.

    Raises
    ------
    CalibrationError
        Where the input is no image, has other channels or another size than the settings, or has
        no fixed size while the settings have none either.
    """
    if len(input_shape) != 4:
        raise CalibrationError(
            f"the model's input of shape {_words(input_shape)} is not a batch of images; "
            "give a .npy or .npz file instead of images"
        )
    rows = _sides(preprocessing, input_shape)
    _check_channels(preprocessing, input_shape)
    size = preprocessing.size or _fixed_size(rows)
    for side, row in zip(size, rows, strict=True):
        if isinstance(row, int) and row != side:
            raise CalibrationError(
                f"the size {size[0]}x{size[1]} does not fit the model's input of shape "
                f"{_words(input_shape)}; leave --size out"
            )
    resize = preprocessing.resize
    if preprocessing.size is None and preprocessing.in_proportion:
        resize = preset_resize(size)
    if resize is not None and preprocessing.crop == "center" and resize < max(size):
        raise CalibrationError(
            f"images resized to {resize} pixels are smaller than the model's {size[0]}x{size[1]}; "
            f"give --resize {max(size)} or more"
        )
    return preprocessing.replace(size=size, resize=resize)


def prepare_image(
    source: Path,
    preprocessing: Preprocessing,
    size: tuple[int, int],
    channels: int,
    dtype: DTypeLike = np.float32,
) -> NDArray[Any]:
    """Make one image file into one sample of a model's input.

    Parameters
    ----------
    source : Path
        A JPEG, PNG, BMP, WebP, GIF (its first frame), TIFF, PPM or PGM file.
    preprocessing : Preprocessing
        How; its `resize` is in pixels (see `resolve_preprocessing`).
    size : tuple of (int, int)
        Height and width of the sample.
    channels : int
        Channels of the sample: 1 for gray, 3 for RGB and BGR.
    dtype : dtype, default float32
        A floating-point type, or uint8, for which pixels stay 0 to 255 without scale, mean and std.

    Returns
    -------
    ndarray of shape (channels, height, width) or (height, width, channels), by the layout

    Raises
    ------
    CalibrationError
        Where the file cannot be read as an image, is too large, or does not come out with this
        size and these channels.
    """
    if channels != _channel_count(preprocessing):
        raise CalibrationError(
            f"{source} gives {_channel_count(preprocessing)} channels where {channels} are wanted; "
            f"give {_channels_remedy(channels)}"
        )
    return arrange_image(open_image(source), source, preprocessing, size, dtype)


def open_image(source: Path) -> Image.Image:
    """Open an image file and check its format and its size, without decoding it yet.

    Not for a thread beside others: it changes how Python warns, and changes it back.

    Raises
    ------
    CalibrationError
        Where the file is no image of a known format or has more pixels than `limits.PIXELS`.
    """
    try:
        # Pillow warns of large images before anything can be asked of them. The warning becomes an
        # exception here alone, since its limit is a setting of the whole program.
        with warnings.catch_warnings(), _pixel_limit(PIXELS.value):
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(source, formats=_FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise CalibrationError(_too_large(source)) from error
    except _UNREADABLE as error:
        raise CalibrationError(_unreadable(source, error)) from error
    if image.width * image.height > PIXELS.value:
        image.close()
        raise CalibrationError(_too_large(source))
    return image


@contextmanager
def _pixel_limit(most: int) -> Iterator[None]:
    usual = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = most
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = usual


def arrange_image(
    image: Image.Image,
    source: Path,
    preprocessing: Preprocessing,
    size: tuple[int, int],
    dtype: DTypeLike = np.float32,
) -> NDArray[Any]:
    """Decode an opened image and make it into a sample, as `prepare_image` does; close it.

    Raises
    ------
    CalibrationError
        Where the image is damaged or does not come out with this size.
    """
    plain = _decoded(image, source, "L" if preprocessing.channels == "gray" else "RGB")
    fitted = _resized_and_cropped(plain, source, preprocessing, size)
    pixels = np.asarray(fitted).reshape(*size, -1)
    if preprocessing.channels == "bgr":
        pixels = pixels[..., ::-1]
    if np.dtype(dtype) != np.uint8:
        mean, std = (np.asarray(v, np.float32) for v in (preprocessing.mean, preprocessing.std))
        scaled = pixels.astype(np.float32) * np.float32(preprocessing.scale)
        pixels = ((scaled - mean) / std).astype(dtype)
    if preprocessing.layout == "nchw":
        pixels = pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(pixels)


def thumbnail(source: Path, side: int = THUMBNAIL_SIDE) -> bytes:
    """Make a small copy of an image file.

    Parameters
    ----------
    source : Path
        As for `prepare_image`.
    side : int, default THUMBNAIL_SIDE
        Its longer side in pixels, at most; smaller images keep their size.

    Returns
    -------
    bytes
        A JPEG file in RGB.

    Raises
    ------
    CalibrationError
        Where the image cannot be read.
    """
    small = _decoded(open_image(source), source, "RGB")
    small.thumbnail((side, side))
    content = io.BytesIO()
    small.save(content, "JPEG", quality=85)
    return content.getvalue()


def _decoded(image: Image.Image, source: Path, mode: str) -> Image.Image:
    """Decode an opened image, turn it upright, and close its file."""
    with image, _decoding(source):
        image.load()
        if image.format != "TIFF":  # Pillow turns these as it loads them; 10.0 would turn twice
            ImageOps.exif_transpose(image, in_place=True)
        return _with_eight_bits(image, source).convert(mode)


@contextmanager
def _decoding(source: Path) -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as error:
        raise CalibrationError(_unreadable(source, error)) from error


def _with_eight_bits(image: Image.Image, source: Path) -> Image.Image:
    """Return the image in a mode from which Pillow converts well.

    Transparency is dropped and the colours under it are kept: the usual loaders do the same.
    """
    if image.mode == "P":
        # With a transparent entry, P to RGB alone would warn.
        return image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # 16 bits, which Pillow would cut off at 255 rather than scale; 65535 = 257 · 255.
        return Image.fromarray(((np.asarray(image).astype(np.int64) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise CalibrationError(
            f"the image {source} has 32-bit pixels, whose range is not known; "
            "save it with 8 or 16 bits"
        )
    return image


def _resized_and_cropped(
    image: Image.Image, source: Path, preprocessing: Preprocessing, size: tuple[int, int]
) -> Image.Image:
    height, width = size
    if preprocessing.resize is None:
        target = (width, height)
    else:
        target = _shorter_side_resized(image.size, preprocessing.resize)
    if target[0] * target[1] > PIXELS.value:
        raise CalibrationError(
            f"the image {source} would have {target[0]}x{target[1]} pixels after its resize; "
            f"take it out, make it less elongated, or {PIXELS}"
        )
    if target != image.size:
        image = image.resize(target, Image.Resampling.BILINEAR)
    if image.size == (width, height):
        return image
    if preprocessing.crop == "none" or image.width < width or image.height < height:
        raise CalibrationError(
            f"the image {source} has {image.width}x{image.height} pixels after its resize where "
            f"the model takes {width}x{height}; give --crop center with a --resize of "
            f"{max(size)} or more, or no --resize"
        )
    return image.crop(_centre_box(image.size, (width, height)))


def _shorter_side_resized(size: tuple[int, int], resize: int) -> tuple[int, int]:
    """Return the width and height after torchvision's Resize of the shorter side (rounded down)."""
    width, height = size
    if width <= height:
        return resize, int(resize * height / width)
    return int(resize * width / height), resize


def _centre_box(size: tuple[int, int], crop: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of torchvision's CenterCrop (rounded half to even)."""
    left, top = (round((side - cut) / 2) for side, cut in zip(size, crop, strict=True))
    return left, top, left + crop[0], top + crop[1]


def _channel_count(preprocessing: Preprocessing) -> int:
    return 1 if preprocessing.channels == "gray" else 3


def _channels_remedy(channels: int) -> str:
    return {1: "--channels gray", 3: "--channels rgb"}.get(
        channels, "a .npy or .npz file instead of images"
    )


def _sides(
    preprocessing: Preprocessing, shape: tuple[int | str | None, ...]
) -> tuple[int | str | None, ...]:
    return shape[2:4] if preprocessing.layout == "nchw" else shape[1:3]


def _check_channels(preprocessing: Preprocessing, shape: tuple[int | str | None, ...]) -> None:
    here, there = (1, 3) if preprocessing.layout == "nchw" else (3, 1)
    count = _channel_count(preprocessing)
    channels = shape[here]
    if not isinstance(channels, int) or channels == count:
        return
    other = "nhwc" if preprocessing.layout == "nchw" else "nchw"
    remedy = f"--layout {other}" if shape[there] in (1, 3) else _channels_remedy(channels)
    raise CalibrationError(
        f"the model's input of shape {_words(shape)} has {channels} channels where "
        f"{preprocessing.channels} images in the layout {preprocessing.layout} have {count}; "
        f"give {remedy}"
    )


def _fixed_size(sides: tuple[int | str | None, ...]) -> tuple[int, int]:
    height, width = sides
    if isinstance(height, int) and isinstance(width, int):
        return height, width
    raise CalibrationError(
        f"the model's input has no fixed height and width ({_words(sides)}); "
        "give them, for example --size 224"
    )


def _words(shape: tuple[int | str | None, ...]) -> str:
    return "(" + ", ".join("?" if side is None else str(side) for side in shape) + ")"


def _too_large(source: Path) -> str:
    return (
        f"the image {source} has more than {PIXELS.value} pixels; make it smaller, take it out, or "
        f"{PIXELS}"
    )


def _unreadable(source: Path, error: BaseException) -> str:
    reason = error.strerror if isinstance(error, OSError) else None
    detail = f" ({reason})" if reason else ""
    return f"the image {source} cannot be read{detail}; replace it or take it out of the folder"

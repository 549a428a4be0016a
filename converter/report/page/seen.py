"""What a validation saw: the images that the models answer most differently, and their outputs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from converter.report.page.phrases import percent, three
from converter.report.page.record import Record
from converter.report.page.table import Table

__all__ = ["WorstImage", "show_outputs", "show_worst"]

IMAGES = 24
_PICTURE_LIMIT = 2**16
_JPEG = re.compile(r"/9j/[A-Za-z0-9+/]+={0,2}")  # base64 of a file that begins as a JPEG does


@dataclass(frozen=True)
class WorstImage:
    """One image, and how both models answered it; `original_right` is None without a label."""

    name: str
    picture: str
    original: str
    converted: str
    label: str
    original_right: bool | None
    converted_right: bool | None
    error: str


def show_worst(validation: Record) -> tuple[WorstImage, ...]:
    """Show the images that the two models answer most differently."""
    names = validation.texts("class_names")
    return tuple(_worst(each, names) for each in validation.records("worst")[:IMAGES])


def _worst(image: Record, names: Sequence[str]) -> WorstImage:
    label = image.number("label")
    original, converted = image.number("original"), image.number("converted")
    error = image.number("error")
    parts = image.text("file").replace("\\", "/").split("/")
    picture = image.text("picture", _PICTURE_LIMIT)
    return WorstImage(
        name="/".join(parts[-2:]) or f"image {image.count('index')}",
        picture=picture if _JPEG.fullmatch(picture) else "",
        original=_class(original, names),
        converted=_class(converted, names),
        label="" if label is None else _class(label, names),
        original_right=None if label is None else original == label,
        converted_right=None if label is None else converted == label,
        error="not finite" if error is None else f"{100 * error:,.0f} %",
    )


def _class(number: float | None, names: Sequence[str]) -> str:
    if number is None:
        return "?"
    if number < 0:
        return "no number"
    index = int(number)
    return names[index] if index < len(names) else f"class {index}"


def show_outputs(validation: Record) -> Table | None:
    """Say how far each output is from the original's."""
    found = validation.records("outputs")
    if not found:
        return None
    return Table(
        ("output", "max error", "mean", "median", "99 %", "max, of range", "L2, relative"),
        tuple(
            (
                each.text("name") or "?",
                *(three(each.number(f"{key}_abs")) for key in ("max", "mean", "median", "p99")),
                *(percent(each.number(key)) for key in ("max_relative", "relative_l2")),
            )
            for each in found
        ),
    )

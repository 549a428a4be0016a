"""Where the windows of a Conv or a pooling lie, by ONNX's attributes."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["padding", "spans_of"]


def spans_of(kernel: Sequence[int], dilations: Sequence[int]) -> list[int]:
    """Give the sides of a kernel as dilated, in positions of the input."""
    return [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]


def padding(
    auto_pad: str,
    pads: Sequence[int],
    sides: Sequence[int],
    spans: Sequence[int],
    strides: Sequence[int],
) -> list[tuple[int, int]]:
    """Give what is padded before and after each spatial axis.

    Parameters
    ----------
    auto_pad : str
        "NOTSET" (or nothing), "VALID", "SAME_UPPER" or "SAME_LOWER".
    pads : sequence of int
        As stated, the starts of all axes and then their ends; empty for none. Only NOTSET takes them.
    sides, spans, strides : sequence of int
        One for each axis: of the input, of the kernel as dilated, and of the steps.
    """
    count = len(sides)
    if auto_pad in ("", "NOTSET"):
        stated = pads or [0] * (2 * count)
        return list(zip(stated[:count], stated[count:], strict=True))
    if auto_pad == "VALID":
        return [(0, 0)] * count
    found = []
    for side, span, stride in zip(sides, spans, strides, strict=True):
        total = max((-(-side // stride) - 1) * stride + span - side, 0)
        less, more = total // 2, total - total // 2
        found.append((less, more) if auto_pad == "SAME_UPPER" else (more, less))
    return found

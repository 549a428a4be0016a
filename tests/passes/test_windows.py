"""Windows lie where ONNX says: beside the padding that a runtime would need for its output shape."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.windows import padding, spans_of


def test_a_dilated_kernel_spans_the_holes_too() -> None:
    assert spans_of((3, 1, 5), (2, 7, 1)) == [5, 1, 5]


@pytest.mark.parametrize(
    ("auto_pad", "pads", "expected"),
    [
        ("NOTSET", (1, 2, 3, 4), [(1, 3), (2, 4)]),
        ("NOTSET", (), [(0, 0), (0, 0)]),
        ("VALID", (1, 2, 3, 4), [(0, 0), (0, 0)]),
        ("SAME_UPPER", (), [(0, 1), (1, 2)]),
        ("SAME_LOWER", (), [(1, 0), (2, 1)]),
    ],
)
def test_stated_pads_count_alone_where_they_are_asked_for(
    auto_pad: str, pads: tuple[int, ...], expected: list[tuple[int, int]]
) -> None:
    assert padding(auto_pad, pads, (8, 7), (3, 4), (2, 1)) == expected


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    side=st.integers(1, 40),
    span=st.integers(1, 9),
    stride=st.integers(1, 5),
    auto_pad=st.sampled_from(["SAME_UPPER", "SAME_LOWER"]),
)
def test_the_same_is_as_many_windows_as_strides_go_into_the_side(
    side: int, span: int, stride: int, auto_pad: str
) -> None:
    ((before, after),) = padding(auto_pad, (), (side,), (span,), (stride,))
    assert abs(before - after) <= 1
    assert (before <= after) == (auto_pad == "SAME_UPPER" or before == after)
    windows = (side + before + after - span) // stride + 1 if side + before + after >= span else 0
    if span >= stride:  # else the last window ends before the side does
        assert windows == math.ceil(side / stride)

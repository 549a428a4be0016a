"""The page of large networks."""

from __future__ import annotations

import pytest

from tools.large import Row, page


def test_speed_is_set_against_the_multiply_accumulates_that_are_gone() -> None:
    row = Row("vgg16", "--macs 4", 4.0, 2.0, 3.6, 3.5, 3.7, -0.04, 600.4, 5000.4)
    assert row.realised == pytest.approx(0.9)
    last = page([row]).splitlines()[-1]
    assert last == (
        "| vgg16 | `--macs 4` | 4.00 | 2.00 | 3.60 (3.50–3.70) | 0.90 | -4 % | 600 | 5,000 |"
    )

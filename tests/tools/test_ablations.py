"""What is left out is left out, and the page says what that cost; on a tiny network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import converter
from tools import ablations
from tools.ablations import WITHOUT, Row, main, page


def test_every_part_is_left_out_once(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Row] = []
    converted: list[converter.Conversion] = []
    convert = converter.convert

    def listed(rows: list[Row]) -> str:
        measured[:] = rows
        return page(rows)

    def spied(*given: Any, **settings: Any) -> converter.Conversion:
        converted.append(convert(*given, **settings))
        return converted[-1]

    monkeypatch.setattr(ablations, "page", listed)
    monkeypatch.setattr(converter, "convert", spied)
    unseen = tiny / "data" / "cifar10" / "val"
    monkeypatch.setattr(ablations, "train_images", lambda *_: unseen)
    out = tmp_path / "page.md"
    main(model=["vgg16"], factor=[2.0], images=8, shared=tiny, work=tmp_path, out=out)
    assert [row.without for row in measured] == list(WITHOUT)
    assert all(row.images == 8 and 0 < row.error < 1 for row in measured)
    assert out.read_text() == page(measured)
    whole, uncorrected, *_ = measured
    assert uncorrected.predicted != whole.predicted
    for without, found in zip(WITHOUT, converted, strict=True):
        assert not any(f"`{layer.scheme}`" in without for layer in found.layers)


def test_the_page_has_a_line_for_each_row() -> None:
    row = Row("VGG-16", 4.0, "nothing", 0.0123, 0.0456, 0.98765, 2000)
    assert page([row]).splitlines()[-1] == (
        "| VGG-16, MACs ÷ 4 | nothing | 4.56 % | 98.77 % | 2,000 | 0.0123 |"
    )
    assert "python -m tools.ablations" in page([row])

"""The table of a model's layers."""

from __future__ import annotations

from pathlib import Path

from converter.inspection import Inspection, LayerInspection
from converter.report.console.inspection import print_inspection
from tests.converter.report.console.samples import line_with, wide


def test_inspection_table() -> None:
    console, stream = wide()
    layers = (
        LayerInspection("a", "Conv", (8, 3, 3, 3), (1, 8, 4, 4), 3456, 216, "relu", None),
        LayerInspection("b", "MatMul", None, None, None, None, "identity", "it is computed"),
    )
    print_inspection(Inspection(Path("m"), 17, (), layers, 3456, 216, 1, ("a note",)), console)
    text = stream.getvalue()
    assert "yes" in line_with(text, "8×3×3×3")
    assert "no: it is computed" in line_with(text, "MatMul")
    assert "1 of 2 layers" in text
    assert "note: a note" in text

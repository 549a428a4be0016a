"""What a conversion settles before it begins."""

from __future__ import annotations

import pytest

from converter.config import SCHEME_NAMES, QuantizationSettings, SolverSettings
from converter.pipeline import schemes_before

WITHOUT = ("channel", "spatial", "tucker", "sparse")


@pytest.mark.parametrize(
    ("schemes", "precision", "left"),
    [
        (SCHEME_NAMES, None, SCHEME_NAMES),
        (SCHEME_NAMES, "int8", WITHOUT),
        (SCHEME_NAMES, "float16", SCHEME_NAMES),
        (("crossed", "tucker"), "int8", ("crossed", "tucker")),
    ],
)
def test_integers_do_without_crossed_unless_it_is_named(
    schemes: tuple[str, ...], precision: str | None, left: tuple[str, ...]
) -> None:
    solver = SolverSettings(iterations=7, schemes=schemes)
    quantization = None
    if precision is not None:
        quantization = QuantizationSettings(precision=precision)  # type: ignore[arg-type]
    found = schemes_before(solver, quantization)
    assert found.schemes == left
    assert found.iterations == 7


def test_a_baseline_keeps_its_only_scheme() -> None:
    assert schemes_before(SolverSettings("svd"), QuantizationSettings()).schemes == ("channel",)

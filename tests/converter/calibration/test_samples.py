"""What the kinds of calibration set share."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from converter.calibration.samples import spread


@given(st.integers(1, 500), st.integers(1, 500))
def test_spread_takes_every_part_of_a_set(total: int, wanted: int) -> None:
    chosen = spread(total, wanted)
    assert len(chosen) == min(total, wanted)
    assert sorted(set(chosen)) == chosen
    assert 0 <= chosen[0] <= chosen[-1] < total
    for parts in (2, 5, 10):  # equal classes get equal shares, give or take one
        if total % parts == 0 and wanted <= total:
            per = total // parts
            counts = [sum(k * per <= i < (k + 1) * per for i in chosen) for k in range(parts)]
            assert max(counts) - min(counts) <= 1

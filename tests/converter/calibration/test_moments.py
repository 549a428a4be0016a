from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import DTypeLike

from converter.calibration.moments import Moments


def rows(count: int, seed: int = 0) -> np.ndarray:
    """Rows far from zero, whose sum of squares would cancel."""
    return (1000 + np.random.default_rng(seed).standard_normal((count, 6))).astype(np.float32)


# float32 rows near 1000 have steps of 6e-5, which a float32 scatter sees as an error of the mean
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-12), (np.float32, 2e-4)])
def test_parts_add_up_to_the_whole(dtype: DTypeLike, rtol: float) -> None:
    whole = rows(50)
    moments = Moments.none(6, dtype)
    for part in np.split(whole, [1, 9, 9, 30]):
        moments.add(part)
    exact = whole.astype(np.float64)
    assert moments.count == 50
    assert moments.scatter.dtype == dtype
    np.testing.assert_allclose(moments.mean, exact.mean(axis=0), rtol=1e-12)
    covariance = np.cov(exact.T, bias=True)
    np.testing.assert_allclose(moments.covariance, covariance, atol=rtol * covariance.max())


def test_joining_is_adding_and_changes_neither() -> None:
    first, second, both = (Moments.none(6) for _ in range(3))
    first.add(rows(7, seed=1))
    second.add(rows(20, seed=2))
    both.add(rows(7, seed=1))
    both.add(rows(20, seed=2))
    before = first.mean.copy(), first.scatter.copy(), second.mean.copy(), second.scatter.copy()

    joined = first.joined(second)

    assert (joined.count, first.count, second.count) == (27, 7, 20)
    np.testing.assert_allclose(joined.mean, both.mean, rtol=1e-12)
    np.testing.assert_allclose(joined.scatter, both.scatter, rtol=1e-9)
    after = first.mean, first.scatter, second.mean, second.scatter
    for was, now in zip(before, after, strict=True):
        np.testing.assert_array_equal(was, now)


def test_no_rows_change_nothing() -> None:
    moments, none = Moments.none(6), Moments.none(6)
    moments.add(rows(5))
    for joined in (moments.joined(none), none.joined(moments)):
        assert joined.count == 5
        np.testing.assert_allclose(joined.mean, moments.mean, rtol=1e-15)
        np.testing.assert_array_equal(joined.scatter, moments.scatter)
    assert none.joined(none).count == 0

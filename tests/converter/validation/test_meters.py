"""One output of two models, taken in batch by batch."""

from __future__ import annotations

import numpy as np
import pytest

from converter.validation.meters import Meter


def test_quantiles_of_large_outputs_come_from_a_bounded_sample() -> None:
    generator = np.random.default_rng(0)
    meter = Meter("y", sample=4000)
    chunks = [np.abs(generator.standard_normal(700)) for _ in range(60)]
    for chunk in chunks:
        meter.add(np.zeros(700), chunk)
    found = meter.result()
    errors = np.concatenate(chunks)
    assert found.sampled == 4000
    assert found.max_abs == errors.max()
    assert found.mean_abs == pytest.approx(errors.mean())
    # The median of 4,000 draws of a half-normal has a standard error of about 0.01; five of them.
    assert found.median_abs == pytest.approx(np.median(errors), abs=0.05)

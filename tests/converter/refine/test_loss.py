"""The loss against its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from converter.refine.loss import answers_differ, mean_scores, relative_error
from converter.scores import holds_scores, in_rows


def softmax(values: np.ndarray) -> np.ndarray:
    shifted = np.exp(values - values.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def test_scores_are_compared_as_softened_distributions() -> None:
    random = np.random.default_rng(0)
    mine, theirs = random.standard_normal((2, 6, 4)) * 3
    mine -= (mine - theirs).mean(1, keepdims=True)
    p, q = softmax(theirs / 2.5), softmax(mine / 2.5)
    expected = 2.5**2 * (p * np.log(p / q)).sum() / 6
    found = answers_differ(
        {"y": torch.from_numpy(mine)}, {"y": torch.from_numpy(theirs)}, ("y",), 2.5
    )
    assert float(found) == pytest.approx(expected, rel=1e-9)


def test_a_constant_added_to_all_scores_is_seen() -> None:
    scores = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    level = answers_differ({"y": scores + 7}, {"y": scores}, ("y",), 4)
    assert float(level) == pytest.approx(7**2 / 2, rel=1e-4)


def test_at_a_high_temperature_it_is_the_squared_error() -> None:
    generator = torch.Generator().manual_seed(2)
    mine, theirs = (torch.randn(6, 4, generator=generator).double() for _ in range(2))
    found = answers_differ({"y": mine}, {"y": theirs}, ("y",), 1e3)
    assert float(found) == pytest.approx(float((mine - theirs).square().mean()) / 2, rel=1e-2)


def test_maps_are_compared_by_relative_error_and_outputs_averaged() -> None:
    maps = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(2))
    spread = float((maps - maps.mean(0)).square().sum())
    error = float(relative_error(maps + 0.5, maps))
    assert error == pytest.approx(0.25 * maps.numel() / spread, rel=1e-5)
    both = answers_differ({"a": maps + 0.5, "b": maps}, {"a": maps, "b": maps}, ("a", "b"), 1)
    assert float(both) == pytest.approx(error / 2, rel=1e-5)
    assert not holds_scores(maps)
    assert not holds_scores(torch.ones(4, 1))
    assert holds_scores(torch.ones(4, 2))


def test_scores_of_outputs_alone_are_averaged() -> None:
    first = {"y": torch.full((3, 4), 1.0), "map": torch.ones(3, 2, 5, 5), "inner": torch.ones(3, 4)}
    second = {name: 3 * each for name, each in first.items()}
    found = mean_scores(first, second, ("y", "map"))
    assert torch.equal(found["y"], torch.full((3, 4), 2.0))
    assert found["map"] is first["map"]
    assert found["inner"] is first["inner"]


def test_an_output_that_hardly_differs_between_images_does_not_outweigh_the_others() -> None:
    wanted = 0.99999 + 1e-5 * torch.randn(64, 1, 4, generator=torch.Generator().manual_seed(0))
    off = relative_error(wanted + 1e-5, wanted)
    assert 1e-5 < float(off) < 1e-3


def test_scores_may_have_axes_of_one_behind() -> None:
    row = torch.arange(8.0).reshape(2, 4, 1, 1)
    assert holds_scores(row)
    assert in_rows(row).shape == (2, 4)
    assert in_rows(np.ones((2, 1, 1))).shape == (2, 1)
    assert not holds_scores(np.ones((2, 3, 4, 1)))

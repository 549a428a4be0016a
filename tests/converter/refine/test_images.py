"""What is drawn from the images, and what happens to them on the way."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from converter.calibration.sets import Batch
from converter.errors import CalibrationError
from converter.refine.images import Images, augmented, holds_images, load_images, mirror_images


class Set:
    """A calibration set over one array."""

    class_names = None

    def __init__(self, images: NDArray[np.float32], labels: bool = False) -> None:
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._images)

    def batches(self, size: int) -> Iterator[Batch]:
        for start in range(0, len(self), size):
            part = self._images[start : start + size]
            classes = np.arange(start, start + len(part)) if self._labels else None
            yield Batch({"x": part}, classes, len(part))

    def describe(self) -> str:
        return f"{len(self)} images"

    def digest(self) -> str:
        return "0"


def pictures(count: int, side: int = 8) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((count, 3, side, side)).astype(np.float32)


def test_images_are_held_in_half_precision_with_their_labels() -> None:
    images, notes = load_images(Set(pictures(20), labels=True), 16)
    assert images.feeds["x"].dtype == np.float16
    assert images.labels is not None
    assert images.labels.tolist() == list(range(20))
    assert notes == ()
    batch = images.batch(slice(2, 5), "cpu")["x"]
    assert batch.dtype == torch.float32
    np.testing.assert_allclose(batch.numpy(), pictures(20)[2:5], rtol=1e-3, atol=1e-6)


def test_what_does_not_fit_is_left_out_and_said() -> None:
    one = 3 * 64 * 64 * 2
    images, notes = load_images(Set(pictures(1000, 64)), 16)
    assert len(images) == 16 * 2**20 // one
    assert "stay within 16 MiB" in notes[0]
    with pytest.raises(CalibrationError, match="raise the memory"):
        load_images(Set(pictures(2, 1024)), 16)


def test_what_half_precision_does_not_hold_is_kept_whole_or_refused() -> None:
    large = 1e5 * np.abs(pictures(20))
    images, _ = load_images(Set(large), 16)
    np.testing.assert_array_equal(images.feeds["x"], large)
    large[:16] /= 1e6
    with pytest.raises(CalibrationError, match="'x' has values beyond 65,504"):
        load_images(Set(large), 16)


def test_every_tenth_is_held_out_and_no_image_is_lost() -> None:
    images, _ = load_images(Set(pictures(95), labels=True), 16)
    rest, held = images.split(10, 1000)
    assert held.labels is not None
    assert rest.labels is not None
    assert held.labels.tolist() == list(range(9, 95, 10))
    assert sorted([*held.labels, *rest.labels]) == list(range(95))
    assert len(images.split(10, 3)[1]) <= 3


def test_an_epoch_sees_each_image_once_in_an_order_of_its_own() -> None:
    images = Images({"x": pictures(12)})
    epochs = [
        np.concatenate([images.seen_at(epoch * 3 + at, 4, seed=5)[0] for at in range(3)])
        for epoch in range(2)
    ]
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert epochs[0].tolist() != epochs[1].tolist()
    assert images.seen_at(4, 4, seed=5)[0].tolist() == epochs[1][4:8].tolist()
    assert [images.seen_at(step, 5, seed=5)[1:] for step in (0, 1, 2, 4)] == [
        *((0, 0), (0, 0), (1, 0), (2, 0))
    ]


@pytest.mark.parametrize("apart", [1, 8, 12, 2048])
def test_some_images_have_all_their_turns_before_the_next_ones(
    monkeypatch: pytest.MonkeyPatch, apart: int
) -> None:
    monkeypatch.setattr("converter.refine.images._APART", apart)
    images = Images({"x": pictures(23)})
    steps = [images.seen_at(step, 4, seed=5, turns=2) for step in range(2 * 10)]
    assert [seen for _, seen, _ in steps] == [0] * 10 + [1] * 10
    together = max(1, apart // 4)
    for start in (0, 10):
        of_turns = [
            [rows for rows, _, turn in steps[start : start + 10] if turn == each] for each in (0, 1)
        ]
        first, second = map(np.concatenate, of_turns)
        assert len(np.unique(first)) == 20
        for at in range(0, 20, 4 * together):
            block = slice(at, at + 4 * together)
            assert sorted(first[block]) == sorted(second[block])
        assert together == 1 or first.tolist() != second.tolist()
        turns = [turn for _, _, turn in steps[start : start + 10]]
        lengths = [min(together, 5 - at) for at in range(0, 5, together)]
        assert turns == [turn for length in lengths for turn in [0] * length + [1] * length]


def chances(count: int, seed: int) -> NDArray[np.float64]:
    return Images({"x": pictures(count)}).chances(np.arange(count), (seed,))


def test_an_image_is_changed_alike_whatever_it_comes_with() -> None:
    images = Images({"x": pictures(12)})
    whole = images.chances(np.arange(12), (5, 1))
    np.testing.assert_array_equal(images.chances(np.array([7, 2]), (5, 1)), whole[[7, 2]])
    assert not np.array_equal(images.chances(np.arange(12), (5, 2)), whole)


def test_a_flip_turns_some_images_round_and_leaves_the_rest() -> None:
    given = torch.from_numpy(pictures(32))
    found = augmented({"x": given}, ("flip",), chances(32, 1))["x"]
    turned = [torch.equal(one, other.flip(-1)) for one, other in zip(found, given, strict=True)]
    same = [torch.equal(one, other) for one, other in zip(found, given, strict=True)]
    assert all(one != other for one, other in zip(turned, same, strict=True))
    assert 5 < sum(turned) < 27


def test_a_shift_moves_whole_images_and_mirrors_the_edge() -> None:
    given = torch.arange(64.0).view(1, 1, 8, 8).repeat(40, 1, 1, 1)
    found = augmented({"x": given}, ("shift",), chances(40, 2))["x"]
    rows = found[:, 0, :, 4] // 8
    expected = {
        (1, 0, 1, 2, 3, 4, 5, 6),
        (0, 1, 2, 3, 4, 5, 6, 7),
        (1, 2, 3, 4, 5, 6, 7, 6),
    }
    assert {tuple(map(int, row)) for row in rows} == expected


def test_channels_last_images_are_changed_alike_and_other_arrays_not_at_all() -> None:
    given = torch.from_numpy(pictures(8))
    first = augmented({"x": given}, ("flip", "shift"), chances(8, 3))["x"]
    last = augmented({"x": given.permute(0, 2, 3, 1)}, ("flip", "shift"), chances(8, 3))["x"]
    assert torch.equal(last.permute(0, 3, 1, 2), first)
    rows = {"x": torch.ones(4, 10)}
    assert augmented(rows, ("flip", "shift"), chances(4, 3))["x"] is rows["x"]
    assert torch.equal(augmented({"x": given}, (), chances(8, 3))["x"], given)


def test_images_are_mirrored_in_either_layout_and_nothing_else_is() -> None:
    given = torch.from_numpy(pictures(3))
    feeds = {"x": given, "last": given.permute(0, 2, 3, 1), "rows": torch.arange(6.0).view(3, 2)}
    found = mirror_images(feeds)
    assert torch.equal(found["x"], given.flip(3))
    assert torch.equal(found["last"], given.flip(3).permute(0, 2, 3, 1))
    assert found["rows"] is feeds["rows"]
    assert holds_images(feeds)
    assert not holds_images({"rows": feeds["rows"], "maps": torch.ones(3, 7, 6, 6)})


@pytest.mark.parametrize(
    ("offset", "spread", "kept"),
    [
        (0.0, 1.0, np.float16),
        (128.0, 60.0, np.float16),
        (300.0, 2.0, np.float32),
        (0.0, 1e-7, np.float32),
    ],
)
def test_what_half_precision_would_not_tell_apart_is_held_in_single(
    offset: float, spread: float, kept: type
) -> None:
    given = offset + spread * np.random.default_rng(0).standard_normal((20, 3, 8, 8))
    images, _ = load_images(Set(given.astype(np.float32)), 16)
    assert images.feeds["x"].dtype == kept

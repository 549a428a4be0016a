"""What the original answers is computed once for each variant of an image."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from onnx import numpy_helper

from converter.config import RecoverySettings
from converter.refine.images import Images
from converter.refine.lessons import HELD_OUT_VARIANTS, VARIANTS, Lessons
from converter.refine.networks import Networks

TEXT = """<ir_version: 8, opset_import: ["": 17]>
    small (float[n, 3, 8, 8] x) => (float[n, 5] y)
    <float[5, 3, 3, 3] a> {
        h = Conv (x, a)
        r = Relu (h)
        p = GlobalAveragePool (r)
        y = Flatten (p)
    }"""


WITH_A_MAP = TEXT.replace("(float[n, 5] y)", "(float[n, 5] y, float[n, 5, 6, 6] h)")


class Counted:
    """Two networks that count how often the original is asked."""

    def __init__(self, text: str = TEXT, *, mirrored: bool = False) -> None:
        model = onnx.parser.parse_model(text)
        del model.graph.initializer[:]
        values = np.random.default_rng(0).standard_normal((5, 3, 3, 3)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, "a"))
        self._networks = Networks(model, model, mirrored=mirrored)
        self.mirrored = mirrored
        self.outputs = self._networks.outputs
        self.asked = 0

    def original(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.asked += 1
        return self._networks.original(feeds)


def lessons(text: str = TEXT, **changes: Any) -> tuple[Lessons, Counted]:
    networks: Any = Counted(text, mirrored=changes.get("mirrored") is True)
    pictures = np.random.default_rng(1).standard_normal((23, 3, 8, 8)).astype(np.float32)
    settings = RecoverySettings(epochs=1, **changes)
    made = Lessons(networks, Images({"x": pictures}), settings)
    networks.asked = 0
    return made, networks


@pytest.mark.parametrize(("augment", "variants"), [(("flip", "shift"), VARIANTS), ((), 1)])
def test_answers_are_those_of_the_original_and_most_are_kept(
    augment: tuple[str, ...], variants: int
) -> None:
    made, networks = lessons(augment=augment)
    assert made.variants == variants
    for step in range(4 * 3 * variants):
        rows, feeds, answers = made.lesson(step, 5, nullcontext())
        assert len(rows) == 5
        expected = networks._networks.original(feeds)
        torch.testing.assert_close(answers["y"], expected["y"], rtol=1e-5, atol=1e-6)
        # inner responses are there while all variants are new, and at no other time
        assert ("r" in answers) == (step < 4 * variants)
        if step == 4 * variants - 1:
            assert networks.asked == 4 * variants
    # the first pass leaves 3 of 23 images out: a few steps later on meet one of them
    assert networks.asked < 4 * 2 * variants


@pytest.mark.parametrize(
    ("mirrored", "start"), [(False, 4 * VARIANTS), (True, 2)], ids=["in time", "between two turns"]
)
def test_a_run_that_goes_on_learns_the_same(
    monkeypatch: pytest.MonkeyPatch, mirrored: bool, start: int
) -> None:
    monkeypatch.setattr("converter.refine.images._APART", 10)
    whole, _ = lessons(mirrored=mirrored)
    cut, _ = lessons(mirrored=mirrored)
    for step in range(start):
        whole.lesson(step, 5, nullcontext())
    for step in range(start, start + 8):
        (rows, feeds, answers), (again, same, found) = (
            each.lesson(step, 5, nullcontext()) for each in (whole, cut)
        )
        np.testing.assert_array_equal(rows, again)
        assert torch.equal(feeds["x"], same["x"])
        assert answers.keys() == found.keys()
        assert ("r" in answers) == (mirrored and step % 4 < 2)
        torch.testing.assert_close(answers["y"], found["y"], rtol=1e-5, atol=1e-6)


def test_answers_that_are_too_large_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converter.refine.lessons._SHARE", 2**40)
    made, networks = lessons()
    assert made.variants is None
    seen: dict[int, list[torch.Tensor]] = {}
    for step in range(4 * (VARIANTS + 1)):
        rows, feeds, answers = made.lesson(step, 5, nullcontext())
        assert answers.keys() == {"y", "r"}
        for row, image in zip(rows, feeds["x"], strict=True):
            seen.setdefault(int(row), []).append(image)
    assert networks.asked == 4 * (VARIANTS + 1)
    # each pass draws anew: one way of 18 may come twice by chance, seven may not
    assert all(len({image.numpy().tobytes() for image in each}) > 2 for each in seen.values())


def test_an_image_and_its_mirror_image_have_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converter.refine.images._APART", 10)
    made, networks = lessons(mirrored=True)
    turns: list[dict[int, torch.Tensor]] = []
    learned: list[dict[int, torch.Tensor]] = []
    for step in range(4 * 2 * VARIANTS):
        asked = networks.asked
        rows, feeds, answers = made.lesson(step, 5, nullcontext())
        # two steps see ten images, and the next two see them turned round
        run, at = divmod(step, 2)
        turns += [{}] if at == 0 else []
        learned += [{}] if at == 0 else []
        turns[-1].update(zip(rows.tolist(), feeds["x"], strict=True))
        learned[-1].update(zip(rows.tolist(), answers["y"], strict=True))
        assert ("r" in answers) == (run % 2 == 0)
        # the first pass leaves 3 of 23 images out, and what they missed is made up for
        assert (networks.asked > asked) == (run % 2 == 0)
    for first, second in zip(turns[::2], turns[1::2], strict=True):
        assert first.keys() == second.keys()
        for row, image in first.items():
            assert torch.equal(second[row], image.flip(2))
    for first, second in zip(learned[::2], learned[1::2], strict=True):
        for row, scores in first.items():
            assert torch.equal(second[row], scores)


def mean_over(networks: Counted, views: Sequence[torch.Tensor]) -> torch.Tensor:
    """What the original answers to some views and their mirror images, on average."""
    plain = networks._networks.original  # the mean with the mirror image already
    return torch.stack([plain({"x": each})["y"] for each in views]).mean(0)


@pytest.mark.parametrize("start", [0, 4 * 2 * VARIANTS - 4])
def test_where_scores_are_means_they_are_means_over_all_variants_so_far(start: int) -> None:
    made, networks = lessons(mirrored=True)
    images, ways = made._images, ("flip", "shift")
    assert made.averaged
    for step in range(start, 4 * 2 * (VARIANTS + 1)):
        rows, _, answers = made.lesson(step, 5, nullcontext())
        seen = min(step // 8, VARIANTS - 1)
        views = [images.variant(rows, "cpu", ways, (0, 1, each))["x"] for each in range(seen + 1)]
        expected = mean_over(networks, views)
        torch.testing.assert_close(answers["y"], expected, rtol=1e-5, atol=1e-6)
    # one that goes on from here begins with the means over all passes so far
    made.ended(4 * 2 * 2 + 3, 5)
    onward: Any = Lessons(networks, images, made._settings, made)  # type: ignore[arg-type]  # a stand-in
    asked = networks.asked
    rows, _, answers = onward.lesson(0, 5, nullcontext())
    views = [images.variant(rows, "cpu", ways, (0, 1, each))["x"] for each in (0, 1)]
    torch.testing.assert_close(answers["y"], mean_over(networks, views), rtol=1e-5, atol=1e-6)
    assert networks.asked == asked  # what was answered is still there
    made.ended(10_000, 5)
    onward = Lessons(networks, images, made._settings, made)  # type: ignore[arg-type]  # a stand-in
    rows, _, answers = onward.lesson(0, 5, nullcontext())
    views = [images.variant(rows, "cpu", ways, (0, 1, each))["x"] for each in range(VARIANTS)]
    torch.testing.assert_close(answers["y"], mean_over(networks, views), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"mirrored": False}, TEXT),
        ({"mirrored": True, "augment": ("flip",)}, TEXT),
        ({"mirrored": True, "augment": ()}, TEXT),
        ({"mirrored": True}, WITH_A_MAP),
    ],
    ids=["as the original", "not shifted", "as they are", "a map"],
)
def test_otherwise_images_that_are_held_out_are_answered_as_they_are(
    changes: dict[str, Any], text: str
) -> None:
    made, networks = lessons(text, **changes)
    assert not made.averaged
    held_out = Images({"x": np.random.default_rng(2).standard_normal((7, 3, 8, 8), np.float32)})
    wanted = made.of_held_out(held_out, 3)
    expected = networks._networks.original(held_out.batch(slice(0, 7), "cpu"))
    assert wanted.keys() == set(networks.outputs)
    for name, each in wanted.items():
        torch.testing.assert_close(each, expected[name], rtol=1e-5, atol=1e-6)


def test_held_out_images_are_answered_by_means_too() -> None:
    made, networks = lessons(mirrored=True)
    held_out = Images({"x": np.random.default_rng(2).standard_normal((7, 3, 8, 8), np.float32)})
    views = [
        held_out.variant(slice(0, 7), "cpu", ("flip", "shift"), (0, 1, each))["x"]
        for each in range(HELD_OUT_VARIANTS)
    ]
    assert not torch.equal(views[0], views[1])
    found = made.of_held_out(held_out, 3)
    torch.testing.assert_close(found["y"], mean_over(networks, views), rtol=1e-5, atol=1e-6)


def test_a_map_is_another_one_for_the_mirror_image() -> None:
    made, networks = lessons(WITH_A_MAP, mirrored=True)
    for step in range(4 * 2 * VARIANTS):
        _, feeds, answers = made.lesson(step, 5, nullcontext())
        expected = networks._networks.original(feeds)
        for name in ("y", "h"):
            torch.testing.assert_close(answers[name], expected[name], rtol=1e-5, atol=1e-6)

"""A walk answers what the whole network answers with one layer changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from converter.calibration import walk as module
from converter.calibration.segment import Segment
from converter.calibration.walk import Walk
from passes.base import PassError
from passes.split import Split
from tests.converter.calibration.recorded import (
    CLOSE,
    ONE_THREAD,
    half,
    layers_of,
    normal,
    parsed,
    split,
    tensors_of,
)

TEXT = """two (float[%s, 3, 8, 8] x)
        => (float[n, 4, 4, 4] early, float[n, 6] y, float[n, 2, 4, 4] narrow) {
    k = Sin (k0)
    side = Conv (k, v)
    c = Conv <strides = [2, 2]> (x, a)
    early = Sigmoid (c)
    r = Relu (c)
    d = Conv <pads = [1, 1, 1, 1]> (r, b)
    e = Add (d, c)
    s = Relu (e)
    wide = Conv (s, w)
    t = Relu (wide)
    narrow = Conv (t, u)
    shifted = Add (narrow, side)
    f = Flatten (shifted)
    g = MatMul (f, m)
    y = Add (g, bias)
}"""
WEIGHTS = {
    "k0": normal(1, 3, 1, 1),
    "v": normal(2, 3, 1, 1),
    "a": normal(4, 3, 2, 2),
    "b": normal(4, 4, 3, 3, seed=1),
    "w": normal(12, 4, 1, 1, seed=2),
    "u": normal(2, 12, 1, 1, seed=3),
    "m": normal(32, 6, seed=4),
    "bias": normal(6, seed=5),
}
LAYERS = ["c", "d", "wide", "narrow", "g"]
WANTED = ("y", "early", "narrow")
BEFORE = {
    "x": ["x"],
    "d": ["c", "early", "r"],
    "wide": ["early", "s"],
    "narrow": ["early", "t"],
    "g": ["early", "f", "narrow"],
}


def batches(*counts: int) -> list[dict[str, NDArray[np.float32]]]:
    return [{"x": normal(count, 3, 8, 8, seed=count)} for count in counts]


@pytest.mark.parametrize("batch", ["n", "5"])
@pytest.mark.parametrize(
    ("memory", "starts"),
    [
        (2**20, ["x", "x", "d", "wide", "narrow"]),
        (12_000, ["x", "x", "d", "wide", "wide"]),  # "t" is the largest of all
        (0, ["x"] * 5),
    ],
    ids=["all are kept", "one is too large", "none is kept"],
)
def test_the_network_answers_as_a_whole_and_what_is_before_a_layer_is_computed_once(
    monkeypatch: pytest.MonkeyPatch, batch: str, memory: int, starts: list[str]
) -> None:
    opened: list[list[str]] = []

    class Seen(Segment):
        def __init__(self, model: Any, given: Any, wanted: Any, *rest: Any, **options: Any) -> None:
            super().__init__(model, given, wanted, *rest, **options)
            opened.append(list(given))

    monkeypatch.setattr(module, "Segment", Seen)
    model = parsed(TEXT % batch, WEIGHTS)
    fed = batches(5, 5, 2 if batch == "n" else 5)
    walk = Walk(model, fed, ONE_THREAD, memory)
    layers = layers_of(model)
    assert list(layers) == LAYERS
    for layer in layers.values():
        whole = split(model, layer)
        found = list(walk.answers(layer, [Split(layer, half(layer))], WANTED))
        assert len(found) == len(fed)
        for answers, feeds in zip(found, fed, strict=True):
            right = tensors_of(whole, feeds, WANTED)
            for name in WANTED:
                np.testing.assert_allclose(answers[name], right[name], rtol=CLOSE, atol=CLOSE)
    # of the three parts of each layer, what leads up to it comes last
    assert opened[2::3] == [BEFORE[start] for start in starts]


def test_a_type_that_nobody_knows_is_refused_before_anything_runs() -> None:
    model = parsed(TEXT % "n", WEIGHTS)
    del model.graph.value_info[:]
    model.opset_import.add(domain="com.microsoft", version=1)
    relu = next(node for node in model.graph.node if node.output[0] == "r")
    relu.op_type, relu.domain = "QuickGelu", "com.microsoft"
    layers = layers_of(model)
    fed = batches(3, 2)
    walk = Walk(model, fed, ONE_THREAD, 2**20)
    with pytest.raises(PassError, match="type of 'r' is not known"):
        next(walk.answers(layers["d"], [], WANTED))
    # what was fed is still there, so that layers with known types go on
    wanted = tensors_of(model, fed[1], ["early"])["early"]
    found = list(walk.answers(layers["c"], [], ["early"]))
    np.testing.assert_allclose(found[1]["early"], wanted, rtol=CLOSE, atol=CLOSE)

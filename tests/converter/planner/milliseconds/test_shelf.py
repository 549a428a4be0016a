"""What counts as the same layer, within a network and from one plan to the next."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest

from converter.planner.milliseconds.shelf import Shelf
from converter.schemes.form import KEEP
from tests.converter.planner.milliseconds.residual import FEEDS, layers_of, network

BATCH = 2


def clip(frames: int, batch: str) -> onnx.ModelProto:
    """A Conv over each frame, then the same over their mean."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        clip (float[{batch}, {frames}, 8, 6, 6] x) => (float[{batch}, 8, 36] y) {{
            images = Constant<value_ints = [-1, 8, 6, 6]>()
            a = Reshape(x, images)
            b = Relu(a)
            [each] c = Conv<pads = [1, 1, 1, 1]>(b, w1)
            d = Relu(c)
            clips = Constant<value_ints = [-1, {frames}, 8, 6, 6]>()
            e = Reshape(d, clips)
            f = ReduceMean<axes = [1], keepdims = 0>(e)
            g = Relu(f)
            [mean] h = Conv<pads = [1, 1, 1, 1]>(g, w2)
            i = Relu(h)
            flat = Constant<value_ints = [-1, 8, 36]>()
            y = Reshape(i, flat)
        }}"""
    )
    for name in ("w1", "w2"):
        weight = np.ones((8, 8, 3, 3), np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    return model


def shelf_of(frames: int, batch: str, known: dict[str, float] | None = None) -> Shelf:
    model = clip(frames, batch)
    feeds = {"x": np.ones((BATCH, frames, 8, 6, 6), np.float32)}
    return Shelf(model, layers_of(model), feeds, known or {})


@pytest.mark.parametrize("batch", ["n", str(BATCH)])
def test_layers_share_what_was_measured_only_where_as_much_is_folded_into_the_batch(
    batch: str,
) -> None:
    each, mean = layers_of(clip(4, batch))
    assert shelf_of(4, batch).alike([each, mean]) == [[each], [mean]]
    assert shelf_of(1, batch).alike([each, mean]) == [[each, mean]]

    first = shelf_of(4, batch)
    first.note(each, KEEP, 4.0)
    first.note(mean, KEEP, 1.0)
    kept = first.new(drift=1.0)
    again, longer, single = (shelf_of(frames, batch, kept) for frames in (4, 8, 1))
    assert [again.known(layer, KEEP) for layer in (each, mean)] == [4.0, 1.0]
    assert [longer.known(layer, KEEP) for layer in (each, mean)] == [None, 1.0]
    assert [single.known(layer, KEEP) for layer in (each, mean)] == [1.0, 1.0]


def test_what_earlier_versions_kept_is_found_where_nothing_is_folded() -> None:
    """A change of the key would have everything measured again, on every machine."""
    model = network(blocks=1)
    layers = layers_of(model)
    shelf = Shelf(model, layers, FEEDS, {})
    shelf.note(layers[0], KEEP, 1.0)
    assert list(shelf.new(drift=1.0)) == ["56fe73e9948788efc06dcc660d883e50"]

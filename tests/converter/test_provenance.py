"""What a converted model says of where it came from."""

from __future__ import annotations

import json

import onnx
from onnx.parser import parse_model

from converter.outcome import LayerOutcome
from converter.provenance import LARGEST_PLAN, PREFIX, mark


def model(**properties: str) -> onnx.ModelProto:
    made = parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N] x) => (float[N] y) { y = Relu(x) }'
    )
    onnx.helper.set_model_props(made, properties)
    return made


def layer(name: str, scheme: str, *ranks: int, support: int = 0) -> LayerOutcome:
    return LayerOutcome(name, "Conv", (1, 1), "relu", scheme, ranks, support, 4, 2, 4, 2)


def props(marked: onnx.ModelProto) -> dict[str, str]:
    return {each.key: each.value for each in marked.metadata_props}


def test_plan_and_source_stand_beside_what_was_there() -> None:
    marked = model(classes="ten", **{f"{PREFIX}plan": "old", f"{PREFIX}other": "kept"})
    mark(
        marked,
        "abc",
        [layer("a", "kept"), layer("b", "tucker", 2, 3), layer("c", "sparse", support=5)],
    )
    found = props(marked)
    assert list(found)[:2] == ["classes", f"{PREFIX}other"]
    assert len(marked.metadata_props) == 5
    assert found["classes"] == "ten"
    assert found[f"{PREFIX}source_sha256"] == "abc"
    assert found[f"{PREFIX}version"]
    assert json.loads(found[f"{PREFIX}plan"]) == {
        "b": {"scheme": "tucker", "ranks": [2, 3], "support": 0},
        "c": {"scheme": "sparse", "ranks": [], "support": 5},
    }


def test_marking_twice_changes_nothing() -> None:
    once, twice = model(), model()
    for each in (once, twice, twice):
        mark(each, "abc", [layer("b", "channel", 2)])
    assert once == twice


def test_a_long_plan_is_counted() -> None:
    marked = model()
    many = [layer(f"{'long' * 100}{index}", "channel", 2) for index in range(300)]
    mark(marked, "abc", [*many, layer("b", "spatial", 2)])
    plan = props(marked)[f"{PREFIX}plan"]
    assert len(plan) <= LARGEST_PLAN
    assert json.loads(plan) == {"layers": {"channel": 300, "spatial": 1}}

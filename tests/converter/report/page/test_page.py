"""The page: what it says, that it says nothing else, and that no report can break it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converter.errors import ConfigError
from converter.report.page import render_page, write_page

Report = dict[str, Any]
EMPTY = {"area", "br", "img", "input", "link", "meta", "wbr", "circle", "line", "polyline", "rect"}


class Document(HTMLParser):
    """The elements of a page with their attributes, its text, and whether tags are balanced."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in EMPTY:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def heading(page: str) -> str:
    found = re.search(r"<h1>(.*?)</h1>", page, re.DOTALL)
    assert found is not None
    return Document(found[0]).text


# ---- the verdict


def test_the_verdict_of_a_conversion_and_its_validation(run: Report, validation: Report) -> None:
    page = render_page(run, validation=validation)
    assert heading(page) == "3.9× faster at batch 32, 9.0× smaller"
    assert (
        "Top-1 accuracy 87.9 → 87.4 % on 5,000 images. Timed on CPU, 2 threads."
        in Document(page).text
    )


def test_the_verdict_of_a_conversion_alone(run: Report) -> None:
    page = render_page(run)
    assert heading(page) == "3.0× faster at batch 32, 3.0× fewer parameters"
    assert "compare the two with twofold validate" in Document(page).text


@pytest.mark.parametrize(
    ("agreement", "said"),
    [
        (0.984, "The same best class on 98.4 % of"),
        (None, "Outputs are off by 1.3 % of their variance on"),
    ],
)
def test_the_verdict_of_a_conversion_alone_says_how_far_it_was_off(
    run: Report, agreement: float | None, said: str
) -> None:
    run["answers"] = {"error": 0.0132, "agreement": agreement, "images": 250}
    words = Document(render_page(run)).text
    assert f"{said} 250 calibration images: compare the two on others" in words


def test_a_speed_up_within_its_noise_is_none(run: Report) -> None:
    run["latency"] |= {"speedup": 1.04, "low": 0.97, "high": 1.1}
    assert heading(render_page(run)).startswith("As fast as before at batch 32,")
    run["latency"] |= {"speedup": 0.5, "low": 0.45, "high": 0.6}
    assert heading(render_page(run)).startswith("2.0× slower at batch 32,")


def test_nothing_replaced_is_said_so(kept_only: Report) -> None:
    page = render_page(kept_only)
    assert heading(page) == "No layer was replaced"
    assert "depthwise" in Document(page).text


def test_a_model_that_gives_nan_is_not_praised(validation: Report) -> None:
    validation["finite"] = False
    assert "do not use it" in Document(render_page(validation)).text


def test_gates_stand_on_top(run: Report, judged: Callable[..., Report]) -> None:
    words = Document(render_page(run, validation=judged())).text
    assert "1 of 2 gates failed" in words
    assert words.index("1 of 2 gates failed") < words.index("faster at batch 32")
    assert re.search(
        r"max_accuracy_drop\s+✗ failed\s+0.5 points\s+at most 0.1 points\s+too much", words
    )
    assert "1 of 1 gates passed" in Document(render_page(run, validation=judged(keep=1))).text
    assert "gate" not in Document(render_page(run)).text


def test_a_gate_that_does_not_say_that_it_passed_has_failed(run: Report) -> None:
    page = render_page(
        run, validation={"format": "twofold-verdict-1", "gates": [{"name": "odd", "passed": "yes"}]}
    )
    assert "1 of 1 gates failed" in Document(page).text


def test_a_search_says_what_was_lost(run: Report) -> None:
    drop = {"measure": "accuracy", "points": 0.42, "standard_error": 0.1, "images": 500}
    probe = {
        "asked": 3.0,
        "effect": 0.01,
        "macs_reduction": 3.1,
        "latency": run["latency"],
        "drop": drop,
    }
    run["search"] = {
        "max_drop": 0.5,
        "images": "500 images of val",
        "probes": [
            {**probe, "within": True},
            {**probe, "within": False, "drop": {**drop, "points": 2.0}},
        ],
    }
    words = Document(render_page(run)).text
    assert "0.42 points of accuracy lost on 500 images, 500 images of val" in words
    assert "2.00 points of accuracy lost, not within" in words


def test_a_prediction_at_another_pace_is_told_from_a_wrong_one(run: Report) -> None:
    run["latency"].update(off=0.68, pace=1.66, off_at_pace=0.012)
    words = Document(render_page(run)).text
    assert (
        "The predicted latency of the result was off by +68 %: the plan, timed again, read 1.66 times its "
        "speed of the planning, and at that pace it was off by +1 %."
    ) in words


# ---- the verdict where the model was quantized


def test_the_verdict_is_that_of_the_quantized_model(quantized: Report) -> None:
    page = render_page(quantized)
    assert (
        heading(page)
        == "7.7× faster at batch 32, 3.0× fewer parameters, 3.0× smaller than in float"
    )
    words = Document(page).text
    assert (
        "The same best class on 95.5 % of 200 calibration images: compare the two on others with twofold "
        "validate. Timed on CPU, 1 thread."
    ) in words
    assert re.search(
        r"latency, batch 32 before 12\.3 ms → , after 1\.60 ms speed-up 7\.70 \(7\.50 to 7\.90\)",
        words,
    )
    assert re.search(
        r"file size, float to int8 before 3\.00 MiB → , after 1\.00 MiB ÷ 3\.00", words
    )
    assert "speed-up 3.00" not in words
    assert "measured: 3.00 times, before it was quantized" in words
    assert "The predicted latency of the model in float was off by" in words
    assert re.search(r"Quantization written the quantized model precision int8", words)
    assert "ranges were taken from 1800 of 2000 images" in words


def test_where_only_the_quantization_helped_the_verdict_is_not_that_nothing_did(
    kept_only: Report, quantized: Report
) -> None:
    kept_only["quantization"] = quantized["quantization"]
    assert heading(render_page(kept_only)) == "7.7× faster at batch 32, 3.0× smaller"
    kept_only["quantization"]["latency"] = None
    assert heading(render_page(kept_only)) == "3.0× smaller"
    kept_only["quantization"]["bytes_after"] = 4 * 2**20
    assert heading(render_page(kept_only)) == "1.3× larger"
    kept_only["quantization"]["shipped"] = False
    assert heading(render_page(kept_only)) == "No layer was replaced"


def test_a_quantized_model_that_was_not_timed_has_not_the_speed_up_of_the_float_one(
    quantized: Report,
) -> None:
    quantized["quantization"]["latency"] = None
    page = render_page(quantized)
    assert heading(page) == "3.0× fewer parameters, 3.0× smaller than in float"
    assert "Timed on" not in Document(page).text


def test_a_quantized_model_that_was_not_written_leaves_the_verdict_alone(
    run: Report, quantized: Report
) -> None:
    quantized["quantization"] |= {"shipped": False, "notes": ["slower, so not written"]}
    page = render_page(quantized)
    assert heading(page) == heading(render_page(run))
    words = Document(page).text
    assert "speed-up 3.00 (2.90 to 3.10)" in words
    assert "file size" not in words
    assert "The predicted latency of the result" in words
    assert "written the float model, and not the quantized one" in words
    assert "slower, so not written" in words


def test_a_validation_has_the_last_word_on_the_quantized_model(
    quantized: Report, validation: Report
) -> None:
    page = render_page(quantized, validation=validation)
    assert heading(page) == "3.9× faster at batch 32, 9.0× smaller"
    words = Document(page).text
    assert "Top-1 accuracy 87.9 → 87.4 % on 5,000 images." in words
    assert "file size before 9.00 MiB" in words
    assert "speed-up 7.70" not in words
    del validation["latencies"][1]
    assert heading(render_page(quantized, validation=validation)).startswith(
        "7.7× faster at batch 32,"
    )


def test_a_quantized_model_that_a_search_found_lost_what_is_tolerated_at_most(
    quantized: Report,
) -> None:
    drop = {"measure": "accuracy", "points": 0.42, "standard_error": 0.1, "images": 500}
    quantized["search"] = {
        "max_drop": 0.5,
        "images": "500 images of val",
        "probes": [{"effect": 0.01, "macs_reduction": 3.1, "drop": drop, "within": True}],
    }
    words = Document(render_page(quantized)).text
    assert "At most 0.50 points of accuracy lost on 500 images, 500 images of val." in words
    del quantized["search"]["max_drop"]
    assert "The same best class on 95.5 % of" in Document(render_page(quantized)).text


def test_a_quantized_model_that_is_no_classifier_has_its_error(quantized: Report) -> None:
    quantized["quantization"]["after"]["agreement"] = None
    words = Document(render_page(quantized)).text
    assert "Outputs are off by 1.2 % of their variance on 200 calibration images" in words


# ---- what else it shows


def test_every_layer_has_its_numbers(run: Report) -> None:
    words = Document(render_page(run)).text
    for part in ("/block1/conv1/Conv", "64×32×3×3", "sparse + channel, rank 16, 8 channels"):
        assert part in words
    for part in (
        "18.9 M",
        "6.29 M",
        "3.00",
        "2.50",
        "0.90",
        "1.23 %",
        "iteration limit, 120 iterations",
    ):
        assert part in words
    assert "its weights are shared" in words
    assert "the memory bound halved the patches" in words


def test_a_front_that_was_not_timed_does_not_say_so(front: Report) -> None:
    front["settings"] = {"target": {"runtime": {"provider": "cpu", "threads": 2}}}
    assert "Timed on CPU, 2 threads." in Document(render_page(front)).text
    for point in front["points"]:
        point["speedup"] = None
    assert "Timed on" not in Document(render_page(front)).text


def test_the_front_has_the_chosen_point_and_a_table(run: Report, front: Report) -> None:
    page = render_page(run)
    marks = re.findall(r'<circle class="(\w+)" cx', page)
    assert (
        marks.count("predicted") == 4 + 1
    )  # the original loses nothing and has no place; the legend
    assert marks.count("chosen") == marks.count("measured") == 1 + 1
    assert re.search(r"4\.20 2\.86 3\.50 2\.50 1\.2 % chosen", Document(page).text)
    words = Document(render_page(front)).text
    assert "measured: 3.00 times, 0.42 points of accuracy lost" in words
    assert "500 images of val" in words
    assert heading(render_page(front)) == "5.0× faster at most, as predicted"


def test_worst_images_with_both_answers(validation: Report) -> None:
    page = render_page(validation)
    words = Document(page).text
    assert "original cat ✓ right converted dog ✗ wrong error 71 % cat/0007.jpg" in words
    assert "converted no number error not finite image 9" in words
    assert page.count("data:image/jpeg;base64,/9j/") == 1


def test_a_long_trace_is_thinned_out(run: Report) -> None:
    run["layers"][0]["trace"] *= 10
    page = render_page(run)
    (line,) = re.findall(r'class="primal" points="([^"]*)"', page)
    assert len(line.split()) == 80


def test_the_page_of_a_file_is_that_of_what_it_was_made_of(
    run: Report, validation: Report, tmp_path: Path
) -> None:
    write_page(tmp_path / "page.html", json.loads(json.dumps(run)), validation=validation)
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == render_page(
        run, validation=validation
    )
    assert [each.name for each in tmp_path.iterdir()] == ["page.html"]


def test_a_validation_of_other_models_is_refused(run: Report, validation: Report) -> None:
    validation["converted"]["digest"] = "00" * 32
    with pytest.raises(ConfigError, match="another converted model"):
        render_page(run, validation=validation)
    with pytest.raises(ConfigError, match="beside it one of validate"):
        render_page(run, validation=run)


# ---- it is one file, and trusts nothing


def test_nothing_is_loaded_and_only_its_own_script_runs(run: Report, validation: Report) -> None:
    page = render_page(run, validation=validation)
    document = Document(page)
    policy = next(
        attributes["content"] or ""
        for name, attributes in document.elements
        if name == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    for _, attributes in document.elements:
        assert not any(name.startswith("on") or name == "style" for name in attributes)
        for name in ("src", "href", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/jpeg;base64,"))
    assert "http" not in re.sub(r"http-equiv", "", page)


HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7*7 }}\x1b[2J\u202e"


def _poisoned(value: Any) -> Any:
    """Put the hostile text in place of every text but the formats."""
    if isinstance(value, dict):
        return {
            (key if key in KEYS else HOSTILE): item if key == "format" else _poisoned(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_poisoned(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


KEYS: set[str] = set()


def _keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value) | {key for item in value.values() for key in _keys(item)}
    return {key for item in value for key in _keys(item)} if isinstance(value, list) else set()


def test_texts_are_texts_whatever_they_hold(
    quantized: Report, validation: Report, judged: Callable[..., Report]
) -> None:
    KEYS.update(_keys(quantized) - {"processor", "macs", "budget"}, _keys(judged(validation)))
    page = render_page(_poisoned(quantized), validation=_poisoned(judged(validation)))
    document = Document(page)
    assert document.count("script") == 1
    assert document.count("img") == 0  # the hostile picture is none
    assert not any(name.startswith("on") for _, given in document.elements for name in given)
    assert "<script>alert(1)</script>" in document.text.replace("/ ", "/")
    assert "{{ 7*7 }}" in document.text
    assert "\x1b" not in page
    assert "\u202e" not in page


ANYTHING = [
    *(None, "", "x", -1, 0, 1e300, float("nan"), 10**400, True),
    *([], {}, [[]], [{}], {"a": 1}),
]


@pytest.mark.parametrize("value", ANYTHING)
def test_any_field_may_be_anything(run: Report, validation: Report, value: Any) -> None:
    for report in (run, validation):
        for path in _paths(report):
            changed = _with(report, path, value)
            both = {"validation": changed} if report is validation else {}
            if (
                path not in (("format",), ("source_digest",), ("out_digest",))
                and "digest" not in path
            ):
                render_page(run if both else changed, **both)


@pytest.mark.parametrize("value", ANYTHING)
def test_any_field_of_a_quantization_may_be_anything(quantized: Report, value: Any) -> None:
    for path in _paths(quantized["quantization"], ("quantization",)):
        Document(render_page(_with(quantized, path, value)))


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands: every key, and the first entry of every list."""
    found = [path] if path else []
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value[:1])
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        if key not in ("passes", "stages", "machine", "settings", "calibration"):
            found += _paths(item, (*path, key))
    return found


def _with(report: Report, path: tuple[Any, ...], value: Any) -> Report:
    changed = deepcopy(report)
    at: Any = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return changed


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_missing_fields_are_missed_by_nobody(
    run: Report, validation: Report, data: st.DataObject
) -> None:
    changed = [
        {key: item for key, item in report.items() if key == "format" or data.draw(st.booleans())}
        for report in (run, validation)
    ]
    Document(render_page(changed[0], validation=changed[1]))
    Document(render_page(changed[1]))


def test_a_report_of_nothing() -> None:
    for name in ("twofold-conversion-2", "twofold-front-1", "twofold-validation-1"):
        assert heading(render_page({"format": name})) == "Nothing was measured"


def test_many_layers_make_a_page_of_bounded_size(large: Report) -> None:
    page = render_page(large)
    document = Document(page)
    assert (
        document.count("tbody") == 150 + 50 + 1
    )  # layers, logs of their solvers, the front's table
    assert len(page) < 2**21

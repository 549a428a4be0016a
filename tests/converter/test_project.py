"""twofold.toml: what it may hold, how it is read, and what a first one says."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from onnx import numpy_helper
from onnx.parser import parse_model

import converter
from converter.cli import project_settings
from converter.config import Gates
from converter.errors import ConfigError
from converter.project import LARGEST, read_project, schema, starter
from tools.schema import PUBLISHED

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SETTINGS = project_settings()


def read(folder: Path, text: str) -> dict[str, object]:
    path = folder / "twofold.toml"
    path.write_text(text, encoding="utf-8")
    return read_project(path, SETTINGS)


def test_values_as_if_they_were_typed(tmp_path: Path) -> None:
    values = read(
        tmp_path,
        """
        model = "models/a.onnx"
        calib = "/images"
        schemes = ["channel", "tucker"]
        [budget]
        speedup = 2
        [preprocessing]
        size = 224
        mean = [0.5, 0.25, 1]
        [running]
        timing = false
        [gates]
        min_speedup = 1.8
        max_file_mb = 3
        data = "val"
        """,
    )
    assert values == {
        "model": str(tmp_path / "models/a.onnx"),  # relative to the file
        "calib": "/images",
        "schemes": "channel,tucker",
        "speedup": 2,
        "size": 224,
        "mean": "0.5,0.25,1",
        "timing": False,
        "data": str(tmp_path / "val"),
        "gate": ["min_speedup=1.8", "max_file_mb=3"],
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('modle = "a"', r"no key 'modle'; did you mean 'model'\?"),
        (
            "[gates]\nmin_spedup = 2",
            r"no key 'min_spedup' in \[gates\]; did you mean 'min_speedup'",
        ),
        ("speedup = 2", r"'speedup' belongs into \[budget\]"),
        ('[budget]\nmodel = "a"', r"'model' in \[budget\] belongs to the top"),
        ("pachtes = 2", r"did you mean 'patches', into \[running\]\?"),
        ("[zzz]", "give one of model"),
        ("model = 3", "model is 3, and a text in quotes is wanted"),
        ('[running]\nthreads = "2"', "running.threads is '2', and a whole number is wanted"),
        ("[running]\nthreads = 2.5", "a whole number is wanted"),
        ("[gates]\nmin_speedup = true", "a number is wanted"),
        ('[running]\nprovider = "tpu"', "one of cpu, cuda is wanted"),
        ("[preprocessing]\nmean = [true]", "preprocessing.mean is True"),
        ("[preprocessing]\nmean = 3", "a text in quotes or a list is wanted"),
        ("budget = 3", "budget is 3, and a table is wanted"),
        ("model = 1979-05-27", "a text in quotes is wanted"),
        ("model = ", "no TOML"),
        ("a = " + "[" * 100_000, "no TOML"),
        ("#" * (LARGEST + 1), "larger than"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        read(tmp_path, text)
    assert "twofold.toml" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_file_and_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="twofold init"):
        read_project(tmp_path / "twofold.toml", SETTINGS)
    (tmp_path / "twofold.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="no TOML"):
        read_project(tmp_path / "twofold.toml", SETTINGS)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "twofold.toml"
    path.write_bytes(content)
    with contextlib.suppress(ConfigError):
        assert isinstance(read_project(path, SETTINGS), dict)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
NAMES = [each.name for each in SETTINGS] + [each.table for each in SETTINGS]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), JSON, max_size=4))
def test_what_the_schema_refuses_is_refused_in_one_sentence(
    tmp_path: Path, content: dict[str, object]
) -> None:
    fits = Draft202012Validator(schema(SETTINGS)).is_valid(content)
    path = tmp_path / "twofold.toml"
    try:
        text = "\n".join(f"{_toml(key)} = {_toml(value)}" for key, value in content.items())
    except TypeError:
        return  # JSON has null, TOML has not
    path.write_text(text, encoding="utf-8")
    try:
        read_project(path, SETTINGS)
        assert fits
    except ConfigError:
        assert not fits or "no TOML" in text


def _toml(value: object) -> str:
    if value is None:
        raise TypeError
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        inside = (f"{_toml(key)} = {_toml(item)}" for key, item in value.items())
        return f"{{{', '.join(inside)}}}"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


# The schema --------------------------------------------------------------------------------------


def test_the_published_schema_is_current() -> None:
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    assert published == schema(SETTINGS), "run `make schema`"


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(schema(SETTINGS))
    assert all(each.description for each in SETTINGS)
    assert {each.name for each in SETTINGS if each.gate} == set(Gates.__dataclass_fields__)


# A first file ------------------------------------------------------------------------------------


def network(folder: Path, shape: str = "N, 1, 8, 8") -> Path:
    model = parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[{shape}] image) => (float[N, 4, h, w] y) '
        "{ y = Conv(image, w) }"
    )
    weight = np.ones((4, 1, 3, 3), np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    path = folder / "net.onnx"
    onnx.save(model, path)
    return path


def test_a_first_file_is_read(tmp_path: Path) -> None:
    inspection = converter.inspect(network(tmp_path))
    text = starter(inspection, "net.onnx", SETTINGS)
    values = read(tmp_path, text)
    assert values["model"] == str(tmp_path / "net.onnx")
    assert values["out"] == str(tmp_path / "net-fast.onnx")
    assert values["channels"] == "gray"
    assert values["gate"] == ["min_speedup=1.5", "min_agreement=97.0"]
    assert text.startswith("#:schema ./twofold.schema.json\n")
    assert "input image: float32 N×1×8×8" in text
    assert "1 of 1 layers" in text


def test_a_first_file_lists_all_settings_with_their_defaults(tmp_path: Path) -> None:
    text = starter(converter.inspect(network(tmp_path)), "net.onnx", SETTINGS)
    whole = re.sub(r"^# (\w+ = .+)$", r"\1", text, flags=re.MULTILINE)
    content = tomllib.loads(whole)
    Draft202012Validator(schema(SETTINGS)).validate(content)
    for each in SETTINGS:
        assert re.search(rf"^(# )?{each.name} =", text, re.MULTILINE), each.name
        if each.default is not None:
            table = content[each.table] if each.table else content
            assert each.name in table


def test_names_from_the_model_stay_comments(tmp_path: Path) -> None:
    path = network(tmp_path)
    model = onnx.load(path)
    model.graph.input[0].name = model.graph.node[0].input[0] = 'a\nmodel = "evil"'
    onnx.save(model, path)
    values = read(tmp_path, starter(converter.inspect(path), 'n"et.onnx', SETTINGS))
    assert values["model"] == str(tmp_path / 'n"et.onnx')

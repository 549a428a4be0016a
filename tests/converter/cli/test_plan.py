"""`twofold plan`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from converter.config import SCHEME_NAMES
from tests.converter.cli.conftest import Called, Planned, Run


def test_plan_takes_what_convert_takes(
    twofold: Run, planned: Planned, called: Called, net: Path, pictures: Path, tmp_path: Path
) -> None:
    shared = (
        *("--calib", pictures, "--preset", "cifar10", "--images", 5, "--calib-batch", 2),
        *("--schemes", "spatial", "--threads", 1, "--batch", 8, "--seed", 3, "--no-timing"),
    )
    assert twofold("plan", net, *shared, "--val", tmp_path, "--verify", 3).code == 0
    assert planned.positional == (net, pictures)
    assert (planned.named.pop("val"), planned.named.pop("verify")) == (tmp_path, 3)
    twofold("convert", net, *shared, "--out", tmp_path / "s.onnx", "--macs", 2)
    for named in (planned.named, called.named):
        del named["progress"]
    assert planned.named.items() <= called.named.items()
    own = {"max_drop", "val", "recovery", "recover_images", "quantization"}
    assert called.named.keys() - planned.named.keys() == own


def test_plan_writes_what_it_is_asked_for(
    twofold: Run, planned: Planned, net: Path, pictures: Path, tmp_path: Path
) -> None:
    report, picture = tmp_path / "front.json", tmp_path / "front.png"
    ended = twofold(
        *("plan", net, "--calib", pictures, "--json", report, "--picture", picture),
    )
    assert ended.code == 0
    assert planned.named["verify"] == 2
    assert planned.named["solver"].schemes == SCHEME_NAMES
    assert json.loads(report.read_text(encoding="utf-8"))["format"] == "twofold-front-1"
    with Image.open(picture) as image:
        assert image.format == "PNG"
    for part in ("2.00", "1 %", str(report), str(picture)):
        assert part in ended.out


def test_plan_quietly(twofold: Run, planned: Planned, net: Path, pictures: Path) -> None:
    ended = twofold("plan", net, "--calib", pictures, "-q")
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    assert planned.positional


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--picture", "front.jpg"), ".svg"),
        (("--picture", "none/front.png"), "none"),
        (("--json", "net.onnx"), "overwrite"),
        (("--json", "a.png", "--picture", "a.png"), "overwrite"),
        (("--batch", "0"), "batch 0"),
    ],
)
def test_plans_that_make_no_sense(
    twofold: Run,
    planned: Planned,
    net: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    sentence: str,
) -> None:
    monkeypatch.chdir(net.parent)
    before = sorted(net.parent.rglob("*"))
    ended = twofold("plan", "net.onnx", "--calib", pictures, *options)
    assert ended.code == 2
    assert sentence in ended.err
    assert ended.err.count("\n") == 1
    assert planned.positional == ()
    assert sorted(net.parent.rglob("*")) == before

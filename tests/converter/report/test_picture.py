"""The picture of a front: what is drawn, where, and that a file appears whole or not at all."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from converter.errors import ConfigError
from converter.front import Front, FrontPoint, Verified
from converter.outcome import Drop, Latency
from converter.report.picture import check_picture, draw_front

LATENCY = Latency("cpu", 2, 1, 8.0, 4.0, 2.0, 1.9, 2.2, 4.1)
POINTS = (
    FrontPoint(0.0, 1.0, 1.0, 8.0, 1.0, {}),
    FrontPoint(0.004, 2.2, 2.0, 4.1, 1.95, {}),
    FrontPoint(0.03, 3.5, 3.1, 2.6, 3.1, {}),
    FrontPoint(0.2, 7.0, 4.1, 1.5, 5.3, {}),
)
FRONT = Front(
    source=Path("net$2.onnx"),
    points=POINTS,
    judged_on=None,
    stages=(),
    notes=(),
    settings={"target": {"batch": 4, "runtime": {"provider": "cpu", "threads": 2}}},
    calibration={},
    machine={},
    source_digest="",
)


def verified(drop: Drop, latency: Latency | None = LATENCY) -> Front:
    done = Verified(latency, 2.1, 1.9, drop)
    return replace(FRONT, points=(POINTS[0], replace(POINTS[1], verified=done), *POINTS[2:]))


def untimed(front: Front) -> Front:
    points = tuple(replace(each, ms=None, speedup=None) for each in front.points)
    return replace(front, points=points)


def texts(path: Path) -> str:
    """What matplotlib notes of its texts in an SVG: one comment each."""
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".svg"])
def test_a_picture_is_drawn(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"front{suffix}"
    draw_front(verified(Drop("accuracy", 0.3, 0.2, 100)), path)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    if suffix == ".svg":
        assert ET.parse(path).getroot().tag.endswith("svg")  # written just now
    else:
        with Image.open(path) as image:
            assert image.width > 1000
            assert len(np.unique(np.asarray(image.convert("L")))) > 10


def test_the_same_front_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        draw_front(verified(Drop("agreement", 3.0, 1.0, 100)), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize(
    ("front", "wanted", "unwanted"),
    [
        (FRONT, "<!-- times faster than the original -->", "carried out"),
        (untimed(FRONT), "<!-- times fewer multiply-accumulates -->", "carried out"),
        (verified(Drop("accuracy", -0.3, 0.2, 9)), "<!-- accuracy lost, points", "error of the output, %"),
        (verified(Drop("agreement", 3.0, 1.0, 9)), "<!-- agreement lost, points", "error of the output, %"),
        (verified(Drop("output error", 2.0, None, 9)), "<!-- error of the output, % -->", "lost"),
        (untimed(verified(Drop("accuracy", 1, 1, 9), None)), "carried out", "times faster"),
        (verified(Drop("accuracy", 1, 1, 9)), "batch 4, cpu, 2 threads", "fewer"),
    ],
)  # fmt: skip
def test_what_the_axes_say(tmp_path: Path, front: Front, wanted: str, unwanted: str) -> None:
    draw_front(front, tmp_path / "front.svg")
    assert wanted in texts(tmp_path / "front.svg")
    assert unwanted not in texts(tmp_path / "front.svg")


def test_a_drop_without_end_does_not_end_the_picture(tmp_path: Path) -> None:
    draw_front(verified(Drop("accuracy", float("inf"), 0.2, 9)), tmp_path / "front.svg")
    assert (tmp_path / "front.svg").is_file()


def test_names_and_places_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.png nor in \.svg"):
        check_picture(tmp_path / "front.jpg")
    with pytest.raises(ConfigError, match="cannot be written"):
        draw_front(FRONT, tmp_path / "none" / "front.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        draw_front(FRONT, tmp_path / "folder.png")
    assert [each.name for each in tmp_path.iterdir()] == ["folder.png"]

"""`twofold inspect`."""

from __future__ import annotations

import json
from pathlib import Path

from tests.converter.cli.conftest import Run


def test_inspect(twofold: Run, net: Path, tmp_path: Path) -> None:
    report = tmp_path / "net.json"
    ended = twofold("inspect", net, "--json", report)
    assert ended.code == 0
    assert "Gemm" in ended.out
    assert "4×3" in ended.out
    content = json.loads(report.read_text(encoding="utf-8"))
    assert content["layers"][0]["macs"] == 12


def test_inspect_does_not_overwrite_the_model(twofold: Run, net: Path) -> None:
    before = net.read_bytes()
    ended = twofold("inspect", net, "--json", net)
    assert ended.code == 2
    assert net.read_bytes() == before

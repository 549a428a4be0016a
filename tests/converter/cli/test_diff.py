"""`twofold diff`."""

from __future__ import annotations

import json
from pathlib import Path

from tests.converter.cli.conftest import Called, Run


def test_diff(twofold: Run, called: Called, net: Path, pictures: Path, tmp_path: Path) -> None:
    del called
    for name in ("a", "b"):
        twofold(
            "convert", net, "--calib", pictures, "--out", tmp_path / f"{name}.onnx", "--macs", 2
        )
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    same = twofold("diff", first, second, "--exit-code", "--json", tmp_path / "d.json")
    assert same.code == 0
    assert "are the same" in same.out
    assert json.loads((tmp_path / "d.json").read_text(encoding="utf-8"))["alike"] is True
    report = json.loads(second.read_text(encoding="utf-8"))
    second.write_text(json.dumps({**report, "out_digest": "other"}), encoding="utf-8")
    assert twofold("diff", first, second).code == 0
    other = twofold("diff", first, second, "--exit-code")
    assert other.code == 1
    assert "other" in other.out
    assert twofold("diff", first, net).code == 2

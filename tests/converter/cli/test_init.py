"""`twofold init`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.converter.cli.conftest import Run


def test_init(twofold: Run, net: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ended = twofold("init", net)
    assert ended.code == 0
    path, rules = tmp_path / "twofold.toml", tmp_path / "twofold.schema.json"
    assert str(path) in ended.out
    assert 'model = "net.onnx"' in path.read_text(encoding="utf-8")
    assert json.loads(rules.read_text(encoding="utf-8"))["title"] == "twofold.toml"

    path.write_text("mine", encoding="utf-8")
    refused = twofold("init", net)
    assert refused.code == 2
    assert "--force" in refused.err
    assert path.read_text(encoding="utf-8") == "mine"
    assert twofold("init", net, "--force").code == 0

    (tmp_path / "ci").mkdir()
    monkeypatch.chdir(tmp_path)
    assert twofold("init", "net.onnx", "--config", "ci/other.toml").code == 0
    text = (tmp_path / "ci" / "other.toml").read_text(encoding="utf-8")
    assert 'model = "../net.onnx"' in text

    refused = twofold("init", "net.onnx", "--config", ".")
    assert refused.code == 2
    assert "is a folder" in refused.err

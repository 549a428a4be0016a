"""`twofold check`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from converter.cli.gating import SUMMARY
from tests.converter.cli.conftest import Run

GATED = ("--seconds", "0.01", "--threads", "1", "--preset", "unit")


def test_check(
    twofold: Run,
    net: Path,
    recoloured: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    summary, report, junit = (tmp_path / name for name in ("s.md", "v.json", "j.xml"))
    monkeypatch.setenv(SUMMARY, str(summary))
    monkeypatch.chdir(tmp_path)
    gates = ("--gate", "max_accuracy_drop=30", "--gate", "max_file_mb=1")
    ended = twofold(
        *("check", recoloured, "--against", net, "--data", pictures, *gates, *GATED),
        *("--json", report, "--junit", junit),
    )
    assert ended.code == 1
    assert "1 of 3 gates failed; max_accuracy_drop failed: 40 points" in ended.err
    assert "max_file_mb" in ended.out
    assert "1 of 3 gates failed" in summary.read_text(encoding="utf-8")
    assert json.loads(report.read_text(encoding="utf-8"))["passed"] is False
    assert 'failures="1"' in junit.read_text(encoding="utf-8")

    passing = ("--gate", "max_accuracy_drop=40", "--quiet")
    ended = twofold("check", recoloured, "--against", net, "--data", pictures, *passing, *GATED)
    assert (ended.code, ended.out, ended.err) == (0, "", "")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--data", "pictures"), "no gate was given"),
        (("--gate", "max_file_mb=1"), "no images were given"),
        (("--data", "pictures", "--gate", "max_file_mb"), "max_file_mb=1.8"),
        (("--data", "pictures", "--gate", "max_size=1"), "there is no gate 'max_size'"),
        (("--data", "pictures", "--gate", "max_file_mb=1", "--json", "net.onnx"), "overwrite"),
        (
            ("--data", "pictures", "--gate", "max_file_mb=1", "--config", "none.toml"),
            "none.toml cannot be read",
        ),
    ],
)
def test_checks_that_make_no_sense(
    twofold: Run,
    net: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    sentence: str,
) -> None:
    monkeypatch.chdir(net.parent)
    ended = twofold("check", "net.onnx", "--against", "net.onnx", *options)
    assert ended.code == 2
    assert sentence in ended.err
    assert ended.err.count("\n") == 1
    assert pictures.is_dir()

"""Pages: `twofold report`, and `--html` of the commands whose reports it takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.converter.cli.conftest import QUICK, Called, Run


@pytest.mark.usefixtures("called")
def test_pages_of_a_conversion_and_a_validation(
    twofold: Run, net: Path, pictures: Path, tmp_path: Path
) -> None:
    out, page = tmp_path / "s.onnx", tmp_path / "s.html"
    ended = twofold("convert", net, "--calib", "x.npy", "--out", out, "--macs", 2, "--html", page)
    assert ended.code == 0
    assert str(page) in ended.out
    assert "No layer was replaced" in page.read_text(encoding="utf-8")

    saved, seen = tmp_path / "v.json", tmp_path / "v.html"
    options = (*QUICK, "--json", saved, "--html", seen)
    assert twofold("validate", net, net, "--data", pictures, *options).code == 0
    text = seen.read_text(encoding="utf-8")
    assert "Top-1 accuracy 80.0 → 80.0 % on 5 images" in text
    assert text.count("data:image/jpeg;base64,") == 5

    # the same from what was saved
    again = tmp_path / "again.html"
    ended = twofold("report", saved, "--out", again)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == f"written     {again}\n"
    assert again.read_text(encoding="utf-8") == text

    both = tmp_path / "both.html"
    ended = twofold("report", out.with_suffix(".json"), "--validation", saved, "--out", both, "-q")
    assert (ended.code, ended.out) == (0, "")
    assert "80.00 %" in both.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("report", "net.onnx", "--out", "a.html"), "is not JSON"),
        (("report", "none.json", "--out", "a.html"), "cannot be read"),
        (("report", "old.json", "--out", "a.html"), "has the format 'twofold-conversion-1'"),
        (("report", "old.json", "--out", "old.json"), "overwrite"),
        (("report", "old.json", "--out", "none/a.html"), "none"),
        (
            ("validate", "net.onnx", "net.onnx", "--data", "x.npy", "--html", "net.onnx"),
            "overwrite",
        ),
        (
            (
                *("convert", "net.onnx", "--calib", "x.npy", "--macs", "2"),
                *("--out", "s.onnx", "--html", "s.json"),
            ),
            "overwrite",
        ),
    ],
)
def test_pages_that_make_no_sense(
    twofold: Run,
    called: Called,
    net: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    sentence: str,
) -> None:
    monkeypatch.chdir(net.parent)
    Path("old.json").write_text('{"format": "twofold-conversion-1"}', encoding="utf-8")
    before = sorted(net.parent.rglob("*"))
    ended = twofold(*arguments)
    assert ended.code == 2
    assert sentence in ended.err
    assert ended.err.count("\n") == 1
    assert sorted(net.parent.rglob("*")) == before
    assert called.positional == ()

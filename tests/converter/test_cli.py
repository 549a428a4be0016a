"""The program as it is typed: options to settings, exit codes, what goes where on the terminal."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from PIL import Image

import converter
from converter import cli
from converter.config import (
    PRESETS,
    SCHEME_NAMES,
    Budget,
    CalibrationSettings,
    QuantizationSettings,
    Runtime,
    SolverSettings,
    Target,
)
from converter.errors import (
    CalibrationError,
    ConfigError,
    ConverterError,
    ModelError,
    SolverError,
    ValidationError,
)
from converter.front import Front, FrontPoint
from converter.outcome import Conversion, LayerOutcome, Stage

NET = """
    <ir_version: 8, opset_import: ["": 17]>
    net (float[batch, 3, 8, 8] image) => (float[batch, 4] scores)
    <float[4, 3] w = {1,0,0, 0,1,0, 0,0,1, 0.5,0.5,0.5}>
    {
        a = GlobalAveragePool (image)
        b = Flatten (a)
        scores = Gemm <transB = 1> (b, w)
    }
"""


@dataclass(frozen=True)
class Ended:
    """How a run of the program ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def twofold(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the program in this process, as the console script does."""

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["twofold", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        printed = capsys.readouterr()
        code = exit_.value.code
        return Ended(code if isinstance(code, int) else int(code is not None), *printed)

    monkeypatch.delenv(cli.DEBUG, raising=False)
    return run


@pytest.fixture
def net(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    onnx.save(onnx.parser.parse_model(NET), path)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Four class folders; the network is right on each, but for one of the last."""
    folder = tmp_path / "pictures"
    colours = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255), "d": (255, 255, 255)}
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), colour).save(folder / name / "1.png")
    Image.new("RGB", (8, 8), colours["a"]).save(folder / "d" / "2.png")
    return folder


class Called:
    """Stands for `converter.convert`: keeps its arguments and returns a small result."""

    def __init__(self) -> None:
        self.positional: tuple[Any, ...] = ()
        self.named: dict[str, Any] = {}
        self.error: BaseException | None = None

    def __call__(self, *positional: Any, **named: Any) -> Conversion:
        self.positional, self.named = positional, named
        if self.error is not None:
            raise self.error
        model, _, out, _ = positional
        layer = LayerOutcome(
            *("fc", "Gemm", (4, 3), "identity", "kept", (), 0, 12, 12, 12, 12), reason="too small"
        )
        return Conversion(
            source=model,
            out=out,
            macs_before=12,
            macs_after=12,
            params_before=12,
            params_after=12,
            layers=(layer,),
            passes=(),
            latency=None,
            stages=(Stage("all", 0.1),),
            notes=("nothing was left to gain",),
            settings={},
            calibration={},
            machine={},
            source_digest="",
            out_digest="",
            peak_memory_mib=1.0,
        )


class Planned(Called):
    """Stands for `converter.plan`."""

    def __call__(self, *positional: Any, **named: Any) -> Front:  # type: ignore[override]  # another result
        self.positional, self.named = positional, named
        return Front(
            source=positional[0],
            points=(
                FrontPoint(0.0, 1.0, 1.0, None, None, {}),
                FrontPoint(0.01, 2.0, 2.0, None, None, {"fc": "sparse s 2"}),
            ),
            judged_on=None,
            stages=(Stage("all", 0.1),),
            notes=(),
            settings={"target": {"batch": 1, "runtime": {"provider": "cpu", "threads": 0}}},
            calibration={},
            machine={},
            source_digest="",
        )


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Planned:
    stand_in = Planned()
    monkeypatch.setattr(converter, "plan", stand_in)
    return stand_in


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Called:
    stand_in = Called()
    monkeypatch.setattr(converter, "convert", stand_in)
    return stand_in


# The program itself --------------------------------------------------------------------------


def test_starting_loads_nothing_slow() -> None:
    slow = (
        "{'torch', 'onnx', 'onnxruntime', 'onnx_graphsurgeon', 'PIL', 'rich.progress', "
        "'matplotlib', 'scipy'}"
    )
    check = f"import sys, converter.cli; print({slow} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_module_is_the_same_program() -> None:
    command = [sys.executable, "-m", "converter", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"twofold {converter.__version__}\n"
    assert done.stderr == ""


@pytest.mark.parametrize(
    "command",
    [(), *((name,) for name in ("convert", "plan", "inspect", "validate", "run", "check", "init"))],
)
def test_help(twofold: Run, command: tuple[str, ...]) -> None:
    ended = twofold(*command, "--help")
    assert ended.code == 0
    assert "Usage: twofold" in ended.out


@pytest.mark.parametrize(
    "arguments",
    [
        ("unknown",),
        ("convert",),
        ("convert", "a.onnx", "--calib", "b"),
        ("convert", "a.onnx", "--calib", "b", "--out", "c", "--macs", "half"),
        ("plan", "a.onnx"),
        ("plan", "a.onnx", "--calib", "b", "--macs", "2"),
        ("validate", "a.onnx", "--data", "d"),
        ("inspect", "a.onnx", "--wrong"),
    ],
)
def test_wrong_usage_is_two(twofold: Run, arguments: tuple[str, ...]) -> None:
    ended = twofold(*arguments)
    assert ended.code == 2
    assert "Traceback" not in ended.err
    assert ended.out == ""


# convert -------------------------------------------------------------------------------------


def test_options_become_settings(
    twofold: Run, called: Called, net: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "small.onnx"
    ended = twofold(
        *("convert", net, "--calib", pictures, "--out", out, "--macs", 2, "--params", 3),
        *("--solver", "svd", "--preset", "cifar10", "--size", "8x8", "--channels", "bgr"),
        *("--images", 10, "--patches", 512, "--memory", 128, "--calib-batch", 4, "--seed", 7),
        *("--threads", 1, "--device", "cuda", "--batch", 32, "--no-timing", "--cache", tmp_path),
    )
    assert ended.code == 0
    assert called.positional == (net, pictures, out, Budget(macs=2, params=3))
    cifar10 = PRESETS["cifar10"]
    assert called.named["preprocessing"] == cifar10.replace(
        size=(8, 8), channels="bgr", mean=cifar10.mean[::-1], std=cifar10.std[::-1]
    )
    assert called.named["calibration"] == CalibrationSettings(10, 4, 512, 128, 7)
    assert called.named["solver"] == SolverSettings("svd", "cuda")
    assert called.named["target"] == Target(Runtime("cpu", 1), 32)
    assert called.named["timing"] is False
    assert called.named["cache"] == tmp_path
    assert called.named["max_drop"] is None


def test_defaults_are_those_of_the_settings(
    twofold: Run, called: Called, net: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "small.onnx"
    assert twofold("convert", net, "--calib", pictures, "--out", out, "--speedup", 2).code == 0
    assert called.positional == (net, pictures, out, Budget(speedup=2))
    assert called.named["calibration"] == CalibrationSettings()
    assert called.named["solver"] == SolverSettings()
    assert called.named["target"] == Target()
    assert called.named["timing"] is True
    assert called.named["cache"] is None


@pytest.mark.parametrize(
    ("options", "budget"),
    [
        (("--latency-ms", "4.5"), Budget(latency_ms=4.5)),
        (("--speedup", "3", "--params", "2"), Budget(speedup=3, params=2)),
        (("--latency-ms", "4.5", "--macs", "2"), Budget(latency_ms=4.5, macs=2)),
    ],
)
def test_budgets(
    twofold: Run, called: Called, net: Path, tmp_path: Path, options: tuple[str], budget: Budget
) -> None:
    twofold("convert", net, "--calib", "x.npy", "--out", tmp_path / "s.onnx", *options)
    assert called.positional[3] == budget


def test_a_tolerance_in_place_of_a_budget(
    twofold: Run, called: Called, net: Path, pictures: Path, tmp_path: Path
) -> None:
    ended = twofold(
        *("convert", net, "--calib", pictures, "--out", tmp_path / "s.onnx", "--max-drop", 0.5),
        *("--val", tmp_path, "--schemes", "spatial, tucker"),
    )
    assert ended.code == 0
    assert called.positional[3] is None
    assert (called.named["max_drop"], called.named["val"]) == (0.5, tmp_path)
    assert called.named["solver"].schemes == ("spatial", "tucker")


def test_the_report_overwrites_no_image_list(
    twofold: Run, called: Called, net: Path, tmp_path: Path
) -> None:
    val = tmp_path / "val.npy"
    val.touch()
    ended = twofold(
        *("convert", net, "--calib", "x.npy", "--out", tmp_path / "s.onnx", "--max-drop", 1),
        *("--val", val, "--report", val),
    )
    assert ended.code == 2
    assert "overwrite" in ended.err
    assert called.positional == ()


def test_table_report_and_files(
    twofold: Run, called: Called, net: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "small.onnx"
    ended = twofold("convert", net, "--calib", pictures, "--out", out, "--macs", 2)
    assert ended.code == 0
    assert "too small" in ended.out
    assert "nothing was left to gain" in ended.out
    assert str(out) in ended.out
    report = tmp_path / "small.json"
    assert str(report) in ended.out
    assert json.loads(report.read_text(encoding="utf-8"))["layers"][0]["reason"] == "too small"
    assert "--preset unit" in ended.err  # nothing was said about pixels
    assert called.named["preprocessing"] == PRESETS["unit"]


def test_quiet_prints_nothing(
    twofold: Run, called: Called, net: Path, pictures: Path, tmp_path: Path
) -> None:
    report = tmp_path / "elsewhere.json"
    ended = twofold(
        *("convert", net, "--calib", pictures, "--out", tmp_path / "s.onnx", "--macs", 2),
        *("--report", report, "-q"),
    )
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    assert called.positional
    assert report.is_file()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((), "--macs 2"),
        (("--macs", "1"), "not a factor above 1"),
        (("--macs", "nan"), "not a factor above 1"),
        (("--speedup", "1"), "not a factor above 1"),
        (("--latency-ms", "0"), "milliseconds above 0"),
        (("--speedup", "2", "--latency-ms", "4"), "one of them"),
        (("--max-drop", "1", "--macs", "2"), "takes the place of a budget"),
        (("--macs", "2", "--schemes", "magic"), "magic"),
        (("--macs", "2", "--schemes", ","), "schemes none"),
        (("--macs", "2", "--batch", "0"), "batch 0"),
        (("--macs", "2", "--solver", "magic"), "magic"),
        (("--macs", "2", "--preset", "magic"), "imagenet"),
        (("--macs", "2", "--mean", "a,b"), "'a,b'"),
        (("--macs", "2", "--size", "0"), "size"),
        (("--macs", "2", "--provider", "tpu"), "tpu"),
        (("--macs", "2", "--patches", "1"), "patches"),
        (("--macs", "2", "--memory", "1"), "memory"),
        (("--macs", "2", "--report", "net.onnx"), "net.onnx"),
        (("--macs", "2", "--report", "small.onnx"), "small.onnx"),
        (("--macs", "2", "--report", "none/report.json"), "none"),
        (("--macs", "2", "--out", "."), "folder"),
        (("--macs", "2", "--out", "net.onnx"), "overwrite"),
    ],
)
def test_settings_that_make_no_sense(
    twofold: Run,
    called: Called,
    net: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    sentence: str,
) -> None:
    monkeypatch.chdir(net.parent)
    before = sorted(net.parent.rglob("*"))
    ended = twofold("convert", "net.onnx", "--calib", pictures, "--out", "small.onnx", *options)
    assert ended.code == 2
    assert ended.err.startswith("twofold: error: ")
    assert ended.err.count("\n") == 1
    assert sentence in ended.err
    assert called.positional == ()  # refused before any work
    assert sorted(net.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValidationError("v"), 1),
        (ConfigError("c"), 2),
        (ModelError("m"), 3),
        (CalibrationError("d"), 4),
        (SolverError("s"), 5),
        (ConverterError("e"), 5),
    ],
)
def test_exit_codes(
    twofold: Run, called: Called, net: Path, tmp_path: Path, error: ConverterError, code: int
) -> None:
    called.error = error
    out = tmp_path / "s.onnx"
    ended = twofold("convert", net, "--calib", "x.npy", "--out", out, "--macs", 2)
    assert ended.code == code
    assert (ended.out, ended.err) == ("", f"twofold: error: {error}\n")


def test_unexpected_error_is_one_sentence(
    twofold: Run, called: Called, net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called.error = KeyError("lost\nkey")
    arguments = ("convert", net, "--calib", "x.npy", "--out", tmp_path / "s.onnx", "--macs", 2)
    ended = twofold(*arguments)
    assert ended.code == 5
    assert "KeyError" in ended.err
    assert "TWOFOLD_DEBUG=1" in ended.err
    assert ended.err.count("\n") == 1
    monkeypatch.setenv(cli.DEBUG, "1")
    ended = twofold(*arguments)
    assert ended.code == 5
    assert "Traceback" in ended.err


def test_interrupt(twofold: Run, called: Called, net: Path, tmp_path: Path) -> None:
    called.error = KeyboardInterrupt()
    ended = twofold("convert", net, "--calib", "x.npy", "--out", tmp_path / "s.onnx", "--macs", 2)
    assert ended.code == 130
    assert ended.err.startswith("twofold: interrupted")
    assert ended.err.count("\n") == 1


# plan ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ((), None),
        (("--int8",), QuantizationSettings(memory_mib=CalibrationSettings.memory_mib)),
        (
            ("--int8", "--harmless", 0.5, "--calib-batch", 4, "--memory", 128),
            QuantizationSettings(error=0.005, batch=4, memory_mib=128),
        ),
        (("--fp16",), QuantizationSettings("float16", memory_mib=CalibrationSettings.memory_mib)),
    ],
)
def test_convert_quantizes_where_it_is_asked_to(
    twofold: Run,
    called: Called,
    net: Path,
    pictures: Path,
    tmp_path: Path,
    options: tuple[Any, ...],
    settings: QuantizationSettings | None,
) -> None:
    out = tmp_path / "small.onnx"
    ended = twofold("convert", net, "--calib", pictures, "--out", out, "--macs", 2, *options)
    assert ended.code == 0
    assert called.named["quantization"] == settings


def test_quantize_takes_int8_where_nothing_is_said(
    twofold: Run,
    monkeypatch: pytest.MonkeyPatch,
    net: Path,
    pictures: Path,
    tmp_path: Path,
    quantized: converter.Quantized,
) -> None:
    given: list[Any] = []

    def quantize(*positional: Any, **named: Any) -> Any:
        given.append((positional, named))
        return quantized

    monkeypatch.setattr(converter, "quantize", quantize)
    out, report = tmp_path / "q.onnx", tmp_path / "q.json"
    asked = ("quantize", net, net, "--calib", pictures, "--out", out)
    ended = twofold(*asked, "--images", 5, "--batch", 8, "--threads", 1, "--json", report)
    assert ended.code == 0
    positional, named = given[0]
    assert positional == (net, net, pictures, out, QuantizationSettings(images=5))
    assert named["target"] == Target(Runtime(threads=1), 8)
    assert named["timing"] is True
    assert json.loads(report.read_text(encoding="utf-8"))["format"] == "twofold-quantization-1"
    for part in ("u8 × s7", "1 of 2 layers: conv1", "a note", str(out)):
        assert part in ended.out
    assert twofold(*asked, "--fp16", "-q").out == ""
    assert given[1][0][4] == QuantizationSettings("float16")
    refused = twofold(*asked, "--int8", "--fp16")
    assert refused.code == 2
    assert "leave one of them out" in refused.err


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


# inspect -------------------------------------------------------------------------------------


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


# validate ------------------------------------------------------------------------------------

QUICK = ("--seconds", "0.01", "--time-batch", "1", "--preset", "unit")


def test_validate(twofold: Run, net: Path, pictures: Path, tmp_path: Path) -> None:
    report = tmp_path / "v.json"
    ended = twofold("validate", net, net, "--data", pictures, *QUICK, "--json", report)
    assert ended.code == 0
    assert "comparing outputs" in ended.err
    content = json.loads(report.read_text(encoding="utf-8"))
    assert content["format"] == "twofold-validation-1"
    assert content["images"] == 5
    assert content["accuracy"]["original"] == 0.8  # the subfolders are classes
    assert [each["batch"] for each in content["latencies"]] == [1]
    assert content["agreement"]["top1"] == 1.0


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


@pytest.mark.parametrize(("option", "labelled"), [("--labels", True), ("--no-labels", False)])
def test_validate_labels(
    twofold: Run, net: Path, pictures: Path, option: str, labelled: bool
) -> None:
    ended = twofold("validate", net, net, "--data", pictures, *QUICK, option)
    assert ended.code == 0
    assert ("accuracy" in ended.out) == labelled


def test_loose_images_are_no_classes(twofold: Run, net: Path, pictures: Path) -> None:
    Image.new("RGB", (8, 8)).save(pictures / "loose.png")
    assert "accuracy" not in twofold("validate", net, net, "--data", pictures, *QUICK).out
    asked = twofold("validate", net, net, "--data", pictures, *QUICK, "--labels")
    assert asked.code == 4


def test_validate_quietly(twofold: Run, net: Path, pictures: Path) -> None:
    ended = twofold("validate", net, net, "--data", pictures, *QUICK, "--quiet", "--images", 2)
    assert (ended.code, ended.out, ended.err) == (0, "", "")


def test_models_that_do_not_match(twofold: Run, net: Path, pictures: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    onnx.save(onnx.parser.parse_model(NET.replace("scores", "answers")), other)
    ended = twofold("validate", net, other, "--data", pictures, *QUICK)
    assert ended.code == 1
    assert "'scores'" in ended.err or "'answers'" in ended.err


def test_converted_model_that_gives_nan(
    twofold: Run, net: Path, pictures: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.onnx"
    model = onnx.load(net)
    broken = np.full((4, 3), np.nan, np.float32)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(broken, "w"))
    onnx.save(model, other)
    ended = twofold("validate", net, other, "--data", pictures, *QUICK)
    assert ended.code == 1
    assert "do not use it" in ended.err
    assert "scores" in ended.out  # the tables are there nevertheless


# check, run and init -------------------------------------------------------------------------

GATED = ("--seconds", "0.01", "--threads", "1", "--preset", "unit")


@pytest.fixture
def recoloured(net: Path, tmp_path: Path) -> Path:
    """A model that takes blue for green, and is right on three of five pictures."""
    model = onnx.load(net)
    weight = np.array([[1, 0, 0], [0, 0, 1], [0, 1, 0], [0.5, 0.5, 0.5]], np.float32)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "w"))
    path = tmp_path / "recoloured.onnx"
    onnx.save(model, path)
    return path


def test_check(
    twofold: Run,
    net: Path,
    recoloured: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    summary, report, junit = (tmp_path / name for name in ("s.md", "v.json", "j.xml"))
    monkeypatch.setenv(cli.SUMMARY, str(summary))
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


def project(folder: Path, gates: str = "max_file_mb = 1") -> Path:
    """Write a project whose conversion is made by `converting`."""
    path = folder / "twofold.toml"
    path.write_text(
        f"""
        model = "net.onnx"
        calib = "pictures"
        out = "small.onnx"
        [budget]
        macs = 2
        [preprocessing]
        preset = "unit"
        [running]
        threads = 1
        patches = 512
        [gates]
        data = "pictures"
        seconds = 0.01
        {gates}
        """,
        encoding="utf-8",
    )
    return path


@pytest.fixture
def converting(called: Called, recoloured: Path, monkeypatch: pytest.MonkeyPatch) -> Called:
    """Stands for `converter.convert`, and writes the recoloured model."""

    def convert(*positional: Any, **named: Any) -> Conversion:
        positional[2].write_bytes(recoloured.read_bytes())
        return called(*positional, **named)

    monkeypatch.setattr(converter, "convert", convert)
    return called


def test_run_takes_the_file_and_options_override_it(
    twofold: Run, converting: Called, net: Path, pictures: Path, tmp_path: Path
) -> None:
    path = project(tmp_path)
    ended = twofold("run", "--config", path, "--patches", 1024, "--gate", "max_accuracy_drop=40")
    assert ended.code == 0
    assert converting.positional == (net, pictures, tmp_path / "small.onnx", Budget(2))
    assert converting.named["calibration"].patches == 1024  # typed
    assert converting.named["target"] == Target(Runtime(threads=1))  # from the file
    assert "max_file_mb" in ended.out  # typed gates stand beside those of the file
    assert "max_accuracy_drop" in ended.out
    assert (tmp_path / "small.json").is_file()

    ended = twofold("run", "--config", path, "--gate", "max_accuracy_drop=39.9")
    assert ended.code == 1
    assert "max_accuracy_drop failed" in ended.err
    assert (tmp_path / "small.onnx").is_file()  # it is there to be looked at


def test_run_and_check_find_the_file_where_they_are_started(
    twofold: Run,
    converting: Called,
    net: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    del converting, net, pictures
    monkeypatch.chdir(tmp_path)
    missing = twofold("run")
    assert missing.code == 2
    assert "twofold init" in missing.err
    project(tmp_path, "max_accuracy_drop = 30")
    assert twofold("run", "--gate", "max_accuracy_drop=50").code == 0
    checked = twofold("check")  # the two models are the project's
    assert checked.code == 1
    assert "max_accuracy_drop failed: 40 points, at most 30" in checked.err


def test_run_refuses_before_it_converts(
    twofold: Run, converting: Called, net: Path, pictures: Path, tmp_path: Path
) -> None:
    del net
    path = project(tmp_path, "")
    assert "no gate was given" in twofold("run", "--config", path).err
    path = project(tmp_path, "max_accuracy_drop = 1")
    Image.new("RGB", (8, 8)).save(pictures / "loose.png")
    ended = twofold("run", "--config", path)
    assert ended.code == 2
    assert "class folders" in ended.err
    assert converting.positional == ()


def test_a_failed_conversion_is_not_judged(
    twofold: Run, converting: Called, net: Path, pictures: Path, tmp_path: Path
) -> None:
    del net, pictures
    converting.error = SolverError("broken")
    ended = twofold("run", "--config", project(tmp_path))
    assert ended.code == 5
    assert "gates" not in ended.out + ended.err


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


# The same in Python --------------------------------------------------------------------------


def test_every_public_name_is_there() -> None:
    assert all(getattr(converter, name) is not None for name in converter.__all__)
    assert set(converter.__all__) <= set(dir(converter))
    with pytest.raises(AttributeError, match="magic"):
        _ = converter.magic


def test_preset_and_preprocessing_exclude_each_other(net: Path, pictures: Path) -> None:
    with pytest.raises(ConfigError, match="one of them"):
        converter.validate(
            net, net, pictures, preset="unit", preprocessing=PRESETS["unit"], seconds=0.01
        )
    with pytest.raises(ConfigError, match="magic"):
        converter.validate(net, net, pictures, preset="magic")


def test_validate_takes_a_data_reader(net: Path) -> None:
    class Reader:
        def __init__(self) -> None:
            self.left = [np.full((2, 3, 8, 8), value, np.float32) for value in (0.0, 1.0)]

        def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
            return {"image": self.left.pop()} if self.left else None

    result = converter.validate(str(net), str(net), Reader(), time_batches=(), seconds=0.01)
    assert result.images == 4
    assert result.accuracy is None

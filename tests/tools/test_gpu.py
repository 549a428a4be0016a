"""The GPU benchmark where there is none: the refusal, the page, and the whole way on the CPU."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from torch import nn

from converter import Budget, CalibrationSettings, ConfigError, Runtime
from models import export_onnx, initialise
from tools import gpu
from tools.gpu import Bench, Case, Finding, FitCheck, Row, Wish, page

SIZE = 8
IMAGES = 32


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A network of two Convs and a Gemm, and noise to calibrate it on."""
    folder = tmp_path_factory.mktemp("tiny")
    net = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )
    initialise(net, 0, size=SIZE)
    model = export_onnx(net, folder / "tiny.onnx", size=SIZE).path
    images = np.random.default_rng(0).normal(size=(IMAGES, 3, SIZE, SIZE)).astype(np.float32)
    np.save(folder / "images.npy", images)
    return Case("Tiny", model, folder / "images.npy")


def bench(folder: Path) -> Bench:
    return Bench(
        folder,
        Runtime("cpu", 1),
        "cpu",
        batches=(1, 4),
        seconds=0.02,
        calibration=CalibrationSettings(patches=512),
    )


def row(precision: str = "fp32", **changes: Any) -> Row:
    made = Row(
        model="VGG-16",
        wish="MACs ÷ 2",
        batch=64,
        precision=precision,
        macs=2.013,
        replaced=14,
        layers=16,
        original_ms=40.0,
        converted_ms=25.0,
        ratio=1.6,
        low=1.5,
        high=1.7,
        off=None,
        difference=1e-3,
        seconds=61.4,
    )
    return dataclasses.replace(made, **changes)


CHECK = FitCheck("resnet20", "data-svd", "cuda", 20, (), 2e-6, 0.5, 0.5, 30.2, 9.6)


def test_without_a_gpu_it_refuses_in_one_sentence_and_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(typer.Exit) as ended:
        gpu.main(work=tmp_path / "work", out=tmp_path / "page.md")
    assert ended.value.exit_code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "has no CUDAExecutionProvider and torch" in said.err
    assert "onnxruntime-gpu" in said.err
    assert not any(tmp_path.iterdir())


def test_one_missing_half_is_enough_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"^torch \S+ finds no CUDA GPU"):
        gpu.require_cuda()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    gpu.require_cuda()


def test_the_whole_way_on_the_cpu(
    tiny: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wishes = (Wish(Budget(macs=2)), Wish(Budget(speedup=1000), batch=4))
    out = tmp_path / "page.md"
    assert gpu._benchmark(tiny, [tiny], wishes, bench(tmp_path), out)

    text = out.read_text()
    for solver in ("data-svd", "admm"):  # equal arithmetic: equal results
        assert f"- ✓ `{solver}` on cpu against cpu, Tiny, MACs ÷ 2" in text
    assert text.count("outputs differ by 0.0e+00 of their range, 3 of 3 layers") == 2
    assert "- ✓ Outputs under the GPU against the CPU: 4 of 4 rows agree." in text
    assert "- Tiny, speed-up 1000 at batch 4: " in text

    stored = json.loads((tmp_path / "findings.json").read_text())
    reached, refused = map(Finding.from_dict, stored["findings"])
    assert [(each.batch, each.precision) for each in reached.rows] == [
        (1, "fp32"),
        (1, "fp16"),
        (4, "fp32"),
        (4, "fp16"),
    ]
    assert {each.difference for each in reached.rows if each.precision == "fp32"} == {0.0}
    assert all(0 < each.difference < 1e-2 for each in reached.rows if each.precision == "fp16")
    assert all(each.macs >= 2 and each.replaced >= 1 for each in reached.rows)
    assert all(each.original_ms > 0 and each.off is None for each in reached.rows)
    assert refused.rows == ()

    # a run that goes on measures nothing twice, and ends with the same page but for the checks' seconds
    monkeypatch.setattr(gpu, "measure", None)
    monkeypatch.setattr(gpu, "check_fits", lambda *_: CHECK)
    assert gpu._benchmark(tiny, [tiny], wishes, bench(tmp_path), out)
    assert out.read_text().partition("- ✓ Outputs")[2] == text.partition("- ✓ Outputs")[2]


def test_quick_runs_one_network_and_a_failed_check_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def benchmark(*given: Any) -> bool:
        asked.append(given)
        return False

    monkeypatch.setattr(gpu, "require_cuda", lambda: None)
    monkeypatch.setattr(gpu, "_case", lambda name, work, _: Case(name, work, work))
    monkeypatch.setattr(gpu, "_benchmark", benchmark)
    store = tmp_path / "work" / "quick" / "findings.json"
    store.parent.mkdir(parents=True)
    store.write_text("{}")
    with pytest.raises(typer.Exit) as ended:
        gpu.main(work=tmp_path / "work", quick=True, fresh=True)
    assert ended.value.exit_code == 1
    assert not store.exists()
    small, cases, wishes, place, out = asked[0]
    assert small.name == "resnet20"
    assert [each.name for each in cases] == ["resnet50"]
    assert [str(wish) for wish in wishes] == ["MACs ÷ 2", "speed-up 2 at batch 1"]
    assert place == Bench(tmp_path / "work" / "quick", Runtime("cuda"), "cuda")
    assert out == tmp_path / "work" / "quick" / "results-gpu.md"


def test_the_page_has_each_row_and_marks_what_does_not_agree() -> None:
    rows = (row(off=-0.042), row("fp16", difference=0.3))
    findings = [
        Finding("VGG-16", "MACs ÷ 2", rows),
        Finding("ResNet-50", "MACs ÷ 4", refused="--macs 4 is out of reach"),
    ]
    text = page([CHECK], findings, "GPU 9000")
    assert (
        "| VGG-16 | MACs ÷ 2 | 2.01 | 14 of 16 | 64 | fp32 | 40.00 | 25.00 | 1.60 (1.50–1.70) | "
        "-4.2 % | 1.0e-03 | 61 |\n"
    ) in text
    assert "| fp16 | 40.00 | 25.00 | 1.60 (1.50–1.70) | – | 3.0e-01 ✗ | 61 |\n" in text
    assert "- ✗ Outputs under the GPU against the CPU: 1 of 2 rows agree." in text
    assert "- ✓ `data-svd` on cuda against cpu, resnet20, MACs ÷ 2" in text
    assert "; 10 s against 30 s." in text
    assert "- ResNet-50, MACs ÷ 4: --macs 4 is out of reach.\n" in text
    assert "- Machine: GPU 9000; " in text
    assert f"torch {torch.__version__}" in text
    header, rule = text[text.index("| model") :].splitlines()[:2]
    assert header.count("|") == rule.count("|") == text.splitlines()[-5].count("|")


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        ({}, True),
        ({"difference": 0.01}, False),
        ({"difference": math.nan}, False),
        ({"unlike": ("conv1",)}, False),
        ({"solver": "admm", "difference": 0.02, "unlike": ("conv1",)}, True),
        ({"solver": "admm", "device_error": 0.54}, False),
        ({"solver": "admm", "device_error": math.nan}, False),
    ],
)
def test_closed_forms_must_agree_and_iterations_be_equally_good(
    changes: dict[str, Any], passed: bool
) -> None:
    check = dataclasses.replace(CHECK, **changes)
    assert check.passed is passed
    assert page([check], [], "GPU 9000").count("- ✓ `" if passed else "- ✗ `") == 1


def test_a_row_that_is_no_number_does_not_agree() -> None:
    assert row().passed
    assert not row(difference=math.nan).passed

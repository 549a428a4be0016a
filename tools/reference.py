"""Convert the reference models at several budgets, and write a page of results.

    python -m tools.reference [--only vgg16] [--recovered | --int8] [--budget "--macs 4"] [--shared ../shared]

Each row is what a user would run: `twofold convert` on the calibration images, then `twofold validate`
on the validation images, each in a program of its own, so that seconds and memory are its own too.
`--recovered` runs the budgets with `--recover` instead, which learn from the 50,000 training images for up
to an hour each. `--int8` runs those that end in int8, and compares what comes of them with the original in
float32 and in int8. Rows are kept beside the page, docs/results.md, with the machine and the day; a run
measures what is not there yet, `--fresh` all that it is asked for. `--out` writes another page, with rows of
its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from converter.config import Preprocessing, preprocessing_from_options
from converter.output_file import write_text_atomically
from converter.report.words import interval
from tools.results_page import Int8Row, Results, Row, Run, page, this_machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "references" / "results"
IMAGENET = ("--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225")
CIFAR = ("--preset", "cifar10")
MEMORY_PROBE = (
    "import resource, runpy, sys; sys.argv[0] = 'twofold'\n"
    "try: runpy.run_module('converter', run_name='__main__', alter_sys=True)\n"
    "finally: open({path!r}, 'w').write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))\n"
)


@dataclass(frozen=True)
class Ask:
    """A budget as it is typed, the largest drop allowed there, in points, and the time to recover in.

    `int8`, of those that end in int8, are the speed-ups over int8 of the original that are asked for, at
    batch 1 and 32.
    """

    options: tuple[str, ...]
    drop: float | None = None
    recover: str | None = None
    int8: tuple[float, float] | None = None

    def __str__(self) -> str:
        return " ".join([*self.options, *([f"--recover {self.recover}"] if self.recover else [])])


@dataclass(frozen=True)
class Target:
    """A reference model, how its images are prepared, and what is asked of it."""

    name: str
    file: str
    preparation: tuple[str, ...]
    asks: tuple[Ask, ...]

    def preprocessing(self) -> Preprocessing:
        """Read the options that say how images are prepared."""
        options: dict[str, Any] = {
            option.removeprefix("--"): value
            for option, value in zip(self.preparation[::2], self.preparation[1::2], strict=True)
        }
        return preprocessing_from_options(**options)


TARGETS = (
    Target(
        "ResNet-20",
        "resnet20_cifar10.onnx",
        IMAGENET,
        (
            Ask(("--macs", "2"), 1.5),
            Ask(("--macs", "3"), 4.5),
            Ask(("--params", "2", "--macs", "2"), 0.0, "18m"),
            Ask(("--params", "2", "--macs", "2", "--mirrored"), 0.0, "18m"),
            Ask(("--params", "3.4", "--macs", "3.4"), 0.5, "28m"),
            Ask(("--params", "3.4", "--macs", "3.4", "--mirrored"), 0.5, "28m"),
        ),
    ),
    Target(
        "AlexNet",
        "alexnet_cifar10.onnx",
        CIFAR,
        (
            Ask(("--macs", "3"), 1.0),
            Ask(("--params", "4", "--macs", "4", "--mirrored"), 0.0, "15m"),
        ),
    ),
    Target(
        "VGG-16",
        "vgg16_cifar10.onnx",
        CIFAR,
        (
            Ask(("--macs", "4"), 0.4),
            Ask(("--macs", "8"), 1.5),
            Ask(("--params", "4.9"), 0.2),
            Ask(("--params", "10"), 1.0),
            Ask(("--speedup", "3", "--batch", "1"), 0.4),
            Ask(("--speedup", "4", "--batch", "32"), 0.4),
            Ask(("--params", "4.9"), 0.0, "10m"),
            Ask(("--params", "4.9", "--mirrored"), 0.0, "11m"),
            Ask(("--params", "4.9", "--mirrored", "--gradual", "1"), 0.0, "11m"),
            Ask(("--macs", "4"), 0.4, "10m"),
            Ask(("--params", "20", "--macs", "7", "--mirrored"), 0.1, "50m"),
            Ask(("--macs", "4", "--int8", "--batch", "32"), 0.5, "10m", (2.0, 2.5)),
            Ask(("--macs", "4", "--mirrored", "--int8", "--batch", "32"), 0.5, "10m", (2.0, 2.5)),
            Ask(
                ("--params", "20", "--macs", "7", "--mirrored", "--int8", "--batch", "32"),
                *(0.5, "50m", (2.0, 2.5)),
            ),
        ),
    ),
    Target(
        "GoogLeNet",
        "googlenet_cifar10.onnx",
        CIFAR,
        (
            Ask(("--macs", "3"), 1.0),
            Ask(("--params", "4", "--macs", "4", "--mirrored"), 0.0, "47m"),
        ),
    ),
)

ASKED = {
    f"{target.name} {ask}": ask.recover is not None
    for target in TARGETS
    for ask in target.asks
    if ask.int8 is None
}
"""Budgets of either table in float32, as rows are kept by: whether they recover."""


def main(
    shared: Annotated[Path, typer.Option(help="Folder with models/ and data/.")] = ROOT.parent
    / "shared",
    references: Annotated[Path, typer.Option(help="Models of tools/train_reference.py.")] = (
        ROOT / "references"
    ),
    work: Annotated[Path, typer.Option(help="Where models go.")] = RESULTS,
    out: Annotated[Path, typer.Option(help="The page to write; rows are kept beside it.")] = (
        ROOT / "docs" / "results.md"
    ),
    only: Annotated[list[str] | None, typer.Option(help="Names of models, as vgg16.")] = None,
    recovered: Annotated[bool, typer.Option(help="Run the budgets with --recover.")] = False,
    int8: Annotated[bool, typer.Option(help="Run the budgets with --int8.")] = False,
    budget: Annotated[
        list[str] | None, typer.Option(help="Budgets as they stand in the table, else all.")
    ] = None,
    remark: Annotated[str, typer.Option(help="What a reader must know of these runs.")] = "",
    fresh: Annotated[bool, typer.Option(help="Measure anew what was measured before.")] = False,
) -> None:
    """Convert the reference models at several budgets, and write the table."""
    work.mkdir(parents=True, exist_ok=True)
    store = out.with_suffix(".json")
    results = Results.read(store)
    run = Run(this_machine(), time.strftime("%Y-%m-%d"), remark)

    def write() -> None:
        results.write(store)
        write_text_atomically(out, page(results, ASKED))

    for target, path in _models(shared, references, only):
        for ask in target.asks:
            key = f"{target.name} {ask}"
            if (ask.int8 is not None) != int8 or (budget and str(ask) not in budget):
                continue
            if not int8 and (ask.recover is not None) != recovered:
                continue
            if not fresh and key in (results.int8 if int8 else results.rows):
                continue
            print(f"== {key}", flush=True)
            if int8:
                results.int8[key] = _measure_int8(target, path, ask, shared, work, run)
            else:
                results.rows[key] = _measure(target, path, ask, shared, work, run)
            write()
    write()
    print(f"wrote {out}")


def _models(shared: Path, references: Path, only: list[str] | None) -> list[tuple[Target, Path]]:
    known = {target.file: target for target in TARGETS}
    files = [shared / "models" / target.file for target in TARGETS]
    trained = sorted(references.glob("*_cifar10.onnx")) if references.is_dir() else []
    chosen = [(known[file.name], file) for file in files if file.exists()]
    for file in trained:
        like = known.get(file.name)
        asks = like.asks if like else (Ask(("--macs", "2")),)
        chosen.append((Target(f"{file.stem} (trained here)", file.name, CIFAR, asks), file))
    if only:
        chosen = [
            (target, file) for target, file in chosen if any(name in file.stem for name in only)
        ]
    if not chosen:
        sys.exit(f"no reference model lies in {shared / 'models'} or {references}; name --shared")
    return chosen


def made_by(model: Path, ask: Ask, work: Path) -> tuple[Path, Path, Path]:
    """Say where a converted model, its report and its comparison with the original lie."""
    trained_here = "trained-" if model.parent.name == "references" else ""
    stem = (
        trained_here + model.stem + str(ask).replace(" --", "-").replace("--", "-").replace(" ", "")
    )
    small, report, comparison = (
        work / f"{stem}{end}" for end in (".onnx", ".json", "-against.json")
    )
    return small, report, comparison


@dataclass(frozen=True)
class _Made:
    """A conversion: its files, the seconds that it took, and its peak resident memory."""

    model: Path
    report: dict[str, Any]
    comparison: Path
    seconds: float
    memory_mib: float


def _convert(target: Target, model: Path, ask: Ask, shared: Path, work: Path) -> _Made:
    small, report, comparison = made_by(model, ask, work)
    data = shared / "data" / "cifar10"
    recovery: list[str] = []
    if ask.recover is not None:
        recovery = ["--recover", ask.recover, "--recover-images", str(train_images(data, work))]
    started = time.monotonic()
    memory = run_twofold(
        "convert", str(model), "--calib", str(data / "calib"), "--out", str(small), *ask.options,
        *recovery, "--report", str(report), "--cache", str(work / "cache"), *target.preparation,
        probe=work / "memory",
    )  # fmt: skip
    seconds = time.monotonic() - started
    return _Made(small, json.loads(report.read_text()), comparison, seconds, memory)


def _validate(
    target: Target, first: Path, second: Path, shared: Path, work: Path, out: Path
) -> dict[str, Any]:
    run_twofold(
        "validate", str(first), str(second), "--data", str(shared / "data" / "cifar10" / "val"),
        "--json", str(out), *target.preparation, probe=work / "memory",
    )  # fmt: skip
    compared: dict[str, Any] = json.loads(out.read_text())
    return compared


def _measure(target: Target, model: Path, ask: Ask, shared: Path, work: Path, run: Run) -> Row:
    made = _convert(target, model, ask, shared, work)
    compared = _validate(target, model, made.model, shared, work, made.comparison)
    converted = made.report
    timing = {entry["batch"]: entry for entry in compared["latencies"]}
    return Row(
        model=target.name,
        budget=str(ask),
        run=run,
        allowed=ask.drop,
        macs=converted["macs_reduction"],
        params=converted["params_reduction"],
        images=compared["accuracy"]["images"],
        before=100 * compared["accuracy"]["original"],
        after=100 * compared["accuracy"]["converted"],
        error=compared["accuracy"]["standard_error_points"],
        batch_1=_speed(timing[1]),
        batch_32=_speed(timing[32]),
        off=converted["latency"]["off"],
        at_pace=None
        if converted["latency"]["pace"] is None
        else converted["latency"]["off_at_pace"],
        seconds=made.seconds,
        memory_mib=made.memory_mib,
    )


def _measure_int8(
    target: Target, model: Path, ask: Ask, shared: Path, work: Path, run: Run
) -> Int8Row:
    """Convert, recover and quantize in one go, and compare with the original in float32 and in int8."""
    assert ask.int8 is not None, "asked for where it is called"
    made = _convert(target, model, ask, shared, work)
    large = work / f"{model.stem}-int8.onnx"
    run_twofold(
        "quantize", str(model), str(model), "--calib", str(shared / "data" / "cifar10" / "calib"),
        "--out", str(large), "--int8", "--batch", "32", "--json", str(large.with_suffix(".json")),
        *target.preparation, probe=work / "memory",
    )  # fmt: skip
    beside = made.comparison.with_stem(f"{made.comparison.stem}-int8")
    compared = [
        _validate(target, first, made.model, shared, work, out)
        for first, out in ((model, made.comparison), (large, beside))
    ]
    accuracies = [each["accuracy"] for each in compared]
    speeds = [(_speed(each["latencies"][0]), _speed(each["latencies"][1])) for each in compared]
    return Int8Row(
        model=target.name,
        budget=str(ask),
        run=run,
        images=accuracies[0]["images"],
        original=100 * accuracies[0]["original"],
        original_int8=100 * accuracies[1]["original"],
        converted_int8=100 * accuracies[0]["converted"],
        over_original=speeds[0],
        over_int8=speeds[1],
        asked=ask.int8,
        file=compared[1]["bytes_reduction"],
        settings=(
            f"original: {_how(json.loads(large.with_suffix('.json').read_text()))}; "
            f"converted: {_how(made.report['quantization'])}"
        ),
        seconds=made.seconds,
        allowed=ask.drop,
    )


def _how(said: dict[str, Any]) -> str:
    """Say in a few words in what form a model was written."""
    if not said["shipped"]:
        return "float, which is faster"
    left = sum(len(each["layers"]) for each in said["left"])
    return f"{said['types']}, {said['ranges']}, {left} of {said['layers']} layers in float"


def train_images(data: Path, work: Path) -> Path:
    """Unpack the training images beside the results, once."""
    folder = work / "train"
    if not folder.exists():
        with tarfile.open(data / "train.tar.gz") as archive:
            archive.extractall(work / "unpacked", filter="data")
        (work / "unpacked" / "train").rename(folder)
    return folder


def _speed(entry: dict[str, Any]) -> str:
    return interval(**entry["speedup"])


def run_twofold(*arguments: str, probe: Path) -> float:
    """Run the program; its peak resident memory in MiB."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    code = MEMORY_PROBE.format(path=str(probe))
    finished = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, check=False
    )
    if finished.returncode:
        sys.exit(f"twofold {' '.join(arguments)} ended with {finished.returncode}")
    return int(probe.read_text()) / 1024


if __name__ == "__main__":
    typer.run(main)

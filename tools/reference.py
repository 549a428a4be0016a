"""Convert the reference models at several budgets, and write docs/results.md.

    python -m tools.reference [--only vgg16] [--recovered | --int8] [--shared ../shared]

Each row is what a user would run: `twofold convert` on the calibration images, then `twofold validate`
on the validation images, each in a program of its own, so that seconds and memory are its own too.
`--recovered` runs the budgets with `--recover` instead, which learn from the 50,000 training images for up
to an hour each. `--int8` takes what was made of some of them, or makes it first, quantizes it and the
original alike, and compares the three. Rows are kept in the work folder; a run that was interrupted goes on
from there, `--fresh` starts over.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from converter.config import Preprocessing, preprocessing_from_options
from converter.model_file import write_text_atomically
from converter.runtime import machine

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

    `int8` are the speed-ups over int8 of the original that are asked for, at batch 1 and 32.
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
            Ask(("--params", "4", "--macs", "4", "--mirrored"), 0.0, "25m"),
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
            Ask(("--params", "4.9", "--mirrored"), 0.0, "12m"),
            Ask(("--macs", "4"), 0.4, "10m", int8=(2.0, 2.5)),
            Ask(("--params", "20", "--macs", "7", "--mirrored"), 0.1, "55m", int8=(2.0, 2.5)),
        ),
    ),
    Target(
        "GoogLeNet",
        "googlenet_cifar10.onnx",
        CIFAR,
        (
            Ask(("--macs", "3"), 1.0),
            Ask(("--params", "4", "--macs", "4", "--mirrored"), 0.0, "45m"),
        ),
    ),
)


@dataclass(frozen=True)
class Published:
    """A paper's result on CIFAR-10, retrained with labels: percent that is gone, and top-1 change."""

    network: str
    method: str
    params: float
    macs: float
    change: float


PUBLISHED = (
    Published("VGG-16", "ALDS", 95.8, 86.2, -0.11),
    Published("VGG-16", "CHIP", 87.3, 78.6, -0.78),
    Published("ResNet-20", "ALDS", 74.9, 67.9, -0.47),
    Published("ResNet-20", "SPARK (sparse + low rank)", 70.4, 71.1, 1.25),
    Published("ResNet-56", "CHIP", 70.0, 74.1, -0.83),
    Published("ResNet-56", "SPARK (sparse + low rank)", 65.6, 66.0, 0.64),
)


@dataclass(frozen=True)
class Row:
    """One conversion, measured."""

    model: str
    budget: str
    allowed: float | None
    macs: float
    params: float
    images: int
    before: float
    after: float
    error: float
    batch_1: str
    batch_32: str
    off: float
    seconds: float
    memory_mib: float


@dataclass(frozen=True)
class Int8Row:
    """A conversion in int8, beside the original in float32 and in int8.

    Accuracies are in percent. Speed-ups (batch 1, batch 32) are those of the quantized conversion; `file` is
    the size of the original in int8 over its own.
    """

    model: str
    budget: str
    images: int
    original: float
    original_int8: float
    converted_int8: float
    over_original: tuple[str, str]
    over_int8: tuple[str, str]
    asked: tuple[float, float]
    file: float
    settings: str
    seconds: float


def main(
    shared: Annotated[Path, typer.Option(help="Folder with models/ and data/.")] = ROOT.parent
    / "shared",
    references: Annotated[Path, typer.Option(help="Models of tools/train_reference.py.")] = (
        ROOT / "references"
    ),
    work: Annotated[Path, typer.Option(help="Where models and rows go.")] = RESULTS,
    out: Annotated[Path, typer.Option(help="The page to write.")] = ROOT / "docs" / "results.md",
    only: Annotated[list[str] | None, typer.Option(help="Names of models, as vgg16.")] = None,
    recovered: Annotated[bool, typer.Option(help="Run the budgets with --recover.")] = False,
    int8: Annotated[bool, typer.Option(help="Quantize what was made, and the original.")] = False,
    note: Annotated[
        str, typer.Option(help="What a reader must know of the machine or the runs.")
    ] = "",
    fresh: Annotated[bool, typer.Option(help="Forget the rows of earlier runs.")] = False,
) -> None:
    """Convert the reference models at several budgets, and write the table."""
    work.mkdir(parents=True, exist_ok=True)
    rows, in_int8 = ({} if fresh else _stored(work / name) for name in ("rows.json", "int8.json"))

    def write() -> None:
        for name, kept in (("rows.json", rows), ("int8.json", in_int8)):
            write_text_atomically(work / name, json.dumps(kept, indent=1) + "\n")
        made = [Row(**each) for each in rows.values()]
        quantized = [Int8Row(**each) for each in in_int8.values()]
        write_text_atomically(out, _page(made, note, quantized))

    for target, path in _models(shared, references, only):
        for ask in target.asks:
            if (ask.int8 is None) if int8 else ((ask.recover is not None) != recovered):
                continue
            key = f"{path.stem} {ask}"
            if key not in rows or (int8 and not made_by(path, ask, work)[0].exists()):
                print(f"== {key}", flush=True)
                rows[key] = asdict(_measure(target, path, ask, shared, work))
                write()
            if int8 and key not in in_int8:
                print(f"== {key} --int8", flush=True)
                in_int8[key] = asdict(_measure_int8(target, path, ask, shared, work))
                write()
    write()
    print(f"wrote {out}")


def _stored(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


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
    stem = model.stem + str(ask).replace(" --", "-").replace("--", "-").replace(" ", "")
    small, report, comparison = (
        work / f"{stem}{end}" for end in (".onnx", ".json", "-against.json")
    )
    return small, report, comparison


def _measure(target: Target, model: Path, ask: Ask, shared: Path, work: Path) -> Row:
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
    run_twofold(
        "validate", str(model), str(small), "--data", str(data / "val"), "--json", str(comparison),
        *target.preparation, probe=work / "memory",
    )  # fmt: skip
    converted = json.loads(report.read_text())
    compared = json.loads(comparison.read_text())
    timing = {entry["batch"]: entry for entry in compared["latencies"]}
    return Row(
        model=target.name,
        budget=str(ask),
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
        seconds=seconds,
        memory_mib=memory,
    )


def _measure_int8(target: Target, model: Path, ask: Ask, shared: Path, work: Path) -> Int8Row:
    """Quantize original and conversion alike, at batch 32, and compare the latter with both."""
    assert ask.int8 is not None, "asked for where it is called"
    data = shared / "data" / "cifar10"
    converted = made_by(model, ask, work)[0]
    small, large = (work / f"{each.stem}-int8.onnx" for each in (converted, model))
    seconds = 0.0
    for source, out in ((model, large), (converted, small)):
        if out == large and large.exists() and large.with_suffix(".json").exists():
            continue  # of a row before
        started = time.monotonic()
        run_twofold(
            "quantize", str(model), str(source), "--calib", str(data / "calib"), "--out", str(out), "--int8",
            "--batch", "32", "--json", str(out.with_suffix(".json")), *target.preparation,
            probe=work / "memory",
        )  # fmt: skip
        seconds = time.monotonic() - started
    compared = []
    for first in (model, large):
        comparison = work / f"{small.stem}-against-{first.stem}.json"
        run_twofold(
            "validate", str(first), str(small), "--data", str(data / "val"), "--json", str(comparison),
            *target.preparation, probe=work / "memory",
        )  # fmt: skip
        compared.append(json.loads(comparison.read_text()))
    accuracies = [each["accuracy"] for each in compared]
    speeds = [(_speed(each["latencies"][0]), _speed(each["latencies"][1])) for each in compared]
    return Int8Row(
        model=target.name,
        budget=str(ask),
        images=accuracies[0]["images"],
        original=100 * accuracies[0]["original"],
        original_int8=100 * accuracies[1]["original"],
        converted_int8=100 * accuracies[0]["converted"],
        over_original=speeds[0],
        over_int8=speeds[1],
        asked=ask.int8,
        file=compared[1]["bytes_reduction"],
        settings="; ".join(
            f"{name}: {_how(out.with_suffix('.json'))}"
            for name, out in (("original", large), ("converted", small))
        ),
        seconds=seconds,
    )


def _how(report: Path) -> str:
    """Say in a few words in what form `twofold quantize` wrote a model."""
    said = json.loads(report.read_text())
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
    ratio = entry["speedup"]
    return f"{ratio['ratio']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


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


def _page(rows: list[Row], note: str = "", quantized: Sequence[Int8Row] = ()) -> str:
    here = machine()
    asks = {f"{target.name} {ask}": ask for target, ask in _all_asks()}
    order = {key: at for at, key in enumerate(asks)}
    rows = sorted(
        rows, key=lambda row: (order.get(f"{row.model} {row.budget}", len(order)), row.model)
    )
    plain = [row for row in rows if "--recover" not in row.budget]
    recovered = [row for row in rows if "--recover" in row.budget]
    done = {f"{row.model} {row.budget}" for row in rows}
    lines = [
        "# Results",
        "",
        "Written by `make reference` (`python -m tools.reference`); every row is one `twofold convert` on",
        "the calibration images and one `twofold validate` on the validation images.",
        "",
        f"- Machine: {here['processor']}, {here['usable_cores']} cores; onnxruntime "
        f"{here['versions']['onnxruntime']}, torch {here['versions']['torch']}.",
        "- Calibration: 2,000 unlabelled training images. Accuracy: top-1 on the validation images, with the",
        "  standard error of the paired difference. No number was swept on them, but the trials behind the",
        "  main designs (`docs/adr`) ran on ResNet-20 and VGG-16 with these images in sight.",
        "- Speed-up: median ratio of interleaved runs, two threads, with its 95 % interval.",
        "  Predicted: latency of the converted model as planned over as measured, less 1.",
        "  Seconds and memory: the whole program `twofold convert`.",
        *([f"- {note}"] if note else []),
        "",
        "## Converted, nothing retrained",
        "",
        *_table(plain),
        *_not_run(asks, done, recovered=False),
        "",
        "## Recovered without labels, beside what is published",
        "",
        "Written by `python -m tools.reference --recovered`: the same with `--recover`, which learns from",
        "50,000 images without their labels for the time that is given.",
        "",
        *_table(recovered),
        *_not_run(asks, done, recovered=True),
        "",
        *_published_lines(recovered),
    ]
    if quantized:
        lines += _int8_lines(quantized)
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| model | asked for | MACs ÷ | params ÷ | images | top-1 before | after | change | allowed | "
        "speed-up, batch 1 | batch 32 | predicted | seconds | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        allowed = "–" if row.allowed is None else f"≥ −{row.allowed:g}" if row.allowed else "≥ 0"
        lines.append(
            f"| {row.model} | `{row.budget}` | {row.macs:.2f} | {row.params:.2f} | {row.images:,} | "
            f"{row.before:.2f} % | {row.after:.2f} % | {row.after - row.before:+.2f} ± {row.error:.2f} | "
            f"{allowed} | {row.batch_1} | {row.batch_32} | {100 * row.off:+.0f} % | "
            f"{row.seconds:.0f} | {row.memory_mib:,.0f} |"
        )
    return lines if rows else []


def _not_run(asks: Mapping[str, Ask], done: Collection[str], *, recovered: bool) -> list[str]:
    missing = [
        f"{key.removesuffix(f' {ask}')} `{ask}`"
        for key, ask in asks.items()
        if key not in done and (ask.recover is not None) == recovered
    ]
    return ["", f"Not run yet: {', '.join(missing)}."] if missing else []


def _published_lines(recovered: Sequence[Row]) -> list[str]:
    """Set our rows beside those of papers, in their terms: what is gone in percent."""
    ours = [
        (row.model, f"Twofold, `{row.budget}`", "none", 1 - 1 / row.params, 1 - 1 / row.macs,
         f"{row.after - row.before:+.2f} ± {row.error:.2f}")
        for row in recovered
    ]  # fmt: skip
    theirs = [
        (
            each.network,
            each.method,
            "yes",
            each.params / 100,
            each.macs / 100,
            f"{each.change:+.2f}",
        )
        for each in PUBLISHED
    ]
    lines = [
        "In the terms of published results on CIFAR-10, which are retrained with labels, for far longer,",
        "from networks of their own (these images are recompressed: compare changes, not accuracies):",
        "",
        "| model | by | labels | parameters | MACs | top-1 change |",
        "|---|---|---|---|---|---|",
    ]
    for model, method, labels, params, macs, change in sorted(
        [*ours, *theirs], key=lambda each: each[0], reverse=True
    ):
        lines.append(
            f"| {model} | {method} | {labels} | −{100 * params:.1f} % | −{100 * macs:.1f} % | {change} |"
        )
    return lines


def _int8_lines(rows: Sequence[Int8Row]) -> list[str]:
    lines = [
        "",
        "## In int8",
        "",
        "Written by `python -m tools.reference --int8`: the conversions above and the originals, both by",
        "`twofold quantize --int8 --batch 32` on the calibration images. Speed-ups are those of the",
        "conversion in int8, over the original in float32 and in int8; file: the original in int8 over it.",
        "",
        "| model | converted by | images | top-1 float32 | original int8 | converted int8 | "
        "over float32, batch 1 | batch 32 | over int8, batch 1 | asked | batch 32 | asked | file ÷ | "
        "seconds | settings |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        (slow, fast), (one, many) = row.over_original, row.over_int8
        lines.append(
            f"| {row.model} | `{row.budget}` | {row.images:,} | {row.original:.2f} % | "
            f"{row.original_int8:.2f} % | {row.converted_int8:.2f} % | {slow} | {fast} | {one} | "
            f"≥ {row.asked[0]:g} | {many} | ≥ {row.asked[1]:g} | {row.file:.2f} | {row.seconds:.0f} | "
            f"{row.settings} |"
        )
    return lines


def _all_asks() -> list[tuple[Target, Ask]]:
    return [(target, ask) for target in TARGETS for ask in target.asks]


if __name__ == "__main__":
    typer.run(main)

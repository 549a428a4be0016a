"""Convert the reference models with each solver at several budgets, and write docs/results.md.

    python -m tools.reference [--only vgg16] [--solver admm] [--shared ../shared] [--out docs/results.md]

Each row is what a user would run: `twofold convert` on the calibration images, then `twofold validate`
on the validation images, each in a program of its own, so that seconds and memory are its own too. Rows
are kept in the work folder; a run that was interrupted goes on from there, `--fresh` starts over.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from converter.model_file import write_text_atomically
from converter.runtime import machine

ROOT = Path(__file__).resolve().parent.parent
IMAGENET = ("--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225")
CIFAR = ("--preset", "cifar10")
SOLVERS = ("admm", "data-svd", "svd")
MEMORY_PROBE = (
    "import resource, runpy, sys; sys.argv[0] = 'twofold'\n"
    "try: runpy.run_module('converter', run_name='__main__', alter_sys=True)\n"
    "finally: open({path!r}, 'w').write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))\n"
)


@dataclass(frozen=True)
class Target:
    """A reference model, how its images are prepared, its budgets and the largest drop allowed there."""

    name: str
    file: str
    preparation: tuple[str, ...]
    budgets: tuple[tuple[str, float, float | None], ...]


TARGETS = (
    Target("ResNet-20", "resnet20_cifar10.onnx", IMAGENET, (("macs", 2, 5.0), ("macs", 1.5, None))),
    Target("AlexNet", "alexnet_cifar10.onnx", CIFAR, (("macs", 2, 1.0), ("params", 4, None))),
    Target(
        "VGG-16",
        "vgg16_cifar10.onnx",
        CIFAR,
        (("macs", 4, 2.0), ("macs", 2, 0.7), ("params", 4.9, 1.0)),
    ),
    Target("GoogLeNet", "googlenet_cifar10.onnx", CIFAR, (("macs", 2, 2.0),)),
)


@dataclass(frozen=True)
class Row:
    """One conversion, measured."""

    model: str
    solver: str
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
    seconds: float
    memory_mib: float


def main(
    shared: Annotated[Path, typer.Option(help="Folder with models/ and data/.")] = ROOT.parent
    / "shared",
    references: Annotated[Path, typer.Option(help="Models of tools/train_reference.py.")] = (
        ROOT / "references"
    ),
    work: Annotated[Path, typer.Option(help="Where models and rows go.")] = ROOT
    / "references"
    / "results",
    out: Annotated[Path, typer.Option(help="The page to write.")] = ROOT / "docs" / "results.md",
    only: Annotated[list[str] | None, typer.Option(help="Names of models, as vgg16.")] = None,
    solver: Annotated[list[str] | None, typer.Option(help="Solvers; all by default.")] = None,
    fresh: Annotated[bool, typer.Option(help="Forget the rows of earlier runs.")] = False,
) -> None:
    """Convert the reference models with each solver at several budgets, and write the table."""
    work.mkdir(parents=True, exist_ok=True)
    store = work / "rows.json"
    rows: dict[str, Any] = {} if fresh or not store.exists() else json.loads(store.read_text())
    for target, path in _models(shared, references, only):
        for name in solver or SOLVERS:
            for unit, factor, allowed in target.budgets:
                key = f"{path.stem} {name} {unit} {factor:g}"
                if key in rows:
                    continue
                print(f"== {key}", flush=True)
                row = _measure(target, path, name, unit, factor, allowed, shared, work)
                rows[key] = asdict(row)
                write_text_atomically(store, json.dumps(rows, indent=1) + "\n")
                write_text_atomically(out, _page([Row(**each) for each in rows.values()]))
    write_text_atomically(out, _page([Row(**each) for each in rows.values()]))
    print(f"wrote {out}")


def _models(shared: Path, references: Path, only: list[str] | None) -> list[tuple[Target, Path]]:
    known = {target.file: target for target in TARGETS}
    files = [shared / "models" / target.file for target in TARGETS]
    trained = sorted(references.glob("*_cifar10.onnx")) if references.is_dir() else []
    chosen = [(known[file.name], file) for file in files if file.exists()]
    for file in trained:
        like = known.get(file.name)
        budgets = like.budgets if like else (("macs", 2.0, None),)
        chosen.append((Target(f"{file.stem} (trained here)", file.name, CIFAR, budgets), file))
    if only:
        chosen = [
            (target, file) for target, file in chosen if any(name in file.stem for name in only)
        ]
    if not chosen:
        sys.exit(f"no reference model lies in {shared / 'models'} or {references}; name --shared")
    return chosen


def _measure(
    target: Target,
    model: Path,
    solver: str,
    unit: str,
    factor: float,
    allowed: float | None,
    shared: Path,
    work: Path,
) -> Row:
    stem = f"{model.stem}-{solver}-{unit}{factor:g}"
    small, report, comparison = (
        work / f"{stem}{end}" for end in (".onnx", ".json", "-against.json")
    )
    data = shared / "data" / "cifar10"
    started = time.monotonic()
    memory = _twofold(
        "convert", str(model), "--calib", str(data / "calib"), "--out", str(small), f"--{unit}",
        f"{factor:g}", "--solver", solver, "--report", str(report), *target.preparation,
        probe=work / "memory",
    )  # fmt: skip
    seconds = time.monotonic() - started
    _twofold(
        "validate", str(model), str(small), "--data", str(data / "val"), "--json", str(comparison),
        *target.preparation, probe=work / "memory",
    )  # fmt: skip
    converted = json.loads(report.read_text())
    compared = json.loads(comparison.read_text())
    timing = {entry["batch"]: entry for entry in compared["latencies"]}
    return Row(
        model=target.name,
        solver=solver,
        budget=f"{'MACs' if unit == 'macs' else 'parameters'} ÷ {factor:g}",
        allowed=allowed,
        macs=converted["macs_reduction"],
        params=converted["params_reduction"],
        images=compared["accuracy"]["images"],
        before=100 * compared["accuracy"]["original"],
        after=100 * compared["accuracy"]["converted"],
        error=compared["accuracy"]["standard_error_points"],
        batch_1=_speed(timing[1]),
        batch_32=_speed(timing[32]),
        seconds=seconds,
        memory_mib=memory,
    )


def _speed(entry: dict[str, Any]) -> str:
    ratio = entry["speedup"]
    return f"{ratio['ratio']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def _twofold(*arguments: str, probe: Path) -> float:
    """Run the program; its peak resident memory in MiB."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    code = MEMORY_PROBE.format(path=str(probe))
    finished = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, check=False
    )
    if finished.returncode:
        sys.exit(f"twofold {' '.join(arguments)} ended with {finished.returncode}")
    return int(probe.read_text()) / 1024


def _page(rows: list[Row]) -> str:
    here = machine()
    names = [target.name for target in TARGETS]
    rows = sorted(
        rows,
        key=lambda row: (
            names.index(row.model) if row.model in names else len(names),
            row.budget,
            SOLVERS.index(row.solver),
        ),
    )
    lines = [
        "# Results",
        "",
        "Written by `make reference` (`python -m tools.reference`); every row is one `twofold convert` on",
        "the calibration images and one `twofold validate` on the validation images, without retraining.",
        "",
        f"- Machine: {here['processor']}, {here['usable_cores']} cores; onnxruntime "
        f"{here['versions']['onnxruntime']}, torch {here['versions']['torch']}.",
        "- Calibration: 2,000 unlabelled training images. Accuracy: top-1 on the validation images, with the",
        "  standard error of the paired difference. No number was swept on them, but the trials behind the",
        "  main designs (the output metric, the price, the polish, the features; `docs/adr/0003`, `0004`)",
        "  ran on ResNet-20 and VGG-16 with these images in sight.",
        "- Speed-up: ratio of the medians of interleaved runs, two threads, with its 95 % interval.",
        "  Seconds and memory: the whole program `twofold convert`.",
        "- `admm` is Twofold's method (sparse + channel). `data-svd` (low rank in the metric of the data)",
        "  and `svd` (of the weights) are baselines with the same shares of the budget.",
        "",
        "| model | solver | budget | MACs ÷ | params ÷ | images | top-1 before | after | change | asked | "
        "speed-up, batch 1 | batch 32 | seconds | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        asked = "–" if row.allowed is None or row.solver != "admm" else f"≥ −{row.allowed:g}"
        lines.append(
            f"| {row.model} | {row.solver} | {row.budget} | {row.macs:.2f} | {row.params:.2f} | "
            f"{row.images:,} | {row.before:.2f} % | {row.after:.2f} % | "
            f"{row.after - row.before:+.2f} ± {row.error:.2f} | {asked} | {row.batch_1} | {row.batch_32} | "
            f"{row.seconds:.0f} | {row.memory_mib:,.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)

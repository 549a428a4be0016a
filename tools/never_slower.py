"""Convert reference models at random budgets, time each result anew, and write docs/never-slower.md.

    python -m tools.never_slower [--runs 20] [--seed 0] [--only resnet20] [--out docs/never-slower.md]

Model, kind of budget, factor and batch are drawn from the seed; a budget that is out of a model's reach is
drawn again. Each conversion measures its layers from scratch, in a cache folder of its own. The result is
timed against its original once more, with other sessions than the conversion had. It counts as slower
where the whole 95 % interval of the speed-up lies below 1.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import converter
from converter.calibration.opening import open_calibration_set
from converter.config import Budget, CalibrationSettings, Runtime, Target
from converter.errors import ConfigError
from converter.latency import measure_latency, speedup
from converter.model_file import load_model
from converter.output_file import write_text_atomically
from converter.report.words import interval
from converter.runtime import machine, model_inputs
from tools.reference import ROOT, TARGETS

__all__ = ["Draw", "Row", "draws", "main", "page"]

SHARES = {"ResNet-20": 11, "AlexNet": 7, "VGG-16": 1, "GoogLeNet": 1}
"""Of twenty conversions; the small ones are quick, and the most likely to be slower."""
KINDS = ("macs", "params", "speedup")
BATCHES = (1, 8, 32)
FACTORS = (1.15, 6.0)
SECONDS = 3.0
IMAGES, PATCHES = 500, 4096
"""Of the calibration: what is asked about is time, not accuracy."""


@dataclass(frozen=True)
class Draw:
    """One conversion to try.

    Attributes
    ----------
    model : str
        Name in `TARGETS`.
    kind : str
        Field of `Budget`.
    factor : float
    batch : int
    """

    model: str
    kind: str
    factor: float
    batch: int

    def __str__(self) -> str:
        return f"--{self.kind} {self.factor:g} --batch {self.batch}"


@dataclass(frozen=True)
class Row:
    """One conversion, and its result timed anew.

    Attributes
    ----------
    model, asked : str
    replaced : int
        Layers that were replaced; 0 where the original was written.
    claimed : float
        Speed-up that the conversion's own report states.
    ratio, low, high : float
        Speed-up as timed anew, and its 95 % interval.
    """

    model: str
    asked: str
    replaced: int
    claimed: float
    ratio: float
    low: float
    high: float

    @property
    def slower(self) -> bool:
        """Whether the result takes longer than its original."""
        return self.high < 1.0


def draws(seed: int, models: list[str]) -> Iterator[Draw]:
    """Draw conversions without end, the models in their shares.

    Parameters
    ----------
    seed : int
    models : list of str
        Names in `SHARES`.
    """
    random = np.random.default_rng(seed)
    turns = [name for name in models for _ in range(SHARES[name])]
    while True:
        for model in random.permutation(turns):
            low, high = np.log(FACTORS)
            yield Draw(
                str(model),
                str(random.choice(KINDS)),
                round(float(np.exp(random.uniform(low, high))), 2),
                int(random.choice(BATCHES)),
            )


def main(
    runs: Annotated[int, typer.Option(min=1, help="Conversions.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Seed of what is drawn.")] = 0,
    shared: Annotated[Path, typer.Option(help="Folder with models/ and data/.")] = ROOT.parent
    / "shared",
    only: Annotated[list[str] | None, typer.Option(help="Names of models, as resnet20.")] = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = ROOT
    / "docs"
    / "never-slower.md",
    work: Annotated[Path, typer.Option(help="Where rows are kept; a run goes on from there.")] = (
        ROOT / "references" / "never-slower"
    ),
) -> None:
    """Convert at random budgets and time what comes out; exit code 1 where a result is slower."""
    files = {target.name: target.file for target in TARGETS}
    models = [name for name in SHARES if not only or any(o in files[name] for o in only)]
    if not models:
        sys.exit(f"none of {', '.join(files.values())} is meant by --only {' '.join(only or [])}")
    work.mkdir(parents=True, exist_ok=True)
    store = work / f"rows-{seed}.json"
    kept: dict[str, Any] = json.loads(store.read_text()) if store.exists() else {}
    rows: list[Row] = []
    for draw in draws(seed, models):
        if len(rows) == runs:
            break
        key = f"{draw.model} {draw}"
        if key not in kept:
            print(f"== {len(rows) + 1} of {runs}: {key}", flush=True)
            row = _converted(draw, shared)
            kept[key] = None if row is None else asdict(row)
            write_text_atomically(store, json.dumps(kept, indent=1) + "\n")
        if kept[key] is not None:
            rows.append(Row(**kept[key]))
    write_text_atomically(out, page(rows, seed))
    print(f"wrote {out}")
    if any(row.slower for row in rows):
        raise typer.Exit(1)


def _converted(draw: Draw, shared: Path) -> Row | None:
    """Convert and time anew; None where the budget is out of reach."""
    target = next(each for each in TARGETS if each.name == draw.model)
    model = shared / "models" / target.file
    images = shared / "data" / "cifar10" / "calib"
    preprocessing, runtime = target.preprocessing(), Runtime()
    with tempfile.TemporaryDirectory() as name:
        small = Path(name) / "small.onnx"
        try:
            conversion = converter.convert(
                model,
                images,
                small,
                Budget(**{draw.kind: draw.factor}),
                preprocessing=preprocessing,
                calibration=CalibrationSettings(images=IMAGES, patches=PATCHES),
                target=Target(runtime, draw.batch),
                cache=Path(name) / "cache",
            )
        except ConfigError as error:
            print(error, flush=True)
            return None
        data = open_calibration_set(images, model_inputs(load_model(model)), preprocessing)
        feeds = next(data.batches(draw.batch)).feeds
        timings = measure_latency(
            {"original": model, "converted": small}, feeds, runtime, seconds=SECONDS
        )
        found = speedup(timings["original"], timings["converted"])
    assert conversion.latency is not None, "conversions are timed unless told otherwise"
    return Row(
        model=draw.model,
        asked=str(draw),
        replaced=sum(layer.scheme != "kept" for layer in conversion.layers),
        claimed=conversion.latency.speedup,
        ratio=found.ratio,
        low=found.low,
        high=found.high,
    )


def page(rows: list[Row], seed: int) -> str:
    """Write the page."""
    here = machine()
    slower = sum(row.slower for row in rows)
    lines = [
        "# Never slower",
        "",
        f"Written by `python -m tools.never_slower --runs {len(rows)} --seed {seed}`: conversions of the "
        "reference models at budgets",
        f"that were drawn at random, on {IMAGES:,} calibration images, each with an empty cache of "
        "measurements. Every result is timed",
        "against its original once more, in turns, with other sessions than the conversion had. It counts "
        "as slower where the",
        "whole 95 % interval lies below 1.",
        "",
        f"- Machine: {here['processor']}, {here['usable_cores']} cores; onnxruntime "
        f"{here['versions']['onnxruntime']}.",
        f"- **{len(rows) - slower} of {len(rows)} are not slower.**",
        "",
        "| model | asked for | layers replaced | speed-up, as its report says | timed anew (95 %) |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        verdict = " **slower**" if row.slower else ""
        lines.append(
            f"| {row.model} | `{row.asked}` | {row.replaced} | {row.claimed:.2f} | "
            f"{interval(row.ratio, row.low, row.high)}{verdict} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)

"""Convert a VGG-16 for 224×224 images, and write docs/results-224.md: time, memory, and speed realised.

    python -m tools.large [--network vgg16] [--factor 2 --factor 4] [--out docs/results-224.md]

The network has random weights (`python -m models export`), so its answers mean nothing; its shapes, and
so time, memory and speed, are real. Each row is one `twofold convert` at batch 1 with the default settings
on 256 calibration images, in a program of its own, and one `twofold validate`, which times both models anew.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from converter.output_file import write_text_atomically
from converter.report.words import interval
from converter.runtime import machine
from models import NETWORKS, build, export_onnx, initialise
from tools.reference import ROOT, run_twofold

__all__ = ["Row", "main", "page"]

IMAGES = 256
COMPARED = 16
"""Images that both models answer, before they are timed."""


@dataclass(frozen=True)
class Row:
    """One conversion, measured.

    Attributes
    ----------
    network, budget : str
    macs, params : float
        Original over converted.
    speedup, low, high : float
        Of batch 1, timed anew, with its 95 % interval.
    off : float
        Latency as planned over as measured, less 1.
    seconds, memory_mib : float
        Of the whole program `twofold convert`.
    """

    network: str
    budget: str
    macs: float
    params: float
    speedup: float
    low: float
    high: float
    off: float
    seconds: float
    memory_mib: float

    @property
    def realised(self) -> float:
        """Speed-up over the reduction of multiply-accumulates."""
        return self.speedup / self.macs


def main(
    network: Annotated[str, typer.Option(help="Network, as `python -m models list` has it.")] = (
        "vgg16"
    ),
    factor: Annotated[list[float] | None, typer.Option(help="Budgets for --macs.")] = None,
    calib: Annotated[Path, typer.Option(help="Folder of images.")] = (
        ROOT.parent / "shared" / "data" / "cifar10" / "calib"
    ),
    work: Annotated[Path, typer.Option(help="Where models and rows go.")] = ROOT
    / "references"
    / "large",
    out: Annotated[Path, typer.Option(help="The page to write.")] = ROOT
    / "docs"
    / "results-224.md",
    fresh: Annotated[bool, typer.Option(help="Forget the rows of earlier runs.")] = False,
) -> None:
    """Convert at every budget, and write the page."""
    work.mkdir(parents=True, exist_ok=True)
    model, side = work / f"{network}.onnx", NETWORKS[network].size
    if not model.exists():
        net = build(network)
        initialise(net, 0, size=side)
        export_onnx(net, model, size=side)
    store = work / "rows.json"
    rows: dict[str, Any] = {} if fresh or not store.exists() else json.loads(store.read_text())
    for each in factor or (2.0, 4.0):
        key = f"{network} --macs {each:g}"
        if key not in rows:
            print(f"== {key}", flush=True)
            rows[key] = asdict(_measure(model, each, calib, work))
            write_text_atomically(store, json.dumps(rows, indent=1) + "\n")
    write_text_atomically(out, page([Row(**each) for each in rows.values()]))
    print(f"wrote {out}")


def _measure(model: Path, factor: float, calib: Path, work: Path) -> Row:
    small, report, comparison = (
        work / f"{model.stem}-{factor:g}{end}" for end in (".onnx", ".json", "-against.json")
    )
    cache, probe = work / f"cache-{factor:g}-{time.time():.0f}", work / "memory"
    started = time.monotonic()
    memory = run_twofold(
        "convert", str(model), "--calib", str(calib), "--images", str(IMAGES), "--out", str(small),
        "--preset", "imagenet", "--macs", f"{factor:g}", "--report", str(report),
        "--cache", str(cache), probe=probe,
    )  # fmt: skip
    seconds = time.monotonic() - started
    run_twofold(
        "validate", str(model), str(small), "--data", str(calib), "--images", str(COMPARED),
        "--preset", "imagenet", "--no-labels", "--json", str(comparison), probe=probe,
    )  # fmt: skip
    converted = json.loads(report.read_text())
    ratio = json.loads(comparison.read_text())["latencies"][0]["speedup"]
    return Row(
        network=model.stem,
        budget=f"--macs {factor:g}",
        macs=converted["macs_reduction"],
        params=converted["params_reduction"],
        speedup=ratio["ratio"],
        low=ratio["low"],
        high=ratio["high"],
        off=converted["latency"]["off"],
        seconds=seconds,
        memory_mib=memory,
    )


def page(rows: list[Row]) -> str:
    """Write the page."""
    here = machine()
    lines = [
        "# Networks for 224×224 images: time, memory, and speed realised",
        "",
        "Written by `python -m tools.large`. Random weights: answers mean nothing, shapes and speed are "
        "real. Each row is one",
        f"`twofold convert` with its default settings on {IMAGES} images and with an empty cache of "
        "measurements, and one `twofold validate`.",
        "",
        f"- Machine: {here['processor']}, {here['usable_cores']} cores; onnxruntime "
        f"{here['versions']['onnxruntime']}, torch {here['versions']['torch']}.",
        "- Speed-up: batch 1, all cores, median ratio of interleaved runs, with its 95 % interval.",
        "  Realised: speed-up over the reduction of multiply-accumulates. Predicted: latency as planned",
        "  over as measured, less 1. Seconds and memory: the whole program `twofold convert`.",
        "",
        "| network | asked for | MACs ÷ | params ÷ | speed-up (95 %) | realised | predicted | seconds | "
        "peak MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.network} | `{row.budget}` | {row.macs:.2f} | {row.params:.2f} | "
        f"{interval(row.speedup, row.low, row.high)} | {row.realised:.2f} | "
        f"{100 * row.off:+.0f} % | {row.seconds:.0f} | {row.memory_mib:,.0f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)

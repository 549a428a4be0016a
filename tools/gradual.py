"""In how many parts is a budget best met? Convert and recover in one and in several, and print what is lost.

    python -m tools.gradual [--model resnet20] [--factor 2 --factor 3.4] [--parts 1 --parts 2] [--recover 6m]

Each row is one `twofold convert --recover` that learns from the training images without their labels. What
is printed is the loss on images that were held out of those; the validation images are not looked at. It
takes what `--recover` says, and a minute or so more, for each row.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tools.reference import ROOT, TARGETS, run_twofold, train_images

__all__ = ["main"]


def main(
    model: Annotated[str, typer.Option(help="A reference model, by the start of its file.")] = (
        "resnet20"
    ),
    factor: Annotated[
        list[float] | None, typer.Option(help="Budgets for --macs and --params.")
    ] = None,
    parts: Annotated[list[int] | None, typer.Option(help="What --gradual is given.")] = None,
    recover: Annotated[str, typer.Option(help="What --recover is given.")] = "6m",
    shared: Annotated[Path, typer.Option(help="Folder with models/ and data/.")] = ROOT.parent
    / "shared",
    work: Annotated[Path, typer.Option(help="Where models and reports go.")] = ROOT
    / "references"
    / "gradual",
) -> None:
    """Convert at every budget, in every number of parts."""
    work.mkdir(parents=True, exist_ok=True)
    target = next(each for each in TARGETS if each.file.startswith(model))
    images = train_images(shared / "data" / "cifar10", work)
    table = Table("budget", "parts", "loss as converted", "recovered", "same class", "epochs")
    for each in factor or (2.0, 3.4):
        for count in parts or (1, 2):
            out = work / f"{model}-{each:g}-in-{count}.onnx"
            run_twofold(
                "convert", str(shared / "models" / target.file), "--out", str(out),
                "--calib", str(shared / "data" / "cifar10" / "calib"), *target.preparation,
                "--macs", f"{each:g}", "--params", f"{each:g}", "--recover", recover,
                "--gradual", str(count), "--recover-images", str(images), probe=work / "memory",
            )  # fmt: skip
            found = json.loads(out.with_suffix(".json").read_text())["recovery"]
            table.add_row(
                f"MACs and parameters ÷ {each:g}",
                str(count),
                f"{found['before']['loss']:.4g}",
                f"{found['after']['loss']:.4g}",
                f"{100 * found['after']['agreement']:.1f} % of {found['held_out']:,}",
                f"{found['epochs']:.1f} in the last part",
            )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)

"""The headings of options, and the options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "BUDGET",
    "GATES",
    "IMAGES",
    "OUTPUT",
    "QUANTIZATION",
    "RECOVERY",
    "RUNNING",
    "TABLES",
    "Batch",
    "Calib",
    "CalibBatch",
    "Device",
    "Html",
    "Images",
    "Json",
    "Model",
    "Original",
    "Out",
    "Quiet",
    "Seed",
    "Size",
    "Timing",
]

IMAGES = "How images are prepared"
RUNNING = "Where and how it runs"
BUDGET = "What the result may cost (one or more), or lose"
RECOVERY = "Recovery, with the original as teacher"
QUANTIZATION = "Quantization, last of all"
GATES = "What must hold"
OUTPUT = "Output"

TABLES = {
    BUDGET: "budget",
    IMAGES: "preprocessing",
    RUNNING: "running",
    RECOVERY: "recovery",
    QUANTIZATION: "quantization",
    GATES: "gates",
    OUTPUT: "output",
}
"""Table of `twofold.toml` for the options under each heading; those under none stand at the top."""


Model = Annotated[Path, typer.Argument(metavar="MODEL", help="ONNX model.")]
Original = Annotated[Path, typer.Argument(metavar="ORIGINAL", help="The model as it was.")]
Calib = Annotated[
    Path, typer.Option(help="Folder of images, .npy or .npz file; labels are not needed.")
]
Out = Annotated[Path, typer.Option(help="ONNX file to write.")]
Size = Annotated[
    str | None,
    typer.Option(metavar="H[xW]", help="Size of the images, where the model leaves it free."),
]

# Where and how it runs

Images = Annotated[
    int | None,
    typer.Option(help="At most so many images, spread evenly.", rich_help_panel=RUNNING),
]
CalibBatch = Annotated[
    int, typer.Option(help="Images that are recorded at once.", rich_help_panel=RUNNING)
]
Batch = Annotated[
    int,
    typer.Option(help="Images at once that the result must be fast at.", rich_help_panel=RUNNING),
]
Timing = Annotated[
    bool,
    typer.Option(
        "--timing/--no-timing",
        help="Whether layers and results are timed; without, MACs and parameters alone count.",
        rich_help_panel=RUNNING,
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of all that is drawn.", rich_help_panel=RUNNING)]
Device = Annotated[
    str,
    typer.Option(
        metavar="cpu|cuda[:N]", help="torch device of fits and training.", rich_help_panel=RUNNING
    ),
]

# Output

Json = Annotated[Path | None, typer.Option(help="JSON file to write.", rich_help_panel=OUTPUT)]
Html = Annotated[
    Path | None,
    typer.Option(help="Page to write: one HTML file for any browser.", rich_help_panel=OUTPUT),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print errors only.", rich_help_panel=OUTPUT)
]

"""What are the parts of a plan worth? Convert with one of them left out, and write docs/ablations.md.

    python -m tools.ablations [--model vgg16] [--factor 4] [--images 2000] [--out docs/ablations.md]

Each row is one conversion without timing. Its outputs are compared with the original's on training images
that no conversion has seen; the validation images are not looked at, so that choices may be made by what
stands here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from unittest import mock

import typer

import converter
from converter.config import Budget, SolverSettings
from converter.output_file import write_text_atomically
from converter.runtime import machine
from converter.schemes import SCHEMES
from tools.reference import RESULTS, ROOT, TARGETS, Target, train_images

__all__ = ["WITHOUT", "Row", "main", "page"]


def _schemes_but(*left_out: str) -> SolverSettings:
    return SolverSettings(schemes=tuple(name for name in SCHEMES if name not in left_out))


def _uncorrected() -> AbstractContextManager[object]:
    """Plan by the effects that Ω predicts."""
    return mock.patch("converter.pace.correct_effects")


WITHOUT = {
    "nothing": (SolverSettings(), nullcontext),
    "measured effects (ADR 19)": (SolverSettings(), _uncorrected),
    "`depthwise` (ADR 21)": (_schemes_but("depthwise"), nullcontext),
    "`depthwise` and `tucker`": (_schemes_but("depthwise", "tucker"), nullcontext),
    "rounds through the activation": (SolverSettings(polish=0), nullcontext),
}
"""What is left out of a conversion, and how."""


@dataclass(frozen=True)
class Row:
    """One conversion, compared with its original.

    Attributes
    ----------
    model : str
    factor : float
        Reduction of the multiply-accumulates that was asked for.
    without : str
        Key of `WITHOUT`.
    predicted : float
        Squared error of the outputs that the plan was chosen by, relative to their variance.
    error : float
        ‖outputs − original's‖ over ‖original's‖.
    agreement : float
        Share of the images with the original's class.
    images : int
    """

    model: str
    factor: float
    without: str
    predicted: float
    error: float
    agreement: float
    images: int


def main(
    model: Annotated[
        list[str] | None, typer.Option(help="Reference models, by the start of their files.")
    ] = None,
    factor: Annotated[list[float] | None, typer.Option(help="Budgets for --macs.")] = None,
    images: Annotated[int, typer.Option(help="Unseen images.")] = 2000,
    shared: Annotated[Path, typer.Option(help="Folder with models/ and data/.")] = ROOT.parent
    / "shared",
    work: Annotated[Path, typer.Option(help="Where models go.")] = ROOT
    / "references"
    / "ablations",
    out: Annotated[Path, typer.Option(help="The page to write.")] = ROOT / "docs" / "ablations.md",
) -> None:
    """Convert at every budget, with everything and without each part, and write the table."""
    work.mkdir(parents=True, exist_ok=True)
    unseen = train_images(shared / "data" / "cifar10", RESULTS)
    rows = []
    # what conversions share is done once, and anew in each run: the program may have changed since
    with tempfile.TemporaryDirectory() as kept:
        for name in model or ("vgg16",):
            target = next(each for each in TARGETS if each.file.startswith(name))
            for each in factor or (4.0,):
                for without in WITHOUT:
                    print(f"== {target.name} ÷ {each:g} without {without}", flush=True)
                    made = work / f"{target.file}-{each:g}-{list(WITHOUT).index(without)}.onnx"
                    rows.append(
                        _measured(target, each, without, shared, made, kept, unseen, images)
                    )
                    write_text_atomically(out, page(rows))
    print(f"wrote {out}")


def _measured(
    target: Target,
    factor: float,
    without: str,
    shared: Path,
    made: Path,
    kept: str,
    unseen: Path,
    images: int,
) -> Row:
    solver, patched = WITHOUT[without]
    original = shared / "models" / target.file
    with patched():
        converted = converter.convert(
            original,
            shared / "data" / "cifar10" / "calib",
            made,
            Budget(macs=factor),
            preprocessing=target.preprocessing(),
            solver=solver,
            timing=False,
            work=kept,
        )
    compared = converter.validate(
        original,
        made,
        unseen,
        preprocessing=target.preprocessing(),
        labels=False,
        images=images,
        time_batches=(),
    )
    found = compared.outputs[0]
    assert found.relative_l2 is not None, "the outputs of reference models are not all zero"
    assert compared.agreement is not None, "the reference models are classifiers"
    return Row(
        model=target.name,
        factor=factor,
        without=without,
        predicted=sum(layer.effect or 0.0 for layer in converted.layers),
        error=found.relative_l2,
        agreement=compared.agreement.top1,
        images=compared.images,
    )


def page(rows: Sequence[Row]) -> str:
    """Write the rows as a Markdown page.

    Parameters
    ----------
    rows : sequence of Row
    """
    here = machine()
    lines = [
        "# What the parts of a plan are worth",
        "",
        "Written by `python -m tools.ablations`. Each row is one conversion with `--no-timing` from the",
        "2,000 calibration images, with one part left out. Its outputs are compared with the original's on",
        "training images that no conversion has seen; nothing is retrained.",
        "",
        f"- Machine: {here['processor']}, {here['usable_cores']} cores; onnxruntime "
        f"{here['versions']['onnxruntime']}, torch {here['versions']['torch']}.",
        "- Off: ‖outputs − original's‖ over ‖original's‖. Predicted: the squared error, relative to the",
        "  variance of the outputs, that the plan was chosen by.",
        "",
        "| model, budget | without | outputs off | same class | images | predicted |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.model}, MACs ÷ {row.factor:g} | {row.without} | {100 * row.error:.2f} % | "
        f"{100 * row.agreement:.2f} % | {row.images:,} | {row.predicted:.4f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)

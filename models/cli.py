"""`python -m models`: list the networks, export one, or train the digits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from models.catalog import NETWORKS, build
from models.errors import NetworkError
from models.export import Exported, check_images, check_target, export_onnx
from models.weights import initialise, load_weights

__all__ = ["app"]

app = typer.Typer(
    help="CNNs to try Twofold on, written as ONNX files.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Seed = Annotated[int, typer.Option(min=0, help="Seed of all random values.")]


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Turn an expected error into one sentence and exit code 2."""
    try:
        yield
    except NetworkError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or 'the file'} cannot be written: {error.strerror or error}"
    else:
        return
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"Error: {message}", markup=False)
    raise typer.Exit(2)


def _describe(exported: Exported, size: int, channels: int, opset: int) -> str:
    return (
        f"wrote {exported.path}: {exported.parameters:,} parameters, "
        f"{exported.size_bytes / 2**20:.1f} MiB, input (batch, {channels}, {size}, {size}), "
        f"opset {opset}; torch and onnxruntime agree to {exported.error:.1e} of the outputs' range"
    )


@app.command("list")
def list_networks() -> None:
    """List the networks that can be exported."""
    table = Table("name", "images", "classes", "parameters", "loads state dicts of", box=None)
    for network in NETWORKS.values():
        table.add_row(
            network.name,
            f"{network.size}×{network.size}",
            str(network.classes),
            f"{network.parameter_count():,}",
            network.state_dicts,
        )
    Console().print(table)


@app.command()
def export(
    name: Annotated[str, typer.Argument(help="Network, as `list` names it.")],
    out: Annotated[Path, typer.Option(help="ONNX file to write.")],
    weights: Annotated[
        Path | None, typer.Option(help="State dict to load (.pth); without it, random weights.")
    ] = None,
    classes: Annotated[int | None, typer.Option(help="Classes, where not the usual.")] = None,
    size: Annotated[
        int | None, typer.Option(help="Side of the images, in pixels, where not the usual.")
    ] = None,
    opset: Annotated[int, typer.Option(help="ONNX opset, 13 to 20.")] = 17,
    seed: Seed = 0,
    transform_input: Annotated[
        bool | None,
        typer.Option(
            help="googlenet only: bring ImageNet's normalisation to that of torchvision's weights. "
            "Default: on with --weights."
        ),
    ] = None,
) -> None:
    """Write a network as an ONNX file, checked against onnxruntime before it appears."""
    console = Console(soft_wrap=True, highlight=False)
    with _one_sentence():
        check_target(out)
        if transform_input is None:
            transform_input = name == "googlenet" and weights is not None
        net = build(name, classes=classes, size=size, transform_input=transform_input)
        side = NETWORKS[name].size if size is None else size
        check_images(net, side)
        if weights is None:
            console.print(
                f"random weights (seed {seed}): the answers mean nothing, shape and speed are real"
            )
            initialise(net, seed, size=side)
        else:
            load_weights(net, weights)
        exported = export_onnx(net, out, size=side, opset=opset)
    console.print(_describe(exported, side, 3, opset), markup=False)


@app.command()
def digits(
    out: Annotated[Path, typer.Option(help="Folder for digits.onnx, calib/ and val/.")],
    epochs: Annotated[int, typer.Option(help="Passes over the train images.")] = 4,
    seed: Seed = 0,
) -> None:
    """Train a small network on scikit-learn's digits; write it and images to try it on."""
    with _one_sentence():
        try:
            import models.digits as trained  # slow to import, and scikit-learn is a dev extra
        except ModuleNotFoundError as error:
            raise NetworkError(
                f"{error.name} is not installed; install it with: pip install scikit-learn"
            ) from error
        console = Console(soft_wrap=True, highlight=False)
        images, labels = trained.digits_images()
        split = trained.split_digits(labels, seed)
        for part, chosen in (("calib", split.calib), ("val", split.val)):
            trained.write_digits_folder(out / part, images[chosen], labels[chosen])
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("training", total=epochs)
            net = trained.train_digits(
                seed,
                epochs,
                lambda epoch, loss: bar.update(
                    task, completed=epoch, description=f"epoch {epoch}/{epochs}, loss {loss:.3f}"
                ),
            )
        exported = export_onnx(net, out / "digits.onnx", size=trained.SIZE, channels=1)
        accuracy = trained.digits_accuracy(net, images[split.val], labels[split.val])
    console.print(_describe(exported, trained.SIZE, 1, 17), markup=False)
    console.print(
        f"accuracy on {out / 'val'} ({len(split.val)} images, unseen): {accuracy:.2%}; "
        f"to calibrate: {out / 'calib'} ({len(split.calib)} images); input is gray, pixel/255",
        markup=False,
    )

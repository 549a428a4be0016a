"""The linear layers of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from converter.report.console.output import headed, output_console, print_lines, print_notes, texts
from converter.report.words import count, shape

if TYPE_CHECKING:
    from converter.inspection import Inspection

__all__ = ["print_inspection"]


def print_inspection(inspection: Inspection, console: Console | None = None) -> None:
    """Print every linear layer and the totals."""
    console = console or output_console()
    table = headed(
        "layer", "op", "weight", "output", ">MACs", ">parameters", "activation", "convertible"
    )
    for layer in inspection.layers:
        table.add_row(
            *texts(
                [
                    layer.name,
                    layer.op,
                    shape(layer.weight_shape),
                    shape(layer.output_shape),
                    count(layer.macs),
                    count(layer.params),
                    layer.activation,
                    "yes" if layer.reason is None else f"no: {layer.reason}",
                ]
            )
        )
    if inspection.layers:
        console.print(table)
    inputs = ", ".join(
        f"{each.name} {each.dtype} {shape(each.shape)}" for each in inspection.inputs
    )
    share = inspection.convertible_macs / inspection.macs if inspection.macs else 0.0
    print_lines(
        console,
        [
            f"inputs      {inputs}",
            f"MACs        {count(inspection.macs)}, {share:.1%} of them in the "
            f"{len(inspection.convertible)} of {len(inspection.layers)} layers that can be "
            "converted",
            f"parameters  {count(inspection.params)}",
        ],
    )
    if inspection.folded:
        print_lines(
            console, [f"folded      {inspection.folded} changes by folding BatchNormalization"]
        )
    print_notes(console, inspection.notes)

"""Export to ONNX, checked before the file appears.

The exporter is torch's TorchScript one (`dynamo=False`): it writes the opset that is asked for,
keeps GlobalAveragePool and Flatten, and needs no further package. The newer one implements opset 18
and above only (`Pad` does not convert back to 17) and writes ReduceMean and Reshape in their place.
Constant subgraphs that the older one leaves (the pads of a shortcut) are folded here.
"""

from __future__ import annotations

import inspect
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import torch
from torch import nn

from models.errors import ExportError

__all__ = ["Exported", "check_images", "check_target", "export_onnx"]

TOLERANCE = 1e-4
"""Largest difference between torch and onnxruntime, relative to the range of the outputs. The two
sum in other orders: float32 round-off over the deepest networks is some 1e-6 of the range; a wrong
graph is off by 1e-2 and more."""

_BATCHES = (1, 3)
_LARGEST = 2**31 - 2**20  # bytes of weights in one protobuf file, which ends at 2 GiB

# What torch says about its own exporter; nothing that a caller could act on.
_EXPORTER_WARNINGS = (
    ("You are using the legacy TorchScript-based ONNX export", DeprecationWarning),
    ("The feature will be removed. Please remove usage of this function", DeprecationWarning),
    ("Constant folding - Only steps=1 can be constant folded", UserWarning),
)


@dataclass(frozen=True)
class Exported:
    """What was written, and how well it agrees.

    Attributes
    ----------
    path : Path
        The ONNX file.
    parameters : int
        Trainable parameters of the torch network.
    size_bytes : int
        Size of the file, in bytes.
    error : float
        Largest difference between torch and onnxruntime, relative to the outputs' range, from 0.
    """

    path: Path
    parameters: int
    size_bytes: int
    error: float


def check_target(out: Path) -> None:
    """Raise `ExportError` where no file can be written at `out`."""
    if out.is_dir():
        raise ExportError(
            f"{out} is a folder; give --out the name of a file, such as {out / 'model.onnx'}"
        )
    if not out.parent.is_dir():
        raise ExportError(
            f"there is no folder {out.parent} to write {out.name} into; create it or correct --out"
        )


def check_images(net: nn.Module, size: int, channels: int = 3) -> None:
    """Raise `ExportError` where `net` cannot take images of `size` × `size` pixels."""
    net.eval()
    try:
        with torch.no_grad():
            net(torch.zeros(1, channels, size, size))
    except RuntimeError as error:  # torch's word for shapes that do not fit
        reason = str(error).splitlines()[0]
        raise ExportError(
            f"the network cannot take {size}×{size} images ({reason}); give another --size"
        ) from error


def _trace(net: nn.Module, example: torch.Tensor, opset: int, path: Path) -> onnx.ModelProto:
    """Return the model that torch's exporter writes, by way of a file at `path`."""
    arguments: dict[str, Any] = {}
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:
        arguments["dynamo"] = False  # torch before 2.5 knows this exporter only
    with warnings.catch_warnings():
        for message, category in _EXPORTER_WARNINGS:
            warnings.filterwarnings("ignore", message, category)  # of the exporter, about itself
        torch.onnx.export(
            net,
            (example,),
            str(path),
            input_names=["input"],
            output_names=["logits"],
            dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
            opset_version=opset,
            **arguments,
        )
    return onnx.load(path)


def _fold_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with all that follows from constants alone as initializers."""
    # Of equal initializers, such as biases of zeros, the exporter keeps one and adds an Identity.
    if not any(node.op_type in ("Constant", "Identity") for node in model.graph.node):
        return model
    graph = gs.import_onnx(model)
    graph.fold_constants().cleanup().toposort()
    # Newest IR versions are not known to older runtimes: stay with the exporter's.
    folded: onnx.ModelProto = gs.export_onnx(graph, ir_version=model.ir_version)
    return folded


def _disagreement(net: nn.Module, path: Path, shape: tuple[int, int, int]) -> float:
    """Return the largest difference on seeded noise, relative to the outputs' range."""
    options = ort.SessionOptions()
    options.log_severity_level = 3  # its optimiser's remarks are of no use here; errors raise
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # cores may be busy
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch in _BATCHES:
        images = torch.randn(batch, *shape, generator=generator)
        with torch.no_grad():
            expected = net(images).numpy()
        (got,) = session.run(["logits"], {"input": images.numpy()})
        if got.shape != expected.shape:
            raise ExportError(
                f"{path.name} was not written: at batch {batch} onnxruntime answers with shape "
                f"{got.shape} and torch with {expected.shape}; try another --opset"
            )
        if not (np.isfinite(expected).all() and np.isfinite(got).all()):
            raise ExportError(
                f"{path.name} was not written: the network's answers are not finite; "
                "check the weights"
            )
        spread = float(np.ptp(expected)) or 1.0  # constant answers: compare absolutely
        worst = max(worst, float(np.abs(got - expected).max()) / spread)
    return worst


def export_onnx(
    net: nn.Module, out: Path, *, size: int, channels: int = 3, opset: int = 17
) -> Exported:
    """Write `net` to one ONNX file, once onnxruntime agrees with torch at batches 1 and 3.

    Parameters
    ----------
    net : nn.Module
        (n, channels, size, size) float32 → (n, classes) float32, on the CPU; is put into eval mode.
    out : Path
        File that appears, or is replaced, only if everything went well.
    size, channels : int
        Side, in pixels, and channels of the images.
    opset : int, default 17
        Version of ONNX's operators, 13 to 20.

    Returns
    -------
    Exported
        What was written; input `input` (batch, channels, size, size) and output `logits`
        (batch, classes), with a dynamic batch.

    Raises
    ------
    ExportError
        Where the network cannot take such images, the file cannot be written, or the two disagree.
    """
    check_target(out)
    if not 13 <= opset <= 20:
        raise ExportError(f"opset {opset} is not from 13 to 20; 17 is understood by most runtimes")
    if sum(t.numel() * t.element_size() for t in net.state_dict().values()) > _LARGEST:
        raise ExportError(
            f"{out.name} would not fit the 2 GiB of one ONNX file; give fewer --classes"
        )
    check_images(net, size, channels)
    example = torch.zeros(2, channels, size, size)
    # A folder beside `out` is on the same disk, so that the last step is a rename.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as beside:
        model = _fold_constants(_trace(net, example, opset, Path(beside) / "traced.onnx"))
        draft = Path(beside) / out.name
        onnx.save(model, draft)
        difference = _disagreement(net, draft, (channels, size, size))
        if not difference <= TOLERANCE:
            raise ExportError(
                f"{out.name} was not written: onnxruntime and torch differ by {difference:.1e} of "
                f"the outputs' range, more than {TOLERANCE:.0e}; try another --opset"
            )
        draft.replace(out)
    parameters = sum(p.numel() for p in net.parameters())
    return Exported(out, parameters, out.stat().st_size, difference)

"""Convert a model of more than 2 GB with external data, and write a section of docs/reliability.md.

    python -m tools.over_2gb

The network is a face recogniser: some Convs, an embedding, and a last layer with a row for each of 280,000
people, 2.3 GB in two halves. Weights are random; the singular values of those of Convs fall like 1/i. It is
one `twofold convert` in a program of its own, whose seconds and highest resident memory are measured, and one
comparison of both models under onnxruntime.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import typer
from numpy.typing import NDArray
from onnx import TensorProto, helper

from converter.config import Runtime
from converter.model_file import save_model
from converter.runtime import open_session
from tools.reference import run_twofold
from tools.reliability import load_figures, machine_line, save_figures, write_section

__all__ = ["main", "recogniser"]

PEOPLE, EMBEDDING, WIDTH, SIDE = 280_000, 2048, 96, 56
IMAGES = 32
BOUND = 6
"""Resident memory is at most so many times the model, and 1 GiB, which the program takes without it."""


def main(
    people: Annotated[int, typer.Option(min=1000, help="Rows of the last layer.")] = PEOPLE,
    work: Annotated[Path | None, typer.Option(help="Where the model goes; 5 GB.")] = None,
) -> None:
    """Convert it; exit code 1 where the bound does not hold."""
    with tempfile.TemporaryDirectory(dir=work) as name:
        figures = _measured(Path(name), people)
    found = load_figures("over-2gb") | figures
    save_figures("over-2gb", found)
    write_section("A model over 2 GB", _section(found))
    if found["peak_mib"] > found["bound_mib"]:
        raise typer.Exit(1)


def recogniser(people: int) -> onnx.ModelProto:
    """Build the network: (batch, 3, 56, 56) → a score for each of `people`."""
    random = np.random.default_rng(0)
    tensors, nodes = [], []

    def weight(name: str, *shape: int) -> str:
        values = random.standard_normal(shape, np.float32)
        if len(shape) == 4:
            values = _falling(values)
        values *= np.float32(np.sqrt(2 / np.prod(shape[1:])))
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
        tensor.raw_data = values.tobytes()
        tensors.append(tensor)
        return name

    x, channels = "face", 3
    for number in range(5):
        operands = [x, weight(f"w{number}", WIDTH, channels, 3, 3)]
        stride = 2 if number == 4 else 1
        nodes.append(
            helper.make_node(
                "Conv", operands, [f"c{number}"], f"conv{number}",
                pads=[1] * 4, strides=[stride] * 2,
            )
        )  # fmt: skip
        nodes.append(helper.make_node("Relu", [f"c{number}"], [f"r{number}"]))
        x, channels = f"r{number}", WIDTH
    nodes += [
        helper.make_node("GlobalAveragePool", [x], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node(
            "Gemm", ["flat", weight("we", EMBEDDING, WIDTH)], ["e"], "embed", transB=1
        ),
        helper.make_node("Relu", ["e"], ["embedding"]),
    ]
    # in two halves: protobuf copies no tensor of more than 2 GB
    for half in ("first", "second"):
        operands = ["embedding", weight(half, people // 2, EMBEDDING)]
        nodes.append(helper.make_node("Gemm", operands, [f"{half}_scores"], half, transB=1))
    nodes.append(helper.make_node("Concat", ["first_scores", "second_scores"], ["scores"], axis=1))
    graph = helper.make_graph(
        nodes,
        "recogniser",
        [helper.make_tensor_value_info("face", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", people])],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _falling(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Let the singular values of a weight fall like 1/i, as those of trained networks do."""
    left, found, right = np.linalg.svd(values.reshape(len(values), -1), full_matrices=False)
    falling = found / np.arange(1, len(found) + 1)
    falling *= np.linalg.norm(found) / np.linalg.norm(falling)
    changed: NDArray[np.float32] = ((left * falling) @ right).reshape(values.shape)
    return changed.astype(np.float32)


def _measured(folder: Path, people: int) -> dict[str, float]:
    model, small, images = (folder / name for name in ("large.onnx", "small.onnx", "images.npy"))
    save_model(recogniser(people), model)
    faces = np.random.default_rng(1).normal(size=(IMAGES + 4, 3, SIDE, SIDE)).astype(np.float32)
    np.save(images, faces[:IMAGES])
    size = sum(path.stat().st_size for path in folder.glob("large.onnx*"))
    started = time.monotonic()
    peak = run_twofold(
        "convert", str(model), "--calib", str(images), "--out", str(small), "--macs", "1.3",
        "--no-timing", "--patches", "1024", "--calib-batch", "8", probe=folder / "probe",
    )  # fmt: skip
    seconds = time.monotonic() - started
    report = json.loads(small.with_suffix(".json").read_text())
    answers = []
    for path in (model, small):
        session = open_session(path, Runtime())
        answers.append(np.asarray(session.run(None, {"face": faces[IMAGES:]})[0]))
        del session
    wanted, found = answers
    return {
        "model_mib": size / 2**20,
        "layers": len(report["layers"]),
        "converted": sum(layer["scheme"] != "kept" for layer in report["layers"]),
        "macs": report["macs_reduction"],
        "seconds": seconds,
        "peak_mib": peak,
        "bound_mib": BOUND * size / 2**20 + 1024,
        "error": float(np.square(found - wanted).sum() / np.square(wanted - wanted.mean(0)).sum()),
    }


def _section(found: dict[str, float]) -> list[str]:
    return [
        "`python -m tools.over_2gb`: a face recogniser whose last layer has a row for each of 280,000 "
        "people; weights in external data.",
        f"`--macs 1.3 --no-timing`, {IMAGES} images. {machine_line()}.",
        "",
        f"- Model: {found['model_mib']:,.0f} MiB. Converted: {found['converted']:.0f} of "
        f"{found['layers']:.0f} layers, MACs ÷ {found['macs']:.2f}; the halves of the last layer "
        "are too wide and stay.",
        f"- **{found['seconds']:.0f} seconds, {found['peak_mib']:,.0f} MiB at most**; bound: {BOUND} times "
        f"the model and 1 GiB, {found['bound_mib']:,.0f} MiB.",
        f"- Squared error of the scores on 4 other images, relative to their variance: {found['error']:.2g}.",
    ]


if __name__ == "__main__":
    typer.run(main)

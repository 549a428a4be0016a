"""What the tests of the passes share: running models, and reading them from text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from passes.layers import Layer
from passes.split import Branches, Factor

Feeds = Mapping[str, NDArray[np.generic]]
Answers = dict[str, NDArray[np.generic]]
Run = Callable[..., Answers]


def run_model(
    model: onnx.ModelProto,
    feeds: Feeds,
    wanted: Sequence[str] | None = None,
    *,
    optimise: bool = True,
) -> Answers:
    """Outputs of `model` by name, on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = list(wanted or [output.name for output in session.get_outputs()])
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


@pytest.fixture(scope="session")
def run() -> Run:
    return run_model


@pytest.fixture(scope="session")
def parse() -> Callable[..., onnx.ModelProto]:
    """Model from the text of its graph; checked."""

    def read(graph: str, *, opset: int = 17, ir: int = 8, imports: str = "") -> onnx.ModelProto:
        header = f'<ir_version: {ir}, opset_import: ["": {opset}{imports}]>'
        model = onnx.parser.parse_model(f"{header}\n{graph}")
        onnx.checker.check_model(model, full_check=True)
        return model

    return read


@pytest.fixture(scope="session")
def light_models() -> dict[str, Path]:
    """The nine networks that the onnx package ships, by their name without "light_"."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    return {path.stem.removeprefix("light_"): path for path in sorted(folder.glob("*.onnx"))}


def exact_branches(layer: Layer, way: str, scheme: str = "channel", seed: int = 0) -> Branches:
    """Branches that together are the layer's weight itself, up to float32.

    Ways: "sparse" (all channels in S), "low rank" (full rank), "parts" (half of the channels in S,
    the others in L), "overlap" (S is noise on half of the channels, and L what is missing).
    Schemes of L: see `exact_factors`.
    """
    assert layer.weight is not None
    weight = layer.weight.astype(np.float64)
    channels = weight.shape[1]
    if way == "sparse":
        return Branches(support=np.arange(channels), sparse=weight, bias=layer.bias)
    support = sparse = None
    rest = weight
    if way != "low rank":
        rng = np.random.default_rng(seed)
        support = np.sort(rng.permutation(channels)[: (channels + 1) // 2]).astype(np.int64)
        sparse = weight[:, support]
        if way == "overlap":
            sparse = rng.normal(size=sparse.shape) * weight.std()
        rest = weight.copy()
        rest[:, support] -= sparse
    return Branches(support, sparse, exact_factors(rest, scheme, seed), layer.bias)


def exact_factors(weight: NDArray[np.float64], scheme: str, seed: int = 0) -> tuple[Factor, ...]:
    """Factors of full rank whose product is `weight`, (N, C, *kernel).

    "channel": all axes in the first of two; "spatial": the first half of the axes in the first of
    two, the others in the second; "tucker": all axes in the middle one of three.
    """
    outputs, channels, *kernel = weight.shape
    if scheme == "tucker":
        rng = np.random.default_rng(seed)
        into, out = rng.permutation(channels), rng.permutation(outputs)
        return (
            Factor(padded(np.eye(channels)[into], weight.ndim)),
            Factor(weight[out][:, into], tuple(range(len(kernel)))),
            Factor(padded(np.eye(outputs)[:, out], weight.ndim)),
        )
    cut = len(kernel) // 2 if scheme == "spatial" else len(kernel)
    first, second = kernel[:cut], kernel[cut:]
    kernel_last = np.moveaxis(weight.reshape(outputs, channels, *first, -1), -1, 1)
    left, right = full_rank_factors(kernel_last.reshape(outputs * math.prod(second), -1), seed)
    up = np.moveaxis(left.reshape(outputs, *second, -1), -1, 1)  # (N, r, *second)
    return (
        Factor(padded(right.reshape(-1, channels, *first), weight.ndim), tuple(range(cut))),
        Factor(up.reshape(*up.shape[:2], *[1] * cut, *second), tuple(range(cut, len(kernel)))),
    )


def padded(array: NDArray[np.float64], axes: int) -> NDArray[np.float64]:
    """The array with axes of length 1 behind its own, `axes` in all."""
    return array.reshape(*array.shape, *[1] * (axes - array.ndim))


def full_rank_factors(
    matrix: NDArray[np.float64], seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Factors (N, r) and (r, D) with r = min(N, D): U S and Vᵀ, or for large ones W Q and Qᵀ.

    Q is a reflection: LAPACK takes its time with large matrices, most of all on busy cores.
    """
    if matrix.size <= 1 << 14:
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        return left * values, right
    rank = min(matrix.shape)
    normal = np.random.default_rng(seed).normal(size=rank)
    normal /= np.linalg.norm(normal)
    mixing = np.eye(rank) - 2 * np.outer(normal, normal)
    if rank == len(matrix):
        return mixing, matrix - 2 * np.outer(normal, normal @ matrix)
    return matrix - 2 * np.outer(matrix @ normal, normal), mixing


@pytest.fixture(scope="session")
def exact() -> Callable[..., Branches]:
    return exact_branches

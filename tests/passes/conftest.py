"""What the tests of the passes share: running models, and reading them from text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from passes.split import Branches
from tools.exact import exact_branches

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


@pytest.fixture(scope="session")
def exact() -> Callable[..., Branches]:
    return exact_branches

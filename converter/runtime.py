"""Running models under onnxruntime: sessions, their inputs, one run, and the machine it ran on.

Everything that onnxruntime refuses becomes one sentence that names the model. Its own log stays off
the terminal.
"""

from __future__ import annotations

import math
import os
import platform
import re
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from converter.calibration.sets import ModelInput
from converter.config import Runtime
from converter.errors import CalibrationError, ConfigError, ConverterError, ModelError
from converter.limits import SAMPLE_MIB
from converter.model_file import save_model

__all__ = [
    "declared_shape",
    "machine",
    "model_inputs",
    "open_session",
    "run",
    "session_with",
    "weight_bytes",
]

_VECTORS = ("avx", "amx", "fma", "sve", "asimd", "i8mm", "bf16")
"""How instructions begin that onnxruntime has kernels for."""
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

_REFUSALS: tuple[type[Exception], ...] = (
    ort_errors.EPFail,
    ort_errors.EngineError,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.ModelLoaded,
    ort_errors.NoModel,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    RuntimeError,  # what onnxruntime's Python layer raises for wrong types
    ValueError,  # and for missing feeds
)

_SESSION_TYPES: dict[str, npt.DTypeLike] = {
    "tensor(bool)": np.bool_,
    "tensor(double)": np.float64,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int16)": np.int16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(int8)": np.int8,
    "tensor(uint16)": np.uint16,
    "tensor(uint32)": np.uint32,
    "tensor(uint64)": np.uint64,
    "tensor(uint8)": np.uint8,
}

IN_MEMORY = 2**28
"""Models with more bytes of weights go to onnxruntime through a file: while it opens one from memory it holds
three copies of it."""

_TYPE_NAMES = {number: name.lower() for name, number in TensorProto.DataType.items()}


def open_session(
    model: onnx.ModelProto | Path | bytes,
    runtime: Runtime,
    *,
    spinning: bool = True,
    optimise: bool = True,
    label: str | None = None,
) -> ort.InferenceSession:
    """Open `model` for running.

    An operator gets `runtime.thread_count` threads, and operators run one after another.

    Parameters
    ----------
    model : onnx.ModelProto, Path or bytes
        A model, its file, or its serialised form. A model with over 256 MiB of weights
        goes through a temporary folder.
    runtime : Runtime
        Provider and threads.
    spinning : bool, default True
        Whether idle threads spin before they sleep, as onnxruntime does when deployed. Turn it off
        where several sessions run in turns: the idle threads of one take the cores from another.
    optimise : bool, default True
        Whether onnxruntime optimises the graph, as it does when deployed.
    label : str or None, default None
        What messages call the model; None takes the file's name, or "the model".

    Raises
    ------
    ConfigError
        Where `runtime` asks for CUDA and this onnxruntime cannot use it.
    ModelError
        Where onnxruntime refuses the model.
    """
    provider = _PROVIDERS[runtime.provider]
    if provider not in ort.get_available_providers():
        raise ConfigError(
            f"the installed onnxruntime has no {provider}; pip uninstall onnxruntime and pip install "
            "onnxruntime-gpu in its place, or use the cpu provider"
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = runtime.thread_count
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4  # fatal only: every lesser failure is raised as well
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    name = label or (model.name if isinstance(model, Path) else "the model")
    try:
        session = session_with(model, options, list(dict.fromkeys((provider, _PROVIDERS["cpu"]))))
    except ConverterError:
        raise
    except _REFUSALS as error:
        raise ModelError(f"{name}: onnxruntime refuses it: {_reason(error)}") from error
    if provider not in session.get_providers():
        raise ConfigError(
            f"{provider} could not start, so {name} would run on the CPU; check the CUDA driver "
            "and libraries, or use the cpu provider"
        )
    return session


def session_with(
    model: onnx.ModelProto | Path | bytes, options: ort.SessionOptions, providers: list[str]
) -> ort.InferenceSession:
    """Open `model` with given options, large ones through a file; `open_session` checks more."""
    if isinstance(model, Path):
        return ort.InferenceSession(str(model), options, providers=providers)
    if isinstance(model, bytes):
        return ort.InferenceSession(model, options, providers=providers)
    if weight_bytes(model.graph) <= IN_MEMORY:
        return ort.InferenceSession(model.SerializeToString(), options, providers=providers)
    # The session may map the weights' file, which some systems refuse to delete while it is open.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "model.onnx"
        save_model(model, path, external_above=IN_MEMORY)
        return ort.InferenceSession(str(path), options, providers=providers)


def weight_bytes(graph: onnx.GraphProto) -> int:
    """Return the bytes of all initializers and Constant nodes outside of bodies, as arrays."""

    def size(tensor: TensorProto) -> int:
        kind = np.dtype(_array_type(tensor.data_type) or np.float64)
        return int(math.prod(tensor.dims)) * int(kind.itemsize)

    constants = (
        attribute.t
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    )
    return sum(map(size, graph.initializer)) + sum(map(size, constants))


def _reason(error: Exception) -> str:
    """Say what onnxruntime said, on one line, without its error code and source position."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^\S*/onnxruntime/\S+:\d+ .*?\) (?=[A-Z])", "", text)
    text = text.replace(" Please fix either the inputs/outputs or the model.", "")
    return text if len(text) <= 300 else f"{text[:299]}…"


def model_inputs(
    model: onnx.ModelProto | ort.InferenceSession, *, label: str = "the model"
) -> tuple[ModelInput, ...]:
    """Return the inputs that a user feeds, in order; initializers listed among the inputs are none.

    Raises
    ------
    ModelError
        Where an input is not a tensor of booleans, integers or float16/32/64, its rank is not known, or
        its shape is larger than `limits.SAMPLE_MIB`.
    """
    if isinstance(model, onnx.ModelProto):
        given = {tensor.name for tensor in model.graph.initializer}
        given |= {tensor.values.name for tensor in model.graph.sparse_initializer}
        return tuple(
            _proto_input(value, label) for value in model.graph.input if value.name not in given
        )
    return tuple(
        ModelInput(
            value.name,
            tuple(None if size in (-1, 0) else size for size in value.shape),
            _known_type(_SESSION_TYPES.get(value.type), value.name, label),
        )
        for value in model.get_inputs()
    )


def _proto_input(value: onnx.ValueInfoProto, label: str) -> ModelInput:
    shape = declared_shape(value.type)
    if value.type.WhichOneof("value") != "tensor_type":
        raise ModelError(
            f"{label}: input '{value.name}' is not a tensor; give a model whose inputs are tensors"
        )
    if shape is None:
        raise ModelError(
            f"{label}: the rank of input '{value.name}' is not known; export it with a shape"
        )
    kind = _known_type(_array_type(value.type.tensor_type.elem_type), value.name, label)
    size = math.prod(side for side in shape if isinstance(side, int)) * kind.itemsize
    if size > SAMPLE_MIB.value << 20:
        raise ModelError(
            f"{label}: input '{value.name}' takes {size >> 20} MiB at once, more than "
            f"{SAMPLE_MIB.value}; export it with a smaller shape, or {SAMPLE_MIB}"
        )
    return ModelInput(value.name, shape, kind)


def declared_shape(value_type: onnx.TypeProto) -> tuple[int | str | None, ...] | None:
    """Return the shape that a model declares for a tensor, None where its rank is not known.

    A free size is its name, or None; so are −1 and 0, which some exporters write for it.
    """
    if not value_type.tensor_type.HasField("shape"):
        return None
    return tuple(_size(dim) for dim in value_type.tensor_type.shape.dim)


def _size(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return dim.dim_value if dim.dim_value > 0 else None
    return dim.dim_param or None


def _array_type(number: int) -> npt.DTypeLike | None:
    return _SESSION_TYPES.get(f"tensor({_TYPE_NAMES.get(number)})")


def _known_type(dtype: npt.DTypeLike | None, name: str, label: str) -> np.dtype[Any]:
    if dtype is None:
        raise ModelError(
            f"{label}: input '{name}' is no tensor of booleans, integers or float16/32/64; "
            "export it with such an input"
        )
    return np.dtype(dtype)


def run(
    session: ort.InferenceSession,
    outputs: Sequence[str] | None,
    feeds: Mapping[str, npt.NDArray[Any]],
    *,
    label: str = "the model",
) -> list[npt.NDArray[Any]]:
    """Run `session` once on `feeds` and return the named `outputs`, or all of them for None.

    Raises
    ------
    CalibrationError
        Where a feed is missing, unknown, or of the wrong type, rank or size.
    ModelError
        Where a node fails, or an output is no array.
    """
    try:
        results: list[Any] = session.run(None if outputs is None else list(outputs), dict(feeds))
    except _REFUSALS as error:
        reason = _reason(error)
        if "while running" in reason:
            raise ModelError(f"{label}: a node failed on this input: {reason}") from error
        raise CalibrationError(f"{label} does not take this input: {reason}") from error
    for value in results:
        if not isinstance(value, np.ndarray):
            raise ModelError(
                f"{label}: an output is a {type(value).__name__}; give a model with tensors only"
            )
    return results


def machine() -> dict[str, Any]:
    """Describe this machine for a report: processor, cores, system, versions of the libraries.

    Machines of one processor's name may offer other instructions, and then take other times.
    """
    return {
        "processor": _processor(),
        "instructions": _instructions(),
        "cores": os.cpu_count() or 1,
        "usable_cores": Runtime().thread_count,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {
            name: _version(name)
            for name in (
                *("twofold", "onnx", "onnx-graphsurgeon", "onnxruntime", "onnxruntime-gpu"),
                *("numpy", "scipy", "torch", "pillow"),
            )
            if _version(name)
        },
    }


def _processor() -> str:
    return _of_cores("model name") or platform.processor() or platform.machine()


def _instructions() -> list[str]:
    """Name those for vectors and matrices that the first core has, where Linux tells."""
    offered = (_of_cores("flags") or _of_cores("Features")).split()
    return sorted(name for name in offered if name.startswith(_VECTORS))


def _of_cores(key: str) -> str:
    """Read what Linux says of the first core; "" where it says nothing."""
    table = Path("/proc/cpuinfo")
    if not table.is_file():
        return ""
    text = table.read_text(encoding="utf-8")
    found = re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

"""One node, ready to run in torch, and what its operators share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.external_data_helper import uses_external_data

from converter.errors import ConverterError, ModelError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Operator",
    "Step",
    "UnsupportedOperatorError",
    "as_tensor",
    "from_array",
    "index_of",
    "matrix",
    "method",
    "padded",
    "wholes",
]


class UnsupportedOperatorError(ConverterError):
    """An operator, or a form of one, whose gradient is not available here; exit code 3."""

    exit_code: ClassVar[int] = 3


@dataclass(frozen=True, eq=False)
class Step:
    """One node, ready to run."""

    op: str
    label: str
    opset: int
    device: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    operator: Operator
    released: tuple[str, ...] = ()

    def apply(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run on the named tensors; return what is written, by name."""
        operands = [values[name] if name else None for name in self.inputs]
        try:
            result = self.operator(self, *operands)
        except (RuntimeError, IndexError, TypeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(
                f"{self.op} node '{self.label}' does not run in torch: {reason}; check the sizes "
                "of the model's inputs"
            ) from error
        results = result if isinstance(result, tuple) else (result,)
        # Operators return what is asked for first; the rest is known not to be read.
        return {name: value for name, value in zip(self.outputs, results, strict=False) if name}

    def refuse(self, what: str) -> UnsupportedOperatorError:
        """Return the error for a form of the operator that is not supported."""
        return UnsupportedOperatorError(
            f"{self.op} node '{self.label}' {what}, which has no differentiable form here; "
            "export the model without it"
        )

    def whole(self, name: str, default: int) -> int:
        """Return an integer attribute."""
        return int(self.attributes.get(name, default))

    def wholes(self, name: str, default: Sequence[int] = ()) -> list[int]:
        """Return an attribute that lists integers."""
        return [int(value) for value in self.attributes.get(name, default)]

    def number(self, name: str, default: float) -> float:
        """Return a floating-point attribute."""
        return float(self.attributes.get(name, default))

    def text(self, name: str, default: str) -> str:
        """Return a text attribute."""
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else str(value)

    def axes(self, operand: Tensor | None, name: str = "axes") -> list[int] | None:
        """Return a list that newer opsets give as an operand and older ones as an attribute."""
        if operand is not None:
            return wholes(operand)
        return self.wholes(name) if name in self.attributes else None


Operator = Callable[..., "Tensor | tuple[Tensor, ...]"]


def as_tensor(stored: onnx.TensorProto, device: str) -> Tensor:
    """Read a stored tensor; floating-point types become float32."""
    if uses_external_data(stored):
        raise ModelError(
            f"the weight '{stored.name}' is in a file that was not loaded; load the model with it"
        )
    return from_array(numpy_helper.to_array(stored), stored.name, device)


def from_array(array: NDArray[Any], name: str, device: str) -> Tensor:
    """Turn an array into a tensor; floating-point types become float32."""
    import torch

    if array.dtype.kind in "OSU":
        raise UnsupportedOperatorError(
            f"the constant '{name}' holds text, which has no differentiable form; export without it"
        )
    if array.dtype.kind not in "biu":  # float16, float64, and bfloat16, which is no numpy kind
        array = array.astype(np.float32, copy=False)
    with warnings.catch_warnings():
        # The memory belongs to bytes and cannot be written to; nothing here writes to a constant.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array).to(device)


def wholes(operand: Tensor) -> list[int]:
    """List the integers of an operand."""
    return [int(value) for value in operand.flatten().tolist()]


def index_of(positions: Sequence[int] | NDArray[np.integer], like: Tensor) -> Tensor:
    """Make positions an index tensor where `like` is."""
    import torch

    return torch.as_tensor(np.asarray(positions, dtype=np.int64), device=like.device)


def padded(x: Tensor, pads: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    """Pad, or crop where negative, the last axes of x."""
    from torch.nn import functional

    if not any(map(any, pads)):
        return x
    return functional.pad(x, [size for pair in reversed(pads) for size in pair], value=value)


def matrix(x: Tensor, axis: int) -> Tensor:
    """Flatten the axes before `axis`, and those from it on."""
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def method(name: str) -> Operator:
    """Make an operator of a method of Tensor."""

    def apply(step: Step, x: Tensor) -> Tensor:
        del step
        result: Tensor = getattr(x, name)()
        return result

    return apply

"""Operators of tensors: arithmetic, shapes, resizing."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from converter.differentiable.step import (
    Operator,
    Step,
    as_tensor,
    from_array,
    index_of,
    matrix,
    method,
    padded,
    wholes,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["SUPPORTED", "TENSORS"]

# ---- arithmetic


def _add(step: Step, a: Tensor, b: Tensor) -> Tensor:
    del step
    return a + b


def _sub(step: Step, a: Tensor, b: Tensor) -> Tensor:
    del step
    return a - b


def _mul(step: Step, a: Tensor, b: Tensor) -> Tensor:
    del step
    return a * b


def _matmul(step: Step, a: Tensor, b: Tensor) -> Tensor:
    del step
    return a @ b


def _div(step: Step, a: Tensor, b: Tensor) -> Tensor:
    del step
    return a / b if a.is_floating_point() else a.div(b, rounding_mode="trunc")


def _pow(step: Step, a: Tensor, b: Tensor) -> Tensor:
    del step
    return a.pow(b).to(a.dtype)


def _max(step: Step, *operands: Tensor) -> Tensor:
    del step
    return functools.reduce(lambda a, b: a.maximum(b), operands)


def _min(step: Step, *operands: Tensor) -> Tensor:
    del step
    return functools.reduce(lambda a, b: a.minimum(b), operands)


def _sum(step: Step, *operands: Tensor) -> Tensor:
    del step
    return functools.reduce(lambda a, b: a + b, operands)


def _mean(step: Step, *operands: Tensor) -> Tensor:
    return _sum(step, *operands) / len(operands)


def _binary(name: str) -> Operator:
    """Make an operator of a method of Tensor that takes another one."""

    def apply(step: Step, a: Tensor, b: Tensor) -> Tensor:
        del step
        result: Tensor = getattr(a, name)(b)
        return result

    return apply


def _where(step: Step, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    del step
    return a.where(condition, b)


def _cast(step: Step, x: Tensor) -> Tensor:
    import torch

    kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(step.whole("to", 0)))
    if kind.kind in "OSU":
        raise step.refuse("makes text of numbers")
    if kind.kind not in "biu":
        return x.float()
    dtype: torch.dtype = torch.from_numpy(np.empty(0, kind)).dtype
    return x.to(dtype)


def _norm(x: Tensor, axes: list[int], *, keepdim: bool) -> Tensor:
    import torch

    # its gradient at zero is zero, where that of the root of a sum is none
    result: Tensor = torch.linalg.vector_norm(x, dim=axes, keepdim=keepdim)
    return result


def _reduction(reduce: str | Callable[..., Tensor]) -> Operator:
    """Make an operator of a method of Tensor, or of a function, that reduces axes."""

    def apply(step: Step, x: Tensor, axes: Tensor | None = None) -> Tensor:
        chosen = step.axes(axes)
        if x.ndim == 0 or (not chosen and step.whole("noop_with_empty_axes", 0)):
            return x
        kept = bool(step.whole("keepdims", 1))
        over = chosen or list(range(x.ndim))
        if callable(reduce):
            return reduce(x, over, keepdim=kept)
        result: Tensor = getattr(x, reduce)(over, keepdim=kept)
        return result

    return apply


# ---- shapes


def _identity(step: Step, x: Tensor) -> Tensor:
    del step
    return x


def _dropout(
    step: Step, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None
) -> Tensor:
    del ratio
    if training is not None and bool(training):
        raise step.refuse("is in training mode")
    return x


def _shape(step: Step, x: Tensor) -> Tensor:
    sizes = list(x.shape)[step.attributes.get("start", 0) : step.attributes.get("end")]
    return index_of(sizes, x)


def _constant(step: Step) -> Tensor:
    for name, kind in (("float", np.float32), ("int", np.int64)):
        for form in (f"value_{name}", f"value_{name}s"):
            if form in step.attributes:
                array = np.array(step.attributes[form], kind)
                return from_array(array, step.label, step.device)
    if "value" not in step.attributes:
        raise step.refuse("holds no dense numbers")
    return as_tensor(step.attributes["value"], step.device)


def _constant_of_shape(step: Step, shape: Tensor) -> Tensor:
    stored = step.attributes.get("value")
    value = np.zeros(1, np.float32) if stored is None else numpy_helper.to_array(stored)
    filled = from_array(value, step.label, step.device)
    return filled.reshape(()).expand(wholes(shape)).contiguous()


def _concat(step: Step, *operands: Tensor) -> Tensor:
    import torch

    return torch.cat(operands, step.whole("axis", 1))


def _flatten(step: Step, x: Tensor) -> Tensor:
    return matrix(x, step.whole("axis", 1))


def _reshape(step: Step, x: Tensor, shape: Tensor) -> Tensor:
    sizes = wholes(shape)
    if not step.whole("allowzero", 0):
        sizes = [size or x.shape[axis] for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


def _transpose(step: Step, x: Tensor) -> Tensor:
    return x.permute(step.wholes("perm") or list(range(x.ndim))[::-1])


def _squeeze(step: Step, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = step.axes(axes)
    return x.squeeze() if chosen is None else x.squeeze(tuple(chosen))


def _unsqueeze(step: Step, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = step.axes(axes) or []
    rank = x.ndim + len(chosen)
    for axis in sorted(axis % rank for axis in chosen):
        x = x.unsqueeze(axis)
    return x


def _slice(
    step: Step,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    strides: Tensor | None = None,
) -> Tensor:
    first, last = step.axes(starts, "starts") or [], step.axes(ends, "ends") or []
    chosen = step.axes(axes) or list(range(len(first)))
    by = wholes(strides) if strides is not None else [1] * len(first)
    for start, end, axis, stride in zip(first, last, chosen, by, strict=True):
        # What Python's slices do with ends beyond the axis is what ONNX says, but for a start before it.
        first_one = max(start, -x.shape[axis]) if stride < 0 else start
        positions = range(*slice(first_one, end, stride).indices(x.shape[axis]))
        if stride == 1:
            x = x.narrow(axis, positions.start, len(positions))
        else:
            x = x.index_select(axis, index_of(positions, x))
    return x


def _gather(step: Step, x: Tensor, indices: Tensor) -> Tensor:
    axis = step.whole("axis", 0) % x.ndim
    flat = indices.flatten().long()
    flat = (flat + x.shape[axis]).where(flat < 0, flat)
    shape = [*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]]
    return x.index_select(axis, flat).reshape(shape)


def _split(step: Step, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = step.whole("axis", 0)
    parts = step.axes(sizes, "split")
    if parts is None:
        size = -(-x.shape[axis] // len(step.outputs))
        parts = [size] * (x.shape[axis] // size)
        parts += [x.shape[axis] - sum(parts)] * (len(step.outputs) - len(parts))
    starts = np.cumsum([0, *parts[:-1]]).tolist()
    return tuple(x.narrow(axis, start, size) for start, size in zip(starts, parts, strict=True))


def _range(step: Step, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    del step
    import torch

    # in double precision, as onnxruntime counts
    count = max(math.ceil((float(limit) - float(start)) / float(delta)), 0)
    return start + delta * torch.arange(count, device=start.device).to(start.dtype)


def _tile(step: Step, x: Tensor, repeats: Tensor) -> Tensor:
    del step
    return x.repeat(wholes(repeats))


def _expand(step: Step, x: Tensor, shape: Tensor) -> Tensor:
    del step
    return x.expand(np.broadcast_shapes(tuple(x.shape), tuple(wholes(shape))))


def _pad(
    step: Step,
    x: Tensor,
    pads: Tensor | None = None,
    value: Tensor | None = None,
    axes: Tensor | None = None,
) -> Tensor:
    flat = step.axes(pads, "pads") or []
    half = len(flat) // 2
    chosen = list(range(x.ndim)) if axes is None else [a % x.ndim for a in wholes(axes)]
    ends = dict(zip(chosen, zip(flat[:half], flat[half:], strict=True), strict=True))
    mode = step.text("mode", "constant")
    if mode == "constant":
        fill = step.number("value", 0.0) if value is None else float(value)
        return padded(x, [ends.get(axis, (0, 0)) for axis in range(x.ndim)], fill)
    for axis, (before, after) in ends.items():
        if (before, after) != (0, 0):
            x = x.index_select(
                axis, index_of(_mirrored(step, x.shape[axis], before, after, mode), x)
            )
    return x


def _mirrored(step: Step, size: int, before: int, after: int, mode: str) -> NDArray[np.integer]:
    """Return the positions along an axis that a padded axis takes its values from."""
    positions = np.arange(-before, size + after)
    if mode == "edge":
        return positions.clip(0, size - 1)
    if max(before, after) >= size:
        raise step.refuse(f"reflects more than the {size} values that it has")
    mirrored: NDArray[np.integer] = size - 1 - np.abs(size - 1 - np.abs(positions))
    return mirrored


def _depth_to_space(step: Step, x: Tensor) -> Tensor:
    block = step.whole("blocksize", 1)
    count, channels, height, width = x.shape
    inner = channels // block**2
    if step.text("mode", "DCR") == "DCR":
        x = x.reshape(count, block, block, inner, height, width).permute(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(count, inner, block, block, height, width).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(count, inner, height * block, width * block)


def _space_to_depth(step: Step, x: Tensor) -> Tensor:
    block = step.whole("blocksize", 1)
    count, channels, height, width = x.shape
    x = x.reshape(count, channels, height // block, block, width // block, block)
    x = x.permute(0, 3, 5, 1, 2, 4)
    return x.reshape(count, channels * block**2, height // block, width // block)


# ---- resizing


def _upsample(step: Step, x: Tensor, scales: Tensor | None = None) -> Tensor:
    """Run Upsample, and Resize of opset 10, which have one rule: out / scale, rounded down."""
    factors = step.attributes.get("scales") if scales is None else scales.tolist()
    if factors is None or min(factors) < 1:
        raise step.refuse("makes its input smaller")
    sizes = [_scaled(size, factor) for size, factor in zip(x.shape, factors, strict=True)]
    mode = step.text("mode", "nearest")
    for axis, (size, factor) in enumerate(zip(sizes, factors, strict=True)):
        x = _resized(step, x, axis, size, factor, (mode, "asymmetric", "floor"))
    return x


def _resize(
    step: Step,
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    if step.opset < 11:
        return _upsample(step, x, roi)
    axes = [axis % x.ndim for axis in step.wholes("axes", range(x.ndim))]
    rule = (
        step.text("mode", "nearest"),
        step.text("coordinate_transformation_mode", "half_pixel"),
        step.text("nearest_mode", "round_prefer_floor"),
    )
    if sizes is not None and sizes.numel():
        wanted = wholes(sizes)
        factors = [size / x.shape[axis] for axis, size in zip(axes, wanted, strict=True)]
    elif scales is not None and scales.numel():
        factors = [float(factor) for factor in scales.tolist()]
        wanted = [_scaled(x.shape[a], f) for a, f in zip(axes, factors, strict=True)]
    else:
        raise step.refuse("has neither scales nor sizes")
    for axis, size, factor in zip(axes, wanted, factors, strict=True):
        x = _resized(step, x, axis, size, factor, rule)
    return x


def _scaled(size: int, factor: float) -> int:
    """Scale a size in float32 as onnxruntime does: ten times 1.4 are 14, and in float64 less."""
    return int(np.float32(factor) * np.float32(size))


def _resized(
    step: Step, x: Tensor, axis: int, size: int, factor: float, rule: tuple[str, str, str]
) -> Tensor:
    """Resize one axis; the rule is mode, coordinate transformation and way of rounding."""
    mode, transformation, rounding = rule
    last = x.shape[axis] - 1
    if size == last + 1 and factor == 1.0:
        return x
    places = _coordinates(last + 1, size, factor, transformation)
    if mode == "nearest":
        nearest = _ROUNDINGS[rounding](places).clip(0, last)
        return x.index_select(axis, index_of(nearest.astype(np.int64), x))
    places = places.clip(0, last)
    low = np.floor(places).astype(np.int64)
    shape = [-1 if each == axis else 1 for each in range(x.ndim)]
    share = from_array((places - low).astype(np.float32), step.label, step.device).reshape(shape)
    first = x.index_select(axis, index_of(low, x))
    return first + share * (x.index_select(axis, index_of(np.minimum(low + 1, last), x)) - first)


def _coordinates(
    before: int, after: int, factor: float, transformation: str
) -> NDArray[np.float32]:
    """Return where each of `after` places lies among the `before` ones, in float32 as others do."""
    at = np.arange(after, dtype=np.float32)
    half, scale = np.float32(0.5), np.float32(factor)
    places: NDArray[np.float32]
    if transformation == "asymmetric":
        places = at / scale
    elif transformation == "align_corners":
        places = at * np.float32(before - 1) / np.float32(max(after - 1, 1))
    elif transformation == "pytorch_half_pixel" and after == 1:
        places = at
    else:
        places = (at + half) / scale - half
    return places


_ROUNDINGS: dict[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
    "round_prefer_floor": lambda places: np.ceil(places - np.float32(0.5)),
    "round_prefer_ceil": lambda places: np.floor(places + np.float32(0.5)),
    "floor": np.floor,
    "ceil": np.ceil,
}


TENSORS: dict[str, Operator] = {
    "Abs": method("abs"),
    "Add": _add,
    "And": _binary("logical_and"),
    "Cast": _cast,
    "Ceil": method("ceil"),
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Cos": method("cos"),
    "DepthToSpace": _depth_to_space,
    "Div": _div,
    "Dropout": _dropout,
    "Equal": _binary("eq"),
    "Erf": method("erf"),
    "Exp": method("exp"),
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": method("floor"),
    "Gather": _gather,
    "Greater": _binary("gt"),
    "GreaterOrEqual": _binary("ge"),
    "Identity": _identity,
    "Less": _binary("lt"),
    "LessOrEqual": _binary("le"),
    "Log": method("log"),
    "MatMul": _matmul,
    "Max": _max,
    "Mean": _mean,
    "Min": _min,
    "Mul": _mul,
    "Neg": method("neg"),
    "Not": method("logical_not"),
    "Or": _binary("logical_or"),
    "Pad": _pad,
    "Pow": _pow,
    "Range": _range,
    "Reciprocal": method("reciprocal"),
    "ReduceL2": _reduction(_norm),
    "ReduceMax": _reduction("amax"),
    "ReduceMean": _reduction("mean"),
    "ReduceMin": _reduction("amin"),
    "ReduceSum": _reduction("sum"),
    "Reshape": _reshape,
    "Resize": _resize,
    "Round": method("round"),
    "Shape": _shape,
    "Sign": method("sign"),
    "Sin": method("sin"),
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Sqrt": method("sqrt"),
    "Squeeze": _squeeze,
    "Sub": _sub,
    "Sum": _sum,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Upsample": _upsample,
    "Where": _where,
}

# Attributes that change what an operator means, and the values that are known here; the rest is
# refused when the graph is built.
SUPPORTED: dict[str, dict[str, tuple[object, ...]]] = {
    "BatchNormalization": {"training_mode": (0,), "spatial": (1,)},
    "DepthToSpace": {"mode": ("DCR", "CRD")},
    "Pad": {"mode": ("constant", "reflect", "edge")},
    "Resize": {
        "antialias": (0,),
        "coordinate_transformation_mode": (
            "align_corners",
            "asymmetric",
            "half_pixel",
            "pytorch_half_pixel",
        ),
        "keep_aspect_ratio_policy": ("stretch",),
        "mode": ("linear", "nearest"),
        "nearest_mode": tuple(_ROUNDINGS),
    },
    "Upsample": {"mode": ("linear", "nearest")},
}

"""Operators of layers: convolutions and matrix products, normalisation, activations, pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from converter.differentiable.step import (
    Operator,
    Step,
    matrix,
    method,
    padded,
)
from passes.windows import padding, spans_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LAYERS"]

# ---- convolution and matrix products


def _spatial(step: Step, x: Tensor) -> int:
    """Return the number of spatial axes, which torch knows from 1 to 3 of."""
    count = x.ndim - 2
    if not 1 <= count <= 3:
        raise step.refuse(f"has {count} spatial axes")
    return count


def _per_axis(step: Step, name: str, count: int) -> list[int]:
    return step.wholes(name) or [1] * count


def _pads(
    step: Step, sizes: Sequence[int], spans: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """Return what is padded before and after each spatial axis; a span is a dilated kernel's."""
    way, stated = step.text("auto_pad", "NOTSET"), step.wholes("pads")
    return padding(way, stated, sizes, spans, strides)


def _conv(step: Step, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    import torch
    from torch.nn import functional

    count = _spatial(step, x)
    strides, dilations = _per_axis(step, "strides", count), _per_axis(step, "dilations", count)
    pads = _pads(step, x.shape[2:], spans_of(weight.shape[2:], dilations), strides)
    native = all(before == after >= 0 for before, after in pads)
    x = x if native else padded(x, pads)
    if count == 2 and x.device.type == "cpu":
        # pixel by pixel, as what comes out is then too: once a Gather has put channels first, every pooling
        # and every Conv of single channels behind it takes up to twenty times as long
        x = x.contiguous(memory_format=torch.channels_last)
    groups = step.whole("group", 1)
    convolve = partial(
        getattr(functional, f"conv{count}d"),
        x,
        stride=strides,
        padding=[before for before, _ in pads] if native else 0,
        dilation=dilations,
        groups=groups,
    )
    each = len(weight) // groups
    if groups == 1 or weight.shape[1] > 1 or each == 1:
        whole: Tensor = convolve(weight=weight, bias=bias)
        return whole
    # several filters of each channel: torch is three to six times as fast with one after another
    parts = [
        convolve(weight=weight[index::each], bias=None if bias is None else bias[index::each])
        for index in range(each)
    ]
    return torch.stack([part.movedim(1, -1) for part in parts], dim=-1).flatten(-2).movedim(-1, 1)


def _conv_transpose(step: Step, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    from torch.nn import functional

    count = _spatial(step, x)
    strides, dilations = _per_axis(step, "strides", count), _per_axis(step, "dilations", count)
    more = step.wholes("output_padding") or [0] * count
    convolve = getattr(functional, f"conv_transpose{count}d")
    full: Tensor = convolve(
        x, weight, None, stride=strides, groups=step.whole("group", 1), dilation=dilations
    )
    sizes = [size + extra for size, extra in zip(full.shape[2:], more, strict=True)]
    # Cropping the full result takes any pads; torch's own argument takes symmetric ones alone.
    pads = _transpose_pads(step, x.shape[2:], sizes, strides)
    ends = [(-before, extra - after) for (before, after), extra in zip(pads, more, strict=True)]
    result = padded(full, ends)
    return result if bias is None else result + bias.reshape(-1, *[1] * count)


def _transpose_pads(
    step: Step, inputs: Sequence[int], sizes: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """Return what is cropped of a full transposed convolution of `sizes`."""
    way = step.text("auto_pad", "NOTSET")
    wanted = step.wholes("output_shape")[-len(inputs) :]
    if not wanted and way in ("NOTSET", "VALID"):
        return _pads(step, inputs, sizes, strides)
    wanted = wanted or [size * stride for size, stride in zip(inputs, strides, strict=True)]
    pads = []
    for size, target in zip(sizes, wanted, strict=True):
        total = size - target
        if total < 0:
            raise step.refuse(f"asks for an output of {target}, above the full {size}")
        less, more = total // 2, total - total // 2
        pads.append((less, more) if way == "SAME_UPPER" else (more, less))
    return pads


def _gemm(step: Step, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.T if step.whole("transA", 0) else a
    b = b.T if step.whole("transB", 0) else b
    product = a @ b
    alpha, beta = step.number("alpha", 1.0), step.number("beta", 1.0)
    product = product if alpha == 1.0 else alpha * product
    return product if c is None else product + (c if beta == 1.0 else beta * c)


# ---- normalisation


def _batch_normalization(
    step: Step, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    from torch.nn import functional

    epsilon = step.number("epsilon", 1e-5)
    return functional.batch_norm(x, mean, variance, scale, bias, training=False, eps=epsilon)


def _standardised(step: Step, x: Tensor, axes: list[int]) -> Tensor:
    centred = x - x.mean(axes, keepdim=True)
    variance = centred.square().mean(axes, keepdim=True) + step.number("epsilon", 1e-5)
    return centred * variance.rsqrt()


def _of_channels(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    shape = (-1, *[1] * (x.ndim - 2))
    return x * scale.reshape(shape) + bias.reshape(shape)


def _instance_normalization(step: Step, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return _of_channels(_standardised(step, x, list(range(2, x.ndim))), scale, bias)


def _group_normalization(step: Step, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    if step.opset < 21:  # its scale was one of groups, and the operator was withdrawn for that
        raise step.refuse("is of an opset below 21")
    groups = x.reshape(len(x), step.whole("num_groups", 1), -1)
    return _of_channels(_standardised(step, groups, [2]).reshape(x.shape), scale, bias)


def _layer_normalization(
    step: Step, x: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    first = step.whole("axis", -1) % x.ndim
    result = _standardised(step, x, list(range(first, x.ndim))) * scale
    return result if bias is None else result + bias


def _lrn(step: Step, x: Tensor) -> Tensor:
    from torch.nn import functional

    size = step.whole("size", 1)
    before = (size - 1) // 2
    squares = x.square().reshape(len(x), 1, x.shape[1], -1)
    squares = padded(squares, [(before, size - 1 - before), (0, 0)])
    mean = functional.avg_pool2d(squares, (size, 1), stride=1).reshape(x.shape)
    scale = step.number("bias", 1.0) + step.number("alpha", 1e-4) * mean
    return x * scale.pow(-step.number("beta", 0.75))


# ---- activations


def _clip(step: Step, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    if step.opset < 11:
        return x.clamp(step.number("min", -math.inf), step.number("max", math.inf))
    return x if low is None and high is None else x.clamp(low, high)


def _leaky_relu(step: Step, x: Tensor) -> Tensor:
    from torch.nn import functional

    return functional.leaky_relu(x, step.number("alpha", 0.01))


def _prelu(step: Step, x: Tensor, slope: Tensor) -> Tensor:
    del step
    return (x * slope).where(x < 0, x)


def _elu(step: Step, x: Tensor) -> Tensor:
    from torch.nn import functional

    return functional.elu(x, step.number("alpha", 1.0))


def _softplus(step: Step, x: Tensor) -> Tensor:
    del step
    return x.logaddexp(x.new_zeros(()))


def _selu(step: Step, x: Tensor) -> Tensor:
    alpha, gamma = (
        step.number("alpha", 1.6732632423543772),
        step.number("gamma", 1.0507009873554805),
    )
    return gamma * (x.relu() + alpha * x.clamp(max=0.0).expm1())


def _celu(step: Step, x: Tensor) -> Tensor:
    alpha = step.number("alpha", 1.0)
    return x.relu() + alpha * (x.clamp(max=0.0) / alpha).expm1()


def _mish(step: Step, x: Tensor) -> Tensor:
    return x * _softplus(step, x).tanh()


def _hard_sigmoid(step: Step, x: Tensor) -> Tensor:
    return (step.number("alpha", 0.2) * x + step.number("beta", 0.5)).clamp(0.0, 1.0)


def _hard_swish(step: Step, x: Tensor) -> Tensor:
    del step
    return x * (x / 6.0 + 0.5).clamp(0.0, 1.0)


def _gelu(step: Step, x: Tensor) -> Tensor:
    from torch.nn import functional

    return functional.gelu(x, approximate=step.text("approximate", "none"))


def _softmax(step: Step, x: Tensor) -> Tensor:
    if step.opset >= 13:
        return x.softmax(step.whole("axis", -1))
    return matrix(x, step.whole("axis", 1)).softmax(1).reshape(x.shape)


def _log_softmax(step: Step, x: Tensor) -> Tensor:
    if step.opset >= 13:
        return x.log_softmax(step.whole("axis", -1))
    return matrix(x, step.whole("axis", 1)).log_softmax(1).reshape(x.shape)


# ---- pooling


def _pool_pads(
    step: Step, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int]
) -> tuple[list[tuple[int, int]], list[int]]:
    """Return the pads, and how much further a last, partial window reaches under ceil_mode."""
    spans = spans_of(kernel, _per_axis(step, "dilations", len(sizes)))
    pads = _pads(step, sizes, spans, strides)
    if not step.whole("ceil_mode", 0) or step.text("auto_pad", "NOTSET") != "NOTSET":
        return pads, [0] * len(sizes)
    further = []
    for size, (before, after), span, stride in zip(sizes, pads, spans, strides, strict=True):
        length = before + size + after
        windows = -(-(length - span) // stride) + 1
        if (windows - 1) * stride >= before + size:  # it would see nothing but padding
            windows -= 1
        further.append(max((windows - 1) * stride + span - length, 0))
    return pads, further


def _extended(pads: Sequence[tuple[int, int]], further: Sequence[int]) -> list[tuple[int, int]]:
    return [(before, after + more) for (before, after), more in zip(pads, further, strict=True)]


def _max_pool(step: Step, x: Tensor) -> Tensor:
    from torch.nn import functional

    count = _spatial(step, x)
    kernel, strides = step.wholes("kernel_shape"), _per_axis(step, "strides", count)
    pads = _extended(*_pool_pads(step, x.shape[2:], kernel, strides))
    native = all(
        before == after and 2 * before <= size
        for (before, after), size in zip(pads, kernel, strict=True)
    )
    pool = getattr(functional, f"max_pool{count}d")
    result: Tensor = pool(
        x if native else padded(x, pads, -math.inf),
        kernel,
        strides,
        padding=[before for before, _ in pads] if native else 0,
        dilation=_per_axis(step, "dilations", count),
    )
    return result


def _average_pool(step: Step, x: Tensor) -> Tensor:
    from torch.nn import functional

    count = _spatial(step, x)
    kernel, strides = step.wholes("kernel_shape"), _per_axis(step, "strides", count)
    if set(_per_axis(step, "dilations", count)) != {1}:
        raise step.refuse("has dilations")
    pads, further = _pool_pads(step, x.shape[2:], kernel, strides)
    pool = getattr(functional, f"avg_pool{count}d")
    mean: Tensor = pool(padded(x, _extended(pads, further)), kernel, strides)
    include = bool(step.whole("count_include_pad", 0))
    if not any(further) and (include or not any(map(any, pads))):
        return mean
    counted = padded(x.new_ones(1, 1, *x.shape[2:]), pads, 1.0 if include else 0.0)
    share: Tensor = pool(padded(counted, [(0, more) for more in further]), kernel, strides)
    return mean / share


def _global_average_pool(step: Step, x: Tensor) -> Tensor:
    del step
    return x.mean(list(range(2, x.ndim)), keepdim=True)


def _global_max_pool(step: Step, x: Tensor) -> Tensor:
    del step
    return x.amax(list(range(2, x.ndim)), keepdim=True)


LAYERS: dict[str, Operator] = {
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_normalization,
    "Celu": _celu,
    "Clip": _clip,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Elu": _elu,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average_pool,
    "GlobalMaxPool": _global_max_pool,
    "GroupNormalization": _group_normalization,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "InstanceNormalization": _instance_normalization,
    "LRN": _lrn,
    "LayerNormalization": _layer_normalization,
    "LeakyRelu": _leaky_relu,
    "LogSoftmax": _log_softmax,
    "MaxPool": _max_pool,
    "Mish": _mish,
    "PRelu": _prelu,
    "Relu": method("relu"),
    "Selu": _selu,
    "Sigmoid": method("sigmoid"),
    "Softmax": _softmax,
    "Softplus": _softplus,
    "Tanh": method("tanh"),
}

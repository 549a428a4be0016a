"""How much the network's outputs care about errors of each layer's response.

A layer's error counts by what it does to the outputs. To first order an error δ of the response y
(one vector over the channels at each position) changes the outputs o by J δ, with J = ∂o/∂y. Where
the errors of different positions are independent, with covariance C each, the outputs move by

    E‖J δ‖² = tr(Ω C),    Ω = E over images of Σ over positions of J_pᵀ J_p.

Ω is estimated without J: for v with independent standard normal elements, g = ∂(vᵀ o)/∂y has
E_v[g_pᵀ g_p] = J_pᵀ J_p. Outputs are measured in units of their own spread over the images, so that
tr(Ω C) is a squared error relative to what the outputs tell about an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from converter.calibration.sets import Batch, CalibrationSet, fixed_batch, padded
from converter.calibration.subset import Subset
from converter.errors import CalibrationError
from converter.progress import SILENT, Advance, Progress
from converter.runtime import model_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from converter.differentiable import TorchGraph

__all__ = [
    "NO_VARIANCE",
    "FlatOutputError",
    "NoGradientError",
    "OutputMetrics",
    "output_metrics",
    "output_sources",
]

NO_VARIANCE = 1e-12
"""Variance of an output over the images, relative to the square of its mean, that rounding gives too."""


class FlatOutputError(CalibrationError):
    """No output differs between the images, so nothing can be said of what errors do to it."""


class NoGradientError(CalibrationError):
    """A gradient is not finite on an image, so what errors there do is not known."""


_FLOATING = frozenset(
    {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.DOUBLE,
        onnx.TensorProto.BFLOAT16,
    }
)
_REARRANGING = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


@dataclass(frozen=True, eq=False)
class OutputMetrics:
    """What errors of each response cost at the outputs.

    Attributes
    ----------
    metric : dict of str to ndarray of shape (N, N), dtype float64
        By response: Ω, symmetric and positive semidefinite. tr(Ω C) is the squared error of the
        outputs, relative to their variance over the images, that an independent error with
        covariance C at each position causes. Zero where the response reaches no output.
    outputs : tuple of str
        Tensors that were differentiated; the logits in place of a softmax.
    images : int
        How many images were gone through.
    projections : int
        Random projections for each image and output.
    left_out : dict of str to str
        Outputs of the model that have no part in it, and why.
    """

    metric: dict[str, NDArray[np.float64]]
    outputs: tuple[str, ...]
    images: int
    projections: int
    left_out: dict[str, str]


def output_metrics(
    model: onnx.ModelProto,
    responses: Mapping[str, int],
    data: CalibrationSet,
    *,
    images: int = 512,
    projections: int = 2,
    batch: int = 64,
    memory_mib: int = 1024,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = SILENT,
) -> OutputMetrics:
    """Estimate the metric Ω of the outputs at each response.

    Every output is divided by the root of its total variance E‖o − E o‖² over the images, and the
    metrics of several outputs are averaged. Where a softmax gives an output, what feeds it is
    differentiated in its place: a softmax that is sure of its class has no gradient left, and its
    errors would count for nothing. Outputs of integers (classes, indices) are left out, and so are
    outputs that do not vary, or that are not one row for each image. Images do not mix: with equal
    `seed` and `images`, batch and memory bound change the result by rounding alone.

    Parameters
    ----------
    model : onnx.ModelProto
        A valid model with its weights in memory; it is not changed.
    responses : mapping of str to int
        Tensor that a node writes -> its channel axis: 1 for Conv (n, N, ...), −1 for Gemm and
        MatMul.
    data : CalibrationSet
        Images for the model, at least two different ones.
    images : int, default 512
        At most so many images are used, spread evenly over the set; from 2.
    projections : int, default 2
        Random projections for each image and output, from 1; each costs one backward pass.
    batch : int, default 64
        Most images at once, from 1; a model with a fixed batch overrides it.
    memory_mib : int, default 1024
        Bound on activations and their gradients in memory at once, in MiB, from 1. At least one
        image (or one fixed batch) runs at once, even where that alone is above the bound.
    seed : int, default 0
        Seed of the projections, from 0.
    device : str, default "cpu"
        torch device: "cpu", "cuda" or "cuda:N".
    progress : Progress
        Told of every image.

    Raises
    ------
    UnsupportedOperatorError
        Where an operator between an input and an output or a response cannot be differentiated, or
        where no output is of floating-point type.
    CalibrationError
        Where the images do not fit, no output varies over them (`FlatOutputError`), or a response's gradient
        (`NoGradientError`) or an output is not finite.
    ModelError
        Where a node does not run on the images.
    ValueError
        Where no node writes a response, or a number is out of its range.
    """
    from converter.differentiable import TorchGraph, UnsupportedOperatorError

    _require_numbers(images=(images, 2), projections=(projections, 1), batch=(batch, 1))
    _require_numbers(memory_mib=(memory_mib, 1), seed=(seed, 0))
    sources, left_out = output_sources(model)
    if not sources:
        raise UnsupportedOperatorError(
            "no output of the model is of floating-point type, so nothing can be differentiated; "
            "export the model with its scores as an output"
        )
    graph = TorchGraph(model, device, outputs=[*sources, *responses])
    forced = fixed_batch(model_inputs(model))
    used = Subset(data, images) if images < len(data) else data
    measured = [_Measured(name, (seed, index)) for index, name in enumerate(sources)]
    work = _Work(graph, responses, measured, projections)
    with progress.stage("weighing errors by the outputs", total=len(used)) as advance:
        for given in used.batches(forced or batch):
            parts = [padded(given, forced)] if forced else work.within(given, memory_mib)
            for part in parts:
                _run(work, part, advance)
    return work.result(left_out, sources)


def _require_numbers(**numbers: tuple[int, int]) -> None:
    for name, (value, least) in numbers.items():
        if value < least:
            raise ValueError(f"{name} {value} is below {least}; give at least {least}")


def output_sources(model: onnx.ModelProto) -> tuple[dict[str, str], dict[str, str]]:
    """Say what stands for each output of a model where outputs are compared: the logits for a softmax.

    Parameters
    ----------
    model : onnx.ModelProto

    Returns
    -------
    tuple of (dict of str to str, dict of str to str)
        Tensors, each with the output that it stands for; and the outputs that are left out, with why.
    """
    writers = {name: node for node in model.graph.node for name in node.output if name}
    sources: dict[str, str] = {}
    left_out = {}
    for output in model.graph.output:
        if output.type.tensor_type.elem_type in _FLOATING:
            sources.setdefault(_before_softmax(output.name, writers), output.name)
        else:
            left_out[output.name] = "it is not of floating-point type"
    return sources, left_out


def _before_softmax(output: str, writers: Mapping[str, onnx.NodeProto]) -> str:
    """Return what feeds the softmax that gives an output; the output itself where none does."""
    name = output
    while name in writers:
        node = writers[name]
        if node.op_type == "Softmax":
            # what is fed to the model is no response of it
            return str(node.input[0]) if node.input[0] in writers else output
        if node.op_type not in _REARRANGING:
            break
        name = node.input[0]
    return output


@dataclass
class _Measured:
    """One output: its spread over the images, and each response's metric in its own units."""

    name: str
    seed: tuple[int, int]
    count: int = 0
    mean: NDArray[np.float64] = field(default_factory=lambda: np.zeros(()))
    scatter: float = 0.0
    metric: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    excluded: str | None = None

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)

    def add(self, rows: NDArray[np.float64]) -> None:
        """Take in the outputs of some images, shape (n, elements): Chan's update."""
        mean = rows.mean(axis=0)
        count = self.count + len(rows)
        shift = mean - self.mean
        self.scatter += float(np.square(rows - mean).sum())
        self.scatter += float(shift @ shift) * self.count * len(rows) / count if self.count else 0.0
        self.mean = self.mean + shift * (len(rows) / count)
        self.count = count

    def directions(self, count: int, projections: int, elements: int) -> NDArray[np.float32]:
        """Draw projections for `count` images, shape (count, projections, elements)."""
        return self._random.standard_normal((count, projections, elements), dtype=np.float32)

    @property
    def variance(self) -> float:
        """Total variance over the images so far, with rounding taken for none."""
        size = float(np.square(self.mean).sum())
        variance = self.scatter / max(self.count, 1)
        return variance if variance > NO_VARIANCE * size else 0.0


@dataclass
class _Work:
    """Everything that goes on from batch to batch."""

    graph: TorchGraph
    responses: Mapping[str, int]
    measured: Sequence[_Measured]
    projections: int
    most: int | None = None
    images: int = 0
    channels: dict[str, int] = field(default_factory=dict)

    def within(self, given: Batch, memory_mib: int) -> Iterator[Batch]:
        """Split a batch so that what each part keeps stays within the bound."""
        if self.most is None:
            one = self.graph.activation_bytes(self.tensors(_rows(given, 0, 1)))
            # Twice: a gradient is kept of each tapped tensor, and none is larger than the tensor.
            self.most = max(1, memory_mib * 2**20 // max(2 * one, 1))
        for start in range(0, given.count, self.most):
            yield _rows(given, start, min(start + self.most, given.count))

    def tensors(self, given: Batch) -> dict[str, Tensor]:
        """Return the feeds as tensors on the graph's device."""
        import torch

        return {
            name: torch.from_numpy(np.array(feed)).to(self.graph.device)
            for name, feed in given.feeds.items()
        }

    def result(self, left_out: dict[str, str], sources: Mapping[str, str]) -> OutputMetrics:
        """Average over images, projections and outputs."""
        usable = []
        for each in self.measured:
            if each.excluded is None and each.variance == 0.0:
                each.excluded = "it does not vary over the images"
            if each.excluded is None:
                usable.append(each)
            else:
                left_out = {**left_out, sources[each.name]: each.excluded}
        if not usable:
            reasons = "; ".join(f"'{name}': {why}" for name, why in left_out.items())
            raise FlatOutputError(
                f"no output tells the {self.images} images apart ({reasons}); give more images, "
                "or different ones"
            )
        metric = {name: np.zeros((channels, channels)) for name, channels in self.channels.items()}
        for each in usable:
            share = 1.0 / (each.variance * self.images * self.projections * len(usable))
            for name, total in each.metric.items():
                metric[name] += share * total
        outputs = tuple(each.name for each in usable)
        return OutputMetrics(metric, outputs, self.images, self.projections, left_out)


def _rows(given: Batch, start: int, stop: int) -> Batch:
    feeds: dict[str, NDArray[Any]] = {n: feed[start:stop] for n, feed in given.feeds.items()}
    return Batch(feeds, None, stop - start)


def _run(work: _Work, part: Batch, advance: Advance) -> None:
    outputs, tapped = work.graph.forward(work.tensors(part), taps=work.responses)
    for name, axis in work.responses.items():
        work.channels[name] = tapped[name].shape[axis]
    filled = next(len(feed) for feed in part.feeds.values())
    for measured in work.measured:
        output = outputs[measured.name]
        if output.ndim < 1 or len(output) != filled:
            measured.excluded = "it has not one row for each image"
        if measured.excluded is None:
            _add_output(work, measured, output.reshape(len(output), -1), tapped, part.count)
    work.images += part.count
    advance(part.count)


def _add_output(
    work: _Work, measured: _Measured, output: Tensor, tapped: Mapping[str, Tensor], count: int
) -> None:
    """Take in one output of one batch, shape (n, elements); its first `count` rows are images."""
    import torch

    rows = output.detach()[:count].cpu().numpy().astype(np.float64)
    if not np.isfinite(rows).all():
        raise CalibrationError(
            f"'{measured.name}' is not finite on a calibration image; check the images and how "
            "they are prepared"
        )
    measured.add(rows)
    drawn = measured.directions(count, work.projections, output.shape[1])
    names = [name for name, tap in tapped.items() if tap.requires_grad]
    if not output.requires_grad or not names:
        return
    for index in range(work.projections):
        # Rows that only fill a fixed batch weigh nothing.
        direction = torch.zeros_like(output)
        direction[:count] = torch.from_numpy(drawn[:, index]).to(output.device)
        gradients = torch.autograd.grad(
            output,
            [tapped[name] for name in names],
            grad_outputs=direction,
            retain_graph=True,
            allow_unused=True,
        )
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                found = _squares(gradient, work.responses[name], name)
                measured.metric[name] = measured.metric.get(name, 0.0) + found


def _squares(gradient: Tensor, axis: int, name: str) -> NDArray[np.float64]:
    """Return Σ over positions of gᵀ g, shape (N, N)."""
    rows = gradient.movedim(axis, -1).reshape(-1, gradient.shape[axis])
    largest = float(rows.abs().max())
    if not np.isfinite(largest):
        raise NoGradientError(
            f"the gradient at '{name}' is not finite on a calibration image; check the model's "
            "weights and how the images are prepared"
        )
    if largest == 0.0:
        return np.zeros((rows.shape[1], rows.shape[1]))
    rows = rows / largest  # far from 1, squares leave the range of float32
    squares: NDArray[np.float64] = (rows.T @ rows).cpu().numpy().astype(np.float64)
    return squares * largest**2

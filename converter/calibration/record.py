"""Record what layers see and answer: sampled patches, responses and their moments.

Layers are converted in the order of the graph. Each is fitted on the patches that the layers
before it deliver *as converted so far*, against the response of the *original* at the same
positions. So the original runs once for all layers (`Recorder.originals`), and the graph as
converted so far runs once more for each layer (`Recorder.inputs`), but only in part: the recorder
keeps the tensors of one cut through the graph, right before the layer, and the next layer starts
from there. Where a cut is too large to keep, an older one is run forward instead, at worst the
calibration set itself.

Images can be recorded in parts, elsewhere: `Recorder.draw` says where the patches of all of them lie,
`Recorder.part` gives a recorder of some of them that can be pickled, and the samples of parts join
(`Sample.joined`) to the sample of the whole.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnxruntime as ort
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from onnx import numpy_helper

from converter.calibration.moments import Moments
from converter.calibration.sets import CalibrationSet, padded
from converter.calibration.subset import Subset
from converter.config import CalibrationSettings, Runtime
from converter.errors import CalibrationError
from converter.progress import Advance
from converter.runtime import model_inputs, open_session, run
from passes.base import PassError
from passes.expose import extract
from passes.layers import Layer

__all__ = ["Inputs", "Recorder", "Sample"]

Floats: TypeAlias = NDArray[np.float32]
Tensors: TypeAlias = Mapping[str, NDArray[Any]]

_MIB = 2**20
_CHUNK_BYTES = 2**26  # patches that are gathered at once


@dataclass(frozen=True, eq=False)
class Sample:
    """Where the patches of a layer are sampled, and what the original model did there.

    Attributes
    ----------
    positions : ndarray of shape (images, per), int64
        Flat positions in the response of each image, in [0, P), ascending, each once.
    out_shape : tuple of int
        Spatial shape of the response; () for Gemm; for MatMul the axes between the batch and the
        last one.
    target : ndarray of shape (n, N), float32
        The original's tensor before the activation: the response, plus the shortcut where the
        layer has one. n = images · per, image by image.
    mean : ndarray of shape (N,), float64
        Mean of the layer's own response, without the shortcut, over the sample.
    covariance : ndarray of shape (N, N), float64
        Its covariance over the sample, E[(y − mean)(y − mean)ᵀ].
    """

    positions: NDArray[np.int64]
    out_shape: tuple[int, ...]
    target: Floats
    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    def joined(self, following: Sample) -> Sample:
        """Return the sample of these images and those that follow; neither part is changed."""
        moments = self._moments().joined(following._moments())
        return Sample(
            np.concatenate([self.positions, following.positions]),
            self.out_shape,
            np.concatenate([self.target, following.target]),
            moments.mean,
            moments.covariance,
        )

    def _moments(self) -> Moments:
        count = len(self.target)
        return Moments(count, self.mean, self.covariance * count)


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a layer reads at the positions of its sample, in the graph as converted so far.

    Attributes
    ----------
    features : ndarray of shape (n, D) or (n, m), float32
        Patches, flattened as the weight is (C, *kernel); in the coordinates of the basis where
        one was given.
    offset : ndarray of shape (n, N), float32, or None
        The shortcut that is added to the response; None where the layer has none.
    """

    features: Floats
    offset: Floats | None


@dataclass(frozen=True, eq=False)
class _Held:
    """Tensors of one batch of `fed` images, of which the first `count` are real."""

    tensors: Tensors
    count: int
    fed: int


@dataclass(eq=False)
class _Cut:
    """The tensors that the rest of a graph needs, for all images, and what they were made by."""

    names: tuple[str, ...]
    batches: list[_Held]
    provenance: str

    @property
    def nbytes(self) -> int:
        return sum(_bytes_of(batch.tensors) for batch in self.batches)


@dataclass(frozen=True)
class _Geometry:
    """Shape of a response: `fold` blocks of `spatial` positions for each image, N outputs."""

    fold: int
    spatial: tuple[int, ...]
    out_shape: tuple[int, ...]
    outputs: int

    @property
    def positions(self) -> int:
        return self.fold * math.prod(self.spatial)


@dataclass(frozen=True, eq=False)
class _Draw:
    """Where the patches of a layer are sampled, before anything is recorded there."""

    geometry: _Geometry
    positions: NDArray[np.int64]  # (images, per)

    @property
    def nbytes(self) -> int:
        """Bytes that the sample will hold."""
        outputs = self.geometry.outputs
        return self.positions.nbytes + 4 * self.positions.size * outputs + 8 * outputs**2


class Recorder:
    """Records activations of a model on a calibration set, within a bound on memory.

    Half of the bound is for the targets of all layers, half for the tensors of a cut; the moments,
    one batch on its way and what `inputs` hands out come on top.

    Parameters
    ----------
    data : CalibrationSet
        The samples; at most `settings.images` of them are used.
    settings : CalibrationSettings
        Images, batch, patches for each layer, bound on memory and seed.
    runtime : Runtime
        Provider and threads.
    fixed_batch : int or None, default None
        The batch that the model insists on; None where it takes any.

    Attributes
    ----------
    notes : list of str
        What had to be reduced to stay within the bound, and by how much.

    Raises
    ------
    CalibrationError
        Where the set has no samples.
    """

    def __init__(
        self,
        data: CalibrationSet,
        settings: CalibrationSettings,
        runtime: Runtime,
        *,
        fixed_batch: int | None = None,
    ) -> None:
        if settings.images is not None and settings.images < len(data):
            data = Subset(data, settings.images)
        if len(data) == 0:
            raise CalibrationError(
                f"the calibration set ({data.describe()}) has no samples; give at least one"
            )
        self.notes: list[str] = []
        self._data = data
        self._images = len(data)
        self._start = 0
        self._settings = settings
        self._runtime = runtime
        self._fixed = fixed_batch
        self._batch = fixed_batch or min(settings.batch, self._images)
        self._cut: _Cut | None = None
        self._sample_bytes = 0
        self._peak = 0
        self._draws: dict[str, _Draw] = {}
        self._cuts = {"stored": 0, "too_large": 0, "runs_from_start": 0}

    @property
    def data(self) -> CalibrationSet:
        """The samples that are used."""
        return self._data

    @property
    def batch(self) -> int:
        """Images that run at once; `draw` may lower it."""
        return self._batch

    @property
    def fixed_batch(self) -> int | None:
        """The batch that the model insists on; None where it takes any."""
        return self._fixed

    @property
    def memory_bytes(self) -> int:
        """The bound on memory, in bytes."""
        return self._settings.memory_mib * _MIB

    def originals(
        self,
        model: onnx.ModelProto,
        layers: Sequence[Layer],
        progress: Advance | None = None,
    ) -> dict[str, Sample]:
        """Sample what the original model answers, for all layers in one pass over the set.

        Parameters
        ----------
        model : onnx.ModelProto
            The model before any layer was replaced.
        layers : sequence of Layer
            Layers of it that can be converted; their order is part of the seed.
        progress : Advance or None, default None
            Called with the number of images that are done.

        Returns
        -------
        dict of str to Sample
            By the layer's name.

        Raises
        ------
        CalibrationError
            Where a tensor has values that are not finite, where a response does not have the same
            number of positions for each image, or where even one patch for each image does not
            fit into the memory.
        ModelError
            Where onnxruntime refuses the model.
        """
        if not layers:
            return {}
        self.draw(model, layers)
        return self.answers(model, layers, progress)

    def draw(self, model: onnx.ModelProto, layers: Sequence[Layer]) -> None:
        """Settle how many images run at once and where the patches of each layer are sampled.

        The first image runs for the shapes. What is drawn depends on the seed, the order of the layers
        and the number of an image, and not on how images are recorded afterwards.

        Parameters
        ----------
        model : onnx.ModelProto
            The model before any layer was replaced.
        layers : sequence of Layer
            All layers of it that can be converted.

        Raises
        ------
        CalibrationError, ModelError
            As `originals`.
        """
        self._cut = None
        segment = self._answering(model, layers)
        probe, tensors = self._probe(segment)
        geometries = [_geometry(layer, tensors[layer.response], probe.fed) for layer in layers]
        quota = self._quota(geometries)
        self._draws = {
            layer.name: _Draw(geometry, self._positions(geometry, quota, index))
            for index, (layer, geometry) in enumerate(zip(layers, geometries, strict=True))
        }
        self._sample_bytes = sum(draw.nbytes for draw in self._draws.values())
        self._note_peak(0)

    def part(self, data: CalibrationSet, start: int) -> Recorder:
        """Return a recorder of consecutive images, with their places as they were drawn here.

        It is for `answers` and `patches`, and can be pickled where `data` can.

        Parameters
        ----------
        data : CalibrationSet
            These images alone.
        start : int
            The number of the first of them, from 0.
        """
        settings = replace(self._settings, images=None, batch=self._batch)
        part = Recorder(data, settings, self._runtime, fixed_batch=self._fixed)
        part._start = start
        part._draws = {
            name: replace(draw, positions=draw.positions[start : start + len(data)])
            for name, draw in self._draws.items()
        }
        return part

    def threaded(self, threads: int) -> Recorder:
        """Return the same recorder for a process with another number of threads."""
        other = copy(self)
        other._runtime = replace(self._runtime, threads=threads)
        return other

    def answers(
        self,
        model: onnx.ModelProto,
        layers: Sequence[Layer],
        progress: Advance | None = None,
    ) -> dict[str, Sample]:
        """Sample what the original model answers where `draw` said; else as `originals`."""
        segment = self._answering(model, layers)
        recordings = [_Recording(layer, self._draws[layer.name]) for layer in layers]
        for index, first, batch in self._numbered(self._batches(segment.given, self._batch)):
            tensors = segment.run(batch.tensors)
            self._note_peak(_fresh_bytes(tensors, batch) + _bytes_of(batch.tensors))
            for recording in recordings:
                recording.add(tensors, batch, first, index)
            _advance(progress, batch.count)
        return {recording.layer.name: recording.sample() for recording in recordings}

    def patches(
        self, model: onnx.ModelProto, layers: Sequence[Layer]
    ) -> Generator[tuple[str, NDArray[np.int64], Floats], None, None]:
        """Give what layers read where `draw` said, piece by piece; nothing of it is kept here.

        Parameters
        ----------
        model : onnx.ModelProto
        layers : sequence of Layer
            Some of those that were drawn for.

        Yields
        ------
        name : str
            Of the layer.
        images : ndarray of shape (n,), int64
            Number of the image in the whole set that each patch is of, ascending over all pieces.
        patches : ndarray of shape (n, D), float32
            Flattened as the weight is; at most 64 MiB.

        Raises
        ------
        CalibrationError, ModelError
            As `inputs`.
        """
        names = [each.name for each in model_inputs(model)]
        segment = _Segment(model, names, [layer.input for layer in layers], self._runtime)
        self._probe(segment)
        for index, first, batch in self._numbered(self._batches(names, self._batch)):
            tensors = segment.run(batch.tensors)
            for layer in layers:
                draw = self._draws[layer.name]
                positions = draw.positions[first - self._start :][: batch.count]
                images = np.repeat(np.arange(first, first + batch.count), positions.shape[1])
                for part, patches in _chunks(
                    layer, tensors[layer.input], positions, batch.fed, draw.geometry.out_shape
                ):
                    _require_finite(patches, layer, "input", index, first, batch.count)
                    yield layer.name, images[part], patches

    def inputs(
        self,
        model: onnx.ModelProto,
        layer: Layer,
        sample: Sample,
        basis: Floats | None = None,
        progress: Advance | None = None,
    ) -> Inputs:
        """Record what a layer reads in a graph whose earlier layers may have been replaced.

        Parameters
        ----------
        model : onnx.ModelProto
            The graph as converted so far, in which `layer` is still its original node.
        layer : Layer
            The layer, as it was found before anything was replaced.
        sample : Sample
            From `originals`.
        basis : ndarray of shape (m, D), float32, or None, default None
            Coordinates that patches are recorded in: features = patches · basisᵀ. The patches
            themselves are then never kept.
        progress : Advance or None, default None
            Called with the number of images that are done.

        Returns
        -------
        Inputs

        Raises
        ------
        CalibrationError
            Where a tensor has values that are not finite.
        ModelError
            Where onnxruntime refuses the model.
        ValueError
            Where the layer is not in `model`, or sample or basis do not fit it.
        """
        patches = _Patches(layer, sample, basis)
        frontier = _frontier(model.graph, layer)
        segment, cut = self._segment(model, frontier, patches.wanted)
        kept: list[_Held] = []
        held, fits = 0 if cut is None else cut.nbytes, False
        for index, first, batch in self._numbered(self._source(model, cut)):
            tensors = segment.run(batch.tensors)
            given = _bytes_of(batch.tensors)
            self._note_peak(held + _fresh_bytes(tensors, batch) + (given if cut is None else 0))
            ahead = {name: tensors[name] for name in frontier}
            if index == 0:
                fits = self._fits(ahead, batch.fed)
            if fits:
                kept.append(_Held(ahead, batch.count, batch.fed))
                held += _bytes_of(ahead)
            if fits and cut is not None:  # the new cut replaces the old one batch by batch
                cut.batches[index] = _Held({}, 0, 0)
                held -= given
            patches.add(tensors, batch, first, index)
            _advance(progress, batch.count)
        self._cuts["stored" if fits else "too_large"] += 1
        self._cut = _Cut(frontier, kept, _provenance(model.graph, frontier)) if fits else cut
        return patches.inputs()

    def describe(self) -> dict[str, Any]:
        """Say for a report what was recorded and what it took; numbers are plain.

        Returns
        -------
        dict
            `images`, `batch`, `patches` (by layer), `memory_mib` (the bound), `peak_bytes` (most
            that was held at once: samples, cuts and the batch on its way), `cuts` (how many
            were `stored`, were `too_large` to be, and how often the calibration set itself
            was run: `runs_from_start`), `notes`.
        """
        return {
            "images": self._images,
            "batch": self._batch,
            "patches": {name: draw.positions.size for name, draw in self._draws.items()},
            "memory_mib": self._settings.memory_mib,
            "peak_bytes": self._peak,
            "cuts": dict(self._cuts),
            "notes": list(self.notes),
        }

    # What runs ------------------------------------------------------------------------------

    def _batches(self, names: Sequence[str], size: int) -> Generator[_Held, None, None]:
        """Give the calibration set batch by batch, filled up where the batch is fixed."""
        seen = 0
        for batch in self._data.batches(size):
            seen += batch.count
            if seen > self._images:
                break
            if self._fixed is not None:
                batch = padded(batch, self._fixed)
            missing = set(names).difference(batch.feeds)
            if missing:
                raise CalibrationError(
                    f"the calibration set does not feed the model's input {min(missing)!r}; "
                    "give a set with an array for each input"
                )
            tensors = {name: batch.feeds[name] for name in names}
            fed = len(next(iter(tensors.values())))
            yield _Held(tensors, batch.count, fed)
        if seen != self._images:
            raise CalibrationError(
                f"the calibration set gave {seen} samples where it announced {self._images}; "
                "give a set that always gives the same ones"
            )

    def _numbered(self, batches: Iterable[_Held]) -> Iterator[tuple[int, int, _Held]]:
        """Give batches with their number and that of their first image, both in the whole set."""
        first = self._start
        for index, batch in enumerate(batches, self._start // self._batch):
            yield index, first, batch
            first += batch.count

    def _answering(self, model: onnx.ModelProto, layers: Sequence[Layer]) -> _Segment:
        """Open what computes the responses and shortcuts of layers."""
        wanted = [n for layer in layers for n in (layer.response, layer.shortcut) if n is not None]
        names = [each.name for each in model_inputs(model)]
        return _Segment(model, names, wanted, self._runtime)

    def _segment(
        self, model: onnx.ModelProto, frontier: Sequence[str], wanted: Sequence[str]
    ) -> tuple[_Segment, _Cut | None]:
        """Open what computes the wanted tensors, from the stored cut where that is possible.

        The stored cut is taken out: were a run to fail halfway, it would not be whole any more.
        """
        cut, self._cut = self._cut, None
        tensors = list(dict.fromkeys([*frontier, *wanted]))
        if cut is not None and cut.provenance == _provenance(model.graph, cut.names):
            try:
                return _Segment(model, cut.names, tensors, self._runtime), cut
            except PassError:
                # The layer lies before the cut, or ONNX cannot tell the type of a tensor of it.
                cut = None
        self._cuts["runs_from_start"] += 1
        names = [each.name for each in model_inputs(model)]
        return _Segment(model, names, tensors, self._runtime), None

    def _source(self, model: onnx.ModelProto, cut: _Cut | None) -> Iterator[_Held]:
        if cut is None:
            return self._batches([each.name for each in model_inputs(model)], self._batch)
        return (cut.batches[index] for index in range(len(cut.batches)))

    # What fits ------------------------------------------------------------------------------

    @property
    def _half(self) -> int:
        return self._settings.memory_mib * _MIB // 2

    def _probe(self, segment: _Segment) -> tuple[_Held, Tensors]:
        """Run the first images for the shapes; settle a batch whose tensors fit into a quarter."""
        with closing(self._batches(segment.given, self._fixed or 1)) as batches:
            probe = next(batches)
        tensors = segment.run(probe.tensors)
        bound = self._half // 2
        fitting = max(1, bound * probe.fed // max(1, _bytes_of(tensors)))
        if self._fixed is None and fitting < self._batch:
            self.notes.append(
                f"{fitting} images run at once instead of {self._batch}, so that their tensors "
                f"stay within {bound // _MIB} MiB"
            )
            self._batch = fitting
        return probe, tensors

    def _quota(self, geometries: Sequence[_Geometry]) -> int:
        """Return the most positions of an image that are sampled, the same for all layers."""

        def targets(per: int) -> int:
            return sum(4 * min(g.positions, per) * g.outputs for g in geometries) * self._images

        asked = math.ceil(self._settings.patches / self._images)
        asked = min(asked, max(g.positions for g in geometries))
        if targets(1) > self._half:
            raise CalibrationError(
                f"one patch of each of the {self._images} images takes {_mib(targets(1))} MiB for "
                f"all layers, more than half of the bound of {self._settings.memory_mib} MiB; "
                f"raise the memory to {2 * _mib(targets(1))} MiB or use fewer images"
            )
        per = next(per for per in range(asked, 0, -1) if targets(per) <= self._half)
        if per < asked:
            self.notes.append(
                f"at most {per * self._images} patches of a layer are sampled instead of "
                f"{asked * self._images}, so that the targets stay within "
                f"{self._half // _MIB} MiB; more memory allows more"
            )
        return per

    def _positions(self, geometry: _Geometry, quota: int, index: int) -> NDArray[np.int64]:
        """Draw positions of each image: one out of each of `per` parts of equal length."""
        per = min(geometry.positions, quota)
        edges = np.arange(per + 1, dtype=np.int64) * geometry.positions // per
        random = np.random.default_rng((self._settings.seed, index))
        return random.integers(edges[:-1], edges[1:], size=(self._images, per), dtype=np.int64)

    def _fits(self, ahead: Tensors, fed: int) -> bool:
        """Whether a cut fits, judged by its tensors in a batch of `fed` images."""
        rows = self._images
        if self._fixed is not None:
            rows = math.ceil(self._images / self._fixed) * self._fixed
        return _bytes_of(ahead) * rows <= self._half * fed

    def _note_peak(self, held: int) -> None:
        self._peak = max(self._peak, self._sample_bytes + held)


class _Segment:
    """Computes some tensors of a model from others; what is given is passed through.

    Raises `PassError` where they cannot be computed from these.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        given: Sequence[str],
        wanted: Sequence[str],
        runtime: Runtime,
    ) -> None:
        self.given = tuple(given)
        self._wanted = tuple(dict.fromkeys(wanted))
        self._computed = [name for name in self._wanted if name not in self.given]
        self._session: ort.InferenceSession | None = None
        if self._computed:
            part = extract(model, self.given, self._computed)
            self._session = open_session(part, runtime, spinning=False)

    def run(self, tensors: Tensors) -> Tensors:
        """Return the wanted tensors of one batch."""
        results: dict[str, NDArray[Any]] = {}
        if self._session is not None:
            arrays = run(self._session, self._computed, tensors)
            results = dict(zip(self._computed, arrays, strict=True))
        return {name: results[name] if name in results else tensors[name] for name in self._wanted}


class _Recording:
    """Gathers the sample of one layer, batch by batch."""

    def __init__(self, layer: Layer, draw: _Draw) -> None:
        self.layer = layer
        self._geometry = draw.geometry
        self._positions = draw.positions
        self._target: Floats = np.empty((draw.positions.size, draw.geometry.outputs), np.float32)
        self._moments = Moments.none(draw.geometry.outputs)
        self._done = 0

    def add(self, tensors: Tensors, batch: _Held, first: int, index: int) -> None:
        """Take the positions of the next images, from number `first` on, out of the batch's tensors."""
        layer = self.layer
        response = tensors[layer.response]
        if _geometry(layer, response, batch.fed) != self._geometry:
            raise CalibrationError(
                f"layer {layer.name!r} answers with other shapes in batch {index} than before; "
                "give samples of one size, or leave the layer out of the conversion"
            )
        positions = self._positions[self._done :][: batch.count]
        rows = _rows(layer.op, response, positions, batch.fed)
        _require_finite(rows, layer, "response", index, first, batch.count)
        self._moments.add(rows)
        if layer.shortcut is not None:
            shortcut = _rows(layer.op, tensors[layer.shortcut], positions, batch.fed)
            _require_finite(shortcut, layer, "shortcut", index, first, batch.count)
            rows = rows + shortcut
        per = positions.shape[1]
        self._target[self._done * per :][: len(rows)] = rows
        self._done += batch.count

    def sample(self) -> Sample:
        """Return what was gathered."""
        mean, covariance = self._moments.mean, self._moments.covariance
        return Sample(self._positions, self._geometry.out_shape, self._target, mean, covariance)


class _Patches:
    """Gathers the inputs of one layer, batch by batch."""

    def __init__(self, layer: Layer, sample: Sample, basis: Floats | None) -> None:
        if layer.weight is None or layer.group != 1:
            raise ValueError(f"layer {layer.name!r} cannot be converted: {layer.reason}")
        self._layer = layer
        self._sample = sample
        self._features = math.prod(layer.weight.shape[1:])
        if basis is not None and (basis.ndim != 2 or basis.shape[1] != self._features):
            raise ValueError(
                f"a basis of shape {basis.shape} does not fit layer {layer.name!r} with patches "
                f"of {self._features} numbers"
            )
        self._basis = None if basis is None else np.asarray(basis, np.float32)
        columns = self._features if basis is None else len(basis)
        self._out: Floats = np.empty((len(sample.target), columns), np.float32)
        self._offset: Floats | None = None
        if layer.shortcut is not None:
            self._offset = np.empty_like(sample.target)

    @property
    def wanted(self) -> list[str]:
        """Tensors that are recorded from."""
        layer = self._layer
        return [layer.input] if layer.shortcut is None else [layer.input, layer.shortcut]

    def add(self, tensors: Tensors, batch: _Held, first: int, index: int) -> None:
        """Take the positions of the images from `first` on out of the batch's tensors."""
        layer = self._layer
        positions = self._sample.positions[first : first + batch.count]
        per = positions.shape[1]
        span = slice(first * per, (first + batch.count) * per)
        place = (layer, index, first, batch.count)
        features = self._out[span]
        out_shape = self._sample.out_shape
        for part, patches in _chunks(layer, tensors[layer.input], positions, batch.fed, out_shape):
            _require_finite(patches, layer, "input", *place[1:])
            if self._basis is None:
                features[part] = patches
            else:
                np.matmul(patches, self._basis.T, out=features[part])
        if layer.shortcut is not None and self._offset is not None:
            rows = _rows(layer.op, tensors[layer.shortcut], positions, batch.fed)
            _require_finite(rows, layer, "shortcut", *place[1:])
            self._offset[span] = rows

    def inputs(self) -> Inputs:
        """Return what was gathered."""
        return Inputs(self._out, self._offset)


# Tensors to rows -----------------------------------------------------------------------------


def _geometry(layer: Layer, response: NDArray[Any], fed: int) -> _Geometry:
    """Read the shape of a response to `fed` images; raise where it has no such shape."""
    assert layer.weight is not None, "listed layers that can be converted have a weight"
    blocks = _blocks(layer.op, response)
    if blocks.size == 0 or len(blocks) % fed or blocks.shape[1] != len(layer.weight):
        raise CalibrationError(
            f"the response of layer {layer.name!r} has the shape {response.shape} for {fed} "
            "images, which is not the same number of positions for each of them; leave the layer "
            "out of the conversion"
        )
    conv = layer.op == "Conv"
    spatial = response.shape[2:] if conv else ()
    return _Geometry(
        fold=len(blocks) // fed,
        spatial=spatial,
        out_shape=spatial if conv else response.shape[1:-1],
        outputs=blocks.shape[1],
    )


def _blocks(op: str, tensor: NDArray[Any]) -> NDArray[Any]:
    """Bring a tensor of a layer to (blocks, channels, positions)."""
    shape = tensor.shape
    if op == "Conv":
        return tensor.reshape(shape[0], shape[1], math.prod(shape[2:]))
    return tensor.reshape(math.prod(shape[:-1]), shape[-1], 1)


def _rows(
    op: str,
    tensor: NDArray[Any],
    positions: NDArray[np.int64],
    fed: int,
    part: slice = slice(None),
) -> NDArray[Any]:
    """Return the channels at positions (images, per) of a batch, (images · per, channels)."""
    blocks = _blocks(op, tensor)
    size = blocks.shape[2]
    fold = len(blocks) // fed
    images = np.repeat(np.arange(len(positions)), positions.shape[1])[part]
    flat = positions.reshape(-1)[part]
    rows: NDArray[Any] = blocks[images * fold + flat // size, :, flat % size]
    return rows


def _chunks(
    layer: Layer,
    tensor: NDArray[Any],
    positions: NDArray[np.int64],
    fed: int,
    out_shape: tuple[int, ...],
) -> Iterator[tuple[slice, Floats]]:
    """Give the patches at positions (images, per) of a batch, so many at once as fit into a chunk."""
    assert layer.weight is not None, "listed layers that can be converted have a weight"
    step = max(1, _CHUNK_BYTES // (4 * math.prod(layer.weight.shape[1:])))
    for start in range(0, positions.size, step):
        part = slice(start, min(start + step, positions.size))
        yield part, _gather(layer, tensor, positions, part, fed, out_shape)


def _gather(
    layer: Layer,
    tensor: NDArray[Any],
    positions: NDArray[np.int64],
    part: slice,
    fed: int,
    out_shape: tuple[int, ...],
) -> Floats:
    """Return the patches of some of the positions of a batch, (rows, D)."""
    assert layer.weight is not None, "listed layers that can be converted have a weight"
    if layer.op != "Conv":
        return _rows(layer.op, tensor, positions, fed, part)
    per = positions.shape[1]
    flat = positions.reshape(-1)[part]
    images = np.arange(part.start, part.stop) // per
    fold = len(tensor) // fed
    patches = np.empty((len(flat), math.prod(layer.weight.shape[1:])), np.float32)
    # as many images at once as fit into a chunk: one at a time, small images took longer than their network
    together = max(1, _CHUNK_BYTES // max(1, fold * tensor[0].nbytes))
    for first in range(images[0], images[-1] + 1, together):
        low, high = np.searchsorted(images, (first, first + together))
        block = tensor[first * fold : (first + together) * fold]
        places = flat[low:high] + (images[low:high] - first) * fold * math.prod(out_shape)
        patches[low:high] = _conv_patches(layer, block, places, out_shape)
    return patches


def _conv_patches(
    layer: Layer,
    block: NDArray[Any],
    flat: NDArray[np.int64],
    out_shape: tuple[int, ...],
) -> NDArray[Any]:
    """Return the patches of some images, (rows, D).

    Parameters
    ----------
    layer : Layer
        A Conv.
    block : ndarray of shape (images · fold, C, *spatial)
        Its input for these images.
    flat : ndarray of shape (rows,), int64
        Flat positions in (images · fold, *out_shape).
    out_shape : tuple of int
        Spatial shape of the response.
    """
    assert layer.weight is not None, "required where the recording starts"
    kernel = layer.weight.shape[2:]
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, layer.dilations, strict=True)]
    pads = _resolved_pads(layer, block.shape[2:], spans)
    if any(before or after for before, after in pads):
        block = np.pad(block, [(0, 0), (0, 0), *pads])
    sides = zip(block.shape[2:], spans, layer.strides, strict=True)
    found = tuple((side - span) // stride + 1 for side, span, stride in sides)
    if found != out_shape:
        raise ValueError(
            f"layer {layer.name!r} has responses of shape {found}, its sample of {out_shape}"
        )
    axes = tuple(range(2, block.ndim))
    windows = sliding_window_view(block, tuple(spans), axis=axes)
    taps: tuple[Any, ...] = (
        Ellipsis,
        *(slice(None, None, dilation) for dilation in layer.dilations),
    )
    fold, *places = np.unravel_index(flat, (len(block), *out_shape))
    starts = [place * stride for place, stride in zip(places, layer.strides, strict=True)]
    chosen: tuple[Any, ...] = (fold, slice(None), *starts)
    patches: NDArray[Any] = windows[taps][chosen]  # (rows, C, *kernel)
    return patches.reshape(len(flat), -1)


def _resolved_pads(
    layer: Layer, sides: Sequence[int], spans: Sequence[int]
) -> list[tuple[int, int]]:
    """Return zeros before and after each spatial axis; `spans` are the dilated kernel's sides."""
    if layer.auto_pad == "VALID":
        return [(0, 0)] * len(sides)
    if layer.auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        pads = []
        for side, span, stride in zip(sides, spans, layer.strides, strict=True):
            total = max(0, (math.ceil(side / stride) - 1) * stride + span - side)
            small, large = total // 2, total - total // 2
            pads.append((small, large) if layer.auto_pad == "SAME_UPPER" else (large, small))
        return pads
    axes = len(sides)
    return list(zip(layer.pads[:axes], layer.pads[axes:], strict=True))


def _require_finite(
    values: NDArray[Any], layer: Layer, what: str, index: int, first: int, count: int
) -> None:
    if not np.isfinite(values).all():
        raise CalibrationError(
            f"the {what} of layer {layer.name!r} is NaN or infinite in batch {index} of the "
            f"calibration set (samples {first} to {first + count - 1}); check the preprocessing "
            "and these samples, or leave the layer out of the conversion"
        )


# The graph -----------------------------------------------------------------------------------


def _frontier(graph: onnx.GraphProto, layer: Layer) -> tuple[str, ...]:
    """Return the tensors that exist before the layer's node and that it or later nodes read.

    Those that no input of the model changes are left out: they are computed where they are needed.
    """
    reads = [_reads(node) for node in graph.node]
    at = next(
        (
            index
            for index, node in enumerate(graph.node)
            if node.op_type == layer.op
            and layer.input in node.input
            and layer.output in node.output
        ),
        None,
    )
    if at is None:
        raise ValueError(f"the graph has no {layer.op} {layer.name!r}: it was replaced already")
    varying = {value.name for value in graph.input}.difference(_initializer_names(graph))
    for node, names in zip(graph.node[:at], reads, strict=False):
        if not varying.isdisjoint(names):
            varying.update(name for name in node.output if name)
    return tuple(sorted(varying.intersection(set().union(*reads[at:]))))


def _reads(node: onnx.NodeProto) -> set[str]:
    """Return the tensors that a node reads; names inside of its subgraphs are among them."""
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            names.update(*(_reads(inner) for inner in graph.node))
    return names


def _initializer_names(graph: onnx.GraphProto) -> set[str]:
    names = {tensor.name for tensor in graph.initializer}
    return names | {tensor.values.name for tensor in graph.sparse_initializer}


def _provenance(graph: onnx.GraphProto, names: Collection[str]) -> str:
    """Return a SHA-256 over all nodes and weights that tensors are computed by.

    A stored cut is only as good as the graph before it: where that changed since, so does this.
    """
    wanted = set(names)
    digest = hashlib.sha256()
    for node in reversed(graph.node):
        if wanted.isdisjoint(name for name in node.output if name):
            continue
        wanted |= _reads(node)
        attributes = sorted(a.SerializeToString(deterministic=True) for a in node.attribute)
        ends = (list(node.input), list(node.output))
        digest.update(repr((node.domain, node.op_type, *ends, attributes)).encode())
    weights = {tensor.name: tensor for tensor in graph.initializer if tensor.name in wanted}
    for name in sorted(weights):
        tensor = weights[name]
        digest.update(repr((name, tensor.data_type, list(tensor.dims))).encode())
        if tensor.data_type == onnx.TensorProto.STRING:
            digest.update(tensor.SerializeToString(deterministic=True))
        else:
            array = np.ascontiguousarray(numpy_helper.to_array(tensor))
            digest.update(array.reshape(-1).view(np.uint8).data)
    for sparse in graph.sparse_initializer:
        if sparse.values.name in wanted:
            digest.update(sparse.SerializeToString(deterministic=True))
    return digest.hexdigest()


# Small things --------------------------------------------------------------------------------


def _bytes_of(tensors: Tensors) -> int:
    return sum(int(array.nbytes) for array in tensors.values())


def _fresh_bytes(tensors: Tensors, batch: _Held) -> int:
    """Bytes of what was computed from a batch; what was passed through does not count."""
    return sum(int(tensors[name].nbytes) for name in tensors if name not in batch.tensors)


def _mib(size: int) -> int:
    return math.ceil(size / _MIB)


def _advance(progress: Advance | None, steps: int) -> None:
    if progress is not None:
        progress(steps)

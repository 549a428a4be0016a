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

import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from converter.calibration.gather import (
    Draw,
    Fed,
    Inputs,
    PatchGatherer,
    Sample,
    TargetGatherer,
    require_finite,
)
from converter.calibration.patches import (
    Floats,
    ResponseShape,
    Tensors,
    bytes_of,
    patch_chunks,
    response_shape,
)
from converter.calibration.segment import Segment, frontier_of, provenance_of
from converter.calibration.sets import CalibrationSet, padded
from converter.calibration.subset import Subset
from converter.config import CalibrationSettings, Runtime
from converter.errors import CalibrationError
from converter.progress import Advance
from converter.runtime import model_inputs
from passes.base import PassError
from passes.layers import Layer

__all__ = ["Recorder"]

_MIB = 2**20


@dataclass(eq=False)
class _Cut:
    """The tensors that the rest of a graph needs, for all images, and what they were made by."""

    names: tuple[str, ...]
    batches: list[Fed]
    provenance: str

    @property
    def nbytes(self) -> int:
        return sum(bytes_of(batch.tensors) for batch in self.batches)


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
        self._draws: dict[str, Draw] = {}
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
        geometries = [response_shape(layer, tensors[layer.response], probe.fed) for layer in layers]
        quota = self._quota(geometries)
        self._draws = {
            layer.name: Draw(geometry, self._positions(geometry, quota, index))
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

    def forget(self) -> None:
        """Let go of the tensors that are kept from layer to layer; the next layer starts from the images."""
        self._cut = None

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
        recordings = [TargetGatherer(layer, self._draws[layer.name]) for layer in layers]
        for index, first, batch in self._numbered(self._batches(segment.given, self._batch)):
            tensors = segment.run(batch.tensors)
            self._note_peak(_fresh_bytes(tensors, batch) + bytes_of(batch.tensors))
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
        segment = Segment(model, names, [layer.input for layer in layers], self._runtime)
        self._probe(segment)
        for index, first, batch in self._numbered(self._batches(names, self._batch)):
            tensors = segment.run(batch.tensors)
            for layer in layers:
                draw = self._draws[layer.name]
                positions = draw.positions[first - self._start :][: batch.count]
                images = np.repeat(np.arange(first, first + batch.count), positions.shape[1])
                for part, patches in patch_chunks(
                    layer, tensors[layer.input], positions, batch.fed, draw.geometry.out_shape
                ):
                    require_finite(patches, layer, "input", index, first, batch.count)
                    yield layer.name, images[part], patches

    def inputs(
        self,
        model: onnx.ModelProto,
        layer: Layer,
        sample: Sample,
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
            Where the layer is not in `model`, or the sample does not fit it.
        """
        patches = PatchGatherer(layer, sample)
        frontier = frontier_of(model.graph, layer)
        segment, cut = self._segment(model, frontier, patches.wanted)
        kept: list[Fed] = []
        held, fits = 0 if cut is None else cut.nbytes, False
        for index, first, batch in self._numbered(self._source(model, cut)):
            tensors = segment.run(batch.tensors)
            given = bytes_of(batch.tensors)
            self._note_peak(held + _fresh_bytes(tensors, batch) + (given if cut is None else 0))
            ahead = {name: tensors[name] for name in frontier}
            if index == 0:
                fits = self._fits(ahead, batch.fed)
            if fits:
                kept.append(Fed(ahead, batch.count, batch.fed))
                held += bytes_of(ahead)
            if fits and cut is not None:  # the new cut replaces the old one batch by batch
                cut.batches[index] = Fed({}, 0, 0)
                held -= given
            patches.add(tensors, batch, first, index)
            _advance(progress, batch.count)
        self._cuts["stored" if fits else "too_large"] += 1
        self._cut = _Cut(frontier, kept, provenance_of(model.graph, frontier)) if fits else cut
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

    def _batches(self, names: Sequence[str], size: int) -> Generator[Fed, None, None]:
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
            yield Fed(tensors, batch.count, fed)
        if seen != self._images:
            raise CalibrationError(
                f"the calibration set gave {seen} samples where it announced {self._images}; "
                "give a set that always gives the same ones"
            )

    def _numbered(self, batches: Iterable[Fed]) -> Iterator[tuple[int, int, Fed]]:
        """Give batches with their number and that of their first image, both in the whole set."""
        first = self._start
        for index, batch in enumerate(batches, self._start // self._batch):
            yield index, first, batch
            first += batch.count

    def _answering(self, model: onnx.ModelProto, layers: Sequence[Layer]) -> Segment:
        """Open what computes the responses and shortcuts of layers."""
        wanted = [n for layer in layers for n in (layer.response, layer.shortcut) if n is not None]
        names = [each.name for each in model_inputs(model)]
        return Segment(model, names, wanted, self._runtime)

    def _segment(
        self, model: onnx.ModelProto, frontier: Sequence[str], wanted: Sequence[str]
    ) -> tuple[Segment, _Cut | None]:
        """Open what computes the wanted tensors, from the stored cut where that is possible.

        The stored cut is taken out: were a run to fail halfway, it would not be whole any more.
        """
        cut, self._cut = self._cut, None
        tensors = list(dict.fromkeys([*frontier, *wanted]))
        if cut is not None and cut.provenance == provenance_of(model.graph, cut.names):
            try:
                return Segment(model, cut.names, tensors, self._runtime), cut
            except PassError:
                # The layer lies before the cut, or ONNX cannot tell the type of a tensor of it.
                cut = None
        self._cuts["runs_from_start"] += 1
        names = [each.name for each in model_inputs(model)]
        return Segment(model, names, tensors, self._runtime), None

    def _source(self, model: onnx.ModelProto, cut: _Cut | None) -> Iterator[Fed]:
        if cut is None:
            return self._batches([each.name for each in model_inputs(model)], self._batch)
        return (cut.batches[index] for index in range(len(cut.batches)))

    # What fits ------------------------------------------------------------------------------

    @property
    def _half(self) -> int:
        return self._settings.memory_mib * _MIB // 2

    def _probe(self, segment: Segment) -> tuple[Fed, Tensors]:
        """Run the first images for the shapes; settle a batch whose tensors fit into a quarter."""
        with closing(self._batches(segment.given, self._fixed or 1)) as batches:
            probe = next(batches)
        tensors = segment.run(probe.tensors)
        bound = self._half // 2
        fitting = max(1, bound * probe.fed // max(1, bytes_of(tensors)))
        if self._fixed is None and fitting < self._batch:
            self.notes.append(
                f"{fitting} images run at once instead of {self._batch}, so that their tensors "
                f"stay within {bound // _MIB} MiB"
            )
            self._batch = fitting
        return probe, tensors

    def _quota(self, geometries: Sequence[ResponseShape]) -> int:
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

    def _positions(self, geometry: ResponseShape, quota: int, index: int) -> NDArray[np.int64]:
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
        return bytes_of(ahead) * rows <= self._half * fed

    def _note_peak(self, held: int) -> None:
        self._peak = max(self._peak, self._sample_bytes + held)


def _fresh_bytes(tensors: Tensors, batch: Fed) -> int:
    """Bytes of what was computed from a batch; what was passed through does not count."""
    return sum(int(tensors[name].nbytes) for name in tensors if name not in batch.tensors)


def _mib(size: int) -> int:
    return math.ceil(size / _MIB)


def _advance(progress: Advance | None, steps: int) -> None:
    if progress is not None:
        progress(steps)

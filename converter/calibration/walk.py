"""A network gone through once, layer by layer: what it answers where one layer at a time is another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx

from converter.calibration.patches import Tensors, bytes_of
from converter.calibration.segment import Segment, frontier_of
from converter.config import Runtime
from passes.base import Pass
from passes.expose import types_of
from passes.layers import Layer

__all__ = ["Walk"]

_LABEL = "the network with one layer in another form"


class Walk:
    """What lies before a layer is the same with any form of it: it is computed once, and the rest for each.

    Parameters
    ----------
    model : onnx.ModelProto
        It is not changed.
    batches : sequence of dict of str to ndarray
        What is fed to its inputs.
    runtime : Runtime
    memory : int
        Bytes that tensors before a layer may take, for all batches, as judged by the first. Where they take
        more, those before an earlier layer are kept, at worst what is fed.
    """

    def __init__(
        self, model: onnx.ModelProto, batches: Sequence[Tensors], runtime: Runtime, memory: int
    ) -> None:
        self._model, self._runtime, self._memory = model, runtime, memory
        self._types = types_of(model)
        self._batches = list(batches)

    def answers(
        self, layer: Layer, changes: Sequence[Pass], wanted: Sequence[str]
    ) -> Iterator[Tensors]:
        """Give tensors that the network computes with one layer changed, batch by batch.

        All batches are to be taken, since what comes before the layer is kept of each as it passes.

        Parameters
        ----------
        layer : Layer
            A layer of the network; not one before that of an earlier call.
        changes : sequence of Pass
            What rewrites the layer; its response keeps its name.
        wanted : sequence of str
            Names of tensors, the same in each call.

        Raises
        ------
        PassError
            Where the type of a tensor between the parts is not known, before anything runs; or where the
            layer comes before an earlier one.
        ModelError, CalibrationError
            Where onnxruntime refuses a part of the network, or what is fed.
        """
        reached = frontier_of(self._model.graph, layer, wanted)
        changed = self._segment([layer.input], [layer.response], changes)
        rest = self._segment([*reached, layer.response], wanted)
        forward = self._segment(tuple(self._batches[0]), [*reached, layer.input])
        fits = False
        for index, batch in enumerate(self._batches):
            tensors = forward.run(batch)
            before = {name: tensors[name] for name in reached}
            if index == 0:
                fits = bytes_of(before) * len(self._batches) <= self._memory
            if fits:
                self._batches[index] = before
            response = changed.run({layer.input: tensors[layer.input]})
            yield rest.run({**before, **response})

    def _segment(
        self, given: Sequence[str], wanted: Sequence[str], changes: Sequence[Pass] = ()
    ) -> Segment:
        return Segment(
            *(self._model, given, wanted, self._runtime),
            changes=changes,
            label=_LABEL,
            types=self._types,
        )

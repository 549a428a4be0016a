"""Inner tensors of a model on the calibration images, batch by batch within a bound of memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx
from numpy.typing import NDArray

from converter.calibration.sets import Batch, CalibrationSet, fixed_batch, padded
from converter.calibration.subset import Subset
from converter.config import QuantizationSettings, Runtime
from converter.runtime import model_inputs, open_session, run
from passes.expose import expose

__all__ = ["Recording"]

LEAST_IMAGES = 32
_BYTES = 16
"""What a value takes at most: itself, a copy, and a count of the copy in a wider type."""

Values = Mapping[str, NDArray[Any]]


class Recording:
    """A model and the images that it is recorded on.

    Parameters
    ----------
    model : onnx.ModelProto
    data : CalibrationSet
    settings : QuantizationSettings
        The images that run at once at most, and the bound on the tensors of a batch.
    runtime : Runtime
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        data: CalibrationSet,
        settings: QuantizationSettings,
        runtime: Runtime,
    ) -> None:
        self._model, self._data = model, data
        self._settings, self._runtime = settings, runtime
        self._fixed = fixed_batch(model_inputs(model))

    def of(
        self, tensors: Sequence[str], *, work: float
    ) -> tuple[int, Iterator[tuple[int, Values]]]:
        """Run the model and give what some of its tensors hold.

        Parameters
        ----------
        tensors : sequence of str
            Of its main graph, inputs and outputs among them.
        work : float
            Values that are given in all, about: a large network takes fewer images, spread evenly, and
            `LEAST_IMAGES` at least.

        Returns
        -------
        tuple of (int, iterator of (int, mapping of str to ndarray))
            How many images there are, and for each batch how many it has and its tensors by name.

        Raises
        ------
        ModelError, CalibrationError
            Where onnxruntime refuses the model or the images.
        """
        fed = {each.name for each in model_inputs(self._model)}
        inner = [name for name in tensors if name not in fed]
        label = "the model that is quantized"
        session = open_session(
            expose(self._model, inner), self._runtime, spinning=False, label=label
        )

        def values(batch: Batch) -> Values:
            feeds = (padded(batch, self._fixed) if self._fixed else batch).feeds
            found = dict(zip(inner, run(session, inner, feeds, label=label), strict=True))
            return found | {name: feed for name, feed in feeds.items() if name in tensors}

        first = values(next(iter(self._data.batches(self._fixed or 1))))
        each = max(sum(array.size for array in first.values()) / (self._fixed or 1), 1.0)
        wanted = max(LEAST_IMAGES, int(work / each))
        data = Subset(self._data, wanted) if wanted < len(self._data) else self._data
        fitting = int(self._settings.memory_mib * 2**20 / (_BYTES * each))
        size = self._fixed or max(1, min(self._settings.batch, fitting))
        return len(data), ((batch.count, values(batch)) for batch in data.batches(size))

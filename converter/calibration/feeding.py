"""Arrays as an input of the model takes them: whether they fit, and the cast to its type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converter.calibration.sets import ModelInput
from converter.errors import CalibrationError

__all__ = ["check_fit", "fed"]


def check_fit(
    where: str, shape: tuple[int, ...], dtype: np.dtype[Any], model_input: ModelInput
) -> None:
    """Refuse an array whose samples have another shape than the input, or another kind of type."""
    name, wanted = model_input.name, model_input.shape
    if len(shape) == len(wanted) - 1 and _sides_agree(shape, wanted[1:]):
        raise CalibrationError(
            f"{where} has the shape {shape} of one sample without a batch axis; save array[None]"
        )
    if len(shape) != len(wanted) or not _sides_agree(shape[1:], wanted[1:]):
        words = ", ".join("?" if side is None else str(side) for side in wanted)
        raise CalibrationError(
            f"{where} has the shape {shape} where the model's input {name!r} takes ({words}); "
            "bring the array to that shape"
        )
    if not _keeps_meaning(dtype, model_input.dtype):
        raise CalibrationError(
            f"{where} is {dtype} where the model's input {name!r} takes {model_input.dtype}; scale "
            f"it as for the model's training and save it as {model_input.dtype}"
        )


def _sides_agree(shape: Sequence[int], wanted: Sequence[int | str | None]) -> bool:
    return len(shape) == len(wanted) and all(
        not isinstance(want, int) or side == want for side, want in zip(shape, wanted, strict=True)
    )


def _keeps_meaning(given: np.dtype[Any], wanted: np.dtype[Any]) -> bool:
    if given.kind == wanted.kind == "f":
        return True
    if given.kind in "iu" and wanted.kind in "iu":
        return np.can_cast(given, wanted, "safe")
    return given == wanted


def fed(array: NDArray[Any], model_input: ModelInput, where: str) -> NDArray[Any]:
    """Cast to the input's type; refuse what is not finite, before the cast or after it."""
    with np.errstate(over="ignore"):  # a number too large becomes inf, which is refused below
        cast = array.astype(model_input.dtype, copy=False)
    if cast.dtype.kind == "f" and not np.isfinite(cast).all():
        raise CalibrationError(
            f"{where} has values that are NaN or infinite as {model_input.dtype}; "
            "take them out and save the rest"
        )
    return cast

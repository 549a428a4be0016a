"""Inputs and outputs that two models must share to be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

from converter.calibration.sets import ModelInput
from converter.errors import ValidationError
from converter.runtime import declared_shape, model_inputs

__all__ = ["common_interface"]


def common_interface(
    models: Sequence[onnx.ModelProto], labels: Sequence[str]
) -> tuple[tuple[ModelInput, ...], tuple[str, ...]]:
    """Give the inputs that two models share, and the names of their outputs.

    Parameters
    ----------
    models : sequence of onnx.ModelProto
    labels : sequence of str
        What messages call them.

    Raises
    ------
    ValidationError
        Where inputs or outputs differ in name, type or a fixed size.
    """
    return _common_inputs(models, labels), _common_outputs(models, labels)


def _common_inputs(
    models: Sequence[onnx.ModelProto], labels: Sequence[str]
) -> tuple[ModelInput, ...]:
    first, second = (
        {each.name: each for each in model_inputs(model, label=label)}
        for model, label in zip(models, labels, strict=True)
    )
    _same_names("input", first, second, labels)
    common = []
    for name, mine in first.items():
        other = second[name]
        if mine.dtype != other.dtype or not _shapes_meet(mine.shape, other.shape):
            raise ValidationError(
                f"input '{name}' is {mine.dtype} {list(mine.shape)} in {labels[0]} but "
                f"{other.dtype} {list(other.shape)} in {labels[1]}; compare two forms of one model"
            )
        shape = tuple(
            b if isinstance(b, int) else a for a, b in zip(mine.shape, other.shape, strict=True)
        )
        common.append(ModelInput(name, shape, mine.dtype))
    return tuple(common)


def _common_outputs(models: Sequence[onnx.ModelProto], labels: Sequence[str]) -> tuple[str, ...]:
    first, second = ({value.name: value.type for value in model.graph.output} for model in models)
    _same_names("output", first, second, labels)
    for name, mine in first.items():
        other = second[name]
        kinds = [kind.tensor_type.elem_type for kind in (mine, other)]
        shapes = [declared_shape(kind) for kind in (mine, other)]
        known = [shape for shape in shapes if shape is not None]
        if kinds[0] != kinds[1] or (len(known) == 2 and not _shapes_meet(*known)):
            types = [onnx.TensorProto.DataType.Name(kind).lower() for kind in kinds]
            raise ValidationError(
                f"output '{name}' is {types[0]} {list(shapes[0] or ())} in {labels[0]} but "
                f"{types[1]} {list(shapes[1] or ())} in {labels[1]}; "
                "compare two forms of one model"
            )
    return tuple(first)


def _same_names(
    kind: str, first: Mapping[str, object], second: Mapping[str, object], labels: Sequence[str]
) -> None:
    for here, there, label in ((first, second, labels[1]), (second, first, labels[0])):
        missing = sorted(here.keys() - there.keys())
        if missing:
            raise ValidationError(
                f"{label} has no {kind} '{missing[0]}'; compare two forms of one model"
            )


def _shapes_meet(one: Sequence[int | str | None], other: Sequence[int | str | None]) -> bool:
    """Whether two declared shapes can be one: equal ranks, and equal sizes where both are fixed."""
    return len(one) == len(other) and all(
        a == b or not isinstance(a, int) or not isinstance(b, int)
        for a, b in zip(one, other, strict=True)
    )

"""Which outputs hold scores of classes; the same for all who compare answers."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar, cast

__all__ = ["holds_scores", "in_rows"]


class _Array(Protocol):
    """What arrays of numpy and tensors of torch have in common."""

    @property
    def ndim(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


_T = TypeVar("_T", bound=_Array)


def in_rows(output: _T) -> _T:
    """Drop trailing axes of length 1, down to rank 2: where a pooling ends a network, they are left."""
    row: Any = output
    while row.ndim > 2 and row.shape[-1] == 1:
        row = row[..., 0]
    return cast("_T", row)


def holds_scores(output: _Array) -> bool:
    """Whether an output looks like scores of classes: one row of two or more for each image."""
    row = in_rows(output)
    return row.ndim == 2 and row.shape[1] >= 2

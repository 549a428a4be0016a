"""A small layer whose columns are grouped in three ways."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from converter.solver.quadratic import Groups

ROWS, CHANNELS, HIGH, WIDE = 7, 4, 3, 2
TAPS = HIGH * WIDE
WIDTH = CHANNELS * TAPS
PATCHES = 400
_COLUMNS = torch.arange(WIDTH).view(CHANNELS, HIGH, WIDE)
SPATIAL = Groups(_COLUMNS.permute(2, 0, 1).reshape(WIDE, CHANNELS * HIGH))
TUCKER = Groups(_COLUMNS.permute(1, 2, 0).reshape(TAPS, CHANNELS))
WHOLE = Groups(torch.arange(WIDTH)[None])
GROUPS = pytest.mark.parametrize(
    "groups", [SPATIAL, TUCKER, WHOLE], ids=["spatial", "tucker", "whole"]
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def positive(size: int, seed: int) -> Tensor:
    """A random symmetric positive definite matrix, float64."""
    factor = torch.randn(size, 2 * size, generator=generator(seed), dtype=torch.float64)
    return factor @ factor.T / size


def roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T


def dense_target(seed: int = 3) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=generator(seed), dtype=torch.float64)


def separable(rank: int, seed: int = 8) -> Tensor:
    """A weight (N, D) that is exactly a kh×1 Conv of `rank` outputs and a 1×kw one behind it."""
    random = generator(seed)
    first = torch.randn(rank, CHANNELS, HIGH, generator=random)
    second = torch.randn(ROWS, WIDE, rank, generator=random)
    return torch.einsum("nwr,rch->nchw", second, first).reshape(ROWS, WIDTH)


def separable_beside(channel: int) -> Tensor:
    """A separable weight of rank 2, and anything on one channel."""
    weight = separable(2)
    own = slice(channel * TAPS, (channel + 1) * TAPS)
    weight[:, own] += 3 * torch.randn(ROWS, TAPS, generator=generator(9))
    return weight


def tucker(first: int, second: int, seed: int = 8) -> Tensor:
    """A weight (N, D) that is exactly of Tucker ranks (first, second)."""
    random = generator(seed)
    inner = torch.randn(first, CHANNELS, generator=random)
    core = torch.randn(second, first, TAPS, generator=random)
    outer = torch.randn(ROWS, second, generator=random)
    return torch.einsum("nq,qrt,rc->nct", outer, core, inner).reshape(ROWS, WIDTH)

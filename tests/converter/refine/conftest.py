"""Files of a network that was damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from converter.model_file import save_model
from tests.converter.refine.small import network


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Original, damaged model and images."""
    images: NDArray[np.float32] = (
        np.random.default_rng(2).standard_normal((160, 3, 8, 8)).astype(np.float32)
    )
    np.save(tmp_path / "images.npy", images)
    save_model(network(), tmp_path / "original.onnx")
    save_model(network(0.3), tmp_path / "damaged.onnx")
    return tmp_path / "original.onnx", tmp_path / "damaged.onnx", tmp_path / "images.npy"

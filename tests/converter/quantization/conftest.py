"""A small residual network and its images as files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from converter.model_file import save_model

Network = Callable[..., onnx.ModelProto]


@pytest.fixture
def files(network: Network, images: NDArray[np.float32], tmp_path: Path) -> tuple[Path, Path]:
    """The network and its images as files."""
    save_model(network(), tmp_path / "model.onnx")
    np.save(tmp_path / "images.npy", images)
    return tmp_path / "model.onnx", tmp_path / "images.npy"

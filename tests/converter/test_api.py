"""What `import converter` gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import converter
from converter.config import PRESETS
from converter.errors import ConfigError


def test_every_public_name_is_there() -> None:
    assert all(getattr(converter, name) is not None for name in converter.__all__)
    assert set(converter.__all__) <= set(dir(converter))
    with pytest.raises(AttributeError, match="magic"):
        _ = converter.magic


def test_preset_and_preprocessing_exclude_each_other(net: Path, pictures: Path) -> None:
    with pytest.raises(ConfigError, match="one of them"):
        converter.validate(
            net, net, pictures, preset="unit", preprocessing=PRESETS["unit"], seconds=0.01
        )
    with pytest.raises(ConfigError, match="magic"):
        converter.validate(net, net, pictures, preset="magic")


def test_validate_takes_a_data_reader(net: Path) -> None:
    class Reader:
        def __init__(self) -> None:
            self.left = [np.full((2, 3, 8, 8), value, np.float32) for value in (0.0, 1.0)]

        def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
            return {"image": self.left.pop()} if self.left else None

    result = converter.validate(str(net), str(net), Reader(), time_batches=(), seconds=0.01)
    assert result.images == 4
    assert result.accuracy is None

"""A seeded share of the damaged files, and what counts as a fault."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from converter.errors import ConfigError
from tools import damage
from tools.damage import KINDS, Kind, damaged

QUICK = [kind for kind in KINDS if kind.name != "reports"]


@pytest.mark.parametrize("kind", QUICK, ids=lambda kind: kind.name)
def test_damaged_files_are_read_or_refused(tmp_path: Path, kind: Kind) -> None:
    for number in range(25):
        data, suffix = damage._input(kind, tmp_path, 7, number)
        path = tmp_path / f"damaged{suffix}"
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about damaged images
            assert damage._fault(kind, path) in ("", None)


def test_damage_is_drawn_from_its_seed_and_does_damage() -> None:
    data = bytes(range(256)) * 4
    drawn = [damaged(data, np.random.default_rng(seed)) for seed in range(50)]
    assert drawn == [damaged(data, np.random.default_rng(seed)) for seed in range(50)]
    assert sum(each != data for each in drawn) > 35


def test_what_is_neither_read_nor_refused_with_a_sentence_is_a_fault(tmp_path: Path) -> None:
    def raising(error: Exception) -> Kind:
        def read(path: Path) -> None:
            del path
            raise error

        return Kind("x", 1, read, read)

    assert damage._fault(raising(ConfigError("it is wrong; correct it")), tmp_path) is None
    assert damage._fault(raising(ConfigError("two\nlines")), tmp_path)
    assert damage._fault(raising(RecursionError("deep")), tmp_path) == "RecursionError: deep"
    assert sum(kind.share for kind in KINDS) == 100

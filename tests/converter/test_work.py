"""Finished parts on disk: kept under what they depend on, and made again where they are damaged."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from converter import work as module
from converter.errors import ConfigError
from converter.prediction import Prediction, Probe
from converter.schemes import KEEP, Candidate, Form
from converter.sensitivity import OutputMetrics
from converter.solver.solution import Iteration, Solution
from converter.work import Work, key_of
from passes.activation import Activation
from passes.split import Branches, Factor

SOLUTION = Solution(
    support=torch.tensor([1, 4]),
    sparse=torch.randn(3, 2, generator=torch.Generator().manual_seed(0)),
    factors=(torch.ones(2, 6), torch.full((3, 2), 0.1)),
    bias=torch.tensor([0.1, -0.0, 3.0]),
    fitted=0.1,
    unseen=1 / 3,
    status="iteration limit",
    history=(Iteration(1, 0.5, 0.25, 3.0, 10.0, 2, 2, 0.01),),
)
CANDIDATES = (
    Candidate(KEEP, 0.0, 100.0, 20.0),
    Candidate(Form("tucker", (3, 4), 2), 1 / 3, 0.1, 7.0),
)
DEPTHWISE = (
    Factor(np.full((2, 4, 1, 1), 1 / 3, np.float32)),
    Factor(np.ones((4, 1, 3, 3), np.float32), (0, 1), 2),
    Factor(np.ones((3, 4, 1, 1), np.float32)),
)
SPARSE = Branches(
    support=np.array([0, 3]),
    sparse=np.full((3, 2, 3, 3), 0.1, np.float32),
    bias=np.array([0.1, -0.0, 3.0], np.float32),
)
PREDICTION = Prediction(
    CANDIDATES,
    (
        Probe(Form("depthwise", (2, 4)), 1 / 7, Branches(factors=DEPTHWISE)),
        Probe(Form("sparse", (), 2), 1 / 9, SPARSE),
    ),
)
METRICS = OutputMetrics(
    {"c1": np.eye(2) / 3, "c/2": np.zeros((1, 1))}, ("logits",), 64, 2, {"classes": "integers"}
)


def test_everything_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    work = Work(tmp_path / "new" / "folder")
    work.keep_solution("fit-a", SOLUTION)
    found = work.solution("fit-a")
    assert found is not None
    for name in ("support", "sparse", "bias"):
        wanted, got = getattr(SOLUTION, name), getattr(found, name)
        assert got.dtype == wanted.dtype
        assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))
    assert all(map(torch.equal, found.factors, SOLUTION.factors))
    assert (found.fitted, found.unseen, found.status) == (0.1, 1 / 3, "iteration limit")
    assert found.history == SOLUTION.history

    work.keep_candidates("predict-a", CANDIDATES)
    assert work.candidates("predict-a") == CANDIDATES

    work.keep_prediction("predict-b", PREDICTION)
    prediction = work.prediction("predict-b")
    assert prediction is not None
    assert prediction.candidates == CANDIDATES
    assert [(each.form, each.effect) for each in prediction.probes] == [
        (each.form, each.effect) for each in PREDICTION.probes
    ]
    # the key takes in every array, and every setting beside them
    assert key_of("predict", prediction) == key_of("predict", PREDICTION)

    work.keep_metrics("effects-a", METRICS)
    effects = work.metrics("effects-a")
    assert effects is not None
    assert list(effects.metric) == ["c1", "c/2"]
    np.testing.assert_array_equal(effects.metric["c1"], METRICS.metric["c1"])
    assert (effects.outputs, effects.images, effects.projections, effects.left_out) == (
        ("logits",),
        64,
        2,
        {"classes": "integers"},
    )
    assert work.notes == ()
    assert work.solution("fit-b") is None


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 something", b"x" * 1000])
def test_damage_is_noted_and_nothing_is_taken(tmp_path: Path, content: bytes) -> None:
    work = Work(tmp_path)
    work.keep_candidates("predict-a", CANDIDATES)
    (tmp_path / "predict-a.npz").write_bytes(content)
    assert work.candidates("predict-a") is None
    assert len(work.notes) == 1
    assert "made again" in work.notes[0]
    work.keep_candidates("predict-a", CANDIDATES)
    assert work.candidates("predict-a") == CANDIDATES


def test_what_belongs_to_another_part_is_not_taken(tmp_path: Path) -> None:
    work = Work(tmp_path)
    work.keep_candidates("predict-a", CANDIDATES)
    (tmp_path / "predict-a.npz").rename(tmp_path / "predict-b.npz")
    assert work.candidates("predict-b") is None
    work.keep_candidates("fit-a", CANDIDATES)
    assert work.solution("fit-a") is None  # whole, but no solution
    assert len(work.notes) == 2


def test_what_cannot_be_kept_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="work folder"):
        Work(tmp_path / "file" / "folder")
    work = Work(tmp_path / "gone")
    work.folder.rmdir()
    work.keep_candidates("predict-a", CANDIDATES)
    assert "could not be kept" in work.notes[0]

    work = Work(tmp_path / "small")
    keys = [key_of("predict", number) for number in range(5)]
    for number in range(4):
        work.keep_candidates(keys[number], CANDIDATES)
        os.utime(work.folder / f"{keys[number]}.npz", (number, number))
    assert work.candidates(keys[0]) is not None  # used, and so the youngest
    size = (work.folder / f"{keys[0]}.npz").stat().st_size
    monkeypatch.setattr(module, "MOST_BYTES", 3 * size)
    work.keep_candidates(keys[4], CANDIDATES)
    left = {path.stem for path in work.folder.iterdir()}
    assert left == {keys[0], keys[3], keys[4]}


# Keys --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    number: float
    array: np.ndarray[Any, Any]


def test_keys_are_names_of_files_and_depend_on_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.arange(6, dtype=np.float32)
    values: list[Any] = [
        *(1, 1.0, True, None, "1", b"1", (), (1,), (1, 1), ((1,), 1), [[], [1]]),
        *(array, array.astype(np.float64), array.reshape(2, 3), array[::-1], array[:0]),
        *(np.zeros((0, 2)), np.zeros((0, 3)), np.float32(2) * array),
        *(Setting(1.0, array), Setting(1.0, array[::-1]), Setting(-0.0, array)),
        *(Setting(0.0, array), Activation("relu"), Activation("clip", 0, 6)),
    ]
    keys = [key_of("fit", value) for value in values]
    assert len(set(keys)) == len(values)
    assert keys == [key_of("fit", value) for value in values]
    assert key_of("fit", "a", "bc") != key_of("fit", "ab", "c")
    assert key_of("fit") != key_of("predict")
    assert all(key.replace("-", "").isalnum() for key in keys)
    with pytest.raises(TypeError):
        key_of("fit", {1, 2})
    monkeypatch.setattr(module, "_surroundings", lambda: b"another machine")
    assert key_of("fit", 1) not in keys


@given(st.integers(0, 23), st.integers(0, 7))
def test_one_bit_of_an_array_is_another_key(byte: int, bit: int) -> None:
    array = np.arange(6, dtype=np.float32)
    changed = array.copy()
    changed.view(np.uint8)[byte] ^= 1 << bit
    assert key_of("fit", array) != key_of("fit", changed)


def test_only_its_own_files_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = [tmp_path / name for name in ("calib.npz", "fast.recovery.npz", "fit-mine.npz")]
    for path in others:
        np.savez(path, x=np.zeros(4))
        os.utime(path, (0, 0))
    monkeypatch.setattr(module, "MOST_BYTES", 1)
    work = Work(tmp_path)
    work.keep_candidates(key_of("predict", 1), CANDIDATES)
    assert all(path.exists() for path in others)
    assert work.candidates(key_of("predict", 1)) is None


def test_a_part_in_a_folder_of_someone_else_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work(tmp_path)
    work.keep_candidates("predict-a", CANDIDATES)

    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "utime", refused)
    assert work.candidates("predict-a") == CANDIDATES
    assert work.notes == ()


def test_what_could_not_be_read_again_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("converter.array_file.MOST_BYTES", 100)
    work = Work(tmp_path)
    work.keep_solution("fit-a", SOLUTION)
    assert not list(tmp_path.iterdir())
    (note,) = work.notes
    assert "more than the 100" in note

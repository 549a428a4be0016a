"""How long a recovery may take as typed, and settings that are refused."""

from __future__ import annotations

import pytest

from converter.config import recovery_length
from converter.errors import ConfigError
from tests.converter.refine.small import settings


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90s", {"seconds": 90}),
        ("10m", {"seconds": 600}),
        ("1.5h", {"seconds": 5400}),
        ("20e", {"epochs": 20}),
    ],
)
def test_lengths(text: str, expected: dict[str, float]) -> None:
    assert recovery_length(text) == expected


@pytest.mark.parametrize("text", ["", "m", "10", "-3m", "nanm", "10d"])
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="90s, 10m or 1h"):
        recovery_length(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": None},
        {"seconds": 3.0},
        {"batch": 1},
        {"rate": 0.0},
        {"augment": ("turn",)},
        {"temperature": 0.0},
        {"refit": 1.5},
    ],
    ids=str,
)
def test_settings_that_make_no_sense(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        settings(**changes)

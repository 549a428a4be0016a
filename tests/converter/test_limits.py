"""Limits: the default, what a variable makes of it, and what it must not be."""

from __future__ import annotations

import pytest

from converter.errors import ConfigError
from converter.limits import Limit

LIMIT = Limit("TWOFOLD_MAX_TESTED", 7)


def test_a_variable_sets_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LIMIT.value == 7
    monkeypatch.setenv("TWOFOLD_MAX_TESTED", "")
    assert LIMIT.value == 7
    monkeypatch.setenv("TWOFOLD_MAX_TESTED", "12")
    assert LIMIT.value == 12
    assert str(LIMIT) == "set TWOFOLD_MAX_TESTED above 12 if it is right"


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "much", " 3", "1" * 13, "٣"])
def test_a_variable_that_is_no_whole_number_is_refused(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("TWOFOLD_MAX_TESTED", text)
    with pytest.raises(ConfigError, match="TWOFOLD_MAX_TESTED is"):
        _ = LIMIT.value

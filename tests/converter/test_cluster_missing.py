"""A cluster that is asked for where its package is not there."""

from __future__ import annotations

import sys

import pytest

from converter.cluster import connect
from converter.errors import ConfigError


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ConfigError, match=r"pip install 'twofold\[dask\]'"):
        connect("tcp://127.0.0.1:9")

"""What solvers may choose from."""

from __future__ import annotations

import pytest

from converter.config import SolverSettings
from converter.config.solver import SCHEME_NAMES
from converter.errors import ConfigError
from converter.schemes import SCHEMES


def test_all_schemes_are_allowed_unless_some_are_named() -> None:
    assert set(SolverSettings().schemes) == set(SCHEME_NAMES) == set(SCHEMES)
    assert SolverSettings(schemes=("tucker",)).schemes == ("tucker",)


def test_baselines_have_channel_alone() -> None:
    assert SolverSettings("svd").schemes == ("channel",)
    assert SolverSettings("data-svd", schemes=("spatial",)).schemes == ("channel",)


@pytest.mark.parametrize("schemes", [(), ("crossed",)])
def test_unknown_schemes_are_refused(schemes: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="give some of channel, spatial, depthwise"):
        SolverSettings(schemes=schemes)

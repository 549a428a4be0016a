"""Errors by kind."""

from __future__ import annotations

from converter.errors import ConfigError, ConverterError, ModelError


def test_errors_have_the_exit_codes_of_the_command_line() -> None:
    assert (ModelError.exit_code, ConfigError.exit_code) == (3, 2)
    assert issubclass(ModelError, ConverterError)

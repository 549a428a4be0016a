"""What can go wrong, by kind. Each kind has the exit code that the command line ends with.

Every message is one sentence that names the file, the node where there is one, and the remedy.
A layer that cannot be converted is no error: it stays as it is, and the report says why.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "CalibrationError",
    "ConfigError",
    "ConverterError",
    "ModelError",
    "SolverError",
    "ValidationError",
]


class ConverterError(Exception):
    """Base of every error that Twofold raises on purpose; exit code 5."""

    exit_code: ClassVar[int] = 5


class ConfigError(ConverterError, ValueError):
    """A setting, a budget or an output path that cannot be used; exit code 2."""

    exit_code: ClassVar[int] = 2


class ModelError(ConverterError):
    """A model that cannot be read, is not valid, or refers to an unsafe path; exit code 3."""

    exit_code: ClassVar[int] = 3


class CalibrationError(ConverterError):
    """Images or arrays that cannot be read or do not fit the model; exit code 4."""

    exit_code: ClassVar[int] = 4


class SolverError(ConverterError):
    """Numbers that became non-finite or a system that is singular; exit code 5."""

    exit_code: ClassVar[int] = 5


class ValidationError(ConverterError):
    """A converted model that does not do what was promised; exit code 1."""

    exit_code: ClassVar[int] = 1

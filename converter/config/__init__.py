"""Settings: frozen, validated where they are made, and nothing else.

A setting that makes no sense is refused here, with `ConfigError`, before any work starts.
"""

from converter.config.budget import Budget
from converter.config.calibration import CalibrationSettings
from converter.config.gates import Gates, gates_from_options, nearest
from converter.config.preprocessing import (
    PRESETS,
    Preprocessing,
    preprocessing_from_options,
    preset_resize,
)
from converter.config.quantization import QuantizationSettings
from converter.config.recovery import Precision, RecoverySettings, recovery_length
from converter.config.solver import SCHEME_NAMES, SolverName, SolverSettings
from converter.config.target import Provider, Runtime, Target

__all__ = [
    "PRESETS",
    "SCHEME_NAMES",
    "Budget",
    "CalibrationSettings",
    "Gates",
    "Precision",
    "Preprocessing",
    "Provider",
    "QuantizationSettings",
    "RecoverySettings",
    "Runtime",
    "SolverName",
    "SolverSettings",
    "Target",
    "gates_from_options",
    "nearest",
    "preprocessing_from_options",
    "preset_resize",
    "recovery_length",
]

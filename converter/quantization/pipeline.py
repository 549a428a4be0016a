"""Quantization from files to a file."""

from __future__ import annotations

from pathlib import Path

from converter.calibration.opening import open_calibration_set
from converter.calibration.sets import CalibrationSet, DataReader
from converter.config import Preprocessing, QuantizationSettings, Target
from converter.model_file import external_files, load_model, save_model
from converter.output_file import check_output_path
from converter.progress import SILENT, Progress
from converter.quantization.quantizing import Quantized, quantize, require_quantizable
from converter.runtime import model_inputs

__all__ = ["quantize_files"]


def quantize_files(
    original: Path,
    converted: Path,
    calib: Path | DataReader | CalibrationSet,
    out: Path,
    settings: QuantizationSettings,
    *,
    preprocessing: Preprocessing,
    target: Target,
    timing: bool = True,
    progress: Progress = SILENT,
) -> Quantized:
    """Quantize `converted`, and write what is faster; see `converter.quantize`."""
    read = [original, converted, *external_files(original), *external_files(converted)]
    check_output_path(out, *read)
    first, second = load_model(original), load_model(converted)
    require_quantizable(second, converted, settings, target.runtime)
    data = open_calibration_set(calib, model_inputs(first, label=str(original)), preprocessing)
    quantized = quantize(
        first,
        second,
        data,
        settings,
        target,
        path=converted,
        timing=timing,
        progress=progress,
    )
    save_model(quantized.model, out)
    return quantized

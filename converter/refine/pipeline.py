"""Recovery from files to a file."""

from __future__ import annotations

from pathlib import Path

from converter.calibration.opening import open_calibration_set
from converter.calibration.sets import CalibrationSet, DataReader
from converter.config import Preprocessing, RecoverySettings, Runtime
from converter.model_file import external_files, load_model, save_model
from converter.output_file import check_output_path
from converter.progress import SILENT, Progress
from converter.refine.recovery import Recovered, recover
from converter.runtime import model_inputs

__all__ = ["checkpoint_of", "recover_files"]


def checkpoint_of(out: Path, part: int = 0) -> Path:
    """Say where the state of an unfinished recovery lies; that of a part of the way has its number."""
    return out.with_suffix(f".recovery-{part}.npz" if part else ".recovery.npz")


def recover_files(
    original: Path,
    converted: Path,
    images: Path | DataReader | CalibrationSet,
    out: Path,
    settings: RecoverySettings,
    *,
    preprocessing: Preprocessing,
    runtime: Runtime,
    checkpoint: Path | None = None,
    progress: Progress = SILENT,
) -> Recovered:
    """Train `converted`, and write the better of before and after; see `converter.recover`."""
    read = [original, converted, *external_files(original), *external_files(converted)]
    check_output_path(out, *read)
    kept = checkpoint or checkpoint_of(out)
    check_output_path(kept, *read, out)
    first, second = load_model(original), load_model(converted)
    data = open_calibration_set(
        images,
        model_inputs(first, label=str(original)),
        preprocessing,
        labels=settings.labels,
    )
    recovered = recover(first, second, data, settings, runtime, checkpoint=kept, progress=progress)
    save_model(recovered.model, out)
    kept.unlink(missing_ok=True)
    return recovered

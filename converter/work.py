"""Finished parts of a conversion on disk, so that a run that was killed goes on from there.

What takes the time are three functions: the effects on the output, the prediction of a layer's forms, and
the fit of a form. Each result is kept under a hash of all that it depends on: the arguments to the last
bit, the program's own code, the versions of the libraries, and the processor. So nothing that is kept can
be out of date. Recordings are cheap beside the fits, and are made again in the same order: the arguments
of the next fit are then those of an undisturbed run.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from converter.array_file import DamagedFileError, load_arrays, save_arrays
from converter.errors import ConfigError
from converter.runtime import machine
from converter.schemes import Candidate, Form
from converter.solver.solution import Iteration, Solution
from passes.split import Branches, Factor

if TYPE_CHECKING:
    from converter.prediction import Prediction
    from converter.sensitivity import OutputMetrics

__all__ = ["Work", "key_of"]

About: TypeAlias = Mapping[str, Any]
Arrays: TypeAlias = Mapping[str, NDArray[Any]]
_T = TypeVar("_T")

_KINDS = ("effects", "predict", "fit")
_DIGEST = "[0-9a-f]" * 64
"""What files of the folder are called; others may lie there too."""
MOST_BYTES = 2**34
"""Of all that is kept; what was not used for the longest time goes first."""


class Work:
    """A folder of finished parts.

    Parameters
    ----------
    folder : Path
        Made where it is missing.

    Raises
    ------
    ConfigError
        Where there is no such folder and none can be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._notes: dict[str, None] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"the work folder {self.folder} cannot be made: {error.strerror}; give another"
            ) from error

    @property
    def notes(self) -> tuple[str, ...]:
        """What could not be read or kept, each once."""
        return tuple(self._notes)

    # The three parts -----------------------------------------------------------------------------

    def metrics(self, key: str) -> OutputMetrics | None:
        """Recall what errors cost at the outputs; None where it is not there."""
        return self._recall(key, _metrics)

    def keep_metrics(self, key: str, metrics: OutputMetrics) -> None:
        """Keep them."""
        about = {
            "names": list(metrics.metric),
            "outputs": metrics.outputs,
            "images": metrics.images,
            "projections": metrics.projections,
            "left_out": metrics.left_out,
        }
        arrays = {str(number): each for number, each in enumerate(metrics.metric.values())}
        self._keep(key, about, arrays)

    def candidates(self, key: str) -> tuple[Candidate, ...] | None:
        """Recall what a layer may become; None where it is not there."""
        return self._recall(key, _candidates)

    def keep_candidates(self, key: str, candidates: Sequence[Candidate]) -> None:
        """Keep them."""
        self._keep(key, {"candidates": _rows(candidates)}, {})

    def prediction(self, key: str) -> Prediction | None:
        """Recall what a layer may become, with its probes; None where it is not there."""
        return self._recall(key, _prediction)

    def keep_prediction(self, key: str, prediction: Prediction) -> None:
        """Keep it."""
        probes: list[About] = []
        arrays: dict[str, NDArray[Any]] = {}
        for number, probe in enumerate(prediction.probes):
            made = probe.branches
            given = {"support": made.support, "sparse": made.sparse, "bias": made.bias}
            given |= {f"factor {index}": each.weight for index, each in enumerate(made.factors)}
            arrays |= {f"{number} {name}": each for name, each in given.items() if each is not None}
            factors = [(each.axes, each.filters) for each in made.factors]
            form = probe.form.scheme, probe.form.ranks, probe.form.support
            probes.append({"form": form, "effect": float(probe.effect), "factors": factors})
        about = {"candidates": _rows(prediction.candidates), "probes": probes}
        self._keep(key, about, arrays)

    def solution(self, key: str) -> Solution | None:
        """Recall the fit of a layer; None where it is not there."""
        return self._recall(key, _solution)

    def keep_solution(self, key: str, solution: Solution) -> None:
        """Keep it."""
        tensors = {name: getattr(solution, name) for name in ("support", "sparse", "bias")}
        tensors |= {f"factor {number}": each for number, each in enumerate(solution.factors)}
        about = {
            "factors": len(solution.factors),
            "fitted": float(solution.fitted),
            "unseen": float(solution.unseen),
            "status": solution.status,
            "history": [dataclasses.asdict(line) for line in solution.history],
        }
        self._keep(key, about, {name: each.cpu().numpy() for name, each in tensors.items()})

    # Files -----------------------------------------------------------------------------------

    def _recall(self, key: str, decode: Callable[[About, Arrays], _T]) -> _T | None:
        path = self._path(key)
        try:
            if not path.exists():
                return None
            about, arrays = load_arrays(path)
            if about.pop("key", None) != key:
                raise DamagedFileError(f"{path} belongs to something else")
            with suppress(OSError):  # a folder of someone else's
                os.utime(path)
            return decode(about, arrays)
        except (DamagedFileError, OSError, KeyError, TypeError, ValueError) as error:
            what = error if isinstance(error, DamagedFileError) else f"{path} is damaged"
            self._note(f"{what}, so that part was made again")
            return None

    def _keep(self, key: str, about: About, arrays: Arrays) -> None:
        try:
            save_arrays(self._path(key), {"key": key, **about}, arrays)
            self._remove_oldest()
        except (ConfigError, OSError) as error:
            self._note(f"finished layers could not be kept in {self.folder}: {error}")

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.npz"

    def _remove_oldest(self) -> None:
        """Stay within the bound; what a killed run left half-written counts too."""
        found = []
        ours = [f"{kind}-{_DIGEST}.npz" for kind in _KINDS]
        for path in (
            each for pattern in (*ours, ".twofold-*.tmp") for each in self.folder.glob(pattern)
        ):
            try:
                status = path.stat()
            except FileNotFoundError:  # another run has finished with it
                continue
            found.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= MOST_BYTES:
                break
            path.unlink(missing_ok=True)
            total -= size

    def _note(self, text: str) -> None:
        self._notes[text] = None


def _metrics(about: About, arrays: Arrays) -> OutputMetrics:
    from converter.sensitivity import OutputMetrics

    return OutputMetrics(
        metric={name: arrays[str(number)] for number, name in enumerate(about["names"])},
        outputs=tuple(about["outputs"]),
        images=about["images"],
        projections=about["projections"],
        left_out=about["left_out"],
    )


def _rows(candidates: Sequence[Candidate]) -> list[tuple[Any, ...]]:
    return [
        (
            *(each.form.scheme, each.form.ranks, each.form.support),
            *(float(each.effect), float(each.macs), float(each.params)),
        )
        for each in candidates
    ]


def _prediction(about: About, arrays: Arrays) -> Prediction:
    from converter.prediction import Prediction, Probe

    probes = []
    for number, probe in enumerate(about["probes"]):
        factors = tuple(
            Factor(arrays[f"{number} factor {index}"], tuple(axes), filters)
            for index, (axes, filters) in enumerate(probe["factors"])
        )
        support, sparse, bias = (
            arrays.get(f"{number} {name}") for name in ("support", "sparse", "bias")
        )
        branches = Branches(support=support, sparse=sparse, factors=factors, bias=bias)
        scheme, ranks, beside = probe["form"]
        probes.append(Probe(Form(scheme, tuple(ranks), beside), probe["effect"], branches))
    return Prediction(_candidates(about, arrays), tuple(probes))


def _candidates(about: About, arrays: Arrays) -> tuple[Candidate, ...]:
    del arrays
    return tuple(
        Candidate(Form(scheme, tuple(ranks), support), effect, macs, params)
        for scheme, ranks, support, effect, macs, params in about["candidates"]
    )


def _solution(about: About, arrays: Arrays) -> Solution:
    import torch

    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    return Solution(
        support=tensors["support"],
        sparse=tensors["sparse"],
        factors=tuple(tensors[f"factor {number}"] for number in range(about["factors"])),
        bias=tensors["bias"],
        fitted=about["fitted"],
        unseen=about["unseen"],
        status=about["status"],
        history=tuple(Iteration(**line) for line in about["history"]),
    )


def key_of(kind: str, *parts: Any) -> str:
    """Hash all that a part depends on: numbers, texts, arrays, and settings made of them."""
    digest = hashlib.sha256(_surroundings())
    _feed(digest, (kind, parts))
    return f"{kind}-{digest.hexdigest()}"


@functools.cache
def _surroundings() -> bytes:
    """Hash what every result depends on: the program, the libraries and the processor."""
    digest = hashlib.sha256(json.dumps(machine(), sort_keys=True).encode())
    root = Path(__file__).resolve().parent.parent
    for package in ("converter", "passes"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.digest()


def _feed(digest: hashlib._Hash, value: Any) -> None:
    """Take in a value so that different ones differ."""
    if isinstance(value, np.ndarray):
        digest.update(f"array {value.dtype.str} {value.shape};".encode())
        if value.size:
            digest.update(np.ascontiguousarray(value).data.cast("B"))
    elif is_dataclass(value):
        digest.update(f"{type(value).__name__};".encode())
        for each in dataclasses.fields(value):
            _feed(digest, getattr(value, each.name))
    elif isinstance(value, (tuple, list)):
        digest.update(f"{len(value)};".encode())
        for each in value:
            _feed(digest, each)
    elif isinstance(value, bytes):
        digest.update(f"{len(value)};".encode() + value)
    elif isinstance(value, (str, int, float)) or value is None:
        digest.update(f"{type(value).__name__} {value!r};".encode())
    else:
        raise TypeError(f"a {type(value).__name__} has no hash here")

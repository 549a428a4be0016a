"""A recovery from two models and images to what comes of it: checks, the training, and who is better after.

Before all weights, their biases and a factor for each output channel may be trained alone, for a share of the
time: a thousandth of the unknowns, which few images determine well.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from converter.calibration.sets import CalibrationSet, fixed_batch
from converter.config import RecoverySettings, Runtime
from converter.errors import CalibrationError, ConfigError
from converter.progress import SILENT, Progress
from converter.refine.images import Images, holds_images, load_images, mirror_images
from converter.refine.judge import Judge, Judgement, judged_together
from converter.refine.lessons import Lessons
from converter.refine.networks import Networks
from converter.refine.training import Status, Training
from converter.runtime import model_inputs, open_session, run
from converter.scores import holds_scores

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Recovered", "Teacher", "recover", "require_recoverable"]

HELD_OUT_EVERY = 10
HELD_OUT_MOST = 1000
"""Every tenth image is held out, a thousand at most."""
LEAST_HELD_OUT = 2
JUDGED_BYTES, JUDGED_PART = 44, 2
"""Bytes that a number of an answer takes while it is judged, most of them in float64: both answers, what is
learned, and their difference; and the part of the images' memory that all may take, a half."""
MIRRORED = (
    "scores follow the mean of the original's for an image and for its mirror image, both shifted a little "
    "where images are; agreement is with its answers to the images as they are"
)
AS_THEY_ARE = (
    "no input takes floating-point images of 1, 3 or 4 colours, so none is flipped or shifted"
)
MIRRORED_TO_SEE = 200
"""Images that are mirrored to see whether left and right are alike, up to the end of a batch."""
ALIKE = 0.9
"""Share of equal classes from which they seem to be."""
CHECKED = 4
"""Images on which torch is compared with onnxruntime."""


@dataclass(frozen=True, eq=False)
class Recovered:
    """What a recovery has come to.

    Attributes
    ----------
    model : onnx.ModelProto
        The better of the model that was given and the one that was trained, by the held-out loss.
    improved : bool
        Whether that is the trained one.
    before, after : Judgement
        Of the model that was given, and of `model`.
    images, held_out : int
        Images that it was trained on, and that it was judged on.
    steps : int
    epochs : float
    seconds : float
        Of the training, those before an interruption included.
    status : {"time limit", "epochs done", "ended early"}
    precision : {"float32", "bfloat16"}
    inner : tuple of str
        Inner responses that were compared as well.
    notes : tuple of str
    """

    model: onnx.ModelProto
    improved: bool
    before: Judgement
    after: Judgement
    images: int
    held_out: int
    steps: int
    epochs: float
    seconds: float
    status: Status
    precision: str
    inner: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model as JSON-ready values."""
        plain = {
            each.name: getattr(self, each.name)
            for each in dataclasses.fields(self)
            if each.name != "model"
        }
        plain["before"], plain["after"] = (
            dataclasses.asdict(each) for each in (self.before, self.after)
        )
        return plain


def require_recoverable(
    original: onnx.ModelProto, data: CalibrationSet, settings: RecoverySettings
) -> None:
    """Refuse at once, before anything is converted, what could not be trained afterwards.

    Parameters
    ----------
    original : onnx.ModelProto
    data : CalibrationSet
        Images; the first few are read where the settings ask something of them.
    settings : RecoverySettings

    Raises
    ------
    ConfigError
        Where the model takes batches of one size only, or as `recover`.
    UnsupportedOperatorError, ModelError, CalibrationError
        As `recover`.
    """
    _require_free_batch(original)
    networks = Networks(original, original, settings.device, mirrored=settings.mirrored)
    first = next(iter(data.batches(CHECKED)), None)
    labelled = first is not None and first.labels is not None
    _require_lessons(data, settings, labelled=labelled, count=len(data))
    if not (settings.mirrored or settings.labels):
        return
    if first is not None:
        some = Images({name: feed[: first.count] for name, feed in first.feeds.items()})
        _require_teachable(networks, some, settings)
        names = data.class_names if settings.labels else None
        if names is not None:
            _require_class(len(names) - 1, networks, some, settings)


def _require_free_batch(model: onnx.ModelProto) -> None:
    if fixed_batch(model_inputs(model)) is not None:
        raise ConfigError(
            "the model takes batches of one fixed size only, and training needs any; export the original "
            "with a free batch"
        )


def recover(
    original: onnx.ModelProto,
    converted: onnx.ModelProto,
    data: CalibrationSet,
    settings: RecoverySettings,
    runtime: Runtime,
    *,
    checkpoint: Path | None = None,
    progress: Progress = SILENT,
) -> Recovered:
    """Train a converted model to answer as its original does; see `converter.recover`.

    Parameters
    ----------
    original, converted : onnx.ModelProto
        Neither is changed.
    data : CalibrationSet
        Images; every tenth is held out. With labels where the settings ask for them.
    settings : RecoverySettings
    runtime : Runtime
        Where the result is judged.
    checkpoint : Path or None, default None
        File to go on from, where it fits, and to keep the state in.
    progress : Progress

    Raises
    ------
    UnsupportedOperatorError
        Where an operator of either model cannot be differentiated.
    ModelError
        Where the models do not belong together, or torch does not compute what onnxruntime does.
    CalibrationError
        Where the images are too few, do not fit, or have no labels that were asked for.
    ConfigError
        Where mirror images are asked for and nothing of the model could be averaged over them.
    SolverError
        Where the loss becomes NaN or infinite at once.
    """
    _require_free_batch(converted)
    Networks(
        original, converted, settings.device
    )  # what cannot be trained is refused before images are read
    teacher = Teacher(original, data, settings, runtime, progress)
    return teacher.teach(converted, checkpoint=checkpoint, progress=progress)


class Teacher:
    """The original and the images without labels, which one network after another learns from.

    The images are read once, and what the original answers to them is kept from one to the next.

    Parameters
    ----------
    original : onnx.ModelProto
        It is not changed.
    data, settings, runtime, progress
        As for `recover`.

    Raises
    ------
    CalibrationError
        As `recover`.
    """

    def __init__(
        self,
        original: onnx.ModelProto,
        data: CalibrationSet,
        settings: RecoverySettings,
        runtime: Runtime,
        progress: Progress = SILENT,
    ) -> None:
        self._original, self._data = original, data
        self._settings, self._runtime = settings, runtime
        with progress.stage("read the images", 1):
            images, self._notes = load_images(data, settings.memory_mib)
        labelled = images.labels is not None
        _require_lessons(data, settings, labelled=labelled, count=len(images))
        most = self._judgeable()
        self._images, self._held_out = images.split(HELD_OUT_EVERY, min(HELD_OUT_MOST, most))
        if most < min(HELD_OUT_MOST, len(images) // HELD_OUT_EVERY):
            self._notes += (
                f"{most} images are held out to judge by, since answers are large; more memory allows more",
            )
        self._lessons: Lessons | None = None

    def _judgeable(self) -> int:
        """Say how many images may be held out: what networks answer to them is held, several times over."""
        session = open_session(self._original, self._runtime, label="the original model")
        first = next(iter(self._data.batches(1))).feeds
        answers = run(session, None, first, label="the original model")
        values = max(1, sum(each.size for each in answers if each.dtype.kind == "f"))
        room = self._settings.memory_mib * 2**20 // JUDGED_PART
        return max(LEAST_HELD_OUT, room // (JUDGED_BYTES * values))

    def teach(
        self,
        converted: onnx.ModelProto,
        *,
        share: float = 1.0,
        checkpoint: Path | None = None,
        progress: Progress = SILENT,
    ) -> Recovered:
        """Train a converted model; see `recover`.

        Parameters
        ----------
        converted : onnx.ModelProto
            It is not changed.
        share : float, default 1
            Of the time or the epochs of the settings, above 0 and at most 1.
        checkpoint, progress
            As for `recover`.

        Raises
        ------
        UnsupportedOperatorError, ModelError, CalibrationError, ConfigError, SolverError
            As `recover`.
        """
        settings, runtime = self._settings.of_share(share), self._runtime
        networks = Networks(self._original, converted, settings.device, mirrored=settings.mirrored)
        networks.check(self._images.batch(slice(0, CHECKED), settings.device), runtime)
        notes = self._notes + _left_out(networks)
        _require_teachable(networks, self._images, settings)
        notes += (MIRRORED,) if settings.mirrored else self._hint(networks)
        if settings.augment and not holds_images(self._images.batch(slice(0, 1), settings.device)):
            notes += (AS_THEY_ARE,)
        if settings.labels:
            _require_classes(networks, self._images, settings)

        if self._lessons is not None:
            # inner responses are not kept; they make a percent of difference
            settings = dataclasses.replace(settings, features=0.0)
        lessons = Lessons(networks, self._images, settings, self._lessons)
        together = judged_together(settings, self._held_out)
        wanted = lessons.of_held_out(self._held_out, together)
        judge = Judge(networks, self._original, self._held_out, wanted, settings, runtime)
        before = judge.judge(converted)
        training = Training(networks, self._images, self._held_out, wanted, lessons, settings)
        key = _key(self._original, converted, self._data, settings)
        there = checkpoint is not None and checkpoint.exists()
        resumed = checkpoint is not None and training.resumed(checkpoint, key)
        status: Status = "ended early"
        if settings.refit > 0 and not resumed:
            channels = Training(
                networks.of_scales(),
                self._images,
                self._held_out,
                wanted,
                lessons,
                settings,
                settings.refit,
            )
            channels.notes = training.notes
            own_key = f"{key}-channels"
            resumed = checkpoint is not None and channels.resumed(checkpoint, own_key)
            notes += _went_on(channels) if resumed else ()
            status = channels.run("re-fit channels", checkpoint, own_key, progress)
            training = training.after(channels)
        elif resumed:
            notes += _went_on(training)
        if there and not resumed:
            notes += (
                f"{checkpoint} is damaged, or of other models, images or settings, so this run began anew",
            )
        if settings.refit < 1:
            status = training.run("recover", checkpoint, key, progress)
        lessons.ended(training.step, training.batch)
        self._lessons = lessons
        notes += tuple(training.notes)
        if training.asked_in != training.precision:
            notes += (f"the original answered in {training.asked_in}, where it is clearly faster",)

        trained = training.networks.written(training.best)
        after = judge.judge(trained)
        improved = after.loss < before.loss
        return Recovered(
            model=trained if improved else converted,
            improved=improved,
            before=before,
            after=after if improved else before,
            images=len(self._images),
            held_out=len(self._held_out),
            steps=training.step,
            epochs=training.step * training.batch / len(self._images),
            seconds=training.seconds,
            status=status,
            precision=training.precision,
            inner=networks.inner if settings.features > 0 else (),
            notes=notes,
        )

    def _hint(self, networks: Networks) -> tuple[str, ...]:
        """Tell of --mirrored where left and right seem to be alike; only a person knows whether they are."""
        import torch

        same: list[Tensor] = []
        for rows in self._held_out.in_order(judged_together(self._settings, self._held_out)):
            feeds = self._held_out.batch(rows, self._settings.device)
            if not holds_images(feeds):
                return ()
            plain, turned = networks.original(feeds), networks.original(mirror_images(feeds))
            scores = next((name for name in networks.outputs if holds_scores(plain[name])), None)
            if scores is None:
                return ()
            same.append(plain[scores].argmax(1) == turned[scores].argmax(1))
            if rows.stop >= MIRRORED_TO_SEE:
                break
        share = float(torch.cat(same).float().mean())
        if share < ALIKE:
            return ()
        return (
            f"the original gives {share:.0%} of images the class of their mirror images: if left and right "
            "are alike in all of them, --mirrored may well make the result right more often",
        )


def _require_lessons(
    data: CalibrationSet, settings: RecoverySettings, *, labelled: bool, count: int
) -> None:
    """Refuse images that are too few to hold some out, or have no labels that were asked for."""
    if settings.labels and not labelled:
        raise CalibrationError(
            f"{data.describe()} has no labels; give a folder with one subfolder for each class, or "
            "leave --labels out"
        )
    if count < LEAST_HELD_OUT * HELD_OUT_EVERY:
        raise CalibrationError(
            f"{data.describe()} has too few images to hold some out; give at least "
            f"{LEAST_HELD_OUT * HELD_OUT_EVERY}"
        )


def _left_out(networks: Networks) -> tuple[str, ...]:
    return tuple(
        f"output {name} is not learned: it has not one row for each image"
        for name in networks.left_out
    )


def _went_on(training: Training) -> tuple[str, ...]:
    return (f"the run went on from step {training.step} of an earlier one",)


def _require_teachable(networks: Networks, images: Images, settings: RecoverySettings) -> None:
    """Refuse mirror images and labels where nothing of the model has to do with them."""
    if settings.mirrored and not holds_images(images.batch(slice(0, CHECKED), settings.device)):
        raise ConfigError(
            "no input of the model takes floating-point images to mirror; leave --mirrored out"
        )
    if not (settings.mirrored or settings.labels) or _scores(networks, images, settings):
        return
    if settings.mirrored:
        raise ConfigError(
            "no output of the model holds scores of classes, which alone are the same for a mirror image; "
            "leave --mirrored out"
        )
    raise CalibrationError(
        "no output of the model holds scores of classes, so labels say nothing; leave --labels out"
    )


def _scores(networks: Networks, images: Images, settings: RecoverySettings) -> list[Tensor]:
    """Run the original on a few images; those of its outputs that hold scores of classes."""
    answers = networks.original(images.batch(slice(0, CHECKED), settings.device))
    return [answers[name] for name in networks.outputs if holds_scores(answers[name])]


def _require_classes(networks: Networks, images: Images, settings: RecoverySettings) -> None:
    """Refuse labels of classes that the model has no scores for."""
    assert images.labels is not None, "asked for where the images are read"
    lowest, highest = int(images.labels.min()), int(images.labels.max())
    _require_class(highest if lowest >= 0 else lowest, networks, images, settings)


def _require_class(
    number: int, networks: Networks, images: Images, settings: RecoverySettings
) -> None:
    classes = _scores(networks, images, settings)[0].shape[1]
    if not 0 <= number < classes:
        raise CalibrationError(
            f"the images have the class {number} and the model scores for {classes}; give one subfolder "
            "for each class of the model, or leave --labels out"
        )


def _key(
    original: onnx.ModelProto,
    converted: onnx.ModelProto,
    data: CalibrationSet,
    settings: RecoverySettings,
) -> str:
    """Tell one run from another: models, images and settings."""
    digest = hashlib.sha256()
    for model in (original, converted):
        digest.update(model.SerializeToString(deterministic=True))
    digest.update(data.digest().encode())
    # in how many parts a conversion goes its way says nothing of the training in one of them
    asked = dataclasses.asdict(dataclasses.replace(settings, gradual=None))
    digest.update(json.dumps(asked, sort_keys=True).encode())
    return digest.hexdigest()

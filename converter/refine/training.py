"""The training itself: steps, the best so far on held-out images, and checkpoints.

The steps are Adam's (Kingma and Ba, arXiv:1412.6980). The rate of each tensor is relative to the root mean
square of its own values, so that one setting serves small and large factors alike; it rises over the first
steps and falls along a cosine to nothing at the end of the time or of the epochs. What is judged on the
held-out images, and kept, is a running mean of the weights (Polyak and Juditsky, 1992), since single steps
are noisy. A network that answers nearly as its original does is only shaken by steps of that size: as long as
nothing is gained, each judgement takes it back to where it was, and goes on with a third of the rate.
A judgement that would take too much of a limited time is left out.

A checkpoint is one `.npz` file of plain arrays. It appears whole or not at all, and is used only by a run
with the same models, images and settings; such a run sees the images that the first would have seen.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from converter.array_file import DamagedFileError, load_arrays, save_arrays
from converter.config import RecoverySettings
from converter.errors import ConfigError, SolverError
from converter.progress import Progress
from converter.refine.images import Images
from converter.refine.judge import judged_together
from converter.refine.lessons import Lessons
from converter.refine.loss import lessons_differ, relative_error
from converter.refine.networks import Networks

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SHRINK", "Status", "Training"]

JUDGEMENTS = 20
"""How often the weights are judged over the whole time, at most."""
JUDGED_SHARE = 0.2
"""Share of a limited time that judging may take: where images are large, it is done less often."""
PATIENCE = 5
"""Judgements without a gain after which it ends early; those of the first half, where steps are large and a
gain may yet come, do not count."""
SHRINK = 3.0
"""What the rate is divided by where a judgement finds that nothing was gained yet."""
RISE = 0.03
"""Share of the whole over which the rate rises."""
MEAN_DECAY = 0.998
LEAST_SIZE = 1e-3
"""Root mean square that a tensor is taken to have at least; a bias may be all zeros."""
CLIP = 1.0
"""Largest norm of a gradient: one odd batch must not spoil Adam's moments."""
FASTER = 0.8
"""Share of the time below which the coarser precision is worth it."""
TIMED = 4
"""Runs of a batch in either precision that are timed."""
PROBED, HOPELESS = 16, 2.0
"""A precision that takes so many times as long for a sixteenth of a batch is not timed for a whole one. On a
processor without instructions for bfloat16 a few Convs took 30 times as long, and timing took minutes."""
CHECKPOINT_FORMAT = "twofold-recovery-5"

Status = Literal["time limit", "epochs done", "ended early"]


@dataclass(eq=False)
class Training:
    """The state of the training: weights, Adam's moments, the running mean, and the best so far.

    `wanted` is what is learned of `held_out`. `began` and `until` are the shares of the whole length between
    which it runs. `precision` is that of the network that is trained, `asked_in` that of the original.
    `notes` are what a reader must know, each once.
    """

    networks: Networks
    images: Images
    held_out: Images
    wanted: Mapping[str, Tensor]
    lessons: Lessons
    settings: RecoverySettings
    until: float = 1.0
    began: float = 0.0
    step: int = 0
    seconds: float = 0.0
    precision: str = "float32"
    asked_in: str = "float32"
    best: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    best_loss: float = math.inf
    idle: int = 0
    judged: int = 0
    gained: bool = False
    shrunk: float = 1.0
    restarted: float = 0.0
    notes: dict[str, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        import torch

        self.batch = min(self.settings.batch, len(self.images))
        self._judging: list[float] = []  # seconds of each judgement
        parameters = self.networks.parameters
        self._mean = {name: value.detach().clone() for name, value in parameters.items()}
        self._adam = torch.optim.Adam(
            [{"params": [value], "size": _size(value)} for value in parameters.values()],
            lr=self.settings.rate,
            betas=(0.9, 0.99),
        )

    # ---- the loop

    def after(self, channels: Training) -> Training:
        """Go on with all weights where factors of channels were trained; with those where that was all."""
        import torch

        if channels.settings.refit == 1:
            return channels
        found = self.networks.weights_of(channels.networks.written(channels.best))
        with torch.no_grad():
            for name, value in self.networks.parameters.items():
                value.copy_(torch.from_numpy(found[name]))
                self._mean[name].copy_(value)
        self.step, self.seconds, self.judged = channels.step, channels.seconds, channels.judged
        self.began = self.done
        return self

    def run(self, what: str, checkpoint: Path | None, key: str, progress: Progress) -> Status:
        """Train until the time is over, the epochs are done, or nothing is gained any more."""
        if self.idle >= PATIENCE:  # a run that was cut off later had ended here
            return "ended early"
        last = time.monotonic()
        if not self.best:
            self._keep_best()
        self.precision, self.asked_in = self._precisions()
        status: Status = "time limit" if self.settings.seconds is not None else "epochs done"
        with progress.stage(what, 1000) as advance:
            shown = self._shown(advance, 0)
            while self.passed < 1.0:
                try:
                    self._one_step()
                except SolverError as error:
                    if not self.gained:
                        raise
                    self.notes[f"the best so far was kept, since {error}"] = None
                    status = "ended early"
                    break
                now = time.monotonic()
                self.seconds, last = self.seconds + now - last, now
                shown = self._shown(advance, shown)
                if self.done * JUDGEMENTS >= self.judged + 1 or self.passed >= 1.0:
                    self.judged = int(self.done * JUDGEMENTS)
                    ends = self.passed >= 1.0
                    judges = ends or self._has_time_to_judge()
                    if judges and not self._keep_best() and not self.gained and not ends:
                        self._start_over()
                    if checkpoint is not None:
                        self._keep(checkpoint, key)
                    if self.idle >= PATIENCE:
                        status = "ended early"
                        break
            advance(1000 - shown)
        self.seconds += time.monotonic() - last  # the last judgement
        return status

    def _has_time_to_judge(self) -> bool:
        """Whether judging once more leaves the training its share of a limited time."""
        if self.settings.seconds is None:
            return True
        return sum(self._judging) + max(self._judging, default=0.0) <= JUDGED_SHARE * self.seconds

    def _start_over(self) -> None:
        """Take the weights back to the best, forget the gradients, and go on with a smaller rate."""
        import torch

        with torch.no_grad():
            for name, value in self.networks.parameters.items():
                value.copy_(torch.from_numpy(self.best[name]))
                self._mean[name].copy_(value)
                for each in self._adam.state[value].values():
                    each.zero_()
        self.shrunk *= SHRINK
        self.restarted = self.passed

    @property
    def done(self) -> float:
        """Share of the time or of the epochs that is over."""
        if self.settings.seconds is not None:
            return self.seconds / self.settings.seconds
        assert self.settings.epochs is not None, "one of the two is set"
        total = max(1, round(self.settings.epochs * len(self.images) / self.batch))
        return self.step / total

    @property
    def passed(self) -> float:
        """Share of this part of it that is over."""
        left = self.until - self.began
        return (self.done - self.began) / left if left > 0 else 1.0

    def _shown(self, advance: Any, shown: int) -> int:
        now = min(1000, int(1000 * self.passed))
        if now > shown:
            best = (
                "" if math.isinf(self.best_loss) else f", {self.best_loss:.3g} on held-out images"
            )
            advance(now - shown, f"step {self.step}{best}")
        return max(now, shown)

    def _one_step(self) -> None:
        import torch

        rows, feeds, wanted = self.lessons.lesson(
            self.step, self.batch, self._casting(self.asked_in)
        )
        with self._casting(self.precision):
            found = self.networks.converted(feeds)
        loss = self._loss(found, wanted, rows)
        if not math.isfinite(float(loss.detach())):
            raise SolverError(
                f"the training became NaN or infinite at step {self.step}; a lower --rate may do"
            )
        self._adam.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(list(self.networks.parameters.values()), CLIP)
        rate = self._rate()
        for group in self._adam.param_groups:
            group["lr"] = rate * group["size"]
        self._adam.step()
        self.step += 1
        decay = min(MEAN_DECAY, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, value in self.networks.parameters.items():
                self._mean[name].lerp_(value, 1 - decay)

    def _rate(self) -> float:
        risen = min(1.0, (self.passed - self.restarted) / RISE)
        rate = self.settings.rate / self.shrunk
        return rate * max(risen, 1e-3) * 0.5 * (1 + math.cos(math.pi * self.passed))

    def _loss(
        self, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], rows: NDArray[Any]
    ) -> Tensor:
        outputs = self.networks.outputs
        # maps are large, and even a weight of 0 would have its cost; where answers were kept there are none
        asked = self.networks.inner if self.settings.features > 0 else ()
        inner = [name for name in asked if name in wanted]
        found = {name: found[name].float() for name in (*outputs, *inner)}
        wanted = {name: wanted[name].float() for name in (*outputs, *inner)}
        loss = lessons_differ(
            found, wanted, outputs, self.settings.temperature, self._classes(self.images, rows)
        )
        for name in inner:
            share = self.settings.features / len(self.networks.inner)
            loss = loss + share * relative_error(found[name], wanted[name])
        return loss

    def _classes(self, images: Images, rows: NDArray[Any] | slice) -> Tensor | None:
        """Give the classes of some images, where they are learned."""
        return images.classes(rows, self.settings.device) if self.settings.labels else None

    # ---- precision

    def _casting(self, precision: str) -> Any:
        import torch

        if precision == "float32":
            return nullcontext()
        return torch.autocast(self.settings.device.partition(":")[0], dtype=torch.bfloat16)

    def _precisions(self) -> tuple[str, str]:
        """Say in which precision the trained network and the original run: what is asked for, or the faster.

        Each is timed on its own: the original has no backward run, which gains least by the coarser one.
        """
        import torch

        asked = self.settings.precision
        if asked != "auto":
            return asked, asked

        @functools.cache
        def prepared(size: int) -> tuple[NDArray[Any], dict[str, Tensor], dict[str, Tensor]]:
            rows = np.arange(size)
            feeds = self.images.batch(rows, self.settings.device)
            return rows, feeds, self.networks.original(feeds)

        def step(size: int, precision: str) -> None:
            rows, feeds, wanted = prepared(size)
            with self._casting(precision):
                found = self.networks.converted(feeds)
            torch.autograd.backward(self._loss(found, wanted, rows))
            self._adam.zero_grad(set_to_none=True)

        def answer(size: int, precision: str) -> None:
            _, feeds, _ = prepared(size)
            with self._casting(precision):
                self.networks.original(feeds)

        device = self.settings.device
        return _faster(step, self.batch, device), _faster(answer, self.batch, device)

    # ---- the best, and checkpoints

    def _keep_best(self) -> bool:
        """Judge the running mean on the held-out images; keep it, and say so, where it is the best so far."""
        started = time.monotonic()
        loss_now = self._judged_mean()
        self._judging.append(time.monotonic() - started)
        first = not self.best
        better = first or loss_now < self.best_loss
        if better:
            self.gained = not first
            self.best_loss, self.idle = loss_now if math.isfinite(loss_now) else math.inf, 0
            self.best = {name: value.cpu().numpy().copy() for name, value in self._mean.items()}
        elif self.passed > 0.5:
            self.idle += 1
        return better

    def _judged_mean(self) -> float:
        """Loss of the running mean of the weights on the held-out images."""
        import torch

        parameters, outputs = self.networks.parameters, self.networks.outputs
        now = {name: value.detach().clone() for name, value in parameters.items()}
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(self._mean[name])
            found = _together(self._held_out_answers(self.networks.converted), outputs)
            for name, value in parameters.items():
                value.copy_(now[name])
        classes = self._classes(self.held_out, slice(None))
        return float(
            lessons_differ(found, self.wanted, outputs, self.settings.temperature, classes)
        )

    def _held_out_answers(
        self, network: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    ) -> Iterator[dict[str, Tensor]]:
        for rows in self.held_out.in_order(judged_together(self.settings, self.held_out)):
            yield network(self.held_out.batch(rows, self.settings.device))

    def _keep(self, checkpoint: Path, key: str) -> None:
        """Write a checkpoint; where that fails, as on a full disk, the training goes on without."""
        try:
            self._write(checkpoint, key)
        except ConfigError as error:
            self.notes[f"an interrupted run would begin anew, or further back: {error}"] = None

    def _write(self, path: Path, key: str) -> None:
        arrays: dict[str, NDArray[Any]] = {}
        updates = 0
        for number, (name, value) in enumerate(self.networks.parameters.items()):
            # what leads to an output that is left out gets no gradient, and so no state
            state = self._adam.state.get(value) or _untouched(value)
            # fewer than steps, where channels went first
            updates = max(updates, int(state["step"]))
            arrays[f"{number}/now"] = value.detach().cpu().numpy()
            arrays[f"{number}/mean"] = self._mean[name].cpu().numpy()
            arrays[f"{number}/best"] = self.best[name]
            arrays[f"{number}/first"] = state["exp_avg"].cpu().numpy()
            arrays[f"{number}/second"] = state["exp_avg_sq"].cpu().numpy()
        about = {
            "format": CHECKPOINT_FORMAT,
            "key": key,
            "step": self.step,
            "updates": updates,
            "seconds": self.seconds,
            "began": self.began,
            "best_loss": self.best_loss,
            "idle": self.idle,
            "judged": self.judged,
            "gained": self.gained,
            "shrunk": self.shrunk,
            "restarted": self.restarted,
        }
        save_arrays(path, about, arrays)

    def resumed(self, path: Path, key: str) -> bool:
        """Take up the state of a checkpoint, where it is one of this very run."""
        import torch

        try:
            about, arrays = load_arrays(path)
        except DamagedFileError:
            return False
        if about.get("format") != CHECKPOINT_FORMAT or about.get("key") != key:
            return False
        names = list(self.networks.parameters)
        shapes = [tuple(self.networks.parameters[name].shape) for name in names]
        kinds = ("now", "mean", "best", "first", "second")
        for number, shape in enumerate(shapes):
            for kind in kinds:
                if arrays.get(f"{number}/{kind}", np.empty(0)).shape != shape:
                    return False
        for number, name in enumerate(names):
            value = self.networks.parameters[name]
            now, mean, best, first, second = (
                torch.from_numpy(np.array(arrays[f"{number}/{kind}"])).to(value) for kind in kinds
            )
            with torch.no_grad():
                value.copy_(now)
            self._mean[name] = mean
            self.best[name] = best.cpu().numpy()
            self._adam.state[value] = {
                "step": torch.tensor(float(about["updates"])),
                "exp_avg": first,
                "exp_avg_sq": second,
            }
        self.step, self.seconds = int(about["step"]), float(about["seconds"])
        self.began = float(about["began"])
        self.best_loss, self.idle = float(about["best_loss"]), int(about["idle"])
        self.judged, self.gained = int(about["judged"]), bool(about["gained"])
        self.shrunk, self.restarted = float(about["shrunk"]), float(about["restarted"])
        return True


def _untouched(value: Tensor) -> dict[str, Any]:
    """Give the state that Adam has of a weight before its first gradient."""
    nothing = value.detach().new_zeros(value.shape)
    return {"step": 0, "exp_avg": nothing, "exp_avg_sq": nothing}


def _together(parts: Iterable[Mapping[str, Tensor]], outputs: Sequence[str]) -> dict[str, Tensor]:
    """Join what was answered part by part, of the outputs alone."""
    import torch

    kept = [[part[name] for name in outputs] for part in parts]
    return {
        name: torch.cat(each) for name, each in zip(outputs, zip(*kept, strict=True), strict=True)
    }


def _faster(run: Callable[[int, str], None], size: int, device: str) -> str:
    """Time runs of `size` images in both precisions, and name the coarser one where it is clearly faster.

    Where a few images are hopeless in the coarser one, no more is timed.
    """
    taken = _times(run, -(-size // PROBED), device, 2)
    if taken["bfloat16"] < HOPELESS * taken["float32"]:
        taken = _times(run, size, device, TIMED)
    return "bfloat16" if taken["bfloat16"] < FASTER * taken["float32"] else "float32"


def _times(run: Callable[[int, str], None], size: int, device: str, count: int) -> dict[str, float]:
    """Give the shortest of `count` runs in either precision, in turns; seconds."""
    import torch

    taken = {"float32": math.inf, "bfloat16": math.inf}
    run(size, "float32")  # what is prepared once is no part of it
    for _ in range(count):
        for precision in taken:
            started = time.perf_counter()
            run(size, precision)
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            taken[precision] = min(taken[precision], time.perf_counter() - started)
    return taken


def _size(value: Tensor) -> float:
    return max(float(value.detach().square().mean().sqrt()), LEAST_SIZE)

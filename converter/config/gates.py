"""What a converted model must keep to before it is deployed."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass

from converter.config.require import require
from converter.errors import ConfigError

__all__ = ["Gates", "gates_from_options", "nearest"]


@dataclass(frozen=True)
class Gates:
    """What a converted model must keep to before it is deployed; None is not asked for.

    Attributes
    ----------
    min_speedup : float or None, default None
        Original milliseconds over converted ones, median over rounds of both in turns, above 0.
    max_latency_ms : float or None, default None
        Median milliseconds of the converted model for one batch, above 0.
    max_accuracy_drop : float or None, default None
        Percentage points of top-1 accuracy that may be lost, from -100 to 100; needs class folders.
    min_accuracy : float or None, default None
        Top-1 accuracy of the converted model in percent, above 1 and up to 100; needs class folders.
    min_agreement : float or None, default None
        Percent of images with the same best class in both models, above 1 and up to 100.
    max_output_error : float or None, default None
        ‖converted − original‖ / ‖original‖ of the worst output, in percent, from 0.
    max_file_mb : float or None, default None
        Size of the converted model in megabytes of 1,000,000 bytes, above 0.
    min_macs_reduction : float or None, default None
        Multiply-accumulates of the original over those of the converted model, above 0.
    min_params_reduction : float or None, default None
        The same of parameters, above 0.
    """

    min_speedup: float | None = None
    max_latency_ms: float | None = None
    max_accuracy_drop: float | None = None
    min_accuracy: float | None = None
    min_agreement: float | None = None
    max_output_error: float | None = None
    max_file_mb: float | None = None
    min_macs_reduction: float | None = None
    min_params_reduction: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.asked().items():
            require(math.isfinite(value), f"the gate {name} {value} is no number; correct it")
            if name in ("min_accuracy", "min_agreement"):
                # 0.99 would be meant as a share and hold for almost every model
                require(
                    1 < value <= 100,
                    f"the gate {name} {value:g} is not a percentage above 1; 99 asks for 99 %",
                )
            elif name == "max_accuracy_drop":
                require(
                    -100 <= value <= 100,
                    f"the gate {name} {value:g} is not from -100 to 100 percentage points; "
                    "0.5 allows half a point",
                )
            elif name == "max_output_error":
                require(
                    value >= 0,
                    f"the gate {name} {value:g} is below 0 percent, which no model keeps to; correct it",
                )
            else:
                require(value > 0, f"the gate {name} {value:g} is not above 0; correct it")

    def asked(self) -> dict[str, float]:
        """Those that were asked for, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


def gates_from_options(options: Iterable[str]) -> Gates:
    """Read gates as they are typed, "min_speedup=1.8"; of two with one name the later counts.

    Raises
    ------
    ConfigError
        Where a gate is unknown, has no number, or makes no sense.
    """
    known = [each.name for each in dataclasses.fields(Gates)]
    found: dict[str, float] = {}
    for option in options:
        name, _, text = option.partition("=")
        name = name.strip().replace("-", "_")
        if name not in known:
            near = nearest(name, known)
            remedy = f"did you mean {near!r}?" if near else f"give one of {', '.join(known)}"
            raise ConfigError(f"there is no gate {name!r}; {remedy}")
        try:
            found[name] = float(text)
        except ValueError as error:
            raise ConfigError(
                f"the gate {option!r} is not a name and a number such as {name}=1.8; correct it"
            ) from error
    return Gates(**found)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Give the known name that a mistyped one is most like; None where it is like none."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)

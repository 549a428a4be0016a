"""Where models run, and must be fast."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from converter.config.require import require

__all__ = ["Provider", "Runtime", "Target"]

Provider = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Runtime:
    """Where and how models run under onnxruntime.

    Attributes
    ----------
    provider : {"cpu", "cuda"}, default "cpu"
    threads : int, default 0
        Threads inside one operator; 0 takes the cores that this process may use.
    """

    provider: Provider = "cpu"
    threads: int = 0

    def __post_init__(self) -> None:
        require(
            self.provider in ("cpu", "cuda"),
            f"provider {self.provider!r} is neither cpu nor cuda; give one",
        )
        require(
            0 <= self.threads <= 1024, f"threads {self.threads} is not from 0 to 1024; correct it"
        )

    @property
    def thread_count(self) -> int:
        """Threads inside one operator, with 0 resolved."""
        if self.threads:
            return self.threads
        affinity = getattr(os, "sched_getaffinity", None)
        return len(affinity(0)) if affinity else (os.cpu_count() or 1)


@dataclass(frozen=True)
class Target:
    """Where the converted model must be fast.

    Attributes
    ----------
    runtime : Runtime
        Provider and threads.
    batch : int, default 1
        Samples that run at once, from 1.
    """

    runtime: Runtime = Runtime()
    batch: int = 1

    def __post_init__(self) -> None:
        require(1 <= self.batch <= 65536, f"batch {self.batch} is not from 1 to 65536; correct it")

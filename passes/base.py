"""The protocol of a graph pass, and the runner.

A pass runs in a fixed order: ``requires`` (what must hold before), ``rewrite`` (the work),
``ensures`` (what must hold after). An author writes ``rewrite`` and, where there is something to
check, the other two. The result says what changed and what was skipped, each with its reason.
Around every pass one promise is checked without the author: the inputs and outputs of the graph
keep their names and their order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import onnx_graphsurgeon as gs

__all__ = ["Change", "Pass", "PassError", "PassLog", "PassResult", "Skip", "run_passes"]


class PassError(Exception):
    """A graph that breaks what a pass requires or ensures; the message names the node."""


@dataclass(frozen=True)
class Change:
    """One thing that a pass did: the node (or tensor) it did it to, and what it did."""

    node: str
    what: str


@dataclass(frozen=True)
class Skip:
    """One thing that a pass left alone: the node (or tensor), and why."""

    node: str
    why: str


@dataclass
class PassLog:
    """What a running pass notes down; the runner turns it into a `PassResult`."""

    changes: list[Change] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)

    def changed(self, node: str, what: str) -> None:
        """Note that `node` was changed, and how."""
        self.changes.append(Change(node, what))

    def skipped(self, node: str, why: str) -> None:
        """Note that `node` was left alone, and why."""
        self.skips.append(Skip(node, why))


@dataclass(frozen=True)
class PassResult:
    """What one pass did to a graph.

    Attributes
    ----------
    name : str
        Name of the pass.
    changes : tuple of Change
        Everything it changed, in order.
    skips : tuple of Skip
        Everything it looked at and left alone, with the reason.
    """

    name: str
    changes: tuple[Change, ...]
    skips: tuple[Skip, ...]

    @property
    def modified(self) -> bool:
        """Whether the graph differs from what it was before."""
        return bool(self.changes)


class Pass(ABC):
    """One rewrite of a graph, in place."""

    name: ClassVar[str]

    def requires(self, graph: gs.Graph) -> None:  # noqa: B027  # most passes take every graph
        """Raise `PassError` where the graph is not fit for this pass."""

    @abstractmethod
    def rewrite(self, graph: gs.Graph, log: PassLog) -> None:
        """Change `graph` in place and note every change and every skip in `log`."""

    def ensures(self, graph: gs.Graph) -> None:  # noqa: B027  # many have nothing to add
        """Raise `PassError` where the pass broke what it promises."""

    def __call__(self, graph: gs.Graph) -> PassResult:
        """Run the pass on `graph`, in place, between its checks."""
        log = PassLog()
        self.requires(graph)
        interface = _interface(graph)
        self.rewrite(graph, log)
        if _interface(graph) != interface:
            raise PassError(f"the pass {self.name} changed the inputs or outputs of the graph")
        self.ensures(graph)
        return PassResult(self.name, tuple(log.changes), tuple(log.skips))


def _interface(graph: gs.Graph) -> tuple[list[str], list[str]]:
    return [t.name for t in graph.inputs], [t.name for t in graph.outputs]


def run_passes(graph: gs.Graph, passes: Sequence[Pass]) -> tuple[PassResult, ...]:
    """Run `passes` on `graph` in order, in place.

    Raises
    ------
    PassError
        Where a pass finds the graph unfit before it, or broken after it.
    """
    return tuple(each(graph) for each in passes)

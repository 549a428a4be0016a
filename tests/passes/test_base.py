from __future__ import annotations

import onnx_graphsurgeon as gs
import pytest

from passes.base import Change, Pass, PassError, PassLog, Skip, run_passes


class Renames(Pass):
    """Renames the nodes of one operator; notes the others."""

    name = "renames"

    def __init__(self, op: str, calls: list[str]) -> None:
        self.op = op
        self.calls = calls

    def requires(self, graph: gs.Graph) -> None:
        self.calls.append("requires")
        if not graph.nodes:
            raise PassError("the graph has no node")

    def rewrite(self, graph: gs.Graph, log: PassLog) -> None:
        self.calls.append("rewrite")
        for node in graph.nodes:
            if node.op == self.op:
                node.name = f"new_{node.name}"
                log.changed(node.name, "has a new name")
            else:
                log.skipped(node.name, f"is a {node.op}")

    def ensures(self, graph: gs.Graph) -> None:
        self.calls.append("ensures")
        if any(node.name == "new_bad" for node in graph.nodes):
            raise PassError("a bad name")


class DropsOutput(Pass):
    name = "drops-output"

    def rewrite(self, graph: gs.Graph, log: PassLog) -> None:
        graph.outputs = []
        log.changed("y", "is no output any more")


def graph_of(*names: str) -> gs.Graph:
    x = gs.Variable("x")
    tensors = [x, *(gs.Variable(f"{name}_output") for name in names)]
    nodes = [
        gs.Node("Relu", name, inputs=[tensors[i]], outputs=[tensors[i + 1]])
        for i, name in enumerate(names)
    ]
    return gs.Graph(nodes=nodes, inputs=[x], outputs=[tensors[-1]])


def test_a_pass_runs_between_its_checks_and_says_what_it_did() -> None:
    calls: list[str] = []
    result = Renames("Relu", calls)(graph_of("a", "b"))
    assert calls == ["requires", "rewrite", "ensures"]
    assert result.name == "renames"
    assert result.changes == (
        Change("new_a", "has a new name"),
        Change("new_b", "has a new name"),
    )
    assert result.modified


def test_a_pass_that_only_skips_has_not_modified() -> None:
    result = Renames("Conv", [])(graph_of("a"))
    assert not result.modified
    assert result.skips == (Skip("a", "is a Relu"),)


def test_an_unfit_graph_is_not_touched() -> None:
    calls: list[str] = []
    with pytest.raises(PassError, match="has no node"):
        Renames("Relu", calls)(graph_of())
    assert calls == ["requires"]


def test_a_broken_promise_is_told() -> None:
    with pytest.raises(PassError, match="a bad name"):
        Renames("Relu", [])(graph_of("bad"))


def test_no_pass_may_change_the_interface() -> None:
    with pytest.raises(PassError, match="drops-output changed the inputs or outputs"):
        DropsOutput()(graph_of("a"))


def test_passes_run_in_order() -> None:
    graph = graph_of("a")
    results = run_passes(graph, [Renames("Relu", []), Renames("Relu", [])])
    assert [result.changes[0].node for result in results] == ["new_a", "new_new_a"]

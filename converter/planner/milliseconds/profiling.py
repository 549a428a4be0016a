"""One session with a profile: how long each node of the optimised graph ran, and a whole run without."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from converter.config import Runtime
from converter.planner.milliseconds.forms import Feeds
from converter.runtime import run, session_with

__all__ = ["Profile", "profile_overhead", "profiled"]

_LEAST_RUNS = 5
_MOST_PROFILED_RUNS = 30
"""More make the file of a deep network large, which takes longer to read than the runs took: with 60, layers
of a ResNet-20 read no more alike in four trials."""
_WARM_SECONDS = 0.02
_IDLE_NODES = 64
_TINY = 1e-6
_MILLISECONDS = 1e-3  # of a profile's unit, the microsecond
_OPTIMISED = "optimised.onnx"


@dataclass(frozen=True)
class Profile:
    """One session's times.

    Attributes
    ----------
    graph : onnx.GraphProto
        What onnxruntime made of the model; its weights are elsewhere.
    nodes : dict of str to float
        Milliseconds of each of its nodes, by name, with what the profile adds.
    wall_ms : float
        Milliseconds of a whole run that is not profiled.
    """

    graph: onnx.GraphProto
    nodes: dict[str, float]
    wall_ms: float

    def total(self, overhead: float) -> float:
        """Milliseconds of all nodes, without an overhead for each; above 0."""
        return max(sum(max(each - overhead, 0.0) for each in self.nodes.values()), _TINY)


def profiled(model: onnx.ModelProto, feeds: Feeds, runtime: Runtime, seconds: float) -> Profile:
    """Run a model for `seconds` with a profile, and for half as long without."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        session = _profiling_session(model, runtime, folder)
        del model  # its weights may have most of the memory, and the session has its own
        run(session, None, feeds)
        warm = len(_run_for(session, feeds, _WARM_SECONDS)) + 1
        _run_for(session, feeds, seconds, least=_LEAST_RUNS, most=_MOST_PROFILED_RUNS)
        nodes = _node_times(Path(session.end_profiling()), warm)
        _run_for(session, feeds, _WARM_SECONDS)
        wall = _usual(_run_for(session, feeds, seconds / 2, least=_LEAST_RUNS))
        del session  # it may hold the files open
        graph = onnx.load(folder / _OPTIMISED, load_external_data=False).graph
    return Profile(graph, nodes, wall)


def _profiling_session(
    model: onnx.ModelProto, runtime: Runtime, folder: Path
) -> ort.InferenceSession:
    """Open a model as `open_session` does, with its profile and optimised graph in `folder`."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = runtime.thread_count
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    options.optimized_model_filepath = str(folder / _OPTIMISED)
    # Weights go to a file that nobody reads: the graph alone is wanted, and has no bound on size.
    external = "session.optimized_model_external_initializers"
    options.add_session_config_entry(f"{external}_file_name", "weights")
    options.add_session_config_entry(f"{external}_min_size_in_bytes", "1024")
    return session_with(model, options, ["CPUExecutionProvider"])


def _run_for(
    session: ort.InferenceSession,
    feeds: Feeds,
    seconds: float,
    *,
    least: int = 1,
    most: int | None = None,
) -> list[float]:
    """Run for about `seconds`; return the milliseconds of each run."""
    given = dict(feeds)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or (time.perf_counter() < end and len(times) != most):
        begin = time.perf_counter()
        session.run(None, given)
        times.append((time.perf_counter() - begin) * 1e3)
    return times


def _usual(times: Sequence[float]) -> float:
    """Mean of the faster half: what other programs do to a run can only make it slower.

    A mean, since a profile counts whole microseconds, and small nodes take few of them.
    """
    faster = sorted(times)[: (len(times) + 1) // 2]
    return statistics.fmean(faster)


def _node_times(profile: Path, warm: int) -> dict[str, float]:
    """Milliseconds of each node, by name, without its first `warm` runs."""
    times: dict[str, list[float]] = defaultdict(list)
    for event in json.loads(profile.read_text(encoding="utf-8")):
        name, is_kernel, _ = event["name"].rpartition("_kernel_time")
        if is_kernel and event.get("cat") == "Node":
            times[name].append(event["dur"] * _MILLISECONDS)
    return {
        name: _usual(durations[warm:]) for name, durations in times.items() if len(durations) > warm
    }


def profile_overhead(runtime: Runtime) -> float:
    """Milliseconds that a profile adds to each node: of a chain of nodes that have nothing to do."""
    names = [f"t{index}" for index in range(_IDLE_NODES + 1)]
    nodes = [
        helper.make_node("Neg", [first], [second], name=second) for first, second in pairwise(names)
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in names]
    graph = helper.make_graph(nodes, "idle", ends[:1], ends[-1:])
    opset = [helper.make_opsetid("", 13)]
    chain = helper.make_model(graph, opset_imports=opset, ir_version=8)
    profile = profiled(chain, {names[0]: np.ones(1, np.float32)}, runtime, 3 * _WARM_SECONDS)
    return max(statistics.fmean(profile.nodes.values()) - profile.wall_ms / len(profile.nodes), 0.0)

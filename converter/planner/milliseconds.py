"""What a whole model would take, predicted from few measurements of its layers.

On the CPU the layers are measured where they stand. In each of some sessions every layer has
another form that is still to be measured, so that shapes, neighbours, onnxruntime's blocked layout
and the state of the caches are those of a real model. Its profile says how long each node of the
optimised graph ran; the nodes are counted to layers by the names of the tensors that they write.
onnxruntime names a node in the blocked layout after such a tensor; a reorder into or out of that
layout belongs to the layers that read its result, since one of them asked for it.

A profile adds some microseconds to each node. A chain of nodes that do nothing shows how many, more
or less. With that taken off, the nodes add up to the time of a run but for one factor. Both numbers
are fitted to the times of whole runs of all sessions, robustly, since other programs disturb one
session or the other.

On CUDA a profile shows when kernels were started, not how long they ran. There each layer is
measured alone, as a small model of its own, all its forms in turns.

Layers with the same geometry share their measurements: within a network, and through
`Measurements` with every network that is planned on this machine later on.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper
from scipy.optimize import least_squares

from converter.config import Runtime, Target
from converter.latency import measure_latency
from converter.planner.measurements import Measurements, measurement_key
from converter.progress import SILENT, Progress
from converter.runtime import machine, open_session, run, session_with
from converter.schemes.form import KEEP, Form
from passes.base import run_passes
from passes.exchange import export_model, import_graph
from passes.expose import extract
from passes.layers import Layer
from passes.normalise import InferShapes
from passes.reorder_sums import ReorderSums
from passes.split import Branches, Split

__all__ = ["LatencyModel", "Point", "Replace", "measure_layers"]

Point: TypeAlias = tuple[Form, float]
"""A form, and its multiply-accumulates for one sample."""
Replace: TypeAlias = Callable[[Layer, Form], Branches]
"""Gives branches of a form's shapes; their values do not matter, but must not be denormal."""
Feeds: TypeAlias = Mapping[str, NDArray[Any]]
_Curve: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64]]

_LEAST_RUNS = 5
_MOST_PROFILED_RUNS = 60
"""More would make a profile of a deep network large without making its medians better."""
_WARM_SECONDS = 0.02
_RUN_SECONDS = 0.15
"""Of one session: profiled for so long, then timed for so long; the original for three times that."""
_ALONE_SECONDS = 0.1
_IDLE_NODES = 64
_LEAST_FITTED = 5
"""With fewer sessions the overhead of a profile is what the chain says."""
_LEAST_OVERHEAD, _MOST_OVERHEAD = 0.5, 2.0
"""Of a node with something to do, relative to one of the chain."""
_BUSY_FACTOR = 1.4
"""A run that takes so many times its nodes was disturbed; read 0.9 to 1.2 where nothing else ran."""
_BUSY_MS = 0.3
"""In shorter runs the call itself has a share."""
_TINY = 1e-6
_MILLISECONDS = 1e-3  # of a profile's unit, the microsecond
_OPTIMISED = "optimised.onnx"
_IDLE = "idle"
_REORDERS = ("ReorderInput", "ReorderOutput")


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """Milliseconds of one model by the forms of its layers, as a user would measure them.

    Attributes
    ----------
    rest_ms : float
        What is no layer's: poolings, concatenations, what cannot be converted, the call itself.
    curves : mapping of str to mapping of str to tuple of ndarray
        By layer and family: multiply-accumulates, ascending, and milliseconds, both float64 of
        shape (k,). A layer whose time onnxruntime does not show has none.
    notes : tuple of str
        What could not be measured.
    """

    rest_ms: float
    curves: Mapping[str, Mapping[str, _Curve]]
    notes: tuple[str, ...]

    @property
    def original_ms(self) -> float:
        """Milliseconds of the model with every layer as it is."""
        return self.rest_ms + sum(float(each[KEEP.family][1][0]) for each in self.curves.values())

    def layer_ms(self, layer: str, form: Form, macs: float) -> float | None:
        """Milliseconds that a layer takes in one form.

        Linear in the multiply-accumulates between the measured forms of the same family, and
        beyond them as between the last two, but never below 0.

        Parameters
        ----------
        layer : str
            Name of the layer.
        form : Form
        macs : float
            Of the layer in this form, for one sample.

        Returns
        -------
        float or None
            None where no form of the family was measured in this layer: what is not known to be
            faster is best not chosen.
        """
        curve = self.curves.get(layer, {}).get(form.family)
        return None if curve is None else _read_off(*curve, macs)


def measure_layers(
    model: onnx.ModelProto,
    layers: Sequence[Layer],
    points: Mapping[str, Sequence[Point]],
    replace: Replace,
    feeds: Feeds,
    target: Target,
    cache: Measurements,
    *,
    alone: bool | None = None,
    progress: Progress = SILENT,
) -> LatencyModel:
    """Measure what each layer takes in some of its forms.

    Parameters
    ----------
    model : onnx.ModelProto
        The normalised original, with its weights in memory; it is not changed.
    layers : sequence of Layer
        Its layers that can be converted, from `find_layers`.
    points : mapping of str to sequence of Point
        By layer: the forms to measure, two or more of each family. "keep" is measured anyway and
        need not be among them.
    replace : callable
        Gives the branches of a layer in a form.
    feeds : mapping of str to ndarray
        One batch of input, of `target.batch` samples.
    target : Target
    cache : Measurements
        What is known already is taken from here, and what is new is kept here.
    alone : bool or None, default None
        Whether each layer is measured alone rather than where it stands; None does so on CUDA.
    progress : Progress, default SILENT

    Raises
    ------
    ConfigError, ModelError, CalibrationError
        As `converter.runtime.open_session` and `converter.runtime.run`.
    """
    runtime = target.runtime
    alone = runtime.provider == "cuda" if alone is None else alone
    context = _context(target, alone=alone)
    shelf = _Shelf(model, layers, feeds, cache.read(context))
    wanted = {
        layer.name: list(dict.fromkeys(form for form, _ in points.get(layer.name, ())))
        for layer in layers
    }
    measured = (_measured_alone if alone else _measured_in_place)(
        model, layers, wanted, replace, feeds, runtime, shelf, progress
    )
    cache.write(context, shelf.new)
    curves, missing = _curves(layers, points, shelf, measured)
    return LatencyModel(measured.rest_ms, curves, (*missing, *measured.notes, *cache.notes))


# Keys -----------------------------------------------------------------------------------------


class _Shelf:
    """Milliseconds of forms by geometry: those of earlier plans, and those of this one."""

    def __init__(
        self,
        model: onnx.ModelProto,
        layers: Sequence[Layer],
        feeds: Feeds,
        known: Mapping[str, float],
    ) -> None:
        graph = import_graph(model)
        run_passes(graph, [InferShapes()])
        tensors = graph.tensors()
        writers = {tensor.name: node for node in graph.nodes for tensor in node.outputs}
        self._geometry = {layer.name: _geometry(layer, tensors, writers, feeds) for layer in layers}
        self._known = known
        self._seen: dict[str, list[float]] = defaultdict(list)

    def alike(self, layers: Sequence[Layer]) -> list[list[Layer]]:
        """Group the layers that share their measurements."""
        groups: dict[str, list[Layer]] = {}
        for layer in layers:
            groups.setdefault(self._geometry[layer.name], []).append(layer)
        return list(groups.values())

    def known(self, layer: Layer, form: Form) -> float | None:
        """Milliseconds that an earlier plan measured."""
        return self._known.get(self._key(layer, form))

    def note(self, layer: Layer, form: Form, milliseconds: float) -> None:
        """Take in a measurement of this plan."""
        self._seen[self._key(layer, form)].append(milliseconds)

    def seen(self, layer: Layer, form: Form) -> float | None:
        """Milliseconds that this plan measured: the median over layers that are alike."""
        values = self._seen.get(self._key(layer, form))
        return None if values is None else statistics.median(values)

    @property
    def new(self) -> dict[str, float]:
        """What this plan measured, by key."""
        return {key: statistics.median(values) for key, values in self._seen.items()}

    def _key(self, layer: Layer, form: Form) -> str:
        return measurement_key(self._geometry[layer.name], str(form))


def _context(target: Target, *, alone: bool) -> str:
    """Describe what all measurements of one file share."""
    computer = machine()
    versions = computer["versions"]
    parts = {
        "processor": computer["processor"],
        "cores": computer["cores"],
        "provider": target.runtime.provider,
        "accelerator": _accelerator() if target.runtime.provider == "cuda" else "",
        "onnxruntime": versions.get("onnxruntime-gpu") or versions.get("onnxruntime"),
        "threads": target.runtime.thread_count,
        "batch": target.batch,
        "alone": alone,
    }
    return json.dumps(parts, sort_keys=True)


def _accelerator() -> str:
    """Name the GPUs as the Linux driver does; elsewhere they are not told apart."""
    tables = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    lines = [line for path in tables for line in path.read_text(encoding="utf-8").splitlines()]
    return ", ".join(line.partition(":")[2].strip() for line in lines if line.startswith("Model"))


def _geometry(
    layer: Layer, tensors: Mapping[str, gs.Tensor], writers: Mapping[str, gs.Node], feeds: Feeds
) -> str:
    """Describe everything about a layer that its time depends on."""
    shapes = [tensors[name].shape for name in (layer.input, layer.response)]
    sizes = [None if shape is None else list(shape[1:]) for shape in shapes]
    known = all(size is not None and all(isinstance(n, int) for n in size) for size in sizes)
    producer = writers.get(layer.input)
    parts = [
        layer.op,
        None if layer.weight is None else layer.weight.shape,
        layer.bias is not None,
        [layer.strides, layer.pads, layer.dilations, layer.auto_pad],
        [str(size) for size in sizes],
        # where the model leaves its sizes open, what is fed decides them
        [] if known else sorted((name, feed.shape) for name, feed in feeds.items()),
        layer.activation.kind,
        layer.shortcut is not None,
        "" if producer is None else producer.op,
        sorted(node.op for node in tensors[layer.activated].outputs),
    ]
    return json.dumps(parts)


# In place -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Measured:
    """How what was measured becomes milliseconds that a user would measure.

    Attributes
    ----------
    factor : float
        On what this plan measured.
    drift : float
        On top of it, on what earlier plans measured: how much slower this machine is now.
    rest_ms : float
        Milliseconds of what is no layer's, with the factor.
    notes : tuple of str
        What speaks against these numbers.
    """

    factor: float
    drift: float
    rest_ms: float
    notes: tuple[str, ...] = ()


def _measured_in_place(
    model: onnx.ModelProto,
    layers: Sequence[Layer],
    wanted: Mapping[str, Sequence[Form]],
    replace: Replace,
    feeds: Feeds,
    runtime: Runtime,
    shelf: _Shelf,
    progress: Progress,
) -> _Measured:
    rounds = _rounds(layers, wanted, shelf)
    profiles = []
    with progress.stage("measure layers", len(rounds)) as advance:
        for forms in rounds:
            seconds = _RUN_SECONDS if forms else 3 * _RUN_SECONDS
            # no name for the copy here: `_profiled` lets go of it as soon as its session is open
            profiles.append(
                _profiled(_with_forms(model, layers, forms, replace), feeds, runtime, seconds)
            )
            advance(1, f"{len(forms)} layers changed")
    overhead, factor = _fitted(profiles, _profile_overhead(runtime))
    rests = []
    for forms, profile in zip(rounds, profiles, strict=True):
        times = _by_layer(profile, layers, overhead)
        for layer in layers:
            form = forms.get(layer.name, KEEP)
            # a layer that stays as it is while others change is no point of its own
            if layer.name in times and (form != KEEP or not forms):
                shelf.note(layer, form, times[layer.name])
        rests.append(profile.total(overhead) - sum(times.values()))
    rest = factor * statistics.median(rests)
    return _Measured(factor, _drift(layers, shelf), rest, _doubts(factor, profiles[0].wall_ms))


def _doubts(factor: float, wall_ms: float) -> tuple[str, ...]:
    if factor < _BUSY_FACTOR or wall_ms < _BUSY_MS:
        return ()
    return (
        f"a whole run took {factor:.1f} times what its nodes took undisturbed, so other programs "
        "keep the processor busy and predictions are rough; measure again when it is idle",
    )


def _fitted(profiles: Sequence[_Profile], expected: float) -> tuple[float, float]:
    """Return the overhead of a node, in milliseconds, and the factor on what is left of its time."""

    def misses(numbers: NDArray[np.float64]) -> list[float]:
        factor, overhead = numbers
        return [factor * each.total(overhead * expected) / each.wall_ms - 1 for each in profiles]

    factor = statistics.median(each.wall_ms / each.total(expected) for each in profiles)
    if len(profiles) < _LEAST_FITTED or expected == 0:
        return expected, factor
    bounds = ((0.0, _LEAST_OVERHEAD), (np.inf, _MOST_OVERHEAD))
    fit = least_squares(misses, (factor, 1.0), bounds=bounds, loss="cauchy", f_scale=0.05)
    return float(fit.x[1]) * expected, float(fit.x[0])


def _rounds(
    layers: Sequence[Layer], wanted: Mapping[str, Sequence[Form]], shelf: _Shelf
) -> list[dict[str, Form]]:
    """Share out the forms that are still to be measured: for each session, the form of each layer.

    The first has none: it is the original. Layers that are alike divide their forms among them.
    """
    rounds: list[dict[str, Form]] = [{}]
    for group in shelf.alike(layers):
        forms = dict.fromkeys(form for layer in group for form in wanted[layer.name])
        missing = [form for form in forms if form != KEEP and shelf.known(group[0], form) is None]
        for index, form in enumerate(missing):
            number = 1 + index // len(group)
            if number == len(rounds):
                rounds.append({})
            rounds[number][group[index % len(group)].name] = form
    return rounds


def _drift(layers: Sequence[Layer], shelf: _Shelf) -> float:
    """How much slower kept layers read now than when they were measured first; a median."""
    pairs = [(shelf.seen(layer, KEEP), shelf.known(layer, KEEP)) for layer in layers]
    ratios = [now / before for now, before in pairs if now and before]
    return statistics.median(ratios) if ratios else 1.0


def _with_forms(
    model: onnx.ModelProto, layers: Sequence[Layer], forms: Mapping[str, Form], replace: Replace
) -> onnx.ModelProto:
    """Return a copy of the model with some layers replaced, and nodes named after what they write."""
    graph = import_graph(model)
    changed = [layer for layer in layers if layer.name in forms]
    if changed:
        splits = [Split(layer, replace(layer, forms[layer.name])) for layer in changed]
        run_passes(graph, [*splits, ReorderSums()])
    for node in graph.nodes:  # their own names may be empty, or stand for several nodes
        node.name = next((tensor.name for tensor in node.outputs if tensor.name), node.name)
    return export_model(graph, model)


@dataclass(frozen=True)
class _Profile:
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


def _profiled(model: onnx.ModelProto, feeds: Feeds, runtime: Runtime, seconds: float) -> _Profile:
    """Run a model for `seconds` with a profile, and again without."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        session = _profiling_session(model, runtime, folder)
        del model  # its weights may have most of the memory, and the session has its own
        run(session, None, feeds)
        warm = len(_run_for(session, feeds, _WARM_SECONDS)) + 1
        _run_for(session, feeds, seconds, least=_LEAST_RUNS, most=_MOST_PROFILED_RUNS)
        nodes = _node_times(Path(session.end_profiling()), warm)
        _run_for(session, feeds, _WARM_SECONDS)
        wall = _usual(_run_for(session, feeds, seconds, least=_LEAST_RUNS))
        del session  # it may hold the files open
        graph = onnx.load(folder / _OPTIMISED, load_external_data=False).graph
    return _Profile(graph, nodes, wall)


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


def _profile_overhead(runtime: Runtime) -> float:
    """Milliseconds that a profile adds to each node: of a chain of nodes that have nothing to do."""
    names = [f"t{index}" for index in range(_IDLE_NODES + 1)]
    nodes = [
        helper.make_node("Neg", [first], [second], name=second) for first, second in pairwise(names)
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in names]
    graph = helper.make_graph(nodes, "idle", ends[:1], ends[-1:])
    opset = [helper.make_opsetid("", 13)]
    chain = helper.make_model(graph, opset_imports=opset, ir_version=8)
    profile = _profiled(chain, {names[0]: np.ones(1, np.float32)}, runtime, 3 * _WARM_SECONDS)
    return max(statistics.fmean(profile.nodes.values()) - profile.wall_ms / len(profile.nodes), 0.0)


# Whose a node is --------------------------------------------------------------------------------


def _by_layer(profile: _Profile, layers: Sequence[Layer], overhead: float) -> dict[str, float]:
    """Milliseconds of each layer that has a node in the profile, without an overhead for each."""
    owners = _Owners(layers)
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in profile.graph.node:
        for name in node.input:
            readers[name].append(node)
    times: dict[str, float] = defaultdict(float)
    for node in profile.graph.node:
        if node.name not in profile.nodes:
            continue
        whose = [owners.of_node(node)]
        if node.op_type in _REORDERS:
            inside = owners.inside(node.input[0]) or owners.inside(node.output[0])
            asked = [owners.of_node(each) for name in node.output for each in readers[name]]
            whose = [inside] if inside else list(dict.fromkeys(asked))
        if None in whose:  # also where something besides the layers needs a reorder
            continue
        for name in whose:
            times[str(name)] += max(profile.nodes[node.name] - overhead, 0.0) / len(whose)
    return dict(times)


class _Owners:
    """Which layer a tensor or node of a model belongs to, however the layer is written."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        self._named: dict[str, str] = {}
        self._stems = {layer.name for layer in layers}
        for layer in layers:
            for tensor in (layer.output, layer.response, layer.sum, layer.activated):
                if tensor:
                    self._named[tensor] = layer.name

    def of_node(self, node: onnx.NodeProto) -> str | None:
        """Name the layer of a node, by what it writes or by the name that onnxruntime gave it."""
        written = [node.name.removesuffix("_nchwc"), *node.output]
        found = (self._named.get(name) or self.inside(name) for name in written)
        return next(filter(None, found), None)

    def inside(self, tensor: str) -> str | None:
        """Name the layer whose branches alone use a tensor: they are named after it."""
        stem = tensor
        while stem:
            stem = stem.rpartition("/")[0]
            if stem in self._stems:
                return stem
        return None


# Alone ----------------------------------------------------------------------------------------


def _measured_alone(
    model: onnx.ModelProto,
    layers: Sequence[Layer],
    wanted: Mapping[str, Sequence[Form]],
    replace: Replace,
    feeds: Feeds,
    runtime: Runtime,
    shelf: _Shelf,
    progress: Progress,
) -> _Measured:
    groups = shelf.alike(layers)
    shapes = _entry_shapes(model, [group[0] for group in groups], feeds, runtime)
    with progress.stage("measure layers", len(groups) + 1) as advance:
        whole = measure_latency({"original": model}, feeds, runtime, rounds=_LEAST_RUNS)
        advance(1, "the original")
        for group in groups:
            forms = dict.fromkeys([KEEP, *(form for layer in group for form in wanted[layer.name])])
            missing = [form for form in forms if shelf.known(group[0], form) is None]
            if missing:
                times = _forms_alone(model, group[0], missing, replace, shapes, runtime)
                for form, taken in times.items():
                    shelf.note(group[0], form, taken)
            advance(1, group[0].name)
    wall = whole["original"].median_ms
    kept = [shelf.seen(layer, KEEP) or shelf.known(layer, KEEP) or 0.0 for layer in layers]
    # Alone, each layer waits for its own start and end; in a row they overlap.
    factor = min(1.0, wall / sum(kept)) if sum(kept) > 0 else 1.0
    return _Measured(factor, 1.0, max(wall - factor * sum(kept), 0.0))


def _forms_alone(
    model: onnx.ModelProto,
    layer: Layer,
    forms: Sequence[Form],
    replace: Replace,
    shapes: Mapping[str, tuple[int, ...]],
    runtime: Runtime,
) -> dict[Form, float]:
    """Milliseconds of one layer in each form, timed in turns as models of their own."""
    entries = _entries(layer)
    part = extract(model, entries, [layer.activated])
    models: dict[str, onnx.ModelProto | Path | bytes] = {_IDLE: _idle(part)}
    for form in forms:
        changes = {} if form == KEEP else {layer.name: form}
        models[str(form)] = _with_forms(part, [layer], changes, replace)
    generator = np.random.default_rng(0)
    feeds = {name: generator.random(shapes[name], np.float32) for name in entries}
    # Many sessions are open, and their spinning threads would take the cores from each other.
    times = measure_latency(
        models, feeds, runtime, seconds=_ALONE_SECONDS, rounds=_LEAST_RUNS, spinning=False
    )
    idle = times[_IDLE].median_ms
    return {form: max(times[str(form)].median_ms - idle, 0.0) for form in forms}


def _entries(layer: Layer) -> list[str]:
    """Tensors that a layer and what follows it read."""
    return list(dict.fromkeys([layer.input, *([layer.shortcut] if layer.shortcut else [])]))


def _entry_shapes(
    model: onnx.ModelProto, layers: Sequence[Layer], feeds: Feeds, runtime: Runtime
) -> dict[str, tuple[int, ...]]:
    """Shapes of what the layers read, as they really are: from one run on `feeds`.

    One layer after another, since all tensors of a large batch may not fit into the memory.
    """
    shapes = {name: feed.shape for name, feed in feeds.items()}
    for name in dict.fromkeys(name for layer in layers for name in _entries(layer)):
        if name not in shapes:
            part = extract(model, list(feeds), [name])
            (value,) = run(open_session(part, runtime), [name], feeds)
            shapes[name] = value.shape
    return shapes


def _idle(part: onnx.ModelProto) -> onnx.ModelProto:
    """Make a model with the inputs of `part` that does nothing: what a call costs by itself."""
    shape = helper.make_tensor_value_info("shape", TensorProto.INT64, [None])
    node = helper.make_node("Shape", [part.graph.input[0].name], ["shape"])
    graph = helper.make_graph([node], "idle", part.graph.input, [shape])
    return helper.make_model(graph, opset_imports=part.opset_import, ir_version=part.ir_version)


# Read off -------------------------------------------------------------------------------------


def _curves(
    layers: Sequence[Layer],
    points: Mapping[str, Sequence[Point]],
    shelf: _Shelf,
    measured: _Measured,
) -> tuple[dict[str, dict[str, _Curve]], list[str]]:
    """Put the measured forms of each layer in order, and say what is missing."""
    curves: dict[str, dict[str, _Curve]] = {}
    notes = []

    def milliseconds(layer: Layer, form: Form) -> float | None:
        seen, known = shelf.seen(layer, form), shelf.known(layer, form)
        if seen is not None:
            return seen * measured.factor
        return None if known is None else known * measured.factor * measured.drift

    for layer in layers:
        kept = milliseconds(layer, KEEP)
        if kept is None:
            notes.append(
                f"onnxruntime does not show the time of {layer.name}, so it stays as it is"
            )
            continue
        families: dict[str, list[tuple[float, float]]] = {KEEP.family: [(0.0, kept)]}
        for form, macs in points.get(layer.name, ()):
            taken = milliseconds(layer, form)
            if taken is None:
                notes.append(f"onnxruntime does not show the time of {layer.name} as {form}")
            elif form != KEEP:
                families.setdefault(form.family, []).append((macs, taken))
        curves[layer.name] = {name: _curve(found) for name, found in families.items()}
    return curves, notes


def _curve(points: Sequence[tuple[float, float]]) -> _Curve:
    """Order points by their multiply-accumulates; those with the same count are averaged."""
    by_macs: dict[float, list[float]] = defaultdict(list)
    for macs, taken in points:
        by_macs[macs].append(taken)
    ordered = sorted(by_macs)
    return np.array(ordered), np.array([statistics.fmean(by_macs[macs]) for macs in ordered])


def _read_off(macs: NDArray[np.float64], taken: NDArray[np.float64], at: float) -> float:
    if len(macs) == 1 or macs[0] <= at <= macs[-1]:
        return float(np.interp(at, macs, taken))
    end, inner = (0, 1) if at < macs[0] else (-1, -2)
    slope = (taken[end] - taken[inner]) / (macs[end] - macs[inner])
    # never cheaper for more work: two noisy points would else point the wrong way
    return max(float(taken[end] + max(slope, 0.0) * (at - macs[end])), 0.0)

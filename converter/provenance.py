"""Where a converted model came from, written into the model itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import onnx

from converter.outcome import LayerOutcome

__all__ = ["LARGEST_PLAN", "PREFIX", "mark"]

PREFIX = "twofold."
LARGEST_PLAN = 2**16
"""Characters of a plan that is written layer by layer; of a longer one the schemes are counted."""


def mark(model: onnx.ModelProto, source_digest: str, layers: Iterable[LayerOutcome]) -> None:
    """Add the plan and the hash of the source to `model.metadata_props`; what else is there stays.

    The keys are `twofold.version`, `twofold.source_sha256` and `twofold.plan`. Nothing depends on
    time or place, so that equal conversions stay equal files.

    Parameters
    ----------
    model : onnx.ModelProto
        Changed in place; earlier entries of these keys are replaced.
    source_digest : str
        SHA-256 of the model that was converted.
    layers : iterable of LayerOutcome
        Those that were replaced are the plan: scheme, ranks, and channels of the sparse part.
    """
    own = {
        f"{PREFIX}version": metadata.version("twofold"),
        f"{PREFIX}source_sha256": source_digest,
        f"{PREFIX}plan": _plan(layers),
    }
    others = {each.key: each.value for each in model.metadata_props if each.key not in own}
    onnx.helper.set_model_props(model, {**others, **own})


def _plan(layers: Iterable[LayerOutcome]) -> str:
    """Write the plan as JSON: by layer or, where that is too long, by scheme."""
    replaced = [layer for layer in layers if layer.scheme != "kept"]
    plan: dict[str, Any] = {
        layer.name: {"scheme": layer.scheme, "ranks": layer.ranks, "support": layer.support}
        for layer in replaced
    }
    text = json.dumps(plan, separators=(",", ":"))
    if len(text) > LARGEST_PLAN:
        return json.dumps({"layers": Counter(layer.scheme for layer in replaced)})
    return text

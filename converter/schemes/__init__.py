"""The ways to write a layer, one file each, and what they cost.

`keep` is the layer as it is. `sparse` is S alone. `channel`, `spatial`, `depthwise` and `tucker` factorise
L, each of them but `depthwise` also beside S.
"""

from __future__ import annotations

from converter.schemes.base import Effort, Evidence, Scheme, block_of
from converter.schemes.channel import Channel
from converter.schemes.depthwise import Depthwise
from converter.schemes.form import KEEP, Candidate, Form, Geometry
from converter.schemes.sparse import SHARES, Sparse, usable_supports
from converter.schemes.spatial import Spatial
from converter.schemes.tucker import Tucker

__all__ = [
    "KEEP",
    "SCHEMES",
    "Candidate",
    "Effort",
    "Evidence",
    "Form",
    "Geometry",
    "Scheme",
    "block_of",
    "cost_of",
    "families_of",
]

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme for scheme in (Channel(), Spatial(), Depthwise(), Tucker(), Sparse())
}
"""Every scheme by its name; `keep` is the absence of one."""

BESIDE_SHARES = (1 / 8,)
"""Channels that S may keep beside L, as fractions of all."""


def cost_of(geometry: Geometry, form: Form) -> tuple[float, float]:
    """Multiply-accumulates of one sample, and parameters, of a layer in some form, bias included."""
    weights = geometry.outputs * geometry.columns
    if form.scheme == "keep":
        bias = geometry.outputs if geometry.bias else 0
        return float(weights * geometry.positions), float(weights + bias)
    macs, params = SCHEMES[form.scheme].cost(geometry, form.ranks)
    sparse = form.support * geometry.taps * geometry.outputs
    return macs + sparse * geometry.positions, params + sparse + geometry.outputs


def families_of(
    geometry: Geometry, names: tuple[str, ...], *, beside: bool
) -> list[tuple[Scheme, int]]:
    """List schemes and supports of S that a layer may take.

    Parameters
    ----------
    geometry : Geometry
    names : tuple of str
        Schemes that are allowed.
    beside : bool
        Whether S may stand beside L.

    Returns
    -------
    list of (Scheme, int)
    """
    found: list[tuple[Scheme, int]] = []
    for name in names:
        scheme = SCHEMES[name]
        if name == "sparse":
            found += [(scheme, support) for support in usable_supports(geometry, SHARES)]
        else:
            supports: list[int] = []
            if beside and scheme.takes_sparse:
                supports = usable_supports(geometry, BESIDE_SHARES)
            found += [(scheme, support) for support in (0, *supports)]
    return found

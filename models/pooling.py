"""Average pooling to a fixed grid, chosen when the network is built.

`nn.AdaptiveAvgPool2d` to a grid other than 1×1 has no ONNX operator. At a known image size it is
nothing at all (AlexNet and VGG-16 at 224) or plain average pooling, and both export cleanly.
"""

from __future__ import annotations

from torch import nn

from models.errors import NetworkError

__all__ = ["pool_to_grid"]


def pool_to_grid(side: int, grid: int, size: int) -> nn.Module:
    """Return what `nn.AdaptiveAvgPool2d(grid)` does to maps of `side` × `side`.

    Parameters
    ----------
    side, grid : int
        Side of the maps that come in, and of those that go out.
    size : int
        Side of the network's images, in pixels; only for the message of the error.

    Raises
    ------
    NetworkError
        Where the grid does not divide the maps evenly.
    """
    if side == grid:
        return nn.Identity()
    if side > grid and side % grid == 0:
        return nn.AvgPool2d(side // grid)
    raise NetworkError(
        f"images of {size}×{size} leave maps of {max(side, 0)}×{max(side, 0)}, which do not divide "
        f"into the {grid}×{grid} that the classifier takes; give --size 224"
    )

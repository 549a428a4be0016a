"""What can go wrong, each said in one sentence that names the file or network and the remedy."""

from __future__ import annotations

__all__ = ["ExportError", "NetworkError", "WeightsError"]


class NetworkError(Exception):
    """A network, an image size, a class count or a folder that cannot be used."""


class WeightsError(NetworkError):
    """A state dict that cannot be read or does not fit its network."""


class ExportError(NetworkError):
    """A network that cannot be exported, or whose ONNX file does not answer as the network does."""

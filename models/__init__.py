"""torch definitions of CNNs to try Twofold on, their state dicts and their export to ONNX.

For 224×224 images: AlexNet, VGG-16, GoogLeNet, ResNet-18 and ResNet-50, with torchvision's
parameter names. For 32×32 images: AlexNet, VGG-16, GoogLeNet, ResNet-20 and ResNet-56. And a small
network for scikit-learn's digits, trained in place (`models.digits`).
"""

from __future__ import annotations

from models.catalog import NETWORKS, Network, build
from models.errors import ExportError, NetworkError, WeightsError
from models.export import Exported, export_onnx
from models.weights import initialise, load_weights, settle_norms

__all__ = [
    "NETWORKS",
    "ExportError",
    "Exported",
    "Network",
    "NetworkError",
    "WeightsError",
    "build",
    "export_onnx",
    "initialise",
    "load_weights",
    "settle_norms",
]

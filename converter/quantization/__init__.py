"""Quantization: the converted network in 8-bit integers, or in half precision.

The room is not called `quantize`, since that is the function of the package: `converter.quantize`.
"""

import sys
from importlib import import_module

# onnxruntime.quantization puts a folder with a package `models` on the path, which would shadow anyone's own
_path = list(sys.path)
import_module("onnxruntime.quantization")
sys.path[:] = _path

"""An ONNX network as a differentiable function in torch, node by node.

One small function for each operator, in a table by operator type. What an operator or an attribute
means follows the ONNX specification at the model's opset, and onnxruntime where the two differ.
An operator that is not in the table is refused by name, when the graph is built.

torch is imported where it is used: it takes seconds to load, and nothing but the fits needs it.
"""

from converter.differentiable.graph import TorchGraph, needed_nodes
from converter.differentiable.step import UnsupportedOperatorError

__all__ = ["TorchGraph", "UnsupportedOperatorError", "needed_nodes"]

"""Graph passes on onnx_graphsurgeon: one rewrite per file.

`base` holds the protocol and the runner.
"""

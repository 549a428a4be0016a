"""Quantization: the converted network in 8-bit integers, or in half precision.

The room is not called `quantize`, since that is the function of the package: `converter.quantize`.
"""

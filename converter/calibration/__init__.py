"""Calibration: the images or arrays that a model is tried on, and what is recorded from them."""

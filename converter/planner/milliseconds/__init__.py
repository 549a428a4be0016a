"""Milliseconds of the layers of a network, measured, and of the whole that they add up to."""

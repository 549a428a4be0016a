"""The decomposition of one layer: arrays in, arrays out, torch on CPU or GPU; no graphs here."""

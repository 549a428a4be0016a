"""The decomposition of one layer: arrays in, arrays out, torch on CPU or GPU. Nothing here knows of graphs."""

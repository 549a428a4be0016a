"""What a maintainer runs: benchmarks, training of the reference models, plots."""

"""Measurements of the kernels against named peers; see `python -m benchmarks.norms --help`."""

"""Measurements against named peers: `red-kernels bench`. Protocol and file format: docs/benchmarks.md."""

"""Measurements beside named peers: `red-kernels bench`. How, and what the files hold: docs/benchmarks.md."""

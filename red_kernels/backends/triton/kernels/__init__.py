"""The kernels, one file for each family, in Triton's language (checked by its compiler, not by mypy)."""

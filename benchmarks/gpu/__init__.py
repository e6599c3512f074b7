"""Fifteen minutes on a GPU: the preparations (`kit`), the work there in two calls (`plan`, `runner`), and the results
(`summary`).

`make gpu-kit` and `benchmarks/gpu_suite.sh` are the commands; docs/gpu-status.md explains them.
"""

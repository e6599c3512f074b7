"""Fifteen minutes on a GPU: what is built before (`kit`), what is done there in two calls (`plan`, `runner`), and what
came of it (`summary`).

`make gpu-kit` and `benchmarks/gpu_suite.sh` are the ways in; docs/gpu-status.md says what to type.
"""

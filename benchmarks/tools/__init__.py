"""Programs beside the suite, each run by `python -m benchmarks.tools.NAME`."""

"""From files of results to documents: `figures` derives numbers, `tables` writes markdown, `plots` draws.

`python -m benchmarks.report` (`make report`) writes the README's figures and docs/performance.md; `--check` compares.
"""

"""The same measurements for pytest-benchmark: `python -m pytest benchmarks --benchmark-group-by=group`."""

from __future__ import annotations

from typing import Any

import pytest

from .norms import DTYPES, OPERATIONS, Inputs


@pytest.mark.parametrize("implementation", ["ours", "eager"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(("rows", "width"), [(512, 768), (2048, 768), (2048, 4096)])
@pytest.mark.parametrize("operation", list(OPERATIONS))
def test_forward_and_backward(
    benchmark: Any, operation: str, rows: int, width: int, dtype: str, implementation: str
) -> None:
    eager, fused = OPERATIONS[operation]
    step = Inputs(rows, width, DTYPES[dtype], fresh=False).step(fused if implementation == "ours" else eager)
    benchmark.group = f"{operation}, {rows} x {width}, {dtype}"
    benchmark.pedantic(step, args=(0,), rounds=15, warmup_rounds=2)

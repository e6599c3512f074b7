"""The operations for pytest-benchmark: `python -m pytest benchmarks --benchmark-group-by=group`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .ops.implementations import implementations
from .ops.inputs import DTYPES, Inputs
from .ops.job import prepared
from .ops.operations import OPERATIONS, Operation
from .ops.timing import gradients

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = [one.name for one in implementations(DEVICE)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "width"), [(512, 768), (2048, 4096)])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: "-".join(filter(None, operation.key)))
def test_forward_and_backward(
    benchmark: Any, operation: Operation, rows: int, width: int, dtype: str, name: str
) -> None:
    """Checked against fp64 first, as the others are. Those that are missing here are skipped with the reason."""
    missing = next(one.missing for one in implementations(DEVICE) if one.name == name)
    if missing is not None:
        pytest.skip(missing)
    inputs = Inputs(operation, rows, width, DTYPES[dtype], True, DEVICE)
    found, left_out = prepared(operation, inputs, DEVICE, only=("eager", name))
    if name not in found:
        pytest.skip(left_out[name])
    rounds = iter(range(1_000_000))

    def call() -> None:
        number = next(rounds)
        gradients(operation, found[name].forward(inputs, number), inputs, number)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{', '.join(filter(None, operation.key))}, {rows} x {width}, {dtype}"
    with found[name].active():
        benchmark.pedantic(call, rounds=15, warmup_rounds=2)

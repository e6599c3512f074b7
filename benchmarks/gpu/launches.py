"""A pytest plugin: the tests launch no Triton kernel, and the launches of each on a GPU are written into a file.

    LAUNCHES=FILE TRITON_INTERPRET=1 RED_KERNELS_TEST_ON=triton python -m pytest -p benchmarks.gpu.launches tests

Most tests fail, as results are uninitialised memory. The file has a line for each program, see `programs.line_of`. The
cases are those of a GPU with the same variables.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

VARIABLE = "LAUNCHES"


def pytest_configure(config: pytest.Config) -> None:
    if not os.environ.get(VARIABLE):
        raise pytest.UsageError(f"{VARIABLE} is not set, expected the file for programs")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems() -> None:
    """The interpreter skips the large cases, but here no code is interpreted."""
    import sampling

    sampling.INTERPRETED = False


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_launched() -> Iterator[None]:
    from red_kernels.backends.triton import launch

    from .programs import ARCHITECTURE, line_of

    seen: set[str] = set()
    with Path(os.environ[VARIABLE]).open("a", encoding="utf-8") as file:

        def record(
            kernel: launch.Kernel,
            grid: launch.Grid,
            tensors: tuple[Tensor | None, ...],
            numbers: tuple[Any, ...],
            constants: tuple[Any, ...],
            warps: int,
            stages: int | None,
        ) -> None:
            line = line_of(kernel, [None if t is None else t.dtype for t in tensors], constants, warps, stages)
            if line not in seen:
                seen.add(line)
                file.write(line + "\n")
                file.flush()

        with launch.pretending(ARCHITECTURE), launch.recording(record):
            yield

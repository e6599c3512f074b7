"""The Triton programs of the suite on a GPU, as lines of JSON: another Python compiles them, without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget

from red_kernels.backends.triton import launch
from red_kernels.backends.triton.rules import Architecture

from ..tools import ahead_of_time
from .sizes import OPERATION_TESTS, WIDTHS

TARGET = "sm_90"
GPU: GPUTarget = ahead_of_time.TARGETS[TARGET].gpu
ARCHITECTURE: Architecture = ahead_of_time.TARGETS[TARGET].architecture
ROOT = Path(__file__).resolve().parents[2]


def line_of(
    kernel: launch.Kernel,
    dtypes: Sequence[torch.dtype | None],
    constants: Sequence[Any],
    warps: int,
    stages: int | None,
) -> str:
    """A program as a line: the kernel's name, the dtypes of its tensors, its constants and Triton's options."""
    return json.dumps(
        {
            "kernel": kernel.name,
            "dtypes": [None if dtype is None else str(dtype).removeprefix("torch.") for dtype in dtypes],
            "constants": list(constants),
            "options": kernel.options(warps, stages, False),
        }
    )


def of_cases(cases: Iterable[ahead_of_time.Case]) -> list[str]:
    """The programs of some operations."""
    dtypes = {kind: dtype for dtype, kind in ahead_of_time._TYPES.items()}
    return [
        line_of(
            ahead_of_time._KERNELS[one.kernel],
            [None if kind is None else dtypes[kind] for kind in one.types],
            one.constants,
            one.warps,
            one.stages,
        )
        for one in ahead_of_time.programs_of(cases, (TARGET,))
    ]


def of_benchmarks() -> list[str]:
    """The timed programs: bf16 at all widths, and the host's time, of fp32 at two."""
    usual = ahead_of_time.usual_cases(WIDTHS)
    return of_cases(
        [*usual, *(ahead_of_time.Case(one, d, "fp32") for one in ahead_of_time.OPERATIONS for d in (64, 768))]
    )


def of_tests(files: Sequence[str] = OPERATION_TESTS) -> list[str]:
    """The programs of the operations' tests, thinned by pairs. The tests themselves fail: no kernel is launched.

    Raises RuntimeError, with the end of pytest's output, if no test launched a kernel.
    """
    with tempfile.TemporaryDirectory() as folder:
        noted = Path(folder) / "launches"
        variables = {
            "LAUNCHES": str(noted),
            "TRITON_INTERPRET": "1",
            "RED_KERNELS_TEST_ON": "triton",
            "RED_KERNELS_TEST_PAIRS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "--assert=plain", "-p", "no:cacheprovider", "-p"]
        command += ["benchmarks.gpu.launches", *files]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
        found = noted.read_text().splitlines() if noted.is_file() else []
    if not found:
        last = (done.stdout + done.stderr).strip().splitlines()[-1:]
        raise RuntimeError(f"no test of {', '.join(files)} launched a kernel: {' '.join(last)}")
    return list(dict.fromkeys(found))

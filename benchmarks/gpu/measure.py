"""A job of the suite with its own settings, for some seconds: `python -m benchmarks.gpu.measure ops|step ...`.

Results in the file are not measured again. No case starts after its time; the file is then not complete.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..ops import job as ops
from ..runs import Run
from ..step import job as step

JOBS: dict[str, tuple[Any, Any]] = {ops.JOB: (ops.run_job, ops.Settings), step.JOB: (step.run_job, step.Settings)}


def settings_of(job: str, given: Mapping[str, Any]) -> Any:
    """JSON lists as the tuples of the settings."""

    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    return JOBS[job][1](**{name: frozen(value) for name, value in given.items()})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.measure")
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument("--settings", type=json.loads, default={})
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args(arguments)
    run = Run(torch.device(given.device), Console(width=200), given.quick, time.monotonic() + given.seconds)
    settings = settings_of(given.job, given.settings)
    run_job = JOBS[given.job][0]
    file = given.output / f"{given.job}.json"
    try:
        run_job(settings, run, given.output, file.is_file())
    except ValueError as error:
        if not str(error).startswith("--resume"):
            raise
        print(f"begun anew: {error}")  # another machine, whose figures are no part of these
        run_job(settings, run, given.output, False)
    return 0


if __name__ == "__main__":
    sys.exit(main())

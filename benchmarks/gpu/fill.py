"""Compiles torch.compile's code before it is timed: `python -m benchmarks.gpu.fill --settings JSON`.

Inductor stores it in TORCHINDUCTOR_CACHE_DIR.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch
from rich.console import Console
from torch._functorch import config as functorch_config

from ..ops.inputs import DTYPES, Inputs
from ..ops.job import cases, prepared
from ..ops.operations import find
from ..runs import Run
from .measure import settings_of


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.fill")
    parser.add_argument("--settings", type=json.loads, default={})
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    settings = settings_of("ops", given.settings)
    for case in cases(settings, Run(device, Console())):
        operation = find(case["operation"], case["variant"])
        inputs = Inputs(operation, case["rows"], case["width"], DTYPES[case["dtype"]], False, device)
        with functorch_config.patch(donated_buffer=device.type == "cpu"):  # as in the timing: it is part of the key
            _, left_out = prepared(operation, inputs, device, only=("eager", "compile"))
        print(operation.name, operation.variant, case["width"], left_out or "compiled", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

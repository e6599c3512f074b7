"""One pass of one operation between the marks of a profiler: `python -m benchmarks.gpu.one --case JSON`."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator

import torch

import red_kernels as rk

from ..ops.inputs import DTYPES, Inputs
from ..ops.job import candidates
from ..ops.operations import find
from ..ops.timing import gradients

WARM_UPS = 3


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.one")
    parser.add_argument("--case", type=json.loads, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    given = parser.parse_args(arguments)
    case, device = given.case, torch.device(given.device)
    operation = find(case["operation"], case["variant"])
    inputs = Inputs(operation, case["rows"], case["width"], DTYPES[case["dtype"]], True, device)
    found, _ = candidates(operation, device, only=(case["backend"],))
    candidate = found[case["backend"]]
    with rk.backend(case["backend"]):
        for number in range(WARM_UPS):
            gradients(operation, candidate.forward(inputs, number), inputs, number)
        results = candidate.forward(inputs, WARM_UPS)
        with _marked(device):
            if case["pass"] == "forward":
                candidate.forward(inputs, WARM_UPS)
            else:
                gradients(operation, results, inputs, WARM_UPS)
    return 0


@contextlib.contextmanager
def _marked(device: torch.device) -> Iterator[None]:
    if device.type == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    yield
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    sys.exit(main())

"""What a call costs the host: Python, checks, autograd, allocation, and everything up to the launch.

    python -m benchmarks.tools.host_cost [--rows 512] [--width 768] [--output FILE]
    python -m benchmarks.tools.host_cost --steps 64 256    # training steps of small models of these widths, in pairs

Where there is a GPU the Triton and the CUDA kernels are launched and not waited for. Elsewhere tensors on the CPU stand
for those on a GPU: the launch itself is stubbed out of the Triton backend, and left out of the CUDA operators, if the
variable RED_KERNELS_CUDA_EMULATED is the path of their library for the emulator, whose way from Python to the launch is
compiled of the same code. Beside them the CPU backend, which computes, and PyTorch's own norms: at 4 x 64 elements,
where their time is host time too. A forward with gradient is to cost at most twice a call of PyTorch's ``rms_norm``.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import red_kernels as rk
from red_kernels.backends import Backend, cuda
from red_kernels.support.files import write_files

from ..harness import Timing, environment, interleave
from .host_steps import steps

CALLS = 200  # in a row, for one measurement
TINY = (4, 64)
LEFT_OUT = (
    "The figures of the CUDA operators without a GPU leave out cudaLaunchKernelEx, the device guard, the query of "
    "the current stream, and the time of CUDA's caching allocator beyond malloc. torch's rms_norm is several kernels "
    "on the CPU; on a GPU it is one kernel and costs less."
)


class _Launched:
    """Stands for a compiled kernel."""

    function = packed_metadata = None

    @staticmethod
    def run(*arguments: Any) -> None:
        """Where the launch would be."""


class _AllCompiled(dict[Any, Any]):
    def get(self, key: Any, default: Any = None) -> Any:
        return _Launched


@contextmanager
def stubbed() -> Iterator[None]:
    """Run the Triton backend on CPU tensors up to each launch and no further. Results are whatever was in memory."""
    from red_kernels import backends
    from red_kernels.backends import triton
    from red_kernels.backends.triton import launch, operations, rules

    record = Backend("triton", triton, lambda: None, triton.unsupported)
    patches: list[Any] = [mock.patch.object(kernel, "_compiled", _AllCompiled()) for kernel in operations.KERNELS]
    patches += [
        mock.patch.object(triton, "_device", "cpu"),
        mock.patch.object(launch, "_current_device", launch._no_device),
        mock.patch.object(launch, "_current_stream", launch._no_stream),
        mock.patch.dict(backends._known.by_name, {"triton": record}),
    ]
    for patch in patches:
        patch.start()
    try:
        with launch.pretending(rules.Architecture("sm_90", 32, 132)):
            yield
    finally:
        for patch in reversed(patches):
            patch.stop()


def calls(rows: int, width: int, device: str) -> dict[str, Callable[[], object]]:
    """Every operation with edit vectors that ask for gradients, forward and forward with backward."""
    x, residual = (torch.randn(rows, width, device=device).requires_grad_() for _ in range(2))
    scale, bias = (torch.randn(width, device=device).requires_grad_() for _ in range(2))
    weight, norm_bias = (torch.randn(width, device=device) for _ in range(2))
    forwards: dict[str, Callable[[], Any]] = {
        "edit": lambda: rk.edit(x, scale, bias),
        "edit_add": lambda: rk.edit_add(x, residual, scale, bias),
        "edit_add_rms_norm": lambda: rk.edit_add_rms_norm(x, residual, scale, bias, weight),
        "edit_add_layer_norm": lambda: rk.edit_add_layer_norm(x, residual, scale, bias, weight, norm_bias),
        "rms_norm_edit": lambda: rk.rms_norm_edit(x, weight, scale, bias),
        "layer_norm_edit": lambda: rk.layer_norm_edit(x, weight, norm_bias, scale, bias),
    }
    upstream = torch.randn(rows, width, device=device)

    def both(forward: Callable[[], Any]) -> Callable[[], object]:
        def call() -> object:
            found = forward()
            results = found if isinstance(found, tuple) else (found,)
            return torch.autograd.grad(results, [x, scale, bias], [upstream] * len(results))

        return call

    return forwards | {f"{name}, with backward": both(forward) for name, forward in forwards.items()}


@contextmanager
def without_launches() -> Iterator[None]:
    """Run the emulator's CUDA operators up to each launch and no further. Results are whatever was in memory."""
    cuda.skip_launches(True)
    try:
        yield
    finally:
        cuda.skip_launches(False)


def torchs(device: str) -> dict[str, Callable[[], object]]:
    """PyTorch's own norms at a size where the host decides."""
    x, weight = torch.randn(TINY, device=device, requires_grad=True), torch.randn(TINY[1], device=device)
    return {
        "torch rms_norm": lambda: F.rms_norm(x, TINY[1:], weight),
        "torch layer_norm": lambda: F.layer_norm(x, TINY[1:], weight, weight),
    }


def measure(rows: int, width: int, seconds: float) -> dict[str, dict[str, Timing]]:
    """Seconds of one call, by implementation and operation."""
    there = {name for name, reason in rk.available_backends().items() if reason is None}
    found: dict[str, dict[str, Timing]] = {"torch, 4 x 64": _time(torchs("cpu"), seconds)}
    if "cpu" in there:
        with rk.backend("cpu"):
            found["cpu, 4 x 64"] = _time(calls(*TINY, "cpu"), seconds)
    if torch.cuda.is_available():
        found["torch on the GPU, 4 x 64"] = _time(torchs("cuda"), seconds)
        for name in ("triton", "cuda"):
            if name in there and not (name == "cuda" and cuda.EMULATED):
                for shape in (TINY, (rows, width)):
                    with rk.backend(name):
                        found[f"{name}, {shape[0]} x {shape[1]}"] = _time(calls(*shape, "cuda"), seconds)
                    torch.cuda.synchronize()
        return found
    _keep_memory()
    if "cuda" in there:
        for shape in (TINY, (rows, width)):
            with without_launches(), rk.backend("cuda"):
                found[f"cuda, {shape[0]} x {shape[1]}, launch left out"] = _time(calls(*shape, "cpu"), seconds)
    with stubbed(), rk.backend("triton"):
        found[f"triton, {rows} x {width}, launch stubbed out"] = _time(calls(rows, width, "cpu"), seconds)
    return found


def ratios(found: dict[str, dict[str, Timing]]) -> dict[str, dict[str, float]]:
    """Forwards with gradient at 4 x 64 over PyTorch's own ``rms_norm`` on the same device, by implementation."""
    result = {}
    for implementation, timings in found.items():
        peer = found.get("torch, 4 x 64" if _on_cpu(implementation) else "torch on the GPU, 4 x 64")
        if "4 x 64" in implementation and not implementation.startswith("torch") and peer is not None:
            result[implementation] = {
                name: timing.median / peer["torch rms_norm"].median
                for name, timing in timings.items()
                if not name.endswith("with backward")
            }
    return result


def _on_cpu(implementation: str) -> bool:
    return implementation.startswith("cpu") or implementation.endswith("out")


def _time(some: dict[str, Callable[[], object]], seconds: float) -> dict[str, Timing]:
    def repeated(call: Callable[[], object]) -> Callable[[int], object]:
        def run(number: int) -> None:
            for _ in range(CALLS):
                call()

        return run

    timings = interleave({name: repeated(call) for name, call in some.items()}, seconds=seconds)
    return {name: Timing(t.median / CALLS, t.low / CALLS, t.high / CALLS) for name, t in timings.items()}


def _keep_memory() -> None:
    """Have malloc keep what is freed, as a GPU's allocator does; else each large tensor is a call of the system."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        return


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, and write the result where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tools.host_cost", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each implementation")
    parser.add_argument("--steps", type=int, nargs="+", metavar="WIDTH", help="training steps of whole models instead")
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if chosen.steps:
        costs = steps(chosen.steps, chosen.seconds, print)
        _write(chosen.output, {"environment": environment(), "steps": costs})
        return
    found = measure(chosen.rows, chosen.width, chosen.seconds)
    table = Table("implementation", "operation", "median us", "quartiles us")
    for implementation, timings in found.items():
        for name, t in timings.items():
            table.add_row(implementation, name, f"{t.median * 1e6:.1f}", f"{t.low * 1e6:.1f} to {t.high * 1e6:.1f}")
    over = Table("implementation", "forward with gradient", "times torch's rms_norm")
    for implementation, values in ratios(found).items():
        for name, ratio in values.items():
            over.add_row(implementation, name, f"{ratio:.2f}")
    console = Console(file=sys.stdout)
    console.print(table)
    console.print(over)
    if any(name.startswith("cuda") and name.endswith("left out") for name in found):
        console.print(LEFT_OUT)
    results = {key: {name: t.json() for name, t in timings.items()} for key, timings in found.items()}
    _write(chosen.output, {"environment": environment(), "seconds": results, "times_torch_rms_norm": ratios(found)})


def _write(file: Path | None, said: dict[str, Any]) -> None:
    if file is not None:
        write_files(file.parent, {file.name: (json.dumps(said, indent=1) + "\n").encode()})


if __name__ == "__main__":
    main()

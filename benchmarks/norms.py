"""Forward plus backward of the edit fused with residual add and norm, on the CPU, against eager, compiled and copies.

    python -m benchmarks.norms --output results.json

Every implementation computes the same y and z and the gradients of x, residual, scale and bias, for gradients of both
outputs, and is checked to before it is timed. `copies` is the floor: as many plain copies as move the least bytes
that the mathematics allows, 4 activations forward and 6 backward. `fresh` rotates inputs beyond the last cache, `warm`
uses one set.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import red_kernels as rk

from .harness import Timing, environment, geometric_mean, interleave

CACHE_BYTES = 64 << 20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COPIES = 5


def eager_rms(x: Tensor, residual: Tensor, scale: Tensor, bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The composition that a model runs: edit in fp32, residual add, torch's own norm."""
    z = residual + (scale * x + bias).to(x.dtype)
    return F.rms_norm(z, z.shape[-1:], weight, 1e-6), z


def eager_layer(x: Tensor, residual: Tensor, scale: Tensor, bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`eager_rms`, with LayerNorm."""
    z = residual + (scale * x + bias).to(x.dtype)
    return F.layer_norm(z, z.shape[-1:], weight, None, 1e-5), z


def fused_rms(x: Tensor, residual: Tensor, scale: Tensor, bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    return rk.edit_add_rms_norm(x, residual, scale, bias, weight, 1e-6)


def fused_layer(
    x: Tensor, residual: Tensor, scale: Tensor, bias: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor | None]:
    return rk.edit_add_layer_norm(x, residual, scale, bias, weight, None, 1e-5)


OPERATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "edit_add_rms_norm": (eager_rms, fused_rms),
    "edit_add_layer_norm": (eager_layer, fused_layer),
}


class Inputs:
    """Sets of activations and gradients, as many as reach beyond the cache, and the vectors they share."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype, fresh: bool) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        bytes_of_set = 4 * rows * width * dtype.itemsize
        count = max(2, -(-CACHE_BYTES // bytes_of_set)) if fresh else 1
        self.sets = []
        for _ in range(count):
            x, residual, dy, dz = (draw(rows, width).to(dtype) for _ in range(4))
            self.sets.append((x.requires_grad_(), residual.requires_grad_(), dy, dz))
        self.scale = (1 + 0.1 * draw(width)).requires_grad_()
        self.bias = (0.1 * draw(width)).requires_grad_()
        self.weight = (1 + 0.1 * draw(width)).to(dtype)

    def step(self, function: Callable[..., Any]) -> Callable[[int], list[Tensor]]:
        """A call of one forward and backward on the set that the round's number chooses."""

        def call(number: int) -> list[Tensor]:
            x, residual, dy, dz = self.sets[number % len(self.sets)]
            y, z = function(x, residual, self.scale, self.bias, self.weight)
            grads = torch.autograd.grad((y, z), (x, residual, self.scale, self.bias), (dy, dz))
            return [y.detach(), z.detach(), *grads]

        return call

    def copies(self) -> Callable[[int], None]:
        """The floor: as many plain copies between buffers as move the same bytes."""
        targets = [torch.empty_like(self.sets[0][0]) for _ in range(COPIES)]

        def call(number: int) -> None:
            with torch.no_grad():
                for place, target in enumerate(targets):
                    target.copy_(self.sets[(number + place // 4) % len(self.sets)][place % 4])

        return call


def check_same(found: dict[str, list[Tensor]], dtype: torch.dtype, rows: int) -> None:
    """Raise AssertionError unless the implementations agree, by norms.

    To a few roundings of the dtype, and for column sums, which some add up one after the other, to the root of their
    length.
    """
    expected = found["eager"]
    for name, tensors in found.items():
        for place, (tensor, other) in enumerate(zip(tensors, expected, strict=True)):
            difference = (tensor.double() - other.double()).norm() / other.double().norm()
            bound = 8 * torch.finfo(dtype).eps + (rows**0.5 * torch.finfo(torch.float32).eps if place >= 4 else 0.0)
            assert difference <= bound, f"{name}, result {place}: differs by {difference:.2e}, more than {bound:.2e}"


def measure(operation: str, rows: int, width: int, dtype: str, fresh: bool, seconds: float) -> dict[str, Any]:
    """One row of the results."""
    eager, fused = OPERATIONS[operation]
    inputs = Inputs(rows, width, DTYPES[dtype], fresh)
    torch._dynamo.reset()
    compiled = torch.compile(eager, dynamic=False, fullgraph=True)
    steps = {name: inputs.step(f) for name, f in (("ours", fused), ("eager", eager), ("compile", compiled))}
    check_same({name: step(0) for name, step in steps.items()}, DTYPES[dtype], rows)
    times: dict[str, Timing] = interleave({**steps, "copies": inputs.copies()}, seconds=seconds)
    moved = 10 * rows * width * DTYPES[dtype].itemsize
    return {
        "operation": operation,
        "rows": rows,
        "width": width,
        "dtype": dtype,
        "inputs": "fresh" if fresh else "warm",
        "seconds": {name: t.json() for name, t in times.items()},
        "times_eager": times["eager"].median / times["ours"].median,
        "times_compile": times["compile"].median / times["ours"].median,
        "over_copies": times["ours"].median / times["copies"].median,
        "gigabytes_per_second": moved / times["ours"].median / 1e9,
    }


def summarise(results: list[dict[str, Any]]) -> dict[str, float]:
    """The figures that a reader wants first: means over everything, and the worst cases."""
    large = [r["over_copies"] for r in results if r["rows"] * r["width"] > 3_000_000]
    return {
        "times_eager, geometric mean": geometric_mean([r["times_eager"] for r in results]),
        "times_eager, least": min(r["times_eager"] for r in results),
        "times_compile, geometric mean": geometric_mean([r["times_compile"] for r in results]),
        "times_compile, least": min(r["times_compile"] for r in results),
        **({"over_copies above 3M elements, geometric mean": geometric_mean(large)} if large else {}),
        **({"over_copies above 3M elements, worst": max(large)} if large else {}),
    }


def print_results(results: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="forward + backward; times = peer's time over ours", caption="medians (spread: quartiles)")
    for name in (
        "operation",
        "rows",
        "width",
        "dtype",
        "inputs",
        "ours ms",
        "spread",
        "x eager",
        "x compile",
        "/ copies",
    ):
        table.add_column(name, justify="right" if name not in ("operation", "dtype", "inputs") else "left")
    for r in results:
        ours = r["seconds"]["ours"]
        table.add_row(
            r["operation"],
            str(r["rows"]),
            str(r["width"]),
            r["dtype"],
            r["inputs"],
            f"{ours['median'] * 1e3:.3f}",
            f"{(ours['high'] - ours['low']) / ours['median']:.0%}",
            f"{r['times_eager']:.2f}",
            f"{r['times_compile']:.2f}",
            f"{r['over_copies']:.2f}",
        )
    console.print(table)
    for name, value in summarise(results).items():
        console.print(f"{name}: {value:.2f}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--widths", nargs="+", type=int, default=[576, 768, 2048, 4096])
    parser.add_argument("--rows", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--inputs", nargs="+", choices=("fresh", "warm"), default=["fresh", "warm"])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row of the table")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    options = parser.parse_args(arguments)
    if options.output is not None:
        _check_output(options.output)
    cases = [
        (operation, rows, width, dtype, inputs == "fresh")
        for operation in options.operations
        for dtype in options.dtypes
        for width in options.widths
        for rows in options.rows
        for inputs in options.inputs
    ]
    console = Console(width=120)
    results = [measure(*case, options.seconds) for case in track(cases, "measuring", console=Console(stderr=True))]
    print_results(results, console)
    if options.output is not None:
        text = json.dumps({"environment": environment(), "summary": summarise(results), "results": results}, indent=1)
        temporary = _temporary(options.output)
        temporary.write_text(text + "\n")
        os.replace(temporary, options.output)


def _temporary(output: Path) -> Path:
    return output.with_name(output.name + ".tmp")


def _check_output(output: Path) -> None:
    """Make the folder and write a file into it: minutes of measuring must not end in results that are lost."""
    try:
        if output.is_dir():
            raise IsADirectoryError(f"{output} is a folder, expected the name of a file")
        output.parent.mkdir(parents=True, exist_ok=True)
        _temporary(output).write_text("")
        _temporary(output).unlink()
    except OSError as error:
        raise SystemExit(f"--output: cannot write {output}: {error}") from error


if __name__ == "__main__":
    main()

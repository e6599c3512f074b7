"""Rotations and reflections with the sum and the norm behind them, against RED's own edit and against their peers.

    python -m benchmarks.tools.mixes --widths 768 4096 --dtypes fp32 bf16 --output results.json

One table per width, dtype and pass (forward; forward with backward), interleaved: `all` (RED's edit, the yardstick);
`rotation` and `reflection` in the same operation; each as torch.compile and eager PyTorch have it; PEFT's RoAd layer
with the sum and the norm behind it; and a copy of as many bytes as must move. The activations exceed the last cache,
and each call takes another set of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import red_kernels as rk
from red_kernels.backends import cpu
from red_kernels.edits.kinds import kind_named
from red_kernels.support.files import write_files

from ..harness import Timing, environment, interleave
from ..ops.inputs import DTYPES, cache_bytes

EPS = 1e-6
PASSES = ("forward", "forward and backward")
MOVED = {"forward": 4, "forward and backward": 10}  # activations read and written at least
Calls = dict[str, Callable[[int], object]]
Function = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def functions(width: int, blocks: int, dtype: torch.dtype) -> dict[str, tuple[Function, list[Tensor]]]:
    """Each peer as a function of `x` and `residual`, and the vectors that ask for gradients."""
    torch.manual_seed(0)
    weight = torch.randn(width).to(dtype)
    scale, bias = (1 + 0.1 * torch.randn(width)).requires_grad_(), (0.1 * torch.randn(width)).requires_grad_()
    first, second = (torch.randn(width).requires_grad_() for _ in range(2))
    normal = (torch.randn(width) / (width // blocks) ** 0.5).requires_grad_()

    def normed(z: Tensor) -> tuple[Tensor, Tensor]:
        return F.rms_norm(z, (width,), weight, EPS), z

    def rotated(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        low, high = x.unflatten(-1, (-1, 2, 32)).unbind(-2)
        partner = torch.stack((high, low), -2).flatten(-3)
        return normed(residual + (first * x + second * partner).to(dtype))

    def reflected(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        parts, u = x.unflatten(-1, (blocks, -1)).float(), normal.view(blocks, -1)
        moved = (parts - u * (u * parts).sum(-1, keepdim=True)).flatten(-2)
        return normed(residual + moved.to(dtype))

    found: dict[str, tuple[Function, list[Tensor]]] = {
        "all": (lambda x, r: _both(rk.edit_add_rms_norm(x, r, scale, bias, weight, EPS)), [scale, bias]),
        "rotation": (lambda x, r: rk.mix_add_rms_norm(x, r, first, second, None, weight, EPS), [first, second]),
        "rotation, compile": (torch.compile(rotated, dynamic=False, fullgraph=True), [first, second]),
        "rotation, eager": (rotated, [first, second]),
        "reflection": (
            lambda x, r: rk.mix_add_rms_norm(x, r, normal, None, None, weight, EPS, blocks=blocks),
            [normal],
        ),
        "reflection, compile": (torch.compile(reflected, dynamic=False, fullgraph=True), [normal]),
        "reflection, eager": (reflected, [normal]),
    }
    with contextlib.suppress(ImportError):
        from peft.tuners.road.layer import _apply_road

        start = kind_named("rotation").start(width, torch.float32, "cpu")
        theta, alpha = (start[part].requires_grad_() for part in ("theta", "alpha"))

        def road(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
            return normed(residual + _apply_road("road_1", 64, theta, alpha, x.float()).to(dtype))

        found["rotation, PEFT's RoAd"] = road, [theta, alpha]
    return found


def _both(results: tuple[Tensor, Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(one for one in results if one is not None)


def calls(rows: int, width: int, blocks: int, dtype: torch.dtype) -> dict[str, Calls]:
    """The calls of each pass."""
    count = max(2, -(-cache_bytes(torch.device("cpu")) // (4 * rows * width * dtype.itemsize)))
    sets = [[torch.randn(rows, width).to(dtype) for _ in range(4)] for _ in range(count)]
    for x, residual, _, _ in sets:
        x.requires_grad_()
        residual.requires_grad_()
    made: dict[str, Calls] = {name: {} for name in PASSES}
    for name, (function, vectors) in functions(width, blocks, dtype).items():

        def forward(number: int, function: Function = function) -> object:
            x, residual, _, _ = sets[number % count]
            with torch.no_grad():
                return function(x, residual)

        def step(number: int, function: Function = function, vectors: list[Tensor] = vectors) -> object:
            x, residual, *upstream = sets[number % count]
            return torch.autograd.grad(function(x, residual), [x, residual, *vectors], upstream)

        made["forward"][name], made["forward and backward"][name] = forward, step
    for name, moved in MOVED.items():
        target = torch.empty_like(sets[0][0])

        def copied(number: int, moved: int = moved, target: Tensor = target) -> object:
            for place in range(moved // 2):
                target.copy_(sets[number % count][place % 4].detach())
            return None

        made[name]["copy"] = copied
    return made


def measured(
    widths: list[int], dtypes: list[str], elements: int, blocks: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """An entry for each width, dtype and pass."""
    for width in widths:
        for dtype in dtypes:
            rows = max(1, elements // width)
            for name, timed in calls(rows, width, blocks, DTYPES[dtype]).items():
                times: dict[str, Timing] = interleave(timed, seconds=seconds)
                over = {peer: t.median / times["all"].median for peer, t in times.items()}
                what = {"pass": name, "rows": rows, "width": width, "dtype": dtype, "blocks": blocks}
                yield {**what, "seconds": {peer: t.json() for peer, t in times.items()}, "over_all": over}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print tables, and write the result where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tools.mixes", description=str(__doc__).split("\n")[0])
    parser.add_argument("--widths", nargs="+", type=int, default=[768, 4096])
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--elements", type=int, default=1 << 23, help="elements of an activation (default: 8 million)")
    parser.add_argument("--blocks", type=int, default=4, help="of a reflection")
    parser.add_argument("--seconds", type=float, default=8.0, help="for each table")
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    chosen = parser.parse_args(arguments)
    console = Console(file=sys.stdout, width=120)
    results = []
    for result in measured(chosen.widths, chosen.dtypes, chosen.elements, chosen.blocks, chosen.seconds):
        table = Table("peer", "median ms", "quartiles ms", "over all")
        table.title = f"{result['pass']}, {result['rows']} x {result['width']}, {result['dtype']}"
        table.title += f", {cpu.instruction_set()}, {torch.get_num_threads()} threads"
        for peer, t in result["seconds"].items():
            quartiles = f"{t['low'] * 1e3:.2f} to {t['high'] * 1e3:.2f}"
            table.add_row(peer, f"{t['median'] * 1e3:.2f}", quartiles, f"{result['over_all'][peer]:.2f}")
        console.print(table)
        results.append(result)
    if chosen.output:
        said = {"environment": environment(), "results": results}
        write_files(chosen.output.parent, {chosen.output.name: (json.dumps(said, indent=1) + "\n").encode()})


if __name__ == "__main__":
    main()

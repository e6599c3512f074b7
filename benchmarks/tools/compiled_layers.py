"""What Inductor makes of the edit, beside this package's operator in its graph.

    OMP_NUM_THREADS=1 python -m benchmarks.tools.compiled_layers --layers 6 --rounds 25 --output results.json

Stacks of Llama's layers with the same random weights, each compiled whole: without an edit; with the plain edit, which
Inductor fuses as it likes (a patched model under torch.compile); and with `rk.edit_add_rms_norm` as an operator of the
graph. The last one also runs uncompiled. A step is a forward and a backward to the inputs and the vectors. The stacks
take turns; a step's cost is the seconds of all processors that the process used, so that other programs count little.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import red_kernels as rk
from red_kernels.support.files import write_files

from ..harness import Timing, environment, timing
from ..ops.inputs import DTYPES

EPS = 1e-5
HEAD = 64  # columns of an attention head
FROZEN, PLAIN, OPERATOR = "frozen", "plain edit", "operator"
STACKS = {
    "frozen, compiled": (FROZEN, True),
    "plain edit, compiled": (PLAIN, True),
    "operator, compiled": (OPERATOR, True),
    "operator, not compiled": (OPERATOR, False),
}


@dataclass(frozen=True)
class Shape:
    """`batch` x `length` tokens of `width` columns through `layers` layers whose FFN has `inner` columns."""

    width: int = 576
    inner: int = 1536
    layers: int = 6
    batch: int = 4
    length: int = 256

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        if self.width % HEAD:
            raise ValueError(f"width: got {self.width}, expected a multiple of {HEAD}, the columns of a head")


class _Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, inner = shape.width, shape.inner
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)
        self.first, self.second = (nn.Parameter(torch.ones(width)) for _ in range(2))  # of the norms
        self.scale = nn.Parameter(1 + 0.1 * torch.randn(width))
        self.bias = nn.Parameter(0.1 * torch.randn(width))

    def attend(self, normed: Tensor) -> Tensor:
        """The attention's output."""
        q, k, v = self.qkv(normed).unflatten(-1, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        output: Tensor = self.out(mixed.transpose(1, 2).flatten(-2))
        return output

    def feed(self, normed: Tensor) -> Tensor:
        """The FFN's output."""
        output: Tensor = self.down(F.silu(self.gate(normed)) * self.up(normed))
        return output


class Stack(nn.Module):
    """Layers with frozen weights, whose FFN outputs are edited in one of three ways."""

    def __init__(self, shape: Shape, edit: str) -> None:
        super().__init__()
        self.edit = edit
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.layers))
        self.last = nn.Parameter(torch.ones(shape.width))
        self.requires_grad_(False)
        for own in self.vectors() if edit != FROZEN else ():
            own.requires_grad_(True)

    def each(self) -> list[_Layer]:
        """The layers."""
        return cast(list[_Layer], list(self.layers))

    def vectors(self) -> list[nn.Parameter]:
        """The edits' vectors."""
        return [own for layer in self.each() for own in (layer.scale, layer.bias)]

    def forward(self, x: Tensor) -> Tensor:
        """`x` is `(batch, length, width)`, and the result too."""
        layers = self.each()
        after = [*(layer.first for layer in layers[1:]), self.last]
        normed = _norm(x, layers[0].first)
        for layer, weight in zip(layers, after, strict=True):
            x = x + layer.attend(normed)
            h = layer.feed(_norm(x, layer.second))
            if self.edit == OPERATOR:
                normed, total = rk.edit_add_rms_norm(h, x, layer.scale, layer.bias, weight, EPS)
                assert total is not None  # need_z is True
                x = total
                continue
            if self.edit == PLAIN:
                h = (layer.scale * h.float() + layer.bias).to(h.dtype)
            x = x + h
            normed = _norm(x, weight)
        return normed


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def stacks(shape: Shape, dtype: torch.dtype) -> dict[str, Callable[[Tensor], Tensor]]:
    """The stacks by name, with the same weights; the vectors stay fp32."""
    torch.manual_seed(0)
    weights = Stack(shape, PLAIN).state_dict()
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, (edit, compiled) in STACKS.items():
        stack = Stack(shape, edit)
        stack.load_state_dict(weights)
        vectors = {id(own) for own in stack.vectors()}
        for own in stack.parameters():
            if id(own) not in vectors:
                own.data = own.data.to(dtype)
        found[name] = torch.compile(stack, dynamic=False) if compiled else stack
    return found


def measure(shape: Shape, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Processor seconds of a step of each stack, and their ratios to the frozen one's in the same round.

    Raises:
        ArithmeticError: the operator and the plain edit give other results than rounding explains.
    """
    found = stacks(shape, dtype)
    torch.manual_seed(1)
    x = torch.randn(shape.batch, shape.length, shape.width).to(dtype).requires_grad_()
    given = torch.randn(shape.batch, shape.length, shape.width).to(dtype)

    def step(name: str) -> Tensor:
        y = found[name](x)
        y.backward(given)
        x.grad = None
        return y.detach().float()

    results = {name: step(name) for name in found}
    _same(results, dtype)
    del results
    for name in found:
        step(name)
    seconds: dict[str, list[float]] = {name: [] for name in found}
    order = random.Random(0)
    gc.collect()
    for _ in range(rounds):
        for name in order.sample(list(found), len(found)):
            start = time.process_time()
            step(name)
            seconds[name].append(time.process_time() - start)
    floor = seconds[next(iter(STACKS))]
    ratios = {name: [one / two for one, two in zip(own, floor, strict=True)] for name, own in seconds.items()}
    return {
        "shape": asdict(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "rounds": rounds,
        "processor_seconds": {name: timing(own).json() for name, own in seconds.items()},
        "over_frozen": {name: timing(own).json() for name, own in ratios.items()},
    }


def _same(results: dict[str, Tensor], dtype: torch.dtype) -> None:
    plain, scale = results["plain edit, compiled"], results["plain edit, compiled"].abs().max().item()
    for name in ("operator, compiled", "operator, not compiled"):
        error = (results[name] - plain).abs().max().item() / scale
        if not error <= 50 * torch.finfo(dtype).eps:
            raise ArithmeticError(f"{name}: differs from the plain edit by {error:.2g} of the largest value")


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table, and write a JSON file if one is named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tools.compiled_layers", description=__doc__)
    for name, value in asdict(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args(arguments)
    try:
        shape = Shape(**{name: getattr(given, name) for name in asdict(Shape())})
        if given.rounds < 2:
            raise ValueError(f"rounds: got {given.rounds}, expected at least 2: quartiles need them")
    except ValueError as error:
        parser.error(str(error))
    found = measure(shape, DTYPES[given.dtype], given.rounds)
    _show(found, Console())
    if given.output is not None:
        content = {"environment": environment(), **found}
        write_files(given.output.parent, {given.output.name: (json.dumps(content, indent=2) + "\n").encode()})
    return 0


def _show(found: dict[str, Any], console: Console) -> None:
    table = Table(title="A step, and its ratio to the frozen stack's in the same round: median and quartiles")
    for column in ("stack", "processor seconds", "over frozen"):
        table.add_column(column)
    for name, over in found["over_frozen"].items():
        ratio = Timing(**over)
        seconds = found["processor_seconds"][name]["median"]
        table.add_row(name, f"{seconds:.3f}", f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})")
    console.print(table)
    spread = statistics.median([Timing(**own).high - Timing(**own).low for own in found["over_frozen"].values()])
    console.print(f"The quartiles lie {spread:.3f} apart; a smaller difference means nothing.", highlight=False)


if __name__ == "__main__":
    sys.exit(main())

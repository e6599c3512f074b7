"""What `test_tune.py` runs in processes of their own, in Triton's interpreter: `python tune_worker.py JOB FOLDER`.

Each job prints one line of JSON.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import interpreter
import torch
from rich.console import Console

import red_kernels as rk
from red_kernels.backends.arguments import Norm, Statistics, affine_edit
from red_kernels.backends.triton import launch, linear, operations, rules, tuned
from red_kernels.backends.triton.tuning import job
from red_kernels.backends.triton.tuning.search import Bench
from red_kernels.support import clocks

interpreter.mend()
CPU = torch.device("cpu")
WIDTH, ROWS = 24, 40


def programs(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
    """A clock by which a program of a kernel takes a microsecond, however long it takes: the same in every run."""
    count = 0

    def add(kernel: launch.Kernel, grid: launch.Grid, *rest: Any) -> None:
        nonlocal count
        count += grid[0] * grid[1] * grid[2]

    with launch.recording(add):
        for call in calls:
            call()
    return lambda: count / len(calls) * 1e-6


def tune(output: Path, clock: clocks.Clock, **options: Any) -> tuple[dict[str, Any], str]:
    """Search on few sizes; the table and what was shown."""
    shown = io.StringIO()
    settings = {"operations": ("edit_add_rms_norm",), "widths": (WIDTH,), "dtypes": ("fp32",), "rows": (ROWS,)}
    bench = Bench(CPU, clock, 0, rounds=2, confirming_rounds=2, passes=2, reach=1, how="test")
    job.tune(job.Settings(output=output, **{**settings, **options}), Console(file=shown, width=300), bench)
    return json.loads(output.read_text()), shown.getvalue()


def launched() -> list[list[Any]]:
    """Names and constants of what edit_add_rms_norm launches, forward and backward."""
    found: list[list[Any]] = []
    x = torch.randn(ROWS, WIDTH)
    with launch.recording(lambda kernel, grid, tensors, numbers, constants, warps, *rest: found.append(
        [kernel.name, list(constants), warps]
    )):  # fmt: skip
        norm = Norm(x[0], None, 1e-6)
        operations.edit_norm_forward(x, x, affine_edit(x[0], x[0]), norm, True)
        needs = (True, True, True, True, False, False)
        operations.edit_norm_backward(x, x, x, x, None, affine_edit(x[0]), norm, Statistics(None, x[:, 0]), 1, needs)
    return found


def errors() -> dict[str, float]:
    """Relative errors of the operation and its gradients on the kernels, to the reference in fp64."""
    torch.manual_seed(1)
    x, residual, dy, dz = (torch.randn(ROWS, WIDTH, dtype=torch.float64) for _ in range(4))
    scale, bias, weight = (torch.randn(WIDTH, dtype=torch.float64) for _ in range(3))

    def run(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [t.to(dtype).requires_grad_() for t in (x, residual, scale, bias)]
        with rk.backend(backend):
            y, z = rk.edit_add_rms_norm(*inputs, weight.to(dtype))
            return [y.detach(), z.detach(), *torch.autograd.grad((y, z), inputs, (dy.to(dtype), dz.to(dtype)))]

    pairs = zip(run("triton", torch.float32), run("reference", torch.float64), strict=True)
    names = ("y", "z", "dx", "dresidual", "dscale", "dbias")
    return {n: float((own.double() - true).norm() / true.norm()) for n, (own, true) in zip(names, pairs, strict=True)}


def search(folder: Path) -> dict[str, Any]:
    """Search, store, reload, use: by the clock that counts programs."""
    chip = launch.architecture(torch.empty(0))
    before = launched()
    table, shown = tune(folder / "table.json", programs)
    during = launched()  # the search must leave nothing behind
    os.environ[tuned.VARIABLE] = str(folder / "table.json")
    tuned.forget()
    return {
        "table": table,
        "shown": shown,
        "before": before,
        "during": during,
        "after": launched(),
        "rule": asdict(rules.norm_forward(WIDTH, 4, chip)),
        "other": asdict(rules.norm_forward(WIDTH + 1, 4, chip)),
        "default": asdict(tuned.RULES["norm_forward"].factory(WIDTH, 4, chip)),
        "errors": errors(),
    }


def wall(folder: Path) -> dict[str, Any]:
    """The same with real times, which decide nothing here, of an operation with another norm and an edit behind it."""
    options = {"operations": ("layer_norm_edit",), "dtypes": ("bf16",), "rows": (3,), "sums": (4,)}
    table, shown = tune(folder / "table.json", clocks.wall_clock, **options)
    return {"table": table, "shown": shown}


def products(folder: Path) -> dict[str, Any]:
    """The fused matmul wins by a clock for which the composed form is slow, but for rows above 8; then it is used."""

    def clock(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
        product = next((call.args[0] for call in calls if isinstance(call, partial)), None)
        slow = product is not None and len(product["x"]) <= 8
        return lambda: 1e-3 if slow else 1e-5

    table, shown = tune(folder / "table.json", clock, operations=("linear_edit",), dtypes=("bf16",), rows=(8, 16))
    os.environ[tuned.VARIABLE] = str(folder / "table.json")
    tuned.forget()
    weight = torch.ones(WIDTH, 4 * WIDTH).bfloat16()
    used = {}
    for m in (4, 5, 6, 8, 9, 16):
        with launch.recording(lambda *launched: None):
            x = torch.ones(m, 4 * WIDTH).bfloat16()
            used[m] = linear.linear_edit_forward(x, weight, None, None, affine_edit()) is not None
    return {"table": table, "shown": shown, "used": used}


def broken(folder: Path) -> dict[str, Any]:
    """Of the forward's tiles, those with 32 rows do not compile and those with 8 warps write nothing."""
    run = launch.Kernel.__call__

    def call(
        self: launch.Kernel, grid: Any, tensors: Any, numbers: Any, constants: Any, warps: int, *rest: Any
    ) -> None:
        if self.name == "norm_forward" and launch._recorder is None:
            if constants[1] == 32:
                raise RuntimeError("[32 rows] are out of resources\nand more")
            if warps == 8:
                return
        run(self, grid, tensors, numbers, constants, warps, *rest)

    launch.Kernel.__call__ = call  # type: ignore[method-assign]
    table, shown = tune(folder / "table.json", programs)
    return {"table": table, "shown": shown}


def first_use(folder: Path) -> dict[str, Any]:
    """The variable names a file that is no table: importing works, the first operation says what is wrong."""
    x = torch.ones(2, 8)
    found = []
    for _ in range(2):
        try:
            with rk.backend("triton"):
                rk.edit(x, x[0])
        except (ValueError, OSError) as error:
            found.append(f"{type(error).__name__}: {error}")
    with rk.backend("reference"):
        works = torch.equal(rk.edit(x, x[0]), x)
    return {"errors": found, "others work": works}


if __name__ == "__main__":
    jobs = {function.__name__: function for function in (search, wall, products, broken, first_use)}
    print(json.dumps(jobs[sys.argv[1]](Path(sys.argv[2]))))

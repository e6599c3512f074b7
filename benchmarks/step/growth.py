"""The growth of a training step's time and memory: with layers, width, tokens, and the number of edits in a batch.

The model is a Llama-shaped decoder with random weights. On the axis `edits` the rows of the batch use as many edits in
turn, by `rk.use_edits`; its eager peer takes each row's vectors from one bank of them. The steps are those of the job
`step`. The columns of the file: docs/benchmarks.md.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import red_kernels as rk
from red_kernels.finetune.base_dtype import ASKED, AUTO

from ..methods import METHODS, Prepared, edited_sites, prepare, sister
from ..runs import Case, ResultFile, Run, run_cases
from . import job
from .check import TOKENS
from .compare import compare
from .models import batch_of, build, llama

JOB = "growth"
METHODS_HERE = ("frozen-fused", "red", "naive", "lora-all")
AXES = ("layers", "width", "tokens", "edits")
ONE_FOR_ALL = "PEFT takes adapters by row (adapter_names) for inference only"
VOCABULARY = 1024


@dataclass(frozen=True)
class Sizes:
    """The fixed sizes, and the values of each axis.

    Attributes:
        layers, width, batch, length: of the model and its batch while another axis varies.
        axes: axis to its values. `tokens` varies the batch at this length; `edits` has at most one for each row.
    """

    layers: int
    width: int
    batch: int
    length: int
    axes: Mapping[str, tuple[int, ...]]


ON_CPU = Sizes(
    4,
    512,
    16,
    64,
    {
        "layers": (1, 2, 4, 8, 16),
        "width": (128, 256, 512, 768, 1024),
        "tokens": (256, 512, 1024, 2048, 4096),
        "edits": (1, 2, 4, 8, 16),
    },
)
ON_GPU = Sizes(
    8,
    2048,
    64,
    64,
    {
        "layers": (2, 4, 8, 16, 32),
        "width": (512, 1024, 2048, 4096, 8192),
        "tokens": (1024, 2048, 4096, 8192, 16384),
        "edits": (1, 4, 16, 32, 64),
    },
)
QUICK = Sizes(1, 64, 4, 8, {"layers": (1, 2), "tokens": (16, 32), "edits": (1, 4)})


@dataclass(frozen=True)
class Settings:
    """The scope of a measurement.

    Attributes:
        sizes: None for those of the device.
        dtype: of the weights; `"auto"` for that of the run.
        methods: in the order of the results.
        seconds: the time of a case, apart from its least rounds.
        rounds: the least rounds.
    """

    sizes: Sizes | None = None
    dtype: str = AUTO
    methods: tuple[str, ...] = field(default=METHODS_HERE)
    seconds: float = 12.0
    rounds: int = 7

    def __post_init__(self) -> None:
        if self.dtype not in ASKED:
            raise ValueError(f"dtype: got {self.dtype!r}, expected one of {', '.join(map(repr, ASKED))}")
        job.check_timed(self.methods, METHODS_HERE, self.seconds, self.rounds)
        if self.sizes is not None:
            _check_sizes(self.sizes)


def _check_sizes(sizes: Sizes) -> None:
    for axis, values in sizes.axes.items():
        if axis not in AXES:
            raise ValueError(f"sizes: got the axis {axis!r}, expected some of {', '.join(map(repr, AXES))}")
        for value in values:
            if value < 1:
                raise ValueError(f"sizes: got {value} {axis}, expected at least 1")
            if axis == "tokens" and value % sizes.length:
                raise ValueError(f"sizes: got {value} tokens, expected a multiple of the length {sizes.length}")
            if axis == "edits" and value > sizes.batch:
                raise ValueError(f"sizes: got {value} edits, the batch has {sizes.batch} rows")
            if axis == "edits" and sizes.batch * sizes.length > TOKENS:  # the check then takes fewer rows
                raise ValueError(f"sizes: got {sizes.batch} x {sizes.length} tokens, expected at most {TOKENS}")
    for width in (sizes.width, *sizes.axes.get("width", ())):
        if width < 64 or width % 64:
            raise ValueError(f"sizes: got the width {width}, expected a multiple of 64, the width of a head")
    for name in ("layers", "batch", "length"):
        if getattr(sizes, name) < 1:
            raise ValueError(f"sizes: got {name} {getattr(sizes, name)}, expected at least 1")


def missing(run: Run) -> dict[str, str]:
    """Method to the reason why it is not measured here at all."""
    return {name: reason for name in METHODS_HERE if (reason := METHODS[name].missing()) is not None}


def cases(settings: Settings, run: Run) -> list[Case]:
    """The cases, axis by axis."""
    sizes = settings.sizes
    if sizes is None:
        sizes = QUICK if run.quick else ON_GPU if run.device.type == "cuda" else ON_CPU
    found = []
    for axis, values in sizes.axes.items():
        for value in values:
            case = {
                "axis": axis,
                "value": value,
                "layers": sizes.layers,
                "width": sizes.width,
                "batch": sizes.batch,
                "length": sizes.length,
                "edits": 1,
            }
            case |= {"batch": value // sizes.length} if axis == "tokens" else {axis: value}
            found.append(case | {"dtype": run.resolved(settings.dtype)})
    return found


def measure(case: Case, settings: Settings, run: Run) -> dict[str, Any]:
    """One case: the fields in docs/benchmarks.md. Raises ArithmeticError if methods disagree."""
    width, edits = case["width"], case["edits"]
    shape = llama(VOCABULARY, width, width * 8 // 3 // 8 * 8, case["layers"], max(1, width // 64), 4096)
    base = build(shape, case["dtype"], run.device)
    batch = batch_of(base, shape.task, case["batch"], case["length"], run.device)
    methods, left_out = job.choose(settings.methods, run)
    if edits > 1 and "lora-all" in methods:
        methods.remove("lora-all")
        left_out["lora-all"] = ONE_FOR_ALL
    makers = {name: functools.partial(_make, name, base, case["batch"], edits) for name in methods}
    naive = functools.partial(_naive, edits)
    found = compare(base, makers, naive, batch, run.device, *job.budget(settings.seconds, settings.rounds, run))
    found["left_out"] |= left_out
    parameters = sum(own.numel() for own in base.parameters())
    return {**found, "parameters": parameters, "tokens": batch["input_ids"].numel()}


def _make(name: str, base: nn.Module, rows: int, edits: int) -> Prepared:
    model = sister(base)
    if edits > 1 and name == "red":
        return by_rows(model, rows, edits)
    if edits > 1 and name == "naive":
        return naive_by_rows(model, torch.float32, rows, edits)
    return prepare(name, model)


def _naive(edits: int, model: nn.Module, dtype: torch.dtype, rows: int) -> Prepared:
    return naive_by_rows(model, dtype, rows, edits) if edits > 1 else job.naive(model, dtype, rows)


def by_rows(model: nn.Module, rows: int, edits: int) -> Prepared:
    """Our edits by row: `trained` has for each site the scales of all edits, then their biases."""
    rk.patch(model)
    names = [f"edit{number:04d}" for number in range(edits)]
    for name in names:
        rk.add_edit(model, name)
    first = next(iter(rk.edit_parameters(model).values()))
    for parts in rk.edit_parameters(model).values():
        for own in parts.values():  # the edit of the patch is not used
            own.requires_grad_(False)
    each = [rk.edit_parameters(model, name) for name in names]
    trained = [named[site][part] for site in each[0] for part in first for named in each]
    ids: list[str | None] = [names[row % edits] for row in range(rows)]
    return Prepared(model, trained, lambda: rk.use_edits(model, ids))


def naive_by_rows(model: nn.Module, dtype: torch.dtype, rows: int, edits: int) -> Prepared:
    """The same in eager PyTorch: at each site one bank of scales and one of biases, `(edits, width)`, in `trained`."""
    model.requires_grad_(False)
    trained: list[nn.Parameter] = []
    device = next(model.parameters()).device
    ids = torch.arange(rows, device=device) % edits
    for site, width in edited_sites(model).items():
        scale = nn.Parameter(torch.ones(edits, width, dtype=dtype, device=device))
        bias = nn.Parameter(torch.zeros(edits, width, dtype=dtype, device=device))
        trained += [scale, bias]
        model.get_submodule(site).register_forward_hook(functools.partial(_edit_rows, scale, bias, ids))
    return Prepared(model, trained)


def _edit_rows(
    scale: Tensor, bias: Tensor, ids: Tensor, module: nn.Module, arguments: object, output: Tensor
) -> Tensor:
    return (output * scale[ids][:, None] + bias[ids][:, None]).to(output.dtype)


def run_job(settings: Settings, run: Run, folder: Path, resume: bool) -> ResultFile:
    """Measure all cases into `growth.json` in a folder, and print a table for each.

    Raises ValueError if the file to resume is of another run, and the last error if all cases have failed.
    """
    planned = cases(settings, run)
    said = asdict(settings) | {"dtype": run.resolved(settings.dtype)}
    lacking = missing(run)
    file = ResultFile(folder / f"{JOB}.json", JOB, run, said, lacking, resume=resume, base_dtype=run.base_dtype)
    run_cases(file, planned, lambda case: measure(case, settings, run), run, "growth")
    print_results(file.content, run.console)
    return file


def print_results(content: Mapping[str, Any], console: Console) -> None:
    """A table for each case, with the reasons of omitted methods."""
    for case in content["cases"]:
        shape = f"{case['layers']} x {case['width']}, {case['batch']} x {case['length']} tokens, {case['dtype']}"
        console.print(job.table(case, f"{case['value']} {case['axis']} ({shape})"))

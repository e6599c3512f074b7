"""The job `ops`: operations by implementations by inputs.

The fields of the file: docs/benchmarks.md.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch._functorch import config as functorch_config

from ..failure import in_words
from ..harness import Timing
from ..memory import peak_allocated
from ..runs import Case, ResultFile, Run, run_cases
from .check import differing
from .implementations import implementations
from .inputs import DTYPES, Copies, Inputs
from .kernels import started
from .operations import NAMES, OPERATIONS, Operation, find
from .timing import FLOOR, PASSES, Candidate, Times, device_times, gradients, host_times, wall_times

JOB = "ops"
INPUTS = ("fresh", "warm")
# Widths are those of RoBERTa-base, GPT-2 and T5-base (768), RoBERTa-large and GPT-2 medium (1,024), and Llama of 1B, 7B
# and 70B (2,048, 4,096, 8,192); on a GPU others between and above.
Sizes = tuple[tuple[int, ...], tuple[int, ...]]  # widths and rows
ON_CPU: Sizes = ((768, 1024, 2048, 4096, 8192), (512, 4096))
ON_GPU: Sizes = ((4096, 1024, 8192, 768, 2048, 5120, 3072, 1536, 16384, 576), (16384, 4096, 512))
QUICK: Sizes = ((64, 768), (64,))
MOST_ON_CPU = 17_000_000  # elements of an activation
MOST_ON_GPU = 135_000_000
WARM_OPERATIONS = (("edit_add_rms_norm", ""), ("edit_add_layer_norm", ""))
HOST_SHAPE = {"cpu": (4, 64), "cuda": (512, 768)}
GPU_ROUNDS = 15


@functools.cache
def implementation_names() -> tuple[str, ...]:
    """The names of all implementations, on any device. It imports the packages of those for GPUs, which takes long."""
    return tuple(dict.fromkeys(one.name for kind in ("cpu", "cuda") for one in implementations(torch.device(kind))))


@dataclass(frozen=True)
class Settings:
    """The scope of a measurement; None selects the device's default.

    Attributes:
        operations: names of functions; all variants of a function are measured.
        dtypes: of the activations.
        widths, rows: sizes of the activations; pairs beyond the device's limit are skipped.
        elements: instead of `rows`: for each width the largest number of whole rows within this many elements.
        implementations: the timed ones, `copy` always; None for all. Eager PyTorch always runs, for comparison.
        inputs: `"fresh"` for all operations, `"warm"` for those of whole blocks.
        seconds: the duration of a case's rounds on a CPU, at least seven rounds.
        peak_memory: whether memory is measured.
        kernels: whether the names of each implementation's kernels on a GPU are recorded: a library may
            choose among several.
    """

    operations: tuple[str, ...] = NAMES
    dtypes: tuple[str, ...] = ("bf16", "fp32")
    widths: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None
    elements: tuple[int, ...] | None = None
    implementations: tuple[str, ...] | None = None
    inputs: tuple[str, ...] = INPUTS
    seconds: float = 1.0
    peak_memory: bool = True
    kernels: bool = False

    def __post_init__(self) -> None:
        for field, known in (("operations", NAMES), ("dtypes", tuple(DTYPES)), ("inputs", INPUTS)):
            for value in getattr(self, field):
                if value not in known:
                    raise ValueError(f"{field}: got {value!r}, expected some of {', '.join(known)}")
        if self.rows is not None and self.elements is not None:
            raise ValueError("rows and elements: got both, expected one of them at most")
        for value in self.implementations or ():
            if value not in implementation_names():
                raise ValueError(
                    f"implementations: got {value!r}, expected some of {', '.join(implementation_names())}"
                )
        for field in ("widths", "rows", "elements"):
            for value in getattr(self, field) or ():
                if value < 1:
                    raise ValueError(f"{field}: got {value}, expected positive numbers")
        for field in ("operations", "dtypes", "widths", "rows", "elements", "implementations", "inputs"):
            values = getattr(self, field)
            if values is not None and not values:
                raise ValueError(f"{field}: got nothing, expected one value or more")
        if not 0 <= self.seconds < math.inf:
            raise ValueError(f"seconds: got {self.seconds}, expected 0 or more")


def missing(run: Run) -> dict[str, str]:
    """Implementation to the reason why it is not measured here at all."""
    return {one.name: one.missing for one in implementations(run.device) if one.missing is not None}


def cases(settings: Settings, run: Run) -> list[Case]:
    """The cases in the order of their value: of each size all operations, fresh inputs before warm ones."""
    gpu = run.device.type == "cuda"
    sizes = QUICK if run.quick else ON_GPU if gpu else ON_CPU
    widths, rows = settings.widths or sizes[0], settings.rows or sizes[1]
    for count, width in itertools.product(settings.elements or (), widths):
        if count < width:
            raise ValueError(f"elements: got {count:,}, less than one row of the width {width:,}")
    most = MOST_ON_GPU if gpu else MOST_ON_CPU
    keys = ("operation", "variant", "dtype", "width", "rows", "inputs")
    found = [
        dict(zip(keys, (*operation.key, dtype, width, count, inputs), strict=True))
        for inputs, dtype, size, width in itertools.product(
            settings.inputs, settings.dtypes, settings.elements or rows, widths
        )
        for count in [size // width if settings.elements else size]
        for operation in OPERATIONS
        if operation.name in settings.operations
        and width * count <= most
        and (inputs == "fresh" or operation.key in WARM_OPERATIONS)
    ]
    if not found:
        raise ValueError(f"widths, and rows or elements: every pair exceeds the {most:,} elements that fit this device")
    return found


def candidates(
    operation: Operation, device: torch.device, only: tuple[str, ...] | None = None
) -> tuple[dict[str, Candidate], dict[str, str]]:
    """The implementations of an operation, and the reasons of those that lack it. Missing ones are in neither."""
    torch._dynamo.reset()
    found, left_out = {}, {}
    for one in implementations(device):
        if one.missing is None and (only is None or one.name in only):
            function = one.make(operation)
            if isinstance(function, str):
                left_out[one.name] = function
            else:
                found[one.name] = Candidate(function, one.active)
    return found, left_out


def measure(case: Case, settings: Settings, run: Run) -> dict[str, Any]:
    """One case: the fields in docs/benchmarks.md. Raises ArithmeticError if an implementation of ours, or eager
    PyTorch, has wrong results; other wrong ones are left out."""
    operation = find(case["operation"], case["variant"])
    dtype = DTYPES[case["dtype"]]
    inputs = Inputs(operation, case["rows"], case["width"], dtype, case["inputs"] == "fresh", run.device)
    timed, left_out = wanted(settings, operation, inputs, run.device)
    copies = Copies(inputs)
    if run.device.type == "cuda":
        times, uncaptured = device_times(timed, inputs, copies, rounds=3 if run.quick else GPU_ROUNDS)
        left_out |= uncaptured
    else:
        times = wall_times(timed, inputs, copies, seconds=0.0 if run.quick else settings.seconds)
    passes = operation.passes()
    moved = {name: passes[name] * case["rows"] * case["width"] * dtype.itemsize for name in PASSES}
    ours = [one.name for one in implementations(run.device) if one.ours and one.name in times["both"]]
    return {
        "seconds": _json(times),
        "bytes": moved,
        "peak_bytes": _memory(timed, inputs, run.device) if settings.peak_memory else {},
        "left_out": left_out,
        **({"kernels": started(timed, inputs)} if settings.kernels and run.device.type == "cuda" else {}),
        "result": {name: result(times[name], ours, moved[name]) for name in PASSES},
    }


def wanted(
    settings: Settings, operation: Operation, inputs: Inputs, device: torch.device
) -> tuple[dict[str, Candidate], dict[str, str]]:
    """The requested implementations that run and agree, and the reasons of the others.

    Raises ValueError if all requested ones are missing here.
    """
    names = settings.implementations
    if names is None:
        return prepared(operation, inputs, device)
    absent = {one.name: one.missing for one in implementations(device) if one.missing is not None}
    if set(names) <= set(absent):
        raise ValueError(f"implementations: none of {', '.join(names)} can be measured here: {absent[names[0]]}")
    found, left_out = prepared(operation, inputs, device, only=("eager", *names))
    return {name: one for name, one in found.items() if name in names}, left_out


def prepared(
    operation: Operation, inputs: Inputs, device: torch.device, only: tuple[str, ...] | None = None
) -> tuple[dict[str, Candidate], dict[str, str]]:
    """The implementations that run and agree, and the reasons of the others. `only`: those to check, including eager,
    the reference of the others."""
    found, left_out = candidates(operation, device, only)
    for name, candidate in list(found.items()):
        try:
            with candidate.active():
                gradients(operation, candidate.forward(inputs, 0), inputs, 0)
        except Exception as error:
            if name in _held(device):
                raise
            left_out[name] = f"failed: {in_words(error)}"
            del found[name]
    for name, reason in differing(found, inputs).items():
        if name in _held(device):
            raise ArithmeticError(f"{name}: {reason}")
        left_out[name] = f"does not compute the same: {reason}"
        del found[name]
    return found, left_out


def _held(device: torch.device) -> set[str]:
    return {"eager"} | {one.name for one in implementations(device) if one.ours}


def _memory(timed: Mapping[str, Candidate], inputs: Inputs, device: torch.device) -> dict[str, int]:
    """The peak of forward and backward, beyond inputs and incoming gradients."""

    def step(candidate: Candidate) -> None:
        with candidate.active():
            gradients(inputs.operation, candidate.forward(inputs, 0), inputs, 0)

    return {name: peak_allocated(functools.partial(step, one), device) for name, one in timed.items()}


def result(times: Mapping[str, Timing], ours: list[str], moved: int) -> dict[str, dict[str, Any]]:
    """Our implementations, the best peer and the floor."""
    found = {}
    for name in ours:
        own = times[name].median
        peers = [peer for peer in times if peer not in (*ours, FLOOR)]
        peer = min(peers, key=lambda peer: times[peer].median, default=None)
        found[name] = {
            "best_peer": peer,
            "over_best_peer": None if peer is None else times[peer].median / own,
            "over_floor": own / times[FLOOR].median,
            "gigabytes_per_second": moved / own / 1e9,
        }
    return found


def add_host(file: ResultFile, settings: Settings, run: Run) -> None:
    """Host time by call: with inputs so small that a CPU computes next to nothing, or without waiting for a GPU.

    Operations already in the file are skipped, and those without time.
    """
    if settings.implementations is not None:
        return  # only a part, for their bandwidth
    rows, width = HOST_SHAPE[run.device.type]
    found = file.content.setdefault("host", [])
    chosen = [operation for operation in OPERATIONS if operation.name in settings.operations]
    for operation in chosen:
        key = {"operation": operation.name, "variant": operation.variant, "dtype": settings.dtypes[0]}
        if any(all(one[name] == value for name, value in key.items()) for one in found) or not run.in_time():
            continue
        inputs = Inputs(operation, rows, width, DTYPES[settings.dtypes[0]], False, run.device)
        timed, left_out = prepared(operation, inputs, run.device)
        times = host_times(timed, inputs, seconds=0.0 if run.quick else settings.seconds)
        found.append({**key, "rows": rows, "width": width, "seconds": _json(times), "left_out": left_out})
        file.write()
    if len(found) < len(chosen):
        file.content["complete"] = False
        file.write()


def _json(times: Times) -> dict[str, dict[str, dict[str, float]]]:
    return {name: {one: time.json() for one, time in of.items()} for name, of in times.items()}


def run_job(settings: Settings, run: Run, folder: Path, resume: bool) -> ResultFile:
    """Measure all cases into `ops.json` in a folder, and print the tables.

    Raises ValueError if the file to resume is of another run, and the last error if all cases have failed.
    """
    planned = cases(settings, run)
    file = ResultFile(folder / f"{JOB}.json", JOB, run, asdict(settings), missing(run), resume=resume)
    # A compiled backward that overwrites saved tensors could not be replayed from a graph.
    replayed = functorch_config.patch(donated_buffer=False) if run.device.type == "cuda" else contextlib.nullcontext()
    with replayed:
        run_cases(file, planned, lambda case: measure(case, settings, run), run, "operations")
        add_host(file, settings, run)
    print_results(file.content, run.console)
    return file


def print_results(content: Mapping[str, Any], console: Console) -> None:
    """A table for each operation, a line for each case, forward and backward together; and missing implementations."""
    operations: dict[str, list[Mapping[str, Any]]] = {}
    for case in content["cases"]:
        operations.setdefault(", ".join(filter(None, (case["operation"], case["variant"]))), []).append(case)
    for label, found in operations.items():
        title = f"{label}: forward + backward on {content['environment']['device']}, medians in ms"
        console.print(_table(title, found))
    if operations:
        console.print("spread: ours, between quartiles; x best: the best peer over ours")
    for name, reason in content["missing"].items():
        console.print(f"not measured: {name}: {escape(reason)}")


def _table(title: str, cases: Sequence[Mapping[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for case in cases for name in case["seconds"]["both"] if name != FLOOR))
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    table.add_column("dtype", no_wrap=True)
    heads = [name.replace("-", "\n", 1) for name in (*names, FLOOR)]
    for head in ("size", *heads, "spread", "x\nbest", "over\ncopy", "GB/s"):
        table.add_column(head, justify="right", no_wrap=True)
    for case in cases:
        times, own = case["seconds"]["both"], case["result"]["both"]
        first = next(iter(own), None)
        figures = ["-"] * 4
        if first is not None:
            time, best = times[first], own[first]
            figures = [f"{(time['high'] - time['low']) / time['median']:.0%}"]
            figures += ["-" if best["over_best_peer"] is None else f"{best['over_best_peer']:.2f}"]
            figures += [f"{best['over_floor']:.2f}"]
            figures += [f"{best['gigabytes_per_second']:.1f}"]
        medians = [f"{times[name]['median'] * 1e3:.3g}" if name in times else "-" for name in (*names, FLOOR)]
        kind = case["dtype"] + (" warm" if case["inputs"] == "warm" else "")
        table.add_row(kind, f"{case['rows']}x{case['width']}", *medians, *figures)
    return table

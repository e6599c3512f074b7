"""Whole training steps of every method on real configurations: time, peak memory, trainable parameters.

A step is forward, backward, AdamW and the dropping of the gradients, in training mode. The steps of all methods are
timed in turn in one process, on shared weights. Only a method's own parameters are trained: a classification head stays
as it is in all methods but full fine-tuning. The columns of the file: docs/benchmarks.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from red_kernels.finetune.base_dtype import ASKED, AUTO
from red_kernels.patching.naive import naive_edit

from ..methods import METHODS, STEP_KNOWN, STEP_METHODS, Prepared, edited_sites, prepare, sister
from ..runs import Case, ResultFile, Run, run_cases
from .compare import compare
from .models import batch_of, build, find

JOB = "step"
KEYS = ("model", "dtype", "batch", "length")
Cases = tuple[tuple[str, str, int, int], ...]
ON_CPU: Cases = (
    ("SmolLM2-135M", AUTO, 4, 256),
    ("MiniLM-L6", "fp32", 32, 128),
    ("SmolLM2-135M", AUTO, 2, 512),
    ("MiniLM-L6", "fp32", 16, 256),
)
ON_GPU: Cases = (
    ("Llama-2-7B", AUTO, 2, 2048),
    ("RoBERTa-base", AUTO, 32, 512),
    ("GPT-2-medium", AUTO, 16, 512),
    ("T5-base", AUTO, 16, 512),
    ("RoBERTa-large", AUTO, 32, 512),
    ("Llama-2-7B", AUTO, 4, 2048),
    ("RoBERTa-base", AUTO, 128, 128),
    ("GPT-2-medium", AUTO, 8, 1024),
    ("RoBERTa-large", AUTO, 128, 128),
    ("GPT-2-medium", AUTO, 64, 128),
    ("T5-base", AUTO, 64, 128),
    ("Llama-2-7B", AUTO, 8, 2048),
)
QUICK: Cases = (("tiny-decoder", AUTO, 2, 16), ("tiny-encoder", "fp32", 2, 16))


def case_of(model: str, batch: int, length: int) -> tuple[str, str, int, int]:
    """A case of a model, in the dtype of its other cases."""
    known = {name: dtype for name, dtype, _, _ in (*QUICK, *ON_GPU, *ON_CPU)}
    return model, known.get(model, AUTO), batch, length


@dataclass(frozen=True)
class Settings:
    """The scope of a measurement.

    Attributes:
        cases: `(model, dtype, batch, length)` in the order of their value; None for those of the device. The dtype
            `"auto"` is that of the run.
        methods: in the order of the results.
        seconds: the time of a case, apart from its least rounds; compiling and checking come before.
        rounds: the least rounds.
    """

    cases: Cases | None = None
    methods: tuple[str, ...] = STEP_METHODS
    seconds: float = 50.0
    rounds: int = 7

    def __post_init__(self) -> None:
        for name, dtype, batch, length in self.cases or ():
            model = find(name)
            if dtype not in ASKED:
                raise ValueError(f"cases: got the dtype {dtype!r}, expected one of {', '.join(map(repr, ASKED))}")
            if batch < 1:
                raise ValueError(f"cases: got a batch of {batch} for {name}, expected at least 1")
            if not 2 <= length <= model.longest:
                raise ValueError(f"cases: got {length} tokens for {name}, expected 2 to {model.longest}")
        check_timed(self.methods, STEP_KNOWN, self.seconds, self.rounds)


def check_timed(methods: tuple[str, ...], known: tuple[str, ...], seconds: float, rounds: int) -> None:
    """Raises ValueError for settings that time nothing; the growth has the same."""
    for method in methods:
        if method not in known:
            raise ValueError(f"methods: got {method!r}, expected some of {', '.join(map(repr, known))}")
    if not methods:
        raise ValueError("methods: got none, expected at least one")
    if not 0 <= seconds < math.inf:
        raise ValueError(f"seconds: got {seconds}, expected 0 or more")
    if rounds < 2:
        raise ValueError(f"rounds: got {rounds}, expected at least 2: quartiles need them")


def missing(run: Run) -> dict[str, str]:
    """Method to the reason why it is not measured here at all."""
    return {name: reason for name in STEP_KNOWN if (reason := METHODS[name].missing()) is not None}


def cases(settings: Settings, run: Run) -> list[Case]:
    """The cases in the order of their value."""
    chosen = settings.cases
    if chosen is None:
        chosen = QUICK if run.quick else ON_GPU if run.device.type == "cuda" else ON_CPU
    return [dict(zip(KEYS, case, strict=True)) | {"dtype": run.resolved(case[1])} for case in chosen]


def measure(case: Case, settings: Settings, run: Run) -> dict[str, Any]:
    """One case: the fields in docs/benchmarks.md.

    Raises:
        ArithmeticError: a method has wrong results.
        ModuleNotFoundError: the package with the model is missing.
    """
    model = find(case["model"])
    base = build(model, case["dtype"], run.device)
    batch = batch_of(base, model.task, case["batch"], case["length"], run.device)
    methods, rest = choose(settings.methods, run)
    makers = {name: functools.partial(_make, name, base, batch) for name in methods}
    found = compare(base, makers, naive, batch, run.device, *budget(settings.seconds, settings.rounds, run))
    found["left_out"] |= rest
    parameters = sum(own.numel() for own in base.parameters())
    return {**found, "parameters": parameters, "tokens": batch["input_ids"].numel()}


def _make(name: str, base: nn.Module, batch: Mapping[str, Tensor]) -> Prepared:
    return prepare(name, sister(base), batches=[batch])


def naive(model: nn.Module, dtype: torch.dtype, rows: int) -> Prepared:
    """The edited model that is the reference of the others, see `check`."""
    sites = edited_sites(model)
    return Prepared(model, naive_edit(model, sites, dtype=dtype, widths=sites).vectors())


def choose(methods: tuple[str, ...], run: Run) -> tuple[list[str], dict[str, str]]:
    """The measured methods, and the reasons of the others."""
    absent = missing(run)
    if run.quick:
        absent |= {name: "a quick run compiles nothing" for name in methods if name.endswith("-compile")}
    return [name for name in methods if name not in absent], {name: absent[name] for name in methods if name in absent}


def budget(seconds: float, rounds: int, run: Run) -> tuple[float, int]:
    """The seconds and the least rounds of a case; less of both in a quick run."""
    return (min(seconds, 1.0), min(rounds, 3)) if run.quick else (seconds, rounds)


def run_job(settings: Settings, run: Run, folder: Path, resume: bool) -> ResultFile:
    """Measure all cases into `step.json` in a folder, and print a table for each.

    Raises ValueError if the file to resume is of another run, and the last error if all cases have failed.
    """
    planned = cases(settings, run)
    said = asdict(settings) | {"cases": [list(case.values()) for case in planned]}
    file = ResultFile(folder / f"{JOB}.json", JOB, run, said, missing(run), resume=resume, base_dtype=run.base_dtype)
    run_cases(file, planned, lambda case: measure(case, settings, run), run, "training steps")
    print_results(file.content, run.console)
    return file


def print_results(content: Mapping[str, Any], console: Console) -> None:
    """A table for each case, with the reasons of omitted methods."""
    for case in content["cases"]:
        title = (
            f"{case['model']}, {case['parameters']:,} parameters, {case['dtype']}, "
            f"{case['batch']} x {case['length']} tokens"
        )
        console.print(table(case, title))


def table(case: Mapping[str, Any], title: str) -> Table:
    """The methods of one case; times also over that of our edit."""
    found = Table("method", "median ms", "quartiles ms", "over ours", "peak MiB", "trained", title=title)
    ours = case["seconds"].get("red", {}).get("median")
    for name, method in METHODS.items():
        if name in case["seconds"]:
            time = case["seconds"][name]
            found.add_row(
                method.label,
                f"{time['median'] * 1e3:.1f}",
                f"{time['low'] * 1e3:.1f} to {time['high'] * 1e3:.1f}",
                f"{time['median'] / ours:.2f}" if ours else "",
                f"{case['peak_bytes'][name] / 2**20:.1f}",
                f"{case['trainable'][name]:,}" if "trainable" in case else "",
            )
        elif name in case["left_out"]:
            found.add_row(method.label, "left out", case["left_out"][name])
    return found

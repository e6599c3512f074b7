"""`red-kernels bench [ops|step|quality|all] --output FOLDER`: the jobs, their files, tables and pictures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from red_kernels.finetune.base_dtype import ASKED, AUTO, BaseDtype, resolve_dtype

from .ops import job as ops
from .quality import job as quality
from .runs import ResultFile, Run, kept_dtype, read
from .step import growth
from .step import job as step

Job = Callable[[Run, Path, bool], ResultFile]
JOBS = ("ops", "step", "quality")
GROWTH = "growth"  # the second part of the steps, which can be run alone
ALL = "all"


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        job: one of `JOBS`, or all of them.
        output: the folder for results and pictures.
        device: `"cpu"` or `"cuda"`; None for a GPU where there is one.
        resume: go on with what the folder holds, without what is measured already.
        overwrite: replace what it holds.
        minutes: no case is begun after so many.
        quick: few and small cases, to see that all runs.
        options: values for fields of `ops.Settings`; `seconds`, how long a case is timed, is for the jobs `step` and
            `growth` too.
        methods: of the job `step` or `quality`, some of its methods; empty for those by default. The growth of steps,
            which has methods of its own, is left out then.
        cases: of the job `step`, `(model, batch, length)` in place of those of the device; the growth is left out too.
        tasks: of the job `quality`, some of its tasks; empty for all.
        dtype: of the base models of `step`, `growth` and `quality`, but for those that are fp32 by design: `"auto"`,
            `"fp32"` or `"bf16"`. A folder that is gone on with keeps what `"auto"` was.
    """

    job: str
    output: Path
    device: str | None = None
    resume: bool = False
    overwrite: bool = False
    minutes: float | None = None
    quick: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = AUTO
    methods: tuple[str, ...] = ()
    cases: tuple[tuple[str, int, int], ...] = ()
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.job not in (*JOBS, GROWTH, ALL):
            raise ValueError(f"job: got {self.job!r}, expected one of {', '.join((*JOBS, GROWTH, ALL))}")
        if self.device not in (None, "cpu", "cuda"):
            raise ValueError(f"--device: got {self.device!r}, expected cpu or cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"--device: got 'cuda', and torch {torch.__version__} finds no GPU here")
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite: got both, expected one of them at most")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ValueError(f"--minutes: got {self.minutes}, expected a number above 0")
        if self.dtype not in ASKED:
            raise ValueError(f"--dtype: got {self.dtype!r}, expected one of {', '.join(ASKED)}")
        if self.dtype != AUTO and self.job == ops.JOB:
            raise ValueError(
                "--dtype: needs a job with base models, got the job ops; --dtypes sets the dtypes of activations"
            )
        if self.methods and self.job not in (step.JOB, quality.JOB):
            raise ValueError(f"--methods: needs the job step or quality, got the job {self.job}")
        if self.cases and self.job != step.JOB:
            raise ValueError(f"--case: needs the job step, got the job {self.job}")
        if self.tasks and self.job != quality.JOB:
            raise ValueError(f"--tasks: needs the job quality, got the job {self.job}")
        timed = {"seconds"} if self.job in (step.JOB, GROWTH) else set()
        if set(self.options) - timed and self.job in ("step", GROWTH, "quality"):
            given = ", ".join(f"--{name}" for name in self.options if name not in timed)
            raise ValueError(f"{given}: needs the job ops, got the job {self.job}")

    def settings(self) -> ops.Settings:
        """Those of the operations. Raises ValueError for what is no such setting."""
        known = {one.name for one in fields(ops.Settings)}
        unknown = sorted(set(self.options) - known)
        if unknown:
            raise ValueError(f"options: got {', '.join(unknown)}, expected some of {', '.join(sorted(known))}")
        return replace(ops.Settings(), **self.options)

    def jobs(self) -> dict[str, Job]:
        """File name, without its end, to what measures it, in the order of the runs."""
        settings = self.settings()
        chosen: dict[str, Any] = {"methods": self.methods} if self.methods else {}
        timed = {"seconds": self.options["seconds"]} if self.job in (step.JOB, GROWTH) and self.options else {}

        def operations(run: Run, folder: Path, resume: bool) -> ResultFile:
            return ops.run_job(settings, run, folder, resume)

        def steps(run: Run, folder: Path, resume: bool) -> ResultFile:
            cases = tuple(step.case_of(*case) for case in self.cases) or None
            return step.run_job(step.Settings(cases, **chosen, **timed), run, folder, resume)

        def growing(run: Run, folder: Path, resume: bool) -> ResultFile:
            return growth.run_job(growth.Settings(**timed), run, folder, resume)

        def qualities(run: Run, folder: Path, resume: bool) -> ResultFile:
            settings = replace(quality.Settings(**chosen), tasks=self.tasks or quality.TASKS)
            return quality.run_job(settings, run, folder, resume)

        of: dict[str, dict[str, Job]] = {
            "ops": {ops.JOB: operations},
            "step": {step.JOB: steps} if self.methods or self.cases else {step.JOB: steps, growth.JOB: growing},
            GROWTH: {growth.JOB: growing},
            "quality": {quality.JOB: qualities},
        }
        names = JOBS if self.job == ALL else (self.job,)
        return {file: job for name in names for file, job in of[name].items()}


def run_suite(request: Request, console: Console) -> dict[str, ResultFile]:
    """Run the jobs asked for; returns file name, without its end, to what was measured.

    A job that cannot run at all is named, and the others go on.

    Raises:
        FileExistsError: the folder has results of these jobs, and neither `resume` nor `overwrite` was asked for.
        OSError: the folder cannot be written to.
        RuntimeError: a job could not run; raised at the end, with the reasons.
    """
    jobs = request.jobs()
    there = [name for name in jobs if (request.output / f"{name}.json").exists()]
    if there and not (request.resume or request.overwrite):
        raise FileExistsError(
            f"--output: {request.output} has results of {', '.join(there)}; --resume continues them, --overwrite "
            "measures again"
        )
    if request.output.exists() and not request.output.is_dir():
        raise NotADirectoryError(f"--output: {request.output} is a file, expected a folder")
    device = torch.device(request.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    deadline = None if request.minutes is None else time.monotonic() + 60 * request.minutes
    run = Run(device, console, request.quick, deadline, chosen=_dtype(request, jobs, device, console))
    found: dict[str, ResultFile] = {}
    failed: list[str] = []
    for name, job in jobs.items():
        try:
            found[name] = job(run, request.output, request.resume)
        except Exception as error:
            if len(jobs) == 1:
                raise
            failed.append(f"{name}: {error}")
            console.print(f"[red]{name} could not run:[/] {escape(str(error))}")
    for path in draw(request.output, console):
        console.print(f"wrote {path}")
    for file in found.values():
        console.print(f"wrote {file.path}" + ("" if file.content["complete"] else ", which is not complete"))
    if failed:
        raise RuntimeError("; ".join(failed))
    return found


def _dtype(request: Request, jobs: Mapping[str, Job], device: torch.device, console: Console) -> BaseDtype | None:
    """The dtype of base models, printed with its reason; None where no job has any."""
    models = [name for name in jobs if name != ops.JOB]
    if not models:
        return None
    kept = None
    for path in (request.output / f"{name}.json" for name in models) if request.resume else ():
        if path.is_file():
            kept = kept or kept_dtype(read(path))
    dtype = resolve_dtype(request.dtype, device, kept)
    console.print(f"Base models' dtype: {dtype.name} ({dtype.reason})", markup=False, highlight=False, soft_wrap=True)
    if dtype.warning is not None:
        console.print(f"Warning: {dtype.warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    return dtype


def draw(folder: Path, console: Console) -> Sequence[Path]:
    """The pictures of a folder of results; without matplotlib none, which is said."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        console.print("no pictures: they need the package 'matplotlib': pip install matplotlib")
        return []
    from .report.plots import write_plots

    try:
        return write_plots(folder)
    except (ValueError, KeyError, OSError) as error:  # another file in the folder may be of another form
        console.print(f"[red]no pictures:[/] {escape(str(error))}")
        return []

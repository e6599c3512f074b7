"""The quality of each method on three tasks, under equal budgets: accuracy of two classifications, and perplexity.

All methods get the same steps, batches, lengths and, for a seed, the same order of the data and the same new head. The
learning rate of each method is chosen by the mean loss on the validation part, with seed 0, in runs of a share of the
steps, each with its own warm-up and decay. If the best is at the edge of the method's grid, the grid is extended. Only
then the test part is used: by runs with seeds 1, 2, ... The mean over these and their sample standard deviation are the
result. The fields of the file: docs/benchmarks.md.

The head on the sentence model is transformers' own: a linear layer on the first token, after the model's pooler.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from red_kernels.finetune.measure import HeldOut

from ..memory import held_bytes, peak_allocated
from ..methods import METHODS, QUALITY_DEFAULT, QUALITY_METHODS, Prepared, prepare
from ..runs import Case, ResultFile, Run, run_cases
from .settings import Settings
from .tasks import LABELS, LANGUAGE, METRIC, TASKS, Budget, Task, make_task
from .training import search_rate, train

JOB = "quality"
BASE = "base"
_BASE_LABEL = dict.fromkeys(LABELS, "most frequent class") | {LANGUAGE: "no training"}
POINTS = 10  # of a training curve, each a mean over as many steps
LOOKED_AT = 4  # batches that a method may read before it trains
LOOKS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)  # fractions of a run's steps at which its validation loss is measured


def missing(methods: Iterable[str]) -> dict[str, str]:
    """Those of these methods, and of the default ones, that cannot be measured here, with the reason."""
    reasons = {name: METHODS[name].missing() for name in QUALITY_METHODS if name in {*QUALITY_DEFAULT, *methods}}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def cases(settings: Settings, run: Run) -> list[Case]:
    """Every method on every task, sentiment first: it gives more results in less time."""
    return [{"task": task, "method": method} for task in settings.tasks for method in (BASE, *settings.methods)]


def measure(case: Case, settings: Settings, run: Run) -> dict[str, Any]:
    """Search the learning rate of a method on a task, and run it with each seed.

    Raises:
        OSError, ValueError, ModuleNotFoundError: the task's data or model is not available.
        RuntimeError: the training diverged with every learning rate.
    """
    settings = settings.for_run(run)
    budget = settings.budget(case["task"])
    task = _task(case["task"], budget, run.device)
    if case["method"] == BASE:
        return _base(task)
    with _products(budget.products):
        return _method(case["method"], task, settings)


@contextlib.contextmanager
def _products(dtype: str) -> Iterator[None]:
    """Products of fp32 matrices by factors in this dtype."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if dtype == "bf16" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _task(name: str, budget: Budget, device: torch.device) -> Task:
    found = _made(name, budget, device)
    if isinstance(found, Exception):
        raise found.with_traceback(None)
    return found


@functools.lru_cache(maxsize=1)
def _made(name: str, budget: Budget, device: torch.device) -> Task | Exception:
    try:
        return make_task(name, budget, device)
    except Exception as error:  # a missing network is tried once, not for every method
        return error


def _base(task: Task) -> dict[str, Any]:
    """The score before any training: of the class frequencies, or of the model."""
    found = task.majority or task.judge(task.fresh(0).model, task.test)
    runs = [{"seed": None, **_entry(task, found)}]
    return {**_summary(task, runs), "learning_rates": {}, "chosen": None, "trainable": 0, "steps": 0}


def _method(method: str, task: Task, settings: Settings) -> dict[str, Any]:
    budget = task.budget

    def rated(rate: float) -> HeldOut:
        prepared = _prepared(method, task, 0, budget.search)
        return _trained(prepared, task, 0, budget.search, rate) or task.judge(prepared.model, task.validation)

    search = search_rate(settings.grids[task.name][method], rated, settings.extend)
    runs = []
    looks = sorted({max(1, round(share * budget.steps)) for share in LOOKS})
    for seed in range(1, budget.seeds + 1):
        prepared = _prepared(method, task, seed, budget.steps)
        course: list[dict[str, Any]] = []

        def look(step: int, seconds: float, model: Any = prepared.model, course: Any = course) -> None:
            found = task.judge(model, task.validation)
            course.append({"step": step, "seconds": round(seconds, 3), **_entry(task, found)})

        losses: list[float] = []
        diverged = _trained(prepared, task, seed, budget.steps, search.chosen, losses, looks=looks, look=look)
        found = diverged or task.judge(prepared.model, task.test)
        runs.append({"seed": seed, **_entry(task, found), "curve": _curve(losses), "validation": course})
    tried = {str(rate): _entry(task, found) for rate, found in search.tried.items()}
    return {
        **_summary(task, runs),
        "learning_rates": {rate: entry["loss"] for rate, entry in tried.items()},
        "validation_scores": {rate: entry["score"] for rate, entry in tried.items()},
        "chosen": search.chosen,
        "at_edge": search.at_edge,
        "added": list(search.added),
        "trainable": prepared.trainable,
        "peak_bytes": _peak(method, task),
    }


def _prepared(method: str, task: Task, seed: int, steps: int) -> Prepared:
    base = task.fresh(seed)
    torch.manual_seed(seed)  # of the method's random values
    looked_at = itertools.islice(task.batches(seed, steps), LOOKED_AT)
    return prepare(method, base.model, head=sorted(base.new_parameters), batches=looked_at)


def _trained(
    prepared: Prepared, task: Task, seed: int, steps: int, rate: float, losses: list[float] | None = None, **looks: Any
) -> HeldOut | None:
    """Train; returns the score if the training diverged. `losses` gets those of the steps."""
    torch.manual_seed(seed)  # of dropout
    with prepared.active():
        found = train(prepared.model, prepared.trained, task.batches(seed, steps), steps, rate, **looks)
        if losses is not None:
            losses += found
    return None if math.isfinite(found[-1]) else HeldOut(math.nan, 0)


def _peak(method: str, task: Task) -> int:
    """The memory of a training step beyond the base weights, on the longest batch of a run: the second of two steps.

    The optimizer's state exists from the first step on.
    """
    base = task.fresh(1)
    weights = [own.detach() for own in base.model.parameters()]
    batch = task.longest(1)
    prepared = prepare(method, base.model, head=sorted(base.new_parameters), batches=[batch])
    added = held_bytes([*prepared.trained, *prepared.fixed], weights)
    with prepared.active():
        peak = peak_allocated(lambda: train(prepared.model, prepared.trained, [batch] * 2, 2, 1e-6), task.device)
    return peak + added


def _entry(task: Task, found: HeldOut) -> dict[str, Any]:
    """Score and loss; None for both if the training diverged, as JSON has no NaN."""
    if not math.isfinite(found.loss) or not math.isfinite(task.score(found)):
        return {"score": None, "loss": None}
    return {"score": task.score(found), "loss": found.loss}


def _summary(task: Task, runs: list[dict[str, Any]]) -> dict[str, Any]:
    scores = [run["score"] for run in runs]
    whole = None not in scores
    return {
        "metric": METRIC[task.name],
        "runs": runs,
        "mean": statistics.fmean(scores) if whole else None,
        "spread": statistics.stdev(scores) if whole and len(scores) > 1 else None,
        "steps": task.budget.steps,
        "search_steps": task.budget.search,
        "products": task.budget.products,
        "batch": task.budget.batch,
        "length": task.budget.length,
        **task.said,
    }


def _curve(losses: list[float]) -> list[float | None]:
    """The training loss in `POINTS` parts."""
    count = min(POINTS, len(losses))
    edges = [number * len(losses) // count for number in range(count + 1)]
    means = [statistics.fmean(losses[start:end]) for start, end in itertools.pairwise(edges)]
    return [round(value, 5) if math.isfinite(value) else None for value in means]


def run_job(settings: Settings, run: Run, folder: Path, resume: bool) -> ResultFile:
    """Measure all cases into `quality.json` in a folder, and print the tables.

    Raises:
        ValueError, OSError: of `ResultFile`; and the error of `measure` if every case fails.
    """
    lacking = missing(settings.methods)
    chosen = settings.for_run(run)
    file = ResultFile(
        folder / f"{JOB}.json", JOB, run, asdict(chosen), lacking, resume=resume, base_dtype=run.base_dtype
    )
    here = [case for case in cases(settings, run) if case["method"] not in lacking]
    try:
        run_cases(file, here, lambda case: measure(case, settings, run), run, JOB)
    finally:
        _made.cache_clear()
    print_results(file.content, run.console)
    return file


def print_results(content: dict[str, Any], console: Console) -> None:
    """A table for each task, and the differences between the fused and the eager edit."""
    for task in TASKS:
        found = {case["method"]: case for case in content["cases"] if case["task"] == task}
        if not found:
            continue
        unit = "accuracy %" if METRIC[task] == "accuracy" else "perplexity"
        table = Table("method", "trained parameters", "learning rate", f"{unit}, mean ± spread", "seeds")
        for method, case in found.items():
            rate = "" if case["chosen"] is None else f"{case['chosen']:g}" + (" (edge)" if case["at_edge"] else "")
            label = METHODS[method].label if method in METHODS else _BASE_LABEL[task]
            table.add_row(label, f"{case['trainable']:,}", rate, _mean(case), str(len(case["runs"])))
        any_case = next(reversed(found.values()))
        parts = ", ".join(f"{any_case[f'{part}_items']:,} {part}" for part in ("train", "validation", "test"))
        table.title = f"{task}: {any_case['steps']} steps of {any_case['batch']} x {any_case['length']} tokens"
        table.caption = f"items: {parts}"
        console.print(table)
        difference = fused_over_naive(found)
        if difference is not None:
            mean, spread = difference
            said = "" if spread is None else f" ± {spread:.3f}"
            console.print(f"{task}: fused minus eager edit, by seed: {mean:+.3f}{said} ({unit})")
    for name, reason in content["missing"].items():
        console.print(f"not measured: {name}: {reason}", markup=False)


def fused_over_naive(found: Mapping[str, Case]) -> tuple[float, float | None] | None:
    """The mean and the spread of the fused edit's score minus the eager one's, seed by seed.

    None if one of the two is missing, has diverged, or had another learning rate: then the trainings would not be the
    same.
    """
    if not {"red", "naive"} <= found.keys() or found["red"]["chosen"] != found["naive"]["chosen"]:
        return None
    scores = [{run["seed"]: run["score"] for run in found[name]["runs"]} for name in ("red", "naive")]
    if None in [*scores[0].values(), *scores[1].values()]:
        return None
    differences = [scores[0][seed] - scores[1][seed] for seed in scores[0]]
    return statistics.fmean(differences), statistics.stdev(differences) if len(differences) > 1 else None


def _mean(case: Case) -> str:
    if case["mean"] is None:
        return "diverged"
    digits = 1 if case["metric"] == "accuracy" else 3
    spread = "" if case["spread"] is None else f" ± {case['spread']:.{digits}f}"
    return f"{case['mean']:.{digits}f}{spread}"

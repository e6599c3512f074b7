"""The quality of each method on two tasks, under equal budgets: accuracy on sentiment, perplexity on a language model.

All methods get the same steps, batches, lengths and, for a seed, the same order of the data and the same fresh head.
The learning rate is chosen for each method by the mean loss on the validation part, with seed 0; where the best lies at
the edge of the method's grid, the grid is extended. Only then the test part is used: by runs with seeds 1, 2, ... The
mean over these and their sample standard deviation are the result. What the file's fields mean: docs/benchmarks.md.

The head on the sentence model is transformers' own: a linear layer on the first token, as the model's pooler gives it.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from red_kernels.finetune.base_dtype import AUTO
from red_kernels.finetune.measure import HeldOut

from ..methods import KIND_METHODS, METHODS, QUALITY_DEFAULT, QUALITY_METHODS, prepare
from ..runs import Case, ResultFile, Run, run_cases
from .tasks import LANGUAGE, METRIC, SENTIMENT, TASKS, Budget, Task, make_task
from .training import check_grid, search_rate, train

JOB = "quality"
BASE = "base"
_BASE_LABEL = {SENTIMENT: "most frequent class", LANGUAGE: "no training"}
POINTS = 10  # of a training curve, each a mean over as many steps
LOOKS = 4  # batches of its training that a method looks at, if it does, before it trains
_RED = (3e-3, 1e-2, 3e-2, 1e-1)
_KINDS = {
    **dict.fromkeys(KIND_METHODS, _RED),
    **dict.fromkeys(("lowrank", "direct", "initial", "gift", "generated"), (1e-3, 3e-3, 1e-2, 3e-2)),
}
_NEIGHBOURS = {
    "road": (3e-3, 1e-2, 3e-2, 1e-1),
    "vera": (3e-3, 1e-2, 3e-2, 1e-1),
    "hra": (1e-3, 3e-3, 1e-2, 3e-2),
    "sara": (1e-4, 3e-4, 1e-3, 3e-3),
    "spt": (1e-4, 3e-4, 1e-3, 3e-3),
    "lorta": (1e-3, 3e-3, 1e-2, 3e-2),
    "loretta-adp": (1e-3, 3e-3, 1e-2, 3e-2),
    "loretta-rep": (1e-3, 3e-3, 1e-2, 3e-2),
    "melora": (3e-4, 1e-3, 3e-3, 1e-2),
}
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    SENTIMENT: {
        **_KINDS,
        **_NEIGHBOURS,
        "red": _RED,
        "naive": _RED,
        "lora-all": (3e-4, 1e-3, 3e-3, 1e-2),
        "ia3": (3e-3, 1e-2, 3e-2, 1e-1),
        "linear-probe": (3e-3, 1e-2, 3e-2, 1e-1),
        "full": (1e-5, 3e-5, 1e-4, 3e-4),
    },
    LANGUAGE: {
        **_KINDS,
        **_NEIGHBOURS,
        "red": _RED,
        "naive": _RED,
        "lora-all": (3e-4, 1e-3, 3e-3, 1e-2),
        "ia3": (3e-3, 1e-2, 3e-2, 1e-1),
        "linear-probe": (1e-5, 3e-5, 1e-4, 3e-4),
        "full": (1e-5, 3e-5, 1e-4, 3e-4),
    },
}
SENTENCES = Budget("all-MiniLM-L6-v2", "fp32", 96, 16, 40, seeds=3, validation=512, test=1000)
TEXTS = Budget("SmolLM2-135M-Instruct", AUTO, 16, 4, 128, seeds=3, validation=24, test=64)


@dataclass(frozen=True)
class Settings:
    """What is measured. The budgets are for two cores of a CPU, half an hour in all for the methods by default.

    Attributes:
        sentiment, language: the budget of each task.
        methods: in the order in which they are measured, after the base.
        grids: task to method to the learning rates to try; the fused and the eager edit have the same.
        extend: how many rates may be tried beyond a grid.
        tasks: which, in this order.
    """

    sentiment: Budget = SENTENCES
    language: Budget = TEXTS
    methods: tuple[str, ...] = QUALITY_DEFAULT
    grids: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=lambda: GRIDS)
    extend: int = 2
    tasks: tuple[str, ...] = TASKS

    def __post_init__(self) -> None:
        self.sentiment.check("sentiment")
        self.language.check("language")
        if not self.tasks or not set(self.tasks) <= set(TASKS):
            raise ValueError(f"tasks: got {self.tasks}, expected some of {', '.join(TASKS)}")
        unknown = [name for name in self.methods if name not in QUALITY_METHODS]
        if unknown or not self.methods:
            raise ValueError(f"methods: got {self.methods}, expected some of {', '.join(QUALITY_METHODS)}")
        for task in TASKS:
            grids = {name: self.grids.get(task, {}).get(name, ()) for name in self.methods}
            for name, grid in grids.items():
                check_grid(f"grids[{task!r}][{name!r}]", grid)
            if {"red", "naive"} <= grids.keys() and grids["red"] != grids["naive"]:
                raise ValueError(
                    f"grids[{task!r}]: 'red' has {grids['red']}, 'naive' {grids['naive']}, expected the same"
                )
        if self.extend < 0:
            raise ValueError(f"extend: got {self.extend}, expected at least 0")

    def budget(self, task: str) -> Budget:
        """The budget of a task."""
        return self.sentiment if task == SENTIMENT else self.language

    def for_run(self, run: Run) -> Settings:
        """These settings with the run's dtype in place of `auto`; of a quick run only few steps, rates and items."""
        own = {name: replace(self.budget(name), dtype=run.resolved(self.budget(name).dtype)) for name in TASKS}
        resolved = replace(self, sentiment=own[SENTIMENT], language=own[LANGUAGE])
        return resolved._quick() if run.quick else resolved

    def _quick(self) -> Settings:

        def small(budget: Budget) -> Budget:
            return replace(budget, steps=4, batch=4, length=min(32, budget.length), seeds=1, validation=16, test=16)

        grids = {
            task: {name: tuple(grid[len(grid) // 2 - 1 :][:2]) for name, grid in own.items()}
            for task, own in self.grids.items()
        }
        return replace(self, sentiment=small(self.sentiment), language=small(self.language), grids=grids, extend=0)


def missing(methods: Iterable[str]) -> dict[str, str]:
    """Those of these methods, and of the default ones, that cannot be measured here, to the reason."""
    reasons = {name: METHODS[name].missing() for name in QUALITY_METHODS if name in {*QUALITY_DEFAULT, *methods}}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def cases(settings: Settings, run: Run) -> list[Case]:
    """Every method on every task, sentiment first: more of it is done in less time."""
    return [{"task": task, "method": method} for task in settings.tasks for method in (BASE, *settings.methods)]


def measure(case: Case, settings: Settings, run: Run) -> dict[str, Any]:
    """Search the learning rate of a method on a task, and run it with each seed.

    Raises:
        OSError, ValueError, ModuleNotFoundError: the task's data or model cannot be had.
        RuntimeError: the training diverged with every learning rate.
    """
    settings = settings.for_run(run)
    task = _task(case["task"], settings.budget(case["task"]), run.device)
    if case["method"] == BASE:
        return _base(task)
    return _method(case["method"], task, settings)


def _task(name: str, budget: Budget, device: torch.device) -> Task:
    found = _made(name, budget, device)
    if isinstance(found, Exception):
        raise found.with_traceback(None)
    return found


@functools.lru_cache(maxsize=1)
def _made(name: str, budget: Budget, device: torch.device) -> Task | Exception:
    try:
        return make_task(name, budget, device)
    except Exception as error:  # a network that is not there is asked once, not for every method
        return error


def _base(task: Task) -> dict[str, Any]:
    """What is there before any training: the frequencies of the classes, or the model as it is."""
    found = task.majority or task.judge(task.fresh(0).model, task.test)
    runs = [{"seed": None, **_entry(task, found)}]
    return {**_summary(task, runs), "learning_rates": {}, "chosen": None, "trainable": 0, "steps": 0}


def _method(method: str, task: Task, settings: Settings) -> dict[str, Any]:
    trainable = 0

    def trained(seed: int, rate: float, part: list[Any]) -> tuple[HeldOut, list[float]]:
        nonlocal trainable
        base = task.fresh(seed)
        torch.manual_seed(seed)  # of what a method draws
        looked_at = itertools.islice(task.batches(seed), LOOKS)
        prepared = prepare(method, base.model, head=sorted(base.new_parameters), batches=looked_at)
        trainable = prepared.trainable
        torch.manual_seed(seed)  # of dropout
        with prepared.active():
            losses = train(prepared.model, prepared.trained, task.batches(seed), task.budget.steps, rate)
            if not math.isfinite(losses[-1]):
                return HeldOut(math.nan, 0), losses
            return task.judge(prepared.model, part), losses

    search = search_rate(
        settings.grids[task.name][method], lambda rate: trained(0, rate, task.validation)[0], settings.extend
    )
    runs = []
    for seed in range(1, task.budget.seeds + 1):
        found, losses = trained(seed, search.chosen, task.test)
        runs.append({"seed": seed, **_entry(task, found), "curve": _curve(losses)})
    tried = {str(rate): _entry(task, found) for rate, found in search.tried.items()}
    return {
        **_summary(task, runs),
        "learning_rates": {rate: entry["loss"] for rate, entry in tried.items()},
        "validation_scores": {rate: entry["score"] for rate, entry in tried.items()},
        "chosen": search.chosen,
        "at_edge": search.at_edge,
        "added": list(search.added),
        "trainable": trainable,
    }


def _entry(task: Task, found: HeldOut) -> dict[str, Any]:
    """Score and loss; None for both where the training diverged, as JSON has no other word for it."""
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
        ValueError, OSError: of `ResultFile`; and what `measure` raises, where every case fails.
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
    """A table for each task, and what the fused edit differs by from the eager one."""
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
    """The mean and the spread of what the fused edit's score differs by, seed by seed.

    None where one of the two is missing, has diverged, or was run with another learning rate: then it would not be the
    same training.
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

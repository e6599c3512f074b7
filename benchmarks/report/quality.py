"""The measured part of docs/quality.md: each method's scores on each task, from one or several runs of the suite.

`benchmarks/results/quality/<name>/quality.json` are files of `red-kernels bench quality`. One file may hold some
methods and another the rest: what a method learns does not depend on the machine, but for rounding. Every file must
have the same budget. Products of matrices may have been rounded otherwise; the table says of each method how.
"""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .figures import QUALITY_METHODS, in_order, lower_is_better
from .losses import score
from .results import Device, load
from .text import NONE, mebibytes, table

FOLDER = "quality"
PEER = "lora-all"  # the reference of a score
NOTHING = "No results of this form yet."
_BUDGET = ("steps", "search_steps", "batch", "length", "train_items", "validation_items", "test_items")

Case = dict[str, Any]
Tasks = dict[str, dict[str, Case]]


def merged(results: Path) -> Tasks:
    """Task to method to case, over all files; ``results`` is the folder of all results.

    Raises:
        ValueError: a file is not a file of results, two have one method, or their budgets differ.
    """
    found: Tasks = {}
    seen: dict[tuple[str, str], str] = {}
    for device in _devices(results):
        for case in device.files.get(FOLDER, {}).get("cases", []):
            own = found.setdefault(case["task"], {})
            name = case["method"]
            if name in own and name != "base":
                raise ValueError(f"{name} on {case['task']} is in {seen[case['task'], name]} and in {device.name}")
            for known in own.values():
                unlike = [one for one in _BUDGET if name != "base" != known["method"] and case[one] != known[one]]
                if unlike:
                    raise ValueError(
                        f"{device.name}: {name} on {case['task']} has {unlike[0]} {case[unlike[0]]}, and "
                        f"{known['method']} has {known[unlike[0]]}"
                    )
            own[name] = case
            seen[case["task"], name] = device.name
    return found


def _devices(results: Path) -> list[Device]:
    folder = results / FOLDER
    return load(folder) if folder.is_dir() else []


def quality_block(results: Path) -> str:
    """The text between the marks of docs/quality.md. Raises as `merged`."""
    tasks = merged(results)
    parts = [part for task in sorted(tasks, reverse=True) for part in _task(task, tasks[task])]
    machines = dict.fromkeys(
        f"{device.environment.get('processor')}, {device.environment.get('instruction_set')}, "
        f"threads: {device.environment.get('threads')}, torch {device.environment.get('torch')}"
        for device in _devices(results)
    )
    if machines:
        parts.append(f"Measured on: {'; '.join(machines)}.")
    return "\n" + ("\n\n".join(parts) or NOTHING) + "\n"


def _task(task: str, cases: Mapping[str, Case]) -> list[str]:
    methods = in_order(set(cases), QUALITY_METHODS)
    trained = [cases[name] for name in methods if name != "base"]
    if not trained:
        return []
    any_case = trained[0]
    metric = any_case["metric"]
    budget = (
        f"{any_case['steps']} steps of {any_case['batch']} x {any_case['length']} tokens at most, rates searched in "
        f"{any_case['search_steps']} steps, {any_case['train_items']:,} items to train on, {any_case['test_items']:,} "
        "to test on."
    )
    header = (
        *("method", "products", "trained", f"test {metric}", f"over `{PEER}`", "learning rate"),
        *("validation loss at 60, 80, 100% of the steps", "seconds of a training", "memory of a step"),
    )
    rows = [_row(cases[name], cases.get(PEER)) for name in methods]
    return [f"### {task[0].upper()}{task[1:]}", textwrap.fill(budget, 110), table(header, rows)]


def _row(case: Case, peer: Case | None) -> list[str]:
    rate = case.get("chosen")
    return [
        f"`{case['method']}`",
        NONE if case["method"] == "base" else case["products"],
        f"{case['trainable']:,}",
        score(case),
        _over(case, peer),
        NONE if rate is None else f"{rate:g}" + (" (edge)" if case.get("at_edge") else ""),
        ", ".join(f"{value:.3f}" for value in course(case, "loss")[-3:]) or NONE,
        f"{course(case, 'seconds')[-1]:.0f}" if course(case, "seconds") else NONE,
        mebibytes(case.get("peak_bytes")),
    ]


def _over(case: Case, peer: Case | None) -> str:
    """A mean score minus the peer's; in brackets if it is within both deviations together."""
    if peer is None or case is peer or case["method"] == "base" or None in (case["mean"], peer["mean"]):
        return NONE
    ahead = case["mean"] - peer["mean"]
    if lower_is_better(case["metric"]):
        ahead = -ahead
    said = f"{ahead:+.2f}"
    return f"({said})" if abs(ahead) <= (case["spread"] or 0) + (peer["spread"] or 0) else said


def course(case: Case, what: str) -> list[float]:
    """The mean over the seeds of `loss`, `score`, `seconds` or `step` at each look of the trainings; [] without any."""
    runs: Sequence[Sequence[Mapping[str, Any]]] = [run.get("validation", []) for run in case["runs"]]
    looks = list(zip(*runs, strict=False))
    values = [[one[what] for one in look] for look in looks]
    return [statistics.fmean(look) for look in values if None not in look]

"""The settings of the quality job: the budget of each task, the methods, the grids of learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from red_kernels.finetune.base_dtype import AUTO

from ..methods import KIND_METHODS, POSITION_METHODS, QUALITY_DEFAULT, QUALITY_METHODS
from ..runs import Run
from .tasks import FOLLOWING, LANGUAGE, SENTIMENT, TASKS, Budget
from .training import check_grid

_VECTORS = (3e-3, 1e-2, 3e-2)  # methods that scale, shift or rotate existing values
_MATRICES = (3e-4, 1e-3, 3e-3)  # products of matrices
_BETWEEN = (1e-3, 3e-3, 1e-2)
_WEIGHTS = (2e-5, 6e-5, 2e-4)  # the model's own weights, or entries of them
_GRIDS = {
    **dict.fromkeys(("red", "naive", *POSITION_METHODS, *KIND_METHODS, "ia3", "road", "vera"), _VECTORS),
    **dict.fromkeys(("lowrank", "direct", "initial", "gift", "generated"), _BETWEEN),
    **dict.fromkeys(("hra", "lorta", "loretta-adp", "loretta-rep", "melora", "beft", "ln-tuning"), _BETWEEN),
    **dict.fromkeys(("lora-all", "lora-all-r1", "sara", "spt"), _MATRICES),
    "full": _WEIGHTS,
}
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    SENTIMENT: {**_GRIDS, "linear-probe": _VECTORS},
    FOLLOWING: {**_GRIDS, "linear-probe": _VECTORS},
    LANGUAGE: {**_GRIDS, "linear-probe": _WEIGHTS},  # its head is the output projection
}
# Three passes over the sentences; the results show the course of the validation loss.
SENTENCES = Budget("all-MiniLM-L6-v2", "fp32", 690, 32, 64, seeds=3, validation=5000, test=5000, search=230)
PAIRS = Budget("all-MiniLM-L6-v2", "fp32", 690, 32, 96, seeds=3, validation=5000, test=5000, search=230)
TEXTS = Budget("SmolLM2-135M-Instruct", AUTO, 120, 4, 128, seeds=3, validation=24, test=64, search=40)
_FIELDS = {SENTIMENT: "sentiment", FOLLOWING: "following", LANGUAGE: "language"}  # of the settings


@dataclass(frozen=True)
class Settings:
    """The scope of a measurement.

    Attributes:
        sentiment, following, language: the budget of each task.
        methods: in the order of measurement, after the base.
        grids: task to method to its learning rates; the fused and the eager edit share a grid.
        extend: the most rates tried beyond a grid.
        tasks: the tasks, in this order.
    """

    sentiment: Budget = SENTENCES
    following: Budget = PAIRS
    language: Budget = TEXTS
    methods: tuple[str, ...] = QUALITY_DEFAULT
    grids: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=lambda: GRIDS)
    extend: int = 2
    tasks: tuple[str, ...] = TASKS

    def __post_init__(self) -> None:
        for name in TASKS:
            self.budget(name).check(_FIELDS[name])
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
        found: Budget = getattr(self, _FIELDS[task])
        return found

    def for_run(self, run: Run) -> Settings:
        """These settings with the run's dtype instead of `auto`; a quick run has few steps, rates and items."""
        own: dict[str, Any] = {_FIELDS[name]: self.budget(name).resolved(run.resolved(AUTO)) for name in TASKS}
        resolved = replace(self, **own)
        return resolved._quick() if run.quick else resolved

    def _quick(self) -> Settings:

        def small(budget: Budget) -> Budget:
            return replace(
                budget, steps=4, batch=4, length=min(32, budget.length), seeds=1, validation=16, test=16, search=2
            )

        grids = {
            task: {name: tuple(grid[len(grid) // 2 - 1 :][:2]) for name, grid in own.items()}
            for task, own in self.grids.items()
        }
        own: dict[str, Any] = {_FIELDS[name]: small(self.budget(name)) for name in TASKS}
        return replace(self, **own, grids=grids, extend=0)
